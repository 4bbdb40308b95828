"""Held-out evaluation: a frozen detector on prompts it was not tuned to, by prompt type, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from .detect import Detector, Over, ThresholdRule
from .files import Result
from .intervals import Estimate, bootstrap, group_weights, proportion
from .metrics import (
    Draws,
    Weights,
    accuracy,
    best_threshold,
    check_scores,
    delong,
    holm,
    mcnemar,
    weighted_auprc,
    weighted_auroc,
    weighted_brier,
    weighted_ece,
    weighted_rate,
    weighted_tpr_at_fpr,
)
from .prompts import PromptSet
from .residuals import ResidualCache
from .scorers import Method
from .show import card, pick
from .types import Labels, MismatchError, OptionError, PromptError, Scores

OVERALL = "all"
CANDIDATES: tuple[tuple[Method, Over], ...] = (
    ("two-vector", "best"),
    ("lda", "best"),
    ("lda", "mean"),
    ("logistic", "best"),
    ("logistic", "mean"),
    ("logistic", "concat"),
)
"""What `choose_detector` tries: few, because each one more adds luck to the best one's figure."""

PARTS = {"type": "kind", "source": "source", "category": "category", "language": "language"}
"""What a report is split by, and the field of `Prompt` that says it."""


@dataclass(frozen=True)
class DetectionReport(Result):
    """A frozen detector on one prompt set: a row for all prompts, then rows for the parts of the set.

    `by` says what a row is a part by (all, type, source, category, language) and `type` which part;
    `n_safe`, `n_dangerous`, `prevalence` and `majority` (the accuracy of always giving the commoner
    class, the control) say what it rests on. Then, each with `_low` and `_high`:

        accuracy, balanced_accuracy, tpr (dangerous prompts caught), fpr (safe prompts flagged),
        decided (share outside the abstain band), accuracy_decided: at the frozen threshold
        oracle_accuracy                the accuracy of the threshold that is best on these very rows
        auroc, auprc                   of the scores; the chance level of auprc is the prevalence
        tpr_at_1_fpr, tpr_at_5_fpr     only with 300 safe rows or more
        brier, ece                     of the calibrated probabilities, where there are any

    Intervals are 95%, bootstrapped by group (Wilson's for oracle_accuracy, and for rates that are the
    same in every resample). NaN where a statistic is not defined.
    """

    frame: pd.DataFrame
    scores: Scores
    probabilities: Scores
    labels: Labels
    kinds: tuple[str, ...]
    threshold: float
    band: float
    detector: str
    source: str
    digest: str
    model: str
    seed: int

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> Estimate:
        return self.estimate("accuracy")

    @property
    def auroc(self) -> Estimate:
        return self.estimate("auroc")

    def estimate(self, name: str) -> Estimate:
        """A column of the row of all prompts, such as "tpr" or "ece"."""
        if f"{name}_low" not in self.frame:
            known = [c.removesuffix("_low") for c in self.frame if c.endswith("_low")]
            raise OptionError(f"no statistic {name!r} in the report: expected one of {', '.join(known)}")
        return Estimate.from_columns(self.frame.iloc[0], name, self.n)

    def _repr_html_(self) -> str:
        return card(
            f"{self.detector} on {self.source}: {self.n} prompts, {self.model}, "
            f"threshold {self.threshold:.4g}",
            pick(self.frame, "by", "type", "n_safe", "n_dangerous", "accuracy", "auroc", "tpr", "fpr"),
            "ls.plots.score_distribution(report)",
            note="tpr: dangerous prompts caught; fpr: safe prompts flagged",
        )


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
        return self.frame.loc[self.frame["by"] == OVERALL].reset_index(drop=True)

    def _repr_html_(self) -> str:
        return card(
            f"Detectors on the same held-out prompts, {self.model}",
            pick(self.overall, "set", "detector", "accuracy", "auroc", "tpr", "fpr"),
            "ls.plots.comparison(comparison)",
        )


@dataclass(frozen=True)
class PairedTests(Result):
    """Each two detectors on the same rows of the same set.

    Columns: `set`, `n`, `first`, `second`; `accuracy_difference` (first - second) and `mcnemar_p`;
    `auroc_difference` with `_low` and `_high` and `delong_p`; `mcnemar_holm` and `delong_holm`: the
    p-values adjusted for all comparisons of the table (Holm 1979).
    """

    frame: pd.DataFrame

    def _repr_html_(self) -> str:
        shown = ("set", "n", "first", "second", "accuracy_difference", "mcnemar_holm")
        return card(
            f"{len(self.frame)} pairs of detectors on the same prompts, first less second",
            pick(self.frame, *shown, "auroc_difference", "delong_holm"),
            "tests.to_frame()",
            note="p-values adjusted for all pairs of the table (Holm)",
        )


def choose_detector(
    caches: ResidualCache | Sequence[ResidualCache],
    *,
    candidates: Sequence[tuple[Method, Over]] = CANDIDATES,
    layers: Sequence[int] | None = None,
    threshold: float | ThresholdRule = "accuracy",
    target_fpr: float = 0.05,
    abstain: float = 0.0,
    seed: int = 0,
) -> tuple[Detector, pd.DataFrame]:
    """The candidate with the highest cross-validated AUROC inside the training set, and the table of all.

    `caches` are the same training prompts, read in one or several ways (position, template); `candidates`
    are (method, over) pairs; the other options are those of `Detector.fit`. With a few hundred labels the
    differences between candidates are mostly noise and the best one's AUROC flatters: report it on
    held-out prompts.

    Raises:
        OptionError: no caches or candidates.
        MismatchError: caches of different training prompts.
    """
    caches = [caches] if isinstance(caches, ResidualCache) else list(caches)
    if not caches or not candidates:
        raise OptionError("no caches or no candidates given: expected at least one of each")
    if len({cache.prompts.digest for cache in caches}) > 1:
        raise MismatchError(
            f"caches of {', '.join(cache.prompts.name for cache in caches)} with different prompts given: "
            "expected the same training prompts, read in different ways"
        )
    tried = [
        Detector.fit(
            cache,
            method=method,
            over=over,
            layers=layers,
            threshold=threshold,
            target_fpr=target_fpr,
            abstain=abstain,
            seed=seed,
        )
        for cache in caches
        for method, over in candidates
    ]
    best = max(tried, key=lambda detector: detector.auroc_cv)
    frame = pd.concat([detector.to_frame() for detector in tried], ignore_index=True)
    frame["chosen"] = [detector is best for detector in tried]
    return best, frame


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
    scores = detector.score(cache)
    return report_scores(
        scores,
        cache.prompts,
        threshold=detector.threshold,
        band=detector.band,
        probabilities=detector.probability(scores),
        detector=f"{detector.name}, fitted on {detector.source}",
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
    band: float = 0.0,
    probabilities: Scores | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> DetectionReport:
    """The same report for scores from anywhere (a text classifier, another tool).

    Raises:
        OptionError: not a finite score and (or NaN) a probability for each prompt.
        PromptError: a prompt without a label.
    """
    labels = prompts.labels
    if probabilities is None:
        probabilities = np.full(len(scores), np.nan)
    if not len(scores) == len(probabilities) == len(prompts):
        raise OptionError(
            f"{len(scores)} scores and {len(probabilities)} probabilities given for {prompts.name} with "
            f"{len(prompts)} prompts: expected one for each"
        )
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise OptionError("probabilities outside 0 to 1 given: expected probabilities; leave log odds out")
    check_scores(scores)
    parts = [(OVERALL, OVERALL, np.ones(len(scores), dtype=bool))]
    for by, field in PARTS.items():
        values = np.array([getattr(prompt, field) for prompt in prompts])
        named = [value for value in dict.fromkeys(values.tolist()) if value]
        # One part only would be the first row again; the type is always shown.
        if len(named) > 1 or by == "type":
            parts += [(by, value, values == value) for value in named]
    rows = []
    for by, value, of in parts:
        weights = group_weights(prompts.groups[of], n_resamples=n_resamples, seed=seed)
        given = (scores[of], probabilities[of], labels[of], threshold, band)
        rows.append({"by": by, "type": value} | _row(*given, weights))
    return DetectionReport(
        frame=pd.DataFrame(rows),
        scores=scores,
        probabilities=probabilities,
        labels=labels,
        kinds=prompts.kinds,
        threshold=threshold,
        band=band,
        detector=detector,
        source=prompts.name,
        digest=prompts.digest,
        model=model,
        seed=seed,
    )


def oracle_accuracy(detector: Detector, cache: ResidualCache) -> Estimate:
    """The study's own evaluation: accuracy at the threshold that is best on these very test scores.

    For comparison only. It has seen the answers, so it is never below the honest accuracy.
    """
    return _oracle(detector.score(cache), cache.prompts.labels)


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


def paired_tests(reports: Sequence[tuple[str, DetectionReport]]) -> PairedTests:
    """McNemar's test of the accuracies and DeLong's of the AUROCs, of each two detectors on a set.

    Rows count as independent in both; with many rewordings of a prompt in a set, read the bootstrap
    intervals by group instead.

    Raises:
        OptionError: fewer than two reports on any set.
        MismatchError: two reports that are named alike but are not of the same rows.
    """
    by_set: dict[str, list[tuple[str, DetectionReport]]] = {}
    for name, report in reports:
        by_set.setdefault(report.source, []).append((name, report))
    rows = [_paired(a, b) for group in by_set.values() for a, b in combinations(group, 2)]
    if not rows:
        raise OptionError(
            f"{len(reports)} reports on {len(by_set)} sets given: expected two detectors on the same set"
        )
    frame = pd.DataFrame(rows)
    for test in ("mcnemar", "delong"):
        frame[f"{test}_holm"] = holm(frame[f"{test}_p"].tolist())
    return PairedTests(frame)


def _paired(first: tuple[str, DetectionReport], second: tuple[str, DetectionReport]) -> dict[str, object]:
    (name_a, a), (name_b, b) = first, second
    if a.digest != b.digest:
        raise MismatchError(
            f"the reports of {name_a!r} and {name_b!r} on {a.source} are not of the same rows: expected the "
            "same prompts in the same order"
        )
    right_a, right_b = (((r.scores > r.threshold) == r.labels) for r in (a, b))
    difference, error, p = delong(a.scores, b.scores, a.labels)
    return {
        "set": a.source,
        "n": a.n,
        "first": name_a,
        "second": name_b,
        "accuracy_difference": float(right_a.mean() - right_b.mean()),
        "mcnemar_p": mcnemar(right_a, right_b),
        "auroc_difference": difference,
        "auroc_difference_low": difference - 1.96 * error,
        "auroc_difference_high": difference + 1.96 * error,
        "delong_p": p,
    }


def _oracle(scores: Scores, labels: Labels) -> Estimate:
    hits = accuracy(scores, labels, best_threshold(scores, labels))
    return proportion(round(hits * len(labels)), len(labels))


def _row(
    scores: Scores, probabilities: Scores, labels: Labels, threshold: float, band: float, weights: Weights
) -> dict[str, object]:
    flagged = scores > threshold
    right = flagged == labels
    everyone = np.ones(len(labels), dtype=bool)
    decided = np.abs(scores - threshold) > band if band else everyone
    rates = {
        "accuracy": (right, everyone),
        "tpr": (flagged, labels),
        "fpr": (flagged, ~labels),
        "decided": (decided, everyone),
        "accuracy_decided": (right, decided),
    }
    estimates = {name: _rate(hits, among, weights) for name, (hits, among) in rates.items()}

    def balanced(w: Weights) -> Draws:
        return (weighted_rate(flagged, labels, w) + weighted_rate(~flagged, ~labels, w)) / 2

    estimates["balanced_accuracy"] = bootstrap(balanced, weights)
    estimates["oracle_accuracy"] = _oracle(scores, labels)
    statistics = {
        "auroc": lambda w: weighted_auroc(scores, labels, w),
        "auprc": lambda w: weighted_auprc(scores, labels, w),
        "tpr_at_1_fpr": lambda w: weighted_tpr_at_fpr(scores, labels, 0.01, w),
        "tpr_at_5_fpr": lambda w: weighted_tpr_at_fpr(scores, labels, 0.05, w),
        "brier": lambda w: weighted_brier(probabilities, labels, w),
        "ece": lambda w: weighted_ece(probabilities, labels, w),
    }
    estimates |= {name: bootstrap(statistic, weights) for name, statistic in statistics.items()}
    n_dangerous, n = int(labels.sum()), len(labels)
    row: dict[str, object] = {
        "n_safe": n - n_dangerous,
        "n_dangerous": n_dangerous,
        "prevalence": n_dangerous / n,
        "majority": max(n_dangerous, n - n_dangerous) / n,
    }
    for name, estimate in estimates.items():
        row |= estimate.columns(name)
    return row


def _rate(hits: Labels, among: Labels, weights: Weights) -> Estimate:
    made = bootstrap(lambda w: weighted_rate(hits, among, w), weights)
    # All right, or all wrong: so is every resample, but nobody is that certain.
    if made.n and made.low == made.high:
        return proportion(int((hits & among).sum()), int(among.sum()))
    return made
