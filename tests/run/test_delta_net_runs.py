"""A model of gated delta nets and attention as a user trains one, on text."""

from tests.run.test_expert_runs import learn_on_text

SHAPE = {"family": "qwen3_5_text", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 16}
SHAPE |= {"layer_types": ["linear", "global"], "max_positions": 64}


def test_grpo_of_gated_delta_nets_learns(root, tmp_path):
    """More vowels; trainer and sampler agree on what was sampled."""
    rows = learn_on_text(root, tmp_path / "run", {"architecture": SHAPE})
    assert all(row["kl/sampler_mismatch"] < 1e-4 for row in rows[1:])
