"""A page about runs: what they wrote down, as curves, samples and configs. It reads files and imports no JAX."""
