"""Held-out evaluation: a frozen detector on prompts it was not tuned to, by prompt type, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .detect import Detector
from .files import Result
from .metrics import Estimate, accuracy, best_threshold, bootstrap_auroc, proportion
from .prompts import PromptSet
from .residuals import ResidualCache
from .types import Labels, OptionError, PromptError, Scores

OVERALL = "all"


@dataclass(frozen=True)
class DetectionReport(Result):
    """A frozen detector on one prompt set: a row for all prompts, then a row for each type.

    Columns: `type`, `n_safe`, `n_dangerous`; `accuracy`, `auroc`, `tpr` (dangerous prompts caught),
    `fpr` (safe prompts flagged), each with `_low` and `_high`: a 95% interval, Wilson's for
    proportions, bootstrapped by group for AUROC. NaN where a type has one class only. `majority` is
    the accuracy of always giving the type's commoner class (the control).
    """

    frame: pd.DataFrame
    scores: Scores
    labels: Labels
    kinds: tuple[str, ...]
    threshold: float
    detector: str
    source: str
    model: str
    seed: int

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> Estimate:
        return self._estimate("accuracy")

    @property
    def auroc(self) -> Estimate:
        return self._estimate("auroc")

    def _estimate(self, name: str) -> Estimate:
        return Estimate.from_columns(self.frame.iloc[0], name, self.n)

    def _repr_html_(self) -> str:
        title = (
            f"{self.detector} on {self.source} (n = {self.n}, {self.model}), threshold "
            f"{self.threshold:.4g}. Plot: ls.plots.score_distribution(report)"
        )
        return f"<p>{title}</p>{self.frame.round(3).to_html(index=False)}"


@dataclass(frozen=True)
class DetectorComparison(Result):
    """Several detectors on the same held-out sets: a row for each detector, set and prompt type.

    Columns: `detector`, `set`, and those of `DetectionReport`; type "all" is all types together.
    """

    frame: pd.DataFrame
    model: str
    seed: int

    @property
    def overall(self) -> pd.DataFrame:
        """The rows of all types together."""
        return self.frame.loc[self.frame["type"] == OVERALL].reset_index(drop=True)

    def _repr_html_(self) -> str:
        return f"{self.overall.round(3).to_html(index=False)}<p>Plot: ls.plots.comparison(result)</p>"


def compare(reports: Sequence[tuple[str, DetectionReport]]) -> DetectorComparison:
    """Put the reports of several named detectors under each other."""
    if not reports:
        raise OptionError("no reports given to compare: expected at least one (name, report) pair")
    frames = []
    for name, report in reports:
        frame = report.to_frame()
        frame.insert(0, "detector", name)
        frame.insert(1, "set", report.source)
        frames.append(frame)
    first = reports[0][1]
    return DetectorComparison(frame=pd.concat(frames, ignore_index=True), model=first.model, seed=first.seed)


def evaluate(
    detector: Detector, cache: ResidualCache, *, n_resamples: int = 1000, seed: int = 0
) -> DetectionReport:
    """Score a held-out cache once and report it by prompt type; nothing is chosen here.

    Raises:
        PromptError: a prompt without a label, or one that the detector was fitted on.
        MismatchError: a cache of another model, position or template.
    """
    seen = len(set(cache.prompts.text_digests) & set(detector.fitted_on))
    if seen:
        raise PromptError(
            f"the detector was fitted on {seen} of the {len(cache)} prompts of {cache.prompts.name}: "
            "expected held-out prompts; for the training set read detector.auroc_cv"
        )
    return report_scores(
        detector.score(cache),
        cache.prompts,
        threshold=detector.threshold,
        detector=f"{detector.method} at layer {detector.layer}, fitted on {detector.source}",
        model=detector.model.name,
        n_resamples=n_resamples,
        seed=seed,
    )


def report_scores(
    scores: Scores,
    prompts: PromptSet,
    *,
    threshold: float,
    detector: str,
    model: str,
    n_resamples: int = 1000,
    seed: int = 0,
) -> DetectionReport:
    """The same report for scores from anywhere (a text classifier, another tool)."""
    labels, groups = prompts.labels, prompts.groups
    kinds = np.array(prompts.kinds)
    rows = [_row(OVERALL, scores, labels, groups, threshold, n_resamples, seed)]
    for kind in dict.fromkeys(prompts.kinds):
        chosen = kinds == kind
        part = (scores[chosen], labels[chosen], groups[chosen])
        rows.append(_row(kind, *part, threshold, n_resamples, seed))
    return DetectionReport(
        frame=pd.DataFrame(rows),
        scores=scores,
        labels=labels,
        kinds=prompts.kinds,
        threshold=threshold,
        detector=detector,
        source=prompts.name,
        model=model,
        seed=seed,
    )


def oracle_accuracy(detector: Detector, cache: ResidualCache) -> Estimate:
    """The study's own evaluation: accuracy at the threshold that is best on these very test scores.

    For comparison only. It has seen the answers, so it is never below the honest accuracy.
    """
    scores, labels = detector.score(cache), cache.prompts.labels
    hits = accuracy(scores, labels, best_threshold(scores, labels))
    return proportion(round(hits * len(labels)), len(labels))


def tfidf_report(
    train: PromptSet, test: PromptSet, *, n_resamples: int = 1000, seed: int = 0
) -> DetectionReport:
    """The baseline without a language model: TF-IDF of words and characters, logistic regression.

    What it detects is wording alone; a detector has to beat it to be about more than that.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    pipeline = make_pipeline(make_union(words, characters), LogisticRegression(C=10, max_iter=1000))
    texts, labels = np.array(train.texts, dtype=object), train.labels
    everyone = np.arange(len(train))
    splits = [(np.setdiff1d(everyone, held), held) for held in train.folds(5, seed=seed)]
    held_out = cross_val_predict(pipeline, texts, labels, cv=splits, method="decision_function")
    fitted = pipeline.fit(texts, labels)
    return report_scores(
        np.asarray(fitted.decision_function(test.texts), dtype=np.float64),
        test,
        threshold=best_threshold(np.asarray(held_out), labels),
        detector=f"TF-IDF + logistic regression, fitted on {train.name}",
        model="no language model",
        n_resamples=n_resamples,
        seed=seed,
    )


def _row(
    kind: str,
    scores: Scores,
    labels: Labels,
    groups: np.ndarray,
    threshold: float,
    n_resamples: int,
    seed: int,
) -> dict[str, object]:
    flagged = scores > threshold
    n_dangerous, n = int(labels.sum()), len(labels)
    columns = {
        "accuracy": proportion(int((flagged == labels).sum()), n),
        "auroc": bootstrap_auroc(scores, labels, groups, n_resamples=n_resamples, seed=seed),
        "tpr": proportion(int(flagged[labels].sum()), n_dangerous),
        "fpr": proportion(int(flagged[~labels].sum()), n - n_dangerous),
    }
    row: dict[str, object] = {"type": kind, "n_safe": n - n_dangerous, "n_dangerous": n_dangerous}
    for name, estimate in columns.items():
        row |= estimate.columns(name)
    return row | {"majority": max(n_dangerous, n - n_dangerous) / n}
