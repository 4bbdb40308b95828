"""Metrics against their definitions, against scikit-learn, and by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lens_safety.metrics import (
    UNDEFINED,
    accuracy,
    auroc,
    auroc_by_layer,
    best_threshold,
    bootstrap_auroc,
    bootstrap_mean,
    cohens_d,
    group_weights,
    proportion,
    weighted_auroc,
)
from lens_safety.types import OptionError


def tied(seed: int, n: int = 31) -> tuple[np.ndarray, np.ndarray]:
    """Random scores on a coarse grid, and labels of both classes that lean on them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3 == 0
    return rng.integers(0, 6, n) / 4 + 0.3 * labels.round(), labels


def by_pairs(scores: np.ndarray, labels: np.ndarray) -> float:
    difference = scores[labels][:, None] - scores[~labels][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order_ties_counted_half(seed: int):
    scores, labels = tied(seed)
    scores = np.round(scores, 0)
    assert auroc(scores, labels) == pytest.approx(by_pairs(scores, labels))
    assert auroc(scores, labels) == pytest.approx(float(roc_auc_score(labels, scores)))


def test_constant_scores_have_auroc_one_half():
    labels = np.array([True, False, False, True, False])
    assert auroc(np.full(5, 2.0), labels) == 0.5
    assert auroc_by_layer(np.full((2, 5), 2.0), labels).tolist() == [0.5, 0.5]


def test_flipped_labels_and_flipped_scores_turn_auroc_over():
    scores, labels = tied(1)
    assert auroc(scores, labels) > 0.6
    assert auroc(scores, ~labels) == pytest.approx(1 - auroc(scores, labels))
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels))


@pytest.mark.parametrize("label", [True, False])
def test_auroc_of_one_class_is_not_defined(label: bool):
    labels = np.full(4, label)
    assert math.isnan(auroc(np.arange(4.0), labels))
    assert np.isnan(auroc_by_layer(np.ones((3, 4)), labels)).tolist() == [True] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("metric", [auroc, best_threshold])
def test_scores_that_are_not_finite_are_refused(metric, bad: float):
    with pytest.raises(OptionError, match=r"3 scores of which 1 are NaN or infinite"):
        metric(np.array([1.0, bad, 2.0]), np.array([True, False, True]))


def test_no_scores_are_refused():
    with pytest.raises(OptionError, match="0 scores"):
        best_threshold(np.array([]), np.array([], dtype=bool))


def test_auroc_by_layer_is_auroc_row_by_row():
    rng = np.random.default_rng(0)
    _, labels = tied(0)
    layers = rng.integers(0, 5, (7, len(labels))).astype(float)
    expected = [auroc(row, labels) for row in layers]
    assert len(set(expected)) > 3
    np.testing.assert_allclose(auroc_by_layer(layers, labels), expected)


def test_accuracy_takes_a_score_at_the_threshold_for_safe():
    scores, labels = np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, True, True, True])
    assert accuracy(scores, labels, 1.0) == 0.75
    assert accuracy(scores, labels, 0.99) == 1.0


def test_cohens_d_by_hand():
    # Means 4 and 1; variances 2 and 0, so the pooled standard deviation is 1.
    scores, labels = np.array([3.0, 1.0, 5.0, 1.0]), np.array([True, False, True, False])
    assert cohens_d(scores, labels) == pytest.approx(3.0)
    assert cohens_d(scores, ~labels) == pytest.approx(-3.0)


def test_cohens_d_weighs_the_variances_by_class_size():
    # Variances 1 (of three rows) and 8 (of two): pooled (2 * 1 + 1 * 8) / 3.
    scores = np.array([1.0, 2.0, 3.0, 2.0, 6.0])
    labels = np.array([False, False, False, True, True])
    assert cohens_d(scores, labels) == pytest.approx(2 / math.sqrt(10 / 3))


def test_cohens_d_of_constant_classes_and_of_single_rows():
    labels = np.array([True, True, False, False])
    assert cohens_d(np.ones(4), labels) == 0
    assert cohens_d(np.array([2.0, 2.0, 1.0, 1.0]), labels) == math.inf
    assert cohens_d(np.array([1.0, 1.0, 2.0, 2.0]), labels) == -math.inf
    assert math.isnan(cohens_d(np.arange(3.0), np.array([True, False, False])))


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_is_as_accurate_as_any_threshold(seed: int):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 14))
    scores, labels = rng.integers(0, 5, n) / 2.0, rng.random(n) < 0.5
    every = np.arange(-1.0, 4.0, 0.25)
    best = max(accuracy(scores, labels, t) for t in every)
    assert accuracy(scores, labels, best_threshold(scores, labels)) == best


def test_best_threshold_lies_outside_the_scores_of_one_class():
    scores = np.array([1.0, 2.0, 4.0])
    assert best_threshold(scores, np.ones(3, dtype=bool)) < 1
    assert best_threshold(scores, np.zeros(3, dtype=bool)) > 4
    assert best_threshold(np.ones(3), np.ones(3, dtype=bool)) < 1


def test_best_threshold_is_the_middle_of_equally_good_ones():
    scores = np.arange(6.0)
    labels = np.array([False, True, False, True, False, True])
    assert [accuracy(scores, labels, t) for t in (0.5, 2.5, 4.5)] == [4 / 6] * 3
    assert best_threshold(scores, labels) == 2.5
    assert best_threshold(np.array([1.0, 3.0]), np.array([False, True])) == 2.0


@pytest.mark.parametrize(("successes", "n"), [(7, 10), (0, 8), (8, 8), (313, 1000)])
def test_proportion_has_the_wilson_interval(successes: int, n: int):
    z, p = 1.959963984540054, successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    got = proportion(successes, n)
    assert (got.value, got.n) == (p, n)
    assert (got.low, got.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_proportion_of_nothing_is_not_defined():
    assert proportion(0, 0) is UNDEFINED
    assert str(UNDEFINED) == "not defined"
    assert str(proportion(1, 2)) == "0.500 [0.095, 0.905]"


def test_bootstrap_interval_holds_the_estimate():
    scores, labels = tied(3, n=60)
    got = bootstrap_auroc(scores, labels, np.arange(60), n_resamples=200)
    assert got.low < got.value < got.high
    assert (got.value, got.n) == (auroc(scores, labels), 60)


def test_doubling_rows_inside_their_groups_leaves_the_interval_as_it_was():
    scores, labels = tied(4, n=40)
    groups = np.arange(40)
    once = bootstrap_auroc(scores, labels, groups, n_resamples=200)
    rows = np.repeat(groups, 2)
    twice = bootstrap_auroc(scores[rows], labels[rows], groups[rows], n_resamples=200)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    # The negative: the same rows taken for independent ones look surer than they are.
    singly = bootstrap_auroc(scores[rows], labels[rows], np.arange(80), n_resamples=200)
    assert singly.high - singly.low < 0.9 * (once.high - once.low)


def test_every_resample_holds_whole_groups():
    groups = np.array([0, 1, 1, 2, 2, 2, 7])
    weights = group_weights(groups, n_resamples=50, seed=0)
    firsts = [0, 1, 3, 6]
    assert (weights == weights[:, firsts][:, [0, 1, 1, 2, 2, 2, 3]]).all()
    assert (weights[:, firsts].sum(axis=1) == 4).all()
    assert len(set(weights.sum(axis=1))) > 1


@pytest.mark.parametrize("seed", range(5))
def test_weighted_auroc_is_that_of_the_rows_repeated(seed: int):
    scores, labels = tied(seed)
    scores = np.round(scores, 0)
    weights = np.random.default_rng(seed).integers(0, 4, (9, len(scores))).astype(float)
    repeated = [np.repeat(np.arange(len(scores)), row.astype(int)) for row in weights]
    expected = [auroc(scores[rows], labels[rows]) for rows in repeated]
    np.testing.assert_allclose(weighted_auroc(scores, labels, weights), expected)


def test_weighted_auroc_of_one_class_is_not_defined():
    labels = np.array([True, False, False])
    weights = np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    got = weighted_auroc(np.arange(3.0), labels, weights)
    assert np.isnan(got[0])
    assert got[1] == 0


def test_bootstrap_repeats_with_its_seed_and_varies_without():
    scores, labels = tied(5)
    first, again, other = (
        bootstrap_auroc(scores, labels, np.arange(31), n_resamples=50, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_bootstrap_of_one_class_is_not_defined_and_resamples_of_one_class_do_not_spoil_it():
    scores, groups = np.array([0.0, 1.0, 2.0]), np.arange(3)
    assert bootstrap_auroc(scores, np.ones(3, dtype=bool), groups) is UNDEFINED
    got = bootstrap_auroc(scores, np.array([False, False, True]), groups, n_resamples=50)
    assert (got.low, got.value, got.high) == (1, 1, 1)


def test_the_bootstrapped_mean_leaves_nan_rows_out():
    values = np.random.default_rng(0).normal(2.0, 1.0, 100)
    got = bootstrap_mean(values)
    assert got == bootstrap_mean(np.concatenate([[np.nan], values, [np.nan]]))
    assert (got.value, got.n) == (pytest.approx(values.mean()), 100)
    # The standard error is 0.1 here, so the interval is about 2 * 1.96 * 0.1 wide.
    assert got.low < got.value < got.high
    assert got.high - got.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    assert bootstrap_mean(np.full(2, np.nan)) is UNDEFINED
