"""How the command ends the processes of its run, and which errors are told in one line."""

import errno
import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
WORDS = ("NOSPC", "DQUOT", "FBIG", "ROFS", "ACCES", "PERM", "IO", "NOTDIR", "ISDIR", "NAMETOOLONG", "MFILE")
REFUSED = {getattr(errno, f"E{word}") for word in WORDS}


def abandon(code: int) -> None:
    """Ends the process if it is one of several."""
    processes = sys.modules.get("jaxrlhf.hosts.processes")
    if processes is None or not processes.several():
        return
    if not isinstance(sys.exc_info()[1], SystemExit):
        traceback.print_exc()
    processes.abandon(code)


def raised_here(error: BaseException) -> bool:
    """Whether a raise statement of this package raised ``error``, so that its message was written for the user."""
    from jaxrlhf.user_code import raised_in

    return raised_in(PACKAGE, error)


def by_the_system(error: BaseException) -> bool:
    """Whether the file system refused what this package, or a library for it, wanted: a full disk, missing rights. What
    a user's own function opens is shown with its traceback."""
    from jaxrlhf.user_code import frames_outside

    refused = isinstance(error, OSError) and error.errno in REFUSED
    return refused and not raised_here(error) and not frames_outside(error)
