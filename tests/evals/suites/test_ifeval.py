"""IFEval's checks against replies whose verdict is plain, and the eight replies of the loose criterion."""

from __future__ import annotations

import random

import pytest

from trimtab.core.errors import DataError
from trimtab.evals.suites.ifeval import followed, loosened, read, score
from trimtab.evals.suites.ifeval_checks import CHECKS, compared, num_capital_words, num_sentences
from trimtab.evals.suites.languages import language_of, may_be_in
from trimtab.evals.suites.suite import SuiteAnswer

NTH = "length_constraints:nth_paragraph_first_word"
PARAGRAPHS = {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"}
AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
AT_MOST = {"relation": "at most", "num_words": 3}
# The instruction, its arguments, a reply that follows it and replies that do not.
CASES = [
    ("keywords:existence", {"keywords": ["lamp", "C++"]}, "My LAMPS and c++.", ["My lamp.", "C++ only"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", ["A CAT.", "cat"]),
    ("keywords:frequency", AT_LEAST | {"keyword": "to", "frequency": 2}, "To tomorrow.", ["to"]),
    ("keywords:frequency", LESS | {"keyword": "to", "frequency": 2}, "to", ["To tomorrow."]),
    (
        "keywords:letter_frequency",
        {"letter": "n", "let_frequency": 3, "let_relation": "at least"},
        "No, nine",
        ["nine"],
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, "#", ["##"]),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Weg.", ["This is not the way.", "नमस्ते"]),
    ("length_constraints:number_words", AT_LEAST | {"num_words": 4}, "I don't know", ["I do know"]),
    ("length_constraints:number_words", LESS | {"num_words": 4}, "I do know", ["I don't know"]),
    ("length_constraints:number_sentences", AT_LEAST | {"num_sentences": 2}, "One. Two!", ["Only one, Dr. Ames."]),
    ("length_constraints:number_sentences", LESS | {"num_sentences": 2}, "Only one", ["One? Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "***\na\n***\nb\n***",
        ["a\n\nb", "a\n***\n***\nb", "a *** b *** c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First this.\n\n"Then, that.',
        ["Then.\n\nFirst.", "First.\n\nThenceforth.", "a\n\nThen\n\nc", "a\n\n\n\nThen"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] of [place]",
        ["[name]", "[na\nme] [b]"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np. s. more", ["Bye PS more", "P.P.S more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", ["P.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b\n**c**", ["* a", "* a\n* b\n- c"]),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe. Bye", ["My answer is yes", "Maybe."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b**",
        ["**b** only", "* * and *a*", "*a\nb* *c*"],
    ),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 x\nDay 2", ["Day 1"]),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', ['Sure: {"a": 1}', "{'a': 1}"]),
    ("detectable_format:title", {}, "<<A name>>\ntext", ["<name>", "<<  >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, "a\n******\nb", ["a", "a ****** a", "a ****** b ****** c", "a ****** ****** b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, " say it. Done", ["Done. Say it."]),
    ("startend:end_checker", {"end_phrase": "The End."}, '"So, the end."  ', ["The end. Bye"]),
    ("startend:quotation", {}, ' "all" ', ['"', 'so "all"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        "NASA's CO-OP: A plan",
        ["NASA and Co"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "less than"},
        "none here",
        ["I am"],
    ),
    ("change_case:english_capital", {}, "THIS IS THE WAY.", ["This is the way.", "ЭТО ОЧЕНЬ ПРОСТО"]),
    ("change_case:english_lowercase", {}, "this is the way.", ["This is the way.", "das ist der weg und nicht das."]),
    ("punctuation:no_comma", {}, "No; none", ["Yes, one"]),
]


def test_every_instruction_of_the_paper_has_a_check_and_a_case():
    assert len(CHECKS) == 25
    assert {name for name, *_ in CASES} == CHECKS.keys()


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_a_check_knows_who_follows_and_who_does_not(name, arguments, good, bad):
    assert CHECKS[name](good, arguments)
    assert [reply for reply in bad if CHECKS[name](reply, arguments)] == []


def test_other_relations_are_refused():
    with pytest.raises(ValueError, match="at most"):
        compared(1, "at most", 2)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No mark", 1),
        ("It costs 3.50. Why?", 2),
        ("Dr. Ames met J. Smith, e.g. at noon. He left.", 2),
        ("Apples, pears etc. Then more.", 2),
        ("Apples, pears etc. and more.", 1),
        ('He said "Go!" Then he left...', 2),
        ("One (really.) Two", 2),
    ],
)
def test_sentences_are_counted_as_a_reader_would(text, count):
    assert num_sentences(text) == count


def test_words_in_capitals_are_cut_as_in_the_treebank():
    assert num_capital_words("I'M SURE. Not IT, but A/B and NASA's (USA)") == 7  # I 'M SURE IT A/B NASA USA


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The lamp is on the table and it is not mine.", "en"),
        ("La casa es de los niños y no está lejos.", "es"),
        ("Nous sommes dans la maison avec les enfants.", "fr"),
        ("Isto não é para você, mas é uma casa.", "pt"),
        ("Questo non è il libro che ho, ma è anche mio.", "it"),
        ("Hän on kotona, mutta se ei ole hyvä.", "fi"),
        ("Hii ni nyumba ya watu wa kijiji na ni kubwa.", "sw"),
        ("Tôi không biết điều đó, nhưng đây là một ngôi nhà.", "vi"),
        ("To jest dom, ale nie wiem, czy on jest mój.", "pl"),
        ("यह एक अच्छा दिन है और मैं खुश हूँ।", "hi"),
        ("हे एक घर आहे आणि ते माझे नाही.", "mr"),
        ("यो मेरो घर हो र त्यो पनि छ।", "ne"),
        ("Это очень простой ответ, и мы его знаем.", "ru"),
        ("Це дуже проста відповідь і її знають.", "uk"),
        ("هذا هو الجواب الصحيح إلى السؤال.", "ar"),
        ("این یک پاسخ خوب است که می‌گویم.", "fa"),
        ("یہ ایک اچھا جواب ہے اور میں خوش ہوں۔", "ur"),
        ("پاکستان جنوبی ایشیا کا ایک ملک ہے۔ اس کی آبادی بہت زیادہ ہے اور لوگ مختلف زبانیں بولتے ہیں۔", "ur"),
        ("گلگت بلتستان کی جھیلیں گرمیوں میں دیکھنے کے قابل ہیں کیونکہ پہاڑوں پر برف پگھلتی ہے۔", "ur"),
        ("ایران کشوری در غرب آسیا است و پایتخت آن تهران، بزرگ‌ترین شهر کشور، در دامنهٔ البرز قرار دارد.", "fa"),
        ("Так, звичайно, можна.", "uk"),
        ("Так можно, но не всегда.", "ru"),
        ("Това е моят дом и аз го обичам много.", "bg"),
        ("これは日本語の文です。", "ja"),
        ("这是一个答案。", "zh"),
        ("이것은 답입니다.", "ko"),
        ("ఇది ఒక సమాధానం.", "te"),
        ("12 + 30 = 42", None),
    ],
)
def test_the_language_of_a_sentence(text, language):
    assert language_of(text) == language


def test_without_a_known_word_the_script_decides():
    assert may_be_in("Zebra", "en")
    assert may_be_in("Zebra", "de")
    assert not may_be_in("Zebra", "hi")
    assert may_be_in("123", "hi")
    assert may_be_in("kissa nukkuu matolla.", "en")  # too few words to tell


def test_many_words_of_which_none_is_known_are_not_in_a_language():
    turkish = "Kedi bugün pencerenin önünde sessizce uyuyor çünkü hava çok soğuk."
    assert language_of(turkish) is None
    assert not may_be_in(turkish, "en")
    assert not may_be_in(turkish, "de")


def rows(**changes):
    row = {"key": 1, "prompt": "Say hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return [("rows, row 1", row | changes)]


def test_numbers_of_paragraphs_may_be_written_as_floats():
    given = {"num_paragraphs": 2.0, "nth_paragraph": 2.0, "first_word": "then"}
    (item,) = read(rows(instruction_id_list=[NTH], kwargs=[given]))
    assert followed(item, "First this.\n\nThen that.") == [True]


def test_loose_tries_eight_replies():
    assert loosened("Sure!\n*a*\nBye") == [
        "Sure!\n*a*\nBye",
        "*a*\nBye",
        "Sure!\n*a*",
        "*a*",
        "Sure!\na\nBye",
        "a\nBye",
        "Sure!\na",
        "a",
    ]


def test_strict_and_loose_by_prompt_and_by_instruction():
    names = ["detectable_format:json_format", "punctuation:no_comma", "startend:end_checker"]
    (item,) = read(rows(instruction_id_list=names, kwargs=[{}, None, {"end_phrase": "}"}]))
    found = score(item, [SuiteAnswer(replies=('Sure!\n{"a": 1}',))])
    assert found["instruction_strict"] == [0.0, 1.0, 1.0]
    assert found["instruction_loose"] == [1.0, 1.0, 1.0]  # without its first line the reply is JSON
    assert (found["prompt_strict"], found["prompt_loose"]) == ([0.0], [1.0])
    assert found["instruction_strict/detectable_format"] == [0.0]


def test_an_empty_reply_follows_nothing_even_what_forbids():
    (item,) = read(rows())
    assert followed(item, " \n") == [False]
    assert score(item, [SuiteAnswer(replies=("",))])["prompt_loose"] == [0.0]


def test_loose_is_never_below_strict_on_random_replies():
    generator = random.Random(0)
    pieces = ["*", "a,", "\n", "***", "******", '"', "[x]", "<<t>>", "{}", "The end.", " ", "P.S."]
    items = [read(rows(instruction_id_list=[name], kwargs=[given]))[0] for name, given, *_ in CASES]
    for _ in range(200):
        reply = "".join(generator.choices(pieces, k=12))
        for item in items:
            found = score(item, [SuiteAnswer(replies=(reply,))])
            assert found["prompt_loose"] >= found["prompt_strict"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction_id_list": ["made:up"]}, "no check for the instruction 'made:up'"),
        ({"kwargs": []}, "no lists of one length"),
        ({"kwargs": ["no"]}, "a table for each instruction"),
        ({"instruction_id_list": [["punctuation:no_comma"]]}, "no check for the instruction"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "lamp"}]}, "no list of texts"),
        ({"instruction_id_list": ["keywords:existence"]}, "KeyError"),
        ({"instruction_id_list": ["length_constraints:number_words"], "kwargs": [AT_MOST]}, "at most"),
        ({"instruction_id_list": [NTH], "kwargs": [PARAGRAPHS | {"nth_paragraph": 0}]}, "of 2"),
        ({"instruction_id_list": [NTH], "kwargs": [PARAGRAPHS | {"num_paragraphs": "x"}]}, "'x'"),
        ({"instruction_id_list": [NTH], "kwargs": [{"num_paragraphs": 2, "nth_paragraph": 1}]}, "first_word"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "tlh"}]}, "language 'tlh'"),
        ({"prompt": " "}, "no text under 'prompt'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_checked_are_refused(changes, said):
    with pytest.raises(DataError, match=said) as refused:
        read(rows(**changes))
    assert "row 1" in str(refused.value)
