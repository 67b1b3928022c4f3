"""Comparisons on a world: sample replies from a checkpoint and let the world's simulated annotators vote on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trimtab import seeds, worlds
from trimtab.data.chat import Chat
from trimtab.engines.local_generator import LocalGenerator, Sampling
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.roles import Policy
from trimtab.runs.run import Run
from trimtab.types import PreferencePair, Prompt, to_dict
from trimtab.worlds.annotators import Annotators, calibrate


@dataclass(frozen=True, kw_only=True)
class Settings:
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
    """Replies sampled of each prompt; they are compared two by two."""
    num_annotators: int = 20
    """Simulated annotators; each pair is shown to one of them."""
    agreement: float = 0.70
    """How often two annotators agree on a pair; sets their noise. Real teams report 0.65 to 0.75."""
    biases: dict[str, float] | None = None
    """What annotators like that the gold score does not, in units of gold; None takes the world's own."""
    sampling: Sampling = field(default_factory=Sampling)
    """How replies are drawn."""
    seed: int = 0
    """Seed of prompts, replies and votes."""

    def __post_init__(self) -> None:
        if self.replies_per_prompt < 2 or self.replies_per_prompt % 2:
            raise ValueError(f"replies_per_prompt = {self.replies_per_prompt}; it must be even, as replies are paired")


def run(settings: Settings, run: Run) -> None:
    """Writes train.jsonl and held_out.jsonl (preference pairs) into the run directory."""
    world = worlds.load(settings.world)
    chat = Chat(load_tokenizer(settings.model))
    generator = LocalGenerator(Policy(load_causal(settings.model), pad_id=chat.pad_id), chat, settings.sampling)
    run.add_data(f"world:{settings.world}", "", settings.num_prompts + settings.num_held_out_prompts)
    summary: dict[str, object] = {}
    annotators: Annotators | None = None
    for name, split, num in (
        ("train", "train", settings.num_prompts),
        ("held_out", "test", settings.num_held_out_prompts),
    ):
        prompts = world.prompts(split, num, seed=settings.seed)  # type: ignore[arg-type]
        pairs, identical = sampled_pairs(prompts, generator, settings, purpose=name)
        if annotators is None:
            biases = world.biases if settings.biases is None else settings.biases
            annotators = calibrate(world, biases, pairs, agreement=settings.agreement)
        voted = [vote(annotators, pair, i % settings.num_annotators, settings.seed) for i, pair in enumerate(pairs)]
        with (run.directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(to_dict(pair), ensure_ascii=False) + "\n" for pair in voted)
        summary |= {
            f"num_{name}_pairs": len(voted),
            f"num_{name}_identical_pairs": identical,
            f"{name}_agreement": annotators.expected_agreement(pairs),
            f"{name}_bayes_accuracy": annotators.bayes_accuracy(pairs),
        }
    assert annotators is not None
    run.finish(summary | {"annotator_scale": annotators.scale})


def sampled_pairs(
    prompts: Sequence[Prompt], generator: LocalGenerator, settings: Settings, *, purpose: str
) -> tuple[list[tuple[Prompt, str, str]], int]:
    """(prompt, one reply, another) and the number of pairs left out because both replies were the same."""
    rollouts = generator.generate(
        prompts, group_size=settings.replies_per_prompt, seed=seeds.derive(settings.seed, "compare", purpose)
    )
    texts = [r.response for r in rollouts]
    pairs = [(rollouts[i].prompt, texts[i], texts[i + 1]) for i in range(0, len(texts), 2)]
    different = [(p, a, b) for p, a, b in pairs if a.strip() and b.strip() and a != b]
    return different, len(pairs) - len(different)


def vote(annotators: Annotators, pair: tuple[Prompt, str, str], annotator: int, seed: int) -> PreferencePair:
    """One annotator's vote as a preference pair. The chance of that vote is kept among the prompt's facts, so that
    a reward model can be held against the best anyone could do with such annotators."""
    prompt, a, b = pair
    prefers_a = annotators.vote(prompt, a, b, annotator=annotator, seed=seed) == "A"
    chosen, rejected = (a, b) if prefers_a else (b, a)
    probability = annotators.preference_probability(prompt, chosen, rejected)
    facts = dict(prompt.facts) | {"probability_chosen": probability}
    return PreferencePair(prompt=replace(prompt, facts=facts), chosen=chosen, rejected=rejected)
