"""A template that writes the date writes the same one on every day."""

import copy

import pytest

from trimtab.core.errors import DataError
from trimtab.core.types import Message
from trimtab.data.chat import Chat
from trimtab.rewards.written_text import WrittenText

TURNS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}", "Current date: 2024-07-26"),
        ("{{ 'Today: ' + strftime_now('%d %B %Y, %H:%M') }}", "Today: 26 July 2024, 00:00"),
        ("{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
         "{{ 'Today Date: ' + date_string }}", "Today Date: 26 Jul 2024"),
        ("{{ strftime_now('%-d.%-m.%y %P %U %G') }}", "26.7.24 am 29 2024"),
    ],
)  # fmt: skip
def test_the_date_of_a_template_is_that_of_every_day(tokenizers, head, said):
    tokenizer = copy.deepcopy(next(iter(tokenizers.values())))
    tokenizer.chat_template = head + TURNS
    ids = Chat(tokenizer).encode_prompt([Message("user", "a")])
    assert said in tokenizer.decode(ids)


def test_of_several_templates_the_default_is_used_and_has_that_date_too(tokenizers):
    tokenizer = copy.deepcopy(next(iter(tokenizers.values())))
    dated = "{{ strftime_now('%Y-%m-%d') }}" + TURNS
    tokenizer.chat_template = {"default": dated, "tool_use": "{{ tools }}" + TURNS}
    ids = Chat(tokenizer).encode_prompt([Message("user", "a")])
    assert "2024-07-26" in tokenizer.decode(ids)
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    tokenizer.chat_template = {"rag": TURNS, "tool_use": TURNS}
    with pytest.raises(DataError, match=r"templates named 'rag', 'tool_use', and none named 'default'"):
        Chat(tokenizer)


def test_what_a_template_writes_behind_a_reply_does_not_depend_on_its_date(tokenizers):
    tokenizer = copy.deepcopy(next(iter(tokenizers.values())))
    tokenizer.chat_template = TURNS.replace("'<|end|>'", "'<|end|>' + 'b'")
    ending = WrittenText.of(Chat(tokenizer), None).ending
    assert len(ending) > 1
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    assert WrittenText.of(Chat(tokenizer), None).ending == ending
