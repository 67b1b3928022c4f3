"""The process reward models of TRL 1.12, the last release to train them, and ours on the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

from tests.parity import needs_trl
from tests.parity.trl_online import model_directory
from trimtab.batches.trees import response_tree
from trimtab.data.graded import Grade, GradedPrompts, mask_of
from trimtab.math.losses.graded import ProcessLoss
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel

pytestmark = needs_trl("1.12")

ROWS = {
    "prompt": ["What is 12 + 30?", "We can refund the lamp", "I want a refund"],
    "completions": [
        ["12 + 30 is 42", "The answer is 42"],
        ["Thank you"],
        ["It is within 30 days", "We refund", "Item"],
    ],
    "labels": [[True, False], [False], [True, True, False]],
}


def trainer_of(directory) -> Any:
    from datasets import Dataset
    from trl.experimental.prm import PRMConfig, PRMTrainer

    path = model_directory(str(directory))
    model: Any = AutoModelForTokenClassification.from_pretrained(path, num_labels=2).float()
    torch.nn.init.zeros_(model.score.bias)  # ours has none
    options = {"output_dir": str(directory), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return PRMTrainer(
        model=model,
        args=PRMConfig(**options),
        processing_class=load_tokenizer(path),
        train_dataset=Dataset.from_dict(ROWS),
    )


def graded(row, num_prompt):
    """A row of TRL's data set as ours: its own ids and the places where it has a label."""
    ids, labels = row["input_ids"], row["labels"]
    places = [i - num_prompt for i, label in enumerate(labels) if label >= 0]
    grade = Grade(tuple(ids[num_prompt:]), tuple(places), tuple(float(label) for label in labels if label >= 0))
    return response_tree(ids[:num_prompt], [grade.ids], [mask_of(grade)]), [grade]


def test_the_loss_of_a_process_model_is_trls(tmp_path):
    """TRL's two outputs a token against our one, which is their difference. TRL ends every step with the separator,
    also the last one, and has its label there; ours is at the end token. The same tokens have the same loss."""
    trainer = trainer_of(tmp_path)
    rows = [trainer.train_dataset[i] for i in range(len(ROWS["prompt"]))]
    theirs = trainer.model.train()
    loss = trainer.compute_loss(theirs, trainer.data_collator([dict(row) for row in rows]))
    (gradient,) = torch.autograd.grad(loss, theirs.model.embed_tokens.weight)

    tokenizer = trainer.processing_class
    num_prompts = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in ROWS["prompt"]]
    trees, grades = zip(*(graded(row, num) for row, num in zip(rows, num_prompts, strict=True)), strict=True)
    found = GradedPrompts(trees, grades, prompts=range(len(trees)))
    mine: Any = load_scalar(str(model_directory(str(tmp_path))), head_seed=0)
    with torch.no_grad():
        mine.score.weight.copy_(theirs.score.weight[1:] - theirs.score.weight[:1])
    role, batch = ScalarModel(mine, pad_id=tokenizer.pad_token_id, gives="both"), found.batch()
    total, metrics = ProcessLoss()(role(batch.trees), batch)
    mean = total / ProcessLoss().weight(batch).float()

    assert batch.num_labels == 6
    torch.testing.assert_close(mean, loss, rtol=1e-5, atol=1e-6)
    own = torch.autograd.grad(mean, mine.model.embed_tokens.weight)[0]
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert metrics["loss/train"].value == pytest.approx(loss.item(), rel=1e-5)
