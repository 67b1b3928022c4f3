"""vLLM as a form of decoding: its engine computes the logits, and trimtab draws from them.

A logits processor takes the place of vLLM's own sampling. It gives the logits of each step to the same `ReplyBuffer`
that the local forms fill, so random numbers, temperature, truncation, log-probabilities, stop tokens and stop texts are
those of the local sampler, and replies depend on no batch, process or restart. vLLM is then told the drawn token as the
only possible one. For that, its engine runs in this process; only this file imports it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from trimtab.core.errors import EngineError
from trimtab.engines.local.replies import ReplyBuffer
from trimtab.engines.samplers.weights import WEIGHTS_FILE, SamplerStart

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where the logits processor finds its buffer
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS says
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality


class TakesDraws(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each row by the `ReplyBuffer` that is being filled."""

    replies: ReplyBuffer | None = None
    """The buffer of the replies being drawn; there is one engine in a process, and one call at a time."""

    def __init__(self, _config: Any, _device: torch.device, _pinned: bool) -> None:
        self.rows: dict[int, tuple[int, list[int]]] = {}
        """By the row of the logits: the number of its reply, and the tokens drawn so far, a list that vLLM extends."""

    def is_argmax_invariant(self) -> bool:
        """False: it decides the token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows which reply stands in which row."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, drawn in batch_update.added:
            self.rows[row] = (params.extra_args["reply"], drawn)
        for a, b, way in batch_update.moved:
            first, second = self.rows.pop(a, None), self.rows.pop(b, None)
            if first is not None:
                self.rows[b] = first
            if second is not None and way == MoveDirectionality.SWAP:
                self.rows[a] = second

    def apply(self, logits: Tensor) -> Tensor:
        """The logits [n, V], in which all tokens but the one drawn are impossible."""
        if self.replies is None or not self.rows:  # vLLM computes a few rows of its own while it starts
            return logits
        rows = sorted(self.rows)
        replies, places = zip(*((self.rows[r][0], len(self.rows[r][1])) for r in rows), strict=True)
        tokens, _ = self.replies.draw(logits[rows], torch.tensor(replies), torch.tensor(places))
        logits[rows] = -torch.inf
        logits[torch.tensor(rows), tokens] = 0.0
        return logits


_BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes for which vLLM can make room."""


class VllmForm:
    """Decodes with vLLM; see `DecodingForm`."""

    name = "vllm"

    def __init__(self, start: SamplerStart) -> None:
        self.start = start
        cpu = start.device == "cpu"
        options: dict[str, Any] = {
            "model": start.model,
            "tokenizer": start.tokenizer,
            "dtype": start.precision,
            "max_model_len": start.max_length,
            "max_num_seqs": start.batch_size,
            "enforce_eager": cpu,  # compiling takes minutes on a CPU
            "enable_prefix_caching": True,
            "async_scheduling": False,  # a token is known before the next one is computed
            "generation_config": "vllm",  # no settings of sampling from the model's directory
            "seed": 0,
            "logits_processors": [TakesDraws],
            "disable_log_stats": True,
        }
        if start.rank:
            options |= {"enable_lora": True, "max_lora_rank": _room_for(start.rank), "max_loras": 1}
        options |= (
            {"kv_cache_memory_bytes": cache_bytes(start)} if cpu else {"gpu_memory_utilization": start.gpu_memory}
        )
        self.engine = LLMEngine.from_engine_args(EngineArgs(**options))
        self.adapter: LoRARequest | None = None
        self._names: frozenset[str] | None = None
        self._requests = 0

    def decode(self, prompts: Sequence[Sequence[int]], group_size: int, replies: ReplyBuffer) -> None:
        """Draws `group_size` replies to each prompt into `replies`; see `DecodingForm`."""
        stop_ids = sorted(replies.stop_ids)
        numbers: dict[str, int] = {}
        TakesDraws.replies = replies
        try:
            for i, limit in enumerate(replies.limits.tolist()):
                params = SamplingParams(
                    max_tokens=limit,
                    temperature=0.0,
                    detokenize=False,
                    ignore_eos=True,
                    stop_token_ids=stop_ids,
                    extra_args={"reply": i},
                )
                self._requests += 1
                name = str(self._requests)
                numbers[name] = i
                prompt = {"prompt_token_ids": list(prompts[i // group_size])}
                self.engine.add_request(name, prompt, params, lora_request=self.adapter)
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if not output.finished and replies.stopped[numbers[output.request_id]]:  # by a stop text
                        self.engine.abort_request([output.request_id])
        finally:
            TakesDraws.replies = None
            if self.engine.has_unfinished_requests():  # after an error
                self.engine.abort_request(list(numbers))

    def update(self, directory: Path, revision: int) -> None:
        """Takes the weights or the adapter in `directory`, and forgets keys and values of older ones.

        Raises EngineError if the weights are not those of this model, all of them.
        """
        if self.start.rank:
            # vLLM keeps an adapter by its number, so each revision has a new one.
            self.adapter = LoRARequest(f"revision-{revision}", revision + 1, str(directory))
            self.engine.add_lora(self.adapter)
            unbound = self.engine.collective_rpc(_unbound, args=(revision + 1,))[0]
            if unbound:
                raise EngineError(
                    f"vLLM has no place for {len(unbound)} parts of the adapter, such as {unbound[0]!r}",
                    where="engine.sampler",
                    fix="choose other layers with adapter.modules, or sample with engine.sampler.name = 'local'",
                )
        else:
            weights = load_file(directory / WEIGHTS_FILE)
            names = frozenset(weights)
            if self._names is not None and names != self._names:
                raise _other_names(names, self._names)
            self._names = names
            missing = self.engine.collective_rpc(_reload, args=(weights,))[0]
            if missing:
                raise _other_names(names, names | missing)
        self.forget()

    def forget(self) -> None:
        """Lets go of the keys and values of all prompts."""
        if not self.engine.reset_prefix_cache():
            raise EngineError(
                "vLLM kept keys and values of older weights",
                where="the prefix cache",
                fix="please report this; it refuses to forget while it computes, and nothing is being computed",
            )


def _room_for(rank: int) -> int:
    if rank > _LORA_RANKS[-1]:
        raise EngineError(
            f"an adapter of rank {rank}; vLLM takes ranks up to {_LORA_RANKS[-1]}",
            where="adapter.rank and engine.sampler",
            fix="train a smaller adapter, or sample with engine.sampler.name = 'local'",
        )
    return next(n for n in _LORA_RANKS if n >= rank)


def cache_bytes(start: SamplerStart) -> int:
    """Room for the keys and values of `batch_size` of the longest replies, but at most `cache_gb`. vLLM takes all of it
    at once."""
    config = AutoConfig.from_pretrained(start.tokenizer).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each: int = 2 * config.num_hidden_layers * heads * size * (2 if start.precision == "bfloat16" else 4)
    length = (start.max_length // _BLOCK + 2) * _BLOCK
    return min(int(start.cache_gb * 2**30), start.batch_size * length * each)


def _reload(worker: Any, weights: Mapping[str, Tensor]) -> set[str]:
    """Gives vLLM's model new weights, in its worker. Returns the names of those that were not among them."""
    runner = worker.model_runner
    model = runner.get_model()
    load, loaded = model.load_weights, set()

    def noting(given: Any) -> set[str]:
        found: set[str] = load(given)
        loaded.update(found)
        return found

    model.load_weights = noting
    try:
        runner.reload_weights(weights_iterator=iter(weights.items()))
    finally:
        del model.load_weights
    pack_tied_head(model)
    return {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()} - loaded


def _unbound(worker: Any, number: int) -> list[str]:
    """The layers of an adapter that vLLM would leave out without a word; a sign for an adapter of which it takes
    nothing at all."""
    manager = worker.model_runner.lora_manager._adapter_manager
    layers = set(manager.get_adapter(number).loras)
    return sorted(layers - set(manager.modules)) if layers else ["all of it"]


def pack_tied_head(model: Any) -> None:
    """Packs a head that shares the embedding again. On a CPU vLLM multiplies by a packed copy of the head, which a new
    embedding does not change."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear") and getattr(model.config, "tie_word_embeddings", False):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _other_names(found: frozenset[str], expected: frozenset[str] | set[str]) -> EngineError:
    lacking, further = sorted(expected - found), sorted(found - expected)
    said = [
        f"{len(names)} {word}, such as {names[0]!r}"
        for word, names in (("lacking", lacking), ("unknown", further))
        if names
    ]
    return EngineError(
        f"the weights for the sampler are not those of its model: {'; '.join(said)}",
        where="engine.sampler",
        fix="please report this, with the model's architecture",
    )
