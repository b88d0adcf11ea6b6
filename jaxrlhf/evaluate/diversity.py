"""How different the responses of a policy are from each other: distinct-n and self-BLEU, by words."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

NGRAMS = 4  # words of the longest n-gram of BLEU
UNSEEN = 0.1  # what BLEU counts where no n-gram matches: method 1 of Chen & Cherry 2014
Ngram = tuple[str, ...]


def ngrams(words: Sequence[str], n: int) -> Counter[Ngram]:
    """How often each stands in ``words``."""
    return Counter(zip(*(words[at:] for at in range(n))))


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of all texts (Li et al. 2016, arXiv:1510.03055); NaN of none."""
    counts: Counter[Ngram] = Counter()
    for words in texts:
        counts += ngrams(words, n)
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """The mean BLEU-4 of each text with all others as its references (Zhu et al. 2018, arXiv:1802.01886): 1 where all
    are the same. Texts without a word are left out; NaN of fewer than two others."""
    texts = [words for words in texts if words]
    if len(texts) < 2:
        return math.nan
    logs = [[0.0] * NGRAMS for _ in texts]
    none_matches = [False] * len(texts)
    for n in range(1, NGRAMS + 1):
        each = [ngrams(words, n) for words in texts]
        highest: dict[Ngram, tuple[int, int]] = {}  # the two largest counts of a text
        for counts in each:
            for gram, count in counts.items():
                first, second = highest.get(gram, (0, 0))
                highest[gram] = (count, first) if count > first else (first, max(second, count))
        for at, counts in enumerate(each):
            matched = 0
            for gram, count in counts.items():
                first, second = highest[gram]
                matched += min(count, second if count == first else first)  # of the others
            none_matches[at] = none_matches[at] or (n == 1 and not matched)
            logs[at][n - 1] = math.log((matched or UNSEEN) / max(counts.total(), 1))
    lengths = Counter(len(words) for words in texts)
    scores = []
    for at, words in enumerate(texts):
        others = lengths - Counter([len(words)])
        closest = min(others, key=lambda length: (abs(length - len(words)), length))
        brevity = min(0.0, 1 - closest / len(words))
        scores.append(0.0 if none_matches[at] else math.exp(brevity + sum(logs[at]) / NGRAMS))
    return sum(scores) / len(scores)


def diversity(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Of the responses of ``rows``: distinct_1 to distinct_3, self_bleu; None where there is nothing to measure."""
    texts = [row["response"].split() for row in rows]
    found = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)} | {"self_bleu": self_bleu(texts)}
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in found.items()}
