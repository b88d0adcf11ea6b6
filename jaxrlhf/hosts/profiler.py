"""A trace of a few iterations of a run, to be opened at https://ui.perfetto.dev."""

import os
from collections.abc import Callable

import jax


class Profiler:
    """Traces the iterations ``steps`` into ``folder``. Call ``before`` and ``after`` around each iteration; ``wait``
    returns when everything that was dispatched is done."""

    def __init__(self, folder: os.PathLike | str, steps: range):
        self.folder, self.steps, self.tracing = os.fspath(folder), steps, False

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """A run that goes on in the middle of ``steps`` traces what is left of them."""
        if step in self.steps and not self.tracing:
            wait()
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.tracing = True

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """Behind the last of ``steps`` the trace is written."""
        if self.tracing and step == self.steps[-1]:
            wait()
            self.close()

    def close(self) -> None:
        """Writes what has been traced, where a trace is open."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
