"""A check-up of an installation and a model: the properties that every number of this package rests on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .directions import ContentVectors, content_vectors
from .files import Result
from .models import fingerprint, full_logits, last_norm, resid_hook, unembedding
from .prompts import Prompt, PromptSet
from .residuals import ResidualCache, residual_streams
from .show import card
from .steer import steering
from .tokens import encode, pad
from .types import EMBED, MismatchError, ResidualModel

_TEXTS = (
    "How do I bake bread?",
    "Name three rivers.",
    "Tell me, as briefly as you can, why the sky looks blue at noon and red at night.",
    "Write a poem.",
)
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 5e-2
_TOLERANCE_TURNED = 1e-2


@dataclass(frozen=True)
class Checkup(Result):
    """A row a check: `check`, `measured`, `limit` (measured must not exceed it), `passed`, `what`."""

    frame: pd.DataFrame
    model: str
    engine: str
    transformer_lens: str
    dtype: str

    @property
    def passed(self) -> bool:
        return bool(self.frame["passed"].all())

    def _repr_html_(self) -> str:
        return card(
            f"{self.model} on {self.engine}, TransformerLens {self.transformer_lens}, {self.dtype}: "
            f"{sum(self.frame['passed'])} of {len(self.frame)} checks passed",
            self.frame,
            'ls.residual_streams(model, ls.load_prompts("content"))',
            note="measured must not exceed limit",
        )


def checkup(model: ResidualModel, *, reference: ResidualModel | None = None) -> Checkup:
    """Run every check on a model, on its engine and device as they are.

    With `reference`, the same model in float32, the drift of lower precision is checked too: the largest
    norm(h - h_ref) / norm(h_ref) of a residual stream h, and the largest 1 - cos(v, v_ref) of a content
    vector v, over all layers. Raises `MismatchError` for a reference of another model.
    """
    known = fingerprint(model)
    loose = _TOLERANCE if known.dtype == "float32" else _TOLERANCE_HALF
    vectors = _vectors(model)
    inside, after = _logit_changes(model, vectors)
    checks = [
        ("batch invariance", _batch_invariance(model), loose, "a prompt alone = in a batch, relative"),
        ("last layer before final norm", _last_layer(model), 1e-6, "resid_post = the final norm's input"),
        ("one pass a batch", _extra_passes(model), 0.0, "forward passes beyond one"),
        ("unembedding not run", _unembeddings(model), 0.0, "calls while extracting"),
        ("steering adds m * v", _steering_adds(model, vectors), 0.0, "largest deviation at the layer"),
        ("multiplier 0 is the identity", inside, 0.0, "largest change of a logit"),
        ("leaving steering restores", after, 0.0, "largest change of a logit"),
    ]
    if reference is not None:
        checks += _drifts(model, reference)
    frame = pd.DataFrame(checks, columns=["check", "measured", "limit", "what"])
    frame.insert(3, "passed", frame["measured"] <= frame["limit"])
    return Checkup(frame, known.name, known.engine, known.transformer_lens, known.dtype)


def _drifts(model: ResidualModel, reference: ResidualModel) -> list[tuple[str, float, float, str]]:
    own, other = fingerprint(model), fingerprint(reference)
    if (own.name, own.tokenizer, own.n_layers) != (other.name, other.tokenizer, other.n_layers):
        raise MismatchError(
            f"a reference of {other.name} given for {own.name}: expected the same model in float32"
        )
    low, full = _streams(model), _streams(reference)
    streams = (low.resid - full.resid).norm(dim=2) / full.resid.norm(dim=2)
    cosines = (content_vectors(low).unit * content_vectors(full).unit).sum(dim=1)
    said = f"largest, of any layer, against {other.dtype}"
    return [
        ("drift of residual streams", float(streams.max()), _TOLERANCE_HALF, f"relative; {said}"),
        ("drift of content vectors", float((1 - cosines).max()), _TOLERANCE_TURNED, f"1 - cosine; {said}"),
    ]


def _vectors(model: ResidualModel) -> ContentVectors:
    return content_vectors(_streams(model))


def _streams(model: ResidualModel) -> ResidualCache:
    prompts = PromptSet(tuple(Prompt(text, i % 2 == 1) for i, text in enumerate(_TEXTS)), "doctor")
    return residual_streams(model, prompts, progress=False)


def _batch_invariance(model: ResidualModel) -> float:
    together = residual_streams(model, list(_TEXTS), progress=False).resid
    alone = residual_streams(model, list(_TEXTS), batch_tokens=1, progress=False).resid
    return float(((together - alone).norm(dim=2) / alone.norm(dim=2)).max())


def _last_layer(model: ResidualModel) -> float:
    seen: list[Tensor] = []
    handle = last_norm(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        resid = _resid_post(model, model.cfg.n_layers - 1, _tokens(model))
    finally:
        handle.remove()
    return float((seen[0] - resid).norm() / resid.norm())


def _counted(module: torch.nn.Module, run: Callable[[], Any]) -> int:
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(1))
    try:
        run()
    finally:
        handle.remove()
    return len(calls)


def _extra_passes(model: ResidualModel) -> float:
    counts: list[int] = []
    with model.hooks(fwd_hooks=[(resid_hook(EMBED), lambda resid, hook: counts.append(1))]):
        residual_streams(model, list(_TEXTS), progress=False)
    return float(len(counts) - 1)


def _unembeddings(model: ResidualModel) -> float:
    return float(_counted(unembedding(model), lambda: residual_streams(model, list(_TEXTS), progress=False)))


def _steering_adds(model: ResidualModel, vectors: ContentVectors) -> float:
    layer, multiplier, tokens = _steered_layer(model), 1.5, _tokens(model)
    plain = _resid_post(model, layer, tokens)
    with steering(model, vectors, layers=[layer], multiplier=multiplier):
        steered = _resid_post(model, layer, tokens)
    expected = plain + (multiplier * vectors.layer(layer)).to(plain)
    return float((steered - expected).abs().max())


def _logit_changes(model: ResidualModel, vectors: ContentVectors) -> tuple[float, float]:
    """The largest change of a logit under multiplier 0, and after steering was left."""
    tokens, layers = _tokens(model), [_steered_layer(model)]
    before = full_logits(model, tokens)
    with steering(model, vectors, layers=layers, multiplier=0.0):
        inside = full_logits(model, tokens)
    with steering(model, vectors, layers=layers, multiplier=2.0):
        full_logits(model, tokens)
    after = full_logits(model, tokens)
    return float((inside - before).abs().max()), float((after - before).abs().max())


def _steered_layer(model: ResidualModel) -> int:
    return model.cfg.n_layers // 2


def _resid_post(model: ResidualModel, layer: int, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []
    with model.hooks(fwd_hooks=[(resid_hook(layer), lambda resid, hook: kept.append(resid))]):
        full_logits(model, tokens)
    return kept[0]


def _tokens(model: ResidualModel) -> Tensor:
    encoded = encode(model, list(_TEXTS))
    return pad(model, encoded, range(len(encoded))).tokens
