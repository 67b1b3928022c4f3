"""Whether a plan fits, and the cheapest change that makes it fit."""

from dataclasses import replace

import pytest

from tests.engines.test_placement import JOB, LARGE
from trimtab.engines.machines import MACHINES
from trimtab.engines.paper import RANK, PaperPlan, remedies
from trimtab.engines.placement import ASSUMPTIONS, RoleOnPaper, SamplingOnPaper, Spread

POLICY = RoleOnPaper(name="policy", shape=LARGE, trained=True)
SMALL_POLICY = replace(POLICY, shape=replace(LARGE, num_layers=4, vocab_size=32000))


def plan(job, spread=None, machine="h100", price=None):
    return PaperPlan(
        name="sft", job=job, machine=MACHINES[machine], spread=spread or Spread(), num_steps=10, price=price
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
    reference = RoleOnPaper(name="reference", shape=replace(LARGE, num_layers=100), passes=1)
    tight = plan(replace(JOB, roles=(POLICY, reference), num_trees=8), Spread(processes=8, shard=True))
    adapter, whole = remedies(tight)  # an adapter's reference is its base
    assert adapter.plan.not_built == ("trimtab does not run on several GPUs yet",)
    assert sum(change.startswith("--assume") for change in whole.changes) == 1


def test_every_assumption_is_said():
    full = plan(JOB, Spread(processes=8, shard=True, assumed=frozenset(ASSUMPTIONS)))
    assert len(full.not_built) == 1 + len(ASSUMPTIONS)


def test_nothing_helps_a_tree_that_is_too_long():
    job = replace(JOB, roles=(replace(POLICY, shape=replace(LARGE, num_layers=80)),), reply_tokens=2_000_000)
    assert remedies(plan(job)) == ()
