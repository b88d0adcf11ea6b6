"""The same weights in transformers and here: logits, scores, greedy tokens, files both ways, number formats.

The live tests need torch. Without it the committed numbers of transformers (golden/transformers_*.json) are checked;
``python -m tests.parity.test_transformers`` writes those anew. Their weights are not stored but drawn by ``law``.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.files import hf_config, hf_weights
from tests.parity import checks, table
from tests.parity.both import (
    compute,
    our_greedy,
    read,
    reload,
    same_weights,
    their_greedy,
    their_model,
    their_output,
    write_by_law,
)
from tests.parity.cases import CASES, COLUMNS, FIRST, VALID, config_of, heads_of
from tests.support.learning import first_dpo_metrics

GOLDEN = Path(__file__).parents[1] / "golden"
SHOWN = slice(None, None, 8)  # of the vocabulary: the files stay small
# cases that also generate without torch, one for each way of decoding: programs take seconds to compile
GREEDY = ("llama: linear", "llama: SmolLM2", "mistral", "qwen2: windows", "qwen3", "phi3: longrope", "olmo2", "gemma2")
GREEDY += ("gemma3_text", "gpt2", "gpt_neox", "qwen3_moe", "qwen3_5_text", "qwen3_5_text: odd", "smollm3", "ministral3")
GREEDY += ("gpt_oss", "gemma4_text", "gemma4_text: keys are values", "gemma4_text: experts")


def golden_file(case: str) -> Path:
    return GOLDEN / f"transformers_{case.replace(': ', '_').replace(' ', '_').lower()}.json"


# its parts are those of "qwen3_5_text: odd" and of the mixture without "odd"
DEAR = "qwen3_5_moe_text: odd"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.nightly) if case == DEAR else case for case in CASES]
)
def test_golden(case, tmp_path):
    """transformers' numbers from the law's weights, read from a folder written without torch."""
    golden = json.loads(golden_file(case).read_text())
    for head in golden["config"]:
        write_by_law(tmp_path / head, golden["config"][head])
    params, cfg, head = read(tmp_path / "lm")
    assert head == "lm"
    checks.close(compute(params, cfg, head)[VALID][:, SHOWN], np.array(golden["logits"]), 1)
    if golden["scores"] is not None:
        scored = read(tmp_path / "scalar")
        assert scored[2] == "scalar"
        np.testing.assert_allclose(compute(*scored)[:, -1], golden["scores"], atol=checks.TOLERANCE, rtol=0)
    if case in GREEDY:
        assert np.asarray(our_greedy(params, cfg).tokens[:, COLUMNS:]).tolist() == golden["greedy"]


@pytest.mark.parametrize("case", GREEDY)
def test_decode(case):
    checks.decode(case)


# one case of each family for every change; its other positions, windows and biases nightly
LIVE = [pytest.param(case, marks=[] if case in FIRST.values() else pytest.mark.nightly) for case in CASES]


# its parts are those of "qwen3_5_text" and of the other mixtures
DPO = [pytest.param("qwen3_5_moe_text", marks=pytest.mark.nightly) if x == "qwen3_5_moe_text" else x for x in FIRST]
DPO += [pytest.param(case, marks=pytest.mark.nightly) for case in CASES if case not in FIRST]


@pytest.mark.parametrize("case", DPO)
def test_the_first_loss_of_dpo_is_ln_2(case):
    checks.dpo(case)


@pytest.mark.nightly  # by day: the same of a forward pass
@pytest.mark.parametrize("case", FIRST.values())
def test_a_first_iteration_of_dpo_loses_ln_2(case, tmp_path):
    write_by_law(tmp_path / "model", config_of(case, "lm"))
    metrics = first_dpo_metrics(hf_config.read_config(tmp_path / "model")[0])
    assert float(metrics["loss/policy"]) == pytest.approx(np.log(2), abs=checks.LN_2)
    assert float(metrics["policy/grad_norm"]) > 1e-3


# ---- live -----------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("case", LIVE)
@pytest.mark.parametrize("check", checks.CHECKS)
def test_live(case, check):
    pytest.importorskip("torch")
    checks.CHECKS[check](case)


@pytest.mark.torch
@pytest.mark.parametrize("case", LIVE)
def test_golden_is_what_transformers_says(case):
    pytest.importorskip("torch")
    golden = json.loads(golden_file(case).read_text())
    expected = their_output(checks.saved(case)[0])[VALID][:, SHOWN]
    np.testing.assert_allclose(expected, np.array(golden["logits"]), atol=1e-5, rtol=0)
    assert golden["config"] == json.loads(json.dumps({head: config_of(case, head) for head in heads_of(case)}))


@pytest.mark.nightly
@pytest.mark.torch
@pytest.mark.parametrize("name", table.TABLES)
def test_the_tables_in_the_readme(name):
    """They are what the checks of this session return, which are not run again."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    assert table.in_readme(name) == table.TABLES[name](), "python -m tests.parity.table writes the new one"


@pytest.mark.torch
def test_bfloat16_files_and_token_ids(tmp_path):
    """Weights written in bfloat16 are transformers' own rounding, and generation stops at either EOS token."""
    torch = pytest.importorskip("torch")
    model = their_model("llama")
    model.save_pretrained(tmp_path / "theirs")
    params, cfg, head = read(tmp_path / "theirs")
    ids = hf_config.TokenIds(eos=(int(their_greedy(model)[0, 3]), 99), bos=1, pad=2)
    hf_weights.save(params, cfg, head, tmp_path / "ours", "bfloat16", ids=ids)
    again = reload(model, tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    same_weights(model.to(torch.bfloat16), again)
    assert again.generation_config.eos_token_id == list(ids.eos)
    assert (again.config.bos_token_id, again.config.pad_token_id) == (1, 2)
    loaded = hf_weights.load(tmp_path / "ours", cfg, head, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def write_golden() -> None:
    """Ask transformers and write golden/transformers_*.json."""
    import transformers

    for case in CASES:
        model = their_model(case)
        scorer = their_model(case, "scalar") if "scalar" in heads_of(case) else None
        rounded = lambda x: np.round(x.astype(float), 6).tolist()
        golden = {
            "about": "Logits of the valid tokens (every eighth), scores of the last token, and greedy tokens of "
            "transformers, with the weights, tokens and mask of tests/parity/cases.py.",
            "source": f"transformers {transformers.__version__}",
            "config": {head: config_of(case, head) for head in heads_of(case)},
            "logits": rounded(their_output(model)[VALID][:, SHOWN]),
            "scores": None if scorer is None else rounded(their_output(scorer)),
            "greedy": their_greedy(model).tolist() if case in GREEDY else None,
        }
        golden_file(case).write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
