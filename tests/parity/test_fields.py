"""config.json with one field changed: what is computed here is what transformers computes, or it is refused in a line.

Every field that a class of transformers knows is changed, and every field that some family reads, in several ways. The
weights are transformers' own for the changed config, so fields may change shapes."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.parity.both import compute, read, their_output
from tests.parity.cases import CASES, VALID, config_of, law_of_parameter

FAMILIES_OF = [case for case in CASES if ":" not in case]
# besides the fields of the class: what other families, older versions or remote code know
OTHERS: dict[str, list[Any]] = {
    "is_causal": [False, True],
    "use_bidirectional_attention": [True, False, "all", "vision"],
    "partial_rotary_factor": [0.5, 0.75, 1.0, 2.0, 0.0, None, "half"],
    "rotary_pct": [0.5, 1.0, 2.0],
    "rotary_emb_base": [100, 100.0],
    "rotary_dim": [4],
    "rope_theta": [100, 100.0, 0.5, None, -1.0],
    "rope_interleaved": [True],
    "rope_local_base_freq": [100.0],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        {"rope_type": "default"},
        {"factor": 2.0},
        {"rope_type": "mrope", "mrope_section": [1, 1, 2]},
        {"rope_type": "linear", "factor": 0.5},
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 2.0},
        {"rope_theta": 100.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
        {
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ],
    "sliding_window": [2, 3, None, 0, 100],
    "sliding_window_pattern": [1, 2],
    "_sliding_window_pattern": [1, 2],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 5],
    "layer_types": [
        ["sliding_attention", "full_attention"],
        ["full_attention", "sliding_attention"],
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention"],
        ["linear_attention"] * 2,
        ["chunked_attention"] * 2,
    ],
    "attention_chunk_size": [2],
    "no_rope_layers": [[0, 1], [0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 2]],
    "head_dim": [4, 6, 12, None],
    "v_head_dim": [4],
    "qk_norm": [True],
    "use_qk_norm": [True, False],
    "attention_bias": [True, False],
    "qkv_bias": [True],
    "use_bias": [True, False],
    "mlp_bias": [True, False],
    "lm_head_bias": [True],
    "clip_qkv": [1.0],
    "attention_multiplier": [0.5],
    "embedding_multiplier": [2.0],
    "residual_multiplier": [0.5],
    "logits_scaling": [2.0],
    "logit_scale": [0.5],
    "query_pre_attn_scalar": [1, 64, 0.5],
    "attn_logit_softcapping": [1.0, None],
    "final_logit_softcapping": [1.0, None],
    "parallel_attn": [True],
    "use_parallel_residual": [True, False],
    "add_cross_attention": [True],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "reorder_and_upcast_attn": [True],
    "hidden_act": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish", "gelu_fast", "quick_gelu"],
    "hidden_activation": ["gelu", "gelu_new", "silu", "gelu_pytorch_tanh", None],
    "activation_function": ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu"],
    "tie_word_embeddings": [True, False],
    "pretraining_tp": [2],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
    "is_decoder": [True, False],
    "is_encoder_decoder": [True],
    "attn_implementation": ["eager"],
    "_attn_implementation": ["eager"],
    "num_experts": [2],
    "num_key_value_heads": [1, 2, 4, 3, None],
    "n_inner": [40, None],
    "torch_dtype": ["bfloat16", "float32"],
    "dtype": ["bfloat16", "float32"],
}
KEPT = {"architectures", "model_type", "transformers_version"}  # what says which class it is; tested elsewhere
KEPT |= {"return_dict", "use_return_dict", "output_hidden_states", "output_attentions"}  # what calls return


def other_values(value: Any) -> list[Any]:
    """Values of the same type, and null."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, 2 * value, 1, None]
    if isinstance(value, float):
        return [2 * value, value / 2, 0.0, 1.0, None]
    return [None, True, 2, 0.5] if value is None else [None]


def changes(case: str) -> Iterator[tuple[str, Any]]:
    """(field, value): every change of one field, and every field taken out (...)."""
    transformers = pytest.importorskip("transformers")
    raw = config_of(case, "lm")
    known = getattr(transformers, raw["architectures"][0]).config_class.from_dict(raw).to_dict()
    for name, value in {**known, **raw}.items():
        if name not in KEPT:
            yield from ((name, other) for other in [*other_values(value), *OTHERS.get(name, [])])
    for name, values in OTHERS.items():
        if name not in known:
            yield from ((name, other) for other in values)
    for name in raw.keys() - KEPT:
        yield name, ...


def theirs(raw: dict, folder) -> np.ndarray | str:
    """Logits of transformers with the law's weights, which are left in the folder; or why there are none."""
    import torch  # type: ignore[import-not-found]
    import transformers

    cls = getattr(transformers, raw["architectures"][0])
    try:
        config = cls.config_class.from_dict(json.loads(json.dumps(raw)))
        config._experts_implementation = "eager"  # the other one computes no odd widths on CPUs
        model = cls(config).float().eval()
        if sum(value.numel() for value in model.parameters()) > 1e6:
            return "too large"
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(torch.tensor(law_of_parameter(raw["model_type"], name, tuple(value.shape))))
        model.save_pretrained(folder)
        found = their_output(model)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return found if np.isfinite(found[VALID]).all() else "not finite"


def outcome(case: str, name: str, value: Any, folder) -> str | None:
    """What is wrong with one change; None where nothing is."""
    raw = config_of(case, "lm") | {name: value}
    if value is ...:
        del raw[name]
    expected = theirs(raw, folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if not (folder / "model.safetensors").exists():
        return None  # no class of transformers computes it: there is nothing to compare with
    try:
        found = compute(*read(folder))[VALID]
    except ValueError as error:
        return f"more than a line: {error}" if "\n" in str(error) else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(expected, str):
        if expected.startswith("IndexError: index out of range in self"):
            return None  # the rows hold tokens beyond a smaller vocabulary
        return f"computed here; transformers: {expected}"
    different = np.abs(found - expected[VALID]).max() if found.shape == expected[VALID].shape else np.inf
    return None if different < 1e-3 else f"logits differ by {different:.3g}"


@pytest.mark.nightly
@pytest.mark.torch
@pytest.mark.parametrize("case", FAMILIES_OF)
def test_one_field_changed(case, tmp_path):
    pytest.importorskip("torch").set_num_threads(1)
    found, count = [], 0
    for count, (name, value) in enumerate(changes(case), 1):
        wrong = outcome(case, name, value, tmp_path / str(count))
        if wrong:
            found.append(f"{name}: {value!r}: {wrong}")
    assert count > 100
    assert not found, "\n".join(["", *found])
