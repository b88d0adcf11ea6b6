"""The run directory: one writer at a time."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Container
from typing import IO

from etils import epath

from jaxrlhf.paths import unreachable


class RunDirBusy(ValueError):
    """Another process writes to the run directory."""


def is_local(path: os.PathLike | str) -> bool:
    """Whether ``path`` is on a file system, which can append and lock, and not in an object store (gs://)."""
    return "://" not in os.fspath(path)


def split_step(name: os.PathLike | str) -> tuple[str, str]:
    """("runs/a", "best") of runs/a@best; no step where ``name`` is a folder with an @ in it, or no run.

    Raises ValueError where a run's @ has nothing behind it: a variable of a shell may be empty; and for a path that
    can't be opened."""
    whole = os.path.expanduser(name)
    if why := unreachable(whole):
        raise ValueError(f"{whole!r}: {why}")
    folder, at, step = whole.rpartition("@")
    if not at or not folder or "/" in step or not (epath.Path(folder) / "config.yaml").exists():
        return whole, ""
    if epath.Path(whole).exists():
        return whole, ""
    if not step:
        raise ValueError(f"{whole}: no step behind the @; expected {folder}, {folder}@best or {folder}@STEP")
    return folder, step


def made_by(name: str | None, made: Container[str]) -> str | None:
    """The run that ``name`` (RUN, RUN@best, RUN@40) says, where it is among ``made``; it may not be there yet."""
    whole = name or ""
    return next((run for run in (whole, whole.rpartition("@")[0]) if run and run in made), None)


def at_step(name: str, step: str) -> str:
    """``name`` as RUN@STEP, where a command line gives --step beside it. Raises ValueError where it is no run."""
    if not step:
        return name
    if split_step(name)[1] or not (epath.Path(name) / "config.yaml").exists():
        raise ValueError(f"--step {step}: {name}: expected a run directory, whose checkpoints have steps")
    return f"{name}@{step}"


def lock_run_dir(run_dir: os.PathLike | str) -> IO | None:
    """Makes this process the only writer of ``run_dir`` (created if missing) until the returned file is closed.

    The lock belongs to the open file, so it ends with the process however that ends: there are no stale locks to clear.
    None for an object store, which has no locks: there a second writer is not noticed. Raises RunDirBusy, in one line,
    when another writer holds it, and ValueError where there is no writing to it.
    """
    path = epath.Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            return None
        file = open(path / ".lock", "a+")  # noqa: SIM115 (open as long as the lock is held)
    except OSError as error:
        why = "a file" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise ValueError(f"run_dir: {os.fspath(run_dir)}: {why}; expected a directory that can be written") from error
    try:
        take(file)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown process"
        file.close()
        raise RunDirBusy(
            f"run_dir: {os.fspath(run_dir)}: already being written by {holder}; stop it or choose another run_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def take(file: IO) -> None:
    """The lock, which is_locked may hold for a moment. Raises OSError where a process keeps it."""
    for last in (False, False, True):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if last:
                raise
            time.sleep(0.02)


def is_locked(run_dir: os.PathLike | str) -> bool:
    """Whether a process writes to the run directory. False where its file system has no such locks."""
    with contextlib.suppress(OSError), open(epath.Path(run_dir) / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def keep_lock(run_dir: os.PathLike | str, file: IO | None) -> IO | None:
    """The lock of ``run_dir`` that lock_run_dir gave, or a new one where somebody deleted its file.

    Raises RunDirBusy where another process made a new file, and so writes to the run directory too."""
    if file is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(os.path.join(run_dir, ".lock")), os.fstat(file.fileno())):
            return file
    return lock_run_dir(run_dir)
