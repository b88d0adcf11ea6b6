"""Distillation: losses against loops over full distributions of two real models, rewards and shares against loops, what
changes nothing, and policies that become their teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import distill, distill_data
from jaxrlhf.algorithms.distill import Demonstrated, DistillConfig
from jaxrlhf.algorithms.distill_data import DistillDataConfig
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.nets import make_nets, segments
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Ask, Batch, Divergence, DivergenceStats, Experience, Rows, TokenStats, Trees
from tests.algorithms.test_sft import packed, rows_of
from tests.ops.test_divergence import by_loop
from tests.support import enumerated, fake, tiny

# wider and deeper than the policy, with an untied head, and with fewer kv heads
LARGE = resolve(
    ModelConfig(
        vocab_size=64, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=1, mlp_size=40, tie_embeddings=False
    )
)
ASK = Ask("policy", "divergence", "teacher")
ALONE = [[0], [1], [2], [3], [4]]  # one document a row


@pytest.fixture(scope="module")
def run() -> tiny.Tiny:
    return tiny.build("distill_data", DistillDataConfig(), batch=Batch(sequences=packed()), teacher=LARGE)


def logits_of(params, shape: ModelConfig, rows) -> np.ndarray:
    """Column t is of the token after t."""

    def compute(params):
        return lm_logits(params, shape, forward(params, shape, rows.tokens, segments(rows), Runtime()))

    return np.asarray(tiny.program(compute)(params))


def loss_and_gradient(run: tiny.Tiny, rows, cfg: DistillDataConfig):
    def total(params):
        losses, _ = distill_data.loss(run.recipe.nets, Trees(params, run.state.slow), Experience(responses=rows), cfg)
        return losses["policy"].total, losses["policy"].count

    return tiny.program(jax.value_and_grad(total, has_aux=True))(run.state.params)


# ---- the divergence of two models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [Divergence("forward_kl"), Divergence("jsd", 0.3, top_k=5, temperature=2.0)], ids=lambda how: how.kind
)
def test_the_loss_is_a_loop_over_the_distributions_of_both_models(run, how):
    """From the models' own logits: column t - 1 is about token t."""
    rows = rows_of(ALONE)
    ours = logits_of(run.state.params["policy"], tiny.MODEL, rows)
    theirs = logits_of(run.state.slow["teacher"], LARGE, rows)
    where = list(zip(*np.nonzero(np.asarray(rows.response_mask))))
    expected = [by_loop(ours[row, t - 1], theirs[row, t - 1], how) for row, t in where]
    fields = {"divergence": how.kind, "beta": how.beta, "top_k": how.top_k, "temperature": how.temperature}
    (total, count), _ = loss_and_gradient(run, rows, DistillDataConfig(**fields))
    assert count == len(where) == 20 and min(expected) > 1e-4
    np.testing.assert_allclose(total, sum(expected), rtol=1e-4)


def test_packing_changes_nothing(run):
    (alone, count), gradient = loss_and_gradient(run, rows_of(ALONE), DistillDataConfig())
    (together, packed_count), packed_gradient = loss_and_gradient(run, packed(), DistillDataConfig())
    assert packed_count == count
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), packed_gradient, gradient)


def nets_of(stored: int, monkeypatch, teacher: ModelConfig = LARGE):
    """Networks of a policy and a teacher that hold so many floats of logits."""
    monkeypatch.setattr("jaxrlhf.models.nets.stored_logits", lambda platform: stored)
    return make_nets({"policy": tiny.MODEL, "teacher": teacher}, Runtime(), Sampling(), fake.no_sample)


def test_chunks_change_nothing(run, monkeypatch):
    """Also with responses behind left-padded prompts."""
    rows = tiny.sequences(rows=6)
    mask = rows.response_mask

    def read(nets):
        def mean(params):
            (stats,) = nets.read(Trees(params, run.state.slow), rows, ASK)
            return jnp.where(mask, stats.divergence, 0).sum(), stats

        return tiny.program(jax.value_and_grad(mean, has_aux=True))(run.state.params)

    ((whole, stats), gradient), ((chunked, _), chunked_gradient) = (
        read(nets_of(stored, monkeypatch)) for stored in (10**9, 1000)
    )
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked_gradient, gradient)
    assert isinstance(stats, DivergenceStats) and stats.divergence.shape == mask.shape
    assert (stats.divergence[:, : rows.response_start] == 0).all(), "columns of the prompts are 0"


def test_a_teacher_with_more_rows_of_vocabulary_is_compared_on_those_of_both(run, monkeypatch):
    """Models of one tokenizer pad their vocabularies differently; both are renormalised over what both have."""
    wide = dataclasses.replace(LARGE, vocab_size=150)
    params, rows = tiny.parameters(wide, "lm", 9), tiny.sequences(rows=4)
    narrow = dict(params)
    for name, cut in (("embed", lambda x: x[:64]), ("head", lambda x: x[:, :64])):
        narrow[name] = jax.tree.map(cut, params[name])
    read = lambda nets, teacher: tiny.program(
        lambda policy: nets.read(Trees({"policy": policy}, {"teacher": teacher}), rows, ASK)
    )(run.state.params["policy"])
    found = read(nets_of(10**9, monkeypatch, wide), params)
    expected = read(nets_of(10**9, monkeypatch), narrow)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_the_policy_as_its_own_teacher_has_nothing_to_learn():
    run = tiny.build("distill_data", DistillDataConfig("jsd"), batch=Batch(sequences=packed()))
    same = run._replace(state=run.state.replace(slow={"teacher": run.state.params["policy"]}))
    (total, _), gradient = loss_and_gradient(same, packed(), DistillDataConfig("jsd"))
    assert abs(float(total)) < 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5


# ---- rewards and shares ---------------------------------------------------------------------------------------------

# each role's parameters hold its answers; the teacher's log-probs are in the case's reference
ANSWERS = fake.answering(
    token_stats=lambda params, rows: TokenStats(params["logprobs"], params["entropy"]),
    scores=lambda params, rows: params["scores"],
    divergence=lambda params, rows: DivergenceStats(
        params["divergence"], params["entropy"], params["entropy"], jnp.ones(rows.tokens.shape)
    ),
)
GROUP = 3


def case_of(cfg: DistillConfig, junk: float = 0.0, **fields):
    """(the case, what each token diverges, state, experience, metrics) of two prompts with three responses each."""
    case = fake.make_case(5, junk)
    apart = np.where(case.mask, np.random.default_rng(1).random(case.mask.shape), junk).astype(np.float32)
    params = {"policy": {**case.params()["policy"], "divergence": jnp.array(apart)}}
    slow = {"teacher": case.slow()["reference"], "reward": case.slow()["reward"]}
    state = case.state(0.0).replace(params=params, slow=slow)
    batch = Batch(prompts=fake.prompts_of(2), sequences=case.sequences(), **fields)
    return case, apart, state, *distill.prepare(ANSWERS, state, batch, cfg)


def expected_loss(case: fake.Case, apart: np.ndarray, cfg: DistillConfig) -> float:
    """A token at a time, in float64."""
    earned = np.zeros(len(case.mask))
    for group in np.arange(len(case.mask)).reshape(-1, GROUP):
        real = [row for row in group if case.mask[row].any()]
        scores = case.scores[real].astype(np.float64)
        earned[real] = (scores - scores.mean()) / (scores.std(ddof=1) + cfg.std_eps)
    total, tokens = 0.0, list(zip(*np.nonzero(case.mask)))
    for row, t in tokens:
        advantage = cfg.reward_coef * earned[row]
        if cfg.divergence_in == "rewards":
            advantage -= cfg.divergence_coef * float(case.sampled[row, t] - case.reference[row, t])
        ratio = np.exp(float(case.policy[row, t] - case.sampled[row, t]))
        clipped = np.clip(ratio, 1 - cfg.clip_range_low, 1 + cfg.clip_range_high)
        total -= min(advantage * ratio, advantage * clipped)
        if cfg.divergence_in == "loss":
            total += cfg.divergence_coef * float(apart[row, t])
    return total / len(tokens)


@pytest.mark.parametrize(
    "cfg",
    [
        DistillConfig(divergence_coef=0.7),
        DistillConfig(divergence_coef=0.7, reward_coef=0.5),
        DistillConfig(divergence_coef=0.7, divergence_in="rewards"),
        DistillConfig(divergence_coef=0.7, divergence_in="rewards", reward_coef=0.5, clip_range_high=0.1),
    ],
    ids=lambda cfg: f"{cfg.divergence_in}-{cfg.reward_coef}",
)
def test_the_loss_is_a_loop(cfg):
    case, apart, state, experience, metrics = case_of(cfg)
    losses, more = distill.loss(ANSWERS, state.trees, experience, cfg)
    np.testing.assert_allclose(losses["policy"].value(), expected_loss(case, apart, cfg), rtol=1e-5)
    assert ("score/mean" in metrics) == (cfg.reward_coef > 0) == ("group/zero_variance" in metrics)
    if cfg.divergence_in == "rewards":
        rows = [row for row in range(len(case.mask)) if case.mask[row].any()]
        apart = np.where(case.mask, case.sampled - case.reference, 0).sum(1)[rows].mean()
        np.testing.assert_allclose(metrics["kl/teacher"].value(), apart, rtol=1e-5)
    else:
        np.testing.assert_allclose(more["teacher/divergence"].value(), apart[case.mask].mean(), rtol=1e-5)


@pytest.mark.parametrize("where", ["loss", "rewards"])
def test_junk_outside_the_responses_changes_nothing(where):
    cfg, found = DistillConfig(divergence_in=where, reward_coef=0.5), []
    for junk in (0.0, np.nan):
        _, _, state, experience, _ = case_of(cfg, junk)

        def total(params, state=state, experience=experience):
            return distill.loss(ANSWERS, Trees(params, state.slow), experience, cfg)[0]["policy"].total

        found.append(jax.grad(total)(state.params)["policy"])
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_scores_that_do_not_count_are_told():
    """Functions on the host may score what only the teacher teaches."""
    case = fake.make_case(5)
    _, _, state, *_ = case_of(DistillConfig())
    sequences = case.sequences(scores=jnp.array(case.scores).at[0].set(jnp.nan))
    batch = Batch(prompts=fake.prompts_of(2), sequences=sequences)
    experience, metrics = distill.prepare(ANSWERS, state, batch, DistillConfig())
    np.testing.assert_allclose(metrics["score/mean"].value(), case.scores[[1, 3, 4, 5]].mean(), rtol=1e-5)
    assert experience.responses.response_mask[0].any(), "it is still learned from"
    experience, _ = distill.prepare(ANSWERS, state, batch, DistillConfig(reward_coef=1.0))
    assert not experience.responses.response_mask[0].any()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_shares_are_those_of_two_means(aggregation):
    cfg = DistillConfig(on_policy_share=0.3, aggregation=aggregation)
    data = tiny.sequences(rows=4, seed=3)
    case, apart, state, experience, _ = case_of(cfg, demonstrations=data)
    assert isinstance(experience.data, Rows) and isinstance(experience.data.data, Demonstrated)
    of_data = np.random.default_rng(2).random(data.tokens.shape).astype(np.float32)

    def read(trees, rows, *asks):
        here = jnp.array(apart if rows.tokens.shape == case.mask.shape else of_data)
        return tuple(DivergenceStats(here, here, here, jnp.ones(here.shape)) for _ in asks)

    losses, metrics = distill.loss(ANSWERS._replace(read=read), state.trees, experience, cfg)

    def mean(values, mask):
        if aggregation == "token-mean":
            return values[mask].mean()
        return np.mean([row[inside].mean() for row, inside in zip(values, mask) if inside.any()])

    masks = case.mask, np.asarray(data.response_mask)
    expected = 0.3 * mean(apart, masks[0]) + 0.7 * mean(of_data, masks[1])
    np.testing.assert_allclose(losses["policy"].value(), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/policy"].value(), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["teacher/divergence_data"].value(), of_data[masks[1]].mean(), rtol=1e-5)


# ---- what changes nothing -------------------------------------------------------------------------------------------


@functools.cache
def gradient_on(devices: int, num_micro: int = 1, **options):
    """(gradient, losses) of responses and demonstrations, with a score: on a mesh of so many devices."""
    cfg = DistillConfig("jsd", on_policy_share=0.7, reward_coef=0.5, top_k=9)
    sequences = tiny.sequences(rows=8)
    logprobs = jnp.where(sequences.response_mask, -4.0, 0.0)
    scores = jnp.arange(8.0)
    rows = Batch(
        prompts=tiny.prompts(rows=4),
        sequences=sequences.replace(logprobs=logprobs, scores=scores),
        demonstrations=tiny.sequences(rows=8, seed=3),
    )
    rows = jax.tree.map(np.asarray, rows)
    mesh = make_mesh(MeshConfig(1, devices // 2 or 1, 2 if devices > 1 else 1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        run = tiny.build(
            "distill", cfg, batch=tiny.put(rows), teacher=LARGE, num_micro=num_micro, samples_per_prompt=2, **options
        )

        @tiny.program
        def gradient(state, batch):
            experience, _ = distill.prepare(run.recipe.nets, state, batch, cfg)
            grads, means, _ = steps.gradients(run.recipe, state, jax.lax.stop_gradient(experience))
            return grads, {name: mean.value() for name, mean in means.items()}

        return jax.device_get(gradient(run.state, run.batch))


def test_devices_change_no_divergence():
    """Rows over four of them, vocabulary and heads over two, where the teacher's vocabulary is cut to the policy's; the
    gradient too each night, below."""
    wide = dataclasses.replace(LARGE, vocab_size=150)
    rows, found = jax.tree.map(np.asarray, tiny.sequences(rows=8)), []
    for devices in (1, 8):
        mesh = make_mesh(MeshConfig(1, devices // 2 or 1, 2 if devices > 1 else 1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            run = tiny.build("distill_data", DistillDataConfig(), batch=Batch(), teacher=wide)
            read = lambda trees, rows, run=run: run.recipe.nets.read(trees, rows, ASK._replace(how=Divergence(top_k=9)))
            found.append(jax.device_get(tiny.program(read)(run.state.trees, tiny.put(rows))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
    assert found[0][0].divergence.max() > 1e-3


@pytest.mark.nightly
@pytest.mark.parametrize(("devices", "num_micro"), [(8, 1), (1, 2)])
def test_devices_and_micro_batches_change_nothing(devices, num_micro):
    (grads, numbers), (others, other_numbers) = gradient_on(1), gradient_on(devices, num_micro)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, others)
    for name, number in numbers.items():
        np.testing.assert_allclose(number, other_numbers[name], rtol=1e-5, err_msg=name)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 1e-3


@pytest.mark.nightly  # by day: adapters of other algorithms, in models/test_lora.py and test_mesh.py
def test_an_adapter_learns_from_a_teacher():
    run = tiny.build(
        "distill",
        DistillConfig(),
        batch=Batch(prompts=tiny.prompts(rows=8)),
        teacher=LARGE,
        lora=LoraConfig(rank=4, alpha=8.0),
        optimizer=dataclasses.replace(tiny.ADAM, learning_rate=1e-2),
    )
    step, state, base = tiny.program(steps.make_iteration(run.recipe)), run.state, run.state.slow["base"]
    found = []
    for _ in range(20):
        state, metrics, _ = step(state, run.batch)
        found.append(float(metrics["teacher/divergence"]))
    assert np.mean(found[-3:]) < 0.8 * found[0]
    assert tiny.equal_trees(base, state.slow["base"]) and set(state.params["policy"]) == {"layers"}


# ---- a policy that can be enumerated --------------------------------------------------------------------------------

WRITER = resolve(ModelConfig(vocab_size=4, hidden_size=24, num_layers=2, num_heads=2, mlp_size=32))


def trained(cfg: DistillConfig, iterations: int, rows: int = 64, sharper: float = 3.0):
    """(KL from the policy to the teacher before and after, nats a response, summed over all responses; metrics)."""
    made, exact = enumerated.run("distill", cfg, rows=rows, teacher=WRITER)
    sharp = lambda tree: jax.tree.map(lambda x: sharper * x if x.ndim > 1 else x, tree)
    teacher = sharp(made.state.slow["teacher"])
    state = made.state.replace(slow=made.state.slow | {"teacher": teacher})
    step = tiny.program(steps.make_iteration(made.recipe))
    theirs = exact.log_p_of(made.recipe.nets, "teacher", teacher)
    before, metrics = exact.kl(state.params["policy"], theirs), {}
    for _ in range(iterations):
        state, metrics, _ = step(state, made.batch)
    return before, exact.kl(state.params["policy"], theirs), {name: float(x) for name, x in metrics.items()}


@pytest.mark.parametrize(
    ("cfg", "most"),
    [
        (DistillConfig(), 0.01),
        *(
            pytest.param(cfg, most, marks=pytest.mark.nightly)
            for cfg, most in (
                (DistillConfig("forward_kl"), 0.01),
                (DistillConfig("jsd", 0.3), 0.01),
                (DistillConfig(top_k=2), 0.01),
                (DistillConfig(divergence_in="rewards"), 0.01),
            )
        ),
    ],
    ids=lambda value: "-".join(map(str, dataclasses.astuple(value)[:6])) if isinstance(value, DistillConfig) else "",
)
def test_the_policy_becomes_its_teacher(cfg, most):
    """The exact KL, summed over all 40 responses: the optimum of every divergence is the teacher itself."""
    before, after, metrics = trained(cfg, 100)
    print(f"\nKL to the teacher, nats a response: {before:.4f} -> {after:.5f}")
    assert before > 0.1 and after < most, (before, after)
    if cfg.divergence_in == "loss" and not cfg.top_k:
        assert (
            metrics["teacher/divergence"] < most and abs(metrics["teacher/entropy"] - metrics["policy/entropy"]) < 0.05
        )


# ---- the records ----------------------------------------------------------------------------------------------------


def test_the_records():
    record = distill.ALGORITHM
    assert record.online and not distill_data.ALGORITHM.online
    assert record.roles(DistillConfig()) == ({"policy": "lm"}, {"teacher": "lm"})
    assert record.roles(DistillConfig(reward_coef=1.0))[1] == {"teacher": "lm", "reward": "scalar"}
    assert distill_data.ALGORITHM.roles(DistillDataConfig()) == ({"policy": "lm"}, {"teacher": "lm"})
    assert record.batch(DistillConfig()) == ("prompts",)
    assert record.batch(DistillConfig(on_policy_share=0.5)) == ("prompts", "demonstrations")
    assert [record.min_samples(DistillConfig(reward_coef=coef)) for coef in (0.0, 1.0)] == [1, 2]
    assert record.updates(DistillConfig(num_epochs=2, num_minibatches=3))[:2] == (2, 3)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"beta": 0.3}, "beta: 0.3: reverse_kl has no mixture"),
        ({"tail": "drop"}, "tail: drop: top_k is 0"),
        ({"divergence_in": "rewards", "divergence": "forward_kl"}, "divergence: forward_kl: divergence_in rewards"),
        ({"divergence_in": "rewards", "top_k": 5}, "top_k: 5: divergence_in rewards"),
        ({"divergence_in": "rewards", "temperature": 2.0}, "temperature: 2: divergence_in rewards"),
        ({"advantages": "mean"}, "advantages: mean: reward_coef is 0"),
        ({"divergence_coef": 0.0}, "divergence_coef: 0: nothing would be learned"),
    ],
    ids=str,
)
def test_a_field_that_would_do_nothing_is_refused(fields, key):
    (line,) = distill.ALGORITHM.problems(DistillConfig(**fields))
    assert line.startswith(key) and "; expected" in line and "\n" not in line
    assert not [*distill.ALGORITHM.problems(DistillConfig("jsd", 0.3, top_k=5, tail="drop", reward_coef=1.0))]
