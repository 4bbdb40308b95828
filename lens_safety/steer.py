"""Steering: the residual stream pushed along a direction while the model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .decoding import continuation_logits, greedy_continuations
from .directions import ContentVectors
from .operators import Operator
from .plans import Gate, Multiplier, Per, Schedule, SteeringPlan, build_plan
from .prompts import PromptSet, as_prompts, load_prompts
from .types import OptionError, ResidualModel

KL_TOKENS = 16
"""Tokens of each neutral continuation over which `next_token_kl` is averaged."""

_ROWS_A_PASS = 32
_RATIO = 2.0
_FINEST = 0.01


@dataclass(frozen=True)
class TargetKL:
    """A multiplier as the damage it does: the one at which `next_token_kl` is `kl` nats, solved.

    A negative number asks for the multiplier below 0, toward safe. It is solved for all layers at once, on
    the built-in `neutral` prompts in `template`: name the one in which you steer.
    """

    kl: float | int
    template: tok.Template = "auto"


def steering_plan(
    model: ResidualModel,
    vectors: ContentVectors,
    *,
    layers: Sequence[int],
    multiplier: Multiplier | TargetKL = 1.0,
    operator: str | Operator = "add",
    positions: str = "all",
    sites: Sequence[str] = ("resid_post",),
    schedule: Schedule | None = None,
    when: Gate | None = None,
    per: Per = "prompt",
) -> SteeringPlan:
    """What `steering` with the same arguments writes where: print it, then `with plan.on(model): ...`."""

    def planned(m: Multiplier) -> SteeringPlan:
        return build_plan(
            model,
            vectors,
            layers=layers,
            multiplier=m,
            operator=operator,
            positions=positions,
            sites=sites,
            schedule=schedule,
            when=when,
            per=per,
        )

    if isinstance(multiplier, TargetKL):
        return planned(_solve_kl(model, multiplier, planned))
    return planned(multiplier)


@contextmanager
def steering(
    model: ResidualModel,
    vectors: ContentVectors,
    *,
    layers: Sequence[int],
    multiplier: Multiplier | TargetKL = 1.0,
    operator: str | Operator = "add",
    positions: str = "all",
    sites: Sequence[str] = ("resid_post",),
    schedule: Schedule | None = None,
    when: Gate | None = None,
    per: Per = "prompt",
) -> Iterator[SteeringPlan]:
    """Steer every call of the model inside the context; outside, the model is as it was.

    At each named layer h, the residual stream, is replaced by the operator's new tensor, never edited;
    v is the layer's vector (raw), u = v / norm(v). With "add", h + multiplier * v: a positive multiplier
    pushes toward dangerous; multiplier 0 is the identity, bit for bit, for every operator.

    Args:
        multiplier: one number; one per row of the batch (every call must then have that batch); a
            `Dose`; a mapping from layer to one of these; or a `TargetKL`.
        operator: "add", "add-norm", "ablate", "clamp" (or "clamp:VALUE"), "toward", "rotate" (or
            "rotate:DEGREES"), or an object of `lens_safety.operators`, where the equations stand.
        positions: "all"; "prompt"; "generated"; "content", the prompt's content tokens; "last:K", the
            last K tokens of the prompt; "generated:FROM:TO", that window of generated tokens, from 0.
            In `generate` and `continuation_nll` these are known. In any other call several positions
            count as one prompt without pads, whose first token is not content, and one position as a
            generated token.
        sites: where in the block: "resid_post", "resid_pre", "attn_out", "mlp_out".
        schedule: the factor on the multiplier at each step (0: the prompt, t: the t-th generated token),
            such as `LinearDecay(20)`, `ExponentialDecay(5)`, or any callable; constant by default.
        when: steer only where this detector says dangerous, reading the model that runs, unsteered up to
            there: its layers must not be above the steered ones. `per` "prompt" decides once for each row,
            on the prompt as the detector reads prompts; "token" for each token by itself.

    Yields:
        The `SteeringPlan`, whose `fired` counts the calls of each layer's hooks.

    Raises:
        MismatchError: vectors or a detector of another model, or vectors without one of the layers.
        OptionError: a layer out of range, an unknown operator, position or site, a vector that is zero,
            NaN or infinite, a multiplier that is not a finite number.
    """
    plan = steering_plan(
        model,
        vectors,
        layers=layers,
        multiplier=multiplier,
        operator=operator,
        positions=positions,
        sites=sites,
        schedule=schedule,
        when=when,
        per=per,
    )
    with plan.on(model) as record:
        yield record


@dataclass(frozen=True)
class Continued:
    """A prompt with the unsteered model's continuation, where that starts, and its log-probabilities."""

    batch: tok.Batch
    start: int
    log_p: Float[Tensor, "new d_vocab"]


def next_token_kl(
    model: ResidualModel,
    plans: Sequence[SteeringPlan],
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    n_tokens: int = KL_TOKENS,
    template: tok.Template = "auto",
) -> Float[np.ndarray, "plan prompt"]:
    """The damage of each plan: KL(unsteered || steered) of the next token, in nats.

    The mean over the first `n_tokens` tokens of the unsteered model's own greedy continuation of each
    prompt, of which the plan's positions treat the continuation as generated. Plans must be stackable
    (`SteeringPlan.stack`). The built-in `neutral` prompts by default.
    """
    if plans:
        SteeringPlan.stack(plans)
    return divergence(model, plans, continued(model, prompts, n_tokens=n_tokens, template=template))


def continued(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    n_tokens: int = KL_TOKENS,
    template: tok.Template = "auto",
) -> list[Continued]:
    """What `divergence` measures on: each prompt (the built-in `neutral` ones by default), continued."""
    chosen = load_prompts("neutral") if prompts is None else as_prompts(prompts)
    encoded, starts = greedy_continuations(model, chosen.texts, n_tokens, template=template)
    made = []
    for row, start in enumerate(starts):
        batch = tok.pad(model, encoded, [row])
        log_p = continuation_logits(model, batch, [start])[0].log_softmax(dim=-1)
        made.append(Continued(batch, start, log_p))
    return made


def divergence(
    model: ResidualModel, plans: Sequence[SteeringPlan], texts: Sequence[Continued]
) -> Float[np.ndarray, "plan prompt"]:
    """`next_token_kl` on texts that were continued before."""
    kl = np.zeros((len(plans), len(texts)))
    for prompt, one in enumerate(texts):
        for first in range(0, len(plans), _ROWS_A_PASS):
            part = plans[first : first + _ROWS_A_PASS]
            rows = torch.zeros(len(part), dtype=torch.long)
            with SteeringPlan.stack(part).on(model):
                steered = continuation_logits(model, one.batch, [one.start], rows=rows)
            kl[first : first + len(part), prompt] = [_kl(one.log_p, logits) for logits in steered]
    return kl


def _kl(base: Float[Tensor, "new d_vocab"], logits: Float[Tensor, "new d_vocab"]) -> float:
    """mean over positions of sum p0 (log p0 - log p)."""
    return float(
        torch.nn.functional.kl_div(
            logits.log_softmax(dim=-1), base, reduction="batchmean", log_target=True
        ).clamp_min(0)
    )


def _solve_kl(model: ResidualModel, asked: TargetKL, planned: Any) -> float:
    """The smallest multiplier whose KL is the target: brackets of a doubling grid, refined twice."""
    target = asked.kl
    if not np.isfinite(target) or target == 0:
        raise OptionError(f"TargetKL({target}) given, expected nats above 0, or below 0 for toward safe")

    # What cannot be steered is refused before anything runs.
    planned(1.0)
    texts = continued(model, template=asked.template)

    def measured(grid: np.ndarray) -> np.ndarray:
        plans = [planned(float(np.sign(target) * m)) for m in grid]
        return divergence(model, plans, texts).mean(axis=1)

    grid = _RATIO ** np.arange(-6.0, 7.0)
    while True:
        kl = measured(grid)
        over = np.flatnonzero(kl >= abs(target))
        if len(over) == 0 or over[0] == 0:
            raise OptionError(
                f"TargetKL({target}) given, and multipliers {grid[0]:.3g} to {grid[-1]:.3g} reach KLs of "
                f"{kl.min():.3g} to {kl.max():.3g} nats; ask for one between them"
            )
        low, high = grid[over[0] - 1], grid[over[0]]
        if high / low - 1 < _FINEST:
            return float(np.sign(target) * (low * high) ** 0.5)
        grid = np.geomspace(low, high, 9)
