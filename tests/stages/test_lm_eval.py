"""lm-eval runs in a process of its own. Here a program stands in for it that writes files as it does.

With an interpreter that has lm-eval in TRIMTAB_LM_EVAL the last test runs lm-eval itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import jsonschema
import pytest

from tests.evals.lm_eval_files import write_run
from tests.evals.test_lm_eval import SCHEMA
from tests.stages.commands import trimtab

PROGRAM = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.evals.lm_eval_files import write_run
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
if value("--tasks") == "unknown":
    sys.exit("no task is called unknown")
better = "good" in value("--model_args")
write_run(Path(value("--output_path")), right={{t: [1.0, float(better)] * 20 for t in value("--tasks").split(",")}})
Path(value("--output_path"), "words.json").write_text(json.dumps([words, "PYTHONPATH" in os.environ]))
"""


@pytest.fixture
def python(tmp_path):
    """An interpreter that has a program called lm_eval."""
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM.format(root=os.getcwd()))
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\ncd "{package.parent}" && exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def models(tmp_path):
    for name in ("good", "worse"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    return str(tmp_path / "good"), str(tmp_path / "worse")


def test_a_model_and_its_baseline_are_run_and_compared(python, models, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    out, kept = tmp_path / "out", tmp_path / "kept"
    options = ["--tasks", "arc,piqa", "--python", python, "--limit", "40", "--num-fewshot", "2"]
    done = trimtab("eval", "lm-eval", *models, *options, "--out", str(out), "--files", str(kept))
    assert done.exit_code == 0, done.output
    assert "lm-eval/arc" in done.output
    assert "pass" in done.output
    for task in ("arc", "piqa"):
        result = json.loads((out / f"{task}.json").read_text())
        jsonschema.validate(result, SCHEMA)
        assert result["metrics"][0]["difference"]["value"] == 0.5
    words, has_path = json.loads((kept / "baseline" / "words.json").read_text())
    assert has_path is False
    assert words[:2] == ["--model", "hf"]
    assert words[words.index("--model_args") + 1] == f"pretrained={models[1]}"
    assert words[words.index("--limit") + 1] == "40"
    assert not {"--device", "--include_path"} & {*words}  # nobody asked for them
    assert {"--apply_chat_template", "--log_samples", "--num_fewshot"} <= {*words}
    tax = trimtab("eval", "tax", str(out / "arc.json"), str(out / "piqa.json"))
    assert tax.exit_code == 0, tax.output
    assert "lm-eval/piqa acc" in tax.output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_lm_eval_ends_with_the_program_that_started_it(python, models, tmp_path, number):
    said = tmp_path / "pid"
    program = tmp_path / "packages" / "lm_eval" / "__main__.py"
    program.write_text(
        f"import os, pathlib, sys, time\npathlib.Path({str(said)!r}).write_text(f'{{os.getpid()}} ')\n"
        "assert sys.argv[1:3] == ['--model', 'hf']\ntime.sleep(300)\n"
    )
    command = [sys.executable, "-m", "trimtab", "eval", "lm-eval", models[0], "--tasks", "arc", "--python", python]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (said.exists() and said.read_text().endswith(" ")):
            assert time.monotonic() < until
            time.sleep(0.05)
        child = int(said.read_text())
    finally:
        process.send_signal(number)
        process.wait(timeout=30)
    while is_there(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_there(process: int) -> bool:
    """Whether a process goes on; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_folders_that_lm_eval_has_written_are_read_without_it(tmp_path):
    ours = write_run(tmp_path / "a", right={"arc": [1.0, 0.0] * 20})
    theirs = write_run(tmp_path / "b", right={"arc": [1.0, 1.0] * 20})
    done = trimtab("eval", "lm-eval", str(ours), str(theirs))
    assert done.exit_code == 0, done.output
    assert "fail" in done.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tasks", ""], "no task is named"),
        (["--tasks", "unknown"], "ended with exit code 1"),
        (["--python", "/no/python"], "cannot be started"),
        (["--python", sys.executable], "has no lm-eval"),
        (["--files", "{full}"], "not empty"),
        (["--out", "{file}"], "is a file"),
        (["--out", "{file}/deeper", "--tasks", "unknown"], "could not be written"),  # before lm-eval begins
    ],
)
def test_what_cannot_be_run_is_said(python, models, tmp_path, change, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    change = [word.format(full=tmp_path / "full", file=tmp_path / "full" / "file") for word in change]
    options = ["--tasks", "arc", "--python", python, *change]
    done = trimtab("eval", "lm-eval", models[0], *options)
    assert done.exit_code == 2
    assert said in done.output


def test_models_that_lm_eval_would_misread_are_refused(python, models, tmp_path):
    def refused(*names):
        done = trimtab("eval", "lm-eval", *names, "--tasks", "arc", "--python", python)
        assert done.exit_code == 2
        return done.output

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "a,b").mkdir()
    assert "trimtab export" in refused(str(tmp_path / "adapter"))
    assert "comma" in refused(str(tmp_path / "a,b"))
    assert "no such directory" in refused(str(tmp_path / "missing"))
    assert "against itself" in refused(models[0], models[0])


def test_a_missing_lm_eval_is_answered_with_the_install_command(models, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = trimtab("eval", "lm-eval", models[0], "--tasks", "arc")
    assert done.exit_code == 2
    assert "trimtab[lm-eval]" in done.output


@pytest.mark.slow
@pytest.mark.skipif("TRIMTAB_LM_EVAL" not in os.environ, reason="TRIMTAB_LM_EVAL names no interpreter with lm-eval")
def test_lm_eval_itself(base, tmp_path):
    rows = [{"question": f"What is {n} + 1?", "choices": [str(n + 1), str(n + 2)]} for n in range(12)]
    data, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    options = ["--tasks", "sums", "--include-path", str(tasks), "--python", os.environ["TRIMTAB_LM_EVAL"]]
    done = trimtab("eval", "lm-eval", str(base), *options, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "sums.json").read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["num_items"] == 12
    assert result["metrics"][0]["name"] == "acc"
