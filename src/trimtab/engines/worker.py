"""A process that computes for a controller: `python -m trimtab.engines.worker RANK`, started by `WorkerGroup`."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from trimtab.core.errors import TrimtabError
from trimtab.data.chat import Chat
from trimtab.data.tokenizers import load_tokenizer
from trimtab.engines.group import Caller, is_lost
from trimtab.engines.replica import CALLS, Replica


def main(rank: int) -> int:
    """Answers calls until the controller ends. Returns the exit code."""
    caller = Caller(rank)
    try:
        begin = caller.begin()
        module, _, function = begin["load"].partition(":")
        load = getattr(importlib.import_module(module), function)
        tokenizer, roles = load(begin["settings"], Path(begin["directory"]))
        replica = Replica(roles, None if tokenizer is None else Chat(load_tokenizer(tokenizer)))
        caller.answer(replica.checksums())
        while (call := caller.next_call()) is not None:
            method, arguments = call
            assert method in CALLS, method
            caller.answer(getattr(replica, method)(**arguments))
    except TrimtabError as error:
        caller.fail(error)
        return 2
    except Exception as error:  # whatever ends a worker is to be known to the controller
        if not is_lost(error):  # else another process has ended, and the controller sees which
            traceback.print_exc()
            caller.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
