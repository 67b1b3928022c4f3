import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.stages.commands import FAST, rows, run_stage, summary, trimtab, write_run_file
from trimtab.core.types import Message
from trimtab.data.split import place_of_prompt

TURNS = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(4)))
    return path


def settings(base, data, **changed):
    return {"model": str(base), "data": str(data), "batch_size": 8, "optimizer": FAST} | changed


def test_two_steps_and_a_validation(tmp_path, base):
    out = run_stage("sft", tmp_path / "run", **settings(base, "world:arithmetic?num=16", held_out=0.2))
    found = rows(out)
    assert len(found) == 2 == summary(out)["num_steps"]
    assert found[1]["loss/train"] < found[0]["loss/train"]
    assert "loss/validation" in found[1]
    assert "loss/validation" not in found[0]
    assert json.loads((out / "environment.json").read_text())["paths"] in ({"form": "tree"}, {"form": "tree, compiled"})


@pytest.mark.parametrize(("train_on", "replies"), [("last", ["4"]), ("all", ["2", "4"])])
def test_the_first_loss_is_the_cross_entropy_of_the_replies_trained(tmp_path, base, conversations, train_on, replies):
    out = run_stage("sft", tmp_path / "run", **settings(base, conversations, train_on=train_on, held_out=0.0))
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    ids = tokenizer.apply_chat_template(TURNS, return_dict=False)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = []
    for reply in replies:  # the reply's tokens and the end token, after the marker of its turn
        wanted = [*tokenizer(reply)["input_ids"], tokenizer.eos_token_id]
        before = tokenizer("<|assistant|>\n")["input_ids"] + wanted
        start = next(i for i in range(len(ids)) if ids[i : i + len(before)] == before) + len(before) - len(wanted)
        losses += [-float(logprobs[i - 1, ids[i]]) for i in range(start, start + len(wanted))]
    assert rows(out)[0]["loss/train"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ({"on_too_long": "drop"}, {"dropped_too_long": 1}),
        ({"on_too_long": "truncate_prompt_left"}, {"truncated_too_long": 1}),
        ({"train_on": "all"}, {"dropped_too_long": 1}),
    ],
)
def test_examples_that_are_too_long_are_counted(tmp_path, base, changed, counts):
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": text, "completion": "yes"} for text in ("short", "also short", "long " * 50)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = run_stage("sft", tmp_path / "run", **settings(base, data, max_tokens=40, held_out=0.0, **changed))
    found = summary(out)
    assert {k: v for k, v in found["counts"].items() if "long" in k} == counts
    assert found["num_examples"] == 3 - counts.get("dropped_too_long", 0)


def test_when_nothing_fits_the_error_says_what_to_change(tmp_path, base):
    run_file = write_run_file(
        tmp_path / "run.toml", settings(base, "world:arithmetic?num=4", max_tokens=4, on_too_long="drop")
    )
    result = trimtab("sft", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "raise max_tokens (now 4)" in result.output


def test_what_was_split_by_the_same_rule_before_is_not_split_again_in_silence(tmp_path, base):
    texts = (f"question {i}" for i in range(3000))
    left = [text for text in texts if place_of_prompt([Message("user", text)]) >= 0.1][:500]
    rows = [{"prompt": text, "completion": "Yes."} for text in left]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(base), "data": str(data), "max_steps": 1, "held_out": 0.08}
    result = trimtab("sft", write_run_file(tmp_path / "run.toml", settings), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "holds out none of 500 prompts" in result.output
    assert "split=held_out" in result.output
    run_stage("sft", tmp_path / "none", **settings | {"held_out": 0.0})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    few = trimtab("sft", tmp_path / "run.toml", "--out", tmp_path / "few")
    assert few.exit_code == 0, few.output
    assert "none of 40 prompts is held out, so nothing is validated" in few.output


def test_many_lost_examples_are_said_at_once(tmp_path, base):
    """293 of 300 were dropped without a word."""
    data = tmp_path / "shown.jsonl"
    lines = [{"prompt": f"What is {i} + {i}?", "completion": "2 " * (1 if i < 7 else 60)} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    run_file = write_run_file(tmp_path / "run.toml", settings(base, data, max_tokens=40, held_out=0.0))
    result = trimtab("sft", run_file, "--out", tmp_path / "run")
    assert "note: 33 of 40 records are left out: they are longer than max_tokens = 40" in result.output
    assert summary(tmp_path / "run")["counts"]["dropped_too_long"] == 33


def test_many_prompts_that_lose_their_beginning_are_said_at_once(tmp_path, base):
    """The default cuts a prompt on its left: of a whole file of long ones only the ends were trained on, in silence."""
    data = tmp_path / "shown.jsonl"
    lines = [{"prompt": f"Question {i}. " + "long " * (50 if i < 6 else 0), "completion": "yes"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    run_file = write_run_file(tmp_path / "run.toml", settings(base, data, max_tokens=40, held_out=0.0))
    result = trimtab("sft", run_file, "--out", tmp_path / "run")
    assert "note: 6 of 8 records have a prompt that is cut on its left" in result.output


def test_a_share_of_an_epoch_that_holds_no_example_is_refused(tmp_path, base):
    run_file = write_run_file(tmp_path / "run.toml", settings(base, "world:arithmetic?num=4", num_epochs=1e-9))
    result = trimtab("sft", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "num_epochs = 1e-09 of 4 examples are none" in result.output
