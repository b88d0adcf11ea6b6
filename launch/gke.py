#!/usr/bin/env python3
"""python launch/gke.py launch/gke.yaml [--dry-run]: train as a JobSet on GKE."""

from jaxrlhf.launch.cli import main

main(__file__)
