from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import labelled
from sklearn.metrics import auc, precision_recall_curve, roc_curve

import lens_safety as ls
from lens_safety import plots
from lens_safety.evaluate import DetectionReport, compare, report_scores
from lens_safety.metrics import (
    band_of_curves,
    weighted_auprc,
    weighted_auroc,
    weighted_precision_recall,
    weighted_risk_coverage,
    weighted_roc,
)

N = 40


def titles(figure) -> set[str]:
    axes = [a for a in figure.layout if str(a).startswith(("xaxis", "yaxis"))]
    return {str(figure.layout[axis].title.text).replace("<br>", " ") for axis in axes}


def text(figure) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def named(figure, start: str) -> Any:
    (trace,) = [t for t in figure.data if (t.name or "").replace("<br>", " ").startswith(start)]
    return trace


def drawn(seed: int = 0, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Scores rounded so that some are equal, a third of them dangerous and higher."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3 == 0
    return np.round(rng.normal(size=n) + 1.2 * labels, 1), labels


def reported(scores: np.ndarray, labels: np.ndarray, **options: Any) -> DetectionReport:
    options = {"threshold": 0.55, "detector": "lda at layer 3", "model": "m", "n_resamples": 50} | options
    prompts = labelled([f"text {i}" for i in range(len(scores))], labels, kind="odd_ones")
    return report_scores(scores, prompts, **options)


@pytest.fixture(scope="module")
def report() -> DetectionReport:
    scores, labels = drawn()
    return reported(scores, labels, probabilities=1 / (1 + np.exp(-scores)), band=0.3)


def ones(n: int = N) -> np.ndarray:
    return np.ones((1, n))


def test_the_roc_is_scikit_learns_and_its_area_the_auroc():
    scores, labels = drawn()
    (x,), (y,) = weighted_roc(scores, labels, ones())
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(x, fpr)
    np.testing.assert_allclose(y, tpr)
    assert auc(x, y) == pytest.approx(weighted_auroc(scores, labels, ones())[0])


def test_precision_and_recall_are_scikit_learns_and_their_steps_the_auprc():
    scores, labels = drawn()
    (recall,), (precision,) = weighted_precision_recall(scores, labels, ones())
    expected, at, _ = precision_recall_curve(labels, scores)
    np.testing.assert_allclose(precision, expected[-2::-1])
    np.testing.assert_allclose(recall, at[-2::-1])
    area = (np.diff(recall, prepend=0) * precision).sum()
    assert area == pytest.approx(weighted_auprc(scores, labels, ones())[0])


def test_risk_by_hand_where_equal_margins_are_decided_together():
    margins, wrong = np.array([3.0, 2.0, 2.0, 1.0]), np.array([False, True, False, True])
    coverage, risk = weighted_risk_coverage(margins, wrong, np.array([[1.0] * 4, [2.0, 0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(coverage, [[0.25, 0.75, 1], [0.5, 0.75, 1]])
    np.testing.assert_allclose(risk, [[0, 1 / 3, 0.5], [0, 0, 0.25]])


def test_a_band_is_the_middle_of_the_curves_straight_or_in_steps():
    x, y = np.array([[0.0, 0.5, 1.0]] * 3), np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [np.nan] * 3])
    low, high = band_of_curves(x, y, np.array([0.25, 1.0]))
    np.testing.assert_allclose([low, high], [[0.0125, 1], [0.4875, 1]])
    low, high = band_of_curves(x, y, np.array([0.25, 0.5, 0.75]), steps=True)
    np.testing.assert_allclose([low, high], [[0.025, 0.025, 1], [0.975, 0.975, 1]])


def test_roc_has_the_curve_its_band_the_threshold_and_chance(report):
    figure: Any = plots.roc(report)
    band, curve, diamond = figure.data
    fpr, tpr, _ = roc_curve(report.labels, report.scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.x, fpr)
    np.testing.assert_allclose(curve.y, tpr)
    assert "AUROC " in curve.name
    assert f"{report.auroc.value:.2f} [{report.auroc.low:.2f}, " in curve.name
    half = len(band.x) // 2
    high, low = np.array(band.y[:half]), np.array(band.y[half:][::-1])
    at = np.array(band.x[:half])
    inside = np.interp(at, fpr, tpr)
    assert ((low <= inside + 1e-9) & (inside <= high + 1e-9)).mean() > 0.95
    assert (high - low).mean() > 0.1
    flagged = report.scores > report.threshold
    assert diamond.x[0] == pytest.approx(flagged[~report.labels].mean())
    assert diamond.y[0] == pytest.approx(flagged[report.labels].mean())
    (chance,) = figure.layout.shapes
    assert (chance.x0, chance.y0, chance.x1, chance.y1) == (0, 0, 1, 1)
    assert "false positive rate (share of safe flagged)" in titles(figure)
    for said in ("m", "lda at layer 3", "n = 40", "95%", "dotted: chance"):
        assert said in text(figure)


def test_several_reports_are_told_apart_by_what_differs(report):
    other = replace(report, detector="words", scores=-report.scores)
    figure: Any = plots.roc(report, other)
    assert named(figure, "lda at layer 3: AUROC").line.color != named(figure, "words: AUROC").line.color
    assert [t.name for t in figure.data].count("frozen threshold") == 2
    assert [t.showlegend for t in figure.data if t.name == "frozen threshold"] == [True, False]
    assert "lda" not in text(figure)
    models = plots.roc(report, replace(report, model="another"))
    assert named(models, "another: AUROC")
    assert "lda at layer 3" in text(models)


def test_precision_recall_has_steps_the_threshold_and_the_prevalence(report):
    figure: Any = plots.precision_recall(report)
    _, curve, diamond = figure.data
    assert curve.line.shape == "vh"
    flagged = report.scores > report.threshold
    assert diamond.y[0] == pytest.approx(report.labels[flagged].mean())
    assert diamond.x[0] == pytest.approx(flagged[report.labels].mean())
    assert [s.y0 for s in figure.layout.shapes] == [pytest.approx(report.labels.mean())]
    assert f"AUPRC {report.estimate('auprc').value:.2f} [" in curve.name.replace("<br>", " ")
    assert {"recall (share of dangerous caught)", "precision (share of flagged that is dangerous)"} <= titles(
        figure
    )
    assert "dotted: prevalence" in text(figure)


def test_no_diamond_where_nothing_is_flagged():
    scores, labels = drawn()
    figure: Any = plots.precision_recall(reported(scores, labels, threshold=99.0))
    assert np.isnan(figure.data[-1].y[0])


@pytest.mark.parametrize("plot", [plots.roc, plots.precision_recall])
def test_a_curve_of_one_class_is_refused(plot):
    scores, _ = drawn()
    with pytest.raises(ls.OptionError, match="40 safe and 0 dangerous prompts"):
        plot(reported(scores, np.zeros(N, dtype=bool)))


@pytest.mark.parametrize("plot", [plots.roc, plots.precision_recall, plots.reliability, plots.risk_coverage])
def test_no_reports_are_refused(plot):
    with pytest.raises(ls.OptionError, match="no reports given"):
        plot()


def test_reliability_by_hand():
    probabilities = np.repeat([0.12, 0.72], [4, 16])
    labels = np.array([True] + [False] * 3 + [True] * 12 + [False] * 4)
    report = reported(probabilities, labels, probabilities=probabilities)
    figure: Any = plots.reliability(report)
    (dots,) = figure.data
    np.testing.assert_allclose(dots.x, [0.12, 0.72])
    np.testing.assert_allclose(dots.y, [0.25, 0.75])
    assert list(dots.customdata) == [4, 16]
    assert dots.marker.size[0] < dots.marker.size[1]
    # Wilson's interval of 1 of 4.
    assert dots.y[0] - dots.error_y.arrayminus[0] == pytest.approx(0.0456, abs=1e-3)
    assert dots.y[0] + dots.error_y.array[0] == pytest.approx(0.6994, abs=1e-3)
    assert f"ECE {report.estimate('ece').value:.2f} [" in dots.name.replace("<br>", " ")
    diagonal, prevalence = figure.layout.shapes
    assert (diagonal.x1, diagonal.y1) == (1, 1)
    assert prevalence.y0 == prevalence.y1 == pytest.approx(13 / 20)
    with pytest.raises(ls.OptionError, match="no probabilities"):
        plots.reliability(report, reported(*drawn()))


def test_risk_coverage_marks_the_shipped_band_and_the_commoner_class(report):
    figure: Any = plots.risk_coverage(report)
    _, curve, diamond = figure.data
    distance = np.abs(report.scores - report.threshold)
    wrong = (report.scores > report.threshold) != report.labels
    assert curve.x[-1] == pytest.approx(1)
    assert curve.y[-1] == pytest.approx(wrong.mean())
    decided = distance > 0.3
    assert diamond.x[0] == pytest.approx(decided.mean())
    assert diamond.y[0] == pytest.approx(wrong[decided].mean())
    assert [s.y0 for s in figure.layout.shapes] == [pytest.approx(14 / 40)]
    assert "coverage (share of prompts decided)" in titles(figure)
    everyone: Any = plots.risk_coverage(replace(reported(*drawn()), band=0.0))
    assert everyone.data[-1].x[0] == 1


def test_confusion_counts_each_type_and_label_with_the_interval_of_those_flagged():
    scores = np.array([0.0, 0.2, 0.5, 0.9, 1.0, 0.45, 0.0])
    labels = np.array([False, False, False, False, True, True, True])
    report = reported(scores, labels, threshold=0.5, band=0.1)
    figure: Any = plots.confusion(report)
    flagged, unsure, passed = figure.data
    assert [t.name for t in figure.data] == ["flagged", "unsure", "passed"]
    np.testing.assert_allclose(flagged.x, [1 / 4, 1 / 3])
    np.testing.assert_allclose(unsure.x, [1 / 4, 1 / 3])
    np.testing.assert_allclose(passed.x, [2 / 4, 1 / 3])
    assert 0.25 + flagged.error_x.array[0] == pytest.approx(0.6994, abs=1e-3)
    captions = [a.text for a in figure.layout.annotations]
    assert captions == [
        "<b>odd ones, safe</b>: 1 flagged, 1 unsure, 2 passed of 4",
        "<b>odd ones, dangerous</b>: 1 flagged, 1 unsure, 1 passed of 3",
    ]
    assert figure.layout.shapes[0].x0 == pytest.approx(2 / 7)
    assert "dotted: flagged of all (29%)" in text(figure)
    sure: Any = plots.confusion(replace(report, band=0.0))
    assert list(sure.data[1].x) == [0, 0]


def test_models_side_by_side_has_a_panel_a_set_and_a_colour_a_model(report):
    hard = replace(report, source="hard", frame=report.frame.assign(auroc=0.4, auroc_low=0.3, auroc_high=0.5))
    first = compare([("lda", report), ("words", report), ("lda", hard)])
    second = replace(compare([("words", report)]), model="other")
    figure: Any = plots.models_side_by_side(first, second)
    assert [a.text for a in figure.layout.annotations] == [report.source, "hard"]
    own, other, own_hard, other_hard = figure.data
    assert [t.name for t in figure.data] == ["m", "other"] * 2
    assert own.marker.color != other.marker.color
    assert list(own.customdata) == ["lda", "words"]
    assert list(other.customdata) == ["words"]
    assert 0.5 < own.y[1] < 1 < other.y[0] < 1.5
    assert own_hard.x[0] == 0.4
    assert own_hard.error_x.arrayminus[0] == pytest.approx(0.1)
    assert len(other_hard.x or ()) == 0
    assert [s.x0 for s in figure.layout.shapes] == [0.5, 0.5]
    accuracy: Any = plots.models_side_by_side(first, measure="accuracy")
    assert [s.x0 for s in accuracy.layout.shapes] == [pytest.approx(26 / 40)] * 2
    assert "AUROC (n = 40)" in titles(figure)
    assert "dotted: chance" in text(figure)
    with pytest.raises(ls.OptionError, match="no comparisons given"):
        plots.models_side_by_side()
    with pytest.raises(ls.OptionError, match="unknown measure 'luck'"):
        plots.models_side_by_side(first, measure="luck")


def test_legends_below_have_room_for_a_line_an_entry_on_a_narrow_page(report):
    one: Any = plots.roc(report)
    many: Any = plots.roc(*(replace(report, detector=f"another detector, number {i}") for i in range(5)))
    assert many.layout.margin.b - one.layout.margin.b >= 4 * 20
    assert many.layout.height - many.layout.margin.b == one.layout.height - one.layout.margin.b
    assert many.layout.legend.y * many.layout.height < many.layout.margin.b - 50
