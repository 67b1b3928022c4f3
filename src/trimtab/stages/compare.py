"""Sample replies and have a world's annotators compare them.

The pairs and their votes are those that a reward model or a preference loss is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, groupby

from trimtab import worlds
from trimtab.core import seeds
from trimtab.core.errors import ConfigError
from trimtab.core.files import write_rows
from trimtab.core.types import PreferencePair, Prompt, Rollout, to_dict
from trimtab.data.chat import Chat
from trimtab.engines.build import Engines, load_policy, sampling_roles
from trimtab.engines.device import EngineSettings
from trimtab.engines.local.sampler import LocalSampler, Sampling
from trimtab.models.load import load_tokenizer
from trimtab.runs.run import Run
from trimtab.stages.stage import Stage, few_prompts
from trimtab.worlds import World
from trimtab.worlds.annotators import Annotators, calibrate


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of the compare stage."""

    model: str
    """The checkpoint to sample from."""
    world: str
    """The world whose prompts and annotators are used."""
    num_prompts: int = 1000
    """Prompts for training pairs."""
    num_held_out_prompts: int = 250
    """Prompts, of another split, for the pairs a reward model is judged by."""
    replies_per_prompt: int = 2
    """Replies sampled for each training prompt, every two of them compared; held-out prompts get two."""
    num_annotators: int = 20
    """Simulated annotators, taking the pairs in turn."""
    votes_per_pair: int = 1
    """Annotators who vote on each pair. In training pairs the label is the share that agrees; held out, each vote is a
    pair of its own."""
    agreement: float = 0.70
    """How often two annotators agree on a pair; sets their noise. Real teams report 0.65 to 0.75."""
    question: str | None = None
    """What annotators are asked, of a world with several questions, such as "harm" of helpdesk_harm; None asks which
    reply has more gold."""
    biases: dict[str, float] | None = None
    """What annotators like and the gold score does not, in units of gold; None takes the world's own biases."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """How the stage is computed."""
    seed: int = 0
    """Seed of prompts, replies and votes."""

    def __post_init__(self) -> None:
        if self.replies_per_prompt < 2:
            raise ValueError(f"replies_per_prompt = {self.replies_per_prompt}; a comparison needs at least 2")
        if not 1 <= self.votes_per_pair <= self.num_annotators:
            raise ValueError(
                f"votes_per_pair = {self.votes_per_pair} with num_annotators = {self.num_annotators}: "
                "each vote on a pair is another annotator's"
            )


def run(settings: CompareSettings, run: Run) -> None:
    """Writes train.jsonl and held_out.jsonl (preference pairs) into the run directory."""
    world = worlds.load(settings.world)
    if settings.question is not None and settings.question not in world.questions:
        raise ConfigError(
            f"no question of the world {settings.world} is called {settings.question!r}",
            where="question",
            fix=f"use {' or '.join(world.questions)}" if world.questions else "leave it out: this world has none",
        )
    chat = Chat(load_tokenizer(settings.model))
    policy = load_policy(settings.model, chat, settings)
    with Engines.start(settings, run.directory, load=sampling_roles, models={"policy": policy}) as engines:
        compare(settings, run, world, engines.sampler(policy, chat, settings.sampling))


def compare(settings: CompareSettings, run: Run, world: World, generator: LocalSampler) -> None:
    """Samples, has the pairs voted on, and finishes the run."""
    run.add_data(f"world:{settings.world}", "", settings.num_prompts + settings.num_held_out_prompts)
    run.note_path("sampler", generator.sampler)
    summary: dict[str, object] = {}
    annotators: Annotators | None = None
    asked = {
        "train": world.prompts("train", settings.num_prompts, seed=settings.seed),
        "held_out": world.prompts("test", settings.num_held_out_prompts, seed=settings.seed),
    }
    generator.check_prompts(prompt for prompts in asked.values() for prompt in prompts)
    for name, prompts in asked.items():
        num_replies = settings.replies_per_prompt if name == "train" else 2
        seed = seeds.derive(settings.seed, "compare", name)
        pairs, identical = sampled_pairs(generator.generate(prompts, group_size=num_replies, seed=seed))
        if annotators is None:
            own = world.biases if settings.question is None else world.questions[settings.question]
            biases = own if settings.biases is None else settings.biases
            annotators = calibrate(world, biases, pairs, agreement=settings.agreement, question=settings.question)
        voted = []
        for i, pair in enumerate(pairs):
            voters = [
                (i * settings.votes_per_pair + k) % settings.num_annotators for k in range(settings.votes_per_pair)
            ]
            ballots = [voters] if name == "train" else [[voter] for voter in voters]
            voted += [vote(annotators, pair, ballot, settings.seed) for ballot in ballots]
        write_rows(run.directory / f"{name}.jsonl", map(to_dict, voted))
        summary |= {
            f"num_{name}_pairs": len(voted),
            f"num_{name}_identical_pairs": identical,
            f"{name}_agreement": annotators.expected_agreement(pairs),
            f"{name}_logprob_difference": generator.difference,
            f"{name}_bayes_accuracy": annotators.bayes_accuracy(pairs),
        }
    assert annotators is not None
    run.finish(summary | {"annotator_scale": annotators.scale} | {"sampler": generator.sampler})


def sampled_pairs(rollouts: Sequence[Rollout]) -> tuple[list[tuple[Prompt, str, str]], int]:
    """Every two replies of a prompt as (prompt, one, another), and the number of pairs left out because both replies
    were the same or one was empty."""
    pairs = [
        (prompt, a.response, b.response)
        for prompt, group in groupby(rollouts, key=lambda r: r.prompt)
        for a, b in combinations(group, 2)
    ]
    different = [(p, a, b) for p, a, b in pairs if a.strip() and b.strip() and a != b]
    return different, len(pairs) - len(different)


def vote(annotators: Annotators, pair: tuple[Prompt, str, str], voters: Sequence[int], seed: int) -> PreferencePair:
    """The votes of some annotators as a preference pair whose label is the share of the majority.

    The probability that one annotator prefers `chosen` is kept among the prompt's facts, so that a reward model can be
    compared with the best that is possible with such annotators.
    """
    prompt, a, b = pair
    num_for_a = sum(annotators.vote(prompt, a, b, annotator=voter, seed=seed) == "A" for voter in voters)
    chosen, rejected = (a, b) if 2 * num_for_a >= len(voters) else (b, a)
    probability = annotators.preference_probability(prompt, chosen, rejected)
    return PreferencePair(
        prompt=replace(prompt, facts=dict(prompt.facts) | {"probability_chosen": probability}),
        chosen=chosen,
        rejected=rejected,
        label=max(num_for_a, len(voters) - num_for_a) / len(voters),
    )


STAGE = Stage(
    settings=CompareSettings,
    run=run,
    writes=("train.jsonl", "held_out.jsonl"),
    few=few_prompts("num_prompts", "num_held_out_prompts"),
    about="Replies were sampled in pairs and judged by annotators.",
)
