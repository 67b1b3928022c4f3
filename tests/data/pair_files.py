"""Rows of pairs that are unlike each other, for files of any size."""

from __future__ import annotations

import json
import random

WORDS = [
    *[
        "Hello",
        "there",
        "how",
        "are",
        "you",
        "today",
        "I",
        "am",
        "fine",
        "What",
        "is",
        "two",
        "plus",
        "it",
        "four",
        "<|end|>",
        "é",
        "!",
        "<|user|>",
        "12",
    ],
    "",
    "\n",
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def says(random_, most=8):
    """Words and marks of templates, none of which begins or ends the text: such a row is a bad one."""
    return "x" + " ".join(random_.choices(WORDS, k=random_.randint(1, most))) + "."


def prompt_of(random_):
    """A question, or a conversation of three turns."""
    if random_.random() < 0.6:
        return says(random_, 12)
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": says(random_)} for role in roles]


def pair_rows(num=60, seed=0):
    """Pairs of which some share a prompt, some a reply, with margins, labels, ids of their own, and bad rows."""
    random_ = random.Random(seed)
    prompts = [prompt_of(random_) for _ in range(num // 2)]
    replies = [says(random_) for _ in range(num)]
    rows: list[object] = []
    for i in range(num):
        number = random_.randrange(len(prompts))
        chosen, rejected = random_.sample(sorted(set(replies)), 2)
        row = {"prompt": prompts[number], "chosen": chosen, "rejected": rejected}
        row |= random_.choice([{}, {"margin": 0.5}, {"label": 0.75}])
        if number % 3 == 0:
            # an id of the prompt, or one of the row: prompts alike with several ids are held out together
            row["id"] = f"prompt {number}" if number % 2 else f"row {i}"
        rows.append(row)
    rows[5] = '{"prompt": "cut'
    rows[20] = {"prompt": "What?", "chosen": "", "rejected": "x"}
    return rows
