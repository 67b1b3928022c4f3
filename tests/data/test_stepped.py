"""Replies in steps, as TRL, PRM800K and Math-Shepherd lay them out, and replies with ratings."""

import json

import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import Demonstration, Message, Prompt, RatedResponse, SteppedResponse, from_dict, to_dict
from trimtab.data.layouts import load

PROMPT = Prompt(messages=(Message("user", "Hi"),))


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "steps.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def labels_of(source, **options):
    return [record.labels for record in load(SteppedResponse, source, **options).records]


def stepwise(*labels):
    return {"prompt": "Hi", "completions": [f"step {i}" for i in range(len(labels))], "labels": list(labels)}


def test_a_label_may_be_a_probability_and_a_step_may_be_without_one(file):
    assert labels_of(file(stepwise(True, 0.25, None, 0))) == [(1.0, 0.25, None, 0.0)]


def test_a_record_round_trips_through_json_with_a_step_that_is_not_judged():
    record = SteppedResponse(prompt=PROMPT, steps=("a", "b"), labels=(0.5, None))
    assert from_dict(SteppedResponse, json.loads(json.dumps(to_dict(record)))) == record


@pytest.mark.parametrize(("neutral", "label"), [("right", 1.0), ("wrong", 0.0), ("skip", None)])
def test_a_neutral_step_counts_as_the_source_says(file, neutral, label):
    path = file(stepwise(1, 0, -1), stepwise(1, 1))
    assert labels_of(f"{path}?neutral={neutral}") == [(1.0, label, 0.0), (1.0, 1.0)]


def test_three_labels_without_a_word_on_the_neutral_one_are_refused_with_the_three_ways(file):
    with pytest.raises(DataError, match="0 may be neutral") as caught:
        load(SteppedResponse, file(stepwise(1, 0), stepwise(1, -1)), on_bad_row="drop")
    assert caught.value.where.endswith("steps.jsonl, row 2")
    assert all(f"steps.jsonl?neutral={way}" in caught.value.fix for way in ("right", "wrong", "skip"))


@pytest.mark.parametrize(
    ("row", "option", "said"),
    [
        (stepwise(1, 0.5), "?neutral=right", "with neutral=right a label is -1, 0 or 1"),
        (stepwise(1, 0), "?neutral=maybe", "neutral is 'maybe'"),
        (stepwise(1, 2), "", "a list of true and false, or of probabilities"),
        (stepwise(1, "perhaps"), "", "a list of true and false, or of probabilities"),
        (stepwise(None, None), "", "none of 2 steps is judged"),
        (stepwise(), "", "there is no step"),
        (stepwise(1, 0) | {"completions": ["a", " "]}, "", "an empty one"),
        (stepwise(1, 0) | {"labels": [1]}, "", "2 steps with 1 labels"),
        (stepwise(1) | {"labels": 1}, "", "labels is 1"),
    ],
)
def test_what_is_no_reply_in_steps_is_refused_with_its_row(file, row, option, said):
    with pytest.raises(DataError, match=said) as caught:
        load(SteppedResponse, file(stepwise(1, 1), row) + option)
    assert caught.value.where.endswith(", row 2") or option == "?neutral=maybe"
    assert caught.value.fix


# --- PRM800K ---


def completion(text, rating, **more):
    return {"text": text, "rating": rating, "flagged": False, **more}


def prm800k(*steps, **more):
    return {
        "labeler": "x",
        "timestamp": "2022-07-17",
        "generation": 2,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "Hi", "ground_truth_answer": "7", "pre_generated_steps": ["a"]},
        "label": {"steps": list(steps), "total_time": 5, "finish_reason": "solution"},
    } | more


def step(*completions, chosen=0, human=None):
    return {"completions": list(completions), "human_completion": human, "chosen_completion": chosen}


def test_a_row_of_prm800k_labels_each_step_once(file):
    """Two completions of the second step were rated; the first was chosen. Worked by hand."""
    row = prm800k(
        step(completion("a", 1)),
        step(completion("b", 0), completion("c", -1), chosen=0),
        step(completion("d", -1), chosen=None),
    )
    loaded = load(SteppedResponse, file(row))
    assert [(r.steps, r.labels) for r in loaded.records] == [
        (("a", "c"), (None, 0.0)),
        (("a", "b", "d"), (None, None, 0.0)),
        (("a", "b"), (1.0, 1.0)),
    ]
    assert {r.prompt.facts["answer"] for r in loaded.records} == {"7"}
    assert loaded.layout == "steps of PRM800K"
    assert load(Prompt, file(row)).records[0].text == "Hi"


@pytest.mark.parametrize(("neutral", "label"), [("right", 1.0), ("wrong", 0.0), ("skip", None)])
def test_neutral_steps_of_prm800k_count_as_right_unless_it_is_said_otherwise(file, neutral, label):
    path = file(prm800k(step(completion("a", 1)), step(completion("b", 0))))
    assert labels_of(f"{path}?neutral={neutral}") == [(1.0, label)]
    assert labels_of(path) == [(1.0, 1.0)]


def test_steps_that_nobody_rated_are_not_judged(file):
    human = {"text": "mine", "rating": None, "source": "human", "flagged": False}
    row = prm800k(
        step(completion("a", 1)),
        step(completion("b", None)),
        step(completion("c", -1, flagged=True), chosen=None, human=human),
        step(completion("d", 1)),
    )
    (found,) = load(SteppedResponse, file(row)).records
    assert found.steps == ("a", "b", "mine", "d")
    assert found.labels == (1.0, None, None, 1.0)


@pytest.mark.parametrize("name", ["is_quality_control_question", "is_initial_screening_question"])
def test_questions_that_test_the_labelers_are_refused_or_dropped_and_counted(file, name):
    good = prm800k(step(completion("a", 1)))
    path = file(good, good | {name: True})
    with pytest.raises(DataError, match=f"{name} is true"):
        load(SteppedResponse, path)
    loaded = load(SteppedResponse, path, on_bad_row="drop")
    assert loaded.counts["dropped_tests_labelers"] == 1
    assert len(loaded.records) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (prm800k(step(completion("a", 3))), "rating is 3"),
        (prm800k(step(completion("a", None))), "no step is judged"),
        (prm800k(step(completion(" ", 1))), "is an empty step"),
        (prm800k(step(completion("a", 1), chosen=4)), "chosen_completion is 4"),
        (prm800k({"completions": ["a"]}), "completions.0. is 'a'"),
        (prm800k(label={"steps": None}), "an object with steps"),
    ],
)
def test_a_damaged_row_of_prm800k_is_refused_with_its_place(file, row, said):
    with pytest.raises(DataError, match=said) as caught:
        load(SteppedResponse, file(prm800k(step(completion("a", 1))), row))
    assert caught.value.where.endswith(", row 2")


# --- Math-Shepherd ---

TEXT = "Hi Step 1: Two. ки\nStep 2: Step 1: was wrong. ки\nStep 3: The answer is: 3 ки"


def shepherd(text=TEXT, marks="+-+"):
    label = text
    for mark in marks:
        label = label.replace("ки", mark, 1)
    return {"input": text, "label": label, "task": "GSM8K"}


def test_a_row_of_math_shepherd_is_cut_at_its_tags(file):
    loaded = load(SteppedResponse, file(shepherd()))
    assert loaded.records == [
        SteppedResponse(
            prompt=PROMPT,
            steps=("Step 1: Two.", "Step 2: Step 1: was wrong.", "Step 3: The answer is: 3"),
            labels=(1.0, 0.0, 1.0),
        )
    ]
    assert loaded.layout == "steps of Math-Shepherd"
    assert load(Prompt, file(shepherd())).records[0].messages == PROMPT.messages


def test_marks_within_a_step_are_text(file):
    (found,) = load(SteppedResponse, file(shepherd("Hi Step 1: 1 + 2 - 3 = 0 ки", "-"))).records
    assert (found.steps, found.labels) == (("Step 1: 1 + 2 - 3 = 0",), (0.0,))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (shepherd(marks="+-"), "behind which . or - is needed"),
        (shepherd() | {"label": "other"}, "label differs from the text"),
        (shepherd() | {"label": shepherd()["label"] + " more"}, "follows the last label"),
        (shepherd() | {"input": TEXT + " more"}, "has no tag behind it"),
        (shepherd() | {"input": "Hi there"}, "no step ends with"),
        (shepherd("Hi. Two. ки", "+"), "where the steps begin"),
        (shepherd("Hi Step 1: Two. ки ки", "++"), "a step is empty"),
    ],
)
def test_a_damaged_row_of_math_shepherd_is_refused_with_its_place(file, row, said):
    with pytest.raises(DataError, match=said) as caught:
        load(SteppedResponse, file(shepherd(), row))
    assert caught.value.where.endswith(", row 2")


# --- ratings ---


@pytest.mark.parametrize("name", ["rating", "score", "helpfulness"])
def test_a_reply_with_a_rating_is_read_if_ratings_are_asked_for(file, name):
    path = file({"prompt": "Hi", "completion": "Yo", name: 3}, {"prompt": "Hi", "completion": "No", name: "1.5"})
    assert [r.rating for r in load(RatedResponse, path).records] == [3.0, 1.5]
    with pytest.raises(DataError, match=f"{name} is 3"):
        load(Demonstration, path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"rating": "good"}, "rating is 'good'"),
        ({"rating": None}, "the reply has no rating"),
        ({"rating": 3, "quality": 4}, "rating and quality rate the reply"),
    ],
)
def test_a_rating_that_is_no_number_or_one_of_two_is_refused(file, row, said):
    good = {"prompt": "Hi", "completion": "Yo", "rating": 3}
    with pytest.raises(DataError, match=said) as caught:
        load(RatedResponse, file(good, good | row))
    assert caught.value.where.endswith(", row 2")
