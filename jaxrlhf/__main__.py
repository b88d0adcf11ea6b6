"""``jaxrlhf`` and ``python -m jaxrlhf``."""

import os
import signal
import sys

from jaxrlhf.hosts.exit_codes import EXIT_PREEMPTED


def main() -> None:
    """The command. Its import takes a while, in which SIGTERM ends training with its own exit code already."""
    if sys.argv[1:2] == ["train"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    from jaxrlhf.cli.app import main

    main()


def leave(*_: object) -> None:
    """The handler until that of training takes its place."""
    os.write(2, b"SIGTERM: stopped\n")
    os._exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    main()
