"""Room on the page: panels above each other and legends below, so that a figure is readable at 390 pixels."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_NARROW = 270
"""Pixels of a plot's width on a page of 390."""

_AXIS_ROOM, _ENTRY = 58, 24


def stacked(titles: Sequence[str], heights: Sequence[int], *, gap: int = 70) -> go.Figure:
    """Panels above each other, each with its title at its left; `heights` and the `gap` between in pixels."""
    room = sum(heights) + gap * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        row_heights=list(heights),
        vertical_spacing=gap / room,
        subplot_titles=list(titles),
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_layout(height=room + 160)
    return figure


def legend_below(figure: go.Figure) -> go.Figure:
    """The figure with its legend under the axis, and as much room there as a narrow page needs."""
    traces: Any = figure.data
    shown = [trace.name for trace in traces if trace.showlegend is not False and trace.name]
    lines = [name.split("<br>") for name in shown]
    widest = 42 + 6.8 * max((len(line) for name in lines for line in name), default=0)
    columns = max(1, int(_NARROW // widest))
    each = [len(name) for name in lines]
    rows = sum(each) if columns == 1 else -(-len(each) // columns) * max(each, default=0)
    below = _ENTRY * rows + 20
    height = int(figure.layout.height) + below
    figure.update_layout(
        height=height,
        margin_b=_AXIS_ROOM + below,
        showlegend=True,
        legend={
            "orientation": "h",
            # One below the other on a wide page too, else the room for a narrow one would be blank there.
            **({"entrywidthmode": "fraction", "entrywidth": 1.0} if columns == 1 else {}),
            "traceorder": "normal",
            "yref": "container",
            "y": below / height,
            "yanchor": "top",
            "x": 0,
            "xanchor": "left",
        },
    )
    return figure
