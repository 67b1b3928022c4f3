"""The PPO of TRL 1.12, the last release to have one, and ours on the same random numbers.

`PPOTrainer.train` itself runs for one batch of rollouts and two passes over them, on models that say what they are
told. Its sampler is replaced by the rollouts, its optimizer by one that keeps the gradients and moves the models to
given places. Advantages and returns are read off those gradients. Where the two define a thing differently, the test
says how and checks both.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.parity import needs_trl
from trimtab.math.advantages import gae, token_rewards
from trimtab.math.kl import ESTIMATORS, k3
from trimtab.math.logprobs import token_logprobs
from trimtab.math.losses.policy import PPO
from trimtab.math.losses.value import ValueLoss
from trimtab.math.masking import whiten
from trimtab.math.rewards import missing_eos_penalty

pytestmark = needs_trl("1.12")

VOCAB, PAD, EOS, PROMPT, WIDTH, SIZE = 11, 0, 10, 2, 6, 8
TEMPERATURE = 0.7 + 1e-7  # TRL adds the 1e-7 itself
VF_COEF = 0.1


class Numbers(nn.Module):
    """Written-down numbers for every position; of a row of input, those with the number that is its first token."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = nn.Parameter(numbers.clone())
        self.is_gradient_checkpointing = False
        self.generation_config, self.config = SimpleNamespace(), SimpleNamespace(to_dict=dict)

    def of(self, input_ids):
        return self.numbers[input_ids[:, 0] - 1]


class Told(Numbers):
    """A causal model."""

    def forward(self, input_ids, **more):
        return SimpleNamespace(logits=self.of(input_ids))


class Backbone(Numbers):
    def forward(self, input_ids, **more):
        return SimpleNamespace(hidden_states=[self.of(input_ids)[..., None]])


class Scalar(nn.Module):
    """A model with one number for each position."""

    base_model_prefix = "backbone"

    def __init__(self, numbers):
        super().__init__()
        self.backbone, self.score = Backbone(numbers), nn.Identity()
        self.generation_config = SimpleNamespace()


class Keeper(torch.optim.Optimizer):
    """Keeps the gradients of each step and moves the parameters to where they are to be next."""

    def __init__(self, places):
        self.places = places
        super().__init__([p for p, _ in places], {"lr": 1.0})
        self.gradients = []

    @torch.no_grad()
    def step(self, closure=None):
        self.gradients.append([p.grad.clone() for p, _ in self.places])
        for parameter, place in self.places:
            parameter.copy_(place)


class Rollouts:
    """Replies and every number that goes into a step, [B, T] or by position [B, PROMPT + WIDTH]."""

    def __init__(self, lengths, seed=0):
        draw = torch.Generator().manual_seed(seed)

        def noise(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=draw)

        self.lengths = torch.tensor(lengths)
        self.mask = torch.arange(WIDTH) < self.lengths[:, None]
        self.replies = torch.randint(1, EOS, (SIZE, WIDTH), generator=draw)
        self.finished = self.lengths < WIDTH
        self.replies[torch.arange(SIZE)[self.finished], self.lengths[self.finished] - 1] = EOS
        self.replies[~self.mask] = PAD
        places = (SIZE, PROMPT + WIDTH)
        self.old = noise(*places, VOCAB, scale=1.5)
        self.new = self.old + noise(*places, VOCAB, scale=0.25)
        self.ref = self.old + noise(*places, VOCAB, scale=0.4)
        self.old_values, self.scores_at = noise(*places), noise(*places)
        self.new_values = self.old_values + noise(*places, scale=0.3)

    @property
    def sequence_ids(self):
        return torch.arange(SIZE).repeat_interleave(self.lengths)

    @property
    def scores(self):
        """What the reward model says at the last token of each reply."""
        return self.scores_at[torch.arange(SIZE), PROMPT + self.lengths - 1]

    def flat(self, by_position):
        """[M] from where each token is predicted."""
        return by_position[:, PROMPT - 1 : -1][self.mask]

    def ours(self, logits):
        hidden, targets = self.flat(logits), self.replies[self.mask]
        return token_logprobs(hidden, torch.eye(VOCAB), targets, temperature=TEMPERATURE, with_entropy=True)


def their_step(tmp_path, monkeypatch, rollouts, **config):
    """The gradients of both passes in logits and values, and what was logged."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    def sampled(model, queries, *rest):
        rows = queries[:, 0] - 1
        scores = rollouts.old[rows, PROMPT - 1 : -1] / TEMPERATURE
        return torch.cat([queries, rollouts.replies[rows]], 1), scores

    monkeypatch.setattr(ppo_trainer, "batch_generation", sampled)
    policy, value = Told(rollouts.old), Scalar(rollouts.old_values)
    keeper = Keeper([(policy.numbers, rollouts.new), (value.backbone.numbers, rollouts.new_values)])
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            per_device_train_batch_size=SIZE,
            gradient_accumulation_steps=1,
            total_episodes=SIZE,
            num_ppo_epochs=2,
            num_sample_generations=0,
            response_length=WIDTH,
            **config,
        ),
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        model=policy,
        ref_model=Told(rollouts.ref),
        reward_model=Scalar(rollouts.scores_at),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": [[row + 1, 3] for row in range(SIZE)]}),
        data_collator=lambda rows: {"input_ids": torch.tensor([r["input_ids"] for r in rows])},
        optimizers=(keeper, torch.optim.lr_scheduler.ConstantLR(keeper)),
    )
    logged = []
    trainer.log = logged.append
    trainer.train()
    return keeper.gradients, logged[0]


def our_step(
    rollouts,
    *,
    kl_coef=0.05,
    estimator="k1",
    gamma=1.0,
    lam=0.95,
    whitened_scale=None,
    penalty=0.0,
    score_after_end=False,
):
    """The same gradients and our metrics: of each pass the policy loss, the value loss and their gradients.

    With `whitened_scale` rewards are whitened, their deviations from the mean times it (1 is as in training).
    With `score_after_end` every reply that ended gets one more token that only the critic sees, as TRL has it.
    """
    ids = rollouts.sequence_ids
    with torch.no_grad():
        old, _ = rollouts.ours(rollouts.old)
        kl = ESTIMATORS[estimator](old - rollouts.ours(rollouts.ref)[0])
    scores = missing_eos_penalty(rollouts.scores, rollouts.finished, penalty)
    real = torch.ones(len(ids), dtype=torch.bool)
    values, new_values = (rollouts.flat(v) for v in (rollouts.old_values, rollouts.new_values))
    if score_after_end:
        extra = rollouts.lengths + rollouts.finished
        mask = torch.arange(WIDTH) < extra[:, None]
        ids = torch.arange(SIZE).repeat_interleave(extra)
        real = rollouts.mask[mask]
        kl = torch.zeros(len(ids)).masked_scatter(real, kl)
        values, new_values = (v[:, PROMPT - 1 : -1][mask] for v in (rollouts.old_values, rollouts.new_values))
    rewards = token_rewards(scores, kl, ids, kl_coef=kl_coef)
    if whitened_scale is not None:
        mean = rewards.mean()
        rewards = mean + whitened_scale * (whiten(rewards, shift_mean=False) - mean)
    advantages, returns = gae(rewards, values, ids, gamma=gamma, lam=lam)

    trained = whiten(advantages[real])
    batch = SimpleNamespace(
        sequence_ids=rollouts.sequence_ids,
        num_sequences=SIZE,
        old_logprobs=old,
        advantages=trained,
        correction=torch.ones_like(old),
        old_values=values,
        returns=returns,
    )
    passes = []
    for logits, now in ((rollouts.old, values), (rollouts.new, new_values)):
        logits, now = logits.clone().requires_grad_(), now.clone().requires_grad_()
        logprobs, entropy = rollouts.ours(logits)
        loss, metrics = PPO()(SimpleNamespace(logprobs=logprobs, entropy=entropy), batch)
        value_loss, value_metrics = ValueLoss(clip=0.2)(SimpleNamespace(values=now), batch)
        loss, value_loss = loss / len(logprobs), value_loss / len(values)
        gradients = [torch.autograd.grad(loss, logits)[0], torch.autograd.grad(value_loss, now)[0]]
        passes.append((loss.item(), value_loss.item(), gradients, metrics | value_metrics))
    return passes, SimpleNamespace(kl=kl, scores=scores, values=values, real=real, ids=ids, logprobs=old)


def close(mine, theirs, rel=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=rel, atol=rel * float(theirs.abs().max()))


def unbiased(num):
    """TRL divides the variance by the count less one: its whitened numbers are this much smaller than ours."""
    return ((num - 1) / num) ** 0.5


def same_gradients(theirs, passes, num_whitened, place_values):
    for (policy, value), (_, _, (my_policy, my_value), _) in zip(theirs, passes, strict=True):
        close(my_policy * unbiased(num_whitened), policy)
        close(VF_COEF * my_value, place_values(value))


VARIANTS = {
    "usual": ({}, {}),
    "k3 and a coefficient": ({"kl_estimator": "k3", "kl_coef": 0.2}, {"estimator": "k3", "kl_coef": 0.2}),
    "a shorter horizon": ({"gamma": 0.9, "lam": 0.5}, {"gamma": 0.9, "lam": 0.5}),
    "a charge for no end": ({"missing_eos_penalty": 1.5}, {"penalty": 1.5}),
}


@pytest.mark.parametrize(("config", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_two_passes_over_replies_of_full_length_are_trls(tmp_path, monkeypatch, config, options):
    """KL in the reward, GAE, returns, both losses and their gradients, before and after the policy has moved.
    Advantages are whitened with the biased variance here, and with the unbiased one there."""
    rollouts = Rollouts([WIDTH] * SIZE)
    theirs, logged = their_step(tmp_path, monkeypatch, rollouts, **config)
    passes, seen = our_step(rollouts, **options)
    same_gradients(theirs, passes, SIZE * WIDTH, rollouts.flat)
    for ours, name in ((0, "loss/policy_avg"), (1, "loss/value_avg")):
        scale = unbiased(SIZE * WIDTH) if ours == 0 else 1.0
        assert scale * sum(p[ours] for p in passes) / 2 == pytest.approx(logged[name], rel=2e-5, abs=1e-7)
    metrics = passes[1][3]
    assert metrics["policy/clip_fraction"].value / 2 == pytest.approx(logged["policy/clipfrac_avg"], rel=1e-5)
    assert metrics["critic/clip_fraction"].value / 2 == pytest.approx(logged["val/clipfrac_avg"], rel=1e-5)
    assert logged["policy/clipfrac_avg"] > 0
    assert logged["val/clipfrac_avg"] > 0
    assert float(seen.kl.sum()) / SIZE == pytest.approx(logged["objective/kl"], rel=1e-5)
    assert float(seen.scores.mean()) == pytest.approx(logged["objective/scores"], rel=1e-5)


def test_whitened_rewards_are_trls_but_for_the_count_in_the_variance(tmp_path, monkeypatch):
    """Both keep the mean. TRL's deviations from it are smaller by sqrt((n - 1) / n)."""
    rollouts = Rollouts([WIDTH] * SIZE)
    theirs, _ = their_step(tmp_path, monkeypatch, rollouts, whiten_rewards=True)
    n = SIZE * WIDTH
    scaled, _ = our_step(rollouts, whitened_scale=unbiased(n))
    same_gradients(theirs, scaled, n, rollouts.flat)
    for (_, value), (_, _, (_, my_value), _) in zip(theirs, our_step(rollouts, whitened_scale=1.0)[0], strict=True):
        close(VF_COEF * my_value, rollouts.flat(value), rel=2 / n)


LENGTHS = [3, 5, 1, 4, 6, 2, 5, 6]


def test_the_score_of_a_reply_that_ended_is_paid_at_its_end_and_by_trl_one_place_later(tmp_path, monkeypatch):
    """TRL adds the score at the first pad after the end token and lets the critic value that pad. Given such a place
    our functions give TRL's numbers; without it the critic is asked only before tokens that were sampled."""
    rollouts = Rollouts(LENGTHS)
    theirs, _ = their_step(tmp_path, monkeypatch, rollouts)
    passes, _ = our_step(rollouts, score_after_end=True)
    longer = torch.arange(WIDTH) < (rollouts.lengths + rollouts.finished)[:, None]
    same_gradients(theirs, passes, sum(LENGTHS), lambda value: value[:, PROMPT - 1 : -1][longer])

    # Ours: the score at the last token, and no value behind it.
    (_, _, (my_policy, my_value), _), _ = our_step(rollouts)[0]
    assert my_value.shape == (sum(LENGTHS),)
    assert float((my_policy * unbiased(sum(LENGTHS)) - theirs[0][0]).abs().max()) > 1e-3

    # Where the critic values that pad at nothing and nothing is discounted, what is trained on is the same.
    behind_end = rollouts.finished, PROMPT - 1 + rollouts.lengths[rollouts.finished]
    rollouts.old_values[torch.arange(SIZE)[behind_end[0]], behind_end[1]] = 0.0
    theirs, _ = their_step(tmp_path, monkeypatch, rollouts, lam=1.0)
    (_, _, (my_policy, _), _), _ = our_step(rollouts, lam=1.0)[0]
    close(my_policy * unbiased(sum(LENGTHS)), theirs[0][0])


def test_what_is_logged_of_a_pass_is_of_tokens_and_trl_counts_the_padding_too(tmp_path, monkeypatch):
    """TRL's approximate KL (half a square, ours is k3) and entropy are means over the whole rectangle: padding counts
    as tokens that have not moved, and its logits have an entropy."""
    rollouts = Rollouts(LENGTHS)
    _, logged = their_step(tmp_path, monkeypatch, rollouts)
    (_, _, _, before), (_, _, _, after) = our_step(rollouts)[0]
    moved = rollouts.ours(rollouts.new)[0] - rollouts.ours(rollouts.old)[0]
    rectangle = SIZE * WIDTH
    assert float(moved.square().sum() / 2 / rectangle / 2) == pytest.approx(logged["policy/approxkl_avg"], rel=1e-5)
    assert after["policy/approx_kl"].value == pytest.approx(float(k3(-moved).mean()), rel=1e-5)
    mine = (before["policy/entropy"].value + after["policy/entropy"].value) / 2
    everywhere = []
    for logits in (rollouts.old, rollouts.new):
        p = (logits[:, PROMPT - 1 : -1] / TEMPERATURE).softmax(-1)
        everywhere.append(-(p * p.log()).sum(-1))
    assert float(torch.stack(everywhere).mean()) == pytest.approx(logged["policy/entropy_avg"], rel=1e-5)
    assert float(torch.stack(everywhere)[:, rollouts.mask].mean()) == pytest.approx(mine, rel=1e-5)
    assert mine != pytest.approx(logged["policy/entropy_avg"], rel=1e-3)
