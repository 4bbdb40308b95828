"""One prompt through the layers."""

import pandas as pd
import plotly.graph_objects as go

from .style import CONTROL, DANGEROUS, INK, SAFE, pale, styled


def layer_profile(frame: pd.DataFrame, note: str) -> go.Figure:
    """One prompt's score at each layer, on the bands of the safe and of the dangerous training prompts.

    `frame` has `layer`, `score`, and `low` and `high` of `safe` and `dangerous`; -1 is the safe mean, 1 the
    dangerous one.
    """
    figure = go.Figure()
    layers = frame["layer"].tolist()
    for name, colour in (("safe", SAFE), ("dangerous", DANGEROUS)):
        figure.add_scatter(
            x=[*layers, *layers[::-1]],
            y=[*frame[f"{name}_high"], *frame[f"{name}_low"][::-1]],
            fill="toself",
            fillcolor=pale(colour),
            line_width=0,
            mode="lines",
            name=f"{name} prompts",
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=layers,
        y=frame["score"],
        mode="lines+markers",
        name="this prompt",
        line={"color": INK, "width": 2},
        marker={"size": 6},
        hovertemplate="layer %{x}: %{y:.2f}<extra></extra>",
    )
    figure.add_hline(0, line={"color": CONTROL, "dash": "dot", "width": 1})
    figure.update_xaxes(title_text="layer (resid_post)")
    figure.update_yaxes(title_text="score (−1 safe, 1 dangerous)")
    return styled(figure, "Score at each layer", note, 420, above=34)
