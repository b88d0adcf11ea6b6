"""Adapters in PEFT and here: ours is loaded by PeftModel, PEFT's by us, and logits and scores agree.

test_capabilities.py has one of each family."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_weights, peft
from jaxrlhf.models.lora import LoraConfig, assemble, targets_of
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.run import build as builds
from jaxrlhf.run.export import export, export_adapter
from jaxrlhf.sharding import make_mesh
from tests.parity.both import compute
from tests.run.test_adapters import config
from tests.support import runs, tiny
from tests.test_minimal import write_models

torch = pytest.importorskip("torch")
theirs: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.torch
TOKENS = np.random.default_rng(2).integers(0, 90, (2, 9))
WHOLE = np.ones_like(TOKENS, bool)
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "mlp_size": 24}
LLAMA = resolve(ModelConfig(family="llama", num_kv_heads=2, **SIZES))
QWEN2 = resolve(ModelConfig(family="qwen2", num_kv_heads=2, tie_embeddings=False, **SIZES))
QWEN3_5 = resolve(
    ModelConfig(family="qwen3_5_text", num_kv_heads=2, linear_key_heads=2, linear_value_heads=4, norm_eps=1e-2, **SIZES)
)
DEEP: dict[str, Any] = SIZES | {"num_layers": 4}
GPT2 = resolve(ModelConfig(family="gpt2", **SIZES))
ADAPTERS = {
    "llama": (LLAMA, LoraConfig(rank=3, alpha=7.5)),
    "llama, few": (LLAMA, LoraConfig(rank=2, alpha=8, targets=("query", "value", "down"))),
    "qwen2": (QWEN2, LoraConfig(rank=4, alpha=8, rslora=True)),
    "qwen3_5_text": (  # all but those that are one tensor in files
        QWEN3_5,
        LoraConfig(
            rank=2,
            alpha=8,
            targets=("query", "key", "value", "out", "gate", "up", "down")
            + ("delta_decay", "delta_beta", "delta_gate", "delta_out"),
        ),
    ),
    "gemma4_text": (  # maps of the same name in layers of other sizes; some have no keys and values
        resolve(
            ModelConfig(
                family="gemma4_text",
                layer_types=("local", "global", "local", "global"),
                sliding_window=4,
                num_kv_heads=2,
                global_head_dim=8,
                global_kv_heads=1,
                keys_are_values=True,
                shared_kv_layers=2,
                wide_shared_mlp=True,
                per_layer_size=4,
                norm_eps=1e-2,
                **DEEP,
            )
        ),
        LoraConfig(rank=2, alpha=8),
    ),
    "qwen2, dora": (QWEN2, LoraConfig(rank=4, alpha=8, dora=True)),  # with biases, which it does not scale
    "gpt2, dora": (GPT2, LoraConfig(rank=2, alpha=4, targets=("down", "up"), dora=True)),
    "gpt2, few": (GPT2, LoraConfig(rank=2, alpha=4, targets=("down",))),  # whose out has the same last name
}


ADAPTERS |= {
    f"{name}, dora": (ADAPTERS[name][0], dataclasses.replace(ADAPTERS[name][1], dora=True))
    for name in ("gemma4_text", "qwen3_5_text")
}


def base_of(cfg: ModelConfig, folder: Path):
    """Weights of the model's size written for transformers."""
    params = tiny.parameters(cfg, "lm", 0)
    hf_weights.save(params, cfg, "lm", folder / "base")
    return params


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_ours(name, tmp_path):
    from transformers import AutoModelForCausalLM

    cfg, lora = ADAPTERS[name]
    base, own = base_of(cfg, tmp_path), tiny.adapter(cfg, "lm", lora, 1)
    peft.save(own, cfg, "lm", lora, tmp_path / "ours", str(tmp_path / "base"), base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    alone = their_logits(model)
    adapted = their_logits(theirs.PeftModel.from_pretrained(model, str(tmp_path / "ours")))
    assert np.abs(adapted - alone).max() > 0.02
    ours = compute(assemble(base, own, lora.scale), cfg, "lm", TOKENS, WHOLE)
    np.testing.assert_allclose(ours, adapted, atol=1e-4)
    again = peft.load(cfg, "lm", dataclasses.replace(lora, init_from=str(tmp_path / "ours")), base)
    if lora.dora:  # m - ||W|| is rounded as m is
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), again, own)
    else:
        assert tiny.equal_trees(again, own)


def own_name(name: str) -> str:
    """That of a tensor in a file, by that of a parameter in PEFT."""
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def test_gradients_of_dora_are_pefts(tmp_path):
    """Of the mean square of the logits, by A, B and magnitudes of every map: to 1e-4 of the largest."""
    from transformers import AutoModelForCausalLM

    cfg, lora = ADAPTERS["qwen2, dora"]
    base, own = base_of(cfg, tmp_path), tiny.adapter(cfg, "lm", lora, 1)
    peft.save(own, cfg, "lm", lora, tmp_path / "ours", str(tmp_path / "base"), base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = theirs.PeftModel.from_pretrained(model, str(tmp_path / "ours"), is_trainable=True)
    (model(torch.tensor(TOKENS)).logits[..., : cfg.vocab_size] ** 2).mean().backward()
    expected = {own_name(name): x.grad for name, x in model.named_parameters() if x.requires_grad}

    def loss(own):
        hidden = forward(assemble(base, own, lora.scale), cfg, jnp.asarray(TOKENS), jnp.asarray(WHOLE, int), Runtime())
        logits = jnp.einsum("bsd,dv->bsv", hidden, base["head"]["kernel"])[..., : cfg.vocab_size]
        return (logits**2).mean()

    found = jax.jit(jax.grad(loss))(own)
    for stack, maps in found["layers"].items():
        for target, leaves in maps.items():
            for kind, leaf in leaves.items():
                for layer, name in zip(np.asarray(leaf), peft.names_of(cfg, stack, target, kind), strict=True):
                    grad = expected.pop(name).numpy().T
                    np.testing.assert_allclose(layer.reshape(grad.shape), grad, atol=1e-4 * np.abs(grad).max())
    assert not expected


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj", "gate_proj"]])
def test_ours_loads_pefts(targets, dora, tmp_path):
    from transformers import AutoModelForCausalLM

    base = base_of(QWEN2, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = theirs.LoraConfig(r=4, lora_alpha=10, target_modules=targets, task_type="CAUSAL_LM", use_dora=dora)
    model = theirs.get_peft_model(model, config)
    torch.manual_seed(0)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.3)
        if "magnitude" in weight_name:
            weight.data *= 1 + 0.3 * torch.rand_like(weight)
    model.save_pretrained(tmp_path / "theirs")
    names = ("query", "out", "gate") if isinstance(targets, list) else targets_of(QWEN2, LoraConfig())
    lora = LoraConfig(rank=4, alpha=10, targets=names, dora=dora, init_from=str(tmp_path / "theirs"))
    peft.check_folder(QWEN2, lora)
    ours = compute(assemble(base, peft.load(QWEN2, "lm", lora, base), lora.scale), QWEN2, "lm", TOKENS, WHOLE)
    np.testing.assert_allclose(ours, their_logits(model), atol=1e-4)
    assert np.abs(ours - compute(base, QWEN2, "lm", TOKENS, WHOLE)).max() > 0.02


def test_scores(tmp_path):
    """A reward model's head goes with its adapter; PEFT's scores lack its bias."""
    from transformers import AutoModelForSequenceClassification

    cfg, lora = LLAMA, ADAPTERS["llama"][1]
    base, own = base_of(cfg, tmp_path), tiny.adapter(cfg, "scalar", lora, 1)
    own["head"]["bias"] = jnp.array([0.25])
    (note,) = peft.save(own, cfg, "scalar", lora, tmp_path / "ours", str(tmp_path / "base"))
    assert "0.25" in note
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model.config.pad_token_id = 95
    scores = their_logits(theirs.PeftModel.from_pretrained(model, str(tmp_path / "ours")))
    ours = compute(assemble(base, own, lora.scale), cfg, "scalar", TOKENS, WHOLE)[:, -1:]
    np.testing.assert_allclose(ours - 0.25, scores, atol=1e-4)
    again = peft.load(cfg, "scalar", dataclasses.replace(lora, init_from=str(tmp_path / "ours")))
    assert tiny.equal_trees(again, own)


def test_the_initial_a_is_pefts(tmp_path):
    """The bound of PEFT's uniform noise, and the deviation of its normal noise."""
    import jax
    from transformers import AutoModelForCausalLM

    from jaxrlhf.models.linear import LORA_A
    from jaxrlhf.models.lora import init_adapter

    base_of(LLAMA, tmp_path)
    for init, name in ((True, "kaiming_uniform"), ("gaussian", "gaussian")):
        config = theirs.LoraConfig(r=8, target_modules=["down_proj"], init_lora_weights=init)
        model = theirs.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        found = [x.detach().numpy() for key, x in model.named_parameters() if "lora_A" in key]
        lora = LoraConfig(rank=8, targets=("down",), init=name)  # type: ignore[arg-type]
        ours = np.asarray(init_adapter(LLAMA, lora, jax.random.key(0))["layers"]["mlp"]["down"][LORA_A])
        assert np.concatenate(found).std() == pytest.approx(ours.std(), rel=0.1)
        if init is True:
            assert np.abs(found).max() == pytest.approx(np.abs(ours).max(), rel=0.05)


def test_config_is_json_that_peft_reads(tmp_path):
    cfg, lora = ADAPTERS["gpt2, few"]
    peft.save(tiny.adapter(cfg, "lm", lora, 1), cfg, "lm", lora, tmp_path, "a/b")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["mlp.c_proj"] and raw["fan_in_fan_out"] is True
    assert theirs.PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "a/b"


def test_what_a_run_exports(root, tmp_path, monkeypatch):
    """A user's way: a folder of Hugging Face's, GRPO of an adapter by a function of one's own, then the merged folder
    in transformers, and the adapter on the first folder in PEFT: the same model, and another than the first."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(builds, "make_mesh", lambda cfg, *_: make_mesh(cfg, jax.devices()[:1]))
    first = write_models(tmp_path, runs.text(root))["lm"]
    models = {"policy": {"init_from": str(first), "adapter": {"rank": 2, "alpha": 4}}}
    run = str(tmp_path / "run")
    assert trainer.run(config("grpo", root, tmp_path / "run", models)) == "done"
    export(run, "policy", tmp_path / "merged")
    export_adapter(run, "policy", tmp_path / "adapter")
    alone, merged = (AutoModelForCausalLM.from_pretrained(place) for place in (first, tmp_path / "merged"))
    before = their_logits(alone)
    adapted = their_logits(theirs.PeftModel.from_pretrained(alone, str(tmp_path / "adapter")))
    np.testing.assert_allclose(their_logits(merged), adapted, atol=1e-5)
    assert np.abs(adapted - before).max() > 1e-3
