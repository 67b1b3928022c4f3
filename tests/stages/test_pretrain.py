import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.stages.commands import rows, run_stage, summary, trimtab, write_run_file
from trimtab.stages.pretrain import document_trees

SMALL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "max_positions": 256}


def settings(**changed):
    return {
        "data": "world:arithmetic",
        "num_documents": 16,
        "vocab_size": 280,
        "architecture": SMALL,
        "batch_size": 8,
    } | changed


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_two_steps_give_a_model_with_its_tokenizer(tmp_path, family):
    out = run_stage("pretrain", tmp_path / "run", **settings(architecture={**SMALL, "family": family}))
    losses = [row["loss/train"] for row in rows(out)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.model_type == family
    assert AutoTokenizer.from_pretrained(out / "model").chat_template
    assert summary(out)["num_parameters"] == sum(p.numel() for p in model.parameters())


def test_long_documents_are_cut_into_pieces_and_none_is_lost(tmp_path):
    texts = ["a b c d e f g h i j k l m n o p " * 4, "short"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    changed = settings(data=str(data), num_documents=None, max_tokens=16, batch_size=1)
    out = run_stage("pretrain", tmp_path / "run", **{k: v for k, v in changed.items() if v is not None})
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]  # and the end token
    assert summary(out)["num_steps"] == sum(-(-(n - 1) // 15) for n in lengths)
    for max_tokens in range(2, max(lengths) + 2):  # also where a cut leaves the end token alone
        trees = document_trees(texts, tokenizer, max_tokens)
        assert max(tree.num_tokens for tree in trees) <= max_tokens
        assert sum(tree.num_trained for tree in trees) == sum(lengths) - len(texts)
        assert sum(tree.branches[0].ids[-1] == tokenizer.eos_token_id for tree in trees) == len(texts)


def test_preference_pairs_are_written_in_the_chat_markup(tmp_path, pairs):
    out = run_stage("pretrain", tmp_path / "run", **settings(data=str(pairs), num_documents=8))
    assert summary(out)["num_documents"] == 16
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer("<|user|>")["input_ids"]) == 1


def test_a_world_needs_a_number_of_documents(tmp_path):
    run_file = write_run_file(tmp_path / "run.toml", {"data": "world:arithmetic"})
    result = trimtab("pretrain", run_file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "num_documents" in result.output


def test_rows_without_a_text_and_columns_that_are_not_used_are_said(tmp_path, capsys):
    from trimtab.data.sources import read_rows
    from trimtab.stages.pretrain import plain_texts

    class Recorder:
        """What a run is told of its data."""

        def add_data(self, *told):
            self.told = told

    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "source": "x"}\n{"text": " "}\n{"no": 1}\n{"text": \n')
    run = Recorder()
    assert plain_texts(read_rows(path), run) == ["a"]
    dropped = {"broken_json": 1, "without_text": 2}
    assert run.told[2:] == (1, {"layout": "plain text", "not_used": ["no", "source"], "dropped": dropped})
