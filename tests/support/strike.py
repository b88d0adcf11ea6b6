"""``jaxrlhf``, struck at a moment that STRIKE names: "SIGTERM 1 loop" is a signal, who gets it, and when.

Who: the number of a process, or "launcher", the parent of process 0. When: "import" (JAX is being loaded, and the
processes have not met), "compile" (of the run), "loop" (the row of step STEP is being written). "FULL 1 loop": files of
process 1 can't grow beyond a few kB from the row of step FULL[0] to that of FULL[1]. Each process notes its number, so
that a test finds those whose parent is gone.
"""

import builtins
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

STEP, FULL = 3, (3, 7)
MOMENTS = ("import", "compile", "loop")


def main() -> None:
    """The command, after the moments are watched for."""
    number = next((word.rpartition("=")[2] for word in sys.argv if word.startswith("distributed.process_id=")), "0")
    Path(os.environ["STRIKE_PIDS"], number).write_text(str(os.getpid()))
    kind, who, when = (os.environ.get("STRIKE") or "- - -").split()
    if who == number or (who == "launcher" and number == "0"):
        Strike(kind, os.getppid() if who == "launcher" else os.getpid()).arm(when)
    from jaxrlhf.__main__ import main as jaxrlhf

    jaxrlhf()


class Strike:
    """One signal, which is sent once."""

    def __init__(self, kind: str, to: int):
        self.kind, self.to, self.sent = kind, to, False

    def send(self) -> None:
        """From a thread, as a signal from outside comes: the main thread goes on."""
        if self.sent:
            return
        self.sent = True
        thread = threading.Thread(target=os.kill, args=(self.to, getattr(signal, self.kind)))
        thread.start()
        thread.join()

    def arm(self, when: str) -> None:
        {"import": self.at_import, "compile": self.at_compilation, "loop": self.in_the_loop}[when]()

    def at_import(self) -> None:
        strike = self

        class Finder:
            """Finds nothing, and sees what is looked for."""

            def find_spec(self, name: str, *_: Any) -> None:
                if name == "jax" and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    strike.send()

        sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]

    def at_compilation(self) -> None:
        self.after_import("jaxrlhf.train", lambda module: self.before(module.Trainer, "compile"))

    def in_the_loop(self) -> None:
        if self.kind == "FULL":
            self.after_import("jaxrlhf.log.metrics", lambda module: self.before(module.MetricsLog, "write", self.fill))
            return
        self.after_import("jaxrlhf.log.metrics", lambda module: self.before(module.MetricsLog, "write", self.at_step))

    def at_step(self, log: Any, step: int, numbers: Any) -> bool:
        """From then on an iteration takes a second: JAX looks once a second whether SIGTERM came."""
        time.sleep(step > STEP)
        return step == STEP

    def fill(self, log: Any, step: int, numbers: Any) -> bool:
        """A full disk, as long as one is due; nothing is sent."""
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if step in FULL:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14 if step == FULL[0] else most, most))
        return False

    def before(self, owner: Any, name: str, when: Any = lambda *_: True) -> None:
        """Strikes as ``owner.name`` is called."""
        real = getattr(owner, name)

        def struck(*given: Any, **named: Any) -> Any:
            if when(*given):
                self.send()
            return real(*given, **named)

        setattr(owner, name, struck)

    def after_import(self, name: str, then: Any) -> None:
        """Calls ``then`` with a module of this package once it is loaded."""
        real = builtins.__import__

        def importing(*given: Any, **named: Any) -> Any:
            found = real(*given, **named)
            spec = getattr(sys.modules.get(name), "__spec__", None)
            if builtins.__import__ is importing and spec and not getattr(spec, "_initializing", False):
                builtins.__import__ = real
                then(sys.modules[name])
            return found

        builtins.__import__ = importing


if __name__ == "__main__":
    main()
