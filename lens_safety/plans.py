"""Plans: what steering writes where, and the hooks that do it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .decoding import PAD, Pass, RowsApart, current_pass, is_own_pass, rows_apart
from .directions import ContentVectors
from .models import ModelFingerprint, check_layers, fingerprint, resid_hook, site_hook, with_hooks
from .operators import Add, Directions, Operator, named_operator, operator_name
from .show import card
from .types import Hook, MismatchError, OptionError, ResidualModel, Scores, one_of

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
Per = Literal["prompt", "token"]
Schedule = Callable[[int], float]

_GATE_POSITIONS = ("content_mean", "content_last", "last")


@dataclass(frozen=True)
class Dose:
    """A multiplier as the norm of what it adds over the layer's median residual norm, signed.

    multiplier = dose * median residual norm / norm(v), at each layer its own. One number, or one a row.
    """

    dose: float | int | Sequence[float]


@dataclass(frozen=True)
class LinearDecay:
    """1 at step 0 (the prompt), falling evenly to 0 at `steps` generated tokens and staying there."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"LinearDecay(steps={self.steps}) given, expected 1 or more")

    def __call__(self, step: int) -> float:
        return max(0.0, 1 - step / self.steps)


@dataclass(frozen=True)
class ExponentialDecay:
    """0.5 ** (step / half_life): halved every `half_life` generated tokens."""

    half_life: float | int

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise OptionError(f"ExponentialDecay(half_life={self.half_life}) given, expected above 0")

    def __call__(self, step: int) -> float:
        return 0.5 ** (step / self.half_life)


Multiplier = float | int | Sequence[float] | Dose | Mapping[int, Any]


@runtime_checkable
class Gate(Protocol):
    """What conditional steering asks of a detector."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def threshold(self) -> float: ...
    @property
    def position(self) -> str: ...
    @property
    def model(self) -> ModelFingerprint: ...
    @property
    def name(self) -> str: ...
    def score_resid(self, resid: Float[Tensor, "layer prompt d_model"]) -> Scores: ...


@dataclass(frozen=True)
class Write:
    """What is written at one layer: directions and multipliers, a row for each row of the batch or one."""

    vector: Float[Tensor, "#row d_model"]
    safe_mean: Float[Tensor, "#row d_model"]
    dangerous_mean: Float[Tensor, "#row d_model"]
    multiplier: Float[Tensor, " row"]
    dose: Float[Tensor, " row"]


@dataclass(frozen=True)
class SteeringPlan:
    """What steering will do, before anything runs: print it. `with plan.on(model): ...` does it.

    `fired` counts the calls of each layer's hooks while it is on.
    """

    writes: dict[int, Write]
    operator: Operator
    positions: str
    sites: tuple[str, ...]
    schedule: Schedule | None
    gate: Gate | None
    per: Per
    model: ModelFingerprint
    fired: dict[int, int] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.writes)

    @property
    def n_rows(self) -> int:
        """1: the same for every row of a batch; else the rows that a batch must have."""
        return max(len(write.multiplier) for write in self.writes.values())

    def to_frame(self) -> pd.DataFrame:
        """A row for each layer, site and multiplier: what is written where."""
        rows = [
            {
                "hook": site_hook(layer, site),
                "operator": operator_name(self.operator),
                "h becomes": self.operator.equation,
                "multiplier": multiplier,
                "dose": dose,
                "rows": "all" if len(write.multiplier) == 1 else row,
                "positions": self.positions,
                "schedule": "constant" if self.schedule is None else repr(self.schedule),
                "when": "always" if self.gate is None else f"{self.gate.name}, per {self.per}",
            }
            for layer, write in self.writes.items()
            for site in self.sites
            for row, (multiplier, dose) in enumerate(
                zip(write.multiplier.tolist(), write.dose.tolist(), strict=True)
            )
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        return self.to_frame().round(4).to_string(index=False)

    def _repr_html_(self) -> str:
        return card(
            f"Plan: steer {self.model.name} at {len(self.writes)} layers",
            self.to_frame(),
            "with plan.on(model): ls.generate(model, prompts)",
        )

    @contextmanager
    def on(self, model: ResidualModel) -> "Iterator[SteeringPlan]":
        """Steer every call of the model inside the context; outside, the model is as it was."""
        self.model.require(fingerprint(model), "the vectors")
        record = replace(self, fired=dict.fromkeys(self.writes, 0))
        opened = _Opened(record)
        hooks: list[tuple[str, Hook]] = []
        if self.gate is not None:
            hooks += [(resid_hook(layer), partial(opened.read, layer)) for layer in self.gate.layers]
        hooks += [
            (site_hook(layer, site), partial(opened.steer, layer))
            for layer in self.writes
            for site in self.sites
        ]
        with ExitStack() as stack:
            stack.enter_context(rows_apart(self._rows_apart(len(hooks))))
            stack.enter_context(with_hooks(model, hooks))
            yield record

    def off(self) -> "SteeringPlan":
        """The same plan with every multiplier 0."""
        writes = {
            layer: replace(w, multiplier=w.multiplier * 0, dose=w.dose * 0)
            for layer, w in self.writes.items()
        }
        return replace(self, writes=writes, fired={})

    def _rows_apart(self, n_hooks: int) -> RowsApart:
        """Where rows are told apart in a pass over prompts, and over prompts with continuations."""
        # A gate reads a prompt as a whole; the others count from its end or by its content.
        whole = self.gate is not None or not self.positions.startswith(("all", "prompt", "generated"))
        if self.n_rows == 1:
            return RowsApart(whole=whole, n_hooks=n_hooks)
        # What a block adds cannot have more rows than the stream that it is added to.
        where = "inside" if set(self.sites) <= {"resid_pre", "resid_post"} else "start"
        prompts = "never" if self.positions.startswith("generated") else where
        return RowsApart(prompts, where, whole, n_hooks)

    @staticmethod
    def stack(plans: "Sequence[SteeringPlan]") -> "SteeringPlan":
        """One plan for a batch of as many rows: row i is steered as `plans[i]` says.

        A layer that a plan does not name gets multiplier 0 in its row.

        Raises:
            OptionError: plans that differ in more than layers, directions and multipliers, or have
                several rows already.
        """
        if not plans:
            raise OptionError("no plans given, expected at least one")
        first = plans[0]
        for plan in plans:
            if plan.n_rows > 1:
                raise OptionError(
                    f"a plan of {plan.n_rows} rows given, expected one row: stack each row's plan"
                )
            for name in ("operator", "positions", "sites", "schedule", "gate", "per", "model"):
                if getattr(plan, name) != getattr(first, name):
                    raise OptionError(
                        f"plans with different {name} given ({getattr(first, name)!r:.80} and "
                        f"{getattr(plan, name)!r:.80}): expected them to differ in layers, vectors and "
                        "multipliers alone"
                    )
        layers = sorted({layer for plan in plans for layer in plan.writes})
        return replace(first, writes={layer: _stacked(plans, layer) for layer in layers}, fired={})


def build_plan(
    model: ResidualModel,
    vectors: ContentVectors,
    *,
    layers: Sequence[int],
    multiplier: Multiplier,
    operator: str | Operator,
    positions: str,
    sites: Sequence[str],
    schedule: Schedule | None,
    when: Gate | None,
    per: Per,
) -> SteeringPlan:
    """The plan of `steering`'s arguments, each of them checked."""
    acting = named_operator(operator)
    _check_options(positions, sites, schedule, per)
    vectors.model.require(fingerprint(model), "the vectors")
    chosen = check_layers(model, layers)
    if isinstance(multiplier, Mapping) and set(multiplier) != set(chosen):
        raise OptionError(f"multipliers for layers {sorted(multiplier)} given, and layers {sorted(chosen)}")
    if when is not None:
        _check_gate(when, model, chosen, sites)
    own = multiplier if isinstance(multiplier, Mapping) else dict.fromkeys(chosen, multiplier)
    writes = {layer: _write(vectors, layer, own[layer], acting) for layer in chosen}
    if len({len(write.multiplier) for write in writes.values()} - {1}) > 1:
        raise OptionError(f"multiplier {multiplier!r} given, expected the same number of rows at each layer")
    return SteeringPlan(writes, acting, positions, tuple(sites), schedule, when, per, vectors.model)


class _Opened:
    """A plan while it is on: the hooks, and what the gate has read and decided."""

    def __init__(self, plan: SteeringPlan):
        self._plan = plan
        self._read: dict[int, Tensor] = {}
        self._open: dict[int, Tensor] = {}

    def read(self, layer: int, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        gate = self._plan.gate
        assert gate is not None
        self._read[layer] = resid
        if len(self._read) < len(gate.layers):
            return
        together = torch.stack([self._read.pop(one) for one in gate.layers]).float()
        run = current_pass(resid.shape[1])
        if self._plan.per == "token":
            scores = gate.score_resid(together.flatten(1, 2).cpu())
            self._decide(torch.from_numpy(scores > gate.threshold).view(resid.shape[:2]), run)
        elif bool((run.place < 0).any()):
            scores = gate.score_resid(_at_position(together, run, gate.position).cpu())
            self._decide(torch.from_numpy(scores > gate.threshold)[:, None], run)

    def _decide(self, dangerous: Bool[Tensor, "batch pos"], run: Pass) -> None:
        """By number of rows: a prompt that is run once decides for all rows that it becomes."""
        self._open = {len(one): one for one in (dangerous, run.fan_out(dangerous))}

    def steer(self, layer: int, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        plan, write = self._plan, self._plan.writes[layer]
        plan.fired[layer] += 1
        run = current_pass(resid.shape[1])
        where = _where(plan.positions, run).to(resid.device)
        if not bool(where.any()):
            return resid
        if plan.n_rows > 1:
            resid = run.fan_out(resid)
            if plan.n_rows != len(resid):
                raise OptionError(
                    f"{plan.n_rows} multipliers given for a batch of {len(resid)} rows: expected one "
                    "multiplier, or one per row"
                )
        return plan.operator(resid, _directions(write, resid), self._strength(write, run, where, resid))

    def _strength(self, write: Write, run: Pass, where: Tensor, resid: Tensor) -> Float[Tensor, "row pos 1"]:
        """The multiplier of each row and position: 0 where nothing is steered."""
        n, device = len(resid), resid.device
        m = write.multiplier.to(device)[:, None]
        schedule, gate = self._plan.schedule, self._plan.gate
        if schedule is not None:
            steps = (run.place + 1).clamp_min(0).tolist()
            known = {step: float(schedule(step)) for row in steps for step in row}
            m = m * _rows(torch.tensor([[known[step] for step in row] for row in steps]), n, run).to(device)
        if not bool(where.all()):
            m = m * _rows(where, n, run)
        if gate is not None:
            if n not in self._open:
                raise OptionError(
                    f"{gate.name} saw no prompt of {n} rows: expected a call over the prompts first"
                )
            m = m * self._open[n].to(device)
        return m[..., None]


def _rows(values: Tensor, n: int, run: Pass) -> Tensor:
    """`values` with as many rows as the residual stream has by now (or one for all)."""
    return values if len(values) in (1, n) else run.fan_out(values)


def _directions(write: Write, resid: Tensor) -> Directions:
    return Directions(
        *(t.to(resid.device)[:, None] for t in (write.vector, write.safe_mean, write.dangerous_mean))
    )


def _where(positions: str, run: Pass) -> Bool[Tensor, "#batch pos"]:
    name, *numbers = positions.split(":")
    if name == "all":
        return torch.ones_like(run.content)
    if name == "content":
        return run.content
    if name == "prompt":
        return run.place < 0
    if name == "last":
        return (run.place < 0) & (run.place >= -int(numbers[0]))
    if not numbers:
        return run.place >= 0
    if not is_own_pass():
        raise OptionError(f"positions {positions!r} given outside generate, where tokens have no number")
    first, end = map(int, numbers)
    return (run.place >= first) & (run.place < end)


def _at_position(
    resid: Float[Tensor, "layer batch pos d_model"], run: Pass, position: str
) -> Float[Tensor, "layer batch d_model"]:
    """What a detector of that position reads from each prompt."""
    n = resid.shape[1]
    content = run.content.expand(n, -1).to(resid.device)
    if position == "content_mean":
        return (resid * content[..., None]).sum(dim=2) / content.sum(dim=1)[:, None]
    number = torch.arange(resid.shape[2], device=resid.device)
    chosen = content if position == "content_last" else (run.place < 0).expand(n, -1).to(resid.device)
    last = torch.where(chosen & (run.place > PAD).to(resid.device), number, -1).max(dim=1).values
    return resid[:, torch.arange(n, device=resid.device), last]


def _write(vectors: ContentVectors, layer: int, given: Any, operator: Operator) -> Write:
    row = vectors.row(layer)
    vector = vectors.layer(layer)
    if not bool(vector.isfinite().all()):
        raise OptionError(f"the vector of layer {layer} holds NaN or infinity; make it again")
    if bool(vectors.is_zero[row]):
        raise OptionError(f"the vector of layer {layer} is zero: it has no direction; use another layer")
    of_one = float(vectors.dose(1.0)[row])
    if isinstance(given, Dose):
        if not isinstance(operator, Add):
            raise OptionError(f"a dose given for {operator_name(operator)}: only what is added has one")
        if not np.isfinite(of_one):
            raise OptionError(
                f"a dose given for layer {layer}, whose residual norm is unknown; import the vectors with "
                "cache=, or give a plain multiplier"
            )
        multiplier = _multipliers(given.dose) / of_one
    else:
        multiplier = _multipliers(given)
    return Write(
        vector=vector[None],
        safe_mean=vectors.safe_mean[row][None],
        dangerous_mean=vectors.dangerous_mean[row][None],
        multiplier=multiplier,
        dose=multiplier.abs() * of_one,
    )


def _multipliers(given: Any) -> Float[Tensor, " row"]:
    try:
        factors = torch.tensor(np.atleast_1d(np.asarray(given, dtype=np.float64)), dtype=torch.float32)
    except (TypeError, ValueError):
        factors = torch.tensor([])
    if factors.ndim != 1 or len(factors) == 0 or not bool(factors.isfinite().all()):
        raise OptionError(
            f"multiplier {given!r} given, expected a finite number, or one per row of the batch"
        )
    return factors


def _stacked(plans: Sequence[SteeringPlan], layer: int) -> Write:
    """One write a row; plans without the layer get zeros."""
    some = next(plan.writes[layer] for plan in plans if layer in plan.writes)
    none = replace(some, multiplier=torch.zeros(1), dose=torch.zeros(1))
    own = [plan.writes.get(layer, none) for plan in plans]
    return Write(
        *(
            torch.cat([getattr(write, name) for write in own])
            for name in ("vector", "safe_mean", "dangerous_mean", "multiplier", "dose")
        )
    )


def _check_options(positions: str, sites: Sequence[str], schedule: Schedule | None, per: str) -> None:
    name, *numbers = positions.split(":") if isinstance(positions, str) else [""]
    counts = {"all": 0, "prompt": 0, "content": 0, "last": 1, "generated": (0, 2)[len(numbers) == 2]}
    if counts.get(name) != len(numbers) or not all(number.isdecimal() for number in numbers):
        raise OptionError(
            f"unknown positions {positions!r}: expected all, prompt, generated, content, last:K or "
            "generated:FROM:TO"
        )
    if numbers:
        first, end = map(int, ("0", *numbers)[-2:])
        if first >= end:
            raise OptionError(f"positions {positions!r} given, which name no token")
    if not sites:
        raise OptionError(f"no sites given, expected some of {', '.join(SITES)}")
    for site in sites:
        one_of(site, SITES, "site")
    one_of(per, ("prompt", "token"), "per")
    if schedule is not None and not callable(schedule):
        raise OptionError(f"schedule {schedule!r} given, expected a callable step -> factor, or None")


def _check_gate(gate: Gate, model: ResidualModel, layers: list[int], sites: Sequence[str]) -> None:
    if not isinstance(gate, Gate):
        raise OptionError(f"when={gate!r} given, expected a detector")
    gate.model.require(fingerprint(model), "the detector")
    one_of(gate.position, _GATE_POSITIONS, "position of the detector that steers")
    # The stream after a block is not there yet when the block itself is steered.
    highest = min(layers) - (set(sites) != {"resid_post"})
    if max(gate.layers) > highest:
        raise MismatchError(
            f"{gate.name} reads layer {max(gate.layers)}, above what is known where layer {min(layers)} is "
            f"steered: expected layers up to {highest}; fit it with layers={list(range(highest + 1))[-1:]} "
            "or steer later layers"
        )
