"""Uses a checkpoint: generates to a file, scores a file, or chats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.core import config, seeds
from trimtab.core.errors import ConfigError
from trimtab.core.files import check_out, json_lines, write_out
from trimtab.core.hub import reward_facts
from trimtab.core.terminal import note, say
from trimtab.core.types import Demonstration, Message, PreferencePair, Prompt, to_dict
from trimtab.data.chat import Chat
from trimtab.data.layouts import Loaded, OnBadRow, kinds_of, load
from trimtab.data.questions import further_turns
from trimtab.data.sources import records_source
from trimtab.engines.device import device_of
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.evals.answers import Conversation, answer_rows
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.reports.card_sentences import card_sentences
from trimtab.rewards.length_correction import corrections_in
from trimtab.rewards.model import RewardModel
from trimtab.rewards.process import ProcessReward
from trimtab.rewards.scorer import TOKEN_BUDGET, finite_scores, rewards_of
from trimtab.stages.card import Texts, measure, of_reading, reply_lengths, rewards_of_sides


def _generator(model: str, *, temperature: float, device: str | None, top_k: int = 0, **sampled: Any) -> LocalSampler:
    """A sampler for a checkpoint. Temperature 0 means its limit, the likeliest token."""
    values = {"top_k": 1} if temperature == 0 else {"temperature": temperature, "top_k": top_k}
    sampling = config.resolve(Sampling, values | sampled, where="the command line")
    chat = Chat(load_tokenizer(model))
    loaded = load_causal(model, device=device_of(device))
    policy = Policy(loaded, pad_id=chat.pad_id, temperature=sampling.temperature)
    return LocalSampler(policy, chat, sampling)


def generate_file(
    *,
    model: str,
    data: str | None,
    prompt: str | None,
    out: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    num_samples: int,
    seed: int,
    device: str | None = None,
    limit: int | None = None,
    layout: str | None = None,
    on_bad_row: OnBadRow = "stop",
    show: Callable[[str], None] = say,
) -> int:
    """Samples `num_samples` replies for each prompt; returns how many. They go to `out` as JSON lines of rollouts,
    or through `show` as text if `out` is None.

    With a `layout` of `ANSWER_ROWS`, questions of several turns are asked turn by turn, and the file holds the answers
    of a model with the name of the file. With `on_bad_row` "drop", rows that are no prompts are left out and counted.
    """
    if layout is not None and (out is None or data is None):
        raise ConfigError(
            "answers in a layout are read from questions and written into a file",
            where="--layout",
            fix="give both, such as --data question.jsonl --out model_answer/NAME.jsonl",
        )
    if (data is None) == (prompt is None):
        raise ConfigError("give either a prompt or a data file", where="generate", fix="--prompt TEXT or --data FILE")
    check_out(out)
    if data is not None:
        loaded = load(Prompt, data, limit=limit, on_bad_row=on_bad_row)
        prompts = loaded.records
        if loaded.num_dropped:
            note(loaded.left_out)
    else:
        prompts = [Prompt(messages=(Message("user", prompt or ""),))]
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    generator = _generator(model, device=device, max_new_tokens=max_new_tokens, **drawn)
    if layout is not None and out is not None:
        choices = answer_turns(generator, prompts, num_samples=num_samples, seed=seed)
        rows = answer_rows(layout, out.stem, list(zip(prompts, choices, strict=True)))
        write_out(out, json_lines(rows))
        return sum(len(choice) for own in choices for choice in own)
    if num := sum(bool(further_turns(prompt)) for prompt in prompts):
        note(f"{num} questions have further turns; --layout fastchat asks them too")
    rollouts = generator.generate(prompts, group_size=num_samples, seed=seed)
    if out is None:
        for r in rollouts:
            show(r.response)
    else:
        write_out(out, json_lines(map(to_dict, rollouts)))
    return len(rollouts)


def answer_turns(
    generator: LocalSampler, prompts: Sequence[Prompt], *, num_samples: int, seed: int
) -> list[list[Conversation]]:
    """For each prompt `num_samples` conversations: its question and the reply, and each further turn with the reply to
    it. All conversations of a turn are drawn together."""
    turns = [(prompt.text, *further_turns(prompt)) for prompt in prompts for _ in range(num_samples)]
    talks = [prompt.messages for prompt in prompts for _ in range(num_samples)]
    said: list[list[tuple[str, str]]] = [[] for _ in turns]
    rollouts = generator.generate(prompts, group_size=num_samples, seed=seed)
    here = list(range(len(turns)))
    for turn in range(max(map(len, turns))):
        if turn > 0:
            here = [i for i in here if turn < len(turns[i])]
            asked = [Prompt(messages=(*talks[i], Message("user", turns[i][turn]))) for i in here]
            rollouts = generator.generate(asked, group_size=1, seed=seeds.derive(seed, "turn", turn))
        for i, rollout in zip(here, rollouts, strict=True):
            said[i].append((turns[i][turn], rollout.response))
            talks[i] = (*rollout.prompt.messages, Message("assistant", rollout.response))
    return [list(said[i : i + num_samples]) for i in range(0, len(said), num_samples)]


def score_file(
    *,
    model: str,
    data: str,
    out: Path | None,
    device: str | None = None,
    on_bad_row: OnBadRow = "stop",
    show: Callable[[str], None] = print,
) -> int:
    """Scores the rows of `data` with a reward model; returns how many. They go to `out` as JSON lines, if it is given.
    With "drop", rows that cannot be used are left out, and `show` says how many.

    Each reply (in any layout, or in a rollout) gets a `reward`, and of a process model its `step_rewards` too. A
    preference pair gets one for each side, and the card of the reward model on the pairs is shown: how often it orders
    them as they are labelled, and what might explain it. Raises EngineError for a text that the model cannot read, and
    for a reward that is not finite.
    """
    check_out(out)
    if holds_pairs(data):
        return _score_pairs(
            model, load(PreferencePair, data, on_bad_row=on_bad_row), data, out, device_of(device), show
        )
    if out is None:
        raise ConfigError("replies are scored into a file", where="score", fix="--out FILE.jsonl")
    loaded = load(Demonstration, data, on_bad_row=on_bad_row)
    demonstrations = loaded.records
    texts = [(one.prompt, one.response) for one in demonstrations]
    given = _of_steps if reward_facts(model).get("reward_kind") == "process" else _of_replies
    rewards = given(model, texts, device_of(device))
    rows = [to_dict(one) | reward for one, reward in zip(demonstrations, rewards, strict=True)]
    write_out(out, json_lines(rows))
    if loaded.num_dropped:
        show(loaded.left_out)
    return len(rows)


def _of_replies(model: str, texts: Texts, device: torch.device) -> list[dict[str, Any]]:
    """The `reward` of each reply."""
    scorer = RewardModel(path=model).load(token_budget=TOKEN_BUDGET, device=device)
    return [{"reward": reward} for reward in rewards_of(scorer, texts).tolist()]


def _of_steps(model: str, texts: Texts, device: torch.device) -> list[dict[str, Any]]:
    """The `reward` of each reply by a process model, and as `step_rewards` the probability that each step is right."""
    scorer = ProcessReward(path=model).load(token_budget=TOKEN_BUDGET, device=device)
    found = scorer.step_probabilities(texts)
    finite_scores(torch.cat(found).double().numpy(), of=scorer.scorer.model)
    return [{"reward": float(scorer.reward_of(own)), "step_rewards": own.tolist()} for own in found]


def _score_pairs(
    model: str,
    loaded: Loaded[PreferencePair],
    data: str,
    out: Path | None,
    device: torch.device,
    show: Callable[[str], None],
) -> int:
    pairs = loaded.records
    scorer = RewardModel(path=model).load(token_budget=TOKEN_BUDGET, device=device)
    chosen, rejected = rewards_of_sides(scorer, pairs)
    card = measure(
        pairs,
        chosen=chosen,
        rejected=rejected,
        score=lambda texts: rewards_of(scorer, texts, unread="nan"),
        lengths=reply_lengths(scorer, pairs),
        corrections=corrections_in(model),
    )
    for sentence in card_sentences(card | of_reading(model, {data: loaded})):
        show(sentence)
    if out is not None:
        rewards = zip(pairs, chosen.tolist(), rejected.tolist(), strict=True)
        rows = [to_dict(pair) | {"reward_chosen": a, "reward_rejected": b} for pair, a, b in rewards]
        write_out(out, json_lines(rows))
    return len(pairs)


def holds_pairs(source: str) -> bool:
    """Whether the source holds pairs of replies rather than replies."""
    own = records_source(source)
    return PreferencePair in kinds_of(source) if own is None else own.natural is PreferencePair


def chat(
    *,
    model: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    device: str | None = None,
    read: Callable[[str], str] = input,
    show: Callable[[str], None] = say,
) -> None:
    """Holds a conversation in the terminal; an empty line or the end of input closes it."""
    generator = _generator(model, device=device, max_new_tokens=max_new_tokens, temperature=temperature)
    prompt = Prompt(messages=())
    turn = 0
    while text := _next_line(read):
        prompt = replace(prompt, messages=(*prompt.messages, Message("user", text)), id="")
        rollout = generator.generate([prompt], group_size=1, seed=seeds.derive(seed, "chat", turn))[0]
        show(rollout.response)
        prompt = replace(prompt, messages=(*prompt.messages, Message("assistant", rollout.response)), id="")
        turn += 1


def _next_line(read: Callable[[str], str]) -> str:
    try:
        return read("you> ").strip()
    except EOFError:
        return ""
