#!/usr/bin/env python3
"""python launch/tpu_vm.py launch/tpu_vm.yaml [--dry-run]: train on TPU VMs."""

from jaxrlhf.launch.cli import main

main(__file__)
