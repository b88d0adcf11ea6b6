"""Exit codes of the command, which launchers act on."""

EXIT_BROKEN = 1
EXIT_MISTAKE = 2  # in the config or the input
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: all is saved, and the same command goes on
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
