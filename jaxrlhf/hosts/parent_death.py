"""A process that ends with the one that started it: what a launcher starts is not left behind where that is killed."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "JAXRLHF_LAUNCHER"  # in the environment: the number of the process with which training ends
EVERY = 1.0  # seconds between two looks, where the kernel doesn't tell
PR_SET_PDEATHSIG = 1


def ends_with_launcher(number: signal.Signals = signal.SIGTERM) -> None:
    """Where the environment names a launcher, this process gets ``number`` once that has ended: SIGTERM saves.

    The name is taken out of the environment: children of this process end with this one, or as they like."""
    launcher = os.environ.pop(LAUNCHER, "")
    if launcher.isdigit():
        ends_with(int(launcher), number)


def ends_with(parent: int, number: signal.Signals) -> None:
    """This process gets the signal ``number`` once the process ``parent``, which started it, has ended."""
    if sys.platform == "linux" and os.getppid() == parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended just now
            os.kill(os.getpid(), number)
        return

    def watch() -> None:
        while alive(parent):
            time.sleep(EVERY)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def alive(process: int) -> bool:
    """Whether there is such a process."""
    with contextlib.suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True
