"""What a name of a model stands for, and what is said, at once, where it stands for none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.tiny import write_model_directory
from trimtab.core.errors import EngineError
from trimtab.core.hub import base_of, find_model, lasting_name, members_in


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "sft" / "model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "sft" / "settings.toml").write_text("")
    (tmp_path / "runs" / "new").mkdir()
    (tmp_path / "runs" / "new" / "settings.toml").write_text("")
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "model.safetensors").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("runs/sftt/model", r"(?s)'runs/sftt' does not exist.*did you mean runs/sft/model\?"),
        ("runs/stf", r"(?s)'runs/stf' does not exist.*did you mean runs/sft\?"),
        ("/nowhere/at/all", r"'/nowhere' does not exist"),
        ("./a/b", r"'a' does not exist"),
        ("gpt2", r"(?s)no model directory 'gpt2'.*a hub id as org/name"),
        ("runs/sft", r"(?s)the directory of a run, not of its model.*name the model in it: runs/sft/model"),
        ("runs/new", r"the run in 'runs/new' has not written a model"),
        ("runs", r"(?s)holds no model.*models in it: runs/sft/model"),
        ("runs/empty", r"(?s)holds no model.*name a directory with config\.json"),
        ("model.safetensors", r"is a file; a model is a directory"),
        (
            "org/name",
            r"(?s)no directory 'org/name', and as a hub id it cannot be fetched: HF_HUB_OFFLINE is set.*hf download",
        ),
    ],
)
def test_a_name_that_is_no_model(here, name, says):
    with pytest.raises(EngineError, match=says):
        find_model(name)


def test_a_directory_is_found_by_any_of_its_names(here):
    assert find_model("runs/sft/model") == "runs/sft/model"
    assert lasting_name("runs/sft/model") == str((here / "runs" / "sft" / "model").resolve())
    assert lasting_name("org/name") == "org/name"
    assert base_of("runs/sft/model") is None


def test_the_members_of_an_ensemble_are_those_of_its_file(tmp_path):
    assert members_in(tmp_path) == [str(tmp_path)]
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": [".", "members/1"]}))
    assert members_in(tmp_path) == [str(tmp_path), str(tmp_path / "members" / "1")]


@pytest.mark.parametrize("facts", [{}, {"members": []}, {"members": "members/1"}, {"members": [1]}, {"members": None}])
def test_an_ensemble_without_members_is_refused(tmp_path, facts):
    (tmp_path / "ensemble.json").write_text(json.dumps(facts))
    with pytest.raises(EngineError, match=r"ensemble.json names no members, but "):
        members_in(tmp_path)


def cache(directory, name, files):
    """The cache of the hub with one repository in it."""
    repository = directory / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file, text in files.items():
        (snapshot / file).write_text(text)
    return snapshot


ASK = "from trimtab.core.hub import base_of, find_model; print(find_model({0!r})); print(base_of({0!r}))"


READ = "from trimtab.data.sources import read_rows; read_rows({0!r})"


def asked(name, directory, code=ASK, **environment):
    """What a new process finds, in which no hub can be reached."""
    variables = os.environ | {
        "HF_HUB_CACHE": str(directory),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", code.format(name)]
    return subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=False)


def test_a_hub_that_cannot_be_reached_is_answered_in_seconds_and_the_cache_is_used(tmp_path):
    started = time.perf_counter()
    answer = asked("org/name", tmp_path)
    assert "the hub cannot be reached" in answer.stderr
    assert "copy the model here" in answer.stderr
    assert time.perf_counter() - started < 30  # importing is most of it, on a busy machine
    snapshot = cache(tmp_path, "org/name", {"config.json": "{}"})
    assert asked("org/name", tmp_path).stdout.split() == [str(snapshot), "None"]
    base = write_model_directory(tmp_path / "base")
    files = {"adapter_config.json": json.dumps({"base_model_name_or_path": str(base)}), "adapter_model.safetensors": ""}
    snapshot = cache(tmp_path, "org/adapter", files)
    assert asked("org/adapter", tmp_path, HF_HUB_OFFLINE="1").stdout.split() == [str(snapshot), str(base)]


def test_a_data_set_of_a_hub_that_cannot_be_reached_is_not_asked_for_again_and_again(tmp_path):
    answer = asked("org/data", tmp_path, code=READ)
    assert "the hub data set 'org/data' could not be read" in answer.stderr
    assert "Retrying" not in answer.stderr
