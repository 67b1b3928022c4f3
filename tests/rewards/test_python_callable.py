import math
import sys

import pytest
import torch

from trimtab.errors import ConfigError
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.python_callable import PythonCallable
from trimtab.rewards.shaping import Length

MODULE = """
import math
def length(prompt, response, facts): return len(response) + facts.get("bonus", 0)
def question(prompt, response, facts): return float(prompt.text == "Try it.")
def odd(prompt, response, facts):
    if response == "raise": raise RuntimeError("cannot say")
    return {"none": None, "inf": math.inf, "nan": math.nan, "text": "5", "huge": 10**400}.get(response, 2)
def two(prompt, response): return 1
class Scorer:
    def __call__(self, prompt, response, facts): return 7
    @staticmethod
    def inside(prompt, response, facts): return 8
scorer = Scorer()
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def scores(name, rollouts):
    return PythonCallable(function=name).load(token_budget=1).score(rollouts)[0]


@pytest.mark.parametrize(
    ("name", "value"), [("length", 6.0), ("question", 1.0), ("scorer", 7.0), ("Scorer.inside", 8.0)]
)
def test_the_function_sees_prompt_response_and_facts(name, value, module, rollout):
    assert scores(f"my_rewards:{name}", [rollout("hello", bonus=1)]).tolist() == [value]
    assert "" not in sys.path[:1]


def test_what_raises_or_returns_no_number_is_nan_counted_and_named(module, rollout, caplog):
    replies = ["fine", "raise", "none", "inf", "nan", "text", "huge"]
    combined = load_rewards([PythonCallable(function="my_rewards:odd"), Length(max_tokens=100)], token_budget=1)
    values, metrics = combined.score([rollout(r) for r in replies])
    assert values[0] == 2
    assert torch.isnan(values[1:]).all()
    assert metrics["reward/callable_failed"].value == 6
    assert metrics["reward/length_failed"].value == 0
    assert metrics["reward/callable"].value == 2
    assert metrics["reward/mean"].value == 2
    assert "reward callable could not judge 6 of 7 replies" in caplog.text
    assert "RuntimeError: cannot say" in caplog.text


def test_a_batch_in_which_nothing_can_be_judged_has_no_mean(module, rollout):
    values, metrics = load_rewards([PythonCallable(function="my_rewards:odd")], token_budget=1).score([rollout("nan")])
    assert torch.isnan(values).all()
    assert math.isnan(metrics["reward/mean"].value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_rewards", "form module:name"),
        ("my_rewards:", "form module:name"),
        ("no_such_module_here:f", "No module named"),
        ("broken_rewards:f", "ZeroDivisionError"),
        ("my_rewards:lenght", "did you mean 'length'"),
        ("my_rewards:zzz", "name a function that it defines"),
        ("my_rewards:two", "def name\\(prompt, response, facts\\)"),
        ("my_rewards:number", "cannot be called"),
    ],
)
def test_a_bad_name_says_what_is_wrong_when_it_is_loaded(name, words, module):
    with pytest.raises(ConfigError, match=words):
        PythonCallable(function=name).load(token_budget=1)
