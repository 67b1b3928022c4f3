"""The processes that draw replies from one role, together as one form of decoding.

Each has weights of its own, which it gets as files when `sync` is called. Replies of older weights would be trained on
unseen, so nothing is drawn before a process has shown that it has the new ones: all names of weights agree, the
revision does (the count of changes), and some tokens that it draws after a fixed prompt have the log-probabilities of
the policy here. The prompt is longer than a block of vLLM's cache of prompts, so that kept keys and values of older
weights are noticed too.

A process that ends is started again and draws its share of the replies anew. They are the same replies, because each
has its own random numbers.
"""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import EngineError
from trimtab.core.terminal import note
from trimtab.data.chat import Chat
from trimtab.engines.device import SamplerSettings
from trimtab.engines.local.agreement import logprob_difference
from trimtab.engines.local.form_choice import FormChoice
from trimtab.engines.local.replies import ReplyBuffer, Sampling
from trimtab.engines.local.sampler import LocalSampler
from trimtab.engines.local.token_sets import stop_ids, unnamed_tokens
from trimtab.engines.samplers.process import ProcessLost, SamplerProcess
from trimtab.engines.samplers.weights import (
    SamplerStart,
    Scratch,
    base_and_rank,
    refuse_rounded_base,
    write_revision,
)
from trimtab.engines.spread import deal
from trimtab.models.precision import Precision
from trimtab.models.roles import Policy

PROBE_PROMPT, PROBE_REPLY = 160, 8
"""Tokens of the fixed prompt, and of the reply to it. vLLM's cache has blocks of up to 128 tokens."""
PROBE_BOUND: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of a log-probability of the probe, in nats. In float32 engines differ by rounding, about 1e-5."""
MAX_RESTARTS, RESTART_WINDOW = 3, 10
"""If processes end more often than this within so many calls, the run ends."""


class SamplerPool:
    """A form of decoding whose processes have weights of their own; see `DecodingForm`."""

    def __init__(
        self,
        policy: Policy,
        chat: Chat,
        settings: SamplerSettings,
        sampling: Sampling,
        *,
        revision: Callable[[], int],
        whole: Callable[[], AbstractContextManager[None]],
        limit_seconds: float,
    ) -> None:
        """Starts the processes and gives them the weights as they are.

        `revision` counts the changes of the policy's weights, which it has inside `whole()`. A call that takes longer
        than `limit_seconds` ends the run. `sampling` gives the limits of prompts, replies and memory; other settings of
        it may differ from call to call.
        """
        refuse_rounded_base(policy)
        self.policy = policy
        self.chat = chat
        self.settings = settings
        self.sampling = sampling
        self.name: str = settings.name
        self.num_restarts = 0
        """How often a process was started again."""
        self.difference = 0.0
        """The largest difference of a log-probability, in nats, when the weights were last shown to be the policy's."""
        self._current = revision
        self._whole = whole
        self._limit = limit_seconds
        self._scratch = Scratch()
        self._processes: list[SamplerProcess] = []
        self.close = weakref.finalize(self, _end, self._processes, self._scratch)
        """Ends the processes."""
        config = policy.model.config.get_text_config()
        length = sampling.max_prompt_tokens + sampling.max_new_tokens
        self._max_length = max(PROBE_REPLY + 1, min(length, getattr(config, "max_position_embeddings", None) or length))
        self._revision = -1
        self._probed: dict[int, ReplyBuffer] = {}
        self._calls = 0
        self._restarts: list[int] = []
        chat.tokenizer.save_pretrained(self._scratch.path / "tokenizer")
        policy.model.config.save_pretrained(self._scratch.path / "tokenizer")  # without it no tokenizer is read
        self.sync()

    def sync(self) -> None:
        """Gives the processes the weights as they are now, if they have changed, and shows that they have them.

        Raises EngineError if a process has other weights; then nothing that it drew may be used.
        """
        revision = self._current()
        if revision == self._revision:
            return
        with self._whole():
            write_revision(self.policy, self._directory(revision), self._dtype)
            before, self._revision = self._revision, revision
            for number in range(len(self._processes), self.settings.processes):
                self._processes.append(self._started(number + 1))
            self._everywhere("update", {"directory": str(self._directory(revision)), "revision": revision})
            self._show_agreement()
        shutil.rmtree(self._directory(before), ignore_errors=True)

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """Draws `group_size` replies to each prompt into `replies`, with the weights of the last `sync`."""
        shares = deal([len(prompt) for prompt in prompts], len(self._processes))
        rows = [torch.tensor([i * group_size + g for i in share for g in range(group_size)]) for share in shares]
        given = [
            self._share([prompts[i] for i in share], group_size, replies, of)
            for share, of in zip(shares, rows, strict=True)
            if share
        ]
        for columns, of in zip(self._each("sample", given), (of for of in rows if len(of)), strict=True):
            replies.fill(of, columns)

    def peaks_rss_gb(self) -> list[float]:
        """The most memory that each process has held."""
        return self._everywhere("peak_rss_gb", {})

    def _share(
        self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer, rows: Tensor
    ) -> dict[str, Any]:
        return {
            "revision": self._revision,
            "prompts": [list(p) for p in prompts],
            "group_size": group_size,
            "uniforms": replies.uniforms[rows],
            "limits": replies.limits[rows],
            "sampling": replies.sampling,
            "stop_ids": sorted(replies.stop_ids),
            "unnamed": replies.unnamed,
        }

    def _show_agreement(self) -> None:
        """Compares what each process draws after the fixed prompt with the policy. Raises EngineError."""
        buffers = [self._probe_buffer() for _ in self._processes]
        given = [self._share([self._probe], 1, buffer, _ONLY) for buffer in buffers]
        for i, columns in enumerate(self._each("sample", given)):
            buffers[i].fill(_ONLY, columns)
            self.difference = logprob_difference(self.policy, [self._probe], 1, buffers[i])
            self._refuse(i, self.difference)
            self._probed[i] = buffers[i]

    def _show_again(self, i: int) -> None:
        """Compares what a process that was started again draws after the fixed prompt with what the one before it
        drew; the policy itself may have moved on. Raises EngineError."""
        if (before := self._probed.get(i)) is None:
            return
        buffer = self._probe_buffer()
        self._processes[i].call("sample", **self._share([self._probe], 1, buffer, _ONLY))
        buffer.fill(_ONLY, self._processes[i].answer())
        same = bool((buffer.tokens == before.tokens).all())
        self._refuse(i, float((buffer.logprobs - before.logprobs).abs().max()) if same else math.inf)

    def _refuse(self, i: int, difference: float) -> None:
        bound = max(PROBE_BOUND[precision] for precision in (self.policy.precision, self.sampling.precision))
        if not difference <= bound:
            raise EngineError(
                f"sampler {i + 1} has other weights than the policy: after {self._revision} changes they were sent to "
                f"it, and differ by {difference:.3g} nats on the same token (bound: {bound})",
                where=f'engine.sampler.name = "{self.name}", architecture {type(self.policy.model).__name__}',
                fix='set engine.sampler.name = "local", and please report this; nothing was trained on its replies',
            )

    def _probe_buffer(self) -> ReplyBuffer:
        """An empty buffer for the reply to the fixed prompt."""
        draw = torch.Generator().manual_seed(1)
        uniforms = torch.rand(1, PROBE_REPLY, generator=draw, dtype=torch.float64)
        sampling = replace(self.sampling, temperature=self.policy.temperature, top_p=1.0, top_k=0, stop=())
        return ReplyBuffer(uniforms, sampling, self.chat, stop_ids=(), unnamed=self._unnamed)

    @cached_property
    def _unnamed(self) -> Tensor | None:
        return unnamed_tokens(self.policy, self.chat)

    @cached_property
    def _probe(self) -> list[int]:
        """The fixed prompt, of ordinary tokens: special ones may stand for an image, or end a reply."""
        size = self.policy.model.config.get_text_config().vocab_size
        special = stop_ids(self.policy, self.chat) | set(self.chat.tokenizer.all_special_ids)
        allowed = [i for i in range(size) if i not in special and (self._unnamed is None or not self._unnamed[i])]
        draw = torch.Generator().manual_seed(0)
        length = max(1, min(PROBE_PROMPT, self._max_length - PROBE_REPLY))
        return [allowed[i] for i in torch.randint(len(allowed), (length,), generator=draw).tolist()]

    @property
    def _dtype(self) -> torch.dtype:
        """That of the weights that are sent. The forms of this package round products and not weights."""
        in_16_bits = self.name == "vllm" and self.sampling.precision == "bfloat16"
        return torch.bfloat16 if in_16_bits else torch.float32

    # --- the processes ---

    def _directory(self, revision: int) -> Path:
        return self._scratch.path / f"revision-{revision}"

    def _started(self, number: int) -> SamplerProcess:
        """A process that has loaded the model, but not yet this revision of its weights."""
        base, rank = base_and_rank(self.policy)
        start = SamplerStart(
            engine=self.name,
            model=base or str(self._directory(self._revision)),
            tokenizer=str(self._scratch.path / "tokenizer"),
            rank=rank,
            device=self.settings.device,
            gpu_memory=self.settings.gpu_memory,
            precision=self.sampling.precision,
            temperature=self.policy.temperature,
            max_length=self._max_length,
            batch_size=self.sampling.batch_size,
            cache_gb=self.sampling.cache_gb,
            threads=torch.get_num_threads(),
        )
        python = self.settings.python if self.name == "vllm" else None
        options: Any = {"python": python, "scratch": self._scratch.path, "limit": self._limit}
        return SamplerProcess(start, number=number, **options)

    def _everywhere(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        return self._each(method, [arguments] * len(self._processes))

    def _each(self, method: str, given: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The answers of the first processes to one call each. One that ends is started again and asked again."""
        self._calls += 1
        for i, arguments in enumerate(given):
            self._begin(i, method, arguments)
        return [self._answer(i, method, arguments) for i, arguments in enumerate(given)]

    def _begin(self, i: int, method: str, arguments: Mapping[str, Any]) -> None:
        while True:
            try:
                return self._processes[i].call(method, **arguments)
            except ProcessLost as lost:
                self._restart(i, lost)

    def _answer(self, i: int, method: str, arguments: Mapping[str, Any]) -> Any:
        while True:
            try:
                return self._processes[i].answer()
            except ProcessLost as lost:
                self._restart(i, lost)
                self._begin(i, method, arguments)

    def _restart(self, i: int, lost: ProcessLost) -> None:
        """Starts a process again, with the weights of the last `sync`. Raises EngineError if it ends too often."""
        while True:
            self._count_restart(i, lost)
            self._processes[i] = process = self._started(i + 1)
            self._refuse_closed()
            try:
                process.call("update", directory=str(self._directory(self._revision)), revision=self._revision)
                process.answer()
                return self._show_again(i)
            except ProcessLost as again:
                lost = again

    def _refuse_closed(self) -> None:
        """Raises EngineError, with every process ended, if the pool was closed while a thread was drawing."""
        if not self.close.alive:
            _end(self._processes, self._scratch)
            raise EngineError("the run ends", where="engine.sampler", fix="see what ended it")

    def _count_restart(self, i: int, lost: ProcessLost) -> None:
        self._refuse_closed()
        self._restarts = [at for at in self._restarts if at > self._calls - RESTART_WINDOW] + [self._calls]
        self._processes[i].close()
        if len(self._restarts) > MAX_RESTARTS:
            last_words = self._processes[i].last_words()
            self.close()
            raise EngineError(
                f"{lost}, and processes ended {len(self._restarts)} times in {RESTART_WINDOW} calls; its last words:\n"
                + last_words,
                where="engine.sampler",
                fix="start the same command again: it goes on from the last checkpoint. If they were killed for want "
                "of memory, lower sampling.cache_gb or sampling.batch_size; if they are slow, raise "
                "engine.timeout_seconds",
            )
        note(f"{lost}; it is started again")
        self.num_restarts += 1


class PooledSampler(LocalSampler):
    """A sampler whose replies a pool draws. Its weights are those of the last `sync`, which has compared them."""

    def __init__(self, policy: Policy, chat: Chat, sampling: Sampling, *, pool: SamplerPool) -> None:
        """`pool` draws from this policy."""
        choice = FormChoice(type(policy.model).__name__, pool, {})
        super().__init__(policy, chat, sampling, choice=choice, watched=False)
        self.pool = pool

    @property
    def may_draw_meanwhile(self) -> bool:
        """True: those of the last sync."""
        return True

    def sync(self) -> None:
        """Takes the policy's weights as they are now; raises EngineError if that fails in any process."""
        self.pool.sync()

    def _decode(self, prefixes: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """Fills `replies` by the processes. The policy is left alone: others may be computing with it."""
        self.pool.decode(prefixes, group_size, replies)


_ONLY = torch.tensor([0])


def _end(processes: Sequence[SamplerProcess], scratch: Scratch) -> None:
    for process in processes:
        process.close()
    scratch.remove()
