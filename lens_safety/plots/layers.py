"""Curves over layers: where the classes lie apart."""

from html import escape
from itertools import cycle

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..separation import LayerTable
from ..types import EMBED, OptionError
from .style import ACCENT, COLOURS, CONTROL, DANGEROUS, INK, SAFE, line, pale, styled


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
        mode="lines",
        fill="toself",
        fillcolor=pale(DANGEROUS),
        line_width=0,
        name="95% interval",
        hoverinfo="skip",
    )
    line(figure, x, frame["auroc"], "AUROC", DANGEROUS, row=1)
    line(figure, x, frame["auroc_shuffled"], "shuffled labels, 97.5%", CONTROL, row=1, dash="dot")
    line(figure, x, frame["separation"], "separation", SAFE, row=2, legend=False)
    line(figure, x, frame["relative_magnitude"], "relative magnitude", ACCENT, row=3, legend=False)
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
    return styled(figure, title, note, 620, above=40)


def layers_side_by_side(*tables: LayerTable) -> go.Figure:
    """AUROC with its interval, Cohen's d and relative magnitude of several models or prompt sets.

    The x axis is relative depth, (layer + 1) / (highest layer of the table + 1): the embedding is 0, the
    last block 1. A star marks each best layer. Raises `OptionError` without a table.
    """
    if not tables:
        raise OptionError("no layer tables given: expected at least one")
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    one_model = len({table.model for table in tables}) == 1
    for table, colour in zip(tables, cycle(COLOURS), strict=False):
        name = table.source if one_model else f"{table.model}, {table.source}"
        for trace, row in _profile(table, f"{name} (n = {table.n_safe + table.n_dangerous})", colour):
            figure.add_trace(trace, row=row, col=1)
    figure.add_hline(0.5, row=1, col=1, line={"color": CONTROL, "width": 1}, annotation_text="chance")  # type: ignore[arg-type]
    figure.update_yaxes(title_text="AUROC<br>(cross-validated)", row=1, col=1)
    figure.update_yaxes(title_text="Cohen's d", row=2, col=1, rangemode="tozero")
    figure.update_yaxes(title_text="magnitude<br>‖v‖ / ‖h‖", row=3, col=1, rangemode="tozero")
    figure.update_xaxes(title_text="relative depth (0 = embedding, 1 = last block)", row=3, col=1)
    where = tables[0].model if one_model else f"{len(tables)} tables"
    note = f"{where} · bands: 95% intervals · stars: best layers"
    return styled(figure, "Where it is, side by side", note, 620, above=60)


def _profile(table: LayerTable, name: str, colour: str) -> list[tuple[go.Scatter, int]]:
    """A table's curves, each with its row; one entry in the legend switches all of them."""
    frame = table.frame
    depth = ((frame["layer"] + 1) / (frame["layer"].to_numpy().max() + 1)).tolist()
    shared = {"legendgroup": name, "name": name, "showlegend": False}
    band = go.Scatter(
        x=[*depth, *depth[::-1]],
        y=[*frame["auroc_high"], *frame["auroc_low"][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=pale(colour),
        line_width=0,
        hoverinfo="skip",
        **shared,
    )
    curves = [
        go.Scatter(
            x=depth,
            y=frame[column],
            mode="lines",
            line={"color": colour, "width": 2},
            customdata=frame["name"],
            hovertemplate=f"%{{customdata}}: %{{y:.3f}}<extra>{escape(name)}</extra>",
            **shared | {"showlegend": row == 1},
        )
        for row, column in enumerate(("auroc", "cohens_d", "relative_magnitude"), start=1)
    ]
    best = int((frame["layer"] == table.best_layer).to_numpy().argmax())
    star = go.Scatter(
        x=[depth[best]],
        y=[frame["auroc"].iloc[best]],
        mode="markers",
        marker={"symbol": "star", "size": 13, "color": colour, "line": {"color": INK, "width": 1}},
        hovertemplate=f"best layer: {table.best_layer}<extra>{escape(name)}</extra>",
        **shared,
    )
    return [(band, 1), *((curve, row) for row, curve in enumerate(curves, start=1)), (star, 1)]
