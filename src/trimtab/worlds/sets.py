"""Writes a world to files in the layouts of the ecosystem, for any tool to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.core.files import write_rows
from trimtab.core.types import Prompt
from trimtab.worlds.annotators import Annotators, Pair, calibrate
from trimtab.worlds.world import SPLITS, Split, World

# Pairs used to set how noisy the simulated annotators are.
_CALIBRATION_PAIRS = 500


def write_sets(world: World, rows: int, out: Path, seed: int = 0) -> dict[str, int]:
    """Writes the sets of a world; returns the number of rows of each file by its name under `out`, such as
    `train/demonstrations.jsonl`.

    Each split gets `demonstrations` (conversational `messages`), `comparisons` (`prompt`, `chosen`, `rejected`: one
    vote of a simulated annotator on two replies), `prompts` (with the facts that gold needs) and `documents` (`text`).
    Train gets `rows` of each, validation and test a tenth. Raises DataError if the world has too few prompts.
    """
    people = calibrate(world, world.biases, reply_pairs(world, "train", _CALIBRATION_PAIRS, seed=seed + 1))
    counts: dict[str, int] = {}
    for split in SPLITS:
        num = rows if split == "train" else max(1, rows // 10)
        pairs = reply_pairs(world, split, num, seed=seed)
        sets: dict[str, Iterable[Mapping[str, Any]]] = {
            "demonstrations": (
                {"messages": [*_messages(d.prompt), _reply(d.response)]}
                for d in world.demonstrations(split, num, seed=seed)
            ),
            "comparisons": (_comparison(people, pair, annotator=i, seed=seed) for i, pair in enumerate(pairs)),
            "prompts": (
                {"prompt": _messages(p), "id": p.id, "facts": p.facts} for p in world.prompts(split, num, seed=seed)
            ),
            "documents": ({"text": text} for text in world.documents(num, split=split, seed=seed)),
        }
        for name, lines in sets.items():
            path = out / split / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            counts[f"{split}/{path.name}"] = write_rows(path, lines)
    return counts


def reply_pairs(world: World, split: Split, num: int, *, seed: int) -> list[Pair]:
    """Prompts of the split, each with two replies of the grammar, which differ if 16 draws give different ones."""
    pairs: list[Pair] = []
    for prompt in world.prompts(split, num, seed=seed):
        replies = list(dict.fromkeys(world.replies(prompt, 16, seed=seed)))
        pairs.append((prompt, replies[0], replies[1 % len(replies)]))
    return pairs


def _comparison(people: Annotators, pair: Pair, *, annotator: int, seed: int) -> dict[str, Any]:
    prompt, a, b = pair
    choice = people.vote(prompt, a, b, annotator=annotator, seed=seed)
    chosen, rejected = (a, b) if choice == "A" else (b, a)
    return {"prompt": _messages(prompt), "chosen": [_reply(chosen)], "rejected": [_reply(rejected)]}


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [asdict(message) for message in prompt.messages]


def _reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
