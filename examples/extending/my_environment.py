"""An environment of your own, in one file:

trimtab online run.toml 'environment="examples/extending/my_environment.py:SecondLook"' sampling.max_new_tokens=128
"""

from dataclasses import dataclass
from typing import ClassVar

from trimtab.core.types import Observation, Prompt


@dataclass(frozen=True, kw_only=True)
class SecondLook:
    """Asks the policy to correct its first reply, and ends with the second (two attempts as in SCoRe: Kumar et al.,
    arXiv:2409.12917). Both are trained; what is asked in between is not. Logs `rollout/changed_replies`."""

    request: str = "Look again: correct what is wrong, and give the whole answer once more."
    """What the user says to the first reply."""

    stop: ClassVar[tuple[str, ...]] = ()  # a turn ends with the end token alone

    def load(self) -> "SecondLook":
        """The environment itself; nothing needs loading."""
        return self

    def reset(self, prompt: Prompt, *, seed: int) -> list[str]:
        """The replies so far: none."""
        return []

    def step(self, state: list[str], turn: str) -> Observation:
        """The request after the first reply, the end after the second."""
        state.append(turn)
        if len(state) == 1:
            return Observation(text=self.request, new_turn=True)
        return Observation(done=True, events={"changed_replies": int(state[0] != state[1])})
