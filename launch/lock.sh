#!/usr/bin/env bash
# Writes launch/requirements.lock anew: the newest versions that fit together, for Python 3.12 on x86-64 Linux.
# Needs uv. Run it after a change of the dependencies in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml --quiet --upgrade --all-extras --no-emit-package jaxrlhf \
    --python-version 3.12 --python-platform x86_64-manylinux_2_31 --no-annotate --no-header \
    --output-file launch/requirements.lock
