import math
import os
import signal
import sys

import pytest
import torch

from trimtab.core.errors import ConfigError
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.python_callable import PythonCallable
from trimtab.rewards.shaping import Length

MODULE = """
import math
def length(prompt, response, facts): return len(response) + facts.get("bonus", 0)
def question(prompt, response, facts): return float(prompt.text == "Try it.")
def odd(prompt, response, facts):
    if response == "raise": raise RuntimeError("cannot say")
    others = {"none": None, "inf": math.inf, "nan": math.nan, "text": "5", "huge": 10**400, "wide": 1e300}
    return others.get(response, 2)
def changes(prompt, response, facts): return facts.pop("bonus") + len(facts["list"].pop())
def two(prompt, response): return 1
def moves(prompt, response, facts):
    import os
    os.chdir("/")
    return 1
def verl(data_source, solution_str, ground_truth, extra_info=None): return 1
def openrlhf(queries, prompts, labels): return 1
def swapped(response, prompt, facts): return 1
def one_fact(prompt, response, answer): return float(response == answer)
def exits(prompt, response, facts): raise SystemExit(3)
def prints(prompt, response, facts): print("seen", response); return 1
def hangs(prompt, response, facts):
    while True:
        try: pass
        except Exception: pass
def sleeps(prompt, response, facts):
    import time
    try: time.sleep(60)
    except Exception: return 1
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
    (tmp_path / "exits.py").write_text("raise SystemExit(4)")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "json.py").write_text("from beside import seven\ndef f(prompt, response, facts): return seven")
    (tmp_path / "deep" / "beside.py").write_text("seven = 7")
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
    replies = ["fine", "raise", "none", "inf", "nan", "text", "huge", "wide"]
    combined = load_rewards([PythonCallable(function="my_rewards:odd"), Length(max_tokens=100)], token_budget=1)
    values, metrics = combined.score([rollout(r) for r in replies])
    assert values[0] == 2
    assert torch.isnan(values[1:]).all()
    assert metrics["reward/callable_failed"].value == 7
    assert metrics["reward/length_failed"].value == 0
    assert metrics["reward/callable"].value == 2
    assert metrics["reward/mean"].value == 2
    assert "reward callable could not judge 7 of 8 replies" in caplog.text
    assert "RuntimeError: cannot say" in caplog.text


def test_a_function_that_changes_the_directory_is_named_and_the_run_stays(module, rollout, caplog, tmp_path):
    assert torch.isnan(scores("my_rewards:moves", [rollout("any")])).all()
    assert f"my_rewards:moves changed the working directory to /, and the run writes into {tmp_path}" in caplog.text
    assert os.getcwd() == str(tmp_path)


def test_a_number_that_32_bits_cannot_hold_is_named(module, rollout, caplog):
    assert torch.isnan(scores("my_rewards:odd", [rollout("wide")])).all()
    assert "the score is 1e+300, which is no finite number of 32 bits" in caplog.text


def test_a_function_that_changes_its_facts_changes_those_of_no_other_reply(module, rollout):
    reply = rollout("any", bonus=2, list=["abc"])
    assert [scores("my_rewards:changes", [reply, reply]).tolist() for _ in range(2)] == [[5.0, 5.0], [5.0, 5.0]]
    assert reply.prompt.facts == {"bonus": 2, "list": ["abc"]}


def test_a_batch_in_which_nothing_can_be_judged_has_no_mean(module, rollout):
    values, metrics = load_rewards([PythonCallable(function="my_rewards:odd")], token_budget=1).score([rollout("nan")])
    assert torch.isnan(values).all()
    assert math.isnan(metrics["reward/mean"].value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_rewards.py:lenght", "did you mean 'length'"),
        ("./my_rewards:length", "did you mean my_rewards.py"),
        ("nowhere/my_rewards.py:length", "there is no file 'nowhere/my_rewards.py'"),
        ("broken_rewards.py:f", "ZeroDivisionError"),
        ("exits.py:f", "SystemExit: 4"),
        ("exits:f", "SystemExit: 4"),
        ("my_rewards", "form module:name"),
        ("my_rewards:", "form module:name"),
        ("no_such_module_here:f", "No module named"),
        ("broken_rewards:f", "ZeroDivisionError"),
        ("my_rewards:lenght", "did you mean 'length'"),
        ("my_rewards:zzz", "name a function that it defines"),
        ("my_rewards:two", "def name\\(prompt, response, facts\\)"),
        ("my_rewards:number", "cannot be called"),
        ("my_rewards:verl", "takes data_source, solution_str, ground_truth; it is called for one reply"),
        ("my_rewards:openrlhf", "takes queries, prompts, labels; it is called for one reply"),
        ("my_rewards:swapped", "takes response, prompt, facts; it is called for one reply"),
        ("my_rewards:one_fact", "takes prompt, response, answer; it is called for one reply"),
    ],
)
def test_a_bad_name_says_what_is_wrong_when_it_is_loaded(name, words, module):
    with pytest.raises(ConfigError, match=words):
        PythonCallable(function=name).load(token_budget=1)


@pytest.mark.parametrize("name", ["my_rewards.py:length", "./my_rewards.py:length"])
def test_the_function_may_be_named_by_its_file(name, module, rollout):
    assert scores(name, [rollout("hello", bonus=1)]).tolist() == [6.0]


def test_a_file_sees_its_neighbours_and_may_be_called_like_a_known_module(module, rollout, tmp_path):
    assert scores("deep/json.py:f", [rollout("any")]).tolist() == [7.0]
    assert scores(f"{tmp_path}/deep/json.py:f", [rollout("any")]).tolist() == [7.0]
    assert "deep" not in sys.modules["json"].__file__
    sys.modules.pop("beside")


def test_a_function_that_exits_is_named_and_ends_nothing(module, rollout, caplog):
    assert torch.isnan(scores("my_rewards:exits", [rollout("any")])).all()
    assert "my_rewards:exits called sys.exit(3) instead of returning a number" in caplog.text


@pytest.mark.parametrize("name", ["hangs", "sleeps"])
def test_a_function_that_hangs_is_named_and_stopped(name, module, rollout, caplog):
    scorer = PythonCallable(function=f"my_rewards:{name}", seconds=0.1).load(token_budget=1)
    assert torch.isnan(scorer.score([rollout("any")])[0]).all()
    assert f"my_rewards:{name} gave no answer within 0.1 s" in caplog.text
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_what_a_function_prints_is_named_and_kept_out_of_the_output(module, rollout, capsys):
    assert scores("my_rewards:prints", [rollout("a"), rollout("b")]).tolist() == [1.0, 1.0]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "my_rewards:prints: seen a\nmy_rewards:prints: seen b\n"


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="leaves no time"):
        PythonCallable(function="my_rewards:length", seconds=0)
