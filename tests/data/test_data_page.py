"""Every example of docs/data.md is read as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trimtab.core import types
from trimtab.data.formats import LAYOUTS
from trimtab.data.layouts import load

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```jsonl (\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("kind", "rows"), EXAMPLES)
def test_an_example_is_read_as_the_page_says_and_whole(tmp_path, kind, rows):
    path = tmp_path / "data.jsonl"
    path.write_text(rows, encoding="utf-8")
    loaded = load(getattr(types, kind), path)
    assert loaded.records
    assert set(loaded.unused) <= {"category", "labeler", "generation", "task"}
    if kind != "Prompt":
        assert load(types.Prompt, path).records


def test_every_layout_has_an_example(tmp_path):
    found = set()
    for kind, rows in EXAMPLES:
        path = tmp_path / "data.jsonl"
        path.write_text(rows, encoding="utf-8")
        found.add(load(getattr(types, kind), path).layout)
    assert {layout.name for layout in LAYOUTS} - found <= {"trees of messages"}
