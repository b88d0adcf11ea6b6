"""The estimate of memory against what XLA allocates for tiny models on eight fake devices."""

import dataclasses
import math

import jax
import pytest

from jaxrlhf.config.batch import asked_parts
from jaxrlhf.config.load import load, parse
from jaxrlhf.config.record import Config, PrecisionConfig
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.plan import cost, roofline
from jaxrlhf.plan.calls import PlannedPass, models_of, passes_of
from jaxrlhf.plan.expert_rows import expert_rows
from jaxrlhf.plan.memory_estimate import estimate, rollout_of, stored
from jaxrlhf.plan.search import candidates, differences, settings, setup_of, with_micro
from jaxrlhf.plan.shapes import blueprint
from jaxrlhf.plan.target import Target
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.sharding import MeshConfig, current, make_mesh
from jaxrlhf.tpu.peaks import CHIPS, GIB

EIGHT = Target("v5e:2x4", CHIPS["v5e"], 8, 1, [None] * 8)
FACTOR = 2.0  # how far the estimate of the peak may be from XLA's, either way
MODEL = "{vocab_size: 4096, hidden_size: 128, num_layers: 4, num_heads: 4, mlp_size: 384, max_positions: 512}"
PPO = f"""
run_dir: nowhere
iterations: 1
algorithm: {{name: ppo, num_epochs: 1}}
models: {{policy: {{architecture: {MODEL}}}, reward: {{init_from: policy}}}}
tokenizer: {{init_from: somewhere}}
data: {{prompts: {{path: p.jsonl}}, prompt_buckets: [64]}}
batch: {{prompts_per_step: 64}}
generate: {{max_new_tokens: 64}}
"""
SFT = f"""
run_dir: nowhere
iterations: 1
algorithm: {{name: sft}}
models: {{policy: {{architecture: {MODEL}}}}}
tokenizer: {{init_from: somewhere}}
data: {{demonstrations: {{path: d.jsonl}}, max_length: 128, pack: false}}
batch: {{sequences_per_step: 64}}
"""


def config(text: str, mesh: MeshConfig, **changes) -> Config:
    return dataclasses.replace(parse(read_yaml(text, "test"), "test"), mesh=mesh, **changes)


def drawn_for(cfg: Config):
    """(blueprint, its passes, models, setup) on eight devices."""
    drawn, _ = blueprint(resolve_config(cfg), make_mesh(cfg.mesh, jax.devices()[:8]), {})
    recipe = drawn.recipe._replace(num_micro=asked_parts(drawn.resolved))  # as on a TPU
    drawn = dataclasses.replace(drawn, recipe=recipe)
    passes = passes_of(drawn, list(batch_shapes(drawn.resolved, drawn.mesh))[-1])
    return drawn, passes, models_of(drawn), setup_of(cfg, jax.devices()[:8], drawn)


MANY = PPO.replace("prompts_per_step: 64", "prompts_per_step: 16, samples_per_prompt: 8")
TRUNK = PPO.replace("{init_from: policy}", "{init_from: policy}, value: {share_trunk: true}")
ADAPTED = PPO.replace(
    f"{{architecture: {MODEL}}}, reward: {{init_from: policy}}",
    f"{{architecture: {MODEL}, adapter: {{rank: 8}}}}, value: {{init_from: policy, adapter: {{rank: 4}}}}, "
    f"reward: {{architecture: {MODEL}}}",
)
LARGE = MODEL.replace("hidden_size: 128, num_layers: 4", "hidden_size: 192, num_layers: 6")
TAUGHT = PPO.replace("{name: ppo, num_epochs: 1}", "{name: distill}").replace(
    "reward: {init_from: policy}", f"teacher: {{architecture: {LARGE}}}"
)
MAGNITUDES = ADAPTED.replace("{rank: 8}", "{rank: 8, dora: true}").replace("{rank: 4}", "{rank: 4, dora: true}")
QUANTIZED = ADAPTED.replace("{rank: 8}}", "{rank: 8}, base_quantization: nf4}")
ESTIMATED = {
    "distill": (TAUGHT, MeshConfig(1, 4, 2), {"precision": PrecisionConfig(params="bfloat16")}),
    "ppo, adapters": (ADAPTED, MeshConfig(1, 4, 2), {"precision": PrecisionConfig(params="bfloat16")}),
    "ppo, magnitudes": (MAGNITUDES, MeshConfig(1, 4, 2), {"precision": PrecisionConfig(params="bfloat16")}),
    "ppo, adapters on nf4": (QUANTIZED, MeshConfig(1, 4, 2), {"precision": PrecisionConfig(params="bfloat16")}),
    "sft, fsdp": (SFT, MeshConfig(1, 8, 1), {}),
    "sft, copies, remat": (SFT, MeshConfig(8, 1, 1), {"remat": "full"}),
    "ppo, fsdp and tensor": (PPO, MeshConfig(1, 4, 2), {}),
    "ppo, copies": (PPO, MeshConfig(8, 1, 1), {}),
    "ppo, samples of a prompt": (MANY, MeshConfig(1, 8, 1), {}),
    "ppo, shared trunk": (TRUNK, MeshConfig(1, 4, 2), {}),
}


# 4 devices share 8 experts, each of which has the places of 4 devices' tokens
MIXTURE = "{family: qwen3_moe, vocab_size: 512, hidden_size: 128, num_layers: 2, num_heads: 4, num_kv_heads: 4, "
MIXTURE += "head_dim: 32, mlp_size: 96, num_experts: 8, experts_per_token: 2, max_positions: 512}"
ESTIMATED["sft, experts"] = SFT.replace(MODEL, MIXTURE), MeshConfig(1, 2, 1, expert=4), {}
ESTIMATED["ppo, experts and tensor"] = PPO.replace(MODEL, MIXTURE), MeshConfig(1, 2, 2, expert=2), {}
OFTEN = ("sft, fsdp", "sft, experts")


@pytest.mark.parametrize(
    "text, mesh, changes",
    [
        pytest.param(*case, id=name, marks=[] if name in OFTEN else pytest.mark.nightly)
        for name, case in ESTIMATED.items()
    ],
)
def test_the_estimate_is_near_what_xla_allocates(text, mesh, changes):
    """Arguments to 1% (tiny scalars apart), the peak within FACTOR."""
    cfg = config(text, mesh, **changes)
    drawn, passes, models, setup = drawn_for(cfg)
    found = estimate(passes, models, setup)
    with jax.set_mesh(drawn.mesh):
        batch = list(batch_shapes(resolve_config(cfg), drawn.mesh))[-1]
        (program,) = compile_programs(drawn, abstract_state(drawn), batch).values()
    memory = program.compiled.memory_analysis()
    assert memory is not None
    data = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) / 8
    assert found.arguments + data == pytest.approx(memory.argument_size_in_bytes, rel=0.01)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert peak / FACTOR < found.peak < peak * FACTOR, (found, memory)


def test_what_makes_it_smaller():
    """Each of the levers that the advice has."""
    peak = lambda cfg: estimate(*drawn_for(cfg)[1:]).peak
    whole = peak(config(SFT, MeshConfig(8, 1, 1)))
    assert peak(config(SFT, MeshConfig(1, 8, 1))) < whole
    assert peak(config(SFT, MeshConfig(8, 1, 1), remat="dots")) < whole
    assert peak(config(SFT, MeshConfig(8, 1, 1), remat="full")) < peak(config(SFT, MeshConfig(8, 1, 1), remat="dots"))
    cfg = config(SFT, MeshConfig(8, 1, 1))
    assert peak(dataclasses.replace(cfg, batch=dataclasses.replace(cfg.batch, micro_batch_size=16))) < whole


def test_the_cache_holds_a_prompt_once():
    """16 prompts of 64 tokens on 8 chips: 16 samples more of each are no more prompts in the cache."""
    mesh, one = MeshConfig(1, 8, 1), PlannedPass("policy", "sample", 16, 64, 64)
    _, _, models, setup = drawn_for(config(PPO, mesh))
    cfg, columns = models["policy"][0], lambda copies: 16 / 8 * (64 + copies * 64)
    logits = lambda copies: 16 * copies / 8 * 4096 * 4 * 2
    found = [rollout_of(one._replace(copies=copies), cfg, setup) for copies in (16, 32)]
    more = (columns(32) - columns(16)) * 2 * cfg.num_kv_heads * cfg.head_dim * cfg.num_layers * setup.compute
    assert found[1] - found[0] == more + logits(32) - logits(16)


def test_no_remat_keeps_a_gathered_weight():
    """8 devices that share the weights keep for an update what 8 copies do, but for their part of the gradients."""
    cfg = config(SFT, MeshConfig(1, 8, 1))
    _, passes, models, setup = drawn_for(cfg)
    for remat in ("none", "dots", "full"):
        one = setup._replace(remat=remat)
        kept = lambda fsdp: estimate(passes, models, one._replace(mesh={"data": 8 // fsdp, "fsdp": fsdp, "tensor": 1}))  # noqa: B023
        gradients = lambda fsdp: stored(*models["policy"], fsdp, 1) * 4
        assert kept(8).update - gradients(8) == kept(1).update - gradients(1) > 0


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_weights_and_moments_are_counted_in_the_formats_of_the_state(params, moment):
    """What learns keeps float32 weights and a float32 second moment, whatever precision.params says."""
    more = {"precision": PrecisionConfig(params=params), "optimizer": {"default": OptimizerConfig(dtype=moment)}}
    drawn, passes, models, setup = drawn_for(config(PPO, MeshConfig(1, 4, 2), **more))
    with current(drawn.mesh):
        state = abstract_state(drawn)
    held = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    assert estimate(passes, models, setup).arguments == pytest.approx(sum(map(held, jax.tree.leaves(state))), rel=0.01)


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_muon_keeps_one_moment_of_a_matrix(moment):
    """As the state has it, and less than Adam's by a float32 of each matrix of the layers."""
    rows = {name: {"default": OptimizerConfig(name=name, dtype=moment)} for name in ("adamw", "muon")}
    found = {}
    for name, row in rows.items():
        drawn, passes, models, setup = drawn_for(config(PPO, MeshConfig(1, 4, 2), optimizer=row))
        with current(drawn.mesh):
            state = abstract_state(drawn)
        held = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        found[name] = estimate(passes, models, setup).arguments
        assert found[name] == pytest.approx(sum(map(held, jax.tree.leaves(state))), rel=0.01)
    assert found["muon"] < 0.9 * found["adamw"]


def test_adapters_by_hand():
    """On one chip, in bytes: the base of policy, value and reference once in bfloat16; A and B of rank 8 and 4, the
    value's head, all with two moments in float32; the reward model in bfloat16."""
    cfg = config(ADAPTED, MeshConfig(1, 1, 1), precision=PrecisionConfig(params="bfloat16"))
    resolved = resolve_config(cfg)
    assert {role: based.base for role, based in resolved.bases.items()} == dict.fromkeys(
        ("policy", "value", "reference"), "base_policy"
    )
    drawn, _ = blueprint(resolved, make_mesh(cfg.mesh, jax.devices()[:1]), {})
    passes = passes_of(drawn, list(batch_shapes(resolved, drawn.mesh))[-1])
    found = estimate(passes, models_of(drawn), setup_of(cfg, jax.devices()[:1], drawn))
    base = 4096 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128
    adapter = 4 * (4 * (128 + 128) + 3 * (128 + 384))  # of rank 1
    learned = 8 * adapter + 4 * adapter + 129
    assert found.arguments == 2 * base + 12 * learned + 2 * (base + 129)
    with jax.set_mesh(drawn.mesh):
        state = abstract_state(drawn)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim) == found.arguments


def test_magnitudes_by_hand():
    """On one chip: a number for each output in 12 bytes, and of each output, without remat, 4 bytes a token more that
    are kept; a pass multiplies each adapted weight with the rank's columns of A and one square, and reads it twice."""
    found, setups = [], []
    for text in (ADAPTED, ADAPTED.replace("{rank: 8}", "{rank: 8, dora: true}")):
        cfg = config(text, MeshConfig(1, 1, 1), precision=PrecisionConfig(params="bfloat16"))
        drawn, _ = blueprint(resolve_config(cfg), make_mesh(cfg.mesh, jax.devices()[:1]), {})
        passes = passes_of(drawn, list(batch_shapes(drawn.resolved, drawn.mesh))[-1])
        setups.append(setup_of(cfg, jax.devices()[:1], drawn))
        found.append(estimate(passes, models_of(drawn), setups[-1]))
        with jax.set_mesh(drawn.mesh):
            state = abstract_state(drawn)
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim) == found[-1].arguments
    outputs, elements = 4 * (4 * 128 + 2 * 384 + 128), 4 * (4 * 128 * 128 + 3 * 128 * 384)
    assert found[1].arguments - found[0].arguments == 12 * outputs
    (micro,) = {one.tokens for one in passes.micro if one.role == "policy"}
    bytes_kept = setups[1].compute * micro * outputs
    assert found[1].update - found[0].update == pytest.approx(
        4 * outputs * (2 if passes.micros > 1 else 1) + bytes_kept
    )
    works = [cost.magnitudes(drawn.configs["policy"], "policy", setup) for setup in setups]
    assert works == [roofline.DeviceWork(), roofline.DeviceWork(2 * 9 * elements, 2 * 2 * elements)]


def test_a_teacher_by_hand():
    """On one chip, in bytes: the policy with two moments in float32, and a larger teacher in bfloat16, once."""
    cfg = config(TAUGHT, MeshConfig(1, 1, 1), precision=PrecisionConfig(params="bfloat16"))
    drawn, _ = blueprint(resolve_config(cfg), make_mesh(cfg.mesh, jax.devices()[:1]), {})
    passes = passes_of(drawn, list(batch_shapes(drawn.resolved, drawn.mesh))[-1])
    found = estimate(passes, models_of(drawn), setup_of(cfg, jax.devices()[:1], drawn))
    size = lambda width, layers: 4096 * width + layers * (4 * width**2 + 3 * width * 384 + 2 * width) + width
    assert found.arguments == 12 * size(128, 4) + 2 * size(192, 6)
    with jax.set_mesh(drawn.mesh):
        state = abstract_state(drawn)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim) == found.arguments


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        # a byte a weight, and 4 bytes for each of 4 x 128 outputs of attention, 2 x 384 + 128 of the mlp
        ("int8", 4 * 128 * 128 + 3 * 128 * 384 + 4 * (4 * 128 + 2 * 384 + 128)),
        # half a byte, and 4 bytes for each block of 64; of 32 where attention's heads are the input
        ("nf4", (4 * 128 * 128 + 3 * 128 * 384) // 2 + 4 * ((3 * 128 * 128 + 3 * 128 * 384) // 64 + 128 * 128 // 32)),
    ],
)
def test_quantised_bases_by_hand(kind, layer):
    """On one chip, in bytes: the layers' maps of the base packed, the rest of it in bfloat16; decoding reads merged
    weights, or these."""
    half = PrecisionConfig(params="bfloat16")
    texts = ADAPTED, QUANTIZED.replace("nf4", kind)
    plain, cfg = (config(text, MeshConfig(1, 1, 1), precision=half) for text in texts)
    found, rollouts = [], []
    beside = dataclasses.replace(cfg, generate=dataclasses.replace(cfg.generate, merge_adapter=False))
    for one in (plain, cfg, beside):
        drawn, _ = blueprint(resolve_config(one), make_mesh(one.mesh, jax.devices()[:1]), {})
        passes = passes_of(drawn, list(batch_shapes(drawn.resolved, drawn.mesh))[-1])
        need = estimate(passes, models_of(drawn), setup_of(one, jax.devices()[:1], drawn))
        found.append(need.arguments)
        rollouts.append(need.rollout)
    elements = 4 * 128 * 128 + 3 * 128 * 384
    assert found[0] - found[1] == 4 * (2 * elements - layer) and found[1] == found[2]
    assert rollouts[0] == rollouts[1] and rollouts[1] - rollouts[2] == 4 * (4 * elements - layer)  # computed in float32
    with jax.set_mesh(drawn.mesh):
        state = abstract_state(drawn)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim) == found[1]


def test_rows_of_experts_by_hand():
    """Eight chips, two halves of 4 that share 8 experts. A chip has 8 rows of 128 tokens, its group 4,096 tokens, which
    choose 2 experts each: 8,192 places."""
    cfg = config(SFT.replace(MODEL, MIXTURE), MeshConfig(1, 2, 1, expert=4))
    _, passes, models, setup = drawn_for(cfg)
    (one,), (shape, _) = passes.micro, models["policy"]
    rows = expert_rows(one, shape, setup)
    assert rows.gathered == 4096 * 128 * 4 and rows.wide == 8192 * 128 * 4 and rows.inner == 8192 * 96 * 4
    assert rows.backward == 2 * rows.gathered + 7 * rows.wide + 3 * rows.inner
    half = expert_rows(one, shape, setup._replace(compute=2))  # but for the gradient of the results, float32
    assert half.backward == (rows.backward + rows.gathered) / 2
    for remat, kept in {"none": 2 * rows.wide + 6 * rows.inner, "dots": rows.wide + 2 * rows.inner, "full": 0}.items():
        both = [
            estimate(passes, models, setup._replace(remat=remat, mesh={**setup.mesh, **mesh})) for mesh in ({}, TWICE)
        ]
        more = both[1].update - both[0].update  # of layers, their experts' kernels and the places of as many tokens
        assert more > shape.num_layers * kept + rows.backward - rows.gathered, remat
    dense = expert_rows(one, drawn_for(config(SFT, MeshConfig(1, 8, 1)))[2]["policy"][0], setup)
    assert dense.forward == dense.backward == dense.kept_all == dense.kept_products == 0


TWICE = {"fsdp": 1, "expert": 8}  # a chip has as many tokens, and twice the places


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("grpo_qwen3_30b_a3b", 26.50), ("grpo_gpt_oss_20b", 25.46)],  # GiB of "learn" on v6e:8x8, libtpu 0.0.52
)
def test_mixtures_are_counted_as_a_tpu_compiler_has_them(name, compiled):
    """Within a quarter, on 64 chips; without libtpu, so drawn for 8 devices: passes depend on rows alone."""
    cfg = load(f"configs/gsm8k/{name}.yaml", [])
    tensor = cfg.mesh.tensor
    eight = dataclasses.replace(cfg, mesh=MeshConfig(1, -1, 1, expert=8), attention="auto")
    _, passes, models, setup = drawn_for(eight)
    mesh = {**setup.mesh, "fsdp": 8 // tensor, "tensor": tensor}
    found = estimate(passes, models, setup._replace(mesh=mesh))
    assert compiled / 1.25 < found.peak / GIB < compiled * 1.25, found


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scales_that_fsdp_does_not_divide_are_whole(kind):
    """Two blocks of 128 features, and the only scale of an output, are on each of 4 devices; as the state has them."""
    cfg = config(QUANTIZED.replace("nf4", kind), MeshConfig(1, 4, 2), precision=PrecisionConfig(params="bfloat16"))
    drawn, passes, models, setup = drawn_for(cfg)
    with current(drawn.mesh):
        state = abstract_state(drawn)
    held = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    assert estimate(passes, models, setup).arguments == pytest.approx(sum(map(held, jax.tree.leaves(state))), rel=0.001)


# ---- the search -----------------------------------------------------------------------------------------------------


def test_settings_pass_the_checks_and_are_said_as_overrides():
    cfg = config(PPO, MeshConfig(8, 1, 1))
    drawn, passes, *_ = drawn_for(cfg)
    every = [one for _, one in settings(drawn, 8)]
    assert cfg in every and len(every) > 50
    assert differences(cfg, cfg) == []
    other = dataclasses.replace(cfg, mesh=MeshConfig(1, 4, 2), remat="full")
    assert differences(cfg, other) == ["remat=full", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"]
    half = with_micro(passes, 2)
    assert [one.rows for one in half.micro] == [one.rows // 2 for one in passes.micro] and half.micros == 2


def test_the_best_candidate_fits_and_changes_no_number_format_where_it_need_not():
    cfg = config(PPO, MeshConfig(8, 1, 1))
    drawn, passes, models, setup = drawn_for(cfg)
    there = estimate(passes, models, setup).peak / 2
    found = candidates(drawn, passes, EIGHT, there)
    best = found[0]
    assert best.memory.peak < there and best.overrides
    assert not [text for text in best.overrides if text.startswith(("precision", "optimizer"))]
    same = [one.seconds for one in found if one.cfg.precision == cfg.precision and one.cfg.optimizer == cfg.optimizer]
    assert best.seconds == min(same)
    least = min(one.memory.peak for one in found)
    smaller = candidates(drawn, passes, EIGHT, 0.9 * least)
    assert all(one.memory.peak < 0.9 * least for one in smaller)
    assert candidates(drawn, passes, EIGHT, 1000.0) == []
