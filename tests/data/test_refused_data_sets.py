"""Rows of well-known data sets that would be read wrongly are refused with what to do."""

from __future__ import annotations

import json

import pytest

from tests.data.records import TALK, said, user
from trimtab.core.errors import DataError
from trimtab.core.types import Comparison, Demonstration, PreferencePair, SteppedResponse
from trimtab.data.layouts import load

REFUSED = {
    "wildchat with its flag": (
        Demonstration,
        {"conversation": [user("Hi"), said("Yo")], "toxic": True},
        "toxic is True: it judges",
        "ignore=toxic",
    ),
    "a rating under a longer name": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "humanRating": "1/5"},
        "humanRating is '1/5': it judges",
        "ignore=humanRating",
    ),
    "a score of a reward model": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "reward_model_score": -3},
        "reward_model_score is -3: it judges",
        "ignore=reward_model_score",
    ),
    "a thumb down": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "thumbs_down": 1},
        "thumbs_down is 1: it judges",
        "ignore=thumbs_down",
    ),
    "a grade": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "grade": "F"},
        "grade is 'F': it judges",
        "ignore=grade",
    ),
    "ratings of several people": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "rating": [{"user_id": "ann", "value": 1, "status": "submitted"}]},
        "rating is 1: it judges",
        "ignore=rating",
    ),
    "answers of annotators": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "quality.responses": [2], "quality.responses.status": ["submitted"]},
        "quality.responses is 2: it judges",
        "ignore=quality.responses",
    ),
    "a rating in a word": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "quality": "poor"},
        "quality is .poor.: it judges",
        "ignore=quality",
    ),
    "a reaction": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "reaction": "👎"},
        "reaction is .*: it judges",
        "ignore=reaction",
    ),
    "votes that say the contrary": (
        PreferencePair,
        {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "chosen_votes": 1, "rejected_votes": 9},
        "the rejected reply is the better one",
        "ignore=chosen_votes,rejected_votes",
    ),
    "a part of a turn that is not trained": (
        Demonstration,
        {"messages": [user("Hi"), said("Yo", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]},
        "train_detail is",
        "ignore=train_detail",
    ),
    "a mask of the reply": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "completion_mask": [0, 1]},
        "completion_mask is",
        "ignore=completion_mask",
    ),
    "options in columns of letters": (
        Demonstration,
        {"question": "2+2?", "A": "3", "B": "4", "answer": "B"},
        "A holds .3., which is no part of the prompt",
        "ignore=A,B",
    ),
    "numbered options": (
        Demonstration,
        {"question": "2+2?", "option1": "3", "option_b": "4", "answer": "B"},
        "option1 holds .3., which is no part of the prompt",
        "ignore=option1,option_b",
    ),
    "a task beside its input": (
        Demonstration,
        {"definition": "In this task you translate to French.", "input": "cheese", "output": "fromage"},
        "definition holds .* no part of the prompt",
        "columns=definition:context",
    ),
    "a dialogue that is summed up": (
        Demonstration,
        {"instruction": "Sum up.", "dialogue": "Amy: I baked cookies. Jerry: Great!", "output": "Cookies."},
        "dialogue holds .* no part of the prompt",
        "columns=dialogue:context",
    ),
    "a text that is asked about": (
        Demonstration,
        {"text": "Bob did it with a knife.", "question": "Who?", "answer": "Bob"},
        "text holds .* no part of the prompt",
        "columns=text:context",
    ),
    "reasoning under a longer name": (
        Demonstration,
        {"question": "1+1?", "solution": "2", "thinking_trajectories": ["First I take one and one."]},
        "thinking_trajectories holds .* reasoning apart from the reply",
        "ignore=thinking_trajectories",
    ),
    "a system turn under a longer name": (
        Demonstration,
        {"prompt": "Hi", "completion": "Arr", "bot_system": "Talk as a pirate would."},
        "bot_system holds .* which may be the system turn",
        "columns=bot_system:system",
    ),
    "a text that addresses the model": (
        Demonstration,
        {"persona": "You are a pirate.", "prompt": "Hi", "completion": "Arr"},
        "persona holds .* which may be the system turn",
        "columns=persona:system",
    ),
    "turns that are written out": (
        Demonstration,
        {"prompt": "### Human: Hi ### Assistant:", "completion": "Yo"},
        "turns that are written out",
        "",
    ),
    "pairs whose turns are written out": (
        PreferencePair,
        {"chosen": "User: Is it?\n\nAssistant: Yes.", "rejected": "User: Is it?\n\nAssistant: No."},
        "turns that are written out",
        "",
    ),
    "a prompt that a template ended": (
        Demonstration,
        {"prompt": "Be brief. <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "completion": "Yo"},
        "the mark of a chat template",
        "",
    ),
    "a system turn of somebody else": (
        Demonstration,
        {"system": {"role": "user", "content": "Hi"}, "prompt": "Hi", "completion": "Yo"},
        "system is .* text is needed",
        "",
    ),
    "pictures under another name": (
        Demonstration,
        {"prompt": "What is it?", "completion": "A cat.", "image_file": "cat.png"},
        "only text is read",
        "ignore=image_file",
    ),
    "tools under another name": (
        Demonstration,
        {"messages": [user("Hi"), said("Yo")], "function_list": [{"name": "f"}]},
        "tools that the model is told of",
        "ignore=function_list",
    ),
    "a turn with a thumb down": (
        Demonstration,
        {"messages": [user("Hi"), said("No", feedback="thumbs_down"), user("?"), said("Yo")]},
        "feedback is 'thumbs_down': it judges",
        "ignore=feedback",
    ),
    "a turn with a rating": (
        Demonstration,
        {"messages": [user("Hi"), said("No", rating=1)]},
        "rating is 1: it judges",
        "ignore=rating",
    ),
    "a turn that is thought": (
        Demonstration,
        {"messages": [user("Hi"), said("Hm.", channel="analysis"), said("Yo", channel="final")]},
        "channel is 'analysis': the turn is no reply",
        "",
    ),
    "a turn that calls": (
        Demonstration,
        {"messages": [user("Hi"), said("1+1", recipient="python"), said("2")]},
        "calls a tool",
        "",
    ),
    "a mask of the row": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo", "loss_mask": [0, 1]},
        "loss_mask is",
        "ignore=loss_mask",
    ),
    "retrieved documents": (
        Demonstration,
        {"retrieved_docs": ["Bob did it with a knife."], "question": "Who?", "answer": "Bob"},
        "retrieved_docs holds .* no part of the prompt",
        "columns=retrieved_docs:context",
    ),
    "ranks that say the contrary": (
        PreferencePair,
        {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "chosen_rank": 2, "rejected_rank": 1},
        "the rejected reply is the better one",
        "ignore=chosen_rank,rejected_rank",
    ),
    "a pair that is tied": (
        PreferencePair,
        {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "tie": True},
        "neither reply is the better one",
        "",
    ),
    "safety of a reply": (
        Demonstration,
        {"prompt": "Hi", "response": "Go away.", "is_safe": False},
        "is_safe is False: it judges",
        "",
    ),
    "a reply that was not chosen": (
        Demonstration,
        {"prompt": "Hi", "response": "Go away.", "chosen": False},
        "chosen is False: it judges",
        "",
    ),
    "a place in a ranking": (
        Demonstration,
        {"prompt": "Hi", "response": "Go away.", "rank": 4},
        "rank is 4: it judges",
        "",
    ),
    "a verdict": (
        Demonstration,
        {"question": "1+1?", "response": "3", "verdict": "incorrect"},
        "verdict is 'incorrect': it",
        "",
    ),
    "a reply beside an other conversation": (
        Demonstration,
        {"response": "No", "conversations": TALK},
        "two columns may be the reply",
        "ignore=response",
    ),
    "a text that the question is about": (
        Demonstration,
        {"article": "Bob did it with a knife.", "question": "Who?", "answer": "Bob"},
        "article holds .* no part of the prompt",
        "columns=article:context",
    ),
    "documents that the question is about": (
        Demonstration,
        {"documents": ["Bob did it with a knife."], "question": "Who?", "answer": "Bob"},
        "documents holds .* no part of the prompt",
        "columns=documents:context",
    ),
    "sides that chosen names": (
        PreferencePair,
        {
            "prompt": "Is it?",
            "response_1": "Yes.",
            "response_2": "No.",
            "chosen": "response_1",
            "rejected": "response_2",
        },
        "response_1 may be one of the replies",
        "ignore=response_1,response_2",
    ),
    "a strength that says no side": (
        PreferencePair,
        {"prompt": "Is it?", "response_a": "Yes.", "response_b": "No.", "preference_strength": 2},
        "nothing says which one that is",
        "",
    ),
    "a strength out of range": (
        PreferencePair,
        {"prompt": "Is it?", "response_1": "Yes.", "response_2": "No.", "preference_strength": 7},
        "given as 7, and nothing says which",
        "",
    ),
    "a verdict that is no side": (
        Comparison,
        {"prompt": "Is it?", "response_a": "Yes.", "response_b": "No.", "choice": "A>B"},
        "labelled 'A>B'",
        "",
    ),
    "texts that name who speaks": (
        Demonstration,
        {"conversations": ["Human: Hi", "Assistant: Yo"]},
        "name their speaker",
        "",
    ),
    "an exchange with a weight": (
        Demonstration,
        {"conversation": [{"input": "Hi", "output": "Yo", "weight": 0}]},
        "weight is 0",
        "",
    ),
    "a prompt that a template wrote": (
        Demonstration,
        {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "completion": "Yo"},
        "the mark of a chat template",
        "",
    ),
    "a prompt of llama 2": (
        Demonstration,
        {"prompt": "<s>[INST] Hi [/INST]", "completion": "Yo"},
        "holds '<s>\\[INST\\]'",
        "",
    ),
    "a reply with its end": (
        Demonstration,
        {"prompt": "Hi", "completion": "Yo<|eot_id|>\n"},
        "holds '<|eot_id|>'".replace("|", r"\|"),
        "",
    ),
    "pairs that a template wrote": (
        PreferencePair,
        {"chosen": "<|user|>\nIs it?\n<|assistant|>\nYes.", "rejected": "<|user|>\nIs it?\n<|assistant|>\nNo."},
        "the mark of a chat template",
        "",
    ),
    "messages as the context of a prompt": (
        Demonstration,
        {"context": json.dumps([user("Hi"), said("Yo")]), "prompt": "And?", "completion": "Bye"},
        "column 'history'",
        "",
    ),
    "red-team attempts": (
        Demonstration,
        {"transcript": "\n\nHuman: Hi\n\nAssistant: Yo", "rating": 4.0, "task_description": "x"},
        "no known layout has the columns rating, task_description, transcript",
        "",
    ),
    "comparisons of summaries": (
        PreferencePair,
        {"info": {"post": "Long."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        "no known layout has the columns choice, info, summaries",
        "",
    ),
    "process bench": (
        SteppedResponse,
        {"problem": "1+1?", "steps": ["1+1", "= 3"], "final_answer_correct": False, "label": 1},
        "not SteppedResponse",
        "",
    ),
    "label studio": (
        PreferencePair,
        {"id": 1, "data": {"prompt": "Hi"}, "annotations": [{"result": []}]},
        "no known layout has the columns annotations, data, id",
        "",
    ),
    "a call without words": (
        Demonstration,
        {"messages": [user("Hi"), said(None, tool_calls=[{"function": {"name": "f"}}]), user("?"), said("Yo")]},
        "calls a tool",
        "",
    ),
    "nothing said": (Demonstration, {"messages": [user("Hi"), said(None)]}, r"content is None .* text is needed", ""),
    "a reply that is no number": (Demonstration, {"prompt": "Hi", "completion": float("nan")}, "completion is nan", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_would_be_read_wrongly_is_refused_and_the_way_out_works(file, name):
    kind, row, message, option = REFUSED[name]
    path = file(row)
    with pytest.raises(DataError, match=message) as caught:
        load(kind, path)
    if option:
        assert f"{path}?{option}" in caught.value.fix
        assert load(kind, f"{path}?{option}").records


def test_a_question_about_the_marks_of_a_template_is_one(file):
    rows = [
        {"prompt": text, "completion": "Yo"} for text in ("What is <|im_end|>", "[INST] opens it?", "<|user|> or user?")
    ]
    assert [found.prompt.text for found in load(Demonstration, file(*rows)).records] == [row["prompt"] for row in rows]


def test_the_contents_of_messages_are_taken_as_they_are(file):
    row = {"prompt": [user("What is <|im_end|>")], "completion": [said("It ends a turn: <|im_end|>")]}
    [found] = load(Demonstration, file(row)).records
    assert found.response == "It ends a turn: <|im_end|>"


def test_a_text_that_is_struck_out_is_no_end_token(file):
    [found] = load(Demonstration, file({"prompt": "Hi", "completion": "<s>Yo</s>"})).records
    assert found.response == "<s>Yo</s>"


def test_what_a_question_is_about_becomes_part_of_it_under_the_name_of_a_context(file):
    path = file({"article": "Bob did it with a knife.", "question": "Who?", "answer": "Bob"})
    [found] = load(Demonstration, f"{path}?columns=article:context").records
    assert found.prompt.text == "Who?\n\nBob did it with a knife."


def test_a_reply_that_the_conversation_ends_with_need_not_be_left_out_in_any_row(file):
    row = {"instruction": "Hi", "response": "Yo", "conversations": TALK}
    rows = [row] * 1001
    assert len(load(Demonstration, file(*rows)).records) == 1001
    with pytest.raises(DataError, match="two columns may be the reply"):
        load(Demonstration, file(*rows[:10], {**row, "response": "No"}))
