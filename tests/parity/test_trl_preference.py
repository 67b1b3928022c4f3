"""Every preference loss that TRL 1.16 defines, against TRL's own code: values and gradients on the same random numbers.

The trainers' own methods run (`DPOTrainer._compute_loss`, `KTOTrainer._compute_loss`, `ORPOTrainer.odds_ratio_loss`,
`CPOTrainer.cpo_loss`, …); only the model is replaced, by a table of log-probabilities. Where a definition differs from
ours, the test says how, and checks both.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.preference_batches import make, mean_loss, random_pairs, random_replies, split_pairs
from trimtab.math.masking import mean_per_sequence, pad_per_sequence, sum_per_sequence

pytestmark = pytest.mark.parity

VERSION = "1.16.0"
INSTALL = f"pip install trl=={VERSION}, then pytest -m parity tests/parity"
BETA = 0.3


@pytest.fixture(scope="module")
def trl():
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"TRL is not installed: {INSTALL}")
    if found != VERSION:
        pytest.skip(f"TRL is {found}: {INSTALL}")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer, KTOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer

        return SimpleNamespace(DPO=DPOTrainer, KTO=KTOTrainer, ORPO=ORPOTrainer, CPO=CPOTrainer)


class Same:
    """One process: what is gathered is what there is."""

    device = torch.device("cpu")

    def gather(self, x):
        return x

    def gather_for_metrics(self, x):
        return x

    def unwrap_model(self, model):
        return model

    def autocast(self):
        return contextlib.nullcontext()


class Table(torch.nn.Module):
    """A model whose log-probabilities are given: rows of a table for each tensor of input ids."""

    is_gradient_checkpointing = False

    def __init__(self, rows):
        super().__init__()
        self.rows = rows  # [(input ids, log-probabilities of the tokens after the first)]

    def forward(self, input_ids, labels, **_):
        logprobs = next(logprobs for ids, logprobs in self.rows if ids is input_ids)
        logprobs = logprobs * (labels[:, 1:] != -100)
        zeros = torch.zeros_like(logprobs)
        return SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer_of(cls, **attributes):
    """A trainer without a run: what its loss reads, and nothing else."""
    trainer = cls.__new__(cls)
    common = {
        "accelerator": Same(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": False,
    }
    for name, value in (common | attributes).items():
        setattr(trainer, name, value)
    return trainer


def padded(trees, *values):
    """Every sequence as a row: input ids, completion mask, and each of `values` [M] at the token before."""
    rows = trees.padded(0)
    places = rows.predict_from
    mask = torch.zeros_like(rows.input_ids).flatten().index_fill(0, places + 1, 1).view_as(rows.input_ids)
    spread = [
        torch.zeros(rows.input_ids.numel(), dtype=v.dtype).index_put((places,), v).view_as(rows.input_ids)[:, :-1]
        for v in values
    ]
    return rows, mask, spread


def dpo_inputs(batch, logprobs):
    """The batch as TRL lays it out, chosen rows before rejected ones, and tables of policy and reference."""
    rows, mask, (policy, ref) = padded(batch.trees, logprobs, batch.ref_logprobs)
    order = torch.cat([batch.chosen_ids, batch.rejected_ids])
    ids = rows.input_ids[order]
    inputs = {
        "input_ids": ids,
        "attention_mask": rows.attention_mask[order].long(),
        "completion_mask": mask[order],
    }
    return inputs, Table([(ids, policy[order])]), Table([(ids, ref[order])])


def dpo_loss(trl, loss_type, batch, logprobs, **settings):
    """TRL's loss and its logged metrics."""
    inputs, model, reference = dpo_inputs(batch, logprobs)
    options = {
        "beta": BETA,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "loss_weights": [1.0],
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }
    trainer = trainer_of(trl.DPO, loss_types=[loss_type], model=model, ref_model=reference, **(options | settings))
    value = trainer._compute_loss(model, inputs, return_outputs=False)
    return value, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same(theirs, ours, start):
    """Values, and gradients in the log-probabilities, within 1e-5 of their size."""
    own, other = (start.clone().requires_grad_() for _ in range(2))
    a, b = theirs(own), ours(other)
    torch.testing.assert_close(b.double(), a.double(), rtol=1e-5, atol=1e-7)
    a.backward()
    b.backward()
    assert own.grad.norm() > 0
    assert float((own.grad - other.grad).norm() / own.grad.norm()) < 1e-5


SAME = [
    ("sigmoid", {}, "dpo", {}),
    ("sigmoid", {"ld_alpha": 0.4}, "dpo", {"ld_alpha": 0.4}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, "dpo", {"divergence": "forward_kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, "dpo", {"divergence": "js"}),
    ("sigmoid_norm", {}, "dpo", {"length_normalised": True}),
    ("sigmoid_norm", {"f_divergence_type": "js_divergence"}, "dpo", {"divergence": "js", "length_normalised": True}),
    ("robust", {"label_smoothing": 0.2}, "robust_dpo", {"label_smoothing": 0.2}),
    ("hinge", {}, "hinge", {}),
    ("ipo", {}, "ipo", {"length_normalised": True}),
    ("exo_pair", {"label_smoothing": 0.01}, "exo", {"label_smoothing": 0.01}),
    ("nca_pair", {}, "nca", {}),
    ("sppo_hard", {}, "sppo", {}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("aot", {}, "aot", {}),
    ("aot", {"label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {}, "aot", {"paired": False}),
    ("discopop", {}, "discopop", {}),
]


@pytest.mark.parametrize(("loss_type", "their_settings", "name", "settings"), SAME)
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_trainer(trl, loss_type, their_settings, name, settings, seed):
    batch, logprobs = random_pairs(num=8, seed=seed)
    loss = make(name, beta=BETA, **settings)
    assert_same(
        lambda x: dpo_loss(trl, loss_type, batch, x, **their_settings)[0],
        lambda x: mean_loss(loss, batch, x)[0],
        logprobs,
    )


def test_ipo_on_whole_replies_is_the_equation_and_trl_averages_tokens(trl):
    """Eq. 17 has log-ratios of whole replies, our default; TRL divides them by the replies' lengths. On replies of one
    token both are the same."""
    batch, logprobs = random_pairs(num=8)
    theirs = dpo_loss(trl, "ipo", batch, logprobs)[0]
    assert not torch.isclose(theirs, mean_loss(make("ipo", beta=BETA), batch, logprobs)[0].float(), rtol=1e-2)
    ratios = sum_per_sequence(logprobs - batch.ref_logprobs, batch.sequence_ids, batch.num_sequences)
    h = ratios[batch.chosen_ids] - ratios[batch.rejected_ids]
    by_hand = (h - 1 / (2 * BETA)).square().mean()
    torch.testing.assert_close(mean_loss(make("ipo", beta=BETA), batch, logprobs)[0].float(), by_hand)


@pytest.mark.parametrize("their_alpha", [0.5, 0.8])
def test_the_alpha_of_trl_is_one_minus_the_papers(trl, their_alpha):
    """f-DPO has f'(u) = (1 - u^-alpha) / alpha and so do we; TRL raises u to its coefficient minus 1. At the default,
    0.5, both are the same."""
    batch, logprobs = random_pairs(num=8)
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": their_alpha}
    loss = make("dpo", beta=BETA, divergence="alpha", divergence_alpha=1 - their_alpha)
    assert_same(
        lambda x: dpo_loss(trl, "sigmoid", batch, x, **options)[0], lambda x: mean_loss(loss, batch, x)[0], logprobs
    )


def test_bco_on_pairs_is_their_pair_loss_over_replies(trl):
    """TRL adds the two cross-entropies of a pair and divides by pairs; we divide by replies, of which there are twice
    as many, and measure from a shift, which its pair form leaves out."""
    batch, logprobs = random_pairs(num=8)
    loss = make("bco", beta=BETA, shift="none")
    assert_same(
        lambda x: dpo_loss(trl, "bco_pair", batch, x)[0],
        lambda x: 2 * mean_loss(loss, split_pairs(batch), x)[0],
        logprobs,
    )


def test_the_imitation_term_is_a_mean_over_replies_and_trls_one_over_tokens(trl):
    """RPO's equation divides each chosen reply by its own length; TRL's "sft" divides all their tokens by all their
    lengths, within a micro-batch, so that the cut changes it."""
    batch, logprobs = random_pairs(num=8)
    theirs = dpo_loss(trl, "sft", batch, logprobs)[0]
    chosen = torch.isin(batch.sequence_ids, batch.chosen_ids)
    torch.testing.assert_close(theirs, -logprobs[chosen].mean())
    with_nll, without = (mean_loss(make("dpo", nll_coef=x), batch, logprobs)[0] for x in (1.0, 0.0))
    means = mean_per_sequence(logprobs, batch.sequence_ids, batch.num_sequences)[batch.chosen_ids]
    torch.testing.assert_close((with_nll - without).float(), -means.mean())
    # One pair at a time there is no difference.
    for i in range(8):
        one, own = batch.select([i]), logprobs[batch.trees.index_of("token", [i])]
        options = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
        inputs, model, reference = dpo_inputs(one, own)
        trainer = trainer_of(
            trl.DPO,
            model=model,
            ref_model=reference,
            beta=BETA,
            label_smoothing=0.0,
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            **options,
        )
        both = trainer._compute_loss(model, inputs, return_outputs=False)
        torch.testing.assert_close(mean_loss(make("dpo", beta=BETA, nll_coef=0.5), one, own)[0].float(), both)


def test_the_logged_rewards_are_the_same(trl):
    batch, logprobs = random_pairs(num=8)
    _, theirs = dpo_loss(trl, "sigmoid", batch, logprobs)
    _, ours = mean_loss(make("dpo", beta=BETA), batch, logprobs)
    names = {
        "rewards/chosen": "policy/chosen_reward",
        "rewards/rejected": "policy/rejected_reward",
        "rewards/margins": "policy/margin",
        "rewards/accuracies": "policy/accuracy",
        "logps/chosen": "policy/chosen_logprobs",
        "logps/rejected": "policy/rejected_logprobs",
    }
    for name, own in names.items():
        assert ours[own].value == pytest.approx(theirs[name], rel=1e-5), name


def kto_loss(trl, batch, logprobs, mismatched_logprobs, **settings):
    rows, mask, (policy, ref) = padded(batch.trees, logprobs, batch.ref_logprobs)
    kl_rows, kl_mask, (kl_policy, kl_ref) = padded(batch.mismatched, mismatched_logprobs, batch.mismatched_ref_logprobs)
    inputs = {
        "input_ids": rows.input_ids,
        "attention_mask": rows.attention_mask.long(),
        "completion_mask": mask,
        "KL_input_ids": kl_rows.input_ids,
        "KL_attention_mask": kl_rows.attention_mask.long(),
        "KL_completion_mask": kl_mask,
        "label": batch.desirable.bool(),
    }
    model = Table([(rows.input_ids, policy), (kl_rows.input_ids, kl_policy)])
    reference = Table([(rows.input_ids, ref), (kl_rows.input_ids, kl_ref)])
    options = {"beta": BETA, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0} | settings
    trainer = trainer_of(
        trl.KTO,
        model=model,
        ref_model=reference,
        calculate_KL=options["loss_type"] == "kto",
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        **options,
    )
    return trainer._compute_loss(model, inputs, return_outputs=False)


@pytest.mark.parametrize("shift", [-1.0, 1.0])
@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.33, "undesirable_weight": 0.7}])
def test_kto_trainer(trl, shift, weights):
    """Given the same mismatched replies. Which reply is set beside which prompt differs: TRL shifts within a batch of
    the data's order, we pair prompts once for the whole set."""
    batch, logprobs, mismatched = random_replies(num=9)
    mismatched = mismatched + shift
    loss = make("kto", beta=BETA, **weights)
    assert_same(
        lambda x: kto_loss(trl, batch, x, mismatched, **weights),
        lambda x: mean_loss(loss, batch, x, logprobs_of=lambda _: mismatched)[0],
        logprobs,
    )


def test_kto_trainer_without_a_baseline_is_unpaired_apo_zero(trl):
    batch, logprobs, mismatched = random_replies(num=9)
    loss = make("kto", beta=BETA, baseline="none")
    assert_same(
        lambda x: kto_loss(trl, batch, x, mismatched, loss_type="apo_zero_unpaired"),
        lambda x: mean_loss(loss, batch, x)[0],
        logprobs,
    )


def test_orpo_trainer_odds_ratio(trl):
    batch, logprobs = random_pairs(num=8)
    trainer = trainer_of(trl.ORPO, beta=0.1)

    def theirs(x):
        means = mean_per_sequence(x, batch.sequence_ids, batch.num_sequences)
        losses, *_ = trainer.odds_ratio_loss(means[batch.chosen_ids], means[batch.rejected_ids])
        return -losses.mean()

    assert_same(theirs, lambda x: mean_loss(make("orpo", nll_coef=0.0), batch, x)[0], logprobs)


def logits_for(batch, seed=0, vocabulary=64):
    """Logits for the batch's rows as a tensor of their own, and the log-probabilities [M] of the trained tokens."""
    rows, mask, _ = padded(batch.trees)
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(*rows.input_ids.shape, vocabulary, generator=draw).requires_grad_()
    logprobs = logits.log_softmax(-1).flatten(0, 1)[rows.predict_from, batch.trees.targets]
    return rows, mask, logits, logprobs


def concatenated_inputs(batch, rows, mask):
    """What ORPO's and CPO's trainers take: labels with -100 before the reply."""
    inputs = {}
    for side, ids in (("chosen", batch.chosen_ids), ("rejected", batch.rejected_ids)):
        inputs[f"{side}_input_ids"] = rows.input_ids[ids]
        inputs[f"{side}_attention_mask"] = rows.attention_mask[ids].long()
        inputs[f"{side}_labels"] = rows.input_ids[ids].masked_fill(mask[ids] == 0, -100)
    return inputs


def logits_model(batch, logits):
    order = torch.cat([batch.chosen_ids, batch.rejected_ids])
    return lambda *_, **__: SimpleNamespace(logits=logits[order])


COMMON = {"is_encoder_decoder": False, "padding_value": 0, "pad_token_id": 0, "aux_loss_enabled": False}


def test_orpo_trainer_imitates_prompts_too(trl):
    """The paper's first term is the likelihood of the chosen reply. TRL's is that of prompt and reply together, over
    all their tokens; ours is the reply's, each divided by its own length."""
    batch, _ = random_pairs(num=5)
    rows, mask, logits, logprobs = logits_for(batch)
    trainer = trainer_of(trl.ORPO, beta=0.1, **COMMON)
    theirs, _ = trainer.get_batch_loss_metrics(logits_model(batch, logits), concatenated_inputs(batch, rows, mask))
    odds = mean_loss(make("orpo", nll_coef=0.0), batch, logprobs)[0]
    everything = logits.log_softmax(-1)[:, :-1].gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
    seen = rows.attention_mask[batch.chosen_ids][:, 1:]
    torch.testing.assert_close(theirs - odds.float(), -everything[batch.chosen_ids][seen].mean())
    both = mean_loss(make("orpo"), batch, logprobs)[0]
    means = mean_per_sequence(logprobs, batch.sequence_ids, batch.num_sequences)[batch.chosen_ids]
    torch.testing.assert_close((both - odds).float(), -means.mean())


@pytest.mark.parametrize(
    ("theirs", "name", "settings"),
    [
        ({"loss_type": "sigmoid"}, "cpo", {"beta": BETA}),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "cpo", {"beta": BETA, "label_smoothing": 0.1}),
        ({"loss_type": "simpo", "simpo_gamma": 0.5}, "simpo", {"beta": BETA, "gamma": 0.5}),
        (
            {"loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": 0.1},
            "simpo",
            {"beta": BETA, "gamma": 0.5, "label_smoothing": 0.1},
        ),
    ],
)
def test_cpo_trainer(trl, theirs, name, settings):
    batch, logprobs = random_pairs(num=8)
    options = {"beta": BETA, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0} | theirs
    trainer = trainer_of(trl.CPO, **options)

    def their_loss(x):
        of_replies = mean_per_sequence if theirs["loss_type"] == "simpo" else sum_per_sequence
        scores = of_replies(x, batch.sequence_ids, batch.num_sequences)
        return trainer.cpo_loss(scores[batch.chosen_ids], scores[batch.rejected_ids])[0].mean()

    assert_same(their_loss, lambda x: mean_loss(make(name, nll_coef=0.0, **settings), batch, x)[0], logprobs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_cpo_trainer_imitates_by_tokens_and_we_by_replies(trl, loss_type):
    """CPO and CPO-SimPO. TRL's imitation term averages over the tokens of all chosen replies of the micro-batch, ours
    over replies; for a single pair both are the same."""
    name, settings = {"sigmoid": ("cpo", {}), "simpo": ("simpo", {"gamma": 0.5})}[loss_type]
    batch, _ = random_pairs(num=5)
    options = {"beta": BETA, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, "cpo_alpha": 1.0}
    trainer = trainer_of(trl.CPO, loss_type=loss_type, **options, **COMMON)
    for part in (batch, *(batch.select([i]) for i in range(5))):
        rows, mask, logits, logprobs = logits_for(part)
        theirs, _ = trainer.get_batch_loss_metrics(logits_model(part, logits), concatenated_inputs(part, rows, mask))
        preference = mean_loss(make(name, beta=BETA, nll_coef=0.0, **settings), part, logprobs)[0].float()
        chosen = torch.isin(part.sequence_ids, part.chosen_ids)
        torch.testing.assert_close(theirs, preference - logprobs[chosen].mean())
        if part is batch:
            continue
        (own,) = torch.autograd.grad(theirs, logits, retain_graph=True)
        ours = mean_loss(make(name, beta=BETA, nll_coef=1.0, **settings), part, logprobs)[0]
        (other,) = torch.autograd.grad(ours, logits)
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-7)
        assert float((own - other).norm() / own.norm()) < 1e-5


def test_rows_are_laid_out_as_meant():
    """The table the trainers read: each trained token stands where the token before it predicts it."""
    batch, logprobs = random_pairs(num=4)
    inputs, model, _ = dpo_inputs(batch, logprobs)
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    read = model(inputs["input_ids"], labels).log_probs.sum(1)
    sums = sum_per_sequence(logprobs, batch.sequence_ids, batch.num_sequences)
    torch.testing.assert_close(read, sums[torch.cat([batch.chosen_ids, batch.rejected_ids])])
    tokens, filled = pad_per_sequence(batch.trees.targets, batch.sequence_ids, batch.num_sequences)
    assert inputs["input_ids"][0][inputs["completion_mask"][0] == 1].tolist() == tokens[0][filled[0]].tolist()
