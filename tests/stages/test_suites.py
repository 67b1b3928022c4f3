"""A suite is asked of a model: log-probabilities are transformers' own, conversations go on, files are whole."""

from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evals.suites.suite_rows import place, write_folder
from tests.stages.commands import trimtab
from trimtab.core import registry
from trimtab.engines.local.sampler import Sampling
from trimtab.evals.suites.suite import Question, SuiteItem
from trimtab.stages.suites import SuiteSettings, ask

SCHEMA = json.loads((files("trimtab.evals.suites") / "suite.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("suites"))


def item(**question):
    return SuiteItem(id="1", questions=(Question(**question),))


def asked(model, items, *, max_new_tokens=8):
    return ask(SuiteSettings(model=str(model), sampling=Sampling(max_new_tokens=max_new_tokens)), items)


def logprob(model, turns, reply):
    """The log-probability of a reply after a conversation, by transformers alone."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = network(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


def test_options_have_the_log_probabilities_of_transformers_over_two_turns(base):
    first, second = "What is 12 + 30?", "Are you sure?"
    options = ("42", "We can not refund it.", "a lamp")
    ((answer,),) = asked(base, [item(turns=(first, second), options=options)])
    turns = [{"role": "user", "content": first}]
    wanted = [logprob(base, turns, option) for option in options]
    assert answer.logprobs[0] == pytest.approx(wanted, abs=1e-3)
    likeliest = options[wanted.index(max(wanted))]
    turns += [{"role": "assistant", "content": likeliest}, {"role": "user", "content": second}]
    assert answer.logprobs[1] == pytest.approx([logprob(base, turns, option) for option in options], abs=1e-3)
    assert len(answer.num_tokens) == 3


def test_replies_go_into_the_next_turn_and_samples_are_several(base):
    two = item(turns=("Hello", "Again"))
    sampled = item(turns=("Goodbye",), num_samples=3)
    (one,), (many,) = asked(base, [two, sampled])
    assert len(one.replies) == 2
    assert len(set(many.replies)) == 3
    other = asked(base, [item(turns=("Goodbye", "Again"))])[0][0]
    assert other.replies[1] != one.replies[1]  # "Again" after another first turn
    assert asked(base, [two])[0][0] == one  # whatever else is asked


def test_a_cut_reply_is_counted(base):
    answers = [answer for (answer,) in asked(base, [item(turns=(word,)) for word in "abcdefgh"], max_new_tokens=1)]
    assert [answer.num_truncated for answer in answers] == [int(answer.replies != ("",)) for answer in answers]
    assert any(answer.num_truncated for answer in answers)


@pytest.mark.parametrize("name", registry.modules("suite"))
def test_every_suite_runs_from_the_command_line(tmp_path, folder, base, other, name):
    out, replies = tmp_path / "found.json", tmp_path / "replies.jsonl"
    few = ["--limit", 6, "--max-new-tokens", 4, "--out", out, "--replies", replies]
    result = trimtab("eval", name, base, other, "--data", place(folder, name), *few)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert (found["suite"], found["num_items"], found["num_available"]) == (name, 6, 10)
    assert found["model_sha256"] != found["baseline_sha256"]
    assert {json.loads(line)["role"] for line in replies.read_text().splitlines()} == {"model", "baseline"}
    for metric in found["metrics"]:
        assert metric["name"] in result.output


def test_the_same_command_gives_the_same_figures(tmp_path, folder, base):
    def figures(name):
        out = tmp_path / name
        options = ["--data", place(folder, "diversity"), "--limit", 2, "--max-new-tokens", 4, "--out", out]
        assert trimtab("eval", "diversity", base, *options).exit_code == 0
        found = json.loads(out.read_text())
        return {key: found[key] for key in ("metrics", "items", "data", "settings", "model_sha256")}

    assert figures("a.json") == figures("b.json")


def test_replies_are_greedy_whatever_the_seed(tmp_path, folder, base):
    for seed in (0, 1):
        options = ["--data", place(folder, "xstest"), "--max-new-tokens", 8, "--seed", seed]
        assert trimtab("eval", "xstest", base, *options, "--replies", tmp_path / str(seed)).exit_code == 0
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def test_the_tax_is_told_over_several_suites(tmp_path, folder, base, other):
    paths = [tmp_path / f"{name}.json" for name in ("hhh", "truthful_qa")]
    for path in paths:
        options = ["--data", place(folder, path.stem), "--out", path]
        assert trimtab("eval", path.stem, base, other, *options).exit_code == 0
    out = tmp_path / "tax.json"
    result = trimtab("eval", "tax", *paths, "--margin", 0.05, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [row["suite"] for row in found["verdicts"]] == ["hhh", "truthful_qa"]
    assert "inconclusive" in result.output


def test_what_says_nothing_about_a_tax_is_refused(tmp_path, folder, base, other):
    alone, traits, pair, swapped = (tmp_path / f"{name}.json" for name in ("alone", "traits", "pair", "swapped"))
    few = ["--limit", 5, "--out"]
    hhh = ["--data", place(folder, "hhh"), *few]
    assert trimtab("eval", "hhh", base, *hhh, alone).exit_code == 0
    assert trimtab("eval", "traits", base, other, "--data", place(folder, "traits"), *few, traits).exit_code == 0
    assert trimtab("eval", "hhh", base, other, *hhh, pair).exit_code == 0
    assert (
        trimtab("eval", "truthful_qa", other, base, "--data", place(folder, "truthful_qa"), *few, swapped).exit_code
        == 0
    )
    (tmp_path / "none.json").write_text("{}")
    for arguments, said in [
        ([tmp_path / "missing.json"], "no such file"),
        ([tmp_path / "none.json"], "no results of a suite"),
        ([alone], "results without a baseline"),
        ([traits], "neither direction of matching is better"),
        ([pair, pair], "given twice"),
        ([pair, swapped], "another pair of models"),
    ]:
        result = trimtab("eval", "tax", *arguments)
        assert result.exit_code == 2, result.output
        assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hhh", "{base}", "{base}"], "against itself"),
        (["hhh", "{base}", "{base}/"], "against itself"),
        (["hhh", "{base}", "--out", "{folder}/x", "--replies", "{folder}/hhh_alignment/../x"], "would both be written"),
        (["hhh", "{base}", "--data", "{folder}/nowhere"], "nowhere"),
        (["hhh", "{base}"], "--data"),
        (["hhh", "{base}", "--data", "{folder}/hhh_alignment/hhh_alignment.jsonl", "--limit", "0"], "--limit"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_model_is_loaded(folder, base, arguments, said):
    result = trimtab("eval", *(str(one).format(base=base, folder=folder) for one in arguments))
    assert result.exit_code == 2
    assert said in result.output
