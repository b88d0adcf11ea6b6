"""What the launchers would do, as golden texts. ``python -m tests.launch.cases`` writes them to tests/golden/launch."""

from pathlib import Path

from jaxrlhf.launch.cli import PROVIDERS
from jaxrlhf.launch.config import load_launch

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "launch"

TWO_SLICES = ["slices=2", "overrides=[mesh.fsdp=4, batch.sequences_per_step=128]"]
# name of the golden text -> (provider, overrides of launch/PROVIDER.yaml)
CASES = {
    "tpu_vm": ("tpu_vm", []),
    "tpu_vm_two_slices": (
        "tpu_vm",
        [
            "accelerator=v5p-128",
            *TWO_SLICES,
            "capacity=reserved",
            "tpu_vm={network: net, subnetwork: sub, service_account: a@b.c, internal_ips: true, valid_until: 6h}",
        ],
    ),
    "tpu_vm_flex_start": (
        "tpu_vm",
        [
            "accelerator=v6e-8",
            "capacity=flex-start",
            "tpu_vm={max_run_duration: 24h, valid_until: 6h}",
            "train=[configs/quickstart/sft.yaml, configs/quickstart/rm.yaml]",
            "overrides=[batch.sequences_per_step=16, batch.preferences_per_step=16]",
        ],
    ),
    "gke": ("gke", []),
    "gke_flex_start": ("gke", ["capacity=flex-start"]),
    "gke_two_slices": (
        "gke",
        [
            "accelerator=tpu7x:4x4x4",
            "slices=2",
            "overrides=[mesh.fsdp=4, batch.sequences_per_step=256]",
            "capacity=reserved",
            "preflight=false",
            "env={HF_HOME: /dev/shm/hf}",
            "secrets=[HF_TOKEN]",
            "gke={image: registry/image:1, context: there, queue: research, secret: keys, reservation: block-1}",
        ],
    ),
    "slurm": ("slurm", []),
    "slurm_all": (
        "slurm",
        ["env={NOTE: it's fine}", "slurm={account: lab, python: /opt/v/bin, lines: [module load cuda/13]}"],
    ),
    "skypilot": ("skypilot", []),
    "skypilot_gpus": (
        "skypilot",
        ["accelerator=h100:8", "slices=2", "capacity=on-demand", "skypilot={cloud: lambda, strategy: FAILOVER}"],
    ),
}


def rendered(name: str) -> str:
    """The text of the case, without the place of this repository."""
    provider, overrides = CASES[name]
    launch = load_launch(ROOT / "launch" / f"{provider}.yaml", provider, ROOT, overrides)
    return PROVIDERS[provider].dry_run(launch).replace(str(ROOT), "/ROOT").rstrip("\n") + "\n"


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(rendered(name))
