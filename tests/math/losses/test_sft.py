from types import SimpleNamespace

import pytest
import torch

from trimtab.core.metrics import merge
from trimtab.math.losses.sft import SFTLoss

LENGTHS = [1, 4, 2]
IDS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))


def batch_of(ids, num_sequences):
    return SimpleNamespace(sequence_ids=ids, num_sequences=num_sequences)


def test_the_token_mean_is_torchs_cross_entropy():
    logits = torch.randn(7, 10)
    targets = torch.randint(0, 10, (7,))
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss, metrics = SFTLoss()(SimpleNamespace(logprobs=logprobs, entropy=None), batch_of(IDS, 3))
    mean = loss / SFTLoss().weight(batch_of(IDS, 3))
    torch.testing.assert_close(mean, torch.nn.functional.cross_entropy(logits, targets), check_dtype=False)
    assert metrics["loss/train"].value == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_splitting_a_batch_of_uneven_lengths_changes_neither_loss_nor_gradient_nor_metric(aggregation):
    loss_class = SFTLoss(aggregation=aggregation)
    logprobs = -torch.rand(7, dtype=torch.float64)

    def run(parts):
        leaf = logprobs.clone().requires_grad_()
        weight = sum(loss_class.weight(b) for _, b in parts)
        results = [loss_class(SimpleNamespace(logprobs=leaf[rows], entropy=None), b) for rows, b in parts]
        loss = sum(total for total, _ in results) / weight
        loss.backward()
        return loss.detach(), leaf.grad, merge(m for _, m in results)["loss/train"].value

    whole = run([(slice(0, 7), batch_of(IDS, 3))])
    split = run([(slice(0, 1), batch_of(IDS[:1], 1)), (slice(1, 7), batch_of(IDS[1:] - 1, 2))])
    torch.testing.assert_close(whole, split)


def test_a_mean_of_micro_batch_means_would_be_something_else():
    # averaging per micro-batch would give (6 + 1) / 2: the single token of the first part counts like six of the second
    logprobs = -torch.tensor([6.0, 1, 1, 1, 1, 1, 1])
    loss, _ = SFTLoss()(SimpleNamespace(logprobs=logprobs, entropy=None), batch_of(IDS, 3))
    assert (loss / SFTLoss().weight(batch_of(IDS, 3))).item() == pytest.approx(12 / 7)


def test_the_sequence_mean_gives_every_sequence_the_same_say():
    logprobs = -torch.tensor([6.0, 1, 1, 1, 1, 3, 5])
    loss, _ = SFTLoss(aggregation="sequence_mean")(SimpleNamespace(logprobs=logprobs), batch_of(IDS, 3))
    assert loss.item() == pytest.approx(6 + 1 + 4)
    assert SFTLoss(aggregation="sequence_mean").weight(batch_of(IDS, 3)).item() == 3


def test_no_tokens_weigh_nothing():
    empty = batch_of(IDS[:0], 0)
    loss, metrics = SFTLoss()(SimpleNamespace(logprobs=torch.zeros(0)), empty)
    assert loss.item() == 0
    assert SFTLoss().weight(empty).item() == 0
    assert SFTLoss().weight(empty).dtype == torch.float64
    assert metrics["loss/train"].weight == 0
