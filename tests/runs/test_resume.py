"""What may differ when a run goes on: how it is computed, where it lies, and that it becomes longer."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimtab.core import registry
from trimtab.core.errors import ConfigError, DataError
from trimtab.core.settings_help import settings_help
from trimtab.runs import models
from trimtab.runs.models import model_digest
from trimtab.runs.resume import HOW, is_how
from trimtab.runs.run import Run

SETTINGS: dict[str, Any] = {
    "model": "m",
    "token_budget": 4096,
    "max_steps": 5,
    "num_epochs": 1.0,
    "rewards": [{"name": "unit_tests", "num_parallel": 1, "weight": 1.0}],
    "sampling": {"batch_size": 256, "top_k": 0},
}


def opened(directory: Path, **changes: Any) -> Run:
    facts = registry.descriptor("stage", "sft")
    return Run.open(directory, stage="sft", settings={**SETTINGS, **changes}, facts=facts)


def write_one(path: Path) -> None:
    (path / "weights.txt").write_text("x")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    with opened(tmp_path / "run") as run:
        run.log(3, {"loss/train": 1.0})
        run.save_checkpoint(3, write_one)
    return tmp_path / "run"


def environment(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "environment.json").read_text())


def test_how_a_run_is_computed_may_change_and_is_recorded(begun: Path, capsys: pytest.CaptureFixture[str]):
    changed = {
        "token_budget": 1024,
        "trackers": [{"name": "tensorboard"}],
        "rewards": [{"name": "unit_tests", "num_parallel": 8, "weight": 1.0}],
        "sampling": {"batch_size": 16, "top_k": 0},
        "engine": {"name": "local"},
    }
    opened(begun, **changed).close()
    assert "goes on after step 3" in capsys.readouterr().err
    (entry,) = environment(begun)["changed_settings"]
    assert entry["after_step"] == 3
    assert entry["settings"] == {
        "token_budget": {"before": 4096, "now": 1024},
        "trackers.0.name": {"before": None, "now": "tensorboard"},
        "rewards.0.num_parallel": {"before": 1, "now": 8},
        "sampling.batch_size": {"before": 256, "now": 16},
        "engine.name": {"before": None, "now": "local"},
    }
    assert tomllib.loads((begun / "settings.toml").read_text())["token_budget"] == 1024
    opened(begun, **changed).close()
    assert len(environment(begun)["changed_settings"]) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"sampling": {"batch_size": 256, "top_k": 5}},
        {"rewards": [{"name": "unit_tests", "num_parallel": 1, "weight": 2.0}]},
        {"model": "n"},
    ],
)
def test_what_a_run_computes_may_not_change(begun: Path, changed: dict[str, Any]):
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        opened(begun, **changed)
    assert "changed_settings" not in environment(begun)


def test_every_setting_that_is_memory_and_speed_only_may_change():
    for module in registry.modules("stage").values():
        for line, said in settings_help(module):
            key = line.replace(" ", ":").partition(":")[0]
            if "memory and speed only" in said.lower() or "speed and memory only" in said.lower():
                assert is_how(key), key


def test_every_setting_that_may_change_is_one():
    known = [line for module in registry.modules("stage").values() for line, _ in settings_help(module)]
    for key in HOW - {"engine"}:  # of engines to come
        assert any(f".{line}".split(" ")[0].strip(":,").endswith(f".{key}") for line in known), key
    for stage, module in registry.modules("stage").items():
        own = [line for line, _ in settings_help(module)]
        for key in registry.descriptor("stage", stage).grows:
            assert any(line.startswith(f"{key}:") for line in own), (stage, key)


@pytest.mark.parametrize("length", [{"max_steps": 9}, {"max_steps": None}, {"num_epochs": 2.0}])
def test_a_finished_run_may_become_longer(begun: Path, length: dict[str, Any]):
    opened(begun).finish({})
    with opened(begun, **length) as run:
        assert not run.finished
        assert run.load_checkpoint() == (3, begun / "checkpoints" / "step-00000003")
    assert environment(begun)["changed_settings"][0]["settings"].keys() == length.keys()


def test_a_run_may_become_shorter_only_if_it_has_not_come_so_far(begun: Path):
    opened(begun, max_steps=4).close()
    with pytest.raises(ConfigError, match=r"max_steps: 4 there, 2 now") as caught:
        opened(begun, max_steps=2)
    assert "may grow" in caught.value.fix
    opened(begun, max_steps=4).finish({})
    with pytest.raises(ConfigError, match=r"max_steps: 4 there, 3 now"):
        opened(begun, max_steps=3)


def test_a_finished_run_stays_finished_if_only_how_it_is_computed_differs(begun: Path):
    opened(begun).finish({"a": 1})
    with opened(begun, token_budget=7) as run:
        assert run.finished
    assert tomllib.loads((begun / "settings.toml").read_text())["token_budget"] == 4096


def test_a_run_named_by_its_absolute_path_or_moved_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    old, new = Path("runs/p"), tmp_path / "elsewhere" / "q"
    for name in ("base/model", "models/own"):
        (old / name).mkdir(parents=True)
    (old / "data.jsonl").write_text("{}\n")

    def begin(place: Path, reward: str) -> Run:
        paths = {"model": str(place / "base" / "model"), "rewards": [{"name": "model", "path": reward}]}
        run = opened(place / "sft", **paths)
        run.add_data(place / "data.jsonl", "00", 1)
        run.log(1, {"loss/train": 1.0})
        return run

    begin(old, "runs/p/models/own").close()
    begin(old.absolute(), str(tmp_path / "runs/p/models/own")).close()
    new.parent.mkdir()
    shutil.move(old, new)
    begin(new, str(new / "models" / "own")).close()
    assert tomllib.loads((new / "sft" / "settings.toml").read_text())["model"] == str(new / "base" / "model")
    assert "changed_settings" not in environment(new / "sft")
    with pytest.raises(ConfigError, match=r"model: .*base/model' there"):
        opened(new / "sft", model=str(new / "other" / "model"))
    monkeypatch.chdir(new)
    with begin(Path("."), "models/own") as run, pytest.raises(DataError, match="not the data this run began with"):
        run.add_data("data.jsonl", "11", 2)


def test_a_finished_run_that_was_moved_can_be_opened_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old" / "base" / "model").mkdir(parents=True)
    with opened(tmp_path / "old" / "sft", model="old/base/model") as run:
        run.finish({})
    record = environment(tmp_path / "old" / "sft")
    shutil.copytree("old", "here/new")
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        with opened(Path("new/sft"), model="new/base/model") as run:
            assert run.finished
    assert environment(Path("new/sft")) == record  # the place is that of the settings, which stay as they were
    with opened(Path("new/sft"), model="new/base/model", max_steps=6) as run:
        assert not run.finished


def model(directory: Path, weight: float) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    save_file({"weight": torch.full([4], weight)}, directory / "model.safetensors")
    return directory


def adapter(directory: Path, base: Path) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    save_file({"lora": torch.ones(4)}, directory / "adapter_model.safetensors")
    return directory


def opened_with(directory: Path, *models: Path, **changes: Any) -> Run:
    facts = registry.descriptor("stage", "sft")
    names = {"model": str(models[0]), "rewards": [{"name": "model", "path": str(path)} for path in models[1:]]}
    settings = {**SETTINGS, **names, **changes}
    return Run.open(directory, stage="sft", settings=settings, facts=facts, models=[*map(str, models)])


def test_another_model_of_the_same_name_is_refused(tmp_path: Path):
    base, judge = model(tmp_path / "base", 1.0), model(tmp_path / "judge", 2.0)
    tuned = adapter(tmp_path / "tuned", base)
    with opened_with(tmp_path / "run", tuned, judge) as run:
        run.save_checkpoint(3, write_one)
        run.finish({})
    before = (tmp_path / "run" / "models.json").read_text()
    for changed, name in ((base, tuned), (judge, judge)):
        kept = changed.rename(tmp_path / "kept")
        model(changed, 3.0)
        with pytest.raises(DataError) as caught:
            opened_with(tmp_path / "run", tuned, judge, max_steps=6)
        assert caught.value.problem == f"{name} is not the model this run began with"
        assert (tmp_path / "run" / "summary.json").exists()
        opened_with(tmp_path / "run", tuned, judge).close()  # a finished run reads no model
        shutil.rmtree(changed)
        kept.rename(changed)
    opened_with(tmp_path / "run", tuned, judge, max_steps=6).close()
    assert (tmp_path / "run" / "models.json").read_text() == before


def test_a_model_may_be_mended_until_there_is_a_checkpoint(tmp_path: Path):
    opened_with(tmp_path / "run", model(tmp_path / "base", 1.0)).close()
    shutil.rmtree(tmp_path / "base")
    opened_with(tmp_path / "run", model(tmp_path / "base", 2.0)).close()
    recorded = json.loads((tmp_path / "run" / "models.json").read_text())
    assert recorded == {str(tmp_path / "base"): {"sha256": model_digest(tmp_path / "base")}}


def test_a_large_file_of_weights_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_WHOLE_BYTES", 1024)
    (tmp_path / "config.json").write_text("{}")
    values = torch.zeros(2**21)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    before = model_digest(tmp_path)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    assert model_digest(tmp_path) == before
    values[2**20 : 2**20 + 2**15] = 1.0  # a 64th of the weights
    save_file({"weight": values}, tmp_path / "model.safetensors")
    assert model_digest(tmp_path) != before


def test_the_same_words_from_elsewhere_may_not_mean_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        (place / "m").mkdir(parents=True)  # the model of SETTINGS
    monkeypatch.chdir(here)
    opened(here / "run").close()
    shutil.copytree(here, tmp_path / "copied")
    (here / "run" / "metrics.jsonl").write_text("")
    monkeypatch.chdir(there)
    with pytest.raises(ConfigError, match=rf"(?s)model: '{here / 'm'}' there, '{there / 'm'}' now"):
        opened(here / "run")
    (there / "m").rmdir()
    (there / "m").symlink_to(here / "m")
    opened(here / "run").close()
    monkeypatch.chdir(tmp_path / "copied")  # with the model it began with
    (tmp_path / "copied" / "run" / "metrics.jsonl").write_text("")
    opened(tmp_path / "copied" / "run").close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.toml", b"a = = 1"),
        ("settings.toml", b"\xff\xfe"),
        ("environment.json", b'{"paths": []}'),
        ("environment.json", b'{"resumed_with": {}}'),
        *(
            (name, text)
            for name in ("environment.json", "data.json", "models.json")
            for text in (b"", b'{"a": ', b"[1]", b"\xff\xfe")
        ),
    ],
)
def test_a_damaged_record_is_named_with_the_way_out(begun: Path, name: str, content: bytes):
    (begun / name).write_bytes(content)
    base = model(begun.parent / "m", 1.0)
    same = {"model": "m", "rewards": SETTINGS["rewards"]}
    with pytest.raises((ConfigError, DataError)) as caught, opened_with(begun, base, **same) as run:
        run.add_data("a.jsonl", "00", 1)
    assert f"{name} is damaged" in caught.value.problem
    assert str(begun / name) in caught.value.where
    with Run.open(begun, stage="sft", settings=SETTINGS, resume=False) as run:
        assert run.load_checkpoint() is None


def test_without_its_environment_a_run_goes_on(begun: Path):
    (begun / "environment.json").unlink()
    opened(begun).close()
    assert environment(begun)["place"]["directory"] == str(begun)


def test_the_way_of_computing_is_recorded_and_another_one_is_said(begun: Path, capsys: pytest.CaptureFixture[str]):
    with opened(begun) as run:
        run.note_path("sampler", "fused, compiled")
        run.note_path("sampler", "fused, compiled")
    assert environment(begun)["paths"] == {"sampler": "fused, compiled"}
    assert capsys.readouterr().err == ""
    for _ in range(2):
        with opened(begun) as run:
            run.note_path("sampler", "fused")
    said = capsys.readouterr().err
    assert said.count("began with the sampler 'fused, compiled' and goes on with 'fused'") == 1
    assert environment(begun)["resumed_with"] == [{"paths.sampler": "fused"}]


def test_what_is_kept_is_said(tmp_path: Path):
    with opened(tmp_path / "run") as run:
        assert "nothing of" in run.kept()
        run.save_checkpoint(7, write_one)
        assert "goes on after step 7" in run.kept()
        run.finish({})
        assert "is finished" in run.kept()
