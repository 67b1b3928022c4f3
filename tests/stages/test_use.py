import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.stages.commands import rows, trimtab
from trimtab.core.types import Rollout, from_dict

PROMPT = "What is 12 + 30?"


def test_replies_are_printed_the_same_for_the_same_seed(base):
    def printed(seed):
        options = ["--prompt", PROMPT, "--num-samples", 3, "--max-new-tokens", 8, "--seed", seed]
        result = trimtab("generate", "--model", base, *options)
        assert result.exit_code == 0, result.output
        return result.output

    assert printed(1) == printed(1) != printed(2)


def test_temperature_zero_takes_the_likeliest_token(base):
    result = trimtab("generate", "--model", base, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 6)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    turns = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert result.output == tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"


def test_rollouts_are_written_and_can_be_scored(tmp_path, base, reward_run):
    replies, scored = tmp_path / "a" / "replies.jsonl", tmp_path / "b" / "scored.jsonl"
    data = ["--data", "world:arithmetic?num=3", "--num-samples", 2, "--max-new-tokens", 8, "--out", replies]
    assert trimtab("generate", "--model", base, *data).exit_code == 0
    written = [from_dict(Rollout, row) for row in rows(replies.parent, replies.name)]
    assert len(written) == 6
    kept = [json.dumps(row) for row in rows(replies.parent, replies.name) if row["response"].strip()]
    replies.write_text("\n".join(kept) + "\n")
    result = trimtab("score", "--model", reward_run / "model", "--data", replies, "--out", scored)
    assert result.exit_code == 0, result.output
    rewards = [row["reward"] for row in rows(scored.parent, scored.name)]
    assert len(rewards) == len(kept) > 1
    assert len(set(rewards)) > 1


def test_rows_that_are_no_prompts_are_refused_or_left_out_and_counted(tmp_path, base):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is 1 + 1?"}\n{"prompt": 7}\n{"prompt": "What is 2 + 2?"}\n')
    asked = ("generate", "--model", base, "--data", file, "--out", tmp_path / "replies.jsonl", "--max-new-tokens", 2)
    refused = trimtab(*asked)
    assert refused.exit_code != 0
    assert "--on-bad-row drop" in refused.output
    done = trimtab(*asked, "--on-bad-row", "drop")
    assert "1 rows are left out" in done.output
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 2


def test_a_conversation_remembers_and_ends_with_an_empty_line(base):
    one = trimtab("chat", "--model", base, "--max-new-tokens", 8, stdin="Hello\nAgain\n\nnever read\n")
    assert one.exit_code == 0, one.output
    assert one.output.count("you> ") == 3
    other = trimtab("chat", "--model", base, "--max-new-tokens", 8, stdin="Goodbye\nAgain\n")
    assert other.exit_code == 0, other.output
    assert one.output.splitlines()[1] != other.output.splitlines()[1]  # "Again" after another first turn


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either a prompt or a data file"),
        (["--prompt", "a", "--data", "b"], "give either a prompt or a data file"),
        (["--prompt", "a", "--temperature", -1], "temperature = -1.0"),
        (["--prompt", "a", "--top-p", 1.5], "top_p = 1.5"),
        (["--prompt", "a", "--num-samples", 0], "'--num-samples': 0 is not in the range x>=1"),
        (["--prompt", "a", "--seed", -1], "'--seed': -1 is not in the range x>=0"),
    ],
)
def test_a_mistake_is_answered_with_what_to_change(base, options, said):
    result = trimtab("generate", "--model", base, *options)
    assert result.exit_code == 2
    assert said in result.output
    assert "run file" not in result.output


@pytest.mark.parametrize("words", [["generate", "--prompt", "a"], ["score", "--data", "world:arithmetic?num=2"]])
def test_a_place_that_cannot_be_written_is_answered_before_the_model_is_loaded(words):
    result = trimtab(*words, "--model", "nowhere/at/all", "--out", "/proc/nope/x.jsonl")
    assert result.exit_code == 2
    assert "/proc/nope/x.jsonl could not be written" in result.output


def test_a_model_without_a_score_head_cannot_score(tmp_path, base):
    result = trimtab("score", "--model", base, "--data", "world:arithmetic?num=2", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 2
    assert "no trained score head" in result.output


def test_a_reward_model_is_judged_on_further_pairs(tmp_path, reward_run, pairs):
    out = tmp_path / "scored.jsonl"
    result = trimtab("score", "--model", reward_run / "model", "--data", pairs, "--out", out)
    assert result.exit_code == 0, result.output
    scored = rows(tmp_path, "scored.jsonl")
    margins = [row["reward_chosen"] - row["reward_rejected"] for row in scored]
    right = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    assert f"It is right about {right:g} of 20 pairs, ties half." in result.output
    assert f"orders {100 * right / 20:.0f}%" in result.output
    alone = trimtab("score", "--model", reward_run / "model", "--data", pairs)
    assert alone.output == result.output


def test_pairs_with_an_even_label_are_in_no_count_of_right_ones(tmp_path, reward_run, pairs):
    even = tmp_path / "even.jsonl"
    given = rows(pairs.parent, pairs.name)
    even.write_text("".join(json.dumps(row | {"label": 0.5 if i < 8 else 1.0}) + "\n" for i, row in enumerate(given)))
    result = trimtab("score", "--model", reward_run / "model", "--data", even, "--out", tmp_path / "scored.jsonl")
    margins = [row["reward_chosen"] - row["reward_rejected"] for row in rows(tmp_path, "scored.jsonl")]
    right = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins[8:])
    said = f"It is right about {right:g} of 12 pairs, ties half; 8 more have an even label, and so no right side."
    assert said in result.output
    assert trimtab("card", reward_run / "model", even).output == result.output


def test_rewards_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, overflowing, pairs):
    for data in (pairs, "world:arithmetic?num=3"):
        result = trimtab("score", "--model", overflowing, "--data", data, "--out", tmp_path / "scored.jsonl")
        assert result.exit_code == 2
        assert "rewards are not finite" in result.output
        assert not (tmp_path / "scored.jsonl").exists()


def test_replies_are_scored_into_a_file(tmp_path, reward_run):
    result = trimtab("score", "--model", reward_run / "model", "--data", "world:arithmetic?num=2")
    assert result.exit_code == 2
    assert "--out FILE.jsonl" in result.output
