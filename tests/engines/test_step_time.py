"""The time of a step on paper, by hand and beside what one GPU took."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.test_placement import CPU, GPU, H200, JOB, LARGE, POLICY, SHAPE
from trimtab.engines.machines import MACHINES
from trimtab.engines.placement import RoleOnPaper, SamplingOnPaper, Spread, holding
from trimtab.engines.step_time import step_time

H100 = MACHINES["h100"]


def test_an_update_by_hand():
    # 16,384 tokens; activations again: 8 operations for each weight of the blocks, at 0.375 x 720 TFLOP/s
    blocks = 8 * 28 * SHAPE.linear_weights * 16_384 / 270e12
    # two rows of 8,192: 4 x 28 x 2,048 operations for each of 2 x 8,192^2 / 2 pairs, and 2.5 times as many back
    pairs = 2 * 8192**2 / 2
    attention = 4 * 28 * 2048 * pairs * (1 / 323e12 + 2.5 / 218e12)
    head = 8 * 151_936 * 1024 * 16_384 / 382e12
    adam = 28 * 596_049_920 / 3.2e12
    assert step_time(JOB, H200, Spread()).total == pytest.approx(blocks + attention + head + adam, rel=1e-6)


def test_scoring_and_the_models_of_rewards_by_hand():
    judge = RoleOnPaper(name="reward model", shape=replace(SHAPE, scalar=True), controller_only=True, passes=2)
    job = replace(JOB, roles=(replace(POLICY, trained=False), judge), num_trees=4)
    # the controller judges all four, also with two processes; a scalar head takes no time
    tokens, pairs = 4 * 8192, 4 * 8192**2 / 2
    once = 2 * 28 * SHAPE.linear_weights * tokens / 270e12 + 4 * 28 * 2048 * pairs / 323e12
    assert step_time(job, H200, Spread(processes=2)).scoring == pytest.approx(2 * once, rel=1e-6)


def test_gradients_are_added_in_a_ring():
    # eight processes: 2 x 7/8 of 4 bytes of each weight, at 360 GB/s
    times = step_time(replace(JOB, num_trees=16), H100, Spread(processes=8))
    assert times.communication == pytest.approx(2 * 7 / 8 * 4 * 596_049_920 / 360e9)


def test_shards_are_gathered_twice_and_scattered_once_for_each_micro_batch():
    job = replace(JOB, roles=(RoleOnPaper(name="policy", shape=LARGE, trained=True),), num_trees=32)
    spread = Spread(processes=8, shard=True)
    assert job.num_micro(8) == 2  # four of 8,192 tokens each, two at a time
    expected = 2 * 3 * 7 / 8 * 4 * 8_030_261_248 / 360e9
    assert step_time(job, H100, spread).communication == pytest.approx(expected)
    half = replace(spread, assumed=frozenset({"gather-bfloat16"}))
    assert step_time(job, H100, half).communication == pytest.approx(expected * 2 / 3)
    # between nodes at 40 GB/s, one micro-batch of 16
    wide = step_time(job, H100, Spread(processes=16, shard=True)).communication
    assert wide == pytest.approx(3 * 15 / 16 * 4 * 8_030_261_248 / 40e9)
    assert step_time(job, H100, Spread()).communication == 0


def test_processes_share_the_work():
    job = replace(JOB, num_trees=16)
    one, eight = (step_time(job, H100, Spread(processes=n)).update for n in (1, 8))
    adam = 28 * 596_049_920 / H100["optimizer"]
    assert one - adam == pytest.approx(8 * (eight - adam))


def test_frozen_weights_take_two_operations_fewer():
    frozen = replace(JOB, roles=(replace(POLICY, adapter=SHAPE.adapter_weights(16)),))
    saved = step_time(JOB, H200, Spread()).update - step_time(frozen, H200, Spread()).update
    blocks = 2 * 28 * SHAPE.linear_weights * 16_384 / 270e12
    head = 2 * 151_936 * 1024 * 16_384 / 382e12
    adam = 28 * (596_049_920 - SHAPE.adapter_weights(16)) / 3.2e12
    assert saved == pytest.approx(blocks + head + adam, rel=1e-6)


def test_with_vllm_a_decoding_step_only_reads():
    sampling = SamplingOnPaper(batch_size=64, cache_gib=30, bfloat16=True)
    job = replace(JOB, roles=(replace(POLICY, trained=False),), num_trees=64, sampling=sampling, reply_tokens=128)
    ours, theirs = (step_time(job, H100, Spread(assumed=frozenset(assumed))).sampling for assumed in ((), ("vllm",)))
    assert ours > 128 * 28 * 1.3e-3  # starting operations
    assert theirs < ours / 10


@pytest.mark.parametrize(
    ("row", "trees", "tokens"),
    [
        (GPU["sft"]["bfloat16"], 2, (0, 8192, 1)),
        (GPU["rl"]["16,384 tokens"], 2, (1024, 15 * 1024, 1)),
        (GPU["rl"]["replies alone"], 16, (1024, 1024, 1)),
        (GPU["rl"]["groups of 8"], 2, (1024, 1024, 8)),
    ],
)
def test_steps_on_one_h200_took_as_long(row, trees, tokens):
    prompt, reply, replies = tokens
    job = replace(JOB, num_trees=trees, prompt_tokens=prompt, reply_tokens=reply, replies=replies)
    assert step_time(job, H200, Spread()).total == pytest.approx(row["seconds"], rel=0.25)


def test_the_share_of_products_is_that_of_its_row(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    found = importlib.import_module("paper_plans").bfloat16_share(GPU)
    assert found == pytest.approx(H200["bfloat16_share"], rel=0.01)


def test_vllm_is_counted_in_bfloat16_whatever_the_run_file_says():
    both = [SamplingOnPaper(batch_size=64, cache_gib=0.5, bfloat16=half) for half in (False, True)]
    jobs = [replace(JOB, num_trees=64, sampling=sampling, prompt_tokens=512, reply_tokens=512) for sampling in both]
    assumed = Spread(assumed=frozenset({"vllm"}))
    assert len({step_time(job, H100, assumed).sampling for job in jobs}) == 1
    first, second = (holding(job, H100, assumed).phases["sampling"] for job in jobs)
    assert first == second
    # 28 blocks, keys and values of 8 heads of 128 numbers in 2 bytes, 1,024 tokens for each reply that has room
    each = 2 * 2 * 28 * 1024 * 1024
    assert first["cache"] == int(0.5 * 2**30 / each) * each
    assert len({step_time(job, H100, Spread()).sampling for job in jobs}) == 2


@pytest.mark.parametrize("num", [2, 3, 16])
def test_processes_of_a_cpu_are_never_as_many_times_faster(num):
    job = replace(JOB, bfloat16=False, num_trees=16, prompt_tokens=64, reply_tokens=64)
    job = replace(job, sampling=SamplingOnPaper(batch_size=1, cache_gib=1, bfloat16=False))
    one, several = (step_time(job, CPU, Spread(processes=n)) for n in (1, num))
    for part in ("sampling", "scoring", "update"):
        assert num * getattr(several, part) >= getattr(one, part), part
    assert num * several.total > 1.5 * one.total
