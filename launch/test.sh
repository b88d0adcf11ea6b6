#!/usr/bin/env bash
# The test suite on a machine that has only Python 3.11+ and pip: makes .venv (or $VENV), installs, runs pytest.
# Arguments go to pytest:  bash launch/test.sh tests/ops -k kl
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    for PYTHON in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        PYTHON=
    done
    if [ -z "$PYTHON" ]; then
        echo "launch/test.sh: no Python 3.11 or newer on PATH; PYTHON=/path/to/python names one" >&2
        exit 2
    fi
    "$PYTHON" -m venv "$VENV"
fi

echo "installing into $VENV ..."
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[test]"

# XLA's own threads and two workers share the cores
exec "$VENV/bin/python" -m pytest -n 2 -m "not nightly" "$@"
