"""A process that draws replies for a controller: `python -m trimtab.engines.samplers.serve`, started by `SamplerPool`.

With vLLM it may run in an environment of its own, since vLLM asks for other versions of libraries than trimtab is
tested with. It answers three calls: `update` takes new weights, `sample` draws, `peak_rss_gb` says how much memory it
has held.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trimtab.core.errors import EngineError, TrimtabError
from trimtab.core.process import own_peak_rss_gb
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import load_tokenizer
from trimtab.engines.local.replies import DecodingForm, ReplyBuffer, Sampling
from trimtab.engines.messages import decode, encode
from trimtab.engines.samplers.process import KEY, PORT
from trimtab.engines.samplers.weights import SamplerStart

_SIGNAL_WHEN_PARENT_ENDS = 1  # PR_SET_PDEATHSIG of Linux
CALLS = ("update", "sample", "peak_rss_gb")
"""The methods of `SamplerServer` that a controller may call."""


class ServedForm(DecodingForm, Protocol):
    """A form of decoding that has weights of its own."""

    def update(self, directory: Path, version: int) -> None:
        """Takes the weights in `directory`, which are version `version`."""
        ...


class SamplerServer:
    """Draws replies with the weights of the last update."""

    def __init__(self, start: SamplerStart) -> None:
        self.chat = Chat(load_tokenizer(start.tokenizer))
        self.form = _form(start, self.chat)
        self.version = -1
        """The version of its weights; -1 before the first update."""

    def update(self, *, directory: str, version: int) -> None:
        """Takes the weights in `directory`."""
        self.version = -1  # if this fails, its weights are of no version
        self.form.update(Path(directory), version)
        self.version = version

    def sample(
        self,
        *,
        version: int,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        uniforms: Tensor,
        limits: Tensor,
        sampling: Sampling,
        stop_ids: Sequence[int],
        unnamed: Tensor | None,
    ) -> Mapping[str, Tensor]:
        """The columns of a `ReplyBuffer` with `group_size` replies to each prompt. Raises EngineError if its weights
        are of another version."""
        if version != self.version:
            raise EngineError(
                f"version {version} of the weights was to be drawn from, and the sampler has version {self.version}",
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
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_ENDS, signal.SIGUSR1)
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the controller says when to stop
        signal.signal(number, signal.SIG_IGN)
    link = Client(("127.0.0.1", int(os.environ[PORT])), authkey=bytes.fromhex(os.environ.pop(KEY)))
    begin = decode(link.recv_bytes())

    def end(*_: Any) -> None:
        shutil.rmtree(begin["scratch"], ignore_errors=True)  # the controller cannot do it if it was killed
        os._exit(1)

    signal.signal(signal.SIGUSR1, end)
    if sys.platform == "linux" and os.getppid() == 1:  # it ended before the call above
        end()
    try:
        server = SamplerServer(begin["start"])
        link.send_bytes(encode({"answer": None}))
        while True:
            try:
                call = decode(link.recv_bytes())
            except (EOFError, OSError):
                end()
            assert call["do"] in CALLS, call["do"]
            link.send_bytes(encode({"answer": getattr(server, call["do"])(**call["arguments"])}))
    except Exception as error:  # whatever ends the process is to be known to the controller
        traceback.print_exc()
        said = {"problem": f"{type(error).__name__}: {error}", "where": "engine.sampler", "fix": "please report this"}
        if isinstance(error, TrimtabError):
            said = {"problem": error.problem, "where": error.where, "fix": error.fix}
        link.send_bytes(encode({"error": said}))
        return 1


if __name__ == "__main__":
    sys.exit(main())
