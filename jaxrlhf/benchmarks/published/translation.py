"""Translation between two made-up languages: chrF as the reward, a constant one, an estimate that can be cheated."""

import dataclasses
import functools
import itertools
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import constant
from jaxrlhf.benchmarks.languages import lexicon, sentence, sloppy_translation, translation
from jaxrlhf.benchmarks.published.perfectible import read_rows, write_rows
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Above, Below, Between, Fall, Holds, NoRise, Rise

END = " >"  # of a prompt
HELD_OUT = 200  # sentences that no demonstration and no prompt has
SAMPLES = 8  # translations of a held-out sentence
LONGEST = 12  # tokens of a translation: nine words and EOS at most, where it is right
UNKNOWN = 0.5  # share of the words that the estimate does not know
RANKS = ((1, 1), (2, 2), (3, 3), (4, 7), (8, 1000))  # groups, from the first to the last
EVERY = 5  # iterations between two points of a curve


# ---- data -----------------------------------------------------------------------------------------------------------


def write_data(folder: Path, seed: int, demonstrations: int = 4000, prompts: int = 1500) -> None:
    """demonstrations.jsonl, with sloppy translations; prompts.jsonl and held_out.jsonl of other sentences, with right
    ones."""
    rng, sentences = random.Random(seed), {}
    while len(sentences) < demonstrations + prompts + HELD_OUT:
        sentences[sentence(rng, seed)] = None
    shown, *others = ([*sentences][:demonstrations], [*sentences][demonstrations:-HELD_OUT], [*sentences][-HELD_OUT:])
    prompt = lambda words: {"prompt": " ".join(words) + END}
    text = lambda words: " " + " ".join(words)
    rows = [prompt(words) | {"response": text(sloppy_translation(rng, words, seed))} for words in shown]
    write_rows(folder / "demonstrations.jsonl", rows)
    for name, part in zip(("prompts", "held_out"), others, strict=True):
        rows = [prompt(words) | {"answer": text(translation(words, seed)), "seed": seed} for words in part]
        write_rows(folder / f"{name}.jsonl", rows)


# ---- rewards --------------------------------------------------------------------------------------------------------


@functools.cache
def known_words(seed: int) -> frozenset[str]:
    """The words of the source language that the estimate knows."""
    words = sorted(lexicon(seed))
    return frozenset(random.Random(2000 + seed).sample(words, round((1 - UNKNOWN) * len(words))))


def estimated(text: str, prompt: str, seed: int) -> float:
    """The share of the words of a translation that translate known words of the prompt; each counts once. 0 of none."""
    wanted: list[tuple[str, ...]] = []  # any of the forms is right
    for word in prompt.removesuffix(END).split():
        if word in known_words(seed):
            entry = lexicon(seed)[word]
            wanted += [entry.right] if entry.kind == "adjective" else [(one,) for one in entry.right]
    said, found = text.split(), 0
    for word in said:
        place = next((at for at, forms in enumerate(wanted) if word in forms), None)
        if place is not None:
            del wanted[place]
            found += 1
    return found / len(said) if said else 0.0


def quality(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """An estimate of quality without a reference. It is a precision: length does not count."""
    pairs = zip(responses, records, strict=True)
    return [estimated(text, record["prompt"], record["seed"]) for text, record in pairs]


def length_ratio(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The guard: -1 for a translation whose words are fewer than those of the prompt, or more than 4/3 of them."""
    words = [len(record["prompt"].removesuffix(END).split()) for record in records]
    return [-float(not 3 * count <= 3 * len(text.split()) <= 4 * count) for text, count in zip(responses, words)]


# ---- what is measured -----------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of the held-out sentences, sampled at temperature 1 (``greedy``: at 0): exact matches, chrF, the estimate, and
    words over the right number of words. Of the right translations' tokens: see ``promoted``. Two curves of training
    where the estimate is the reward."""
    from jaxrlhf import api
    from jaxrlhf.rewards.chrf import ChrF

    rows = read_rows(done.folder / "data" / "held_out.jsonl")
    found: Measured = {}
    for name, temperature, count in (("", 1.0, SAMPLES), ("greedy_", 0.0, 1)):
        sample = partial(api.sample, n=count, max_new_tokens=LONGEST, temperature=temperature, seed=1)
        texts = [text for texts in sample(str(done.run_dir), [row["prompt"] for row in rows]) for text in texts]
        records = [row for row in rows for _ in range(count)]
        pairs = [(text.split(), row["answer"].split()) for text, row in zip(texts, records, strict=True)]
        found |= {
            f"{name}exact_match": statistics.fmean(said == right for said, right in pairs),
            f"{name}chrf": statistics.fmean(score or 0.0 for score in ChrF()(texts, records)),
            f"{name}quality": statistics.fmean(quality(texts, records)),
            f"{name}length": statistics.fmean(len(said) / len(right) for said, right in pairs),
        }
    for name in ("chrf", "quality"):
        if done.cell in ("hackable", "guarded"):
            values = done.curve(f"score/{name}")
            parts = [values[at : at + EVERY] for at in range(0, len(values), EVERY)]
            found[f"{name}_curve"] = [round(statistics.fmean(part), 3) for part in parts]
    return found | promoted(done, rows)


def promoted(done: FinishedCell, rows: list[dict[str, Any]]) -> Measured:
    """Of the tokens of the right translations, each behind those before it, by groups of the rank that ``sft`` gives
    them: their number (of ``sft``), or the share to which this cell gives rank 1."""
    import numpy as np

    from jaxrlhf.benchmarks.finished_run import token_ranks

    right = [{"prompt": row["prompt"], "response": row["answer"]} for row in rows]
    ranks, kept = np.concatenate(token_ranks(done.run_dir, right)), done.folder / "ranks.npy"
    if done.cell == "sft":
        np.save(kept, ranks)
        return {f"rank_{first}": float(np.sum((ranks >= first) & (ranks <= last))) for first, last in RANKS}
    before = np.load(kept)
    groups = [ranks[(before >= first) & (before <= last)] for first, last in RANKS]
    shares = [float(np.mean(group == 1)) if len(group) else 0.0 for group in groups]
    return {f"to_1_from_{first}": share for (first, _), share in zip(RANKS, shares, strict=True)}


# ---- what is shown --------------------------------------------------------------------------------------------------


def no_gain(results: Results) -> tuple[bool, str]:
    """Whether the mean gain of each constant reward is at most the deviation of ``sft`` over the seeds, sampled and
    greedy."""
    told, held = [], True
    for quantity in ("chrf", "greedy_chrf"):
        noise = results.spread("sft", quantity)
        for cell in ("constant", "constant_reinforce"):
            gain = results.mean(cell, quantity) - results.mean("sft", quantity)
            held &= gain <= noise
            told.append(f"{cell}, {quantity} {gain:+.3f}, noise {noise:.3f}")
    return held, "; ".join(told)


def falls_with_rank(results: Results) -> tuple[bool, str]:
    """Whether GRPO gives rank 1 to a smaller share of each group of ranks than of the one before, with every seed."""
    groups = [f"to_1_from_{first}" for first, _ in RANKS]
    shares = [*zip(*(results.of("grpo", group) for group in groups), strict=True)]
    held = all(one > other for each in shares for one, other in itertools.pairwise(each))
    return held, "; ".join(" > ".join(f"{share:.2f}" for share in each) for each in shares)


def plot(on: Any, results: Results) -> None:
    """chrF and exact matches of each cell; chrF and the estimate while it is the reward; who gets rank 1."""
    from jaxrlhf.benchmarks import figure

    on.set_size_inches(10.5, 2.9)
    first, second, third, fourth = on.subplots(1, 4)
    figure.plot_dots(first, results, "chrf")
    figure.plot_dots(second, results, "exact_match")
    for cell in ("hackable", "guarded"):
        for name, style, label in (("quality", "--", "estimate"), ("chrf", "-", "chrF")):
            for at, values in enumerate(results.of(cell, f"{name}_curve")):
                places, told = range(0, EVERY * len(values), EVERY), None if at else f"{cell}: {label}"
                third.plot(places, values, style, color=figure.color_of(results, cell), lw=0.9, label=told)
    third.set(title="rewarded by the estimate", xlabel="iteration", ylim=(0, 1))
    third.legend(frameon=False, fontsize=6, loc="lower left")
    names = [str(low) if low == high else f"{low}-{high}" for low, high in RANKS[:-1]] + [f"{RANKS[-1][0]} on"]
    cells = [cell for cell in ("grpo", "reinforce", "constant_reinforce") if cell in results.measured]
    for at, cell in enumerate(cells):
        shares = [results.mean(cell, f"to_1_from_{low}") for low, _ in RANKS]
        places = [place + (at - 1) * 0.27 for place in range(len(RANKS))]
        fourth.bar(places, shares, 0.25, color=figure.color_of(results, cell), label=cell)
    fourth.set_xticks(range(len(RANKS)), names)
    fourth.set(title="right tokens that get rank 1", xlabel="their rank in sft", ylim=(0, 1))
    fourth.legend(frameon=False, fontsize=6)
    figure.tidy(third)
    figure.tidy(fourth)


# ---- the benchmark --------------------------------------------------------------------------------------------------

CHRF, QUALITY = (f"rewards.functions.{name}.weight" for name in ("chrf", "quality"))
CHEAT = {CHRF: 0, QUALITY: 1}
GUARD = {"rewards.functions.length_ratio": {"function": length_ratio}}
NOTHING = {CHRF: 0, "rewards.functions.constant": {"function": constant}}
PLAIN = {"algorithm.advantages": "none"}

CELLS = (
    Cell("sft", "maximum likelihood, from random weights, on sloppy translations"),
    Cell("grpo", "GRPO from `sft`, reward: chrF"),
    Cell("reinforce", "the same without a baseline: the advantage is the score", "grpo", PLAIN),
    Cell("hackable", "GRPO, reward: the estimate, which is blind to length", "grpo", CHEAT),
    Cell("guarded", "the same, and -1 for a wrong length", "grpo", CHEAT | GUARD),
    Cell("constant", "control: GRPO with a constant reward (4 iterations)", "grpo", NOTHING | {"iterations": 4}),
    Cell("constant_reinforce", "control: `reinforce` with a constant reward", "grpo", NOTHING | PLAIN),
    Cell(
        "still",
        "control: GRPO with learning rate 0 (4 iterations)",
        "grpo",
        {"optimizer.default.learning_rate": 0.0, "iterations": 4},
    ),
)

BENCHMARK = Benchmark(
    name="translation",
    title="Translation: chrF as a reward corrects sloppy demonstrations; an estimate blind to length is cheated",
    after=(
        "Choshen et al. 2020 ([arXiv 1907.01752](https://arxiv.org/abs/1907.01752)), He et al. 2024 "
        "([arXiv 2401.12873](https://arxiv.org/abs/2401.12873))"
    ),
    about=(
        "Sentences of 3 to 7 words of a made-up language are translated into another one: nouns come before their "
        "adjectives, which take their gender and the reverse order, and half of the verbs become two words. Each seed "
        "has other words. A transformer of two layers and 64 features learns, from random weights and 4,000 "
        "translations, what a sloppy demonstrator writes (`sft`): of ten candidates for a word the k-th has a "
        "probability proportional to 0.2^k, the right one is the first of 36 words, and the second, third, fifth or "
        "eighth of 16; a word of 25 is left out. Reinforcement learning follows: 50 iterations of 32 other sentences "
        "x 16 translations, rewarded by their chrF with the right one, as sacrebleu computes it. `hackable` is "
        "rewarded by an estimate of quality without a reference: the share of the translation's words that translate "
        "a word of the sentence, of which it knows half. Its guard takes 1 off for fewer words than the "
        "sentence has, and for more than 4/3 of them. Measured on 200 held-out sentences, 8 translations each at "
        "temperature 1: exact matches, chrF, the estimate (`quality`), and the words over the right number of words "
        "(`length`); `greedy` is temperature 0. `to 1 from 2` is of the tokens of the right translations, each behind "
        "those before it, that `sft` ranks second: the share that has rank 1 at the end; 4 stands for ranks 4 to 7, 8 "
        "for all behind. What is published of large models: a constant reward gains as much as BLEU does, only tokens "
        "of rank 2 or 3 are promoted (Choshen et al.); a learned estimate rises while translations get worse, "
        "which a penalty for wrong lengths removes (He et al.). `constant` changes nothing by construction, as the "
        "rewards of a group are compared; `constant_reinforce` does change the policy. The learning rate and "
        "the number of iterations were chosen on seed 100, where 3e-4 and 60 or 100, 6e-4 and 50 (taken), 1e-3 and 50 "
        "had the same signs. An estimate that knew three quarters of the words was tried there, and on seed 0, where "
        "`hackable` ended at 0.47 chrF and 0.074 exact matches, so that one line of three missed: a quarter of the "
        "sentences had no unknown word to leave out. Seeds 0, 1, 2 follow that change."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("sft", "exact_match", 0.02, 0.3),
        *(Rise(cell, "sft", name, 0.2) for cell in ("grpo", "reinforce") for name in ("chrf", "exact_match")),
        Holds("no constant reward gains more chrF than sft varies over the seeds (a deviation)", no_gain),
        NoRise("still", "sft", "chrf"),
        Rise("hackable", "sft", "quality", 0.2),
        *(Fall("hackable", "sft", name) for name in ("chrf", "exact_match", "length")),
        *(Rise("guarded", "sft", name) for name in ("quality", "chrf", "exact_match")),
        Above("grpo", "to_1_from_2", 0.5),
        Holds("the worse the rank of a right token, the smaller the share that GRPO gives rank 1", falls_with_rank),
        Below("grpo", "to_1_from_4", 0.1),
        Below("grpo", "to_1_from_8", 0.1),
        Below("constant_reinforce", "to_1_from_4", 0.1),
    ),
    shown=("exact_match", "chrf", "greedy_chrf", "quality", "length")
    + ("to_1_from_2", "to_1_from_3", "to_1_from_4", "to_1_from_8"),
    plot=plot,
)

START = {
    "iterations": 160,
    "optimizer.default.learning_rate": 6e-3,
    "models.policy.architecture.num_layers": 1,
}
SHORT = {"iterations": 16, "batch.prompts_per_step": 16, "optimizer.default.learning_rate": 2e-3}

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides=START),
        *(dataclasses.replace(CELLS[at], overrides={**CELLS[at].overrides, **SHORT}) for at in (1, 6)),
    ),
    data=partial(write_data, demonstrations=1500, prompts=250),
    signature=(
        Rise("grpo", "sft", "chrf", 0.05),
        NoRise("constant_reinforce", "sft", "chrf", 0.05),
        Rise("grpo", "constant_reinforce", "to_1_from_2", 0.1),
    ),
    plot=None,
    quick=True,
)
