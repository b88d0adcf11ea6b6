"""The same run on 1 device and on 8: equal noise, equal tokens, equal losses; and every array where the table says."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import step as steps
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.ops.sampling import uniform_noise
from jaxrlhf.run.programs import compile_program
from jaxrlhf.run.transfer import put
from jaxrlhf.sharding import SPLIT_ROWS, MeshConfig, current, explicit, for_programs, make_mesh
from jaxrlhf.types import Batch, TrainState
from tests.support import tiny

ALONE = (1, 1, 1)
MESHES = [
    (8, 1, 1),
    (2, 2, 2),
    (1, 4, 2),
    (1, 2, 2, 2),
    (1, 8, 1, 1, 4),
]  # data, fsdp, tensor, slices, decode, expert, context
Shape = tuple[int, ...] | int  # of a mesh, or the devices of a pmap
ITERATIONS = 5

# kv heads are grouped, and tensor = 2 divides them
PLAIN = "ppo", tiny.MODEL, PPOConfig(num_epochs=2, num_minibatches=2), 1, 1
# tensor = 2 does not divide the one kv head, the vocabulary is padded, and everything that can be on is on
ODD_MODEL = dataclasses.replace(tiny.MODEL, num_kv_heads=1, vocab_size=50)
ODD_PPO = PPOConfig(
    num_epochs=2,
    num_minibatches=2,
    old_logprobs="recompute",
    sampler_ratio_cap=2.0,
    reward_update=True,
    kl_controller="adaptive",
    whiten_rewards=True,
    missing_eos_penalty=0.5,
    entropy_coef=0.01,
    stop_kl=10.0,
)
ODD_OPTIMIZER = {"optimizer": dataclasses.replace(tiny.ADAM, spike_sigmas=6.0)}
ODD = "ppo", ODD_MODEL, ODD_PPO, 2, 2, ODD_OPTIMIZER  # micro-batches a minibatch, samples a prompt
# groups, which the shards of a batch must not cut
GROUPS = "grpo", tiny.MODEL, GRPOConfig(num_minibatches=2, aggregation="seq-mean-token-mean"), 2, 4
# the same where micro-batches cut them apart
CUT = *GROUPS, {"share_prompts": False}
# the same of PPO, with epochs
TWICE = "ppo", tiny.MODEL, PPOConfig(num_epochs=2, num_minibatches=4), 1, 4
TWICE_CUT = "ppo", tiny.MODEL, PPOConfig(num_epochs=2, num_minibatches=4), 4, 4, {"share_prompts": False}
# the same where responses end early, and are packed
PACKED = *GROUPS, {"pack_widths": 3, "eos_ids": tuple(range(1, 16))}
# the value model is a head on the policy
TRUNK = "ppo", tiny.MODEL, PPOConfig(num_minibatches=2, old_logprobs="recompute"), 2, 2, {"trunk_gradient": 0.5}
# SmolLM2's heads, which tensor = 2 does not divide: they stay whole on every device, the rest is split
NINE_MODEL = resolve(dataclasses.replace(tiny.MODEL, hidden_size=18, num_heads=9, num_kv_heads=3, head_dim=4))
NINE = "ppo", NINE_MODEL, PPOConfig(num_epochs=1), 1, 1
# GPT-2's vocabulary, which nothing divides; cold, since rounding picks the neighbour of a token that is as unlikely
COLD = {"temperature": 0.1}
WIDE = "ppo", dataclasses.replace(tiny.MODEL, vocab_size=50257), PPOConfig(num_epochs=1), 1, 1, COLD
# the policy is an adapter on a base, which is the reference; a value model with it, packed, and with a head on it
LORA = {"lora": LoraConfig(rank=2, alpha=8.0)}
ADAPTERS = *GROUPS, LORA
ADAPTERS_VALUE = "ppo", tiny.MODEL, PPOConfig(num_minibatches=2), 2, 2, LORA
ADAPTERS_PACKED = *GROUPS, PACKED[-1] | LORA
ADAPTERS_TRUNK = *TRUNK[:-1], TRUNK[-1] | LORA
# experts, of which expert = 2 has two each; of the same rows as without it
MOE_MODEL = resolve(ModelConfig("qwen3_moe", 64, 16, 2, mlp_size=8, num_experts=4, experts_per_token=2))
EXPERTS = "grpo", MOE_MODEL, GRPOConfig(num_minibatches=2, kl_coef=0.0), 2, 4
# and with sinks and biases
OSS = ModelConfig("gpt_oss", 64, 16, 2, mlp_size=8, num_experts=4, sliding_window=4)
SINKS = "grpo", resolve(OSS), GRPOConfig(num_minibatches=2), 2, 4
# and with one that all tokens share, behind a gated delta net and attention
SHARED = ModelConfig("qwen3_5_moe_text", 64, 16, 2, mlp_size=8, num_experts=4, shared_expert_size=12)
SHARING = "grpo", resolve(SHARED), GRPOConfig(num_minibatches=2), 2, 4
# and beside the mlps of layers whose heads differ
MIXED = ModelConfig(
    "gemma4_text",
    64,
    16,
    2,
    mlp_size=8,
    num_experts=4,
    expert_size=12,
    global_head_dim=8,
    layer_types=("local", "global"),
    sliding_window=4,
)
BESIDE = "grpo", resolve(MIXED), GRPOConfig(num_minibatches=2), 2, 4
# the same base in 4 bits, which decoding merges, or reads beside the adapter; 16 features are one block, which fsdp
# cuts
QUANTIZED = *ADAPTERS_VALUE[:-1], LORA | {"quantization": "nf4"}
QUANTIZED_BESIDE = *GROUPS, LORA | {"quantization": "nf4", "merge_adapter": False}
# adapters with magnitudes; on 8 bits, which decoding reads beside them
DORA = {"lora": LoraConfig(rank=2, alpha=8.0, dora=True)}
DORA_VALUE = *ADAPTERS_VALUE[:-1], DORA
DORA_BESIDE = *GROUPS, DORA | {"quantization": "int8", "merge_adapter": False}
MUON = *EXPERTS, {"optimizer": dataclasses.replace(tiny.ADAM, name="muon")}
CASES: dict[str, tuple] = {
    "muon": MUON,
    "experts": EXPERTS,
    "sinks": SINKS,
    "shared expert": SHARING,
    "experts beside": BESIDE,
    "adapters": ADAPTERS,
    "adapters value": ADAPTERS_VALUE,
    "dora value": DORA_VALUE,
    "dora beside": DORA_BESIDE,
    "quantized": QUANTIZED,
    "quantized beside": QUANTIZED_BESIDE,
    "adapters packed": ADAPTERS_PACKED,
    "adapters trunk": ADAPTERS_TRUNK,
    "plain": PLAIN,
    "odd": ODD,
    "groups": GROUPS,
    "cut": CUT,
    "twice": TWICE,
    "twice cut": TWICE_CUT,
    "packed": PACKED,
    "trunk": TRUNK,
    "nine": NINE,
    "wide": WIDE,
}


def mesh_of(shape: Shape):
    if isinstance(shape, int):
        return make_mesh(MeshConfig(style="pmap"), jax.devices()[:shape])
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape[:4]) * np.prod(shape[5:]))])


def program_of(recipe: steps.Recipe, mesh, state: TrainState, batch: Batch):
    """The iteration under jit, or under pmap."""
    iteration = steps.make_iteration(recipe)
    if explicit():
        return tiny.program(iteration, donate=0)
    return compile_program(iteration, mesh, state, batch, rows=(False, False, True), donate=True).run


class Ran(NamedTuple):
    """A run of ITERATIONS iterations."""

    tokens: list[np.ndarray]
    metrics: list[dict[str, float]]
    first: TrainState  # shapes and layouts only
    last: TrainState
    sequences: NamedSharding  # of the sampled tokens
    recompiled: int  # compilations after the first iteration


def layouts(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def begun(which: str) -> tiny.Tiny:
    """A run before its first iteration, on the current mesh."""
    name, model, cfg, num_micro, copies, *options = CASES[which]
    batch = Batch(prompts=tiny.prompts(vocab=model.vocab_size), preferences=None)
    if "preferences" in ALGORITHMS[name].batch(cfg):
        batch = dataclasses.replace(batch, preferences=tiny.preferences(vocab=model.vocab_size))
    kind = {"model": model, "num_micro": num_micro, "samples_per_prompt": copies} | dict(*options)
    return tiny.build(name, cfg, batch=batch, **kind)


def with_first_bias(state: TrainState) -> TrainState:
    """``state`` with the bias of a reward head that learns as it was drawn, 0.

    Preferences do not identify it: its gradient is rounding alone, which differs between meshes, and which Adam makes
    steps of full size. All rewards then shift alike, scores and values with them; margins agree to 1e-7."""
    if "reward" not in state.params:
        return state
    head = state.params["reward"]["head"]
    zero = jax.device_put(np.zeros(head["bias"].shape, head["bias"].dtype), head["bias"].sharding)
    return state.replace(params=state.params | {"reward": state.params["reward"] | {"head": head | {"bias": zero}}})


@functools.cache
def first_layouts(shape: Shape, which: str) -> TrainState:
    """Shapes and layouts of the state before the first iteration."""
    mesh = mesh_of(shape)
    with current(mesh):
        return layouts(for_programs(begun(which).state, mesh))


@functools.cache
def ran(shape: Shape, which: str) -> Ran:
    few = (
        "experts",
        "packed",
        "twice",
        "twice cut",
        "trunk",
        "nine",
        "wide",
        "adapters",
        "adapters value",
        "adapters packed",
        "adapters trunk",
    )
    few += ("quantized", "quantized beside", "dora value", "dora beside", "muon", "sinks")
    few += ("shared expert", "experts beside")
    iterations = 2 if which in few else ITERATIONS
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    mesh = mesh_of(shape)
    with current(mesh):
        run = begun(which)
        state, batch = for_programs(run.state, mesh), put(mesh, run.batch)
        first, (step, tokens, metrics) = layouts(state), (program_of(run.recipe, mesh, state, batch), [], [])
        for iteration in range(iterations):
            state, numbers, sequences = step(state, batch)
            state = with_first_bias(state)
            tokens.append(np.asarray(sequences.tokens))
            metrics.append({name: float(number) for name, number in numbers.items()})
            if iteration == 0:
                jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.unregister_event_duration_listener(listen)
    return Ran(tokens, metrics, first, layouts(state), sequences.tokens.sharding, len(compiled))


@pytest.mark.parametrize("shape", MESHES)
def test_noise_has_the_same_bits(shape):
    rng = np.random.default_rng(0)
    ids, positions = rng.integers(0, 2**31 - 1, 64, np.int32), rng.integers(0, 4096, (64, 8), np.int32)
    draw = jax.jit(uniform_noise)
    alone = np.asarray(draw(jnp.int32(3), jnp.int32(7), jnp.array(ids), jnp.array(positions)))
    with jax.set_mesh(mesh_of(shape)):
        split = draw(jnp.int32(3), jnp.int32(7), *tiny.put((ids, positions)))
    np.testing.assert_array_equal(np.asarray(split).view(np.uint32), alone.view(np.uint32))
    few = draw(jnp.int32(3), jnp.int32(7), jnp.array(ids[8:16]), jnp.array(positions[8:16]))
    np.testing.assert_array_equal(np.asarray(few), alone[8:16])  # whatever the number of rows
    assert len(np.unique(alone)) > 500 and alone.min() >= 0 and alone.max() < 1


NIGHTLY = functools.partial(pytest.param, marks=pytest.mark.nightly)
# all axes but data, whose rows are split as those of slices and fsdp are
RUNS: list = [((1, 2, 2, 2, 2), "groups"), ((1, 2, 2, 1, 2), "adapters"), ((1, 2, 2, 1, 1, 2), "experts")]
RUNS += [((1, 2, 2, 1, 1, 1, 2), "groups")]
RUNS += [NIGHTLY(shape, "groups") for shape in ((1, 2, 1, 1, 1, 1, 4), (1, 4, 1, 1, 2, 1, 2))]
RUNS += [NIGHTLY((1, 1, 1, 1, 1, 1, 4), "trunk"), NIGHTLY((1, 1, 2, 1, 1, 1, 2), "adapters")]
RUNS += [NIGHTLY((1, 1, 1, 1, 1, 2, 2), "experts")]
RUNS += [NIGHTLY(shape, "experts") for shape in ((1, 1, 2, 1, 1, 4), (1, 2, 2, 1, 2, 2), (2, 2, 2))]
RUNS += [NIGHTLY((2, 2, 2), which) for which in ("adapters value", "adapters packed", "adapters trunk")]
# by day: test_optim, updates alone
RUNS += [NIGHTLY(shape, "sinks") for shape in ((1, 2, 2, 1, 1, 2), (1, 2, 2, 1, 2), (2, 2, 2))]
RUNS += [NIGHTLY(shape, "shared expert") for shape in ((1, 2, 2, 1, 1, 2), (1, 2, 2, 1, 2))]
RUNS += [NIGHTLY(shape, "experts beside") for shape in ((1, 2, 2, 1, 1, 2), (1, 2, 2, 1, 2))]
RUNS += [NIGHTLY(shape, "muon") for shape in ((1, 2, 2, 1, 2), (1, 2, 2, 1, 1, 2))]
# by day: models/test_quantized, one forward and backward pass
RUNS += [NIGHTLY((2, 2, 2), "quantized"), NIGHTLY((1, 2, 2, 1, 2), "quantized beside")]
# by day: models/test_dora, one forward and backward pass
RUNS += [NIGHTLY((2, 2, 2), "dora value"), NIGHTLY((1, 2, 2, 1, 2), "dora beside")]
RUNS += [NIGHTLY((1, 1, 2, 1, 1, 1, 2), "dora value")]
RUNS += [NIGHTLY(shape, "groups") for shape in ((2, 2, 2), (1, 2, 2, 2), (1, 4, 2, 1, 2))]
RUNS += [NIGHTLY(shape, "plain") for shape in MESHES]
RUNS += [NIGHTLY((2, 2, 2), name) for name in ("odd", "packed", "trunk", "nine", "wide")]
RUNS += [NIGHTLY(shape, "odd") for shape in ((1, 4, 2, 1, 2), (1, 2, 2, 1, 1, 1, 2))]
# by day: the cut groups of pmap against one device's whole ones, below
MAPPED = [NIGHTLY(4, "quantized"), NIGHTLY(4, "muon"), NIGHTLY(4, "dora value")]
MAPPED += [
    NIGHTLY(*case)
    for case in (
        (8, "cut"),
        (4, "adapters value"),
        (4, "odd"),
        (8, "plain"),
        (4, "groups"),
        (4, "packed"),
        (4, "trunk"),
    )
]
COMPARED = ("loss/", "score/", "kl/", "reward/", "policy/entropy", "policy/sampler", "response/", "group/")
SHIFTED = ("reward/chosen", "reward/rejected")  # by the reward head's bias within an iteration; reward/margin is not


@pytest.mark.parametrize(("shape", "which"), [*RUNS, *MAPPED])
def test_the_run_is_that_of_one_device(shape, which):
    """A minibatch under pmap is that of the mesh: the same rows, so the same losses to rounding."""
    compare(ran(ALONE, which), ran(shape, which), 1e-5 if isinstance(shape, int) else 1e-4)


def compare(alone: Ran, split: Ran, tolerance: float) -> None:
    """The same tokens, and the same numbers to rounding, in every iteration."""
    for iteration in range(len(alone.tokens)):
        np.testing.assert_array_equal(
            split.tokens[iteration], alone.tokens[iteration], err_msg=f"iteration {iteration}"
        )
        expected, found = alone.metrics[iteration], split.metrics[iteration]
        assert found.keys() == expected.keys()
        for name in expected:
            if name.startswith(COMPARED) and name not in SHIFTED:
                np.testing.assert_allclose(
                    found[name], expected[name], rtol=0, atol=tolerance, err_msg=f"{name}, {iteration}"
                )
    changes = [np.abs(a - b).max() for a, b in zip(alone.tokens[:-1], alone.tokens[1:])]
    assert min(changes) > 0 and alone.metrics[0]["loss/policy"] != alone.metrics[-1]["loss/policy"]


@pytest.mark.parametrize(
    ("shape", "cut", "whole"),
    [(8, "cut", "groups"), NIGHTLY(ALONE, "cut", "groups"), NIGHTLY(ALONE, "twice cut", "twice")],
)
def test_minibatches_are_the_same_where_groups_are_cut(shape, cut, whole):
    """Micro-batches smaller than a group, or devices that have less of it: the unit of shuffling is the group."""
    compare(ran(ALONE, whole), ran(shape, cut), 1e-4)


@pytest.mark.parametrize(("shape", "which"), RUNS)
def test_nothing_is_compiled_twice(shape, which):
    """The state comes out laid out as it went in; else the second iteration would be another program."""
    found = ran(shape, which)
    assert found.recompiled == 0
    assert jax.tree.structure(found.first) == jax.tree.structure(found.last)
    for before, after in zip(jax.tree.leaves(found.first), jax.tree.leaves(found.last)):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert not before.shape or before.sharding == after.sharding


FSDP = ("fsdp", "decode", "expert", "context")


def table(kv_axis: str | None, axis: str | None = "tensor") -> dict:
    """Where the weights of a model with a scalar head live, by hand."""
    norm = {"scale": P(None, FSDP)}
    up = {"kernel": P(None, FSDP, "tensor")}
    return {
        "embed": {"tokens": {"embedding": P("tensor", FSDP)}},
        "layers": {
            "attention": {
                "norm": norm,
                "query": {"kernel": P(None, FSDP, axis, None)},
                "key": {"kernel": P(None, FSDP, kv_axis, None)},
                "value": {"kernel": P(None, FSDP, kv_axis, None)},
                "out": {"kernel": P(None, axis, None, FSDP)},
            },
            "mlp": {"norm": norm, "up": up, "gate": up, "down": {"kernel": P(None, "tensor", FSDP)}},
        },
        "final_norm": {"scale": P(FSDP)},
        "head": {"kernel": P(FSDP, None), "bias": P(None)},
    }


@pytest.mark.parametrize(
    ("shape", "which", "kv_axis", "axis"),
    [
        ((2, 2, 2), "plain", "tensor", "tensor"),
        ((2, 2, 2), "odd", None, "tensor"),
        ((2, 2, 2), "nine", None, None),
        ((2, 2, 2), "wide", "tensor", "tensor"),
    ],
)
@pytest.mark.parametrize("when", ["first", NIGHTLY("last")])
def test_weights_and_moments_are_where_the_table_says(shape, which, kv_axis, axis, when):
    """Adam's moments with them: automatic mode was seen to replicate those silently."""
    state = first_layouts(shape, which) if when == "first" else ran(shape, which).last
    expected = table(kv_axis, axis)
    policy = {name: part for name, part in expected.items() if name != "head"}
    for role, tree in state.params.items():
        trees = [tree, *(optax.tree.get(state.opt_state[role], moment) for moment in ("mu", "nu"))]
        for found in trees:
            check_layout(found, policy if role == "policy" else expected, shape)
    for role, tree in state.slow.items():
        check_layout(tree, policy if role == "reference" else expected, shape)


def check_layout(tree, expected, shape: tuple[int, ...]):
    """Specs, and what a device really holds."""
    sizes = {None: 1, FSDP: shape[1], "tensor": shape[2]}

    def one(leaf, spec):
        padded = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
        assert P(*padded) == spec
        held = tuple(size // sizes[axis] for size, axis in zip(leaf.shape, spec))
        assert leaf.sharding.shard_shape(leaf.shape) == held

    jax.tree.map(one, tree, expected)


@pytest.mark.parametrize(
    ("shape", "which"),
    [((1, 2, 2, 2, 2), "groups"), *(NIGHTLY(one, "plain") for one in MESHES)],
)
def test_rows_of_a_batch_are_split(shape, which):
    found = ran(shape, which)
    shards = int(np.prod(shape[:4])) // shape[2]
    assert found.sequences.spec[0] == SPLIT_ROWS and not any(found.sequences.spec[1:])
    assert found.sequences.shard_shape(found.tokens[0].shape)[0] == len(found.tokens[0]) // shards


@pytest.mark.parametrize(("name", "cfg"), [("ppo", PPOConfig(whiten_rewards=True)), ("grpo", GRPOConfig())])
def test_whitening_and_groups_gather_no_tokens(name, cfg):
    """Statistics over devices are sums of numbers: what was sampled stays where it is."""
    with jax.set_mesh(mesh_of((8, 1, 1))):
        run = tiny.build(name, cfg, batch=Batch(tiny.prompts(), tiny.sequences(rows=32)), samples_per_prompt=2)
        rows = run.batch.sequences
        logprobs = tiny.put(np.zeros(rows.tokens.shape, np.float32))
        batch = run.batch.replace(sequences=rows.replace(logprobs=logprobs))
        prepare = lambda state, batch: run.recipe.algorithm.prepare(run.recipe.nets, state, batch, cfg)
        text = tiny.program(prepare).lower(run.state, batch).compile().as_text() or ""
    assert "all-reduce" in text
    assert not any(kind in text for kind in ("all-gather", "all-to-all", "collective-permute"))
