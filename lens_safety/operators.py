"""Operators: how a direction changes the residual stream, each with one strength, the multiplier m.

Every operator is the identity at m = 0, bit for bit, and with m > 0 pushes toward dangerous (`Ablate`
has no side: m > 0 removes). h is the residual stream, v the direction (raw), u = v / norm(v).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .types import OptionError

Resid = Float[Tensor, "batch pos d_model"]
Strength = Float[Tensor, "#batch #pos 1"]


@dataclass(frozen=True)
class Directions:
    """What an operator works with at one layer: a row for each row of the batch, or one for all."""

    vector: Float[Tensor, "#batch 1 d_model"]
    safe_mean: Float[Tensor, "#batch 1 d_model"]
    dangerous_mean: Float[Tensor, "#batch 1 d_model"]

    @property
    def unit(self) -> Float[Tensor, "#batch 1 d_model"]:
        return self.vector / self.vector.norm(dim=-1, keepdim=True).clamp_min(1e-30)

    def target(self, m: Strength) -> Float[Tensor, "... d_model"]:
        """The mean of the class that m points to."""
        return torch.where(m >= 0, self.dangerous_mean, self.safe_mean)


@runtime_checkable
class Operator(Protocol):
    """Anything with an `equation` (for the plan) that maps (h, directions, m) to a new h."""

    @property
    def equation(self) -> str: ...

    def __call__(self, h: Resid, directions: Directions, m: Strength) -> Resid: ...


@dataclass(frozen=True)
class Add:
    """h + m v; with `keep_norm` scaled back to the norm that h had.

    Source: activation addition (Turner et al. 2308.10248), contrastive activation addition
    (Rimsky et al. 2312.06681).
    """

    keep_norm: bool = False

    @property
    def equation(self) -> str:
        return "(h + m v) * norm(h) / norm(h + m v)" if self.keep_norm else "h + m v"

    def __call__(self, h: Resid, directions: Directions, m: Strength) -> Resid:
        moved = h + (m * directions.vector).to(h.dtype)
        if not self.keep_norm:
            return moved
        new = moved.float().norm(dim=-1, keepdim=True)
        ratio = torch.where(new > 0, h.float().norm(dim=-1, keepdim=True) / new.clamp_min(1e-30), 1.0)
        return (moved.float() * ratio).to(h.dtype)


@dataclass(frozen=True)
class Ablate:
    """h - m (h . u) u: at m = 1 nothing of the direction is left (Arditi et al. 2406.11717).

    They ablate one direction everywhere: `vectors.everywhere(layer)`, all layers, and
    `sites=("resid_pre", "attn_out", "mlp_out")`.
    """

    @property
    def equation(self) -> str:
        return "h - m (h . u) u"

    def __call__(self, h: Resid, directions: Directions, m: Strength) -> Resid:
        return _along(h, directions, lambda along: -m * along)


@dataclass(frozen=True)
class Clamp:
    """h + m (c - h . u) u: at m = 1 the projection on the direction is c, `value` in residual units.

    Without a value c is the projection of a class mean, that of the dangerous class for m >= 0 and that
    of the safe one below, approached by the share abs(m).
    """

    value: float | int | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise OptionError(f"Clamp(value={self.value}) given, expected a finite projection, or None")

    @property
    def equation(self) -> str:
        if self.value is None:
            return "h + |m| (c - h . u) u, c = class mean . u"
        return f"h + m ({self.value:g} - h . u) u"

    def __call__(self, h: Resid, directions: Directions, m: Strength) -> Resid:
        if self.value is not None:
            value = float(self.value)
            return _along(h, directions, lambda along: m * (value - along))
        c = (directions.target(m) * directions.unit).sum(dim=-1, keepdim=True)
        return _along(h, directions, lambda along: m.abs() * (c - along))


@dataclass(frozen=True)
class Toward:
    """h + abs(m) (mu - h): a step toward the mean mu of the dangerous class, or of the safe one for m < 0."""

    @property
    def equation(self) -> str:
        return "h + |m| (class mean - h)"

    def __call__(self, h: Resid, directions: Directions, m: Strength) -> Resid:
        return (h.float() + m.abs() * (directions.target(m) - h.float())).to(h.dtype)


@dataclass(frozen=True)
class Rotate:
    """h turned by m * `degrees` toward v in the plane of the two; the norm of h is kept.

    cos(a) h + sin(a) norm(h) e, with a the angle and e the part of u at right angles to h, normalised.
    Where h lies along v there is no such plane, and h stays. Source: angular steering (2510.26243).
    """

    degrees: float | int = 15.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.degrees) and self.degrees > 0):
            raise OptionError(f"Rotate(degrees={self.degrees}) given, expected an angle above 0")

    @property
    def equation(self) -> str:
        return f"h turned by m * {self.degrees:g} degrees toward v, norm kept"

    def __call__(self, h: Resid, directions: Directions, m: Strength) -> Resid:
        x, u = h.float(), directions.unit
        norm = x.norm(dim=-1, keepdim=True)
        e1 = x / norm.clamp_min(1e-30)
        across = u - (u * e1).sum(dim=-1, keepdim=True) * e1
        length = across.norm(dim=-1, keepdim=True)
        angle = torch.where(length > 1e-6, m * math.radians(self.degrees), 0.0)
        turned = angle.cos() * x + angle.sin() * norm * across / length.clamp_min(1e-30)
        return turned.to(h.dtype)


OPERATORS: dict[str, Callable[[], Operator]] = {
    "add": Add,
    "add-norm": lambda: Add(keep_norm=True),
    "ablate": Ablate,
    "clamp": Clamp,
    "toward": Toward,
    "rotate": Rotate,
}


def named_operator(given: "str | Operator") -> Operator:
    """The operator of a name of `OPERATORS`, or "clamp:VALUE" or "rotate:DEGREES"; an operator as it is.

    Raises:
        OptionError: an unknown name, or a value that is no number.
    """
    if not isinstance(given, str):
        if isinstance(given, Operator) and not isinstance(given, type):
            return given
        raise OptionError(f"operator {given!r} given, expected a name or an object such as Rotate(30)")
    name, _, value = given.partition(":")
    if name not in OPERATORS or (value and name not in ("clamp", "rotate")):
        raise OptionError(
            f"unknown operator {given!r}: expected one of {', '.join(OPERATORS)}, clamp:VALUE, rotate:DEGREES"
        )
    if not value:
        return OPERATORS[name]()
    try:
        number = float(value)
    except ValueError as error:
        raise OptionError(f"operator {given!r} given, expected a number after the colon") from error
    return Clamp(number) if name == "clamp" else Rotate(number)


def operator_name(operator: Operator) -> str:
    """The name that `named_operator` reads; the repr of one's own operator."""
    if isinstance(operator, Clamp) and operator.value is not None:
        return f"clamp:{operator.value:.15g}"
    if isinstance(operator, Rotate):
        return f"rotate:{operator.degrees:.15g}"
    return next((name for name, make in OPERATORS.items() if make() == operator), repr(operator))


def _along(h: Resid, directions: Directions, change: Callable[[Tensor], Tensor]) -> Resid:
    """h with its projection p on u changed to p + change(p)."""
    u = directions.unit
    p = (h.float() * u).sum(dim=-1, keepdim=True)
    return (h.float() + change(p) * u).to(h.dtype)
