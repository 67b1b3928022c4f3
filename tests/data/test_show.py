from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from trimtab.core.errors import ConfigError
from trimtab.data.show import show, visible


@pytest.fixture(scope="module")
def model_dir(tokenizers, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tokenizers["ours"].save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return directory


def shown(data: list[dict], model_dir, tmp_path, **options) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    out = io.StringIO()
    options = {"kind": "auto", "rows": 3, **options}
    show(path, model_dir, console=Console(file=out, width=200), **options)
    return out.getvalue()


PAIRS = [{"prompt": "What?", "chosen": "Four.", "rejected": f"Five {i}."} for i in range(20)]


def test_what_is_trained_is_in_brackets_with_its_end_token(model_dir, tmp_path):
    text = shown(PAIRS, model_dir, tmp_path, rows=1)
    assert "What?<|end|>⏎\n<|assistant|>⏎\n⟦Four.<|end|>⟧" in text
    assert "⟦Five 0.<|end|>⟧" in text
    assert "Five 1." not in text


TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_the_turns_that_the_sft_stage_trains_are_in_brackets(model_dir, tmp_path):
    rows = [{"messages": [{"role": role, "content": content} for role, content in TURNS]}]
    text = shown(rows, model_dir, tmp_path)
    assert "⟦b" not in text
    assert "⟦d<|end|>⟧" in text
    text = shown(rows, model_dir, tmp_path, train_on="all")
    assert "⟦b<|end|>⟧" in text
    assert "⟦d<|end|>⟧" in text


def test_a_turn_of_weight_zero_is_never_in_brackets(model_dir, tmp_path):
    rows = [{"messages": [{"role": role, "content": content} for role, content in TURNS]}]
    rows[0]["messages"][1]["weight"] = 0
    text = shown(rows, model_dir, tmp_path, train_on="all")
    assert "⟦b" not in text
    assert "⟦d<|end|>⟧" in text


def test_layout_counts_dropped_rows_and_lengths_are_told(model_dir, tmp_path):
    text = shown([*PAIRS, {"prompt": "What?", "chosen": "", "rejected": "b"}], model_dir, tmp_path)
    assert "preference pairs" in text
    assert "dropped empty response  1" in text
    assert "row 21: chosen is empty" in text
    assert "median" in text
    assert "█" in text


def test_what_is_not_used_is_named(model_dir, tmp_path):
    turns = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    text = shown([{"messages": turns, "topic": "x"}], model_dir, tmp_path)
    assert "not used: topic, messages[].name" in text


def test_a_prompt_has_nothing_to_train_on(model_dir, tmp_path):
    text = shown(PAIRS, model_dir, tmp_path, kind="prompt")
    assert "⟦" not in text
    assert "not trained on" in text


def test_markup_and_control_characters_of_the_data_are_shown_and_not_obeyed(model_dir, tmp_path):
    rows = [{"prompt": "[bold red]hi[/] \x1b[2J\x07", "completion": "[link=http://x]y[/link]\u202e\x00"}]
    text = shown(rows, model_dir, tmp_path)
    assert "[bold red]hi[/] ␛[2J␇" in text
    assert "[link=http://x]y[/link]\\u{202e}␀" in text
    assert "\x1b" not in text


def test_without_a_model_rows_are_text_with_their_facts_and_counts(tmp_path):
    rows = [{"prompt": "[b]2+2?\x1b", "chosen": "Four.", "rejected": "Five.", "facts": {"answer": "4"}, "topic": "x"}]
    text = shown([*rows, {"prompt": "What?", "chosen": "", "rejected": "b"}], None, tmp_path)
    assert "1. user\n[b]2+2?␛\n1. chosen\nFour.\n1. rejected\nFive.\n" in text
    assert '1. fact answer\n"4"' in text
    assert "facts" in text
    assert "not used: topic" in text
    assert "dropped empty response  1" in text
    assert "row 2: chosen is empty" in text
    assert "With --model MODEL" in text
    assert "⟦" not in text
    assert "median" not in text


def test_without_a_model_no_turn_can_be_marked(tmp_path):
    with pytest.raises(ConfigError, match="--train-on all without --model"):
        shown(PAIRS, None, tmp_path, train_on="all")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, "1. user\na\n1. thumbs down\nb\n"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "1. user\na\n1. demonstration\nb\n"),
        ({"prompt": "a"}, "1. user\na\n"),
    ],
)  # fmt: skip
def test_each_kind_of_record_has_its_texts(tmp_path, row, said):
    assert said in shown([row] * 2, None, tmp_path)


def test_visible_leaves_ordinary_text_alone():
    assert visible("naïve ☃ [b] 漢字") == "naïve ☃ [b] 漢字"
    assert visible("a\r\tb\x7f") == "a␍␉b\\u{7f}"


def test_only_the_first_rows_are_read_unless_all_are_asked_for(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.data.show.NUM_MEASURED", 20)
    rows = [{"prompt": f"Question {i}?", "completion": "yes"} for i in range(50)] + [{"prompt": "Why?"}]
    first = shown(rows, model_dir, tmp_path, rows=1)
    assert "first 20 rows; --all reads every row" in first
    assert "missing field" not in first
    everything = shown(rows, model_dir, tmp_path, rows=1, whole=True)
    assert "--all" not in everything
    assert "dropped missing field" in everything
