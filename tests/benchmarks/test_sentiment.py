"""The parts of the benchmark of sentiment: the grammar and its gold score, labels, rows, and what is read of a run."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.benchmarks.published import sentiment as task
from jaxrlhf.benchmarks.record import FinishedCell, Results
from jaxrlhf.benchmarks.words import word_tokenizer
from jaxrlhf.config.load import load
from jaxrlhf.data import encode
from jaxrlhf.data.tokenizer import decode_rows


@pytest.mark.parametrize(
    "text, gold",
    [
        ("the film is superb", 2.0),
        ("the film is very superb and the plot is not great .", 1.5 * 2.0 - 1.6),
        ("the cast is awful but the music is not awful", 0.0),
        ("the camera is very french . the pace is", 0.0),
        ("superb superb the is great film is nice", 0.0),  # no statements
        ("the film is great great very great", 1.6),  # one statement
        ("is slow . the plot is weak", -0.8),  # a statement begins with its noun
    ],
)
def test_gold_by_hand(text, gold):
    assert task.gold_of(text) == pytest.approx(gold)


def test_reviews_are_of_the_grammar_and_mostly_negative():
    rng = random.Random(5)
    found = [task.review(rng) for _ in range(2000)]
    assert all(len(first.split()) <= task.LONGEST and len(rest.split()) == task.LENGTH for first, rest in found)
    assert {word for pair in found for text in pair for word in text.split()} == set(task.WORDS)
    gold = np.array([task.gold_of(rest) for _, rest in found])
    assert -1 < gold.mean() < -0.2 and gold.std() > 1.5
    firsts = np.array([task.gold_of(first) for first, _ in found])
    assert np.corrcoef(firsts, gold)[0, 1] > 0.1  # the mood of a review is in its first sentence


def test_rows_are_what_training_makes_of_the_texts():
    """Left-padded prompts; ids as word_tokenizer gives them to a config with append_eos false."""
    tokenizer = word_tokenizer(task.WORDS)
    rng = random.Random(6)
    texts = [task.review(rng) for _ in range(20)]
    rows = task.as_rows(texts)
    assert {len(first.split()) for first, _ in texts} == {task.LONGEST - 1, task.LONGEST}
    for at, (prompt, response) in enumerate(texts):
        record = {"prompt": prompt, "response": response}
        encoded = encode.encode_demonstration(record, tokenizer, "response", [0], append_eos=False)
        assert rows.tokens[at][rows.valid[at]].tolist() == encoded.tokens.tolist()
        assert rows.response_mask[at][rows.valid[at]].tolist() == encoded.response_mask.tolist()
        assert not rows.valid[at][: task.LONGEST - len(prompt.split())].any() and rows.valid[at][-1]
    assert decode_rows(tokenizer, rows.tokens, rows.response_mask) == [response for _, response in texts]


def test_the_best_of_four_is_preferred_to_each_of_the_others():
    texts = ["the film is weak", "the film is great", "the plot is great", "the film is new"]
    pairs = task.pairs_of("p", texts)
    assert pairs == [{"prompt": "p", "chosen": texts[1], "rejected": texts[at]} for at in (0, 2, 3)]


def test_labels_are_of_the_supervised_policy_and_stay(tmp_path, monkeypatch):
    asked = []

    def written_by(run_dir, prompts, samples, seed):
        asked.append((run_dir, samples))
        return [[f"the film is {word}" for word in ("weak", "nice", "awful", "superb")] for _ in prompts]

    monkeypatch.setattr(task, "written_by", written_by)
    task.write_labels(tmp_path, 0, labels=5, held_out=2)
    read = lambda name: [json.loads(line) for line in (tmp_path / "labels" / name).read_text().splitlines()]
    assert (len(read("pairs.jsonl")), len(read("held_out_pairs.jsonl"))) == (15, 6)
    assert {row["chosen"] for row in read("pairs.jsonl")} == {"the film is superb"}
    task.write_labels(tmp_path, 1, labels=5, held_out=2)
    assert asked == [(tmp_path / "sft", task.BEST_OF)]


def run_of(tmp_path, **columns: list[float]) -> FinishedCell:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinishedCell("ppo", tmp_path, tmp_path, 0)


def test_what_is_read_of_a_run_by_hand(tmp_path):
    """Eight iterations, of which the last two count; one ratio is exp(1e-3) at each token."""
    drift = math.expm1(-1e-3) + 1e-3  # k3
    columns = {
        "kl/reference": [0.0, 5, 4, 3, 2, 2, 1.8, 2.4],
        "kl/coef": [0.1, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.5],
        "score/mean": [0.0, 0, 0, 0, 0, 0, 1.0, 2.0],
        "policy/ratio": [1.0, 1 + 1e-4, 1, 1, 1, 1, 1, 1],
        "policy/kl_old": [0.0, 0, 0, 0, 0, drift, 0, 0],
    }
    found = task.over_the_run(run_of(tmp_path, **columns))
    assert found["kl"] == pytest.approx(2.1) and found["score"] == 1.5
    assert found["coef"] == pytest.approx(0.45) and found["coef_range"] == pytest.approx(0.25)
    assert found["ratio_error"] == pytest.approx(1e-3, rel=1e-3)
    assert found["kl_curve"] == columns["kl/reference"]
    found = task.over_the_run(run_of(tmp_path, **{**columns, "policy/kl_old": [0.0] * 8}))
    assert found["ratio_error"] == pytest.approx(1e-4)


def test_curves_are_means_of_blocks():
    found = task.blocks([*map(float, range(2 * task.BLOCKS))])
    assert len(found) == task.BLOCKS and found[:2] == [0.5, 2.5]


def test_the_coefficient_from_afar_is_compared_seed_by_seed():
    measured = lambda values: [{"coef": value} for value in values]
    results = lambda far: Results([0, 1], {"ppo": measured([0.4, 0.4]), "far": measured(far)})
    assert task.same_from_afar(results([0.44, 0.36]))[0]
    assert not task.same_from_afar(results([0.40, 0.48]))[0]
    assert not task.same_from_afar(results([0.30, 0.40]))[0]


def test_the_config_says_how_many_words_there_are():
    architecture = (
        load(Path(__file__).parents[2] / "configs/benchmarks/sentiment/sft.yaml").models["policy"].architecture
    )
    assert architecture is not None and architecture.vocab_size == len(word_tokenizer(task.WORDS))
