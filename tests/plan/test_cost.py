"""The counts against numbers worked out by hand for a tiny model, and what an algorithm asks of its networks."""

import dataclasses
from typing import Literal

import jax
import pytest

from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files.published import published
from jaxrlhf.models.parameters import Leaf
from jaxrlhf.plan import cost
from jaxrlhf.plan import weights as weights_of
from jaxrlhf.plan.calibration import STEPS, calibrate, calibrate_decoding, reached
from jaxrlhf.plan.calls import Models, Passes, PlannedPass, passes_of
from jaxrlhf.plan.cost import Setup, phases
from jaxrlhf.plan.muon import newton_schulz_work
from jaxrlhf.plan.roofline import DeviceWork, Phase, timed
from jaxrlhf.plan.shapes import blueprint, counted_experts
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.sharding import make_mesh
from jaxrlhf.tpu.peaks import CHIPS
from jaxrlhf.types import Head

REMATS: tuple[Literal["none", "full", "dots"], ...] = ("none", "full", "dots")
ALONE = {"data": 1, "fsdp": 1, "tensor": 1}
# a layer: query 8x8, key and value 8x4, out 8x8, up, gate and down 8x16; so 64 + 64 + 64 + 384 = 576 elements
MODEL = resolve(
    ModelConfig(vocab_size=64, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=16, max_positions=64)
)
LAYER, NORMS, EMBED = 64 + 2 * 32 + 64 + 3 * 128, 2 * 8, 64 * 8
ALL = 2 * (LAYER + NORMS) + 8 + EMBED  # of the language model, whose embedding is its head
TEXTS = PlannedPass("policy", "token_stats", 3, 5, 2)  # 3 rows of 5 tokens, logits of the last 2 of each
# 2 prompts of 6 tokens with 4 responses of 3 each: 8 rows of 9, logits of all response tokens
GROUPS = PlannedPass("policy", "token_stats", 8, 9, 3, copies=4, prompt=6)
ASKED = PlannedPass("policy", "sample", 2, 6, 3, copies=4)  # the same, sampled


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_flops_of_a_forward_pass():
    """2 FLOPs a token and element; attention 4 S^2 H K a layer."""
    work = cost.forward(MODEL, "lm", TEXTS, Setup(ALONE))
    assert work.flops == 2 * 15 * 2 * LAYER + 2 * 3 * 4 * 25 * 4 * 2 + 2 * 6 * EMBED
    scores = cost.forward(MODEL, "scalar", TEXTS._replace(read=5), Setup(ALONE))
    assert scores.flops == 2 * 15 * 2 * LAYER + 2 * 3 * 4 * 25 * 4 * 2 + 2 * 15 * 8
    assert cost.backward(MODEL, "lm", TEXTS, Setup(ALONE)).flops == 2 * work.flops


def test_traffic_of_a_forward_pass():
    """Features that go in and out of each product, 6 a layer for norms and residuals; the weights; softmax; logits."""
    moved = 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16)) + 6 * 2 * 8
    pairs = 3 * 25 * 4 * 2
    head = 6 * (8 * 2 + 2 * 4 * 64)
    work = cost.forward(MODEL, "lm", TEXTS, Setup(ALONE))
    assert work.hbm == 15 * moved * 2 + pairs * 12 + ALL * 4 + head
    assert work.ici == 0
    kernel = cost.forward(MODEL, "lm", TEXTS, Setup(ALONE, stored_attention=False))
    assert work.hbm - kernel.hbm == pairs * 12


def test_a_prompt_is_computed_once_for_its_responses():
    """2 x (6 + 4 x 3) = 36 tokens in place of 8 x 9; of products 2 x 6 x 6 and, of each response, 3 x 9."""
    work = cost.forward(MODEL, "lm", GROUPS, Setup(ALONE))
    pairs = 2 * 6 * 6 + 8 * 3 * 9
    assert work.flops == 2 * 36 * 2 * LAYER + 4 * pairs * 4 * 2 * 2 + 2 * 24 * EMBED
    kernel = cost.forward(MODEL, "lm", GROUPS, Setup(ALONE, stored_attention=False))
    assert (work.flops, work.hbm - kernel.hbm) == (kernel.flops, pairs * 4 * 2 * 12)
    assert cost.forward(MODEL, "lm", GROUPS, Setup({**ALONE, "tensor": 2})).ici == 2 * 2 * 36 * 8 * 2 * 2 * 1 / 2
    alone = GROUPS._replace(copies=1)  # each row's own prompt: it does not attend to the response behind it
    assert (alone.tokens, alone.pairs) == (8 * 9, 8 * (6 * 6 + 3 * 9))


def test_prompts_are_read_for_sampling_once():
    work = cost.prefill(MODEL, ASKED, Setup(ALONE))
    assert work.flops == 2 * 12 * 2 * LAYER + 4 * 2 * 6 * 6 * 4 * 2 * 2


def test_a_decode_step_reads_all_weights_and_the_whole_cache():
    """Of a prompt 6 columns once, of its 4 responses 3 each: keys and values of 2 heads, 2 features, 2 layers."""
    work = cost.decode_step(MODEL, ASKED, Setup(ALONE))
    weights, cache = 2 * LAYER + EMBED, 2 * (6 + 4 * 3) * 2 * 2 * 2 * 2 * 2
    assert work.flops == 2 * 8 * weights + 4 * 8 * 9 * 4 * 2 * 2
    assert work.hbm == weights * 2 + cache + 3 * 8 * 64 * 4
    apart = cost.decode_step(MODEL, ASKED._replace(rows=8, copies=1), Setup(ALONE))
    assert (apart.flops, apart.hbm - work.hbm) == (work.flops, 6 * 6 * 2 * 2 * 2 * 2 * 2)  # 6 prompts more


def test_rows_are_chosen_from_once_by_the_devices_that_share_them():
    """8 rows of 64 logits: 4 each on 2 devices, which trade a half of them; one row that they share is read by both."""
    two, one_row = Setup({**ALONE, "tensor": 2}), ASKED._replace(rows=1, copies=1)
    assert cost.chosen_from(MODEL, ASKED, two.decoding()) == 4 * 64 * 4
    assert cost.chosen_from(MODEL, one_row, two.decoding()) == 64 * 4
    sums = 2 * 2 * 8 * 8 * 2 * 2 * 1 / 2  # 2 a layer, of 8 tokens x 8 features in bfloat16, each sent twice by halves
    assert cost.decode_step(MODEL, ASKED, two).ici == sums + 4 * 64 * 4 / 2


def test_decoding_in_int8_reads_a_byte_a_number():
    """And a scale of 4 bytes for the 2 features of each key and value; its weights are gathered so too."""
    setup = Setup({**ALONE, "fsdp": 4})
    for what, weight, number in [(("weights",), 1, 2), (("cache",), 2, 3), (("weights", "cache"), 1, 3)]:
        work = cost.decode_step(MODEL, ASKED, Setup(ALONE, int8=what))
        assert work.hbm == (2 * LAYER + EMBED) * weight + (6 + 4 * 3) * 2 * 2 * 2 * 2 * 2 * number + 3 * 8 * 64 * 4
        wide, narrow = (cost.gather_for_decoding(MODEL, one).ici for one in (setup, setup._replace(int8=what)))
        assert narrow == wide * weight / 2


def test_linear_layers_and_their_states():
    """Three linear layers to one of attention: twice the tokens are twice the keys and values of one layer, and the
    same states; a token sampled reads them and writes them, and multiplies three times with each."""
    net = resolve(
        ModelConfig(
            "qwen3_5_text",
            vocab_size=64,
            hidden_size=16,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            linear_key_heads=2,
            linear_value_heads=4,
            linear_key_dim=8,
        )
    )
    setup, long = Setup({"data": 1, "fsdp": 1, "tensor": 1}), ASKED._replace(read=2 * ASKED.read)
    keys = 2 * 2 * 4 * setup.compute  # of a token: key and value, heads, features
    state, tail = 4 * 8 * 8 * 4, 3 * (2 * 2 * 8 + 4 * 8) * setup.compute
    count = ASKED.rows * ASKED.copies
    held = [cost.cache_bytes(net, one, setup) for one in (ASKED, long)]
    assert held[1] - held[0] == count * ASKED.read * keys
    assert held[0] == (ASKED.rows * ASKED.columns + count * ASKED.read) * keys + count * 3 * (state + tail)
    split = setup._replace(mesh={"data": 1, "fsdp": 1, "tensor": 2})
    assert cost.cache_bytes(net, ASKED, split) == held[0] / 2
    weights = sum(weight.size for weight in weights_of.matrices(net, "lm", 1))
    pairs = count * (ASKED.columns + ASKED.read) * 4
    flops = 2 * count * weights + 4 * pairs * 4 + 6 * count * 3 * state / 4
    assert cost.decode_step(net, ASKED, setup).flops == flops
    whole, none = cost.layers_forward(net, "lm", TEXTS, setup), cost.delta_rule(resolve(ModelConfig()), TEXTS, setup)
    assert none == DeviceWork()
    assert whole.flops == 2 * 15 * (weights - 64 * 16) + 4 * 3 * 25 * 4 * 4 + cost.delta_rule(net, TEXTS, setup).flops


def test_layers_of_other_heads_that_share_keys_and_have_embeddings():
    """Of local layers 2 features a head, of global ones 6; the last two read the caches of the first two."""
    model = resolve(
        ModelConfig(
            "gemma4_text",
            vocab_size=64,
            hidden_size=8,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            mlp_size=16,
            layer_types=("local", "global") * 2,
            sliding_window=4,
            global_head_dim=6,
            global_kv_heads=1,
            keys_are_values=True,
            shared_kv_layers=2,
            wide_shared_mlp=True,
            per_layer_size=4,
        )
    )
    setup = Setup(ALONE)
    attention = 8 * 2 * (4 + 4) * 2 + 8 * 2 * (2 + 2) + 8 * 6 * (4 + 4) * 2 + 8 * 6 * 1
    weights = attention + (1 + 1 + 2 + 2) * 3 * 8 * 16 + 4 * 3 * 8 * 4
    assert sum(weight.size for weight in weights_of.matrices(model, "lm", 1)) == weights + EMBED
    work, pairs = cost.decode_step(model, ASKED, setup), 8 * 9
    assert work.flops == 2 * 8 * (weights + EMBED) + 4 * pairs * 4 * 2 * (2 + 6)
    held = cost.cache_bytes(model, ASKED, setup)
    assert held == (12 + 8 * 3) * 2 * (2 * 2 + 1 * 6) * 2
    assert work.hbm == (weights + EMBED) * 2 + 2 * held + 3 * 8 * 64 * 4
    quantised = cost.cache_bytes(model, ASKED, Setup(ALONE, int8=("cache",)))
    assert quantised == (12 + 8 * 3) * 2 * (2 * 2 * (1 + 4 / 2) + 6 * (1 + 4 / 6))
    four = Setup(
        {**ALONE, "fsdp": 4}
    )  # which do not gather the tables of layers, but send what 9 tokens each find there
    tables, every = 4 * 64 * 4, weights_of.held(model, "lm", 1)
    once = cost.forward(model, "lm", TEXTS._replace(rows=4, columns=9), four).ici
    assert once == 0.75 * (every - tables) * 2 + 9 * 4 * 4 * 2 * 3
    assert cost.gather_for_decoding(model, four).ici == 0.75 * every * 2


def test_fsdp_gathers_weights_and_scatters_gradients():
    """4 devices: each receives three quarters of every weight in bfloat16 forward, as much of the gradients backward,
    and the weights once more, since no pass keeps them for the next."""
    setup, four = Setup({**ALONE, "fsdp": 4}), TEXTS._replace(rows=4)
    forward, backward = (f(MODEL, "lm", four, setup) for f in (cost.forward, cost.backward))
    assert forward.ici == ALL * 2 * 3 / 4
    assert backward.ici == ALL * 2 * 3 / 4
    again = {remat: cost.recomputed(MODEL, "lm", four, setup._replace(remat=remat)).ici for remat in REMATS}
    assert again == dict.fromkeys(REMATS, forward.ici)
    assert forward.flops == cost.forward(MODEL, "lm", TEXTS._replace(rows=1), Setup(ALONE)).flops
    summed = setup._replace(sums=True)  # along three axes of a torus: whole weights, twice
    for part in (cost.forward, cost.backward, cost.recomputed):
        assert part(MODEL, "lm", four, summed).ici == 2 * part(MODEL, "lm", four, setup).ici
    assert cost.gather_for_decoding(MODEL, summed).ici == 2 * cost.gather_for_decoding(MODEL, setup).ici


def test_gradients_are_summed_within_a_slice_before_they_go_between_slices():
    """2 slices of data 2 x fsdp 4: within one, halves of a device's quarter twice, and scattered parts; of what is
    left, an eighth of the gradients in bfloat16, half goes each way."""
    setup = Setup({**ALONE, "fsdp": 4, "data": 2, "slice": 2})
    backward, between = (f(MODEL, "lm", TEXTS._replace(rows=16), setup) for f in (cost.backward, cost.between_slices))
    assert backward.ici == ALL * 2 * 3 / 4 + 2 * ALL * 2 / 4 / 2 and backward.dcn == 0
    assert between == DeviceWork(dcn=2 * ALL * 2 / 8 / 2)
    assert not any(cost.between_slices(MODEL, "lm", TEXTS, Setup({**ALONE, "fsdp": 4, "data": 2})))


def test_tensor_splits_products_and_sums_activations():
    """Heads, mlp and vocabulary in halves; two sums a layer of 15 tokens x 8 features, each sent twice by halves."""
    setup = Setup({**ALONE, "tensor": 2})
    work = cost.forward(MODEL, "lm", TEXTS, setup)
    assert work.flops == cost.forward(MODEL, "lm", TEXTS, Setup(ALONE)).flops / 2
    assert work.ici == 2 * 2 * 15 * 8 * 2 * 2 * 1 / 2


def test_heads_that_tensor_does_not_divide():
    one = resolve(dataclasses.replace(MODEL, num_heads=4, num_kv_heads=1))
    assert cost.heads_here(one, 2) == (2, 2)  # the one key-value head is repeated for each of 4, of which 2 are here
    assert cost.heads_here(resolve(dataclasses.replace(MODEL, num_heads=3, num_kv_heads=3, head_dim=4)), 2) == (3, 3)


def test_adam_reads_and_writes_weights_gradient_and_moments():
    assert cost.optimizer(MODEL, "lm", 8, Setup(ALONE)).hbm == ALL * 2 * (4 + 4 + 8)
    assert cost.optimizer(MODEL, "lm", 6, Setup(ALONE, params=2)).hbm == ALL * 2 * (4 + 4 + 6)


def test_newton_schulz_by_hand():
    """Two matrices of 3 x 5, one a device of two: 4 m^2 n + 2 m^3 a step; of three layers each has two, one padded."""
    leaf = lambda layers: Leaf((layers, 3, 5), ("layers", "embed", "mlp"), 1.0)
    two, three = {"layers": {"up": {"kernel": leaf(2)}}}, {"layers": {"up": {"kernel": leaf(3)}}}
    step, mesh = 4 * 9 * 5 + 2 * 27, {"data": 2, "fsdp": 1, "tensor": 1}
    assert newton_schulz_work(two, 5, ALONE, 1, 1)[0] == 2 * 5 * step
    assert newton_schulz_work(two, 5, mesh, 1, 1)[0] == 5 * step
    assert newton_schulz_work(three, 5, mesh, 1, 1)[0] == 2 * 5 * step
    assert newton_schulz_work(two, 5, ALONE, 1, 1)[2] == 0
    assert newton_schulz_work(two, 5, mesh, 1, 1)[2] == 30 * 4 / 2  # gathered
    assert (
        newton_schulz_work(two, 5, {"data": 1, "fsdp": 2, "tensor": 2}, 2, 2)[2] == 30 / 2 * 4 * 2
    )  # tensor divides no 5
    expert = {"layers": {"up": {"kernel": Leaf((2, 4, 5, 3), ("layers", "expert", "embed_of_expert", "mlp"), 1.0)}}}
    assert newton_schulz_work(expert, 1, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}, 4, 1)[0] == 1 * 2 * step
    setup = Setup(ALONE, moments={"policy": 8}, newton_schulz={"policy": 5})
    rows = {phase.name: phase.work for phase in phases(Passes([], [], [], 1, 1), {"policy": (MODEL, "lm")}, setup)}
    assert rows["update policy: Newton-Schulz"].flops > 0 and "update policy: Adam" not in rows


@pytest.mark.parametrize("remat, layers", [("none", 0), ("full", 1), ("dots", None)])
def test_recomputation(remat, layers):
    setup = Setup(ALONE, remat=remat)
    head, attention = 2 * 6 * EMBED, 2 * 3 * 4 * 25 * 4 * 2
    expected = head + (attention if layers is None else layers * (2 * 15 * 2 * LAYER + attention))
    assert cost.recomputed(MODEL, "lm", TEXTS, setup).flops == expected


def test_the_roofline_is_the_slowest_of_three():
    chip = CHIPS["v5e"]
    work = DeviceWork(flops=chip.flops, hbm=3 * chip.bandwidth, ici=2 * chip.ici)
    assert timed(Phase("x", work, 0), chip)[1:] == (3.0, "HBM")
    assert timed(Phase("x", work._replace(ici=4 * chip.ici), 0), chip)[1:] == (4.0, "network")
    assert timed(Phase("x", DeviceWork(dcn=3.125e9), 0), chip)[1:] == (1.0, "between slices")  # of v5e: 25 Gbit/s
    assert timed(Phase("x", DeviceWork(chip.flops), 0), chip, devices_per_chip=2)[1:] == (2.0, "compute")


# ---- an iteration ---------------------------------------------------------------------------------------------------

PPO = """
run_dir: nowhere
iterations: 1
algorithm: {name: ppo, num_epochs: 2, num_minibatches: 2}
models:
  policy: {architecture: {vocab_size: 64, hidden_size: 8, num_layers: 2, num_heads: 4, num_kv_heads: 2, mlp_size: 16}}
  reward: {init_from: policy}
tokenizer: {init_from: somewhere}
data: {prompts: {path: p.jsonl}, prompt_buckets: [4, 6]}
batch: {prompts_per_step: 16, micro_batch_size: 4}
generate: {max_new_tokens: 3}
"""


def config(text: str = PPO, **changes) -> Config:
    import yaml

    return dataclasses.replace(parse(yaml.safe_load(text), "test"), **changes)


def passes(cfg: Config) -> Passes:
    drawn, _ = blueprint(resolve_config(cfg), make_mesh(cfg.mesh, jax.devices()[:1]), {})
    return passes_of(drawn, list(batch_shapes(drawn.resolved, drawn.mesh))[-1])


def test_what_ppo_asks_of_its_networks():
    found = passes(config())
    assert found.rollout == [PlannedPass("policy", "sample", 16, 6, 3)]
    assert set(found.prepare) == {
        PlannedPass("reward", "scores", 16, 9, 4, prompt=6),
        PlannedPass("reference", "token_stats", 16, 9, 3, prompt=6),
        PlannedPass("value", "values", 16, 9, 3, prompt=6),
    }
    assert sorted(found.micro) == [
        PlannedPass("policy", "token_stats", 4, 9, 3, prompt=6),
        PlannedPass("value", "values", 4, 9, 3, prompt=6),
    ]
    assert (found.updates, found.micros) == (4, 2)


def test_the_samples_of_a_prompt_stay_together():
    """16 prompts x 4 samples: all passes are over whole groups, a micro-batch over one."""
    cfg = config()
    found = passes(dataclasses.replace(cfg, batch=dataclasses.replace(cfg.batch, samples_per_prompt=4)))
    assert found.rollout == [PlannedPass("policy", "sample", 16, 6, 3, copies=4)]
    assert PlannedPass("reference", "token_stats", 64, 9, 3, copies=4, prompt=6) in found.prepare
    assert PlannedPass("policy", "token_stats", 4, 9, 3, copies=4, prompt=6) in found.micro
    assert (found.updates, found.micros) == (4, 8)


def test_what_recomputing_old_log_probs_adds():
    cfg = config()
    again = passes(dataclasses.replace(cfg, algorithm=dataclasses.replace(cfg.algorithm, old_logprobs="recompute")))
    assert set(again.prepare) - set(passes(cfg).prepare) == {PlannedPass("policy", "token_stats", 16, 9, 3, prompt=6)}


def test_a_shared_trunk_is_computed_once():
    """What old values are read off is a pass of its own; in an update policy and value are one, and the head is all
    that is beside it."""
    cfg = config(PPO.replace("  reward:", "  value: {share_trunk: true}\n  reward:"))
    found, old = passes(cfg), PlannedPass("value", "head", 16, 0, 3)
    assert set(found.prepare) - {old} == {
        PlannedPass("reward", "scores", 16, 9, 4, prompt=6),
        PlannedPass("reference", "token_stats", 16, 9, 3, prompt=6),
        PlannedPass("policy", "states", 16, 9, 0, prompt=6),
    }
    assert sorted(found.micro) == [
        PlannedPass("policy", "token_stats", 4, 9, 3, prompt=6),
        PlannedPass("value", "head", 4, 0, 3),
    ]
    head = cost.forward(MODEL, "bare", old, Setup(ALONE))
    assert head.flops == 2 * 16 * 3 * MODEL.hidden_size
    again = dataclasses.replace(cfg, algorithm=dataclasses.replace(cfg.algorithm, old_logprobs="recompute"))
    assert PlannedPass("policy", "token_stats", 16, 9, 3, prompt=6) in passes(again).prepare
    assert not any(one.kind == "states" for one in passes(again).prepare)


@pytest.mark.parametrize("reward", [False, True])
def test_a_teacher_is_read_forward_in_each_update(reward):
    """With a reward the policy's log-probs are read off the pass that its distribution is compared in."""
    text = PPO.replace("ppo, num_epochs: 2, num_minibatches: 2", f"distill, reward_coef: {int(reward)}")
    roles = "teacher: {init_from: policy}" + "\n  reward: {init_from: policy}" * reward
    text = text.replace("reward: {init_from: policy}", roles)
    text = text.replace("micro_batch_size: 4", "micro_batch_size: 4, samples_per_prompt: 2")
    found = passes(config(text))
    read = {"rows": 4, "columns": 9, "read": 3, "copies": 2, "prompt": 6}
    both = [PlannedPass(role, "divergence", **read) for role in ("policy", "teacher")]
    assert found.micro == [*both, *([PlannedPass("policy", "head", 4, 0, 3)] if reward else [])]
    assert [one.role for one in found.prepare] == (["reward"] if reward else [])
    models: Models = {"policy": (MODEL, "lm"), "teacher": (MODEL, "lm"), "reward": (MODEL, "scalar")}
    rows = {phase.name: phase.work for phase in phases(found, models, Setup(ALONE, moments={"policy": 8}))}
    parts = found.updates * found.micros
    assert rows["update teacher: forward"].flops == parts * cost.forward(MODEL, "lm", both[1], Setup(ALONE)).flops
    assert rows["update teacher: recomputed"].flops == parts * 2 * 4 * 3 * EMBED, "its logits alone"
    assert not any(name.startswith("update teacher: b") for name in rows) and "update policy: backward" in rows


def test_a_reward_function_takes_the_reward_model_s_place():
    text = PPO.replace("  reward: {init_from: policy}\n", "")
    cfg = config(text + 'rewards: {function: "jaxrlhf.rewards.math_answer:strict"}\n')
    found = passes(cfg)
    assert {one.role for one in found.prepare} == {"reference", "value"}


def test_pairs_are_two_rows_each():
    text = PPO.replace("ppo, num_epochs: 2, num_minibatches: 2", "dpo").replace("prompts: {path", "preferences: {path")
    batch = "preferences_per_step: 8, micro_batch_size: 8"
    found = passes(config(text.replace("prompts_per_step: 16, micro_batch_size: 4", batch)))
    assert found.rollout == [] and found.updates == found.micros == 1
    assert found.prepare == [PlannedPass("reference", "token_stats", 16, 512, 511)]
    assert found.micro == [PlannedPass("policy", "token_stats", 16, 512, 511)]


def test_phases_add_up():
    """Epochs x minibatches x micro-batches times each pass of the update; what is recomputed is not useful."""
    found, setup = passes(config()), Setup(ALONE, moments={"policy": 8, "value": 8}, remat="full")
    heads: dict[str, Head] = {"policy": "lm", "reference": "lm", "value": "scalar", "reward": "scalar"}
    models: Models = {role: (MODEL, head) for role, head in heads.items()}
    rows = {phase.name: phase for phase in phases(found, models, setup)}
    policy, value = sorted(found.micro)
    assert rows["update policy: forward"].work.flops == 8 * cost.forward(MODEL, "lm", policy, setup).flops
    assert rows["update value: backward"].work.flops == 16 * cost.forward(MODEL, "scalar", value, setup).flops
    assert rows["decode 3 tokens"].work == cost.decode_step(MODEL, found.rollout[0], setup).times(3)
    assert rows["update policy: recomputed"].useful == 0 < rows["update policy: recomputed"].work.flops
    assert rows["update policy: Adam"].work.hbm == 4 * ALL * 2 * 16
    assert "update reward: forward" not in rows and rows["scores of reward"].useful > 0


# ---- against what is published --------------------------------------------------------------------------------------


def test_published_steps_are_slower_than_the_bound_and_not_by_much():
    assert {step.topology.split("-")[0] for step in STEPS} == {"v5e", "v5p", "v6e"}
    for row in calibrate():
        assert 0.55 < row.ratio < 0.95, row
    low, high = reached()
    assert low == min(row.ratio for row in calibrate()) < high


def test_a_published_step_by_hand():
    """MaxText 32B on v5e-256: full remat does 4/3 of the useful work, so a compute-bound step reaches 75% at most."""
    row = next(row for row in calibrate() if row.step.name == "MaxText 32B" and row.step.topology == "v5e-256")
    assert row.predicted == pytest.approx(0.75, abs=0.005)
    assert row.ratio == pytest.approx(0.669 / 0.75, abs=0.01)


def test_published_decoding_by_hand():
    """Qwen3 8B on 4 chips of v6e, 64 rows of 1024 + 512 tokens: weights without embeddings, and cache."""
    row = calibrate_decoding()[0]
    layer = 4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 12288
    weights = 2 * (36 * layer + 151936 * 4096) / 4
    cache = 2 * 36 * 2 * 8 / 4 * 128 * 64 * (1024 + 512)
    assert row.predicted == pytest.approx((weights + cache) / 1638e9, rel=0.02)
    assert all(0.35 < row.ratio < 0.55 for row in calibrate_decoding())


# ---- experts --------------------------------------------------------------------------------------------------------

# a layer: attention as MODEL's, a router 8x4, and 4 experts of 3 maps 8x16, of which a token is computed by 2
MOE = resolve(ModelConfig("qwen3_moe", 64, 8, 2, 4, 2, head_dim=2, mlp_size=16, num_experts=4, experts_per_token=2))
ATTENTION, ROUTER, EXPERT = 64 + 2 * 32 + 64, 8 * 4, 3 * 8 * 16


def test_flops_of_experts_are_those_of_the_chosen_ones():
    work = cost.forward(MOE, "lm", TEXTS, Setup(ALONE))
    assert work.flops == 2 * 15 * 2 * (ATTENTION + ROUTER + 2 * EXPERT) + 2 * 3 * 4 * 25 * 4 * 2 + 2 * 6 * EMBED
    every = weights_of.held(MOE, "lm", 1)
    assert every == 2 * (ATTENTION + ROUTER + 4 * EXPERT + 2 * 8 + 2 * 2) + 8 + EMBED
    assert weights_of.active(MOE, "lm") == every - 2 * 2 * EXPERT


def test_experts_of_gpt_oss():
    """The parameters that its model card counts: 20.91 and 116.83 billion, of which 3.61 and 5.13 compute a token, but
    for the embeddings (arXiv:2508.10925, table 1)."""
    for name, every, some in (("20b", 20.91, 3.61), ("120b", 116.83, 5.13)):
        shape = published(f"openai/gpt-oss-{name}")
        assert shape is not None
        unread = shape.vocab_size * shape.hidden_size
        found = weights_of.held(shape, "lm", 1), weights_of.active(shape, "lm") - unread
        assert [round(size / 1e9, 2) for size in found] == [every, some]
    assert shape is not None and "4 of 128 experts" in counted_experts(shape)


def test_columns_split_over_devices():
    """Over 2 devices: half of the tokens and of the weights that are stored; keys and values come from the other one,
    forward and for the backward pass, and their gradients go there."""
    alone, split = Setup(ALONE, remat="dots"), Setup({**ALONE, "context": 2}, remat="dots")
    assert (split.shards, split.decoding().shards, split.decoding().context) == (2, 2, 1)
    assert cost.forward(MODEL, "lm", TEXTS, split).flops == cost.forward(MODEL, "lm", TEXTS, alone).flops / 2
    keys = 7.5 * 2 * 2 * 4 * 2  # tokens of the other device, layers, keys and values, 2 heads of 2, bytes
    weights = ALL / 2 * 2
    assert cost.forward(MODEL, "lm", TEXTS, split).ici == weights + keys
    assert cost.recomputed(MODEL, "lm", TEXTS, split).ici == weights + keys
    assert cost.backward(MODEL, "lm", TEXTS, split).ici == weights + keys
    assert cost.recomputed(MODEL, "lm", TEXTS, split._replace(remat="full")).ici == weights + keys
    assert cost.gather_for_decoding(MODEL, split).ici == weights


def test_experts_split_over_devices():
    """Over 2 devices: half of the experts, never gathered; the rest as over fsdp. Tokens are gathered, and results
    scattered back."""
    setup = Setup({**ALONE, "expert": 2})
    assert setup.shards == 2 and cost.forward(MOE, "lm", TEXTS, setup).flops == (
        cost.forward(MOE, "lm", TEXTS, Setup(ALONE)).flops / 2
    )
    dense = weights_of.held(MOE, "lm", 1) - 2 * 4 * EXPERT
    tokens = 7.5 * 2 * 8 * 2 * 2  # layers, features, bytes, there and back
    assert cost.forward(MOE, "lm", TEXTS, setup).ici == dense / 2 * 2 + tokens
    assert cost.used_and_stored(MOE, "lm", setup) == (dense + 2 * 2 * EXPERT, weights_of.held(MOE, "lm", 1) / 2)


def test_decoding_reads_the_experts_that_its_tokens_choose():
    """One token: 2 of 4; three tokens: all but those that none of them chose, a share of 1/2 to the third."""
    read = lambda tokens, expert=1: sum(
        cost.read_of(weight, MOE, tokens, Setup({**ALONE, "expert": expert}))
        for weight in weights_of.matrices(MOE, "lm", 1)
    )
    rest = 2 * (ATTENTION + ROUTER) + EMBED
    assert read(1) == rest + 2 * 2 * EXPERT and read(3) == rest + 2 * 4 * EXPERT * 7 / 8
    assert read(1, expert=2) == rest + 2 * 2 * EXPERT * 3 / 4
