"""An outside judge: a bag-of-words classifier on labelled texts that no policy or reward model has learned from.

It shares nothing with the neural models, so a policy that only pleases its own reward model does not please it too.
"""

from collections.abc import Iterable, Sequence

import numpy as np


class Judge:
    """P(positive) of a text: TF-IDF of words and word pairs, logistic regression.

    ``records`` have ``text`` and ``label`` (1 positive, 0 negative). Raises ImportError, in one line, without
    scikit-learn."""

    def __init__(self, records: Iterable[dict]):
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
        except ImportError:
            raise ImportError("eval.judge: needs scikit-learn; pip install 'jaxrlhf[demo]'") from None
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        self.model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=200))
        rows = list(records)
        self.model.fit([row["text"] for row in rows], [int(row["label"]) for row in rows])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """f64[len(texts)]: the probability that each is positive."""
        return self.model.predict_proba(list(texts))[:, 1]
