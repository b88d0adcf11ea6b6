"""Algorithms written outside the package, against its records alone: they are found by name and train."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.heads import lm_logits, scalar
from jaxrlhf.models.nets import segments
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.step import gradients, make_iteration
from jaxrlhf.types import Ask, Batch, Metrics, QStats, TrainState
from tests.algorithms.outside import ilql_shaped, kto_shaped, moving_reference
from tests.support import runs, tiny
from tests.support.flops import flops

WHERE = "tests.algorithms.outside"


def trained(name: str, cfg: Any, batch: Batch, iterations: int = 2) -> tuple[list[TrainState], list[Metrics]]:
    """(the states, from the first on; the metrics of each iteration) of the algorithm in module ``name``."""
    run = tiny.build(f"{WHERE}.{name}:ALGORITHM", cfg, batch=batch)
    step, states, metrics = tiny.program(make_iteration(run.recipe)), [run.state], []
    for _ in range(iterations):
        state, numbers, sequences = step(states[-1], run.batch)
        assert sequences is None
        states.append(state)
        metrics.append(numbers)
    return states, metrics


def test_a_kto_shaped_algorithm_tells_good_responses_from_bad():
    states, (first, second) = trained("kto_shaped", kto_shaped.Config(beta=0.5), Batch(unpaired=tiny.unpaired()))
    assert second["loss/policy"] < first["loss/policy"]
    assert second["ratio/good"] - second["ratio/bad"] > first["ratio/good"] - first["ratio/bad"]
    assert tiny.equal_trees(states[0].slow, states[2].slow)
    assert not tiny.equal_trees(states[0].params, states[2].params)


def test_a_slow_role_follows_the_policy():
    """As a NumPy loop has it. In the first iteration the two are equal, so that there is no KL."""
    cfg = moving_reference.Config(polyak=0.25)
    states, (first, second) = trained("moving_reference", cfg, Batch(sequences=tiny.sequences()))
    assert second["loss/policy"] < first["loss/policy"]
    assert np.isclose(first["kl/reference"], 0, atol=1e-6) and second["kl/reference"] > 1e-6
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].slow["reference"])
    for state in states[1:]:
        expected = jax.tree.map(lambda new, old: 0.25 * np.asarray(new) + 0.75 * old, state.params["policy"], expected)
        pairs = zip(jax.tree.leaves(state.slow["reference"]), jax.tree.leaves(expected), strict=True)
        for found, wanted in pairs:
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert not tiny.equal_trees(states[1].slow, states[2].slow)


# ---- Q heads on the policy's trunk ----------------------------------------------------------------------------------

ILQL = ilql_shaped.Config()


def ilql_by_loop(state: TrainState, rows: Any, good: np.ndarray, cfg: ilql_shaped.Config) -> dict[str, float]:
    """Mean losses in float64, a token at a time, from the hidden states of the policy alone."""
    hidden = forward(state.params["policy"], tiny.MODEL, rows.tokens, segments(rows), Runtime())
    wide = lambda tree: np.asarray(lm_logits(tree, tiny.MODEL, hidden), np.float64)
    logits, values = wide(state.params["policy"]), np.asarray(scalar(state.params["value"], hidden), np.float64)
    q = {role: wide(state.params[role]) for role in ilql_shaped.QS}
    target = [wide(state.slow[f"target_{role}"]) for role in ilql_shaped.QS]
    lse = lambda x: x.max() + np.log(np.exp(x - x.max()).sum())
    losses: dict[str, list[Any]] = {"policy": [], "value": [], "q1": [], "q2": []}
    mask, tokens = np.asarray(rows.response_mask), np.asarray(rows.tokens)
    for row, t in zip(*np.nonzero(mask)):
        last = t + 1 == mask.shape[1] or not mask[row, t + 1]
        token, before = tokens[row, t], (row, t - 1)
        backup = float(good[row]) if last else cfg.gamma * values[row, t]
        losses["policy"].append(lse(logits[before]) - logits[before][token])
        error = min(one[before][token] for one in target) - values[before]
        losses["value"].append((cfg.expectile if error > 0 else 1 - cfg.expectile) * error**2)
        for role, found in q.items():
            chosen = found[before][token]
            losses[role].append((chosen - backup) ** 2 + cfg.conservative * (lse(found[before]) - chosen))
    return {role: float(np.mean(terms)) for role, terms in losses.items()}


@pytest.mark.nightly  # by day: the loop of ilql itself, in test_trajectories
def test_an_ilql_shaped_algorithm_learns_values_as_a_numpy_loop_has_them():
    rows = tiny.unpaired()
    states, (first, second) = trained("ilql_shaped", ILQL, Batch(unpaired=rows))
    expected = ilql_by_loop(states[0], rows.responses, np.asarray(rows.desirable), ILQL)
    for role, wanted in expected.items():
        np.testing.assert_allclose(first[f"loss/{role}"], wanted, rtol=1e-4, err_msg=role)
    assert all(second[f"loss/{role}"] < first[f"loss/{role}"] for role in ("policy", "q1", "q2"))
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].slow)
    for state in states[1:]:
        for role in ilql_shaped.QS:
            new, old = np.asarray(state.params[role]["head"]["kernel"]), expected[f"target_{role}"]["head"]["kernel"]
            expected[f"target_{role}"] = {"head": {"kernel": 0.1 * new + 0.9 * old}}
            found = state.slow[f"target_{role}"]["head"]["kernel"]
            np.testing.assert_allclose(found, expected[f"target_{role}"]["head"]["kernel"], rtol=1e-5, atol=1e-6)
    assert not tiny.equal_trees(states[0].slow, states[1].slow)


def test_six_heads_on_one_trunk_are_one_pass():
    """FLOPs of the traced gradient: those of supervised fine-tuning, and of five heads; four of them go back too."""
    rows = tiny.unpaired()
    ilql = tiny.build(f"{WHERE}.ilql_shaped:ALGORITHM", ILQL, batch=Batch(unpaired=rows))
    sft = tiny.build("sft", None, batch=Batch(sequences=rows.responses))

    def traced(run: tiny.Tiny) -> int:
        experience = run.recipe.algorithm.prepare(run.recipe.nets, run.state, run.batch, run.recipe.cfg)[0]
        return flops(jax.make_jaxpr(partial(gradients, run.recipe))(run.state, experience))

    tokens = rows.responses.tokens.shape[0] * 6
    wide, narrow = (2 * tokens * tiny.MODEL.hidden_size * size for size in (tiny.MODEL.vocab_size, 1))
    most = 2 * 3 * wide + 2 * wide + 3 * narrow  # two Q heads that learn, two that do not, one value head
    assert 0.95 * (2 * 3 * wide) < traced(ilql) - traced(sft) <= 1.05 * most


def test_q_of_a_model_s_own_logits():
    """An "lm" head read as action values: its logits."""
    run = tiny.build("sft", None)
    rows = tiny.sequences()
    (found,) = tiny.program(lambda trees: run.recipe.nets.read(trees, rows, Ask("policy", "q")))(run.state.trees)
    hidden = forward(run.state.params["policy"], tiny.MODEL, rows.tokens, segments(rows), Runtime())
    logits = lm_logits(run.state.params["policy"], tiny.MODEL, hidden)[:, :-1]
    chosen = jnp.take_along_axis(logits, rows.tokens[:, 1:, None], axis=-1)[..., 0]
    mask = rows.response_mask[:, 1:]
    wanted = QStats(chosen, logits.max(-1), jax.nn.logsumexp(logits, axis=-1))
    same = lambda got, expected: np.testing.assert_allclose(got[:, 1:][mask], expected[mask], atol=1e-5)
    jax.tree.map(same, found, wanted)


ILQL_RUN = """
run_dir: {folder}/run
iterations: 2
algorithm: {{name: "tests.algorithms.outside.ilql_shaped:ALGORITHM"}}
models: {{policy: {{architecture: {{hidden_size: 8, num_layers: 1, num_heads: 2, mlp_size: 16, max_positions: 64}}}}}}
tokenizer: {{train_vocab_size: 300}}
data:
  demonstrations: {{path: {text}/demonstrations.jsonl}}
  unpaired: {{path: {text}/unpaired.jsonl}}
  max_length: 32
batch: {{unpaired_per_step: 8}}
checkpoint: {{every: 1, keep: 3}}
"""


@pytest.mark.nightly  # by day: runs of ppo that go on, in run/test_resume
def test_a_run_with_heads_on_a_trunk_is_saved_and_goes_on(root, tmp_path, command, one_device):
    """From a config that names nothing but the policy: its heads and their targets start equal, and follow over a
    restart."""
    config = tmp_path / "ilql.yaml"
    config.write_text(ILQL_RUN.format(folder=tmp_path, text=runs.text(root)))
    command("train", config)
    command("train", config, "iterations=3")
    states = {step: runs.read_state(tmp_path / "run", step) for step in (1, 2, 3)}
    kernel = lambda step, role: states[step][f"{role}/head/kernel"].astype(np.float64)
    for step in (2, 3):
        followed = 0.1 * kernel(step, "params.q1") + 0.9 * kernel(step - 1, "slow.target_q1")
        np.testing.assert_allclose(kernel(step, "slow.target_q1"), followed, rtol=1e-5, atol=1e-7)
    assert {path for path in states[1] if path.startswith("params.q2")} == {"params.q2/head/kernel"}
    _, err = command("export", tmp_path / "run", "--role", "q1", "--to", tmp_path / "hf", code=2)
    assert "--role q1: action values, which no Hugging Face class holds; expected policy" in err


@pytest.mark.plan
def test_heads_on_a_trunk_are_planned(root, tmp_path, command):
    pytest.importorskip("libtpu")
    config = tmp_path / "ilql.yaml"
    config.write_text(ILQL_RUN.format(folder=tmp_path, text=runs.text(root)))
    out, _ = command("plan", config, "--topology", "v5e:2x2", "--estimate")
    assert "update target_q2" in out and "fits" in out


def test_a_head_on_a_trunk_stays_there(root, tmp_path, command):
    config = tmp_path / "ilql.yaml"
    config.write_text(ILQL_RUN.format(folder=tmp_path, text=runs.text(root)))
    _, err = command("train", config, "models.q1={init_from: somewhere}", code=2)
    assert (
        "models.q1: tests.algorithms.outside.ilql_shaped:ALGORITHM has it as a head on the policy; expected init_from "
        "policy and share_trunk true, or nothing"
    ) in " ".join(err.split())
