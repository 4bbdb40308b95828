"""Detectors: a prompt's score from its residual stream; every choice made inside the training set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import tokens as tok
from .directions import ZERO_NORM, ContentVectors, class_means
from .files import building_from, load_tensors, save_tensors
from .metrics import accuracy, auroc, best_threshold, check_scores
from .models import ModelFingerprint, fingerprint
from .prompts import PromptSet
from .residuals import ResidualCache, residual_streams
from .types import (
    Labels,
    MismatchError,
    OptionError,
    PromptError,
    ResidualModel,
    Scores,
    one_of,
)

Method = Literal["two-vector", "one-vector", "logistic"]
METHODS = ("two-vector", "one-vector", "logistic")

LOGISTIC_C = (0.0003, 0.003, 0.03)
"""The inverse L2 strengths among which cross-validation chooses; features are standardised."""

_KIND = "Detector"
_Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Detector:
    """A frozen scorer of prompts: score > threshold means dangerous.

    With h the residual stream of `layer` at `position`:

        two-vector   cos(h, dangerous mean) - cos(h, safe mean). The persona-vector study; Latent
                     Guard (2507.11878). It equals one direction on h / norm(h).
        one-vector   (h - (safe mean + dangerous mean) / 2) . v / norm(v), v = dangerous - safe mean.
        logistic     w . (h - m) / s + b, the log odds of an L2 logistic regression on standardised h.

    `auroc_cv` and `accuracy_cv` are what cross-validation inside the training set gave at the chosen
    layer; being the best of several layers they flatter the detector, so report a held-out set.
    `fitted_on` holds short hashes of the training texts, so that `evaluate` can refuse them.
    """

    method: str
    layer: int
    threshold: float
    parameters: dict[str, Tensor]
    position: str
    template: str
    model: ModelFingerprint
    source: str
    fitted_on: tuple[str, ...]
    n_safe: int
    n_dangerous: int
    auroc_cv: float
    accuracy_cv: float
    seed: int

    @classmethod
    def fit(
        cls,
        cache: ResidualCache,
        *,
        method: Method = "two-vector",
        layer: int | Literal["auto"] = "auto",
        threshold: float | Literal["accuracy"] = "accuracy",
        vectors: ContentVectors | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> "Detector":
        """Fit on a training cache; every choice is made by cross-validation inside it.

        Args:
            layer: "auto" takes the layer with the highest cross-validated AUROC (the first of
                equals; for logistic together with the L2 strength), -1 is the embedding.
            threshold: "accuracy" takes the threshold with the highest accuracy on the out-of-fold
                scores of the chosen layer; a number is taken as it is.
            vectors: class means from elsewhere (tone vectors, say) for the vector methods; the
                cache then serves only to choose layer and threshold.

        Raises:
            PromptError: a prompt without a label, or fewer than `folds` groups of a class.
            OptionError: an unknown method or threshold, or "logistic" with `vectors`.
            MismatchError: a layer that is not in the cache, or vectors of another model.
        """
        one_of(method, METHODS, "method")
        if vectors is not None:
            _check_vectors(vectors, cache, method)
        labels = cache.prompts.labels
        layers = list(cache.layers) if layer == "auto" else [layer]
        held_out = _folds(cache.prompts, folds, seed, needed=vectors is None)
        strengths = LOGISTIC_C if method == "logistic" else (0.0,)
        tried = [
            (_out_of_fold(cache.layer(at), labels, held_out, method, c, _means(vectors, at)), at, c)
            for at in layers
            for c in strengths
        ]
        best = max(range(len(tried)), key=lambda i: (auroc(tried[i][0], labels), -i))
        scores, at, c = tried[best]
        cut = _threshold(threshold, scores, labels)
        return cls(
            method=method,
            layer=at,
            threshold=cut,
            parameters=_means(vectors, at) or _fit(cache.layer(at), labels, method, c),
            position=cache.position,
            template=cache.template,
            model=cache.model,
            source=cache.prompts.name,
            fitted_on=cache.prompts.text_digests,
            n_safe=int((~labels).sum()),
            n_dangerous=int(labels.sum()),
            auroc_cv=auroc(scores, labels),
            accuracy_cv=accuracy(scores, labels, cut),
            seed=seed,
        )

    def score(
        self,
        prompts: ResidualCache | PromptSet | Sequence[str],
        *,
        model: ResidualModel | None = None,
        truncate: bool = False,
        progress: bool = False,
    ) -> Scores:
        """A float per prompt, in order; higher = more dangerous.

        Texts need `model`. A cache or a model other than the detector's is refused.

        Raises:
            MismatchError: another model, position or template, or a layer that is not cached.
        """
        if isinstance(prompts, ResidualCache):
            cache = prompts
        else:
            cache = self._extract(prompts, model, truncate, progress)
        self._check(cache.model, cache.position, cache.template)
        scores = _apply(cache.layer(self.layer), self.method, self.parameters)
        check_scores(scores)
        return scores

    def predict(
        self,
        prompts: ResidualCache | PromptSet | Sequence[str],
        *,
        model: ResidualModel | None = None,
        truncate: bool = False,
        progress: bool = False,
    ) -> Labels:
        """score > threshold: True = dangerous."""
        return self.score(prompts, model=model, truncate=truncate, progress=progress) > self.threshold

    def verify(
        self,
        model: ResidualModel,
        *,
        position: str | None = None,
        template: str | None = None,
    ) -> None:
        """Raise `MismatchError` unless this detector can be used with the model (and position, template)."""
        self._check(fingerprint(model), position or self.position, template or self.template)

    def _check(self, model: ModelFingerprint, position: str, template: str) -> None:
        self.model.require(model, "the detector")
        for what, own, given in (
            ("position", self.position, position),
            ("template", self.template, template),
        ):
            if own != given:
                raise MismatchError(
                    f"the detector reads {what} {own!r} and was given {given!r}: expected the same; "
                    f"extract with {what}={own!r}, or fit another detector"
                )

    def _extract(
        self,
        prompts: PromptSet | Sequence[str],
        model: ResidualModel | None,
        truncate: bool,
        progress: bool,
    ) -> ResidualCache:
        if model is None:
            raise OptionError("texts given without a model: expected score(texts, model=model)")
        self.verify(model)
        return residual_streams(
            model,
            prompts,
            position=tok.named_position(self.position),
            template=tok.named_template(self.template),
            layers=[max(self.layer, 0)],
            truncate=truncate,
            progress=progress,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row of what it is and what it was fitted on."""
        shown = [name for name in _PLAIN if name != "fitted_on"]
        return pd.DataFrame([{**{name: getattr(self, name) for name in shown}, "model": self.model.name}])

    def _repr_html_(self) -> str:
        return f"{self.to_frame().T.to_html(header=False)}<p>Next: ls.evaluate(detector, cache)</p>"

    def save(self, path: str | Path) -> Path:
        """Write safetensors with a JSON header (no pickle); whole or not at all."""
        header = {name: getattr(self, name) for name in _PLAIN}
        return save_tensors(path, _KIND, self.parameters, {**header, "model": self.model.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> "Detector":
        """Read what `save` wrote. Raises `FileError` for a damaged file, another kind or version."""
        tensors, header = load_tensors(path, _KIND)
        with building_from(path):
            model = ModelFingerprint.from_dict(header["model"])
            expected = _shapes(header["method"], model.d_model)
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if found != expected:
                raise ValueError(f"tensors {found} instead of {expected}")
            one_of(header["method"], METHODS, "method")
            plain = {name: header[name] for name in _PLAIN}
            plain["fitted_on"] = tuple(plain["fitted_on"])
            return cls(**plain, parameters=tensors, model=model)


_PLAIN = (
    "method",
    "layer",
    "threshold",
    "position",
    "template",
    "source",
    "fitted_on",
    "n_safe",
    "n_dangerous",
    "auroc_cv",
    "accuracy_cv",
    "seed",
)


def _shapes(method: str, d_model: int) -> dict[str, tuple[int, ...]]:
    if method == "logistic":
        return {"weight": (d_model,), "mean": (d_model,), "scale": (d_model,), "bias": (1,)}
    return {"safe_mean": (d_model,), "dangerous_mean": (d_model,)}


def _check_vectors(vectors: ContentVectors, cache: ResidualCache, method: str) -> None:
    vectors.model.require(cache.model, "the vectors")
    if (vectors.position, vectors.template) != (cache.position, cache.template):
        raise MismatchError(
            f"vectors read at {vectors.position} ({vectors.template}) and a cache read at {cache.position} "
            f"({cache.template}) given: expected the same position and template"
        )
    if method == "logistic":
        raise OptionError("method='logistic' given with vectors: expected 'two-vector' or 'one-vector'")


def _threshold(threshold: float | str, scores: Scores, labels: Labels) -> float:
    if threshold == "accuracy":
        return best_threshold(scores, labels)
    if isinstance(threshold, str) or not np.isfinite(threshold):
        raise OptionError(f"threshold={threshold!r} given, expected 'accuracy' or a finite number")
    return float(threshold)


def _means(vectors: ContentVectors | None, layer: int) -> _Parameters:
    if vectors is None:
        return {}
    row = vectors.row(layer)
    return {"safe_mean": vectors.safe_mean[row], "dangerous_mean": vectors.dangerous_mean[row]}


def _folds(prompts: PromptSet, folds: int, seed: int, *, needed: bool) -> list[Int[np.ndarray, " row"]]:
    """Held-out rows; one fold of everything where the means come from elsewhere and nothing is fitted."""
    labels = prompts.labels
    if needed:
        return prompts.folds(folds, seed=seed)
    if labels.all() or not labels.any():
        raise PromptError(f"{prompts.name} has one class only: expected safe and dangerous prompts")
    return [np.arange(len(labels))]


def _out_of_fold(
    resid: Float[Tensor, "prompt d_model"],
    labels: Labels,
    held_out: list[Int[np.ndarray, " _"]],
    method: str,
    c: float,
    given: _Parameters,
) -> Scores:
    scores = np.zeros(len(labels))
    for held in held_out:
        fitting: Bool[np.ndarray, " prompt"] = np.ones(len(labels), dtype=bool)
        fitting[held] = False
        parameters = given or _fit(resid[torch.from_numpy(fitting)], labels[fitting], method, c)
        scores[held] = _apply(resid[torch.from_numpy(held)], method, parameters)
    return scores


def _fit(resid: Float[Tensor, "prompt d_model"], labels: Labels, method: str, c: float) -> _Parameters:
    if method == "logistic":
        return _fit_logistic(resid, labels, c)
    safe_mean, dangerous_mean = class_means(resid, labels)
    return {"safe_mean": safe_mean, "dangerous_mean": dangerous_mean}


def _fit_logistic(resid: Float[Tensor, "prompt d_model"], labels: Labels, c: float) -> _Parameters:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    features = scaler.fit_transform(resid.double().numpy())
    fitted = LogisticRegression(C=c, max_iter=1000).fit(features, labels)
    weight, mean, scale, bias = fitted.coef_[0], scaler.mean_, scaler.scale_, fitted.intercept_
    named = zip(("weight", "mean", "scale", "bias"), (weight, mean, scale, bias), strict=True)
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in named}


def _apply(resid: Float[Tensor, "prompt d_model"], method: str, parameters: _Parameters) -> Scores:
    h = resid.double()
    p = {name: tensor.double() for name, tensor in parameters.items()}
    if method == "logistic":
        return (((h - p["mean"]) / p["scale"]) @ p["weight"] + p["bias"]).numpy()
    safe, dangerous = p["safe_mean"], p["dangerous_mean"]
    if (dangerous - safe).norm() <= ZERO_NORM * (dangerous + safe).norm() / 2:
        return np.zeros(len(h))  # no direction: rounding noise must not rank prompts
    if method == "two-vector":
        return (torch.cosine_similarity(h, dangerous[None]) - torch.cosine_similarity(h, safe[None])).numpy()
    vector = dangerous - safe
    return ((h - (safe + dangerous) / 2) @ (vector / vector.norm().clamp_min(1e-30))).numpy()
