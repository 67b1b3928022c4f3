"""Finds the facts that a help desk reply gets wrong: the item, its days, its state, the limit, and the side of it."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator

from trimtab.worlds.helpdesk_grammar import HARMS, ITEMS, PEOPLE, STATES, Facts
from trimtab.worlds.helpdesk_numbers import OTHER_UNITS, amounts, is_number
from trimtab.worlds.helpdesk_reading import NEGATIONS, SAYINGS, ReplyReading, Sentence, words_of

_ITEMS = frozenset(ITEMS)
_REASONS = frozenset(reason for reason, _ in HARMS.values())
_STATES = frozenset(state for states in STATES.values() for state in states)
_ARTICLES = frozenset({"the", "your", "this", "that", "a", "an", "our", "my", "any", "such", "every", "each"})
# Words that stand for the item without naming it.
_GENERIC = frozenset(
    {
        "it", "this", "that", "them", "you", "item", "items", "product", "order", "purchase", "money", "price",
        "request", "one", "policy", "which", "there", "days", "limit",
    }
)  # fmt: skip
# Items whose names are verbs too: they name a thing only after an article or an action.
_VERBS_TOO = frozenset({"saw", "watch", "drill", "fan", "clock", "heater"})
_ADJECTIVES = frozenset({"new", "old", "whole", "full", "entire", "same"}) | _STATES
# Words other than a thing that may follow "refund" or "repair".
_AFTER_ACTION = frozenset(
    {
        "is", "are", "was", "has", "because", "since", "as", "and", "but", "for", "now", "today", "not", "under", "by",
        "in", "within", "past", "if", "when", "at", "with", "or", "we", "i", "to", "here", "after", "would", "will",
        "can", "have", "on", "so", "again", "please", "of", "only", "must", "needs", "does", "then", "too",
    }
)  # fmt: skip
# Words that may be said of the item, besides its states.
_PREDICATES = frozenset(
    {
        "within", "past", "bought", "private", "probably", "an", "a", "the", "approved", "possible", "covered", "no",
        "so", "refunded", "repaired", "stealing", "over", "beyond", "too", "late", "in", "on", "out", "under", "older",
        "more", "less", "eligible", "our", "this", "that", "why", "because", "what", "with", "expired", "outside",
        "inside", "before", "after", "declined", "denied", "refused", "rejected", "granted", "here", "fine", "clear",
        "like", "accepted", "impossible", "not",
    }
)  # fmt: skip

_OBJECT = re.compile(r" (?:refund|repair)(?:ed|s)?(?: for| of| on)?((?: \w+){1,4})")
_HELP_OBJECT = re.compile(r" help(?: \w+)? with((?: \w+){1,3})")
_PREDICATE = re.compile(
    r" (\w+ )?(\w+) (?:is|was|has been|were|looks)( not| never)?(?: also| still| now| only| well| just)? (\w+)"
)
_LATE = re.compile(
    r" (?:past|expired|exceeds|exceeded|exceed|overdue|too late|was late|is late|are late)\b"
    r"| limit (?:is|was) (?:long )?(?:gone|over)\b"
    r"| (?:over|beyond|outside|after|more than|longer than|older than) (?:the |our |your |its )?(?:limit|policy|\d)"
)
_IN_TIME = re.compile(
    r" (?:within|in time|on time|not late)\b"
    r"| (?:under|inside|before|less than|fewer than) (?:the |our |your |its )?(?:limit|\d)"
)
# "Our policy: refund within 30 days" states the rule, and not on which side of it the item is.
_NO_LIMIT = re.compile(r" no (?:limit|policy)\b")
_COVERS_NOT = re.compile(r" (?:policy|we) (?:does|do) not cover (?:(?:that|it|this)\b|(?:a|an|any) (\w+)s?\b)")
_TOO = re.compile(r" (?:is|was|looks) too (\w+)")
# Words for people and for what somebody did, of which a reply knows what the customer wrote and no more.
_TOLD = frozenset({"opened", "broke", "broken", "thief", "liar", "lying", "stole", *PEOPLE})
_COVERS_IT = re.compile(r" (?:policy|we) (?:covers?|does cover) (?:that|it|this)\b")
_RULE = re.compile(r" (?:refund|repair)s?(?: is| are)?(?: only| possible| allowed)* within\b")
_CLAUSES = re.compile(r" (?:and|but|because|since|so|while|as) ")

_LONG_TIMES = OTHER_UNITS | {"week", "weeks", "fortnight", "yesterday"}
_VAGUE = frozenset({"a", "an", "last", "next", "half", "few", "couple", "some", "this"})
_LIMIT_WORDS = frozenset({"limit", "within", "past", "policy", "over", "beyond", "have", "window", "exceeds", "under"})


def false_facts(facts: Facts, says: ReplyReading) -> frozenset[str]:
    """Names of the facts that the reply gets wrong: item, topic, days, limit, number, state, side, claim, or invented.

    What it quotes from the customer ("You write: ...") is the customer's claim: there, only wrong items and numbers
    count.
    """
    found: set[str] = set()
    if facts["claim"] and says.agrees:
        found.add("claim")
    if facts["topic"] and says.words & _REASONS - {HARMS[facts["topic"]][0]}:
        found.add("reason")
    for sentence in says.sentences:
        found.update(_wrong_items(facts, sentence))
        found.update(_wrong_numbers(facts, sentence))
        if sentence.is_quote:
            continue
        found.update(_wrong_objects(facts, sentence))
        for clause in _CLAUSES.split(sentence.text):
            found.update(_wrong_states(facts, f" {clause.strip()} "))
            found.update(_wrong_sides(facts, f" {clause.strip()} "))
    return frozenset(found)


def gives_limit(facts: Facts, says: ReplyReading) -> bool:
    """Whether the reply gives the policy's days and the side of them on which the item is."""
    gives_days = any(number == facts["window"] for s in says.sentences for number, _, _ in s.amounts)
    return gives_days and any(_LATE.search(s.text) or _IN_TIME.search(s.text) for s in says.sentences)


def _wrong_items(facts: Facts, sentence: Sentence) -> Iterator[str]:
    """Yields "item" for each other item of the shop, and "topic" for each other topic of harm, named anywhere."""
    before = ""
    for word in sentence.words:
        item = word if word in _ITEMS else word.removesuffix("s")
        is_named = item in _ITEMS and (item not in _VERBS_TOO or before in _ARTICLES or before in STATES)
        if is_named and item != facts["item"]:
            yield "item"
        if facts["topic"] and word in HARMS and word != facts["topic"]:
            yield "topic"
        before = word


def _wrong_objects(facts: Facts, sentence: Sentence) -> Iterator[str]:
    """Yields "item" or "topic" for a decision about a thing that the ticket is not about, and "invented" for a property
    that the ticket does not give the item."""
    for match in _OBJECT.finditer(sentence.text):
        if not _is_about(match[1].split(), {facts["item"]}, free=_AFTER_ACTION):
            yield "item"
    if facts["topic"]:
        for match in _HELP_OBJECT.finditer(sentence.text):
            if not _is_about(match[1].split(), {facts["topic"]}, free=frozenset()):
                yield "topic"
    for article, subject, _, predicate in _PREDICATE.findall(sentence.text):
        named = {"item", "purchase", "product", facts["item"]} if article.strip() in ("the", "your", "this") else set()
        is_item = subject in named | {"it"}
        if predicate in _STATES | {"within", "past", "bought"} and not is_item and subject not in _GENERIC:
            yield "item"
        if is_item and predicate not in _PREDICATES and predicate not in _STATES and not is_number(predicate):
            yield "invented"
    for place, word in enumerate(sentence.words):
        if word in ("bought", "purchased") and not _says_when(sentence.words[place + 1 :]):
            yield "invented"


def _is_about(words: list[str], things: set[str], *, free: frozenset[str]) -> bool:
    """Whether the words begin with one of `things`, with a word that stands for it, or with no thing at all."""
    rest = words
    while rest and rest[0] in _ARTICLES and len(rest) > 1:
        rest = rest[1:]
    has_article = len(rest) < len(words)
    while rest and rest[0] in _ADJECTIVES and len(rest) > 1:
        rest = rest[1:]
    return not rest or rest[0] in things or rest[0] in _GENERIC or (not has_article and rest[0] in free)


def _says_when(after: tuple[str, ...]) -> bool:
    """Whether "bought" is followed by how long ago, by the limit, or by nothing."""
    return not after or is_number(after[0]) or after[0] in {"within", "past", "too", "and", "but", "over", "after"}


def _wrong_states(facts: Facts, clause: str) -> Iterator[str]:
    words = clause.split()
    state, asked = facts["state"], STATES[facts["action"]][0]
    if _STATES.isdisjoint(words):
        return
    negated = not NEGATIONS.isdisjoint(words)
    is_rule = not {"cover", "covers", "covered"}.isdisjoint(words)
    for place, word in enumerate(words):
        if word not in _STATES:
            continue
        before, after = words[:place], words[place + 1 : place + 2]
        if is_rule:
            # The policy covers the one state it asks for.
            if negated == (word == asked):
                yield "state"
        elif _is_said_of_item(before):
            if (word == state) == bool(NEGATIONS & set(before[-3:])):
                yield "state"
        elif (before[-1:] and before[-1] in ("the", "your", "this")) or after == [facts["item"]]:
            if word != state:
                yield "state"
        elif word not in (state, asked):
            yield "state"


def _is_said_of_item(before: list[str]) -> bool:
    return any(verb in before[-3:] for verb in ("is", "was", "been", "looks")) and not {"be", "if"} & set(before[-3:])


def _wrong_sides(facts: Facts, clause: str) -> Iterator[str]:
    is_late = facts["days"] > facts["window"]
    if _NO_LIMIT.search(clause):
        yield "limit"
    is_asked = facts["state"] == STATES[facts["action"]][0]
    if _COVERS_IT.search(clause) and not is_asked:
        yield "state"
    for match in _COVERS_NOT.finditer(clause):
        if (match[1] is None and is_asked and not is_late) or match[1] in (facts["item"], "item"):
            yield "state"
    for match in _TOO.finditer(clause):
        if match[1] not in ("late", "long", "old") or not is_late:
            yield "invented"
    told = _TOLD & set(clause.split())
    if told and not told <= set(words_of(facts["message"])):
        yield "invented"
    if _RULE.search(clause):
        return
    for pattern, says_late in ((_LATE, True), (_IN_TIME, False)):
        for match in pattern.finditer(clause):
            denied = not NEGATIONS.isdisjoint(clause[: match.start()].split()[-2:])
            if (says_late != denied) != is_late:
                yield "side"


def _wrong_numbers(facts: Facts, sentence: Sentence) -> Iterator[str]:
    """Yields a name for each wrong amount: it must be the item's days or the policy's, and stand where that belongs."""
    days, window, claim = facts["days"], facts["window"], facts["claim"]
    words = sentence.words
    for number, start, end in sentence.amounts:
        before, after = words[max(0, start - 4) : start], words[end : end + 3]
        is_reported = number == claim and not SAYINGS.isdisjoint(words[:start])
        if sentence.is_quote or is_reported:
            if number not in {days, window, claim} | _amounts_of_customer(facts["message"]):
                yield "number"
            continue
        role = _role(words[max(0, start - 3) : start], before, after)
        is_true = number in {"days": {days}, "limit": {window}, "": {days, window}}[role]
        if not is_true and after[:1] in (("past",), ("late",), ("over",), ("too",), ("left",), ("beyond",), ("more",)):
            is_true = number == (window - days if after[0] == "left" else days - window)
        if not NEGATIONS.isdisjoint(words[max(0, start - 2) : start]):
            is_true = not is_true and number == claim
        if not is_true:
            yield role or "number"
    if sentence.is_quote:
        return
    if not _LONG_TIMES.isdisjoint(words):
        for last, word in itertools.pairwise(words):
            if word == "yesterday" or (word in _LONG_TIMES and last in _VAGUE):
                yield "number"


@functools.lru_cache(maxsize=512)
def _amounts_of_customer(message: str) -> frozenset[int]:
    return frozenset(number for number, _, _ in amounts(words_of(message)))


def _role(near: tuple[str, ...], before: tuple[str, ...], after: tuple[str, ...]) -> str:
    """Which of the ticket's amounts belongs there: "days", "limit", or "" if either may stand there."""
    if after[:1] in (("ago",), ("old",)) or "bought" in near:
        return "days"
    if not _LIMIT_WORDS.isdisjoint(before) or after[:1] in (("limit",), ("policy",)):
        return "limit"
    return ""
