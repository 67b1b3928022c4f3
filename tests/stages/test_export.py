"""`trimtab export` makes a whole model of an adapter, and nothing else of a whole one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.core.test_files import small_disk
from tests.models.test_foreign_adapters import IDS, PARTS, logits, lora, write
from tests.stages.commands import trimtab
from tests.tiny import write_model_directory
from trimtab.models.load import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model_directory(tmp_path_factory.mktemp("export") / "base", seed=3)


@pytest.mark.parametrize("part", ["head saved whole", "ia3"])
def test_an_adapter_is_merged(base, tmp_path, part):
    theirs = logits(write(base, tmp_path / "adapter", PARTS[part]()))
    done = trimtab("export", "--model", tmp_path / "adapter", "--out", tmp_path / "whole")
    assert "a language model, LlamaForCausalLM" in done.output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(plain), theirs, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(tmp_path / "whole").chat_template
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_a_reward_adapter_becomes_a_reward_model_in_the_dtype_asked_for(base, tmp_path):
    theirs = logits(write(base, tmp_path / "adapter", lora(task_type="SEQ_CLS"), head=True))
    trimtab("export", "--model", tmp_path / "adapter", "--out", tmp_path / "whole", "--dtype", "bfloat16")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", dtype="auto")
    assert plain.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(plain.float()(input_ids=IDS).logits, theirs, rtol=0.05, atol=0.05)


def test_nothing_is_written_over(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = trimtab("export", "--model", base, "--out", tmp_path)
    assert done.exit_code == 2
    assert "is there and not empty" in done.output


def test_a_disk_that_is_full_leaves_nothing(base, tmp_path):
    with small_disk(20_000):
        done = trimtab("export", "--model", base, "--out", tmp_path / "new" / "whole")
    assert done.exit_code == 2
    assert "new/whole could not be written: File too large" in done.output
    assert not any((tmp_path / "new").iterdir())
    assert trimtab("export", "--model", base, "--out", tmp_path / "new" / "whole").exit_code == 0
