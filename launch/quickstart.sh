#!/usr/bin/env bash
# From nothing to a policy that learned from preferences: installs into .venv (or $VENV), then trains a small language
# model on film reviews (SFT -> reward model -> PPO) and shows what changed. CPU is enough.
# Arguments are overrides for every config:  bash launch/quickstart.sh seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh "[demo]"

"$VENV/bin/jaxrlhf" train configs/quickstart/sft.yaml configs/quickstart/rm.yaml configs/quickstart/ppo.yaml "$@"
exec "$VENV/bin/jaxrlhf" evaluate runs/quickstart/ppo
