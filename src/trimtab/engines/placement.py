"""On paper: which process holds what, in bytes. Nothing is loaded, and no device is needed.

The parts are counted as the engines of this package hold them: float32 weights of every role, gradients and AdamW's
moments of trained ones, what the blocks keep for the backward pass, and so on; `docs/evidence/engines.md` has them
beside measured peaks. Several GPUs are planned by what `shards.py` does with several processes on a CPU, which is not
run on GPUs yet. What no engine here does at all is an assumption that has to be named (`ASSUMPTIONS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.engines.machines import Machine
from trimtab.models.shape import ModelShape

GIB = 2**30
ASSUMPTIONS = {
    "bfloat16-frozen": "frozen roles are kept in bfloat16",
    "shard-frozen": "frozen roles are sharded too, and every role is scored block by block",
    "gather-bfloat16": "sharded blocks are gathered in bfloat16, as FSDP2's mixed precision does",
    "offload-frozen": "frozen roles wait in the memory of the host, and one at a time is on the device",
    "vllm": "replies are drawn by vLLM in bfloat16, over up to 8 GPUs of a node, which sleeps while others compute",
}
"""What trimtab does not do yet, by the names of `--assume`."""
_TILE, _TILE_OF_GPU = (1024, 2048), (8192, 8192)
"""Those of `math/logprobs.py`."""
_REDUCED = 1 << 24
"""Entries that are added over processes at a time (`replica.py`)."""
_FUSED_FROM = 512
"""The width from which layers are compiled on a GPU (`models/fused_layers.py`)."""


@dataclass(frozen=True, kw_only=True)
class RoleOnPaper:
    """A model in one of its roles. For example a reference: `RoleOnPaper(name="reference", shape=shape)`."""

    name: str
    shape: ModelShape
    trained: bool = False
    adapter: int = 0
    """Weights of its adapter; 0 if the role is a model of its own."""
    on_base: bool = False
    """Whether it stands on the base of an earlier role, whose weights are counted there."""
    bits: int = 32
    """Of the linear weights of its blocks, if they are rounded."""
    starts_policy: bool = False
    """Whether it is the model that the policy starts from, as the reference of most runs is."""
    controller_only: bool = False
    """Whether only the first process holds it, as is so for the models of rewards."""
    passes: int = 0
    """Scoring passes over the tokens of a step."""

    @property
    def num_trained(self) -> int:
        """Weights that have gradients and moments."""
        if not self.trained:
            return 0
        return self.adapter or self.shape.num_weights

    def weight_bytes(self, *, frozen_bytes: int = 4) -> float:
        """Bytes of its weights, whole; frozen ones of `frozen_bytes` each."""
        each = frozen_bytes if self.adapter or not self.trained else 4
        linear = self.shape.num_layers * self.shape.linear_weights
        rounded = {32: each, 8: 1 + 4 / self.shape.hidden_size, 4: 0.5 + 4 / 64}[self.bits]  # with their scales
        base = 0.0 if self.on_base else linear * rounded + (self.shape.num_weights - linear) * each
        return base + 4.0 * self.adapter


@dataclass(frozen=True, kw_only=True)
class SamplingOnPaper:
    """How replies are drawn."""

    batch_size: int
    cache_gib: float
    bfloat16: bool
    processes: int = 0
    """Processes of their own that draw, each with all weights; 0 if replies are drawn where the policy is trained."""
    vllm_share: float | None = None
    """The share of a GPU's memory that each of these takes, if they are vLLM's; else None."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of a stage: its roles, its tokens and how they are computed."""

    roles: tuple[RoleOnPaper, ...]
    """The policy (or the one model that is trained) first."""
    bfloat16: bool
    checkpointed: bool
    token_budget: int
    num_trees: int
    """Prompts, pairs or examples of a step, in all processes together."""
    prompt_tokens: int
    reply_tokens: int
    replies: int
    """Replies to a prompt."""
    up_to: bool = False
    """Whether these lengths are only limits. Then shorter examples fill a micro-batch up to its budget."""
    num_epochs: int = 1
    num_minibatches: int = 1
    entropy: bool = False
    sampling: SamplingOnPaper | None = None

    @property
    def tree_tokens(self) -> int:
        """Tokens of a prompt and its replies, the prompt once."""
        return self.prompt_tokens + self.replies * self.reply_tokens

    @property
    def tree_pairs(self) -> float:
        """Pairs of a token of a tree and one that it sees."""
        p, r = self.prompt_tokens, self.reply_tokens
        return p**2 / 2 + self.replies * (r * p + r**2 / 2)

    def micro_trees(self, num_processes: int) -> int:
        """Trees of a full micro-batch of one process."""
        return min(self.minibatch_trees(num_processes), max(1, self.token_budget // self.tree_tokens))

    def micro_tokens(self, num_processes: int) -> int:
        """Tokens of a full micro-batch of one process."""
        if not self.up_to:
            return self.micro_trees(num_processes) * self.tree_tokens
        fitting = max(self.token_budget, self.tree_tokens)
        return min(fitting, self.minibatch_trees(num_processes) * self.tree_tokens)

    def trained_in(self, tokens: int) -> int:
        """How many of so many tokens are trained."""
        return round(tokens * self.replies * self.reply_tokens / self.tree_tokens)

    def minibatch_trees(self, num_processes: int) -> int:
        """Trees of an update in one process."""
        return math.ceil(self.num_trees / self.num_minibatches / num_processes)

    def num_micro(self, num_processes: int) -> int:
        """Micro-batches of an update in one process."""
        return math.ceil(self.minibatch_trees(num_processes) / self.micro_trees(num_processes))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The processes, each on a device of its own."""

    processes: int = 1
    shard: bool = False
    """Whether trained weights are sharded, as with `engine.shard`."""
    assumed: frozenset[str] = frozenset()
    """Names of `ASSUMPTIONS`."""

    def shards(self, role: RoleOnPaper) -> int:
        """Over how many processes a role is spread."""
        if role.trained and not role.adapter:
            return self.processes if self.shard else 1
        return self.processes if "shard-frozen" in self.assumed and not role.adapter else 1

    @property
    def frozen_bytes(self) -> int:
        """Of each weight of a frozen role."""
        return 2 if "bfloat16-frozen" in self.assumed else 4

    def gathered_bytes(self, role: RoleOnPaper) -> int:
        """Of each weight of a block that is gathered to compute with it, in bfloat16 products."""
        gathers_half = "gather-bfloat16" in self.assumed or (not role.trained and self.frozen_bytes == 2)
        return 2 if gathers_half else 4

    def draws_in_bfloat16(self, sampling: SamplingOnPaper) -> bool:
        """Whether replies are drawn in bfloat16: as the run file says, or because vLLM is assumed."""
        return sampling.bfloat16 or "vllm" in self.assumed

    def drawing(self, sampling: SamplingOnPaper) -> Spread:
        """The processes that draw replies: these, or those that do nothing else."""
        return Spread(processes=sampling.processes) if sampling.processes else self

    def tensor_parallel(self) -> int:
        """GPUs that hold one copy of the sampler's weights, with vLLM."""
        return min(self.processes, 8)


@dataclass(frozen=True)
class Holding:
    """What one process holds, in bytes."""

    held: Mapping[str, float]
    """What it holds all the time: weights, gradients and moments by role, such as "policy weights"."""
    phases: Mapping[str, Mapping[str, float]]
    """What comes on top of that in each phase: sampling, scoring, an update."""
    fixed: float
    """Bytes beside tensors: context and libraries."""
    slack: float
    """The share that the allocator reserves beyond tensors."""

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def tensors(self) -> float:
        """Bytes of tensors at the peak: what an allocator calls allocated."""
        return sum(self.held.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def total(self) -> float:
        """All bytes at the peak."""
        return self.fixed + self.tensors * (1 + self.slack)

    def first_too_much(self, memory: float) -> str | None:
        """The first part that does not fit into so many bytes, counted in the order of roles, then of phases; None if
        all fit."""
        sum_so_far = self.fixed
        for name, size in self.held.items():
            sum_so_far += size * (1 + self.slack)
            if sum_so_far > memory:
                return name
        for phase, parts in self.phases.items():
            if sum_so_far + sum(parts.values()) * (1 + self.slack) > memory:
                return f"{max(parts, key=lambda part: parts[part])} of {phase}"
        return None


def holding(job: Job, machine: Machine, spread: Spread, *, controller: bool = True) -> Holding:
    """What one process holds: the controller, which has the models of rewards too, or a worker."""
    gpu = machine.kind == "gpu"
    held: dict[str, float] = {}
    roles = [role for role in job.roles if controller or not role.controller_only]
    waiting: list[float] = []
    """Bytes of frozen roles that wait in the memory of the host."""
    for role in roles:
        weights = role.weight_bytes(frozen_bytes=spread.frozen_bytes) / spread.shards(role)
        if not role.trained and not role.on_base and "offload-frozen" in spread.assumed:
            waiting.append(weights)
        else:
            held[f"{role.name} weights"] = weights
        if role.trained:
            # Gradients stay from an update to the next one, so other roles are sampled from and trained beside them.
            own = 4.0 * role.num_trained / spread.shards(role)
            held |= {f"{role.name} gradients": own, f"{role.name} moments": 2 * own}
    phases = {}
    if job.sampling is not None and not job.sampling.processes:
        phases["sampling"] = sampling_parts(job, job.sampling, machine, spread)
    scored = [role for role in roles if role.passes]
    if scored:
        parts = [scoring_parts(job, role, gpu, spread) for role in scored]
        phases["scoring"] = max(parts, key=lambda part: sum(part.values()))
        if waiting:
            phases["scoring"] = phases["scoring"] | {"a frozen role from the host": max(waiting)}
    for role in roles:
        if role.trained:
            phases[f"the update of the {role.name}"] = update_parts(job, role, machine, spread)
    return Holding(held, phases, machine["context"] * GIB, machine["slack"])


def sampler_holding(job: Job, sampling: SamplingOnPaper, machine: Machine, spread: Spread) -> Holding:
    """What a process that does nothing but draw replies holds: the weights of the policy once more, and what drawing
    takes."""
    if sampling.vllm_share is not None and machine.kind == "gpu":
        return Holding(
            {"set aside for vLLM": sampling.vllm_share * machine["memory"] * GIB}, {"sampling": {}}, 0.0, 0.0
        )
    each = 2.0 if sampling.vllm_share is not None and sampling.bfloat16 else 4.0
    weights = {"sampler weights": each * job.roles[0].shape.num_weights}
    phases = {"sampling": sampling_parts(job, sampling, machine, spread.drawing(sampling))}
    return Holding(weights, phases, machine["context"] * GIB, machine["slack"])


def update_parts(job: Job, role: RoleOnPaper, machine: Machine, spread: Spread) -> dict[str, float]:
    """What an update needs on top of what is held, at the start of a backward pass, when most is kept."""
    shape, gpu = role.shape, machine.kind == "gpu"
    tokens = job.micro_tokens(spread.processes)
    trained = job.trained_in(tokens)
    fused = shape.hidden_size >= _FUSED_FROM if gpu else not job.bfloat16
    packed = gpu and job.bfloat16
    each = shape.kept_bytes(bfloat16=job.bfloat16, fused=fused)
    width = 2 if job.bfloat16 else 4
    # Results of attention are kept beside a block's input where attention is packed, and not computed again.
    kept_input = 4 * shape.hidden_size + ((2 * shape.query_size + 4 * shape.num_heads) if packed else 0)
    mlp = width * 3 * shape.mlp_size
    attention = attention_workspace(job, shape, machine, tokens, width)
    shards = spread.shards(role)
    # First the MLP's backward pass beside all that the block keeps, then attention's without what the MLP kept.
    backward = max(tokens * width * (3 if fused else 4) * shape.mlp_size, attention - tokens * mlp, 0.0)
    if job.checkpointed:
        kept = float(shape.num_layers * tokens * kept_input)
        backward += tokens * (each - kept_input)
    else:
        kept = float(shape.num_layers * tokens * each)
    if job.num_micro(spread.processes) == 1:
        # Then only the head has a gradient when most is kept. Those of blocks come as activations go.
        to_come = role.num_trained if role.adapter else shape.num_layers * shape.block_weights
        kept = max(0.0, kept - 4.0 * to_come / shards)
    head = head_bytes(job, shape, gpu, trained)
    copies = copied_weights(job, role, spread)
    # At the end of the forward pass the copies of all weights are there; a backward pass that computes activations
    # again on a GPU makes those of a block at a time. Elsewhere they stay, because products keep them.
    left = min(copies, 2.0 * shape.linear_weights) if job.checkpointed and gpu else copies
    parts = {"activations": kept}
    if copies + max(tokens * mlp, head) > left + max(backward, head):
        parts |= {"weights in 16 bits": copies, "one block": max(tokens * mlp, head)}
    else:
        parts |= {"weights in 16 bits": left, "one block": max(backward, head)}
    if shards > 1:
        # The outer weights stay gathered from the forward to the backward pass, and their gradients are whole before
        # they are scattered; so are two blocks, the second of which is fetched ahead, and one block's gradients.
        parts["gathered weights"] = blocks_gathered(role, spread)
        parts["gathered gradients"] = 4.0 * (shape.outer_weights + shape.block_weights)
    elif spread.processes > 1:
        parts["added gradients"] = 8.0 * min(_REDUCED, role.num_trained)
    return {name: size for name, size in parts.items() if size}


def copied_weights(job: Job, role: RoleOnPaper, spread: Spread) -> float:
    """Bytes of the copies in 16 bits that autocast makes of trained weights and keeps to the end of a forward pass,
    also of blocks that are sharded. Frozen weights are copied one at a time."""
    if not job.bfloat16 or not role.trained or role.adapter:
        return 0.0
    if spread.shards(role) > 1 and "gather-bfloat16" in spread.assumed:
        return 0.0
    return 2.0 * role.shape.num_layers * role.shape.linear_weights


def blocks_gathered(role: RoleOnPaper, spread: Spread) -> float:
    """Bytes of a sharded role's outer weights and of two of its blocks, of which the second is fetched ahead."""
    shape = role.shape
    return spread.gathered_bytes(role) * float(shape.outer_weights + 2 * shape.block_weights)


def attention_workspace(job: Job, shape: ModelShape, machine: Machine, tokens: int, width: int) -> float:
    """Bytes that the backward pass of attention needs beside what is kept.

    The flash kernel of a GPU, whose sums have a fixed order, adds the gradients of queries in float32 once for each
    group of workers: as many as fill the multiprocessors, for all stretches and heads together (`head_groups`).
    """
    states = width * tokens * (5 * shape.query_size)
    if machine.kind == "cpu" or width == 4:
        return 2.0 * states
    trees = max(1, tokens // job.tree_tokens)
    stretches = trees * (1 if job.replies == 1 else 1 + job.replies)

    def added(stretches: int, tokens: int) -> float:
        workers = max(machine["processors"] / stretches, shape.num_heads)
        return 4.0 * workers * tokens * shape.head_dim

    chains = added(stretches, tokens) + states
    if job.replies == 1:
        return chains
    forked = job.trained_in(tokens)
    return max(chains, added(trees, forked) + states + width * forked * 5 * shape.query_size)


def head_bytes(job: Job, shape: ModelShape, gpu: bool, trained: int) -> float:
    """Bytes of a tile of logits, and of the hidden states and their gradients in float32."""
    rows, columns = _TILE_OF_GPU if gpu else _TILE
    states = 4.0 * 4 * trained * shape.hidden_size
    if shape.scalar:
        return states
    tile = 4.0 * min(rows, trained) * min(columns, shape.vocab_size)
    return tile * (3 if job.entropy else 1) + states


def scoring_parts(job: Job, role: RoleOnPaper, gpu: bool, spread: Spread) -> dict[str, float]:
    """What scoring needs on top of what is held."""
    shape = role.shape
    tokens = min(math.ceil(job.num_trees / spread.processes) * job.tree_tokens, job.micro_tokens(spread.processes))
    trained = job.trained_in(tokens)
    width = 2 if job.bfloat16 else 4
    block = tokens * (12.0 * shape.hidden_size + width * 3 * shape.mlp_size)
    parts = {"one block": max(block, head_bytes(job, shape, gpu, trained))}
    parts["weights in 16 bits"] = copied_weights(job, role, spread)
    return {name: size for name, size in parts.items() if size} | gathered_whole(role, spread)


def gathered_whole(role: RoleOnPaper, spread: Spread) -> dict[str, float]:
    """Bytes of a sharded role that is gathered to score with it."""
    if spread.shards(role) == 1:
        return {}
    if "shard-frozen" in spread.assumed:
        return {"gathered weights": blocks_gathered(role, spread)}
    return {"gathered weights": 4.0 * role.shape.num_weights}


def sampling_parts(job: Job, sampling: SamplingOnPaper, machine: Machine, spread: Spread) -> dict[str, float]:
    """What drawing replies needs on top of what is held."""
    policy = job.roles[0]
    shape = policy.shape
    replies = replies_at_once(job, sampling, machine, spread)
    half = spread.draws_in_bfloat16(sampling)
    cache = cache_bytes(job, machine, shape, replies, bfloat16=half)
    if "vllm" in spread.assumed:
        parallel = spread.tensor_parallel()
        return {"weights of the sampler": 2.0 * shape.num_weights / parallel, "cache": cache}
    parts = {"cache": cache, "logits": 12.0 * replies * shape.vocab_size}
    linear = shape.num_layers * shape.linear_weights
    if machine.kind == "gpu":
        # Layers of the same input are joined in a copy; under autocast the model's own are copied too.
        parts["joined weights"] = (2.0 + 2.0 if half else 4.0) * linear
    elif half:
        parts["joined weights"] = 2.0 * linear
    prompts = max(1, replies // job.replies // 8) * job.prompt_tokens  # as many start at a time
    parts["prompts"] = prompts * 4.0 * (3 * shape.hidden_size + 2 * shape.mlp_size + 2 * shape.query_size)
    if spread.shards(policy) > 1:
        parts["gathered weights"] = 4.0 * shape.num_weights
    return parts


def replies_at_once(job: Job, sampling: SamplingOnPaper, machine: Machine, spread: Spread) -> int:
    """Replies that one process decodes together."""
    shape = job.roles[0].shape
    prompts = math.ceil(job.num_trees / spread.processes)
    half = spread.draws_in_bfloat16(sampling)
    room = int(sampling.cache_gib * GIB / cache_bytes(job, machine, shape, job.replies, bfloat16=half))
    return max(1, min(prompts, sampling.batch_size // job.replies, room)) * job.replies


def cache_bytes(job: Job, machine: Machine, shape: ModelShape, replies: int, *, bfloat16: bool) -> float:
    """Bytes of the keys and values of this many replies with their prompts, of which a group has two while the next
    group begins."""
    each = 2 if bfloat16 and machine.kind == "gpu" else 4
    prompts = replies // job.replies * (1 if job.replies == 1 else 2)
    tokens = prompts * job.prompt_tokens + replies * job.reply_tokens
    return 2.0 * each * shape.num_layers * shape.key_size * tokens
