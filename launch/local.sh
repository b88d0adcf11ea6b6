#!/usr/bin/env bash
# Training on this machine, in one process or in several that act as hosts of one run:
#   bash launch/local.sh CONFIG... [KEY=VALUE]...
#   PROCESSES=2 bash launch/local.sh CONFIG... [KEY=VALUE]...
# Processes find each other at 127.0.0.1 (PORT chooses the port). Their lines begin with [their number]. SIGTERM and
# Ctrl-C reach all of them as SIGTERM: they save and end. The first that fails ends the others; its exit code is ours.
# Several processes need bash 5.1.
set -euo pipefail
processes=${PROCESSES:-1} jaxrlhf=${JAXRLHF:-jaxrlhf}
case $processes in '' | *[!0-9]* | 0)
    echo "PROCESSES: $processes: expected a number of 1 or more" >&2
    exit 2
    ;;
esac
if [ "$processes" = 1 ]; then
    exec "$jaxrlhf" train "$@"
fi

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

coordinator=127.0.0.1:${PORT:-$(free_port)}
children=()
stop() {
    [ "${#children[@]}" = 0 ] || kill -TERM "${children[@]}" 2>/dev/null || true
}
force() { # those that hang in a collective whose other half is gone
    sleep "${GRACE_SECONDS:-60}"
    kill -KILL "${children[@]}" 2>/dev/null || true
}
trap stop TERM INT # children of a script don't hear Ctrl-C
for ((id = 0; id < processes; id++)); do
    "$jaxrlhf" train "$@" distributed.coordinator="$coordinator" distributed.num_processes="$processes" \
        distributed.process_id="$id" > >(exec sed -u "s/^/[$id] /") 2> >(exec sed -u "s/^/[$id] /" >&2) &
    children+=("$!")
done

result=0 forcing=
while [ "${#children[@]}" != 0 ]; do
    code=0
    wait -n -p ended "${children[@]}" || code=$?
    [ -n "${ended:-}" ] || continue # a signal, which was passed on
    for each in "${!children[@]}"; do
        [ "${children[$each]}" != "$ended" ] || unset "children[$each]"
    done
    # 75: saved on SIGTERM; the others save the same step and end by themselves
    if [ "$code" != 0 ] && [ "$result" = 0 ]; then
        result=$code
        if [ "$code" != 75 ]; then
            stop
            force >/dev/null 2>&1 &
            forcing=$!
        fi
    fi
done
[ -z "$forcing" ] || kill "$forcing" 2>/dev/null || true
exit "$result"
