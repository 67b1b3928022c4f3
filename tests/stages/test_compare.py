import pytest

from tests.stages.commands import SHORT, rows, run_stage, summary, trimtab, write_run_file
from trimtab import worlds
from trimtab.core.types import PreferencePair
from trimtab.data.layouts import load
from trimtab.worlds.annotators import Annotators


def test_pairs_are_written_where_the_reward_stage_reads_them(tmp_path, base):
    out = run_stage(
        "compare",
        tmp_path / "run",
        model=str(base),
        world="arithmetic",
        num_prompts=12,
        num_held_out_prompts=4,
        replies_per_prompt=2,
        sampling=SHORT,
        agreement=0.55,
    )
    found = summary(out)
    for name, num in (("train", 12), ("held_out", 4)):
        pairs = load(PreferencePair, out / f"{name}.jsonl").records
        assert len(pairs) == found[f"num_{name}_pairs"]
        assert len(pairs) + found[f"num_{name}_identical_pairs"] == num
        split = "train" if name == "train" else "test"
        for pair in pairs:
            assert pair.chosen != pair.rejected
            assert 0 < pair.prompt.facts["probability_chosen"] < 1
            assert worlds.split_of(pair.prompt.id) == split
    assert 0.5 <= found["train_agreement"] <= found["train_bayes_accuracy"] <= 1
    assert rows(out, "train.jsonl")[0]["prompt"]["facts"]["answer"] is not None


def test_the_same_seed_gives_the_same_votes(tmp_path, base):
    settings = {"model": str(base), "world": "arithmetic", "num_prompts": 6, "num_held_out_prompts": 3}
    one, again, other = (
        run_stage("compare", tmp_path / name, **settings, sampling=SHORT, agreement=0.55, seed=seed)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert (one / "train.jsonl").read_bytes() == (again / "train.jsonl").read_bytes()
    assert (one / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_annotators_are_asked_the_question_of_the_run_file(tmp_path, base):
    settings = {"model": str(base), "num_prompts": 6, "num_held_out_prompts": 3, "sampling": SHORT, "agreement": 0.55}
    asked = settings | {"world": "helpdesk_harm", "question": "harm"}
    out = run_stage("compare", tmp_path / "run", **asked)
    world = worlds.load("helpdesk_harm")
    people = Annotators(world, world.questions["harm"], summary(out)["annotator_scale"], question="harm")
    for pair in load(PreferencePair, out / "train.jsonl").records:
        expected = people.preference_probability(pair.prompt, pair.chosen, pair.rejected)
        assert pair.prompt.facts["probability_chosen"] == pytest.approx(expected)

    for world_name, fix in (("helpdesk_harm", "use helpfulness or harm"), ("helpdesk", "this world has none")):
        run_file = write_run_file(tmp_path / "no.toml", settings | {"world": world_name, "question": "harmm"})
        result = trimtab("compare", run_file, "--out", tmp_path / "no")
        assert result.exit_code == 2
        assert f"no question of the world {world_name} is called 'harmm'" in result.output
        assert fix in result.output
