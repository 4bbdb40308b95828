"""Directions: one vector, its top dimensions, its company."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..directions import ContentVectors
from ..separation import top_dimensions as top_dimensions_of
from .style import CONTROL, FAINT, SECOND, line, provenance, signed, styled


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
    every = go.Bar(x=np.arange(len(values)), y=values, width=1, marker_color=signed(values))
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
    return styled(figure, f"The {vectors.method} vector at layer {layer}", provenance(vectors), 720, above=30)


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


def _top_bars(top: pd.DataFrame) -> go.Bar:
    ordered = top.iloc[::-1]
    return go.Bar(
        x=ordered["value"],
        y=[str(d) for d in ordered["dimension"]],
        orientation="h",
        marker={"color": signed(ordered["value"].to_numpy()), "line": {"width": 0}},
        customdata=ordered["share"],
        hovertemplate="dimension %{y}: %{x:.3f}, %{customdata:.1%} of ‖v‖²<extra></extra>",
    )
