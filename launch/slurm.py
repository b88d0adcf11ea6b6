#!/usr/bin/env python3
"""python launch/slurm.py launch/slurm.yaml [--dry-run]: train on a SLURM cluster."""

from jaxrlhf.launch.cli import main

main(__file__)
