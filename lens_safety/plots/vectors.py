"""Directions: one vector, its top dimensions, its company."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..directions import ContentVectors
from ..separation import top_dimensions as top_dimensions_of
from ..types import OptionError
from .style import (
    CONTROL,
    DANGEROUS,
    FAINT,
    SAFE,
    SECOND,
    SLIDER,
    chosen_layers,
    heading,
    layer_slider,
    line,
    provenance,
    rounded,
    signed,
    styled,
)


def vector(
    vectors: ContentVectors,
    layer: int | Sequence[int] | None = None,
    *,
    start: int | None = None,
    k: int = 20,
) -> go.Figure:
    """A layer's vector: every dimension, the distribution of its values, and the k largest.

    Several layers (None = all) share the figure by a slider, which starts at layer `start`, by default in
    their middle. Values are rounded to four digits. Raises `MismatchError` for a layer without a vector,
    `OptionError` for a start that is not shown.
    """
    layers = chosen_layers(layer, vectors.layers)
    if not layers:
        raise OptionError("no layers given: expected a layer, some, or None for all of them")
    start = layers[len(layers) // 2] if start is None else start
    if start not in layers:
        raise OptionError(f"start={start} given, expected one of the layers shown: {layers}")
    first = layers.index(start)
    views = [_VectorView(vectors, one, k) for one in layers]
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[0.42, 0.58],
        vertical_spacing=0.17,
        horizontal_spacing=0.16,
        subplot_titles=(
            f"all {vectors.vectors.shape[1]} dimensions",
            "distribution of the values",
            views[first].share,
        ),
    )
    for trace, (row, column) in zip(views[first].traces, ((1, 1), (2, 1), (2, 2)), strict=True):
        figure.add_trace(trace, row=row, col=column)
    figure.update_xaxes(title_text="dimension", row=1, col=1)
    figure.update_yaxes(title_text="value (resid units)", row=1, col=1)
    figure.update_xaxes(title_text="value (resid units)", row=2)
    figure.update_yaxes(title_text="dimensions", row=2, col=1)
    figure.update_yaxes(title_text="dimension", row=2, col=2, tickfont_size=10, type="category")
    # A slider's new bars would else make numbers of the names of dimensions.
    figure.update_yaxes(autotypenumbers="strict", row=2, col=2)
    figure.update_annotations(font_size=13)
    figure.update_layout(showlegend=False)
    if len(layers) > 1:
        layer_slider(figure, layers, [view.change for view in views], first)
    height = 720 + (SLIDER if len(layers) > 1 else 0)
    return styled(figure, views[first].title, provenance(vectors), height, above=30)


class _VectorView:
    """One layer's three panels: as traces, and as what a slider changes in them."""

    def __init__(self, vectors: ContentVectors, layer: int, k: int):
        self.values = rounded(vectors.layer(layer))
        top = top_dimensions_of(vectors, layer, min(k, len(self.values)))
        every = go.Bar(y=self.values, width=1, marker={"color": [int(v > 0) for v in self.values]})
        # A number a bar and two colours are a tenth of a colour a bar.
        every.update(marker={"line": {"width": 0}, "colorscale": _SIGNS, "cmin": 0, "cmax": 1})
        every.update(hovertemplate="dimension %{x}: %{y}<extra></extra>")
        spread = go.Histogram(x=self.values, nbinsx=60, marker_color=CONTROL)
        spread.update(hovertemplate="%{x}: %{y} dimensions<extra></extra>")
        self.traces: tuple[Any, Any, Any] = (every, spread, _top_bars(top))
        self.share = f"top {len(top)}: {top['share'].sum():.0%} of ‖v‖²"
        self.title = f"The {vectors.method} vector at layer {layer}"
        self.note = provenance(vectors)

    @property
    def change(self) -> tuple[dict[str, list], dict[str, str]]:
        every, spread, top = self.traces
        traces = {
            "x": [None, list(spread.x), list(top.x)],
            "y": [list(every.y), None, list(top.y)],
            "marker.color": [list(every.marker.color), CONTROL, list(top.marker.color)],
            "customdata": [None, None, list(top.customdata)],
        }
        return traces, {"title.text": heading(self.title, self.note), "annotations[2].text": self.share}


def top_dimensions(vectors: ContentVectors, layer: int, k: int = 20) -> go.Figure:
    """The k dimensions in which a layer's vector is largest; positive = higher for dangerous prompts."""
    top = top_dimensions_of(vectors, layer, k)
    figure = go.Figure(_top_bars(top))
    figure.update_xaxes(title_text="value (resid units); positive = higher for dangerous")
    figure.update_yaxes(title_text="dimension", type="category", tickfont_size=11)
    title = f"Top {k} dimensions at layer {layer}: {top['share'].sum():.0%} of ‖v‖²"
    return styled(figure, title, provenance(vectors), max(320, 120 + 20 * k))


def tone_and_content(tone: ContentVectors, content: ContentVectors) -> go.Figure:
    """cos(tone vector, content vector) at each layer, with what random directions of that width give."""
    figure = go.Figure()
    d_model = content.vectors.shape[1]
    # The cosine of two random directions has standard deviation 1 / sqrt(d_model).
    chance = 1.96 / np.sqrt(d_model)
    figure.add_hrect(-chance, chance, fillcolor=FAINT, opacity=0.8, line_width=0)
    layers = list(content.layers)
    line(figure, layers, content.cosine(tone), "cosine", SECOND, legend=False)
    figure.update_xaxes(title_text="layer (resid_post)")
    figure.update_yaxes(title_text="cos(tone, content)", range=[-1, 1])
    note = f"{content.model.name} · grey: 95% of random directions of width {d_model}"
    return styled(figure, "Tone and content are not the same direction", note, 340)


_SIGNS = [(0, SAFE), (1, DANGEROUS)]


def _top_bars(top: pd.DataFrame) -> go.Bar:
    ordered = top.iloc[::-1]
    return go.Bar(
        x=rounded(ordered["value"]),
        y=[str(d) for d in ordered["dimension"]],
        orientation="h",
        marker={"color": signed(ordered["value"].to_numpy()), "line": {"width": 0}},
        customdata=rounded(ordered["share"]),
        hovertemplate="dimension %{y}: %{x:.3f}, %{customdata:.1%} of ‖v‖²<extra></extra>",
    )
