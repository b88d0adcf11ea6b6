#!/usr/bin/env bash
# Training on this machine, in one process or in several that act as hosts of one run:
#   bash launch/local.sh CONFIG... [KEY=VALUE]...
#   PROCESSES=2 bash launch/local.sh CONFIG... [KEY=VALUE]...
# Processes find each other at 127.0.0.1 (PORT chooses the port). Their lines begin with [their number]. SIGTERM and
# Ctrl-C reach all of them as SIGTERM: they save and end, as they do where this script is killed. The first that fails
# ends the others; its exit code is ours. Several processes need bash 5.1.
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
children=() printers=() told=
stop() {
    told=1
    [ "${#children[@]}" = 0 ] || kill -TERM "${children[@]}" 2>/dev/null || true
}
force() { # those that hang in a collective whose other half is gone
    sleep "${GRACE_SECONDS:-60}"
    kill -KILL "${children[@]}" 2>/dev/null || true
}
number() { # to the end of the lines: a signal to all of the terminal must not take the pipe away from training
    trap '' INT TERM
    exec sed -u "s/^/[$1] /"
}
trap stop TERM INT # children of a script don't hear Ctrl-C
export JAXRLHF_LAUNCHER=$$
for ((id = 0; id < processes; id++)); do
    exec {out}> >(number "$id")
    printers+=("$!")
    exec {err}> >(number "$id" >&2)
    printers+=("$!")
    "$jaxrlhf" train "$@" distributed.coordinator="$coordinator" distributed.num_processes="$processes" \
        distributed.process_id="$id" >&"$out" 2>&"$err" {out}>&- {err}>&- &
    children+=("$!")
    exec {out}>&- {err}>&-
done

result=0 forcing=
while [ "${#children[@]}" != 0 ]; do
    wait -n "${children[@]}" || true # or a signal, which was passed on
    for each in "${!children[@]}"; do
        child=${children[$each]}
        if kill -0 "$child" 2>/dev/null; then
            continue
        fi
        unset "children[$each]" # before what follows: it is waited for once
        code=0
        wait "$child" || code=$?
        if [ "$code" != 0 ] && [ "$result" = 0 ]; then
            result=$code
            # after 75, too: the others save the same step and end, but where they still wait for this one to come
            [ "$code" = 75 ] && [ -n "$told" ] || stop
            if [ "$code" != 75 ]; then
                force >/dev/null 2>&1 &
                forcing=$!
            fi
        fi
    done
done
[ -z "$forcing" ] || kill "$forcing" 2>/dev/null || true
trap '' TERM INT # nothing is left but the last lines; what training left behind may hold their pipes open
{
    sleep 2
    kill -KILL "${printers[@]}"
} >/dev/null 2>&1 &
wait "${printers[@]}" 2>/dev/null || true
kill "$!" 2>/dev/null || true
exit "$result"
