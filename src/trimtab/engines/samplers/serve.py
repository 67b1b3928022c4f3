"""A process that draws replies for a controller: `python -m trimtab.engines.samplers.serve`, started by `SamplerPool`.

With vLLM it may run in an environment of its own, since vLLM asks for other versions of libraries than trimtab is
tested with. It answers three calls: `update` takes new weights, `sample` draws, `peak_rss_gb` says how much memory it
has held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trimtab.core.errors import EngineError, TrimtabError
from trimtab.core.process import own_peak_rss_gb
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import load_tokenizer
from trimtab.engines.launch import when_parent_ends
from trimtab.engines.links import KEY, connect
from trimtab.engines.local.replies import DecodingForm, ReplyBuffer, Sampling
from trimtab.engines.messages import decode, encode
from trimtab.engines.samplers.process import PORT
from trimtab.engines.samplers.weights import SamplerStart

_END_SECONDS = 5.0
"""After its link has closed, a process waits so long for its controller's end."""
CALLS = ("update", "sample", "peak_rss_gb")
"""The methods of `SamplerServer` that a controller may call."""


class ServedForm(DecodingForm, Protocol):
    """A form of decoding that has weights of its own."""

    def update(self, directory: Path, revision: int) -> None:
        """Takes the weights in `directory`, which are revision `revision`."""


class SamplerServer:
    """Draws replies with the weights of the last update."""

    def __init__(self, start: SamplerStart) -> None:
        self.chat = Chat(load_tokenizer(start.tokenizer))
        self.form = _form(start, self.chat)
        self.revision = -1
        """The revision of its weights; -1 before the first update."""

    def update(self, *, directory: str, revision: int) -> None:
        """Takes the weights in `directory`."""
        self.revision = -1  # if this fails, its weights are of no revision
        self.form.update(Path(directory), revision)
        self.revision = revision

    def sample(
        self,
        *,
        revision: int,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        uniforms: Tensor,
        limits: Tensor,
        sampling: Sampling,
        stop_ids: Sequence[int],
        unnamed: Tensor | None,
    ) -> Mapping[str, Tensor]:
        """The columns of a `ReplyBuffer` with `group_size` replies to each prompt. Raises EngineError if its weights
        are of another revision."""
        if revision != self.revision:
            raise EngineError(
                f"weights after {revision} changes were to be drawn from, and the sampler has those of {self.revision}",
                where="engine.sampler",
                fix="please report this; the same command goes on from the last checkpoint",
            )
        replies = ReplyBuffer(uniforms, sampling, self.chat, limits, stop_ids=stop_ids, unnamed=unnamed)
        self.form.decode(prompts, group_size, replies)
        return replies.columns()

    def peak_rss_gb(self) -> float:
        """The most memory that this process has held."""
        return own_peak_rss_gb()


def _form(start: SamplerStart, chat: Chat) -> ServedForm:
    if start.engine == "vllm":
        from trimtab.engines.samplers.vllm_form import VllmForm

        return VllmForm(start)
    from trimtab.engines.samplers.own_form import OwnForm

    return OwnForm(start, chat)


def main() -> int:
    """Answers calls until the controller ends. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the controller says when to stop
        signal.signal(number, signal.SIG_IGN)
    link = connect("127.0.0.1", int(os.environ[PORT]), os.environ.pop(KEY))
    begin = decode(link.recv_bytes())

    def end() -> None:
        shutil.rmtree(begin["scratch"], ignore_errors=True)  # a controller that was killed could not
        os._exit(1)

    when_parent_ends(end)
    try:
        server = SamplerServer(begin["start"])
        link.send_bytes(encode({"answer": None}))
        while True:
            call = decode(link.recv_bytes())
            assert call["do"] in CALLS, call["do"]
            link.send_bytes(encode({"answer": getattr(server, call["do"])(**call["arguments"])}))
    except EOFError:
        time.sleep(_END_SECONDS)  # the controller ends, and this process with it
        return 1
    except Exception as error:  # whatever ends the process is to be known to the controller
        traceback.print_exc()
        said = {"problem": f"{type(error).__name__}: {error}", "where": "engine.sampler", "fix": "please report this"}
        if isinstance(error, TrimtabError):
            said = {"problem": error.problem, "where": error.where, "fix": error.fix}
        with contextlib.suppress(OSError):  # the controller has ended
            link.send_bytes(encode({"error": said}))
        return 1


if __name__ == "__main__":
    sys.exit(main())
