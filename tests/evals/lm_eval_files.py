"""Files as lm-eval 0.4.13 writes them with --log_samples, cut down to what is read."""

from __future__ import annotations

import json
from pathlib import Path

TIME = "2026-01-02T03-04-05.678901"


def write_run(
    folder: Path, *, right: dict[str, list[float]], model="org/model", fewshot=0, limit=None, **changes
) -> Path:
    """Writes a run of multiple-choice tasks and returns its folder. `right` has the values of `acc` for each task."""
    there = folder / model.replace("/", "__")
    there.mkdir(parents=True)
    results = {
        "results": {task: {"alias": task, "acc,none": sum(v) / len(v)} for task, v in right.items()},
        "configs": {task: {"task": task} for task in right},
        "n-shot": dict.fromkeys(right, fewshot),
        "higher_is_better": {task: {"acc": True, "brier": False} for task in right},
        "n-samples": {task: {"original": 100, "effective": len(v)} for task, v in right.items()},
        "config": {"model": "hf", "limit": limit, "fewshot_seed": 0, "gen_kwargs": None},
        "model_name": model,
        "chat_template": "{{ messages }}",
        "system_instruction": None,
        "lm_eval_version": "0.4.13",
        "total_evaluation_time_seconds": "12.34",
    }
    (there / f"results_{TIME}.json").write_text(json.dumps(results | changes))
    for task, values in right.items():
        rows = [sample(number, acc=value, brier=(1 - value) / 2) for number, value in enumerate(values)]
        write_samples(there, task, rows)
    return folder


def sample(number: int, *, of: str = "none", prompt: str | None = None, **metrics) -> dict:
    """A line of a file of samples."""
    return {
        "doc_id": number,
        "doc": {"question": f"question {number}"},
        "target": "0",
        "arguments": {"gen_args_0": {"arg_0": f"question {number}", "arg_1": " yes"}},
        "resps": [[["-1.5", "False"]]],
        "filtered_resps": [["-1.5", "False"]],
        "filter": of,
        "metrics": list(metrics),
        "doc_hash": f"document {number}",
        "prompt_hash": prompt or f"prompt {number}",
        "target_hash": "target",
        **metrics,
    }


def write_samples(there: Path, task: str, rows: list[dict]) -> Path:
    """Writes the file of samples of a task."""
    path = there / f"samples_{task}_{TIME}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
