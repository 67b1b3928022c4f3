"""System calls that Python has no name for, and the filter that takes them away from sandboxed code."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38

_Numbers = dict[str, tuple[int | None, int | None]]
"""Names of system calls to their numbers: (x86_64, aarch64); None if the machine has no such call."""
# fmt: off
_NEVER: _Numbers = {
    "acct": (163, 89), "add_key": (248, 217), "bpf": (321, 280), "chroot": (161, 51), "delete_module": (176, 106),
    "fanotify_init": (300, 262), "finit_module": (313, 273), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fsopen": (430, 430), "fspick": (433, 433), "init_module": (175, 105), "io_setup": (206, 0),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioperm": (173, None),
    "iopl": (172, None), "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "memfd_create": (319, 279), "memfd_secret": (447, 447), "migrate_pages": (256, 238),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239),
    "mq_open": (240, 180), "msgget": (68, 186), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "open_tree": (428, 428), "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "reboot": (169, 142), "request_key": (249, 218), "semget": (64, 190),
    "setns": (308, 268), "shmget": (29, 194), "socket": (41, 198), "swapoff": (168, 225), "swapon": (167, 224),
    "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
}
"""Calls that no code under test needs: for networks, other address spaces and views of the system, and memory outside
the limits."""
_NEVER_IN_THE_OPEN: _Numbers = {
    "chmod": (90, None), "chown": (92, None), "clone": (56, 220), "execve": (59, 221), "execveat": (322, 281),
    "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "fchown": (93, 55), "fchownat": (260, 54),
    "fork": (57, None), "fremovexattr": (199, 16), "fsetxattr": (190, 7), "futimesat": (261, None),
    "ioprio_set": (251, 30), "lchown": (94, None), "lremovexattr": (198, 15), "lsetxattr": (189, 6),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "removexattr": (197, 14), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "setpriority": (141, 140), "setxattr": (188, 5),
    "tkill": (200, 130), "utime": (132, None), "utimensat": (280, 88), "utimes": (235, None), "vfork": (58, None),
}
"""Calls that are refused too if the code shares the process table and the file tree of the user: no second process, no
signal to another one, and no change to a file or process by its name."""
_NUMBERS: _Numbers = _NEVER | _NEVER_IN_THE_OPEN | {
    "capset": (126, 91), "clone3": (435, 435), "fcntl": (72, 25), "ioctl": (16, 29), "kill": (62, 129),
    "prctl": (157, 167), "prlimit64": (302, 261), "tgkill": (234, 131),
}
# fmt: on
# The filter does not know the calls above this number; for sandboxed code they do not exist.
_NEWEST_KNOWN = 452

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `_NUMBERS` and the kernel's name of the architecture."""
_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
_OWNER_COMMANDS = (8, 10, 15)
"""F_SETOWN, F_SETSIG and F_SETOWN_EX: ways to have the kernel signal another process."""
_OWNER_IOCTLS = (0x8901, 0x8902, 0x5412)
"""FIOSETOWN and SIOCSPGRP, which do the same by ioctl, and TIOCSTI, which types into a terminal."""

# Berkeley packet filter: load a word of the call's description, jump on equality and so on, return.
_LOAD, _JEQ, _JGT, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_OF_NUMBER, _OF_MACHINE = 0, 4


def call(name: str, *arguments: object) -> int:
    """The result of a system call by name. Raises OSError, with ENOSYS on an unknown machine."""
    number = _number(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name} on {platform.machine()}")
    return checked(name, libc.syscall(number, *arguments))


def prctl(option: int, *arguments: object) -> int:
    """prctl(2). Raises OSError."""
    padded = [*arguments, *[0] * (4 - len(arguments))]
    return checked("prctl", libc.prctl(option, *[ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded]))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError."""
    encoded = [text.encode() or None for text in (source, target, kind)]
    checked(f"mount {target}", libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None))


def umount(target: str, flags: int) -> None:
    """umount2(2). Raises OSError."""
    checked("umount", libc.umount2(target.encode(), flags))


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    checked("unshare", libc.unshare(flags))


def drop_capabilities() -> None:
    """Gives up every capability of this process."""
    header = struct.pack("Ii", 0x20080522, 0)
    call("capset", header, bytes(24))


def can_filter() -> bool:
    """Whether `install_filter` knows this machine."""
    return platform.machine() in _MACHINES


def install_filter(*, in_the_open: bool) -> None:
    """Takes dangerous system calls away from this process and whatever it starts, for good. Raises OSError.

    `in_the_open` says that no namespace hides the user's processes and files: then the code cannot start a second
    process or thread either, and can send signals only to itself.
    """
    program = _program(in_the_open=in_the_open)
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(instructions)
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(described))


def _program(*, in_the_open: bool) -> list[tuple[int, int, int, int]]:
    _, machine = _MACHINES[platform.machine()]
    program = [
        (_LOAD, 0, 0, _OF_MACHINE),
        (_JEQ, 1, 0, machine),
        (_RETURN, 0, 0, _KILL),  # a 32-bit call would have other numbers
        (_LOAD, 0, 0, _OF_NUMBER),
        (_JGT, 0, 1, _NEWEST_KNOWN),  # the x32 calls are above it too
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    for name in [*_NEVER, *(_NEVER_IN_THE_OPEN if in_the_open else ())]:
        program += _refuse(name, errno.EPERM)
    program += _refuse("clone3", errno.ENOSYS)  # its flags lie in memory; libc then uses clone, whose flags can be seen
    program += _refuse_if("clone", 0, [(_JSET, _NEW_NAMESPACES)])
    program += _refuse_if("ioctl", 1, [(_JEQ, command) for command in _OWNER_IOCTLS])
    program += _refuse_if("prctl", 0, [(_JEQ, PR_SET_PDEATHSIG)])  # it must end when the process that watches it ends
    if in_the_open:
        program += _refuse_if("fcntl", 1, [(_JEQ, command) for command in _OWNER_COMMANDS])
        for name in ("kill", "tgkill"):
            program += _refuse_if(name, 0, [(_JEQ, os.getpid())], holds=False)
        program += _refuse_if("prlimit64", 0, [(_JEQ, 0)], holds=False)
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _refuse(name: str, error: int) -> list[tuple[int, int, int, int]]:
    number = _number(name)
    return [(_JEQ, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)] if number is not None else []


def _refuse_if(
    name: str, argument: int, tests: list[tuple[int, int]], *, holds: bool = True
) -> list[tuple[int, int, int, int]]:
    """Refuses the call when a test of the low word of its argument holds; with `holds` false, when one does not."""
    number = _number(name)
    if number is None:
        return []
    jumps = (0, 1) if holds else (1, 0)
    body = [(_LOAD, 0, 0, _of_argument(argument))]
    for code, value in tests:
        body += [(code, *jumps, value), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    return [(_JEQ, 0, len(body), number), *body, (_LOAD, 0, 0, _OF_NUMBER)]


def _of_argument(index: int) -> int:
    return 16 + 8 * index


def _number(name: str) -> int | None:
    column = _MACHINES.get(platform.machine(), (None,))[0]
    return None if column is None else _NUMBERS[name][column]


def checked(name: str, result: int) -> int:
    """The result of a system call. Raises OSError, with the name, for a result below 0."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
