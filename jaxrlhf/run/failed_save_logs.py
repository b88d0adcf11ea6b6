"""What tensorstore and orbax say after a save has failed: a traceback for each part of it that ends later."""

import logging
import sys
from typing import Any

CLOSED = "Event loop is closed"  # that of orbax, which waited for the parts until the first one failed
UNHEARD = "exception was never retrieved"  # of a future, or of a task


def is_late(event: Any) -> bool:
    """Whether an error that nobody can catch (an argument of sys.unraisablehook) is such a part's."""
    return event.object is None and isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == CLOSED


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's is not of such a part: a write that orbax started and did not wait for."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or UNHEARD not in record.getMessage():
        return True
    trace, files = error.__traceback__, []
    while trace:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return "tensorstore_spec" not in str(error) and not any("/orbax/" in file for file in files)


def silence() -> None:
    """From here on they are not printed: the failure is told in one line."""
    logging.getLogger("asyncio").addFilter(is_news)  # once, however often it is called
    previous = sys.unraisablehook
    if getattr(previous, "__name__", "") == "without_late_writes":
        return

    def without_late_writes(event: Any) -> None:
        if not is_late(event):
            previous(event)

    sys.unraisablehook = without_late_writes
