"""Pure functions on scores and labels. Label True = dangerous; a higher score = more dangerous."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from .types import Labels, OptionError, Scores


@dataclass(frozen=True)
class Estimate:
    """A number that does not travel alone: value, 95% interval, and the rows n it rests on."""

    value: float
    low: float
    high: float
    n: int

    def columns(self, name: str) -> dict[str, float]:
        """As it stands in a table: `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    @classmethod
    def from_columns(cls, row: Any, name: str, n: int) -> "Estimate":
        """What `columns` wrote into a table's row."""
        return cls(row[name], row[f"{name}_low"], row[f"{name}_high"], n)

    def __str__(self) -> str:
        if self.n == 0 or np.isnan(self.value):
            return "not defined"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval_text(row: Any, name: str) -> str:
    """A table's cell for an estimate: value and interval to two digits, a dash where it is not defined."""
    if np.isnan(row[name]):
        return "—"
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


UNDEFINED = Estimate(float("nan"), float("nan"), float("nan"), 0)
"""What a statistic is where it cannot be: AUROC of one class, TPR without dangerous rows."""


def auroc(scores: Scores, labels: Labels) -> float:
    """P(score of a dangerous row > score of a safe row), ties counted half. NaN with one class only."""
    from sklearn.metrics import roc_auc_score

    check_scores(scores)
    if labels.all() or not labels.any():
        return float("nan")
    return float(roc_auc_score(labels, scores))


def accuracy(scores: Scores, labels: Labels, threshold: float) -> float:
    """Share of rows where (score > threshold) equals the label."""
    return float(((scores > threshold) == labels).mean())


def cohens_d(scores: Scores, labels: Labels) -> float:
    """(mean dangerous - mean safe) / pooled standard deviation, ddof 1 (Cohen 1988).

    0 where both classes are constant and equal, NaN with fewer than two rows in a class.
    """
    dangerous, safe = scores[labels], scores[~labels]
    if min(len(dangerous), len(safe)) < 2:
        return float("nan")
    pooled = np.sqrt(
        ((len(dangerous) - 1) * dangerous.var(ddof=1) + (len(safe) - 1) * safe.var(ddof=1))
        / (len(scores) - 2)
    )
    difference = dangerous.mean() - safe.mean()
    if pooled == 0:
        return 0.0 if difference == 0 else float(np.copysign(np.inf, difference))
    return float(difference / pooled)


def best_threshold(scores: Scores, labels: Labels) -> float:
    """The threshold t with the highest accuracy of (score > t).

    Candidates are the midpoints between neighbouring distinct scores, and one step outside either
    end. Of equally good ones the middle one is taken, so that the choice does not lean to a class.
    """
    check_scores(scores)
    values = np.unique(scores)
    middles = (values[:-1] + values[1:]) / 2
    step = float(values[-1] - values[0]) or 1.0
    candidates = np.concatenate([[values[0] - step], middles, [values[-1] + step]])
    order = np.sort(scores[labels]), np.sort(scores[~labels])
    hits = len(order[0]) - np.searchsorted(order[0], candidates, side="right")
    rejections = np.searchsorted(order[1], candidates, side="right")
    correct = hits + rejections
    best = np.flatnonzero(correct == correct.max())
    return float(candidates[best[(len(best) - 1) // 2]])


def proportion(successes: int, n: int) -> Estimate:
    """successes / n with the Wilson 95% interval; undefined for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return UNDEFINED
    interval = binomtest(int(successes), int(n)).proportion_ci(method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), int(n))


def bootstrap_auroc(
    scores: Scores,
    labels: Labels,
    groups: Int[np.ndarray, " prompt"],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """AUROC with its 95% percentile interval, whole groups resampled with replacement.

    Resamples of one class only are left out; the estimate is `UNDEFINED` where the AUROC itself is.
    """
    value = auroc(scores, labels)
    if np.isnan(value):
        return UNDEFINED
    weights = group_weights(groups, n_resamples=n_resamples, seed=seed)
    low, high = np.nanpercentile(weighted_auroc(scores, labels, weights), [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(scores))


def bootstrap_mean(values: Float[np.ndarray, " row"], *, n_resamples: int = 1000, seed: int = 0) -> Estimate:
    """The mean with its 95% percentile interval, rows resampled; rows that are NaN are left out."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return UNDEFINED
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(n_resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def group_weights(
    groups: Int[np.ndarray, " prompt"], *, n_resamples: int, seed: int
) -> Float[np.ndarray, "resample prompt"]:
    """How often each row stands in each bootstrap sample that draws whole groups with replacement."""
    _, member = np.unique(groups, return_inverse=True)
    n_groups = int(member.max()) + 1
    drawn = np.random.default_rng(seed).integers(n_groups, size=(n_resamples, n_groups))
    counts = np.zeros((n_resamples, n_groups))
    np.add.at(counts, (np.arange(n_resamples)[:, None], drawn), 1)
    return counts[:, member]


def weighted_auroc(
    scores: Scores, labels: Labels, weights: Float[np.ndarray, "resample prompt"]
) -> Float[np.ndarray, " resample"]:
    """AUROC of the rows counted as often as `weights` says, for each resample; NaN with one class.

    sum_ij w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_i w_i sum_j w_j), i dangerous and j safe.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    by_value = [
        np.add.reduceat(np.where(of[order], weights[:, order], 0.0), starts, axis=1)
        for of in (labels, ~labels)
    ]
    dangerous, safe = by_value
    below = safe.cumsum(axis=1) - safe / 2
    pairs = dangerous.sum(axis=1) * safe.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray((dangerous * below).sum(axis=1) / pairs)


def auroc_by_layer(scores: Float[np.ndarray, "layer prompt"], labels: Labels) -> Float[np.ndarray, " layer"]:
    """AUROC of each row of scores, by average ranks (Mann-Whitney), all layers at once."""
    from scipy.stats import rankdata

    n_dangerous = int(labels.sum())
    n_safe = len(labels) - n_dangerous
    if n_dangerous == 0 or n_safe == 0:
        return np.full(len(scores), np.nan)
    ranks = rankdata(scores, axis=1)[:, labels].sum(axis=1)
    return (ranks - n_dangerous * (n_dangerous + 1) / 2) / (n_dangerous * n_safe)


def check_scores(scores: Scores) -> None:
    """Raise `OptionError` for NaN or infinite scores, or none at all."""
    if len(scores) == 0 or not np.isfinite(scores).all():
        raise OptionError(
            f"{len(scores)} scores of which {int((~np.isfinite(scores)).sum())} are NaN or infinite: "
            "expected at least one score, all finite"
        )
