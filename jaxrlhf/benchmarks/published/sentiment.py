"""Reviews made more positive: a reward model from the best of four, and PPO whose KL a controller holds at a target."""

import dataclasses
import math
import random
import re
import statistics
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import constant
from jaxrlhf.benchmarks.published.perfectible import read_rows, write_rows
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Below, Between, HigherThan, Holds, NoRise, Rise
from jaxrlhf.benchmarks.words import write_words

GOOD = {"superb": 2.0, "great": 1.6, "funny": 1.3, "clever": 1.0, "nice": 0.8, "neat": 0.6}
BAD = {"awful": -2.0, "boring": -1.6, "silly": -1.3, "clumsy": -1.0, "weak": -0.8, "slow": -0.6}
PLAIN = dict.fromkeys(("long", "short", "french", "quiet", "loud", "new"), 0.0)
LEXICON = GOOD | BAD | PLAIN  # what a statement with this word is worth
TIMES = {"": 1.0, "very ": 1.5, "not ": -1.0}  # what stands before the word, and what the worth is multiplied by
NOUNS = ("film", "plot", "cast", "music", "script", "ending", "acting", "pace", "story", "camera")
JOINED = ("and", "but", ".")
WORDS = ("the", "is", "very", "not", *JOINED, *NOUNS, *LEXICON)
STATEMENT = re.compile(rf"\bthe (?:{'|'.join(NOUNS)}) is (very |not )?({'|'.join(LEXICON)})\b")

LONGEST, LENGTH = 6, 18  # words of a prompt at most, and of a response
BEST_OF = 4  # responses of which a label names the best
LABELS, HELD_OUT_LABELS = 3000, 300
HELD_OUT, SAMPLES = 1024, 4  # prompts by which a policy is measured, and responses to each
TARGET, OTHER_TARGET = 2.0, 1.0  # nats a response
BLOCKS = 30  # points of a curve


# ---- the grammar ----------------------------------------------------------------------------------------------------


def gold_of(text: str) -> float:
    """The sum of what the statements of a text are worth; words outside of a statement are worth nothing."""
    return sum(TIMES[before] * LEXICON[word] for before, word in STATEMENT.findall(text))


def statement(rng: random.Random, mood: int) -> list[str]:
    """ "the plot is very dull": of the sign ``mood`` with 0.6, of the other with 0.15, else plain."""
    before = rng.choices([*TIMES], (0.6, 0.25, 0.15))[0]
    sign = rng.choices((mood, -mood, 0), (0.6, 0.15, 0.25))[0] * (-1 if TIMES[before] < 0 else 1)
    words = {1: GOOD, -1: BAD, 0: PLAIN}[sign]
    return ["the", rng.choice(NOUNS), "is", *before.split(), rng.choice([*words])]


def review(rng: random.Random) -> tuple[str, str]:
    """(the first sentence, LENGTH words behind it). A review is positive with 0.3; "but" flips it."""
    mood = 1 if rng.random() < 0.3 else -1
    first, rest = [*statement(rng, mood), "."], []
    while len(rest) < LENGTH:
        rest += statement(rng, mood)
        rest.append(rng.choices(JOINED, (0.4, 0.2, 0.4))[0])
        mood = -mood if rest[-1] == "but" else mood
    return " ".join(first), " ".join(rest[:LENGTH])


def write_data(folder: Path, seed: int, rows: int = 8000, prompts: int = 2048, held_out: int = HELD_OUT) -> None:
    """The words' tokenizer; demonstrations, prompts to train with, and held-out ones."""
    rng = random.Random(seed)
    shown = [review(rng) for _ in range(rows)]
    write_rows(folder / "demonstrations.jsonl", [{"prompt": first, "response": rest} for first, rest in shown])
    for name, number in (("prompts", prompts), ("held_out", held_out)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": review(rng)[0]} for _ in range(number)])
    write_words(WORDS, folder)


# ---- labels ---------------------------------------------------------------------------------------------------------


def write_labels(folder: Path, seed: int, labels: int = LABELS, held_out: int = HELD_OUT_LABELS) -> None:
    """Best-of-four labels of the supervised policy's responses, in labels/ of the seed's folder. What was written
    before stays."""
    if (folder / "labels" / "pairs.jsonl").exists():
        return
    rng = random.Random(1000 + seed)
    prompts = [review(rng)[0] for _ in range(labels + held_out)]
    written = written_by(folder / "sft", prompts, BEST_OF, seed=2)
    pairs = [pairs_of(prompt, texts) for prompt, texts in zip(prompts, written, strict=True)]
    (folder / "labels").mkdir(exist_ok=True)
    write_rows(folder / "labels" / "held_out_pairs.jsonl", [*chain(*pairs[labels:])])
    write_rows(folder / "labels" / "pairs.jsonl", [*chain(*pairs[:labels])])


def pairs_of(prompt: str, texts: list[str]) -> list[dict[str, Any]]:
    """The response with the highest gold score, the first of equals, beside each of the others."""
    best = max(range(len(texts)), key=lambda at: gold_of(texts[at]))
    others = [text for at, text in enumerate(texts) if at != best]
    return [{"prompt": prompt, "chosen": texts[best], "rejected": other} for other in others]


def written_by(run_dir: Path, prompts: list[str], samples: int, seed: int) -> list[list[str]]:
    """Responses of LENGTH words to each prompt, at the temperature of training."""
    from jaxrlhf.generate.config import GenerateConfig
    from jaxrlhf.serve.writer import Writer

    cfg = GenerateConfig(max_new_tokens=LENGTH, min_new_tokens=LENGTH, temperature=0.7)
    writer = Writer(str(run_dir), cfg, seed, samples, width=LONGEST)
    return [[one.text for one in found] for found in writer({"prompt": prompt} for prompt in prompts)]


# ---- what is measured -----------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of the reward model: its held-out accuracy, and mean and standard deviation of its scores of fresh responses of
    the supervised policy. Of a policy: the gold score of fresh responses; of PPO also ``over_the_run``."""
    prompts = [row["prompt"] for row in read_rows(done.folder / "data" / "held_out.jsonl")]
    if done.cell == "rm":
        return measure_reward_model(done, prompts)
    written = written_by(done.run_dir, prompts, SAMPLES, seed=1)
    found: Measured = {"gold": statistics.fmean(gold_of(text) for texts in written for text in texts)}
    return found if done.cell == "sft" else found | over_the_run(done)


def measure_reward_model(done: FinishedCell, prompts: list[str]) -> Measured:
    """``accuracy`` of held-out pairs, ``score_mean`` and ``score_std``."""
    from jaxrlhf.benchmarks.finished_run import member_scores

    written = written_by(done.folder / "sft", prompts, SAMPLES, seed=3)
    rows = as_rows([(prompt, text) for prompt, texts in zip(prompts, written, strict=True) for text in texts])
    scores = member_scores(done.run_dir, rows)[0]
    accuracy = done.curve("eval/reward/accuracy")[-1]
    return {"accuracy": accuracy, "score_mean": float(scores.mean()), "score_std": float(scores.std(ddof=1))}


def as_rows(texts: list[tuple[str, str]]) -> Any:
    """Sequences of (prompt, response) as PPO has them: prompts left-padded, responses of LENGTH tokens."""
    import numpy as np

    from jaxrlhf.types import Sequences

    ids = {word: at for at, word in enumerate(WORDS, 1)}  # see word_tokenizer
    tokens = np.zeros((len(texts), LONGEST + LENGTH), np.int32)
    for row, pair in zip(tokens, texts, strict=True):
        words = " ".join(pair).split()
        row[len(row) - len(words) :] = [ids[word] for word in words]
    return Sequences(tokens, tokens > 0, (tokens > 0) & (np.arange(tokens.shape[1]) >= LONGEST))  # type: ignore


def over_the_run(done: FinishedCell) -> Measured:
    """Means over the last quarter of the iterations: ``kl`` in nats a response, ``coef`` of the controller, ``score``
    by what the run was rewarded with. ``coef_range``: the largest coefficient of that quarter over the smallest, less
    1. ``ratio_error``: how far the ratio of new to old probabilities was from 1 in any iteration, the larger of its
    mean's distance and the root mean square of its logarithm. And curves: means of blocks of iterations."""
    kl, coef, score = (done.curve(name) for name in ("kl/reference", "kl/coef", "score/mean"))
    quarter = len(kl) // 4 or 1
    drift = [*zip(done.curve("policy/ratio"), done.curve("policy/kl_old"), strict=True)]
    late = {"kl": kl, "coef": coef, "score": score}
    found: Measured = {name: statistics.fmean(values[-quarter:]) for name, values in late.items()}
    found["coef_range"] = max(coef[-quarter:]) / max(min(coef[-quarter:]), 1e-9) - 1
    # the k3 estimate of a small KL is half of the squared logarithm
    found["ratio_error"] = max(max(abs(ratio - 1), math.sqrt(max(2 * far, 0.0))) for ratio, far in drift)
    iterations = [float(at) for at in range(1, len(kl) + 1)]
    return found | {"iterations": blocks(iterations), "kl_curve": blocks(kl), "coef_curve": blocks(coef)}


def blocks(values: list[float]) -> list[float]:
    """Means of BLOCKS parts of a curve, or the curve where it is short."""
    width = max(len(values) // BLOCKS, 1)
    return [round(statistics.fmean(values[at : at + width]), 3) for at in range(0, len(values) - width + 1, width)]


# ---- the benchmark --------------------------------------------------------------------------------------------------


def same_from_afar(results: Results) -> tuple[bool, str]:
    """Whether the controller ends at the same coefficient from ten times the start: within 15 % with every seed."""
    ratios = [far / near for far, near in zip(results.of("far", "coef"), results.of("ppo", "coef"), strict=True)]
    return all(0.85 <= ratio <= 1.15 for ratio in ratios), ", ".join(f"{ratio:.2f}" for ratio in ratios)


def around(cell: str, target: float) -> Between:
    """The KL of ``cell`` is within 15 % of its target."""
    return Between(cell, "kl", 0.85 * target, 1.15 * target)


def plot(on: Any, results: Results) -> None:
    """KL and its coefficient over the run, and the gold score at the end."""
    from jaxrlhf.benchmarks import figure

    on.set_size_inches(9, 2.8)
    left, middle, right = on.subplots(1, 3)
    shown = ("ppo", "target_1", "far")
    figure.plot_curves(left, results, "iterations", "kl_curve", shown)
    for target in (TARGET, OTHER_TARGET):
        left.axhline(target, color="gray", linewidth=0.8, linestyle="--")
    left.set(title="KL, nats a response", xlabel="iteration")
    figure.plot_curves(middle, results, "iterations", "coef_curve", shown)
    middle.set(title="KL coefficient", xlabel="iteration", yscale="log", yticks=(0.1, 0.2, 0.5, 1, 2))
    middle.set_yticklabels(("0.1", "0.2", "0.5", "1", "2"))
    middle.minorticks_off()
    middle.legend(fontsize=6, frameon=False)
    figure.plot_dots(right, results, "gold")


def variant(name: str, about: str, **overrides: Any) -> Cell:
    """ppo.yaml with other fields of its algorithm."""
    return Cell(name, about, "ppo", {f"algorithm.{key}": value for key, value in overrides.items()})


HERE = "runs/benchmarks/sentiment"
NO_MODEL = {"models": {"policy": {"init_from": f"{HERE}/sft"}, "value": {"init_from": "policy", "share_trunk": True}}}
FREE = {"algorithm.kl_controller": "fixed", "algorithm.kl_coef": 0.0, "iterations": 60}

CELLS = (
    Cell("sft", "the base: supervised, from random weights"),
    Cell("rm", f"a reward model on {LABELS:,} labels: the best of {BEST_OF}", prepare=write_labels),
    Cell("ppo", f"PPO from `sft`, target of {TARGET:g} nats, coefficient from 0.15"),
    variant("target_1", f"the same with a target of {OTHER_TARGET:g} nat", kl_target=OTHER_TARGET),
    variant("far", "the same as `ppo`, coefficient from 1.5", kl_coef=1.5),
    Cell("free", "the same without a KL penalty, 60 iterations", "ppo", FREE),
    Cell("constant", "control: a constant reward", "ppo", NO_MODEL | {"rewards.function": constant}),
    Cell("still", "control: learning rate 0", "ppo", {"optimizer.default.learning_rate": 0.0, "iterations": 10}),
)

BENCHMARK = Benchmark(
    name="sentiment",
    title="Sentiment: a controller holds the KL at its target while the score rises",
    after="Ziegler et al. 2019 ([arXiv 1909.08593](https://arxiv.org/abs/1909.08593))",
    about=(
        "Reviews are synthetic: a grammar writes statements (`the plot is very slow`), joined by `and`, `but` or a "
        "full stop; seven in ten begin negative. The gold score sums what the statements are worth: -2 to 2 by the "
        "last word, times 1.5 behind `very`, times -1 behind `not`. A transformer (GPT-2's, two layers, 48 "
        "features) learns, from random weights, to write 18 words behind a first sentence. The gold score labels "
        f"the best of {BEST_OF} of its responses to each of {LABELS:,} prompts. The paper fits a softmax over the "
        "four; here the reward model, which starts from the policy's weights, learns pairs: the best beside each of "
        "the others, one pass. Its scores then get mean 0 and standard deviation 1 on 8,192 responses of the base; "
        "`score_mean` and `score_std` are of 4,096 others. PPO has the paper's form: temperature 0.7, responses of "
        "a fixed length, four epochs of one minibatch, whitened rewards and advantages, a value head on the "
        "policy's trunk, a learning rate that falls to 0. The controller moves the KL coefficient after each "
        "iteration of 128 responses (horizon 1,000). `gold` is the mean over 4,096 responses to held-out prompts at "
        "the end. Of the last quarter of the iterations are the means `kl` (nats a response), `coef` and `score` "
        "(what the run was rewarded with), and `coef_range`, the largest coefficient over the smallest, less 1. "
        "`ratio_error` is how far the ratio of new to old probabilities was from 1; it is read from `still`, whose "
        "first minibatch is also that of `ppo`. Left out: normalising the reward model before its training, cutting "
        "responses at a full stop, and Adam's epsilon in TensorFlow's form. The settings are the first that were "
        "tried, on seed 100, but for 240 iterations of PPO. Chosen by what was seen there: the bound of "
        "`coef_range` (there 0.14), that of `constant` (there +0.31: whitening makes noise of unit size of the "
        "advantages of a constant reward, and the policy drifts), and the lines on score and gold of `free` (there "
        "4.5 and 0.11)."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("rm", "score_mean", -0.05, 0.05),
        Between("rm", "score_std", 0.9, 1.1),
        Below("still", "ratio_error", 1e-5),
        around("ppo", TARGET),
        around("target_1", OTHER_TARGET),
        around("far", TARGET),
        Below("ppo", "coef_range", 0.2),
        Holds("from ten times the coefficient the same one is found, within 15 %, with every seed", same_from_afar),
        HigherThan("ppo", "sft", "gold"),
        Rise("ppo", "target_1", "gold"),
        Rise("free", "ppo", "kl", TARGET),
        Rise("free", "ppo", "score"),
        Rise("ppo", "free", "gold"),
        NoRise("constant", "sft", "gold", 0.5),
        NoRise("still", "sft", "gold"),
    ),
    shown=("gold", "score", "kl", "coef", "accuracy", "score_mean", "score_std"),
    plot=plot,
)

SMALL = {"models.policy.architecture.num_layers": 1, "models.policy.architecture.hidden_size": 32}
FEW = {"algorithm.normalize_samples": 512, "batch.preferences_per_step": 24, "eval.size": 64}
SHORT = {
    "iterations": 40,
    "algorithm.kl_coef": 0.5,
    "batch.prompts_per_step": 32,
    "algorithm.num_epochs": 2,
    "algorithm.kl_horizon": 250,
    "optimizer.default.learning_rate": 2e-3,
}

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides={"iterations": 120} | SMALL),
        dataclasses.replace(
            CELLS[1],
            overrides={"epochs": 4, "optimizer.default.learning_rate": 5e-3} | FEW,
            prepare=partial(write_labels, labels=300, held_out=20),
        ),
        dataclasses.replace(CELLS[2], overrides=SHORT),
    ),
    data=partial(write_data, rows=2000, prompts=256, held_out=64),
    signature=(Between("rm", "score_std", 0.7, 1.3), Rise("ppo", "sft", "gold", 0.5), Between("ppo", "kl", 1.0, 3.0)),
    plot=None,
    quick=True,
)
