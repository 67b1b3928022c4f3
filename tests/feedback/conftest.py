"""Stores for the tests: SQLite always, PostgreSQL where Debian's server is installed."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.feedback.projects import make_project, make_store
from tests.feedback.running import Running
from trimtab.feedback import items, people
from trimtab.feedback.importing import seed_items
from trimtab.feedback.store import Store, open_store

Make = Callable[..., Store]
Start = Callable[..., Running]


def _postgres_binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing is made slow on purpose; tests of other things need not wait for it."""
    monkeypatch.setitem(people._SCRYPT, "n", 16)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server of its own, reached by a socket in a temporary folder."""
    initdb, server = _postgres_binary("initdb"), _postgres_binary("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="trimtab-pg-", dir="/tmp"))
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    running = {"user": user} if user else {}
    subprocess.run(
        [initdb, "-D", data, "-U", "trimtab", "--auth=trust", "--no-sync"], check=True, capture_output=True, **running
    )
    process = subprocess.Popen(
        [server, "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **running,
    )
    try:
        _wait_until_ready(folder)
        yield f"postgresql://trimtab@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)  # end open connections too
        process.wait(timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(folder: Path) -> None:
    import time

    import psycopg

    for _ in range(200):
        try:
            psycopg.connect(f"host={folder} user=trimtab dbname=postgres").close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"PostgreSQL did not start for {getpass.getuser()}")


@pytest.fixture(params=["sqlite", "postgresql"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes stores of a project's settings, in either database."""
    stores: list[Store] = []

    def one(values: dict[str, Any] | None = None) -> Store:
        folder = tmp_path / str(len(stores))
        folder.mkdir()
        values = dict(values or {})
        if request.param == "postgresql":
            values["store"] = new_database(request.getfixturevalue("postgres"))
        stores.append(make_store(folder, values))
        return stores[-1]

    yield one
    for store in stores:
        store.close()


def new_database(server: str) -> str:
    """The URL of a new database of a server."""
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Make]:
    """Makes stores in SQLite."""
    stores: list[Store] = []

    def one(values: dict[str, Any] | None = None) -> Store:
        folder = tmp_path / str(len(stores))
        folder.mkdir()
        stores.append(make_store(folder, values))
        return stores[-1]

    yield one
    for store in stores:
        store.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers of projects and stops them."""
    servers: list[Running] = []

    def one(values: dict[str, Any] | None = None, new: list[items.NewItem] | None = None) -> Running:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        project = make_project(folder, {"data": [] if new else ["world:helpdesk?num=40"], **(values or {})})
        (folder / "guideline.md").write_text("# Judge well\n\nBe fair.", encoding="utf-8")
        store = open_store(project)
        if new:
            items.add_items(store, [("test", one) for one in new])
        else:
            seed_items(store)
        store.close()
        servers.append(Running(project))
        return servers[-1]

    yield one
    for server in servers:
        if server.process.poll() is None:
            server.stop()
