"""The sampler against the whole-row forward pass, NumPy oracles of the distribution, and the law of its noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrlhf import sharding
from jaxrlhf.generate import Sampler, sample, stop_automaton
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.transformer import Leaf, ModelConfig, Runtime, forward, parameter_table, resolve, weight_spec
from jaxrlhf.ops.sampling import Sampling, choose, shape_logits, support, uniform_noise
from jaxrlhf.sharding import MeshConfig
from jaxrlhf.types import Prompts

LLAMA = resolve(
    ModelConfig(vocab_size=101, hidden_size=32, num_kv_heads=2, head_dim=16, mlp_size=48, max_positions=64)
)
GPT2 = resolve(ModelConfig(family="gpt2", vocab_size=101, hidden_size=32, mlp_size=48, max_positions=64))
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
PROMPT, NEW = 6, 16  # columns
LENGTHS = np.array([6, 3, 5, 1, 6, 2, 4, 6])  # of eight prompts
EOS = (3, 17, 40, 41, 77)  # many, so that most rows end within NEW tokens
PAD = 0

PIECES = [bytes([97 + i % 5]) + b"-" * (i % 3) for i in range(101)]  # texts of the tokens
STOP_TEXTS = ("aa", "b--c")  # the first over two tokens, the second in two ways to cut it


def stops(texts):
    return tuple(Automaton.make(text) for text in texts)


class Automaton(np.ndarray):
    """A stop table that jit can hash."""

    @classmethod
    def make(cls, text):
        return stop_automaton(text, PIECES, 128).view(cls)

    def __hash__(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(self.tobytes())

    def __eq__(self, other):
        return np.array_equal(self, other)


SHAPED = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_new_tokens=3, eos_ids=EOS)
SAMPLERS = {
    "plain": Sampler(Sampling(eos_ids=EOS), NEW, EOS, PAD),
    "shaped": Sampler(SHAPED, NEW, EOS, PAD, samples_per_prompt=2),
}


@functools.cache
def weights(name):
    """Random, with logits of size 1, norms and biases that do something; positions matter."""
    rng = np.random.default_rng(3)

    def one(path, leaf):
        deviation = {"embedding": 0.4, "kernel": leaf.init}.get(path[-1].key, 0.1)
        return ((leaf.init == "ones") + deviation * rng.normal(size=leaf.shape)).astype(np.float32)

    table = parameter_table(CONFIGS[name], "lm")
    return jax.tree_util.tree_map_with_path(one, table, is_leaf=lambda x: isinstance(x, Leaf))
