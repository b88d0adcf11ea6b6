"""How different the responses of a policy are from each other: distinct-n and self-BLEU, by words."""

import math
from collections.abc import Sequence
from typing import Any

from jaxrlhf.rewards.ngrams import distinct, self_bleu


def diversity(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Of the responses of ``rows``: distinct_1 to distinct_3, self_bleu; None where there is nothing to measure."""
    texts = [row["response"].split() for row in rows]
    found = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)} | {"self_bleu": self_bleu(texts)}
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in found.items()}
