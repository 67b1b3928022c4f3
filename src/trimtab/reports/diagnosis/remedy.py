"""The remedy of a diagnosis as a run file: that of the run, with its changes applied."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from trimtab.core import config
from trimtab.core.errors import ConfigError, DataError
from trimtab.reports.collect import PipelineRecord, RunRecord
from trimtab.reports.diagnosis.rule import SettingChange


def as_override(change: SettingChange) -> str:
    """The change as the command line takes it, for example `kl.coef=0.1`."""
    return f"{change.key}={config.toml_value(change.new)}"


def mended(record: RunRecord | PipelineRecord, changes: Sequence[SettingChange], *, where: str) -> dict[str, Any]:
    """The values of the run's own run file with the changes applied. Raises DataError if the record holds no settings,
    and ConfigError for a change that does not fit them. What the file refers to, such as "@reward", stays as it is."""
    if not record.settings:
        raise DataError(
            "the settings of the run are missing or damaged, so there is no run file to change",
            where=where,
            fix="give the changes as overrides to the run file you have",
        )
    stage = {"stage": record.stage} if isinstance(record, RunRecord) else {}
    values = stage | copy.deepcopy(dict(record.settings))
    for change in changes:
        if problem := config.set_value(values, change.path, change.new):
            raise ConfigError(
                f"{change.key} cannot be changed: {problem}",
                where=where,
                fix="give the changes as overrides to the run file you have",
            )
    return values
