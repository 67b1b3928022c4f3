import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.hostile_code import ATTACKS, FORGERIES, HONEST, forgery_tests, hostile_code
from tests.sandbox.exam_cases import CASES
from trimtab.core.errors import EngineError
from trimtab.sandbox.sandbox import WALLS, Limits, Sandbox

LIMITS = Limits(seconds=0.6, memory_mb=256, num_processes=4, file_mb=8)
UNHURRIED = Limits(seconds=20, file_mb=8)


# In another interpreter.
ALONE = "from trimtab.sandbox.sandbox import Limits, Sandbox\n"


@pytest.fixture(scope="module", params=WALLS)
def sandbox(request):
    """One sandbox for each kind of wall that this machine has."""
    try:
        return Sandbox(LIMITS, walls=[request.param])
    except EngineError as error:
        pytest.skip(f"needs {request.param}: {error.problem}")


@pytest.fixture(scope="module")
def unhurried(sandbox):
    """The same walls, for code that is to succeed on a busy machine too."""
    return Sandbox(UNHURRIED, walls=[sandbox.walls])


@pytest.fixture
def roomy():
    """The best walls of this machine and more time, for what is about right and wrong."""
    return any_sandbox(UNHURRIED)


def any_sandbox(limits, **options):
    try:
        return Sandbox(limits, **options)
    except EngineError as error:
        pytest.skip(f"needs namespaces or Landlock: {error.problem}")


@pytest.fixture
def outside(tmp_path):
    """A secret in a folder of its own, and a listening socket."""
    secret = tmp_path / "home" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("the secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield secret, server


def running():
    """Processes of sandboxes that this process owns; they are copies of a supervisor and have its command line."""
    mark, found = f'"owner": {os.getpid()}'.encode(), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_achieves_anything_or_leaves_anything(name, sandbox, unhurried, outside):
    secret, server = outside
    before = secret.stat()
    code = hostile_code(
        ATTACKS[name],
        secret=str(secret),
        home=str(Path.home()),
        owner=os.getpid(),
        port=server.getsockname()[1],
        file_mb=LIMITS.file_mb,
    )
    started = time.monotonic()
    exam = sandbox.examine(
        code, ["found = attack()\nif found: raise ValueError(f'achieved {found}')\nassert found == []"]
    )
    assert "achieved" not in exam.message
    assert not exam.refused
    assert time.monotonic() - started < LIMITS.seconds + 20  # about half a second; the rest is for a busy machine
    assert running() == []
    assert secret.read_text() == "the secret"
    assert [p.name for p in secret.parent.iterdir()] == [secret.name]
    assert (secret.stat().st_mode, secret.stat().st_mtime) == (before.st_mode, before.st_mtime)
    with pytest.raises(BlockingIOError):
        server.accept()
    assert unhurried.examine(HONEST, ["assert answer() == 42"]).passed == (True,)


def test_the_attacks_do_achieve_something_without_walls(outside):
    """So that the silence above means something."""
    secret, server = outside
    sandbox = Sandbox(UNHURRIED, walls=[], allow_unisolated=True)
    for name in ("read /etc/passwd", "read the user's secret", "network", "all file descriptors", "write outside"):
        code = hostile_code(
            ATTACKS[name],
            secret=str(secret),
            home=str(Path.home()),
            owner=os.getpid(),
            port=server.getsockname()[1],
            file_mb=LIMITS.file_mb,
        )
        message = sandbox.examine(code, ["found = attack()\nassert found == [], f'achieved {found}'"]).message
        assert ("achieved" in message) == (name != "all file descriptors"), name
    for path in ("/tmp", "/var/tmp", "/dev/shm", "/"):
        (Path(path) / "trimtab-hostile").unlink(missing_ok=True)


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes_a_test(name, sandbox):
    exam = sandbox.examine(textwrap.dedent(FORGERIES[name]), forgery_tests(783461))
    assert not any(exam.passed)
    assert not exam.refused
    assert running() == []


def test_the_tests_of_the_forgeries_can_be_passed(roomy):
    exam = roomy.examine("def answer(): return 42", forgery_tests(42))
    assert exam.passed == (True, True, True, True, True, False, True, True)
    assert roomy.examine("def answer(): return '42'", [forgery_tests(42)[5]]).passed == (True,)


def test_what_was_passed_before_the_time_was_up_counts():
    sandbox = any_sandbox(Limits(seconds=3))
    code = "def f(n):\n    while n > 1: pass\n    return n"
    exam = sandbox.examine(code, [f"assert f({n}) == {n}" for n in range(4)])
    assert exam.passed == (True, True, False, False)
    assert exam.timed_out
    assert "limits" in exam.message


def test_programs_read_input_and_print(unhurried):
    output = unhurried.run("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(3)", "1 2 3\n4")
    assert (output.stdout, output.timed_out) == ("10\n", False)


def test_a_program_that_floods_its_output_is_cut_off(sandbox):
    output = sandbox.run("while True: print('x' * 10000)")
    assert len(output.stdout) <= LIMITS.file_mb << 20


def test_what_code_may_do(unhurried):
    code = """
        import asyncio, collections, dataclasses, decimal, fractions, heapq, json, random, re, statistics
        async def one(): return 1
        def run(): return asyncio.run(one())
        def half(): return fractions.Fraction(1, 2), decimal.Decimal("0.1"), statistics.mean([1, 2])
    """
    tests = [
        "assert run() == 1",
        "from fractions import *\nfrom decimal import *\nassert half() == (Fraction(1, 2), Decimal('0.1'), 1.5)",
    ]
    exam = unhurried.examine(textwrap.dedent(code), tests)
    assert exam.passed == (True, True), exam.message


def test_there_are_threads_processes_and_files_behind_namespaces():
    try:
        sandbox = Sandbox(UNHURRIED, walls=["namespaces"])
    except EngineError as error:
        pytest.skip(f"needs namespaces: {error.problem}")
    code = """
        import os, threading
        def thread():
            found = []
            worker = threading.Thread(target=found.append, args=(1,)); worker.start(); worker.join()
            return found
        def process():
            child = os.fork()
            if child == 0: os._exit(7)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        def file():
            with open("x.txt", "w") as f: f.write("hello")
            return open("/work/x.txt").read()
    """
    tests = ["assert thread() == [1]", "assert process() == 7", "assert file() == 'hello'"]
    exam = sandbox.examine(textwrap.dedent(code), tests)
    assert exam.passed == (True, True, True), exam.message


@pytest.mark.parametrize("name", CASES)
def test_tests_see_the_code_as_if_it_were_beside_them(name, roomy):
    code, test = CASES[name]
    exam = roomy.examine(code, [test])
    assert exam.passed == (True,), exam.message


def test_only_entry_points_are_taken_from_the_code_where_they_are_named(roomy):
    code = "def sum(a, b): return a + b\ndef helper(): return 1"
    tests = ["assert sum(2, 3) == 5", "assert helper() == 1"]
    assert roomy.examine(code, tests).passed == (False, True)
    assert roomy.examine(code, tests, entry_points=["sum"]).passed == (True, False)


def test_a_check_function_is_called_with_the_entry_point(roomy):
    test = "def check(candidate):\n    assert candidate(2) == 4"
    assert roomy.examine("def f(x): return 2 * x", [test], entry_points=["f"]).passed == (True,)
    assert roomy.examine("def f(x): return x", [test], entry_points=["f"]).passed == (False,)


def test_tests_that_cannot_judge_are_refused(roomy):
    assert "no Python" in roomy.examine(HONEST, ["assert ("]).refused
    assert "generator" in roomy.examine("def f(x): return 1", ["f(x for x in [])"]).refused


def test_setup_is_run_before_each_test(roomy):
    code = "def double(x): return 2 * x"
    assert roomy.examine(code, ["x += 1\nassert double(x) == 4"] * 2, setup="x = 1").passed == (True, True)


def test_packages_can_be_imported_where_they_are_named(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "helper_package.py").write_text("VALUE = 5")
    code, test = "import helper_package\ndef f(): return helper_package.VALUE", "assert f() == 5"
    assert any_sandbox(UNHURRIED).examine(code, [test]).passed == (False,)
    assert any_sandbox(UNHURRIED, packages=[str(tmp_path)]).examine(code, [test]).passed == (True,)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, whose sandboxes run as nobody")
def test_packages_that_nobody_may_read_are_refused(tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(EngineError, match="not readable by everyone"):
        Sandbox(LIMITS, packages=[str(tmp_path)], walls=["namespaces"])


def test_without_walls_it_refuses_unless_that_is_allowed():
    with pytest.raises(EngineError, match="allow_unisolated = true"):
        Sandbox(LIMITS, walls=[])
    assert Sandbox(LIMITS, walls=[], allow_unisolated=True).walls == "none"


def test_where_namespaces_are_refused_landlock_is_used():
    # Root of a user namespace without a user to become: what a container without rights looks like.
    code = ALONE + "print(Sandbox(Limits(seconds=20)).examine('def f(): return 1', ['assert f() == 1']).passed)\n"
    code += "print(Sandbox(Limits(seconds=20)).walls)\n"
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs the command unshare of util-linux")
    if "unshare failed" in done.stderr or "older than version 3" in done.stderr:
        pytest.skip(f"needs user namespaces and Landlock: {done.stderr[-200:]}")
    assert done.stdout.split("\n")[:2] == ["(True,)", "landlock"], done.stderr


def test_nothing_is_left_when_the_owner_is_killed():
    code = ALONE + textwrap.dedent("""
        import os, threading, time
        sandbox = Sandbox(Limits(seconds=60))
        threading.Thread(target=sandbox.run, args=("while True: pass",), daemon=True).start()
        print(os.getpid(), flush=True)
        time.sleep(60)
    """)
    any_sandbox(LIMITS)
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())

    def left():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if f'"owner": {pid}'.encode() in path.read_bytes():
                    found.append(path.parent.name)
            except OSError:
                continue
        return found

    assert wait_until(lambda: len(left()) >= 2)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert wait_until(lambda: not left())


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("setting", [{"seconds": 0}, {"memory_mb": 1}, {"num_processes": 0}, {"file_mb": 0}])
def test_limits_that_leave_nothing_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Limits(**setting)
