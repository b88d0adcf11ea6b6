#!/usr/bin/env bash
# On a worker of a TPU VM, sent there by launch/tpu_vm.py:
#   worker.sh install               unpacks and installs the code; not while training runs
#   worker.sh run ATTEMPT ARGS...   starts training, follows its log, ends with its exit code
#   worker.sh stop                  sends it SIGTERM: it saves and ends
# Training is no child of the connection. A second run follows what is running; one that has ended is started again only
# by another ATTEMPT: where a connection breaks, gcloud runs the command again.
set -euo pipefail
code=$HOME/jaxrlhf venv=$HOME/jaxrlhf-venv state=$HOME/jaxrlhf-run

running() {
    [ -e "$state/current" ] && [ ! -e "$state/$(cat "$state/current").code" ] &&
        kill -0 "$(cat "$state/$(cat "$state/current").pid")" 2>/dev/null
}

install() {
    if running; then
        echo "$(hostname): training runs already; nothing is replaced"
        return
    fi
    rm -rf "$code.new"
    mkdir "$code.new"
    tar -xzf "$HOME/jaxrlhf-code.tar.gz" -C "$code.new"
    rm -rf "$code"
    mv "$code.new" "$code"
    # the images have Python 3.10; uv brings another
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv
    [ -x "$venv/bin/python" ] || python3 -m uv venv --quiet --python 3.12 "$venv"
    python3 -m uv pip install --quiet --python "$venv/bin/python" --constraint "$code/launch/requirements.lock" \
        --editable "${code}[${EXTRA:-tpu}]"
    echo "$(hostname): installed"
}

# supervise ATTEMPT ARGS...: runs training and notes how it ended
supervise() {
    local attempt=$1 training result asked
    shift
    cd "$code"
    # shellcheck disable=SC1091 # made by launch/tpu_vm.py
    . "$HOME/jaxrlhf.env"
    JAXRLHF=$venv/bin/jaxrlhf bash launch/train.sh "$@" &
    training=$!
    trap 'asked=1; kill -TERM "$training" 2>/dev/null || true' TERM
    while :; do # a wait that a signal interrupts says nothing of training
        asked='' result=0
        wait "$training" || result=$?
        [ -n "$asked" ] || break
    done
    echo "$result" >"$state/$attempt.code.part"
    mv "$state/$attempt.code.part" "$state/$attempt.code"
}

# begin ATTEMPT ARGS...: starts it apart from this connection
begin() {
    local attempt=$1
    : >"$state/$attempt.log" # what follows it may be here before what writes it
    setsid nohup bash "$0" supervise "$@" </dev/null >>"$state/$attempt.log" 2>&1 9>&- &
    echo $! >"$state/$attempt.pid"
    echo "$attempt" >"$state/current"
}

# follow ATTEMPT: its log, from the start, until it ends
follow() {
    local pid
    pid=$(cat "$state/$1.pid")
    tail --pid="$pid" --sleep-interval="${FOLLOW_SECONDS:-1}" --lines=+1 --follow "$state/$1.log"
    if [ ! -e "$state/$1.code" ]; then
        echo "$(hostname): training was killed" >&2
        return 137
    fi
    return "$(cat "$state/$1.code")"
}

run() {
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock 9
    if ! running && [ ! -e "$state/$1.code" ]; then
        begin "$@"
    fi
    exec 9>&-
    if [ -e "$state/$1.code" ]; then
        follow "$1"
    else
        follow "$(cat "$state/current")"
    fi
}

stop() {
    if running; then
        kill -TERM "$(cat "$state/$(cat "$state/current").pid")"
    fi
}

# one line, read before it runs, as the file may be replaced meanwhile
"$@" && exit || exit
