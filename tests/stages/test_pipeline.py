import json
import shutil

import pytest
import torch

from tests.stages.commands import FAST, SHORT, run_stage, summary, trimtab, write_run_file

STAGES = {
    "base": {
        "stage": "pretrain",
        "data": "world:arithmetic",
        "num_documents": 8,
        "vocab_size": 280,
        "architecture": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "max_positions": 256},
        "batch_size": 4,
    },
    "sft": {"stage": "sft", "model": "@base", "data": "$demonstrations", "batch_size": 8, "optimizer": FAST},
    "check": {
        "stage": "evaluate",
        "model": "@sft",
        "baseline": "@base",
        "prompts": "world:arithmetic?split=test&num=4",
        "world": "arithmetic",
        "sampling": SHORT,
    },
}
PIPELINE = {"seed": 3, "variables": {"demonstrations": "world:arithmetic?num=12"}, "stages": STAGES}


def changed(name, **keys):
    return PIPELINE | {"stages": STAGES | {name: STAGES[name] | keys}}


def run(tmp_path, values):
    return trimtab("run", write_run_file(tmp_path / "pipeline.toml", values), "--out", tmp_path / "out")


def test_stages_feed_each_other_and_a_second_run_skips_what_is_finished(tmp_path):
    assert run(tmp_path, PIPELINE).exit_code == 0
    out = tmp_path / "out"
    found = summary(out)
    assert list(found["stages"]) == sorted(STAGES)
    assert found["seed"] == 3
    assert found["policy"]["gold_sft"] == summary(out / "check")["baseline"]["gold"]
    assert (out / "report.html").exists()
    assert f'"{out}/base/model"' in (out / "sft" / "settings.toml").read_text()
    written = {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in ("base", "sft")}
    again = run(tmp_path, PIPELINE)
    assert again.exit_code == 0
    assert again.output.count("finished before") == 3
    assert {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in written} == written
    assert summary(out) == found
    note = json.loads((out / "check" / "summary.json").read_text())
    (out / "check" / "summary.json").write_text(json.dumps(note | {"peak_rss_gb_each": [900.0, 100.0]}))
    assert run(tmp_path, PIPELINE).exit_code == 0
    assert summary(out)["peak_rss_gb"] == 1000.0, "memory is that of the process that ran the stage"


def test_an_interrupted_pipeline_goes_on_with_the_stage_that_is_missing(tmp_path):
    assert run(tmp_path, PIPELINE | {"stages": {"base": STAGES["base"]}}).exit_code == 0
    result = run(tmp_path, PIPELINE)
    assert result.exit_code == 0
    assert result.output.count("finished before") == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed("sft", model="@bose"), ["stages.sft.model = '@bose'", "base"]),
        (changed("base", data="@sft"), ["stages.base.data = '@sft' names no earlier stage", "none"]),
        (changed("sft", data="$demos"), ["names no variable", "demonstrations"]),
        (changed("sft", batchsize=3), ["stages.sft.batchsize", "batch_size"]),
        (changed("sft", stage="sfft"), ["stages.sft.stage is 'sfft'", "sft, compare"]),
        (PIPELINE | {"sead": 1}, ["sead"]),
        ({"stages": {}}, ["without stages"]),
        ({"stages": 3}, ["without stages"]),
        ({"stages": {"base": 3}}, ["stages.base.stage is None"]),
        (changed("sft", stage="sft") | {"sft": {"batch_size": 3}}, ["unknown keys: sft", "did you mean stages.sft?"]),
        (STAGES["sft"], ["a run file of the stage 'sft'", "use trimtab sft"]),
        (changed("sft", stage=["sft"]), ["stages.sft.stage is ['sft']"]),
        (changed("sft", like=["base"]), ["stages.sft.like = ['base'] names no earlier stage"]),
        (changed("sft", engine=3), ["stages.sft.engine: should be a table, not 3"]),
        (PIPELINE | {"engine": 3}, ["stages.sft.engine: should be a table, not 3"]),
        (PIPELINE | {"variables": 3}, ["variables is 3"]),
        (
            PIPELINE | {"stages": STAGES | {"stf": {"batch_size": 3}}},
            ["stages.stf does not say which stage it is", "did you mean 'sft'?"],
        ),
    ],
)
def test_a_mistake_is_answered_before_any_stage_starts(tmp_path, values, said):
    result = run(tmp_path, values)
    assert result.exit_code == 2
    for words in said:
        assert words in result.output
    assert not (tmp_path / "out").exists()


def test_a_variable_that_no_stage_uses_is_named(tmp_path):
    variables = PIPELINE["variables"] | {"demonstration": "rows.jsonl"}
    result = run(tmp_path, changed("sft", batchsize=3) | {"variables": variables})
    assert "no stage uses variables.demonstration; did you mean 'demonstrations'?" in result.output
    assert "variables.demonstrations" not in result.output


def test_all_mistakes_of_all_stages_are_reported_at_once(tmp_path):
    stages = {
        "base": STAGES["base"] | {"vocabsize": 1, "batch_size": "many"},
        "sft": STAGES["sft"] | {"num_epoch": 1},
        "check": STAGES["check"] | {"sampling": {"temperature": -1.0}},
    }
    result = run(tmp_path, PIPELINE | {"stages": stages})
    assert result.exit_code == 2
    for key in ("base.vocabsize", "base.batch_size", "sft.num_epoch", "check.sampling"):
        assert f"stages.{key}" in result.output
    assert "num_epochs" in result.output


def test_the_engine_of_a_pipeline_is_that_of_every_stage_and_is_looked_at_first(tmp_path):
    assert run(tmp_path, PIPELINE | {"engine": {"device": "cpu"}}).exit_code == 0
    assert 'device = "cpu"' in (tmp_path / "out" / "sft" / "settings.toml").read_text()
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the refusal needs one without")
    run_file = write_run_file(tmp_path / "gpu.toml", PIPELINE)
    result = trimtab("run", run_file, "--out", tmp_path / "gpu", "--device", "cuda:1")
    assert result.exit_code == 2
    for name in STAGES:
        assert f"stages.{name}.engine.device: device = 'cuda:1', but torch sees no GPU" in result.output
    assert not (tmp_path / "gpu").exists()


def test_a_stage_with_other_settings_says_which_directory_to_remove(tmp_path):
    only_base = PIPELINE | {"stages": {"base": STAGES["base"]}}
    assert run(tmp_path, only_base).exit_code == 0
    other = PIPELINE | {"stages": {"base": STAGES["base"] | {"vocab_size": 290}}}
    result = run(tmp_path, other)
    assert result.exit_code == 2
    assert "vocab_size: 280 there, 290 now" in result.output
    assert f"remove {tmp_path / 'out' / 'base'}" in result.output.replace("\n", "")
    assert "--fresh" not in result.output


def test_a_finished_stage_is_refused_once_what_it_was_made_from_was_made_anew(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "1"}]} for i in "123"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = STAGES | {"more": STAGES["sft"] | {"data": str(tmp_path / "rows.jsonl")}}
    out = tmp_path / "out"
    assert run(tmp_path, PIPELINE | {"stages": stages}).exit_code == 0
    shutil.rmtree(out / "sft")
    assert run(tmp_path, PIPELINE | {"stages": stages}).exit_code == 0, "it is made again as it was"

    shutil.rmtree(out / "sft")
    other = stages | {"sft": STAGES["sft"] | {"batch_size": 4}}
    result = run(tmp_path, PIPELINE | {"stages": other})
    assert result.exit_code == 2
    said = result.output.replace("\n", "")
    assert f"check was finished before with another {out}/sft/model than there is now" in said
    assert f"remove {out}/check, so that" in said
    shutil.rmtree(out / "check")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    result = run(tmp_path, PIPELINE | {"stages": other})
    assert result.exit_code == 0
    assert f"more was finished before {tmp_path}/rows.jsonl was changed" in result.output.replace("\n", "")


def test_a_stage_that_is_to_become_longer_names_all_that_began_with_it(tmp_path):
    assert run(tmp_path, PIPELINE).exit_code == 0
    result = run(tmp_path, changed("base", num_epochs=2.0))
    assert result.exit_code == 2
    assert "base is to be made longer, but sft, check began with it" in result.output
    result = run(tmp_path, changed("base", num_epochs=0.5))
    assert "num_epochs: 1.0 there, 0.5 now" in result.output


def test_a_finished_run_that_cannot_become_longer_stays_finished(tmp_path, base):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "1"}]} for i in "1234"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out = run_stage("sft", tmp_path / "run", model=str(base), data=str(data), batch_size=1, held_out=0.0, max_steps=2)
    before = (out / "summary.json").read_bytes(), (out / "settings.toml").read_bytes()
    for content, said in ((json.dumps(rows[0]), "is not what this run began with"), (None, "there is no file")):
        data.write_text(content) if content else data.unlink()
        longer = trimtab("sft", tmp_path / "run.toml", "--out", out, "max_steps=3")
        assert longer.exit_code == 2
        assert said in longer.output
        assert ((out / "summary.json").read_bytes(), (out / "settings.toml").read_bytes()) == before
