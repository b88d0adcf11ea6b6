"""max_run_duration: a run stops while there is still time to save."""

import contextlib
import time
from collections.abc import Iterator

from jaxrlhf.hosts import processes

MARGIN = 1.5  # an iteration, or a save, may take so much longer than the slowest so far
LEAST = 1.0  # seconds to spare, for what is not measured


class TimeLimit:
    """The time that a command has, and what its iterations and saves took of it. ``seconds``: None is for ever."""

    clock = staticmethod(time.monotonic)

    def __init__(self, seconds: float | None, began: float):
        self.seconds, self.began = seconds, began  # by time.monotonic
        self.over = False  # whether the run stops because of it
        self.turn: float | None = None  # when the iteration under way began
        self.slowest = {"iteration": 0.0, "save": 0.0}

    def reached(self) -> bool:
        """Whether time would run out in another iteration and the save behind it, by the slowest of each so far. Called
        once before each iteration; all processes answer alike."""
        if self.seconds is None:
            return False
        now = self.clock()
        if self.turn is not None:
            self.note("iteration", now - self.turn)
        self.turn = now
        late = self.seconds - (now - self.began) < MARGIN * sum(self.slowest.values()) + LEAST
        self.over = any(processes.everywhere("late" if late else ""))
        return self.over

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save."""
        began = self.clock()
        yield
        self.note("save", self.clock() - began)

    def note(self, what: str, seconds: float) -> None:
        self.slowest[what] = max(self.slowest[what], seconds)
