"""Conversations to tokens, and back: the only place that renders a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from trimtab.core.errors import ConfigError, DataError
from trimtab.core.types import Message, MessageRole, Prompt
from trimtab.data.mistakes import Mistake
from trimtab.data.templates import DATE, default_template, only_writes_contents, template_of
from trimtab.data.tokenizers import ModelFacts, choose_pad, refuse_missing_rows
from trimtab.data.words import Words

# A placeholder for the content of turn i while a template is studied. No template writes tabs or private-use characters
# of its own, so the tabs that remain show whether the template strips contents.
_MARK = "\t\ue000{}\ue001\t"
_ASKED = Message("user", "a")
_NOT_IN_ORDER = "the chat template does not write a user turn and an assistant turn one after the other"
_MARKS = re.compile("(\t?)\ue000([0-9]+)\ue001(\t?)")


@dataclass(frozen=True)
class _Skeleton:
    """The text that a template writes around the contents of turns with given roles."""

    pieces: tuple[str, ...]
    """The template's text before the first content, between contents and after the last: one more than turns."""
    strips: tuple[tuple[bool, bool], ...]
    """For each content: whether the template strips blanks on its left and on its right."""

    def fill(self, contents: Sequence[str]) -> tuple[str, ...]:
        """The contents as the template writes them."""
        return tuple(_strip(content, *sides) for content, sides in zip(contents, self.strips, strict=True))


@dataclass(frozen=True)
class _TemplatePart:
    """One part of a rendered conversation: a text that is tokenised alone, or an end token."""

    text: str = ""
    after: str = ""
    """The text before this part. Some tokenizers need it to tokenise the beginning of the part correctly."""
    plain: bool = False
    """Whether special tokens in the text are tokenised as ordinary text."""
    trained: bool = False
    end_id: int | None = None


class Chat:
    """A tokenizer's chat template as token ids, with the mask of what the assistant said.

    The template is the model's own; a tokenizer without one is given `default_template`, so that the model is saved
    with what it was trained on. Three things always hold:

    - The ids of a prompt never depend on the reply: nothing is tokenised across the boundary, so
      `encode_conversation([*prompt, reply])` is `encode_prompt(prompt) + encode_response(reply)`.
    - Every reply ends with one end token, which is trained: the special token with which the template closes an
      assistant turn, or eos if it closes turns with plain text.
    - Contents are plain text: a user who writes "<|assistant|>" does not begin a turn. (Only a template that rewrites
      contents is taken as it is written.)
    """

    end_id: int
    """The token that ends a reply."""
    stop_ids: frozenset[int]
    """The end token of the template, the eos token, and the stop tokens of the model's generation settings; a sampler
    stops at any of them."""
    pad_id: int
    """The padding token. It is never one of `stop_ids`, nor one that the template writes, and the model has a row for
    it: the tokenizer's pad token, else its unk token, else an added token whose name says pad, unused or reserved, else
    another special token, else the first id that does not stop. Padding never enters a loss."""
    pad_is_spare: bool
    """Whether the pad token never stands for a word, so that it can be written into a tokenizer as its pad token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            tokenizer.chat_template = default_template(tokenizer)
        self._template = template_of(tokenizer)
        self._refusals: dict[tuple[MessageRole, ...], Mistake | None] = {}
        self._skeletons: dict[tuple[tuple[MessageRole, ...], bool], _Skeleton | None] = {}
        added = {token.content: (id_, token.special) for id_, token in tokenizer.added_tokens_decoder.items()}
        self._special = {text: id_ for text, (id_, special) in added.items() if special}
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self.words = Words(tokenizer)
        self._study(added)
        facts: ModelFacts | None = getattr(tokenizer, "model_facts", None)
        written = {*self.encode_prompt([_ASKED]), *self.encode_response("a")}
        if facts is not None:
            self.stop_ids |= facts.stop_ids
            refuse_missing_rows(tokenizer, facts.num_rows, written)
        num_ids = len(tokenizer) if facts is None else min(len(tokenizer), facts.num_rows)
        written |= {id_ for text, id_ in self._special.items() if text in self._template}
        self.pad_id, self.pad_is_spare = choose_pad(tokenizer, self.stop_ids, written, num_ids)

    @cached_property
    def highest_id(self) -> int:
        """The largest id of the tokenizer. It exceeds the number of tokens if the ids have gaps."""
        return max(self.tokenizer.get_vocab().values())

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to where the assistant is to speak. Raises DataError if the template refuses the roles."""
        return self._encode_parts(self._prompt_parts(messages, self._render(messages, True)))[0]

    def encode_response(self, text: str, *, ended: bool = True) -> list[int]:
        """The ids of a reply with its end token, as the template writes it. They are the same after every prompt.
        With `ended=False`, the reply was cut off: its ids end where its text ends."""
        parts = self._response_parts(text, self._render(_exchange(text), False))
        if not ended:
            parts = [replace(parts[0], text=parts[0].text.removesuffix(self._before_end))]
        return self._encode_parts(parts)[0]

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids and the response mask, which is true for each assistant turn and its end token.

        The ids end with the end token of the last turn. If a template rewrites earlier turns (for example, drops their
        reasoning), only the last turn is trained, because the earlier ones are not what was said. Raises DataError
        unless the last turn is the assistant's.
        """
        if not messages or messages[-1].role != "assistant":
            raise DataError(
                "the conversation does not end with an assistant turn, so there is no reply to learn from",
                where=_describe(messages),
                fix="end it with an assistant turn, or use it as a prompt",
            )
        prompt_ids, mask = self._encode_parts(self._prompt_parts(messages[:-1], self._render(messages[:-1], True)))
        response_ids = self.encode_response(messages[-1].content)
        return prompt_ids + response_ids, mask + [True] * len(response_ids)

    # ---- many at once: the same ids in a fraction of the time ------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]] | DataError]:
        """For each prompt, the ids of `encode_prompt` and the mask of earlier replies, or the error that it raises."""
        rendered = self.render_many(prompts, True)
        pairs = zip(prompts, rendered, strict=True)
        parts = [self._prompt_parts(messages, text) for messages, text in pairs if isinstance(text, str)]
        encoded = iter(self._encode_many(parts))
        return [next(encoded) if isinstance(text, str) else text for text in rendered]

    def prompt_ids(self, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of `encode_prompt` for each prompt. Raises the error of the first that it refuses."""
        found = []
        for encoded in self.encode_prompts(prompts):
            if isinstance(encoded, DataError):
                raise encoded
            found.append(encoded[0])
        return found

    def prompt_lengths(self, prompts: Iterable[Prompt]) -> list[int]:
        """The number of tokens of each prompt. Raises as `prompt_ids` does."""
        return [len(ids) for ids in self.prompt_ids([prompt.messages for prompt in prompts])]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of `encode_response` for each reply."""
        rendered = self.render_many([_exchange(text) for text in texts], False)
        parts = []
        for text, written in zip(texts, rendered, strict=True):
            if isinstance(written, DataError):
                raise written  # a template refuses roles, and these are those of every reply
            parts.append(self._response_parts(text, written))
        return [ids for ids, _ in self._encode_many(parts)]

    def encode_inline(self, text: str) -> list[int]:
        """The ids of a text within a reply that is not the assistant's; its special tokens become ordinary text."""
        part = self._inline_part(text)
        return self._encode(part.text, after=part.after, plain=part.plain)

    def encode_user_turn(self, text: str, *, ended: bool) -> list[int]:
        """The ids that come between a reply and the next one: the user's turn, up to where the assistant is to speak.

        With `ended=False`, the reply lacks its end token, and the ids begin with it. Nothing that came before is
        rendered or tokenised again. Raises DataError if the template cannot go on after a reply.
        """
        skeleton = self._skeleton(("user", "assistant", "user"), True)
        if skeleton is None:
            raise DataError(
                "the chat template does not write a user turn after a reply",
                where=f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'}",
                fix="use an environment whose observations stand within the reply, or another chat template",
            )
        _, _, before, after = skeleton.pieces
        before = before.removeprefix(self._before_end + self._end)
        content, after = skeleton.fill(["", "", text])[2], after + self._header
        closing = [] if ended else [*self._encode(self._before_end), self.end_id]
        if self._special_pattern.search(content):
            turn = self._encode(before, after=self._end) + self._encode(content, plain=True) + self._encode(after)
        else:
            turn = self._encode(before + content + after, after=self._end)
        return closing + turn

    @property
    def closings(self) -> tuple[str, str]:
        """The text that the template writes behind a reply, and the text with which a reply ends here."""
        return self._after_reply, self._before_end + self._end

    def holds_special_token(self, text: str) -> bool:
        """Whether a text holds the text of a special token, which a tokenizer would read as that token."""
        return self._special_pattern.search(text) is not None

    def decode_response(self, ids: Sequence[int]) -> str:
        """The text of a reply: `encode_response` backwards, without end and special tokens."""
        kept = [id_ for id_ in ids if id_ not in self.stop_ids]
        text = cast(str, self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return text.removeprefix(self._lead).removesuffix(self._before_end)

    def refusal(self, messages: Sequence[Message]) -> Mistake | None:
        """What is wrong with a prompt for this template: it refuses the conversation, or leaves a turn out. None if
        nothing is wrong.

        What a template leaves out is remembered for the order of roles. Whether it refuses a conversation is so too if
        it only writes contents; other templates may look at the contents, and are asked each time.
        """
        roles = tuple(m.role for m in messages)
        if roles not in self._refusals or not self._only_writes_contents:
            try:
                self._render(messages, True)
            except DataError as error:
                return Mistake("template_refuses", error.problem, error.fix)
        if roles not in self._refusals:
            self._refusals[roles] = self._left_out(messages)
        return self._refusals[roles]

    def _left_out(self, messages: Sequence[Message]) -> Mistake | None:
        marks = [_MARK.format(i) for i in range(len(messages))]
        try:
            marked = self._render([Message(m.role, mark) for m, mark in zip(messages, marks, strict=True)], True)
        except DataError:
            return None  # the contents decide what this template accepts
        # Earlier replies may be rewritten, for example without their reasoning; all else must be shown to the model.
        for i, (message, mark) in enumerate(zip(messages, map(str.strip, marks), strict=True), 1):
            if message.role != "assistant" and mark not in marked and json.dumps(mark)[1:-1] not in marked:
                problem = f"the chat template leaves out the {message.role} turn (turn {i} of {len(messages)})"
                fix = "put its text into a user turn, or give the tokenizer a chat template that writes it"
                return Mistake("template_leaves_out", problem, fix)
        return None

    # ---- studying the template, once ------------------------------------------------------------------------------

    def _study(self, added: dict[str, tuple[int, bool]]) -> None:
        """Finds what stands before a reply and what ends it, by rendering one exchange with marks as contents."""
        place = f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'}"
        fix, problem = "give the tokenizer another chat template, or none to get trimtab's own", _NOT_IN_ORDER
        try:
            asked, exchange = self._skeleton(("user",), True), self._skeleton(("user", "assistant"), False)
        except DataError as error:  # it refuses every conversation
            asked, exchange, problem = None, None, error.problem
        if asked is None or exchange is None:
            raise DataError(problem, where=place, fix=fix)
        _, between, tail = exchange.pieces
        generation_prompt = asked.pieces[-1]
        self._lead = between.removeprefix(generation_prompt) if between.startswith(generation_prompt) else ""
        self._header = ""
        if self._lead.strip() and asked == self._skeleton(("user",), False):
            # If the template has no generation prompt, the text that introduces the assistant's turn is still part of
            # the prompt. A bare blank is not: tokens such as "▁Hello" contain it, and a model samples it with them.
            self._header, self._lead = self._lead, ""
        self._context = generation_prompt + self._header
        self._before_reply = asked.pieces[0] + asked.fill([_ASKED.content])[0] + self._context
        self._after_reply = tail

        ends = [(tail.find(text), text) for text in self._special if text in tail]
        ends = ends or [(tail.find(text), text) for text in added if text.strip() and text in tail]
        eos_id = cast("int | None", self.tokenizer.eos_token_id)
        if ends:
            at, end = min(ends, key=lambda found: (found[0], -len(found[1])))
            self._before_end, self._end, self.end_id = tail[:at], end, added[end][0]
        elif eos_id is not None:
            self._before_end, self._end, self.end_id = "", cast(str, self.tokenizer.eos_token), eos_id
        else:
            raise DataError(
                f"the chat template ends a reply with {tail!r}, which is no special token, and there is no eos token",
                where=place,
                fix="set the eos_token of the tokenizer (tokenizer_config.json)",
            )
        self.stop_ids = frozenset({self.end_id} if eos_id is None else {self.end_id, eos_id})

    def _skeleton(self, roles: tuple[MessageRole, ...], generation_prompt: bool) -> _Skeleton | None:
        """The skeleton for these roles; None if the template does not write every content once and in order."""
        key = roles, generation_prompt
        if key not in self._skeletons:
            marked = [Message(role, _MARK.format(i)) for i, role in enumerate(roles)]
            parts = _MARKS.split(self._render(marked, generation_prompt))
            in_order = parts[2::4] == [str(i) for i in range(len(roles))]
            strips = tuple((not left, not right) for left, right in zip(parts[1::4], parts[3::4], strict=True))
            self._skeletons[key] = _Skeleton(tuple(parts[::4]), strips) if in_order else None
        return self._skeletons[key]

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return cast(str, self._apply_template(_turns(messages), generation_prompt))
        except Exception as error:  # foreign templates fail in many ways, and none of them is a bug of ours
            raise DataError(
                f"the model's chat template refuses the conversation: {error}",
                where=_describe(messages),
                fix="put a system turn's text into the first user turn and let user and assistant alternate, "
                "or give the tokenizer a chat template that allows it",
            ) from error

    def render_many(
        self, conversations: Sequence[Sequence[Message]], generation_prompt: bool
    ) -> Sequence[str | DataError]:
        """The text of `_render` for each conversation, or the error that it raises. A template that only writes
        contents is run once for each order of roles."""
        if self._only_writes_contents:
            return [self._filled(messages, generation_prompt) for messages in conversations]
        try:
            turns = [_turns(messages) for messages in conversations]
            return cast("list[str]", self._apply_template(turns, generation_prompt)) if turns else []
        except Exception:
            return [self._rendered_or_error(messages, generation_prompt) for messages in conversations]

    @cached_property
    def _only_writes_contents(self) -> bool:
        return only_writes_contents(self._template)

    def _filled(self, messages: Sequence[Message], generation_prompt: bool) -> str | DataError:
        """The result of `_rendered_or_error`, for a template that only writes contents."""
        try:
            skeleton = self._skeleton(tuple(m.role for m in messages), generation_prompt)
        except DataError:
            skeleton = None  # so that the error names this conversation
        if skeleton is None:
            return self._rendered_or_error(messages, generation_prompt)
        return _interleave(skeleton.pieces, skeleton.fill([m.content for m in messages]))

    def _rendered_or_error(self, messages: Sequence[Message], generation_prompt: bool) -> str | DataError:
        try:
            return self._render(messages, generation_prompt)
        except DataError as error:
            return error

    def _apply_template(self, turns: list[Any], generation_prompt: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt, **DATE
        )

    # ---- text to ids ----------------------------------------------------------------------------------------------

    def _prompt_parts(self, messages: Sequence[Message], rendered: str) -> list[_TemplatePart]:
        """The parts of a prompt that are tokenised alone; each earlier assistant turn is tokenised as a reply."""
        skeleton = self._skeleton(tuple(m.role for m in messages), True)
        contents = skeleton.fill([m.content for m in messages]) if skeleton else ()
        if skeleton is None or _interleave(skeleton.pieces, contents) != rendered:
            return [_TemplatePart(rendered + self._header)]  # the contents decide what this template writes

        parts: list[_TemplatePart] = []
        text = skeleton.pieces[0]
        after = ""
        for message, content, piece in zip(messages, contents, skeleton.pieces[1:], strict=True):
            if message.role == "assistant":
                lead = self._lead if text.endswith(self._lead) else ""
                parts += [_TemplatePart(text.removesuffix(lead), after=after), *self._reply_parts(lead + content)]
                text, after = piece.removeprefix(self._before_end + self._end), self._end
            elif self._special_pattern.search(content):
                parts += [_TemplatePart(text, after=after), _TemplatePart(content, plain=True)]
                text, after = piece, ""
            else:
                text += content + piece
        return [*parts, _TemplatePart(text + self._header, after=after)]

    def _response_parts(self, text: str, rendered: str) -> list[_TemplatePart]:
        if rendered.startswith(self._before_reply) and rendered.endswith(self._after_reply):
            return self._reply_parts(rendered[len(self._before_reply) : len(rendered) - len(self._after_reply)])
        # The generation prompt of this template already begins the reply, for example with a thought.
        return self._reply_parts(text)

    def _reply_parts(self, written: str) -> list[_TemplatePart]:
        return [self._inline_part(written + self._before_end), _TemplatePart(end_id=self.end_id, trained=True)]

    def _inline_part(self, text: str) -> _TemplatePart:
        plain = bool(self._special_pattern.search(text))
        return _TemplatePart(text, after="" if plain else self._context, plain=plain, trained=True)

    def _encode_parts(self, parts: Sequence[_TemplatePart]) -> tuple[list[int], list[bool]]:
        """The ids of the parts, and the mask of those that are trained."""
        return _put_together(
            parts, [self._encode(part.text, after=part.after, plain=part.plain) for part in parts if part.text]
        )

    def _encode_many(self, examples: Sequence[Sequence[_TemplatePart]]) -> list[tuple[list[int], list[bool]]]:
        """The result of `_encode_parts` for each example."""
        wanted = [part for parts in examples for part in parts if part.text]
        found: dict[int, list[int]] = {}
        for plain in (False, True):
            places = [i for i, part in enumerate(wanted) if part.plain == plain]
            ids = self.words.encode([wanted[i].after + wanted[i].text for i in places], plain=plain)
            before = {after: self._ids(after, plain) for after in {wanted[i].after for i in places} if after}
            over_the_seam = []
            for i, both in zip(places, ids, strict=True):
                start = before.get(wanted[i].after, [])
                found[i] = both[len(start) :] if start else both
                if start and both[: len(start)] != start:
                    over_the_seam.append(i)
            alone = self.words.encode([wanted[i].text for i in over_the_seam], plain=plain)
            found.update(zip(over_the_seam, alone, strict=True))
        ids_in_order = (found[i] for i in range(len(wanted)))
        return [_put_together(parts, [next(ids_in_order) for part in parts if part.text]) for parts in examples]

    def _encode(self, text: str, *, after: str = "", plain: bool = False) -> list[int]:
        """The ids of a text; `after` is the text before it, which some tokenizers need to tokenise its beginning.

        They are the text's ids within `after + text`, unless a token crosses the boundary: then the text is tokenised
        alone. With `plain`, special tokens are tokenised as ordinary text.
        """
        if not text:
            return []
        if after:
            before, both = self._ids(after, plain), self._ids(after + text, plain)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text, plain)

    def _ids(self, text: str, plain: bool) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)
        return cast("list[int]", encoded["input_ids"])


Outcome = Literal["kept", "truncated", "dropped"]


@dataclass(frozen=True)
class Fitted:
    """A prompt that leaves room for its reply. Count the outcomes: `Counter(f.outcome for f in fitted)`."""

    prompt_ids: list[int]
    outcome: Outcome
    """A dropped prompt has no ids."""


def fit(
    prompt_ids: list[int],
    response_ids: list[int],
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    on_too_long: Literal["drop", "truncate_prompt_left"] = "drop",
    bos_id: int | None = None,
) -> Fitted:
    """The prompt cut to at most `max_prompt_length` tokens, and to at most `max_length` together with the reply.

    A reply is never cut, because it would lose its end token: if there is no room for it and one token of the prompt,
    the example is dropped. Cutting removes the beginning of the prompt but keeps `bos_id` in front. Raises ConfigError
    if the prompt could take all the room.
    """
    if max_length < 2 or (max_prompt_length is not None and not 0 < max_prompt_length < max_length):
        raise ConfigError(
            f"max_length={max_length} with max_prompt_length={max_prompt_length} leaves no room for a reply",
            where="max_length, max_prompt_length",
            fix="let max_prompt_length be from 1 to max_length - 1",
        )
    room = max_length - len(response_ids)
    if max_prompt_length is not None:
        room = min(room, max_prompt_length)
    if len(prompt_ids) <= room:
        return Fitted(prompt_ids, "kept")
    kept = prompt_ids[:1] if prompt_ids[:1] == [bos_id] else []
    if on_too_long == "drop" or room <= len(kept):
        return Fitted([], "dropped")
    return Fitted(kept + prompt_ids[len(prompt_ids) - room + len(kept) :], "truncated")


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _exchange(reply: str) -> list[Message]:
    return [_ASKED, Message("assistant", reply)]


def _put_together(parts: Sequence[_TemplatePart], encoded: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
    """The ids and mask of an example; `encoded` holds the ids of those parts that have a text."""
    ids: list[int] = []
    mask: list[bool] = []
    found = iter(encoded)
    for part in parts:
        new = next(found) if part.text else [] if part.end_id is None else [part.end_id]
        ids.extend(new)
        mask.extend([part.trained] * len(new))
    return ids, mask


def _strip(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _interleave(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))


def _describe(messages: Sequence[Message]) -> str:
    first = next((m.content for m in messages if m.role == "user"), "")
    return f"a conversation with the turns {', '.join(m.role for m in messages) or '(none)'}: {first[:60]!r}"
