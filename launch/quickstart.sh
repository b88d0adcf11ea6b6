#!/usr/bin/env bash
# From nothing to a policy that learned from preferences: installs into .venv (or $VENV), then trains a small language
# model on film reviews (SFT -> reward model -> PPO), shows what changed, and writes a page of curves and samples. CPU is
# enough.
# Arguments are overrides for every config:  bash launch/quickstart.sh seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh "[demo,report,serve]"

"$VENV/bin/jaxrlhf" train configs/quickstart/sft.yaml configs/quickstart/rm.yaml configs/quickstart/ppo.yaml "$@"
"$VENV/bin/jaxrlhf" evaluate runs/quickstart/ppo
exec "$VENV/bin/jaxrlhf" report runs/quickstart/ppo runs/quickstart/rm runs/quickstart/sft --out runs/quickstart/report.html
