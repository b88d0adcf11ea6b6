"""N-grams of texts: distinct-n, and BLEU of each text with the others as its references."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

NGRAMS = 4  # words of the longest n-gram of BLEU
UNSEEN = 0.1  # what BLEU counts where no n-gram matches: method 1 of Chen & Cherry 2014
Ngram = tuple[Hashable, ...]


def ngrams(words: Sequence[Hashable], n: int) -> Counter[Ngram]:
    """How often each stands in ``words``."""
    return Counter(zip(*(words[at:] for at in range(n))))


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams of all texts (Li et al. 2016, arXiv:1510.03055); NaN of none."""
    counts: Counter[Ngram] = Counter()
    for words in texts:
        counts += ngrams(words, n)
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Sequence[Hashable]]) -> float:
    """The mean of ``bleu_with_others`` over the texts that have one: 1 where all are the same; NaN of none."""
    scores = [score for score in bleu_with_others(texts) if not math.isnan(score)]
    return sum(scores) / len(scores) if scores else math.nan


def bleu_with_others(every: Sequence[Sequence[Hashable]]) -> list[float]:
    """The BLEU-4 of each text with all others as its references (Zhu et al. 2018, arXiv:1802.01886). Texts without a
    word are left out: theirs is NaN, and so is that of a text which is the only other one."""
    texts = [words for words in every if words]
    if len(texts) < 2:
        return [math.nan] * len(every)
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
    found = iter(scores)
    return [next(found) if words else math.nan for words in every]
