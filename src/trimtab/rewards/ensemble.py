"""Several reward models that give one score, and how far they disagree.

The directory of an ensemble is that of its first member, an ordinary model, with the others under `members/` and
`ensemble.json`. Members are put on one scale before they are compared: mean 0 and a common deviation over the replies
that the reward stage held out. Otherwise a member with a larger scale alone would decide the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.batches.device import CPU
from trimtab.batches.trees import TokenTrees, split_by_tokens
from trimtab.core.errors import EngineError
from trimtab.core.hub import ENSEMBLE_FILE, base_of, members_in, read_json
from trimtab.core.metrics import Metrics, mean_of
from trimtab.core.types import Rollout
from trimtab.data.chat import Chat
from trimtab.math.ensembles import Aggregate, aggregate
from trimtab.models.lengths import positions_of
from trimtab.models.load import load_scalar, load_tokenizer
from trimtab.models.roles import ScalarModel
from trimtab.models.trunk import Trunk
from trimtab.rewards.scorer import RewardModelScorer, member_on
from trimtab.rewards.written_text import Ids


class EnsembleScorer(RewardModelScorer):
    """Scores replies with all members, and aggregates."""

    def __init__(
        self,
        members: Sequence[ScalarModel],
        chat: Chat,
        *,
        token_budget: int,
        means: Sequence[float],
        scales: Sequence[float],
        shift: float,
        how: tuple[Aggregate, float | None] = ("mean", None),
        name: str = "model",
    ) -> None:
        """`means` are subtracted from the members' scores, `scales` multiply them after that, and `shift` is subtracted
        from their aggregate."""
        super().__init__(members[0], chat, token_budget=token_budget, shift=shift)
        self.members = list(members)
        self.means, self.scales = torch.tensor(means)[:, None], torch.tensor(scales)[:, None]
        self.how = how
        self.name = name
        found = [n for member in members if (n := positions_of(member.model)) is not None]
        self.positions = min(found, default=None)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        token_budget: int,
        device: torch.device = CPU,
        name: str = "model",
        shared: PreTrainedModel | None = None,
        how: tuple[Aggregate, float | None] = ("mean", None),
    ) -> EnsembleScorer:
        """The frozen ensemble of a directory. Members that are adapters are put on one base, `shared` if it is given.
        Raises EngineError if its file is damaged."""
        scale = scale_in(path)
        paths, chat = members_in(path), Chat(load_tokenizer(path))
        base = base_of(paths[0])
        if base is None:
            models = [load_scalar(member, device=device) for member in paths]
            members = [ScalarModel(model, pad_id=chat.pad_id, gives="scores") for model in models]
        else:
            model = load_scalar(base, head_seed=0, device=device) if shared is None else shared
            members = [
                member_on(model, f"reward_{name}_member_{number}", member, pad_id=chat.pad_id)
                for number, member in enumerate(paths)
            ]
        return cls(members, chat, token_budget=token_budget, how=how, name=name, **scale)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, Metrics]:
        """[B] aggregated rewards, and `reward/NAME_disagreement`: the mean over replies of the deviation between the
        members' scores."""
        sequences = self.ids_of(rollouts)
        scores = self.member_scores(sequences)
        metrics: Metrics = {f"reward/{self.name}_disagreement": mean_of(scores.std(0, correction=0).tolist())}
        return aggregate(scores, *self.how) - self.shift, metrics | self.length_metrics(sequences)

    def score_ids(self, sequences: Sequence[Ids]) -> Tensor:
        """[B] aggregated rewards of prompts and replies given as ids."""
        return aggregate(self.member_scores(sequences), *self.how) - self.shift

    def member_scores(self, sequences: Sequence[Ids]) -> Tensor:
        """[K, B] each member's scores on the common scale, before the shift, and corrected for length if that is asked
        for."""
        trees, where = self.trees_of(sequences)
        scores = (scores_of_members(self.members, trees, self.token_budget)[:, where] - self.means) * self.scales
        return self._corrected(scores, sequences)


def scale_in(path: str) -> dict[str, Any]:
    """The `means`, `scales` and `shift` in the file of an ensemble, one mean and scale for each member. Raises
    EngineError unless all are finite numbers and scales above 0: anything else is no work of the reward stage."""
    file = Path(path).expanduser() / ENSEMBLE_FILE
    facts = read_json(file)
    members, means, scales = (facts.get(key) for key in ("members", "means", "scales"))
    lists = [row for row in (members, means, scales) if isinstance(row, list) and row]
    if len(lists) < 3 or len({len(row) for row in lists}) > 1:
        raise _damaged("does not name members with a mean and a scale each", file)
    scale = {"means": means, "scales": scales, "shift": facts.get("shift")}
    for name, value in scale.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(x, int | float) and math.isfinite(x) and (x > 0 or name != "scales") for x in numbers):
            raise _damaged(f"holds {name} = {value!r:.60}", file)
    return scale


def _damaged(what: str, file: Path) -> EngineError:
    return EngineError(
        f"{ENSEMBLE_FILE} {what}",
        where=str(file),
        fix="copy the directory again, or train the ensemble anew",
    )


@torch.no_grad()
def scores_of_members(members: Sequence[ScalarModel], trees: TokenTrees, token_budget: int) -> Tensor:
    """[K, B] the scores of K members at the last token of each sequence.

    Members that are adapters on one base pass through the blocks that none of them changes together, once.
    """
    scores = torch.empty(len(members), trees.num_sequences)
    on_one_base = all(member.model is members[0].model and member.is_decoder for member in members)
    trunk = Trunk(members[0].model) if on_one_base else None
    for indices in split_by_tokens(trees, token_budget):
        piece, places = trees.select(indices), trees.index_of("sequence", indices)
        for number, member in enumerate(members):
            if trunk is None:
                scores[number, places] = member(piece).scores
                continue
            with trunk.used() if number else trunk.kept():
                scores[number, places] = member(piece).scores
    return scores
