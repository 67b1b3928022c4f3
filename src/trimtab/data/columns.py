"""Column names by their meaning: the names that files use for one thing, and the one name that it has here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

PROMPT = ("prompt", "instruction", "question", "query", "problem", "user_prompt", "input", "context", "history", "post")
"""Names of a prompt, the likeliest first."""
COMPLETION = ("completion", "response", "output", "reply", "solution", "answer", "target")
"""Names of a reply, the likeliest first. "solution" comes before "answer": beside it, an answer is only its result."""
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt", "sys", "preamble")
"""A column with the system turn."""
CONTEXT = ("input", "context", "passage", "passages")
"""Names of text that belongs to the question but stands in a column of its own."""
OPTIONS = ("choices", "options")
"""Names of the options of a question, of which a reply may be the letter."""
BACKGROUND = frozenset({"article", "articles", "document", "documents", "doc", "docs", "paragraph", "paragraphs",
                        "passage", "passages", "context", "contexts", "ctx", "evidence", "story", "background",
                        "scenario"})  # fmt: skip
"""Words in the names of texts that a question may be about. Such a text becomes part of the prompt only under a name of
`CONTEXT`."""
PART_OF_PROMPT = frozenset({*SYSTEM, *CONTEXT, "history"})
WEIGHT = frozenset({"weight", "sample_weight", "loss_weight", "loss_mask"})
REASONING = frozenset({"reasoning", "reasoning_content", "reasoning_details", "thinking", "thinking_blocks", "think",
                       "thoughts", "thought", "chain_of_thought", "cot", "complex_cot"})  # fmt: skip
UNREAD: Mapping[str, str] = {
    **dict.fromkeys(("tools", "functions", "available_tools", "tool_definitions", "tool_schemas",
                     "chat_template_kwargs"), "tools"),
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "image_path", "image_base64", "images_list", "img",
                     "audio", "audios", "video", "videos"), "not text"),
}  # fmt: skip
"""Columns, and fields of messages, that change what they stand in and that no record here can hold, each with what it
holds."""
CALLS = frozenset({"tool_calls", "tool_call", "function_call", "function_calls"})
"""Fields of a message with calls of tools."""
PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_completion", "rejected_completion"),
    ("response_j", "response_k"),
    ("accepted", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred_output", "non_preferred_output"),
    ("winner", "loser"),
    ("better", "worse"),
)
"""Names of the better and the worse reply."""
_SCORE_OF = tuple(
    pattern.format(score)
    for score in ("score", "rating", "reward")
    for pattern in ("{}_{{}}", "{{}}_{}", "{{}}_avg_{}", "{{}}_{}s")
)
SCORES_OF_PAIR = tuple((name.format("chosen"), name.format("rejected")) for name in _SCORE_OF)
"""Names of a score of the better and of the worse reply."""
SIDES = (
    *((f"{name}_a", f"{name}_b") for name in ("response", "reply", "answer", "completion", "output", "human_ref")),
    *((f"{name}_{i}", f"{name}_{i + 1}") for i in (1, 0) for name in ("response", "output", "answer", "completion")),
    *((f"{name}{i}", f"{name}{i + 1}") for i in (1, 0) for name in ("response", "output", "answer", "completion")),
    ("conversation_a", "conversation_b"),
)
"""Names of two replies that do not say which reply is the better one."""
CHOICE = ("choice", "winner", "preference", "preferred", "label", "labels", "better_response_id", "overall_preference",
          "preference_strength")  # fmt: skip
"""Names of the column that says which of two replies was preferred."""
LABEL = ("label", "kto_tag", "thumb", "thumbs", "thumbs_up", "liked", "is_good", "desirable", "is_desirable",
         "feedback", "accepted", "is_accepted", "upvoted", "correct", "is_correct")  # fmt: skip
"""Names of a thumb up or down on one reply."""
RATING = ("rating", "ratings", "score", "stars", "overall_rating", "overall_score", "helpfulness", "quality", "grade",
          "reward", "reward_score")  # fmt: skip
"""Names of a number on one reply."""
JUDGING = frozenset({"rating", "ratings", "score", "stars", "grade", "reward", "rank", "quality", "thumb", "thumbs",
                     "verdict", "correctness", "safe", "unsafe", "toxic", "toxicity",
                     "harmful", "harmless", "helpful", "helpfulness", "preferred", "chosen", "rejected", "selected",
                     "accepted", "approved", "flagged", "upvoted", "downvoted", "liked", "disliked", "passed",
                     "failed", "valid", "invalid", "votes", "upvotes", "downvotes", "likes",
                     "dislikes"})  # fmt: skip
"""Words in the names of columns with a number or thumb on one reply, such as "human_rating" and "is_safe". Some are
true for good replies and some for bad ones."""
_NOT_OF_REPLIES = frozenset({"prompt", "instruction", "instruct", "question", "query", "input", "problem",
                             "difficulty", "complexity", "language", "lang", "educational", "edu", "perplexity",
                             "similarity", "confidence", "count", "num", "number", "index", "id", "repo",
                             "best"})  # fmt: skip
"""Words by which such a column is about something else than one reply."""
_STEPS = ("completions", "steps")

# Every name above, and the names that records use. Other columns become facts or are not used.
KNOWN = frozenset(
    {*PROMPT, *COMPLETION, *MESSAGES, *PART_OF_PROMPT, *OPTIONS, *REASONING, *WEIGHT, *UNREAD, *CHOICE, *LABEL,
     *RATING, *_STEPS, *(name for pair in (*PAIRS, *SIDES, *SCORES_OF_PAIR) for name in pair), "labels", "margin",
     "facts", "id", "annotator", "winner_model_a", "winner_model_b", "winner_tie",
     "score_a", "score_b", "score_0", "score_1", "score_2", "answers", "responses", "generations", "rank", "text",
     "role", "message_id", "parent_id", "message_tree_id", *CALLS}
)  # fmt: skip
_BY_LETTERS = {name.replace("_", ""): name for name in sorted(KNOWN, reverse=True)}


@lru_cache(maxsize=4096)
def plain_name(column: str) -> str:
    """The name in `KNOWN` that a column has, whatever stands between its words: "system_prompt" for "System Prompt",
    "system-prompt" and "systemPrompt". The column itself if there is none."""
    plain = column.strip().lower().replace(" ", "_")
    return plain if plain in KNOWN else _BY_LETTERS.get(re.sub(r"[\s_-]", "", plain), column)


def _words(column: str) -> frozenset[str]:
    """The words of a name: "human" and "rating" for "human_rating", "Human Rating" and "humanRating"."""
    return frozenset(re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower()))


def judges_replies(column: str) -> bool:
    """Whether the name of a column is that of a number or thumb on one reply."""
    words = _words(column)
    of_pair = any(plain_name(column) in names for names in SCORES_OF_PAIR)
    return not of_pair and not JUDGING.isdisjoint(words) and _NOT_OF_REPLIES.isdisjoint(words)


def tells_background(column: str) -> bool:
    """Whether the name of a column is that of a text that a question may be about."""
    return plain_name(column) not in PART_OF_PROMPT and not BACKGROUND.isdisjoint(_words(column))


CHANGES_A_ROW = frozenset({*PART_OF_PROMPT, *REASONING, *WEIGHT, *UNREAD})
"""Columns that are used or refused in any row that has them, whatever the layout."""

_UP = frozenset({"true", "yes", "y", "good", "up", "thumbs up", "thumb up", "1", "1.0", "+1", "+", "👍", "like",
                 "liked", "upvote", "desirable", "positive", "pos", "accept", "accepted", "correct",
                 "chosen"})  # fmt: skip
_DOWN = frozenset({"false", "no", "n", "bad", "down", "thumbs down", "thumb down", "0", "0.0", "-1", "-1.0", "-", "👎",
                   "dislike", "disliked", "downvote", "undesirable", "negative", "neg", "reject", "rejected",
                   "incorrect", "wrong"})  # fmt: skip


def thumb(value: Any) -> bool | None:
    """True for a thumb up, False for a thumb down, in any spelling; None for any other value."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return True if value == 1 else False if value in (0, -1) else None
    if isinstance(value, str):
        word = value.strip().lower().replace("_", " ")
        for spelled in (word, word.replace("-", " ")):  # "-1" and "-" are thumbs too
            if spelled in _UP or spelled in _DOWN:
                return spelled in _UP
    return None


def names_of(columns: frozenset[str], sample: Mapping[str, Any], rare: frozenset[str] = frozenset()) -> dict[str, str]:
    """The columns of a file that have another name here, each with that name, for example {"question": "prompt"}.

    See `plain_name` for the spellings. `sample` holds a value of each column. `rare` are columns that few rows fill
    in: they do not decide the layout, but a system turn in another spelling is recognised in these rows too. If a file
    has two spellings of a column that changes a row, both are that column: no row may fill in both.
    """
    found: dict[str, str] = {}
    have: dict[str, str] = {}  # from the plain name to the name in the file
    for column in sorted(columns):
        plain = plain_name(column)
        taken = plain != column and (plain in columns or plain in have)
        have[column if taken else plain] = column
        if plain != column and (not taken or plain in CHANGES_A_ROW):
            found[column] = plain
    for column in sorted(rare):
        plain = plain_name(column)
        if plain != column and plain in CHANGES_A_ROW:
            found[column] = plain

    def rename(old: str, new: str) -> None:
        if old != new:
            found[have[old]] = new
            have[new] = have.pop(old)

    def first(names: Sequence[str], *, kinds: tuple[type, ...]) -> str | None:
        return next((n for n in names if n in have and isinstance(sample.get(have[n]), kinds)), None)

    for one, other in PAIRS:
        if one in have and other in have and isinstance(sample.get(have[one]), str | list | dict):
            for old, new in _scores_of(one, other):
                if set(old) <= have.keys() and not set(new) & have.keys():
                    rename(old[0], new[0])
                    rename(old[1], new[1])
            rename(one, "chosen")
            rename(other, "rejected")
            break
    if "chosen" not in have:
        for a, b in SIDES:
            if a in have and b in have and _third(b) not in have:
                rename(a, "response_a")
                rename(b, "response_b")
                break
    if "response_b" in have and (name := first(CHOICE, kinds=(str, int, float))):
        rename(name, "choice")
    name = first(MESSAGES, kinds=(list,)) or ("" if "prompt" in have else first(MESSAGES, kinds=(str,)))
    if name and str(sample[have[name]]).lstrip()[:1] in ("[", "{"):  # not a dialogue written as plain text
        rename(name, "prompt" if _comes_before(sample[have[name]], sample.get(have.get("chosen", ""))) else "messages")
    if "messages" not in have and (name := first(PROMPT, kinds=(str, list, dict))):
        rename(name, "prompt")
    one_reply = not {"chosen", "response_b", *_STEPS} & have.keys()
    if one_reply and (name := first(COMPLETION, kinds=(str, list, dict))):
        if name != "answer":
            rename(name, "completion")
        elif have.get("prompt") != "prompt":  # beside "prompt", an answer is what a verifier looks for
            rename(name, "worked_answer")
    name = first(LABEL, kinds=(bool, int, float, str)) if one_reply else None
    if name is not None and (name in LABEL[:2] or thumb(sample[have[name]]) is not None):
        rename(name, "label")
    return found


def _scores_of(one: str, other: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """The names that scores of two columns may have, each with what they are called here: for "response_j" and
    "response_k", the pair "score_j" and "score_k" is "score_chosen" and "score_rejected"."""
    words = [name.split("_") for name in (one, other)]
    better_word, worse_word = (
        next((word for word in mine if word not in its), mine[0]) for mine, its in (words, words[::-1])
    )
    for score, new in zip(_SCORE_OF, SCORES_OF_PAIR, strict=True):
        for better, worse in ((one, other), (better_word, worse_word)):
            yield (score.format(better), score.format(worse)), new


def _third(second: str) -> str:
    """The name that a third reply would have: "response_c" after "response_b"."""
    return second[:-1] + chr(ord(second[-1]) + 1)


def _comes_before(messages: Any, chosen: Any) -> bool:
    """Whether a conversation is the prompt that both replies of a pair answer, and not one of the replies."""
    first = chosen[0] if isinstance(chosen, list) and chosen else chosen
    speaks = (first.get("role") or first.get("from")) if isinstance(first, dict) else "assistant"
    last = messages[-1] if isinstance(messages, list) and messages else {}
    asked = isinstance(last, dict) and (last.get("role") or last.get("from")) in ("user", "human")
    return chosen is not None and asked and speaks in ("assistant", "gpt")
