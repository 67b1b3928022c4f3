"""`trimtab average`: weights of reward models and policies, adapters by their products, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.stages.commands import FAST, run_stage, summary, trimtab
from tests.tiny import write_model_directory
from trimtab.core.types import PreferencePair
from trimtab.data.layouts import load
from trimtab.models.average import weights_of
from trimtab.models.load import load_causal, load_scalar, load_tokenizer
from trimtab.models.save import save_model
from trimtab.rewards.scorer import RewardModelScorer


def train(base, pairs, out, **changed):
    settings = {"held_out": 0.3, "batch_size": 10, "optimizer": FAST, "num_epochs": 10.0, "head_seed": 0} | changed
    return run_stage("reward", out, model=str(base), data=str(pairs), **settings) / "model"


@pytest.fixture(scope="module")
def members(tmp_path_factory, base, pairs):
    """Two reward models of one head and two orders of the data."""
    directory = tmp_path_factory.mktemp("members")
    return [train(base, pairs, directory / f"member_{seed}", seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base, pairs):
    """The same as adapters, of different ranks."""
    directory = tmp_path_factory.mktemp("adapters")
    return [
        train(
            base,
            pairs,
            directory / f"adapter_{seed}",
            seed=seed,
            adapter={"rank": rank},
            optimizer={"learning_rate": 0.01},
        )
        for seed, rank in ((1, 2), (2, 3))
    ]


def averaged(out, *arguments):
    done = trimtab("average", out, *arguments)
    assert done.exit_code == 0, done.output
    return json.loads((out / "average.json").read_text())


def refused(out, *arguments):
    done = trimtab("average", out, *arguments)
    assert done.exit_code == 2
    assert not out.exists()
    return done.output


def test_every_weight_is_the_mean_of_the_members_weights(members, pairs, tmp_path):
    record = averaged(tmp_path / "mean", *members, "--weight", 0.25, "--weight", 0.75, "--data", pairs)
    one, other, mean = (load_file(path / "model.safetensors") for path in (*members, tmp_path / "mean"))
    assert mean.keys() == one.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name, weight in mean.items():
        torch.testing.assert_close(weight, 0.25 * one[name] + 0.75 * other[name])
    assert record["weights"] == [0.25, 0.75]
    ends = [p["accuracy"] for p in record["points"] if p["part"] == 0]
    assert record["points"][-1]["chord"] == pytest.approx(0.25 * ends[0] + 0.75 * ends[1])


def test_the_average_of_equal_models_is_the_model(members, pairs, tmp_path):
    copy = shutil.copytree(members[0], tmp_path / "copy")
    averaged(tmp_path / "mean", members[0], copy, "--data", pairs)
    one, mean = (weights_of(load_scalar(path)) for path in (members[0], tmp_path / "mean"))
    assert all(torch.equal(one[name], mean[name]) for name in one)


def test_zero_moments_and_temperature_are_fitted_anew(members, pairs, tmp_path):
    record = averaged(tmp_path / "mean", *members, "--data", pairs)
    records = load(PreferencePair, pairs).records
    scorer = RewardModelScorer.from_directory(str(tmp_path / "mean"), token_budget=4096)
    chosen = scorer.score_texts([(p.prompt, p.chosen) for p in records])
    both = torch.cat([chosen, scorer.score_texts([(p.prompt, p.rejected) for p in records])]).double()
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean").config
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-5)
    assert config.reward_mean == pytest.approx(float(both.mean()), abs=1e-5)
    assert config.reward_std == pytest.approx(float(both.std(correction=0)), rel=1e-4)
    assert config.reward_temperature == record["card"]["temperature"]


def test_adapters_are_averaged_by_their_products(adapters, pairs, tmp_path):
    record = averaged(tmp_path / "mean", *adapters, "--data", pairs)
    assert record["rank"] == 5
    one, other, mean = (weights_of(load_scalar(path)) for path in (*adapters, tmp_path / "mean"))
    changed = 0.0
    for name in one:
        torch.testing.assert_close(mean[name], (one[name] + other[name]) / 2, rtol=1e-4, atol=1e-6)
        changed = max(changed, float((one[name] - other[name]).abs().max()))
    assert changed > 1e-3


def test_a_lower_rank_keeps_the_largest_part_of_the_change(adapters, pairs, tmp_path):
    record = averaged(tmp_path / "low", *adapters, "--data", pairs, "--rank", 2, "--tolerance", 1)
    base, low, one, other = (
        weights_of(load_scalar(path, head_seed=0))
        for path in (json.loads((adapters[0] / "adapter_config.json").read_text())["base_model_name_or_path"],
                     tmp_path / "low", *adapters)
    )  # fmt: skip
    lost = total = 0.0
    for name in low:
        if "proj" in name:
            change = (one[name] + other[name]) / 2 - base[name]
            values = torch.linalg.svdvals(change.double())
            kept = low[name] - base[name]
            assert float((kept - change).double().norm()) == pytest.approx(float(values[2:].norm()), rel=1e-3, abs=1e-5)
            lost, total = lost + float(values[2:].square().sum()), total + float(values.square().sum())
    assert record["kept_fraction"] == pytest.approx(1 - lost / total, rel=1e-4)
    assert 0.5 < record["kept_fraction"] < 1


def test_policies_are_interpolated_without_pairs(base, tmp_path):
    other = write_model_directory(tmp_path / "other", seed=5)
    averaged(tmp_path / "mean", base, other, "--weight", 0.9, "--weight", 0.1)
    one, two, mean = (weights_of(load_causal(path)) for path in (base, other, tmp_path / "mean"))
    for name in mean:
        torch.testing.assert_close(mean[name], 0.9 * one[name] + 0.1 * two[name])


@pytest.fixture(scope="module")
def turned(members, tmp_path_factory):
    """The first member with its head and its last norm negated: the same scores, and no head half way."""
    model = load_scalar(members[0])
    with torch.no_grad():
        model.score.weight.neg_()
        model.model.norm.weight.neg_()
    directory = tmp_path_factory.mktemp("turned") / "model"
    save_model(model, load_tokenizer(members[0]), directory)
    return directory


def test_an_average_that_sinks_below_the_chord_is_refused(members, turned, pairs, tmp_path):
    said = refused(tmp_path / "mean", members[0], turned, "--data", pairs)
    assert "the accuracy sinks between these models: on 20 pairs the average is right about 50.00%" in said
    assert summary(members[0].parent)["accuracy"] > 0.9
    done = trimtab("average", tmp_path / "mean", members[0], turned, "--data", pairs, "--force")
    assert "written because of --force" in done.output
    points = json.loads((tmp_path / "mean" / "average.json").read_text())["points"]
    assert points[-1]["accuracy"] == 0.5
    assert [p["accuracy"] for p in points if p["part"] == 0] == [points[-1]["chord"]] * 2


def test_members_whose_rewards_are_not_finite_are_refused(overflowing, pairs, tmp_path):
    copy = shutil.copytree(overflowing, tmp_path / "copy")
    assert "rewards are not finite" in refused(tmp_path / "mean", overflowing, copy, "--data", pairs)


def test_models_that_do_not_belong_together_are_refused(base, members, adapters, other, pairs, tmp_path):
    out, data = tmp_path / "mean", ("--data", pairs)
    one = members[0]
    assert "different score heads" in refused(
        out, one, train(base, pairs, tmp_path / "head", seed=3, head_seed=3, num_epochs=1.0), *data
    )
    wide = write_model_directory(tmp_path / "wide", hidden_size=64)
    assert "has the shapes (320, 32) and (320, 64)" in refused(out, base, wide).replace("\n", " ")
    assert "one is an adapter and the other a whole model" in refused(out, one, adapters[0], *data)
    assert "is a reward model and" in refused(out, one, base, *data)
    theirs = train(other, pairs, tmp_path / "theirs", adapter={"rank": 2}, num_epochs=1.0)
    assert "they are adapters of" in refused(out, adapters[0], theirs, *data)
    layers = train(base, pairs, tmp_path / "layers", adapter={"rank": 2, "modules": ["q_proj"]}, num_epochs=1.0)
    assert "only one of them changes" in refused(out, adapters[0], layers, *data)


def test_an_adapter_that_is_more_than_low_rank_is_refused(adapters, pairs, tmp_path):
    copy = shutil.copytree(adapters[0], tmp_path / "dora")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 1}}))
    said = refused(tmp_path / "mean", adapters[1], copy, "--data", pairs)
    assert "more than one low-rank change of each layer: LORA, alpha_pattern" in said
    began = {"init_lora_weights": "pissa"}  # the adapter then belongs to what peft leaves of the base, by the rank
    (copy / "adapter_config.json").write_text(json.dumps(config | began))
    said = refused(tmp_path / "mean", adapters[1], copy, "--data", pairs)
    assert "LORA, init_lora_weights = 'pissa', which changes the base" in said.replace("\n", " ")


def test_a_rank_above_the_size_of_a_layer_loses_nothing(tmp_path, base, pairs):
    """The tiny model's key and value layers have 32 outputs, and the two adapters 40 rows together."""
    paths = [
        train(base, pairs, tmp_path / f"member_{seed}", seed=seed, adapter={"rank": 20}, num_epochs=1.0)
        for seed in (1, 2)
    ]
    record = averaged(tmp_path / "mean", *paths, "--data", pairs, "--rank", 38, "--tolerance", 1)
    one, other, mean = (weights_of(load_scalar(path)) for path in (*paths, tmp_path / "mean"))
    for name in one:
        torch.testing.assert_close(mean[name], (one[name] + other[name]) / 2, rtol=1e-3, atol=1e-5)
    assert record["kept_fraction"] == pytest.approx(1)


def test_other_vocabularies_are_refused(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "vocabulary")
    tokens = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (copy / "tokenizer.json").write_text(json.dumps(tokens))
    assert "they have other vocabularies" in refused(tmp_path / "mean", base, copy)


def test_other_configurations_and_templates_are_refused(base, tmp_path):
    theta, template = (shutil.copytree(base, tmp_path / name) for name in ("theta", "template"))
    config = json.loads((theta / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (theta / "config.json").write_text(json.dumps(config))
    assert "have rms_norm_eps = 1e-06 and 0.1" in refused(tmp_path / "mean", base, theta)
    file = next(template.glob("chat_template*"), None) or template / "tokenizer_config.json"
    file.write_text(file.read_text().replace("<|assistant|>", "<|user|>"))
    assert "other chat templates" in refused(tmp_path / "mean", base, template)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "the average of reward models has another zero"),
        (("--data", "PAIRS", "--weight", 1.0), "the weights 1 of 2 models"),
        (("--data", "PAIRS", "--weight", 0.5, "--weight", 0.6), "the weights 0.5, 0.6 of 2 models"),
        (("--data", "PAIRS", "--weight", "nan", "--weight", 0.5), "the weights nan, 0.5 of 2 models"),
        (("--data", "PAIRS", "--weight", 0.5, "--weight", "nan"), "the weights 0.5, nan of 2 models"),
        (("--data", "PAIRS", "--weight", "inf", "--weight", 0.5), "the weights inf, 0.5 of 2 models"),
        (("--data", "PAIRS", "--tolerance", "nan"), "a tolerance of nan"),
        (("--data", "PAIRS", "--tolerance", -0.1), "a tolerance of -0.1"),
        (("--data", "PAIRS", "--rank", 2), "these are whole models, which have no rank"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(members, pairs, tmp_path, options, said):
    assert said in refused(tmp_path / "mean", *members, *(pairs if o == "PAIRS" else o for o in options))


def relabelled(pairs, path, labels):
    lines = pairs.read_text().splitlines()
    rows = [json.loads(line) | {"label": label} for line, label in zip(lines, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_of_which_no_side_is_right_are_refused(members, pairs, tmp_path):
    even = relabelled(pairs, tmp_path / "even.jsonl", [0.5] * 20)
    said = refused(tmp_path / "mean", *members, "--data", even).replace("\n", " ")
    assert "all 20 pairs have the label 0.5: no side is right" in said


def test_the_record_is_json_and_counts_pairs_that_have_a_right_side(members, pairs, tmp_path):
    few = relabelled(pairs, tmp_path / "few.jsonl", [0.5] * 18 + [1.0] * 2)
    done = trimtab("average", tmp_path / "mean", *members, "--data", few, "--tolerance", 1)
    assert "on 2 pairs the average is right about" in done.output
    text = (tmp_path / "mean" / "average.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["card"]["num_even"] == 18
    assert None in (share["accuracy"] for share in record["card"]["slices"].values())  # no pair is of equal length


def test_a_model_that_is_given_twice_is_refused(base, members, pairs, tmp_path):
    said = f"{members[0]} is given twice"
    assert said in refused(tmp_path / "mean", members[1], members[0], members[0], "--data", pairs)
    link = tmp_path / "link"
    link.symlink_to(base)
    assert "is given twice" in refused(tmp_path / "mean", base, link)


def test_pairs_that_a_member_was_trained_on_and_rows_left_out_are_named(members, pairs, tmp_path):
    done = trimtab("average", tmp_path / "mean", *members, "--data", pairs)
    assert f"The model was trained on {pairs}" in done.output
    assert f"The model was trained on {pairs}" in trimtab("card", tmp_path / "mean", pairs).output  # by its members
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text() + json.dumps({"prompt": "Why?", "chosen": "", "rejected": "No."}) + "\n")
    assert "--on-bad-row drop" in refused(tmp_path / "none", *members, "--data", other)
    done = trimtab("average", tmp_path / "another", *members, "--data", other, "--on-bad-row", "drop")
    assert "1 rows are left out" in done.output
    assert "was trained on" not in done.output


def test_one_model_data_for_policies_and_a_full_directory_are_refused(base, other, members, adapters, pairs, tmp_path):
    assert "an average needs two or more" in refused(tmp_path / "mean", members[0], "--data", pairs)
    assert "these models are policies" in refused(tmp_path / "mean", base, other, "--data", pairs)
    assert "has rank 5" in refused(tmp_path / "mean", *adapters, "--data", pairs, "--rank", 6)
    done = trimtab("average", members[0], *members, "--data", pairs)
    assert "is there and not empty" in done.output
