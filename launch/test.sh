#!/usr/bin/env bash
# The test suite on a machine that has only Python 3.11+ and pip: makes .venv (or $VENV), installs, runs pytest.
# Arguments go to pytest:  bash launch/test.sh tests/ops -k kl
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh "[test]"

# XLA's own threads and two workers share the cores; tests of one file stay on one worker, which has their programs
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal -m "not nightly and not benchmark and not browser" "$@"
