"""Rows of well-known data sets, written anew in their layout, are read as they are, and what is not used is named."""

from __future__ import annotations

import pytest

from tests.data.records import IS_IT, TALK, pair, prompt, said, shown, user
from trimtab.core.types import Demonstration, LabelledResponse, Message, Prompt, RatedResponse, SteppedResponse
from trimtab.data.layouts import load

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
    "messages field by field": (
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Yo"]}},
        shown("Hi", "Yo"),
        (),
    ),
    "a prompt field by field": (
        {"prompt": {"role": ["user"], "content": ["Hi"]}, "completion": "Yo"},
        shown("Hi", "Yo"),
        (),
    ),
    "messages of anthropic": (
        {
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [user("Hi"), said([{"type": "text", "text": "Yo"}])],
            "max_tokens": 100,
        },
        shown("Hi", "Yo", system="Be brief."),
        ("max_tokens", "system[].cache_control"),
    ),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Yo"}]}],
        },
        shown("Hi", "Yo", system="Be brief."),
        (),
    ),
    "a history under another name": (
        {"chat_history": [["Hi", "Yo"]], "question": "And?", "answer": "Bye"},
        shown("Hi", "Yo", "And?", "Bye", facts={"answer": "Bye"}),
        (),
    ),
    "a system message under another name": (
        {"systemMsg": "Be brief.", "prompt": "Hi", "completion": "Yo"},
        shown("Hi", "Yo", system="Be brief."),
        (),
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
    "aya": (
        {"inputs": "Hi", "targets": "Yo", "language": "English", "annotation_type": "original-annotations"},
        shown("Hi", "Yo"),
        ("annotation_type", "language"),
    ),
    "instructions with inputs": (
        {"instructions": "Add.", "inputs": "2 and 3", "outputs": "5"},
        shown("Add.\n\n2 and 3", "5"),
        (),
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
    "the side of a label studio": (
        {"prompt": "Is it?", "answer1": "No.", "answer2": "Yes.", "choice": "right"},
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
    "helpsteer 2 with several turns": (
        {
            "prompt": "Who won?\n<extra_id_1>Assistant\nGermany.\n<extra_id_1>User\nWhere?",
            "response": "In Rome.",
            "helpfulness": 4,
        },
        RatedResponse(prompt=prompt("Who won?", "Germany.", "Where?"), response="In Rome.", rating=4),
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
