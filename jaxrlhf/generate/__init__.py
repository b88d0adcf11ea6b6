"""The jitted sampler: Prompts -> Sequences. The loop is in loop.py, what it depends on in sampler.py."""
