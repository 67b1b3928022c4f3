"""Our numbers against those of other libraries' own code, on the same random tensors.

    .venv/bin/pip install trl==1.16.0 && .venv/bin/pytest -m parity tests/parity

The tests of PPO need trl==1.12.0, the last release with a PPO trainer; each file says which it needs.
"""

from __future__ import annotations

import importlib.metadata

import pytest


def needs_trl(version: str) -> list[pytest.MarkDecorator]:
    """Marks for a test module: `parity`, and skipped unless a TRL of this version ("1.16") is there."""
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    missing = not found.startswith(version + ".")
    reason = f"needs TRL {version} and found {found}: pip install trl=={version}.0, then pytest -m parity tests/parity"
    # TRL and what it imports warn of their own future; that is not what is tested here.
    return [
        pytest.mark.parity,
        pytest.mark.skipif(missing, reason=reason),
        pytest.mark.filterwarnings("ignore"),
    ]
