"""Capability by lm-eval, in a process of its own: its tasks on a model and a baseline, compared item by item.

lm-eval may live in an environment of its own (`python`), whose torch and transformers need not be those of this one.
Nothing of it is imported here; what it writes is read by `evals.lm_eval`. It ends when this program does, however that
ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trimtab.core.errors import ConfigError, EngineError, need
from trimtab.core.files import check_out, finite, json_text, write_out
from trimtab.core.process import bound_module
from trimtab.evals.lm_eval import LmEvalRun, find_results, read_lm_eval, results_of
from trimtab.evals.suites.suite import refuse_itself
from trimtab.runs.environment import environment
from trimtab.runs.models import local_digest

STDERR = 2
"""The file descriptor that lm-eval writes to: stdout belongs to the figures."""
_HAS_IT = "import importlib.util as u, sys; sys.exit(u.find_spec('lm_eval') is None)"


def run_lm_eval(
    model: str,
    baseline: str | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = True,
    include_path: str | None = None,
    batch_size: str = "1",
    device: str | None = None,
    seed: int = 0,
    python: str | None = None,
    files: Path | None = None,
    out: Path | None = None,
    command: str = "",
) -> dict[str, dict[str, Any]]:
    """Runs tasks of lm-eval on a model, and on its baseline if one is given; returns the results of each task.

    `model` and `baseline` are directories or hub ids, or folders that lm-eval has written with --log_samples, which are
    read as they are. `limit` takes the first documents of each task, `num_fewshot` shows so many examples
    (the task's own number by default), `include_path` holds tasks of your own, and `chat_template` asks
    under the model's template. What lm-eval writes is kept below `files`; results are written to `out`, a
    directory, as TASK.json for `trimtab eval tax`. Raises ConfigError, DataError or EngineError.
    """
    refuse_itself(model, baseline)
    given = {"model": model} | ({} if baseline is None else {"baseline": baseline})
    written = {role: bool(find_results(Path(path))) for role, path in given.items()}
    if not all(written.values()):
        if not tasks:
            raise ConfigError("no task is named", where="--tasks", fix="for example --tasks arc_easy,hellaswag")
        for role, path in given.items():
            if not written[role]:
                _check_model(path)
        python = _interpreter(python)
    digests = {role: None if written[role] else local_digest(path) for role, path in given.items()}
    _check_places(files, out)
    options = {"tasks": ",".join(tasks), "batch_size": batch_size, "seed": seed, "limit": limit}
    options |= {"num_fewshot": num_fewshot, "include_path": include_path, "device": device}
    flags = ["log_samples"] + ["apply_chat_template"] * chat_template
    runs: dict[str, LmEvalRun] = {}
    with ExitStack() as stack:
        kept = files or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for role, path in given.items():
            if written[role]:
                runs[role] = read_lm_eval(Path(path))
                continue
            where = {"model_args": f"pretrained={path}", "output_path": kept / role}
            _run(str(python), options | where, flags, where=f"lm-eval on {path}")
            runs[role] = read_lm_eval(kept / role)
    found = results_of(runs["model"], runs.get("baseline"), seed=seed)
    shared = {
        "model": model,
        "model_sha256": digests["model"],
        "baseline": baseline,
        "baseline_sha256": digests.get("baseline"),
        "engine": {"lm_eval": runs["model"].settings["lm_eval"]},
        "command": command,
        "environment": environment(),
        "seconds": {role: run.seconds for role, run in runs.items()},
    }
    done: dict[str, dict[str, Any]] = {name: finite(result | shared) for name, result in found.items()}
    if out is not None:
        for name, result in done.items():
            write_out(out / f"{name}.json", json_text(result))
    return done


def _check_places(files: Path | None, out: Path | None) -> None:
    """Refuses places that cannot be written to, before lm-eval computes for hours."""
    if files is not None and files.exists() and any(files.iterdir()):
        raise ConfigError("the directory is not empty", where=f"--files {files}", fix="name a new one")
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ConfigError("this is a file", where=f"--out {out}", fix="name a directory")
    check_out(out / "results.json")


def _check_model(path: str) -> None:
    """Refuses what lm-eval would read as something else."""
    if "," in path or "=" in path:
        raise ConfigError(
            "lm-eval cuts the name of a model at a comma and at an equals sign",
            where=path,
            fix="give the directory another name, or a link to it",
        )
    if (Path(path) / "adapter_config.json").exists():
        raise ConfigError(
            "an adapter; lm-eval loads whole models",
            where=path,
            fix=f"merge it: trimtab export --model {path} --out DIR, and name DIR",
        )
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ConfigError("there is no such directory", where=path, fix="name a model directory or a hub id")


def _interpreter(python: str | None) -> str:
    """The interpreter that has lm-eval. Raises EngineError if it has not."""
    if python is None:
        need("lm_eval", extra="lm-eval", setting="eval lm-eval without --python", where="trimtab eval lm-eval")
        return sys.executable
    try:
        done = subprocess.run([python, "-c", _HAS_IT], env=_environment(), capture_output=True, check=False)
    except OSError as error:
        raise EngineError(
            f"it cannot be started: {error.strerror}", where=f"--python {python}", fix="name a Python interpreter"
        ) from error
    if done.returncode:
        raise EngineError(
            "this interpreter has no lm-eval", where=f"--python {python}", fix=f"{python} -m pip install 'lm-eval[hf]'"
        )
    return python


def _environment() -> dict[str, str]:
    """Without the path of this environment's packages, which another interpreter could not import."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(python: str, options: dict[str, Any], flags: Sequence[str], *, where: str) -> None:
    """Runs lm-eval with the options that are not None. What it says goes to stderr as it says it."""
    words = [*bound_module(python, "lm_eval"), "--model", "hf", *(f"--{flag}" for flag in flags)]
    words += [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    done = subprocess.run(words, env=_environment(), stdin=subprocess.DEVNULL, stdout=STDERR, check=False)
    if done.returncode:
        raise EngineError(
            f"it ended with exit code {done.returncode}",
            where=where,
            fix="see what it says above; `lm-eval ls tasks` lists its tasks, and without a network only those run "
            "whose data have been read before",
        )
