"""Over-optimisation: a learned reward keeps rising, the true one falls; what ensembles and a KL penalty change."""

import dataclasses
import functools
import json
import random
import statistics
import string
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import constant
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Above, Below, HigherThan, Holds, Rise

LETTERS = string.ascii_letters + string.digits  # by their frequency
SEEN_WELL = 14  # letters that are common; the others are typos
LONGEST = 12  # letters of a response
BEST_LENGTH = 8
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # n of best of n
PAIRS, HELD_OUT = 3000, 64
FEW = 250  # pairs of the smaller data
NARROW, WIDE = 4, 64  # features of the smallest and the largest reward models
FITTED = 5  # evaluations that a fit to the curve of a run takes at least
NOISE = 0.25  # the share of labels that are wrong
USUAL, CAREFUL = 1.1, 1.6  # exponents of Zipf's law: of what the policy writes, and of the pairs, with fewer typos


# ---- the task -------------------------------------------------------------------------------------------------------


@functools.cache
def worth(seed: int) -> dict[str, float]:
    """What a letter adds to the gold score: common ones the quantiles of a normal distribution, in an order of the
    seed's; typos less than nothing."""
    quantiles = [statistics.NormalDist().inv_cdf((at + 0.5) / SEEN_WELL) for at in range(SEEN_WELL)]
    random.Random(1000 + seed).shuffle(quantiles)
    return dict(zip(LETTERS, quantiles)) | dict.fromkeys(LETTERS[SEEN_WELL:], -1.5)


def gold_of(text: str, seed: int) -> float:
    """The mean worth of the letters times 4, less a quadratic penalty for another length than BEST_LENGTH."""
    letters = [worth(seed)[letter] for letter in text if letter in worth(seed)]
    total = sum(letters) / max(len(letters), 1) * 4
    return total - 0.05 * (len(text) - BEST_LENGTH) ** 2


def gold(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The second reward, which nothing is trained on."""
    return [gold_of(text, record["seed"]) for text, record in zip(responses, records, strict=True)]


def write(rng: random.Random, exponent: float = USUAL) -> str:
    """4 to 12 letters by Zipf's law."""
    weights = [1 / (rank + 1) ** exponent for rank in range(len(LETTERS))]
    return "".join(rng.choices(LETTERS, weights, k=rng.randint(4, LONGEST)))


def coin(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The control of a random reward: 0 or 1, by a hash of the response."""
    return [float(zlib.crc32(text.encode()) >> 16 & 1) for text in responses]


def write_data(folder: Path, seed: int, held_out: int = HELD_OUT) -> None:
    """demonstrations, prompts, held-out prompts; pairs labelled by the gold score, all, a few, and all with 25 % of the
    labels swapped; held-out pairs with right labels."""
    rng = random.Random(seed)
    prompt = lambda: {"prompt": rng.choice(LETTERS) + ":", "seed": seed}
    rows: dict[str, list[dict[str, Any]]] = {
        "demonstrations": [prompt() | {"response": write(rng)} for _ in range(8000)],
        "prompts": [prompt() for _ in range(1000)],
        "held_out": [prompt() for _ in range(held_out)],
        "clean_pairs": [pair(rng, prompt()["prompt"], seed) for _ in range(PAIRS)],
        "held_out_pairs": [pair(rng, prompt()["prompt"], seed) for _ in range(500)],
    }
    rows["pairs"] = [swapped(one) if rng.random() < NOISE else one for one in rows["clean_pairs"]]
    rows["few_pairs"] = rows["pairs"][:FEW]
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def pair(rng: random.Random, prompt: str, seed: int) -> dict[str, str]:
    """Two responses: the one with the higher gold score is chosen."""
    rejected, chosen = sorted((write(rng, CAREFUL) for _ in range(2)), key=lambda text: gold_of(text, seed))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def swapped(pair: dict[str, str]) -> dict[str, str]:
    """With the wrong label."""
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}


# ---- what is measured -----------------------------------------------------------------------------------------------

PROXIES = ("rm_narrow", "rm_few", "rm", "rm_wide", "rm_clean")  # cells of reward models
OPTIMIZED = ("single", "kl", "mean", "wco", "uwo")  # cells of GRPO
WAYS = ("single", "mean", "median", "wco", "uwo")
CURVES = (("gold", "gold/mean"), ("proxy", "score/mean"), ("kl", "kl/reference"))


def measure(done: FinishedCell) -> Measured:
    """Of a reward model: best of n by it. Of GRPO: gold, proxy and KL on held-out prompts over the run."""
    if done.cell == "sft":
        write_responses(done)
        return {"loss": done.curve("loss/policy")[-1]}
    return measure_best_of(done) if done.cell.startswith("rm") else measure_training(done)


def measure_training(done: FinishedCell) -> Measured:
    """Gold, proxy and KL from the reference at each evaluation, their last values, and what gold lost of its rise; how
    Gao's form for reinforcement learning, d (alpha - beta log d), fits to the rise of gold."""
    curves = {name: rounded(done.curve(f"eval/{metric}")) for name, metric in CURVES}
    found: Measured = {f"{name}_curve": curve for name, curve in curves.items()}
    found |= {f"{name}_end": curve[-1] for name, curve in curves.items()}
    gold = curves["gold"]
    found |= {"gold_peak": max(gold), "fall": fall(gold), "gold_gain": gold[-1] - gold[0]}
    found["proxy_gain"] = curves["proxy"][-1] - curves["proxy"][0]
    if sum(kl > 1 for kl in curves["kl"]) >= FITTED:
        found["alpha"], found["beta"] = fit_training(curves["kl"], gold)
    return found


def measure_best_of(done: FinishedCell) -> Measured:
    """Gold and proxy of the best of n, for each n of SIZES and each way to combine the members; "single" is the mean of
    what each member does alone. Gao's form for best of n, d (alpha - beta d), fitted to the gold of single members. Of
    curves those that are drawn."""
    import numpy as np

    from jaxrlhf.ops.best_of import best_of, best_of_kl

    scores, gold = scored(done)
    curve = lambda proxy, by: best_of(proxy, by, SIZES).mean(1)
    mean = scores.mean(0)
    ways = {"mean": mean, "median": np.median(scores, axis=0), "wco": scores.min(0), "uwo": mean - 0.5 * scores.var(0)}
    golds = {"single": np.mean([curve(one, gold) for one in scores], axis=0)}
    golds |= {way: curve(proxy, gold) for way, proxy in ways.items()}
    proxy = np.mean([curve(one, one) for one in scores], axis=0)
    accuracies = [done.curve(f"eval/reward/accuracy/reward_{member}")[-1] for member in range(len(scores))]
    found: Measured = {"accuracy": statistics.fmean(accuracies), "proxy_rise": float(np.diff(proxy).min())}
    for way, values in golds.items():
        found |= {f"{way}_end": float(values[-1] - values[0]), f"{way}_fall": fall(list(values))}
        found[f"{way}_peak"] = float(max(values) - values[0])
    drawn = golds | {"proxy": proxy} if done.cell == "rm" else {"single": golds["single"]}
    found |= {f"{name}_curve": rounded(values) for name, values in drawn.items()}
    distance = np.sqrt([best_of_kl(n) for n in SIZES])
    found["alpha"], found["beta"] = fitted(distance, golds["single"] - golds["single"][0], distance)
    return found


def write_responses(done: FinishedCell) -> None:
    """responses.npz in the seed's folder: SIZES[-1] responses of the supervised policy to each held-out prompt, which
    all reward models score, and their gold score."""
    import jax
    import numpy as np

    from jaxrlhf.benchmarks.reproduce import config_of
    from jaxrlhf.config.resolved import resolve_config
    from jaxrlhf.data.tokenizer import decode_rows
    from jaxrlhf.evaluate.against_reference import PolicyEvaluation
    from jaxrlhf.run.build import build
    from jaxrlhf.run.initial_state import initial_state
    from jaxrlhf.run.transfer import put
    from jaxrlhf.sharding import current

    count = len((done.folder / "data" / "held_out.jsonl").read_text().splitlines())
    policy = {"models": {"policy": {"init_from": f"{FOLDER}/sft"}}, "rewards.function": constant, "eval.gold": None}
    rows = {"batch.prompts_per_step": count * SIZES[-1], "batch.samples_per_prompt": 2, "eval.size": count}
    cell = Cell("writer", "", "grpo", policy | rows)  # all prompts in one batch
    ready = build(resolve_config(config_of(BENCHMARK, cell, done.folder, done.seed)), keep=False)
    with current(ready.mesh):
        evaluation = PolicyEvaluation(ready, judge=False, samples=SIZES[-1])
        (prompts,) = evaluation.batches
        found, _ = evaluation.program(initial_state(ready), {}, put(ready.mesh, prompts.batch).prompts)
    names = ("tokens", "valid", "response_mask")
    arrays = {name: jax.device_get(getattr(found, name))[: prompts.real * SIZES[-1]] for name in names}
    texts = decode_rows(ready.tokenizer, arrays["tokens"], arrays["response_mask"])
    np.savez(done.folder / "responses.npz", **arrays, gold=[gold_of(text, done.seed) for text in texts])


def scored(done: FinishedCell) -> tuple[Any, Any]:
    """(scores f64[members, prompts, N], gold f64[prompts, N]) of the responses of ``write_responses``."""
    import numpy as np

    from jaxrlhf.benchmarks.finished_run import member_scores
    from jaxrlhf.types import Sequences

    with np.load(done.folder / "responses.npz") as found:
        rows: Any = Sequences(found["tokens"], found["valid"], found["response_mask"])
        gold = found["gold"].reshape(-1, SIZES[-1])
    scores = member_scores(done.run_dir, rows).astype(np.float64)
    return scores.reshape(len(scores), *gold.shape), gold


def rounded(curve: Any) -> list[float]:
    return [round(float(value), 3) for value in curve]


def fall(curve: Sequence[float]) -> float:
    """How much of its rise from the start a curve has lost at its end: 0 where it ends at its peak, 1 where it is back
    at the start."""
    rise = max(curve) - curve[0]
    return float((max(curve) - curve[-1]) / rise) if rise > 0 else 0.0


def fit_training(kl: Sequence[float], gold: Sequence[float]) -> tuple[float, float]:
    """(alpha, beta) of gold's rise = d (alpha - beta log d), where d = sqrt(KL) is at least 1: it does not hold near
    0."""
    import numpy as np

    distance = np.sqrt(np.maximum(kl, 0.0))
    far = distance >= 1
    return fitted(distance[far], np.asarray(gold)[far] - gold[0], np.log(distance[far]))


def fitted(distance: Any, rises: Any, factor: Any) -> tuple[float, float]:
    """(alpha, beta) of rises = distance (alpha - beta factor), by least squares."""
    import numpy as np

    terms = np.stack([distance, -distance * factor], axis=1)
    alpha, beta = np.linalg.lstsq(terms, rises, rcond=None)[0]
    return float(alpha), float(beta)


# ---- what is shown --------------------------------------------------------------------------------------------------


def plot(figure: Any, results: Results) -> None:
    """Gold of the best of n, by how members are combined, and by data, labels and width; GRPO's gold and proxy over the
    distance from the reference. The mean over the seeds."""
    import numpy as np

    from jaxrlhf.benchmarks.figure import legend_beside, tidy

    figure.set_size_inches(9, 5)
    (ways, proxies), (gold, proxy) = figure.subplots(2, 2)
    average = lambda cell, name: np.mean(results.of(cell, name), axis=0)
    for number, way in enumerate(WAYS):
        ways.plot(SIZES, average("rm", f"{way}_curve"), color=f"C{number}", label=way)
    ways.plot(SIZES, average("rm", "proxy_curve"), "--", color="gray", label="proxy of single")
    for number, cell in enumerate(PROXIES):
        proxies.plot(SIZES, average(cell, "single_curve"), color=f"C{number}", label=cell)
    for number, cell in enumerate(OPTIMIZED):
        distance = np.sqrt(np.maximum(average(cell, "kl_curve"), 0))
        for axes, name in ((gold, "gold"), (proxy, "proxy")):
            axes.plot(distance, average(cell, f"{name}_curve"), "o-", color=f"C{number}", markersize=3, label=cell)
    for axes, title in ((ways, "members combined"), (proxies, "single members of each cell")):
        axes.set(xscale="log", xlabel="n", title=f"gold of the best of n, {title}")
    for axes, name in ((gold, "gold"), (proxy, "proxy")):
        axes.set(xlabel="sqrt(KL), nats", title=f"{name} over GRPO")
    for axes in (ways, proxies, gold, proxy):
        legend_beside(axes)
        tidy(axes)


# ---- the benchmark --------------------------------------------------------------------------------------------------


def ordered(results: Results, ends: dict[str, tuple[str, str]]) -> tuple[bool, str]:
    """Gold at the end of way -> (cell, quantity), the mean over seeds: WCO's and UWO's at least the mean's, that at
    least a single model's."""
    found = {way: results.mean(*where) for way, where in ends.items()}
    held = min(found["wco"], found["uwo"]) >= found["mean"] >= found["single"]
    return held, ", ".join(f"{way} {end:.2f}" for way, end in found.items())


ORDER = "wco and uwo >= mean >= single"
BEST_OF = {way: ("rm", f"{way}_end") for way in WAYS}
GRPO = {way: (way, "gold_end") for way in ("single", "mean", "wco", "uwo")}


def same_frontier(results: Results) -> tuple[bool, str]:
    """Where the run with a KL penalty ends, its gold less that of the run without one at the same KL: within 0.5, the
    mean over seeds."""
    import numpy as np

    gains = []
    for kl, gold, end_kl, end in zip(
        *(results.of("single", name) for name in ("kl_curve", "gold_curve")),
        *(results.of("kl", name) for name in ("kl_end", "gold_end")),
        strict=True,
    ):
        order = np.argsort(kl)
        gains.append(end - float(np.interp(end_kl, np.asarray(kl)[order], np.asarray(gold)[order])))
    return abs(statistics.fmean(gains)) <= 0.5, ", ".join(f"{gain:+.2f}" for gain in gains)


FOLDER = "runs/benchmarks/overoptimization"
RM = {"init_from": f"{FOLDER}/rm"}
NO_MODEL = {"models": {"policy": {"init_from": f"{FOLDER}/sft"}}, "iterations": 24}


def of_pairs(name: str) -> dict[str, Any]:
    return {"data.preferences.path": f"{FOLDER}/data/{name}.jsonl"}


def of_width(features: int, members: int = 2) -> dict[str, Any]:
    """Reward models of another width."""
    model = {"hidden_size": features, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    return {"models.reward": [{"architecture": model}] * members}


def against(combine: str, members: int = 5) -> dict[str, Any]:
    """GRPO against the members of ``rm``, combined."""
    return {"models.reward": [RM] * members, "rewards.combine": combine}


CELLS = (
    Cell("sft", "the policy: supervised, from random weights"),
    Cell("rm", f"five reward models of 32 features on {PAIRS:,} pairs, 25 % labelled wrongly"),
    Cell("rm_few", f"the same on {FEW} pairs", "rm", of_pairs("few_pairs")),
    Cell("rm_clean", f"the same on {PAIRS:,} pairs with right labels", "rm", of_pairs("clean_pairs")),
    Cell("rm_narrow", f"two of {NARROW} features", "rm", of_width(NARROW)),
    Cell("rm_wide", f"two of {WIDE} features", "rm", of_width(WIDE)),
    Cell("single", "GRPO against the first of `rm`", "grpo", {"models.reward": [RM]}),
    Cell("kl", "the same with a KL penalty of 0.1", "grpo", {"models.reward": [RM], "algorithm.kl_coef": 0.1}),
    Cell("mean", "GRPO against the mean of all five", "grpo", against("mean")),
    Cell("wco", "GRPO against the lowest of the five scores", "grpo", against("min")),
    Cell("uwo", "GRPO against mean - 0.5 x variance of the five", "grpo", against("mean_minus_variance")),
    Cell("constant", "control: GRPO with a constant reward", "grpo", NO_MODEL | {"rewards.function": constant}),
    Cell("random", "control: GRPO with a random reward", "grpo", NO_MODEL | {"rewards.function": coin}),
)

BENCHMARK = Benchmark(
    name="overoptimization",
    title="Over-optimisation: the learned reward keeps rising, the true one falls; ensembles hold it",
    after="Gao et al. 2022 ([arXiv 2210.10760](https://arxiv.org/abs/2210.10760)), Coste et al. 2023 "
    "([arXiv 2310.02743](https://arxiv.org/abs/2310.02743))",
    about=(
        "A response is 4 to 12 letters of 62, drawn by Zipf's law. The true score (gold) is 4 times the mean worth of "
        "its letters, less a penalty for another length than 8: the 14 common letters are worth the quantiles of a "
        "normal distribution, in an order of the seed's, and 48 rare ones, the typos, -1.5. Reward models of one "
        "layer, each from random weights of its own, learn from pairs, each from a bootstrap sample. Who wrote the "
        f"pairs makes fewer typos (exponent {CAREFUL}) than the policy (exponent {USUAL}): of typos the models know "
        f"little. `rm` are five of 32 features and {PAIRS:,} pairs, 25 % of them labelled wrongly; of the others one "
        "thing differs. Then the response is chosen that a model holds best of n (up to 1,024, 64 held-out prompts, "
        "the unbiased estimator; all cells score the same responses), or GRPO runs 100 steps against it. `single` is "
        "one model, in best of n the mean of what each member does alone; `wco` the lowest of five scores, `uwo` mean "
        "- 0.5 x variance. `fall` is the share of gold's rise that is lost at the end. alpha and beta are those of "
        "Gao's forms: d (alpha - beta d) for best of n, d (alpha - beta log d) for GRPO where d is 1 or more, d = "
        "sqrt(KL). The settings were chosen on seed 100; `rm_wide` and the controls were not run there, nor `rm_few` "
        "with as few pairs. An earlier version, on seeds 0 to 2, had worths drawn at random, as many typos in the "
        "pairs as the policy writes, 500 pairs in `rm_few`, and 150 steps of 2 minibatches: it missed `single: fall "
        "above 0.2` on seed 2 and `kl: fall below 0.2` on seed 0, and UWO ended only 0.1 sigma above a single model. "
        "Seeds 3 to 5 were run first, where GRPO ended at 1.45 under the mean, 1.43 under WCO, 1.12 under UWO and 0.33 "
        "under a single model, so that the "
        "line of its order missed. 6 and 7 were added after that, as these numbers differ much from seed to seed."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Above("rm", "proxy_rise", 0.0),
        Above("rm", "single_fall", 0.2),
        Above("rm", "beta", 0.0),
        Rise("rm", "rm_few", "single_peak"),
        Rise("rm", "rm_narrow", "single_peak"),
        Rise("rm_wide", "rm_narrow", "single_peak"),
        Rise("rm_wide", "rm", "single_peak"),
        Rise("rm_clean", "rm", "single_peak"),
        Holds(f"gold of the best of {SIZES[-1]}: {ORDER}", functools.partial(ordered, ends=BEST_OF)),
        Above("single", "proxy_gain", 1.0),
        Above("single", "fall", 0.2),
        Holds(f"gold at the end of GRPO: {ORDER}", functools.partial(ordered, ends=GRPO)),
        Below("uwo", "fall", 0.2),
        Below("kl", "fall", 0.2),
        HigherThan("single", "kl", "kl_end", 1.0),
        Holds(
            "the KL penalty moves gold along the frontier of gold and KL only: within 0.5 at the same KL", same_frontier
        ),
        Below("constant", "gold_gain", 0.01),
        Below("random", "gold_gain", 0.5),
    ),
    shown=("accuracy", "single_peak", "single_end", "mean_end", "wco_end", "uwo_end", "alpha", "beta")
    + ("proxy_end", "gold_peak", "gold_end", "fall", "kl_end"),
    plot=plot,
)

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides={"iterations": 60}),
        dataclasses.replace(
            CELLS[1],
            overrides={
                "iterations": 60,
                "models.reward": [{"architecture": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}] * 2,
                "algorithm.normalize_samples": 0,
                "batch.micro_batch_size": 64,
            },
        ),
    ),
    data=functools.partial(write_data, held_out=8),
    signature=(Above("rm", "proxy_rise", 0.0), Above("rm", "wco_peak", 0.3), Above("rm", "accuracy", 0.55)),
    quick=True,
)
