"""``jaxrlhf``, struck by a signal at a moment that STRIKE names: "SIGTERM 1 loop" is a signal, who gets it, and when.

Who: the number of a process, or "launcher", the parent of process 0. When: "import" (JAX is being loaded, and the
processes have not met), "compile" (of the run), "loop" (the row of step STEP is being written). Each process notes its
number, so that a test finds those whose parent is gone.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

STEP = 5
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
        self.kind, self.to = kind, to

    def send(self) -> None:
        """From a thread, as a signal from outside comes: the main thread goes on."""
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
        at_step = lambda log, step, numbers: step == STEP
        self.after_import("jaxrlhf.log.metrics", lambda module: self.before(module.MetricsLog, "write", at_step))

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
        import builtins

        real = builtins.__import__

        def importing(*given: Any, **named: Any) -> Any:
            found = real(*given, **named)
            spec = getattr(sys.modules.get(name), "__spec__", None)
            if spec and not getattr(spec, "_initializing", False):
                builtins.__import__ = real
                then(sys.modules[name])
            return found

        builtins.__import__ = importing


if __name__ == "__main__":
    main()
