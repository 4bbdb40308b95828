"""Maps: dimensions by layers, layers by layers, one model's depth by another's."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from ..directions import ContentVectors
from ..residuals import ResidualCache
from ..separation import linear_cka
from ..types import MismatchError, OptionError
from .style import DIVERGING, INK, PAPER, SEQUENTIAL, layer_name, provenance, rounded, styled


def dimension_map(vectors: ContentVectors, *, k: int = 20) -> go.Figure:
    """The k dimensions that are largest at any layer, by layer: v_d / norm(v), so that layers compare.

    The dimension that is largest anywhere stands at the top. Raises `OptionError` for k outside 1 to d_model.
    """
    unit = vectors.unit.numpy()
    if not 1 <= k <= unit.shape[1]:
        raise OptionError(f"k={k} given, expected 1 to {unit.shape[1]} dimensions")
    largest = np.argsort(-np.abs(unit).max(axis=0), kind="stable")[:k]
    shown = unit[:, largest].T
    carried = (shown**2).sum(axis=0)
    figure = go.Figure(
        _heat(
            shown,
            [layer_name(layer) for layer in vectors.layers],
            [str(dimension) for dimension in largest],
            "dimension %{y}, layer %{x}: %{z:.3f} of ‖v‖<extra></extra>",
            "v<sub>d</sub> / ‖v‖",
        )
    )
    figure.update_xaxes(_layer_ticks(vectors), title_text="layer (resid_post)")
    figure.update_yaxes(title_text="dimension", type="category", autorange="reversed", showgrid=False)
    figure.update_yaxes(tickfont_size=10, dtick=1)
    note = f"{provenance(vectors)} · these {k} carry {carried.min():.0%} to {carried.max():.0%} of ‖v‖²"
    return styled(figure, "The largest dimensions by layer", note, 200 + 20 * k)


def cosine_map(vectors: ContentVectors, other: ContentVectors | None = None) -> go.Figure:
    """cos(vector of one layer, vector of another), within one set of vectors or between two.

    Between two sets (tone and content, or two models of equal width) `vectors` run up, `other` across.
    Two models that were not trained from one another share no axes: their cosines are then at chance.
    Raises `MismatchError` for sets of different width.
    """
    other = vectors if other is None else other
    d_model = vectors.vectors.shape[1]
    if other.vectors.shape[1] != d_model:
        raise MismatchError(
            f"vectors of width {d_model} and {other.vectors.shape[1]} given: expected equal widths; "
            "compare models of different width with layers_side_by_side or depth_map"
        )
    figure = go.Figure(
        _heat(
            (vectors.unit @ other.unit.T).numpy(),
            [layer_name(layer) for layer in other.layers],
            [layer_name(layer) for layer in vectors.layers],
            "layers %{y} and %{x}: cosine %{z:.3f}<extra></extra>",
            "cosine",
            most=1.0,
        )
    )
    up, across = _names(vectors, other)
    figure.update_xaxes(_layer_ticks(other), title_text=f"layer, {across}")
    figure.update_yaxes(_layer_ticks(vectors), title_text=f"layer, {up}")
    models = " and ".join(dict.fromkeys([vectors.model.name, other.model.name]))
    # The cosine of two random directions has standard deviation 1 / sqrt(d_model).
    note = f"{models} · chance: |cos| < {1.96 / np.sqrt(d_model):.2f} for 95% of random directions"
    title = "Does the direction turn with depth?" if other is vectors else f"{up} against {across}"
    return styled(figure, title[0].upper() + title[1:], note, 520)


def depth_map(first: ResidualCache, second: ResidualCache) -> go.Figure:
    """How alike two models, of any widths, see the same prompts: linear CKA of each pair of layers.

    Debiased linear CKA (Kornblith et al. 2019; `lens_safety.separation.linear_cka`) against relative
    depth = (layer + 1) / n_layers; the dots are each layer's nearest one. The control is the highest CKA
    of any pair after the prompts of `second` are shuffled.
    Raises `MismatchError` unless both caches hold the same prompts in the same order.
    """
    if first.prompts.texts != second.prompts.texts:
        raise MismatchError(
            f"{first.prompts.name} ({len(first)} prompts) and {second.prompts.name} ({len(second)}) "
            "given: expected the same prompts in the same order, read from two models"
        )
    alike = linear_cka(first.resid, second.resid)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(second)))
    control = float(linear_cka(first.resid, second.resid[:, shuffled]).max())
    up, across = _depths(first), _depths(second)
    pairs = [[f"layers {one} and {two}" for two in second.layers] for one in first.layers]
    figure = go.Figure(
        go.Heatmap(
            z=rounded(alike),
            x=across,
            y=up,
            customdata=pairs,
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": "CKA"}, "thickness": 12},
            hovertemplate="%{customdata}: CKA %{z:.3f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=np.array(across)[alike.argmax(axis=1)].tolist(),
        y=up,
        mode="markers",
        marker={"color": INK, "size": 6, "line": {"color": PAPER, "width": 1}},
        name="nearest layer",
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text=f"relative depth, {second.model.name}", showgrid=False)
    figure.update_yaxes(title_text=f"relative depth, {first.model.name}", showgrid=False)
    note = (
        f"{first.prompts.name} · n = {len(first)} prompts · linear CKA, debiased · "
        f"dots: nearest layer across · shuffled prompts: at most {control:.2f}"
    )
    figure.update_layout(showlegend=False)
    return styled(figure, "Where two models see alike", note, 520)


def _heat(
    values: np.ndarray, x: list[str], y: list[str], hover: str, unit: str, *, most: float | None = None
) -> go.Heatmap:
    """Signed values around 0; the scale ends at the largest of them, or at `most`."""
    end = most or float(np.abs(values).max()) or 1.0
    return go.Heatmap(
        z=rounded(values),
        x=x,
        y=y,
        zmin=-end,
        zmax=end,
        colorscale=DIVERGING,
        colorbar={"title": {"text": unit}, "thickness": 12},
        hovertemplate=hover,
    )


def _layer_ticks(vectors: ContentVectors) -> dict[str, Any]:
    """Even cells for any layers; every fifth is named where a narrow page has no room for all."""
    return {"type": "category", "showgrid": False, "dtick": 5 if len(vectors.layers) > 12 else 1}


def _names(vectors: ContentVectors, other: ContentVectors) -> tuple[str, str]:
    """What tells two sets of vectors apart: the method, else the model."""
    if vectors.method != other.method or vectors.model.name == other.model.name:
        return vectors.method, other.method
    return vectors.model.name, other.model.name


def _depths(cache: ResidualCache) -> list[float]:
    return [(layer + 1) / cache.model.n_layers for layer in cache.layers]
