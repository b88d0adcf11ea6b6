#!/usr/bin/env bash
# Sourced by the scripts beside it: finds Python 3.11+, makes the virtual environment $VENV (.venv), installs jaxrlhf
# into it with the extras given as the first argument.
set -euo pipefail
VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    for PYTHON in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        PYTHON=
    done
    if [ -z "$PYTHON" ]; then
        echo "$0: no Python 3.11 or newer on PATH; PYTHON=/path/to/python names one" >&2
        exit 2
    fi
    "$PYTHON" -m venv "$VENV"
fi
echo "installing into $VENV (minutes, the first time) ..."
"$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --editable ".$1"
