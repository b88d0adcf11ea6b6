"""The dataset ``jaxrlhf_movie_reviews``: film reviews as demonstrations, preferences, prompts, and for a judge.

Importing this module registers it with TFDS; ``open_source`` does so when it meets the name. Raise VERSION when
anything here or in review_corpus.py changes what is generated: prepared copies are found by it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jaxrlhf.data.files import silence
from jaxrlhf.data.review_corpus import (
    Corpus,
    Review,
    by_label,
    clean,
    imdb_sentences,
    letters,
    natural,
    rank,
    read_reviews,
    split_corpus,
)

VERSION = "1.1.0"
PAIRINGS = 4  # pairs that each sentence is in, each with another partner
PROMPT_WORDS = (2, 5)  # a prompt is this many first words of a sentence

REVIEW_FEATURES = ("text", "label", "source")
FEATURES = {
    "demonstrations": REVIEW_FEATURES,
    "imdb_demonstrations": REVIEW_FEATURES,
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt", "source"),
    "natural_preferences": ("prompt", "chosen", "rejected"),
    "natural_prompts": ("prompt", "source"),
    "judge": REVIEW_FEATURES,
}
Example = dict[str, Any]


class JaxrlhfMovieReviews(tfds.core.GeneratorBasedBuilder):
    """Sentences of Rotten Tomatoes and IMDB reviews; the reviews of the judge and the test sentences are held out."""

    name = "jaxrlhf_movie_reviews"
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="demonstrations", description="Rotten Tomatoes sentences to learn to write"),
        tfds.core.BuilderConfig(name="imdb_demonstrations", description="sentences cut out of IMDB reviews"),
        tfds.core.BuilderConfig(name="preferences", description="a positive sentence is preferred to a negative one"),
        tfds.core.BuilderConfig(name="prompts", description="the first words of sentences"),
        tfds.core.BuilderConfig(name="natural_preferences", description="pairs that begin alike, as people type them"),
        tfds.core.BuilderConfig(name="natural_prompts", description="the first words, as people type them"),
        tfds.core.BuilderConfig(name="judge", description="whole IMDB reviews, seen by no other part"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        numbers = {"label": tfds.features.Scalar(np.int64)}
        features = {name: numbers.get(name, tfds.features.Text()) for name in FEATURES[self._config()]}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
        )

    def download_and_prepare(self, **options):
        print(f"preparing {self.name}/{self._config()}, once", flush=True)
        with silence():
            super().download_and_prepare(**options)

    def _config(self) -> str:
        return str(self.builder_config_name)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Example]]]:
        splits = SPLITS[self._config()](installed_corpus())
        return {split: self._generate_examples(examples) for split, examples in splits.items()}

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator[tuple[str, Example]]:
        for index, example in enumerate(examples):
            yield str(index), example


@functools.cache
def installed_corpus() -> Corpus:
    """The corpus, read and split once for all configs that one process prepares."""
    return split_corpus(read_reviews())


def demonstrations(corpus: Corpus) -> dict[str, list[Example]]:
    """The sentences of Rotten Tomatoes."""
    return {
        "train": [tidy(review)._asdict() for review in corpus.rt_train],
        "test": [tidy(review)._asdict() for review in corpus.rt_test],
    }


def imdb_demonstrations(corpus: Corpus) -> dict[str, list[Example]]:
    """Sentences of IMDB reviews, written as those of Rotten Tomatoes are; they mix: "train" of both configs."""
    return {"train": [review._asdict() for review in imdb_sentences(corpus)]}


def preferences(corpus: Corpus) -> dict[str, list[Example]]:
    """Pairs of Rotten Tomatoes sentences with an empty prompt."""
    split = lambda reviews: pairs([*map(tidy, reviews)], PAIRINGS)
    return {"train": split(corpus.rt_train), "test": split(corpus.rt_test)}


def pairs(reviews: Sequence[Review], rounds: int) -> list[Example]:
    """Each positive review with ``rounds`` different negative ones."""
    negative, positive = (by_label(reviews)[label] for label in (0, 1))
    size = min(len(negative), len(positive))
    rounds = min(rounds, size)
    shifts = [size * turn // rounds for turn in range(rounds)] if rounds else []
    return [
        {
            "prompt": "",
            "chosen": positive[at].text,
            "rejected": negative[(at + shift) % size].text,
        }
        for shift in shifts
        for at in range(size)
    ]


def natural_preferences(corpus: Corpus) -> dict[str, list[Example]]:
    """Pairs of sentences, one positive and one negative, that begin with the same words: those are the prompt."""
    return {"train": continuations(corpus.rt_train, 1), "test": continuations(corpus.rt_test, PAIRINGS)}


def continuations(reviews: Iterable[Review], rounds: int) -> list[Example]:
    """``pairs`` within each group of sentences that share their first word, as (prompt, chosen, rejected)."""
    groups: dict[str, list[Review]] = {}
    for review in map(typed, reviews):
        groups.setdefault(review.text.split()[0], []).append(review)
    found = [pair for word in sorted(groups) for pair in pairs(groups[word], rounds)]
    found.sort(key=lambda pair: rank("continuation", pair["chosen"], pair["rejected"]))
    return [shared for shared in map(share_prompt, found) if shared["prompt"]]


def share_prompt(pair: Example) -> Example:
    """The words that both sides begin with become the prompt; each side keeps one word at least."""
    chosen, rejected = (pair[side].split(" ") for side in ("chosen", "rejected"))
    most = min(len(chosen), len(rejected)) - 1
    count = next((at for at in range(most) if chosen[at] != rejected[at]), most)
    prompt = " ".join(chosen[:count])
    return {"prompt": prompt} | {side: pair[side][len(prompt) :] for side in ("chosen", "rejected")}


def prompts(corpus: Corpus) -> dict[str, list[Example]]:
    """Beginnings of sentences, none of them twice; none of the test is in the training split."""
    return split_beginnings(corpus, tidy)


def natural_prompts(corpus: Corpus) -> dict[str, list[Example]]:
    """The same, as people type them."""
    return split_beginnings(corpus, typed)


def split_beginnings(corpus: Corpus, form: Callable[[Review], Review]) -> dict[str, list[Example]]:
    test = beginnings(map(form, corpus.rt_test), set())
    seen = {letters(example["prompt"]) for example in test}
    return {"train": beginnings(map(form, corpus.rt_train), seen), "test": test}


def beginnings(reviews: Iterable[Review], seen: set[str]) -> list[Example]:
    """The first words of each review, their number drawn from PROMPT_WORDS; what is in ``seen`` is left out."""
    low, high = PROMPT_WORDS
    seen, found = set(seen), []
    for review in reviews:
        prompt = " ".join(review.text.split()[: low + rank("prompt", review.text) % (high - low + 1)])
        if letters(prompt) and letters(prompt) not in seen:
            seen.add(letters(prompt))
            found.append({"prompt": prompt, "source": review.source})
    return found


def judge(corpus: Corpus) -> dict[str, list[Example]]:
    """Whole reviews to train a classifier on, and labelled test sentences to try it on."""
    return {
        "train": [tidy(review)._asdict() for review in corpus.imdb_judge],
        "test": [tidy(review)._asdict() for review in corpus.rt_test],
    }


def tidy(review: Review) -> Review:
    """Both sources go through the same cleaning, so that they can't be told apart by their typing."""
    return review._replace(text=clean(review.text))


def typed(review: Review) -> Review:
    """Tidied, then written as people type."""
    return review._replace(text=natural(clean(review.text)))


SPLITS = {
    "demonstrations": demonstrations,
    "imdb_demonstrations": imdb_demonstrations,
    "preferences": preferences,
    "prompts": prompts,
    "natural_preferences": natural_preferences,
    "natural_prompts": natural_prompts,
    "judge": judge,
}
