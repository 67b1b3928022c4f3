"""What later stages need is looked at before the first one is trained."""

import json
import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.stages.commands import PROMPTS, SHORT, run_stage, trimtab, write_run_file
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
        (
            {"stage": "online", "model": "@base", "prompts": "prompts.jsonl", "rewards": [{"name": "repetition"}]},
            "critic.init = 'reward', but no reward is a reward model",
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


def pointer(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")


def cut(path):
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def without_tokenizer(path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink()


def two_labels(path):
    described = json.loads((path / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (path / "config.json").write_text(json.dumps(described | labels))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pointer, "a pointer of Git LFS"),
        (cut, "model.safetensors is damaged or cut short"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "safetensors are needed"),
        (without_tokenizer, "no tokenizer can be loaded"),
    ],
)
def test_a_damaged_model_of_a_later_stage_is_answered_before_the_first(here, base, change, said):
    change(Path(shutil.copytree(base, here / "damaged")))
    result = run(here, later=REWARD | {"model": "damaged"})
    assert result.exit_code == 2
    assert said in result.output
    assert not (here / "out").exists()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model whose tokenizer was trained on other text than that of `base`."""
    directory = tmp_path_factory.mktemp("foreign") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "TEXTS", ("zebra quick brown fox " * 5, "jumped over dogs lazily " * 4))
        return tiny.write_model_directory(directory)


def test_a_model_that_fits_no_earlier_one_is_answered_before_the_first(here, base, foreign, reward_run, pairs):
    two_labels(Path(shutil.copytree(reward_run / "model", here / "labels")))
    of_base = {"name": "model", "path": str(reward_run / "model")}
    of_foreign = {"name": "model", "path": str(run_reward(here / "foreign", foreign, pairs))}
    adapter = run_reward(here / "adapter", base, pairs, adapter={"rank": 2})
    lost = Path(shutil.copytree(adapter, here / "lost"))
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    (lost / "base.json").unlink()
    sft = STAGES["sft"] | {"model": str(base)}
    check = {"stage": "evaluate", "model": "@sft", "prompts": PROMPTS, "sampling": SHORT}
    judged = check | {"world": "arithmetic"}
    online = {"stage": "online", "model": "@sft", "prompts": PROMPTS, "rewards": [of_base], "sampling": SHORT}
    online |= {"prompts_per_step": 4}
    preference = {"stage": "preference", "model": "@sft", "data": str(pairs)}
    for later, said in [
        (check | {"reward_model": "labels"}, "a classifier with 2 labels"),
        (check | {"reward_model": "lost"}, "the base of the adapter is not found"),
        (judged | {"baseline": str(adapter)}, "is a reward model, and baseline is to be a policy"),
        (judged | {"baseline": str(foreign)}, "another vocabulary"),
        (preference | {"reference": str(foreign)}, "another vocabulary"),
        (online | {"reference": str(foreign)}, "another vocabulary"),
        (online | {"rewards": [of_foreign]}, "set critic.init = 'policy'"),
        (online | {"prompts": "prompts.jsonl"}, "prompts_per_step = 4 of 1 prompts"),
        (check | {"prompts": "prompts.jsonl", "rewards": ["exact_answer"]}, "no prompt has the fact 'answer'"),
        (check | {"prompts": "prompts.jsonl", "world": "helpdesk"}, "no fact named 'topic'"),
        (check | {"prompts": "prompts.jsonl", "rewards": [{"name": "gold", "world": "helpdesk"}]}, "no fact named"),
        (sft | {"adapter": {"modules": ["qproj"]}}, "did you mean 'q_proj'?"),
    ]:
        result = run(here, sft=sft, later=later)
        assert result.exit_code == 2, later
        assert said in result.output
        assert not (here / "out").exists()


def run_reward(out, model, pairs, **settings):
    return run_stage("reward", out, model=str(model), data=str(pairs), max_steps=1, **settings) / "model"


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
