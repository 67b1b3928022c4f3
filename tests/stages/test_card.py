"""The card of a reward model through the command line, and beside the model that the reward stage wrote."""

import json
import shutil
from importlib.resources import files

import jsonschema
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.models.test_save import ENDS_IN_EOS, tokenizer, write_base
from tests.stages.commands import FAST, run_stage, summary, trimtab
from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.reports.card_sentences import cautions
from trimtab.rewards.scorer import RewardModelScorer
from trimtab.stages.card import rewards_of_sides

SCHEMA = json.loads((files("trimtab.evals") / "reward_card.schema.json").read_text(encoding="utf-8"))


def card_in(directory):
    """The card in a directory, which has to fit the schema."""
    card = json.loads((directory / "reward_card.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(card)
    return card


def judged(tmp_path, *words):
    result = trimtab("card", *words, "--out", tmp_path / "card")
    assert result.exit_code == 0, result.output
    return card_in(tmp_path / "card"), result.output


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """Twelve pairs over six prompts, in two slices, with replies of several sentences."""
    path = tmp_path_factory.mktemp("card") / "sliced.jsonl"
    lines = []
    for i in range(12):
        row = {"prompt": f"What is {i // 2} + 1?", "chosen": f"It is {i // 2 + 1}. I am sure.", "rejected": f"No. {i}"}
        lines.append(json.dumps(row | {"facts": {"topic": "even" if i % 4 < 2 else "odd"}}) + "\n")
    path.write_text("".join(lines))
    return path


def test_replies_that_are_the_same_to_the_model_are_a_tie(tmp_path):
    """Rounding would decide between them if the sides were scored in two calls, with other texts beside them."""
    trims = ENDS_IN_EOS.replace("m.content", "m.content | trim")
    base = write_base(tmp_path / "base", tokenizer(["<unk>", "</s>"], trims, eos_token="</s>", unk_token="<unk>"))
    model = load_scalar(base, head_seed=0)
    model.config.update({"reward_shift": 0.0})
    save_model(model, load_tokenizer(base), tmp_path / "reward")
    asked = [Prompt(messages=(Message("user", f"What is {i} + 1?"),)) for i in range(30)]
    said = [("It is so." + " so" * i, "It is so." + " so" * i + " ") for i in range(30)]
    said += [("word " * (i % 7) + "yes", "no" * (i % 9 + 1)) for i in range(30)]
    pairs = [PreferencePair(prompt=p, chosen=a, rejected=b) for p, (a, b) in zip(asked * 2, said, strict=True)]
    scorer = RewardModelScorer.from_directory(str(tmp_path / "reward"), token_budget=200)
    chosen, rejected = rewards_of_sides(scorer, pairs)
    assert (chosen[:30] == rejected[:30]).all()
    assert (chosen[30:] != rejected[30:]).all()


def test_the_schema_is_one_and_refuses_what_a_card_is_not():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate({"version": 1, "accuracy": 0.5})


def test_the_reward_stage_writes_the_card_beside_its_model(reward_run):
    card, known = card_in(reward_run), summary(reward_run)
    assert card.items() >= {name: known[name] for name in card.keys() & known.keys()}.items()
    assert {"accuracy", "styles", "degenerate", "calibrated", "shuffled_replies"} <= card.keys() & known.keys()
    assert card["model"] == str(reward_run / "model")
    assert len(card["model_sha256"]) == 64


def test_the_card_of_an_ensemble_fits_the_schema_too(tmp_path, base, pairs):
    changed = {"held_out": 0.3, "batch_size": 10, "optimizer": FAST, "members": 2, "max_steps": 1}
    out = run_stage("reward", tmp_path / "run", model=str(base), data=str(pairs), **changed)
    assert len(card_in(out)["ensemble"]["accuracies"]) == 2
    of_command, _ = judged(tmp_path, out / "model", pairs)
    assert of_command["num_probed"] == 20


def test_the_command_judges_as_the_stage_did(tmp_path, base, pairs):
    changed = {"held_out_data": str(pairs), "batch_size": 10, "optimizer": FAST, "max_steps": 1}
    out = run_stage("reward", tmp_path / "run", model=str(base), data=str(pairs), **changed)
    by_stage = card_in(out)
    by_command, _ = judged(tmp_path, out / "model", pairs)
    assert by_command["model_sha256"] == by_stage["model_sha256"]
    for name in ("accuracy", "temperature", "ece", "brier", "shuffled_replies", "num_probed", "num_probes_unscored"):
        assert by_command[name] == pytest.approx(by_stage[name], abs=1e-4), name
    for name, premium in by_stage["styles"].items():
        assert by_command["styles"][name]["value"] == pytest.approx(premium["value"], abs=1e-4), name


def test_a_card_is_told_and_written_with_its_slices(tmp_path, reward_run, sliced, pairs):
    card, said = judged(tmp_path, reward_run / "model", sliced, "--slice", "topic")
    assert {name: part["count"] for name, part in card["by_slice"].items()} == {"even": 6, "odd": 6}
    assert "The reward model orders" in said
    assert "By slice: even" in said
    assert "A style adds to the reward of a reply: heading" in said
    assert card["data"] == [str(sliced)]
    both, _ = judged(tmp_path, reward_run / "model", sliced, pairs)
    assert {name: part["count"] for name, part in both["by_slice"].items()} == {str(sliced): 12, str(pairs): 20}
    page = (tmp_path / "card" / "reward_card.html").read_text(encoding="utf-8")
    for words in (
        "Accuracy by slice",
        "What a style adds",
        "Reliability",
        "Reliability at temperature",
        "The reward model orders",
    ):
        assert words in page
    told = trimtab("card", reward_run / "model", sliced, "--slice", "topic")
    assert told.output == said


def test_a_card_of_even_labels_alone_is_written_and_says_that_nothing_was_to_be_ordered(tmp_path, reward_run, sliced):
    even = tmp_path / "even.jsonl"
    even.write_text(
        "".join(json.dumps(json.loads(line) | {"label": 0.5}) + "\n" for line in sliced.read_text().splitlines())
    )
    told = trimtab("card", reward_run / "model", even, "--out", tmp_path)
    assert told.exit_code == 0, told.output
    assert "there was nothing to order, because all 12 pairs have even labels" in told.output.replace("\n", " ")
    card = card_in(tmp_path)
    assert (card["accuracy"], card["num_even"]) == (None, 12)


def test_a_constant_scorer_gets_half_and_is_called_one(tmp_path, base, sliced):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    tokenizer = load_tokenizer(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    save_model(model, tokenizer, tmp_path / "constant")
    card, said = judged(tmp_path, tmp_path / "constant", sliced)
    assert (card["accuracy"], card["shuffled_replies"], card["resembles"]) == (0.5, 0.5, "constant")
    assert "this is a constant, not a judge" in said
    assert {one["value"] for one in card["styles"].values()} == {0}


def test_pairs_that_the_model_cannot_read_are_left_out_and_counted(tmp_path, encoder, sliced, reward_run, pairs):
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    most = model.config.max_position_embeddings
    long = tmp_path / "long.jsonl"
    row = {"prompt": "What is 0 + 1?", "chosen": "word " * most, "rejected": "No."}
    long.write_text(sliced.read_text() + json.dumps(row) + "\n")
    card, said = judged(tmp_path, encoder, long)
    assert (card["num_pairs"], card["num_too_long"]) == (12, 1)
    assert "1 pairs are left out" in said
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps(row) + "\n")
    refused = trimtab("card", encoder, alone)
    assert refused.exit_code == 2
    assert f"none of 1 pairs fits into the {most} positions" in refused.output


def test_rows_that_cannot_be_used_stop_the_command_or_are_counted(tmp_path, reward_run, pairs):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs.read_text() + (json.dumps({"prompt": "Why?", "chosen": "", "rejected": "No."}) + "\n") * 9)
    refused = trimtab("card", reward_run / "model", bad)
    assert refused.exit_code == 2
    assert "chosen is empty" in refused.output
    card, said = judged(tmp_path, reward_run / "model", bad, "--on-bad-row", "drop")
    assert (card["num_pairs"], card["num_bad_rows"]) == (20, 9)
    assert "9 rows are left out" in said


def test_all_bad_rows_are_counted_and_not_the_few_that_a_summary_quotes(tmp_path, reward_run, pairs):
    bad = tmp_path / "bad.jsonl"
    empty = [json.dumps({"prompt": f"Why {i}?", "chosen": "", "rejected": "No."}) + "\n" for i in range(7)]
    bad.write_text(pairs.read_text() + "".join(empty))
    card, said = judged(tmp_path, reward_run / "model", bad, "--on-bad-row", "drop")
    assert (card["num_pairs"], card["num_bad_rows"]) == (20, 7)
    assert "7 rows are left out" in said


@pytest.mark.parametrize("value", ["high", 7, True, None, [0.5]])
def test_a_fact_that_is_no_probability_sets_no_limit_to_accuracy(tmp_path, reward_run, sliced, value):
    path = tmp_path / "facts.jsonl"
    found = [json.loads(line) for line in sliced.read_text().splitlines()]
    known = [row | {"facts": {"probability_chosen": value if i else 0.9}} for i, row in enumerate(found)]
    path.write_text("".join(json.dumps(row) + "\n" for row in known))
    card, said = judged(tmp_path, reward_run / "model", path)
    assert "bayes_accuracy" not in card
    assert "the noise of the votes" not in said


def test_pairs_that_the_model_was_trained_on_are_named(tmp_path, reward_run, pairs, sliced):
    own, said = judged(tmp_path, reward_run / "model", pairs, sliced)
    assert own["trained_on"] == [str(pairs)]
    assert f"The model was trained on {pairs}, except for what its run held out" in said
    assert cautions(own)[-1] in said
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(pairs.read_bytes())
    assert (
        f"The model was trained on {moved}" in trimtab("score", "--model", reward_run / "model", "--data", moved).output
    )
    other, said = judged(tmp_path, reward_run / "model", sliced)
    assert "trained_on" not in other
    assert "was trained on" not in said
    alone = shutil.copytree(reward_run / "model", tmp_path / "alone" / "model")  # nothing says where it is from
    (tmp_path / "settings.toml").write_text("data = 3")
    (tmp_path / "data.json").write_text("[]")
    assert "was trained on" not in trimtab("card", alone, pairs).output


def test_a_slice_that_is_a_column_is_answered_with_how_it_becomes_a_fact(tmp_path, reward_run, sliced):
    path = tmp_path / "columns.jsonl"
    found = [json.loads(line) | {"facts": {}, "topic": "even"} for line in sliced.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    refused = trimtab("card", reward_run / "model", path, "--slice", "topic")
    assert refused.exit_code == 2
    assert "topic is a column: jq -c '.facts.topic = .topic' makes a fact of it" in refused.output


def test_scores_without_the_rows_that_cannot_be_used(tmp_path, reward_run):
    path, out = tmp_path / "replies.jsonl", tmp_path / "scored.jsonl"
    path.write_text(
        '{"prompt": "Why?", "completion": "So."}\n{"prompt": "How?", "completion": ""}\n{"prompt": "Who?"}\n'
    )
    asked = ("score", "--model", reward_run / "model", "--data", path, "--out", out)
    refused = trimtab(*asked)
    assert refused.exit_code == 2
    assert "--on-bad-row drop" in refused.output
    done = trimtab(*asked, "--on-bad-row", "drop")
    assert done.exit_code == 0, done.output
    assert "2 rows are left out" in done.output
    assert len(out.read_text().splitlines()) == 1


def test_what_cannot_be_judged_is_refused(tmp_path, reward_run, base, sliced, pairs):
    for words, said in (
        ([reward_run / "model", sliced, sliced], "is given twice"),
        ([reward_run / "model", pairs, "--slice", "topic"], "20 of 20 pairs have no fact 'topic'"),
        ([base, pairs], "no trained score head"),
        ([reward_run / "model", pairs, "--out", "/proc/nope"], "reward_card.json could not be written"),
    ):
        result = trimtab("card", *words)
        assert result.exit_code == 2, result.output
        assert said in result.output
