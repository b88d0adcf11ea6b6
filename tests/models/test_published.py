"""The table of published shapes: the parameters that come of them are as many as their makers say."""

import math

import pytest

from jaxrlhf.models.config import resolve
from jaxrlhf.models.files.published import SHAPES, published, published_file
from jaxrlhf.models.parameters import Leaf, padded_vocab, parameter_table

# parameters of the files on the hub (safetensors metadata), embeddings counted once where they are tied
COUNTS = {
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "google/gemma-2-2b-it": 2_614_341_888,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "openai/gpt-oss-20b": 20_914_757_184,  # in bfloat16
}


# of models of text and images the files count a vision tower too: the text part by hand, of a layer's maps and norms
MLP, NORMS = 3 * 1024 * 3584, 2 * 1024
DELTA = 1024 * (3 * 2048 + 2 * 2048 + 2 * 16) + 4 * 3 * 2048 + 2 * 16 + 128
GATED = 1024 * (2 * 2048 + 2 * 512 + 2048) + 2 * 256
COUNTS["Qwen/Qwen3.5-0.8B"] = 248320 * 1024 + 24 * (MLP + NORMS) + 18 * DELTA + 6 * GATED + 1024


# the same of Gemma 4: per layer local attention (256 features a head) or global (512), mlps, norms and a number; of the
# last 20 of E2B no keys and values, and mlps of double width. The makers say 2.3B without layers' embeddings, and 30.7B
LOCAL, GLOBAL = 2 * 1536 * 8 * 256 + 256, 2 * 1536 * 8 * 512 + 512
KEYS = 12 * (2 * 1536 * 256 + 256) + 3 * (2 * 1536 * 512 + 512)
OWN = 262144 * 256 + 3 * 1536 * 256 + 1536
COUNTS["google/gemma-4-E2B"] = 262144 * 1536 + 28 * LOCAL + 7 * GLOBAL + KEYS + 35 * (OWN + 4 * 1536 + 1) + 256 + 1536
COUNTS["google/gemma-4-E2B"] += (15 + 2 * 20) * 3 * 1536 * 6144
LOCAL, GLOBAL = 5376 * 256 * (2 * 32 + 2 * 16) + 2 * 256, 5376 * 512 * (2 * 32 + 4) + 2 * 512
COUNTS["google/gemma-4-31B-it"] = (
    262144 * 5376 + 50 * LOCAL + 10 * GLOBAL + 60 * (3 * 5376 * 21504 + 4 * 5376 + 1) + 5376
)


def count(name: str) -> int:
    """Parameters of the model, without the rows that pad its vocabulary."""
    cfg = published(name)
    assert cfg is not None and padded_vocab(cfg) == cfg.vocab_size, "none of these is padded"
    leaves: list[Leaf] = []

    def walk(part):
        if isinstance(part, Leaf):
            leaves.append(part)
        else:
            for inside in part.values():
                walk(inside)

    walk(parameter_table(cfg, "lm"))
    return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_as_many_parameters_as_published(name):
    assert count(name) == COUNTS[name]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_resolves(name):
    assert published(name) == resolve(SHAPES[name])


def test_other_names_are_not_known():
    assert published("somebody/unknown") is None


@pytest.mark.parametrize(
    "file, model",
    [
        ("runs/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("qwen2.5-0.5b.q8_0.gguf", "Qwen/Qwen2.5-0.5B"),
        ("SmolLM2-135M-Instruct-mine.Q4_1.gguf", None),
        ("model.gguf", None),
    ],
)
def test_a_gguf_file_is_known_by_its_name(file, model):
    assert published_file(file) == model
