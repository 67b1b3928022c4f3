import math
from types import SimpleNamespace

import pytest
import torch

from trimtab.core.metrics import merge
from trimtab.core.registry import find
from trimtab.math.losses.policy import (
    CISPO,
    GSPO,
    PPO,
    EntropyBonus,
    KLPenalty,
    Reinforce,
    clipped_surrogate,
    entropy_bonus,
    kl_penalty,
    probability_ratio,
)
from trimtab.math.masking import mean_per_sequence

LENGTHS = [1, 5, 3]
IDS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))


def batch_of(ids=IDS, num_sequences=3, **tensors):
    if "old_logprobs" in tensors:
        tensors = {"correction": torch.ones_like(tensors["old_logprobs"])} | tensors
    return SimpleNamespace(sequence_ids=ids, num_sequences=num_sequences, **tensors)


def example():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    logprobs = -1 - noise[0].abs()
    return logprobs, logprobs + 0.4 * noise[1], noise[2], noise[3].abs()  # new, old, advantages, entropy


def slow_surrogate(logprob, old, advantage, low, high, dual_clip):
    ratio = math.exp(logprob - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def test_clipping_stops_the_reward_for_moving_too_far():
    # ratio 1.5 with advantage +1 is clipped to 1.2; ratio 0.5 with advantage -1 to 0.8
    logprobs = torch.tensor([1.5, 0.5]).log()
    loss = clipped_surrogate(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), low=0.2, high=0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.8]))


def test_moving_in_the_wrong_direction_is_never_clipped_away():
    logprobs = torch.tensor([0.5, 1.5]).log()
    loss = clipped_surrogate(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), low=0.2, high=0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 1.5]))


@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.28), (1.0, 0.01)])
def test_the_surrogate_is_that_of_the_definition(low, high, dual_clip):
    logprobs, old, advantages, _ = example()
    actual = clipped_surrogate(logprobs, old, advantages, low=low, high=high, dual_clip=dual_clip)
    rows = zip(logprobs.tolist(), old.tolist(), advantages.tolist(), strict=True)
    expected = [slow_surrogate(*row, low, high, dual_clip) for row in rows]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_the_second_clip_bounds_what_a_negative_advantage_can_cost():
    # ratio 10 with advantage -1 costs 10, and 3 with the second clip; a positive advantage is untouched
    logprobs = torch.tensor([10.0, 10.0]).log().requires_grad_()
    advantages = torch.tensor([-1.0, 1.0])
    plain = clipped_surrogate(logprobs, torch.zeros(2), advantages, low=0.2, high=0.2)
    bounded = clipped_surrogate(logprobs, torch.zeros(2), advantages, low=0.2, high=0.2, dual_clip=3.0)
    torch.testing.assert_close(plain, torch.tensor([10.0, -1.2]))
    torch.testing.assert_close(bounded, torch.tensor([3.0, -1.2]))
    (gradient,) = torch.autograd.grad(bounded.sum(), logprobs)
    assert gradient.tolist() == [0.0, 0.0]


def test_gradients_check_away_from_the_kinks():
    logprobs, old, advantages, _ = example()
    for dual_clip in (None, 1.5):
        assert torch.autograd.gradcheck(
            lambda x, c=dual_clip: clipped_surrogate(x, old, advantages, low=0.2, high=0.3, dual_clip=c),
            (logprobs.requires_grad_(),),
        )


def test_the_first_step_is_the_plain_policy_gradient():
    logprobs, _, advantages, _ = example()
    leaf = logprobs.clone().requires_grad_()
    clipped_surrogate(leaf, logprobs, advantages, low=0.2, high=0.2).sum().backward()
    torch.testing.assert_close(leaf.grad, -advantages)


@pytest.mark.parametrize("gap", [-2e4, -100.0, 100.0, 2e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_give_finite_losses_and_gradients(gap, advantage):
    logprobs = torch.tensor([gap], requires_grad=True)
    loss = clipped_surrogate(logprobs, torch.zeros(1), torch.tensor([advantage]), low=0.2, high=0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_half_precision_logprobs_are_subtracted_in_float32():
    ratio = probability_ratio(torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-1.001]))
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(math.exp(0.001), rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_splitting_the_batch_changes_neither_loss_nor_gradient_nor_metrics(aggregation):
    logprobs, old, advantages, entropy = example()
    loss_class = PPO(aggregation=aggregation, dual_clip=3.0)

    def run(cuts):
        leaf = logprobs.clone().requires_grad_()
        results, weight = [], 0
        for first, last in cuts:
            rows = (first <= IDS) & (last > IDS)
            batch = batch_of(IDS[rows] - first, last - first, old_logprobs=old[rows], advantages=advantages[rows])
            results.append(loss_class(SimpleNamespace(logprobs=leaf[rows], entropy=entropy[rows]), batch))
            weight += loss_class.weight(batch)
        loss = sum(total for total, _ in results) / weight
        loss.backward()
        return loss.detach(), leaf.grad, {k: m.value for k, m in merge(m for _, m in results).items()}

    whole = run([(0, 3)])
    for cuts in ([(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]):
        split = run(cuts)
        torch.testing.assert_close(split[:2], whole[:2])
        assert split[2] == pytest.approx(whole[2])


def test_averages_over_tokens_and_over_sequences_by_hand():
    # ratio 1, so the loss of a token is -A; sequences of 1 and 3 tokens
    batch = batch_of(
        torch.tensor([0, 1, 1, 1]), 2, old_logprobs=torch.zeros(4), advantages=-torch.tensor([8.0, 1.0, 2.0, 3.0])
    )
    outputs = SimpleNamespace(logprobs=torch.zeros(4), entropy=None)
    for aggregation, total, weight in (("token_mean", 14.0, 4), ("sequence_mean", 10.0, 2)):
        loss_class = PPO(aggregation=aggregation)
        loss, metrics = loss_class(outputs, batch)
        assert loss.item() == total
        assert loss_class.weight(batch).item() == weight
        assert metrics["policy/loss"].value == total / weight
    assert loss_class.weight(batch).dtype == torch.float64


def test_metrics_count_tokens_and_only_what_was_clipped():
    # held up: ratio 2 with A > 0; held down: ratio 0.5 with A < 0; the others are not clipped
    ratios = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.0, 2.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    batch = batch_of(torch.zeros(6, dtype=torch.long), 1, old_logprobs=torch.zeros(6), advantages=advantages)
    _, metrics = PPO()(SimpleNamespace(logprobs=ratios.log(), entropy=torch.full((6,), 0.5)), batch)
    assert metrics["policy/clip_fraction"].value == pytest.approx(2 / 6)
    assert metrics["policy/ratio_mean"].value == pytest.approx(8 / 6)
    assert metrics["policy/entropy"].value == 0.5
    # Schulman's (r - 1) - log r, for tokens drawn from the old policy
    expected = sum(r - 1 - math.log(r) for r in ratios.tolist()) / 6
    assert metrics["policy/approx_kl"].value == pytest.approx(expected, rel=1e-6)
    assert metrics.pop("policy/log_ratio_max").value == pytest.approx(math.log(2))
    assert all(m.weight == 6 for m in metrics.values())
    # with a dual clip also the ratio of 2 with A < 0
    _, metrics = PPO(dual_clip=1.5)(SimpleNamespace(logprobs=ratios.log(), entropy=None), batch)
    assert metrics["policy/clip_fraction"].value == pytest.approx(3 / 6)


def test_equal_advantages_after_whitening_leave_the_policy_where_it_is():
    logprobs = torch.randn(9, requires_grad=True)
    batch = batch_of(old_logprobs=logprobs.detach(), advantages=torch.zeros(9))
    loss, _ = PPO()(SimpleNamespace(logprobs=logprobs, entropy=None), batch)
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad.count_nonzero() == 0


def test_no_tokens_give_a_loss_of_zero_that_can_be_differentiated():
    logprobs = torch.zeros(0, requires_grad=True)
    batch = batch_of(IDS[:0], 0, old_logprobs=torch.zeros(0), advantages=torch.zeros(0))
    loss, metrics = PPO()(SimpleNamespace(logprobs=logprobs, entropy=None), batch)
    loss.backward()
    assert loss.item() == 0
    assert metrics.pop("policy/log_ratio_max").value == 0
    assert all(m.weight == 0 for m in metrics.values())


def test_the_entropy_bonus_pushes_entropy_up():
    entropy = torch.tensor([0.5, 1.5], requires_grad=True)
    batch = batch_of(torch.tensor([0, 0]), 1)
    loss, _ = EntropyBonus(coef=0.01)(SimpleNamespace(entropy=entropy), batch)
    loss.backward()
    assert loss.item() == -2.0
    assert entropy.grad.tolist() == [-1.0, -1.0]
    assert entropy_bonus(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert EntropyBonus(coef=0.01).weight(batch).item() == 2
    assert EntropyBonus.needs_entropy


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_loss_is_zero_at_the_reference_and_pulls_back_to_it(estimator):
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ref_logprobs = torch.tensor([-1.0, -3.0, -2.0])
    batch = batch_of(torch.tensor([0, 0, 0]), 1, ref_logprobs=ref_logprobs)
    loss, metrics = KLPenalty(coef=0.1, estimator=estimator)(SimpleNamespace(logprobs=logprobs, entropy=None), batch)
    expected = 0.5 + 0.5 if estimator == "k2" else (math.exp(-1) - 1 + 1) + (math.exp(1) - 1 - 1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["policy/kl_loss"].value == pytest.approx(expected / 3, rel=1e-6)
    loss.backward()
    assert logprobs.grad.sign().tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_of_the_kl_loss_check(estimator):
    logprobs, ref_logprobs, _, _ = example()
    assert torch.autograd.gradcheck(
        lambda x: kl_penalty(x, ref_logprobs, estimator=estimator), (logprobs.requires_grad_(),)
    )


@pytest.mark.parametrize("loss_class", [EntropyBonus, KLPenalty])
def test_terms_beside_the_policy_loss_can_follow_its_average(loss_class):
    # sequences of 1 and 3 tokens
    batch = batch_of(torch.tensor([0, 1, 1, 1]), 2, ref_logprobs=torch.zeros(4))
    outputs = SimpleNamespace(logprobs=torch.tensor([1.0, 2.0, 3.0, 4.0]), entropy=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tokens = loss_class(coef=1.0, aggregation="token_mean")
    sequences = loss_class(coef=1.0, aggregation="sequence_mean")
    per_token = -outputs.entropy if loss_class is EntropyBonus else (-outputs.logprobs).exp() - 1 + outputs.logprobs
    torch.testing.assert_close(tokens(outputs, batch)[0], per_token.sum())
    torch.testing.assert_close(sequences(outputs, batch)[0], per_token[0] + per_token[1:].mean())
    assert (tokens.weight(batch).item(), sequences.weight(batch).item()) == (4, 2)


def test_ppo_is_found_by_the_name_a_run_file_gives():
    assert find("policy_loss", "ppo", where="test") is PPO
    assert (PPO().clip_low, PPO().clip_high, PPO().dual_clip, PPO().coef) == (0.2, 0.2, None, 1.0)


@pytest.mark.parametrize("wrong", [{"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": 0.0}, {"dual_clip": 1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PPO(**wrong)


def test_a_constant_length_divides_by_it_whatever_the_lengths_are():
    batch = batch_of(
        torch.tensor([0, 1, 1, 1]), 2, old_logprobs=torch.zeros(4), advantages=-torch.tensor([8.0, 1.0, 2.0, 3.0])
    )
    loss_class = PPO(aggregation="constant_length", length=10)
    loss, _ = loss_class(SimpleNamespace(logprobs=torch.zeros(4), entropy=None), batch)
    assert loss.item() == 14.0
    assert loss_class.weight(batch).item() == 20.0  # two replies of ten tokens, all of which count


@pytest.mark.parametrize("wrong", [{"aggregation": "constant_length"}, {"length": 5}])
def test_a_constant_length_and_its_number_belong_together(wrong):
    with pytest.raises(ValueError, match="belong together"):
        PPO(**wrong)


def loss_and_gradient(loss_class, logprobs, batch):
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = loss_class(SimpleNamespace(logprobs=leaf, entropy=None), batch)
    (loss / loss_class.weight(batch)).backward()
    return float(loss.detach() / loss_class.weight(batch)), leaf.grad, metrics


def test_gspo_clips_whole_replies_by_their_mean_ratio():
    # reply 0: log ratios 0.3 and -0.1, s = e^0.1 = 1.105, held at 1.05 for A = 1; reply 1: s = e^0.02, not held
    logprobs = torch.tensor([0.3, -0.1, 0.02])
    batch = batch_of(torch.tensor([0, 0, 1]), 2, old_logprobs=torch.zeros(3), advantages=torch.tensor([1.0, 1.0, -2.0]))
    loss, gradient, metrics = loss_and_gradient(GSPO(clip_low=0.05, clip_high=0.05), logprobs, batch)
    assert loss == pytest.approx((-1.05 + 2 * math.exp(0.02)) / 2)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 2 * math.exp(0.02) / 2]))
    assert metrics["policy/clip_fraction"].value == pytest.approx(2 / 3)


def test_gspo_moves_every_token_of_a_reply_alike():
    logprobs = torch.tensor([0.1, -0.1])
    batch = batch_of(torch.tensor([0, 0]), 1, old_logprobs=torch.zeros(2), advantages=torch.ones(2))
    _, gradient, _ = loss_and_gradient(GSPO(), logprobs, batch)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, -0.5]))


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    # ratios 4 and 1/2; weights min(4, 2) and 1/2; the loss is -weight * A * log pi
    logprobs = torch.tensor([4.0, 0.5]).log()
    batch = batch_of(torch.tensor([0, 0]), 1, old_logprobs=torch.zeros(2), advantages=torch.tensor([1.0, -1.0]))
    loss, gradient, metrics = loss_and_gradient(CISPO(max_ratio=2.0), logprobs, batch)
    assert loss == pytest.approx((-2 * math.log(4) + 0.5 * math.log(0.5)) / 2)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.25]))
    assert metrics["policy/clip_fraction"].value == 0.5


def test_reinforce_is_the_plain_policy_gradient():
    batch = batch_of(torch.tensor([0, 1]), 2, old_logprobs=torch.zeros(2), advantages=torch.tensor([2.0, -1.0]))
    _, gradient, _ = loss_and_gradient(Reinforce(), torch.tensor([-0.7, -0.2]), batch)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.5]))


@pytest.mark.parametrize("loss_class", [PPO(), GSPO(), CISPO(), Reinforce()], ids=lambda c: type(c).__name__)
def test_a_correction_multiplies_each_tokens_loss(loss_class):
    logprobs, old, advantages, _ = example()
    weights = torch.linspace(0, 2, len(logprobs))
    num = int(IDS.max()) + 1
    plain = batch_of(IDS, num, old_logprobs=old, advantages=advantages)
    weighed = batch_of(IDS, num, old_logprobs=old, advantages=advantages, correction=weights)
    _, gradient, _ = loss_and_gradient(loss_class, logprobs, weighed)
    losses, _ = loss_class.token_losses(logprobs, plain)
    per_token = losses * weights
    expected = (
        mean_per_sequence(per_token, IDS, num).sum() if loss_class.aggregation == "sequence_mean" else per_token.sum()
    )
    total, _ = loss_class(SimpleNamespace(logprobs=logprobs, entropy=None), weighed)
    torch.testing.assert_close(total, expected)
    assert gradient.isfinite().all()
