"""Files of replies compared by worlds, reward models, people and rules; and answers to MT-Bench and Arena-Hard."""

import json
from contextlib import closing

import pytest

from tests.feedback.projects import add, answer_next, make_store, person
from tests.stages.commands import rows, trimtab
from trimtab.core.types import Rollout, from_dict

QUESTIONS = [
    {"question_id": 81, "category": "math", "turns": ["What is 1 + 2?", "And 3 more?"]},
    {"question_id": 82, "category": "math", "turns": ["What is 4 + 5?"]},
]


def write(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


@pytest.fixture
def replies(tmp_path):
    """Files of two models' replies to twelve prompts, of which the first is longer for eight."""
    for name, long in (("mine", 8), ("base", 0)):
        given = [
            {"prompt": f"Question {i}?", "completion": f"It is {i}" + (" indeed." if i < long else ".")}
            for i in range(12)
        ]
        write(tmp_path / f"{name}.jsonl", given)
    return tmp_path / "mine.jsonl", tmp_path / "base.jsonl"


def test_replies_are_compared_by_length_and_by_recorded_verdicts(tmp_path, replies):
    mine, base = replies
    people = [
        {
            "prompt": f"Question {i}?",
            "model": "x",
            "baseline": "y",
            "verdict": float(i % 2),
            "reply": f"It is {i} indeed.",
            "baseline_reply": f"It is {i}.",
        }
        for i in range(6)
    ]
    votes = write(tmp_path / "people.jsonl", people)
    out, verdicts = tmp_path / "study.json", tmp_path / "verdicts.jsonl"
    result = trimtab(
        *("eval", "replies", mine, "--baseline", base, "--by", "length", "--by", votes),
        *("--out", out, "--verdicts", verdicts, "--style-control", "--length-control"),
    )
    assert result.exit_code == 0, result.output
    assert "by length" in result.output
    assert "cannot judge 2 pairs of mine" in result.output  # two are longer and were not judged, four are equal
    written = json.loads(out.read_text())
    studies = written["studies"]
    assert written["num_unjudged"] == {"length": {"mine": 0}, str(votes): {"mine": 2}}
    assert written["num_unpaired"] == {"mine": 0}
    assert set(written["sha256"]) == {str(mine), str(base)}
    assert studies["length"]["win_rates"][0]["rate"]["value"] == pytest.approx((8 + 4 / 2) / 12)
    assert studies[str(votes)]["win_rates"][0]["rate"]["value"] == pytest.approx((3 + 4 / 2) / 10)
    assert studies["length"]["style_controlled"]["rates"][0]["model"] == "mine"
    written = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert len(written) == 22
    assert written[0]["reply"] == "It is 0 indeed."
    again = trimtab("eval", "verdicts", verdicts, "--out", tmp_path / "again.json")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again.json").read_text())["num_verdicts"] == 22


def test_generated_replies_are_compared_by_gold_and_by_a_reward_model(tmp_path, base, other, reward_run):
    for name, model in (("one", base), ("two", other)):
        data = ["--data", "world:arithmetic?num=6", "--num-samples", 2, "--max-new-tokens", 8]
        assert trimtab("generate", "--model", model, *data, "--out", tmp_path / f"{name}.jsonl").exit_code == 0
    given = rows(tmp_path, "one.jsonl")
    write(tmp_path / "one.jsonl", [row | {"response": ""} if i == 0 else row for i, row in enumerate(given[:-1])])
    by = ["--by", "world:arithmetic", "--by", reward_run / "model"]
    result = trimtab(
        *("eval", "replies", tmp_path / "one.jsonl", "--baseline", tmp_path / "two.jsonl", *by),
        *("--out", tmp_path / "study.json"),
    )
    assert result.exit_code == 0, result.output
    assert "one: 1 replies have no partner" in result.output
    studies = json.loads((tmp_path / "study.json").read_text())["studies"]
    assert set(studies) == {"world:arithmetic", str(reward_run / "model")}
    for study in studies.values():
        (rate,) = study["win_rates"]
        assert (rate["rate"]["count"], rate["num_verdicts"]) == (6, 11)


def test_prompts_that_are_not_the_same_and_comparers_that_know_nothing_are_refused(tmp_path, replies):
    mine, base = replies
    others = write(tmp_path / "others.jsonl", [{"prompt": "Another?", "completion": "Yes."}])
    result = trimtab("eval", "replies", mine, "--baseline", others, "--by", "length")
    assert result.exit_code == 2
    assert "no prompt in common" in result.output
    plain = {"prompt": "p", "model": "m", "baseline": "b", "verdict": 1.0}
    votes = write(tmp_path / "votes.jsonl", [plain])
    longer = write(tmp_path / "longer.jsonl", [{"prompt": "Question 0?", "completion": "It is so."}])
    result = trimtab("eval", "replies", longer, "--baseline", base, "--by", votes)
    assert result.exit_code == 2
    assert "judges none of the pairs" in result.output


def test_agreement_with_people_stands_beside_length_and_words(tmp_path):
    given = [
        {"input": f"Question {i}?", "output_1": "Yes, it is so.", "output_2": "No.", "label": 1 + (i % 4 == 0)}
        for i in range(20)
    ]
    path, out = write(tmp_path / "human.jsonl", given), tmp_path / "agreement.json"
    result = trimtab("eval", "agreement", path, "--by", "length", "--out", out)
    assert result.exit_code == 0, result.output
    found = {row["comparer"]: row["rate"] for row in json.loads(out.read_text())["agreement"]}
    assert list(found) == ["length", "bag of words"]
    assert found["length"]["value"] == pytest.approx(0.75)
    assert found["length"]["count"] == 20


def test_a_reward_model_agrees_with_people_as_often_as_its_card_says(tmp_path, pairs, reward_run):
    out, model = tmp_path / "agreement.json", reward_run / "model"
    result = trimtab("eval", "agreement", pairs, "--by", model, "--out", out)
    assert result.exit_code == 0, result.output
    assert trimtab("card", model, pairs, "--out", tmp_path / "card").exit_code == 0
    card = json.loads((tmp_path / "card" / "reward_card.json").read_text())
    found = {row["comparer"]: row["rate"] for row in json.loads(out.read_text())["agreement"]}
    assert found[str(model)]["value"] == pytest.approx(card["accuracy"])
    assert found["length"]["value"] == pytest.approx(card["longer_wins"])


def test_rows_that_are_no_pairs_are_refused_or_left_out_and_counted(tmp_path):
    good = [{"prompt": f"Question {i}?", "chosen": "Yes, it is.", "rejected": "No."} for i in range(12)]
    path = write(tmp_path / "pairs.jsonl", [*good, *({**row, "rejected": ""} for row in good[:9])])
    refused = trimtab("eval", "agreement", path)
    assert refused.exit_code == 2
    assert "9 of 21 rows cannot be used" in refused.output
    result = trimtab("eval", "agreement", path, "--on-bad-row", "drop", "--out", tmp_path / "agreement.json")
    assert result.exit_code == 0, result.output
    assert "9 rows are left out, because they cannot be used" in result.output
    assert json.loads((tmp_path / "agreement.json").read_text())["num_dropped"] == 9


def test_pairs_without_a_right_side_are_refused(tmp_path):
    row = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "label": 0.5}
    result = trimtab("eval", "agreement", write(tmp_path / "even.jsonl", [row]))
    assert result.exit_code == 2
    assert "none of 1 pairs has a right side" in result.output


def test_all_turns_of_questions_are_asked_and_answers_are_read_with_judgements(tmp_path, base, other):
    questions = write(tmp_path / "question.jsonl", QUESTIONS)
    for name, model in (("mine", base), ("base-1.5", other)):
        out = tmp_path / "model_answer" / f"{name}.jsonl"
        common = ["--data", questions, "--max-new-tokens", 6, "--layout", "fastchat", "--out", out]
        result = trimtab("generate", "--model", model, *common)
        assert result.exit_code == 0, result.output
        first, second = rows(out.parent, out.name)
        assert (first["question_id"], first["model_id"]) == (81, name)
        assert [len(choice["turns"]) for row in (first, second) for choice in row["choices"]] == [2, 1]
    again = ["--data", questions, "--max-new-tokens", 6, "--layout", "fastchat", "--out", tmp_path / "x.jsonl"]
    assert trimtab("generate", "--model", other, *again).exit_code == 0
    assert rows(tmp_path, "x.jsonl")[0]["choices"] == first["choices"]
    judged = [
        {
            "question_id": row["question_id"],
            "model_1": "mine",
            "model_2": "base-1.5",
            "g1_winner": "model_1",
            "g2_winner": "model_2",
            "judge": ["gpt-4", "pair-v2"],
            "turn": turn,
        }
        for row in QUESTIONS
        for turn in range(1, 1 + len(row["turns"]))
    ]
    pairs = write(tmp_path / "gpt-4_pair.jsonl", judged)
    result = trimtab(
        *("eval", "verdicts", pairs, "--answers", tmp_path / "model_answer", "--style-control", "--length-control"),
        *("--out", tmp_path / "study.json", "--verdicts", tmp_path / "plain.jsonl"),
    )
    assert result.exit_code == 0, result.output
    assert "at equal style" in result.output
    found = json.loads((tmp_path / "study.json").read_text())
    assert (found["num_verdicts"], found["num_unanswered"]) == (6, 0)
    plain = rows(tmp_path, "plain.jsonl")
    assert [row["turn"] for row in plain] == [1, 1, 2, 2, 1, 1]
    assert plain[0]["reply"] == rows(tmp_path / "model_answer", "mine.jsonl")[0]["choices"][0]["turns"][0]
    again = trimtab("eval", "verdicts", tmp_path / "plain.jsonl", "--style-control", "--out", tmp_path / "again.json")
    assert again.exit_code == 0, again.output
    study = json.loads((tmp_path / "again.json").read_text())["study"]
    assert study["win_rates"] == found["study"]["win_rates"]
    assert study["style_controlled"] == found["study"]["style_controlled"]
    assert found["study"]["win_rates"][0]["rate"]["count"] == 2


def test_the_second_turn_is_asked_after_the_reply_to_the_first(tmp_path, base):
    data = ["--data", write(tmp_path / "question.jsonl", QUESTIONS), "--max-new-tokens", 6, "--temperature", 0]
    asked = ["generate", "--model", base, *data, "--layout", "fastchat", "--out", tmp_path / "a.jsonl"]
    assert trimtab(*asked).exit_code == 0
    first, second = rows(tmp_path, "a.jsonl")[0]["choices"][0]["turns"]
    talk = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And 3 more?"},
    ]
    prompt = write(tmp_path / "talk.jsonl", [{"prompt": talk}])
    common = ["--max-new-tokens", 6, "--temperature", 0, "--out", tmp_path / "b.jsonl"]
    assert trimtab("generate", "--model", base, "--data", prompt, *common).exit_code == 0
    assert rows(tmp_path, "b.jsonl")[0]["response"] == second


def test_without_a_layout_the_further_turns_are_noted(tmp_path, base):
    data = ["--data", write(tmp_path / "question.jsonl", QUESTIONS), "--max-new-tokens", 4]
    result = trimtab("generate", "--model", base, *data, "--out", tmp_path / "a.jsonl")
    assert result.exit_code == 0, result.output
    assert "1 questions have further turns; --layout fastchat asks them too" in result.stderr
    found = [from_dict(Rollout, row) for row in rows(tmp_path, "a.jsonl")]
    assert [r.prompt.facts["question_id"] for r in found] == [81, 82]


def test_answers_to_arena_hard_are_in_its_layout(tmp_path, base):
    data = ["--data", write(tmp_path / "q.jsonl", [{"uid": "u", "category": "c", "prompt": "Use ABC."}])]
    result = trimtab(
        *("generate", "--model", base, *data, "--max-new-tokens", 4),
        *("--layout", "arena_hard", "--out", tmp_path / "mine.jsonl"),
    )
    assert result.exit_code == 0, result.output
    (row,) = rows(tmp_path, "mine.jsonl")
    assert (row["uid"], row["model"]) == ("u", "mine")
    assert row["messages"][0] == {"role": "user", "content": "Use ABC."}
    assert set(row["messages"][1]["content"]) == {"answer"}


def test_a_layout_needs_questions_and_a_file(tmp_path, base):
    result = trimtab(
        "generate", "--model", base, "--prompt", "a", "--layout", "fastchat", "--out", tmp_path / "x.jsonl"
    )
    assert result.exit_code == 2
    assert "--data question.jsonl" in result.output
    data = write(tmp_path / "plain.jsonl", [{"prompt": "a"}])
    result = trimtab(
        "generate",
        "--model",
        base,
        "--data",
        data,
        "--max-new-tokens",
        2,
        "--layout",
        "fastchat",
        "--out",
        tmp_path / "x.jsonl",
    )
    assert result.exit_code == 2
    assert "does not name its question" in result.output


def test_the_votes_of_a_project_are_verdicts(tmp_path):
    with closing(make_store(tmp_path)) as store:
        add(store, 4)
        ann = person(store, "ann")
        for _ in range(4):
            answer_next(store, ann)
    for source in (tmp_path / "project.toml", f"feedback:{tmp_path / 'project.toml'}"):
        result = trimtab("eval", "verdicts", source, "--baseline", "model-1", "--out", tmp_path / "study.json")
        assert result.exit_code == 0, result.output
        study = json.loads((tmp_path / "study.json").read_text())["study"]
        (rate,) = study["win_rates"]
        assert (rate["model"], rate["baseline"], rate["rate"]["value"], rate["rate"]["count"]) == (
            *("model-0", "model-1", 1.0, 4),
        )
    given = [{"prompt": f"question {i}", "chosen": f"reply {i}.0", "rejected": f"reply {i}.1"} for i in range(5)]
    pairs, out = write(tmp_path / "pairs.jsonl", given), tmp_path / "agreement.json"
    result = trimtab("eval", "agreement", pairs, "--by", tmp_path / "project.toml", "--out", out)
    assert result.exit_code == 0, result.output
    people = json.loads(out.read_text())["agreement"][-1]
    assert (people["rate"]["value"], people["rate"]["count"], people["num_unjudged"]) == (1.0, 4, 1)


def test_a_reward_by_its_name_compares_and_one_that_needs_settings_says_so(tmp_path):
    for name, right in (("mine", 6), ("base", 2)):
        given = [
            {
                "prompt": f"What is {i} + 1?",
                "completion": f"#### {i + 1 if i < right else 99}",
                "facts": {"answer": i + 1},
            }
            for i in range(8)
        ]
        write(tmp_path / f"{name}.jsonl", given)
    files = (tmp_path / "mine.jsonl", "--baseline", tmp_path / "base.jsonl")
    result = trimtab("eval", "replies", *files, "--by", "exact_answer")
    assert result.exit_code == 0, result.output
    assert "75.0%" in result.output  # four won, four tied
    refused = trimtab("eval", "replies", *files, "--by", "regex")
    assert refused.exit_code == 2
    assert "the reward 'regex' has settings without a default" in refused.output
