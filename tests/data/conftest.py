"""Tiny tokenizers with the chat templates that matter, trained on the spot."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.data import prepare

TEXT = [
    "Hello there, how are you today? I am fine. What is two plus two? It is four.",
    "user assistant system\n\nBe brief.",
]

CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# begins with bos and strips every content
LLAMA3 = (
    "{%- for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '<|header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant<|header|>\\n\\n' }}{% endif %}"
)
# knows no generation prompt, and closes turns with a line break only
PLAIN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
# refuses system turns, demands alternation, has no generation prompt, puts blanks around the reply
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# writes the thoughts of the last reply, if only that there are none, and leaves out those of earlier ones
THINKING = (
    "{%- for message in messages %}{% set parts = message['content'].split('</think>') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last %}"
    "{% set thoughts = parts[0].replace('<think>', '') if parts | length > 1 else '' %}"
    "{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level(
    special: list[str], template: str | None, *, adds_bos: bool = False, **names: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return wrap(tokenizer, template, adds_bos=adds_bos, **names)


def sentencepiece_like(special: list[str], template: str | None, **names: str) -> PreTrainedTokenizerFast:
    """A blank is part of the word after it, and one is put before the text, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    letters = sorted(set("".join(TEXT) + "[]/INST<>_|▁"))
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return wrap(tokenizer, template, **names)


def wrap(
    tokenizer: Tokenizer, template: str | None, *, adds_bos: bool = False, **names: str
) -> PreTrainedTokenizerFast:
    if adds_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if template is not None:
        wrapped.chat_template = template
    return wrapped


def make(name: str) -> PreTrainedTokenizerFast:
    if name == "ours":
        from trimtab.data.templates import SPECIAL_TOKENS

        return byte_level([*SPECIAL_TOKENS], None, eos_token="<|end|>", pad_token="<|pad|>")
    if name == "chatml":  # pad is eos, and turns end with another token
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return byte_level(special, CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    if name == "thinking":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return byte_level(special, THINKING, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if name == "llama3":
        special = ["<|bos|>", "<|eos|>", "<|start|>", "<|header|>", "<|eot|>", "<|reserved_0|>"]
        return byte_level(special, LLAMA3, adds_bos=True, bos_token="<|bos|>", eos_token="<|eos|>")
    if name == "llama2":
        return sentencepiece_like(
            ["<unk>", "<s>", "</s>"], LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    if name == "plain":
        return byte_level(["<|endoftext|>"], PLAIN, eos_token="<|endoftext|>")
    assert name == "base"  # a base model: no template, adds bos
    return byte_level(["<s>", "</s>"], None, adds_bos=True, bos_token="<s>", eos_token="</s>")


NAMES = ("ours", "chatml", "thinking", "llama3", "llama2", "plain", "base")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make(name) for name in NAMES}


@pytest.fixture
def file(tmp_path):
    """Writes rows as JSON lines."""

    def write(*rows: dict, name: str = "data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory in which prepared files are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trimtab" / "data"


@pytest.fixture
def large(monkeypatch):
    """Every source counts as large: blocks, two processes, kept."""
    monkeypatch.setattr(prepare, "SMALL", 0)
    monkeypatch.setattr(prepare, "BLOCK", 7)
    monkeypatch.setattr(prepare, "num_processes", lambda _: 2)
