"""The shipped pipeline in which a policy learns to use tools, in miniature."""

from __future__ import annotations

from tests.stages.commands import rows, trimtab
from trimtab import cli
from trimtab.core import config
from trimtab.stages.pipeline import resolve_stages

FILE = cli.examples_dir() / "tools" / "pipeline.toml"


def test_the_longest_way_to_an_answer_fits_into_an_episode(tmp_path):
    stages = resolve_stages(config.load_run_file(FILE), tmp_path, where="the pipeline")
    assert {name: stage for name, (stage, _) in stages.items()} == {"base": "pretrain", "sft": "sft", "tools": "online"}
    settings = stages["tools"][1]
    assert settings.episodes.max_turns >= 4  # look up, look up, calculate, answer
    assert settings.kl.coef == 0


def test_it_runs_from_nothing_to_a_policy_in_an_environment(tmp_path):
    small = [
        *("stages.base.num_documents=40", "stages.base.num_epochs=1", "stages.base.architecture.hidden_size=16"),
        *(
            "stages.base.architecture.mlp_size=16",
            "stages.base.vocab_size=320",
            "stages.sft.data=world:catalogue?num=16",
        ),
        *("stages.tools.num_steps=2", "stages.tools.prompts_per_step=2", "stages.tools.group_size=2"),
        *("stages.tools.sampling.max_new_tokens=24", "stages.tools.prompts=world:catalogue?num=4"),
    ]
    result = trimtab("run", FILE, *small, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = rows(tmp_path / "run" / "tools")
    assert len(found) == 2
    assert all(row["rollout/logprob_difference"] < 1e-4 for row in found)
