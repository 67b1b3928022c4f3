"""The last step of a rehearsal is the largest of the run, and is not timed."""

import json
from types import SimpleNamespace

import pytest

from tests.stages.commands import SHORT
from trimtab.batches.trees import sequence_tree
from trimtab.core import config
from trimtab.core.types import Message, Prompt
from trimtab.engines.device import EngineSettings
from trimtab.stages.online.data import in_order_of_rehearsal
from trimtab.stages.online.settings import OnlineSettings
from trimtab.stages.online.state import endless
from trimtab.stages.plan import estimate
from trimtab.stages.rehearsal import MOST_STEPS, UNKNOWN, largest_step, rehearsing, steps_rehearsed
from trimtab.stages.sft import SFTSettings
from trimtab.stages.stage import FEW_STEPS
from trimtab.stages.supervised import Epochs


def settings_of(token_budget, workers=1):
    return SimpleNamespace(token_budget=token_budget, engine=EngineSettings(workers=workers))


def test_the_largest_step_has_the_largest_micro_batch_of_any_process():
    # With a budget of 10 the second step's are 3 + 3 + 3, 8 and the first's 5 + 5, 5; so large is no other.
    steps = [[5, 5, 5], [3, 8, 3, 3], [9]]
    assert largest_step(steps, settings_of(10)) == 0
    assert largest_step(steps, settings_of(8)) == 2  # a tree is never split
    assert largest_step(steps, settings_of(100)) == 1
    # two processes have 5 + 5 and 5, 8 and 3 + 3 + 3, 9 and none
    assert largest_step(steps, settings_of(100, workers=2)) == 0


def test_the_last_step_of_a_rehearsal_takes_the_largest():
    settings = SFTSettings(model="m", data="d", batch_size=4, token_budget=1000, seed=1)
    trees = [sequence_tree(list(range(2, 4 + i % 7 * 3 + 40 * (i == 77)))) for i in range(80)]
    plain = Epochs.of(settings, trees)
    assert plain.largest == ()
    sizes = [tree.num_tokens for tree in trees]
    with rehearsing(None):
        epochs = Epochs.of(settings, trees)
    totals = [sum(sizes[i] for i in plain.examples(step)) for step in range(plain.num_steps)]
    step = totals.index(max(totals))
    assert step != FEW_STEPS - 1
    assert 77 in epochs.examples(FEW_STEPS - 1)
    assert epochs.examples(FEW_STEPS - 1) == plain.examples(step)
    assert all(epochs.examples(n) == plain.examples(n) for n in range(FEW_STEPS - 1))
    assert set(epochs.used(FEW_STEPS)) >= set(plain.examples(step))


@pytest.mark.parametrize("num_steps", [1, FEW_STEPS])
def test_a_run_that_is_rehearsed_whole_is_not_changed(num_steps):
    trees = [sequence_tree([2] * (i + 2)) for i in range(80)]
    with rehearsing(num_steps):
        assert Epochs.of(SFTSettings(model="m", data="d", batch_size=4), trees).largest == ()
        assert steps_rehearsed(UNKNOWN) == 0
    with rehearsing(10):
        assert steps_rehearsed(UNKNOWN) == 10
        assert steps_rehearsed(7) == 7
    with rehearsing(None):
        assert steps_rehearsed(UNKNOWN) == MOST_STEPS
    assert steps_rehearsed(UNKNOWN) == 0


def test_prompts_are_put_in_order_for_a_rehearsal():
    rewards = [{"name": "exact_answer"}]
    values = {"model": "m", "prompts": "p", "rewards": rewards, "prompts_per_step": 3, "num_steps": 12, "seed": 4}
    settings = config.resolve(OnlineSettings, values | {"sampling": SHORT}, where="the test")
    prompts = [Prompt(messages=(Message("user", str(i)),)) for i in range(40)]
    lengths = [5 + 30 * (i == 31) for i in range(40)]
    assert in_order_of_rehearsal(prompts, lengths, settings) is prompts
    with rehearsing(12):
        changed = in_order_of_rehearsal(prompts, lengths, settings)
    assert sorted(p.text for p in changed) == sorted(p.text for p in prompts)
    order = endless(40, 1, 4)
    taken = [[prompts[i] for i in order.take(3 * n, 3 * n + 3)] for n in range(12)]
    (largest,) = [step for step in taken if prompts[31] in step]
    assert largest != taken[FEW_STEPS - 1]
    assert [changed[i] for i in order.take(9, 12)] == largest


def test_the_last_step_is_not_timed(tmp_path):
    rows = [{"time/step_seconds": s, "time/tokens_per_second": 1 / s} for s in (9.0, 2.0, 3.0, 50.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 70.0, "num_planned_steps": 100}))
    settings = SFTSettings(model=str(tmp_path), data="d")
    found = estimate("sft", "sft", settings, tmp_path, share_of_data=1.0)
    assert found.seconds_per_step == 2.5
    assert found.tokens_per_second == pytest.approx(1 / 3)
    assert found.seconds == pytest.approx(70 - 64 + 250, rel=0.1)  # and validations
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 70.0, "num_planned_steps": 4}))
    assert estimate("sft", "sft", settings, tmp_path, share_of_data=1.0).seconds_per_step == 3.0
