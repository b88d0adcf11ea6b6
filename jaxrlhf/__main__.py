"""``jaxrlhf`` and ``python -m jaxrlhf``."""

import os
import signal
import sys

from jaxrlhf.hosts.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED

LEAVE = {  # signal -> (what is said, exit code)
    signal.SIGTERM: (b"SIGTERM: stopped\n", EXIT_PREEMPTED),
    signal.SIGINT: (b"Ctrl-C: stopped\n", EXIT_INTERRUPTED),
}


def main() -> None:
    """The command. Its import takes a while, in which signals end it without a traceback already, and SIGTERM ends
    training with its own exit code."""
    if sys.argv[1:2] == ["train"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    from jaxrlhf.hosts.parent_death import ends_with_launcher

    ends_with_launcher()
    from jaxrlhf.cli.app import main

    main()


def leave(number: int, _: object) -> None:
    """The handler until those of the command take its place."""
    text, code = LEAVE[signal.Signals(number)]
    os.write(2, text)
    os._exit(code)


if __name__ == "__main__":
    main()
