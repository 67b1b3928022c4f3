"""The walls of the sandbox: namespaces with a file tree of their own, or Landlock; and limits on resources."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

# Relative, because the bare interpreter that loads this knows no package `trimtab`.
from .syscalls import PR_SET_NO_NEW_PRIVS, call, checked, drop_capabilities, libc, mount, prctl, umount, unshare

NOBODY = 65534
"""The user that root becomes, because limits on processes do not bind root."""

_OWN_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""CLONE_NEWUSER, NEWNS (mounts), NEWPID, NEWNET, NEWIPC and NEWUTS (the name of the machine)."""
_READ_ONLY, _NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _DETACH = -100, 0x8000, 2

_SCAFFOLD = "/sys"
"""The new file tree is built on this directory, out of sight of all other processes. It always exists, and sandboxed
code does not need it."""
WORK = "/work"
"""The only writable directory, if there is one."""


def readable_paths(packages: list[str]) -> list[str]:
    """The paths that a Python program cannot run without, and `packages`."""
    base = Path(sys.base_prefix)
    wanted = [base / "lib", base / "lib64", *map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/lib64"))]
    wanted += [Path("/etc/ld.so.cache"), Path("/usr/share/zoneinfo"), *map(Path, packages)]
    return [str(path) for path in dict.fromkeys(wanted) if path.exists()]


def enter_namespaces(readable: list[str], *, file_mb: int) -> None:
    """Moves this process to namespaces with no network, no other process and no files but `readable`, all read-only,
    and an empty directory of `file_mb` megabytes. The next fork is the first process there. Raises OSError if the
    kernel does not allow it.
    """
    root = _SCAFFOLD
    if os.getuid() == 0 and not _exists(NOBODY):
        raise OSError(f"this root can not become user {NOBODY}, and limits on processes do not bind root")
    write_maps = _maps_writer()
    unshare(_OWN_NAMESPACES)
    write_maps()
    mount("", "/", "", _RECURSIVE | _PRIVATE)
    mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    for path in readable:
        _bind(path, root)
    os.mkdir(root + WORK)
    _make_read_only(root)
    for device in ("/dev/null", "/dev/urandom"):
        mount(device, root + device, "", _BIND)
    owner = NOBODY if os.getuid() == 0 else os.getuid()
    limits = f"size={file_mb}m,nr_inodes=1000,mode=700,uid={owner},gid={owner if owner == NOBODY else os.getgid()}"
    mount("tmpfs", root + WORK, "tmpfs", _NO_SUID | _NO_DEVICES, limits)
    os.chdir(root)
    call("pivot_root", b".", b".")
    umount(".", _DETACH)
    os.chdir(WORK)


def _exists(user: int) -> bool:
    """Whether the user exists in the user namespace of this process."""
    ranges = [map(int, line.split()) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= user < first + num for first, _, num in ranges)


def _maps_writer() -> Callable[[], None]:
    """A function to call once this process is in a user namespace of its own.

    There, the process is the user that it was outside, and if that is root, `NOBODY` exists too. Only a process that
    stayed outside may write these maps, so one is started here, and waits.
    """
    process, is_root = os.getpid(), os.getuid() == 0
    entered_read, entered_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(entered_write)
            if not os.read(entered_read, 1):
                os._exit(status)  # it did not enter
            if not is_root:
                Path(f"/proc/{process}/setgroups").write_text("deny")
            for name, own in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
                extra = f"\n{NOBODY} {NOBODY} 1" if is_root else ""
                Path(f"/proc/{process}/{name}").write_text(f"{own} {own} 1{extra}\n")
            status = 0
        finally:
            os._exit(status)
    os.close(entered_read)

    def write_maps() -> None:
        os.write(entered_write, b"x")
        os.close(entered_write)
        if os.waitpid(helper, 0)[1]:
            raise OSError("the user namespace was given no users")

    return write_maps


def _bind(path: str, root: str) -> None:
    target = Path(root + path)
    if os.path.isdir(path):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(path, str(target), "", _BIND | _RECURSIVE)


def _make_read_only(root: str) -> None:
    for device in ("/dev/null", "/dev/urandom"):
        Path(root + device).parent.mkdir(exist_ok=True)
        Path(root + device).touch()
    wanted = struct.pack("QQQQ", _READ_ONLY | _NO_SUID, 0, 0, 0)
    call("mount_setattr", _AT_FDCWD, root.encode(), _AT_RECURSIVE, wanted, ctypes.c_size_t(len(wanted)))


# Rights of Landlock by the version that introduced them; each is refused unless a rule gives it.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_NETWORK_RIGHTS = {4: 0b11}
_SCOPES = {6: 0b11}
_EXECUTE, _READ_FILE, _READ_DIRECTORY = 1 << 0, 1 << 2, 1 << 3
_OLDEST_LANDLOCK = 3
"""With older versions, files that may only be read could be cut to length zero."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def has_landlock() -> bool:
    """Whether `restrict_files` can be called."""
    return landlock_version() >= _OLDEST_LANDLOCK


def restrict_files(readable: list[str]) -> None:
    """From now on, this process can open only `readable`, and only to read. Raises OSError."""
    version = landlock_version()

    def known(rights: dict[int, int]) -> int:
        return sum(bits for since, bits in rights.items() if since <= version)

    words = [known(_FILE_RIGHTS), known(_NETWORK_RIGHTS), known(_SCOPES)]
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = struct.pack("QQQ", *words)[:size]
    fd = checked("Landlock", libc.syscall(_CREATE_RULESET, ruleset, ctypes.c_size_t(size), ctypes.c_uint32(0)))
    for path in [*readable, "/dev/null", "/dev/urandom"]:
        rights = _READ_FILE | (_EXECUTE | _READ_DIRECTORY if os.path.isdir(path) else 0)
        where = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, where)
        checked("Landlock", libc.syscall(_ADD_RULE, fd, 1, rule, ctypes.c_uint32(0)))
        os.close(where)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    checked("Landlock", libc.syscall(_RESTRICT_SELF, fd, ctypes.c_uint32(0)))
    os.close(fd)


def become_nobody() -> None:
    """Gives up root, if this process is root, and every capability. For use inside namespaces."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    drop_capabilities()
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def check_readable(paths: list[str]) -> None:
    """Raises PermissionError for a directory that exists but that sandboxed code could not read."""
    for path in paths:
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(f"{path} is not readable by everyone, and code that root starts runs as nobody")


def set_limits(*, cpu_seconds: int, memory_mb: int, file_mb: int, num_processes: int | None) -> None:
    """Sets limits that the kernel keeps for each process; `num_processes` is for all processes of the user in the
    namespace."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: file_mb << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if num_processes is not None:
        limits[resource.RLIMIT_NPROC] = num_processes
    for name, limit in limits.items():
        hard = resource.getrlimit(name)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (limit, limit))
