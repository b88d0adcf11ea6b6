#!/usr/bin/env bash
# What every launcher runs on every host: `jaxrlhf preflight` (unless PREFLIGHT=0), then `jaxrlhf train` in this very
# process, so that signals reach it and its exit code is ours. JAXRLHF names the command. Arguments are those of train.
set -euo pipefail
jaxrlhf=${JAXRLHF:-jaxrlhf}

if [ "${PREFLIGHT:-1}" != 0 ]; then
    # a shell that is process 1 of a container would not hear SIGTERM; nothing is lost yet: run it again
    checks=
    trap '[ -z "$checks" ] || kill -TERM "$checks" 2>/dev/null || true; exit 75' TERM
    "$jaxrlhf" preflight "$@" &
    checks=$!
    wait "$checks"
    trap - TERM
fi
exec "$jaxrlhf" train "$@"
