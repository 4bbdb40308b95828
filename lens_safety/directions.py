"""Directions: what separates dangerous from safe prompts, one vector a layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import tokens as tok
from .files import building_from, load_tensors, save_tensors
from .models import ModelFingerprint
from .prompts import PromptSet, load_prompts
from .residuals import ResidualCache, residual_streams
from .show import card
from .types import Labels, MismatchError, PromptError, ResidualModel

_KIND = "ContentVectors"

ZERO_NORM = 1e-6
"""A vector shorter than this share of the median residual norm is rounding noise: its norm counts as 0."""


@dataclass(frozen=True)
class ContentVectors:
    """One direction a layer: vectors[i] = dangerous_mean[i] - safe_mean[i] at layer `layers[i]`.

    It points from safe to dangerous; raw, in the units of the residual stream. `resid_norm[i]` is
    the median over the training prompts of the L2 norm of the residual stream as read at `position`.
    Sums, differences and multiples act on the means and so on the vectors: `a - b`, `2 * a`, `-a`.
    """

    vectors: Float[Tensor, "layer d_model"]
    safe_mean: Float[Tensor, "layer d_model"]
    dangerous_mean: Float[Tensor, "layer d_model"]
    resid_norm: Float[Tensor, " layer"]
    layers: tuple[int, ...]
    method: str
    n_safe: int
    n_dangerous: int
    position: str
    template: str
    source: str
    model: ModelFingerprint

    def __add__(self, other: "ContentVectors") -> "ContentVectors":
        return self._combine(other, 1.0, "+")

    def __sub__(self, other: "ContentVectors") -> "ContentVectors":
        return self._combine(other, -1.0, "-")

    def __mul__(self, factor: float | int) -> "ContentVectors":
        return replace(
            self,
            vectors=self.vectors * factor,
            safe_mean=self.safe_mean * factor,
            dangerous_mean=self.dangerous_mean * factor,
            method=f"{factor:g} * ({self.method})",
        )

    __rmul__ = __mul__

    def __neg__(self) -> "ContentVectors":
        return self * -1.0

    def _combine(self, other: "ContentVectors", sign: float, word: str) -> "ContentVectors":
        self.model.require(other.model, "the left vectors of a sum")
        if self.layers != other.layers:
            raise MismatchError(
                f"vectors of layers {self.layers} and {other.layers} given: expected the same layers"
            )
        return replace(
            self,
            vectors=self.vectors + sign * other.vectors,
            safe_mean=self.safe_mean + sign * other.safe_mean,
            dangerous_mean=self.dangerous_mean + sign * other.dangerous_mean,
            method=f"({self.method}) {word} ({other.method})",
        )

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """The magnitude of each layer's vector: its L2 norm."""
        return self.vectors.norm(dim=1)

    @property
    def is_zero(self) -> Bool[Tensor, " layer"]:
        """True where the classes have the same mean, so that there is no direction."""
        return is_zero(self.vectors, self.resid_norm)

    @property
    def unit(self) -> Float[Tensor, "layer d_model"]:
        """vectors / norm, and zeros (never NaN) where there is no direction."""
        return unit_vectors(self.vectors, self.resid_norm)

    def layer(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one layer, by its number."""
        return self.vectors[self.row(layer)]

    def row(self, layer: int) -> int:
        """Which row a layer's vector stands in. Raises `MismatchError` for a layer without one."""
        if layer not in self.layers:
            raise MismatchError(
                f"layer {layer} given, expected one of the layers with a vector: "
                f"{', '.join(map(str, self.layers))}"
            )
        return self.layers.index(layer)

    def everywhere(self, layer: int) -> "ContentVectors":
        """The vector and means of one layer at every layer: one direction, as Arditi et al. ablate it."""
        row = self.row(layer)
        same = {name: getattr(self, name)[[row] * len(self.layers)] for name in _TENSORS[:3]}
        return replace(self, method=f"{self.method} of layer {layer}", **same)

    def cosine(self, other: "ContentVectors") -> Float[np.ndarray, " layer"]:
        """cos(self, other) at each of these layers; 0 where either has no direction.

        Raises `MismatchError` for vectors of another model, or where `other` lacks a layer.
        """
        self.model.require(other.model, "the vectors")
        rows = [other.row(layer) for layer in self.layers]
        return (self.unit * other.unit[rows]).sum(dim=1).numpy()

    def dose(self, multiplier: float) -> Float[np.ndarray, " layer"]:
        """norm(multiplier * v) / median residual norm of the layer; comparable across layers and models."""
        return (abs(multiplier) * self.norms / self.resid_norm.clamp_min(1e-12)).numpy()

    def to_frame(self) -> pd.DataFrame:
        """A row a layer: magnitude, relative magnitude, whether there is a direction at all."""
        return pd.DataFrame(
            {
                "layer": self.layers,
                "magnitude": self.norms.numpy(),
                "relative_magnitude": self.dose(1.0),
                "is_zero": self.is_zero.numpy(),
            }
        )

    def _repr_html_(self) -> str:
        frame = self.to_frame().sort_values("relative_magnitude", ascending=False, kind="stable")
        return card(
            f"{self.method} vectors of {self.model.name}: {self.source} ({self.n_safe} safe, "
            f"{self.n_dangerous} dangerous), read at {self.position}",
            frame,
            f"ls.plots.vector(vectors, layer={frame['layer'].iloc[0]})",
            note="largest first; relative magnitude: over the median residual norm of the layer",
        )

    def save(self, path: str | Path) -> Path:
        """Write safetensors with a JSON header; whole or not at all."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        return save_tensors(path, _KIND, tensors, {**header, "model": self.model.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> "ContentVectors":
        """Read what `save` wrote. Raises `FileError` for a damaged file, another kind or version."""
        tensors, header = load_tensors(path, _KIND)
        with building_from(path):
            whole = (len(header["layers"]), header["model"]["d_model"])
            for name in _TENSORS:
                shape = whole[:1] if name == "resid_norm" else whole
                if tuple(tensors[name].shape) != shape:
                    found = tuple(tensors[name].shape)
                    raise ValueError(f"{name} of shape {found} instead of {shape}")
            values = {name: header[name] for name in _PLAIN}
            values["layers"] = tuple(values["layers"])
            model = ModelFingerprint.from_dict(header["model"])
            return cls(**{name: tensors[name] for name in _TENSORS}, **values, model=model)


_TENSORS = ("vectors", "safe_mean", "dangerous_mean", "resid_norm")
_PLAIN = ("layers", "method", "n_safe", "n_dangerous", "position", "template", "source")


def content_vectors(cache: ResidualCache, *, method: str = "content") -> ContentVectors:
    """The content vector of each layer: average first, then subtract.

    vectors[layer] = mean over dangerous prompts of resid[layer] - mean over safe prompts of resid[layer]

    The sign is fixed: from safe to dangerous. Source: the persona-vector study's content vectors,
    which are the difference in means of Marks & Tegmark (2310.06824) and Arditi et al. (2406.11717).

    Raises:
        PromptError: a prompt without a label, or a class without a prompt.
    """
    labels = cache.prompts.labels
    if labels.all() or not labels.any():
        raise PromptError(
            f"{cache.prompts.name} has {int(labels.sum())} dangerous and {int((~labels).sum())} safe "
            "prompts: expected at least one of each"
        )
    safe_mean, dangerous_mean = class_means(cache.resid, labels)
    return ContentVectors(
        vectors=dangerous_mean - safe_mean,
        safe_mean=safe_mean,
        dangerous_mean=dangerous_mean,
        resid_norm=median_norm(cache.resid),
        layers=cache.layers,
        method=method,
        n_safe=int((~labels).sum()),
        n_dangerous=int(labels.sum()),
        position=cache.position,
        template=cache.template,
        source=cache.prompts.name,
        model=cache.model,
    )


def tone_vectors(
    model: ResidualModel,
    personas: PromptSet | None = None,
    *,
    position: tok.Position = "content_mean",
    template: tok.Template = "auto",
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> ContentVectors:
    """The same difference from persona prompts: mean(harmful personas) - mean(helpful personas).

    `personas` are labelled prompts (True = the harmful persona); by default the built-in pairs, of
    which the persona-vector study's tone vector is the first alone: `load_prompts("personas")[:2]`.
    """
    personas = load_prompts("personas") if personas is None else personas
    cache = residual_streams(
        model, personas, position=position, template=template, layers=layers, progress=progress
    )
    return content_vectors(cache, method="tone")


def random_vectors(vectors: ContentVectors, *, seed: int = 0) -> ContentVectors:
    """The control: isotropic random directions, each with the norm of the vector it stands in for."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vectors.vectors.shape, generator=generator)
    return _standing_in(vectors, noise, f"random (seed {seed})")


def stand_in(vectors: ContentVectors, other: ContentVectors) -> ContentVectors:
    """Another direction as a control: the directions of `other` with the norms of `vectors`."""
    rows = [other.row(layer) for layer in vectors.layers]
    return _standing_in(vectors, other.vectors[rows], other.method)


def orthogonal_vectors(vectors: ContentVectors, other: ContentVectors) -> ContentVectors:
    """The control: what of `other` is at right angles to the vectors, with their norms."""
    rows = other.vectors[[other.row(layer) for layer in vectors.layers]]
    across = rows - (rows * vectors.unit).sum(dim=1, keepdim=True) * vectors.unit
    return _standing_in(vectors, across, f"orthogonal part of {other.method}")


def _standing_in(
    vectors: ContentVectors, directions: Float[Tensor, "layer d_model"], method: str
) -> ContentVectors:
    """Other directions with the norms of `vectors`, around the middle of its two means."""
    norms = directions.norm(dim=1, keepdim=True).clamp_min(1e-30)
    drawn = directions / norms * vectors.norms[:, None]
    middle = (vectors.safe_mean + vectors.dangerous_mean) / 2
    return replace(
        vectors,
        vectors=drawn,
        safe_mean=middle - drawn / 2,
        dangerous_mean=middle + drawn / 2,
        method=method,
    )


def class_means(
    resid: Float[Tensor, "*layer prompt d_model"], labels: Labels
) -> tuple[Float[Tensor, "*layer d_model"], Float[Tensor, "*layer d_model"]]:
    """(safe mean, dangerous mean) over the prompts."""
    dangerous = torch.from_numpy(labels)
    return resid[..., ~dangerous, :].mean(dim=-2), resid[..., dangerous, :].mean(dim=-2)


def median_norm(resid: Float[Tensor, "layer prompt d_model"]) -> Float[Tensor, " layer"]:
    """The median over the prompts of the L2 norm: sink-like outliers do not move it."""
    return resid.norm(dim=2).median(dim=1).values


def is_zero(
    vectors: Float[Tensor, "layer d_model"], resid_norm: Float[Tensor, " layer"]
) -> Bool[Tensor, " layer"]:
    """True where a vector is rounding noise beside the residual stream."""
    return vectors.norm(dim=1) <= ZERO_NORM * resid_norm


def unit_vectors(
    vectors: Float[Tensor, "layer d_model"], resid_norm: Float[Tensor, " layer"]
) -> Float[Tensor, "layer d_model"]:
    """vectors / norm, and zeros (never NaN) where there is no direction."""
    norms = vectors.norm(dim=1, keepdim=True)
    zero = is_zero(vectors, resid_norm)[:, None]
    return torch.where(zero, torch.zeros_like(vectors), vectors / norms.clamp_min(1e-30))
