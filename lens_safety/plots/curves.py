"""Curves of scored prompts: who is caught at which cost, whether probabilities hold, what abstaining buys."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go

from ..evaluate import DetectionReport
from ..intervals import group_weights, interval_text, proportion
from ..metrics import (
    Curves,
    Weights,
    band_of_curves,
    probability_bins,
    weighted_precision_recall,
    weighted_risk_coverage,
    weighted_roc,
)
from ..types import OptionError
from .layout import legend_below
from .style import ACCENT, CONTROL, DANGEROUS, INK, SAFE, SECOND, pale, styled, wrapped

_N_BOOT = 500
_GRID = np.linspace(0, 1, 201)
_BAND = "band: 95%, prompts resampled"
_Curve = Callable[[DetectionReport, Weights], tuple[Curves, Curves]]


def roc(*reports: DetectionReport) -> go.Figure:
    """The share of dangerous prompts caught against the share of safe ones flagged, at every threshold.

    The diamond is the threshold that was frozen before; the legend has the AUROC with its interval.

    Raises:
        OptionError: no reports, or one with prompts of a single class.
    """
    _require_both_classes(reports)
    figure = go.Figure()
    _diagonal(figure)

    def curve(report: DetectionReport, w: Weights) -> tuple[Curves, Curves]:
        return weighted_roc(report.scores, report.labels, w)

    for report, name, colour in _each(reports):
        entry = f"{name}: AUROC {interval_text(report.frame.iloc[0], 'auroc')}"
        at = [np.inf, *np.unique(report.scores)[::-1]]
        hover = "score ≥ %{customdata:.4f}: %{y:.3f} caught, %{x:.3f} flagged in error"
        _banded(figure, report, entry, colour, curve, _GRID, at, hover)
        place = report.estimate("fpr").value, report.estimate("tpr").value
        hover = f"threshold {report.threshold:.4f}: %{{y:.3f}} caught, %{{x:.3f}} flagged in error"
        _diamond(figure, place, "frozen threshold", colour, hover, legend=report is reports[0])
    figure.update_xaxes(title_text="false positive rate (share of safe flagged)", range=[-0.01, 1.01])
    figure.update_yaxes(title_text="true positive rate<br>(share of dangerous caught)", range=[-0.01, 1.01])
    return _finished(figure, reports, "ROC: caught against false alarms", f"{_BAND} · dotted: chance")


def precision_recall(*reports: DetectionReport) -> go.Figure:
    """The share of flagged prompts that are dangerous against the share of dangerous ones caught.

    Dotted is the prevalence: the precision of flagging at random. The diamond is the frozen threshold.

    Raises:
        OptionError: no reports, or one with prompts of a single class.
    """
    _require_both_classes(reports)
    figure = go.Figure()

    def curve(report: DetectionReport, w: Weights) -> tuple[Curves, Curves]:
        return weighted_precision_recall(report.scores, report.labels, w)

    for report, name, colour in _each(reports):
        entry = f"{name}: AUPRC {interval_text(report.frame.iloc[0], 'auprc')}"
        at, hover = (
            np.unique(report.scores)[::-1],
            "score ≥ %{customdata:.4f}: recall %{x:.3f}, precision %{y:.3f}",
        )
        _banded(figure, report, entry, colour, curve, _GRID[1:], at, hover, steps=True)
        flagged = report.scores > report.threshold
        # Where nothing is flagged there is no precision, and no diamond.
        precision = float(report.labels[flagged].mean()) if flagged.any() else float("nan")
        hover = f"threshold {report.threshold:.4f}: recall %{{x:.3f}}, precision %{{y:.3f}}"
        place = report.estimate("tpr").value, precision
        _diamond(figure, place, "frozen threshold", colour, hover, legend=report is reports[0])
    _controls(figure, reports, "prevalence")
    figure.update_xaxes(title_text="recall (share of dangerous caught)", range=[-0.01, 1.01])
    figure.update_yaxes(title_text="precision (share of<br>flagged that is dangerous)", range=[-0.01, 1.01])
    return _finished(figure, reports, "Precision against recall", f"{_BAND} · dotted: prevalence (chance)")


def reliability(*reports: DetectionReport, n_bins: int = 10) -> go.Figure:
    """The share of dangerous prompts among those given about the same calibrated probability.

    A point for each bin of equal width: its mean probability, the observed share with Wilson's interval, and
    a size that grows with its number of prompts. On the diagonal probabilities are right; dotted across
    is the prevalence, that of a detector that tells nothing apart.

    Raises:
        OptionError: no reports, or one without probabilities.
    """
    _require(reports)
    for report in reports:
        if not np.isfinite(report.probabilities).all():
            raise OptionError(
                f"the report of {report.detector} on {report.source} has no probabilities: expected "
                "calibrated ones, as evaluate() gives; or call report_scores(..., probabilities=...)"
            )
    figure = go.Figure()
    _diagonal(figure)
    for report, name, colour in _each(reports):
        ece = interval_text(report.frame.iloc[0], "ece")
        figure.add_trace(_bins(report, f"{name}: ECE {ece}", colour, n_bins))
    _controls(figure, reports, "prevalence")
    figure.update_xaxes(title_text="calibrated probability of danger", range=[-0.03, 1.03])
    figure.update_yaxes(title_text="share that is dangerous", range=[-0.03, 1.03])
    note = "95% intervals · dot size: prompts in the bin · diagonal: calibrated · dotted across: prevalence"
    return _finished(figure, reports, "Are the probabilities right?", note)


def risk_coverage(*reports: DetectionReport) -> go.Figure:
    """The error rate among the prompts decided, when those nearest the threshold are abstained from.

    A good detector's curve falls to the left. The diamond is the band that the detector ships with
    (all prompts decided where it has none); dotted is the error of always giving the commoner class.

    Raises:
        OptionError: no reports.
    """
    _require(reports)
    figure = go.Figure()

    def curve(report: DetectionReport, w: Weights) -> tuple[Curves, Curves]:
        wrong = (report.scores > report.threshold) != report.labels
        return weighted_risk_coverage(np.abs(report.scores - report.threshold), wrong, w)

    for report, name, colour in _each(reports):
        at = np.unique(np.abs(report.scores - report.threshold))[::-1]
        hover = (
            "score at least %{customdata:.4f} from the threshold: %{x:.2f} decided, %{y:.3f} of them wrong"
        )
        # Fewer than five prompts are no rate.
        grid = np.linspace(min(1.0, 5 / report.n), 1, len(_GRID))
        _banded(figure, report, name, colour, curve, grid, at, hover, steps=True)
        decided, right = report.estimate("decided").value, report.estimate("accuracy_decided").value
        hover = f"band {report.band:.4f}: %{{x:.3f}} decided, %{{y:.3f}} of them wrong"
        _diamond(figure, (decided, 1 - right), "as shipped", colour, hover, legend=report is reports[0])
    _controls(figure, reports, "majority")
    figure.update_xaxes(title_text="coverage (share of prompts decided)", range=[0, 1.02])
    figure.update_yaxes(title_text="error rate<br>(share of decided)", rangemode="tozero")
    return _finished(figure, reports, "What abstaining buys", f"{_BAND} · dotted: always the commoner class")


def _require(reports: Sequence[DetectionReport]) -> None:
    if not reports:
        raise OptionError("no reports given: expected at least one DetectionReport, as evaluate() gives")


def _require_both_classes(reports: Sequence[DetectionReport]) -> None:
    _require(reports)
    for report in reports:
        if report.labels.all() or not report.labels.any():
            n = int(report.labels.sum())
            raise OptionError(
                f"{report.source} has {report.n - n} safe and {n} dangerous prompts: expected both for a "
                "curve; evaluate on a set of both, or see plots.risk_coverage"
            )


def _each(reports: Sequence[DetectionReport]) -> Iterator[tuple[DetectionReport, str, str]]:
    """Each report with what sets it apart from the others, and its colour."""
    varied = _varied(reports) or [0]
    colours = cycle([DANGEROUS, SAFE, ACCENT, SECOND, INK])
    for report, colour in zip(reports, colours, strict=False):
        yield report, ", ".join(_described(report)[i] for i in varied), colour


def _described(report: DetectionReport) -> tuple[str, str, str]:
    return report.detector, f"{report.source} (n = {report.n})", report.model


def _varied(reports: Sequence[DetectionReport]) -> list[int]:
    """Which of detector, set and model are not the same in all reports."""
    return [i for i in range(3) if len({_described(report)[i] for report in reports}) > 1]


def _banded(
    figure: go.Figure,
    report: DetectionReport,
    entry: str,
    colour: str,
    curve: _Curve,
    grid: np.ndarray,
    at: Sequence[float] | np.ndarray,
    hover: str,
    *,
    steps: bool = False,
) -> None:
    """The curve of all rows, over the middle 95% of its resamples."""
    weights = group_weights(np.arange(report.n), n_resamples=_N_BOOT, seed=report.seed)
    low, high = band_of_curves(*curve(report, weights), grid, steps=steps)
    figure.add_scatter(
        x=[*grid, *grid[::-1]],
        y=[*high, *low[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=pale(colour, 0.14),
        line_width=0,
        hoverinfo="skip",
        showlegend=False,
        legendgroup=entry,
    )
    x, y = (own[0] for own in curve(report, np.ones((1, report.n))))
    kept = x >= grid[0]
    figure.add_scatter(
        x=x[kept],
        y=y[kept],
        customdata=np.asarray(at)[kept],
        mode="lines",
        line={"color": colour, "width": 2, "shape": "vh" if steps else "linear"},
        name=wrapped(entry, 42),
        legendgroup=entry,
        hovertemplate=f"{hover}<extra></extra>",
    )


def _diamond(
    figure: go.Figure, place: tuple[float, float], name: str, colour: str, hover: str, *, legend: bool
) -> None:
    figure.add_scatter(
        x=[place[0]],
        y=[place[1]],
        mode="markers",
        marker={"symbol": "diamond", "size": 12, "color": colour, "line": {"color": "white", "width": 1.5}},
        name=name,
        showlegend=legend,
        hovertemplate=f"{hover}<extra></extra>",
    )


def _bins(report: DetectionReport, entry: str, colour: str, n_bins: int) -> go.Scatter:
    rows = probability_bins(report.probabilities, n_bins=n_bins)
    counts = [int(of.sum()) for of in rows]
    shares = [proportion(int(report.labels[of].sum()), n) for of, n in zip(rows, counts, strict=True)]
    sizes = 6 + 18 * np.sqrt(np.array(counts) / max(counts))
    return go.Scatter(
        x=[float(report.probabilities[of].mean()) for of in rows],
        y=[share.value for share in shares],
        error_y={
            "type": "data",
            "array": [share.high - share.value for share in shares],
            "arrayminus": [share.value - share.low for share in shares],
            "thickness": 1.2,
            "width": 3,
        },
        mode="lines+markers",
        line={"color": colour, "width": 1.2},
        marker={"color": colour, "size": sizes, "opacity": 0.85, "line": {"color": "white", "width": 1}},
        customdata=counts,
        name=wrapped(entry, 42),
        hovertemplate="probability %{x:.2f}: %{y:.2f} dangerous, n = %{customdata}<extra></extra>",
    )


def _diagonal(figure: go.Figure) -> None:
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, layer="below", line={"color": CONTROL, "dash": "dot"}
    )


def _controls(figure: go.Figure, reports: Sequence[DetectionReport], name: str) -> None:
    """A dotted line for each set's prevalence, or error of its commoner class."""
    shares = [float(report.frame[name].iloc[0]) for report in reports]
    for height in sorted({1 - share if name == "majority" else share for share in shares}):
        figure.add_hline(height, layer="below", line={"color": CONTROL, "dash": "dot"})


def _finished(figure: go.Figure, reports: Sequence[DetectionReport], title: str, note: str) -> go.Figure:
    same = [i for i in (2, 0, 1) if i not in (_varied(reports) or [0])]
    about = " · ".join(_described(reports[0])[i] for i in same)
    return legend_below(styled(figure, title, f"{about} · {note}" if about else note, 420))
