"""A check-up of an installation and a model: the properties that every number of this package rests on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .directions import content_vectors
from .files import Result
from .models import fingerprint, full_logits, last_norm, unembedding
from .prompts import Prompt, PromptSet
from .residuals import residual_streams
from .steer import steering
from .tokens import encode, pad
from .types import ResidualModel

_TEXTS = (
    "How do I bake bread?",
    "Name three rivers.",
    "Tell me, as briefly as you can, why the sky looks blue at noon and red at night.",
    "Write a poem.",
)
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 5e-2


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

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def _repr_html_(self) -> str:
        return self.frame.to_html(index=False)


def checkup(model: ResidualModel) -> Checkup:
    """Run every check on a model; a check that raises has failed, with the error as what was measured."""
    known = fingerprint(model)
    loose = _TOLERANCE if known.dtype == "float32" else _TOLERANCE_HALF
    checks: list[tuple[str, Callable[[ResidualModel], float], float, str]] = [
        ("batch invariance", _batch_invariance, loose, "a prompt alone = in a batch, relative"),
        ("last layer before final norm", _last_layer, 1e-6, "resid_post = the final norm's input"),
        ("one pass a batch", _extra_passes, 0.0, "forward passes beyond one"),
        ("unembedding not run", _unembeddings, 0.0, "calls while extracting"),
        ("steering adds m * v", _steering_adds, 0.0, "largest deviation at the steered layer"),
        ("multiplier 0 is the identity", _multiplier_zero, 0.0, "largest change of a logit"),
        ("leaving steering restores", _leaving, 0.0, "largest change of a logit"),
    ]
    rows = []
    for name, run, limit, what in checks:
        measured = run(model)
        rows.append(
            {
                "check": name,
                "measured": measured,
                "limit": limit,
                "passed": bool(measured <= limit),
                "what": what,
            }
        )
    return Checkup(pd.DataFrame(rows), known.name, known.engine, known.transformer_lens, known.dtype)


def _prompts() -> PromptSet:
    return PromptSet(tuple(Prompt(text, i % 2 == 1) for i, text in enumerate(_TEXTS)), "doctor")


def _batch_invariance(model: ResidualModel) -> float:
    together = residual_streams(model, list(_TEXTS), progress=False).resid
    alone = residual_streams(model, list(_TEXTS), batch_tokens=1, progress=False).resid
    return float(((together - alone).norm(dim=2) / alone.norm(dim=2)).max())


def _last_layer(model: ResidualModel) -> float:
    seen: list[Tensor] = []
    tokens = _tokens(model)
    handle = last_norm(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kept: list[Tensor] = []
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    try:
        with model.hooks(fwd_hooks=[(name, lambda resid, hook: kept.append(resid))]):
            full_logits(model, tokens)
    finally:
        handle.remove()
    return float((seen[0] - kept[0]).norm() / kept[0].norm())


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
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda resid, hook: counts.append(1))]):
        residual_streams(model, list(_TEXTS), progress=False)
    return float(len(counts) - 1)


def _unembeddings(model: ResidualModel) -> float:
    return float(_counted(unembedding(model), lambda: residual_streams(model, list(_TEXTS), progress=False)))


def _steering_adds(model: ResidualModel) -> float:
    vectors = content_vectors(residual_streams(model, _prompts(), progress=False))
    layer, multiplier, tokens = model.cfg.n_layers // 2, 1.5, _tokens(model)
    plain = _resid_post(model, layer, tokens)
    with steering(model, vectors, layers=[layer], multiplier=multiplier):
        steered = _resid_post(model, layer, tokens)
    expected = plain + (multiplier * vectors.layer(layer)).to(plain)
    return float((steered - expected).abs().max())


def _multiplier_zero(model: ResidualModel) -> float:
    return _logit_change(model, inside=True)


def _leaving(model: ResidualModel) -> float:
    return _logit_change(model, inside=False)


def _logit_change(model: ResidualModel, *, inside: bool) -> float:
    vectors = content_vectors(residual_streams(model, _prompts(), progress=False))
    tokens, layers = _tokens(model), [model.cfg.n_layers // 2]
    before = full_logits(model, tokens)
    with steering(model, vectors, layers=layers, multiplier=0.0 if inside else 2.0):
        during = full_logits(model, tokens)
    after = during if inside else full_logits(model, tokens)
    return float((after - before).abs().max())


def _resid_post(model: ResidualModel, layer: int, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []
    name = f"blocks.{layer}.hook_resid_post"
    with model.hooks(fwd_hooks=[(name, lambda resid, hook: kept.append(resid))]):
        full_logits(model, tokens)
    return kept[0]


def _tokens(model: ResidualModel) -> Tensor:
    encoded = encode(model, list(_TEXTS))
    return pad(model, encoded, range(len(encoded))).tokens
