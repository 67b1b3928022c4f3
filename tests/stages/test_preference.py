"""The preference stage through the command line, against plain transformers."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.preference_batches import LOSSES, make
from tests.stages.commands import FAST, rows, run_stage, summary, trimtab, without_times, write_run_file
from tests.stages.test_resume import differences, kill_after, num_rows, start, wait_for_rows
from trimtab import cli
from trimtab.core import config
from trimtab.core.hub import base_of
from trimtab.data.chat import Chat
from trimtab.math.losses.preference.pairs import DPO
from trimtab.math.losses.preference.replies import KTO
from trimtab.models.adapters import LoRA
from trimtab.models.load import load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stages import plan
from trimtab.stages.preference import PreferenceSettings, late_reference, say_balance
from trimtab.stages.sft import start_policy
from trimtab.stats import wilson

FASTER = FAST | {"learning_rate": 1e-2}


def settings(model, data, **changed):
    return {"model": str(model), "data": str(data), "held_out": 0.3, "batch_size": 8, "optimizer": FAST} | changed


def logprob(model, tokenizer, prompt, reply):
    """log pi(reply | prompt) by plain transformers, the end token included."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    before = len(tokenizer.apply_chat_template(turns[:1], return_dict=False, add_generation_prompt=True))
    last = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[t - 1, ids[t]]) for t in range(before, last + 1))


@pytest.fixture(scope="module")
def tied(tmp_path_factory, pairs):
    """The pairs of the fixture with two more for the first prompt."""
    first = json.loads(pairs.read_text().splitlines()[0])
    more = [first | {"rejected": "Maybe."}, first | {"chosen": "Maybe.", "margin": 0.1}]
    path = tmp_path_factory.mktemp("preference") / "pairs.jsonl"
    path.write_text(pairs.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, pairs):
    """The replies of the pairs with thumbs: every chosen one, every second rejected one."""
    path = tmp_path_factory.mktemp("preference") / "labelled.jsonl"
    lines = []
    for i, line in enumerate(pairs.read_text().splitlines()):
        row = json.loads(line)
        lines.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        if i % 2:
            lines.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory, base, pairs):
    out = tmp_path_factory.mktemp("preference") / "dpo"
    return run_stage("preference", out, **settings(base, pairs, num_epochs=2))


def assert_nothing_has_moved(first):
    """The first update of DPO starts from its reference: exactly, and not up to rounding."""
    assert first["loss/train"] == float(torch.tensor(math.log(2), dtype=torch.float32))
    assert first["policy/margin"] == 0.0
    assert first["policy/accuracy"] == 0.5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changed", [{}, {"token_budget": 100}, {"adapter": {"rank": 2}, "token_budget": 100}])
def test_the_first_loss_is_exactly_log_2_in_every_precision(tmp_path, base, pairs, precision, changed):
    changed = changed | {"precision": precision, "max_steps": 1}
    out = run_stage("preference", tmp_path / "run", **settings(base, pairs, **changed))
    assert_nothing_has_moved(rows(out)[0])


def test_it_trains_a_model_and_says_how_it_orders_held_out_pairs(dpo_run):
    found = rows(dpo_run)
    assert_nothing_has_moved(found[0])
    assert found[-1]["loss/train"] < found[0]["loss/train"]
    assert found[-1]["policy/validation_accuracy"] == 1.0
    assert {"policy/chosen_reward", "policy/rejected_reward", "policy/margin"} <= summary(dpo_run).keys()
    assert summary(dpo_run)["counts"]["margins_not_used"] > 0
    card = summary(dpo_run)
    assert card["accuracy_low"] <= card["accuracy"] == 1.0 == card["accuracy_high"]
    assert 0 < card["num_held_out"] < 20
    AutoModelForCausalLM.from_pretrained(dpo_run / "model")


def test_its_page_shows_accuracy_and_margin(dpo_run):
    page = (dpo_run / "report.html").read_text()
    for words in ("Accuracy", "Margin", "Implied reward", "held-out preferences"):
        assert words in page, words


def test_the_first_loss_is_dpo_by_plain_transformers(tmp_path, base, other, tied):
    """With another reference, margins and soft labels, and several pairs of one prompt."""
    loss = {"name": "dpo", "beta": 0.3, "margin_coef": 0.5}
    changed = {"batch_size": 100, "held_out_data": str(tied), "reference": str(other), "loss": loss}
    out = run_stage("preference", tmp_path / "run", **settings(base, tied, **changed))
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, other))
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for line in tied.read_text().splitlines():
        row = json.loads(line)
        chosen, rejected = (
            logprob(policy, tokenizer, row["prompt"], row[side])
            - logprob(reference, tokenizer, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        )
        x, q = 0.3 * (chosen - rejected) - 0.5 * row.get("margin", 0.0), row.get("label", 1.0)
        losses.append(q * math.log1p(math.exp(-x)) + (1 - q) * math.log1p(math.exp(x)))
    assert rows(out)[0]["loss/train"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_kto_by_plain_transformers(tmp_path, base, other, labelled):
    """Each prompt's baseline is taken with the replies to the prompt half the set away."""
    loss = {"name": "kto", "beta": 0.2, "desirable_weight": 0.8}
    changed = {"batch_size": 100, "held_out_data": str(labelled), "reference": str(other), "loss": loss}
    out = run_stage("preference", tmp_path / "run", **settings(base, labelled, **changed))
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, other))
    tokenizer = AutoTokenizer.from_pretrained(base)

    def ratio(prompt, reply):
        return logprob(policy, tokenizer, prompt, reply) - logprob(reference, tokenizer, prompt, reply)

    by_prompt = {}
    for line in labelled.read_text().splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append((row["completion"], row["label"]))
    prompts = list(by_prompt)
    mixed = [
        ratio(prompt, reply)
        for i, prompt in enumerate(prompts)
        for reply, _ in by_prompt[prompts[(i + len(prompts) // 2) % len(prompts)]]
    ]
    z = max(0.0, sum(mixed) / len(mixed))
    losses = [
        0.8 / (1 + math.exp(0.2 * (ratio(p, r) - z))) if good else 1 / (1 + math.exp(-0.2 * (ratio(p, r) - z)))
        for p, replies in by_prompt.items()
        for r, good in replies
    ]
    first = rows(out)[0]
    assert first["policy/baseline"] == pytest.approx(z, rel=1e-4, abs=1e-5)
    assert first["loss/train"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_from_the_command_line(tmp_path, base, pairs, name):
    out = run_stage("preference", tmp_path / "run", **settings(base, pairs, loss=name, max_steps=2))
    assert len(rows(out)) == 2
    assert summary(out)["num_steps"] == 2
    assert "loss/validation" in rows(out)[-1]
    assert (tmp_path / ".reference").exists() == make(name).needs_reference


def test_what_a_loss_has_no_place_for_is_counted(tmp_path, base, pairs):
    out = run_stage("preference", tmp_path / "run", **settings(base, pairs, loss="aot", max_steps=1, held_out=0.0))
    counts = summary(out)["counts"]
    assert counts["margins_not_used"] == 10
    assert counts["soft_labels_not_used"] == 7
    loss = {"name": "dpo", "margin_coef": 1.0}
    out = run_stage("preference", tmp_path / "other", **settings(base, pairs, loss=loss, max_steps=1))
    assert not {"margins_not_used", "soft_labels_not_used"} & summary(out)["counts"].keys()


def test_pairs_that_are_all_even_are_refused(tmp_path, base, pairs):
    rows_even = [json.loads(line) | {"label": 0.5} for line in pairs.read_text().splitlines()]
    even = tmp_path / "even.jsonl"
    even.write_text("".join(json.dumps(row) + "\n" for row in rows_even))
    run_file = write_run_file(tmp_path / "run.toml", settings(base, even, loss="kto"))
    refused = trimtab("preference", run_file, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "pairs to train on have the label 0.5: nothing says which reply is better" in refused.output


def test_good_and_bad_replies_that_weigh_unevenly_are_said(tmp_path, base, labelled):
    run_file = write_run_file(tmp_path / "run.toml", settings(base, labelled, loss="kto", max_steps=1, held_out=0.0))
    said = trimtab("preference", run_file, "--out", tmp_path / "run").output
    assert "20 good and 10 bad replies weigh as 2.00 to 1" in said
    evened = trimtab("preference", run_file, "loss.undesirable_weight=2", "--out", tmp_path / "even").output
    assert "weigh as" not in evened


# --- the reference ---


def test_a_second_run_reads_what_the_first_one_kept_and_ends_the_same(tmp_path, base, pairs):
    one = run_stage("preference", tmp_path / "one", **settings(base, pairs))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".reference").iterdir()}
    other = run_stage("preference", tmp_path / "other", **settings(base, pairs, loss={"name": "dpo"}))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".reference").iterdir()} == kept
    assert not differences(one, other)


def test_another_length_limit_or_epoch_finds_its_own(tmp_path, base, pairs):
    def kept():
        return {path.name for path in (tmp_path / "cache").iterdir()}

    cache = {"reference_cache": str(tmp_path / "cache"), "max_steps": 2}
    run_stage("preference", tmp_path / "one", **settings(base, pairs, **cache))
    first = kept()
    run_stage("preference", tmp_path / "two", **settings(base, pairs, **cache, max_tokens=30))
    assert len(kept()) > len(first)
    before = kept()
    run_stage("preference", tmp_path / "three", **settings(base, pairs, **cache, num_epochs=3, batch_size=4))
    assert kept() > before  # only the examples of the steps taken are read


def test_examples_find_their_own_reference_in_any_order(tmp_path, base, other, pairs):
    """Each pair's first reward is that of its own replies, shuffled over two epochs or in the order of the data."""
    changed = {"reference": str(other), "held_out": 0.0, "optimizer": {"learning_rate": 1e-12}, "batch_size": 5}
    shuffled = run_stage("preference", tmp_path / "a", **settings(base, pairs, **changed, num_epochs=2))
    in_order = run_stage("preference", tmp_path / "b", **settings(base, pairs, **changed, shuffle=False))
    means = [
        [sum(r["policy/margin"] for r in part) / len(part) for part in (rows(shuffled)[:4], rows(shuffled)[4:])],
        [sum(r["policy/margin"] for r in rows(in_order)) / 4] * 2,
    ]
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    assert abs(means[0][0]) > 1e-3


def test_a_new_adapter_s_reference_is_its_base(tmp_path, base, pairs):
    """Which is the model that a run without an adapter starts from: the kept log-probabilities serve both."""
    full = run_stage("preference", tmp_path / "full", **settings(base, pairs))
    kept = {path.name for path in (tmp_path / ".reference").iterdir()}
    out = run_stage("preference", tmp_path / "run", **settings(base, pairs, adapter={"rank": 4}, optimizer=FASTER))
    assert {path.name for path in (tmp_path / ".reference").iterdir()} == kept
    assert base_of(out / "model") == str(base)
    first = rows(out)[0]
    assert first["policy/margin"] == pytest.approx(0.0, abs=1e-6)
    assert first["policy/chosen_logprobs"] == pytest.approx(rows(full)[0]["policy/chosen_logprobs"], rel=1e-6)
    assert rows(out)[-1]["loss/validation"] < math.log(2)


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory, base):
    out = tmp_path_factory.mktemp("preference") / "sft"
    changed = {"batch_size": 4, "adapter": {"rank": 4}, "optimizer": FASTER}
    return run_stage("sft", out, model=str(base), data="world:arithmetic?num=24", **changed) / "model"


@pytest.mark.parametrize("adapter", [{"rank": 4}, None])
def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path, base, trained_adapter, pairs, adapter):
    """trl#4723, #6043, #6591: the reference was the base, with the trained adapter off."""
    changed = {} if adapter is None else {"adapter": adapter}
    out = run_stage("preference", tmp_path / "run", **settings(trained_adapter, pairs, **changed, max_steps=1))
    first = rows(out)[0]
    assert first["policy/margin"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss/train"] == pytest.approx(math.log(2), rel=1e-5)
    to_base = run_stage(
        "preference", tmp_path / "base", **settings(trained_adapter, pairs, **changed, reference=str(base), max_steps=1)
    )
    assert abs(rows(to_base)[0]["policy/chosen_reward"]) > 1e-2


@pytest.mark.parametrize(("good", "bad", "missing"), [(8, 0, "bad"), (0, 8, "good")])
def test_replies_of_one_kind_only_are_said_to_teach_no_difference(good, bad, missing, capsys):
    say_balance(SimpleNamespace(totals=(good, bad)), KTO())
    said = capsys.readouterr().err
    assert f"{good} good and {bad} bad replies: no {missing} reply counts" in said
    assert "to 1" not in said


def test_activation_checkpoints_and_precision_are_settings(tmp_path, base, pairs):
    plain = run_stage("preference", tmp_path / "plain", **settings(base, pairs, loss="bco"))
    kept = run_stage("preference", tmp_path / "kept", **settings(base, pairs, loss="bco", checkpoint_activations=True))
    for one, other in zip(without_times(rows(plain)), without_times(rows(kept)), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    half = run_stage("preference", tmp_path / "half", **settings(base, pairs, precision="bfloat16"))
    assert rows(half)[0]["loss/train"] == pytest.approx(math.log(2), rel=1e-3)


# --- resume and mistakes ---


def test_killed_once_and_run_again_it_ends_with_the_same_bits(tmp_path, base, other, pairs):
    """The second process finds what the first one read with the reference; the undisturbed run has read its own."""
    cosine = FAST | {"schedule": "cosine", "warmup_fraction": 0.3}
    chosen = {"batch_size": 3, "checkpoint_every": 1, "validate_every": 2, "optimizer": cosine, "loss": "kto"}
    chosen = settings(base, pairs, **chosen, reference=str(other))
    undisturbed = run_stage("preference", tmp_path / "a" / "undisturbed", **chosen)
    run_file, out = write_run_file(tmp_path / "run.toml", chosen), tmp_path / "b" / "run"
    process = start("preference", run_file, out)
    wait_for_rows(process, out, 2)
    assert kill_after(process, 0.01), "it was to be killed at work"
    assert num_rows(out) >= 2
    run_stage("preference", out, **chosen)
    assert not differences(undisturbed, out)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "dop"}, "did you mean 'dpo'"),
        ({"loss": {"name": "dpo", "beta": -1.0}}, "beta = -1.0; it must be above 0"),
        ({"loss": {"name": "simpo", "gama": 1.0}}, "gamma"),
        ({"max_tokens": 8, "on_too_long": "drop"}, "no example is left"),
        ({"loss": "kto", "limit": 1, "held_out": 0.0}, "a single prompt to train on"),
    ],
)
def test_mistakes_are_answered(tmp_path, base, pairs, changed, said):
    run_file = write_run_file(tmp_path / "run.toml", settings(base, pairs, **changed))
    result = trimtab("preference", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.output


def test_a_pair_loss_says_what_it_needs_of_labelled_replies(tmp_path, base, labelled):
    run_file = write_run_file(tmp_path / "run.toml", settings(base, labelled))
    result = trimtab("preference", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "LabelledResponse" in result.output


def test_the_shipped_run_file_is_one_of_this_stage():
    file = cli.examples_dir() / "hh" / "dpo.toml"
    found = config.resolve(PreferenceSettings, config.load_run_file(file), where=str(file))
    assert found.loss == DPO(beta=0.1)
    assert found.data.startswith("hub:Anthropic/hh-rlhf?data_dir=harmless-base")


def test_a_plan_counts_the_reading_of_the_reference(tmp_path, base, pairs):
    found = {}
    for name in ("dpo", "simpo"):
        table = settings(base, pairs, batch_size=2, loss=name) | {"stage": "preference"}
        directory = run_stage("preference", tmp_path / name, **settings(base, pairs, batch_size=2, loss=name))
        values = {**summary(directory), "seconds": 0.0}
        (directory / "summary.json").write_text(json.dumps(values))
        resolved = config.resolve(PreferenceSettings, {k: v for k, v in table.items() if k != "stage"}, where="a test")
        found[name] = plan.estimate(name, "preference", resolved, directory, share_of_data=1.0)
    for name, of_reference in (("dpo", 1 / 3), ("simpo", 0.0)):
        steps = [row["time/step_seconds"] for row in rows(tmp_path / name)]
        planned = found[name].seconds_per_step * len(steps)
        assert found[name].seconds == pytest.approx(planned * (1 + of_reference) - sum(steps), abs=1e-9)
        assert found[name].num_steps == len(steps)
        assert found[name].weights_gb


def test_help_lists_the_settings_that_losses_share():
    said = trimtab("preference", "--help").output
    for words in ("loss.ld_alpha", "[simpo]", "[kto]", "loss.nll_coef", "divergence"):
        assert words in said, words


def test_held_out_pairs_with_even_votes_only_have_no_accuracy_and_no_traceback(tmp_path, base, pairs):
    row = json.loads(pairs.read_text().splitlines()[0]) | {"label": 0.5}
    row.pop("margin", None)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(row) + "\n")
    values = settings(base, pairs, max_steps=1, held_out_data=str(held_out)) | {"held_out": 0.0}
    found = summary(run_stage("preference", tmp_path / "run", **values))
    assert found["num_held_out"] == 0
    assert found["accuracy"] is None


def test_the_interval_counts_each_prompt_once(tmp_path, base, tied):
    found = summary(run_stage("preference", tmp_path / "run", **settings(base, tied, max_steps=1, held_out=0.5)))
    assert found["accuracy_high"] - found["accuracy_low"] > 0
    one_prompt = {"prompt": "p", "chosen": "a"}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(one_prompt | {"rejected": f"b{i}"}) + "\n" for i in range(9)))
    values = settings(base, tied, max_steps=1, held_out_data=str(held_out)) | {"held_out": 0.0}
    found = summary(run_stage("preference", tmp_path / "other", **values))
    assert found["num_held_out"] == 9
    assert found["accuracy_high"] - found["accuracy_low"] == pytest.approx(
        wilson(found["accuracy"], 1).high - wilson(found["accuracy"], 1).low
    )


def test_asking_the_reference_leaves_the_mode_of_each_block_as_it_was(base):
    """Blocks that train with checkpointing are in another mode than the model around them."""
    chat = Chat(load_tokenizer(base))
    policy, _ = start_policy(str(base), LoRA(rank=2), chat, seed=0)
    for number, module in enumerate(policy.model.modules()):
        module.training = number % 2 == 1
    modes = [m.training for m in policy.model.modules()]
    values = {"model": str(base), "data": "pairs.jsonl", "adapter": {"rank": 2}}
    settings = config.resolve(PreferenceSettings, values, where="the test")
    with late_reference(settings, policy, Policy(policy.model, pad_id=chat.pad_id), chat)() as reference:
        assert not any(m.training for m in reference.model.modules())
    assert [m.training for m in policy.model.modules()] == modes
