from __future__ import annotations

import math
import tracemalloc
import zlib

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from trimtab.evals.text import (
    compression_ratio,
    distinct_n,
    expectation_adjusted_distinct,
    length_stats,
    repetition,
    self_bleu,
    sentence_bleu,
    text_stats,
    words,
)


def test_words_are_lower_case_runs_and_single_marks():
    assert words("Don't PANIC: it's 42%!") == ["don't", "panic", ":", "it's", "42", "%", "!"]
    assert words("") == []


def test_expectation_adjusted_distinct_by_hand_and_against_draws():
    assert expectation_adjusted_distinct(["a a a"], vocabulary=2) == pytest.approx(1 / (2 * (1 - 0.5**3)))
    generator = np.random.default_rng(0)
    for length in (50, 500):  # of words drawn evenly as many differ as expected, however long the text is
        draws = [" ".join(f"w{i}" for i in generator.integers(300, size=length)) for _ in range(50)]
        mean = np.mean([expectation_adjusted_distinct([text], vocabulary=300) for text in draws])
        assert mean == pytest.approx(1, abs=0.02)
    assert math.isnan(expectation_adjusted_distinct(["", " "]))


def test_distinct_n_counts_over_all_texts_together():
    # bigrams: a b, b a, a b | a b -> 2 different of 4
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert math.isnan(distinct_n(["a"], 2))


def test_distinct_n_can_be_read_at_an_equal_number_of_words():
    texts = ["a b c", "a b c"]
    assert distinct_n(texts, 1, num_words=3) == 1.0
    assert distinct_n(texts, 1, num_words=4) == 3 / 4


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition("a a a a a", n=2) == 3 / 4
    assert repetition("one two three four five six") == 0
    assert repetition("short") == 0


MARKS = ["a", "B", "it's", "3.5", "1,000", "7-8", ",", ".", "...", "&amp;", "<skipped>", "-\n", "\n", "é", "x/y", "(z)"]


@given(st.lists(st.sampled_from(MARKS), max_size=12), st.lists(st.sampled_from(MARKS), max_size=12))
def test_sentence_bleu_is_that_of_sacrebleu(text, reference):
    a, b = " ".join(text), " ".join(reference)
    expected = sacrebleu.sentence_bleu(a, [b], use_effective_order=True).score / 100
    assert sentence_bleu(a, b) == pytest.approx(expected, abs=1e-12)


def test_self_bleu_is_the_mean_over_all_ordered_pairs_when_they_are_few():
    texts = ["the cat sat on the mat today", "the cat sat on a mat today", "dogs bark at night in the old town"]
    pairs = [(a, b) for a in texts for b in texts if a is not b]
    slow = [sacrebleu.sentence_bleu(a, [b], use_effective_order=True).score / 100 for a, b in pairs]
    assert self_bleu(texts) == pytest.approx(sum(slow) / 6)


def test_self_bleu_tells_copies_from_variety():
    assert self_bleu(["the same reply every time"] * 5) == pytest.approx(1)
    assert self_bleu([f"{w} {w}1 {w}2 {w}3 {w}4" for w in "abcdef"]) < 0.1
    assert math.isnan(self_bleu(["alone"]))


def test_self_bleu_samples_pairs_by_seed():
    texts = [f"reply number {i % 7} is about topic {i % 5}" for i in range(60)]
    assert self_bleu(texts, num_pairs=50, seed=1) == self_bleu(texts, num_pairs=50, seed=1)
    assert self_bleu(texts, num_pairs=50, seed=1) != self_bleu(texts, num_pairs=50, seed=2)
    assert self_bleu(texts, num_pairs=400) == pytest.approx(self_bleu(texts, num_pairs=10_000), abs=0.05)


def test_compression_ratio_is_bytes_over_compressed_bytes():
    assert compression_ratio(["ab", "cd"]) == 5 / len(zlib.compress(b"ab\ncd", 9))
    assert compression_ratio(["again and again "] * 50) > 10


def test_length_stats_count_words():
    stats = length_stats(["one", "one two three", "one two"])
    assert (stats["words_mean"], stats["words_median"], stats["words_max"]) == (2, 2, 3)


def test_text_stats_of_nothing_are_all_unknown():
    assert all(math.isnan(value) for value in text_stats([]).values())
    assert text_stats(["a b", "c d"])["distinct_1"] == 1


def test_the_texts_that_self_bleu_compared_are_not_kept():
    texts = [" ".join(f"w{i * j % 997}" for j in range(1, 300)) for i in range(1, 201)]
    tracemalloc.start()
    self_bleu(texts)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 15e6, f"{held} bytes for 200 texts of 300 words"
