"""Curves over layers: where the classes lie apart."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..separation import LayerTable
from ..types import EMBED
from .style import ACCENT, CONTROL, DANGEROUS, INK, SAFE, line, pale, styled


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
