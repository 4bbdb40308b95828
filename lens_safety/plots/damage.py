"""What steering costs: effect against damage, operators at equal damage, and what the detector sees of it."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..responses import RANDOM, UNSTEERED, Consistency, SteeringSweep
from ..types import OptionError, one_of
from .layout import legend_below, stacked
from .steering import plain_name
from .style import COLOURS, CONTROL, DANGEROUS, INK, SAFE, error_bar, pale, styled

_DAMAGES = {
    "kl": ("kl", "damage: KL on neutral prompts (nats)"),
    "nll": ("nll_change", "damage: rise of the text's NLL (nats a token)"),
}
_SIDES = ((-1, "toward safe (m < 0)", SAFE), (1, "toward dangerous (m > 0)", DANGEROUS))


def damage_frontier(
    sweep: SteeringSweep, *, measure: str | None = None, damage: str = "kl", budget: float | None = None
) -> go.Figure:
    """The effect of each layer and multiplier against its damage; a line through those not outdone.

    A point is outdone by another of its side that moves the measure at least as far at no more damage. Grey
    are the random directions of the same norm; the dashed line is a budget of damage in nats. Read off
    the sweep's own prompts the frontier flatters: `sweep.best` chooses on one half of them.

    Raises:
        OptionError: an unknown measure or damage, or a damage that the sweep has not measured.
    """
    one_of(damage, tuple(_DAMAGES), "damage")
    column, title = _DAMAGES[damage]
    name = measure or sweep.measure
    effects = sweep.effects(name)
    _require_damage([effects], column)
    figure = go.Figure()
    figure.add_trace(_random_points(sweep, name, damage))
    best = [frontier(effects, side, column) for side, _, _ in _SIDES]
    for rows, (side, label, colour) in zip(best, _SIDES, strict=True):
        part = effects.loc[np.sign(effects["multiplier"]) == side]
        figure.add_trace(_points(part, column, label, colour))
        figure.add_trace(_frontier_line(rows, column, colour))
    for text in _labels(pd.concat(best), effects, column):
        figure.add_annotation(**text)
    figure.add_hline(0, line={"color": INK, "dash": "dot", "width": 1})
    if budget is not None:
        figure.add_vline(budget, line={"color": INK, "dash": "dash", "width": 1.2})
    figure.update_xaxes(title_text=title)
    figure.update_yaxes(title_text=f"change of {plain_name(name)}")
    note = f"{sweep.model} · {sweep.operator} · n = {sweep.n_prompts} prompts · 95% intervals on the frontier"
    dashed = "" if budget is None else f" · dashed: budget {budget:g} nats"
    note = f"{note} · label: layer × multiplier{dashed}"
    return legend_below(styled(figure, "What a push buys, at which cost", note, 480))


def frontier(effects: pd.DataFrame, side: int, damage: str) -> pd.DataFrame:
    """The rows of `SteeringSweep.effects` of a side that none outdoes, by rising damage.

    A row is kept where its change in the direction of `side` is above 0 and above that of every row with
    less damage.
    """
    rows = effects.loc[
        (np.sign(effects["multiplier"]) == side) & effects[[damage, "change"]].notna().all(axis=1)
    ]
    gain = side * rows["change"]
    rows = rows.assign(gain=gain).sort_values([damage, "gain"], ascending=[True, False])
    before = rows["gain"].cummax().shift(fill_value=0.0).clip(lower=0.0)
    return rows.loc[rows["gain"] > before].drop(columns="gain")


def operators(*sweeps: SteeringSweep, measure: str | None = None) -> go.Figure:
    """The effect of each operator against its damage: a line for each sweep, layer and side.

    At equal KL operators compare. Grey are the random directions of those sweeps that have them.

    Raises:
        OptionError: no sweeps, sweeps of different measures, or without KL.
    """
    if not sweeps:
        raise OptionError("no sweeps given: expected at least one, such as one for each operator")
    names = {measure or sweep.measure for sweep in sweeps}
    if len(names) > 1:
        raise OptionError(
            f"sweeps measured by {', '.join(sorted(names))} given: expected one measure; give measure="
        )
    name = names.pop()
    tables = [sweep.effects(name) for sweep in sweeps]
    _require_damage(tables, "kl")
    figure = go.Figure()
    for sweep in sweeps:
        points: Any = _random_points(sweep, name, "kl")
        if points.x is not None and len(points.x):
            figure.add_trace(points.update(showlegend=not figure.data))
    colours = cycle([*COLOURS[:4], *COLOURS[5:], INK])
    several = len({(sweep.operator, layer) for sweep in sweeps for layer in sweep.layers}) > len(
        {sweep.operator for sweep in sweeps}
    )
    for sweep, table in zip(sweeps, tables, strict=True):
        for layer, rows in table.groupby("layer"):
            entry = f"{sweep.operator}, layer {layer}" if several else sweep.operator
            _operator_lines(figure, rows, entry, next(colours))
    figure.add_hline(0, line={"color": INK, "dash": "dot", "width": 1})
    ticks = _log_ticks(np.concatenate([table["kl"].to_numpy(dtype=float) for table in tables]))
    figure.update_xaxes(title_text="damage: KL on neutral prompts (nats, log scale)", type="log")
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(title_text=f"change of {plain_name(name)}")
    models = ", ".join(dict.fromkeys(sweep.model for sweep in sweeps))
    layers = sorted({layer for sweep in sweeps for layer in sweep.layers})
    at = "" if several else f"layer {', '.join(map(str, layers))} · "
    note = f"{models} · {at}n = {sweeps[0].n_prompts} prompts · means with 95% intervals"
    return legend_below(styled(figure, "Operators at equal damage", note, 440))


def _log_ticks(values: np.ndarray) -> list[float]:
    """1, 2, 5 of each decade around the values, or its 1 alone where there are many decades."""
    known = np.log10(values[values > 0])
    if not len(known):
        return [1.0]
    low, high = int(np.floor(known.min())), int(np.ceil(known.max()))
    digits = (1, 2, 5) if np.ptp(known) < 2 else (1,)
    return [digit * 10.0**decade for decade in range(low, high + 1) for digit in digits]


def consistency(result: Consistency, layer: int | None = None) -> go.Figure:
    """What a detector sees of a push: at each later layer, over all, and where it falls silent.

    Top: how far the residual stream has moved along the content vector at each layer that was read, a line a
    multiplier; a cross where the interval first holds 0 (washed out). Middle: the change of the detector's
    score of the steered stream and of the text alone. Bottom: of the texts judged dangerous, the share whose
    stream the detector calls safe.

    Raises:
        OptionError: a layer that was not steered.
    """
    steered = list(dict.fromkeys(result.frame["layer"].tolist()))
    layer = steered[0] if layer is None else layer
    if layer not in steered:
        raise OptionError(f"layer {layer} given, expected one that was steered: {steered}")
    frame = result.frame.loc[result.frame["layer"] == layer]
    once = frame.drop_duplicates("multiplier").sort_values("multiplier")
    figure = stacked(
        ["what is left at later layers", "the detector's score", "silent though the text is dangerous"],
        [190, 150, 110],
        gap=86,
    )
    _washing_lines(figure, frame)
    for name, label, colour in (
        ("inside_change", "of the steered stream", DANGEROUS),
        ("text_change", "of the text alone", SAFE),
    ):
        figure.add_trace(_change_line(once, name, label, colour), row=2, col=1)
    figure.add_trace(_silent_bars(once), row=3, col=1)
    for row in (1, 2):
        figure.add_hline(0, row=row, col=1, line={"color": INK, "dash": "dot", "width": 1})  # type: ignore[arg-type]
    few = int(np.ptp(frame["read_layer"].to_numpy())) <= 8
    # No half layers.
    figure.update_xaxes(title_text="layer read (resid_post)", dtick=1 if few else None, row=1, col=1)
    figure.update_xaxes(title_text="multiplier of the vector", row=2, col=1)
    figure.update_xaxes(title_text="multiplier of the vector", row=3, col=1, type="category")
    figure.update_yaxes(title_text="shift (content<br>vectors)", row=1, col=1)
    figure.update_yaxes(title_text="change of<br>the score", row=2, col=1)
    figure.update_yaxes(title_text="share<br>silent", range=[0, 1.02], row=3, col=1)
    n = int(once["n"].iloc[0])
    note = f"{result.model} · {result.detector} · layer {layer} steered · n = {n} prompts · 95% intervals"
    note = f"{note} · judge: {result.judge} · cross: washed out"
    return legend_below(
        styled(figure, "Does the detector see the push?", note, figure.layout.height, above=30)
    )


def _require_damage(tables: Sequence[pd.DataFrame], column: str) -> None:
    if any(bool(table[column].isna().all()) for table in tables):
        what, other = ("KL", "nll") if column == "kl" else ("NLL", "kl")
        raise OptionError(
            f"a sweep without {what} given: expected it to be measured (neutral prompts for the KL, "
            f"texts for the NLL); run sweep() with them, or plots.damage_frontier(sweep, damage={other!r})"
        )


def _random_points(sweep: SteeringSweep, measure: str, damage: str) -> go.Scatter:
    """Each random direction's mean change and damage, at each layer and multiplier."""
    rows = sweep.frame
    base = rows.loc[rows["direction"] == UNSTEERED].set_index("prompt")
    rows = rows.loc[rows["direction"].str.startswith(RANDOM)]
    moved = rows.assign(
        change=rows[measure] - base[measure].reindex(rows["prompt"]).to_numpy(),
        hurt=rows["kl"] if damage == "kl" else rows["nll"] - base["nll"].reindex(rows["prompt"]).to_numpy(),
    )
    means = moved.groupby(["direction", "layer", "multiplier"])[["change", "hurt"]].mean().reset_index()
    return go.Scatter(
        x=means["hurt"],
        y=means["change"],
        mode="markers",
        marker={
            "color": CONTROL,
            "size": 6,
            "opacity": 0.55,
            "symbol": "x-thin",
            "line": {"width": 1.5, "color": CONTROL},
        },
        name="random directions",
        customdata=means[["direction", "layer", "multiplier"]].to_numpy(),
        hovertemplate="%{customdata[0]}, layer %{customdata[1]}, multiplier %{customdata[2]:.3g}: "
        "damage %{x:.3f}, change %{y:.3f}<extra></extra>",
    )


def _points(part: pd.DataFrame, column: str, label: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=part[column],
        y=part["change"],
        mode="markers",
        marker={"color": pale(colour, 0.5), "size": 8},
        name=label,
        legendgroup=label,
        customdata=part[["layer", "multiplier", "dose"]].to_numpy(),
        hovertemplate="layer %{customdata[0]:.0f}, multiplier %{customdata[1]:.3g}, "
        "dose %{customdata[2]:.2f}: damage %{x:.3f}, change %{y:.3f}<extra></extra>",
    )


def _frontier_line(rows: pd.DataFrame, column: str, colour: str) -> go.Scatter:
    known = f"{column}_low" in rows
    return go.Scatter(
        x=rows[column],
        y=rows["change"],
        mode="lines+markers",
        line={"color": colour, "width": 2, "shape": "hv"},
        marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1}},
        error_y=error_bar(rows, "change") | {"thickness": 1, "width": 3},
        error_x=error_bar(rows, column) | {"thickness": 1, "width": 3} if known else None,
        name="frontier",
        showlegend=False,
        hoverinfo="skip",
    )


def _labels(rows: pd.DataFrame, effects: pd.DataFrame, column: str) -> list[dict]:
    """Layer and multiplier of frontier points, largest effects first, none near another."""
    width = float(np.ptp(effects[column].dropna())) or 1.0
    height = float(np.ptp(effects["change"].dropna())) or 1.0
    placed: list[tuple[float, float]] = []
    made = []
    for row in rows.sort_values("change", key=np.abs, ascending=False).to_dict("records"):
        x, y = float(row[column]), float(row["change"])
        if all(abs(x - a) > 0.3 * width or abs(y - b) > 0.12 * height for a, b in placed):
            placed.append((x, y))
            text = f"{row['layer']:.0f} × {row['multiplier']:.3g}"
            shift = 13 if y > 0 else -13
            left = x - float(effects[column].to_numpy().min()) < 0.6 * width
            made.append(
                {"x": x, "y": y, "text": text, "showarrow": False, "yshift": shift, "font_size": 11}
                | {"xanchor": "left" if left else "right", "xshift": 4 if left else -4}
            )
    return made


def _operator_lines(figure: go.Figure, rows: pd.DataFrame, entry: str, colour: str) -> None:
    for side in (-1, 1):
        part = rows.loc[np.sign(rows["multiplier"]) == side].sort_values("kl")
        if part.empty:
            continue
        figure.add_scatter(
            x=part["kl"],
            y=part["change"],
            mode="lines+markers",
            name=entry,
            legendgroup=entry,
            showlegend=side == (1 if float(rows["multiplier"].to_numpy().max()) > 0 else -1),
            line={"color": colour},
            error_y=error_bar(part, "change") | {"thickness": 1},
            customdata=part[["multiplier", "dose"]].to_numpy(),
            hovertemplate=f"{entry}, multiplier %{{customdata[0]:.3g}}, dose %{{customdata[1]:.2f}}: "
            "KL %{x:.3f}, change %{y:.3f}<extra></extra>",
        )


def _washing_lines(figure: go.Figure, frame: pd.DataFrame) -> None:
    most = float(frame["multiplier"].abs().to_numpy().max())
    for m in sorted(set(frame["multiplier"])):
        rows = frame.loc[frame["multiplier"] == m]
        colour = pale(DANGEROUS if m > 0 else SAFE, 0.25 + 0.75 * abs(m) / most)
        figure.add_scatter(
            x=rows["read_layer"],
            y=rows["projection_change"],
            error_y=error_bar(rows, "projection_change") | {"thickness": 1, "width": 0},
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 4},
            name=f"multiplier {m:.3g}",
            customdata=rows["left"],
            hovertemplate=f"multiplier {m:.3g}, layer %{{x}}: %{{y:.2f}} content vectors, "
            "%{customdata:.0%} of the push left<extra></extra>",
            row=1,
            col=1,
        )
        gone = rows.loc[rows["read_layer"].astype(str) == rows["washed_out"]]
        figure.add_scatter(
            x=gone["read_layer"],
            y=gone["projection_change"],
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": INK},
            showlegend=False,
            hovertemplate=f"multiplier {m:.3g} is washed out at layer %{{x}}<extra></extra>",
            row=1,
            col=1,
        )


def _change_line(once: pd.DataFrame, name: str, label: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=once["multiplier"],
        y=once[name],
        error_y=error_bar(once, name) | {"thickness": 1},
        mode="lines+markers",
        line={"color": colour, "dash": "solid" if name == "inside_change" else "dash"},
        name=f"score {label}",
        hovertemplate="multiplier %{x}: %{y:.4f}<extra></extra>",
    )


def _silent_bars(once: pd.DataFrame) -> go.Bar:
    return go.Bar(
        x=[f"{m:.3g}" for m in once["multiplier"]],
        y=once["silent"],
        error_y=error_bar(once, "silent") | {"thickness": 1.2, "color": INK},
        marker_color=CONTROL,
        customdata=once["dangerous"],
        showlegend=False,
        hovertemplate="multiplier %{x}: %{y:.0%} of %{customdata} dangerous texts<extra></extra>",
    )
