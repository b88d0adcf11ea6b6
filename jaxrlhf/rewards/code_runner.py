"""Runs one program with one test within limits. A script of its own, on the standard library alone: code.py starts it
with a folder, and with what the program may take.

    this process      enters namespaces of its own, and ends all the rest at the time limit
    process 1 there   ends with the program; the kernel then ends every other process of the namespace
    the program       within its rlimits, and where this process is root, as a user that has nothing else

What the kernel refuses is left out, and ``status.json`` says what is in force."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

FIRST_USER = 1 << 30  # ids from it on are nobody's
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 24, 38, 47
CAP_DAC_READ_SEARCH, CAP_VERSION = 2, 0x20080522
LATE, FAILED = 124, 125  # exit codes of ours
PAUSE = 0.002  # seconds between two looks
LINUX = sys.platform == "linux"
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


def user_of_program() -> int | None:
    """Where this process is root: the id of a user that has no file and no other process, if there can be one."""
    if not LINUX or os.getuid():
        return None
    user = FIRST_USER + os.getpid()
    child = forked(lambda: (os.setresuid(user, user, user), os._exit(0)))
    return None if os.waitpid(child, 0)[1] else user


def give_up_root(libc: ctypes.CDLL, user: int) -> None:
    """This process is ``user``, who may read what root may where Python is readable for root alone."""
    keeps = 0 if readable_by_all(os.__file__) else 1 << CAP_DAC_READ_SEARCH
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header, data = (ctypes.c_uint32 * 2)(CAP_VERSION, 0), (ctypes.c_uint32 * 6)(keeps, keeps, keeps, 0, 0, 0)
    check(libc.capset(header, data), "capset")
    if keeps:
        check(libc.prctl(PR_CAP_AMBIENT, 2, CAP_DAC_READ_SEARCH, 0, 0), "ambient")


def readable_by_all(path: str) -> bool:
    """Whether every user could import a module there."""
    parts = path.split(os.sep)
    folders = [os.sep.join(parts[:end]) or os.sep for end in range(1, len(parts))]
    return bool(os.stat(path).st_mode & 0o004) and all(os.stat(folder).st_mode & 0o001 for folder in folders)


def enter_namespaces(libc: ctypes.CDLL, as_root: bool) -> bool:
    """Whether network, processes, mounts and queues are those of this process alone from now on. Who is not root needs
    a namespace of users, too."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NEWNET | NEWPID | NEWNS | NEWIPC | (0 if as_root else NEWUSER)):
        return False
    maps = () if as_root else (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"))
    for name, text in maps:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def protect_files(libc: ctypes.CDLL, folder: str, size: int, user: int) -> bool:
    """Whether all files are read-only now, and ``folder`` is one of ``user`` in memory, of at most ``size`` bytes."""

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    attributes = Attributes(RDONLY, 0, 0, 0)
    try:
        check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private")
        where = ctypes.c_long(AT_FDCWD), b"/", ctypes.c_uint(AT_RECURSIVE)
        check(libc.syscall(MOUNT_SETATTR, *where, ctypes.byref(attributes), ctypes.sizeof(attributes)), "read-only")
        options = f"size={size},mode=700,uid={user}".encode()
        check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), "tmpfs")
    except OSError:
        return False
    return True


def set_limits(job: dict, ours: int) -> None:
    """Those of the kernel, for this process and each that it starts. ``ours``: other processes of the user."""
    wanted = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_FSIZE: job["file_size"],
        resource.RLIMIT_NPROC: job["processes"] + ours,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in wanted.items():
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has no RLIMIT_AS
            resource.setrlimit(limit, (most, most))


def become(job: dict, folder: str, libc: ctypes.CDLL, user: int | None) -> None:
    """This process becomes the program."""
    os.chdir(folder)
    for name, text in job["files"].items():
        with open(name, "w", errors="surrogatepass") as file:
            file.write(text)
    if LINUX:
        for capability in {*range(64)} - {CAP_DAC_READ_SEARCH}:  # root of a namespace could make files writable again
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user is not None:
        os.chown(".", user, user)
        give_up_root(libc, user)
    if LINUX:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    set_limits(job, 2 if user is None else 0)
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


def first_process(job: dict, folder: str, libc: ctypes.CDLL, apart: bool, user: int | None) -> None:
    """Process 1: starts the program, and ends as it does."""
    if LINUX:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if apart:  # where the kernel refuses, the program sees the names of other processes
        libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    program = forked(lambda: become(job, folder, libc, user))
    while True:
        ended, found = os.wait()  # orphans become children of process 1
        if ended == program:
            os._exit(code_of(found))


def main() -> None:
    folder = sys.argv[1]
    with open(sys.argv[2]) as file:
        job = json.load(file)
    libc, user, root = ctypes.CDLL(None, use_errno=True), user_of_program(), LINUX and not os.getuid()
    with open(os.path.join(folder, "status.json"), "w") as status:
        apart = LINUX and (enter_namespaces(libc, True) if user else enter_namespaces(libc, False))
        owner = os.getuid() if user is None else user
        read_only = apart and protect_files(libc, folder, job["file_size"] * 2, owner)
        bounded = user is not None or (apart and not root)
        json.dump({"network": apart, "processes": bounded, "files": read_only}, status)
    child = forked(lambda: first_process(job, folder, libc, apart, user))
    end = time.monotonic() + job["seconds"]
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
