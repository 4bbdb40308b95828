"""One result in, one plotly figure out, in one house style. Nothing is shown; the figure is returned.

Blue is safe, vermilion is dangerous, grey is a control or chance (Okabe and Ito's colour-blind safe
palette).
"""

import re
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from .audit import LabelCurve, ShortcutAudit, ToneContent, TransferMatrix
from .directions import ContentVectors
from .evaluate import DetectionReport, DetectorComparison
from .files import atomic_path, write_text
from .intervals import interval_text
from .responses import CONTENT, RANDOM, SteeringSweep
from .separation import LayerTable
from .separation import top_dimensions as top_dimensions_of
from .types import EMBED, OptionError

SAFE, DANGEROUS, CONTROL, ACCENT, SECOND = "#0072B2", "#D55E00", "#8A8F98", "#009E73", "#CC79A7"
_COLOURS = (SAFE, DANGEROUS, ACCENT, SECOND, CONTROL, "#E69F00")
INK, FAINT, PAPER = "#1F2933", "#E4E7EB", "#FFFFFF"
TEMPLATE = "lens_safety"
_MEASURE_NAMES = {
    "behaviour": "behaviour of<br>the text",
    "logit_difference": "logit difference<br>of the answers",
    "score": "danger score<br>of the text",
    "inside_score": "danger score of<br>the steered stream",
    "projection": "projection on<br>the direction",
    "nll": "NLL<br>(nats a token)",
    "kl": "KL on neutral<br>text (nats)",
    "repeated_4grams": "repeated<br>4-grams (share)",
    "distinct_2grams": "distinct<br>2-grams (share)",
}
_DIVERGING = [(0, SAFE), (0.5, PAPER), (1, DANGEROUS)]
_CONFIG = {"responsive": True, "displayModeBar": False}
_AXIS = {
    "gridcolor": FAINT,
    "zeroline": False,
    "title": {"font": {"size": 12}, "standoff": 8},
    "tickfont": {"size": 12},
}

pio.templates[TEMPLATE] = go.layout.Template(
    layout={
        "font": {"family": "Inter, system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13},
        "font_color": INK,
        "title": {
            "font": {"size": 16},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 12, "t": 18},
        },
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "colorway": [SAFE, DANGEROUS, ACCENT, SECOND, CONTROL],
        "margin": {"l": 64, "r": 20, "b": 52},
        "xaxis": _AXIS | {"ticks": "outside", "tickcolor": CONTROL, "tickangle": 0},
        "yaxis": _AXIS | {"automargin": True},
        "annotationdefaults": {"font": {"size": 12}},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1},
        "hoverlabel": {"align": "left"},
    }
)


def layer_curve(table: LayerTable) -> go.Figure:
    """AUROC with its interval and the shuffled-label control, separation and magnitude, by layer."""
    frame, best = table.frame, table.best_layer
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.46, 0.27, 0.27]
    )
    x = frame["layer"]
    band = {"x": [*x, *x[::-1]], "y": [*frame["auroc_high"], *frame["auroc_low"][::-1]]}
    figure.add_scatter(
        **band,
        fill="toself",
        fillcolor=_pale(DANGEROUS),
        line_width=0,
        name="95% interval",
        hoverinfo="skip",
    )
    _line(figure, x, frame["auroc"], "AUROC", DANGEROUS, row=1)
    _line(figure, x, frame["auroc_shuffled"], "shuffled labels, 97.5%", CONTROL, row=1, dash="dot")
    _line(figure, x, frame["separation"], "separation", SAFE, row=2, legend=False)
    _line(figure, x, frame["relative_magnitude"], "relative magnitude", ACCENT, row=3, legend=False)
    figure.add_hline(0.5, row=1, col=1, line={"color": CONTROL, "width": 1}, annotation_text="chance")  # type: ignore[arg-type]
    for row in (1, 2, 3):
        figure.add_vline(best, row=row, col=1, line={"color": INK, "width": 1, "dash": "dash"})  # type: ignore[arg-type]
    figure.update_yaxes(title_text="AUROC<br>(cross-validated)", row=1, col=1)
    figure.update_yaxes(title_text="separation<br>1 − cos", row=2, col=1, rangemode="tozero")
    figure.update_yaxes(title_text="magnitude<br>‖v‖ / ‖h‖", row=3, col=1, rangemode="tozero")
    # Every fifth layer keeps the labels apart on a narrow page; the embedding is named.
    last = int(x.to_numpy().max())
    step = 5 if last > 12 else 1
    ticks = [EMBED, *range(step, last - step // 2, step), last]
    figure.update_xaxes(tickvals=ticks, ticktext=["embed" if t == EMBED else str(t) for t in ticks])
    figure.update_xaxes(title_text="layer (resid_post)", row=3, col=1)
    title = f"Where it is: best layer {best}"
    note = f"{table.model} · {table.source} · n = {table.n_safe + table.n_dangerous}"
    return _styled(figure, title, note, 620, above=40)


def vector(vectors: ContentVectors, layer: int, *, k: int = 20) -> go.Figure:
    """One layer's vector: every dimension, the distribution of its values, and the k largest."""
    values = vectors.layer(layer).numpy()
    top = top_dimensions_of(vectors, layer, min(k, len(values)))
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[0.42, 0.58],
        vertical_spacing=0.17,
        horizontal_spacing=0.16,
        subplot_titles=(
            f"all {len(values)} dimensions",
            "distribution of the values",
            f"top {len(top)}: {top['share'].sum():.0%} of ‖v‖²",
        ),
    )
    every = go.Bar(x=np.arange(len(values)), y=values, width=1, marker_color=_signed(values))
    figure.add_trace(every.update(marker_line_width=0), row=1, col=1)
    figure.add_histogram(x=values, nbinsx=60, marker_color=CONTROL, row=2, col=1)
    figure.add_trace(_top_bars(top), row=2, col=2)
    figure.update_xaxes(title_text="dimension", row=1, col=1)
    figure.update_yaxes(title_text="value (resid units)", row=1, col=1)
    figure.update_xaxes(title_text="value (resid units)", row=2, col=1)
    figure.update_yaxes(title_text="dimensions", row=2, col=1)
    figure.update_xaxes(title_text="value (resid units)", row=2, col=2)
    figure.update_yaxes(title_text="dimension", row=2, col=2, tickfont_size=10, type="category")
    figure.update_annotations(font_size=13)
    figure.update_layout(showlegend=False)
    return _styled(
        figure, f"The {vectors.method} vector at layer {layer}", _provenance(vectors), 720, above=30
    )


def top_dimensions(vectors: ContentVectors, layer: int, k: int = 20) -> go.Figure:
    """The k dimensions in which a layer's vector is largest; positive = higher for dangerous prompts."""
    top = top_dimensions_of(vectors, layer, k)
    figure = go.Figure(_top_bars(top))
    figure.update_xaxes(title_text="value (resid units); positive = higher for dangerous")
    figure.update_yaxes(title_text="dimension", type="category", tickfont_size=11)
    title = f"Top {k} dimensions at layer {layer}: {top['share'].sum():.0%} of ‖v‖²"
    return _styled(figure, title, _provenance(vectors), max(320, 120 + 20 * k))


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
    return _styled(figure, title, f"{report.detector} · {report.model}", 170 + 74 * len(kinds), above=44)


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
            error_x=_interval(part, measure) | {"color": CONTROL, "thickness": 1.5},
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
    return _styled(figure, "Tone against content vectors", note, 160 + 46 * len(detectors), above=30)


def dose_response(sweep: SteeringSweep, layer: int | None = None, *, measure: str | None = None) -> go.Figure:
    """Effect and damage against the multiplier, beside random directions of that norm, to the cliff.

    The band spans the means of the random directions; the dashed line is the unsteered model.
    """
    shown, layer = measure or sweep.measure, sweep.layers[0] if layer is None else layer
    summary = sweep.summary(layer)
    measures = {shown: _MEASURE_NAMES[shown], "nll": "NLL<br>(nats a token)"}
    kl = bool(summary["kl"].notna().any())
    measures |= {"kl": "KL on neutral<br>text (nats)"} if kl else {}
    measures |= {"repeated_4grams": "repeated<br>4-grams (share)"}
    figure = make_subplots(rows=len(measures), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for row, (name, label) in enumerate(measures.items(), start=1):
        for trace in _random_band(summary, name, legend=row == 1):
            figure.add_trace(trace, row=row, col=1)
        figure.add_trace(_dose_curve(summary, CONTENT, name, legend=row == 1), row=row, col=1)
        base = float(summary.loc[summary["multiplier"] == 0, name].iloc[0])
        if np.isfinite(base) and name != "kl":
            figure.add_hline(base, row=row, col=1, line={"color": CONTROL, "dash": "dash", "width": 1})  # type: ignore[arg-type]
        figure.update_yaxes(title_text=label, row=row, col=1)
    _mark_cliff(figure, sweep, layer)
    title = f"multiplier of the vector ({sweep.operator}; + toward the class labelled True)"
    figure.update_xaxes(title_text=title, row=len(measures), col=1)
    note = (
        f"{sweep.model} · layer {layer} · n = {sweep.n_prompts} prompts · means with 95% intervals · dashed: "
        "unsteered"
    )
    return _styled(figure, "What steering does, and what it costs", note, 180 + 150 * len(measures), above=40)


def steering_map(sweep: SteeringSweep, *, measure: str | None = None) -> go.Figure:
    """Layer x multiplier: the mean change of a measure above, the damage below; white is no change."""
    name = measure or sweep.measure
    effects = sweep.effects(name)
    damage = "nll_change" if bool(np.isnan(effects["kl"].to_numpy()).all()) else "kl"
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.16)
    panels = (
        (f"change of {_plain_name(name)}", "change"),
        (f"damage: {damage.replace('_', ' ')} (nats)", damage),
    )
    for column, (title, value) in enumerate(panels, start=1):
        wide = effects.pivot(index="layer", columns="multiplier", values=value)
        most = float(np.nanmax(np.abs(wide.to_numpy()))) or 1.0
        figure.add_heatmap(
            z=wide.to_numpy(),
            x=[f"{m:g}" for m in wide.columns],
            y=[str(layer) for layer in wide.index],
            colorscale=_DIVERGING,
            zmin=-most,
            zmax=most,
            colorbar={"x": 0.43 if column == 1 else 1.01, "thickness": 10, "len": 0.9},
            hovertemplate="layer %{y}, multiplier %{x}: %{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text=f"multiplier<br>{title}", type="category", row=1, col=column)
    figure.update_yaxes(title_text="layer", type="category", row=1, col=1)
    note = f"{sweep.model} · n = {sweep.n_prompts} prompts · means · white: no change"
    height = 200 + max(160, 22 * len(sweep.layers))
    return _styled(figure, "Where and how hard to steer", note, height)


def operators(effects: pd.DataFrame, model: str) -> go.Figure:
    """The effect of each operator against the damage, a line an operator and side.

    `effects`: rows of `SteeringSweep.effects` with a column `operator`.
    """
    figure = go.Figure()
    for colour, (name, rows) in zip(cycle(_COLOURS), effects.groupby("operator", sort=False), strict=False):
        for side in (-1, 1):
            part = rows.loc[np.sign(rows["multiplier"]) == side].sort_values("kl")
            figure.add_scatter(
                x=part["kl"],
                y=part["change"],
                mode="lines+markers",
                name=str(name),
                legendgroup=str(name),
                showlegend=side == (1 if float(rows["multiplier"].to_numpy().max()) > 0 else -1),
                line={"color": colour},
                error_y=_interval(part, "change") | {"thickness": 1},
                hovertemplate=f"{name}: KL %{{x:.2f}}, change %{{y:.2f}}<extra></extra>",
            )
    figure.add_hline(0, line={"color": INK, "dash": "dot", "width": 1})
    figure.update_xaxes(title_text="damage: KL on neutral prompts (nats)", type="log")
    figure.update_yaxes(title_text="change of the behaviour")
    note = f"{model} · n = {int(effects['n'].iloc[0])} prompts · means with 95% intervals · equal KL, solved"
    return _styled(figure, "Operators at equal damage", note, 440, above=40)


def prompt_slopes(sweep: SteeringSweep, *, measure: str | None = None) -> go.Figure:
    """Each prompt's slope of the measure against the multiplier, by layer; below 0: the wrong way."""
    table = sweep.steerability(measure)
    name = measure or sweep.measure
    figure = go.Figure()
    for layer in sweep.layers:
        slopes = sweep.slopes(layer, measure)
        figure.add_violin(
            x=[str(layer)] * len(slopes),
            y=slopes,
            points="all",
            pointpos=0,
            jitter=0.4,
            marker={"color": ACCENT, "size": 4},
            fillcolor=_pale(ACCENT),
            line={"color": ACCENT, "width": 1},
            showlegend=False,
        )
    figure.add_scatter(
        x=[str(layer) for layer in table["layer"]],
        y=(table["random_low"] + table["random_high"]) / 2,
        error_y={"type": "data", "array": (table["random_high"] - table["random_low"]) / 2, "width": 14},
        mode="markers",
        marker={"color": INK, "symbol": "line-ew-open", "size": 14, "line": {"width": 2}},
        name="mean slopes of random directions",
    )
    figure.add_hline(0, line={"color": INK, "dash": "dot", "width": 1})
    figure.update_xaxes(title_text="layer steered", type="category")
    figure.update_yaxes(title_text=f"slope of {_plain_name(name)}<br>a multiplier")
    note = f"{sweep.model} · a dot a prompt, n = {sweep.n_prompts} · below the dotted line: anti-steerable"
    return _styled(figure, "Does every prompt follow?", note, 420, above=30)


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
        subplot_titles=[_wrapped(audit.source) for audit in audits],
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
                error_x=_interval(part, "auroc") | {"color": colour, "thickness": 1.5},
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
    return _styled(figure, "How much is style?", note, 240 + 32 * len(names), above=50)


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
            x=[_wrapped(name, 10) for name in wide.columns],
            y=list(wide.index),
            text=text,
            texttemplate="%{text}",
            colorscale=_DIVERGING,
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
    return _styled(figure, "What carries over", note, 190 + 34 * len(wide))


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
            fillcolor=_pale(colour),
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
    return _styled(
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
            error_y=_interval(cells, estimate) | {"thickness": 1.2, "color": INK},
            hovertemplate="%{x}: %{y:.2f} flagged",
        )
    figure.update_yaxes(title_text="share flagged", range=[0, 1])
    order = [f"{label}, {tone}" for label in ("safe", "dangerous") for tone in ("polite", "rude")]
    figure.update_xaxes(categoryorder="array", categoryarray=order)
    n = int(cells["n"].to_numpy().min())
    note = f"{result.model} · layer {result.layer} · {result.source}, n = {n} a bar · 95% intervals"
    return _styled(figure, "Tone or danger?", note, 380, above=36)


def tone_and_content(tone: ContentVectors, content: ContentVectors) -> go.Figure:
    """cos(tone vector, content vector) at each layer, with what random directions of that width give."""
    figure = go.Figure()
    d_model = content.vectors.shape[1]
    # The cosine of two random directions has standard deviation 1 / sqrt(d_model).
    chance = 1.96 / np.sqrt(d_model)
    figure.add_hrect(-chance, chance, fillcolor=FAINT, opacity=0.8, line_width=0)
    layers = list(content.layers)
    _line(figure, layers, content.cosine(tone), "cosine", SECOND, legend=False)
    figure.update_xaxes(title_text="layer (resid_post)")
    figure.update_yaxes(title_text="cos(tone, content)", range=[-1, 1])
    note = f"{content.model.name} · grey: 95% of random directions of width {d_model}"
    return _styled(figure, "Tone and content are not the same direction", note, 340)


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """One HTML file that opens offline (plotly.js inlined)."""
    return write_text(path, figure.to_html(include_plotlyjs=True, config=_CONFIG))


def save_image(figure: go.Figure, path: str | Path, *, width: int = 760, scale: float = 2.0) -> Path:
    """PNG, SVG or PDF by the path's ending; needs the extra `figures` (kaleido) and a Chromium.

    Raises `OptionError` where either is missing, or for another ending.
    """
    ending = Path(path).suffix.lstrip(".").lower()
    try:
        if ending not in ("png", "svg", "pdf"):
            raise ValueError(f"ending {ending!r}")
        with atomic_path(path) as temporary:
            temporary.write_bytes(figure.to_image(format=ending, width=width, scale=scale))
    except (ValueError, RuntimeError, ImportError) as error:
        reason = [*str(error).strip().splitlines(), type(error).__name__][0].rstrip(".,")
        raise OptionError(
            f"{path} cannot be drawn ({reason}): expected a .png, .svg or .pdf "
            "path, kaleido (pip install 'lens-safety[figures]') and an installed Chromium"
        ) from error
    return Path(path)


def fragment(figure: go.Figure, name: str) -> str:
    """The figure as an HTML element, for a page that has plotly.js already."""
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        config=_CONFIG,
    )


def plotly_js() -> str:
    """The source of plotly.js, to be inlined once a page."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _line(
    figure: go.Figure,
    x: Any,
    y: Any,
    name: str,
    colour: str,
    *,
    row: int | None = None,
    dash: str = "solid",
    legend: bool = True,
) -> None:
    trace = go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines",
        line={"color": colour, "dash": dash, "width": 2},
        showlegend=legend,
        hovertemplate=f"layer %{{x}}: {name} %{{y:.3f}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=None if row is None else 1)


def _dose_curve(summary: pd.DataFrame, direction: str, name: str, *, legend: bool) -> go.Scatter:
    part = summary.loc[summary["direction"] == direction].sort_values("multiplier")
    return go.Scatter(
        x=part["multiplier"],
        y=part[name],
        mode="lines+markers",
        line={"color": DANGEROUS},
        name="content vector",
        showlegend=legend,
        error_y=_interval(part, name) | {"thickness": 1},
        customdata=part["dose"],
        hovertemplate="multiplier %{x}, dose %{customdata:.2f}: %{y:.4f}",
    )


def _random_band(summary: pd.DataFrame, name: str, *, legend: bool) -> list[go.Scatter]:
    """From the lowest to the highest mean of the random directions at each multiplier."""
    part = summary.loc[summary["direction"].str.startswith(RANDOM)]
    if part[name].isna().all():
        return []
    by_m = part.groupby("multiplier")[name].agg(["min", "max"]).dropna()
    x = by_m.index.to_list()
    return [
        go.Scatter(
            x=[*x, *x[::-1]],
            y=[*by_m["max"], *by_m["min"][::-1]],
            fill="toself",
            fillcolor=_pale(CONTROL, 0.35),
            line={"color": CONTROL, "width": 1},
            mode="lines",
            name=f"{part['direction'].nunique()} random directions",
            showlegend=legend,
            hoverinfo="skip",
        )
    ]


def _mark_cliff(figure: go.Figure, sweep: SteeringSweep, layer: int) -> None:
    cliff = sweep.cliff()
    for _, one in cliff.loc[(cliff["layer"] == layer) & cliff["multiplier"].notna()].iterrows():
        figure.add_vline(
            one["multiplier"],
            line={"color": INK, "dash": "dot", "width": 1},
        )
        figure.add_annotation(
            x=one["multiplier"], y=1, yref="y domain", text="cliff", font_size=11, showarrow=False, yshift=9
        )


def _plain_name(measure: str) -> str:
    return _MEASURE_NAMES.get(measure, measure).replace("<br>", " ")


def _interval(frame: pd.DataFrame, name: str) -> dict[str, Any]:
    """The error bar of an estimate's columns."""
    return {
        "type": "data",
        "array": frame[f"{name}_high"] - frame[name],
        "arrayminus": frame[name] - frame[f"{name}_low"],
    }


def _top_bars(top: pd.DataFrame) -> go.Bar:
    ordered = top.iloc[::-1]
    return go.Bar(
        x=ordered["value"],
        y=[str(d) for d in ordered["dimension"]],
        orientation="h",
        marker={"color": _signed(ordered["value"].to_numpy()), "line": {"width": 0}},
        customdata=ordered["share"],
        hovertemplate="dimension %{y}: %{x:.3f}, %{customdata:.1%} of ‖v‖²<extra></extra>",
    )


def _wrapped(name: str, width: int = 13) -> str:
    """A long name in several lines, broken after underscores and spaces."""
    lines = [""]
    for part in re.findall(r"[^_ ]+[_ ]?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "<br>".join(lines)


def _signed(values: np.ndarray) -> list[str]:
    return [DANGEROUS if value > 0 else SAFE for value in values]


def _detector_colour(name: str) -> str:
    for word, colour in (("tone", SECOND), ("content", DANGEROUS)):
        if name.startswith(word):
            return colour
    return CONTROL


def _provenance(vectors: ContentVectors) -> str:
    return (
        f"{vectors.model.name} · {vectors.source} ({vectors.n_safe} safe, {vectors.n_dangerous} dangerous)"
        f" · {vectors.position} · orange = higher for dangerous"
    )


def _pale(colour: str, opacity: float = 0.18) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _styled(figure: go.Figure, title: str, note: str, height: int, *, above: int = 16) -> go.Figure:
    """House style; `above` is the room in pixels for what stands between the title and the axes."""
    lines = [""]
    for part in note.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) <= 62:
            lines[-1] = longer
        else:
            lines.append(part)
    small = "".join(f"<br><span style='font-size:12px;color:#52606D'>{line}</span>" for line in lines)
    top = 44 + 17 * len(lines) + above
    figure.update_layout(template=TEMPLATE, height=height, margin_t=top, title_text=f"<b>{title}</b>{small}")
    return figure
