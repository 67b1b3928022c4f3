from __future__ import annotations

from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.data.split import split_by_prompt


def prompt(text: str, **more) -> Prompt:
    return Prompt(messages=(Message("user", text),), **more)


def test_no_prompt_is_on_both_sides_of_a_split_and_every_record_is_on_one():
    pairs = [
        PreferencePair(prompt=prompt(f"q{i}"), chosen=c, rejected="no") for c in ("yes", "well") for i in range(500)
    ]
    train, held_out = split_by_prompt(pairs, 0.2)
    assert not {p.prompt.id for p in train} & {p.prompt.id for p in held_out}
    assert len(train) + len(held_out) == 1000
    assert 140 < len(held_out) < 260  # 200 expected; 4.7 standard deviations


def test_a_prompt_stays_on_its_side_as_data_is_added():
    prompts = [prompt(f"q{i}") for i in range(200)]
    _, held_out = split_by_prompt(prompts[:50])
    _, held_out_later = split_by_prompt(prompts[::-1])
    assert {p.id for p in held_out} == {p.id for p in held_out_later} & {p.id for p in prompts[:50]}


def test_the_sides_are_the_same_on_every_machine():
    # printf 'ID' | sha256sum begins with less than a tenth of ffff… for these alone
    assert [p.text for p in split_by_prompt([prompt(f"q{i}") for i in range(30)])[1]] == ["q2", "q14", "q22"]


def test_one_conversation_under_several_ids_is_on_one_side():
    prompts = [prompt(f"q{i % 100}", id=f"row {i}") for i in range(300)]
    train, held_out = split_by_prompt(prompts, 0.3)
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert held_out


def test_the_place_of_a_prompt_is_that_of_its_messages_and_not_of_its_id():
    # 60 rows of 10 prompts, each with an id of its own, in two files that share some rows
    rows = [prompt(f"q{i % 10}", id=f"row {i}") for i in range(60)]
    train, held_out = split_by_prompt(rows, 0.3)
    _, of_a_part = split_by_prompt(rows[25:45], 0.3)
    assert len(held_out) % 6 == 0  # all six rows of a prompt, or none
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert {p.text for p in of_a_part} == {p.text for p in held_out}


def test_nothing_is_held_out_when_nothing_is_asked_for():
    prompts = [prompt(f"q{i}") for i in range(50)]
    assert split_by_prompt(prompts, 0.0) == (prompts, [])
