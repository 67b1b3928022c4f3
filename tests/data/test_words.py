"""Many texts at once, against one by one."""

import random

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from trimtab.core.errors import DataError
from trimtab.core.types import Message, Prompt
from trimtab.data import words
from trimtab.data.chat import Chat
from trimtab.data.words import Words

from .conftest import NAMES, make

# What decides where a word begins: blanks of all kinds, signs that may count as blanks, marks that join the letter
# before them, letters, digits, contractions, and special tokens of several tokenizers.
PIECES = [" ", " ", " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\x1c", "\x85", "\u180e", "\u200b", "\ufeff"]
PIECES += ["a", "Hello", "USER", "1", "234", "'s", "'LL", "!", "?!", "é", "e\u0301", "☃", "\u0308", "中文", "/", "<s>"]
PIECES += ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|eot|>", "<think>", "</think>", " \n"]


def texts(num, seed=0):
    random_ = random.Random(seed)
    return ["".join(random_.choices(PIECES, k=random_.randint(0, 12))) for _ in range(num)]


def one_by_one(tokenizer, strings, plain):
    return [tokenizer(t, add_special_tokens=False, split_special_tokens=plain)["input_ids"] for t in strings]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_ids_of_many_texts_are_those_of_each_alone(tokenizers, name, plain):
    found = Words(tokenizers[name])
    assert found.by_words == (name != "llama2")
    strings = texts(600)
    assert found.encode(strings, plain=plain) == one_by_one(tokenizers[name], strings, plain)
    assert found.encode(strings, plain=plain) == one_by_one(tokenizers[name], strings, plain)  # from memory


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("pattern", sorted(words._KNOWN_PATTERNS))
def test_every_known_way_to_cut_words_gives_the_same_ids(pattern, normalizer):
    tokenizer = make("chatml")
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    found = Words(tokenizer)
    assert found.by_words
    strings = texts(600, seed=1)
    assert found.encode(strings) == one_by_one(tokenizer, strings, False)


def test_an_unknown_way_to_cut_words_is_left_to_the_tokenizer():
    tokenizer = make("chatml")
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    found = Words(tokenizer)
    assert not found.by_words
    assert found.encode(["a  5", ""]) == one_by_one(tokenizer, ["a  5", ""], False)


def test_added_tokens_that_take_blanks_are_left_to_the_tokenizer():
    from tokenizers import AddedToken

    tokenizer = make("chatml")
    tokenizer.add_tokens([AddedToken("Hello", single_word=True), AddedToken("☃", lstrip=True, normalized=False)])
    strings = texts(600, seed=2)
    assert Words(tokenizer).encode(strings) == one_by_one(tokenizer, strings, False)


@pytest.mark.parametrize("plain", [False, True])
def test_added_tokens_that_overlap_are_found_as_the_tokenizer_finds_them(plain):
    """As letters, a special token hid the ones inside it from the tokenizer and not from the words."""
    from tokenizers import AddedToken

    tokenizer = make("chatml")
    overlapping = ["im_st", "|>", "a Hello", " a", "xyz", "xy", "yzw"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in overlapping])
    random_ = random.Random(4)
    strings = ["".join(random_.choices([*PIECES, *overlapping * 3, "w"], k=8)) for _ in range(600)]
    assert Words(tokenizer).encode(strings, plain=plain) == one_by_one(tokenizer, strings, plain)


def test_the_memory_is_bounded(tokenizers, monkeypatch):
    monkeypatch.setattr(words, "MAX_PIECES", 50)
    found = Words(tokenizers["ours"])
    for seed in range(5):
        strings = texts(40, seed)
        assert found.encode(strings) == one_by_one(tokenizers["ours"], strings, False)
        assert len(found._first) + len(found._later) <= 50 + 40 * 13


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_replies_together_are_those_of_each_alone(tokenizers, name):
    chat = Chat(tokenizers[name])
    strings = [f"x{t}y" for t in texts(160, seed=3)]
    prompts = [[Message("user", t)] for t in strings]
    prompts += [
        [Message("user", a), Message("assistant", b), Message("user", c)]
        for a, b, c in zip(strings, strings[1:], strings[2:], strict=False)
    ]
    alone = [chat.encode_prompt(p) for p in prompts]
    assert [ids for ids, _ in chat.encode_prompts(prompts)] == alone
    assert chat.prompt_lengths(Prompt(messages=tuple(p)) for p in prompts) == [len(ids) for ids in alone]
    assert chat.encode_responses(strings) == [chat.encode_response(t) for t in strings]
    over_the_seam = [f"{blank}{t}" for t in strings[:40] for blank in ("\n", "\n\n", " ")]  # tokens may reach over it
    assert chat.encode_responses(over_the_seam) == [chat.encode_response(t) for t in over_the_seam]
    for prompt, (ids, mask) in zip(prompts, chat.encode_prompts(prompts), strict=True):
        reply = chat.encode_response("x")
        whole = (ids + reply, mask + [True] * len(reply))
        assert whole == chat.encode_conversation([*prompt, Message("assistant", "x")])


def test_a_conversation_that_the_template_refuses_is_one_error_among_the_others(tokenizers):
    chat = Chat(tokenizers["llama2"])
    twice = [Message("user", "Hello"), Message("user", "there")]
    found = chat.encode_prompts([[Message("user", "Hello")], twice])
    assert found[0] == (chat.encode_prompt([Message("user", "Hello")]), [False] * len(found[0][0]))
    assert isinstance(found[1], DataError)
    assert "must alternate" in found[1].problem
    assert chat.encode_prompts([]) == [] == chat.encode_responses([])
