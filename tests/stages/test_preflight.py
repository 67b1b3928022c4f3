"""What later stages need is looked at before the first one is trained."""

import json
import shutil

import pytest

from tests.stages.commands import trimtab, write_run_file
from tests.stages.test_pipeline import PIPELINE, STAGES

REWARD = {"stage": "reward", "model": "@base", "data": "pairs.jsonl"}


def run(tmp_path, *overrides, **stages):
    values = PIPELINE | {"stages": {"base": STAGES["base"]} | stages}
    return trimtab("run", write_run_file(tmp_path / "p.toml", values), *overrides, "--out", tmp_path / "out")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (STAGES["sft"] | {"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        (STAGES["sft"] | {"data": "prompts.jsonl"}, "Demonstration"),
        (STAGES["sft"] | {"data": "pairs.jsonl"}, "Demonstration"),
        (STAGES["sft"] | {"model": "runs/typo/model"}, "there is no directory 'runs/typo/model'"),
        (STAGES["sft"] | {"model": "empty"}, "it has no config.json"),
        (REWARD | {"demonstrations": "pairs.jsonl"}, "Demonstration"),
        (REWARD | {"held_out_data": "prompts.jsonl"}, "PreferencePair"),
        (REWARD | {"data": "@base/train.jsonl"}, "the stage pretrain writes no 'train.jsonl'"),
        (STAGES["check"] | {"model": "@base", "world": "arithmetics"}, "arithmetics"),
        (
            STAGES["check"] | {"model": "@base", "rewards": [{"name": "callable", "function": "nothing:here"}]},
            "'nothing' cannot be imported",
        ),
    ],
)
def test_a_later_stage_that_cannot_run_is_answered_before_the_first(here, stage, said):
    (here / "empty").mkdir()
    result = run(here, later=stage)
    assert result.exit_code == 2
    assert said in result.output
    assert "later" in result.output
    assert not (here / "out").exists()


def test_all_that_is_missing_is_said_at_once(here):
    result = run(here, sft=STAGES["sft"] | {"data": "no.jsonl"}, reward=REWARD | {"data": "nor.jsonl"})
    assert "2 mistakes" in result.output
    assert "stages.sft.data: there is no file 'no.jsonl'" in result.output
    assert "stages.reward.data: there is no file 'nor.jsonl'" in result.output


@pytest.mark.parametrize(
    ("model", "stage", "said"),
    [
        ("@compared", STAGES["sft"], "the stage compare writes no model"),
        ("@reward", STAGES["sft"], "is a reward model, and model is to be a policy"),
        ("@base", {"reward_model": "@base"}, "is a policy, and reward_model is to be a reward model"),
    ],
)
def test_a_model_of_another_kind_is_answered_before_the_first_stage(here, model, stage, said):
    compare = {"stage": "compare", "model": "@base", "world": "arithmetic"}
    last = (STAGES["check"] | {"model": "@base"} | stage) if "stage" not in stage else stage | {"model": model}
    result = run(here, compared=compare, reward=REWARD, later=last)
    assert result.exit_code == 2
    assert said in result.output


def test_a_reward_model_is_no_policy_wherever_it_lies(here, base, reward_run):
    file = write_run_file(here / "sft.toml", {"model": str(reward_run / "model"), "data": "world:arithmetic?num=4"})
    result = trimtab("sft", file)
    assert result.exit_code == 2
    assert "is a reward model, and model is to be a policy" in result.output
    shutil.copytree(base, here / "runs" / "base" / "model")
    near = trimtab("sft", file, "model=runs/base")
    assert "did you mean 'runs/base/model'?" in near.output
    typo = trimtab("sft", file, "model=runs/bose/model")
    assert "'runs' holds base" in typo.output


def test_a_finished_pipeline_needs_its_data_no_more(here):
    (here / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    sft = STAGES["sft"] | {"data": "d.jsonl"}
    assert run(here, sft=sft).exit_code == 0
    (here / "d.jsonl").unlink()
    again = run(here, sft=sft)
    assert again.exit_code == 0, again.output
    assert again.output.count("finished before") == 2


def test_a_directory_that_holds_another_record_is_refused(here):
    (here / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    assert run(here).exit_code == 0
    before = {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()}
    other = PIPELINE | {"stages": {"other": STAGES["base"]}}
    pipeline = trimtab("run", write_run_file(here / "q.toml", other), "--out", here / "out")
    assert pipeline.exit_code == 2
    assert "holds another pipeline, whose stages base are not in this one" in pipeline.output
    single = trimtab("run", here / "p.toml", "--out", here / "out" / "base")
    assert single.exit_code == 2
    assert "holds the run of a single stage" in single.output
    assert {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()} == before


def test_a_run_file_in_the_directory_of_its_run_is_kept(here):
    (here / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    single, several = here / "one" / "settings.toml", here / "many" / "pipeline.toml"
    write_run_file(single, {key: value for key, value in STAGES["sft"].items() if key != "stage"} | {"data": "d.jsonl"})
    write_run_file(several, PIPELINE | {"stages": {"base": STAGES["base"]}})
    for file, command in ((single, "sft"), (several, "run")):
        (file.parent / "summary.json").write_text("mine")
        before = file.read_bytes()
        result = trimtab(command, file, "--out", file.parent)
        assert result.exit_code == 2
        assert file.name in result.output
        assert "--fresh" not in result.output
        assert file.read_bytes() == before
        assert sorted(path.name for path in file.parent.iterdir()) == sorted([file.name, "summary.json"])


def test_a_pipeline_that_was_killed_at_its_start_goes_on(here):
    written = here / "before" / "pipeline.toml"
    assert run(here).exit_code == 0
    written.parent.mkdir()
    shutil.copy(here / "out" / "pipeline.toml", written)
    result = trimtab("run", here / "p.toml", "--out", written.parent)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "summary.json", ""])
def test_a_stage_is_named_like_a_directory(here, name):
    values = PIPELINE | {"stages": {name: STAGES["base"]}}
    result = trimtab("run", write_run_file(here / "p.toml", values), "--out", here / "out")
    assert result.exit_code == 2
    assert f"a stage called {name!r}" in result.output


def test_a_stage_that_others_began_with_does_not_grow_below_them(here):
    (here / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    sft = STAGES["sft"] | {"data": "d.jsonl"}
    assert run(here, sft=sft).exit_code == 0
    longer = STAGES["base"] | {"num_epochs": 2.0}
    result = run(here, base=longer, sft=sft)
    assert result.exit_code == 2
    assert "base is to be made longer, but sft began with it as it is" in result.output
    shutil.rmtree(here / "out" / "sft")
    grown = run(here, base=longer, sft=sft)
    assert grown.exit_code == 0, grown.output
    assert json.loads((here / "out" / "base" / "summary.json").read_text())["num_steps"] == 4


def test_a_pipeline_that_was_moved_or_is_named_absolutely_goes_on(here):
    (here / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    values = PIPELINE | {"stages": {"base": STAGES["base"], "sft": STAGES["sft"] | {"data": "d.jsonl"}}}
    file = write_run_file(here / "p.toml", values)
    assert trimtab("run", file, "--out", "out").exit_code == 0
    for place in (here / "out", here / "moved"):
        if place.name == "moved":
            shutil.move(here / "out", place)
        (place / "sft" / "summary.json").unlink()  # as if it had been stopped
        result = trimtab("run", file, "--out", place)
        assert result.exit_code == 0, result.output
        assert result.output.count("finished before") == 1
