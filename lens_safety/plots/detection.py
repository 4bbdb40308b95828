"""Detection: scores, comparisons, audits, transfer."""

from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..audit import LabelCurve, ShortcutAudit, ToneContent, TransferMatrix
from ..evaluate import DetectionReport, DetectorComparison
from ..intervals import interval_text, proportion
from ..types import OptionError
from .layout import legend_below, stacked
from .style import (
    ACCENT,
    COLOURS,
    CONTROL,
    DANGEROUS,
    DIVERGING,
    INK,
    SAFE,
    SECOND,
    error_bar,
    pale,
    styled,
    wrapped,
)

_FEW = 6
"""The most columns whose names and numbers fit a narrow page lying flat and in full size."""

_NAME = 19
"""Characters of a detector's name on one line."""

_OUTCOMES = {"flagged": DANGEROUS, "unsure": "#C3C7CE", "passed": SAFE}


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
        ticktext=[wrapped(kind.replace("_", " "), 14) for kind in kinds],
        autorange="reversed",
        showgrid=False,
    )
    figure.update_xaxes(title_text="score (higher = more dangerous)")
    figure.update_layout(legend={"y": 1.04})
    auroc = f"AUROC {interval_text(report.frame.iloc[0], 'auroc')}"
    note = f"{report.detector} · {report.model} · {report.source}, n = {report.n} · {auroc}"
    return styled(figure, "Scores by type", note, 170 + 74 * len(kinds), above=44)


def comparison(result: DetectorComparison, *, measure: str = "accuracy") -> go.Figure:
    """Several detectors on the same held-out sets, a panel a set, with 95% intervals and the chance line."""
    frame = result.overall
    sets = list(dict.fromkeys(frame["set"]))
    detectors = list(dict.fromkeys(frame["detector"]))[::-1]
    figure = stacked(sets, [_tall(detectors)] * len(sets))
    for row, name in enumerate(sets, start=1):
        tested = frame.loc[frame["set"] == name]
        part = tested.set_index("detector").reindex(detectors)
        figure.add_scatter(
            x=part[measure],
            y=detectors,
            mode="markers",
            marker={"size": 10, "color": [_detector_colour(d) for d in detectors]},
            error_x=error_bar(part, measure) | {"color": CONTROL, "thickness": 1.5},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            row=row,
            col=1,
        )
        _tested_on(figure, row, tested, measure)
    figure.update_yaxes(tickvals=detectors, ticktext=[wrapped(d, _NAME) for d in detectors])
    figure.update_layout(showlegend=False)
    note = f"{result.model} · 95% intervals · dotted: {_chance_name(measure)}"
    return styled(figure, "Detectors on the same prompts", note, figure.layout.height, above=30)


def models_side_by_side(*results: DetectorComparison, measure: str = "auroc") -> go.Figure:
    """The same named detectors on the same sets in several models: a panel a set, a colour a model.

    Each result is one model's `compare([(name, report), ...])`; a name that stands in all of them, such as
    "lda, fitted on content", is put side by side.

    Raises:
        OptionError: no comparisons, or a measure that reports do not have.
    """
    if not results:
        raise OptionError("no comparisons given: expected one for each model, as compare() gives")
    frame = pd.concat([one.overall.assign(model=one.model) for one in results], ignore_index=True)
    if f"{measure}_low" not in frame:
        known = [c.removesuffix("_low") for c in frame if c.endswith("_low")]
        raise OptionError(f"unknown measure {measure!r}: expected one of {', '.join(known)}")
    sets, models = (list(dict.fromkeys(frame[of])) for of in ("set", "model"))
    named = {name: list(dict.fromkeys(frame.loc[frame["set"] == name, "detector"])) for name in sets}
    each = 16 * len(models) + 12
    figure = stacked(sets, [max(_tall(names), each * len(names) + 16) for names in named.values()])
    for row, (name, detectors) in enumerate(named.items(), start=1):
        tested = frame.loc[frame["set"] == name]
        for number, model in enumerate(models):
            part = tested.loc[tested["model"] == model]
            # Around the detector's place, so that intervals do not hide each other.
            offset = 0.64 * ((number + 0.5) / len(models) - 0.5)
            places = [detectors.index(detector) + offset for detector in part["detector"]]
            trace = _model_dots(part, measure, model, COLOURS[number % len(COLOURS)], places)
            figure.add_trace(trace.update(showlegend=row == 1), row=row, col=1)
        _tested_on(figure, row, tested, measure)
        figure.update_yaxes(
            tickvals=list(range(len(detectors))),
            ticktext=[wrapped(d, _NAME) for d in detectors],
            range=[len(detectors) - 0.5, -0.5],
            showgrid=False,
            row=row,
            col=1,
        )
    note = f"{' · '.join(models)} · 95% intervals · dotted: {_chance_name(measure)}"
    return legend_below(styled(figure, "Side by side in each model", note, figure.layout.height, above=30))


def confusion(report: DetectionReport) -> go.Figure:
    """What becomes of the safe and of the dangerous prompts of each type: flagged, unsure or passed.

    A bar a type and label, over it the counts; the error bar is Wilson's 95% interval of the share flagged.
    Dotted is the share flagged of all prompts: where bars would end if type and label did not matter.
    """
    rows = _outcomes(report)
    figure = go.Figure()
    for outcome, colour in _OUTCOMES.items():
        shares = [counts[outcome] / sum(counts.values()) for _, _, counts in rows]
        figure.add_bar(
            x=shares,
            y=list(range(len(rows))),
            width=0.42,
            orientation="h",
            name=outcome,
            marker={"color": colour, "line": {"color": "white", "width": 1}},
            error_x=_flagged_interval(rows) if outcome == "flagged" else None,
            customdata=[f"{kind}, {label}: {row[outcome]} {outcome}" for kind, label, row in rows],
            hovertemplate="%{customdata} (%{x:.0%})<extra></extra>",
        )
    for i, (kind, label, counts) in enumerate(rows):
        figure.add_annotation(
            x=0,
            y=i - 0.24,
            text=_caption(kind, label, counts),
            font_size=11,
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    flagged = float((_verdicts(report) == "flagged").mean())
    for i in range(len(rows)):
        ends = {"x0": flagged, "x1": flagged, "y0": i - 0.24, "y1": i + 0.24}
        figure.add_shape(type="line", **ends, line={"color": INK, "dash": "dot", "width": 1.5})
    figure.update_layout(barmode="stack", margin_l=16, bargap=0)
    figure.update_xaxes(
        title_text="share of the prompts of a type and label", range=[0, 1.02], tickformat=".0%"
    )
    figure.update_yaxes(visible=False, range=[len(rows) - 0.7, -0.62])
    note = f"{report.detector} · {report.model} · {report.source}, n = {report.n} · 95% intervals"
    note += f" · dotted: flagged of all ({flagged:.0%})"
    return legend_below(styled(figure, "What becomes of each type", note, 130 + 46 * len(rows)))


def shortcut_audit(*audits: ShortcutAudit) -> go.Figure:
    """AUROC of a detector, of baselines that see no meaning, and of the detector on reworded prompts.

    A panel for each audit: the same detector on several held-out sets.
    """
    if not audits:
        raise OptionError("no audits given: expected at least one")
    names = audits[0].frame["name"].tolist()[::-1]
    kinds = {"detector": DANGEROUS, "baseline": CONTROL, "rewording": SAFE}
    figure = stacked([audit.source for audit in audits], [_tall(names)] * len(audits))
    for row, audit in enumerate(audits, start=1):
        for kind, colour in kinds.items():
            part = audit.frame.loc[audit.frame["kind"] == kind]
            figure.add_scatter(
                x=part["auroc"],
                y=part["name"],
                mode="markers",
                name={"detector": "the detector", "rewording": "the detector, text changed"}.get(kind, kind),
                showlegend=row == 1,
                marker={"size": 10, "color": colour},
                error_x=error_bar(part, "auroc") | {"color": colour, "thickness": 1.5},
                hovertemplate="%{y}: AUROC %{x:.3f}<extra></extra>",
                row=row,
                col=1,
            )
        figure.add_vline(0.5, row=row, col=1, line={"color": CONTROL, "dash": "dot"})  # type: ignore[arg-type]
        figure.update_xaxes(title_text=f"AUROC (n = {audit.n})", row=row, col=1)
    lowest = min(0.2, *(audit.frame["auroc_low"].to_numpy().min() - 0.02 for audit in audits))
    figure.update_xaxes(range=[lowest, 1.05], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(categoryorder="array", categoryarray=names)
    figure.update_yaxes(tickvals=names, ticktext=[wrapped(name, _NAME) for name in names])
    note = f"{audits[0].detector} · {audits[0].model} · 95% intervals · dotted: chance"
    return legend_below(styled(figure, "How much is style?", note, figure.layout.height, above=30))


def transfer_matrix(result: TransferMatrix) -> go.Figure:
    """AUROC of each training set (down) on each test set (across); 0.5 is white, below it blue."""
    wide = result.matrix()
    many = len(wide.columns) > _FEW
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
            x=list(wide.columns),
            y=list(wide.index),
            text=text,
            texttemplate="%{text}",
            textfont_size=9 if many else 12,
            colorscale=DIVERGING,
            zmid=0.5,
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="fitted on %{y}<br>tested on %{x}: AUROC %{z:.3f}<extra></extra>",
            hoverongaps=False,
        )
    )
    sets, fitted = list(wide.columns), list(wide.index)
    figure.update_xaxes(title_text="tested on", showgrid=False, type="category", automargin=True)
    # Upright names fit columns of any width.
    across = [name.replace("_", " ") if many else wrapped(name, 10) for name in sets]
    figure.update_xaxes(tickvals=sets, ticktext=across, tickangle=-90 if many else 0, tickfont_size=10)
    figure.update_yaxes(title_text="fitted on", showgrid=False, autorange="reversed", type="category")
    down = [wrapped(name.replace("_", " "), 12) for name in fitted]
    figure.update_yaxes(tickvals=fitted, ticktext=down, tickfont_size=10)
    note = f"{result.model} · {result.method} · AUROC · * cross-validated inside the set · white = chance"
    row = max(34, 14 * max(1 + name.count("<br>") for name in down))
    return styled(figure, "What carries over", note, (260 if many else 190) + row * len(wide))


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
    note = f"{note} · band: lowest to highest seed · dotted: chance"
    return legend_below(styled(figure, "How many labels does it take?", note, 400))


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
    figure.update_xaxes(tickvals=order, ticktext=[name.replace(", ", ",<br>") for name in order])
    n = int(cells["n"].to_numpy().min())
    note = f"{result.model} · layer {result.layer} · {result.source}, n = {n} a bar · 95% intervals"
    return styled(figure, "Tone or danger?", note, 380, above=36)


def _detector_colour(name: str) -> str:
    for word, colour in (("tone", SECOND), ("content", DANGEROUS)):
        if name.startswith(word):
            return colour
    return CONTROL


def _tall(names: list[str]) -> int:
    """Pixels of a panel with these names down its side."""
    return 20 + len(names) * (14 + 14 * max(wrapped(name, _NAME).count("<br>") + 1 for name in names))


def _chance_name(measure: str) -> str:
    return {"auroc": "chance", "auprc": "prevalence"}.get(measure, "always the commoner class")


def _tested_on(figure: go.Figure, row: int, tested: pd.DataFrame, measure: str) -> None:
    """A panel's chance line, range, and n."""
    first = tested.iloc[0]
    place = 0.5 if measure == "auroc" else float(first["prevalence" if measure == "auprc" else "majority"])
    figure.add_vline(place, row=row, col=1, line={"color": CONTROL, "dash": "dot"})  # type: ignore[arg-type]
    text = {"auroc": "AUROC", "auprc": "AUPRC"}.get(measure, measure)
    n = int(first[["n_safe", "n_dangerous"]].sum())
    figure.update_xaxes(title_text=f"{text} (n = {n})", range=[0, 1.02], row=row, col=1)


def _model_dots(part: pd.DataFrame, measure: str, model: str, colour: str, places: list[float]) -> go.Scatter:
    return go.Scatter(
        x=part[measure],
        y=places,
        mode="markers",
        name=model,
        legendgroup=model,
        marker={"size": 9, "color": colour},
        error_x=error_bar(part, measure) | {"color": colour, "thickness": 1.4, "width": 3},
        customdata=part["detector"],
        hovertemplate=f"{model}, %{{customdata}}: %{{x:.3f}}<extra></extra>",
    )


def _verdicts(report: DetectionReport) -> np.ndarray:
    decided = np.abs(report.scores - report.threshold) > report.band if report.band else True
    return np.where(decided, np.where(report.scores > report.threshold, "flagged", "passed"), "unsure")


def _outcomes(report: DetectionReport) -> list[tuple[str, str, dict[str, int]]]:
    """(type, label, prompts by outcome) for each type and label that has prompts."""
    verdicts, kinds = _verdicts(report), np.array(report.kinds)
    rows = []
    for kind in dict.fromkeys(report.kinds):
        for label, name in ((False, "safe"), (True, "dangerous")):
            of = (kinds == kind) & (report.labels == label)
            if of.any():
                counts = {outcome: int((verdicts[of] == outcome).sum()) for outcome in _OUTCOMES}
                rows.append((kind.replace("_", " "), name, counts))
    return rows


def _flagged_interval(rows: list[tuple[str, str, dict[str, int]]]) -> dict[str, object]:
    shares = [proportion(counts["flagged"], sum(counts.values())) for _, _, counts in rows]
    return {
        "type": "data",
        "array": [share.high - share.value for share in shares],
        "arrayminus": [share.value - share.low for share in shares],
        "color": INK,
        "thickness": 1.2,
        "width": 4,
    }


def _caption(kind: str, label: str, counts: dict[str, int]) -> str:
    n = sum(counts.values())
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return f"<b>{kind}, {label}</b>: {told} of {n}"
