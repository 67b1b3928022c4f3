"""Processes that draw replies: the local sampler's replies, from whatever engine, and every stale weight noticed.

With TRIMTAB_VLLM=PYTHON, an interpreter of an environment with vLLM, the same is asked of vLLM.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from tests import tiny
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core.errors import EngineError
from trimtab.core.types import Message, Prompt
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import load_tokenizer
from trimtab.engines.device import SamplerSettings
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.engines.samplers import pool as pools
from trimtab.engines.samplers import process
from trimtab.engines.samplers.pool import PooledSampler, SamplerPool
from trimtab.engines.samplers.process import SamplerProcess
from trimtab.engines.samplers.weights import SamplerStart, Scratch
from trimtab.models.adapters import LoRA, adapter_parameters, add_adapter
from trimtab.models.load import load_causal
from trimtab.models.roles import Policy
from trimtab.models.save import save_model
from trimtab.stages.pretrain import train_tokenizer

VLLM = os.environ.get("TRIMTAB_VLLM")
ENGINES = [
    "process",
    pytest.param(
        "vllm",
        marks=pytest.mark.skipif(not VLLM, reason="TRIMTAB_VLLM names no interpreter of an environment with vLLM"),
    ),
]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.7, max_prompt_tokens=190, cache_gb=0.1)
PROMPTS = [Prompt(messages=(Message("user", "Where is my lamp? " * n),)) for n in (1, 9, 2, 5, 3)]
CASES = {
    "tied": lambda ids: LlamaConfig(**ids, num_key_value_heads=1, tie_word_embeddings=True),
    "untied": lambda ids: Qwen3Config(**ids, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False),
    "adapter": lambda ids: LlamaConfig(**ids, num_key_value_heads=2, tie_word_embeddings=True),
}


class Drawn:
    """A policy, its pool of processes, and the count of its weights."""

    def __init__(self, engine: str, case: str, directory: Path, *, sampling: Sampling = SAMPLING, **settings) -> None:
        tokenizer = train_tokenizer([*tiny.TEXTS] * 2, 320)
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 2}
        config = CASES[case]({"vocab_size": len(tokenizer), "bos_token_id": None, **shape})
        torch.manual_seed(0)
        save_model(tiny._louder(AutoModelForCausalLM.from_config(config)), tokenizer, directory)
        self.chat = Chat(load_tokenizer(str(directory)))
        model = load_causal(str(directory))
        adapter = "policy" if case == "adapter" else None
        if adapter:
            add_adapter(model, adapter, LoRA(rank=4), seed=0)
        self.policy = Policy(model, pad_id=self.chat.pad_id, temperature=0.7, adapter=adapter)
        self.revision = 0
        python = {"python": VLLM} if engine == "vllm" else {}
        self.pool = SamplerPool(
            self.policy,
            self.chat,
            SamplerSettings(name=engine, **(python | settings)),
            sampling,
            revision=lambda: self.revision,
            whole=nullcontext,
            limit_seconds=240,
        )

    @torch.no_grad()
    def learn(self) -> None:
        """Changes the weights, as an update does."""
        model = self.policy.model
        changed = adapter_parameters(model, "policy").values() if self.policy.adapter else model.parameters()
        draw = torch.Generator().manual_seed(self.revision)
        for weight in changed:
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
        self.revision += 1

    def local(self, sampling: Sampling = SAMPLING) -> LocalSampler:
        return LocalSampler(self.policy, self.chat, sampling)

    def pooled(self, sampling: Sampling = SAMPLING) -> PooledSampler:
        return PooledSampler(self.policy, self.chat, sampling, pool=self.pool)


@pytest.fixture(scope="module", params=[(e, c) for e in ("process", "vllm") for c in CASES], ids=str)
def drawn(request, tmp_path_factory):
    engine, case = request.param
    if engine == "vllm" and not VLLM:
        pytest.skip("TRIMTAB_VLLM names no interpreter of an environment with vLLM")
    made = Drawn(
        engine, case, tmp_path_factory.mktemp(case), processes=2 if (engine, case) == ("process", "tied") else 1
    )
    yield made
    made.pool.close()


def assert_same(ours, theirs, *, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.response_ids, a.response, a.finish_reason) == (b.response_ids, b.response, b.finish_reason)
        assert b.logprobs == pytest.approx(a.logprobs, abs=tolerance)


@pytest.mark.parametrize(
    "changed",
    [{}, {"top_p": 0.8, "top_k": 20}, {"top_k": 1}, {"stop": ("e", "an")}, {"max_new_tokens": 3}],
    ids=lambda changed: ",".join(changed) or "plain",
)
def test_replies_are_those_of_the_local_sampler(drawn, changed):
    sampling = replace(SAMPLING, **changed)
    for group_size in (1, 4):
        options = {"group_size": group_size, "seed": 3}
        assert_same(
            drawn.local(sampling).generate(PROMPTS, **options), drawn.pooled(sampling).generate(PROMPTS, **options)
        )


def test_replies_depend_on_no_order_and_on_no_others(drawn):
    sampler = drawn.pooled()
    whole = sampler.generate(PROMPTS, group_size=2, seed=5)
    turned = sampler.generate(PROMPTS[::-1], group_size=2, seed=5)
    assert_same(sorted(whole, key=lambda r: r.prompt.id), sorted(turned, key=lambda r: r.prompt.id))
    assert_same(whole[4:6], sampler.generate([PROMPTS[2]], group_size=2, seed=5))


def test_replies_follow_the_weights_from_sync_to_sync(drawn):
    sampler = drawn.pooled()
    before = sampler.generate(PROMPTS, group_size=2, seed=7)
    drawn.learn()
    assert_same(before, sampler.generate(PROMPTS, group_size=2, seed=7))  # not yet: the weights are its own
    sampler.sync()
    after = sampler.generate(PROMPTS, group_size=2, seed=7)
    assert_same(drawn.local().generate(PROMPTS, group_size=2, seed=7), after)
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    assert len(list(drawn.pool._scratch.path.glob("revision-*"))) == 1


def test_a_killed_process_is_started_again_and_draws_the_same(drawn, capfd):
    sampler = drawn.pooled()
    expected = sampler.generate(PROMPTS, group_size=2, seed=9)
    drawn.learn()  # the policy moves on; the process that is started again gets the weights of the last sync
    drawn.pool._processes[0].kill()
    assert_same(expected, sampler.generate(PROMPTS, group_size=2, seed=9))
    assert "sampler 1 was killed by SIGKILL; it is started again" in capfd.readouterr().err
    drawn.pool.sync()


def test_a_process_started_again_by_a_thread_outlives_it(drawn):
    """Rollouts that lag are drawn in a thread, which ends before the next ones are drawn in another."""
    sampler = drawn.pooled()
    expected = sampler.generate(PROMPTS, group_size=2, seed=11)
    drawn.pool._processes[0].kill()
    restarts = drawn.pool.num_restarts
    for _ in range(2):
        found = []
        draw = partial(sampler.generate, PROMPTS, group_size=2, seed=11)
        thread = threading.Thread(target=lambda into=found, draw=draw: into.extend(draw()))
        thread.start()
        thread.join()
        time.sleep(0.5)
        assert_same(expected, found)
    assert drawn.pool.num_restarts == restarts + 1


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_in_bfloat16_is_the_local_one_within_its_bound(engine, tmp_path):
    sampling = replace(SAMPLING, precision="bfloat16")
    made = Drawn(engine, "tied", tmp_path / "model", sampling=sampling)
    try:
        made.learn()
        made.pool.sync()
        weights = load_file(made.pool._directory(1) / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.bfloat16 if engine == "vllm" else torch.float32}
        assert "lm_head.weight" not in weights  # it is the embedding
        assert made.pool.difference < 0.1
        options = {"group_size": 2, "seed": 3}
        ours = made.local(sampling).generate(PROMPTS, **options)
        theirs = made.pooled(sampling).generate(PROMPTS, **options)
        if engine == "process":  # the same code: the same rounding
            assert_same(ours, theirs, tolerance=1e-2)
        assert made.pooled(sampling).sampler == f"{engine}, bfloat16"
    finally:
        made.pool.close()


class SlowPool:
    """Draws nothing, and takes its time."""

    name = "slow"

    def decode(self, prompts, group_size, replies):
        time.sleep(0.002)
        replies.lengths[:] = 1


def test_drawing_leaves_the_adapters_of_the_policy_alone(tmp_path):
    """With a lag the reference, which is the base without the adapter, is scored meanwhile."""
    model = tiny.causal("llama")
    add_adapter(model, "policy", LoRA(rank=2), seed=0)
    with torch.no_grad():
        for weight in adapter_parameters(model, "policy").values():
            weight.add_(0.3)
    chat = Chat(load_tokenizer(str(tiny.write_model_directory(tmp_path / "model"))))
    policy = Policy(model, pad_id=0, adapter="policy")
    reference = LocalScorer(Policy(model, pad_id=0, adapter=None), token_budget=64)
    trees = TokenTrees.build([response_tree([3, 4, 5], [[6, 7, 8]])])
    expected = reference.logprobs(trees)
    sampler = PooledSampler(policy, chat, Sampling(max_new_tokens=4), pool=SlowPool())
    ended = threading.Event()

    def draw():
        while not ended.is_set():
            sampler.continue_ids([[3, 4]], group_size=1, uniforms=torch.rand(1, 4, dtype=torch.float64))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert all(torch.equal(reference.logprobs(trees), expected) for _ in range(200))
    finally:
        ended.set()
        thread.join()


def serve_with(fault: str, path: Path, python: str) -> str:
    """An interpreter that serves with a fault: lines of code which run before the server does."""
    script = path / "planted.py"
    script.write_text(
        "from trimtab.engines.samplers import serve\n"
        "def plant():\n" + "".join(f"    {line}\n" for line in fault.splitlines()) + "    return serve.main()\n"
        "if __name__ == '__main__':\n    raise SystemExit(plant())\n"
    )
    wrapper = path / "python"
    wrapper.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exec "{python}" "$@"; fi\nexec "{python}" "{script}"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return str(wrapper)


OF_VLLM = "from trimtab.engines.samplers import vllm_form\n"
FAULTS = {
    "weights that are not taken": (
        "serve.SamplerServer.update = lambda s, *, directory, revision: setattr(s, 'revision', revision)",
        "tied",
    ),
    "an older revision": (
        "serve.SamplerServer.update = lambda s, *, directory, revision: setattr(s, 'revision', 0)",
        "untied",
    ),
    "a tied head": (OF_VLLM + "vllm_form.pack_tied_head = lambda model: None", "tied"),
    "a stale prefix cache": (OF_VLLM + "vllm_form.VllmForm.forget = lambda self: None", "untied"),
    "an adapter under the number of the one before": (
        OF_VLLM + "request = vllm_form.LoRARequest\n"
        "vllm_form.LoRARequest = lambda name, number, path: request('one', 1, path)\n"
        "vllm_form._unbound = lambda worker, number: []",
        "adapter",
    ),
}


def learn_and_sync_twice(made: Drawn) -> None:
    """After the second change an engine that keeps the first one is behind, too."""
    for _ in range(2):
        made.learn()
        made.pool.sync()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_policys_are_refused(fault, engine, tmp_path, monkeypatch):
    code, case = FAULTS[fault]
    if OF_VLLM in code and engine != "vllm":
        pytest.skip("a fault of vLLM")
    python = serve_with(code, tmp_path, VLLM if engine == "vllm" else sys.executable)
    monkeypatch.setattr(sys, "executable", python)
    made = Drawn(engine, case, tmp_path / "model", **({"python": python} if engine == "vllm" else {}))
    try:
        with pytest.raises(EngineError, match=r"has other weights than the policy|were to be drawn from") as refused:
            learn_and_sync_twice(made)
        assert refused.value.fix
    finally:
        made.pool.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_weight_is_named(engine, tmp_path, monkeypatch):
    made = Drawn(engine, "untied", tmp_path)
    write = pools.write_revision

    def without_one(policy, directory, dtype):
        write(policy, directory, dtype)
        weights = load_file(directory / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(pools, "write_revision", without_one)
    made.learn()
    with pytest.raises(EngineError, match="up_proj"):
        made.pool.sync()
    made.pool.close()


@pytest.mark.skipif(not VLLM, reason="TRIMTAB_VLLM names no interpreter of an environment with vLLM")
def test_an_adapter_of_which_vllm_takes_nothing_is_refused(tmp_path, monkeypatch):
    made = Drawn("vllm", "adapter", tmp_path)
    write = pools.write_revision

    def elsewhere(policy, directory, dtype):
        write(policy, directory, dtype)
        weights = load_file(directory / "adapter_model.safetensors")
        renamed = {name.replace("model.layers.", "model.blocks."): w for name, w in weights.items()}
        save_file(renamed, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(pools, "write_revision", elsewhere)
    made.learn()
    with pytest.raises(EngineError, match=r"has no place for|other weights than the policy"):
        made.pool.sync()
    made.pool.close()


def test_a_process_that_ends_again_and_again_ends_the_run(tmp_path, monkeypatch):
    python = serve_with(
        "serve.SamplerServer.sample = lambda self, **_: __import__('os')._exit(7)", tmp_path, sys.executable
    )
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(EngineError, match=r"sampler 1 ended with exit code 7, and processes ended 4 times in 10 calls"):
        Drawn("process", "tied", tmp_path / "model")


def test_a_process_that_ends_while_it_is_started_again_is_started_once_more(tmp_path, monkeypatch):
    count = tmp_path / "count"
    fault = f"""update = serve.SamplerServer.update
def twice(self, **given):
    import os, pathlib
    count = pathlib.Path({str(count)!r})
    count.write_text("x" * (1 + (len(count.read_text()) if count.exists() else 0)))
    if len(count.read_text()) <= 2:
        os._exit(9)
    update(self, **given)
serve.SamplerServer.update = twice"""
    monkeypatch.setattr(sys, "executable", serve_with(fault, tmp_path, sys.executable))
    made = Drawn("process", "tied", tmp_path / "model")
    try:
        assert made.pool.num_restarts == 2
        ours, theirs = (one.generate(PROMPTS, group_size=1, seed=0) for one in (made.local(), made.pooled()))
        assert_same(ours, theirs)
    finally:
        made.pool.close()


def test_an_interpreter_may_be_named_from_the_directory_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "raise SystemExit(5)"\n')
    wrapper.chmod(0o755)
    (tmp_path / "scratch").mkdir()
    start = SamplerStart(
        engine="vllm",
        model="",
        tokenizer="",
        rank=0,
        device="cpu",
        gpu_memory=0.5,
        threads=1,
        precision="float32",
        temperature=1.0,
        max_length=16,
        batch_size=1,
        cache_gb=1.0,
    )
    with pytest.raises(EngineError, match="ended with exit code 5"):  # and is no file that is missing
        SamplerProcess(start, number=1, python="bin/python", scratch=tmp_path / "scratch", limit=60)


def test_weights_that_killed_runs_left_are_removed_and_those_in_use_are_not(monkeypatch):
    mine = Scratch()
    left = mine.path.with_name("trimtab-weights-left")
    (left / "version-3").mkdir(parents=True)
    (left / "in-use").touch()
    foreign = mine.path.with_name("trimtab-weights-of-nobody.txt")
    foreign.touch()
    other = Scratch()
    try:
        assert not left.exists()
        assert mine.path.exists()
        assert foreign.exists()
    finally:
        foreign.unlink()
        mine.remove()
        other.remove()
    assert not mine.path.exists()


def test_a_process_that_cannot_start_says_its_last_words(tmp_path, monkeypatch):
    python = serve_with("print('no room here', flush=True); raise SystemExit(3)", tmp_path, sys.executable)
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(EngineError, match="exit code 3 before it was ready; its last words:\n    no room here"):
        Drawn("process", "tied", tmp_path / "model")


def test_ctrl_c_while_a_process_starts_ends_it(tmp_path, monkeypatch):
    started, start = [], process.start_child

    def noted(*given, **options):
        started.append(start(*given, **options))
        return started[-1]

    def interrupted(self, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "start_child", noted)
    monkeypatch.setattr(process.LinkListener, "accept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Drawn("process", "tied", tmp_path / "model")
    assert started[0].returncode == -signal.SIGKILL


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="tpu"):
        SamplerSettings(name="vllm", device="tpu")


def test_an_environment_without_vllm_is_answered_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(EngineError, match="has no vllm") as refused:
        SamplerSettings(name="vllm", python=sys.executable).find()
    assert "pip install 'trimtab[vllm]'" in refused.value.fix
    with pytest.raises(EngineError, match="cannot be run"):
        SamplerSettings(name="vllm", python=str(tmp_path / "nothing")).find()
