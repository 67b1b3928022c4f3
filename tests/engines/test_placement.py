"""What a process holds on paper, by hand and beside what one GPU held."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.test_shape import LLAMA_8B, QWEN3_06B
from trimtab.engines.machines import MACHINES, machine_of
from trimtab.engines.placement import GIB, Holding, Job, RoleOnPaper, SamplingOnPaper, Spread, holding
from trimtab.models.shape import shape_of

GPU = json.loads((Path(__file__).parents[2] / "docs" / "evidence" / "data" / "gpu.json").read_text())
H200 = MACHINES["h200"]
CPU = machine_of("cpu", "cpu", {"float32_products": 1e11, "bandwidth": 1e10, "memory": 16.0, "context": 0.4}, "a test")
SHAPE, LARGE = shape_of(QWEN3_06B, where=""), shape_of(LLAMA_8B, where="")
POLICY = RoleOnPaper(name="policy", shape=SHAPE, trained=True)
JOB = Job(
    roles=(POLICY,),
    bfloat16=True,
    checkpointed=True,
    token_budget=18 * 1024,
    num_trees=2,
    prompt_tokens=0,
    reply_tokens=8192,
    replies=1,
)


def test_weights_gradients_and_moments_are_sixteen_bytes():
    held = holding(JOB, H200, Spread()).held
    assert sum(held.values()) == 16 * 596_049_920
    assert held["policy moments"] == 8 * 596_049_920
    assert round(sum(held.values()) / GIB, 2) == 8.88  # as measured, docs/evidence/engines.md section 7


def test_shards_divide_what_is_trained_and_nothing_else():
    reference = RoleOnPaper(name="reference", shape=SHAPE, passes=1)
    job = replace(JOB, roles=(POLICY, reference), num_trees=16)
    held = holding(job, H200, Spread(processes=8, shard=True)).held
    assert held["policy gradients"] == 4 * 596_049_920 / 8
    assert held["reference weights"] == 4 * 596_049_920
    apart = holding(job, H200, Spread(processes=8, shard=True, assumed=frozenset({"shard-frozen", "bfloat16-frozen"})))
    assert apart.held["reference weights"] == 2 * 596_049_920 / 8
    away = holding(job, H200, Spread(processes=8, shard=True, assumed=frozenset({"offload-frozen"})))
    assert "reference weights" not in away.held
    assert away.phases["scoring"]["a frozen role from the host"] == 4 * 596_049_920


def test_an_adapter_has_gradients_of_its_own_weights_only():
    adapter = LARGE.adapter_weights(16)
    role = RoleOnPaper(name="policy", shape=LARGE, trained=True, adapter=adapter)
    held = holding(replace(JOB, roles=(role,)), H200, Spread()).held
    assert held["policy weights"] == 4 * (8_030_261_248 + 41_943_040)
    assert held["policy gradients"] == 4 * 41_943_040
    critic = replace(role, name="critic", on_base=True)
    assert critic.weight_bytes() == 4 * 41_943_040
    # 4 bits and a scale in float32 for each 64 weights, of the linear layers of blocks alone
    rounded = replace(role, bits=4).weight_bytes()
    linear = 32 * LARGE.linear_weights
    assert rounded == linear * (0.5 + 4 / 64) + 4 * (8_030_261_248 - linear) + 4 * adapter


def test_kept_inputs_of_blocks_by_hand():
    # Two micro-batches: all gradients are there. A block keeps its input in float32, and the result of attention in
    # 16 bits with a sum for each head: 16,384 x 28 x (4 x 1024 + 2 x 2048 + 4 x 16) bytes.
    parts = holding(replace(JOB, num_trees=4), H200, Spread()).phases["the update of the policy"]
    assert parts["activations"] == 16_384 * 28 * (4096 + 4096 + 64)
    once = holding(JOB, H200, Spread()).phases["the update of the policy"]
    assert once["activations"] == parts["activations"] - 4 * 28 * SHAPE.block_weights


def test_a_block_that_is_not_computed_again_keeps_everything():
    job = replace(JOB, bfloat16=False, checkpointed=False, num_trees=4, token_budget=8192)
    parts = holding(job, CPU, Spread()).phases["the update of the policy"]
    assert parts["activations"] == 8192 * 28 * SHAPE.kept_bytes(bfloat16=False, fused=True)


def test_limits_fill_a_micro_batch():
    # Eight trees of up to 3,000 tokens and a budget of 8,192: two of the longest, or 8,192 tokens of shorter ones.
    job = replace(JOB, num_trees=8, token_budget=8192, reply_tokens=3000)
    assert (job.micro_tokens(1), replace(job, up_to=True).micro_tokens(1)) == (6000, 8192)
    assert replace(job, up_to=True, num_trees=1).micro_tokens(1) == 3000
    assert replace(job, reply_tokens=9000).micro_tokens(1) == 9000  # a tree is never split


def test_the_cache_of_the_sampler_by_hand():
    sampling = SamplingOnPaper(batch_size=256, cache_gib=30, bfloat16=False)
    job = replace(JOB, roles=(replace(POLICY, trained=False),), num_trees=64, prompt_tokens=128, reply_tokens=128)
    parts = holding(replace(job, sampling=sampling), H200, Spread()).phases["sampling"]
    # keys and values of 64 x 256 tokens in 28 blocks of 8 heads of 128, in float32
    assert parts["cache"] == 64 * 256 * 2 * 28 * 8 * 128 * 4
    # with groups a prompt is kept once, and once more for the next one
    groups = holding(replace(job, sampling=sampling, num_trees=8, replies=8), H200, Spread()).phases["sampling"]
    assert groups["cache"] == 8 * (2 * 128 + 8 * 128) * 2 * 28 * 8 * 128 * 4
    small = holding(replace(job, sampling=replace(sampling, cache_gib=1)), H200, Spread()).phases["sampling"]
    assert small["cache"] <= GIB
    # a sharded policy is gathered to sample
    whole = holding(replace(job, roles=(POLICY,), sampling=sampling), H200, Spread(processes=2, shard=True))
    assert whole.phases["sampling"]["gathered weights"] == 4 * 596_049_920


def test_the_models_of_rewards_stand_in_the_controller_alone():
    judge = RoleOnPaper(name="reward model", shape=SHAPE, controller_only=True, passes=1)
    job = replace(JOB, roles=(POLICY, judge))
    spread = Spread(processes=2)
    assert "reward model weights" in holding(job, H200, spread).held
    assert "reward model weights" not in holding(job, H200, spread, controller=False).held


def test_the_first_part_too_much_is_named():
    held = Holding(
        {"policy weights": 4.0, "critic weights": 4.0}, {"sampling": {"cache": 3.0, "logits": 1.0}}, 1.0, 0.0
    )
    assert held.total == 13
    assert held.first_too_much(13) is None
    assert held.first_too_much(12) == "cache of sampling"
    assert held.first_too_much(8) == "critic weights"
    assert held.first_too_much(4) == "policy weights"


LEFT_OVER = 28 * SHAPE.block_weights * 8 / GIB
"""Weights and gradients of the blocks of the model that was measured before. Two rows of gpu.json hold them: see
docs/evidence/engines.md, section 6."""


@pytest.mark.parametrize(
    ("row", "trees", "tokens", "left"),
    [
        (GPU["sft"]["bfloat16"], 2, (0, 8192, 1), 0.0),
        (GPU["rl"]["16,384 tokens"], 2, (1024, 15 * 1024, 1), LEFT_OVER),
        (GPU["rl"]["replies alone"], 16, (1024, 1024, 1), 0.0),
        (GPU["rl"]["groups of 8"], 2, (1024, 1024, 8), LEFT_OVER),
    ],
)
def test_steps_on_one_h200_take_what_they_took(row, trees, tokens, left):
    prompt, reply, replies = tokens
    job = replace(JOB, num_trees=trees, prompt_tokens=prompt, reply_tokens=reply, replies=replies)
    assert holding(job, H200, Spread()).tensors / GIB == pytest.approx(row["gib"] - left, rel=0.1)


@pytest.mark.parametrize("num", [64, 256])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replies_on_one_h200_take_what_they_took(num, precision):
    sampling = SamplingOnPaper(batch_size=num, cache_gib=30, bfloat16=precision == "bfloat16")
    roles = (replace(POLICY, trained=False),)
    job = replace(JOB, roles=roles, num_trees=num, prompt_tokens=128, reply_tokens=128, sampling=sampling)
    row = GPU["sampling"][f"{num} x 128, {precision}"]
    assert holding(job, H200, Spread()).tensors / GIB == pytest.approx(row["gib"], rel=0.1)
