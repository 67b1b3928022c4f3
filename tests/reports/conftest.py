from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reports.fabricate import write_pipeline, write_run


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A finished pipeline; read it, do not write to it."""
    return write_pipeline(tmp_path_factory.mktemp("reports") / "quickstart")


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """`write_run` into a fresh directory called `name`."""
    return lambda name="run", **parts: write_run(tmp_path / name, **parts)
