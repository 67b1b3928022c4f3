"""The GRPO and RLOO of TRL 1.16 and ours on the same random numbers: equal values, gradients, advantages and weights.

TRL's own methods are called, on models that say what they are told (`trl_online.py`). Where the two define a thing
differently, the test says how and checks both.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.parity import needs_trl
from tests.parity.trl_online import Rollouts, Trainer
from trimtab.math.advantages import GRPO, RLOO, Episodes, token_rewards
from trimtab.math.correction import SamplerCorrection
from trimtab.math.kl import k1
from trimtab.math.losses.policy import CISPO, GSPO, PPO, EntropyBonus, KLPenalty, Reinforce
from trimtab.math.masking import sum_per_sequence
from trimtab.rewards.combined import CombinedReward, RewardPart

pytestmark = needs_trl("1.16")

LENGTHS = [3, 5, 1, 4, 2, 6, 6, 2]
WIDTH = max(LENGTHS)


def close(mine, theirs):
    """Equal to 1e-5 of the largest entry."""
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.fixture
def rollouts():
    return Rollouts(LENGTHS, group_size=4, temperature=0.7)


def batch_of(rollouts, advantages, correction=None):
    """What a policy loss of ours reads, from advantages [B]."""
    ids = rollouts.sequence_ids
    return SimpleNamespace(
        sequence_ids=ids,
        num_sequences=len(rollouts.lengths),
        old_logprobs=rollouts.ours(rollouts.old)[0],
        ref_logprobs=rollouts.ours(rollouts.ref)[0],
        advantages=advantages[ids],
        correction=torch.ones(len(ids)) if correction is None else correction,
    )


def ours(losses, rollouts, batch, logits=None):
    """The value, the gradient in the logits and the metrics of a step with these losses."""
    logits = (rollouts.new if logits is None else logits).clone().requires_grad_()
    logprobs, entropy = rollouts.ours(logits)
    outputs = SimpleNamespace(logprobs=logprobs, entropy=entropy)
    total, metrics = torch.zeros(()), {}
    for loss in losses:
        value, logged = loss(outputs, batch)
        total = total + loss.coef * value / loss.weight(batch).float()
        metrics |= logged
    (gradient,) = torch.autograd.grad(total, logits)
    return total.detach(), gradient, metrics


def compare(tmp_path, rollouts, losses, **config):
    """TRL's loss and ours; gives back the trainer and our metrics."""
    theirs = Trainer("GRPO", tmp_path, rollouts, **config)
    judged = theirs.judged()
    value, gradient = theirs.loss(judged)
    mine, my_gradient, metrics = ours(losses, rollouts, batch_of(rollouts, judged["advantages"]))
    close(mine, value)
    close(my_gradient, gradient)
    return theirs, metrics


SAME = {
    "grpo": ([PPO(aggregation="sequence_mean")], {"loss_type": "grpo"}),
    "bnpo": ([PPO()], {"loss_type": "bnpo"}),
    "dr_grpo": ([PPO(aggregation="constant_length", length=WIDTH)], {"loss_type": "dr_grpo"}),
    "dapo": ([PPO()], {"loss_type": "dapo"}),
    "dapo, higher above": ([PPO(clip_high=0.28)], {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "two-sided": ([PPO(dual_clip=1.5)], {"loss_type": "dapo", "delta": 1.5}),
    "gspo": (
        [GSPO(clip_low=0.02, clip_high=0.03)],
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "gspo, tokens the same": (
        [GSPO(clip_low=0.02, clip_high=0.03, aggregation="token_mean")],
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "cispo": ([CISPO(max_ratio=1.2)], {"loss_type": "cispo", "epsilon_high": 1.2}),
    "entropy": ([PPO(), EntropyBonus(coef=0.1)], {"loss_type": "dapo", "entropy_coef": 0.1}),
}


@pytest.mark.parametrize(("losses", "config"), SAME.values(), ids=SAME.keys())
def test_a_loss_and_its_gradient_are_trls(tmp_path, rollouts, losses, config):
    theirs, metrics = compare(tmp_path, rollouts, losses, **config)
    assert metrics["policy/entropy"].value == pytest.approx(theirs.metric("entropy"), rel=1e-5)
    if config["loss_type"] == "cispo" or "importance_sampling_level" in config:
        return
    clipped = theirs.metric("clip_ratio/region_mean")
    assert clipped > 0
    if "delta" not in config:
        assert metrics["policy/clip_fraction"].value == pytest.approx(clipped)


def test_cispo_counts_what_it_holds_whatever_the_advantage(tmp_path, rollouts):
    """`epsilon_high` is TRL's bound on the weight itself, as `max_ratio` is ours (the paper writes 1 + epsilon_high).
    TRL counts as clipped only tokens of positive advantage; the weight is held for the others too, and we count both.
    """
    theirs, metrics = compare(tmp_path, rollouts, [CISPO(max_ratio=1.2)], loss_type="cispo", epsilon_high=1.2)
    ratio = (rollouts.ours(rollouts.new)[0] - rollouts.ours(rollouts.old)[0]).exp()
    positive = theirs.judged()["advantages"][rollouts.sequence_ids] > 0
    held = ratio > 1.2
    assert theirs.metric("cispo_clip_ratio") == pytest.approx(float((held & positive).float().mean()))
    assert metrics["policy/clip_fraction"].value == pytest.approx(float(held.float().mean()))
    assert (held & ~positive).any()


def test_gspo_counts_tokens_where_trl_counts_sequences(tmp_path, rollouts):
    losses, config = SAME["gspo"]
    theirs, metrics = compare(tmp_path, rollouts, losses, **config)
    clipped = theirs.metric("clip_ratio/region_mean") * len(LENGTHS)
    assert clipped == pytest.approx(round(clipped), abs=1e-4)
    tokens = metrics["policy/clip_fraction"].value * sum(LENGTHS)
    assert tokens == pytest.approx(round(tokens), abs=1e-4)
    assert 0 < clipped < len(LENGTHS)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_kl_in_the_loss_is_trls_k3_without_its_correction(tmp_path, rollouts, loss_type):
    aggregation = {"grpo": "sequence_mean", "dr_grpo": "constant_length"}.get(loss_type, "token_mean")
    shared = {"aggregation": aggregation, "length": WIDTH if loss_type == "dr_grpo" else None}
    losses = [PPO(**shared), KLPenalty(coef=0.3, estimator="k3", **shared)]
    config = {"loss_type": loss_type, "beta": 0.3, "use_bias_correction_kl": False}
    theirs, metrics = compare(tmp_path, rollouts, losses, **config)
    if aggregation == "token_mean":
        assert metrics["policy/kl_loss"].value == pytest.approx(theirs.metric("kl"), rel=1e-5)


def test_trls_corrected_k3_has_the_gradient_of_our_k2_on_the_policys_own_samples(tmp_path, rollouts):
    """TRL's default multiplies k3 by the ratio of new to old policy, so that its expected gradient is that of
    KL(policy || reference). Where nothing has moved yet the ratio is 1: the value is k3's and the gradient k2's."""
    gradients = {}
    for corrected in (True, False):
        theirs = Trainer("GRPO", tmp_path, rollouts, loss_type="bnpo", beta=0.3, use_bias_correction_kl=corrected)
        judged = theirs.judged()
        judged["advantages"] = torch.zeros_like(judged["advantages"])  # the KL alone
        value, gradients[corrected] = theirs.loss(judged, rollouts.old)
        batch = batch_of(rollouts, judged["advantages"])
        close(ours([KLPenalty(coef=0.3, estimator="k3")], rollouts, batch, rollouts.old)[0], value)
    for corrected, estimator in ((True, "k2"), (False, "k3")):
        close(ours([KLPenalty(coef=0.3, estimator=estimator)], rollouts, batch, rollouts.old)[1], gradients[corrected])
    assert not torch.allclose(gradients[True], gradients[False], rtol=0.1)


def test_the_step_is_divided_by_its_own_tokens_and_not_by_a_share_of_the_generation_batch(tmp_path, rollouts):
    """Rollouts of one generation, trained on in two steps: TRL's dapo divides each step by half the tokens of the
    generation, we divide by the tokens of the step. The two agree where the steps have as many tokens each."""
    size = len(LENGTHS) // 2
    config = {"per_device_train_batch_size": size, "steps_per_generation": 2, "num_iterations": 1}
    theirs = Trainer("GRPO", tmp_path, rollouts, loss_type="dapo", **config)
    judged = theirs.judged()
    assert int(judged["num_items_in_batch"]) == sum(LENGTHS)
    whole = batch_of(rollouts, judged["advantages"])
    for rows in (slice(0, size), slice(size, None)):
        cut = {k: v if k == "num_items_in_batch" else v[rows] for k, v in judged.items()}
        value, gradient = theirs.loss(cut)
        inside = (whole.sequence_ids >= rows.start) & (whole.sequence_ids < (rows.stop or len(LENGTHS)))

        def masked_mean(logits, inside=inside):
            logprobs = rollouts.ours(logits)[0][inside]
            part = SimpleNamespace(
                sequence_ids=whole.sequence_ids[inside],
                num_sequences=size,
                old_logprobs=whole.old_logprobs[inside],
                advantages=whole.advantages[inside],
                correction=whole.correction[inside],
            )
            loss = PPO()
            return loss(SimpleNamespace(logprobs=logprobs, entropy=None), part)[0] / loss.weight(part).float()

        logits = rollouts.new.clone().requires_grad_()
        mine = masked_mean(logits)
        (my_gradient,) = torch.autograd.grad(mine, logits)
        share = sum(LENGTHS[rows]) / (sum(LENGTHS) / 2)
        assert share != 1
        close(mine.detach() * share, value)
        close(my_gradient * share, gradient)


def test_replies_cut_off_leave_the_average_and_trl_keeps_them_in_it(tmp_path, rollouts):
    """Both give them no gradient and both keep them in their group's mean. TRL's grpo and dr_grpo still divide by all
    replies; our `skip_truncated` divides by those that are left. Token means have no such difference."""
    finished = torch.tensor([True, False, True, True, True, True, False, True])
    kept = finished[rollouts.sequence_ids]
    for i, done in enumerate(finished.tolist()):
        rollouts.replies[i, LENGTHS[i] - 1] = 1 if done else 5
    for loss_type, loss in (("grpo", PPO(aggregation="sequence_mean")), ("dapo", PPO())):
        theirs = Trainer("GRPO", tmp_path, rollouts, loss_type=loss_type, mask_truncated_completions=True)
        theirs.trainer.eos_token_ids = [1]
        theirs.trainer._tokenizer.pad_token_id = 0
        judged = theirs.judged()
        value, gradient = theirs.loss(judged)
        whole = batch_of(rollouts, judged["advantages"])
        logits = rollouts.new.clone().requires_grad_()
        part = SimpleNamespace(
            sequence_ids=torch.unique_consecutive(whole.sequence_ids[kept], return_inverse=True)[1],
            num_sequences=int(finished.sum()),
            old_logprobs=whole.old_logprobs[kept],
            advantages=whole.advantages[kept],
            correction=whole.correction[kept],
        )
        outputs = SimpleNamespace(logprobs=rollouts.ours(logits)[0][kept], entropy=None)
        mine = loss(outputs, part)[0] / loss.weight(part).float()
        (my_gradient,) = torch.autograd.grad(mine, logits)
        share = 6 / 8 if loss_type == "grpo" else 1.0
        close(mine.detach() * share, value)
        close(my_gradient * share, gradient)


CORRECTIONS = {
    "token_truncate": (SamplerCorrection(kind="truncate", level="token", high=1.1), None),
    "token_mask": (SamplerCorrection(kind="mask", level="token", low=0.9, high=1.1), 0.9),
    "sequence_truncate": (SamplerCorrection(kind="truncate", level="sequence", high=1.1), None),
    "sequence_mask": (SamplerCorrection(kind="mask", level="sequence", low=0.8, high=1.1), 0.8),
}


@pytest.mark.parametrize(("mode", "case"), CORRECTIONS.items(), ids=CORRECTIONS.keys())
def test_the_weights_of_another_sampler_are_trls_and_so_is_the_loss_they_weigh(tmp_path, rollouts, mode, case):
    """The KL beside it is not weighed. TRL logs its ratios after they were bounded; ours are the raw ones, so that a
    sampler that drifts away can be seen."""
    correction, low = case
    config = {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": False}
    theirs = Trainer("GRPO", tmp_path, rollouts, correction=(mode, low, 1.1), **config)
    judged = theirs.judged()
    sampled, old = rollouts.flat(rollouts.sampler), rollouts.ours(rollouts.old)[0]
    ids, num = rollouts.sequence_ids, len(LENGTHS)
    weights, metrics = correction(old, sampled, ids, num)
    close(weights, rollouts.flat(judged["importance_sampling_ratio"].expand_as(rollouts.mask)))
    value, gradient = theirs.loss(judged)
    batch = batch_of(rollouts, judged["advantages"], weights)
    mine, my_gradient, _ = ours([PPO(), KLPenalty(coef=0.2)], rollouts, batch)
    close(mine, value)
    close(my_gradient, gradient)
    difference = theirs.metric("sampling/sampling_logp_difference/max")
    assert float((old - sampled).abs().max()) == pytest.approx(difference, rel=1e-4)
    raw = old - sampled if "token" in mode else sum_per_sequence(old - sampled, ids, num)[ids]
    assert metrics["rollout/ratio_max"].value == pytest.approx(float(raw.exp().max()), rel=1e-5)
    assert theirs.metric("sampling/importance_sampling_ratio/max") < metrics["rollout/ratio_max"].value


def episodes(rollouts, scores, *, kl=None, kl_coef=0.0):
    ids = rollouts.sequence_ids
    none = torch.full((len(LENGTHS),), torch.nan)
    rewards = token_rewards(scores, torch.zeros(len(ids)) if kl is None else kl, ids, kl_coef=kl_coef)
    return Episodes(rewards, torch.full_like(rewards, torch.nan), ids, rollouts.group_ids, none)


def per_sequence(advantages, rollouts):
    """The one advantage that all tokens of a reply have, [B]."""
    first = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    assert torch.equal(advantages, advantages[first][rollouts.sequence_ids])
    return advantages[first]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_grpo_are_trls(tmp_path, rollouts, scale):
    judged = Trainer("GRPO", tmp_path, rollouts, scale_rewards=scale).judged()
    close(per_sequence(GRPO(scale=scale)(episodes(rollouts, rollouts.scores)), rollouts), judged["advantages"])


class Told:
    """A reward that gives written-down scores."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def score(self, rollouts):
        return self.scores, {}


def test_several_rewards_are_weighed_alike_in_what_is_trained_on_and_in_what_is_logged(tmp_path, rollouts):
    one, two = torch.randn(2, len(LENGTHS), generator=torch.Generator().manual_seed(5)).tolist()
    theirs = Trainer(
        "GRPO", tmp_path, rollouts, reward_funcs=[lambda **_: one, lambda **_: two], reward_weights=[0.3, 2.0]
    )
    judged = theirs.judged()
    combined = CombinedReward([RewardPart("one", 0.3, Told(one)), RewardPart("two", 2.0, Told(two))])
    scores, metrics = combined.score([None] * len(LENGTHS))
    close(per_sequence(GRPO()(episodes(rollouts, scores)), rollouts), judged["advantages"])
    assert metrics["reward/mean"].value == pytest.approx(theirs.metric("reward"), rel=1e-5)
    # TRL logs the unbiased deviation, ours is the biased one
    n = len(LENGTHS)
    assert metrics["reward/std"].value * (n / (n - 1)) ** 0.5 == pytest.approx(theirs.metric("reward_std"), rel=1e-5)


def test_a_reply_that_cannot_be_judged_is_left_out_of_its_group_by_both(tmp_path, rollouts):
    """TRL keeps it with an advantage of 0, ours (`on_failed_reward = "drop"`) leaves it out of the batch; the others'
    advantages are the same. One reward that fails beside others counts as 0 in TRL's sum: here it fails the reply."""
    scores = rollouts.scores.tolist()
    told = [None if i == 2 else s for i, s in enumerate(scores)]
    judged = Trainer("GRPO", tmp_path, rollouts, reward_funcs=[lambda **_: told]).judged()
    kept = [i for i in range(len(LENGTHS)) if i != 2]
    left = Rollouts([LENGTHS[i] for i in kept], group_size=4)
    ids = left.sequence_ids
    rewards = token_rewards(rollouts.scores[kept], torch.zeros(len(ids)), ids, kl_coef=0.0)
    none = torch.full((len(kept),), torch.nan)
    mine = GRPO()(Episodes(rewards, rewards, ids, torch.tensor([0, 0, 0, 1, 1, 1, 1]), none))
    close(mine, judged["advantages"][kept][ids])
    assert float(judged["advantages"][2]) == 0

    two = [lambda **_: told, lambda **_: [1.0] * len(LENGTHS)]
    theirs = Trainer("GRPO", tmp_path, rollouts, reward_funcs=two, scale_rewards="none").judged()["advantages"]
    as_zero = torch.tensor([0.0 if t is None else t for t in told])
    close(theirs, per_sequence(GRPO(scale="none")(episodes(rollouts, as_zero)), rollouts))
    nan = torch.tensor([float("nan") if t is None else t for t in told])
    total, _ = CombinedReward([RewardPart("a", 1.0, Told(nan.tolist())), RewardPart("b", 1.0, Told([1.0] * 8))]).score(
        [None] * 8
    )
    assert total.isnan().tolist() == [i == 2 for i in range(8)]


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_advantages_of_rloo_are_trls_with_the_kl_in_the_reward(tmp_path, rollouts, beta):
    theirs = Trainer("RLOO", tmp_path, rollouts, beta=beta)
    judged = theirs.judged()
    log_ratio = rollouts.ours(rollouts.old)[0] - rollouts.ours(rollouts.ref)[0]
    mine = RLOO()(episodes(rollouts, rollouts.scores, kl=k1(log_ratio), kl_coef=beta))
    close(per_sequence(mine, rollouts), judged["advantages"])
    if beta:
        assert float(k1(log_ratio).mean()) == pytest.approx(theirs.metric("kl"), rel=1e-4)


def test_normalised_advantages_of_rloo_differ_in_the_deviation_alone(tmp_path, rollouts):
    """TRL normalises over replies with the unbiased deviation plus 1e-4; our `whiten` over tokens, biased."""
    judged = Trainer("RLOO", tmp_path, rollouts, normalize_advantages=True).judged()
    plain = per_sequence(RLOO()(episodes(rollouts, rollouts.scores)), rollouts)
    close((plain - plain.mean()) / (plain.std(correction=1) + 1e-4), judged["advantages"])


def test_the_first_update_of_rloo_is_the_plain_policy_gradient(tmp_path, rollouts):
    """TRL takes one ratio a reply, the product of its tokens', and averages over replies. Where nothing has moved yet
    its gradient is that of REINFORCE, and of our PPO, with a sum over each reply's tokens."""
    theirs = Trainer("RLOO", tmp_path, rollouts)
    judged = theirs.judged()
    _, gradient = theirs.loss(judged, rollouts.old)
    batch = batch_of(rollouts, judged["advantages"])
    summed = {"aggregation": "constant_length", "length": 1}
    for loss in (Reinforce(**summed), PPO(**summed)):
        close(ours([loss], rollouts, batch, rollouts.old)[1], gradient)


def test_later_updates_of_rloo_agree_where_a_reply_is_one_token(tmp_path):
    """Of one token, the product over the reply and the token's own ratio are the same."""
    rollouts = Rollouts([1] * 8, group_size=4)
    theirs = Trainer("RLOO", tmp_path, rollouts)
    judged = theirs.judged()
    value, gradient = theirs.loss(judged)
    mine, my_gradient, metrics = ours([PPO()], rollouts, batch_of(rollouts, judged["advantages"]))
    close(mine, value)
    close(my_gradient, gradient)
    assert metrics["policy/clip_fraction"].value == pytest.approx(theirs.metric("clip_ratio/region_mean"))


def test_later_updates_of_rloo_clip_the_product_of_ratios_where_ours_clips_their_mean_or_each(tmp_path, rollouts):
    """For longer replies: TRL's ratio is the product over tokens, GSPO's its root. With a clip that holds nothing the
    product is what it is said to be, and neither of ours."""
    theirs = Trainer("RLOO", tmp_path, rollouts, epsilon=0.99, epsilon_high=1e6)
    judged = theirs.judged()
    value, _ = theirs.loss(judged)
    log_ratio = rollouts.ours(rollouts.new)[0] - rollouts.ours(rollouts.old)[0]
    product = sum_per_sequence(log_ratio, rollouts.sequence_ids, len(LENGTHS)).exp()
    close(-(product * judged["advantages"]).mean(), value)
    batch = batch_of(rollouts, judged["advantages"])
    for loss in (PPO(clip_low=0.99, clip_high=1e6), GSPO(clip_low=0.99, clip_high=1e6)):
        assert abs(float(ours([loss], rollouts, batch)[0] - value)) > 1e-3
