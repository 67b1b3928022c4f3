import importlib.util
import json
import time

import pytest

from trimtab.core.errors import ConfigError, EngineError
from trimtab.rewards.formats import JsonSchema, ReasoningFormat, Regex, last_fenced

with_schemas = pytest.mark.skipif(
    not importlib.util.find_spec("jsonschema"), reason="needs pip install 'trimtab[json]'"
)


def scores(settings, rollouts):
    return settings.load(token_budget=1).score(rollouts)[0].tolist()


def test_a_pattern_matches_the_whole_reply_or_a_part(rollout):
    replies = [rollout(text) for text in ("yes", "yes\nno", "no")]
    assert scores(Regex(pattern="yes|no.*"), replies) == [1, 0, 1]
    assert scores(Regex(pattern="yes", match="search"), replies) == [1, 1, 0]
    assert scores(Regex(pattern="yes.no"), replies) == [0, 1, 0]


def test_a_pattern_that_takes_for_ever_is_ended_and_the_next_reply_judged(rollout, caplog):
    started = time.monotonic()
    values = scores(Regex(pattern="(a+)+b", seconds=1.0), [rollout("aab"), rollout("a" * 60), rollout("ab")])
    assert values[0] == values[2] == 1
    assert values[1] != values[1]
    assert "no judgement within 1 s" in caplog.text
    assert time.monotonic() - started < 120  # about two seconds; the rest is for a busy machine


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        Regex(pattern="(")


@pytest.mark.parametrize(
    ("reply", "holds"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("<think>\na\n</think>\n<answer>b</answer>\n", True),
        ("<think>a</think> so <answer>b</answer>", False),
        ("well <think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> bye", False),
        ("<think></think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("a</think><answer>b</answer>", False),
        ("", False),
    ],
)
def test_reasoning_comes_before_the_answer_and_nothing_beside_them(reply, holds, rollout):
    assert scores(ReasoningFormat(), [rollout(reply)]) == [float(holds)]


@pytest.mark.parametrize(
    ("settings", "reply", "holds"),
    [
        (ReasoningFormat(opened=True), "a</think><answer>b</answer>", True),
        (ReasoningFormat(opened=True), "<think>a</think><answer>b</answer>", False),
        (ReasoningFormat(answer=""), "<think>a</think>b", True),
        (ReasoningFormat(answer=""), "<think>a</think>", False),
        (ReasoningFormat(reasoning="r", answer="a"), "<r>1</r><a>2</a>", True),
    ],
)
def test_the_tags_are_settings(settings, reply, holds):
    assert settings.holds(reply) is holds


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return str(path)


@with_schemas
def test_only_json_of_the_schema_is_right(schema, rollout):
    replies = ['{"n": 1}', '{"n": 1.5}', '{"n": 1, "m": 2}', "{}", "n", '{"n": NaN}', "[" * 100_000, '{"n": 1} x']
    assert scores(JsonSchema(schema=schema), [rollout(r) for r in replies]) == [1, 0, 0, 0, 0, 0, 0, 0]


@with_schemas
def test_json_may_stand_in_a_block(schema, rollout):
    replies = ['Here:\n```json\n{"n": 1}\n```\nDone.', '{"n": 1}', '```\n{"n": 1}\n```\n```\n{}\n```']
    assert scores(JsonSchema(schema=schema, find="fenced"), [rollout(r) for r in replies]) == [1, 0, 0]


@with_schemas
def test_a_schema_that_takes_for_ever_is_ended(tmp_path, rollout):
    path = tmp_path / "slow.json"
    path.write_text('{"type": "string", "pattern": "^(a+)+$"}')
    values = scores(JsonSchema(schema=str(path), seconds=1.0), [rollout('"aa"'), rollout('"' + "a" * 60 + 'b"')])
    assert values[0] == 1
    assert values[1] != values[1]


@with_schemas
def test_a_reference_to_another_address_is_not_fetched(tmp_path, rollout):
    path = tmp_path / "remote.json"
    path.write_text('{"$ref": "http://127.0.0.1:9/schema.json"}')
    value = scores(JsonSchema(schema=str(path)), [rollout("1")])[0]
    assert value != value


@with_schemas
@pytest.mark.parametrize("text", ["{", '{"type": "nothing"}', None])
def test_a_file_that_is_no_schema_is_refused_when_it_is_loaded(text, tmp_path):
    path = tmp_path / "schema.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="schema"):
        JsonSchema(schema=str(path)).load(token_budget=1)


def test_schemas_without_their_library_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'trimtab\[json\]'"):
        JsonSchema(schema="x").load(token_budget=1)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("a\n```\n1\n```\nb\n```py\n2\n```\n", "2\n"),
        ("```python\nx = '``'\n```  ", "x = '``'\n"),
        ("```python\nx = 1", None),
        ("no code", None),
        ("```python\nx = 1\n```\nIt prints:\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```Python3\nx = 2\n```\n```text\n2\n```", "x = 2\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```\n", "if x:\n    y\n"),
        ("```python\nx = '''\n  ```\n'''\n```", "x = '''\n  ```\n'''\n"),
    ],
)
def test_the_last_block_between_fences_is_found(reply, code):
    assert last_fenced(reply, ("python", "python3", "py")) == code


@pytest.mark.parametrize(
    ("opened", "reply", "words"),
    [
        (
            False,
            "I add.</think><answer>4</answer>",
            "set opened = true if the chat template ends the prompt with the tag",
        ),
        (True, "<think>I add.</think><answer>4</answer>", "set opened = false if the chat template leaves the tag"),
    ],
)
def test_replies_that_fit_the_other_way_to_begin_are_noted(opened, reply, words, rollout, caplog):
    values, _ = ReasoningFormat(opened=opened).load(token_budget=1).score([rollout(reply), rollout("4")])
    assert values.tolist() == [0, 0]
    assert words in caplog.text
    caplog.clear()
    assert ReasoningFormat(opened=not opened).load(token_budget=1).score([rollout(reply)])[0].item() == 1
    assert not caplog.text
