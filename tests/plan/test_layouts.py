"""What the compiled programs of a TPU slice send, and when: read from their HLO, with nothing but libtpu."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.algorithms.sft import SFTConfig
from jaxrlhf.generate import loop
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.attention.kernels import hardware_of
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.linear import linear
from jaxrlhf.models.matrices import layer_matrices
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.parameters import parameter_table
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.optim import OptimizerConfig, make_optimizer
from jaxrlhf.plan import hlo
from jaxrlhf.plan.compiled_memory import describe
from jaxrlhf.plan.target import find_target
from jaxrlhf.run import state as states
from jaxrlhf.sharding import MeshConfig, constrain, current, in_steps, make_mesh, row_layout, spec, whole_square
from jaxrlhf.step import Recipe, make_learn
from jaxrlhf.types import Batch, Prompts, Sequences

pytest.importorskip("libtpu", reason="compiles for TPUs")
pytestmark = pytest.mark.plan

ROWS, ROOM = 128, 64
MODEL = resolve(
    ModelConfig(vocab_size=2048, hidden_size=512, num_layers=2, num_heads=8, num_kv_heads=8, mlp_size=2048, head_dim=64)
)
BF16 = Runtime(jnp.bfloat16)


def rows_of(mesh, *shape: int, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=row_layout(mesh, len(shape)))


def sent(program) -> list[tuple[int, str, int, str]]:
    """(executions, kind, bytes, attributes) of every collective."""
    entry, computations = hlo.parse(program.as_text())
    runs, _ = hlo.executions(entry, computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            if kind := hlo.kind_of(line):
                found.append((runs[name], kind, hlo.transferred(line), line.rest))
    return found


@pytest.mark.parametrize("decode", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_the_decode_loop_of_a_slice_sends_activations_alone(decode):
    """On v5e:8x8 the weights are laid out once, before the loop: in it are sums of one token's activations, and the
    logits of its rows, which devices that share them trade."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=32, tensor=2, decode=decode), find_target("v5e:8x8").devices)
    sampler = Sampler(Sampling(eos_ids=(2,)), ROOM, (2,), 0)
    prompts = Prompts(rows_of(mesh, ROWS, 32), rows_of(mesh, ROWS, 32, dtype=bool), rows_of(mesh, ROWS))  # type: ignore[arg-type]

    def rollout(params, prompts):
        return loop.sample(params, MODEL, prompts, jnp.int32(0), jnp.int32(0), sampler, BF16)

    with jax.set_mesh(mesh):
        params = states.abstract_params(MODEL, "lm", jnp.float32, mesh)
        program = jax.jit(rollout).lower(params, prompts).compile()
    here = ROWS // 32 * decode  # rows of a device
    group, every = 2 * decode, sent(program)
    inside = [(kind, size) for runs, kind, size, _ in every if runs >= ROOM]
    assert [size for kind, size in inside if kind == "all-to-all"] == [here * 2048 // group * 4]
    weights = MODEL.hidden_size * MODEL.mlp_size // group * 2  # bytes of the mlp's largest, as decoding holds it
    assert {kind for kind, _ in inside} == {"all-to-all", "all-reduce"}
    assert all(size <= here * MODEL.hidden_size * 4 < weights for kind, size in inside if kind == "all-reduce")
    before = [kind for runs, kind, size, _ in every if runs < ROOM and size >= weights // 2]
    assert before, "the weights must have been laid out somewhere"
    assert ("all-to-all" in {kind for runs, kind, *_ in every if runs < ROOM}) == (decode > 1)


def test_between_slices_only_what_is_scattered_is_summed():
    """Two v5e:2x2 as (slices 2, fsdp 4): gradients are scattered within a slice first, so that the data-center network
    carries a quarter of them; weights are gathered within a slice."""
    where = find_target("v5e:2x2", 2)
    mesh = make_mesh(MeshConfig(slices=2, data=1, fsdp=4), where.devices)
    nets = make_nets({"policy": MODEL}, BF16, Sampling(), lambda *_: None)  # type: ignore[arg-type]
    optimizers = {"policy": make_optimizer(OptimizerConfig(), 10)}
    recipe = Recipe(ALGORITHMS["sft"], SFTConfig(), nets, optimizers, {})
    tokens, flags = rows_of(mesh, 32, 64), rows_of(mesh, 32, 64, dtype=bool)
    batch = Batch(sequences=Sequences(tokens, flags, flags))  # type: ignore[arg-type]
    with jax.set_mesh(mesh):
        params = {"policy": states.abstract_params(MODEL, "lm", jnp.float32, mesh)}
        state = states.describe_state(params, {}, optimizers, dict, mesh)
        program = jax.jit(make_learn(recipe), donate_argnums=0).lower(state, batch).compile()
    every = sent(program)
    across = sum(runs * size for runs, kind, size, _ in every if kind == hlo.BETWEEN)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    layers = sum(leaf.size for leaf in jax.tree.leaves(params["policy"]["layers"]))
    # gradients of the layers' products are bfloat16, that of the embedding is float32
    assert (2 * layers + 4 * (whole - layers)) / 4 <= across < 1.15 * (2 * layers + 4 * (whole - layers)) / 4
    assert {"all-gather", "reduce-scatter"} <= {kind for _, kind, *_ in every}


def test_muon_moves_parts_of_matrices_alone():
    """On v5e:2x4 as (fsdp 4, tensor 2): an update sends all-to-alls within them, and keeps one moment of a matrix."""
    mesh, table = make_mesh(MeshConfig(1, 4, 2), find_target("v5e:2x4").devices), parameter_table(MODEL, "lm")
    held = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(OptimizerConfig(name=name), 10, layer_matrices(table))

        def update(params, moments, grads, optimizer=optimizer):
            updates, moments = optimizer.update(grads, moments, params, norm=jnp.float32(1))
            return optax.apply_updates(params, updates), moments

        with current(mesh):
            params = states.abstract_params(MODEL, "lm", jnp.float32, mesh)
            state = states.describe_state({"policy": params}, {}, {"policy": optimizer}, dict, mesh)
            program = jax.jit(update, donate_argnums=(0, 1)).lower(params, state.opt_state["policy"], params).compile()
        held[name] = program.memory_analysis().argument_size_in_bytes
        assert {kind for _, kind, *_ in sent(program)} == ({"all-to-all"} if name == "muon" else set())
    matrices = sum(params["layers"][path[1]][path[2]]["kernel"].size for path in layer_matrices(table))
    assert held["adamw"] - held["muon"] == pytest.approx(4 * matrices / 8, rel=0.05)


def gradients_of_an_mlp(mesh, dim: int, mlp: int) -> jax.stages.Compiled:
    """Of its two kernels, of which fsdp splits the first axis of one and the last of the other."""
    up, down, wide = ("embed", "mlp"), ("mlp", "embed"), ("batch", "seq", "mlp")

    def loss(params, x):
        y = linear({"kernel": params["up"]}, x, "bsd,dm->bsm", up, wide)
        y = linear({"kernel": params["down"]}, jax.nn.silu(y), "bsm,md->bsd", down, ("batch", "seq", "hidden"))
        return (y.astype(jnp.float32) ** 2).sum()

    with current(mesh):
        laid = lambda shape, axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec(*axes)))  # type: ignore[arg-type]
        params = {"up": laid((dim, mlp), up), "down": laid((mlp, dim), down)}
        x = jax.ShapeDtypeStruct((2 * mesh.size, 512, dim), jnp.bfloat16, sharding=row_layout(mesh, 3))
        return jax.jit(jax.grad(loss)).lower(params, x).compile()


@pytest.mark.parametrize(
    ("layout", "fsdp", "tensor", "decode", "most"),
    [
        ("4x4", 8, 2, 1, 1.5),  # pieces of 128 features; the sum over tensor is sent too
        ("4x8", 32, 1, 1, 1.01),  # of 32
        ("4x4", 16, 1, 2, 1.1),  # of all chips of a square, in steps
    ],
)
def test_gradients_are_scattered_whichever_axis_is_split(layout, fsdp, tensor, decode, most):
    """On v5e, into pieces of any size: neither is summed whole, and what is received is the least."""
    mesh = make_mesh(MeshConfig(1, fsdp, tensor, decode=decode), find_target(f"v5e:{layout}").devices)
    dim, mlp = 1024, 4096
    program = gradients_of_an_mlp(mesh, dim, mlp)
    found = {one.kind: one for one in hlo.collectives(program.as_text() or "")}
    both = 2 * dim * mlp // tensor * 2  # bytes of a device's kernels in bfloat16
    assert both <= found["reduce-scatter"].bytes <= 1.3 * both  # XLA pads what it scatters
    summed = sum(found[kind].wire for kind in ("reduce-scatter", "all-reduce") if kind in found)
    assert (fsdp - 1) / fsdp * both <= summed * 1.001 and summed <= most * both


@pytest.mark.parametrize(("layout", "dim"), [("4x4", 2048), pytest.param("8x8", 4096, marks=pytest.mark.nightly)])
def test_over_all_chips_of_a_square_gradients_are_summed_whole(layout, dim):
    """What sharding.whole_square says of libtpu, also of 128 features a device: where this fails, it is better now."""
    where = find_target(f"v5e:{layout}")
    mesh = make_mesh(MeshConfig(1, len(where.devices), 1), where.devices)
    assert whole_square(mesh)
    program = gradients_of_an_mlp(mesh, dim, 4096)
    found = {one.kind: one.wire for one in hlo.collectives(program.as_text() or "")}
    assert "reduce-scatter" not in found and found["all-reduce"] > 1.8 * found["all-gather"]


@pytest.mark.parametrize("decode", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_along_three_axes_of_a_torus_weights_move_in_two_steps(decode):
    """64 chips of a v5p share the weights. In one step XLA sums whole ones, twice the bytes; in two it gathers within
    decode groups of 4, then over the others, and scatters gradients over those, then within a group."""
    mesh, dim, mlp = make_mesh(MeshConfig(1, 64, 1, decode=decode), find_target("v5p:4x4x4").devices), 4096, 8192
    assert in_steps(mesh) == (decode == 4)
    program = gradients_of_an_mlp(mesh, dim, mlp)
    found = {one.kind: one.wire for one in hlo.collectives(program.as_text() or "")}
    both = 2 * dim * mlp * 2  # bytes, whole, in bfloat16
    if decode == 1:
        assert found["all-reduce"] > 3.9 * both
    else:
        assert min(found["all-gather"], found["reduce-scatter"]) > 0.9 * both
        assert sum(found.values()) < 2.1 * both


def test_a_program_for_v5p_that_jaxlib_cannot_print_is_described():
    """The gradient of an embedding that fsdp splits: jaxlib 0.10.2 refuses to read an async-update that libtpu 0.0.52
    made, with async collective fusion or without. Where both agree again, the collectives are read."""
    mesh = make_mesh(MeshConfig(1, 4, 1), find_target("v5p:2x2x1").devices)
    vocab, dim = 4096, 2048

    def gradient(table, tokens, kernel):
        def loss(table):
            x = constrain(table.astype(jnp.bfloat16), None, None).at[tokens].get(out_sharding=spec("batch", None, None))
            return (jnp.einsum("bsd,de->bse", x, kernel).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(table)

    laid = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
    table, kernel = laid((vocab, dim), jnp.float32, None, "fsdp"), laid((dim, dim), jnp.bfloat16, None, None)
    with jax.set_mesh(mesh):
        program = jax.jit(gradient).lower(table, rows_of(mesh, 16, 1024), kernel).compile()
    found = describe("iteration", program)
    assert found.arguments >= vocab * dim and found.peak > found.temporaries > 0
    assert "async-update" in found.unread if found.collectives is None else found.collectives
    assert "\n" not in found.unread


def test_the_decode_loop_gathers_tokens_and_no_experts():
    """8 experts over 4 devices, each split over 2: of one token's rows the states are gathered over the devices that
    share the experts, and what these computed is scattered back."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=4), find_target("v5e:4x4").devices)
    model = resolve(
        ModelConfig("qwen3_moe", 2048, 512, 2, 8, 8, 64, 1024, num_experts=8, experts_per_token=2)  # widths of experts
    )
    sampler = Sampler(Sampling(eos_ids=(2,)), ROOM, (2,), 0, keeps_routing=True)
    prompts = Prompts(rows_of(mesh, ROWS, 32), rows_of(mesh, ROWS, 32, dtype=bool), rows_of(mesh, ROWS))  # type: ignore[arg-type]
    runtime = BF16._replace(hardware=hardware_of(mesh.devices.flat[0]))

    def rollout(params, prompts):
        return loop.sample(params, model, prompts, jnp.int32(0), jnp.int32(0), sampler, runtime)

    with jax.set_mesh(mesh):
        params = states.abstract_params(model, "lm", jnp.float32, mesh)
        program = jax.jit(rollout).lower(params, prompts).compile()
    inside = [(kind, size) for runs, kind, size, _ in sent(program) if runs >= ROOM]
    states_of_all = ROWS // 2 * model.hidden_size * 4  # of the rows of the devices that share the experts, float32
    one_expert = model.hidden_size * model.mlp_size // 2 * 2  # bytes, of one map
    assert max(size for _, size in inside) <= states_of_all < one_expert
    assert (
        {"all-gather"} <= {kind for kind, _ in inside} <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    )
