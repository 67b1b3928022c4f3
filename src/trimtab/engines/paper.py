"""On paper: whether a step fits, how long it takes and what it costs, and the cheapest change that makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from trimtab.engines.machines import Machine
from trimtab.engines.placement import ASSUMPTIONS, GIB, Holding, Job, RoleOnPaper, Spread, holding, sampler_holding
from trimtab.engines.step_time import StepTime, step_time

RANK = 16
"""Of the adapter that is proposed."""
MOST_PROCESSES = 1024


@dataclass(frozen=True, kw_only=True)
class PaperPlan:
    """The plan of one stage on one kind of machine."""

    name: str
    job: Job
    machine: Machine
    spread: Spread
    num_steps: int | None
    """Steps of the whole stage; None if only the data says how many."""
    price: float | None = None
    """What an hour of one of these machines costs, in any currency."""
    left_out: tuple[str, ...] = ()
    """What is not counted, by the settings that ask for it."""

    @property
    def memory(self) -> float:
        """Bytes of one machine."""
        return self.machine["memory"] * GIB

    @property
    def controller(self) -> Holding:
        """What the process that runs the stage holds."""
        return holding(self.job, self.machine, self.spread)

    @property
    def worker(self) -> Holding | None:
        """What each other process holds, if there are others."""
        return None if self.spread.processes == 1 else holding(self.job, self.machine, self.spread, controller=False)

    @property
    def sampler(self) -> Holding | None:
        """What each process holds that does nothing but draw replies, if there are such."""
        sampling = self.job.sampling
        if sampling is None or not sampling.processes:
            return None
        return sampler_holding(self.job, sampling, self.machine, self.spread)

    @property
    def needed(self) -> float:
        """Bytes that have to be in one machine. A GPU has one process, of which the controller holds most, and the
        samplers beside it; a CPU has all processes."""
        needed = self.controller.total
        if self.worker is not None and self.machine.kind == "cpu":
            needed += (self.spread.processes - 1) * self.worker.total
        if self.job.sampling is not None and self.sampler is not None:
            needed += self.job.sampling.processes * self.sampler.total
        return needed

    @property
    def time(self) -> StepTime:
        """Seconds of a step."""
        return step_time(self.job, self.machine, self.spread)

    @property
    def fits(self) -> bool:
        """Whether the processes of a machine fit into it."""
        return self.needed <= self.memory

    @property
    def first_too_much(self) -> str:
        """What does not fit, in the order in which it is counted: the controller's parts, then the other processes."""
        return self.controller.first_too_much(self.memory) or "processes beside the controller"

    @property
    def num_machines(self) -> int:
        """A GPU for each process, or one machine without GPUs for all."""
        return self.spread.processes if self.machine.kind == "gpu" else 1

    @property
    def place(self) -> str:
        """Where the processes are, such as "8 x h100" or "2 processes on x86_64"."""
        if self.machine.kind == "gpu":
            return f"{self.num_machines} x {self.machine.name}"
        return (
            f"{self.spread.processes} {'processes' if self.spread.processes > 1 else 'process'} on {self.machine.name}"
        )

    @property
    def machine_seconds(self) -> float:
        """Seconds of a step, times the number of machines."""
        return self.time.total * self.num_machines

    def cost(self, num_steps: float) -> float | None:
        """What so many steps cost; None without a price."""
        return None if self.price is None else self.machine_seconds / 3600 * num_steps * self.price

    @property
    def not_built(self) -> tuple[str, ...]:
        """What this plan takes for granted that trimtab does not do yet."""
        gpus = self.machine.kind == "gpu" and self.spread.processes > 1
        several = ("trimtab does not run on several GPUs yet",) if gpus else ()
        return several + tuple(f"assumed: {ASSUMPTIONS[name]}" for name in ASSUMPTIONS if name in self.spread.assumed)

    @property
    def cautions(self) -> tuple[str, ...]:
        """All that a reader has to know of the plan beside its constants."""
        adapted = self.machine.kind == "gpu" and any(role.adapter for role in self.job.roles)
        untried = ("adapters were not tried on a GPU",) if adapted else ()
        left_out = (f"not counted: {', '.join(self.left_out)}",) if self.left_out else ()
        return self.not_built + untried + left_out


@dataclass(frozen=True)
class Remedy:
    """Changes that make a plan fit."""

    changes: tuple[str, ...]
    """As a user would write them."""
    plan: PaperPlan
    alters: bool
    """Whether something else is trained then: an adapter instead of all weights."""


def remedies(plan: PaperPlan) -> tuple[Remedy, ...]:
    """The cheapest changes that make the plan fit; none if it fits, or if nothing makes it fit.

    First come those that ask least of what trimtab does not do yet, then those that train the same weights, then those
    that take the fewest machine seconds. If they train an adapter, the cheapest that train all weights follow, and if
    they need more machines, the cheapest on as many as were asked for.
    """
    if plan.fits:
        return ()
    found = list(_fitting(plan))

    def rank(remedy: Remedy) -> tuple[int, bool, float, int]:
        return len(remedy.plan.not_built), remedy.alters, remedy.plan.machine_seconds, len(remedy.changes)

    first = min(found, key=rank, default=None)
    whole = min((r for r in found if not r.alters), key=rank, default=None)
    same_size = (r for r in found if r.plan.spread.processes == plan.spread.processes)
    as_many = min(same_size, key=rank, default=None)
    return tuple({r.changes: r for r in (first, whole, as_many) if r is not None}.values())


_Change = tuple[str, Callable[[Job, Spread], tuple[Job, Spread]]]


def _fitting(plan: PaperPlan) -> Iterator[Remedy]:
    """Every combination of changes that fits, each with the largest micro-batch that does."""
    job, spread = plan.job, plan.spread
    toggles: list[list[_Change | None]] = [[None, change] for change in _toggles(plan)]
    processes: list[_Change | None] = [None]
    num = 2 * spread.processes
    while num <= min(MOST_PROCESSES, job.num_trees) and plan.machine.kind == "gpu":
        processes.append(_in(num, "--gpus"))
        num *= 2
    fewer = spread.processes // 2
    while fewer >= 1 and plan.machine.kind == "cpu":
        processes.append(_in(fewer, "--workers"))
        fewer //= 2
    if spread.shard and plan.machine.kind == "cpu":
        processes.append(("--workers 1, engine.shard = false", lambda j, s: (j, replace(s, processes=1, shard=False))))
    for chosen in product(*toggles, processes):
        changes = [change for change in chosen if change is not None]
        new_job, new_spread = job, spread
        for _, apply in changes:
            new_job, new_spread = apply(new_job, new_spread)
        adapted = any(role.trained and role.adapter for role in new_job.roles)
        if new_spread.shard and (new_spread.processes == 1 or adapted):
            continue  # refused by the run itself
        names = tuple(name for name, _ in changes)
        alters = new_job.roles != job.roles
        for budget in _budgets(new_job):
            smaller = replace(new_job, token_budget=budget)
            changed = replace(plan, job=smaller, spread=new_spread)
            if changed.fits:
                less = () if budget == job.token_budget else (f"token_budget = {budget}",)
                yield Remedy((*names, *less), changed, alters)
                break


def _budgets(job: Job) -> Iterator[int]:
    """The token budget, and smaller ones down to a single tree, which is not split."""
    budget = job.token_budget
    while True:
        yield budget
        if budget <= job.tree_tokens:
            return
        budget = max(budget // 2, job.tree_tokens)


def _toggles(plan: PaperPlan) -> Iterator[_Change]:
    """The changes that may be made or not."""
    job, spread = plan.job, plan.spread
    if not job.checkpointed:
        yield "checkpoint_activations = true", lambda j, s: (replace(j, checkpointed=True), s)
    whole = any(role.trained and not role.adapter for role in job.roles)
    if not spread.shard and whole:
        yield "engine.shard = true", lambda j, s: (j, replace(s, shard=True))
    if whole:
        also = ", critic.init = 'policy'" if any(role.name == "critic" and role.trained for role in job.roles) else ""
        also += ", engine.shard = false" if spread.shard else ""  # a base of adapters is not sharded
        yield f"adapter.rank = {RANK}{also}", lambda j, s: (with_adapters(j), replace(s, shard=False))
    if plan.machine.kind == "cpu":
        return
    frozen = any(not role.trained or role.adapter for role in job.roles)
    drawn_here = job.sampling is not None and not job.sampling.processes
    offered = {"bfloat16-frozen": frozen, "offload-frozen": frozen, "vllm": drawn_here}
    offered["gather-bfloat16"] = spread.processes > 1 and whole and job.bfloat16
    offered["shard-frozen"] = spread.processes > 1 and (frozen or job.sampling is not None)
    for name, offers in offered.items():
        if offers and name not in spread.assumed:
            yield f"--assume {name}", _assume(name)


def _assume(name: str) -> Callable[[Job, Spread], tuple[Job, Spread]]:
    return lambda j, s: (j, replace(s, assumed=s.assumed | {name}))


def _in(num: int, option: str) -> _Change:
    return f"{option} {num}", lambda j, s: (j, replace(s, processes=num))


def with_adapters(job: Job) -> Job:
    """The job with adapters on the base of the first role, where models of their own were trained. A reference that is
    what the policy starts from is then the base itself; any other stays a model of its own."""
    first, *others = job.roles

    def changed(role: RoleOnPaper) -> RoleOnPaper:
        if not role.trained:
            return replace(role, on_base=role.on_base or role.starts_policy)
        if role.adapter:
            return role
        shape = replace(first.shape, scalar=role.shape.scalar)  # a critic starts from the policy then
        return replace(role, shape=shape, adapter=shape.adapter_weights(RANK), on_base=role is not first)

    return replace(job, roles=(changed(first), *map(changed, others)))
