"""From a config to a running job: weights, tokenizer, programs, data, state, checkpoints."""
