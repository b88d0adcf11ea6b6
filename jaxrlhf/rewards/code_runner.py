"""Runs one program with its tests within limits. A script of its own, on the standard library alone: code.py starts it
with a folder, and with what the program may take.

    this process      enters namespaces of its own, and ends all the rest at the time limit
    process 1 there   ends with the process after it; the kernel then ends every other process of the namespace
    the tester        gives up what it may do, compiles the program, forks for each test, and writes what came of it
    a test            runs the program from its begin, within rlimits

Where this process is root, the last two are a user that has nothing else. What the kernel refuses is left out, and
``status.json`` says what is in force."""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
import types

FIRST_USER = 1 << 30  # ids from it on are nobody's
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 8, 24, 38, 47
CAP_DAC_READ_SEARCH, CAP_VERSION = 2, 0x20080522
LATE, FAILED = 124, 125  # exit codes of ours
PAUSE = 0.002  # seconds between two looks
SPARE = 5.0  # seconds for all but the tests
LINUX = sys.platform == "linux"


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


def become(libc: ctypes.CDLL, user: int) -> None:
    """This process is ``user``, who may read what root may where Python is readable for root alone."""
    readable = readable_by_all(os.__file__)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    keep(libc, 0 if readable else 1 << CAP_DAC_READ_SEARCH)
    if not readable:
        check(libc.prctl(PR_CAP_AMBIENT, 2, CAP_DAC_READ_SEARCH, 0, 0), "ambient")


def keep(libc: ctypes.CDLL, capabilities: int) -> None:
    """This process has these capabilities, and no other."""
    data = (ctypes.c_uint32 * 6)(capabilities, capabilities, capabilities, 0, 0, 0)
    check(libc.capset((ctypes.c_uint32 * 2)(CAP_VERSION, 0), data), "capset")


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


def limit(what: int, most: int) -> None:
    """For this process and each that it starts."""
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS has no RLIMIT_AS
        resource.setrlimit(what, (most, most))


def give_up(job: dict, folder: str, libc: ctypes.CDLL, user: int | None) -> None:
    """This process may do no more than the program."""
    os.chdir(folder)
    if LINUX:
        for capability in {*range(64)} - {CAP_DAC_READ_SEARCH}:  # root of a namespace could make files writable again
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user is not None:
        os.chown(".", user, user)
        become(libc, user)
    elif LINUX:
        keep(libc, 0)
    if LINUX:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit(resource.RLIMIT_AS, job["memory"])
    limit(resource.RLIMIT_CORE, 0)
    job["processes"] += 3 if user is None else 1  # those of ours that are this user's


# ---- the tests ------------------------------------------------------------------------------------------------------


def test_all(job: dict, alone: bool, results: int) -> None:
    """Writes a line of JSON for each test to ``results``, after an empty one that says that it begins. ``alone``: every
    process that this one may end is of the program."""
    os.write(results, b"\n")
    try:
        program = compile(job["program"], "program", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        program = None
    for test in job["tests"]:
        found = {"code": FAILED} if program is None else test_one(job, program, test, results)
        os.write(results, json.dumps(found).encode() + b"\n")
        if alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        if found["code"] and job["stop"]:
            break


def test_one(job: dict, program: types.CodeType, test: dict, results: int) -> dict:
    """What came of a test: the exit code; whether it came to its end; of a test with input, what was printed."""
    place = f"run{time.monotonic_ns()}"
    os.mkdir(place)
    with open("given", "w", errors="surrogatepass") as file:
        file.write(test.get("input", ""))
    given, printed = os.open("given", os.O_RDONLY), os.open("printed", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    (seen, report), word = os.pipe(), os.urandom(16)
    child = forked(lambda: run(job, program, test, word, place, (given, printed, report, results)))
    os.close(report)
    code = ended(child, job["seconds"])
    os.set_blocking(seen, False)
    said = b""
    with contextlib.suppress(BlockingIOError):  # a process that the program left behind may hold the other end
        said = os.read(seen, len(word) + 1)
    found: dict = {"code": code or (0 if "input" in test or said == word else FAILED)}
    if "input" in test:
        found["output"] = os.pread(printed, job["file_size"], 0).decode(errors="replace")
    for one in (given, printed, seen):
        os.close(one)
    shutil.rmtree(place, ignore_errors=True)  # a program can make it fail: the next has another one
    return found


def ended(child: int, seconds: float) -> int:
    """The exit code of a child, which is ended after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return code_of(status)
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return LATE
        time.sleep(PAUSE)


def run(
    job: dict, program: types.CodeType, test: dict, word: bytes, place: str, files: tuple[int, int, int, int]
) -> None:
    """This process runs the program, and after it the test's code; it ends here."""
    given, printed, report, results = files
    os.setsid()
    os.dup2(given, 0)
    os.dup2(printed, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.close(results)
    os.chdir(place)
    limit(resource.RLIMIT_CPU, job["cpu_seconds"])
    limit(resource.RLIMIT_FSIZE, job["file_size"])
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_NPROC, job["processes"])  # not of the tester, which forks: it may count all of a user's
    name = "__main__" if "input" in test else "program"
    module, sys.argv = types.ModuleType(name), ["program"]
    sys.modules[name] = module
    code = 0
    try:
        exec(program, module.__dict__)
        if "input" not in test:
            exec(compile(test["test"], "test", "exec"), module.__dict__)
            os.write(report, word)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
    try:
        sys.stdout.flush()
    finally:
        os._exit(code & 255)


# ---- the processes around them --------------------------------------------------------------------------------------


def forked(work) -> int:
    """The id of a child that does ``work``, and never comes back here."""
    if child := os.fork():
        return child
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(FAILED)


def code_of(status: int) -> int:
    return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 128 + os.WTERMSIG(status)


def first_process(job: dict, folder: str, libc: ctypes.CDLL, apart: bool, user: int | None, results: int) -> None:
    """Process 1: starts the tester, and ends as it does."""
    if LINUX:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if apart:  # where the kernel refuses, the program sees the names of other processes
        libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)

    def tester() -> None:
        give_up(job, folder, libc, user)
        test_all(job, apart or user is not None, results)
        os._exit(0)

    child = forked(tester)
    while True:
        gone, found = os.wait()  # orphans become children of process 1
        if gone == child:
            os._exit(code_of(found))


def main() -> None:
    folder = sys.argv[1]
    with open(sys.argv[2]) as file:
        job = json.load(file)
    results = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT, 0o600)
    libc, user, root = ctypes.CDLL(None, use_errno=True), user_of_program(), LINUX and not os.getuid()
    with open(os.path.join(folder, "status.json"), "w") as status:
        apart = LINUX and enter_namespaces(libc, user is not None)
        owner = os.getuid() if user is None else user
        read_only = apart and protect_files(libc, folder, job["file_size"] * 2, owner)
        bounded = user is not None or (apart and not root)
        json.dump({"network": apart, "processes": bounded, "files": read_only}, status)
    child = forked(lambda: first_process(job, folder, libc, apart, user, results))
    os._exit(ended(child, job["seconds"] * len(job["tests"]) + SPARE))


if __name__ == "__main__":
    main()
