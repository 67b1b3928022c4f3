"""Whether a plan fits, and the cheapest change that makes it fit."""

from dataclasses import replace

import pytest

from tests.engines.test_placement import CPU, JOB, LARGE, SHAPE
from trimtab.engines.machines import MACHINES
from trimtab.engines.paper import RANK, PaperPlan, remedies, with_adapters
from trimtab.engines.placement import ASSUMPTIONS, RoleOnPaper, SamplingOnPaper, Spread

POLICY = RoleOnPaper(name="policy", shape=LARGE, trained=True)
SMALL_POLICY = replace(POLICY, shape=replace(LARGE, num_layers=4, vocab_size=32000))


def plan(job, spread=None, machine="h100", price=None):
    return PaperPlan(
        name="sft", job=job, machine=MACHINES.get(machine, CPU), spread=spread or Spread(), num_steps=10, price=price
    )


def test_what_fits_needs_nothing():
    fine = plan(replace(JOB, roles=(SMALL_POLICY,)), price=2.0)
    assert fine.fits
    assert remedies(fine) == ()
    assert fine.not_built == ()
    assert fine.cost(3600) == pytest.approx(2.0 * fine.time.total)
    assert plan(JOB).cost(1) is None


def test_activations_are_computed_again_before_anything_is_bought():
    job = replace(JOB, roles=(SMALL_POLICY,), checkpointed=False, num_trees=32, token_budget=131072)
    tight = plan(job)
    assert not tight.fits
    # A smaller budget costs less than computing again, and is enough here.
    (remedy,) = remedies(tight)
    assert remedy.changes == ("token_budget = 65536",)
    assert remedy.plan.fits
    (remedy,) = remedies(plan(replace(job, reply_tokens=131072)))
    assert remedy.changes == ("checkpoint_activations = true",)


def test_a_whole_8b_model_on_one_gpu_asks_for_an_adapter_or_more_gpus():
    tight = plan(replace(JOB, roles=(POLICY,), num_trees=64))
    assert not tight.fits
    assert tight.controller.first_too_much(tight.memory) == "policy moments"
    adapter, whole = remedies(tight)[:2]
    assert adapter.changes[0] == "adapter.rank = 16"
    assert adapter.alters
    assert adapter.plan.not_built == ()
    assert whole.changes[0] == "engine.shard = true"
    assert whole.changes[1].startswith("--gpus")
    assert whole.plan.not_built == ("trimtab does not run on several GPUs yet",)
    assert remedies(plan(replace(JOB, roles=(POLICY,)), machine="a100"))


def test_an_adapter_is_never_proposed_with_shards():
    sampling = SamplingOnPaper(batch_size=64, cache_gib=8, bfloat16=True)
    critic = replace(POLICY, name="critic", passes=1)
    job = replace(JOB, roles=(POLICY, critic), num_trees=64, sampling=sampling)
    first, as_many = remedies(plan(job, Spread(processes=2, shard=True)))
    assert first.changes[0].startswith("--gpus")
    assert as_many.changes == (f"adapter.rank = {RANK}, critic.init = 'policy', engine.shard = false",)
    assert as_many.plan.spread == Spread(processes=2)
    critic = as_many.plan.job.roles[1]
    assert (critic.on_base, critic.adapter) == (True, LARGE.adapter_weights(16))


def test_the_least_that_is_not_built_comes_first():
    # The reference alone is too much beside a policy that is sharded.
    start = RoleOnPaper(name="reference", shape=replace(LARGE, num_layers=100), passes=1, starts_policy=True)
    tight = plan(replace(JOB, roles=(POLICY, start), num_trees=8), Spread(processes=8, shard=True))
    adapter, whole = remedies(tight)
    assert adapter.plan.not_built == ("trimtab does not run on several GPUs yet",)
    assert adapter.plan.job.roles[1].on_base
    assert sum(change.startswith("--assume") for change in whole.changes) == 1


def test_a_reference_of_its_own_stays_beside_an_adapter():
    other = RoleOnPaper(name="reference", shape=replace(LARGE, num_layers=100), passes=1)
    tight = plan(replace(JOB, roles=(POLICY, other), num_trees=8), Spread(processes=8, shard=True))
    assert not with_adapters(tight.job).roles[1].on_base
    for remedy in remedies(tight):  # 22e9 weights of 4 bytes are in no H100
        assert any(change.startswith("--assume") for change in remedy.changes), remedy.changes
    # Nothing but the policy can become an adapter on the policy's base, and a judge is not trained.
    judge = RoleOnPaper(name="reward model", shape=LARGE, controller_only=True, passes=1)
    changed = with_adapters(replace(JOB, roles=(POLICY, judge)))
    assert changed.roles[1] == judge


def test_an_adapter_for_a_critic_stands_on_the_base_of_the_policy():
    small = replace(LARGE, num_layers=4, scalar=True)
    critic = RoleOnPaper(name="critic", shape=small, trained=True)
    changed = with_adapters(replace(JOB, roles=(POLICY, critic))).roles[1]
    assert changed.shape == replace(LARGE, scalar=True)
    assert (changed.on_base, changed.adapter) == (True, LARGE.adapter_weights(RANK))


def test_every_assumption_is_said():
    full = plan(JOB, Spread(processes=8, shard=True, assumed=frozenset(ASSUMPTIONS)))
    assert len(full.not_built) == 1 + len(ASSUMPTIONS)


def test_nothing_helps_a_tree_that_is_too_long():
    job = replace(JOB, roles=(replace(POLICY, shape=replace(LARGE, num_layers=80)),), reply_tokens=2_000_000)
    assert remedies(plan(job)) == ()


def on_a_cpu(num, **changed):
    sampling = SamplingOnPaper(batch_size=64, cache_gib=1, bfloat16=False)
    policy, judge = replace(POLICY, shape=SHAPE), RoleOnPaper(name="reward model", shape=SHAPE, controller_only=True)
    short = {"prompt_tokens": 64, "reply_tokens": 64, "token_budget": 1024, "bfloat16": False}
    job = replace(JOB, roles=(policy, replace(judge, passes=1)), num_trees=16, sampling=sampling, **short | changed)
    return plan(job, Spread(processes=num), machine="cpu", price=2.0)


@pytest.mark.parametrize("num", [2, 4, 8])
def test_processes_of_one_cpu_add_up_in_memory_and_share_its_rates(num):
    one, several = on_a_cpu(1), on_a_cpu(num)
    weights = 4 * SHAPE.num_weights
    assert several.worker.held == {
        "policy weights": weights,
        "policy gradients": weights,
        "policy moments": 2 * weights,
    }
    assert several.needed == several.controller.total + (num - 1) * several.worker.total > num * 4 * weights
    assert several.time.total > one.time.total  # weights are updated, and read to decode, in each process
    assert several.time.scoring == pytest.approx(num * one.time.scoring)  # by the controller, with its part of the CPU
    assert several.time.update == pytest.approx(one.time.update + (num - 1) * 28 * SHAPE.num_weights / CPU["optimizer"])
    assert several.time.sampling > one.time.sampling
    assert several.cost(3600) == pytest.approx(2.0 * several.time.total)  # of one machine


def test_a_cpu_that_is_too_small_for_its_processes_is_offered_fewer():
    tight = on_a_cpu(2)
    assert tight.controller.total < tight.memory < tight.needed
    assert not tight.fits
    assert tight.first_too_much == "processes beside the controller"
    assert ("--workers 1",) in [remedy.changes for remedy in remedies(tight)]
    sharded = replace(tight, spread=Spread(processes=2, shard=True))
    smaller = replace(CPU, constants={**CPU.constants, "memory": replace(CPU.constants["memory"], value=13.5)})
    for remedy in remedies(replace(sharded, machine=smaller)):
        assert remedy.plan.spread.shard is (remedy.plan.spread.processes > 1 and "adapter" not in remedy.changes[0])


def test_processes_that_only_draw_hold_all_weights_once_more():
    here = on_a_cpu(1)
    apart = replace(here, job=replace(here.job, sampling=replace(here.job.sampling, processes=2)))
    assert "sampling" not in apart.controller.phases
    assert apart.sampler.held == {"sampler weights": 4 * SHAPE.num_weights}
    assert apart.needed == apart.controller.total + 2 * apart.sampler.total
    assert apart.time.sampling > here.time.sampling / 2
    vllm = replace(apart.job.sampling, processes=1, vllm_share=0.5, bfloat16=True)
    apart = replace(apart, job=replace(apart.job, sampling=vllm))
    assert apart.sampler.held == {"sampler weights": 2 * SHAPE.num_weights}
    h100 = replace(apart, machine=MACHINES["h100"])
    assert h100.needed == h100.controller.total + h100.memory / 2
