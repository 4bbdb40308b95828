"""Prompts as points: the residual streams of one layer in two or three dimensions."""

from collections.abc import Sequence
from html import escape
from textwrap import shorten, wrap

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int

from ..prompts import Prompt, PromptSet
from ..residuals import ResidualCache
from ..scorers import apply_scorer, fit_scorer
from ..types import OptionError, one_of
from .style import (
    COLOURS,
    CONTROL,
    DANGEROUS,
    SAFE,
    SLIDER,
    chosen_layers,
    heading,
    layer_name,
    layer_slider,
    rounded,
    styled,
)

_AXES = ("x", "y", "z")
# The titles of a cube's axes lie aslant and have little room.
_COMPONENT = {2: "component", 3: "PC"}
_ORTHOGONAL = {2: "orthogonal component", 3: "orthogonal PC"}
_OF_VARIANCE = {2: " of variance", 3: ""}
_SYMBOLS = ("circle", "diamond", "square", "cross", "x")
_LABELS = {"safe": (SAFE, "circle"), "dangerous": (DANGEROUS, "diamond"), "unlabelled": (CONTROL, "square")}
_Points = Float[np.ndarray, "prompt axis"]
_Folds = list[Int[np.ndarray, " _"]]


def projection(
    cache: ResidualCache,
    *,
    method: str = "pca",
    layer: int | Sequence[int] | None = None,
    dims: int = 2,
    colour: str = "label",
) -> go.Figure:
    """The prompts of a cache as points: a dot a prompt, its text on hover; several layers get a slider.

    "pca": the principal components of these prompts (no label is used). "lda": across, each prompt's
    distance from the midpoint along Fisher's direction as fitted on the other folds (groups kept whole;
    5, or as many as there are groups), so that a gap is one that held-out prompts show: fitted on the
    very prompts that it shows, LDA parts any labels where prompts are fewer than dimensions. The further
    axes are the principal components at right angles to the direction of all prompts.

    Raises:
        OptionError: an unknown method or colouring, dims other than 2 or 3, too few prompts.
        PromptError: "lda" with a prompt that has no label, or a class with fewer than two groups.
    """
    one_of(method, ["pca", "lda"], "method")
    one_of(colour, ["label", "kind", "category", "language"], "colouring")
    if dims not in (2, 3):
        raise OptionError(f"dims={dims} given: expected 2 or 3")
    layers = chosen_layers(layer, cache.layers)
    if not layers or len(cache) <= dims:
        raise OptionError(
            f"{len(layers)} layers and {len(cache)} prompts given: expected at least one layer and more "
            f"than {dims} prompts"
        )
    start = len(layers) // 2
    held_out = _folds(cache.prompts) if method == "lda" else []
    views = [_View(cache, one, dims, held_out) for one in layers]
    rows = _rows(cache.prompts, colour)
    figure = go.Figure([_points(cache.prompts, name, rows, views[start]) for name in rows])
    if len(layers) > 1:
        layer_slider(figure, layers, [view.change(list(rows.values())) for view in views], start)
    for name, text in views[start].axis_titles.items():
        figure.update_layout({name: text})
    figure.update_layout(
        legend_itemsizing="constant",
        scene={"aspectmode": "cube", "camera": {"eye": {"x": 1.9, "y": 1.9, "z": 1.1}}},
    )
    if dims == 3:
        figure.update_layout(margin={"l": 4, "r": 4})
    height = (520 if dims == 2 else 640) + (SLIDER if len(layers) > 1 else 0)
    return styled(figure, views[start].title, views[start].note, height, above=48)


class _View:
    """The points of one layer, and the words around them."""

    def __init__(self, cache: ResidualCache, layer: int, dims: int, held_out: _Folds):
        h = cache.layer(layer).double()
        self.dims = dims
        if held_out:
            self.points, shares = _lda(h, cache.prompts, held_out, dims)
            names = [
                ("LDA, held out (resid units)" if dims == 2 else "LDA"),
                *(f"{_ORTHOGONAL[dims]} {i + 1}" for i in range(dims - 1)),
            ]
        else:
            self.points, shares = _pca(h, dims)
            names = [f"{_COMPONENT[dims]} {i + 1}" for i in range(dims)]
        if not held_out and cache.prompts.is_labelled:
            self.points = _dangerous_up(self.points, cache.prompts.labels)
        said = ["" if np.isnan(share) else f" ({share:.0%}{_OF_VARIANCE[dims]})" for share in shares]
        where = ["scene.", ""][dims == 2]
        keys = [f"{where}{axis}axis.title.text" for axis in _AXES[:dims]]
        self.axis_titles = {
            key.replace(".", "_"): f"{name}{share}"
            for key, name, share in zip(keys, names, said, strict=True)
        }
        self._keys = keys
        kind = "LDA, held out" if held_out else "PCA"
        self.title = f"Prompts at layer {layer_name(layer)}: {kind}"
        fitted = (
            "across: each prompt scored by folds without its group · up: fitted on these prompts"
            if held_out
            else "axes fitted on these very prompts, labels unused"
        )
        self.note = f"{cache.model.name} · {cache.prompts.name}, n = {len(cache)} · {fitted}"

    def change(self, rows: list[np.ndarray]) -> tuple[dict[str, list], dict[str, str]]:
        """What a slider sets: the points of each trace, the title, the axes' titles."""
        traces = {
            axis: [rounded(self.points[of, i]) for of in rows] for i, axis in enumerate(_AXES[: self.dims])
        }
        titles = dict(zip(self._keys, self.axis_titles.values(), strict=True))
        return traces, {"title.text": heading(self.title, self.note)} | titles


def _points(
    prompts: PromptSet, name: str, rows: dict[str, np.ndarray], view: _View
) -> go.Scatter | go.Scatter3d:
    """A trace of the prompts that share a name."""
    of = rows[name]
    place = list(rows).index(name)
    colour, symbol = _LABELS.get(name, (COLOURS[place % len(COLOURS)], _SYMBOLS[place % len(_SYMBOLS)]))
    at = {axis: rounded(view.points[of, i]) for i, axis in enumerate(_AXES[: view.dims])}
    made = go.Scatter if view.dims == 2 else go.Scatter3d
    return made(
        **at,
        mode="markers",
        name=f"{escape(name)} (n = {len(of)})",
        marker={"color": colour, "symbol": symbol, "size": 8 if view.dims == 2 else 4, "opacity": 0.75},
        hovertext=[_hover(prompts[int(row)]) for row in of],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _rows(prompts: PromptSet, colour: str) -> dict[str, np.ndarray]:
    """The rows of the prompts by the name that colours them; labels in a fixed order."""
    if colour == "label":
        names = [_label(prompt) for prompt in prompts]
        order = [name for name in _LABELS if name in names]
    else:
        names = [str(getattr(prompt, colour)) or "none" for prompt in prompts]
        order = sorted(set(names))
    return {name: np.flatnonzero(np.array(names) == name) for name in order}


def _label(prompt: Prompt) -> str:
    return "unlabelled" if prompt.label is None else "dangerous" if prompt.label else "safe"


def _hover(prompt: Prompt) -> str:
    """The prompt's text in lines, as text and never as markup, and what is known of it."""
    lines = wrap(shorten(prompt.text, 320, placeholder=" …"), 48) or [""]
    known = " · ".join(filter(None, [_label(prompt), prompt.kind, prompt.category, prompt.language]))
    return "<br>".join([*(escape(one) for one in lines), f"<i>{escape(known)}</i>"])


def _pca(h: torch.Tensor, dims: int) -> tuple[_Points, list[float]]:
    """The points on the first principal components, and each component's share of the variance."""
    from sklearn.decomposition import PCA

    fitted = PCA(n_components=dims, svd_solver="full")
    points = fitted.fit_transform(h.numpy())
    return points, [float(share) for share in fitted.explained_variance_ratio_]


def _lda(h: torch.Tensor, prompts: PromptSet, held_out: _Folds, dims: int) -> tuple[_Points, list[float]]:
    """The held-out LDA score, then principal components of what is at right angles to the direction."""
    labels, groups = prompts.labels, prompts.groups
    scores = np.zeros(len(labels))
    for held in held_out:
        fitting = np.setdiff1d(np.arange(len(labels)), held)
        fitted = fit_scorer(h[fitting], labels[fitting], groups[fitting], "lda")
        scores[held] = apply_scorer(h[held], fitted)
    unit = fit_scorer(h, labels, groups, "lda")["weight"].double()
    across = h - h.mean(dim=0)
    across = across - (across @ unit)[:, None] * unit
    points, shares = _pca(across, dims - 1)
    left = float((across**2).sum() / ((h - h.mean(dim=0)) ** 2).sum().clamp_min(1e-30))
    return np.column_stack([scores, points]), [float("nan"), *(share * left for share in shares)]


def _folds(prompts: PromptSet) -> _Folds:
    return prompts.folds(max(2, min(5, prompts.groups_of_rarer_class)))


def _dangerous_up(points: _Points, labels: np.ndarray) -> _Points:
    """Components have no sign of their own: the dangerous mean is put on the higher side of each axis."""
    if labels.all() or not labels.any():
        return points
    return points * np.where(points[labels].mean(axis=0) < points[~labels].mean(axis=0), -1, 1)
