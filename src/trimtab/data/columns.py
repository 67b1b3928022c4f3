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
_PLURAL_COMPLETION = ("targets", "outputs")
"""Names of a reply if they hold a text; a list or an object under them is several replies."""
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "contents")
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "system_msg",
          "system_text", "system_content", "sys_prompt", "sys_msg", "sys", "preamble", "developer_message")  # fmt: skip
"""A column with the system turn."""
_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("chat_history", "conversation_history", "dialogue_history", "dialog_history", "message_history",
                     "previous_turns", "previous_messages", "past_messages", "prior_turns", "prior_messages"),
                    "history"),
    "inputs": "input", "instructions": "instruction",
}  # fmt: skip
"""Further names of a column, each with the one that it has here."""
CONTEXT = ("input", "context", "passage", "passages")
"""Names of text that belongs to the question but stands in a column of its own."""
OPTIONS = ("choices", "options")
"""Names of the options of a question, of which a reply may be the letter."""
_ONE_OPTION = re.compile(r"(?:opt(?:ion)?|choice)[ _-]?[a-h1-9]|op[a-e]|[A-E]", re.IGNORECASE)
"""A column with one of the options."""
BACKGROUND = frozenset({"article", "articles", "document", "documents", "doc", "docs", "paragraph", "paragraphs",
                        "passage", "passages", "context", "contexts", "ctx", "evidence", "story", "background",
                        "scenario", "excerpt", "excerpts", "snippet", "snippets", "transcript", "dialogue", "dialog",
                        "email", "premise", "hypothesis"})  # fmt: skip
"""Words in the names of texts that a question may be about. Such a text becomes part of the prompt only under a name of
`CONTEXT`."""
_ASKS_TOO = frozenset({"definition", "task", "task_description", "task_definition", "user_query", "user_message",
                       "user_input", "user_request", "request", "prompts", "questions", "body", "question_body", "text",
                       "content", "source_text", "code", "schema", "db_schema", "table", "abstract", "sentence",
                       "sentence1", "sentence2", "support"})  # fmt: skip
"""Names of columns that say what is asked if they hold a text that neither the prompt nor the reply states."""
PART_OF_PROMPT = frozenset({*SYSTEM, *CONTEXT, "history"})
_ABOUT_SYSTEM = frozenset({"id", "model", "name", "version", "fingerprint", "operating", "os", "type", "score"})
WEIGHT = frozenset({"weight", "sample_weight", "loss_weight", "loss_mask", "sampling_weight", "example_weight",
                    "importance_weight", "completion_mask", "assistant_mask", "assistant_masks", "train_detail",
                    "training_detail"})  # fmt: skip
REASONING = frozenset({"reasoning", "reasoning_content", "reasoning_details", "thinking", "thinking_blocks", "think",
                       "thoughts", "thought", "chain_of_thought", "cot", "complex_cot"})  # fmt: skip
_OF_MAKING = frozenset({"judge", "judgement", "judgment", "judging", "labelling", "labeling", "label", "evaluation",
                        "eval", "annotation", "annotator", "critique", "critic", "grader", "rater", "guidelines",
                        "rubric", "generation", "raw", "rationale", "feedback", "explanation", "comment"})  # fmt: skip
_REASONING_WORDS = frozenset({"reasoning", "thinking", "think", "thoughts", "thought", "cot", "trajectory",
                              "trajectories"})  # fmt: skip
_ABOUT_REASONING = frozenset({"type", "mode", "effort", "level", "budget", "length", "tokens", "id", "score", "judge",
                              "prompt"})  # fmt: skip
UNREAD: Mapping[str, str] = {
    **dict.fromkeys(("tools", "functions", "available_tools", "tool_definitions", "tool_schemas", "tool_list",
                     "function_list", "function_definitions", "available_functions", "apis", "api_list",
                     "chat_template_kwargs"), "tools"),
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "image_path", "image_base64", "images_list", "img",
                     "image_paths", "image_file", "image_files", "image_bytes", "img_path", "picture", "pictures",
                     "photo", "photos", "pixel_values", "audio", "audios", "audio_path", "audio_file", "video",
                     "videos", "video_path", "video_file"), "not text"),
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
    for score in ("score", "rating", "reward", "votes", "upvotes")
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
                     "failed", "valid", "invalid", "vote", "votes", "upvotes", "downvotes", "likes", "dislikes",
                     "reaction", "bad", "negative", "incorrect", "wrong", "unhelpful", "hallucination",
                     "hallucinated", "deleted", "discarded"})  # fmt: skip
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
     *RATING, *_STEPS, *_PLURAL_COMPLETION, *(name for pair in (*PAIRS, *SIDES, *SCORES_OF_PAIR) for name in pair),
     "labels", "margin", "facts", "id", "annotator", "winner_model_a", "winner_model_b", "winner_tie",
     "score_a", "score_b", "score_0", "score_1", "score_2", "answers", "responses", "generations", "rank", "text",
     "role", "message_id", "parent_id", "message_tree_id", *CALLS}
)  # fmt: skip
_BY_LETTERS = {
    **{name.replace("_", ""): plain for name, plain in _OTHER_NAMES.items()},
    **{name.replace("_", ""): name for name in sorted(KNOWN, reverse=True)},
}


@lru_cache(maxsize=4096)
def plain_name(column: str) -> str:
    """The name in `KNOWN` that a column has, whatever stands between its words: "system_prompt" for "System Prompt",
    "system-prompt" and "systemPrompt", and "history" for "chat_history". The column itself if there is none."""
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
    """Whether the name of a column is that of a text that a question may be about, or that says what is asked."""
    if plain_name(column) in PART_OF_PROMPT:
        return False
    return column.strip().lower() in _ASKS_TOO or not BACKGROUND.isdisjoint(_words(column))


def is_option(column: str) -> bool:
    """Whether the name of a column is that of the options of a question, or of one of them."""
    return plain_name(column) in OPTIONS or bool(_ONE_OPTION.fullmatch(column.strip()))


def tells_system(column: str) -> bool:
    """Whether the name of a column is that of a system turn that is called by none of the names in `SYSTEM`."""
    return plain_name(column) not in SYSTEM and "system" in _words(column) and _ABOUT_SYSTEM.isdisjoint(_words(column))


def tells_judge(column: str) -> bool:
    """Whether the name of a column is that of what somebody was told who judged or wrote the rows."""
    return not _OF_MAKING.isdisjoint(_words(column))


def tells_reasoning(column: str) -> bool:
    """Whether the name of a column is that of the reasoning behind a reply."""
    words = _words(column)
    return not _REASONING_WORDS.isdisjoint(words) and _ABOUT_REASONING.isdisjoint(words)


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
    by_field = (n for n in MESSAGES if n in have and is_by_field(sample[have[n]]))
    name = (
        first(MESSAGES, kinds=(list,))
        or next(by_field, "")
        or ("" if "prompt" in have else first(MESSAGES, kinds=(str,)))
    )
    if name and str(sample[have[name]]).lstrip()[:1] in ("[", "{"):  # not a dialogue written as plain text
        rename(name, "prompt" if _comes_before(sample[have[name]], sample.get(have.get("chosen", ""))) else "messages")
    if "messages" not in have and (name := first(PROMPT, kinds=(str, list, dict))):
        rename(name, "prompt")
    one_reply = not {"chosen", "response_b", *_STEPS} & have.keys()
    if one_reply and (name := first(COMPLETION, kinds=(str, list, dict)) or first(_PLURAL_COMPLETION, kinds=(str,))):
        if name != "answer":
            rename(name, "completion")
        elif have.get("prompt") != "prompt":  # beside "prompt", an answer is what a verifier looks for
            rename(name, "worked_answer")
    name = first(LABEL, kinds=(bool, int, float, str)) if one_reply else None
    if name is not None and (name in LABEL[:2] or thumb(sample[have[name]]) is not None):
        rename(name, "label")
    return found


def is_by_field(value: Any) -> bool:
    """Whether a value holds messages field by field, {"role": ["user", …], "content": ["Hi", …]}, as tables that
    `datasets` makes of a `Sequence` of objects do."""
    if not isinstance(value, dict) or not {"role", "from"} & value.keys():
        return False
    return all(isinstance(field, list) for field in value.values()) and len(set(map(len, value.values()))) == 1


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
