import math
import resource

import pytest

from trimtab.core.config import dump, resolve
from trimtab.core.errors import EngineError
from trimtab.rewards.combined import load_rewards
from trimtab.rewards.unit_tests import UnitTests
from trimtab.sandbox.sandbox import Limits

ROOMY = Limits(seconds=20)
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def fenced(code):
    return f"Here it is.\n```python\n{code}\n```\n"


def scores(rollouts, **settings):
    try:
        return UnitTests(**{"limits": ROOMY} | settings).load(token_budget=1).score(rollouts)
    except EngineError as error:
        pytest.skip(f"needs namespaces or Landlock: {error.problem}")


def test_code_that_passes_every_test_is_right(rollout):
    codes = ["def add(a, b): return a + b", "def add(a, b): return 3", "def add(a, b", "add = None", ""]
    replies = [rollout(fenced(c), tests=TESTS) for c in codes] + [rollout("I can not.", tests=TESTS)]
    values, metrics = scores(replies)
    assert values.tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics["reward/unit_tests_passed"].value == pytest.approx(1.5 / 6)
    assert metrics["reward/unit_tests_no_code"].value == 1 / 6
    assert metrics["reward/unit_tests_timed_out"].value == 0
    assert scores(replies, score="share")[0].tolist() == [1, 0.5, 0, 0, 0, 0]


def test_the_whole_reply_may_be_the_code(rollout):
    assert scores([rollout("def add(a, b): return a + b", tests=TESTS)], code="whole")[0].tolist() == [1]


def test_setup_and_entry_point_are_facts_of_the_prompt(rollout):
    tests = "def check(candidate):\n    assert candidate(2) == TWICE"
    replies = [
        rollout(fenced(c), tests=tests, setup="TWICE = 4", entry_point="f") for c in ("f = lambda x: 2 * x", "f = abs")
    ]
    assert scores(replies)[0].tolist() == [1, 0]


def test_programs_are_compared_by_what_they_print(rollout):
    tests = [{"input": "2 3\n", "output": "5"}, {"input": "1 1\n", "output": "2\n\n"}]
    codes = ["print(sum(map(int, input().split())), end=' \\n\\n')", "print(5)", "raise SystemExit"]
    replies = [rollout(fenced(c), tests=tests) for c in codes]
    assert scores(replies)[0].tolist() == [1, 0, 0]
    assert scores(replies, score="share")[0].tolist() == [1, 0.5, 0]


def test_a_hostile_reply_does_not_touch_the_scores_of_the_others(rollout):
    loop = "def add(a, b):\n    while True: pass"
    values, metrics = scores(
        [rollout(fenced(c), tests=TESTS) for c in (loop, "import os\nos._exit(0)", "def add(a, b): return a + b")],
        limits=Limits(seconds=3),
        num_parallel=3,
    )
    assert values.tolist() == [0, 0, 1]
    assert metrics["reward/unit_tests_timed_out"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "no fact 'tests'"),
        ({"tests": []}, "which are no tests"),
        ({"tests": [1]}, "which are no tests"),
        ({"tests": ["assert ("]}, "no Python"),
    ],
)
def test_tests_that_judge_nothing_are_counted_and_not_a_zero(facts, words, rollout, caplog):
    scores([])  # skips where there is no sandbox
    combined = load_rewards([UnitTests(limits=ROOMY)], token_budget=1)
    values, metrics = combined.score([rollout(fenced("def add(a, b): return a + b"), **facts)])
    assert math.isnan(values[0])
    assert metrics["reward/unit_tests_failed"].value == 1
    assert words in caplog.text


def test_a_sandbox_that_cannot_be_made_is_counted_and_not_a_zero(rollout, caplog):
    scores([])
    scorer = UnitTests(limits=ROOMY).load(token_budget=1)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, allowed[1]))
    try:
        values, _ = scorer.score([rollout(fenced("def add(a, b): return a + b"), tests=TESTS)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert math.isnan(values[0])
    assert "could not judge 1 of 1" in caplog.text


def test_settings_survive_the_trip_through_toml():
    settings = UnitTests(limits=Limits(seconds=1.5), packages=("x",), score="share")
    assert resolve(UnitTests, dump(settings), where="here") == settings


def test_no_sandbox_at_a_time_is_refused():
    with pytest.raises(ValueError, match="num_parallel = 0"):
        UnitTests(num_parallel=0)


CHECK = "def check(candidate):\n    assert candidate(2) == 4"


@pytest.mark.parametrize("code", ["x = 1", "", "def g(x): return 4"])
def test_code_without_the_entry_point_is_wrong(code, rollout):
    assert scores([rollout(fenced(code), tests=CHECK, entry_point="f")])[0].tolist() == [0]


def test_an_entry_point_may_be_a_method(rollout):
    right = "class Solution:\n    def twice(self, x): return 2 * x"
    codes = [right, "class Solution: pass", "def twice(x): return 2 * x"]
    replies = [rollout(fenced(c), tests=CHECK, entry_point="Solution().twice") for c in codes]
    assert scores(replies)[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("tests", ['["assert add(1, 2) == 3"]', "['assert add(1, 2) == 3']"])
def test_a_list_of_tests_may_be_text(tests, rollout):
    codes = ["def add(a, b): return a + b", "def add(a, b): return 0"]
    assert scores([rollout(fenced(c), tests=tests) for c in codes])[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    "tests",
    [
        "",
        "['assert add(1, 2) == 3' 'assert add(1, 1) == 2']",
        CHECK,
        "class TestAdd:\n    def test_it(self): assert add(1, 2) == 3",
        "async def test_it(): assert add(1, 2) == 3",
        "def main(): assert add(1, 2) == 3\nif __name__ == '__main__': main()",
    ],
)
def test_tests_that_pass_without_any_code_judge_nothing(tests, rollout):
    assert math.isnan(scores([rollout(fenced("def add(a, b): return 0"), tests=tests)])[0].item())


def test_setup_may_be_a_list_of_lines(rollout):
    tests = "assert math.isclose(f(2), math.sqrt(2))"
    reply = rollout(fenced("def f(x): return x ** 0.5"), tests=tests, setup=["import math", "import os"])
    assert scores([reply])[0].tolist() == [1]
    wrong = rollout(fenced("def f(x): return x ** 0.5"), tests=tests, setup=[1])
    assert math.isnan(scores([wrong])[0].item())


def test_a_program_that_crashes_after_its_answer_is_wrong(rollout):
    tests = [{"input": "", "output": "5"}]
    codes = ["print(5)", "print(5)\nraise ValueError", "print(5)\nraise SystemExit(3)"]
    assert scores([rollout(fenced(c), tests=tests) for c in codes])[0].tolist() == [1, 0, 0]


def test_an_entry_point_named_like_a_function_of_python_is_the_code_s_own(rollout):
    tests = "def check(candidate):\n    assert candidate([1, 2]) == 3"
    codes = ["def sum(x): return x[0] + x[1]", "def sum(x): return 0", "y = 1"]
    assert scores([rollout(fenced(c), tests=tests, entry_point="sum") for c in codes])[0].tolist() == [1, 0, 0]
    called = [rollout(fenced(c), tests="assert sum([1, 2]) == 3", entry_point="sum") for c in codes[:2]]
    assert scores(called)[0].tolist() == [1, 0]
