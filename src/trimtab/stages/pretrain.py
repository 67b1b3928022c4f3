"""Train a small language model from scratch, on plain text.

The tokenizer is trained too, so that the whole loop runs without a download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from trimtab import worlds
from trimtab.batches.trees import TokenTrees, Tree, TreeBatch, sequence_tree
from trimtab.core import seeds
from trimtab.core.errors import DataError
from trimtab.core.files import replacing
from trimtab.core.types import Demonstration, Message, PreferencePair, Prompt
from trimtab.data.layouts import Loaded, kinds_of, load
from trimtab.data.sources import SourceRows, read_rows
from trimtab.data.templates import DEFAULT_TEMPLATE, SPECIAL_TOKENS
from trimtab.engines.build import Engines
from trimtab.engines.local.learner import AdamW
from trimtab.math.losses.sft import SFTLoss
from trimtab.models.load import load_causal
from trimtab.models.roles import Policy
from trimtab.models.save import save_model
from trimtab.runs.run import Run
from trimtab.stages.stage import EPOCHS_GROW, Stage
from trimtab.stages.supervised import Epochs, EpochSettings, last_metrics, training
from trimtab.worlds.source import is_world


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape of the base model."""

    family: Literal["llama", "qwen3", "gpt2"] = "llama"
    """A standard transformers architecture."""
    num_layers: int = 4
    """Transformer blocks."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Attention heads; they divide the hidden size."""
    mlp_size: int = 768
    """Width of the feed-forward layer."""
    max_positions: int = 2048
    """Longest sequence that the model is meant for."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of 2 x num_heads = {2 * self.num_heads}"
            )

    def config(self, vocab_size: int, pad_id: int, end_id: int) -> PreTrainedConfig:
        """The transformers configuration, with tied embeddings."""
        common: dict[str, Any] = {
            "vocab_size": vocab_size,
            "pad_token_id": pad_id,
            "eos_token_id": end_id,
            "bos_token_id": None,
            "tie_word_embeddings": True,
        }
        if self.family == "gpt2":
            return GPT2Config(
                n_embd=self.hidden_size,
                n_layer=self.num_layers,
                n_head=self.num_heads,
                n_inner=self.mlp_size,
                n_positions=self.max_positions,
                activation_function="gelu_pytorch_tanh",
                **common,
            )
        shape: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "intermediate_size": self.mlp_size,
            "max_position_embeddings": self.max_positions,
        }
        return LlamaConfig(**shape, **common) if self.family == "llama" else Qwen3Config(**shape, **common)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(EpochSettings):
    """Settings of the pretrain stage."""

    data: str
    """Text: a world, a file with a `text` column, or conversations in any layout."""
    num_documents: int | None = None
    """Documents drawn from a world, or the first of a file; None reads a whole file."""
    vocab_size: int = 2048
    """Tokens of the byte-level BPE tokenizer."""
    architecture: Architecture = field(default_factory=Architecture)
    """Shape of the model."""
    max_tokens: int = 512
    """A longer document is cut into pieces of this length that share one token; every token is still learned."""
    batch_size: int = 64
    """Documents per update."""
    optimizer: AdamW = field(
        default_factory=lambda: AdamW(
            learning_rate=1e-3, schedule="cosine", warmup_fraction=0.05, beta2=0.95, weight_decay=0.1
        )
    )
    """The optimizer and its schedule."""
    checkpoint_every: int = 200
    """Updates between checkpoints."""

    def __post_init__(self) -> None:
        if self.data.startswith("world:") and self.num_documents is None:
            raise ValueError("a world never ends: set num_documents")


def run(settings: PretrainSettings, run: Run) -> None:
    """Trains the tokenizer and the model, and writes both to `run.model_dir`."""
    start = run.directory / "start"
    documents = read_documents(settings, run)
    if not start.exists():
        tokenizer = train_tokenizer(documents, settings.vocab_size)
        torch.manual_seed(seeds.derive(settings.seed, "weights"))
        config = settings.architecture.config(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        with replacing(start) as aside:
            save_model(model, tokenizer, aside)
    model = load_causal(start, device=settings.engine.find_device())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    trees = document_trees(documents, tokenizer, settings.max_tokens)
    if not trees:
        raise DataError(
            f"none of {len(documents)} documents has a token to learn from",
            where=settings.data,
            fix="give texts of more than one token, and max_tokens of at least 2",
        )
    epochs = Epochs.of(settings, trees)
    policy = Policy(model, pad_id=tokenizer.pad_token_id)
    engines = Engines.start(settings, run.directory, load=load_roles, models={"policy": policy})
    how: dict[str, Any] = {"token_budget": settings.token_budget, "num_updates": epochs.num_steps}
    learner = engines.learner(policy, settings.optimizer, name="policy", **how)
    loss = SFTLoss()
    with engines, training(run, learner, epochs, settings, description="pretrain") as steps:
        for _, examples in steps:
            batch = TreeBatch(trees=TokenTrees.build([trees[i] for i in examples]))
            steps.log(learner.update([(batch, [loss])]) | steps.speed(batch))
    run.save_model(lambda path: save_model(model, tokenizer, path))
    parameters = sum(p.numel() for p in model.parameters())
    run.finish(
        {"num_parameters": parameters, "num_documents": len(documents)} | steps.counts | last_metrics(run, "loss/")
    )


def load_roles(settings: PretrainSettings, directory: Path) -> tuple[str, dict[str, Policy]]:
    """The tokenizer and the policy as the run began; see `Engines.start`."""
    start = directory / "start"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    model = load_causal(start, device=settings.engine.find_device())
    return str(start), {"policy": Policy(model, pad_id=tokenizer.pad_token_id)}


def read_documents(settings: PretrainSettings, run: Run) -> list[str]:
    """The texts to train on. Conversations are written with the default chat markup, so that it is known later."""
    if is_world(settings.data):
        assert settings.num_documents is not None
        run.add_data(settings.data, "", settings.num_documents)
        name = settings.data.removeprefix("world:").partition("?")[0]
        return worlds.load(name).documents(settings.num_documents, seed=settings.seed)
    rows = read_rows(settings.data, limit=settings.num_documents)
    first = rows.rows[0][1] if rows.rows else {}
    if isinstance(first.get("text"), str) and "message_id" not in first:
        return plain_texts(rows, run)
    kind: type[Any] = PreferencePair if PreferencePair in kinds_of(settings.data) else Demonstration
    loaded: Loaded[Any] = load(kind, settings.data, limit=settings.num_documents, on_bad_row="drop")
    run.add_data(settings.data, loaded.sha256, len(loaded.records), loaded.report)
    if kind is PreferencePair:
        return [as_document(p.prompt, reply) for p in loaded.records for reply in (p.chosen, p.rejected)]
    return [as_document(d.prompt, d.response) for d in loaded.records]


def plain_texts(rows: SourceRows, run: Run) -> list[str]:
    """The texts of the rows; rows without a text are counted and reported."""
    texts = [row["text"] for _, row in rows.rows if isinstance(row.get("text"), str) and row["text"].strip()]
    dropped = Counter(bad.kind for bad in rows.bad)
    dropped["without_text"] = len(rows.rows) - len(texts)
    others = sorted({name for _, row in rows.rows for name in row} - {"text"})
    reading = {"layout": "plain text", "not_used": others, "dropped": {k: num for k, num in dropped.items() if num}}
    run.add_data(rows.source, rows.sha256, len(texts), reading)
    return texts


def as_document(prompt: Prompt, reply: str) -> str:
    """A conversation as one text, in the markup of the default chat template."""
    turns = [*prompt.messages, Message("assistant", reply)]
    return "\n".join(f"<|{turn.role}|>\n{turn.content}<|end|>" for turn in turns)


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the default chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = DEFAULT_TEMPLATE
    return fast


def document_trees(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[Tree]:
    """The documents, each closed by the end token, in pieces of at most `max_tokens`. A piece begins with the last
    token of the one before it, so that every token of a document but the first is predicted once."""
    end = tokenizer.eos_token_id
    trees = []
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        closed = ids if ids and ids[-1] == end else [*ids, end]
        pieces = [closed[i : i + max_tokens] for i in range(0, len(closed) - 1, max(1, max_tokens - 1))]
        trees += [sequence_tree(piece) for piece in pieces if len(piece) > 1]
    return trees


STAGE = Stage(
    settings=PretrainSettings,
    run=run,
    makes="policy",
    trains="policy",
    writes=("metrics.jsonl", "start"),
    grows=EPOCHS_GROW,
    about="A language model learned from plain text, to have something to align.",
)
