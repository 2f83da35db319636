"""Runs inside the sandboxed process: gives up rights, then runs a program that nobody has read.

    python -I confine.py SETTINGS_JSON

It is a script of the standard library alone (`sandbox.py` starts it and knows the settings). What it takes
away, before the
program begins: processor time, memory, file sizes and threads beyond limits; with Landlock, all files but
Python's own and the current folder, and signals to others; with seccomp, new processes, other programs,
sockets, and system calls that only an administrator needs; all capabilities, and the user's identity where
that was root. Landlock and seccomp are Linux's; what could not be taken away stands in `protections.json` in
the current folder.
"""

import ctypes
import json
import math
import os
import platform
import resource
import struct
import sys

_NOBODY = 65534
_THREADS = 64
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock; the same on every architecture
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute (mapping libraries), read files, read folders
_CAP_READ_ANY = (
    1 << 2
)  # CAP_DAC_READ_SEARCH: Python may lie in a folder that only root can read; Landlock bounds it
# system calls by architecture: (its number in the audit interface, clone, clone3, prlimit64, setrlimit,
# tgkill, those that are refused)
_CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        302,
        160,
        234,
        (
            57,
            58,
            59,
            322,  # fork, vfork, execve, execveat
            41,
            425,
            321,
            298,  # socket, io_uring_setup, bpf, perf_event_open
            62,
            200,
            129,
            297,
            424,
            434,
            438,  # kill, tkill, rt_(tg)sigqueueinfo, pidfd_*
            101,
            310,
            311,
            272,
            308,
            165,
            166,
            161,
            155,
            323,
            304,  # ptrace, process_vm_*, unshare, setns, mount..., userfaultfd, open_by_handle_at
            248,
            249,
            250,
            112,
            109,
            175,
            313,
            246,
            169,
            428,
            429,
            430,
            431,
            432,
            442,
        ),
    ),  # keys, setsid, setpgid, modules, kexec, reboot, new mount calls
    "aarch64": (
        0xC00000B7,
        220,
        435,
        261,
        164,
        131,
        (
            221,
            281,
            198,
            425,
            280,
            241,
            129,
            130,
            138,
            240,
            424,
            434,
            438,
            117,
            270,
            271,
            97,
            268,
            40,
            39,
            51,
            41,
            282,
            265,
            217,
            218,
            219,
            157,
            154,
            105,
            273,
            104,
            142,
            428,
            429,
            430,
            431,
            432,
            442,
        ),
    ),
}
_CLONE_THREAD = 0x10000


def limit(settings: dict) -> None:
    """Processor seconds, bytes of address space and of each file, open files, no core dumps."""
    seconds = math.ceil(settings["seconds"])
    resource.setrlimit(
        resource.RLIMIT_CPU, (seconds, seconds + 1)
    )  # SIGXCPU, and SIGKILL where that is ignored
    for what, most in (
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def limit_threads(user: int) -> None:
    """So many threads more than the user has now: the kernel counts those of all processes of a user
    together."""
    now = 0
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == user:
                now += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:  # it ended meanwhile
            continue
    most = now + _THREADS
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def drop_privileges(libc: ctypes.CDLL) -> None:
    """Root becomes nobody; whoever it is loses every capability (but root keeps that of reading, see
    above)."""
    kept = 0
    user = os.getuid()
    if user == 0:
        user, kept = _NOBODY, _CAP_READ_ANY
        os.chown(".", _NOBODY, _NOBODY)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    limit_threads(user)
    if kept:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = struct.pack("Ii", 0x20080522, 0)
    if libc.capset(header, struct.pack("IIIIII", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def close_files(libc: ctypes.CDLL, readable: list) -> bool:
    """Landlock: read what is needed to run Python, write in the current folder alone. False where the kernel
    has no Landlock."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    attributes = struct.pack(
        "QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0
    )  # TCP; signals and abstract sockets
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    for path, allowed in (
        *((p, _READ) for p in readable),
        ("/dev/null", 1 << 1 | 1 << 2),
        (".", files & ~(1 << 0 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15)),
    ):
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= 1 << 0 | 1 << 1 | 1 << 2
        if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, folder), 0):
            raise OSError(ctypes.get_errno(), f"Landlock: {path}")
        os.close(folder)
    done = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def close_calls(libc: ctypes.CDLL) -> bool:
    """seccomp: refused calls fail with EPERM, clone works for threads, signals go to itself, limits look as
    if they could be raised."""
    if platform.machine() not in _CALLS or not sys.platform.startswith("linux"):
        return False
    audit, clone, clone3, prlimit, setrlimit, tgkill, refused = _CALLS[platform.machine()]
    load, equal, above, some, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, errno = 0x7FFF0000, 0x00050000
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, audit),
        (give, 0, 0, errno | 1),
        (load, 0, 0, 0),
        (above, 0, 1, 0x40000000),
        (give, 0, 0, errno | 1),
    ]
    for number in refused:
        program += [(equal, 0, 1, number), (give, 0, 0, errno | 1)]
    program += [
        (equal, 0, 1, setrlimit),
        (give, 0, 0, errno),
        (equal, 0, 1, clone3),
        (give, 0, 0, errno | 38),
    ]
    program += [
        (equal, 0, 4, tgkill),
        (load, 0, 0, 16),
        (equal, 1, 0, os.getpid()),
        (give, 0, 0, errno | 1),
        (give, 0, 0, allow),
    ]
    program += [
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (some, 1, 0, _CLONE_THREAD),
        (give, 0, 0, errno | 1),
        (give, 0, 0, allow),
    ]
    program += [
        (equal, 0, 5, prlimit),
        (load, 0, 0, 32),
        (equal, 0, 2, 0),
        (load, 0, 0, 36),
        (equal, 1, 0, 0),
        (give, 0, 0, errno),
    ]
    program += [(give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    filters = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    return libc.prctl(22, 2, ctypes.byref(header), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def confine(settings: dict) -> dict:
    """Give up everything; returns which of the kernel's protections are in force."""
    limit(settings)
    if not sys.platform.startswith("linux"):
        return {"files": False, "calls": False}
    libc = ctypes.CDLL(None, use_errno=True)
    drop_privileges(libc)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which both of the following need
        return {"files": False, "calls": False}
    return {"files": close_files(libc, settings["readable"]), "calls": close_calls(libc)}


def main() -> None:
    settings = json.loads(sys.argv[1])
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    arguments = None
    if settings["function"]:
        with open("arguments.json", encoding="utf-8") as file:
            arguments = json.load(file)
    with open("protections.json", "w", encoding="utf-8") as file:
        json.dump(confine(settings), file)
    sys.argv = ["program.py"]
    sys.setrecursionlimit(50_000)
    names: dict = {"__name__": "__main__" if arguments is None else "program", "__file__": "program.py"}
    exec(compile(source, "program.py", "exec"), names)
    if arguments is None:
        return
    owner = names["Solution"]() if "Solution" in names else None
    function = getattr(owner, settings["function"]) if owner is not None else names[settings["function"]]
    result = function(*arguments)
    with open("result.json", "w", encoding="utf-8") as file:
        json.dump(list(result) if isinstance(result, tuple) else result, file)


if __name__ == "__main__":
    main()
