"""Makes the engines of a stage: in this process, or spread over several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.core.errors import EngineError
from trimtab.core.process import note_workers
from trimtab.data.chat import Chat
from trimtab.engines.base import Learner, Scorer
from trimtab.engines.device import EngineSettings
from trimtab.engines.group import WorkerGroup
from trimtab.engines.launchers import find_launcher
from trimtab.engines.local.form_choice import FormChoice
from trimtab.engines.local.learner import AdamW, LocalLearner
from trimtab.engines.local.replies import Sampling
from trimtab.engines.local.sampler import LocalSampler
from trimtab.engines.local.scorer import LocalScorer
from trimtab.engines.replica import checksums, local_learner, prepared
from trimtab.engines.samplers.pool import PooledSampler, SamplerPool
from trimtab.engines.spread import SpreadLearner, SpreadSampler, SpreadScorer
from trimtab.models.load import load_causal, load_tokenizer
from trimtab.models.precision import Precision
from trimtab.models.roles import Policy, ScalarModel

LoadRoles = Callable[[Any, Path], tuple[str | None, Mapping[str, Policy | ScalarModel]]]


@dataclass(frozen=True)
class Engines:
    """Makes the engines of one run. With workers they end with it: `with engines: …`."""

    settings: EngineSettings = field(default_factory=EngineSettings)
    group: WorkerGroup | None = None
    """The workers; None if there are none."""
    learners: dict[str, LocalLearner | SpreadLearner] = field(default_factory=dict)
    """The learners that were made, by the names of their roles."""
    pools: dict[str, SamplerPool] = field(default_factory=dict)
    """The processes that draw replies, by the names of the roles they draw from."""

    @classmethod
    def start(
        cls, settings: Any, directory: Path, *, load: LoadRoles, models: Mapping[str, Policy | ScalarModel]
    ) -> Engines:
        """The engines for a stage with these settings, whose `engine` says how many processes compute.

        `models` are those in this process, by the names of their roles. Workers get theirs by calling `load`, a
        function of a module, with the settings and the directory of the run: it returns the path of the tokenizer
        (None if nothing is sampled) and the models. Raises EngineError if their weights are others.
        """
        engine: EngineSettings = settings.engine
        if engine.workers == 1:
            return cls(engine)
        group = WorkerGroup(
            engine.workers,
            launcher=find_launcher(engine),
            limit_seconds=engine.timeout_seconds,
            load=f"{load.__module__}:{load.__qualname__}",
            settings=settings,
            directory=directory,
        )
        ours = checksums(models)
        for rank, theirs in enumerate(group.checksums, start=1):
            if theirs != ours:
                group.close()
                raise EngineError(
                    f"worker {rank} loaded other weights than the controller (sums {theirs} and {ours})",
                    where="engine.workers",
                    fix="see that the model's files do not change while the run starts; please report this otherwise",
                )
        return cls(engine, group)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        peaks: list[float] = []
        if self.group is not None and not self.group.closed:
            if kind is None:
                for learner in self.learners.values():
                    learner.hold()  # what follows, such as saving the model, needs no other process
                peaks += self._everywhere("peak_rss_gb", {})
            self.group.close()
        for pool in self.pools.values():
            if kind is None:
                peaks += pool.peaks_rss_gb()
            pool.close()
        note_workers(peaks)

    def learner(
        self,
        role: Policy | ScalarModel,
        optimizer: AdamW,
        *,
        name: str,
        token_budget: int,
        num_updates: int,
        precision: Precision = "float32",
        checkpoint_activations: bool = False,
    ) -> Learner:
        """The learner of a role; `name` is that of the role."""
        options: dict[str, Any] = {"name": name, "token_budget": token_budget, "num_updates": num_updates}
        role = prepared(role, precision, checkpoint_activations)
        if self.group is None:
            self.learners[name] = LocalLearner(role, optimizer, **options)
            return self.learners[name]
        how = {"optimizer": optimizer, "precision": precision, "checkpoint_activations": checkpoint_activations}
        self.group.call("make_learner", [{**options, **how, "sharded": self.settings.shard}] * (self.group.size - 1))
        with self.group.working("make_learner"):
            made = local_learner(role, optimizer, sharded=self.settings.shard, **options)
        self.group.answers("make_learner")
        self.learners[name] = SpreadLearner(made, group=self.group)
        return self.learners[name]

    def scorer(
        self, role: Policy | ScalarModel, *, name: str, token_budget: int, precision: Precision = "float32"
    ) -> Scorer:
        """The scorer of a role that is not trained."""
        local = LocalScorer(prepared(role, precision, False), token_budget=token_budget)
        if self.group is None:
            return local
        self._everywhere("make_scorer", {"name": name, "token_budget": token_budget, "precision": precision})
        return SpreadScorer(local, name=name, group=self.group)

    def sampler(
        self,
        policy: Policy,
        chat: Chat,
        sampling: Sampling,
        *,
        name: str = "policy",
        choice: FormChoice | None = None,
        watched: bool = True,
    ) -> LocalSampler:
        """A sampler of the role with this name; see `LocalSampler`."""
        options: dict[str, Any] = {"choice": choice, "watched": watched}
        if self.settings.sampler.name != "local":
            return PooledSampler(policy, chat, sampling, pool=self._pool(policy, chat, sampling, name))
        if self.group is None:
            return LocalSampler(policy, chat, sampling, **options)
        whole = partial(self._whole, name)
        return SpreadSampler(policy, chat, sampling, name=name, group=self.group, whole=whole, **options)

    def _pool(self, policy: Policy, chat: Chat, sampling: Sampling, name: str) -> SamplerPool:
        """The processes that draw from a role, which all of its samplers share."""
        if name not in self.pools:
            self.pools[name] = SamplerPool(
                policy,
                chat,
                self.settings.sampler,
                sampling,
                revision=lambda: self.learners[name].revision if name in self.learners else 0,
                whole=partial(self._whole_everywhere, name),
                limit_seconds=self.settings.timeout_seconds,
            )
        return self.pools[name]

    def _whole_everywhere(self, name: str) -> AbstractContextManager[None]:
        """Inside this block the role has all its weights, in every process: workers are called to gather them."""
        learner = self.learners.get(name)
        return learner.whole() if isinstance(learner, SpreadLearner) else nullcontext()

    def _whole(self, name: str) -> AbstractContextManager[None]:
        """Inside this block the role has all its weights; workers are inside such a block of their own."""
        learner = self.learners.get(name)
        if isinstance(learner, SpreadLearner):
            return learner.local.whole()
        return nullcontext()

    def _everywhere(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """The answers of all workers to one call."""
        assert self.group is not None
        self.group.call(method, [arguments] * (self.group.size - 1))
        return self.group.answers(method)


def load_policy(path: str, chat: Chat, settings: Any) -> Policy:
    """The policy of a checkpoint, to sample from as `settings` with `engine` and `sampling` say."""
    model = load_causal(path, device=settings.engine.find_device())
    return Policy(model, pad_id=chat.pad_id, temperature=settings.sampling.temperature)


def sampling_roles(settings: Any, _directory: Path) -> tuple[str, dict[str, Policy]]:
    """The roles of a stage that samples from `settings.model`, and from a baseline if it has one."""
    chat = Chat(load_tokenizer(settings.model))
    paths = {"policy": settings.model, "baseline": getattr(settings, "baseline", None)}
    return settings.model, {name: load_policy(path, chat, settings) for name, path in paths.items() if path is not None}
