"""Putting a training config on machines: TPU VMs, GKE, SLURM, SkyPilot. The scripts in ``launch/`` call it."""
