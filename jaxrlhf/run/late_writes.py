"""What tensorstore's threads say after a save has failed: a traceback for each part of it that ends later."""

import sys
from typing import Any

CLOSED = "Event loop is closed"  # that of orbax, which waited for the parts until the first one failed


def is_late(event: Any) -> bool:
    """Whether an error that nobody can catch (an argument of sys.unraisablehook) is such a part's."""
    return event.object is None and isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == CLOSED


def silence() -> None:
    """From here on they are not printed: the failure is told in one line."""
    previous = sys.unraisablehook
    if getattr(previous, "__name__", "") == "without_late_writes":
        return

    def without_late_writes(event: Any) -> None:
        if not is_late(event):
            previous(event)

    sys.unraisablehook = without_late_writes
