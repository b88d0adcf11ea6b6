#!/usr/bin/env python3
"""python launch/skypilot.py launch/skypilot.yaml [--dry-run]: train as a managed job of SkyPilot."""

from jaxrlhf.launch.cli import main

main(__file__)
