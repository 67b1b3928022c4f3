"""`trimtab ui` as it is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from trimtab import cli


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_host_that_others_can_reach_is_refused_with_the_way_to_do_it(tmp_path: Path, host: str):
    found = CliRunner().invoke(cli.main, ["ui", str(tmp_path), "--host", host])
    assert found.exit_code == 2
    assert "lets other machines in" in found.output
    assert "ssh -L" in found.output


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path):
    found = CliRunner().invoke(cli.main, ["ui", str(tmp_path / "none")])
    assert found.exit_code == 2
    assert "no directory" in found.output
