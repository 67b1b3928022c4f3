"""Checks a machine before it is used: how fast it computes, and whether every way of computing gives the same numbers.

Nothing is downloaded: a small model with random weights is made in memory. What is found agrees or does not, whatever
the model's size; how fast a run will be says `trimtab plan`.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from trimtab.batches.rollouts import PolicyBatch
from trimtab.batches.trees import TokenTrees, response_tree
from trimtab.core import config
from trimtab.core.process import memory_gb, own_peak_rss_gb
from trimtab.data.chat import Chat
from trimtab.engines.build import Engines
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.form_choice import forms
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.replies import DecodingForm, ReplyBuffer, Sampling
from trimtab.engines.local.scorer import LocalScorer
from trimtab.engines.local.slots import SlotForm
from trimtab.engines.machines import FILE, machine_of, write_machine
from trimtab.engines.samplers.pool import SamplerPool
from trimtab.math.losses.policy import PPO
from trimtab.models.roles import Policy

SIZE, SIZE_OF_GPU = 1024, 8192
"""Rows and columns of the matrices whose product is timed. A GPU would take longer to start a small one than to compute
it."""
SECONDS = 0.5
"""How long a rate is measured."""
NEAR = 1e-3
"""Largest difference of two ways of computing in float32, in nats or relative; rounding is a hundred times smaller."""
NUM_REPLIES, NUM_TOKENS = 32, 24
VOCABULARY = 512


@dataclass(frozen=True)
class Finding:
    """One line of the check, such as `Finding("products in float32", "142 GFLOP/s")`."""

    what: str
    found: str
    wrong: str = ""
    """What is wrong, and what to do; "" if nothing is."""
    matters: bool = False
    """Whether that makes numbers wrong or runs impossible, and not only slow."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """What a paper plan reads of it, by the names in `machines.UNITS`."""


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """The settings of the processes that a check starts."""

    engine: EngineSettings = field(default_factory=EngineSettings)


def check(engine: EngineSettings, directory: Path) -> Iterator[Finding]:
    """Yields what is found, one after the other, in about half a minute. `directory` is where runs will be written."""
    device = engine.find_device()
    yield from machine(device)
    exact, half = (products(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    slow = 'precision = "bfloat16" would slow this machine down' if half < exact else ""
    yield Finding("products in float32", f"{exact:,.0f} GFLOP/s", constants={"float32_products": exact * 1e9})
    half_rate = {"bfloat16_products": half * 1e9}
    yield Finding("products in bfloat16", f"{half:,.0f} GFLOP/s", slow, constants=half_rate)
    moved = memory(device)
    yield Finding("memory, read and written", f"{moved:,.1f} GB/s", constants={"bandwidth": moved * 1e9})
    yield from sampling(device, engine)
    if device.type != "cpu":
        yield updates(device)
    yield disk(directory)
    if engine.workers > 1:
        yield from workers(engine)


def show(values: Mapping[str, Any], directory: Path, say: Callable[[str], None] = print) -> int:
    """Says what is found for these values of `CheckSettings`, and writes what a paper plan reads of this machine.
    Returns 1 if something is wrong, else 0. On a CPU two processes are tried too, if no other number is given."""
    wrong = False
    constants: dict[str, float] = {}
    engine = config.resolve(CheckSettings, values, where="the command line").engine
    if engine.device == "cpu" and "workers" not in values.get("engine", {}):
        engine = replace(engine, workers=2)
    for finding in check(engine, directory):
        constants |= finding.constants
        say(f"{finding.what:<32} {finding.found}")
        if finding.wrong:
            say(f"{'':<32} ! {finding.wrong}")
        wrong |= finding.matters
    if not wrong:
        file = directory / FILE
        source = f"trimtab check, torch {torch.__version__}, {date.today()}"
        device = engine.find_device()
        kind: Literal["cpu", "gpu"] = "cpu" if device.type == "cpu" else "gpu"
        name = platform.machine() if kind == "cpu" else torch.cuda.get_device_name(device)
        write_machine(machine_of(name, kind, constants, source), file)
        say(f"{'for a plan on paper':<32} trimtab plan FILE --on {file}")
    say("something is wrong" if wrong else "all agree")
    return int(wrong)


def machine(device: torch.device) -> Iterator[Finding]:
    """What computes."""
    capability = torch.backends.cpu.get_cpu_capability()
    said = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"
    if device.type != "cuda":
        yield Finding("processor", said, constants={"memory": memory_gb(), "context": own_peak_rss_gb()})
        return
    yield Finding("processor", said)
    gpu = torch.cuda.get_device_properties(device)
    size = gpu.total_memory / 2**30
    sizes = {"memory": size, "processors": float(gpu.multi_processor_count)}
    yield Finding("GPU", f"{gpu.name}, {size:.0f} GiB", constants=sizes)


def products(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of products of square matrices."""
    size = SIZE if device.type == "cpu" else SIZE_OF_GPU
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2 * size**3 * times_a_second(lambda: a @ b, device) / 1e9


def memory(device: torch.device) -> float:
    """GB/s of copying an array that no cache holds, counting what is read and what is written."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 * times_a_second(lambda: target.copy_(source), device) / 1e9


def times_a_second(work: Callable[[], Any], device: torch.device) -> float:
    """How often the work is done in a second."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    num, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        work()
        wait()
        num += 1
    return num / (time.perf_counter() - began)


def sampling(device: torch.device, engine: EngineSettings) -> Iterator[Finding]:
    """Whether each way of drawing replies draws the same ones, and gives the log-probabilities of the scorer."""
    policy = small_policy(device)
    prompts = [list(range(3, 3 + n)) for n in (5, 17, 9, 30)]
    drawn: dict[str, ReplyBuffer] = {}
    for form in forms(policy, Sampling(max_new_tokens=NUM_TOKENS), cast(Chat, NoChat())):
        if form.name != "uncached":
            drawn[form.name] = draw(form, prompts)
            yield compared(form, policy, prompts, drawn)
    if engine.sampler.name != "local":
        yield from samplers(engine, policy, prompts, drawn)
    if isinstance(first := next(forms(policy, Sampling(), cast(Chat, NoChat()))), SlotForm) and device.type == "cpu":
        slow = "no C compiler was found: replies are drawn 1.3 to 1.5 times slower, and training steps take longer too"
        slow = "" if first.kernels.compiled else slow
        yield Finding("compiled kernels", "yes" if first.kernels.compiled else "no", slow)


def samplers(
    engine: EngineSettings, policy: Policy, prompts: Sequence[Sequence[int]], drawn: dict[str, ReplyBuffer]
) -> Iterator[Finding]:
    """How long the processes that draw replies take to start, and whether they draw the same ones."""
    engine.sampler.find()
    began = time.perf_counter()
    pool = SamplerPool(
        policy,
        Chat(small_tokenizer()),
        engine.sampler,
        Sampling(max_new_tokens=NUM_TOKENS, max_prompt_tokens=200, batch_size=NUM_REPLIES),
        revision=lambda: 0,
        whole=nullcontext,
        limit_seconds=engine.timeout_seconds,
    )
    try:
        yield Finding(f"samplers, {pool.name}", f"started in {time.perf_counter() - began:.1f} s")
        drawn[pool.name] = draw(pool, prompts)
        yield compared(pool, policy, prompts, drawn)
    finally:
        pool.close()


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for `small_policy`, whose words are numbers."""
    words = {str(i): i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), unk_token="0", pad_token="1", eos_token="2"
    )


def draw(form: DecodingForm, prompts: Sequence[Sequence[int]]) -> ReplyBuffer:
    """Replies by one way of drawing them; the random numbers are always the same."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(NUM_REPLIES, NUM_TOKENS, generator=generator, dtype=torch.float64)
    replies = ReplyBuffer(uniforms, Sampling(max_new_tokens=NUM_TOKENS), cast(Chat, NoChat()))
    with torch.no_grad():
        form.decode(prompts, NUM_REPLIES // len(prompts), replies)
    return replies


def compared(
    form: DecodingForm, policy: Policy, prompts: Sequence[Sequence[int]], drawn: dict[str, ReplyBuffer]
) -> Finding:
    """The replies of a form beside those of the first, and its log-probabilities beside the scorer's."""
    replies = drawn[form.name]
    each = NUM_REPLIES // len(prompts)
    trees = [response_tree(p, replies.tokens[i * each : (i + 1) * each].tolist()) for i, p in enumerate(prompts)]
    scored = LocalScorer(policy, token_budget=4096).logprobs(TokenTrees.build(trees))
    difference = float((scored - replies.logprobs.flatten()).abs().max())
    first = next(iter(drawn.values()))
    same = int((replies.tokens == first.tokens).all(1).sum())
    wrong = ""
    if not difference <= NEAR:
        wrong = f"the log-probabilities are {difference:.2g} nats from the scorer's; please report this machine"
    found = f"{same} of {NUM_REPLIES} replies as drawn first, log-probabilities within {difference:.0e} nats"
    return Finding(f"replies, {form.name}", found, wrong, bool(wrong))


def updates(device: torch.device) -> Finding:
    """Whether an update on the device is that of the CPU."""
    norms = []
    for place in (torch.device("cpu"), device):
        made = LocalLearner(small_policy(place), AdamW(), token_budget=256, num_updates=1, name="policy")
        norms.append(made.update([(some_batch(), [PPO()])])["optimizer/policy_gradient_norm"].value)
    return _same("an update on the device", norms[1], norms[0])


def workers(engine: EngineSettings) -> Iterator[Finding]:
    """How long several processes take to start and to add their gradients, and whether their update is that of one."""
    settings = CheckSettings(engine=replace(engine, device="cpu"))
    alone = LocalLearner(small_policy(), AdamW(), token_budget=256, num_updates=1, name="policy")
    expected = alone.update([(some_batch(), [PPO()])])["optimizer/policy_gradient_norm"].value
    began = time.perf_counter()
    policy = small_policy()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        engines = Engines.start(settings, directory, load=load_small_policy, models={"policy": policy})
        with engines:
            yield Finding(f"{engine.workers} processes", f"started in {time.perf_counter() - began:.1f} s")
            learner = engines.learner(policy, AdamW(), name="policy", token_budget=256, num_updates=1)
            found = learner.update([(some_batch(), [PPO()])])["optimizer/policy_gradient_norm"].value
            yield _same(f"an update in {engine.workers} processes", found, expected)


def disk(directory: Path) -> Finding:
    """How fast a checkpoint is written where runs go, onto the disk itself."""
    size = 64 << 20
    block = os.urandom(1 << 20) * (size >> 20)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            began = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = size / (time.perf_counter() - began) / 1e6
    except OSError as error:
        advice = f"{error.strerror}: give runs another --out"
        return Finding(f"disk at {directory}", "cannot be written", advice, matters=True)
    return Finding(f"disk at {directory}", f"{rate:,.0f} MB/s")


def _same(what: str, found: float, expected: float) -> Finding:
    difference = abs(found - expected) / expected
    wrong = "" if difference <= NEAR else "it is another update; please report this machine"
    return Finding(what, f"gradient norm within {difference:.0e} of one process on the CPU", wrong, bool(wrong))


def load_small_policy(_settings: CheckSettings, _directory: Path) -> tuple[None, dict[str, Policy]]:
    """The model of the check for a worker; see `Engines.start`."""
    return None, {"policy": small_policy()}


def small_policy(device: torch.device | None = None) -> Policy:
    """A small model whose weights are large enough that its replies differ."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=2,  # vLLM computes no heads of less than 32 numbers on a CPU
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        for weight in model.parameters():
            weight.mul_(4.0 if weight.ndim >= 2 else 1.0)
    return Policy(model if device is None else torch.nn.Module.to(model, device), pad_id=0)


def some_batch() -> PolicyBatch:
    """Made-up replies to four prompts, with advantages."""
    draw = torch.Generator().manual_seed(1)

    def ids(num: int) -> list[int]:
        found: list[int] = torch.randint(2, VOCABULARY, (num,), generator=draw).tolist()
        return found

    trees = TokenTrees.build([response_tree(ids(n), [ids(n + i) for i in range(1, 4)]) for n in (5, 9, 17, 12)])
    zeros: Tensor = torch.zeros(trees.num_trained)
    return PolicyBatch(
        trees=trees,
        old_logprobs=zeros - 6,
        correction=zeros + 1,
        ref_logprobs=zeros - 6,
        old_values=zeros,
        advantages=torch.randn(trees.num_trained, generator=draw),
        returns=zeros,
    )


class NoChat:
    """A chat without a tokenizer, in which no token ends a reply."""

    stop_ids: frozenset[int] = frozenset()
    pad_id = 0
    tokenizer = None
