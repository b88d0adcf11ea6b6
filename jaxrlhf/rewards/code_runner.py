"""Runs one program with one test within limits. A script of its own, on the standard library alone: code.py starts it
with a folder, and with what the program may take.

    this process      gives up root, enters namespaces of its own, ends all the rest at the time limit
    process 1 there   ends with the program, or where there are too many processes (RLIMIT_NPROC is not for root); the
                      kernel then ends every other process of the namespace
    the program       within its rlimits

What the kernel refuses is left out, and ``status.json`` says what is in force."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

NOBODY = 65534
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
PAUSE = 0.002  # seconds between two looks
LATE, FAILED = 124, 125  # exit codes of ours
# the test runs in the namespace of the program; what the last line writes says that nothing ended it before
ASSERTS = """
import os, sys
program, test, word = (open(name).read() for name in ("program", "test", "word"))
for name in ("program", "test", "word"):
    os.unlink(name)
scope = {"__name__": "program"}
exec(compile(program, "program", "exec"), scope)
exec(compile(test, "test", "exec"), scope)
sys.stdout.flush()
os.write(1, word.encode())
os._exit(0)
"""


def check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def give_up_root(folder: str) -> bool:
    """Whether the process is nobody now, or was not root to begin with."""
    if os.getuid():
        return True
    if not readable_by_all(os.__file__):
        return False
    os.chown(folder, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return True


def readable_by_all(path: str) -> bool:
    """Whether nobody could import a module there."""
    parts = path.split(os.sep)
    folders = [os.sep.join(parts[:end]) or os.sep for end in range(1, len(parts))]
    return bool(os.stat(path).st_mode & 0o004) and all(os.stat(folder).st_mode & 0o001 for folder in folders)


def enter_namespaces(libc: ctypes.CDLL) -> bool:
    """Whether users, network, processes, mounts and queues are those of this process alone from now on."""
    uid, gid = os.getuid(), os.getgid()
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
    if libc.unshare(NEWUSER | NEWNET | NEWPID | NEWNS | NEWIPC):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def protect_files(libc: ctypes.CDLL, folder: str, size: int) -> bool:
    """Whether all files are read-only now, and ``folder`` is one in memory of at most ``size`` bytes."""

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    attributes = Attributes(RDONLY, 0, 0, 0)
    try:
        check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private")
        where = ctypes.c_long(AT_FDCWD), b"/", ctypes.c_uint(AT_RECURSIVE)
        check(libc.syscall(MOUNT_SETATTR, *where, ctypes.byref(attributes), ctypes.sizeof(attributes)), "read-only")
        options = f"size={size},mode=700".encode()
        check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), "tmpfs")
    except OSError:
        return False
    return True


def set_limits(job: dict) -> None:
    """Those of the kernel, for this process and each that it starts."""
    wanted = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: job["file_size"],
        resource.RLIMIT_NPROC: job["processes"] + 2,  # the other two of ours
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in wanted.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has no RLIMIT_AS
            resource.setrlimit(limit, (most, most))


def become(job: dict, folder: str, libc: ctypes.CDLL) -> None:
    """This process becomes the program."""
    os.chdir(folder)
    for name, text in job["files"].items():
        with open(name, "w") as file:
            file.write(text)
    set_limits(job)
    if sys.platform == "linux":
        for capability in range(64):  # root of the namespace could make files writable again
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    what = ["-c", ASSERTS] if job["asserts"] else ["program"]
    os.execv(sys.executable, [sys.executable, "-I", "-B", *(() if job["packages"] else ("-S",)), *what])


def forked(work) -> int:
    """The id of a child that does ``work``, and never comes back here."""
    if child := os.fork():
        return child
    try:
        work()
    finally:
        os._exit(FAILED)


def code_of(status: int) -> int:
    return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 128 + os.WTERMSIG(status)


def first_process(job: dict, folder: str, libc: ctypes.CDLL, apart: bool, report: int) -> None:
    """Process 1: starts the program, and ends as it does."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    alone = apart and not libc.mount(b"proc", b"/proc", b"proc", flags, None)  # the program sees its own processes
    os.write(report, b"1" if alone else b"0")
    os.close(report)
    program = forked(lambda: become(job, folder, libc))
    while True:
        ended, found = os.waitpid(-1, os.WNOHANG if alone else 0)  # orphans become children of process 1
        if ended == program:
            os._exit(code_of(found))
        if alone and sum(name.isdigit() for name in os.listdir("/proc")) > job["processes"] + 1:
            os._exit(FAILED)
        if not ended:
            time.sleep(PAUSE)


def main() -> None:
    folder = sys.argv[1]
    with open(sys.argv[2]) as file:
        job = json.load(file)
    libc = ctypes.CDLL(None, use_errno=True)
    with open(os.path.join(folder, "status.json"), "w") as status:
        was_root, nobody = not os.getuid(), give_up_root(folder)
        apart = sys.platform == "linux" and enter_namespaces(libc)
        read_only = apart and protect_files(libc, folder, job["file_size"] * 2)
        seen, report = os.pipe()
        child, end = forked(lambda: first_process(job, folder, libc, apart, report)), time.monotonic() + job["seconds"]
        counted = os.read(seen, 1) == b"1"
        bounded = counted or (nobody and (apart or was_root))
        json.dump({"network": apart, "processes": bounded, "files": read_only}, status)
    while True:
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            os._exit(code_of(found))
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os._exit(LATE)
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
