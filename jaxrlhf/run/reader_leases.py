"""Holds on the steps of a run in an object store, which has no locks: while a step is read there is an object
RUN/readers/STEP-NAME, written anew from time to time. One that is older than LEASE was left by a reader that is gone.

Between the moment in which the run that trains looks for holds, and that in which it deletes, a new one comes too late.
"""

import contextlib
import os
import socket
import threading
import time
import uuid

from etils import epath

LEASE, RENEW = 600.0, 120.0  # seconds


class Hold:
    """Holds ``step`` until ``close``. Raises OSError where the run can't be written to."""

    def __init__(self, run_dir, step: int):
        self.file = folder(run_dir) / f"{step}-{uuid.uuid4().hex}"
        self.over = threading.Event()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.write()
        except Exception as error:  # stores have errors of their own
            raise OSError(f"{self.file.parent}: {error}") from error
        self.thread = threading.Thread(target=self.renew, name="hold", daemon=True)
        self.thread.start()

    def write(self) -> None:
        self.file.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def renew(self) -> None:
        """The thread."""
        while not self.over.wait(RENEW):
            with contextlib.suppress(Exception):  # the next time
                self.write()

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        with contextlib.suppress(Exception):  # else it is too old soon
            self.file.unlink(missing_ok=True)


def folder(run_dir) -> epath.Path:
    return epath.Path(run_dir) / "readers"


def is_held(run_dir, step: int) -> bool:
    """Whether anybody reads ``step``."""
    there = folder(run_dir)
    for file in list(there.glob(f"{step}-*")) if there.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if time.time() - file.stat().mtime < LEASE:
                return True
            file.unlink(missing_ok=True)
    return False
