"""Detection: scores, comparisons, audits, transfer."""

from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..audit import LabelCurve, ShortcutAudit, ToneContent, TransferMatrix
from ..evaluate import DetectionReport, DetectorComparison
from ..intervals import interval_text
from ..types import OptionError
from .style import ACCENT, CONTROL, DANGEROUS, DIVERGING, INK, SAFE, SECOND, error_bar, pale, styled, wrapped


def score_distribution(report: DetectionReport) -> go.Figure:
    """Each prompt's score by type, safe and dangerous apart, with the threshold that was frozen before."""
    kinds = list(dict.fromkeys(report.kinds))
    of = np.array(report.kinds)
    figure = go.Figure()
    rng = np.random.default_rng(0)
    for label, name, colour in ((False, "safe", SAFE), (True, "dangerous", DANGEROUS)):
        chosen = report.labels == label
        place = np.array([kinds.index(kind) for kind in of[chosen]], dtype=float)
        offset = 0.19 if label else -0.19
        figure.add_scatter(
            x=report.scores[chosen],
            y=place + offset + rng.uniform(-0.13, 0.13, size=len(place)),
            mode="markers",
            name=f"{name} (n = {int(chosen.sum())})",
            marker={"color": colour, "size": 7, "opacity": 0.7},
            hovertemplate="score %{x:.4f}",
        )
    figure.add_vline(report.threshold, line={"color": INK, "dash": "dash", "width": 1.5})
    figure.add_annotation(
        x=report.threshold, y=1, yref="paper", yanchor="bottom", showarrow=False, text="threshold"
    )
    figure.update_yaxes(
        tickvals=list(range(len(kinds))),
        ticktext=[kind.replace("_", " ") for kind in kinds],
        autorange="reversed",
        showgrid=False,
    )
    figure.update_xaxes(title_text="score (higher = more dangerous)")
    figure.update_layout(legend={"y": 1.04})
    title = f"Scores on {report.source}: AUROC {interval_text(report.frame.iloc[0], 'auroc')}"
    return styled(figure, title, f"{report.detector} · {report.model}", 170 + 74 * len(kinds), above=44)


def comparison(result: DetectorComparison, *, measure: str = "accuracy") -> go.Figure:
    """Several detectors on the same held-out sets, a panel a set, with 95% intervals and the chance line."""
    frame = result.overall
    sets = list(dict.fromkeys(frame["set"]))
    detectors = list(dict.fromkeys(frame["detector"]))[::-1]
    figure = make_subplots(
        rows=1, cols=len(sets), shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=sets
    )
    figure.update_annotations(font_size=13)
    for column, name in enumerate(sets, start=1):
        tested = frame.loc[frame["set"] == name]
        part = tested.set_index("detector").reindex(detectors)
        figure.add_scatter(
            x=part[measure],
            y=detectors,
            mode="markers",
            marker={"size": 10, "color": [_detector_colour(d) for d in detectors]},
            error_x=error_bar(part, measure) | {"color": CONTROL, "thickness": 1.5},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        chance = 0.5 if measure == "auroc" else float(tested["majority"].iloc[0])
        figure.add_vline(chance, row=1, col=column, line={"color": CONTROL, "dash": "dot"})  # type: ignore[arg-type]
        figure.update_xaxes(
            title_text=f"{measure} (n = {int(tested[['n_safe', 'n_dangerous']].iloc[0].sum())})",
            range=[0, 1],
            row=1,
            col=column,
        )
    figure.update_layout(showlegend=False)
    dotted = "chance" if measure == "auroc" else "always the commoner class"
    note = f"{result.model} · 95% intervals · dotted: {dotted}"
    return styled(figure, "Tone against content vectors", note, 160 + 46 * len(detectors), above=30)


def shortcut_audit(*audits: ShortcutAudit) -> go.Figure:
    """AUROC of a detector, of baselines that see no meaning, and of the detector on reworded prompts.

    A panel for each audit: the same detector on several held-out sets.
    """
    if not audits:
        raise OptionError("no audits given: expected at least one")
    names = audits[0].frame["name"].tolist()[::-1]
    kinds = {"detector": DANGEROUS, "baseline": CONTROL, "rewording": SAFE}
    figure = make_subplots(
        rows=1,
        cols=len(audits),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[wrapped(audit.source) for audit in audits],
    )
    figure.update_annotations(font_size=13)
    for column, audit in enumerate(audits, start=1):
        for kind, colour in kinds.items():
            part = audit.frame.loc[audit.frame["kind"] == kind]
            figure.add_scatter(
                x=part["auroc"],
                y=part["name"],
                mode="markers",
                name={"detector": "the detector", "rewording": "the detector, text changed"}.get(kind, kind),
                showlegend=column == 1,
                marker={"size": 10, "color": colour},
                error_x=error_bar(part, "auroc") | {"color": colour, "thickness": 1.5},
                hovertemplate="%{y}: AUROC %{x:.3f}<extra></extra>",
                row=1,
                col=column,
            )
        figure.add_vline(0.5, row=1, col=column, line={"color": CONTROL, "dash": "dot"})  # type: ignore[arg-type]
        figure.update_xaxes(title_text=f"AUROC (n = {audit.n})", row=1, col=column)
    lowest = min(0.2, *(audit.frame["auroc_low"].to_numpy().min() - 0.02 for audit in audits))
    figure.update_xaxes(range=[lowest, 1.05], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(categoryorder="array", categoryarray=names)
    figure.update_layout(legend={"y": -0.24, "yanchor": "top", "x": 0.5, "xanchor": "center"}, margin_b=90)
    note = f"{audits[0].detector} · {audits[0].model} · 95% intervals · dotted: chance"
    return styled(figure, "How much is style?", note, 240 + 32 * len(names), above=50)


def transfer_matrix(result: TransferMatrix) -> go.Figure:
    """AUROC of each training set (down) on each test set (across); 0.5 is white, below it blue."""
    wide = result.matrix()
    # Without leave-one-out rows the column is of numpy's bools, which are never `is True`.
    inside = result.matrix("inside").eq(True).to_numpy()
    text = [
        [
            "" if np.isnan(value) else f"{value:.2f}{'*' if inside[i, j] else ''}"
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(wide.to_numpy(dtype=float))
    ]
    figure = go.Figure(
        go.Heatmap(
            z=wide.to_numpy(dtype=float),
            x=[wrapped(name, 10) for name in wide.columns],
            y=list(wide.index),
            text=text,
            texttemplate="%{text}",
            colorscale=DIVERGING,
            zmid=0.5,
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "AUROC"}, "thickness": 12},
            hovertemplate="fitted on %{y}<br>tested on %{x}: AUROC %{z:.3f}<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(title_text="tested on", showgrid=False, type="category")
    figure.update_xaxes(tickfont_size=10, automargin=True)
    figure.update_yaxes(title_text="fitted on", showgrid=False, autorange="reversed", type="category")
    note = f"{result.model} · {result.method} · * cross-validated inside the set · white = chance"
    return styled(figure, "What carries over", note, 190 + 34 * len(wide))


def label_curve(*curves: LabelCurve, measure: str = "auroc") -> go.Figure:
    """Held-out AUROC (or accuracy) against the number of training labels, with the band over seeds."""
    if not curves:
        raise OptionError("no label curves given: expected at least one")
    figure = go.Figure()
    for curve, colour in zip(curves, cycle([DANGEROUS, SAFE, ACCENT, SECOND]), strict=False):
        frame = curve.summary()
        band = [*frame[f"{measure}_high"], *frame[f"{measure}_low"][::-1]]
        x = [*frame["labels"], *frame["labels"][::-1]]
        figure.add_scatter(
            x=x,
            y=band,
            mode="lines",
            fill="toself",
            fillcolor=pale(colour),
            line_width=0,
            hoverinfo="skip",
            showlegend=False,
        )
        figure.add_scatter(
            x=frame["labels"],
            y=frame[measure],
            mode="lines+markers",
            name=curve.method,
            line={"color": colour, "width": 2},
            hovertemplate="%{x} labels: %{y:.3f}",
        )
    first = curves[0]
    figure.add_hline(0.5, line={"color": CONTROL, "dash": "dot"})
    ticks = sorted({int(n) for curve in curves for n in curve.frame["labels"]})
    figure.update_xaxes(title_text="training labels (log scale)", type="log", tickvals=ticks, ticktext=ticks)
    figure.update_yaxes(title_text="AUROC" if measure == "auroc" else measure)
    note = f"{first.model} · fitted on {first.train}, tested on {first.test} (n = {first.n_test})"
    return styled(
        figure, "How many labels does it take?", f"{note} · band: lowest to highest seed", 420, above=36
    )


def tone_cells(result: ToneContent) -> go.Figure:
    """Share of prompts flagged by tone and label, before and after the tone direction is projected out."""
    figure = go.Figure()
    cells = result.cells
    names = [f"{label}, {tone}" for label, tone in zip(cells["label"], cells["tone"], strict=True)]
    for suffix, name, colour in (("", "as it is", DANGEROUS), ("_without_tone", "tone projected out", SAFE)):
        estimate = f"flagged{suffix}"
        figure.add_bar(
            x=names,
            y=cells[estimate],
            name=name,
            marker_color=colour,
            error_y=error_bar(cells, estimate) | {"thickness": 1.2, "color": INK},
            hovertemplate="%{x}: %{y:.2f} flagged",
        )
    figure.update_yaxes(title_text="share flagged", range=[0, 1])
    order = [f"{label}, {tone}" for label in ("safe", "dangerous") for tone in ("polite", "rude")]
    figure.update_xaxes(categoryorder="array", categoryarray=order)
    n = int(cells["n"].to_numpy().min())
    note = f"{result.model} · layer {result.layer} · {result.source}, n = {n} a bar · 95% intervals"
    return styled(figure, "Tone or danger?", note, 380, above=36)


def _detector_colour(name: str) -> str:
    for word, colour in (("tone", SECOND), ("content", DANGEROUS)):
        if name.startswith(word):
            return colour
    return CONTROL
