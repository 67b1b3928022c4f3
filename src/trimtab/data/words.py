"""The token ids of many texts at once, many times faster if the tokenizer allows every word to be looked up.

Most tokenizers of today (GPT-2, Llama 3, Qwen, trimtab's own) cut a text into words by one of a few regular
expressions and then look at each word alone. All of these begin a new word at a space that is followed by something
else than white space, and what they do with a word depends on nothing outside it. So a text may be cut at these spaces,
and the ids of a piece that was seen before need not be computed again: a file has few different words. Every other
tokenizer, and every text for which this could matter, is tokenised by the tokenizer itself. The ids are the same either
way.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

MAX_PIECES = 200_000
"""How many different words are remembered, in about 50 MB; when there are more, all are forgotten."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# At white space all of them behave alike: of a run of spaces before a word, the last space belongs to the word.
_KNOWN_PATTERNS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, cl100k
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2 and 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # o200k: gpt-oss, Llama 4, Phi 4 mini
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        + _CONTRACTIONS
        + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        + _CONTRACTIONS
        + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
# White space for Python, and characters that some tables of Unicode count as white space.
_BLANKS = r"[\s\u180e\u200b\u2060\ufeff]"
_NO_BEGIN = re.compile(_BLANKS)
_NO_CUT = re.compile(f" (?={_BLANKS}|\\Z)")
"""A space at which a text is not cut."""


class Words:
    """Token ids of texts, without special tokens around them: those of `tokenizer(text, add_special_tokens=False)`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        rules = _rules(tokenizer)
        self.by_words = rules is not None
        """Whether texts are cut into words that are looked up."""
        if rules is None:
            return
        self._needs_nfc = rules["normalizer"] is not None
        tokens = rules["added_tokens"]
        self._split = _one_of(tokens)
        self._odd = _one_of(filter(_is_odd, tokens))
        self._added_ids = {t["content"]: (int(t["id"]),) for t in tokens}
        self._first: dict[str, tuple[int, ...]] = {}
        """The ids of a piece at the beginning of a text."""
        self._later: dict[str, tuple[int, ...]] = {}
        """The ids of a piece together with the space before it."""

    def encode(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """The ids of each text. With `plain`, special tokens are tokenised as ordinary text, and the tokenizer itself
        is used: few texts need this, and whether it still finds other added tokens follows rules of its own."""
        if plain or not self.by_words:
            return self._by_tokenizer(texts, plain)
        wholes = [i for i, text in enumerate(texts) if not self._may_be_cut(text)]
        found = dict(zip(wholes, self._by_tokenizer([texts[i] for i in wholes], plain), strict=True))
        later: dict[int, list[str]] = {}
        for i, text in enumerate(texts):
            if i not in found:
                split = self._split.split(text)
                try:
                    found[i] = self._join(split)
                except KeyError:
                    later[i] = split
        self._learn(chain.from_iterable(split[::2] for split in later.values()))
        found |= {i: self._join(split) for i, split in later.items()}
        return [found[i] for i in range(len(texts))]

    def _may_be_cut(self, text: str) -> bool:
        if self._odd.search(text):
            return False
        return not self._needs_nfc or text.isascii() or unicodedata.is_normalized("NFC", text)

    def _join(self, split: Sequence[str]) -> list[int]:
        """The ids of a text, given as stretches of words with added tokens between them. KeyError at a new word."""
        ids: list[int] = []
        for i, part in enumerate(split):
            if i % 2:
                ids.extend(self._added_ids[part])
            elif part:
                first, *others = _words(part)
                ids.extend(self._first[first])
                ids.extend(chain.from_iterable(map(self._later.__getitem__, others)))
        return ids

    def _learn(self, stretches: Iterable[str]) -> None:
        """Finds the ids of the pieces that were not seen before."""
        first, later = set[str](), set[str]()
        for stretch in filter(None, stretches):
            begin, *others = _words(stretch)
            first.add(begin)
            later.update(others)
        if len(self._first) + len(self._later) > MAX_PIECES:
            self._first.clear()
            self._later.clear()
        for new, known, before in ((first, self._first, ""), (later, self._later, " ")):
            missing = [piece for piece in new if piece not in known]
            ids = self._by_tokenizer([before + piece for piece in missing], plain=True)
            known.update(zip(missing, map(tuple, ids), strict=True))

    def _by_tokenizer(self, texts: Sequence[str], plain: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            verbose=False,
        )
        return cast("list[list[int]]", encoded["input_ids"])


def _words(text: str) -> list[str]:
    """The pieces of a text. Joined with spaces, they are the text."""
    words = text.split(" ")
    if not _NO_CUT.search(text):
        return words
    pieces = words[:1]
    for word in words[1:]:
        if word and not _NO_BEGIN.match(word):
            pieces.append(word)
        else:
            pieces[-1] += " " + word
    return pieces


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The tokenizer's rules if its texts may be cut into words, else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules: dict[str, Any] = json.loads(backend.to_str())
    model, normalizer = rules["model"], rules["normalizer"]
    looks_at_words_alone = model["type"] == "BPE" and not model.get("dropout")
    keeps_blanks = normalizer is None or normalizer == {"type": "NFC"}
    return rules if looks_at_words_alone and keeps_blanks and _is_known(rules["pre_tokenizer"]) else None


def _is_known(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps: list[dict[str, Any]] = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return bool(steps[0].get("use_regex", True))
    return (
        len(steps) == 2
        and steps[0]["type"] == "Split"
        and steps[0]["pattern"].get("Regex") in _KNOWN_PATTERNS
        and steps[0]["behavior"] == "Isolated"
        and not steps[0]["invert"]
        and not steps[1].get("use_regex", True)
    )


def _is_odd(token: dict[str, Any]) -> bool:
    """Whether the token takes in blanks beside it, needs word boundaries, or is searched for in a normalised text."""
    return bool(token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])


def _one_of(tokens: Iterable[dict[str, Any]]) -> re.Pattern[str]:
    """A pattern that finds the longest of the tokens at the first place where there is one."""
    contents = sorted((t["content"] for t in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, contents))})" if contents else r"((?!))")
