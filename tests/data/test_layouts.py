from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path

import pytest

from trimtab import worlds
from trimtab.core.errors import DataError
from trimtab.core.types import (
    Comparison,
    Demonstration,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    SteppedResponse,
    to_dict,
)
from trimtab.data.layouts import load
from trimtab.data.mistakes import Mistake

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets in ../shared/data")


def prompt(*contents: str, **more) -> Prompt:
    """Turns by user and assistant, one after the other."""
    roles = ("user", "assistant")
    return Prompt(messages=tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)), **more)


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture
def read(tmp_path):
    """Loads rows as they would be loaded from a file with them."""

    def read(kind: type, *rows: dict, name: str = "data.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load(kind, path, **options)

    return read


PAIR = PreferencePair(prompt=prompt("Is it?"), chosen="Yes.", rejected="No.")
LONG_PAIR = PreferencePair(prompt=prompt("Hi", "Hello!", "Is it?"), chosen="Yes.", rejected="No.")
HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Is it?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}, PAIR),
        ({"prompt": turns("Is it?"), "chosen": turns("Yes.", first="assistant"), "rejected": "No."}, PAIR),
        ({"prompt": turns("Hi", "Hello!", "Is it?"), "chosen": "Yes.", "rejected": "No."}, LONG_PAIR),
        ({"chosen": turns("Is it?", "Yes."), "rejected": turns("Is it?", "No.")}, PAIR),
        ({"prompt": "Is it?", "chosen": turns("Is it?", "Yes."), "rejected": turns("Is it?", "No.")}, PAIR),
        ({"chosen": "Is it? Yes.", "rejected": "Is it? No."}, PAIR),
        ({"chosen": HH + " Yes.", "rejected": HH + " No."}, LONG_PAIR),
        ({"prompt": HH, "chosen": "Yes.", "rejected": "No."}, LONG_PAIR),
        (to_dict(LONG_PAIR), LONG_PAIR),
    ],
    ids=["texts", "messages", "long prompt", "implicit", "repeated", "implicit text", "hh", "hh with prompt", "own"],
)
def test_preference_pairs_are_read_in_every_layout(read, row, record):
    assert read(PreferencePair, row).records == [record]
    assert read(Prompt, row).records[0].messages == record.prompt.messages


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "2+2?", "completion": "4"}, Demonstration(prompt=prompt("2+2?"), response="4")),
        (
            {"prompt": turns("2+2?"), "completion": turns("4", first="assistant")},
            Demonstration(prompt=prompt("2+2?"), response="4"),
        ),
        ({"messages": turns("a", "b", "c", "d")}, Demonstration(prompt=prompt("a", "b", "c"), response="d")),
        (
            {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"},
            Demonstration(prompt=prompt("2+2?", facts={"answer": "4"}), response="It is <<2+2=4>>4.\n#### 4"),
        ),
        (
            {"prompt": "2+2?", "completion": "4", "label": True},
            LabelledResponse(prompt=prompt("2+2?"), response="4", label=True),
        ),
        (
            {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=7"], "labels": [True, False]},
            SteppedResponse(prompt=prompt("2+2+2?"), steps=("2+2=4", "4+2=7"), labels=(True, False)),
        ),
        (
            {"prompt": "2+2?", "response_a": "4", "response_b": "5", "choice": "A", "annotator": 7},
            Comparison(prompt=prompt("2+2?"), response_a="4", response_b="5", choice="A", annotator="7"),
        ),
        (
            {"prompt": "2+2?", "level": 1, "facts": {"answer": "4"}, "id": 17},
            prompt("2+2?", id="17", facts={"level": 1, "answer": "4"}),
        ),
        ({"messages": turns("a", "b", "c"), "source": "x"}, prompt("a", "b", "c", facts={"source": "x"})),
    ],
    ids=[
        "prompt+completion",
        "messages",
        "conversation",
        "gsm8k",
        "unpaired",
        "stepwise",
        "comparison",
        "prompt",
        "chat",
    ],
)
def test_every_other_layout_gives_its_record(read, row, record):
    assert read(type(record), row).records == [record]


def test_a_prompt_from_a_conversation_leaves_the_last_reply_out(read):
    assert read(Prompt, {"messages": turns("a", "b", "c", "d")}).records == [prompt("a", "b", "c")]


@pytest.mark.parametrize(
    "record",
    [
        prompt("a", facts={"n": [1, 2]}),
        Demonstration(prompt=prompt("a", id="x"), response="b"),
        Comparison(prompt=prompt("a"), response_a="b", response_b="c", choice="tie", annotator="me"),
        PreferencePair(prompt=prompt("a", facts={"n": 1}), chosen="b", rejected="c", margin=0.5, label=0.75),
        LabelledResponse(prompt=prompt("a"), response="b", label=False),
        SteppedResponse(prompt=prompt("a"), steps=("b", "c"), labels=(True, False)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_our_own_records_come_back_equal(read, record):
    assert read(type(record), to_dict(record)).records == [record]


def test_margin_and_soft_label_are_read(read):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "label": 0.75}
    assert read(PreferencePair, row).records[0] == PreferencePair(
        prompt=prompt("a"), chosen="b", rejected="c", margin=2.0, label=0.75
    )


def test_an_implicit_text_prompt_ends_between_words(read):
    # the texts part inside a word, "blue" and "black"; the prompt must not be "The sky is bl"
    (pair,) = read(PreferencePair, {"chosen": "The sky is blue.", "rejected": "The sky is black."}).records
    assert (pair.prompt.text, pair.chosen, pair.rejected) == ("The sky is", "blue.", "black.")


def test_neighbouring_turns_of_one_speaker_in_a_transcript_become_one(read):
    head = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    (pair,) = read(PreferencePair, {"chosen": head + " x", "rejected": head + " y"}).records
    assert pair.prompt == prompt("a", "b\n\nc", "d")


def test_a_speaker_named_inside_a_turn_does_not_begin_another(read):
    head = "\n\nHuman: say 'Assistant: no'\n\nAssistant:"
    (pair,) = read(PreferencePair, {"chosen": head + " Human: x", "rejected": head + " y"}).records
    assert (pair.prompt, pair.chosen) == (prompt("say 'Assistant: no'"), "Human: x")


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("kind", "good", "bad", "mistake", "message"),
    [
        (
            PreferencePair,
            GOOD,
            GOOD | {"chosen": None},
            "missing_field",
            "no value for 'chosen'; the row has prompt, rejected",
        ),
        (PreferencePair, GOOD, {"prompt": "a", "chosen": "b"}, "missing_field", "no value for 'rejected'"),
        (PreferencePair, GOOD, {"chosen": "b", "rejected": "c"}, "missing_field", "no value for 'prompt'"),
        (PreferencePair, GOOD, GOOD | {"chosen": 3}, "wrong_type", r"chosen is 3 \(int\)"),
        (PreferencePair, GOOD, GOOD | {"prompt": {"a": 1}}, "wrong_type", "prompt is {'a': 1}"),
        (PreferencePair, GOOD, GOOD | {"chosen": " \n"}, "empty_response", "chosen is empty"),
        (PreferencePair, GOOD, GOOD | {"chosen": "c"}, "identical_pair", "are the same: 'c'"),
        (PreferencePair, GOOD, GOOD | {"prompt": ""}, "no_prompt", "the prompt is empty"),
        (PreferencePair, GOOD, GOOD | {"prompt": turns("a", "b")}, "no_prompt", "ends with an assistant turn"),
        (PreferencePair, GOOD, GOOD | {"label": 0.2}, "label_out_of_range", "label is 0.2"),
        (PreferencePair, GOOD, GOOD | {"margin": float("nan")}, "wrong_type", "margin is nan"),
        (PreferencePair, GOOD, GOOD | {"id": 1.5}, "wrong_type", "id is 1.5"),
        (PreferencePair, GOOD, GOOD | {"facts": "x"}, "wrong_type", "facts is 'x'"),
        (PreferencePair, GOOD, GOOD | {"chosen": turns("b")}, "no_assistant_turn", "has the turns user"),
        (
            PreferencePair,
            GOOD,
            GOOD | {"chosen": [], "rejected": turns("a", "c")},
            "no_assistant_turn",
            r"chosen has the turns \(none\)",
        ),
        (
            PreferencePair,
            GOOD,
            GOOD | {"chosen": turns("z", "b"), "rejected": turns("z", "c")},
            "no_shared_prompt",
            "another conversation than prompt",
        ),
        (
            PreferencePair,
            {"chosen": HH + "a", "rejected": HH + "b"},
            {"chosen": HH + "a\n\nHuman: c\n\nAssistant: d", "rejected": HH + "b"},
            "no_shared_prompt",
            "part at turn 4, before the last reply",
        ),
        (
            PreferencePair,
            {"chosen": HH + "a", "rejected": HH + "b"},
            {"chosen": "one", "rejected": "two"},
            "no_shared_prompt",
            "do not begin alike",
        ),
        (
            Demonstration,
            {"messages": turns("a", "b")},
            {"messages": [{"role": "narrator", "content": "a"}]},
            "unknown_role",
            "has the role 'narrator'; roles are system, developer, user",
        ),
        (
            Demonstration,
            {"messages": turns("a", "b")},
            {"messages": [{"role": {"name": "user"}, "content": "a"}]},
            "unknown_role",
            "has the role {'name': 'user'}",
        ),
        (
            Demonstration,
            {"messages": turns("a", "b")},
            {"messages": turns("a")},
            "no_assistant_turn",
            "ends with a user turn",
        ),
        (Demonstration, {"messages": turns("a", "b")}, {"messages": []}, "no_assistant_turn", "ends with nothing"),
        (
            Demonstration,
            {"messages": turns("a", "b")},
            {"messages": [{"speaker": "human", "said": "a"}]},
            "wrong_type",
            r'an object with "role" and "content" \(or "from" and "value"\) is needed',
        ),
        (
            LabelledResponse,
            {"prompt": "a", "completion": "b", "label": True},
            {"prompt": "a", "completion": "b", "label": "perhaps"},
            "unknown_label",
            "label is 'perhaps'",
        ),
        (
            SteppedResponse,
            {"prompt": "a", "completions": ["b"], "labels": [True]},
            {"prompt": "a", "completions": ["b", "c"], "labels": [True]},
            "wrong_number_of_labels",
            "2 steps with 1 labels",
        ),
        (
            Comparison,
            {"prompt": "a", "response_a": "b", "response_b": "c", "choice": "A"},
            {"prompt": "a", "response_a": "b", "response_b": "c", "choice": "C"},
            "unknown_choice",
            "labelled 'C'",
        ),
    ],
)
def test_a_bad_row_is_named_and_can_be_dropped_but_only_counted(read, kind, good, bad, mistake, message):
    with pytest.raises(DataError, match=message) as caught:
        read(kind, good, bad, good)
    assert caught.value.where.endswith("data.jsonl, row 2")
    assert f"1 of 3 rows cannot be used: 1 {mistake}" in caught.value.problem
    assert 'on_bad_row = "drop"' in caught.value.fix

    loaded = read(kind, good, bad, good, on_bad_row="drop")
    assert loaded.counts == {"rows": 3, "records": 2, f"dropped_{mistake}": 1}
    assert len(loaded.records) == 2
    assert "row 2: " in loaded.dropped[0]


def test_all_mistakes_are_counted_at_once_and_five_are_shown(read, tmp_path):
    rows = [GOOD, *[GOOD | {"chosen": "c"}] * 6, GOOD | {"rejected": ""}]
    with pytest.raises(DataError) as caught:
        read(PreferencePair, *rows)
    assert "7 of 8 rows cannot be used: 6 identical_pair, 1 empty_response" in caught.value.problem
    assert "row 6: " in caught.value.problem
    assert "row 7: " not in caught.value.problem
    assert "and 2 more" in caught.value.problem


def test_broken_lines_are_counted_with_the_rest(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt"\n{"prompt": "\xff"}\n')
    assert load(PreferencePair, path, on_bad_row="drop").counts == {
        "rows": 3,
        "records": 1,
        "dropped_broken_json": 1,
        "dropped_not_utf8": 1,
    }


def test_a_file_without_one_good_row_is_an_error_even_when_dropping(read):
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        read(PreferencePair, GOOD | {"chosen": ""}, on_bad_row="drop")


def test_an_unknown_layout_names_the_columns_and_how_to_say_what_they_are(read):
    row = {"headline": "a", "story": "b"}
    with pytest.raises(DataError, match="no known layout has the columns headline, story") as caught:
        read(Demonstration, row)
    assert "known are: " in caught.value.problem
    assert "data.jsonl?columns=NAME:prompt,OTHER:completion" in caught.value.fix
    (found,) = load(Demonstration, f"{caught.value.where}?columns=headline:prompt,story:completion").records
    assert found == Demonstration(prompt=prompt("a"), response="b")


def test_a_csv_file_without_a_header_is_pointed_out(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("Is it?,Yes.,No.\nWas it?,Yes.,No.\n")
    with pytest.raises(DataError, match="has the columns Is it") as caught:
        load(PreferencePair, path)
    assert "make the first line of the file the names of its columns" in caught.value.fix


@pytest.mark.parametrize(
    ("row", "kind", "message", "fix"),
    [
        (GOOD, Demonstration, "the file holds preference pairs", "need not be a good one"),
        ({"prompt": "a", "completion": "b", "label": False}, Demonstration, "thumbs up or down", "label true"),
        ({"prompt": "a", "completion": "b"}, PreferencePair, "prompts with completions", "prompt, chosen, rejected"),
        ({"prompt": "a"}, Demonstration, "holds prompts", "add a column 'completion'"),
    ],
)
def test_a_layout_that_does_not_hold_the_records_asked_for_says_what_it_holds(read, row, kind, message, fix):
    with pytest.raises(DataError, match=message) as caught:
        read(kind, row)
    assert fix in caught.value.fix


def test_a_world_gives_records_with_a_hash():
    loaded = load(Demonstration, "world:helpdesk?num=5&seed=3")
    assert loaded.records == worlds.load("helpdesk").demonstrations("train", 5, seed=3)
    assert loaded.counts == {"rows": 5, "records": 5}
    lines = "".join(json.dumps(to_dict(r), ensure_ascii=False, sort_keys=True) + "\n" for r in loaded.records)
    assert loaded.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert load(Prompt, "world:helpdesk?num=5", limit=2).counts == {"rows": 2, "records": 2}
    with pytest.raises(DataError, match="a world gives Prompt and Demonstration, not PreferencePair"):
        load(PreferencePair, "world:helpdesk")


# ---- real files ---------------------------------------------------------------------------------------------------


@real_data
def test_hh_rlhf_is_read_whole_but_for_its_broken_pairs():
    path = SHARED / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    loaded = load(PreferencePair, path, on_bad_row="drop")
    # four have an empty side; in four the sides part before the last reply
    assert loaded.counts == {
        "rows": 1700,
        "records": 1692,
        "dropped_empty_response": 4,
        "dropped_no_shared_prompt": 4,
    }
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))
    pair = loaded.records[0]
    told = "".join(f"\n\n{'Human' if m.role == 'user' else 'Assistant'}: {m.content}" for m in pair.prompt.messages)
    assert first["chosen"] == f"{told}\n\nAssistant: {pair.chosen}"
    assert first["rejected"] == f"{told}\n\nAssistant: {pair.rejected}"
    assert all(
        [m.role for m in p.prompt.messages] == ["user", "assistant"] * (len(p.prompt.messages) // 2) + ["user"]
        for p in loaded.records
    )


@real_data
@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("gsm8k/train", Demonstration, {"rows": 7473, "records": 7473}),
        ("oasst/pairs_conversational", PreferencePair, {"rows": 602, "records": 602}),
        ("pandalm/pairs", PreferencePair, {"rows": 695, "records": 653, "dropped_empty_response": 42}),
        ("fine_grained_rlhf/pairs", PreferencePair, {"rows": 1893, "records": 1893}),
        ("truthful_qa/pairs", PreferencePair, {"rows": 626, "records": 626}),
        ("arena_hard/question", Prompt, {"rows": 375, "records": 375}),
        ("ifeval/input_data", Prompt, {"rows": 433, "records": 433}),
        ("xstest/xstest_v2_completions_mistralinstruct", Demonstration, {"rows": 346, "records": 346}),
    ],
)
def test_real_data_sets_are_read_as_they_are(name, kind, counts):
    assert load(kind, SHARED / f"{name}.jsonl.gz", on_bad_row="drop").counts == counts


@real_data
def test_verifiers_find_what_they_need_in_the_facts():
    (problem,) = load(Prompt, SHARED / "gsm8k" / "train.jsonl.gz", limit=1).records
    assert problem.facts["answer"] == "72"
    (task,) = load(Prompt, SHARED / "ifeval" / "input_data.jsonl.gz", limit=1).records
    assert task.facts["instruction_id_list"] == ["detectable_format:json_format"]


def test_loaded_cannot_be_changed(read):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read(PreferencePair, GOOD).source = "other"


def test_a_world_and_a_project_are_asked_about_their_prompts_too():
    """A system turn that the model's template leaves out is no row that a file alone can have."""
    first, second = (prompt.messages for prompt in load(Prompt, "world:helpdesk?num=2").records)

    def accepts(messages):
        return Mistake("template_leaves_out", "the system turn", "-") if messages == first else None

    with pytest.raises(DataError, match=r"the system turn\n  1 of 2 rows") as error:
        load(Prompt, "world:helpdesk?num=2", accepts=accepts)
    assert error.value.where == "world:helpdesk?num=2, record 1"
    found = load(Prompt, "world:helpdesk?num=2", accepts=accepts, on_bad_row="drop")
    assert [prompt.messages for prompt in found.records] == [second]
    assert found.counts == {"rows": 2, "records": 1, "dropped_template_leaves_out": 1}
    assert found.dropped == ("world:helpdesk?num=2, record 1: the system turn",)
