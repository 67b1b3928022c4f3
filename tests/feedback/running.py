"""A real server in a process of its own, as `trimtab feedback serve` starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen


class Running:
    """The server of a project, its address and the two first links."""

    def __init__(self, project: Path, port: int = 0) -> None:
        self.project = project
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimtab", "feedback", "serve", str(project), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if " is at http" in line:
                break
        else:
            raise AssertionError("the server did not start:\n" + "\n".join(self.said))
        found = re.search(r"is at (http://\S+)", self.said[-1])
        assert found
        self.address = found[1]
        self.port = int(self.address.rpartition(":")[2])
        self._await_answer()
        self.links = [line.strip() for line in self.said if "/join#" in line]

    def _await_answer(self) -> None:
        """Waits until the server has answered: from then on a signal reaches the server, also where the tests were
        started with Ctrl-C switched off, as background jobs are."""
        with suppress(HTTPError), urlopen(self.address, timeout=60) as answer:
            answer.read()

    def stop(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(2)
        self.process.wait(timeout=20)
        self._close()

    def kill(self) -> None:
        """As a power cut of the process."""
        self.process.kill()
        self.process.wait(timeout=20)
        self._close()

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
