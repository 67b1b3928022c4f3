"""The 25 checks of IFEval (Zhou et al., arXiv:2311.07911): does a reply follow an instruction that a program can check?

Each check takes the reply and the arguments of its instruction. What counts is settled by the published checker where
the paper leaves it open, for example that bold and italic texts are both highlights. Three checks need more than rules
about characters, and use other means than the published ones: sentences (`num_sentences`), words in capitals
(`num_capital_words`) and the language of a text (`languages.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.evals.suites.languages import may_be_in

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]

CHECKS: dict[str, Check] = {}
"""The check of each instruction, by the instruction's id."""


def _check(name: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return add


def compared(count: int, relation: str, bound: int) -> bool:
    """Whether a count is "at least" or "less than" a bound. Raises ValueError for another relation."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"the relation {relation!r}; it is 'at least' or 'less than'")
    return count >= bound if relation == "at least" else count < bound


# ---- words ----------------------------------------------------------------------------------------------------------


@_check("keywords:existence")
def has_keywords(reply: str, given: Arguments) -> bool:
    """Every keyword occurs, in any case, also within a word."""
    return all(keyword.lower() in reply.lower() for keyword in given["keywords"])


@_check("keywords:forbidden_words")
def lacks_forbidden_words(reply: str, given: Arguments) -> bool:
    """No forbidden word occurs as a whole word, in any case."""
    return not any(re.search(rf"\b{re.escape(word)}\b", reply, re.IGNORECASE) for word in given["forbidden_words"])


@_check("keywords:frequency")
def has_keyword_often(reply: str, given: Arguments) -> bool:
    """How often the keyword occurs, in any case, also within words."""
    count = reply.lower().count(given["keyword"].strip().lower())
    return compared(count, given["relation"], given["frequency"])


@_check("keywords:letter_frequency")
def has_letter_often(reply: str, given: Arguments) -> bool:
    """How often a character occurs, in any case."""
    count = reply.lower().count(given["letter"].strip().lower())
    return compared(count, given["let_relation"], given["let_frequency"])


@_check("language:response_language")
def is_in_language(reply: str, given: Arguments) -> bool:
    """The reply is in this language, as far as `may_be_in` can tell."""
    return may_be_in(reply, given["language"])


@_check("change_case:capital_word_frequency")
def has_capital_words(reply: str, given: Arguments) -> bool:
    """How many words are in capitals."""
    return compared(num_capital_words(reply), given["capital_relation"], given["capital_frequency"])


@_check("change_case:english_capital")
def is_english_in_capitals(reply: str, _given: Arguments) -> bool:
    """English without a small letter."""
    return reply.isupper() and may_be_in(reply, "en")


@_check("change_case:english_lowercase")
def is_english_in_small_letters(reply: str, _given: Arguments) -> bool:
    """English without a capital."""
    return reply.islower() and may_be_in(reply, "en")


@_check("punctuation:no_comma")
def has_no_comma(reply: str, _given: Arguments) -> bool:
    """No comma anywhere."""
    return "," not in reply


# ---- lengths --------------------------------------------------------------------------------------------------------


@_check("length_constraints:number_words")
def has_words(reply: str, given: Arguments) -> bool:
    """How many words; a word is a run of letters, digits and underscores, so that "don't" is two."""
    return compared(len(re.findall(r"\w+", reply)), given["relation"], given["num_words"])


@_check("length_constraints:number_sentences")
def has_sentences(reply: str, given: Arguments) -> bool:
    """How many sentences; see `num_sentences`."""
    return compared(num_sentences(reply), given["relation"], given["num_sentences"])


@_check("length_constraints:number_paragraphs")
def has_paragraphs(reply: str, given: Arguments) -> bool:
    """So many paragraphs between dividers ***; an empty one may stand first or last only, and does not count."""
    parts = [part.strip() for part in reply.split("***")]
    inner = parts[1:-1]
    return all(inner) and sum(bool(part) for part in parts) == int(given["num_paragraphs"])


@_check("length_constraints:nth_paragraph_first_word")
def begins_paragraph_with(reply: str, given: Arguments) -> bool:
    """So many paragraphs between empty lines, one of which begins with a word, in any case.

    Empty paragraphs are not counted, but the paragraph's number counts them, as in the published checker.
    """
    nth, wanted, begin = int(given["nth_paragraph"]), int(given["num_paragraphs"]), str(given["first_word"]).lower()
    if not 1 <= nth <= wanted:
        raise ValueError(f"paragraph {nth} of {wanted}")
    paragraphs = [paragraph.strip() for paragraph in reply.split("\n\n")]
    num = sum(bool(paragraph) for paragraph in paragraphs)
    if num != wanted or not paragraphs[nth - 1]:
        return False
    word = paragraphs[nth - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == begin


# ---- content and format ---------------------------------------------------------------------------------------------


@_check("detectable_content:number_placeholders")
def has_placeholders(reply: str, given: Arguments) -> bool:
    """At least so many placeholders such as [address]."""
    return len(re.findall(r"\[[^\n]*?\]", reply)) >= int(given["num_placeholders"])


@_check("detectable_content:postscript")
def has_postscript(reply: str, given: Arguments) -> bool:
    """The mark of a postscript occurs, in any case; within P.S. and P.P.S. there may be blanks."""
    mark = given["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(patterns.get(mark, re.escape(mark.lower())), reply.lower()))


@_check("detectable_format:number_bullet_lists")
def has_bullets(reply: str, given: Arguments) -> bool:
    """Exactly so many lines that begin with a bullet "*" or "-"; "**" begins bold text."""
    bullets = re.findall(r"^\s*\*[^*].*$", reply, re.MULTILINE) + re.findall(r"^\s*-.*$", reply, re.MULTILINE)
    return len(bullets) == int(given["num_bullets"])


@_check("detectable_format:constrained_response")
def is_constrained_answer(reply: str, _given: Arguments) -> bool:
    """One of the three answers of the instruction occurs."""
    return any(f"My answer is {answer}." in reply for answer in ("yes", "no", "maybe"))


@_check("detectable_format:number_highlighted_sections")
def has_highlights(reply: str, given: Arguments) -> bool:
    """At least so many texts in *italics* or **bold** that are not blank."""
    italics, bold = re.findall(r"\*([^\n*]*)\*", reply), re.findall(r"\*\*([^\n*]*)\*\*", reply)
    return sum(bool(text.strip()) for text in (*italics, *bold)) >= int(given["num_highlights"])


@_check("detectable_format:multiple_sections")
def has_sections(reply: str, given: Arguments) -> bool:
    """At least so many headings of a word and a number, such as "SECTION 1"."""
    heading = re.escape(given["section_spliter"].strip())
    return len(re.findall(rf"{heading}\s?\d+", reply)) >= int(given["num_sections"])


@_check("detectable_format:json_format")
def is_json(reply: str, _given: Arguments) -> bool:
    """The whole reply is JSON, within marks of a code block or without."""
    text = reply.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@_check("detectable_format:title")
def has_title(reply: str, _given: Arguments) -> bool:
    """A text in double angle brackets on one line, such as <<title>>."""
    return any(title.strip("<> \t") for title in re.findall(r"<<[^\n]+>>", reply))


@_check("combination:two_responses")
def has_two_responses(reply: str, _given: Arguments) -> bool:
    """Two different replies with ****** between them."""
    parts = [part.strip() for part in reply.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


@_check("combination:repeat_prompt")
def repeats_prompt(reply: str, given: Arguments) -> bool:
    """The reply begins with the request, in any case."""
    return reply.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


@_check("startend:end_checker")
def ends_with(reply: str, given: Arguments) -> bool:
    """The reply ends with a phrase, in any case; quotation marks around the reply do not count."""
    return reply.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


@_check("startend:quotation")
def is_quoted(reply: str, _given: Arguments) -> bool:
    """The whole reply stands between double quotation marks."""
    text = reply.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


# ---- what the checks count ------------------------------------------------------------------------------------------

_ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "inc", "ltd", "co", "corp", "vs", "etc", "e.g", "i.e",
     "a.m", "p.m",
     "u.s", "u.k", "no", "vol", "fig", "dept", "gen", "col", "capt", "lt", "sgt", "rev", "hon", "jan", "feb",
     "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "approx", "ph.d"}
)  # fmt: skip
_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)")
_PIECES = re.compile(r"\.{3}|--+|[^\s,;:@#$%&?!\"()\[\]{}<>`“”]+")
_CONTRACTION = re.compile(r"(?i)(?<=\w)(n't|'(?:s|m|d|ll|re|ve))$")


def num_sentences(text: str) -> int:
    """The number of sentences: it ends behind ".", "!" or "?" before a blank, except behind an abbreviation or an
    initial that more text follows; what follows the last such mark is a sentence too.

    The published checker uses the Punkt model of NLTK, which learned its abbreviations from newspapers. The two differ
    by an abbreviation that only one of them knows, and behind "etc." and the like.
    """
    count, start = 0, 0
    for end in _END.finditer(text):
        word = text[start : end.start()].split()[-1:] or [""]
        if end[0] == "." and (rest := text[end.end() :].lstrip()):
            known = word[0].lower().lstrip("(\"'*") in _ABBREVIATIONS
            if (known and not (word[0].lower() == "etc" and rest[0].isupper())) or re.fullmatch("[A-Z]", word[0]):
                continue
        count += bool(text[start : end.end()].strip())
        start = end.end()
    return count + bool(text[start:].strip())


def num_capital_words(text: str) -> int:
    """The number of words without a small letter and with a capital: "I" is one, and "CO-OP" too.

    Words are cut as in the Penn Treebank: at blanks and punctuation but not at hyphens and slashes, and before 's, 'm,
    n't and the like. The published checker uses NLTK's tokenizer, which cuts a few further contractions.
    """
    words = [part for piece in _PIECES.findall(text) for part in _CONTRACTION.sub(r" \1", piece).split()]
    return sum(word.isupper() for word in words)
