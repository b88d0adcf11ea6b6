"""The parts of the benchmark of translation: its languages, its rewards, and the ranks of right tokens."""

import json
import random

import numpy as np
import pytest

from jaxrlhf.benchmarks import finished_run, languages
from jaxrlhf.benchmarks.finished_run import ranks_in
from jaxrlhf.benchmarks.languages import Word, composed, lexicon, sentence, sloppy_translation
from jaxrlhf.benchmarks.published import translation as task
from jaxrlhf.benchmarks.record import FinishedCell, Results

WORDS = {  # a lexicon by hand
    "redum": Word("adjective", (("rosso", "rossa"), ("verdo", "verda")), 0),
    "bigum": Word("adjective", (("grando", "granda"), ("picco", "picca")), 1),
    "house": Word("noun", (("casa",), ("mano",)), 0),
    "dogum": Word("noun", (("gato",), ("cano",)), 1),
    "seeum": Word("verb", (("vede",), ("ode",)), 0),
    "takum": Word("verb", (("prende", "vi"), ("vede",)), 0),
}


@pytest.fixture
def by_hand(monkeypatch):
    for module in (languages, task):
        monkeypatch.setattr(module, "lexicon", lambda seed: WORDS)
    monkeypatch.setattr(task, "known_words", lambda seed: frozenset(WORDS) - {"seeum"})


def test_a_translation_by_hand(by_hand):
    translated = lambda text: " ".join(languages.translation(text.split(), 0))
    assert translated("dogum seeum house") == "cano vede casa"
    assert translated("redum bigum house takum redum dogum") == "casa picca rossa prende vi cano rosso"


def test_the_form_of_an_adjective_is_that_of_the_noun_that_was_chosen():
    kinds, red = ["adjective", "noun"], ("rosso", "rossa")
    assert composed(kinds, [red, ("casa",)]) == ["casa", "rossa"]
    assert composed(kinds, [red, ("mano",)]) == ["mano", "rosso"]


@pytest.mark.parametrize("seed", [0, 100])
def test_a_lexicon_has_its_words_apart_and_its_right_ones_at_their_places(seed):
    words = lexicon(seed)
    right = [one for word in words.values() for one in word.right]
    assert len(words) == 52 and len(right) == 24 + 2 * 16 + 12 + 6 == len({*right}) and not {*right} & {*words}
    for kind, counts in languages.KINDS.items():
        places = [word.place for word in words.values() if word.kind == kind]
        assert [places.count(place) for place in languages.PLACES] == [*counts]
    assert all(len({*word.candidates}) == languages.CANDIDATES for word in words.values())
    assert words != lexicon(seed + 1)


def test_a_demonstrator_takes_candidate_k_with_its_probability_and_leaves_words_out():
    rng, words = random.Random(0), lexicon(0)
    noun = next(word for word, entry in words.items() if entry.kind == "noun")
    said = [sloppy_translation(rng, [noun], 0) for _ in range(20_000)]
    written = [one[0] for one in said if one]
    assert abs(1 - len(written) / len(said) - languages.LEFT_OUT) < 0.006  # 4 sigma
    weights = [languages.RATIO**k for k in range(languages.CANDIDATES)]
    for (candidate,), weight in zip(words[noun].candidates, weights):
        assert abs(written.count(candidate) / len(written) - weight / sum(weights)) < 0.012


def test_sentences_are_of_3_to_7_words_and_two_phrases():
    rng = random.Random(0)
    made = [[lexicon(0)[word].kind for word in sentence(rng, 0)] for _ in range(500)]
    assert {*map(len, made)} == {3, 4, 5, 6, 7}
    assert all((kinds.count("noun"), kinds.count("verb"), kinds[-1]) == (2, 1, "noun") for kinds in made)


def test_three_kinds_of_sentences_are_apart(tmp_path):
    task.write_data(tmp_path, 0, demonstrations=300, prompts=100)
    read = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    parts = [read(name) for name in ("demonstrations", "prompts", "held_out")]
    assert [*map(len, parts)] == [300, 100, task.HELD_OUT]
    assert len({row["prompt"] for rows in parts for row in rows}) == 300 + 100 + task.HELD_OUT
    for row in [*parts[1], *parts[2]]:
        words = row["prompt"].removesuffix(task.END).split()
        assert row["answer"].split() == languages.translation(words, 0)
        assert len(row["answer"].split()) + 1 <= task.LONGEST
        assert task.length_ratio([row["answer"]], [row]) == [0]


# ---- rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "estimate", "length"),
    [
        ("cano vede casa rossa", 3 / 4, 0),  # vede is right, and not known
        ("casa", 1, -1),  # what is left out costs nothing
        ("rosso", 1, -1),  # any form
        ("casa casa casa casa", 1 / 4, 0),  # each counts once
        ("cano casa rossa mano mano", 3 / 5, 0),
        ("cano casa rossa mano mano mano", 3 / 6, -1),
        ("", 0, -1),
    ],
)
def test_the_estimate_and_its_guard_by_hand(by_hand, text, estimate, length):
    record = {"prompt": "dogum seeum redum house >", "seed": 0}
    assert task.quality([text], [record]) == [pytest.approx(estimate)]
    assert task.length_ratio([text], [record]) == [length]


def test_both_words_of_a_verb_are_wanted(by_hand):
    record = {"prompt": "takum >", "seed": 0}
    assert task.quality(["prende vi", "prende prende", "vi"], [record] * 3) == [1, 0.5, 1]


def test_the_estimate_knows_half_of_the_words():
    assert len(task.known_words(0)) == 26 and task.known_words(0) < {*lexicon(0)}


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    logits = np.array([[[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [2.0, 2.0, 0.0]]])
    np.testing.assert_array_equal(ranks_in(logits, np.array([[1, 0, 0]])), [[1, 3, 1]])


def test_which_ranks_were_promoted(tmp_path, monkeypatch):
    ranks = {"sft": [[1, 1, 2], [2, 3, 5, 9]], "grpo": [[1, 2, 1], [4, 1, 1, 8]]}
    monkeypatch.setattr(
        finished_run, "token_ranks", lambda run_dir, rows: [np.array(one) for one in ranks[run_dir.name]]
    )
    found = {cell: task.promoted(FinishedCell(cell, tmp_path / cell, tmp_path, 0), []) for cell in ranks}
    assert found["sft"] == {"rank_1": 2, "rank_2": 2, "rank_3": 1, "rank_4": 1, "rank_8": 1}
    shares = {"to_1_from_1": 0.5, "to_1_from_2": 0.5, "to_1_from_3": 1, "to_1_from_4": 1, "to_1_from_8": 0}
    assert found["grpo"] == shares


def test_the_lines_of_the_signature_by_hand():
    row = lambda value: {"chrf": value, "greedy_chrf": value}
    noisy = [row(value) for value in (0.4, 0.5, 0.6)]  # deviation 0.1
    moved = lambda by: [row(value + by) for value in (0.4, 0.5, 0.6)]
    results = lambda by: Results(range(3), {"sft": noisy, "constant": noisy, "constant_reinforce": moved(by)})
    assert task.no_gain(results(0.09))[0] and not task.no_gain(results(0.11))[0]
    shares_of = lambda *shares: {
        f"to_1_from_{first}": share for (first, _), share in zip(task.RANKS, shares, strict=True)
    }
    falling = [shares_of(1, 0.9, 0.7, 0.3, 0.1), shares_of(1, 0.8, 0.5, 0.2, 0)]
    assert task.falls_with_rank(Results(range(2), {"grpo": falling}))[0]
    assert not task.falls_with_rank(Results(range(2), {"grpo": [falling[0], shares_of(1, 0.5, 0.5, 0.2, 0)]}))[0]
