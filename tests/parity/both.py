"""A model computed here and in transformers. Programs of a case are compiled once, and shared by all checks."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.generate.loop import sample
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.heads import lm_logits, scalar
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.types import Prompts
from tests.parity.cases import NEW_TOKENS, POSITIONS, TOKENS, VALID, config_of, law, law_of_parameter
from tests.support.tiny import FAST

FLOAT32 = Runtime()

# ---- here -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 4), compiler_options=FAST)
def states(trunk, cfg, tokens, valid, runtime):
    return forward(trunk, cfg, tokens, valid.astype(jnp.int32), runtime)


def compute(params, cfg, head, tokens=TOKENS, valid=VALID, runtime=FLOAT32) -> np.ndarray:
    """Logits [B, S, V] or per-token scores [B, S]. The program is of the trunk, which all heads share."""
    trunk = {name: part for name, part in params.items() if name != "head"}
    hidden = states(trunk, cfg, jnp.array(tokens), jnp.array(valid), runtime)
    return np.asarray(
        scalar(params, hidden) if head == "scalar" else lm_logits(params, cfg, hidden)[..., : cfg.vocab_size]
    )


generate = jax.jit(sample, static_argnums=(1, 5, 6), compiler_options=FAST)


def our_greedy(params, cfg, prompt_tokens=TOKENS, prompt_valid=VALID, runtime=FLOAT32):
    """The Sequences of prompts and NEW_TOKENS most likely tokens each."""
    sampler = Sampler(Sampling(temperature=0.0), NEW_TOKENS, eos_ids=(), pad_id=0)
    prompts = Prompts(jnp.array(prompt_tokens), jnp.array(prompt_valid), jnp.arange(len(prompt_tokens)))
    return generate(params, cfg, prompts, jnp.int32(0), jnp.int32(0), sampler, runtime)


def read(folder, dtype=jnp.float32):
    """(parameters, config, head) of a folder."""
    cfg, head = hf_config.read_config(folder)
    return hf_weights.load(folder, cfg, head, dtype), cfg, head


def write_by_law(folder: Path, raw: dict) -> None:
    """A folder with this config.json and the law's weights, written without torch."""
    from safetensors.numpy import save_file

    from jaxrlhf.models.files.hf_layout import find_sources

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    sources = find_sources(*hf_config.read_config(folder)).values()
    save_file(
        {name: law(name, source.shape(), raw["model_type"]) for source in sources for name in source.names()},
        folder / "model.safetensors",
    )


# ---- there ----------------------------------------------------------------------------------------------------------


def their_model(case: str, head: str = "lm"):
    """A transformers model with the law's weights."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.set_num_threads(1)  # more only wait for each other on models as small as these

    raw = config_of(case, head)
    cls = getattr(transformers, raw["architectures"][0])
    model = cls(cls.config_class.from_dict(raw)).eval()
    with torch.no_grad():
        fixed = [(name, value) for name, value in model.named_buffers() if name.endswith("layer_scalar")]
        for name, value in [*model.named_parameters(), *fixed]:  # a tied head is not listed
            value.copy_(torch.tensor(law_of_parameter(raw["model_type"], name, tuple(value.shape))))
    return model


def their_output(model) -> np.ndarray:
    """Logits [B, S, V]; or scores [B] at the last token, where all rows end."""
    torch = pytest.importorskip("torch")
    inputs = {"input_ids": TOKENS, "attention_mask": VALID.astype(int), "position_ids": POSITIONS}
    inputs = {name: torch.tensor(x) for name, x in inputs.items()}
    with torch.no_grad():
        if hasattr(model, "score"):
            return model.score(model.base_model(**inputs).last_hidden_state)[:, -1, 0].numpy()
        return model(**inputs).logits.float().numpy()


def their_greedy(model) -> np.ndarray:
    """i32[B, NEW_TOKENS]"""
    torch = pytest.importorskip("torch")
    made = model.generate(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(VALID.astype(int)),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return made[:, TOKENS.shape[1] :].numpy()


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] == other[name]).all(), name


def reload(model, folder):
    return type(model).from_pretrained(folder).eval()
