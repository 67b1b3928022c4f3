"""Reward models from rankings: lists with ranks or scores, and pairs that make up a ranking."""

import json
import math
from itertools import combinations, pairwise

import pytest
from transformers import AutoTokenizer

from tests.stages.commands import FAST, rows, run_stage, summary, trimtab, write_run_file
from tests.stages.test_reward import score
from trimtab.core import seeds
from trimtab.models.load import load_scalar

PROMPTS = [f"What is {i} + {i}?" for i in range(12)]
REPLIES = ["#### 4", "It is 4.", "Maybe.", "I can not say."]


def nectar(prompt, ranks=(1, 2, 3, 4)):
    return [{"prompt": prompt, "answers": [{"answer": a, "rank": r} for a, r in zip(REPLIES, ranks, strict=True)]}]


def ultrafeedback(prompt, scores=(9.0, 7.5, 4.0, 1.0)):
    replies = zip(REPLIES, scores, strict=True)
    return [{"instruction": prompt, "completions": [{"response": a, "overall_score": s} for a, s in replies]}]


def openassistant(prompt):
    replies = [{"text": a, "role": "assistant", "rank": i, "replies": []} for i, a in enumerate(REPLIES)]
    return [{"message_tree_id": prompt, "prompt": {"text": prompt, "role": "prompter", "replies": replies}}]


def all_pairs(prompt):
    return [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in combinations(REPLIES, 2)]


def written(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def settings(model, data, **changed):
    return {"model": str(model), "data": str(data), "held_out": 0.3, "batch_size": 100, "optimizer": FAST} | changed


def first_loss(base, tmp_path):
    """-log P(order) by Plackett-Luce, one choice after the other, of each prompt that is trained on: all are alike but
    for the prompt."""
    model = load_scalar(base, head_seed=seeds.derive(0, "reward head"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for prompt in PROMPTS:
        scores = [score(model, tokenizer, prompt, reply) for reply in REPLIES]
        losses.append(sum(math.log(sum(map(math.exp, scores[k:]))) - s for k, s in enumerate(scores)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("layout", [nectar, ultrafeedback, openassistant, all_pairs])
def test_every_layout_of_rankings_gives_the_likelihood_of_the_order(tmp_path, base, layout):
    found = [row for prompt in PROMPTS for row in layout(prompt)]
    data = written(tmp_path / "rankings.jsonl", found)
    loss = {"name": "plackett_luce", "centering_coef": 0.0}
    out = run_stage("reward", tmp_path / "run", **settings(base, data, held_out_data=str(data), loss=loss))
    assert rows(out)[0]["loss/train"] == pytest.approx(first_loss(base, tmp_path), rel=1e-5)
    assert summary(out)["num_pairs"] == 6 * len(PROMPTS)


def test_the_mean_over_prompts_counts_a_prompt_with_six_pairs_like_one_with_one(tmp_path, base):
    two = {"prompt": "Why?", "answers": nectar("")[0]["answers"][:2]}
    losses = {}
    for name, found in {"long": nectar("Hi?"), "short": [two], "both": [*nectar("Hi?"), two]}.items():
        data = written(tmp_path / f"{name}.jsonl", found)
        changed = {"held_out_data": str(data), "loss": {"mean_over": "prompts"}}
        losses[name] = rows(run_stage("reward", tmp_path / name, **settings(base, data, **changed)))[0]["loss/train"]
    assert losses["both"] == pytest.approx((losses["long"] + losses["short"]) / 2, rel=1e-5)


CHAIN = [{"prompt": "Go?", "chosen": a, "rejected": b} for a, b in pairwise(REPLIES)]


@pytest.mark.parametrize(
    ("further", "said", "kind"),
    [
        (CHAIN, "a ranking with a gap: no pair says whether reply 0 is better than reply 2", "ranking_gap"),
        ([*all_pairs("Go?")[:1], {"prompt": "Go?", "chosen": REPLIES[1], "rejected": REPLIES[0]}], "each is", "gap"),
        (ultrafeedback("Go?", (9.0, 9.0, 4.0, 1.0)), "4 replies share 3 ranks", "ranking_tie"),
        ([all_pairs("Go?")[0] | {"label": 0.75}], "a pair has the label 0.75", "soft_label"),
        ([all_pairs("Go?")[0] | {"margin": 1.0}], "a pair has a margin", "with_margin"),
    ],
)
def test_what_is_no_ranking_is_refused_or_left_out(tmp_path, base, further, said, kind):
    head = all_pairs if "chosen" in further[0] else ultrafeedback
    found = [row for prompt in PROMPTS for row in head(prompt)]
    data = written(tmp_path / "data.jsonl", [*found, *further])
    held_out = written(tmp_path / "held_out.jsonl", found)
    run = settings(base, data, held_out_data=str(held_out), loss="plackett_luce")
    result = trimtab("reward", write_run_file(tmp_path / "run.toml", run), "--out", tmp_path / "none")
    assert result.exit_code == 2
    assert said in result.output
    assert "the replies to 'Go?'" in result.output
    assert "1 of 13 prompts give no ranking" in result.output
    assert ("FILE?ignore=label " in result.output) == (kind == "soft_label")
    assert not (tmp_path / "none" / "metrics.jsonl").exists()
    counts = summary(run_stage("reward", tmp_path / "drop", **run, on_bad_row="drop"))["counts"]
    assert [num for name, num in counts.items() if kind in name] == [5 if kind == "ranking_tie" else len(further)]


def test_tied_replies_are_learnt_from_if_asked(tmp_path, base):
    data = written(
        tmp_path / "data.jsonl", [row for prompt in PROMPTS for row in ultrafeedback(prompt, (9.0, 9.0, 4.0, 1.0))]
    )
    loss = {"name": "plackett_luce", "ties": "breslow"}
    out = run_stage("reward", tmp_path / "run", **settings(base, data, held_out_data=str(data), loss=loss))
    assert summary(out)["num_pairs"] == 5 * len(PROMPTS)
