"""Plans a run on paper: from the run file, the config.json of its models and a table of machine constants.

`trimtab plan FILE --on h100` needs neither the machine nor the weights. What a stage holds and computes is written down
here as a `Job`; bytes and seconds are counted in `engines`. Lengths of prompts and replies are taken from the run file,
as long as it allows, unless they are given, because data is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab.core.errors import ConfigError
from trimtab.core.hub import same_model
from trimtab.engines.machines import find_machine
from trimtab.engines.paper import PaperPlan, remedies
from trimtab.engines.placement import ASSUMPTIONS, GIB, Holding, Job, RoleOnPaper, SamplingOnPaper, Spread
from trimtab.models.shape import ModelShape
from trimtab.rewards.combined import judges_and_measure
from trimtab.rewards.model import ModelReward
from trimtab.stages.paper_models import ModelsOnPaper, adapter_weights
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
        values = _on_gpus(values, asked, where=where)
    elif asked.gpus != 1:
        raise ConfigError(
            f"--gpus {asked.gpus} on a machine without GPUs", where=f"--on {asked.on}", fix="set --workers instead"
        )
    place = Path("runs/plan")
    models = ModelsOnPaper(place)
    plans, others = [], []
    for name, (stage, settings) in resolve_stages(values, place, where=where).items():
        models.add(name, settings)
        if stage not in JOBS:
            others.append(name)
            continue
        refuse_lengths(name, settings, asked)
        engine = settings.engine
        if engine.shard and settings.adapter is not None:
            raise ConfigError(
                "the frozen base of an adapter is not sharded",
                where=f"stages.{name}: engine.shard and adapter",
                fix="set engine.shard = false, or train all weights",
            )
        job = JOBS[stage](settings, models, asked)
        elsewhere = engine.sampler.name != "local" and not machine.is_device(engine.sampler.device)
        plans.append(
            PaperPlan(
                name=name,
                job=replace(job, sampling=None) if elsewhere else job,
                machine=machine,
                spread=Spread(processes=engine.workers, shard=engine.shard, assumed=frozenset(asked.assume)),
                num_steps=getattr(settings, "num_steps", None) or getattr(settings, "max_steps", None),
                price=asked.price,
                left_out=tuple(not_counted(settings, elsewhere=elsewhere)),
            )
        )
    return plans, others


def _on_gpus(values: Mapping[str, Any], asked: OnPaper, *, where: str) -> dict[str, Any]:
    """The values of a pipeline with a process for each GPU, as those of a CPU, because a run on several GPUs is
    refused. Values in which an engine is no table stay as they are, and are refused when they are resolved."""
    stages = values.get("stages")
    if not isinstance(stages, Mapping):
        return dict(values)
    given = []
    for table in (values, *stages.values()):
        engine = table.get("engine", {}) if isinstance(table, Mapping) else None
        if not isinstance(engine, Mapping) or not isinstance(engine.get("workers", 1), int):
            return dict(values)
        given += [engine["workers"]] if "workers" in engine else []
    if other := [workers for workers in given if workers != asked.gpus]:
        raise ConfigError(
            f"engine.workers = {other[0]} with {asked.gpus} of {asked.on}: each process has a GPU of its own",
            where=where,
            fix=f"say --gpus {other[0]}, or leave engine.workers out",
        )
    on = {"engine": {"device": "cpu", "workers": asked.gpus}}
    return {**values, "stages": {name: overlay(table, on) for name, table in stages.items()}}


def refuse_lengths(name: str, settings: Any, asked: OnPaper) -> None:
    """Raises ConfigError for lengths of which the stage could not read or draw a single example."""
    sampling, prompt, reply = getattr(settings, "sampling", None), asked.prompt_tokens or 0, asked.reply_tokens or 1
    if sampling is None:
        limits = [(f"--prompt-tokens {prompt} and --reply-tokens {reply}", prompt + reply, "max_tokens")]
    else:
        limits = [
            (f"--prompt-tokens {prompt}", prompt, "sampling.max_prompt_tokens"),
            (f"--reply-tokens {reply}", reply, "sampling.max_new_tokens"),
        ]
    for given, tokens, key in limits:
        most = getattr(sampling or settings, key.rpartition(".")[2])
        if tokens > most:
            raise ConfigError(
                f"{given}, and {key} = {most}",
                where=f"stages.{name}",
                fix=f"raise {key} to {tokens} in the run file, or plan for shorter examples",
            )


def not_counted(settings: Any, *, elsewhere: bool) -> Iterator[str]:
    """What these settings ask for and a plan on paper does not count. `elsewhere` says that replies are drawn by
    another processor than the one that is planned for."""
    for key in ("pretraining_mix", "environment", "dynamic_sampling"):
        if getattr(settings, key, None) is not None:
            yield key
    if getattr(getattr(settings, "loss", None), "needs_ranking", False):
        yield "replies of a ranking beyond the first two"
    sampler = settings.engine.sampler
    if not hasattr(settings, "sampling"):
        return
    if elsewhere:
        yield f"drawing replies on engine.sampler.device = {sampler.device!r}"
    elif sampler.name == "vllm":
        yield "how much faster vLLM draws than trimtab itself"
    if settings.engine.max_staleness:
        yield "the time that is won by engine.max_staleness"


def _trained(name: str, shape: ModelShape, settings: Any, *, on_base: bool = False, passes: int = 0) -> RoleOnPaper:
    """A role that is trained as the settings say: whole, or as an adapter."""
    lora = settings.adapter
    return RoleOnPaper(
        name=name,
        shape=shape,
        trained=True,
        adapter=0 if lora is None else adapter_weights(shape, lora),
        on_base=on_base and lora is not None,
        bits=32 if lora is None else lora.base_bits,
        passes=passes,
    )


def _reference(settings: Any, models: ModelsOnPaper, *, passes: int) -> RoleOnPaper:
    """The reference of a policy: what the policy starts from, or another model. Beside an adapter it is the policy's
    base, another adapter on it, or a model of its own."""
    path = settings.reference or settings.model
    model, base = models.find(path), _shared_base(settings, models)
    adapted = model.is_adapter_of(base)
    return RoleOnPaper(
        name="reference",
        shape=model.shape,
        adapter=model.adapter if adapted else 0,
        on_base=adapted or (base is not None and same_model(path, base)),
        starts_policy=same_model(path, settings.model),
        passes=passes,
    )


def _shared_base(settings: Any, models: ModelsOnPaper) -> str | None:
    """The model on which a stage trains adapters; None if it trains all weights."""
    return None if settings.adapter is None else models.find(settings.model).base or settings.model


def _judges(settings: Any, models: ModelsOnPaper, called: str = "reward model") -> list[RoleOnPaper]:
    """The reward models, each member of an ensemble for itself. Those that are adapters stand on the base of the
    policy's adapter, if it is theirs; else, as those of a teacher always do, those of an ensemble share one base, and a
    single one is merged into its own."""
    paths = [reward.path for reward in judges_and_measure(settings).values() if isinstance(reward, ModelReward)]
    base, roles = None if called == "teacher" else _shared_base(settings, models), []
    for number, path in enumerate(paths, start=1):
        model = models.find(path, scalar=True)
        name = called if len(paths) == 1 else f"{called} {number}"
        on_policy = model.is_adapter_of(base)
        kept_apart = on_policy or model.members > 1
        for member in range(model.members):
            roles.append(
                RoleOnPaper(
                    name=name if model.members == 1 else f"{name}, member {member}",
                    shape=model.shape,
                    adapter=model.adapter if kept_apart else 0,
                    on_base=on_policy or (member > 0 and model.base is not None),
                    controller_only=True,
                    passes=1,
                )
            )
    return roles


def _supervised(settings: Any, roles: tuple[RoleOnPaper, ...], asked: OnPaper, replies: int) -> Job:
    """The job of a stage that trains on records: half of the longest example is prompt, unless lengths are given."""
    longest, prompt, reply = settings.max_tokens, asked.prompt_tokens, asked.reply_tokens
    if prompt is None:
        prompt = longest // 2 if reply is None else min(longest // 2, longest - reply)
    return Job(
        roles=roles,
        bfloat16=settings.precision == "bfloat16",
        checkpointed=settings.checkpoint_activations,
        token_budget=settings.token_budget,
        num_trees=settings.batch_size,
        prompt_tokens=prompt,
        reply_tokens=longest - prompt if reply is None else reply,
        replies=replies,
        up_to=asked.up_to,
    )


def sft_job(settings: Any, models: ModelsOnPaper, asked: OnPaper) -> Job:
    """An update of the sft stage."""
    role = _trained("policy", models.find(settings.model).shape, settings)
    return _supervised(settings, (role,), asked, replies=1)


def reward_job(settings: Any, models: ModelsOnPaper, asked: OnPaper) -> Job:
    """An update of the reward stage: a pair for each prompt, and a model for each member, which are trained in turn.
    Members that are adapters have one base. A teacher scores every pair once, before the first update; that is counted
    as a pass for each step, as it is with a single epoch, and as if its models stayed in memory."""
    shape = models.find(settings.model, scalar=True).shape
    names = ["reward model", *(f"reward model, member {number}" for number in range(1, settings.members))]
    roles = tuple(_trained(name, shape, settings, on_base=number > 0) for number, name in enumerate(names))
    return _supervised(settings, (*roles, *_judges(settings, models, "teacher")), asked, replies=2)


def preference_job(settings: Any, models: ModelsOnPaper, asked: OnPaper) -> Job:
    """An update of the preference stage: a pair for each prompt. A reference scores every pair once, before the first
    update; that is counted as a pass for each step, as it is with a single epoch. A reference that the policy starts
    from is the policy itself then, or its base."""
    passes = 1 if settings.loss.needs_reference else 0
    reference = _reference(settings, models, passes=passes)
    own = bool(passes) and not reference.on_base and not reference.starts_policy
    policy = _trained("policy", models.find(settings.model).shape, settings, passes=0 if own else passes)
    return _supervised(settings, (policy, reference) if own else (policy,), asked, replies=2)


def online_job(settings: Any, models: ModelsOnPaper, asked: OnPaper) -> Job:
    """A step of the online stage, with a model for each role that has one."""
    shape = models.find(settings.model).shape
    again = 1 if settings.kl_estimator == "exact" else 0
    old = 1 if settings.scores_old_policy(max(1, settings.critic.warmup_steps)) else 0
    roles = [_trained("policy", shape, settings, passes=old + again)]
    roles.append(_reference(settings, models, passes=1 + again))
    if settings.has_own_critic:
        start = models.find(settings.critic_start(), scalar=True).shape
        roles.append(_trained("critic", start, settings, on_base=True, passes=1))
    if (start_of_cost := settings.cost_critic_start) is not None:
        of_cost = models.find(start_of_cost, scalar=True).shape
        roles.append(_trained("cost critic", of_cost, settings, on_base=True, passes=1))
    sampling, sampler = settings.sampling, settings.engine.sampler
    return Job(
        roles=(*roles, *_judges(settings, models)),
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
            batch_size=sampling.batch_size,
            cache_gib=sampling.cache_gb,
            bfloat16=sampling.precision == "bfloat16",
            processes=0 if sampler.name == "local" else sampler.processes,
            vllm_share=sampler.gpu_memory if sampler.name == "vllm" else None,
        ),
    )


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
