"""A template that writes the date writes the same one on every day."""

import copy

import pytest

from trimtab.core.types import Message
from trimtab.data.chat import Chat

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
    ],
)  # fmt: skip
def test_the_date_of_a_template_is_that_of_every_day(tokenizers, head, said):
    tokenizer = copy.deepcopy(next(iter(tokenizers.values())))
    tokenizer.chat_template = head + TURNS
    ids = Chat(tokenizer).encode_prompt([Message("user", "a")])
    assert said in tokenizer.decode(ids)
