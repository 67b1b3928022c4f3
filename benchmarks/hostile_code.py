"""Code that tries to get out of a sandbox, to use up the machine, or to pass tests it does not pass.

Each piece defines `attack()`, which gives back a list of what it achieved: the one test of each is that this list is
empty, or that the code was ended before it could say so. Placeholders in capitals are filled in by `hostile_code`.
"""

from __future__ import annotations

import textwrap

_TRY = """
    done = []
    def attempt(what, action):
        try:
            action()
        except BaseException:
            pass
        else:
            done.append(what)
"""

ATTACKS = {
    "fork bomb": """
        import os
        def attack():
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
        """,
    "fork bomb while loading": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
    "memory bomb": """
        def attack():
            held = []
            while True:
                try:
                    held.append(bytearray(32 << 20))
                except MemoryError:
                    pass
        """,
    "memory bomb in processes": """
        import os, time
        def attack():
            for _ in range(64):
                try:
                    if os.fork() == 0:
                        break
                except OSError:
                    pass
            held = []
            while True:
                try:
                    held.append(bytearray(8 << 20))
                except MemoryError:
                    time.sleep(0.01)
        """,
    "memory outside the address space": """
        import os, ctypes
        def attack():
            TRY
            attempt("memfd", lambda: os.memfd_create("x"))
            libc = ctypes.CDLL(None, use_errno=True)
            def shared_segment():
                if libc.shmget(0, ctypes.c_size_t(64 << 20), 0o1600) < 0:
                    raise OSError(ctypes.get_errno())
            attempt("shmget", shared_segment)
            return done
        """,
    "endless loop": """
        def attack():
            while True:
                pass
        """,
    "endless loop that catches everything": """
        import signal, time
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        def attack():
            while True:
                try:
                    time.sleep(1)
                except BaseException:
                    pass
        """,
    "thread bomb": """
        import threading, time
        def attack():
            threading.stack_size(1 << 16)
            started = 0
            try:
                while True:
                    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                    started += 1
            except (RuntimeError, MemoryError):
                return [started] if started > 16 else []
        """,
    "read /etc/passwd": """
        import os
        def attack():
            TRY
            for path in ("/etc/passwd", "/etc/hostname", "/proc/self/../../etc/passwd", "/work/../etc/passwd"):
                attempt(path, lambda: open(path).read())
            return done
        """,
    "read the user's secret": """
        import os, sys
        def attack():
            TRY
            def list_home():
                # the way to Python's own files may lead through it
                if not set(os.listdir("HOME")) - set(sys.base_prefix.split("/")):
                    raise OSError
            attempt("secret", lambda: open("SECRET").read())
            attempt("its folder", lambda: os.listdir(os.path.dirname("SECRET")))
            attempt("home", list_home)
            attempt("other processes", lambda: os.listdir("/proc"))
            attempt("the owner's environment", lambda: open("/proc/OWNER/environ", "rb").read())
            return done
        """,
    "write outside": """
        import os
        def attack():
            TRY
            folder = os.path.dirname("SECRET")
            attempt("overwrite", lambda: open("SECRET", "w").write("gone"))
            attempt("cut", lambda: os.truncate("SECRET", 0))
            attempt("delete", lambda: os.unlink("SECRET"))
            attempt("mode", lambda: os.chmod("SECRET", 0o777))
            attempt("times", lambda: os.utime("SECRET", (0, 0)))
            attempt("create", lambda: open(folder + "/new", "w"))
            attempt("link", lambda: os.symlink("/etc/passwd", folder + "/link"))
            attempt("hard link", lambda: os.link("SECRET", "stolen"))
            attempt("folder", lambda: os.mkdir(folder + "/new"))
            for place in ("/tmp", "/var/tmp", "/dev/shm", "/"):
                attempt(place, lambda: open(place + "/trimtab-hostile", "w").write("x"))
            return done
        """,
    "tamper with the standard library": """
        import decimal, json, os
        def attack():
            TRY
            folder = os.path.dirname(json.__file__)
            attempt("module", lambda: open(decimal.__file__, "a").write("#"))
            attempt("new module", lambda: open(os.path.dirname(folder) + "/evil.py", "w"))
            path = folder
            while path != "/":
                attempt("rename " + path, lambda: os.rename(path, path + ".old"))
                path = os.path.dirname(path)
            return done
        """,
    "network": """
        import socket
        def attack():
            TRY
            attempt("loopback", lambda: socket.create_connection(("127.0.0.1", PORT), 0.2))
            attempt("outside", lambda: socket.create_connection(("192.0.2.1", 80), 0.2))
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
                attempt(str(family), lambda: socket.socket(family, socket.SOCK_DGRAM))
            attempt("names", lambda: socket.getaddrinfo("example.org", 80))
            return done
        """,
    "flood of output": """
        import os
        def attack():
            block = b"x" * (1 << 20)
            while True:
                for fd in (1, 2):
                    try:
                        os.write(fd, block)
                    except OSError:
                        pass
        """,
    "flood of messages": """
        def attack():
            return ["x" * (200 << 20)]
        """,
    "signals": """
        import os, signal
        def attack():
            TRY
            for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
                attempt("owner", lambda: os.kill(OWNER, number))
                try:
                    os.kill(os.getppid(), number)
                    os.killpg(os.getpgid(os.getppid()), number)
                    os.killpg(0, 0)
                    os.kill(-1, number)
                except OSError:
                    pass
            return done
        """,
    "signals by other ways": """
        import fcntl, os, resource, signal
        def attack():
            TRY
            read, write = os.pipe()
            def owner_of_a_pipe():
                fcntl.fcntl(read, fcntl.F_SETOWN, OWNER)
                fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
                os.write(write, b"x")
            attempt("SIGIO", owner_of_a_pipe)
            attempt("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open(OWNER), signal.SIGKILL))
            attempt("limits", lambda: resource.prlimit(OWNER, resource.RLIMIT_CPU, (1, 1)))
            attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, OWNER, 19))
            attempt("cores", lambda: os.sched_setaffinity(OWNER, {0}))
            return done
        """,
    "double fork into a session of its own": """
        import os, time
        def attack():
            TRY
            def escape():
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        while True:
                            time.sleep(0.05)
                    os._exit(0)
                os.wait()
            try:
                escape()
            except OSError:
                pass
            os._exit(0)
        """,
    "sleeping orphan": """
        import os, time
        try:
            if os.fork() == 0:
                time.sleep(3600)
        except OSError:
            pass
        def attack():
            os._exit(0)
        """,
    "all file descriptors": """
        import os
        def attack():
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                return [len(held)] if len(held) > 64 else []
        """,
    "huge files": """
        import os
        def attack():
            written = 0
            for i in range(1000):
                try:
                    with open(f"file{i}", "wb", buffering=0) as file:
                        for _ in range(100):
                            written += file.write(bytes(1 << 20))
                except OSError:
                    pass
            return [written] if written > (FILE_MB << 20) else []
        """,
    "countless files": """
        import os
        def attack():
            made = 0
            try:
                for i in range(100_000):
                    os.mkdir(f"folder{i}")
                    made += 1
            except OSError:
                pass
            return [made] if made > 1000 else []
        """,
    "delete the working directory": """
        import os, shutil
        def attack():
            TRY
            attempt("delete", lambda: os.rmdir(os.getcwd()))
            attempt("delete /work", lambda: os.rmdir("/work"))
            shutil.rmtree("/work", ignore_errors=True)
            shutil.rmtree(".", ignore_errors=True)
            return done
        """,
    "more rights": """
        import ctypes, os
        def attack():
            TRY
            libc = ctypes.CDLL(None, use_errno=True)
            def check(result):
                if result < 0:
                    raise OSError(ctypes.get_errno())
            attempt("root", lambda: os.setuid(0) if os.getuid() else 1 / 0)
            attempt("groups", lambda: os.setgroups([0]))
            attempt("namespace", lambda: check(libc.unshare(0x10000000)))
            attempt("mount", lambda: check(libc.mount(b"tmpfs", b"/work", b"tmpfs", 0, None)))
            attempt("root directory", lambda: os.chroot("."))
            attempt("device", lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)))
            attempt("trace", lambda: check(libc.ptrace(16, os.getppid(), 0, 0)))
            return done
        """,
    "deep recursion": """
        import sys
        def attack():
            sys.setrecursionlimit(10**9)
            def deeper(n):
                return deeper(n + 1)
            return deeper(0)
        """,
    "deeply nested answer": """
        def attack():
            nested = []
            for _ in range(100_000):
                nested = [nested]
            return nested
        """,
    "crash": """
        import ctypes
        def attack():
            ctypes.string_at(0)
        """,
}
"""Against the machine. Where `attack()` comes back, what it gives back has to be empty."""

FORGERIES = {
    "prints a verdict": """
        print('{"result": "ready"}'); print('{"result": "passed", "message": ""}', flush=True)
        def answer():
            print('{"result": "passed", "message": ""}', flush=True)
            return 0
        """,
    "writes a verdict to every file descriptor": """
        import os
        for fd in range(64):
            try:
                os.write(fd, b'{"result": "ready", "message": ""}\\n{"result": "passed", "message": ""}\\n')
            except OSError:
                pass
        def answer():
            return 0
        """,
    "exits with success": """
        import sys
        sys.exit(0)
        """,
    "exits with success when it is asked": """
        import os
        def answer():
            os._exit(0)
        """,
    "raises SystemExit when it is asked": """
        def answer():
            raise SystemExit(0)
        """,
    "an answer that equals everything": """
        class Anything:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return hash(42)
            def __sub__(self, other): return 0
            __rsub__ = __sub__
        def answer():
            return Anything()
        """,
    "a text that equals everything": """
        class Anything(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        def answer():
            return Anything("x")
        """,
    "its own builtins": """
        import builtins
        def abs(x): return 0
        def int(x): return 42
        builtins.abs = abs
        AssertionError = ValueError
        builtins.AssertionError = ValueError
        def answer():
            return 0
        """,
    "its own modules": """
        import sys, types
        class math:
            @staticmethod
            def isclose(*arguments): return True
        sys.modules["math"] = math
        sys.modules["unittest"] = types.ModuleType("unittest")
        def answer():
            return 0
        """,
    "patches the harness": """
        import gc, sys
        for name, module in list(sys.modules.items()):
            for attribute, value in list(vars(module).items()) if hasattr(module, "__dict__") else []:
                if attribute in ("run_examiner", "run_collected", "Examiner", "exec", "compile", "_wait", "_end"):
                    setattr(module, attribute, lambda *a, **k: None)
        for thing in gc.get_objects():
            if type(thing) is dict and "tests" in thing:
                thing["tests"] = []
        def answer():
            return 0
        """,
    "reads the expected answer from frames and memory": """
        import gc, re, sys
        def texts():
            frame = sys._getframe()
            while frame:
                yield from map(str, [*frame.f_locals.values(), *frame.f_code.co_consts])
                frame = frame.f_back
            for thing in gc.get_objects():
                if type(thing) in (dict, list, tuple):
                    parts = [*thing, *thing.values()] if type(thing) is dict else thing
                    yield from (part for part in parts if type(part) is str)
        def answer():
            # the tests ask for a number that no one can guess
            numbers = [n for text in texts() for n in re.findall(r"answer\\(\\) == (\\d+)", text)]
            return int(numbers[0]) if numbers else 0
        """,
    "speaks for the harness on the socket": """
        import os, struct
        text = b'["answer", {"answer": ["call", 1], "abs": ["o", 1], "Refused": ["x", "Refused", "BaseException"]}, []]'
        for fd in range(3, 64):
            try:
                os.write(fd, struct.pack("!I", len(text)) + text)
            except OSError:
                pass
        def answer():
            return 0
        """,
    "sends what is no message": """
        import os
        for fd in range(3, 64):
            try:
                os.write(fd, b"\\xff" * 64)
            except OSError:
                pass
        def answer():
            return 0
        """,
    "raises what the harness raises": """
        class Refused(Exception): pass
        class Gone(Exception): pass
        def answer():
            raise Refused("not judged")
        """,
    "ends the examiner": """
        import os, signal
        def answer():
            for process in (-1, *range(1, 10)):
                try:
                    os.kill(process, signal.SIGKILL)
                except OSError:
                    pass
            return 0
        """,
}
"""Against the verdict: `answer()` is not what any of `forgery_tests` asks for, and none of them may pass."""

HONEST = "def attack(): return []\ndef answer(): return 42\n"


def hostile_code(text: str, *, secret: str, home: str, owner: int, port: int, file_mb: int) -> str:
    """The code of an attack with its placeholders filled in."""
    code = textwrap.dedent(text)
    for word, value in {"SECRET": secret, "HOME": home, "OWNER": owner, "PORT": port, "FILE_MB": file_mb}.items():
        code = code.replace(word, str(value))
    lines = [
        textwrap.indent(textwrap.dedent(_TRY), line[: len(line) - len(line.lstrip())])
        if line.strip() == "TRY"
        else line
        for line in code.splitlines()
    ]
    return "\n".join(lines) + "\n"


def forgery_tests(number: int) -> list[str]:
    """Ways to ask for the number, none of which a wrong answer may pass."""
    return [
        f"assert answer() == {number}",
        f"assert not answer() != {number}",
        f"assert abs(answer() - {number}) < 0.5",
        f"import math\nassert math.isclose(answer(), {number})",
        f"assert answer() in ({number}, {number + 1})",
        f"assert answer() == str({number})",
        f"import unittest\nclass Case(unittest.TestCase):\n    def test(self): self.assertEqual(answer(), {number})",
        f"def test_it():\n    assert answer() == {number}",
    ]
