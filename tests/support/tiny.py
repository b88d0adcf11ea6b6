"""A tiny model and a tiny run of an algorithm, put together by hand: what tests of the step and algorithms share."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxrlhf.algorithms import find
from jaxrlhf.config.roles import head_of
from jaxrlhf.generate import loop
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.int8 import Int8
from jaxrlhf.models.lora import Based, LoraConfig, own_table, params_of
from jaxrlhf.models.matrices import layer_matrices
from jaxrlhf.models.nets import Trunk, make_nets
from jaxrlhf.models.parameters import parameter_table, weight_spec
from jaxrlhf.models.quantized import Quantization, packed_tree
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.newton_schulz import Matrices
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.optim import OptimizerConfig, make_optimizer
from jaxrlhf.run import state as states
from jaxrlhf.sharding import explicit, partition
from jaxrlhf.step import Recipe
from jaxrlhf.types import (
    Batch,
    Comparisons,
    Grader,
    Head,
    HeadSpec,
    Params,
    Preferences,
    Prompts,
    Role,
    Sequences,
    TrainState,
    Trajectories,
    Unpaired,
)

MODEL = resolve(ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32))
ADAM = OptimizerConfig(learning_rate=1e-3)
EOS_IDS = (1, 2)
FAST = {"xla_backend_optimization_level": 0}  # programs of tests run for milliseconds: what counts is to compile them


def program(function, donate=()):
    """``jax.jit`` for tests."""
    return jax.jit(function, donate_argnums=donate, compiler_options=FAST)


def put(tree):
    """NumPy arrays on the current mesh (if any), their rows split as those of a batch."""

    def one(x):
        if not explicit():
            return jnp.asarray(x)
        return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), partition(("batch", *(None,) * (x.ndim - 1)))))

    return jax.tree.map(one, tree)


def parameters(cfg: ModelConfig, head, seed: int) -> Params:
    """What ``parameters.init`` makes, drawn by NumPy: the jitted init takes seconds to compile, on every mesh."""
    return drawn(parameter_table(cfg, head), seed)


def adapter(cfg: ModelConfig, head: Head, lora: LoraConfig | None, seed: int) -> Params:
    """What a role has of its own beside a base: A and B, of which none is 0, and its head."""
    one = lambda leaf: leaf._replace(init=0.1) if leaf.init == "zeros" else leaf
    return drawn(jax.tree.map(one, own_table(cfg, head, lora), is_leaf=lambda x: hasattr(x, "init")), seed)


def drawn(table: dict, seed: int) -> Params:
    """The Leafs of a table as arrays on the current mesh."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        if isinstance(leaf.init, str):
            x = np.full(leaf.shape, float(leaf.init == "ones"), np.float32)
        else:
            x = (rng.normal(size=leaf.shape) * leaf.init).astype(np.float32)
        where = weight_spec(leaf)
        return jnp.array(x) if where is None else jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), where))

    return jax.tree.map(one, table, is_leaf=lambda x: hasattr(x, "init"))


# ---- batches --------------------------------------------------------------------------------------------------------


def wide(x: Int8) -> np.ndarray:
    """The numbers that 8 bits stand for."""
    return np.asarray(x.values, np.float32) * np.asarray(x.scale)


def prompts(rows: int = 16, columns: int = 4, seed: int = 0, vocab: int = 64) -> Prompts:
    """Left-padded prompts of 1 to ``columns`` tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocab, (rows, columns)).astype(np.int32)
    valid = np.arange(columns) >= rng.integers(0, columns, (rows, 1))
    return Prompts(*put((np.where(valid, tokens, 0), valid, np.arange(rows, dtype=np.int32))))


def sequences(rows: int = 16, prompt: int = 4, room: int = 6, seed: int = 0, vocab: int = 64) -> Sequences:
    """Prompts of 1 to ``prompt`` tokens with responses of 0 to ``room`` tokens: row 0 has none, row 1 has all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, vocab, (rows, prompt + room)).astype(np.int32)
    lengths = rng.integers(0, room + 1, rows)
    lengths[:2] = 0, room
    columns = np.arange(prompt + room)
    mask = (columns >= prompt) & (columns < prompt + lengths[:, None])
    valid = mask | ((columns < prompt) & (columns >= rng.integers(0, prompt, (rows, 1))))
    tokens, valid, mask, ended = put((np.where(valid, tokens, 0), valid, mask, lengths < room))
    return Sequences(tokens, valid, mask, ended=ended, response_start=prompt)


def preferences(rows: int = 16, prompt: int = 4, room: int = 6, seed: int = 10, vocab: int = 64) -> Preferences:
    """Pairs of ``sequences``, the last row padding."""
    pair = [sequences(rows, prompt, room, seed + side, vocab) for side in range(2)]
    real = np.arange(rows) < rows - 1
    blank = lambda x: put(np.where(real.reshape(-1, *(1,) * (x.ndim - 1)), np.asarray(x), 0).astype(x.dtype))
    margin = np.random.default_rng(seed).normal(size=rows).astype(np.float32)
    return Preferences(*jax.tree.map(blank, pair), margin=put(margin))


def comparisons(rows: int = 16) -> Comparisons:
    """``preferences`` of which every third is a tie."""
    return Comparisons(preferences(rows).replace(margin=None), put(np.arange(rows) % 3 == 0))


def unpaired(rows: int = 16, prompt: int = 4, room: int = 6, seed: int = 20, vocab: int = 64) -> Unpaired:
    """``sequences`` of which every other is good, with other responses behind the same prompts; the last is padding."""
    own, others = (sequences(rows, prompt, room, seed + side, vocab) for side in range(2))
    real = np.arange(rows) < rows - 1
    blank = lambda x: put(np.where(real.reshape(-1, *(1,) * (x.ndim - 1)), np.asarray(x), 0).astype(x.dtype))
    return Unpaired(jax.tree.map(blank, own), put(np.arange(rows) % 2 == 0), jax.tree.map(blank, others))


def trajectories(rows: int = 16, prompt: int = 4, room: int = 6, seed: int = 30, vocab: int = 64) -> Trajectories:
    """``sequences`` whose tokens earned normal rewards; every third is cut, with a token behind it, and the last is
    padding."""
    rng, real = np.random.default_rng(seed), np.arange(rows) < rows - 1
    own, columns = sequences(rows, prompt, room - 1, seed, vocab), np.arange(prompt + room)
    wide = lambda x: np.where(real[:, None], np.pad(np.asarray(x), ((0, 0), (0, 1))), 0).astype(x.dtype)
    tokens, valid, mask = (wide(x) for x in (own.tokens, own.valid, own.response_mask))
    truncated = real & (np.arange(rows) % 3 == 1)
    behind = truncated[:, None] & (columns == prompt + mask.sum(1)[:, None])
    tokens, valid, mask = put((np.where(behind, EOS_IDS[0], tokens).astype(np.int32), valid | behind, mask))
    rewards = (rng.normal(size=mask.shape) * np.asarray(mask)).astype(np.float32)
    return Trajectories(Sequences(tokens, valid, mask, response_start=prompt), *put((rewards, truncated)))


def every_field() -> Batch:
    """Rows of every kind of data."""
    return Batch(prompts(), sequences(), preferences(), unpaired(), trajectories(), comparisons())


# ---- a run ----------------------------------------------------------------------------------------------------------


class Tiny(NamedTuple):
    """A recipe, the state that it starts from, and one batch."""

    recipe: Recipe
    state: TrainState
    batch: Batch


def build(
    name: str,
    cfg: Any,
    *,
    model: ModelConfig = MODEL,
    batch: Batch | None = None,
    optimizer: OptimizerConfig = ADAM,
    num_micro: int = 1,
    room: int = 6,
    samples_per_prompt: int = 1,
    eos_ids: tuple[int, ...] = EOS_IDS,
    share_prompts: bool = True,
    temperature: float = 1.0,
    pack_widths: int = 1,
    trunk_gradient: float | None = None,
    members: int = 0,
    iterations: int = 1000,
    lora: LoraConfig | None = None,
    teacher: ModelConfig | None = None,
    quantization: Quantization | None = None,
    merge_adapter: bool = True,
    remat: Literal["none", "full", "dots"] = "none",
) -> Tiny:
    """The algorithm called ``name`` (of the table, or module:NAME) on models of this shape, on the current mesh.
    Policy and reference start equal. With ``trunk_gradient`` the value model is a head on the policy; with ``members``
    the reward model is an ensemble. With ``lora`` the roles that learn are adapters on the policy's base, which is the
    reference, with ``quantization`` in so many bits. ``teacher``: its shape, where it is not the model's."""
    algorithm = find(name)
    several = tuple(f"reward_{number}" for number in range(members))
    expand = lambda heads: {
        one: head for role, head in heads.items() for one in (several if several and role == "reward" else (role,))
    }
    trained, slow = map(expand, algorithm.roles(cfg))
    trunks = {} if trunk_gradient is None else {"value": Trunk("policy", trunk_gradient)}
    for role, spec in {**trained, **slow}.items():
        if isinstance(spec, HeadSpec) and spec.trunk is not None:
            trunks[role] = Trunk(spec.trunk, spec.gradient)
    seeds = {"policy": 0, "reference": 0, "value": 1, "reward": 2, "q1": 3, "q2": 4, "target_q1": 3, "target_q2": 4}
    seeds |= {role: 5 + number for number, role in enumerate(several)}
    seeds |= {"q": 3, "target_q": 3, "cost": 5, "cost_value": 6, "teacher": 9}
    shapes = dict.fromkeys(seeds, model) | {"teacher": teacher or model}
    head_in = lambda heads, role: head_of(heads[role], role in trunks)
    make = lambda heads: {role: parameters(shapes[role], head_in(heads, role), seeds[role]) for role in heads}
    sampling, bases = Sampling(temperature, eos_ids=eos_ids), {}
    params, still = make(trained), make(slow)
    if lora is not None:
        based = functools.partial(Based, "base", quantization=quantization)
        bases = {role: based(lora) for role in trained if head_in(trained, role) in ("lm", "scalar")}
        params |= {role: adapter(model, head_in(trained, role), lora, seeds[role]) for role in bases}
        bases |= {"reference": based(None)} if "reference" in slow else {}
        base = packed_tree(parameters(model, "lm", 0), parameter_table(model, "lm"), quantization)
        still |= {"base": base} | ({"reference": {}} if "reference" in slow else {})
    runtime = Runtime(merge_adapter=merge_adapter, remat=remat)

    def matrices(role: str) -> Matrices:
        head = head_in(trained, role)
        return layer_matrices(parameter_table(shapes[role], head) if lora is None else own_table(model, head, lora))

    optimizers = {role: make_optimizer(optimizer, iterations, matrices(role)) for role in trained}
    nets = make_nets(
        shapes,
        runtime,
        sampling,
        sampler_of(model, sampling, room, samples_per_prompt, share=share_prompts, bases=bases, runtime=runtime),
        trunks,
        {"reward": Grader(several)} if several else {},
        bases,
    )
    spikes = {} if optimizer.spike_sigmas is None else dict.fromkeys(trained, optimizer.spike_sigmas)
    more = {"spike_sigmas": spikes, "together": samples_per_prompt}
    recipe = Recipe(algorithm, cfg, nets, optimizers, {}, num_micro, pack_widths, **more)
    state = states.new_state(0, params, still, optimizers, algorithm.controls(cfg))
    return Tiny(recipe, state, Batch(prompts=prompts(), preferences=preferences()) if batch is None else batch)


def sampler_of(
    model: ModelConfig,
    sampling: Sampling,
    room: int,
    samples_per_prompt: int = 1,
    pad_id: int = 0,
    share: bool = True,
    bases: Mapping[Role, Based] = MappingProxyType({}),
    runtime: Runtime | None = None,
):
    """Nets.sample for a model of this shape."""
    sampler = Sampler(sampling, room, sampling.eos_ids, pad_id, (), samples_per_prompt, share)

    def sample(role, trees, prompts, seed, step):
        return loop.sample(params_of(role, trees, bases), model, prompts, seed, step, sampler, runtime or Runtime())

    return sample


def equal_trees(first, second) -> bool:
    """Whether two pytrees hold the same bits."""
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), first, second)
    return all(jax.tree.leaves(same))
