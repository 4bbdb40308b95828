"""What a detector has to beat: wording, length, the embedding, random directions, shuffled labels."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from .detect import Detector
from .directions import content_vectors, random_vectors
from .evaluate import DetectionReport, evaluate, report_scores
from .metrics import auroc, best_threshold
from .prompts import PromptSet
from .residuals import ResidualCache
from .scorers import Method
from .show import card
from .types import EMBED, Scores, one_of

Wording = Literal["tfidf", "naive-bayes", "length"]
WORDINGS = {
    "tfidf": "TF-IDF + logistic regression",
    "naive-bayes": "naive Bayes on words",
    "length": "length of the text",
}


@dataclass(frozen=True)
class TextBaseline:
    """A classifier that sees the text and no language model, fitted and with its threshold frozen.

        tfidf         logistic regression on TF-IDF of words (1-2) and characters (2-5)
        naive-bayes   multinomial naive Bayes on word counts
        length        log of the number of characters, its sign that of the training set

    The threshold has the highest accuracy on the out-of-fold scores; `auroc_cv` is theirs.
    """

    kind: str
    pipeline: Any
    threshold: float
    auroc_cv: float
    source: str

    @classmethod
    def fit(
        cls, train: PromptSet, kind: Wording = "tfidf", *, folds: int = 5, seed: int = 0
    ) -> "TextBaseline":
        """Fit on labelled prompts. Raises what `PromptSet.folds` raises."""
        one_of(kind, tuple(WORDINGS), "text baseline")
        texts, labels = np.array(train.texts, dtype=object), train.labels
        held_out = np.zeros(len(train))
        for held in train.folds(folds, seed=seed):
            rest = np.setdiff1d(np.arange(len(train)), held)
            held_out[held] = _scores(_pipeline(kind).fit(texts[rest], labels[rest]), texts[held])
        return cls(
            kind=kind,
            pipeline=_pipeline(kind).fit(texts, labels),
            threshold=best_threshold(held_out, labels),
            auroc_cv=auroc(held_out, labels),
            source=train.name,
        )

    def _repr_html_(self) -> str:
        return card(
            f"Baseline: {WORDINGS[self.kind]}, fitted on {self.source}",
            pd.DataFrame({"threshold": [self.threshold], "auroc_cv": [self.auroc_cv]}),
            "baseline.report(prompts)",
            note="it sees the text and no language model; cv: cross-validated inside the training set",
        )

    def score(self, prompts: PromptSet) -> Scores:
        """A float per prompt; higher = more dangerous."""
        return _scores(self.pipeline, np.array(prompts.texts, dtype=object))

    def report(self, test: PromptSet, *, n_resamples: int = 1000, seed: int = 0) -> DetectionReport:
        """The same report that a detector gets."""
        return report_scores(
            self.score(test),
            test,
            threshold=self.threshold,
            detector=f"{WORDINGS[self.kind]}, fitted on {self.source}",
            model="no language model",
            n_resamples=n_resamples,
            seed=seed,
        )


def control_reports(
    train: ResidualCache,
    test: ResidualCache,
    *,
    method: Method = "two-vector",
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[tuple[str, DetectionReport]]:
    """What stands beside each detection result: (name, report) of every control, fitted on `train` alone.

    TF-IDF, naive Bayes and length (no language model); `method` on the embedding layer; the best layer
    of random directions, with their signs and threshold chosen on `train`; and `method` fitted on
    shuffled labels, whose AUROC should be 0.5.
    """
    texts = [
        (name, TextBaseline.fit(train.prompts, kind, seed=seed))  # type: ignore[arg-type]
        for kind, name in WORDINGS.items()
    ]
    options = {"n_resamples": n_resamples, "seed": seed}
    reports = [(name, baseline.report(test.prompts, **options)) for name, baseline in texts]
    detectors = {
        "embedding layer": Detector.fit(train, method=method, layers=[EMBED], seed=seed),
        "random direction, best layer": random_direction(train, seed=seed),
        "shuffled labels": Detector.fit(shuffled(train, seed=seed), method=method, seed=seed),
    }
    return reports + [(name, evaluate(d, test, **options)) for name, d in detectors.items()]


def random_direction(train: ResidualCache, *, seed: int = 0) -> Detector:
    """A random direction a layer; layer, sign and threshold chosen on `train`."""
    drawn = random_vectors(content_vectors(train), seed=seed)
    both = [Detector.fit(train, method="one-vector", vectors=v, seed=seed) for v in (drawn, -drawn)]
    return max(both, key=lambda detector: detector.auroc_cv)


def shuffled(cache: ResidualCache, *, seed: int = 0) -> ResidualCache:
    """The same prompts with their labels permuted."""
    labels = np.random.default_rng(seed).permutation(cache.prompts.labels)
    prompts = (replace(p, label=bool(label)) for p, label in zip(cache.prompts, labels, strict=True))
    return replace(cache, prompts=replace(cache.prompts, prompts=tuple(prompts)))


def _pipeline(kind: str) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    if kind == "naive-bayes":
        return make_pipeline(CountVectorizer(token_pattern=r"(?u)\b\w+\b"), MultinomialNB())
    if kind == "length":
        return make_pipeline(FunctionTransformer(_log_length), StandardScaler(), LogisticRegression())
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return make_pipeline(make_union(words, characters), LogisticRegression(C=10, max_iter=1000))


def _log_length(texts: np.ndarray) -> np.ndarray:
    return np.log([[len(text)] for text in texts])


def _scores(fitted: Any, texts: np.ndarray) -> Scores:
    """Log odds of danger."""
    if hasattr(fitted, "decision_function"):
        return np.asarray(fitted.decision_function(texts), dtype=np.float64)
    odds = fitted.predict_log_proba(texts)
    return np.asarray(odds[:, 1] - odds[:, 0], dtype=np.float64)
