"""Runs whose frozen weights are in 8 or 4 bits: what is stored and what learns, resume, the mismatch that is logged,
roles on one base, files out and in, what is refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.check import check
from jaxrlhf.config.load import dump, load
from jaxrlhf.errors import ConfigError
from jaxrlhf.hosts import memory
from jaxrlhf.models import lora
from jaxrlhf.models.files import hf_weights
from jaxrlhf.models.lora import Based, LoraConfig
from jaxrlhf.models.quantized import PACKED, Nf4
from jaxrlhf.run import quantization_mismatch, saved_run
from jaxrlhf.run.announce import describe_adapters
from jaxrlhf.run.export import export
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.initial_state import abstract_state
from tests.run.test_adapters import ADAPTER, config, learner, ready, started
from tests.support import runs, tiny

IS_PACKED = {"is_leaf": lambda x: isinstance(x, PACKED)}
pytestmark = pytest.mark.usefixtures("built_on_one_device")


def quantized(folder: Path, kind: str = "nf4", **more) -> dict:
    return {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER, "base_quantization": kind} | more}


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_its_adapter_resumes_and_is_exported(folder, root, tmp_path):
    """Two iterations are one and one more, bitwise; the base is as it was at the start; the mismatch is a metric of
    step 0; the folder holds what init_from names plus A B, with ``dequantized`` what the policy was trained as."""
    first = tmp_path / "first"
    shutil.copytree(folder / "lm", first)
    models = quantized(folder) | {"policy": quantized(folder)["policy"] | {"init_from": str(first)}}
    whole, parts = (config("grpo", root, tmp_path / name, models) for name in ("whole", "parts"))
    assert trainer.run(whole) == "done"
    assert trainer.run(dataclasses.replace(parts, iterations=1)) == "done" and trainer.run(parts) == "done"
    one, two = (runs.read_state(tmp_path / name, 2) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert not any(name.startswith("slow") or "kernel" in name for name in one)
    assert np.abs(one["params.policy/layers/mlp/up/lora_b"]).max() > 0
    at_start = [row for row in rows_of(tmp_path / "parts") if "policy/quantization_error" in row]
    assert [row["step"] for row in at_start] == [0]
    assert 0.05 < at_start[0]["policy/quantization_error"] < 0.12 and at_start[0]["policy/quantization_mismatch"] > 1e-4

    run, state = started(dataclasses.replace(whole, run_dir=str(tmp_path / "new")))
    _, extra = saved_run.read_extra(str(tmp_path / "whole"))
    with jax.set_mesh(run.mesh):
        trained = saved_run.restore_model(str(tmp_path / "whole"), 2, extra["models"], "policy", jnp.float32, run.mesh)
        own = saved_run.restore_own(str(tmp_path / "whole"), 2, extra["models"], "policy", run.mesh)
        wide = hf_weights.load(first, run.configs["policy"], "lm")
    add = lambda base: lora.merged_at_once(base, own, LoraConfig(rank=2, alpha=4).scale, jnp.float32)
    assert tiny.equal_trees(trained, add(state.slow["base_policy"]))

    for name, how, expected in (("merged", {}, add(wide)), ("trained", {"dequantized": True}, trained)):
        assert export(str(tmp_path / "whole"), "policy", tmp_path / name, **how)[1] == []
        with jax.set_mesh(run.mesh):
            found = hf_weights.load(tmp_path / name, run.configs["policy"], "lm")
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, found, expected)
    refused_where_the_weights_are_others(tmp_path, first, wide, run)


def refused_where_the_weights_are_others(tmp_path: Path, first: Path, wide, run) -> None:
    """No adapter is merged into weights that it was not trained on, nor where there are none."""
    wide["layers"]["mlp"]["up"]["kernel"] = wide["layers"]["mlp"]["up"]["kernel"] * 1.5
    with jax.set_mesh(run.mesh):
        hf_weights.save(wide, run.configs["policy"], "lm", first)
    line = rf"^{tmp_path}/whole: models\.policy\.init_from: {first}: other weights by now \(layers\.mlp\.up\); expected"
    with pytest.raises(ValueError, match=line):
        export(str(tmp_path / "whole"), "policy", tmp_path / "no")
    shutil.rmtree(first)
    with pytest.raises(ValueError, match=rf"models\.policy\.init_from: {first}: .*; expected .* or --dequantized$"):
        export(str(tmp_path / "whole"), "policy", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.nightly  # by day: grpo, above
@pytest.mark.parametrize("name", ["ppo", "sft", "rm", "dpo", "raft", "kto"])
def test_every_algorithm_trains_one(name, folder, root, tmp_path):
    kind = "int8" if name == "rm" else "nf4"
    role, models, more = learner(name, quantized(folder, kind)["policy"], folder)
    assert trainer.run(config(name, root, tmp_path / "run", models, **more)) == "done"
    state = runs.read_state(tmp_path / "run", 2)
    assert all(np.abs(x).max() > 0 for item, x in state.items() if item.endswith("lora_b") and "params" in item)
    (row,) = [row for row in rows_of(tmp_path / "run") if f"{role}/quantization_error" in row]
    assert row["step"] == 0 and row[f"{role}/quantization_error"] > 0


@pytest.mark.nightly  # by day: models/test_quantized, sampling beside the base
def test_a_run_that_decodes_beside_its_base(folder, root, tmp_path):
    more = {"generate": {"max_new_tokens": 4, "merge_adapter": False}}
    assert trainer.run(config("grpo", root, tmp_path / "run", quantized(folder, "int8"), **more)) == "done"
    rows = [row for row in rows_of(tmp_path / "run") if "loss/policy" in row]
    assert len(rows) == 2 and all(np.isfinite(row["loss/policy"]) for row in rows)


# ---- what a state holds ----------------------------------------------------------------------------------------------


def test_roles_share_a_base_in_4_bits(folder, root, tmp_path):
    """The value model follows the policy's; layers alone are packed, of the format that a checkpoint is restored into,
    and in a start they are what a folder's weights become."""
    models = quantized(folder) | {"reward": {"init_from": str(folder / "scalar")}}
    models |= {"value": {"init_from": "policy", "adapter": ADAPTER}}
    cfg = config("ppo", root, tmp_path / "run", models, precision={"params": "bfloat16"})
    run, state = started(cfg)
    assert run.resolved.bases == {
        "policy": Based("base_policy", LoraConfig(rank=2, alpha=4), "nf4"),
        "value": Based("base_policy", LoraConfig(rank=2, alpha=4), "nf4"),
        "reference": Based("base_policy", None, "nf4"),
    }
    assert describe_adapters(run)[0].endswith("kept once for policy, value, reference, the layers in nf4")
    base = state.slow["base_policy"]
    packed = [x for x in jax.tree.leaves(base, **IS_PACKED) if isinstance(x, PACKED)]
    assert len(packed) == 7 and all(isinstance(x, Nf4) for x in packed)
    assert {x.dtype.name for x in jax.tree.leaves(base)} == {"uint8", "float32", "bfloat16"}
    with jax.set_mesh(run.mesh):
        described = abstract_state(run)
    alike = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert all(jax.tree.leaves(jax.tree.map(alike, described, state)))
    assert jax.tree.structure(described) == jax.tree.structure(state)


def test_no_room_to_measure_the_mismatch(folder, root, tmp_path, monkeypatch):
    """It is said, and nothing is read."""
    run, state = started(config("grpo", root, tmp_path / "run", quantized(folder, "int8")))
    monkeypatch.setattr(memory, "free", lambda devices: 1000)
    monkeypatch.setattr(quantization_mismatch, "read_base", None)
    with jax.set_mesh(run.mesh):
        metrics, (line,) = quantization_mismatch.measure(run, state, Feed(run))
    assert metrics == {} and line.startswith("models.policy: int8: its mismatch with the weights as they were read is")
    assert line.endswith("they take 0.0 GiB a device, and 0.0 GiB are free")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "generate", "message"),
    [
        (
            {"policy": {"init_from": "x", "base_quantization": "nf4"}},
            {},
            "models.policy.base_quantization: nf4: policy has no adapter, under which weights are frozen; expected",
        ),
        (
            {
                "policy": {"init_from": "x", "adapter": {}, "base_quantization": "nf4"},
                "reward": {"init_from": "z"},
                "value": {"init_from": "policy", "adapter": {}, "base_quantization": "int8"},
            },
            {},
            "models.value.base_quantization: int8: policy has nf4 for the same weights; nearest: nf4",
        ),
        (
            {"policy": {"init_from": "x", "adapter": {}}},
            {"merge_adapter": False},
            "generate.merge_adapter: false: models.policy.base_quantization is null, so it would save nothing",
        ),
        (
            {"policy": {"init_from": "x", "adapter": {}, "base_quantization": "nf4"}},
            {"merge_adapter": False, "int8": ["weights"]},
            "generate.merge_adapter: false: generate.int8 has weights, which are merged ones; expected true, or",
        ),
    ],
)
def test_mistakes_in_a_config(models, generate, message, root, tmp_path):
    name = "ppo" if "reward" in models else "grpo"
    more = {"tokenizer": {"init_from": "y"}, "generate": {"max_new_tokens": 4} | generate}
    with pytest.raises(ConfigError) as caught:
        check(config(name, root, tmp_path / "run", models, **more), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_kind_that_there_is_not(root, tmp_path):
    with pytest.raises(ConfigError, match=r"models\.policy\.base_quantization: \"int4\": .*nearest: int8"):
        config(
            "grpo", root, tmp_path / "run", {"policy": {"init_from": "x", "adapter": {}, "base_quantization": "int4"}}
        )


def test_an_axis_without_blocks(folder, root, tmp_path):
    """A mlp of 37: it is said before anything is read, with the way out."""
    run = ready(config("grpo", root, tmp_path / "x", {"policy": {"init_from": str(folder / "lm")}}))
    shape = dataclasses.replace(run.configs["policy"], mlp_size=37)
    with jax.set_mesh(run.mesh):
        hf_weights.save(
            tiny.parameters(shape, "lm", 0), shape, "lm", tmp_path / "lm", tokenizer_folder=folder / "tokenizer"
        )
    with pytest.raises(ConfigError) as caught:
        ready(config("grpo", root, tmp_path / "run", quantized(tmp_path)))
    line = "nf4: no even block of 4 to 64 weights divides 37, the model's mlp; nearest: int8"
    assert str(caught.value) == f"models.policy.base_quantization: {line}"


def test_a_config_is_written_and_read(root, tmp_path):
    cfg = config(
        "grpo", root, tmp_path / "run", {"policy": {"init_from": "x", "adapter": {}, "base_quantization": "nf4"}}
    )
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert load(tmp_path / "config.yaml").models["policy"].base_quantization == "nf4"
