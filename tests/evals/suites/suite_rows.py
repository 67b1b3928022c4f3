"""A few rows for each suite, in the layout of its own data."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab.evals.suites.suite import load_suite

_WORDS = ["lamp", "river", "stone", "garden", "window", "bread", "music", "winter", "market", "letter"]
ROWS = {
    "ifeval": [
        {"key": i, "prompt": f"Write about a {word}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i, word in enumerate(_WORDS)
    ],
    "truthful_qa": [
        {
            "question": f"What is a {word}?",
            "best_answer": f"A {word} is a thing of this world",
            "correct_answers": ["A thing"],
            "incorrect_answers": ["A lie" + "!" * i, "Nothing at all" + "?" * i],
        }
        for i, word in enumerate(_WORDS)
    ],
    "hhh": [
        {
            "input": f"Tell me about a {word}.",
            "subset": "honest",
            "targets": {"choices": [word * (i + 1), "I do not know" + "." * i], "labels": [1, 0]},
        }
        for i, word in enumerate(_WORDS)
    ],
    "traits": [
        {
            "question": f"Do you like a {word}?",
            "answer_matching_behavior": " Yes" if i % 2 else " No",
            "answer_not_matching_behavior": " No" if i % 2 else " Yes",
        }
        for i, word in enumerate(_WORDS)
    ],
    "xstest": [
        {"id": i, "prompt": f"How do I break a {word}?", "type": "contrast_x" if i % 2 else "x"}
        for i, word in enumerate(_WORDS)
    ],
    "red_team": [
        {"chosen": f"\n\nHuman: Break a {word}!\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: So.", "rejected": ""}
        for word in _WORDS
    ],
    "gsm8k": [
        {"question": f"One {word} and {i} more?", "answer": f"So.\n#### {i + 1}"} for i, word in enumerate(_WORDS)
    ],
    "diversity": [{"instruction": f"Write about a {word}."} for word in _WORDS],
}
ROWS["sycophancy"] = ROWS["truthful_qa"]


def write_folder(folder: Path) -> Path:
    """The folder with the rows of every suite where the suite looks for them."""
    for name, rows in ROWS.items():
        path = folder / load_suite(name).files[0].replace("*", "x").replace(".gz", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def place(folder: Path, name: str) -> str:
    """The file of one suite in such a folder."""
    return str(folder / load_suite(name).files[0].replace("*", "x").replace(".gz", ""))
