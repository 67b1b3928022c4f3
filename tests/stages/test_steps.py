"""Step labels made by rollouts."""

import json
import math

import pytest
import torch

from tests.stages.commands import rows, run_stage, summary, trimtab, write_run_file
from trimtab.core import seeds
from trimtab.core.types import LabelledResponse, SteppedResponse
from trimtab.data.chat import Chat
from trimtab.data.layouts import load
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.stages.steps import label_of, right_of, steps_of

SHORT = {"max_new_tokens": 6}
NEEDLE = "e"
"""What a right reply holds; the tiny policy writes it now and then."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "replies.jsonl"
    found = [
        {"prompt": "2 + 2?", "completion": "2\n4\n#### 4"},
        {"prompt": "3 + 3?", "completion": "3\n\n#### 7"},
        {"prompt": "4 + 4?", "completion": "#### 8"},
        {"prompt": "5 + 5?", "completion": "5\n#### e"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def settings(base, data, **changed):
    verifier = [{"name": "regex", "pattern": NEEDLE, "match": "search"}]
    made = {"model": str(base), "data": str(data), "rewards": verifier, "sampling": SHORT, "replies_per_step": 2}
    return made | {"num_completions": 4} | changed


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, data):
    directory = tmp_path_factory.mktemp("labelled")
    return {
        labels: run_stage("steps", directory / labels, **settings(base, data, labels=labels))
        for labels in ("hard", "soft")
    }


def slow_shares(base, reply, number, num):
    """The share of right completions from the end of each step but the last: one completion at a time, by the ids that
    the text up to the end of the step has, with the random numbers that belong to it."""
    chat = Chat(load_tokenizer(base))
    sampler = LocalSampler(Policy(load_causal(base), pad_id=chat.pad_id), chat, Sampling(**SHORT))
    ids = chat.encode_response(reply["completion"])
    found = []
    for end in range(len(ids)):
        text = chat.tokenizer.decode(ids[: end + 1])
        shorter = chat.tokenizer.decode(ids[:end])
        rest = chat.tokenizer.decode(ids[end + 1 :], skip_special_tokens=True)
        if text.count("\n") == shorter.count("\n") or not rest.strip() or not shorter.split("\n")[-1].strip():
            continue
        right = 0
        for g in range(num):
            draw = seeds.generator(seeds.derive(0, "steps"), number, end, g).random(SHORT["max_new_tokens"])
            [prompt] = load(SteppedResponse, reply["source"]).records[number : number + 1]
            prefix = chat.encode_prompt(prompt.prompt.messages) + ids[: end + 1]
            [(new, _, _)] = sampler.continue_ids([prefix], group_size=1, uniforms=torch.from_numpy(draw)[None])
            right += NEEDLE in sampler.text(ids[: end + 1] + new)
        found.append(right / num)
    return found


def test_labels_are_the_shares_of_completions_drawn_one_at_a_time(runs, base, data):
    replies = rows(data.parent, data.name)
    source = str(runs["soft"] / "steps.jsonl")
    some = []
    for number, (reply, row) in enumerate(zip(replies, rows(runs["soft"], "steps.jsonl"), strict=True)):
        shares = slow_shares(base, reply | {"source": source}, number, 4)
        assert row["labels"] == [*shares, float(NEEDLE in reply["completion"])]
        some += shares
    assert any(0 < share < 1 for share in some)


def test_hard_labels_ask_whether_any_completion_is_right(runs):
    hard, soft = (rows(runs[labels], "steps.jsonl") for labels in ("hard", "soft"))
    assert [row["labels"] for row in hard] == [[label > 0 for label in row["labels"]] for row in soft]
    assert [row["num_right"] for row in hard] == [row["num_right"] for row in soft]


def test_what_is_written_is_read_as_steps_and_as_outcomes(runs, data):
    found = load(SteppedResponse, runs["hard"] / "steps.jsonl").records
    assert ["\n".join(record.steps) for record in found] == [r["completion"] for r in rows(data.parent, data.name)]
    assert [len(record.steps) for record in found] == [3, 2, 1, 2]
    outcomes = load(LabelledResponse, runs["hard"] / "outcomes.jsonl").records
    assert [record.label for record in outcomes] == [False, False, False, True]
    done = summary(runs["hard"])
    assert done["counts"]["one_step_replies"] == 1
    assert done["counts"]["stepwise_rows"] == 4


def test_how_many_replies_are_labelled_together_changes_no_label(tmp_path, base, data, runs):
    out = run_stage("steps", tmp_path / "run", **settings(base, data, labels="soft", replies_per_step=3))
    assert rows(out, "steps.jsonl") == rows(runs["soft"], "steps.jsonl")


def test_a_stopped_run_goes_on_to_the_same_file_also_behind_half_a_row(tmp_path, base, data, runs):
    made = settings(base, data, labels="soft")
    out = run_stage("steps", tmp_path / "run", **made, max_steps=1)
    assert len(rows(out, "steps.jsonl")) == 2
    with (out / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "half')
    run_stage("steps", tmp_path / "run", **made, max_steps=2)
    assert (out / "steps.jsonl").read_bytes() == (runs["soft"] / "steps.jsonl").read_bytes()
    assert (out / "outcomes.jsonl").read_bytes() == (runs["soft"] / "outcomes.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampling": {**SHORT, "max_prompt_tokens": 1}}, "4 have a prompt of more than 1 tokens"),
        ({"separator": "~"}, "none of 4 replies has the separator '~'"),
        ({"separator": ""}, "separator is empty"),
        ({"rewards": []}, "rewards is empty"),
        ({"rewards": ["exact_answer"]}, "no prompt has the fact 'answer'"),
        ({"num_completions": 0}, "num_completions = 0"),
        ({"rewards": ["exact_answer"], "right_from": 5.0}, "a reply from 0 to 1: no reply can be right"),
        ({"rewards": ["exact_answer"], "right_from": 0.0}, "a reply from 0 to 1: every reply is right"),
        ({"rewards": [{"name": "length", "max_tokens": 5}]}, "a reply from -1 to 0: no reply can be right"),
        ({"rewards": [{"name": "exact_answer", "weight": 0.0}]}, "a reply from 0 to 0: no reply can be right"),
    ],
)
def test_what_cannot_be_labelled_is_refused_before_anything_is_drawn(tmp_path, base, data, changed, said):
    made = settings(base, data) | changed
    result = trimtab("steps", write_run_file(tmp_path / "run.toml", made), "--out", tmp_path / "none")
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert said in words or ("4 prompts have no fact 'answer'" in words and "fact" in said)
    assert "on_failed_reward" not in words  # a setting of online training
    assert not (tmp_path / "none" / "steps.jsonl").exists()


def test_a_step_whose_completions_cannot_be_judged_has_no_label():
    assert right_of([math.nan, 1.0, 0.0], 0.5) == (1, 2)
    assert label_of(1, 2, "hard") is True
    assert label_of(1, 2, "soft") == 0.5
    assert label_of(0, 0, "hard") is None


@pytest.mark.parametrize(
    ("text", "steps"),
    [("a\nb", ("a", "b")), ("\n\na\n\nb\n", ("\n\na\n", "b\n")), ("a", ("a",)), ("a\n \nb", ("a\n ", "b"))],
)
def test_steps_joined_are_the_reply(text, steps):
    assert steps_of(text, "\n") == steps
    assert "\n".join(steps) == text
