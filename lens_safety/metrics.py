"""Pure functions on scores and labels. Label True = dangerous; a higher score = more dangerous.

The `weighted_` functions take weights `[resample prompt]` (how often each row counts) and give one
value a resample, NaN where it is not defined; with all weights 1 they are the usual statistics.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from .intervals import rate_bound
from .types import Labels, OptionError, Scores, one_of

Weights = Float[np.ndarray, "resample prompt"]
Draws = Float[np.ndarray, " resample"]
Curves = Float[np.ndarray, "resample value"]
Band = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]
Criterion = Literal["accuracy", "youden", "f1"]

MIN_NEGATIVES = 300
"""A true positive rate at 1% or 5% false positives is not given on fewer safe rows: it would be noise."""


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
    if np.ptp(dangerous) == np.ptp(safe) == 0:
        # Not by means and variances, which are rounded: the mean of three times 0.1 is not 0.1.
        difference = dangerous[0] - safe[0]
        return 0.0 if difference == 0 else float(np.copysign(np.inf, difference))
    pooled = np.sqrt(
        ((len(dangerous) - 1) * dangerous.var(ddof=1) + (len(safe) - 1) * safe.var(ddof=1))
        / (len(scores) - 2)
    )
    return float((dangerous.mean() - safe.mean()) / pooled)


def best_threshold(scores: Scores, labels: Labels, criterion: Criterion = "accuracy") -> float:
    """The threshold t that is best for (score > t).

    accuracy   share of right rows
    youden     TPR - FPR (Youden 1950): both classes count the same, whatever their numbers
    f1         2 TP / (2 TP + FP + FN)

    Candidates are the midpoints between neighbouring distinct scores, and one step outside either
    end. Of equally good ones the middle one is taken, so that the choice does not lean to a class.
    """
    one_of(criterion, ("accuracy", "youden", "f1"), "threshold criterion")
    check_scores(scores)
    values = np.unique(scores)
    # The middle of two neighbouring floats is one of them, and must not be the upper one.
    middles = np.minimum((values[:-1] + values[1:]) / 2, np.nextafter(values[1:], -np.inf))
    step = float(values[-1] - values[0]) or 1.0
    candidates = np.concatenate([[values[0] - step], middles, [values[-1] + step]])
    dangerous, safe = np.sort(scores[labels]), np.sort(scores[~labels])
    hits = len(dangerous) - np.searchsorted(dangerous, candidates, side="right")
    false = len(safe) - np.searchsorted(safe, candidates, side="right")
    if criterion == "f1":
        value = 2 * hits / np.maximum(hits + false + len(dangerous), 1)
    elif criterion == "youden":
        value = hits / max(len(dangerous), 1) - false / max(len(safe), 1)
    else:
        value = hits - false
    best = np.flatnonzero(np.isclose(value, value.max(), rtol=0, atol=1e-12))
    return float(candidates[best[(len(best) - 1) // 2]])


def fpr_threshold(scores: Scores, labels: Labels, target: float) -> float:
    """The lowest threshold whose false positive rate is certified to be at most `target`.

    Certified: the one-sided 95% bound of Clopper and Pearson on the m safe rows is at most `target`
    (see `rate_bound`). With m safe rows no rate below 1 - 0.05 ** (1 / m), about 3 / m, can be.

    Raises:
        OptionError: a target outside 0 to 1, or one that so few safe rows cannot certify.
    """
    check_scores(scores)
    if not 0 < target < 1:
        raise OptionError(f"target_fpr={target:g} given, expected a rate between 0 and 1, such as 0.05")
    safe = np.sort(scores[~labels])[::-1]
    allowed = [events for events in range(len(safe)) if rate_bound(events, len(safe)) <= target]
    if not allowed:
        raise OptionError(
            f"a false positive rate of {target:g} cannot be certified on {len(safe)} safe prompts: the least "
            f"that they can certify at 95% is {rate_bound(0, len(safe)):.3g}; give a higher "
            f"target_fpr or about {int(np.ceil(3 / target))} safe prompts"
        )
    # Only rows strictly above the threshold are flagged: at most `events` of them are.
    return float(safe[max(allowed)])


def abstain_band(scores: Scores, threshold: float, share: float) -> float:
    """Half the width of the band around `threshold` that holds `share` of the scores: too near to call."""
    check_scores(scores)
    if not 0 <= share < 1:
        raise OptionError(f"abstain={share:g} given, expected a share of prompts, at least 0 and below 1")
    return float(np.quantile(np.abs(scores - threshold), share)) if share else 0.0


def auroc_by_layer(scores: Float[np.ndarray, "layer prompt"], labels: Labels) -> Float[np.ndarray, " layer"]:
    """AUROC of each row of scores, by average ranks (Mann-Whitney), all layers at once."""
    from scipy.stats import rankdata

    n_dangerous = int(labels.sum())
    n_safe = len(labels) - n_dangerous
    if n_dangerous == 0 or n_safe == 0:
        return np.full(len(scores), np.nan)
    ranks = rankdata(scores, axis=1)[:, labels].sum(axis=1)
    return (ranks - n_dangerous * (n_dangerous + 1) / 2) / (n_dangerous * n_safe)


def weighted_rate(hits: Bool[np.ndarray, " prompt"], among: Bool[np.ndarray, " prompt"], w: Weights) -> Draws:
    """The share of `hits` among the rows of `among`."""
    with np.errstate(invalid="ignore"):
        return np.asarray(w[:, hits & among].sum(axis=1) / w[:, among].sum(axis=1))


def weighted_auroc(scores: Scores, labels: Labels, w: Weights) -> Draws:
    """P(score of a dangerous row > score of a safe row), ties counted half.

    sum_ij w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_i w_i sum_j w_j), i dangerous and j safe.
    """
    dangerous, safe = _by_value(scores, labels, w)
    above = safe.cumsum(axis=1)
    pairs = dangerous.sum(axis=1) * safe.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray((dangerous * (above[:, -1:] - above + safe / 2)).sum(axis=1) / pairs)


def weighted_auprc(scores: Scores, labels: Labels, w: Weights) -> Draws:
    """Average precision: sum over falling thresholds of (recall_k - recall_{k-1}) * precision_k.

    Its chance level is the prevalence, the share of dangerous rows: never read it without.
    """
    dangerous, safe = _by_value(scores, labels, w)
    precision = _share_above(dangerous, safe)
    with np.errstate(invalid="ignore"):
        return np.asarray((dangerous * precision).sum(axis=1) / dangerous.sum(axis=1))


def weighted_tpr_at_fpr(scores: Scores, labels: Labels, fpr: float, w: Weights) -> Draws:
    """The highest true positive rate of any threshold with at most this false positive rate.

    It compares detectors without a threshold being chosen. NaN with fewer than `MIN_NEGATIVES` safe rows.
    """
    if (~labels).sum() < MIN_NEGATIVES:
        return np.full(len(w), np.nan)
    dangerous, safe = _by_value(scores, labels, w)
    true, false = dangerous.cumsum(axis=1), safe.cumsum(axis=1)
    allowed = false <= fpr * false[:, -1:] + 1e-9
    best = np.where(false[:, -1] > 0, np.where(allowed, true, 0).max(axis=1), np.nan)
    with np.errstate(invalid="ignore"):
        return np.asarray(best / true[:, -1])


def weighted_brier(probabilities: Scores, labels: Labels, w: Weights) -> Draws:
    """The mean of (probability - label)^2 (Brier 1950).

    0 is perfect; always saying the prevalence p gives p (1 - p).
    """
    return np.asarray(w @ (probabilities - labels) ** 2 / w.sum(axis=1))


def weighted_ece(probabilities: Scores, labels: Labels, w: Weights, *, n_bins: int = 10) -> Draws:
    """Expected calibration error (Guo et al. 1706.04599), over bins of equal width.

    sum over bins of n_bin / n * |share of dangerous rows in it - mean probability in it|
    """
    if np.isnan(probabilities).any():
        return np.full(len(w), np.nan)
    gap = np.zeros(len(w))
    for rows in probability_bins(probabilities, n_bins=n_bins):
        gap += np.abs(w[:, rows] @ (labels[rows] - probabilities[rows]))
    return np.asarray(gap / w.sum(axis=1))


def probability_bins(probabilities: Scores, *, n_bins: int = 10) -> list[Bool[np.ndarray, " prompt"]]:
    """Which rows lie in each of the bins of equal width that are not empty, lowest probabilities first."""
    place = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    return [place == chosen for chosen in range(n_bins) if (place == chosen).any()]


def weighted_roc(scores: Scores, labels: Labels, w: Weights) -> tuple[Curves, Curves]:
    """(false positive rate, true positive rate) at each threshold, from the highest down; (0, 0) first.

    The area under the straight lines between them is `weighted_auroc`.
    """
    dangerous, safe = _by_value(scores, labels, w)
    return _rising(safe), _rising(dangerous)


def weighted_precision_recall(scores: Scores, labels: Labels, w: Weights) -> tuple[Curves, Curves]:
    """(recall, precision) at each threshold, from the highest down.

    A step curve, whose precision holds from the recall before it to its own: the area is `weighted_auprc`.
    """
    dangerous, safe = _by_value(scores, labels, w)
    return _rising(dangerous)[:, 1:], _share_above(dangerous, safe)


def weighted_risk_coverage(
    margins: Scores, wrong: Bool[np.ndarray, " prompt"], w: Weights
) -> tuple[Curves, Curves]:
    """(coverage, risk): the share of rows decided, and the share of these that is `wrong`.

    Rows are decided from the largest margin (distance from the threshold) down, equal ones together
    (Geifman & El-Yaniv 1705.08500).
    """
    errors, right = _by_value(margins, wrong, w)
    return _rising(errors + right)[:, 1:], _share_above(errors, right)


def band_of_curves(x: Curves, y: Curves, at: Float[np.ndarray, " _"], *, steps: bool = False) -> Band:
    """The middle 95% of resampled curves at given places: (low, high).

    Each curve's x rises. Between two of its points it is a straight line, or (`steps`) the later point's y.
    """
    if steps:
        places = [np.searchsorted(own - 1e-9, at).clip(max=len(own) - 1) for own in x]
        read = np.array([own[place] for own, place in zip(y, places, strict=True)])
    else:
        read = np.array([np.interp(at, *own) for own in zip(x, y, strict=True)])
    known = read[np.isfinite(read).all(axis=1)]
    low, high = np.percentile(known, [2.5, 97.5], axis=0) if len(known) else np.full((2, len(at)), np.nan)
    return low, high


def mcnemar(first_right: Bool[np.ndarray, " prompt"], second_right: Bool[np.ndarray, " prompt"]) -> float:
    """The exact p-value (McNemar 1947) of two detectors being right equally often on the same rows.

    Only rows on which one is right and the other wrong count: their split against a fair coin.
    """
    from scipy.stats import binomtest

    first_only = int((first_right & ~second_right).sum())
    second_only = int((second_right & ~first_right).sum())
    if first_only + second_only == 0:
        return 1.0
    return float(binomtest(first_only, first_only + second_only).pvalue)


def delong(first: Scores, second: Scores, labels: Labels) -> tuple[float, float, float]:
    """(AUROC of first - AUROC of second, its standard error, p-value) on the same rows.

    DeLong et al. 1988: the AUROC is a mean over pairs, so its variance is that of the rows' placements,
    V10_i = share of safe rows below dangerous row i and V01_j = share of dangerous rows above safe row j:
    var = var_i(V10 of first - of second) / n_dangerous + the same of V01 / n_safe. Rows count as independent.
    NaN with fewer than two rows of a class; p is 1 where the two never differ.
    """
    from scipy.stats import norm

    check_scores(first)
    check_scores(second)
    if min(labels.sum(), (~labels).sum()) < 2:
        return float("nan"), float("nan"), float("nan")
    (above_1, below_1), (above_2, below_2) = _placements(first, labels), _placements(second, labels)
    difference = float(above_1.mean() - above_2.mean())
    variance = (above_1 - above_2).var(ddof=1) / len(above_1) + (below_1 - below_2).var(ddof=1) / len(below_1)
    error = float(np.sqrt(variance))
    if error == 0:
        return difference, 0.0, 1.0 if difference == 0 else 0.0
    return difference, error, float(2 * norm.sf(abs(difference) / error))


def sign_flip_p(
    differences: Float[np.ndarray, " prompt"], *, n_resamples: int = 4999, seed: int = 0
) -> float:
    """Two-sided p-value of mean difference 0, from flipping the sign of each pair (exact where few).

    Fisher's randomisation test for paired rows, as `scipy.stats.permutation_test` has it. NaN without rows.
    """
    from scipy.stats import permutation_test

    if len(differences) < 2:
        # One pair is as extreme with either sign.
        return float("nan") if len(differences) == 0 else 1.0

    def mean(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        return (x - y).mean(axis=axis)

    result = permutation_test(
        (differences, np.zeros_like(differences)),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values.

    The k-th smallest of m is multiplied by m - k + 1, is never below a smaller one's, and at most 1.
    Those that are NaN stay NaN and are not counted.
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, p[i] * (len(order) - rank)))
        adjusted[i] = running
    return [float(value) for value in adjusted]


def check_scores(scores: Scores) -> None:
    """Raise `OptionError` for NaN or infinite scores, or none at all."""
    if len(scores) == 0 or not np.isfinite(scores).all():
        raise OptionError(
            f"{len(scores)} scores of which {int((~np.isfinite(scores)).sum())} are NaN or infinite: "
            "expected at least one score, all finite"
        )


def _by_value(scores: Scores, labels: Labels, w: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Weight of dangerous and of safe rows at each distinct score, highest score first."""
    check_scores(scores)
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    counted = w[:, order]
    dangerous, safe = (np.add.reduceat(counted * of[order], starts, axis=1) for of in (labels, ~labels))
    return dangerous, safe


def _rising(weights: np.ndarray) -> np.ndarray:
    """The running share of each row's sum, from 0 to 1; NaN where the sum is 0."""
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.pad(weights.cumsum(axis=1) / total, ((0, 0), (1, 0)))


def _share_above(chosen: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `chosen` in all that came until then; 0 where nothing has."""
    among, all_of_them = chosen.cumsum(axis=1), (chosen + others).cumsum(axis=1)
    return np.where(all_of_them > 0, among / np.where(all_of_them > 0, all_of_them, 1), 0)


def _placements(scores: Scores, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """The share of safe rows below each dangerous row, and of dangerous rows above each safe row."""
    from scipy.stats import rankdata

    dangerous, safe = scores[labels], scores[~labels]
    ranks = rankdata(scores)
    above = (ranks[labels] - rankdata(dangerous)) / len(safe)
    below = 1 - (ranks[~labels] - rankdata(safe)) / len(dangerous)
    return above, below
