"""The order of examples, held-out examples in pieces, and the metrics of the summary."""

from pathlib import Path

import pytest

from tests.data.conftest import make
from tests.stages.commands import run_stage, trimtab
from trimtab.core.types import Message, PreferencePair, Prompt
from trimtab.data.chat import Chat
from trimtab.data.pairs import group_pairs
from trimtab.stages.supervised import Epochs, Validation


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_examples_of_the_first_steps_are_those_that_the_steps_take(shuffle):
    epochs = Epochs(num_examples=23, batch_size=5, num_epochs=2.5, seed=3, shuffle=shuffle)
    for num_steps in (1, 4, 7, epochs.num_steps):
        taken = [i for step in range(num_steps) for i in epochs.examples(step)]
        assert epochs.used(num_steps) == sorted(set(taken))
    assert sorted(i for step in range(5) for i in epochs.examples(step))[:23] != []
    assert sorted(epochs.take(0, 23)) == list(range(23))
    assert (epochs.take(0, 23) == list(range(23))) != shuffle
    assert (epochs.take(0, 23) == epochs.take(23, 46)) != shuffle


@pytest.mark.parametrize("budget", [20, 60, 10_000])
@pytest.mark.parametrize("whole", [True, False])
def test_held_out_examples_come_in_the_pieces_of_one_batch(budget, whole):
    pairs = [
        PreferencePair(prompt=Prompt(messages=(Message("user", "Hi " * (7 * i % 5)),)), chosen="a " * i, rejected="b")
        for i in range(1, 13)
    ]
    comparisons = group_pairs(pairs, Chat(make("ours")), max_tokens=200, on_too_long="drop", counts={})
    validation = Validation(lambda: [tree.num_tokens for tree in comparisons.trees], comparisons.batch, whole=whole)
    seen = []

    def prepared(batch):
        seen.append(len(batch.trees.trees))
        return batch

    pieces = list(validation.micro_batches(budget, prepared))
    expected = list(comparisons.batch().micro_batches(budget))
    assert [piece.trees.trees for piece in pieces] == [piece.trees.trees for piece in expected]
    assert [piece.labels.tolist() for piece in pieces] == [piece.labels.tolist() for piece in expected]
    assert seen == ([len(comparisons.trees)] if whole else [len(piece.trees.trees) for piece in expected])


def all_but_the_first_row(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0])


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_text(""), all_but_the_first_row])
def test_lost_metrics_of_a_run_at_its_end_are_named(tmp_path, base, lost):
    out = run_stage("sft", tmp_path / "run", model=str(base), data="world:arithmetic?num=8", batch_size=4)
    (out / "summary.json").unlink()
    lost(out / "metrics.jsonl")
    again = trimtab("sft", out / "settings.toml", "--out", out)
    assert again.exit_code == 2
    assert "metrics.jsonl has no row of the last step" in again.output
    assert "make room" not in again.output
    assert "without the rows of steps" in again.output
