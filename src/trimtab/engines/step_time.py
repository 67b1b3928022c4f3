"""On paper: how long a step takes, in seconds. See `placement.py` for what is counted and `machines.py` for the rates.

Operations are counted from the shape of a model and the tokens of a step, and divided by rates. Nothing overlaps, and
the processes are equally fast, so the time of several is an upper estimate at these rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.engines.machines import Machine
from trimtab.engines.placement import Job, RoleOnPaper, SamplingOnPaper, Spread, replies_at_once

_READ_SHARE = 0.6
"""The share of the bandwidth at which vLLM is assumed to read weights and keys."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, in the slowest process."""

    sampling: float
    scoring: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.sampling + self.scoring + self.update + self.communication


def step_time(job: Job, machine: Machine, spread: Spread) -> StepTime:
    """The time of one step. Processes of one CPU have a share of its rates each."""
    whole, machine = machine, machine.share(spread.processes)
    scoring = sum(role.passes * scoring_seconds(job, role, machine, spread) for role in job.roles)
    updates = [update_seconds(job, role, machine, spread) for role in job.roles if role.trained]
    sampling = 0.0
    if job.sampling is not None:
        drawing = spread.drawing(job.sampling)
        sampling = sampling_seconds(job, job.sampling, whole.share(drawing.processes), drawing)
    return StepTime(sampling, scoring, job.num_epochs * sum(updates), communication_seconds(job, machine, spread))


def products_rate(machine: Machine, bfloat16: bool) -> float:
    """FLOP/s of the blocks of a model in training, all that lies between its products included."""
    kind = "bfloat16" if bfloat16 else "float32"
    return machine[f"{kind}_products"] * machine[f"{kind}_share"]


def trees_of(job: Job, role: RoleOnPaper, spread: Spread) -> int:
    """Trees of a step in the process that has most; a role in the controller alone has all."""
    return job.num_trees if role.controller_only else math.ceil(job.num_trees / spread.processes)


def update_seconds(job: Job, role: RoleOnPaper, machine: Machine, spread: Spread) -> float:
    """Seconds of one pass of updates over the tokens of a step: six operations for each weight and token, two more if
    activations are computed again, two fewer if the weight is frozen; AdamW reads and writes 28 bytes for each trained
    weight."""
    trees = trees_of(job, role, spread)
    again = 1 if job.checkpointed else 0
    passes = 2 + again + (0 if role.adapter else 1)
    linear = 2.0 * passes * role.shape.num_layers * role.shape.linear_weights * trees * job.tree_tokens
    forward = role.shape.attention_flops(trees * job.tree_pairs)
    # A GPU in 16 bits keeps the results of attention (`tree_attention.py`); its backward pass has five products of two.
    attends = 1 + (again if machine.kind == "cpu" or not job.bfloat16 else 0)
    seconds = linear / products_rate(machine, job.bfloat16)
    seconds += attends * forward / machine["attention_forward"] + 2.5 * forward / machine["attention_backward"]
    if not role.shape.scalar:
        trained = trees * job.replies * job.reply_tokens
        seconds += 2.0 * (3 if role.adapter else 4) * role.shape.head_weights * trained / machine["head_products"]
    optimizer = 28.0 * role.num_trained / spread.shards(role) / machine["optimizer"]
    return seconds + job.num_minibatches * optimizer


def scoring_seconds(job: Job, role: RoleOnPaper, machine: Machine, spread: Spread) -> float:
    """Seconds of one forward pass over the tokens of a step."""
    trees, shape = trees_of(job, role, spread), role.shape
    linear = 2.0 * shape.num_layers * shape.linear_weights * trees * job.tree_tokens
    seconds = linear / products_rate(machine, job.bfloat16)
    seconds += shape.attention_flops(trees * job.tree_pairs) / machine["attention_forward"]
    if not shape.scalar:
        seconds += 2.0 * shape.head_weights * trees * job.replies * job.reply_tokens / machine["head_products"]
    if not role.trained and not role.on_base and "offload-frozen" in spread.assumed:
        seconds += role.weight_bytes(frozen_bytes=spread.frozen_bytes) / spread.shards(role) / machine["host_link"]
    return seconds


def sampling_seconds(job: Job, sampling: SamplingOnPaper, machine: Machine, spread: Spread) -> float:
    """Seconds of drawing the replies of a step.

    Each decoding step starts the operations of every block, multiplies with each weight for each reply, and reads the
    weights and, on average, half of the cache. With vLLM, starting takes no time.
    """
    shape = job.roles[0].shape
    prompts = math.ceil(job.num_trees / spread.processes)
    at_once = replies_at_once(job, sampling, machine, spread)
    steps = job.reply_tokens * max(1.0, prompts * job.replies / at_once)
    linear = 2.0 * shape.num_layers * shape.linear_weights
    half = spread.draws_in_bfloat16(sampling)
    rate = products_rate(machine, half)
    each = 2 if half else 4
    tokens = at_once * (job.prompt_tokens + job.reply_tokens / 2)
    cache = 2.0 * each * shape.num_layers * shape.key_size * tokens
    weights = each * (linear / 2) + 4.0 * shape.head_weights
    products = linear * at_once / rate + 2.0 * shape.head_weights * at_once / machine["head_products"]
    started = linear * prompts * job.prompt_tokens / rate
    if "vllm" in spread.assumed:
        parallel = spread.tensor_parallel()
        read = (weights / parallel + cache) / (machine["bandwidth"] * _READ_SHARE)
        return steps * max(read, products) + started
    each_step = shape.num_layers * machine["decoding_block"] + products + (weights + cache) / machine["bandwidth"]
    return steps * each_step + started


def communication_seconds(job: Job, machine: Machine, spread: Spread) -> float:
    """Seconds in which gradients are added and weights gathered, in a ring: each process sends (n - 1) / n of the bytes
    once to gather or to scatter them, and twice to add them up in all processes.

    A sharded role is gathered twice and its gradients scattered once for each micro-batch, and gathered once to sample
    and for each time it is scored.
    """
    n = spread.processes
    if n == 1:
        return 0.0
    link = machine["link"] if n <= machine["per_node"] else machine["node_link"]
    updates = job.num_epochs * job.num_minibatches

    sent = 0.0
    for role in job.roles:
        weights, sharded = float(role.shape.num_weights), spread.shards(role) > 1
        gathered = spread.gathered_bytes(role) * weights
        if role.trained:
            sent += updates * (job.num_micro(n) * (2 * gathered + 4.0 * weights) if sharded else 8.0 * role.num_trained)
        if sharded:
            sent += role.passes * (gathered if "shard-frozen" in spread.assumed else 4.0 * weights)
    if job.sampling is not None and (spread.shards(job.roles[0]) > 1 or "vllm" in spread.assumed):
        sent += (2.0 if "vllm" in spread.assumed else 4.0) * job.roles[0].shape.num_weights
    return sent * (n - 1) / n / link
