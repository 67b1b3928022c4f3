"""Connections between the processes of a run, on one machine or several. Both ends prove that they know the key.

The proof is the challenge of `multiprocessing.connection` (an HMAC of random bytes), so the key itself is never sent.
What is sent afterwards is not encrypted. A stranger that connects and says nothing is given up after a few seconds.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from types import TracebackType

KEY = "TRIMTAB_GROUP_KEY"
"""The variable of the environment that holds the key."""
_PROOF_SECONDS = 5.0
"""Within this time a caller has to prove that it knows the key."""
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_SILENT_SECONDS, _ASK_SECONDS, _NUM_ASKED = 30, 10, 3
"""A machine that went away without a word is noticed by the system after a minute: TCP asks whether it is there."""


class LinkListener:
    """Takes calls of processes that know the key."""

    def __init__(self, interface: str, key: str, *, port: int = 0) -> None:
        """Listens on one interface ("127.0.0.1") or on all (""), at a free port if none is given. Raises OSError if the
        port is taken."""
        self._key = key.encode()
        self._socket = socket.create_server((interface, port))

    @property
    def port(self) -> int:
        """The port."""
        port: int = self._socket.getsockname()[1]
        return port

    def accept(self, seconds: float) -> Connection | None:
        """The link to the next caller; None if nobody called in this time, or somebody who does not know the key."""
        self._socket.settimeout(seconds)
        try:
            caller, _ = self._socket.accept()
        except (TimeoutError, ConnectionAbortedError):
            return None
        return _proved(caller, self._key, first=True)

    def close(self) -> None:
        """Takes no more calls; links stay open."""
        self._socket.close()

    def __enter__(self) -> LinkListener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def connect(host: str, port: int, key: str) -> Connection:
    """A link to the process that listens there. Raises OSError if none does, or one that does not know the key."""
    link = _proved(socket.create_connection((host, port), timeout=_PROOF_SECONDS), key.encode(), first=False)
    if link is None:
        raise ConnectionError(f"what listens at {host}:{port} does not know the key of this run")
    return link


def interface_of(link: Connection) -> str | None:
    """The network interface of this machine that a link uses, such as "eth0"; None if it stays within the machine, or
    if the system does not say."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(fileno=os.dup(link.fileno())) as connected:
        address = connected.getsockname()[0]
        for _, name in socket.if_nameindex() if not address.startswith("127.") else ():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(connected, _GET_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def interface_beyond(links: Iterable[Connection]) -> str | None:
    """The interface of the first of these links that leaves this machine; None if none does. A process on the machine
    of the other end may be linked by a loopback address although further processes are elsewhere."""
    return next((name for link in links if (name := interface_of(link)) is not None), None)


def receive(link: Connection, seconds: float) -> bytes | None:
    """The next message; None if there is none within this time. Raises EOFError or OSError if the other end is gone."""
    return link.recv_bytes() if link.poll(seconds) else None


def _proved(connected: socket.socket, key: bytes, *, first: bool) -> Connection | None:
    """The link, once both ends have proved that they know the key; None if the other does not. One of them asks
    first."""
    with connected:
        connected.settimeout(None)
        link = Connection(os.dup(connected.fileno()))
        too_late = threading.Timer(_PROOF_SECONDS, _hang_up, [connected])
        too_late.start()
        try:
            for ask in (first, not first):
                (deliver_challenge if ask else answer_challenge)(link, key)
        except (AuthenticationError, AssertionError, EOFError, OSError):
            link.close()
            return None
        finally:
            too_late.cancel()
        _notice_silence(connected)
    return link


def _hang_up(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connected.shutdown(socket.SHUT_RDWR)


def _notice_silence(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENT_SECONDS),
            (socket.TCP_KEEPINTVL, _ASK_SECONDS),
            (socket.TCP_KEEPCNT, _NUM_ASKED),
            # It does not ask while something sent is unanswered, which is sent again for a quarter of an hour.
            (socket.TCP_USER_TIMEOUT, 1000 * (_SILENT_SECONDS + _NUM_ASKED * _ASK_SECONDS)),
        ):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
