"""Statistics without rows: count, mean and scatter of each class, added up while prompts stream past.

Axis `stream`: the embedding (layer -1), then the layers of `layers`, in their order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from . import tokens as tok
from .directions import ContentVectors, is_zero, stand_in, unit_vectors
from .files import building_from, load_tensors, save_tensors
from .models import ModelFingerprint, check_layers, fingerprint
from .passes import Passes
from .progress import track
from .prompts import Prompt, PromptSet, as_prompts
from .residuals import ResidualCache
from .show import card
from .types import EMBED, MismatchError, OptionError, PromptError, ResidualModel

CHUNK = 2048
"""Prompts that are held at a time where they come from an iterator."""

_KIND = "Moments"
_PLAIN = ("layers", "position", "template", "source")

Means = Float64[Tensor, "stream d_model"]


@dataclass(frozen=True)
class Spread:
    """Sums over rows of their differences d from the mean, in float64.

    scatter = sum d d^T; third = sum |d|^2 d and fourth = sum |d|^4, for Ledoit and Wolf's shrinkage.
    """

    scatter: Float64[Tensor, "stream d_model d_model"]
    third: Means
    fourth: Float64[Tensor, " stream"]

    def copy(self) -> "Spread":
        return Spread(self.scatter.clone(), self.third, self.fourth)

    def move(self, n: int, delta: Means) -> "Spread":
        """The same of `n` rows about another point, from which their mean is `delta` away; uses this one up.

        With e = d + delta, |e|^2 = |d|^2 + 2 d . delta + |delta|^2, and sum d = 0.
        """
        across = (self.scatter @ delta[:, :, None])[:, :, 0]
        trace = self.scatter.diagonal(dim1=1, dim2=2).sum(dim=1)
        square = delta.square().sum(dim=1)
        mixed = (delta * (across + self.third)).sum(dim=1)
        third = self.third + 2 * across + (trace + n * square)[:, None] * delta
        fourth = self.fourth + 4 * mixed + 2 * square * trace + n * square**2
        return Spread(self.scatter.baddbmm_(n * delta[:, :, None], delta[:, None]), third, fourth)

    def add(self, away: Float64[Tensor, "stream prompt d_model"]) -> "Spread":
        """With the differences of further rows from the same point; uses this one up."""
        squares = away.square().sum(dim=2)
        return Spread(
            self.scatter.baddbmm_(away.mT, away),
            self.third + (squares[:, :, None] * away).sum(dim=1),
            self.fourth + squares.square().sum(dim=1),
        )

    def merge(self, other: "Spread") -> "Spread":
        """With the sums of further rows about the same point; uses this one up."""
        self.scatter.add_(other.scatter)
        return Spread(self.scatter, self.third + other.third, self.fourth + other.fourth)


@dataclass(frozen=True)
class ClassMoments:
    """The rows of one class: how many, their mean, their L2 norms (a median is no moment), their spread.

    The spread is None where it was not asked for.
    """

    n: int
    mean: Means
    norms: Float[Tensor, "stream prompt"]
    spread: Spread | None

    def __add__(self, other: "ClassMoments") -> "ClassMoments":
        both = _Running(self)
        both.merge(other)
        return both.done()


@dataclass(frozen=True)
class Moments:
    """Moments of safe and of dangerous prompts: all that means, separation and LDA need, and no row.

    `a + b` are those of the prompts of both (one that stands in both counts twice), in float64 and
    whatever the order. The memory is that of 2 x (1 + layers) x d_model^2 numbers of 8 bytes
    (SmolLM2-135M: 165 MB; without the scatter 0.3 MB), and 4 bytes a prompt and stream for the norms.
    """

    safe: ClassMoments
    dangerous: ClassMoments
    layers: tuple[int, ...]
    position: str
    template: str
    source: str
    model: ModelFingerprint

    @classmethod
    def of(cls, cache: ResidualCache, *, scatter: bool = True) -> "Moments":
        """The moments of residual streams that are at hand. Raises `PromptError` without labels."""
        both = _Both(1 + len(cache.layers), cache.resid.shape[2], scatter)
        both.add(torch.cat([cache.embed[None], cache.resid]), cache.prompts.labels)
        return both.done(cache.layers, cache.position, cache.template, cache.prompts.name, cache.model)

    def __len__(self) -> int:
        return self.safe.n + self.dangerous.n

    def __add__(self, other: "Moments") -> "Moments":
        """Raises `MismatchError` for another model, position, template or layers, or only one scatter."""
        self.model.require(other.model, "the left moments of a sum")
        for name, mine, theirs in _described(self, other):
            if mine != theirs:
                raise MismatchError(f"moments with {name} {mine} and {theirs} given: expected the same")
        same = self.source == other.source
        return replace(
            self,
            safe=self.safe + other.safe,
            dangerous=self.dangerous + other.dangerous,
            source=self.source if same else f"{self.source} + {other.source}",
        )

    def content_vectors(self) -> ContentVectors:
        """What `content_vectors` gives of the same prompts. Raises `PromptError` for a class without one."""
        self._require_both()
        safe, dangerous = self.safe.mean[1:], self.dangerous.mean[1:]
        return ContentVectors(
            vectors=(dangerous - safe).float(),
            safe_mean=safe.float(),
            dangerous_mean=dangerous.float(),
            resid_norm=self._resid_norm()[1:],
            layers=self.layers,
            method="content",
            n_safe=self.safe.n,
            n_dangerous=self.dangerous.n,
            position=self.position,
            template=self.template,
            source=self.source,
            model=self.model,
        )

    def lda(self, shrinkage: float | int | None = None) -> ContentVectors:
        """Fisher's direction of each layer, toward dangerous, with the norms of the content vectors.

        w = inverse((1 - s) C + s tr(C) / d_model I) (dangerous mean - safe mean), with C = (safe scatter +
        dangerous scatter) / n the covariance inside the classes and s the shrinkage: a number, as in
        scikit-learn's LinearDiscriminantAnalysis(solver="lsqr"), or by default each layer's own, by
        Ledoit & Wolf (2004), as in the detector "lda" on at least as many prompts as dimensions.

        Raises:
            PromptError: a class without a prompt.
            OptionError: a shrinkage outside 0 to 1, or 0 on too few prompts for C to have an inverse.
            MismatchError: no scatter was kept.
        """
        own = self.content_vectors()
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise OptionError(f"shrinkage={shrinkage} given, expected 0 to 1, or None for Ledoit and Wolf's")
        if shrinkage == 0 and len(self) < self.model.d_model + 2:
            raise OptionError(
                f"shrinkage=0 given with {len(self)} prompts: expected at least {self.model.d_model + 2}, "
                "or the covariance has no inverse; shrink it"
            )
        within = self._within()
        rows = range(1, 1 + len(self.layers))
        directions = torch.stack([self._fisher(within, row, shrinkage) for row in rows])
        method = f"lda (shrinkage {'of Ledoit & Wolf' if shrinkage is None else f'{shrinkage:g}'})"
        return stand_in(own, replace(own, vectors=directions.float(), method=method))

    def cohens_d(self, vectors: ContentVectors) -> Float[np.ndarray, " layer"]:
        """Cohen's d of the projections on each layer's vector, as `metrics.cohens_d` has it of rows.

        d = u . (dangerous mean - safe mean) / sqrt(u^T (safe scatter + dangerous scatter) u / (n - 2)), u
        the unit vector. With vectors of other prompts it is a held-out figure.

        Raises:
            PromptError: a class without a prompt.
            MismatchError: vectors of another model or without a layer, or no scatter was kept.
        """
        vectors.model.require(self.model, "the vectors")
        rows = [vectors.row(layer) for layer in self.layers]
        return self._along(vectors.unit[rows].double(), slice(1, None))

    def to_frame(self) -> pd.DataFrame:
        """A row a layer, the embedding first; columns as in `LayerTable` where the rows are not needed.

        `layer`, `name`, `separation`, `magnitude`, `relative_magnitude`, `is_zero`, and, where the scatter
        was kept, `cohens_d_in_sample`: along the content vector of the very same prompts, which flatters
        (`cohens_d(vectors)` takes those of others).

        Raises:
            PromptError: a class without a prompt.
        """
        self._require_both()
        safe, dangerous, resid_norm = self.safe.mean, self.dangerous.mean, self._resid_norm().double()
        vectors = dangerous - safe
        magnitude, layers = vectors.norm(dim=1), [EMBED, *self.layers]
        columns = {
            "layer": layers,
            "name": ["embed" if layer == EMBED else f"layer {layer}" for layer in layers],
            "separation": 1 - torch.cosine_similarity(safe, dangerous).numpy(),
            "magnitude": magnitude.numpy(),
            "relative_magnitude": (magnitude / resid_norm.clamp_min(1e-12)).numpy(),
        }
        if self.safe.spread is not None:
            columns["cohens_d_in_sample"] = self._along(unit_vectors(vectors, resid_norm), slice(None))
        return pd.DataFrame(columns | {"is_zero": is_zero(vectors, resid_norm).numpy()})

    def _repr_html_(self) -> str:
        whole = min(self.safe.n, self.dangerous.n) > 0
        norms = pd.DataFrame({"layer": [EMBED, *self.layers], "median_norm": self._resid_norm().numpy()})
        return card(
            f"Moments of {self.model.name}: {self.source} ({self.safe.n} safe, "
            f"{self.dangerous.n} dangerous), read at {self.position} ({self.template} template)",
            self.to_frame().sort_values("separation", ascending=False, kind="stable") if whole else norms,
            "moments.content_vectors()" if whole else "moments + ls.moments(model, prompts)",
            note="highest separation first" if whole else "one class only: add the other",
        )

    def save(self, path: str | Path) -> Path:
        """Write safetensors with a JSON header; whole or not at all."""
        header: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        header |= {"n": [self.safe.n, self.dangerous.n], "model": self.model.to_dict()}
        tensors = _tensors(self.safe, "safe") | _tensors(self.dangerous, "dangerous")
        return save_tensors(path, _KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read what `save` wrote. Raises `FileError` for a damaged file, another kind or version."""
        tensors, header = load_tensors(path, _KIND)
        with building_from(path):
            model = ModelFingerprint.from_dict(header["model"])
            shape = (1 + len(header["layers"]), model.d_model)
            classes = {
                name: _read_class(tensors, name, n, shape)
                for name, n in zip(("safe", "dangerous"), header["n"], strict=True)
            }
            values = {name: header[name] for name in _PLAIN}
            values["layers"] = tuple(values["layers"])
            return cls(**classes, **values, model=model)

    def _require_both(self) -> None:
        if not (self.safe.n and self.dangerous.n):
            raise PromptError(
                f"the moments of {self.source} are of {self.dangerous.n} dangerous and {self.safe.n} safe "
                "prompts: expected at least one of each; add those of the other class"
            )

    def _resid_norm(self) -> Float[Tensor, " stream"]:
        """The median over all prompts of the L2 norm, as `directions.median_norm` has it of rows."""
        return torch.cat([self.safe.norms, self.dangerous.norms], dim=1).median(dim=1).values

    def _within(self) -> Spread:
        """The spread of the rows of both classes, each about its own class's mean."""
        if self.safe.spread is None or self.dangerous.spread is None:
            raise MismatchError(
                "moments without a scatter given: expected those of moments(..., scatter=True)"
            )
        return self.safe.spread.copy().merge(self.dangerous.spread)

    def _along(self, units: Means, streams: slice) -> Float[np.ndarray, " stream"]:
        self._require_both()
        across = ((self._within().scatter[streams] @ units[:, :, None])[:, :, 0] * units).sum(dim=1)
        apart = ((self.dangerous.mean - self.safe.mean)[streams] * units).sum(dim=1)
        if min(self.safe.n, self.dangerous.n) < 2:
            return np.full(len(units), np.nan)
        d = apart / (across / (len(self) - 2)).sqrt()
        return torch.where(apart == 0, apart, d).numpy()

    def _fisher(self, within: Spread, row: int, shrinkage: float | int | None) -> Float64[Tensor, " d_model"]:
        """A unit vector, or zeros where the classes have one mean."""
        v = self.dangerous.mean[row] - self.safe.mean[row]
        if not v.any():
            return v
        covariance = within.scatter[row] / len(self)
        s = shrinkage
        if s is None:
            s = _ledoit_wolf(covariance, float(within.fourth[row]) / len(self), len(self))
        unit = torch.eye(len(v), dtype=v.dtype)
        shrunk = (1 - s) * covariance + s * covariance.trace() / len(v) * unit
        floor = 1e-9 * (v @ v)  # rows that are alike inside a class have no covariance to invert
        direction = torch.linalg.solve(shrunk + floor * unit, v)
        return direction / direction.norm()


def _ledoit_wolf(covariance: Float64[Tensor, "d_model d_model"], fourth: float, n: int) -> float:
    """The share s of tr(C) / d_model I: the estimated error of C over its distance from that.

    `fourth` is the mean of |d|^4.
    """
    size = float(covariance.square().sum())
    distance = size - float(covariance.trace()) ** 2 / len(covariance)
    error = min((fourth - size) / n, distance)
    return error / distance if error > 0 else 0.0


def moments(
    model: ResidualModel,
    prompts: PromptSet | Iterable[Prompt | str],
    *,
    scatter: bool = True,
    position: tok.Position = "content_mean",
    template: tok.Template = "auto",
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    truncate: bool = False,
    share_prefix: bool = True,
    progress: bool = True,
) -> Moments:
    """Count, mean and scatter of each class at every layer, for prompts whose rows do not fit in memory.

    Rows are read as `residual_streams` reads them and added up batch by batch:

        mean    <- mean + (n_batch / n) (mean of the batch - mean)
        scatter <- scatter + n_before (shift of the mean)(same)^T + sum over the batch of d d^T

    which is Chan, Golub & LeVeque's update (1983, doi:10.1080/00031305.1983.10483115): unlike a sum of
    squares it loses no digits where the mean is large beside the spread.

    Args:
        prompts: labelled; a `PromptSet`, or anything that yields `Prompt`s, of which 2,048 are held at a
            time. Chunks of your own: `itertools.chain.from_iterable(sets)`, or one call a chunk and `+`.
        scatter: keep it (d_model^2 numbers a layer and class); without it there are the means alone, enough
            for content vectors and separation.
        position, template, layers, batch_tokens, truncate, share_prefix: as in `residual_streams`.

    Raises:
        PromptError: a prompt without a label, an empty one, or one too long for the context.
        OptionError: an unknown position or template, or a layer out of range.
    """
    chosen = check_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    named = tok.position_name(position), tok.template_name(model, template)
    both = _Both(1 + len(chosen), model.cfg.d_model, scatter)
    for chunk in _chunks(prompts):
        labels = chunk.labels
        passes = Passes(
            model,
            tok.encode(model, chunk.texts, template=template, truncate=truncate),
            position,
            [EMBED, *chosen],
            batch_tokens=batch_tokens,
            share_prefix=share_prefix,
        )
        batches = track(passes.batches, f"moments of {chunk.name}", progress, size=len)
        for found, streams in passes.run(batches):
            both.add(streams, labels[found])
    source = prompts.name if isinstance(prompts, PromptSet) else PromptSet(()).name
    return both.done(tuple(chosen), *named, source, fingerprint(model))


def _chunks(prompts: PromptSet | Iterable[Prompt | str]) -> Iterator[PromptSet]:
    if isinstance(prompts, PromptSet | str):
        yield as_prompts(prompts)
        return
    rest, start = iter(prompts), 0
    while (some := list(islice(rest, CHUNK))) or not start:
        made = (one if isinstance(one, Prompt) else Prompt(one) for one in some)
        yield as_prompts(PromptSet(tuple(made), f"prompts[{start}:]"))
        start += len(some)


class _Running:
    """The sums of one class, updated in place: a scatter is too large to be copied at each batch."""

    def __init__(self, start: ClassMoments):
        self.n, self.mean, self.norms = start.n, start.mean, [start.norms]
        self.spread = None if start.spread is None else start.spread.copy()

    def add(self, rows: Float[Tensor, "stream prompt d_model"]) -> None:
        """Further rows."""
        if not rows.shape[1]:
            return
        exact = rows.double()
        self._move(rows.shape[1], exact.mean(dim=1))
        self.norms.append(rows.norm(dim=2))
        if self.spread is not None:
            self.spread = self.spread.add(exact - self.mean[:, None])

    def merge(self, other: ClassMoments) -> None:
        """Further rows, by their moments."""
        if not other.n:
            return
        self._move(other.n, other.mean)
        self.norms.append(other.norms)
        if self.spread is not None and other.spread is not None:
            moved = other.spread.copy().move(other.n, other.mean - self.mean)
            self.spread = self.spread.merge(moved)

    def _move(self, n: int, mean: Means) -> None:
        """Take up the mean of these rows and `n` more, and have the spread about it."""
        new = self.mean + (mean - self.mean) * (n / (self.n + n))
        if self.spread is not None:
            self.spread = self.spread.move(self.n, self.mean - new)
        self.n, self.mean = self.n + n, new

    def done(self) -> ClassMoments:
        return ClassMoments(self.n, self.mean, torch.cat(self.norms, dim=1), self.spread)


class _Both:
    """The running sums of the two classes."""

    def __init__(self, streams: int, d_model: int, scatter: bool):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(streams, *shape, dtype=torch.float64)

        spread = Spread(zeros(d_model, d_model), zeros(d_model), zeros()) if scatter else None
        nothing = ClassMoments(0, zeros(d_model), torch.zeros(streams, 0), spread)
        self._classes = {False: _Running(nothing), True: _Running(nothing)}

    def add(self, rows: Float[Tensor, "stream prompt d_model"], labels: np.ndarray) -> None:
        for label, running in self._classes.items():
            running.add(rows[:, torch.from_numpy(labels == label)])

    def done(
        self, layers: tuple[int, ...], position: str, template: str, source: str, model: ModelFingerprint
    ) -> Moments:
        safe, dangerous = (running.done() for running in self._classes.values())
        return Moments(safe, dangerous, layers, position, template, source, model)


def _described(one: Moments, other: Moments) -> list[tuple[str, Any, Any]]:
    names = ("position", "template", "layers")
    kept = ("scatter kept:", one.safe.spread is not None, other.safe.spread is not None)
    return [*((name, getattr(one, name), getattr(other, name)) for name in names), kept]


def _tensors(moments: ClassMoments, label: str) -> dict[str, Tensor]:
    values = {"mean": moments.mean, "norms": moments.norms}
    if moments.spread is not None:
        values |= {field.name: getattr(moments.spread, field.name) for field in fields(Spread)}
    return {f"{label}.{name}": value for name, value in values.items()}


def _read_class(tensors: dict[str, Tensor], label: str, n: int, shape: tuple[int, int]) -> ClassMoments:
    def read(name: str, *expected: int) -> Tensor:
        tensor = tensors[f"{label}.{name}"]
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{label}.{name} of shape {tuple(tensor.shape)} instead of {expected}")
        return tensor

    spread = None
    if f"{label}.scatter" in tensors:
        spread = Spread(read("scatter", *shape, shape[1]), read("third", *shape), read("fourth", shape[0]))
    return ClassMoments(n, read("mean", *shape), read("norms", shape[0], n), spread)
