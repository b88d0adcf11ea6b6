"""Train language models from rewards and preferences: one iteration of RLHF is one compiled JAX program."""

__version__ = "0.1.0"
