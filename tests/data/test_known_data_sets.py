"""Rows of well-known data sets, written anew in their layout: read as they are, or refused with what to do."""

from __future__ import annotations

import json

import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import (
    Comparison,
    Demonstration,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
    SteppedResponse,
)
from trimtab.data.layouts import load


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def prompt(*contents: str, system: str = "", **more) -> Prompt:
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(contents)]
    return Prompt(messages=tuple([Message("system", system)] if system else []) + tuple(turns), **more)


def shown(*contents: str, **more) -> Demonstration:
    return Demonstration(prompt=prompt(*contents[:-1], **more), response=contents[-1])


def pair(asked: Prompt, chosen: str = "Yes.", rejected: str = "No.", **more) -> PreferencePair:
    return PreferencePair(prompt=asked, chosen=chosen, rejected=rejected, **more)


@pytest.fixture
def file(tmp_path):
    def write(*rows: dict):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
IS_IT = [user("Is it?"), said("Yes.")], [user("Is it?"), said("No.")]

READ = {
    # conversations
    "capybara": (
        {"source": "x", "conversation": [{"input": "Hi", "output": "Yo"}, {"input": "And?", "output": "Bye"}]},
        shown("Hi", "Yo", "And?", "Bye"),
        ("source",),
    ),
    "xtuner": (
        {"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Yo"}]},
        shown("Hi", "Yo", system="Be brief."),
        (),
    ),
    "firefly": (
        {"conversation_id": 1, "category": "Chat", "conversation": [{"human": "Hi", "assistant": "Yo"}]},
        shown("Hi", "Yo"),
        ("category", "conversation_id"),
    ),
    "an exchange with more in it": (
        {"conversation": [{"input": "Hi", "output": "Yo", "sep": "|"}]},
        shown("Hi", "Yo"),
        ("conversation[].sep",),
    ),
    "earlier exchanges": (
        {"history": [{"user": "Hi", "assistant": "Yo"}], "prompt": "And?", "response": "Bye"},
        shown("Hi", "Yo", "And?", "Bye"),
        (),
    ),
    "lima": (
        {"conversations": ["Hi", "Yo", "And?", "Bye"], "source": "x"},
        shown("Hi", "Yo", "And?", "Bye"),
        ("source",),
    ),
    "magpie": (
        {
            "uuid": "u",
            "instruction": "Hi",
            "response": "Yo",
            "conversations": TALK,
            "input_quality": "good",
            "instruct_reward": -3.5,
            "gen_input_configs": {"temperature": 1.0},
        },
        shown("Hi", "Yo"),
        ("gen_input_configs", "input_quality", "instruct_reward", "instruction", "response", "uuid"),
    ),
    "ultrachat": (
        {"prompt": "Hi", "prompt_id": "7", "messages": [user("Hi"), said("Yo"), user("And?"), said("Bye")]},
        shown("Hi", "Yo", "And?", "Bye"),
        ("prompt", "prompt_id"),
    ),
    "tulu 3": (
        {"id": "t", "messages": [user("Hi"), said("Yo")], "source": "x"},
        shown("Hi", "Yo", id="t"),
        ("source",),
    ),
    "lmsys chat": (
        {
            "conversation_id": "c",
            "model": "m",
            "conversation": [{"content": "Hi", "role": "user"}, {"content": "Yo", "role": "assistant"}],
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"flagged": False}],
            "redacted": False,
        },
        shown("Hi", "Yo"),
        ("conversation_id", "language", "model", "openai_moderation", "redacted", "turn"),
    ),
    "wildchat": (
        {"conversation": [{**user("Hi"), "toxic": False, "hashed_ip": "x"}, said("Yo", timestamp="1")]},
        shown("Hi", "Yo"),
        ("conversation[].hashed_ip", "conversation[].timestamp", "conversation[].toxic"),
    ),
    "slim orca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {**TALK[0], "weight": 0.0},
                {**TALK[1], "weight": 1.0},
            ]
        },
        shown("Hi", "Yo", system="Be brief."),
        (),
    ),
    "open orca": (
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "Hi", "response": "Yo"},
        shown("Hi", "Yo", system="Be brief.", id="flan.1"),
        (),
    ),
    "sharegpt with an observation": (
        {
            "conversations": [
                TALK[0],
                {"from": "gpt", "value": "look()"},
                {"from": "observation", "value": "a cat"},
                {"from": "gpt", "value": "A cat."},
            ],
            "tools": "[]",
        },
        Demonstration(
            prompt=Prompt(
                messages=(Message("user", "Hi"), Message("assistant", "look()"), Message("tool", "a cat")),
            ),
            response="A cat.",
        ),
        (),
    ),
    "fine-tuning of openai": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user("a"),
                said("b", weight=0),
                user("c"),
                said("d"),
            ],
            "parallel_tool_calls": False,
        },
        Demonstration(prompt=prompt("a", "b", "c", system="Be brief."), response="d", untrained_turns=(0,)),
        ("parallel_tool_calls",),
    ),
    "parts of a table": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}]}, said("Yo")]},
        shown("Hi", "Yo"),
        (),
    ),
    "parts of responses": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Yo", "annotations": []}]},
            ]
        },
        shown("Hi", "Yo"),
        (),
    ),
    "a turn that is not trained": (
        {"messages": [user("a"), said("b", train_on=False), user("c"), said("d", loss_mask=1)]},
        Demonstration(prompt=prompt("a", "b", "c"), response="d", untrained_turns=(0,)),
        (),
    ),
    "a preamble": (
        {"preamble": "Be brief.", "prompt": "Hi", "completion": "Yo"},
        shown("Hi", "Yo", system="Be brief."),
        (),
    ),
    "open r1": (
        {"problem": "1+1?", "solution": "2", "problem_is_valid": "Yes", "correctness_count": 2},
        shown("1+1?", "2"),
        ("correctness_count", "problem_is_valid"),
    ),
    "a right answer beside the reply": (
        {"question": "1+1?", "response": "2", "correct_answer": "2", "correct": "A", "selected_index": 3},
        shown("1+1?", "2"),
        ("correct", "correct_answer", "selected_index"),
    ),
    "the best of our own": (
        {"prompt": "Hi", "completion": "Yo", "best_reward": 2.5},
        shown("Hi", "Yo"),
        ("best_reward",),
    ),
    # questions and answers
    "alpaca with its word for nothing": (
        {"instruction": "Hi", "input": "<noinput>", "output": "Yo", "text": "Below is an instruction. Hi. Yo"},
        shown("Hi", "Yo"),
        ("text",),
    ),
    "numina": (
        {"source": "x", "problem": "1+1?", "solution": r"\boxed{2}", "messages": [user("1+1?"), said(r"\boxed{2}")]},
        shown("1+1?", r"\boxed{2}"),
        ("problem", "solution", "source"),
    ),
    "hendrycks math": (
        {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
        shown("1+1?", r"It is $\boxed{2}$."),
        ("level", "type"),
    ),
    "metamath": (
        {"type": "GSM_Rephrased", "query": "1+1?", "original_question": "1 + 1 = ?", "response": "The answer is: 2"},
        shown("1+1?", "The answer is: 2"),
        ("original_question", "type"),
    ),
    "a text that the prompt states": (
        {"prompt": "Sum up: Once there was a king.", "article": "Once there was a king.", "completion": "A king."},
        shown("Sum up: Once there was a king.", "A king."),
        ("article",),
    ),
    "a file that the question is about": (
        {"prompt": "Sum up.", "document": "report 2023.pdf", "completion": "Profit."},
        shown("Sum up.", "Profit."),
        ("document",),
    ),
    # pairs
    "skywork": ({"chosen": IS_IT[0], "rejected": IS_IT[1], "source": "x"}, pair(prompt("Is it?")), ("source",)),
    "tulu 3 preference": (
        {"id": "t", "prompt": "Is it?", "chosen": IS_IT[0], "rejected": IS_IT[1], "chosen_model": "m"},
        pair(prompt("Is it?", id="t")),
        ("chosen_model",),
    ),
    "magpie dpo": (
        {"instruction": "Is it?", "chosen": IS_IT[0], "rejected": IS_IT[1], "chosen_rewards": 1.5},
        pair(prompt("Is it?")),
        ("chosen_rewards",),
    ),
    "preferences of openai": (
        {
            "input": {"messages": [user("Is it?")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said("Yes.")],
            "non_preferred_output": [said("No.")],
        },
        pair(prompt("Is it?")),
        ("input.parallel_tool_calls",),
    ),
    "axolotl chat_template.default": (
        {"messages": [user("Is it?")], "chosen": said("Yes."), "rejected": said("No.")},
        pair(prompt("Is it?")),
        (),
    ),
    "axolotl chatml.argilla": (
        {"system": "Be brief.", "instruction": "Is it?", "chosen_response": "Yes.", "rejected_response": "No."},
        pair(prompt("Is it?", system="Be brief.")),
        (),
    ),
    "helpsteer 2 preference": (
        {
            "prompt": "Is it?",
            "response_1": "No.",
            "response_2": "Yes.",
            "preference_strength": 2,
            "preference_statement": "Response 2 is better.",
        },
        pair(prompt("Is it?")),
        ("preference_statement",),
    ),
    "helpsteer 3": (
        {"domain": "x", "context": [user("Is it?")], "response1": "Yes.", "response2": "No.", "overall_preference": -3},
        pair(prompt("Is it?")),
        ("domain",),
    ),
    "pku": (
        {
            "prompt": "Is it?",
            "response_0": "No.",
            "response_1": "Yes.",
            "is_response_0_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        pair(prompt("Is it?")),
        ("is_response_0_safe", "safer_response_id"),
    ),
    "a verdict of MT-Bench": (
        {"prompt": "Is it?", "answer_a": "No.", "answer_b": "Yes.", "winner": "[[B]]"},
        pair(prompt("Is it?")),
        (),
    ),
    "a place": (
        {"prompt": "Is it?", "response_a": "No.", "response_b": "Yes.", "choice": "second"},
        pair(prompt("Is it?")),
        (),
    ),
    "stack exchange with scores": (
        {
            "qid": 1,
            "question": "Is it?",
            "answers": [
                {"answer_id": 1, "text": "No.", "pm_score": 0, "selected": False},
                {"answer_id": 2, "text": "Yes.", "pm_score": 3, "selected": True},
            ],
        },
        pair(prompt("Is it?")),
        ("answers[].answer_id", "answers[].selected", "qid"),
    ),
    "distilabel": (
        {"instruction": "Is it?", "generations": ["Yes.", "No.", "Hm."], "ratings": [5, 1, None], "rationales": ["a"]},
        pair(prompt("Is it?")),
        ("rationales",),
    ),
    "rewards of several replies": (
        {"prompt": "Is it?", "responses": [{"text": "Yes.", "reward": 0.5}, {"text": "No.", "reward": -1}]},
        pair(prompt("Is it?")),
        (),
    ),
    "replies whose pair is given": (
        {"prompt": "Is it?", "response_0": "No.", "response_1": "Yes.", "chosen": "Yes.", "rejected": "No."},
        pair(prompt("Is it?")),
        ("response_0", "response_1"),
    ),
    # single replies
    "kto mix": (
        {"prompt": [user("Hi")], "completion": [said("Yo")], "label": False},
        LabelledResponse(prompt=prompt("Hi"), response="Yo", label=False),
        (),
    ),
    "llama factory kto": (
        {"conversations": TALK, "kto_tag": True},
        LabelledResponse(prompt=prompt("Hi"), response="Yo", label=True),
        (),
    ),
    "helpsteer": (
        {"prompt": "Hi", "response": "Yo", "helpfulness": 3, "correctness": 2, "verbosity": 1},
        RatedResponse(prompt=prompt("Hi"), response="Yo", rating=3),
        ("correctness", "verbosity"),
    ),
    "trl steps": (
        {"prompt": "1+1?", "completions": ["1+1", "= 2"], "labels": [True, True]},
        SteppedResponse(prompt=prompt("1+1?"), steps=("1+1", "= 2"), labels=(1, 1)),
        (),
    ),
    # prompts
    "verl": (
        {
            "data_source": "gsm8k",
            "prompt": [user("1+1?")],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": 0},
        },
        prompt(
            "1+1?",
            facts={
                "data_source": "gsm8k",
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "2"},
                "extra_info": {"index": 0},
            },
        ),
        (),
    ),
    "rlvr": (
        {"messages": [user("1+1?")], "ground_truth": "2", "dataset": "gsm8k"},
        prompt("1+1?", facts={"ground_truth": "2", "dataset": "gsm8k"}),
        (),
    ),
    "human eval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "canonical_solution": "    pass",
            "test": "t",
            "entry_point": "f",
        },
        prompt(
            "def f():\n",
            facts={"task_id": "HumanEval/0", "canonical_solution": "    pass", "test": "t", "entry_point": "f"},
        ),
        (),
    ),
    "squad": (
        {"id": "s", "context": "Bob did it.", "question": "Who?", "answers": {"text": ["Bob"], "answer_start": [0]}},
        prompt("Who?\n\nBob did it.", id="s", facts={"answers": {"text": ["Bob"], "answer_start": [0]}}),
        (),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_row_of_a_known_data_set_is_read_and_what_is_not_used_is_named(file, name):
    row, expected, unused = READ[name]
    loaded = load(type(expected), file(row, row), limit=1)
    assert loaded.records == [expected]
    assert sorted(loaded.unused) == sorted(unused)


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
