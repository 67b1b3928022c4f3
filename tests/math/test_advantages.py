import math
import statistics

import pytest
import torch

from trimtab.core.registry import find
from trimtab.math.advantages import GAE, GRPO, RLOO, Episodes, ReinforcePP, ReMax, gae, token_rewards


def slow_gae(rewards, values, gamma, lam):
    """Equation 16 as printed, one sequence: a sum over the future for every token."""
    T = len(rewards)
    values = [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, T)) for t in range(T)]


def example(lengths=(3, 1, 5, 2)):
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rewards, values = torch.randn(2, len(ids), dtype=torch.float64, generator=generator)
    return rewards, values, ids, list(lengths)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0), (0.0, 0.7)])
def test_advantages_are_those_of_the_definition(gamma, lam):
    rewards, values, ids, lengths = example()
    advantages, returns = gae(rewards, values, ids, gamma=gamma, lam=lam)
    expected = [
        a
        for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True)
        for a in slow_gae(r.tolist(), v.tolist(), gamma, lam)
    ]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, advantages + values)


def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards():
    rewards = torch.tensor([1.0, 2.0, 4.0])
    _, returns = gae(rewards, torch.tensor([9.0, -9.0, 3.0]), torch.zeros(3, dtype=torch.long), gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([1 + 1 + 1.0, 2 + 2.0, 4.0]))


def test_the_end_of_a_sequence_is_terminal():
    # a single token: nothing of the next sequence's value may leak in
    advantages, returns = gae(
        torch.tensor([1.0, 5.0]), torch.tensor([0.25, 100.0]), torch.tensor([0, 1]), gamma=1.0, lam=1.0
    )
    assert advantages.tolist() == [0.75, -95.0]
    assert returns.tolist() == [1.0, 5.0]


def test_the_order_of_sequences_does_not_matter():
    rewards, values, ids, lengths = example()
    forward = gae(rewards, values, ids, gamma=0.9, lam=0.8)[0].split(lengths)
    turned = [torch.cat(x.split(lengths)[::-1]) for x in (rewards, values)]
    turned_ids = torch.arange(4).repeat_interleave(torch.tensor(lengths[::-1]))
    backward = gae(*turned, turned_ids, gamma=0.9, lam=0.8)[0].split(lengths[::-1])
    for a, b in zip(forward, backward[::-1], strict=True):
        assert torch.equal(a, b)


def test_the_score_is_paid_at_the_last_token_of_each_sequence():
    # not one past it, where others read a padding token
    rewards = token_rewards(
        torch.tensor([1.0, -2.0]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 0, 1]), kl_coef=0.5
    )
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 1 - 0.1, -2 - 0.15]))


def test_a_score_of_zero_is_a_score():
    ids = torch.tensor([0, 0, 1])
    assert token_rewards(torch.tensor([0.0, 1.0]), torch.zeros(3), ids, kl_coef=0.1).tolist() == [0.0, 0.0, 1.0]


def test_token_rewards_add_up_to_the_shaped_score():
    _, kl, ids, lengths = example()
    score = torch.arange(4.0)
    rewards = token_rewards(score, kl, ids, kl_coef=0.3)
    for b, part in enumerate(rewards.split(lengths)):
        torch.testing.assert_close(part.sum(), score[b] - 0.3 * kl.split(lengths)[b].sum(), check_dtype=False)


def test_half_precision_is_raised_and_nothing_is_differentiated():
    ids = torch.zeros(2, dtype=torch.long)
    rewards = token_rewards(torch.ones(1, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), ids, kl_coef=1.0)
    advantages, returns = gae(rewards, torch.zeros(2, requires_grad=True), ids, gamma=1.0, lam=1.0)
    assert rewards.dtype == advantages.dtype == torch.float32
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_no_tokens_give_no_advantages():
    none = torch.zeros(0)
    advantages, returns = gae(none, none, torch.zeros(0, dtype=torch.long), gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == (0,)
    assert token_rewards(none, none, torch.zeros(0, dtype=torch.long), kl_coef=1.0).shape == (0,)


def test_the_settings_class_is_the_function_and_is_found_by_name():
    rewards, values, ids, _ = example()
    expected, _ = gae(rewards, values, ids, gamma=0.9, lam=0.8)
    torch.testing.assert_close(GAE(gamma=0.9, lam=0.8)(episodes(rewards, ids, [0, 1, 2], values=values)), expected)
    assert GAE.needs_critic
    assert (GAE().gamma, GAE().lam) == (1.0, 0.95)
    assert find("advantage", "gae", where="test") is GAE


@pytest.mark.parametrize("wrong", [{"gamma": 1.1}, {"lam": -0.1}])
def test_discounts_outside_the_unit_interval_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GAE(**wrong)


def episodes(rewards, ids, groups, *, values=None, baselines=None):
    unknown = torch.full((len(groups),), torch.nan)
    return Episodes(
        rewards,
        torch.full_like(rewards, torch.nan) if values is None else values,
        ids,
        torch.tensor(groups),
        unknown if baselines is None else torch.tensor(baselines),
    )


def scored(scores, groups, *, lengths=None, **more):
    """Episodes whose whole reward comes at the last token."""
    ids = torch.tensor([i for i, n in enumerate(lengths or [1] * len(scores)) for _ in range(n)])
    rewards = token_rewards(torch.tensor(scores), torch.zeros(len(ids)), ids, kl_coef=0.0)
    return episodes(rewards, ids, groups, **more)


def test_grpo_is_the_z_score_of_its_group_for_every_token():
    # group 0: 1, 0, 0, 1 has mean 1/2 and deviation sqrt(1/3); group 1: 5, 5 has none
    e = scored([1.0, 0.0, 0.0, 1.0, 5.0, 5.0], [0, 0, 0, 0, 1, 1], lengths=[2, 1, 3, 1, 1, 2])
    z = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(GRPO()(e), torch.tensor([z, z, -z, -z, -z, -z, z, 0, 0, 0]))


def test_dr_grpo_keeps_the_units_of_the_reward_and_batch_scale_uses_one_deviation():
    scores, groups = [1.0, 0.0, 4.0, 2.0], [0, 0, 1, 1]
    torch.testing.assert_close(GRPO(scale="none")(scored(scores, groups)), torch.tensor([0.5, -0.5, 1.0, -1.0]))
    deviation = statistics.stdev(scores) + 1e-4
    expected = torch.tensor([0.5, -0.5, 1.0, -1.0]) / deviation
    torch.testing.assert_close(GRPO(scale="batch")(scored(scores, groups)), expected)


def test_a_group_of_one_has_no_advantage_and_no_nan():
    for estimator in (GRPO(), GRPO(scale="none"), RLOO(), ReinforcePP(baseline="group")):
        assert estimator(scored([3.0], [0])).tolist() == [0.0]


def test_rloo_compares_with_the_mean_of_the_others():
    # 3 against mean(1, 5) = 3; 1 against 4; 5 against 2; another group of two
    e = scored([3.0, 1.0, 5.0, 2.0, 0.0], [0, 0, 0, 1, 1])
    torch.testing.assert_close(RLOO()(e), torch.tensor([0.0, -3.0, 3.0, 2.0, -2.0]))


def test_rloo_of_uneven_groups_equals_the_slow_loop():
    draw = torch.Generator().manual_seed(3)
    groups = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    scores = torch.randn(10, generator=draw).tolist()
    slow = []
    for i, g in enumerate(groups):
        others = [s for j, s in enumerate(scores) if groups[j] == g and j != i]
        slow.append(scores[i] - statistics.mean(others) if others else 0.0)
    torch.testing.assert_close(RLOO()(scored(scores, groups)), torch.tensor(slow))


def test_reinforce_pp_takes_what_is_still_to_come_and_leaves_whitening_to_the_batch():
    ids = torch.tensor([0, 0, 0, 1, 1])
    rewards = torch.tensor([1.0, 0.0, 2.0, -1.0, 4.0])
    assert ReinforcePP()(episodes(rewards, ids, [0, 1])).tolist() == [3.0, 2.0, 2.0, 3.0, 4.0]
    assert ReinforcePP(gamma=0.5)(episodes(rewards, ids, [0, 1])).tolist() == [1.5, 1.0, 2.0, 1.0, 4.0]
    # both replies sum to 3, which is the group's mean
    with_group = ReinforcePP(baseline="group")(episodes(rewards, ids, [0, 0]))
    assert with_group.tolist() == [0.0, -1.0, -1.0, 0.0, 1.0]
    assert ReinforcePP().whiten
    assert ReinforcePP(baseline="group").needs_group
    assert not ReinforcePP().needs_group


def test_remax_subtracts_the_greedy_replys_score():
    e = scored([1.0, 3.0], [0, 1], lengths=[2, 1], baselines=[0.5, 4.0])
    assert ReMax()(e).tolist() == [0.5, 0.5, -1.0]
    assert ReMax.needs_greedy


def test_every_estimator_is_found_by_its_name():
    known = {"gae": GAE, "grpo": GRPO, "rloo": RLOO, "reinforce_pp": ReinforcePP, "remax": ReMax}
    for name, cls in known.items():
        assert find("advantage", name, where="test") is cls


# ---- several rewards -----------------------------------------------------------------------------------------------


def of_parts(parts, group_ids):
    """Episodes of one token each, whose rewards are the weighted sums of the parts."""
    total = sum(weight * scores for weight, scores in parts)
    nothing = torch.full_like(total, torch.nan)
    return Episodes(total, nothing, torch.arange(len(total)), group_ids, nothing, parts)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_advantages_of_each_reward_apart_are_those_of_a_slow_loop(scale):
    generator = torch.Generator().manual_seed(3)
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    parts = [(1.0, torch.randn(9, generator=generator)), (0.3, 50 * torch.rand(9, generator=generator))]
    sums = [0.0] * 9
    for weight, scores in parts:
        for i in range(9):
            group = [float(x) for x, g in zip(scores, groups, strict=True) if g == groups[i]]
            spread = statistics.stdev(group if scale == "group" else scores.tolist())
            sums[i] += weight * (float(scores[i]) - statistics.fmean(group)) / (spread + 1e-4)
    middle, spread = statistics.fmean(sums), statistics.stdev(sums)
    expected = torch.tensor([(x - middle) / (spread + 1e-4) for x in sums])
    found = GRPO(scale=scale, per_reward=True)(of_parts(parts, groups))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_replies_with_one_sum_of_unlike_rewards_differ_in_their_advantages():
    # (1, 0) and (0, 1) have the same sum. Half of the group has the first reward, and one in four the second.
    groups = torch.zeros(4, dtype=torch.long)
    parts = [(1.0, torch.tensor([1.0, 0.0, 1.0, 0.0])), (1.0, torch.tensor([0.0, 1.0, 0.0, 0.0]))]
    apart, together = GRPO(per_reward=True)(of_parts(parts, groups)), GRPO()(of_parts(parts, groups))
    assert together[0] == together[1]
    assert apart[1] > apart[0] + 0.1


def test_rewards_apart_without_a_scale_are_refused():
    with pytest.raises(ValueError, match="scale = 'none'"):
        GRPO(per_reward=True, scale="none")
