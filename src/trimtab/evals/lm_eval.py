"""What EleutherAI's lm-eval has written, as results of suites: one for each of its tasks.

With `--log_samples --output_path FOLDER` lm-eval (0.4) writes `FOLDER/MODEL/results_TIME.json` and beside it a file
`samples_TASK_TIME.jsonl` for each task: a line for each document and filter, with the document's hash, the hash of its
prompt and a value of every metric. Metrics whose value of a document is a number in [0, 1] are used, so that two models
are compared item by item; the others, such as parts of a perplexity, are named as left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import DataError
from trimtab.core.files import read_json
from trimtab.data.sources import read_good_rows
from trimtab.evals.suites.report import figures
from trimtab.evals.suites.results import VERSION
from trimtab.evals.suites.suite import Question, SuiteItem, SuiteMetric

PAPER = "github.com/EleutherAI/lm-evaluation-harness"
NAMED = "lm-eval/{}"
"""The name of a task as a suite."""


@dataclass(frozen=True, kw_only=True)
class LmEvalItem:
    """A document of a task, as it was asked."""

    document: str
    """The hash of the document."""
    prompt: str
    """The hash of its prompt, which is that of several documents if they are not independent."""
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LmEvalTask:
    """A task of lm-eval as one model has done it."""

    items: Mapping[str, LmEvalItem]
    """By the number of the document."""
    metrics: tuple[SuiteMetric, ...]
    """In lm-eval's order, a filter behind a comma if there is one: `exact_match,strict-match`."""
    left_out: tuple[str, ...]
    """Metrics that some document lacks, or whose values are no numbers in [0, 1]."""
    num_available: int
    """Documents of the task, asked or not."""
    num_fewshot: int
    """Examples before each question."""
    sha256: str
    """Of the file of samples."""


@dataclass(frozen=True, kw_only=True)
class LmEvalRun:
    """One run of lm-eval with one model."""

    model: str
    """As lm-eval calls it."""
    tasks: Mapping[str, LmEvalTask]
    settings: Mapping[str, Any]
    """What decides the prompts: the limit, the examples' seed, the template, the system prompt."""
    seconds: float


def find_results(folder: Path) -> list[Path]:
    """The files of results in a folder and below."""
    return sorted(folder.rglob("results_*.json")) if folder.is_dir() else []


def read_lm_eval(folder: Path) -> LmEvalRun:
    """The only run below a folder. Raises DataError if there is none, or several, or its samples are missing, damaged
    or say nothing about single documents."""
    found = find_results(folder)
    if len(found) != 1:
        raise DataError(
            f"{len(found)} files results_*.json of lm-eval are here and below",
            where=str(folder),
            fix="name the folder of one run, written by lm-eval with --output_path FOLDER --log_samples",
        )
    (path,) = found
    fix = "name a folder that lm-eval 0.4 or later wrote with --output_path FOLDER --log_samples"
    results = read_json(path, fix=fix)
    parts: list[Any] = [results.get(name) for name in ("n-samples", "higher_is_better", "n-shot", "config")]
    counted = all(isinstance(part, dict) for part in parts) and all(
        isinstance(count, dict) and isinstance(count.get("original"), int) for count in parts[0].values()
    )
    if not counted:
        raise DataError("these are no results of lm-eval", where=str(path), fix=fix)
    counts, better, shots, settings = parts
    time = path.stem.removeprefix("results_")
    tasks = {
        name: _task(
            path.with_name(f"samples_{name}_{time}.jsonl"),
            better=ways if isinstance(ways := better.get(name), dict) else {},
            num_available=counts[name]["original"],
            num_fewshot=int(shots.get(name) or 0),
        )
        for name in sorted(counts)
    }
    if not tasks:
        raise DataError("lm-eval has done no task", where=str(path), fix=fix)
    return LmEvalRun(
        model=str(results.get("model_name") or settings.get("model")),
        tasks=tasks,
        settings={
            "limit": settings.get("limit"),
            "seed": settings.get("fewshot_seed"),
            "max_new_tokens": None,
            "temperature": None,
            "gen_kwargs": settings.get("gen_kwargs"),
            "chat_template": results.get("chat_template") is not None,
            "system_instruction": results.get("system_instruction"),
            "lm_eval": results.get("lm_eval_version"),
        },
        seconds=_seconds(results.get("total_evaluation_time_seconds")),
    )


def _seconds(text: Any) -> float:
    """lm-eval writes them as a text; 0 for what is none."""
    try:
        return round(float(text), 1)
    except (TypeError, ValueError):
        return 0.0


def _task(path: Path, *, better: Mapping[str, bool | None], num_available: int, num_fewshot: int) -> LmEvalTask:
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), fix="run lm-eval with --log_samples")
    read = read_good_rows(path, fix="run lm-eval again: its file is damaged")
    items: dict[str, LmEvalItem] = {}
    names: dict[str, str] = {}
    left_out: set[str] = set()
    for where, row in read.rows:
        keys: list[Any] = [row.get(name) for name in ("doc_id", "doc_hash", "prompt_hash", "filter", "metrics")]
        if None in keys or not isinstance(keys[-1], list) or not all(isinstance(one, str) for one in keys[-1]):
            raise DataError(
                "no sample of lm-eval: it lacks doc_id, doc_hash, prompt_hash, filter or metrics",
                where=where,
                fix="give the files as lm-eval 0.4 or later writes them",
            )
        number, document, prompt, filtered, metrics = keys
        scores: dict[str, float] = {}
        for metric in metrics:
            name = metric if filtered == "none" else f"{metric},{filtered}"
            names.setdefault(name, metric)
            value = row.get(metric)
            if isinstance(value, int | float) and 0 <= value <= 1:  # nan is not
                scores[name] = float(value)
            else:
                left_out.add(name)
        before = items.get(str(number))
        if before is not None and (before.document != document or before.scores.keys() & scores.keys()):
            raise DataError(f"document {number} is there twice", where=where, fix="run lm-eval into an empty folder")
        known = {} if before is None else before.scores
        items[str(number)] = LmEvalItem(document=str(document), prompt=str(prompt), scores={**known, **scores})
    # of a document whose row was cut off, or has other metrics, nothing is known
    left_out |= {name for name in names if any(name not in item.scores for item in items.values())}
    used = {name: metric for name, metric in names.items() if name not in left_out}
    if not used:
        raise DataError(
            f"no metric of a document is a number from 0 to 1 ({', '.join(sorted(left_out)) or 'none is there'})",
            where=str(path),
            fix="leave this task out: models cannot be compared by it item by item",
        )
    return LmEvalTask(
        items={
            number: LmEvalItem(
                document=item.document, prompt=item.prompt, scores={name: item.scores[name] for name in used}
            )
            for number, item in items.items()
        },
        metrics=tuple(SuiteMetric(name, f"lm-eval's {name}", _better(better.get(used[name]))) for name in used),
        left_out=tuple(sorted(left_out)),
        num_available=num_available,
        num_fewshot=num_fewshot,
        sha256=read.sha256,
    )


def _better(higher: bool | None) -> Any:
    return "neither" if higher is None else "higher" if higher else "lower"


def results_of(ours: LmEvalRun, theirs: LmEvalRun | None = None, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The figures of each task, in the layout of `suite.schema.json` but for models, command and machine. Raises
    DataError if the two runs were not asked the same."""
    if theirs is not None:
        _check_same(ours, theirs)
    found: dict[str, dict[str, Any]] = {}
    for name, task in ours.tasks.items():
        other = None if theirs is None else theirs.tasks[name]
        items = [
            SuiteItem(id=number, questions=(Question(turns=(item.document,)),), cluster=item.prompt)
            for number, item in task.items.items()
        ]
        scores = [{metric: [value] for metric, value in item.scores.items()} for item in task.items.values()]
        baseline = None
        if other is not None:
            shown = {metric.name for metric in other.metrics}
            rows = [other.items[number].scores for number in task.items]
            baseline = [{metric: [row[metric]] for metric in task.items[i.id].scores if metric in shown}
                        for i, row in zip(items, rows, strict=True)]  # fmt: skip
        notes = ["lm-eval takes the first documents of a task if there is a limit"] if ours.settings["limit"] else []
        if task.left_out:
            notes.append(f"left out, since values of single documents are not in [0, 1]: {', '.join(task.left_out)}")
        found[name] = {
            "version": VERSION,
            "suite": NAMED.format(name),
            "paper": PAPER,
            "notes": notes,
            "data": {f"samples of {name}": task.sha256},
            "num_available": task.num_available,
            "settings": {**ours.settings, "num_fewshot": task.num_fewshot},
            **figures(items, scores, baseline, {}, task.metrics, seed=seed),
            "resembles": None,
            "truncated_fraction": None,
        }
    return found


def _check_same(ours: LmEvalRun, theirs: LmEvalRun) -> None:
    """Refuses runs of other tasks, documents or settings."""
    if ours.tasks.keys() != theirs.tasks.keys():
        raise DataError(
            f"the model has done {', '.join(ours.tasks)}, the baseline {', '.join(theirs.tasks)}",
            where="the two runs of lm-eval",
            fix="run both with the same --tasks",
        )
    if changed := [name for name in ours.settings if ours.settings[name] != theirs.settings[name]]:
        values = "; ".join(f"{name} = {ours.settings[name]!r} and {theirs.settings[name]!r}" for name in changed)
        raise DataError(
            f"the model and its baseline were not asked the same way: {values}",
            where="the two runs of lm-eval",
            fix="run both with the same settings",
        )
    for name, task in ours.tasks.items():
        other = theirs.tasks[name]
        here, there = ({n: item.document for n, item in one.items.items()} for one in (task, other))
        if here != there or task.num_fewshot != other.num_fewshot:
            raise DataError(
                f"the documents of {name} are not the same",
                where="the two runs of lm-eval",
                fix="run both with one version of the task, the same --limit and the same --num_fewshot",
            )
