"""Steering: dose and response, maps, operators, prompts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..responses import CONTENT, RANDOM, SteeringSweep
from .layout import stacked
from .style import (
    ACCENT,
    CONTROL,
    DANGEROUS,
    DIVERGING,
    INK,
    error_bar,
    pale,
    styled,
)

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


def dose_response(sweep: SteeringSweep, layer: int | None = None, *, measure: str | None = None) -> go.Figure:
    """Effect and damage against the multiplier, beside random directions of that norm, to the cliff.

    The band spans the means of the random directions; the dashed line is the unsteered model. Where the
    largest multiplier is more than ten times the smallest, they stand at asinh(multiplier / smallest).
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
        mode = "nonnegative" if name in ("kl", "repeated_4grams") else "normal"
        figure.update_yaxes(title_text=label, rangemode=mode, row=row, col=1)
    _mark_cliff(figure, sweep, layer)
    squeezed = _squeeze_wide_range(figure, summary["multiplier"].to_numpy(dtype=float))
    scale = ", asinh scale" if squeezed else ""
    title = f"multiplier of the vector ({sweep.operator}{scale})<br>+ is toward the class labelled True"
    figure.update_xaxes(title_text=title, row=len(measures), col=1)
    figure.update_layout(margin_b=76)
    note = (
        f"{sweep.model} · layer {layer} · n = {sweep.n_prompts} prompts · means with 95% intervals · dashed: "
        "unsteered"
    )
    return styled(figure, "What steering does, and what it costs", note, 180 + 150 * len(measures), above=40)


def steering_map(sweep: SteeringSweep, *, measure: str | None = None) -> go.Figure:
    """Layer x multiplier: the mean change of a measure above, the damage below; white is no change."""
    name = measure or sweep.measure
    effects = sweep.effects(name)
    by_text = bool(np.isnan(effects["kl"].to_numpy()).all())
    panels = {
        "change": f"change of {plain_name(name)}",
        "nll_change" if by_text else "kl": f"damage: {'rise of the NLL' if by_text else 'KL'} (nats)",
    }
    tall = max(120, 24 * len(sweep.layers))
    figure = stacked(list(panels.values()), [tall, tall], gap=86)
    for row, value in enumerate(panels, start=1):
        wide = effects.pivot(index="layer", columns="multiplier", values=value)
        most = float(np.nanmax(np.abs(wide.to_numpy()))) or 1.0
        middle = sum(figure.layout[f"yaxis{row if row > 1 else ''}"].domain) / 2
        figure.add_heatmap(
            z=wide.to_numpy(),
            x=[f"{m:.3g}" for m in wide.columns],
            y=[str(layer) for layer in wide.index],
            colorscale=DIVERGING,
            zmin=-most,
            zmax=most,
            xgap=1,
            ygap=1,
            colorbar={"y": middle, "thickness": 10, "len": tall + 20, "lenmode": "pixels", "nticks": 5},
            hovertemplate="layer %{y}, multiplier %{x}: %{z:.3f}<extra></extra>",
            row=row,
            col=1,
        )
        figure.update_xaxes(title_text="multiplier of the vector", type="category", row=row, col=1)
        figure.update_yaxes(title_text="layer", type="category", row=row, col=1)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    note = f"{sweep.model} · {sweep.operator} · n = {sweep.n_prompts} prompts · means · white: no change"
    return styled(figure, "Where and how hard to steer", note, figure.layout.height, above=30)


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
            fillcolor=pale(ACCENT),
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
    figure.update_yaxes(title_text=f"slope of {plain_name(name)}<br>a multiplier")
    note = f"{sweep.model} · a dot a prompt, n = {sweep.n_prompts} · below the dotted line: anti-steerable"
    return styled(figure, "Does every prompt follow?", note, 420, above=30)


def plain_name(measure: str) -> str:
    """A measure in words, on one line."""
    return _MEASURE_NAMES.get(measure, measure).replace("<br>", " ")


def _squeeze_wide_range(figure: go.Figure, multipliers: np.ndarray) -> bool:
    """Where multipliers differ more than tenfold, all that stands at one goes to its asinh; ticks say it."""
    sizes = np.unique(np.abs(multipliers[multipliers != 0]))
    if not len(sizes) or sizes[-1] <= 10 * sizes[0]:
        return False

    def place(m: Any) -> Any:
        return np.arcsinh(np.asarray(m, dtype=float) / sizes[0])

    figure.for_each_trace(lambda trace: trace.update(x=place(trace.x)))
    for mark in (*figure.layout.shapes, *figure.layout.annotations):
        for end in ("x0", "x1", "x"):
            # Lines across a whole panel count in shares of it.
            if end in mark and mark[end] is not None and "domain" not in str(mark.xref):
                mark[end] = float(place(mark[end]))
    ticks = _apart(np.unique(multipliers), place)
    figure.update_xaxes(tickvals=place(ticks), ticktext=[f"{m:.3g}" for m in ticks])
    return True


def _apart(multipliers: np.ndarray, place: Callable[[Any], Any]) -> list[float]:
    """0, then from the outermost inwards those whose labels do not touch on a narrow page."""
    near = 0.085 * float(np.ptp(place(multipliers)))
    shown = [0.0]
    for m in sorted(multipliers, key=abs, reverse=True):
        if all(abs(place(m) - place(other)) > near for other in shown):
            shown.append(float(m))
    return sorted(shown)


def _dose_curve(summary: pd.DataFrame, direction: str, name: str, *, legend: bool) -> go.Scatter:
    part = summary.loc[summary["direction"] == direction].sort_values("multiplier")
    return go.Scatter(
        x=part["multiplier"],
        y=part[name],
        mode="lines+markers",
        line={"color": DANGEROUS},
        name="content vector",
        showlegend=legend,
        error_y=error_bar(part, name) | {"thickness": 1},
        customdata=part[["multiplier", "dose"]].to_numpy(),
        hovertemplate="multiplier %{customdata[0]:g}, dose %{customdata[1]:.2f}: %{y:.4f}",
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
            fillcolor=pale(CONTROL, 0.35),
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
