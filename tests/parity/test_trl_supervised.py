"""The SFT and reward-model losses of TRL 1.16 and ours on the same random numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.parity import needs_trl
from tests.parity.trl_online import PROMPT, Rollouts, Told, model_directory
from trimtab.math.losses.reward import BradleyTerry
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.load import load_causal, load_scalar, load_tokenizer

pytestmark = needs_trl("1.16")

LENGTHS = [3, 5, 1, 4, 6, 2]


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def config(directory, **more):
    return {"output_dir": str(directory), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True} | more


def sft_trainer(directory):
    import trl
    from datasets import Dataset

    path = model_directory(str(directory))
    return trl.SFTTrainer(
        model=load_causal(path),
        args=trl.SFTConfig(**config(directory)),
        processing_class=load_tokenizer(path),
        train_dataset=Dataset.from_dict({"text": ["a refund", "a lamp"]}),
    )


def sft_inputs(rollouts, rows):
    replies = rollouts.replies[rows]
    prompts = torch.tensor([[row, 3] for row in rows])
    labels = replies.masked_fill(~rollouts.mask[rows], -100)
    input_ids = torch.cat([prompts, replies], 1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat([torch.full((len(rows), PROMPT), -100), labels], 1),
    }


def test_the_loss_of_sft_is_trls_mean_over_the_tokens_of_the_whole_step(tmp_path):
    """In two micro-batches of different token counts, as a trainer that accumulates gradients gives them; TRL is told
    the tokens of the step. Left to itself TRL divides by those of the micro-batch: the mean of means is another number,
    and ours is that of the step for any split."""
    from trl.trainer.utils import add_fused_lm_head

    rollouts = Rollouts(LENGTHS, group_size=1)
    trainer = sft_trainer(tmp_path)
    model = Told(rollouts.old)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    halves = [[0, 1, 2, 4], [3, 5]]
    parts = [
        trainer.compute_loss(model, sft_inputs(rollouts, rows), num_items_in_batch=torch.tensor(sum(LENGTHS)))
        for rows in halves
    ]
    (gradient,) = torch.autograd.grad(sum(parts), model.logits)

    logits = rollouts.old.clone().requires_grad_()
    logprobs, _ = rollouts.ours(logits)
    batch = SimpleNamespace(sequence_ids=rollouts.sequence_ids, num_sequences=len(LENGTHS))
    total, metrics = SFTLoss()(SimpleNamespace(logprobs=logprobs), batch)
    mine = total / SFTLoss().weight(batch).float()
    close(mine.detach(), sum(parts).detach())
    close(torch.autograd.grad(mine, logits)[0], gradient)
    assert metrics["loss/train"].value == pytest.approx(mine.item(), rel=1e-5)

    means = [trainer.compute_loss(model, sft_inputs(rollouts, rows)).item() for rows in halves]
    assert sum(means) / 2 != pytest.approx(mine.item(), rel=1e-3)


class Scores(nn.Module):
    """A sequence classifier whose scores are given: all chosen sides, then all rejected ones."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores.clone())

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.scores[:, None])


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centering", [None, 0.01])
def test_the_loss_of_a_reward_model_is_trls(tmp_path, margin, centering):
    """Bradley-Terry with a margin, and the penalty that keeps scores around zero. It is on here by default (0.01), and
    off in TRL. Soft labels and label smoothing are ours alone."""
    import trl
    from datasets import Dataset

    path = model_directory(str(tmp_path))
    trainer = trl.RewardTrainer(
        model=load_scalar(str(path), head_seed=0),
        args=trl.RewardConfig(**config(tmp_path, center_rewards_coefficient=centering)),
        processing_class=load_tokenizer(path),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}),
    )
    trainer.model.train()
    draw = torch.Generator().manual_seed(0)
    scores, margins = torch.randn(10, generator=draw), torch.rand(5, generator=draw)
    model = Scores(scores)
    inputs = {"attention_mask": torch.ones(10, 1)} | ({"margin": margins} if margin else {})
    theirs = trainer.compute_loss(model, inputs)
    (gradient,) = torch.autograd.grad(theirs, model.scores)

    mine_of = scores.clone().requires_grad_()
    batch = SimpleNamespace(
        chosen_ids=torch.arange(5),
        rejected_ids=torch.arange(5, 10),
        margins=margins if margin else torch.full((5,), torch.nan),
        labels=torch.ones(5),
    )
    loss = BradleyTerry(centering_coef=centering or 0.0)
    total, metrics = loss(SimpleNamespace(scores=mine_of), batch)
    mine = total / loss.weight(batch).float()
    close(mine.detach(), theirs.detach())
    close(torch.autograd.grad(mine, mine_of)[0], gradient)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["reward/accuracy"].value == pytest.approx(logged["accuracy"])
    assert metrics["reward/margin"].value == pytest.approx(logged["margin"], rel=1e-5)
