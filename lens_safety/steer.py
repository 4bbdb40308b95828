"""Steering: the residual stream pushed along a direction while the model runs, and generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .directions import ContentVectors
from .models import (
    Decoding,
    check_layers,
    device_of,
    end_of_text_ids,
    fingerprint,
    full_logits,
    resid_hook,
)
from .progress import track
from .prompts import PromptSet, as_prompts
from .types import Hook, OptionError, ResidualModel, one_of

Operator = Literal["add", "ablate"]
OPERATORS = ("add", "ablate")
Positions = Literal["all", "generated"]
POSITIONS = ("all", "generated")

# How many positions of the pass that runs belong to the prompt; None outside `generate`.
_prompt_positions: ContextVar[int | None] = ContextVar("prompt_positions", default=None)


@dataclass(frozen=True)
class Steering:
    """What `steering` does: to which layers, with which dose; `fired` counts the hooks' calls."""

    layers: tuple[int, ...]
    operator: str
    positions: str
    multiplier: tuple[float, ...]
    dose: tuple[tuple[float, ...], ...]
    fired: dict[int, int] = field(default_factory=dict)


@contextmanager
def steering(
    model: ResidualModel,
    vectors: ContentVectors,
    *,
    layers: Sequence[int],
    multiplier: float | Sequence[float] = 1.0,
    operator: Operator = "add",
    positions: Positions = "all",
) -> Iterator[Steering]:
    """Steer every call of the model inside the context; outside, the model is as it was.

    With h = hook_resid_post of each named layer, v its vector (raw) and u = v / norm(v):

        add      h + multiplier * v        a positive multiplier pushes toward dangerous
        ablate   h - multiplier * (h . u) u        1 removes the direction (Arditi et al. 2406.11717)

    Multiplier 0 is the identity, bit for bit. `h` is replaced by a new tensor, never edited.

    Args:
        multiplier: one number, or one per row of the batch (every call must then have that batch).
        positions: "generated" leaves the prompt alone: inside `generate` the prompt's own positions,
            in any other call every pass over more than one token.

    Yields:
        A `Steering`: the doses (norm of what "add" adds over the layer's median residual norm; for
        each layer, then each multiplier), and `fired`, the number of calls of each layer's hook.

    Raises:
        MismatchError: vectors of another model, or without one of the layers.
        OptionError: a layer out of range, an unknown operator or position, a vector that is zero,
            NaN or infinite, a multiplier that is not a finite number.
    """
    one_of(operator, OPERATORS, "operator")
    one_of(positions, POSITIONS, "positions")
    vectors.model.require(fingerprint(model), "the vectors")
    chosen = check_layers(model, layers)
    factors = _multipliers(multiplier)
    record = Steering(
        layers=tuple(chosen),
        operator=operator,
        positions=positions,
        multiplier=tuple(factors.tolist()),
        dose=tuple(
            tuple(float(vectors.dose(m)[vectors.row(layer)]) for m in factors.tolist()) for layer in chosen
        ),
        fired=dict.fromkeys(chosen, 0),
    )
    hooks = [(resid_hook(layer), _hook(layer, _checked(vectors, layer), factors, record)) for layer in chosen]
    with model.hooks(fwd_hooks=hooks):
        yield record


def generate(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    template: tok.Template = "auto",
    batch_size: int | None = None,
    progress: bool = False,
) -> list[str]:
    """The text that follows each prompt, in order, decoded in batches with a key/value cache.

    Temperature 0 is greedy; above it tokens are sampled from softmax(logits / temperature), cut to
    the `top_k` likeliest and to the smallest set with probability `top_p`, with a generator seeded
    by `seed`. A row ends at an end-of-text or end-of-turn token. Works inside `steering`; one
    multiplier per row then needs all prompts in one batch (`batch_size=None`).

    Raises:
        PromptError: an empty prompt, or one that leaves no room in the context.
        OptionError: a negative temperature, or a length, batch size, top_k or top_p out of range.
    """
    prompts = as_prompts(prompts)
    _check_sampling(max_new_tokens, temperature, top_k, top_p)
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size={batch_size} given, expected 1 or more")
    encoded = tok.encode(model, prompts.texts, template=template, reserve=max_new_tokens)
    size = batch_size or len(encoded)
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    starts = range(0, len(encoded), size)
    for start in track(starts, "generating", progress):
        rows = range(start, min(start + size, len(encoded)))
        batch = tok.pad(model, encoded, rows, side="left")

        def choose(logits: Tensor) -> Tensor:
            return _choose(logits, temperature, top_k, top_p, generator)

        texts += _decode(model, batch, max_new_tokens, choose)
    return texts


def continuation_nll(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    continuations: Sequence[str],
    *,
    template: tok.Template = "auto",
    batch_tokens: int = 1024,
) -> Float[np.ndarray, " prompt"]:
    """Mean negative log-likelihood, in nats a token, of each continuation after its prompt.

    Outside `steering` this is what a steered text costs under the unsteered model. NaN where a
    continuation is empty.
    """
    prompts = as_prompts(prompts)
    if len(prompts) != len(continuations):
        raise OptionError(f"{len(prompts)} prompts and {len(continuations)} continuations given")
    encoded, starts = tok.encode_pairs(model, prompts.texts, continuations, template=template)
    nll = np.full(len(encoded), np.nan)
    for batch in tok.batches(model, encoded, batch_tokens=batch_tokens):
        logits = full_logits(model, batch.tokens)
        for i, row in enumerate(batch.rows):
            start, end = starts[row], len(encoded[row])
            if start < end:
                target = batch.tokens[i, start:end]
                nll[row] = float(
                    torch.nn.functional.cross_entropy(logits[i, start - 1 : end - 1].float(), target)
                )
    return nll


def _hook(
    layer: int,
    vector: Float[Tensor, " d_model"],
    factors: Float[Tensor, " batch"],
    record: Steering,
) -> Hook:
    def hook_fn(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        record.fired[layer] += 1
        start = _first_steered(record.positions, resid.shape[1])
        if start == resid.shape[1]:
            return resid
        if len(factors) not in (1, resid.shape[0]):
            raise OptionError(
                f"{len(factors)} multipliers given for a batch of {resid.shape[0]} rows: expected one "
                "multiplier, or one per row"
            )
        m = factors.to(resid.device)[:, None, None]
        v = vector.to(resid.device)
        steered = _OPERATE[record.operator](resid[:, start:], v, m)
        return steered if start == 0 else torch.cat([resid[:, :start], steered], dim=1)

    return hook_fn


def _add(resid: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return resid + (m * v).to(resid.dtype)


def _ablate(resid: Tensor, v: Tensor, m: Tensor) -> Tensor:
    u = v / v.norm()
    return (resid.float() - m * (resid.float() @ u)[..., None] * u).to(resid.dtype)


_OPERATE = {"add": _add, "ablate": _ablate}


def _first_steered(positions: str, n_positions: int) -> int:
    if positions == "all":
        return 0
    of_prompt = _prompt_positions.get()
    if of_prompt is None:
        return 0 if n_positions == 1 else n_positions
    return min(of_prompt, n_positions)


def _multipliers(multiplier: float | Sequence[float]) -> Float[Tensor, " batch"]:
    try:
        factors = torch.tensor(np.atleast_1d(np.asarray(multiplier, dtype=np.float64)), dtype=torch.float32)
    except (TypeError, ValueError):
        factors = torch.tensor([])
    if factors.ndim != 1 or len(factors) == 0 or not bool(factors.isfinite().all()):
        raise OptionError(
            f"multiplier {multiplier!r} given, expected a finite number, or one per row of the batch"
        )
    return factors


def _checked(vectors: ContentVectors, layer: int) -> Float[Tensor, " d_model"]:
    vector = vectors.layer(layer)
    if not bool(vector.isfinite().all()):
        raise OptionError(f"the vector of layer {layer} holds NaN or infinity; make it again")
    if bool(vectors.is_zero[vectors.row(layer)]):
        raise OptionError(f"the vector of layer {layer} is zero: it has no direction; use another layer")
    return vector


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens} given, expected 1 or more")
    if not 0 <= temperature < float("inf"):
        raise OptionError(f"temperature={temperature} given, expected 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise OptionError(f"top_k={top_k} given, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"top_p={top_p} given, expected above 0 and at most 1")


def _decode(model: ResidualModel, batch: tok.Batch, max_new_tokens: int, choose: Any) -> list[str]:
    tokenizer = model.tokenizer
    ends = torch.tensor(end_of_text_ids(tokenizer), device=device_of(model))
    decoding = Decoding(model, len(batch))
    fed, mask = batch.tokens, tok.real_tokens(batch, side="left")
    running = torch.ones(len(batch), dtype=torch.bool, device=fed.device)
    made: list[Tensor] = []
    for step in range(max_new_tokens):
        state = _prompt_positions.set(fed.shape[1] if step == 0 else 0)
        try:
            logits = decoding.step(fed, mask)
        finally:
            _prompt_positions.reset(state)
        chosen = choose(logits)
        running = running & ~torch.isin(chosen, ends)
        made.append(torch.where(running, chosen, -1))
        if not bool(running.any()):
            break
        fed, mask = chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool)
    rows = torch.stack(made, dim=1).cpu()
    return [tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in rows]


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float().cpu() / temperature
    if top_k is not None:
        lowest = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < lowest, -torch.inf)
    if top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token stays while the probability before it is below top_p, so the likeliest always does.
        beyond = probability.cumsum(dim=-1) - probability >= top_p
        scaled = scaled.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    drawn = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]
    return drawn.to(logits.device)
