"""Models of each kind of layer as a user trains one, on text with a trained tokenizer: GRPO raises the share of vowels.
Those of experts are in test_expert_runs.py."""

import pytest

from tests.run.test_expert_runs import learn_on_text

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 16, "max_positions": 64}
KINDS = {
    "gated delta nets": {"family": "qwen3_5_text", "layer_types": ["linear", "global"]},
    # heads of their own in global layers, the last of which reads the first one's keys; embeddings of layers
    "uneven layers": {
        "family": "gemma4_text",
        "num_layers": 3,
        "layer_types": ["local", "global", "global"],
        "sliding_window": 3,
        "num_kv_heads": 2,
        "global_head_dim": 8,
        "per_layer_size": 4,
        "shared_kv_layers": 1,
    },
    "no positions": {"family": "smollm3", "layer_types": ["nope", "global"]},
}
BY_DAY = ("gated delta nets", "uneven layers")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in BY_DAY else pytest.mark.nightly) for k in KINDS])
def test_grpo_learns(kind, root, tmp_path):
    """More vowels; trainer and sampler agree on what was sampled."""
    rows = learn_on_text(root, tmp_path / "run", {"architecture": SIZES | KINDS[kind]})
    assert all(row["kl/sampler_mismatch"] < 1e-4 for row in rows[1:])
