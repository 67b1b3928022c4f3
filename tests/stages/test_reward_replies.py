"""The reward stage over single replies, and what becomes of its models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.stages.commands import (
    FAST,
    rows,
    run_stage,
    summary,
    trimtab,
    write_run_file,
)
from trimtab.core.errors import ConfigError, EngineError
from trimtab.core.hub import reward_facts
from trimtab.core.types import Message, Prompt, Rollout, SteppedResponse
from trimtab.data.chat import Chat
from trimtab.math.losses.graded import ProcessLoss
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.model import RewardModel
from trimtab.rewards.process import ProcessReward
from trimtab.rewards.shaping import Length
from trimtab.stages.reward_positions import refuse_short_reward_models
from trimtab.stages.reward_replies import first_errors, graded, judge

QUESTIONS = [f"What is {i} + {i}?" for i in range(12)]


def written(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def steps_of(i, separator="\n"):
    return {"prompt": QUESTIONS[i], "completions": [f"{i} and {i}", f"#### {2 * i}"], "labels": [True, i % 2 == 0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of twelve judged replies in each form, by the loss that learns from them."""
    directory = tmp_path_factory.mktemp("judged")
    outcomes = [{"prompt": q, "completion": f"#### {i}", "label": i % 2 == 0} for i, q in enumerate(QUESTIONS)]
    ratings = [{"prompt": q, "completion": f"#### {i}", "rating": i / 4} for i, q in enumerate(QUESTIONS)]
    return {
        "process": written(directory / "steps.jsonl", map(steps_of, range(12))),
        "outcome": written(directory / "outcomes.jsonl", outcomes),
        "regression": written(directory / "ratings.jsonl", ratings),
    }


def settings(model, data, loss, **changed):
    found = {"model": str(model), "data": data, "held_out_data": data, "batch_size": 6, "optimizer": FAST}
    return found | {"num_epochs": 2.0, "loss": loss} | changed


def loss_of(name, **options):
    return {"name": name, **({"labels_from": "rollouts"} if name == "process" else {}), **options}


@pytest.fixture(scope="module")
def models(tmp_path_factory, base, data):
    """A process model, an outcome model and a regression, each of four updates."""
    directory = tmp_path_factory.mktemp("single")
    return {name: run_stage("reward", directory / name, **settings(base, data[name], loss_of(name))) for name in data}


@pytest.mark.parametrize("name", ["process", "outcome", "regression"])
def test_training_lowers_the_loss_and_the_directory_says_what_its_scores_mean(models, name):
    found = rows(models[name])
    assert len(found) == 4
    assert found[-1]["loss/train"] < found[0]["loss/train"]
    assert "loss/validation" in found[-1]
    facts = reward_facts(models[name] / "model")
    assert facts["reward_kind"] == name
    assert facts["reward_shift"] == 0.0
    if name == "process":
        assert facts["reward_separator"] == "\n"
        assert facts["reward_aggregate"] == "last"
    done = summary(models[name])
    assert done["num_replies"] == 12
    figure = "squared_error" if name == "regression" else "label_accuracy"
    assert done[f"{figure}_low"] <= done[figure] <= done[f"{figure}_high"]


def test_a_model_of_pairs_that_began_as_a_process_model_is_none(tmp_path, models, pairs):
    start = {"model": str(models["process"] / "model"), "data": str(pairs), "held_out": 0.3, "max_steps": 1}
    out = run_stage("reward", tmp_path / "run", **start)
    facts = reward_facts(out / "model")
    assert not {"reward_kind", "reward_separator"} & facts.keys()
    assert "reward_shift" in facts


def test_what_is_measured_of_steps_is_what_their_scores_say(models, data):
    """The first errors, from the scores of the written model at the tokens that end steps, one reply at a time."""
    path = models["process"] / "model"
    found = first = 0
    for i in range(12):
        scores = [float(x) for x in token_scores(path, *steps_in_tokens(path, i))]
        wrong = next((k for k, score in enumerate(scores) if score <= 0), -1)
        if i % 2 == 1:
            first += 1
            found += wrong == 1
    done = summary(models["process"])
    assert done["first_error_accuracy_n"] == first
    assert done["first_error_accuracy"] == pytest.approx(found / first)
    assert done["right_fraction"] == pytest.approx(18 / 24)


def steps_in_tokens(path, i):
    row = steps_of(i)
    return row["prompt"], "\n".join(row["completions"]), len(row["completions"][0]) + 1


def token_scores(path, prompt, reply, end_of_first):
    """The head at the token that completes the first step and at the end token, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    turns = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    first = next(k for k in range(1, len(ids)) if len(tokenizer.decode(ids[:k])) >= end_of_first) - 1
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([before + ids])).last_hidden_state[0]
        return model.score(states).squeeze(-1)[[len(before) + first, -1]]


def refused(out, **run):
    result = trimtab("reward", write_run_file(out / "run.toml", run), "--out", out / "none")
    assert result.exit_code == 2, result.output
    assert not (out / "none" / "metrics.jsonl").exists()
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "process"}, "nothing says who labelled the steps"),
        ({"members": 2}, "members with the loss ProcessLoss"),
        ({"demonstrations": "world:arithmetic?num=4"}, "demonstrations with the loss ProcessLoss"),
        ({"loss": loss_of("process", separator=" ")}, "cuts their text into"),
        ({"loss": "outcome"}, "not LabelledResponse"),
        ({"loss": loss_of("process", separator="")}, "separator is empty"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_training(tmp_path, base, data, changed, said):
    assert said in refused(tmp_path, **settings(base, data["process"], loss_of("process")) | changed)


def test_replies_of_one_step_are_refused_with_the_outcome_model_as_the_way(tmp_path, base):
    rows_of_one = [{"prompt": q, "completions": ["#### 1"], "labels": [1]} for q in QUESTIONS]
    path = written(tmp_path / "steps.jsonl", rows_of_one)
    said = refused(tmp_path, **settings(base, path, loss_of("process")))
    assert "each of 12 replies has one step" in said
    assert "loss = 'outcome'" in said


@pytest.mark.parametrize(
    ("loss", "judged", "said"),
    [
        ("outcome", {"completion": "#### 1", "label": "yes"}, "every label of 12 replies to train on is 1"),
        ("outcome", {"completion": "#### 1", "label": False}, "every label of 12 replies to train on is 0"),
        ("regression", {"completion": "#### 1", "rating": 4}, "every rating of 12 replies to train on is 4"),
        ("process", {"completions": ["1", "#### 1"], "labels": [False, None]}, "every label of 12 replies to train on"),
    ],
)
def test_labels_that_are_all_one_teach_nothing_and_are_refused(tmp_path, base, loss, judged, said):
    path = written(tmp_path / "judged.jsonl", [{"prompt": question} | judged for question in QUESTIONS])
    found = refused(tmp_path, **settings(base, path, loss_of(loss)))
    assert said in found
    assert "give replies of both kinds" in found


def test_replies_that_are_judged_and_trained_on_are_counted(models):
    assert all(summary(out)["counts"]["held_out_prompts_trained_on"] == 12 for out in models.values())


def test_an_encoder_cannot_score_steps(tmp_path, encoder, data):
    assert "none at a token within it" in refused(tmp_path, **settings(encoder, data["process"], loss_of("process")))
    run_stage("reward", tmp_path / "run", **settings(encoder, data["regression"], "regression", num_epochs=1.0))


def test_steps_that_hold_the_separator_can_be_left_out_and_are_counted(tmp_path, base):
    found = [*map(steps_of, range(11)), {"prompt": "Go?", "completions": ["a\nb", "c"], "labels": [1, 1]}]
    path = written(tmp_path / "steps.jsonl", found)
    out = run_stage("reward", tmp_path / "run", **settings(base, path, loss_of("process"), on_bad_row="drop"))
    assert summary(out)["counts"]["dropped_separator_in_step"] == 2  # it is in the data and in the held-out data


def test_an_adapter_says_it_beside_its_weights_and_is_read_the_same_on_a_shared_base(tmp_path, base, data):
    changed = {"adapter": {"rank": 2}, "max_steps": 1}
    out = run_stage("reward", tmp_path / "run", **settings(base, data["process"], loss_of("process"), **changed))
    assert reward_facts(out / "model")["reward_kind"] == "process"
    options, found = {"token_budget": 4096}, [reply("a\nb", out)]
    rewards = [ProcessReward(path=str(out / "model"))]
    shared = load_rewards(rewards, shared=load_causal(base), base=str(base), **options)
    torch.testing.assert_close(shared.score(found)[0], load_rewards(rewards, **options).score(found)[0])


# --- its use ---


def reply(text, run, prompt="What is 2 + 2?"):
    chat = Chat(load_tokenizer(run / "model"))
    asked = Prompt(messages=(Message("user", prompt),))
    ids = tuple(chat.encode_response(text))
    return Rollout(
        prompt=asked,
        response=text,
        prompt_ids=tuple(chat.encode_prompt(asked.messages)),
        response_ids=ids,
        logprobs=(-1.0,) * len(ids),
        finish_reason="stop",
    )


TEXTS = ["2 and 2\n#### 4", "2 and 2\n3 and 1\n#### 4", "#### 4"]


def probabilities(run, text):
    """The probability of each step, the reply read alone by transformers."""
    ends, at = [], 0
    for piece in text.split("\n")[:-1]:
        at += len(piece) + 1
        ends.append(at)
    found = [token_scores(run / "model", "What is 2 + 2?", text, end) for end in ends]
    found = [float(x[0].sigmoid()) for x in found]
    return [*found, float(token_scores(run / "model", "What is 2 + 2?", text, 1)[1].sigmoid())]


@pytest.mark.parametrize(
    ("how", "slow"),
    [
        ("last", lambda p: p[-1]),
        ("min", min),
        ("product", lambda p: float(torch.tensor(p).prod())),
        ("mean", lambda p: sum(p) / len(p)),
        (None, lambda p: p[-1]),  # labels from rollouts
    ],
)
def test_the_reward_is_the_aggregate_of_the_steps_as_transformers_reads_them(models, how, slow):
    run = models["process"]
    rewards, metrics = (
        ProcessReward(path=str(run / "model"), aggregate=how)
        .load(token_budget=64)
        .score([reply(text, run) for text in TEXTS])
    )
    assert rewards.tolist() == pytest.approx([slow(probabilities(run, text)) for text in TEXTS], rel=1e-5)
    assert metrics["reward/process_steps"].value == 2
    assert metrics["reward/process_one_step_fraction"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("how", ["last", "min", "product", "mean"])
def test_differences_pay_steps_where_they_end_and_add_up_to_the_reward(models, how):
    run = models["process"]
    found = [reply(text, run) for text in TEXTS]
    options = {"path": str(run / "model"), "aggregate": how}
    total = ProcessReward(**options).load(token_budget=4096).score(found)[0]
    paid = ProcessReward(**options, credit="differences").load(token_budget=4096).score(found)[0]
    assert len(paid) == sum(len(r.response_ids) for r in found)
    parts = torch.split(paid, [len(r.response_ids) for r in found])
    num_paid = [int((part != 0).sum()) for part in parts]
    assert num_paid == [2, 3, 1] or (how == "min" and num_paid <= [2, 3, 1])  # a step above the minimum adds nothing
    torch.testing.assert_close(torch.stack([part.sum() for part in parts]), total)


def test_steps_are_paid_by_themselves_if_asked(models):
    run = models["process"]
    found = [reply(text, run) for text in TEXTS]
    paid = ProcessReward(path=str(run / "model"), credit="steps").load(token_budget=4096).score(found)[0]
    parts = torch.split(paid, [len(r.response_ids) for r in found])
    for text, part in zip(TEXTS, parts, strict=True):
        assert part[part != 0].tolist() == pytest.approx(probabilities(run, text), rel=1e-5)
        assert part[-1] != 0


def test_beside_a_reward_of_whole_replies_the_last_token_gets_that(models):
    run = models["process"]
    found = [reply(text, run) for text in TEXTS]
    process = ProcessReward(path=str(run / "model"), credit="differences", weight=2.0)
    length = Length(max_tokens=4, per_token=1.0, most=100.0)
    both = load_rewards([process, length], token_budget=4096)
    total, by_name, _ = both.score_parts(found)
    torch.testing.assert_close(total, 2 * by_name["process"] + by_name["length"])
    paid = torch.split(both.score(found)[0], [len(r.response_ids) for r in found])
    torch.testing.assert_close(torch.stack([part.sum() for part in paid]), total)
    alone = process.load(token_budget=4096).score(found)[0].split([len(r.response_ids) for r in found])
    for part, steps, of_length in zip(paid, alone, by_name["length"], strict=True):
        torch.testing.assert_close(part[:-1], 2 * steps[:-1])
        torch.testing.assert_close(part[-1], 2 * steps[-1] + of_length)


def test_replies_in_a_file_are_scored_step_by_step(models, pairs, tmp_path):
    path, data, out = models["process"] / "model", tmp_path / "replies.jsonl", tmp_path / "scored.jsonl"
    found = [steps_of(i) for i in range(4)]
    replies = [{"prompt": row["prompt"], "completion": "\n".join(row["completions"])} for row in found]
    written(data, replies)
    done = trimtab("score", "--model", path, "--data", data, "--out", out)
    assert done.exit_code == 0, done.output
    for i, row in enumerate(rows(tmp_path, out.name)):
        expected = token_scores(path, *steps_in_tokens(path, i)).sigmoid().tolist()
        assert row["step_rewards"] == pytest.approx(expected, abs=1e-5)
        assert row["reward"] == pytest.approx(expected[-1], abs=1e-5)
        assert row["response"] == replies[i]["completion"]
    refused = trimtab("score", "--model", path, "--data", pairs)
    assert refused.exit_code == 2
    assert "score replies of a file by it: trimtab score" in refused.output


def test_a_separator_that_never_occurs_is_refused_by_name(models):
    run = models["process"]
    scorer = ProcessReward(path=str(run / "model")).load(token_budget=4096)
    with pytest.raises(EngineError, match=r"'.n' does not occur between two steps in any of 2 replies") as caught:
        scorer.score([reply("#### 4", run), reply("4", run)])
    assert "outcome model" in caught.value.fix


def test_later_replies_of_one_step_are_counted_and_end_no_run(models):
    """A greedy baseline, a round of replacements or a check of the guard may be a few such replies."""
    run = models["process"]
    scorer = ProcessReward(path=str(run / "model")).load(token_budget=4096)
    scorer.score([reply(text, run) for text in TEXTS])
    rewards, metrics = scorer.score([reply("#### 4", run)])
    assert rewards.tolist() == pytest.approx(probabilities(run, "#### 4"), rel=1e-5)
    assert metrics["reward/process_one_step_fraction"].value == 1


def test_a_step_that_an_environment_ended_is_paid_at_the_token_before_that(models):
    run = models["process"]
    whole = reply(TEXTS[1], run)
    scorer = ProcessReward(path=str(run / "model"), credit="steps").load(token_budget=4096)
    plain = scorer.score([whole])[0]
    first, second, last = plain.nonzero().flatten().tolist()
    assert second - first > 1
    written = {"observations": ((first, first + 1),), "logprobs": (-1.0,) * (len(plain) - 1)}
    paid = scorer.score([Rollout(**vars(whole) | written)])[0]
    assert paid.nonzero().flatten().tolist() == [first - 1, second - 1, last - 1]
    torch.testing.assert_close(paid[[first - 1, second - 1, last - 1]], plain[[first, second, last]])


def test_a_first_wrong_step_counts_if_all_steps_before_it_were_judged():
    """Scores and labels of judged steps by hand. If earlier steps were not judged, nobody knows which is the first."""
    right, wrong = 1.0, -1.0
    scores = [[right, wrong], [wrong], [right, wrong], [right], [wrong, right]]
    labels = [[1.0, 0.0], [0.0], [1.0, 0.0], [1.0], [0.0, 1.0]]
    gaps = [None, 0, 1, None, 1]  # the second has unjudged steps before its label, the third one between its labels
    found = first_errors([np.array(x) for x in scores], [np.array(x) for x in labels], gaps)
    assert (found["first_error_accuracy_n"], found["first_error_accuracy"]) == (2, 1.0)  # the first and the last
    assert (found["no_error_accuracy_n"], found["no_error_accuracy"]) == (1, 1.0)
    every = first_errors([np.array(x) for x in scores], [np.array(x) for x in labels])
    assert every["first_error_accuracy_n"] == 4


def test_scores_that_are_no_numbers_are_no_judgement_and_full_marks_are_not_certain(models, tmp_path):
    chat = Chat(load_tokenizer(models["process"] / "model"))
    model = ScalarModel(load_scalar(models["process"] / "model"), pad_id=chat.pad_id, gives="both")
    how = SimpleNamespace(
        loss=ProcessLoss(labels_from="people"), max_tokens=256, on_too_long="drop", on_bad_row="stop", token_budget=64
    )
    always = [SteppedResponse(prompt=Prompt(messages=(Message("user", q),)), steps=("a", "b"), labels=(1.0, 1.0))
              for q in QUESTIONS]  # fmt: skip
    replies = graded(always, chat, how, {})
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    found = judge(model, replies, how)
    assert found["label_accuracy"] == 0
    assert (found["label_accuracy_low"], found["label_accuracy_high"]) == pytest.approx((0, 0.2425), abs=1e-3)  # Wilson
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="24 of 24 rewards are not finite"):
        judge(model, replies, how)


def test_each_kind_of_model_is_refused_as_another(models, reward_run):
    with pytest.raises(ConfigError, match="a model of pairs"):
        ProcessReward(path=str(reward_run / "model")).load(token_budget=64)
    with pytest.raises(ConfigError, match="an outcome model"):
        ProcessReward(path=str(models["outcome"] / "model")).load(token_budget=64)
    with pytest.raises(ConfigError, match="a regression on ratings"):
        ProcessReward(path=str(models["regression"] / "model")).load(token_budget=64)
    with pytest.raises(EngineError, match="this is a process reward model") as caught:
        RewardModel(path=str(models["process"] / "model")).load(token_budget=64)
    assert "'process'" in caught.value.fix
    path = str(models["process"] / "model")
    result = trimtab("average", models["process"] / "average", path, path, "--data", "none.jsonl")
    assert "a reward model of the kind 'process'" in " ".join(result.output.split())


def test_steps_cannot_be_paid_in_another_vocabulary(models):
    run = models["process"]
    scorer = ProcessReward(path=str(run / "model"), credit="differences").load(token_budget=4096)
    foreign = reply("a\nb", run)
    foreign = Rollout(**vars(foreign) | {"prompt_ids": (1,), "response_ids": foreign.response_ids[:1] * 9})
    with pytest.raises(EngineError, match="reads a reply as other tokens than the policy wrote"):
        scorer.score([foreign])


def test_a_process_model_that_cannot_read_the_longest_reply_is_refused_before_training(models):
    scorer = ProcessReward(path=str(models["process"] / "model")).load(token_budget=4096)
    scorer.scorer.positions = 20
    prompts = [reply("a", models["process"]).prompt]
    with pytest.raises(ConfigError, match="the reward model has learned 20"):
        refuse_short_reward_models([scorer], prompts, scorer.scorer.chat, max_new_tokens=64)


def test_an_aggregate_of_steps_that_are_paid_apart_is_refused():
    with pytest.raises(ValueError, match='credit = "steps"'):
        ProcessReward(path="x", credit="steps", aggregate="min")
