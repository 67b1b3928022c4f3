"""Serves the live view on this machine until it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from trimtab.core.errors import ConfigError
from trimtab.feedback.server.serve import listening
from trimtab.ui.app import create_app


def serve(root: Path, *, host: str, port: int, show: Callable[[str], None] = print) -> None:
    """Serves the runs below `root`, and prints the address first.

    Raises ConfigError for a directory that is not there, a host that other machines can reach, or a port in use.
    """
    refuse_other_machines(host)
    if not root.is_dir():
        raise ConfigError(f"no directory {root}", where="trimtab ui", fix="give the directory that holds the runs")
    with listening(host, port, where="trimtab ui") as (listener, address):
        app = create_app(root)
        watch = app.state.watch
        show(f"runs below {root} (Ctrl-C stops the view, never a run): open")
        show(f"  {address}/enter?key={watch.key}")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(config)
        watch.ending = lambda: server.should_exit
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once it has ended
            server.run(sockets=[listener])


def refuse_other_machines(host: str) -> None:
    """Raises ConfigError for a host that is not this machine alone."""
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"the host {host!r} lets other machines in, and the view has no sign-in and no encryption for them",
            where="trimtab ui --host",
            fix="leave it at 127.0.0.1, and from another machine tunnel: ssh -L 8790:127.0.0.1:8790 THIS_MACHINE",
        )
