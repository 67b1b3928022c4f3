"""Templates that only write contents are run once for each order of roles, and no others."""

from itertools import product

import pytest

from tests.data.conftest import make
from trimtab.core.types import Message
from trimtab.data.chat import Chat
from trimtab.data.templates import DEFAULT_TEMPLATE, only_writes_contents

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ 'S: none<|end|>\\n' }}"
    "{% endif %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TRIMMED = (
    "{{ eos_token }}{% for m in messages[:] %}{% if m.role == 'user' %}<|user|> {{ m.content | trim }}\n"
    "{% elif m.role == 'assistant' %}<|assistant|> {{ m['content'] ~ eos_token }}{% else %}"
    "{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
COUNTING = (
    "{{ messages | length }} {% for m in messages %}{{ loop.index0 }}{{ '<|' ~ m.role ~ '|>' ~ m.content }}<|end|>"
    "{% if not loop.last and messages[-1].role == 'assistant' and m.name is not defined %},{% endif %}{% endfor %}"
)
CONTENTS = ["", " ", "plain", "  blanks\n\n", "\ttabs\t", "{{ messages }}", "<|end|>", "äöü\u2028", "a\ue0000\ue001b"]


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, CHATML, TRIMMED, COUNTING])
def test_what_is_filled_in_is_what_the_template_writes(template):
    tokenizer = make("ours")
    tokenizer.chat_template = template
    chat = Chat(tokenizer)
    assert only_writes_contents(template)
    one = [[Message("user", a)] for a in CONTENTS]
    three = [
        [Message("user", a), Message("assistant", b), Message("user", a + b)] for a, b in product(CONTENTS, CONTENTS)
    ]
    for messages, rendered in zip(one + three, chat.render_many(one + three, True), strict=True):
        turns = [{"role": m.role, "content": m.content} for m in messages]
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert rendered == expected


def test_a_conversation_that_such_a_template_refuses_is_refused():
    tokenizer = make("ours")
    tokenizer.chat_template = TRIMMED
    refused, fine = Chat(tokenizer).render_many([[Message("system", "be brief")], [Message("user", "hi")]], True)
    assert "no system turns" in str(refused)
    assert isinstance(fine, str)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if 'x' in m.content %}!{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% set c = m.content %}{{ c }}{% endfor %}",
        "{% for m in messages %}{{ ('a ' + m.content) | trim }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content.strip() }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:5] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}{{ m }}{% endfor %}",
        "{% for m in messages %}{{ m.values() }}{% endfor %}",
        "{% for m in messages %}{{ m['items']() }}{% endfor %}",
        "{% for m in messages %}{% for k in m %}{{ m[k] }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m[key] }}{% endfor %}",
        "{% for m in messages %}{{ m.content if m.role == 'user' else '' }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ loop.previtem.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% if loop.changed(m.content) %}!{% endif %}{% endfor %}",
        "{% for m in messages if m.content %}{{ m.content }}{% endfor %}",
        "{% for m in messages | selectattr('content') %}{{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages recursive %}{{ m.content }}{{ loop(messages[1:]) }}{% endfor %}",
        "{% for role, content in messages %}{{ content }}{% endfor %}",
        "{% for m in [messages[0]] %}{{ m.content }}{% endfor %}{% if messages %}!{% endif %}",
        "{{ messages | tojson }}",
        "{{ messages[0] }}",
        "{{ messages[0].content == 'a' }}",
        "{{ messages | map(attribute='content') | join }}",
        "{% set first = messages[0] %}{{ first.content }}",
        "{% set ns = namespace(c='') %}{% for m in messages %}{% set ns.c = m.content %}{{ ns.c }}{% endfor %}",
        "{% macro say(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
        "{% macro all() %}{% for m in messages %}{{ m.content }}{% endfor %}{% endmacro %}{{ all() | upper }}",
        "{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}",
        "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | trim }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}",
    ],
)
def test_a_template_that_may_look_at_contents_is_run_each_time(template):
    assert not only_writes_contents(template)
