"""Two made-up languages: their words, sentences in one, and translations into the other, right ones and sloppy ones.

A sentence is `phrase verb phrase`; a phrase is a noun behind at most two adjectives. In translation

- the noun comes first, and its adjectives follow in reverse order,
- an adjective has two forms, and takes that of its noun's gender (o, a),
- half of the verbs become two words.
"""

import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

PLACES = (0, 1, 2, 4, 7)  # of the right translation among a word's candidates
KINDS = {"noun": (17, 3, 2, 1, 1), "adjective": (11, 2, 1, 1, 1), "verb": (8, 1, 1, 1, 1)}  # words with each place
CANDIDATES = 10
RATIO = 0.2  # of the probabilities with which a demonstrator takes a candidate and the one before it
LEFT_OUT = 0.04  # share of its words that a demonstrator leaves out
ADJECTIVES = (0.45, 0.4, 0.15)  # probabilities of 0, 1 and 2 in a phrase
GENDERS = "oa"


class Word(NamedTuple):
    """A word of the source language."""

    kind: str  # of KINDS
    # what a demonstrator takes for its translation, likeliest first: both forms of an adjective, the words of a verb
    candidates: tuple[tuple[str, ...], ...]
    place: int  # of the right one

    @property
    def right(self) -> tuple[str, ...]:
        """Its translation."""
        return self.candidates[self.place]


@functools.cache
def lexicon(seed: int) -> dict[str, Word]:
    """The source language; other words in every seed, and other confusions."""
    rng, used = random.Random(1000 + seed), set()

    def stem(syllables: int) -> str:
        """A new one: syllables, the last without its vowel."""
        while True:
            found = "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(syllables))[:-1]
            if found not in used:
                used.add(found)
                return found

    forms = {
        "noun": lambda at: (stem(2) + GENDERS[at % 2],),
        "adjective": lambda at: tuple(map(stem(2).__add__, GENDERS)),
        "verb": lambda at: (stem(2) + "e", *([stem(1) + "i"] if at % 2 else [])),
    }
    words: dict[str, Word] = {}
    for kind, counts in KINDS.items():
        places = [place for place, count in zip(PLACES, counts, strict=True) for _ in range(count)]
        rng.shuffle(places)
        translations = [forms[kind](at) for at in range(len(places))]
        for right, place in zip(translations, places, strict=True):
            others = rng.sample([one for one in translations if one != right], CANDIDATES - 1)
            words[stem(2) + "um"] = Word(kind, (*others[:place], right, *others[place:]), place)
    return words


def sentence(rng: random.Random, seed: int) -> tuple[str, ...]:
    """A random one, 3 to 7 words."""
    of = lambda kind: [word for word, entry in lexicon(seed).items() if entry.kind == kind]

    def phrase() -> list[str]:
        count = rng.choices(range(len(ADJECTIVES)), ADJECTIVES)[0]
        return [*rng.sample(of("adjective"), count), rng.choice(of("noun"))]

    return (*phrase(), rng.choice(of("verb")), *phrase())


def composed(kinds: Sequence[str], chosen: Sequence[tuple[str, ...]]) -> list[str]:
    """The translation of words of these ``kinds`` when each becomes what is ``chosen`` for it."""
    found: list[str] = []
    waiting: list[tuple[str, ...]] = []  # adjectives whose noun has not come
    for kind, forms in zip(kinds, chosen, strict=True):
        if kind == "adjective":
            waiting.append(forms)
        else:
            found += forms
        if kind == "noun":
            gender = GENDERS.index(forms[0][-1])
            found += [adjective[gender] for adjective in reversed(waiting)]
            waiting = []
    return found


def translation(words: Sequence[str], seed: int) -> list[str]:
    """The right one."""
    entries = [lexicon(seed)[word] for word in words]
    return composed([one.kind for one in entries], [one.right for one in entries])


def sloppy_translation(rng: random.Random, words: Sequence[str], seed: int) -> list[str]:
    """A demonstrator's: each word becomes candidate k with a probability proportional to RATIO^k, and some words of the
    translation are left out."""
    entries = [lexicon(seed)[word] for word in words]
    weights = [RATIO**k for k in range(CANDIDATES)]
    chosen = [rng.choices(one.candidates, weights)[0] for one in entries]
    return [word for word in composed([one.kind for one in entries], chosen) if rng.random() >= LEFT_OUT]
