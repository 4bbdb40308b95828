"""Detectors: a prompt's score from its residual stream; every choice made inside the training set."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor

from . import tokens as tok
from .directions import ContentVectors
from .files import building_from, load_tensors, save_tensors
from .metrics import abstain_band, accuracy, auroc, best_threshold, check_scores, fpr_threshold
from .models import ModelFingerprint, fingerprint
from .prompts import PromptSet
from .residuals import ResidualCache, residual_streams
from .scorers import COSINE, LINEAR, METHODS, STRENGTHS, Method, Parameters, apply_scorer, fit_scorer
from .show import card, pick
from .store import Store
from .types import (
    Labels,
    MismatchError,
    OptionError,
    PromptError,
    ResidualModel,
    Scores,
    one_of,
)

Over = Literal["best", "mean", "vote", "concat"]
Calibration = Literal["platt", "isotonic"]
ThresholdRule = Literal["accuracy", "youden", "f1", "fpr"]

OVER = ("best", "mean", "vote", "concat")
CALIBRATIONS = ("platt", "isotonic")
RULES = ("accuracy", "youden", "f1", "fpr")

Prompts = ResidualCache | PromptSet | Sequence[str]

_KIND = "Detector"
_Folds = list[Int[np.ndarray, " _"]]


@dataclass(frozen=True)
class Detector:
    """A frozen scorer of prompts: score > threshold means dangerous.

    What one layer's score is, is said by `method` (see `lens_safety.scorers`: the equations and their
    sources). `over` says how layers come together:

        best     one layer, that with the highest cross-validated AUROC
        mean     the mean over layers of a_l s_l + b_l, each layer's score on the scale of log odds (Platt),
                 a_l at least 0
        vote     the share of layers whose score is above their own threshold. The persona-vector study
        concat   the method on the residual streams of all layers, one after another

    `probability` maps scores to calibrated probabilities of danger (Platt 1999, or isotonic regression);
    prompts whose score is within `band` of the threshold are called "unsure".

    `auroc_cv` and `accuracy_cv` are what cross-validation inside the training set gave; where the best of
    several layers was taken they flatter the detector, so report a held-out set. `fitted_on` holds short
    hashes of the training texts, so that `evaluate` can refuse them.
    """

    method: str
    over: str
    layers: tuple[int, ...]
    threshold: float
    band: float
    parameters: dict[str, Tensor]
    calibration: str
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
        over: Over = "best",
        layers: Sequence[int] | None = None,
        threshold: float | ThresholdRule = "accuracy",
        target_fpr: float = 0.05,
        abstain: float = 0.0,
        calibration: Calibration = "platt",
        vectors: ContentVectors | None = None,
        neutral: ResidualCache | None = None,
        unlabelled: ResidualCache | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> "Detector":
        """Fit on a training cache; every choice is made by cross-validation inside it.

        Grouped, stratified folds give each training prompt a score by a detector that has not seen its
        group. From these out-of-fold scores come the layer (and the L2 strength of `logistic`) with the
        highest AUROC, the first of equals; the threshold; the calibration; the abstain band.

        Args:
            layers: the layers to choose from ("best") or to use together; all cached ones by default,
                -1 is the embedding.
            threshold: a rule (see `metrics.best_threshold`; "fpr": the lowest threshold whose false
                positive rate is certified to be at most `target_fpr`, see `metrics.fpr_threshold`), or
                a number, which is taken as it is.
            abstain: the share of out-of-fold scores, those nearest the threshold, that count as "unsure".
            vectors: class means from elsewhere for the cosine methods and one-vector (method "tone"
                needs them: `tone_vectors(model)`); the cache then only chooses layer and threshold.
            neutral: neutral text, whose mean is the origin of the cosines (cosine methods only).
            unlabelled: text without labels for the covariance of `lda`.
            folds: at least 2; at least 3 for "mean" and "vote", which learn their scales (or cuts) inside.

        Raises:
            PromptError: a prompt without a label, or fewer than `folds` groups of a class.
            OptionError: an unknown option, options that do not go together, a residual stream that is not
                finite, or a target false positive rate that so few prompts cannot certify.
            MismatchError: a layer that is not in a cache, or caches or vectors that do not belong together.
        """
        _check_options(method, over, calibration, vectors, neutral, unlabelled)
        labels = cache.prompts.labels
        pool = tuple(cache.layers if layers is None else layers)
        if not pool:
            raise OptionError("layers=() given: expected at least one layer, or None for all")
        _check_finite(cache, pool)
        for what, other in (("vectors", vectors), ("neutral", neutral), ("unlabelled", unlabelled)):
            if other is not None:
                _check_companion(what, other, cache, pool)
        several = over in ("mean", "vote")
        if folds < (least := 3 if several else 2):
            raise OptionError(f"folds={folds} given, expected at least {least} for over={over!r}")
        held_out = _folds(cache.prompts, folds, seed, needed=vectors is None or several)
        fitter = _Fitter(cache, method, vectors, neutral, unlabelled, held_out, seed)
        # Hundreds of small fits: threads cost them more than they save, tenfold beside a busy neighbour.
        with threadpool_limits(1, "blas"):
            scores, used, parameters = _CHOOSERS[over](fitter, pool)
        cut = _threshold(threshold, scores, labels, target_fpr)
        return cls(
            method=method,
            over=over,
            layers=used,
            threshold=cut,
            band=abstain_band(scores, cut, abstain),
            parameters=parameters | _calibration(scores, labels, calibration),
            calibration=calibration,
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

    @property
    def layer(self) -> int:
        """The layer that is read. Raises `OptionError` for a detector that reads several."""
        if len(self.layers) > 1:
            raise OptionError(
                f"the detector reads {len(self.layers)} layers ({self.over}): expected one; use .layers"
            )
        return min(self.layers)

    @property
    def name(self) -> str:
        """What it is in a few words: method and layers."""
        if len(self.layers) == 1:
            return f"{self.method} at layer {self.layers[0]}"
        return f"{self.method}, {self.over} of layers {min(self.layers)} to {max(self.layers)}"

    @property
    def digest(self) -> str:
        """A short hash of what scores and threshold depend on."""
        made = hashlib.sha256(repr((self.method, self.over, self.layers, self.threshold)).encode())
        for name, tensor in sorted(self.parameters.items()):
            made.update(name.encode() + tensor.double().numpy().tobytes())
        return made.hexdigest()[:16]

    def score(
        self,
        prompts: Prompts,
        *,
        model: ResidualModel | None = None,
        truncate: bool = False,
        store: Store | None = None,
        share_prefix: bool = True,
        progress: bool = False,
    ) -> Scores:
        """A float per prompt, in order; higher = more dangerous.

        Texts need `model`; `truncate`, `store` and `share_prefix` as in `residual_streams`. A cache or a
        model other than the detector's is refused. No block above the detector's highest layer runs.

        Raises:
            MismatchError: another model, position or template, or a layer that is not cached.
        """
        if isinstance(prompts, ResidualCache):
            cache = prompts
        else:
            cache = self._extract(prompts, model, truncate, store, share_prefix, progress)
        self._check(cache.model, cache.position, cache.template)
        scores = _together(_features(cache, self.layers, self.over), self.over, self.parameters)
        check_scores(scores)
        return scores

    def score_resid(self, resid: Float[Tensor, "layer prompt d_model"]) -> Scores:
        """Scores of vectors read elsewhere: row i of `resid` is layer `layers[i]` of this detector."""
        if resid.shape[0] != len(self.layers):
            raise OptionError(f"{resid.shape[0]} layers given, expected those of the detector: {self.layers}")
        features = torch.cat(list(resid), dim=1)[None] if self.over == "concat" else resid
        return _together(features, self.over, self.parameters)

    def predict(
        self,
        prompts: Prompts,
        *,
        model: ResidualModel | None = None,
        truncate: bool = False,
        store: Store | None = None,
        share_prefix: bool = True,
        progress: bool = False,
    ) -> Labels:
        """score > threshold: True = dangerous. Arguments as in `score`."""
        scores = self.score(
            prompts,
            model=model,
            truncate=truncate,
            store=store,
            share_prefix=share_prefix,
            progress=progress,
        )
        return scores > self.threshold

    def probability(self, scores: Scores) -> Scores:
        """The calibrated probability of danger for scores of this detector.

        It is calibrated to the training set's share of dangerous prompts and style: on other prompts
        read it with the report's `ece`.
        """
        if self.calibration == "platt":
            slope, intercept = self.parameters["calibration"].double().numpy()
            return 1 / (1 + np.exp(-np.clip(slope * scores + intercept, -500, 500)))
        points, values = self.parameters["calibration"].double().numpy()
        return np.interp(scores, points, values)

    def verdicts(self, scores: Scores) -> list[str]:
        """ "safe", "dangerous", or "unsure" within `band` of the threshold, for each score."""
        certain = np.abs(scores - self.threshold) > self.band if self.band else np.ones(len(scores), bool)
        named = np.where(scores > self.threshold, "dangerous", "safe")
        return [str(word) for word in np.where(certain, named, "unsure")]

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
        store: Store | None,
        share_prefix: bool,
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
            layers=sorted({max(layer, 0) for layer in self.layers}),
            truncate=truncate,
            store=store,
            share_prefix=share_prefix,
            progress=progress,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row of what it is and what it was fitted on."""
        shown = [name for name in _PLAIN if name != "fitted_on"]
        return pd.DataFrame([{**{name: getattr(self, name) for name in shown}, "model": self.model.name}])

    def _repr_html_(self) -> str:
        shown = ("threshold", "band", "calibration", "position", "template", "auroc_cv", "accuracy_cv")
        return card(
            f"Detector: {self.name} of {self.model.name}, fitted on {self.source} ({self.n_safe} safe, "
            f"{self.n_dangerous} dangerous)",
            pick(self.to_frame(), *shown),
            "ls.evaluate(detector, cache)",
            note="cv: cross-validated inside the training set, so flattering; score > threshold is dangerous",
        )

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
            plain = {name: header[name] for name in _PLAIN}
            for name, allowed in (("method", METHODS), ("over", OVER), ("calibration", CALIBRATIONS)):
                one_of(plain[name], allowed, name)
            for name in ("fitted_on", "layers"):
                plain[name] = tuple(plain[name])
            loaded = cls(**plain, parameters=tensors, model=model)
            _check_shapes(loaded)
            return loaded


def require_same_reading(
    what: str,
    one: ContentVectors | ResidualCache,
    beside: str,
    other: ContentVectors | ResidualCache | Detector,
) -> None:
    """Raise `MismatchError` unless the two were read at one position, in one template."""
    if (one.position, one.template) != (other.position, other.template):
        raise MismatchError(
            f"{what} read at {one.position} ({one.template}) given beside {beside} read at "
            f"{other.position} ({other.template}): expected the same position and template"
        )


def load_detector() -> Detector:
    """The detector that comes with the package, for the built-in model: see its card, `detectors/README.md`.

    Fitted on the authored sets alone. It is no guard: not robust to somebody who attacks it with the
    model's weights at hand (2412.09565), and as good as the card says on the kinds of prompts named there.
    `detector.verify(model)` refuses any other model.
    """
    return Detector.load(str(package_files("lens_safety") / "detectors" / "built_in.safetensors"))


def shipped_for(model: ResidualModel) -> Detector | None:
    """`load_detector()` where it belongs to the model."""
    shipped = load_detector()
    return None if shipped.model.difference(fingerprint(model)) else shipped


_PLAIN = (
    "method",
    "over",
    "layers",
    "threshold",
    "band",
    "calibration",
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


def _check_shapes(detector: Detector) -> None:
    """Raise `ValueError` unless names, shapes and cuts are what the header says."""
    own = {"weight", "centre", "bias"} if detector.method in LINEAR else {"safe_mean", "dangerous_mean"}
    own |= {"calibration"} | {"mean": {"slope", "intercept"}, "vote": {"cut"}}.get(detector.over, set())
    found = set(detector.parameters) - ({"origin"} if detector.method in COSINE else set())
    if found != own:
        raise ValueError(f"tensors {', '.join(sorted(found))} instead of {', '.join(sorted(own))}")
    if not np.isfinite([detector.threshold, detector.band]).all():
        raise ValueError(f"threshold {detector.threshold} and band {detector.band}")
    width = detector.model.d_model * (len(detector.layers) if detector.over == "concat" else 1)
    rows = 1 if detector.over == "concat" else len(detector.layers)
    for name, tensor in detector.parameters.items():
        per_layer = {"bias", "slope", "intercept", "cut"}
        expected = (rows,) if name in per_layer else (rows, width)
        if name == "calibration":
            expected = (2,) if detector.calibration == "platt" else (2, max(1, tensor.numel() // 2))
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} instead of {expected}")


def _check_options(
    method: str, over: str, calibration: str, vectors: object, neutral: object, unlabelled: object
) -> None:
    one_of(method, METHODS, "method")
    one_of(over, OVER, "way over layers")
    one_of(calibration, CALIBRATIONS, "calibration")
    with_vectors = ("tone", "two-vector", "one-vector")
    if vectors is not None and method not in with_vectors:
        raise OptionError(f"method={method!r} given with vectors: expected one of {', '.join(with_vectors)}")
    if vectors is not None and over == "concat":
        raise OptionError("over='concat' given with vectors: expected 'best', 'mean' or 'vote'")
    if vectors is None and method == "tone":
        raise OptionError("method='tone' given without vectors: expected vectors=tone_vectors(model)")
    if neutral is not None and method not in COSINE:
        raise OptionError(f"method={method!r} given with neutral text: expected one of {', '.join(COSINE)}")
    if unlabelled is not None and method != "lda":
        raise OptionError(f"method={method!r} given with unlabelled text: expected 'lda'")


def _check_companion(
    what: str, other: ContentVectors | ResidualCache, cache: ResidualCache, pool: tuple[int, ...]
) -> None:
    other.model.require(cache.model, f"what is given as {what}")
    require_same_reading(what, other, "a cache", cache)
    if isinstance(other, ResidualCache):
        _check_finite(other, pool)


def _check_finite(cache: ResidualCache, pool: tuple[int, ...]) -> None:
    for layer in pool:
        broken = int((~cache.layer(layer).isfinite()).any(dim=1).sum())
        if broken:
            raise OptionError(
                f"layer {layer} of {cache.prompts.name} holds NaN or infinity in {broken} of {len(cache)} "
                "prompts: expected finite residual streams; leave those out, or extract in float32"
            )


def _threshold(threshold: float | str, scores: Scores, labels: Labels, target_fpr: float) -> float:
    if threshold == "fpr":
        return fpr_threshold(scores, labels, target_fpr)
    if threshold in RULES:
        return best_threshold(scores, labels, threshold)  # type: ignore[arg-type]
    if isinstance(threshold, str) or not np.isfinite(threshold):
        raise OptionError(
            f"threshold={threshold!r} given, expected a finite number or one of {', '.join(RULES)}"
        )
    return float(threshold)


def _calibration(scores: Scores, labels: Labels, calibration: str) -> Parameters:
    from sklearn.isotonic import IsotonicRegression

    if calibration == "platt":
        return {"calibration": torch.tensor(_platt(scores, labels), dtype=torch.float64)}
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
    return {"calibration": torch.from_numpy(np.stack([fitted.X_thresholds_, fitted.y_thresholds_]))}


def _platt(scores: Scores, labels: Labels) -> tuple[float, float]:
    """(slope, intercept) of the log odds of danger in the score, by maximum likelihood (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    spread = float(scores.std()) or 1.0
    middle = float(scores.mean())
    # The weak penalty keeps the slope finite where the scores separate the classes.
    fitted = LogisticRegression(C=100.0, max_iter=1000).fit((scores[:, None] - middle) / spread, labels)
    slope = float(fitted.coef_[0, 0]) / spread
    return slope, float(fitted.intercept_[0]) - slope * middle


def _folds(prompts: PromptSet, folds: int, seed: int, *, needed: bool) -> _Folds:
    """Held-out rows; one fold of everything where the means come from elsewhere and nothing is fitted."""
    labels = prompts.labels
    if needed:
        return prompts.folds(folds, seed=seed)
    if labels.all() or not labels.any():
        raise PromptError(f"{prompts.name} has one class only: expected safe and dangerous prompts")
    return [np.arange(len(labels))]


@dataclass(frozen=True)
class _Fitter:
    """One method on one training cache: its out-of-fold scores and its final parameters, for given layers."""

    cache: ResidualCache
    method: str
    vectors: ContentVectors | None
    neutral: ResidualCache | None
    unlabelled: ResidualCache | None
    held_out: _Folds
    seed: int

    @cached_property
    def labels(self) -> Labels:
        return self.cache.prompts.labels

    @cached_property
    def groups(self) -> Int[np.ndarray, " prompt"]:
        return self.cache.prompts.groups

    @property
    def strengths(self) -> tuple[float, ...]:
        return STRENGTHS if self.method == "logistic" else (0.0,)

    def fit(self, layers: tuple[int, ...], strength: float, rows: np.ndarray | None = None) -> Parameters:
        """The method on some layers side by side, on all rows or some."""
        origin = None if self.neutral is None else _beside(self.neutral, layers).mean(dim=0)
        if self.vectors is not None:
            return _given(self.vectors, layers[0], self.method) | (
                {} if origin is None else {"origin": origin}
            )
        chosen = np.arange(len(self.cache)) if rows is None else rows
        return fit_scorer(
            _beside(self.cache, layers)[torch.from_numpy(chosen)],
            self.labels[chosen],
            self.groups[chosen],
            self.method,
            strength=strength,
            origin=origin,
            unlabelled=None if self.unlabelled is None else _beside(self.unlabelled, layers),
            seed=self.seed,
        )

    def out_of_fold(self, layers: tuple[int, ...], strength: float) -> Scores:
        """Each training prompt's score by the method fitted without its fold."""
        features = _beside(self.cache, layers)
        scores = np.zeros(len(self.cache))
        for held in self.held_out:
            rest = np.setdiff1d(np.arange(len(self.cache)), held)
            parameters = self.fit(layers, strength, rest)
            scores[held] = apply_scorer(features[torch.from_numpy(held)], parameters)
        return scores

    def nested(self, layers: tuple[int, ...], strength: float) -> Float[np.ndarray, "fold prompt"]:
        """Row k: each prompt's score by the method fitted without fold k and without the prompt's own."""
        features = _beside(self.cache, layers)
        scores = np.zeros((len(self.held_out), len(self.cache)))
        for k, first in enumerate(self.held_out):
            for j, second in enumerate(self.held_out[: k + 1]):
                rest = np.setdiff1d(np.arange(len(self.cache)), np.concatenate([first, second]))
                if len(set(self.labels[rest])) < 2 and self.vectors is None:
                    raise PromptError(
                        f"the groups of {self.cache.prompts.name} are so uneven that two folds leave one "
                        "class only to fit on: make the groups smaller, or give more folds or prompts"
                    )
                parameters = self.fit(layers, strength, rest)
                scores[k, second] = apply_scorer(features[torch.from_numpy(second)], parameters)
                scores[j, first] = apply_scorer(features[torch.from_numpy(first)], parameters)
        return scores


_Chosen = tuple[Scores, tuple[int, ...], Parameters]
_Learn = Callable[[Float[np.ndarray, "layer prompt"], Labels], Parameters]


def _best(fitter: _Fitter, pool: tuple[int, ...]) -> _Chosen:
    tried = [((layer,), c, fitter.out_of_fold((layer,), c)) for layer in pool for c in fitter.strengths]
    return _highest(fitter, tried)


def _concat(fitter: _Fitter, pool: tuple[int, ...]) -> _Chosen:
    return _highest(fitter, [(pool, c, fitter.out_of_fold(pool, c)) for c in fitter.strengths])


def _highest(fitter: _Fitter, tried: list[tuple[tuple[int, ...], float, Scores]]) -> _Chosen:
    aurocs = [auroc(scores, fitter.labels) for _, _, scores in tried]
    layers, strength, scores = tried[int(np.argmax(aurocs))]
    return scores, layers, {k: v[None] for k, v in fitter.fit(layers, strength).items()}


def _scales(scores: Float[np.ndarray, "layer prompt"], labels: Labels) -> Parameters:
    """Platt's slope and intercept of each layer; a layer that points the wrong way out of fold counts 0.

    A layer's score is higher for dangerous prompts by construction, so a negative slope is noise, which
    with few labels would turn the detector round. Where no layer has a slope, their z-scores are averaged.
    """
    fitted = torch.tensor([_platt(row, labels) for row in scores], dtype=torch.float64)
    slope, intercept = fitted[:, 0].clone(), fitted[:, 1].clone()
    wrong = slope <= 0
    if wrong.all():
        spread = torch.from_numpy(scores.std(axis=1)).clamp_min(1e-12)
        return {"slope": 1 / spread, "intercept": -torch.from_numpy(scores.mean(axis=1)) / spread}
    slope[wrong], intercept[wrong] = 0.0, float(np.log(labels.mean() / (1 - labels.mean())))
    return {"slope": slope, "intercept": intercept}


def _cuts(scores: Float[np.ndarray, "layer prompt"], labels: Labels) -> Parameters:
    thresholds = [best_threshold(row, labels) for row in scores]
    return {"cut": torch.tensor(thresholds, dtype=torch.float64)}


def _mean(fitter: _Fitter, pool: tuple[int, ...]) -> _Chosen:
    return _several(fitter, pool, "mean", _scales)


def _vote(fitter: _Fitter, pool: tuple[int, ...]) -> _Chosen:
    return _several(fitter, pool, "vote", _cuts)


def _several(fitter: _Fitter, pool: tuple[int, ...], over: str, learn: _Learn) -> _Chosen:
    """Layers scored one by one, then put together; the strength is that which is best together.

    The scales (or cuts) that put a fold's scores together come from scores in which that fold had no
    part: from its own, the mean of thirty layers of noise would have an AUROC of 0.9, not 0.5.
    """
    strength = _strength_together(fitter, pool)
    nested = np.stack([fitter.nested((layer,), strength) for layer in pool])
    scores = np.zeros(nested.shape[2])
    own = np.zeros(nested.shape[::2])
    for fold, held in enumerate(fitter.held_out):
        rest = np.setdiff1d(np.arange(len(scores)), held)
        scale = learn(nested[:, fold, rest], fitter.labels[rest])
        own[:, held] = nested[:, fold, held]
        scores[held] = _combine(own[:, held], over, scale)
    fitted = [fitter.fit((layer,), strength) for layer in pool]
    stacked = {name: torch.stack([one[name] for one in fitted]) for name in fitted[0]}
    return scores, pool, stacked | learn(own, fitter.labels)


def _strength_together(fitter: _Fitter, pool: tuple[int, ...]) -> float:
    """The strength whose out-of-fold scores, averaged over layers, have the highest AUROC."""
    if len(fitter.strengths) == 1:
        return fitter.strengths[0]

    def together(strength: float) -> float:
        scores = np.stack([fitter.out_of_fold((layer,), strength) for layer in pool])
        return auroc(scores.mean(axis=0), fitter.labels)

    return max(fitter.strengths, key=together)


_CHOOSERS = {"best": _best, "mean": _mean, "vote": _vote, "concat": _concat}


def _given(vectors: ContentVectors, layer: int, method: str) -> Parameters:
    row = vectors.row(layer)
    safe, dangerous = vectors.safe_mean[row], vectors.dangerous_mean[row]
    if method != "one-vector":
        return {"safe_mean": safe, "dangerous_mean": dangerous}
    labels = np.array([False, True])
    return fit_scorer(torch.stack([safe, dangerous]), labels, np.arange(2), method)


def _beside(cache: ResidualCache, layers: tuple[int, ...]) -> Float[Tensor, "prompt d_model"]:
    """The residual streams of some layers, one after another in each row."""
    return torch.cat([cache.layer(layer) for layer in layers], dim=1)


def _features(
    cache: ResidualCache, layers: tuple[int, ...], over: str
) -> Float[Tensor, "row prompt d_model"]:
    if over == "concat":
        return _beside(cache, layers)[None]
    return torch.stack([cache.layer(layer) for layer in layers])


def _together(features: Float[Tensor, "row prompt d_model"], over: str, parameters: Parameters) -> Scores:
    own = ("safe_mean", "dangerous_mean", "origin", "weight", "centre", "bias")
    rows = [
        apply_scorer(one, {name: parameters[name][row] for name in own if name in parameters})
        for row, one in enumerate(features)
    ]
    return _combine(np.stack(rows), over, parameters)


def _combine(scores: Float[np.ndarray, "row prompt"], over: str, parameters: Parameters) -> Scores:
    if over == "mean":
        slope, intercept = (parameters[name].numpy()[:, None] for name in ("slope", "intercept"))
        return (slope * scores + intercept).mean(axis=0)
    if over == "vote":
        return (scores > parameters["cut"].numpy()[:, None]).mean(axis=0)
    return scores[0]
