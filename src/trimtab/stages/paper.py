"""Plans a run on paper: from the run file, the config.json of its models and a table of machine constants.

`trimtab plan FILE --on h100` needs neither the machine nor the weights. What a stage holds and computes is written down
here as a `Job`; bytes and seconds are counted in `engines`. Lengths of prompts and replies are taken from the run file,
as long as it allows, unless they are given, because data is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab.core.errors import ConfigError
from trimtab.engines.machines import find_machine
from trimtab.engines.paper import PaperPlan, remedies
from trimtab.engines.placement import ASSUMPTIONS, GIB, Holding, Job, RoleOnPaper, SamplingOnPaper, Spread
from trimtab.models.shape import ModelShape, read_shape, shape_of
from trimtab.stages.pipeline import expand, overlay, resolve_stages
from trimtab.stages.plan import duration


@dataclass(frozen=True, kw_only=True)
class OnPaper:
    """What a plan is asked for, and no run is told."""

    on: str
    """A machine of the table, or the file of `trimtab check`."""
    gpus: int = 1
    """How many of them."""
    price: float | None = None
    """Of an hour of one of them."""
    assume: tuple[str, ...] = ()
    """Names of `ASSUMPTIONS`."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; None for as many as the run file allows."""
    reply_tokens: int | None = None
    """Tokens of a reply; None for as many as the run file allows."""

    @property
    def up_to(self) -> bool:
        """Whether the run file's limits stand for lengths."""
        return self.prompt_tokens is None or self.reply_tokens is None


def plan_on_paper(values: Mapping[str, Any], asked: OnPaper, *, where: str) -> tuple[list[PaperPlan], list[str]]:
    """The plan of each stage of a pipeline that trains, and the names of the stages that are not planned on paper."""
    machine = find_machine(asked.on)
    if wrong := [name for name in asked.assume if name not in ASSUMPTIONS]:
        raise ConfigError(
            f"nothing is known of {', '.join(wrong)}", where="--assume", fix=f"it is one of {', '.join(ASSUMPTIONS)}"
        )
    values = expand(values, where=where)
    if machine.kind == "gpu":
        given = [t.get("engine", {}).get("workers") for t in (values, *values["stages"].values())]
        if other := [workers for workers in given if workers not in (None, asked.gpus)]:
            raise ConfigError(
                f"engine.workers = {other[0]} with {asked.gpus} of {asked.on}: each process has a GPU of its own",
                where=where,
                fix=f"say --gpus {other[0]}, or leave engine.workers out",
            )
        # Several processes are resolved as those of a CPU, because a run on several GPUs is refused.
        device = {"device": "cpu", "workers": asked.gpus}
        tables = {name: overlay(table, {"engine": device}) for name, table in values["stages"].items()}
        values = {**values, "stages": tables}
    elif asked.gpus != 1:
        raise ConfigError(
            f"--gpus {asked.gpus} on a machine without GPUs", where=f"--on {asked.on}", fix="set --workers instead"
        )
    place = Path("runs/plan")
    made = ShapesOnPaper(place)
    plans, others = [], []
    for name, (stage, settings) in resolve_stages(values, place, where=where).items():
        made.add(name, stage, settings)
        if stage not in JOBS:
            others.append(name)
            continue
        engine = settings.engine
        if engine.shard and settings.adapter is not None:
            raise ConfigError(
                "the frozen base of an adapter is not sharded",
                where=f"stages.{name}: engine.shard and adapter",
                fix="set engine.shard = false, or train all weights",
            )
        plans.append(
            PaperPlan(
                name=name,
                job=JOBS[stage](settings, made, asked),
                machine=machine,
                spread=Spread(processes=engine.workers, shard=engine.shard, assumed=frozenset(asked.assume)),
                num_steps=getattr(settings, "num_steps", None) or getattr(settings, "max_steps", None),
                price=asked.price,
                left_out=tuple(key for key in NOT_COUNTED if getattr(settings, key, None) is not None),
            )
        )
    return plans, others


@dataclass(frozen=True)
class ShapesOnPaper:
    """The shapes of models: those of directories, and those that earlier stages of the pipeline are to make."""

    place: Path
    made: dict[str, ModelShape] = field(default_factory=dict)

    def add(self, name: str, stage: str, settings: Any) -> None:
        """Notes the shape of the model that a stage makes from another or from nothing."""
        directory = str(self.place / name / "model")
        if (architecture := getattr(settings, "architecture", None)) is not None:
            shape = {
                "model_type": architecture.family,
                "hidden_size": architecture.hidden_size,
                "num_hidden_layers": architecture.num_layers,
                "num_attention_heads": architecture.num_heads,
                "intermediate_size": architecture.mlp_size,
                "vocab_size": settings.vocab_size,
                "tie_word_embeddings": True,
            }
            self.made[directory] = shape_of(shape, where=f"stages.{name}.architecture")
        elif stage in JOBS:
            self.made[directory] = self.of(settings.model)

    def of(self, path: str, *, scalar: bool = False) -> ModelShape:
        """The shape of a model, or of the base of an adapter."""
        if path in self.made:
            values = {**vars(self.made[path]), "scalar": scalar}
            return ModelShape(**values)
        adapter = Path(path).expanduser() / "adapter_config.json"
        if adapter.is_file():
            path = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return read_shape(path, scalar=scalar)


def _trained(name: str, shape: ModelShape, settings: Any, *, on_base: bool = False, passes: int = 0) -> RoleOnPaper:
    """A role that is trained as the settings say: whole, or as an adapter."""
    lora = settings.adapter
    return RoleOnPaper(
        name=name,
        shape=shape,
        trained=True,
        adapter=0 if lora is None else shape.adapter_weights(lora.rank, lora.modules),
        on_base=on_base and lora is not None,
        bits=32 if lora is None else lora.base_bits,
        passes=passes,
    )


def _supervised(settings: Any, role: RoleOnPaper, asked: OnPaper, replies: int) -> Job:
    """The job of a stage that trains on records: half of the longest example is prompt, unless lengths are given."""
    prompt = settings.max_tokens // 2 if asked.prompt_tokens is None else asked.prompt_tokens
    return Job(
        roles=(role,),
        bfloat16=settings.precision == "bfloat16",
        checkpointed=settings.checkpoint_activations,
        token_budget=settings.token_budget,
        num_trees=settings.batch_size,
        prompt_tokens=prompt,
        reply_tokens=max(1, settings.max_tokens - prompt if asked.reply_tokens is None else asked.reply_tokens),
        replies=replies,
        up_to=asked.up_to,
    )


def sft_job(settings: Any, shapes: ShapesOnPaper, asked: OnPaper) -> Job:
    """An update of the sft stage."""
    return _supervised(settings, _trained("policy", shapes.of(settings.model), settings), asked, replies=1)


def reward_job(settings: Any, shapes: ShapesOnPaper, asked: OnPaper) -> Job:
    """An update of the reward stage: a pair for each prompt."""
    role = _trained("reward model", shapes.of(settings.model, scalar=True), settings)
    return _supervised(settings, role, asked, replies=2)


def preference_job(settings: Any, shapes: ShapesOnPaper, asked: OnPaper) -> Job:
    """An update of the preference stage: a pair for each prompt. A reference scores every pair once, before the first
    update; that is counted as a pass for each step, as it is with a single epoch."""
    passes = 1 if settings.loss.needs_reference else 0
    role = _trained("policy", shapes.of(settings.model), settings, passes=passes)
    return _supervised(settings, role, asked, replies=2)


def online_job(settings: Any, shapes: ShapesOnPaper, asked: OnPaper) -> Job:
    """A step of the online stage, with a model for each role that has one."""
    lora, exact = settings.adapter, settings.kl_estimator == "exact"
    shape = shapes.of(settings.model)
    again = 1 if exact else 0
    old = 1 if settings.scores_old_policy(max(1, settings.critic.warmup_steps)) else 0
    roles = [_trained("policy", shape, settings, passes=old + again)]
    of_reference = shapes.of(settings.reference or settings.model)
    shares = lora is not None and settings.reference in (None, settings.model)
    roles.append(RoleOnPaper(name="reference", shape=of_reference, on_base=shares, passes=1 + again))
    judges = [reward.path for reward in settings.rewards if hasattr(reward, "path")]
    if settings.advantage.needs_critic and settings.critic.init != "value_head":
        starts = [settings.critic.path, *(judges if settings.critic.init == "reward" else ()), settings.model]
        start = shapes.of(next(path for path in starts if path is not None), scalar=True)
        roles.append(_trained("critic", start, settings, on_base=True, passes=1))
    for number, path in enumerate(judges, start=1):
        name = "reward model" if len(judges) == 1 else f"reward model {number}"
        roles.append(RoleOnPaper(name=name, shape=shapes.of(path, scalar=True), controller_only=True, passes=1))
    sampling = settings.sampling
    return Job(
        roles=tuple(roles),
        bfloat16=settings.precision == "bfloat16",
        checkpointed=settings.checkpoint_activations,
        token_budget=settings.token_budget,
        num_trees=settings.prompts_per_step,
        prompt_tokens=sampling.max_prompt_tokens if asked.prompt_tokens is None else asked.prompt_tokens,
        reply_tokens=sampling.max_new_tokens if asked.reply_tokens is None else asked.reply_tokens,
        replies=settings.group_size,
        up_to=asked.up_to,
        num_epochs=settings.num_epochs,
        num_minibatches=settings.num_minibatches,
        entropy=bool(settings.entropy_coef),
        sampling=SamplingOnPaper(
            batch_size=sampling.batch_size, cache_gib=sampling.cache_gb, bfloat16=sampling.precision == "bfloat16"
        ),
    )


NOT_COUNTED = ("pretraining_mix", "environment", "dynamic_sampling")
"""Settings that add work to a step which a plan on paper does not count, and says so."""
JOBS = {"sft": sft_job, "reward": reward_job, "preference": preference_job, "online": online_job}
"""The stages that are planned on paper."""


def show(plans: list[PaperPlan], others: list[str], console: Console) -> None:
    """Prints the plans, and every constant that they rest on."""
    for plan in plans:
        show_one(plan, console)
    if others:
        console.print(f"not planned on paper: {', '.join(others)}; rehearse them where they are to run", soft_wrap=True)
    if plans:
        console.print(f"constants of {plans[0].machine.name}, and where each comes from:")
        table = Table(box=None, pad_edge=False)
        for title in ("", "", "", "from"):
            table.add_column(title, overflow="fold")
        for name, constant in plans[0].machine.constants.items():
            table.add_row(name, f"{constant.value:.3g} {constant.unit}", constant.origin, constant.source)
        console.print(table)


def show_one(plan: PaperPlan, console: Console) -> None:
    """Prints the plan of one stage."""
    job, num, time = plan.job, plan.spread.processes, plan.time

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    say(f"{plan.name}, on paper: {plan.place} of {plan.machine['memory']:.0f} GiB")
    for caution in plan.cautions:
        say(f"  ! {caution}")
    say(
        f"  a step: {job.num_trees} prompts of {job.prompt_tokens:,} tokens with {job.replies} x {job.reply_tokens:,} "
        f"of replies; {job.num_micro(num)} micro-batches of up to {job.micro_tokens(num):,} tokens"
    )
    console.print(memory_table(plan))
    for line in verdict(plan):
        say(f"  {line}")
    laps = {
        "sampling": time.sampling,
        "scoring": time.scoring,
        "updates": time.update,
        "communication": time.communication,
    }
    parts = ", ".join(f"{name} {seconds:,.2f} s" for name, seconds in laps.items() if seconds)
    say(f"  a step takes {time.total:,.2f} s: {parts}")
    if plan.num_steps is not None:
        cost = plan.cost(plan.num_steps)
        bill = "" if cost is None else f" and cost {cost:,.2f} at {plan.price:g} an hour each"
        say(f"  {plan.num_steps} steps take {duration(plan.num_steps * time.total)}{bill}")
    elif (cost := plan.cost(1000)) is not None:
        say(f"  a thousand steps cost {cost:,.2f} at {plan.price:g} an hour each")


def memory_table(plan: PaperPlan) -> Table:
    """What the controller and each worker hold, each at its own peak."""
    table = Table(box=None, pad_edge=False)
    table.add_column("  GiB")
    columns = {"the process": plan.controller}
    if plan.worker is not None:
        columns = {"controller": plan.controller, "each worker": plan.worker}
    if plan.sampler is not None:
        columns["each sampler"] = plan.sampler
    for title in columns:
        table.add_column(title, justify="right")
    rows = [rows_of(held) for held in columns.values()]
    last = list(rows[0])[-3:]
    for part in (*dict.fromkeys(name for row in rows for name in row if name not in last), *last):
        table.add_row(f"  {part}", *(gib(row.get(part)) for row in rows))
    return table


def rows_of(held: Holding) -> dict[str, float]:
    """The bytes of each part at the peak; the last three are what the allocator reserves beyond tensors, what a process
    takes without any, and the sum."""
    phase = held.peak_phase
    during = {f"{part}, in {phase}": size for part, size in held.phases[phase].items()}
    rest = {"slack of the allocator": held.slack * held.tensors, "context and libraries": held.fixed}
    return {**held.held, **during, **rest, "in all": held.total}


def gib(size: float | None) -> str:
    """A number of bytes in GiB, or nothing."""
    return "" if size is None else f"{size / GIB:.2f}"


def verdict(plan: PaperPlan) -> list[str]:
    """Whether the plan fits, what does not, and the cheapest change."""
    needed, there = gib(plan.needed), f"{plan.machine['memory']:.0f} GiB"
    if plan.fits:
        return [f"fits: {needed} of {there}"]
    lines = [f"does not fit: {needed} of {there}; first too much are the {plan.first_too_much}"]
    found = remedies(plan)
    for remedy in found:
        how = "an adapter instead of all weights" if remedy.alters else "the same weights trained"
        lines.append(
            f"cheapest change, {how}: {', '.join(remedy.changes)}: {gib(remedy.plan.needed)} GiB, "
            f"{remedy.plan.time.total:,.2f} s a step, {remedy.plan.place}"
        )
        lines += [f"  ! {said}" for said in remedy.plan.cautions]
    return lines if found else [*lines, "no change that is known here makes it fit"]
