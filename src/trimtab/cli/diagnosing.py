"""The command `trimtab doctor`: what went wrong in a run, and what to change."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from trimtab.core.errors import ConfigError


@click.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--json", "json_out", type=click.Path(dir_okay=False, path_type=Path), help="The diagnosis as JSON, to this file."
)
@click.option(
    "--apply",
    "run_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the run's settings with the remedies applied to this new run file.",
)
def doctor(directory: Path, json_out: Path | None, run_file: Path | None) -> None:
    """Say what went wrong in a run or a pipeline, and what to change.

    Works on runs that are unfinished, short or damaged too. Exit code 1 if something is wrong. Without --apply the
    remedies are printed as overrides.
    """
    from trimtab.core.config import to_toml
    from trimtab.core.files import check_out, json_text, write_out
    from trimtab.core.terminal import printable
    from trimtab.reports.collect import collect
    from trimtab.reports.diagnosis import diagnose
    from trimtab.reports.diagnosis.remedy import as_override, mended
    from trimtab.reports.diagnosis.text import lines_of

    if run_file is not None and run_file.exists():
        raise ConfigError(
            f"{run_file} exists", where="--apply", fix="name a file that does not exist; remedies never replace one"
        )
    check_out(json_out)
    record = collect(directory)
    found = diagnose(record)
    for diagnosis in found:
        for line in lines_of(diagnosis):
            click.echo(line)
        click.echo()
    if not found:
        click.echo("The pipeline holds no run yet.")
    changes = [change for diagnosis in found for change in diagnosis.changes]
    if json_out is not None:
        write_out(json_out, json_text({"runs": [diagnosis.as_json for diagnosis in found]}))
        click.echo(f"diagnosis: {json_out}")
    if changes and run_file is None:
        click.echo("With these overrides, or with --apply FILE, the run can be made again:")
        for change in changes:
            click.echo(f"  {shlex.quote(printable(as_override(change)))}")
    if run_file is not None and not changes:
        click.echo(f"{run_file} is not written: no setting has to change")
    elif run_file is not None:
        values = mended(record, changes, where=str(directory))
        _check(values, where=str(run_file))
        write_out(run_file, to_toml(values))
        click.echo(f"run file: {run_file} ({len(changes)} settings changed)")
    sys.exit(1 if any(diagnosis.found for diagnosis in found) else 0)


def _check(values: dict[str, Any], *, where: str) -> None:
    """Raises ConfigError for settings that no stage takes, such as those of an older version, and for a table that
    names no stage, since nothing could be checked there."""
    from trimtab.core import registry, settings_check

    homes = registry.modules("stage")
    tables = {f"stages.{name}": one for name, one in values["stages"].items()} if "stages" in values else {"": values}
    stages = {path: str(table.get("stage")) if isinstance(table, dict) else "" for path, table in tables.items()}
    if lost := [path or "the run" for path, stage in stages.items() if stage not in homes]:
        raise ConfigError(
            f"{', '.join(lost)} names none of the stages {', '.join(homes)}",
            where=where,
            fix="give the changes as overrides to the run file you have",
        )
    settings_check.check(
        {
            path: (homes[stages[path]], {key: value for key, value in table.items() if key != "stage"})
            for path, table in tables.items()
        },
        where=where,
    )
