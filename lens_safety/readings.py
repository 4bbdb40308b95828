"""Reading single prompts: the score of each token, at each layer; the nearest known prompts; attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .detect import Detector, require_same_reading
from .directions import ContentVectors
from .files import Result
from .models import check_layers, fingerprint, pattern_hook, resid_hook, run_blocks
from .prompts import PromptSet, as_prompts
from .residuals import ResidualCache
from .show import card, pick
from .types import EMBED, Hook, OptionError, PromptError, ResidualModel

DETECTOR = "detector"
UNFINISHED = "⋯"
"""Stands for a token that ends within a character; the last token of the character shows it whole."""

_MIDDLE = (0.1, 0.9)
_HALF = "\ufffd"
_RUNNING = ("content_mean", "content_last", "last", "max")


@dataclass(frozen=True)
class TokenScores(Result):
    """The score of each token of some prompts, by a detector and by the class means of each layer.

    A row for each prompt, token and reader. Columns: `prompt` (its number) and `place`; `token`, as text,
    where "⋯" is a token that ends within a character (such as an emoji) and the next ones show it;
    `content` (whether it is of the user's own text); `reader`, "detector" or "layer L"; `score`, of the
    residual stream at this token alone; `running`, of all content tokens up to this one, put together as
    `position` says, NaN before the first of them: its last value is the prompt's score; `cut`, the score
    above which is dangerous (the detector's threshold; 0 for a layer).

    A layer's score is `layer_scores`: -1 at the safe mean, 1 at the dangerous one.
    """

    frame: pd.DataFrame
    prompts: tuple[str, ...]
    detector: str
    position: str
    model: str

    @property
    def readers(self) -> tuple[str, ...]:
        """Who scores: "detector", "layer 0", ..., as far as they were given."""
        return tuple(dict.fromkeys(self.frame["reader"]))

    def of(self, prompt: int, reader: str) -> pd.DataFrame:
        """The tokens of one prompt as one reader scores them, in order."""
        chosen = self.frame.loc[(self.frame["prompt"] == prompt) & (self.frame["reader"] == reader)]
        if chosen.empty:
            raise OptionError(
                f"prompt {prompt} by {reader!r} given, expected one of {len(self.prompts)} prompts and of "
                f"{', '.join(self.readers)}"
            )
        return chosen.reset_index(drop=True)

    def _repr_html_(self) -> str:
        what = f"Token scores of {len(self.prompts)} prompts, {self.model}, read at {self.position}"
        shown = ("prompt", "token", "reader", "score", "running", "cut")
        return card(
            what,
            pick(self.frame.loc[self.frame["content"]], *shown),
            "ls.plots.token_views(scores, reader=None)",
            note="score: of the token alone; running: of the prompt up to it; above the cut is dangerous",
        )


@dataclass(frozen=True)
class AttentionPatterns:
    """What each head looks at: pattern[i, head, p, q], the weight of token q when token p is written.

    Row i is layer `layers[i]`; each `pattern[i, head, p]` sums to 1 over q <= p.
    """

    pattern: Float[Tensor, "layer head_index pos pos"]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    model: str

    def _repr_html_(self) -> str:
        n_heads, n = self.pattern.shape[1], len(self.tokens)
        largest = self.pattern[:, :, 1:, 1:] if n > 1 else self.pattern
        weight, head = largest.amax(dim=(2, 3)).max(dim=1)
        return card(
            f"Attention of {n_heads} heads a layer, {n} tokens, {self.model}",
            pd.DataFrame({"layer": self.layers, "head": head.tolist(), "weight": weight.tolist()}),
            f"ls.plots.attention_view(patterns, layer={self.layers[0]})",
            note="each layer's head with the largest weight on a token other than the first",
        )


def token_scores(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    *,
    detector: Detector | None = None,
    vectors: ContentVectors | None = None,
    layers: Sequence[int] | None = None,
) -> TokenScores:
    """Score every token of each prompt, one forward pass a prompt.

    Args:
        detector: scores as it does; it must read `content_mean`, `content_last`, `last` or `max`.
        vectors: class means, whose `layer_scores` are given at each of `layers` (all of them by default).

    Raises:
        PromptError: an empty prompt, or one longer than the context.
        OptionError: neither a detector nor vectors, layers without vectors, a layer out of range, or a
            position whose running score is not defined.
        MismatchError: a detector or vectors of another model, the two with different positions, or a
            layer that has no vector.
    """
    prompts = as_prompts(prompts)
    position, template = _way_of_reading(detector, vectors)
    for what, one in (("the detector", detector), ("the vectors", vectors)):
        if one is not None:
            one.model.require(fingerprint(model), what)
    chosen = _chosen_layers(model, vectors, layers)
    readers = _readers(detector, vectors, chosen)
    needed = sorted({*chosen, *(() if detector is None else detector.layers)})
    rows: list[pd.DataFrame] = []
    for number, one in enumerate(tok.encode(model, prompts.texts, template=tok.named_template(template))):
        streams = _heard(model, one, needed, resid_hook)
        running = {layer: _running(h, one.content, position) for layer, h in streams.items()}
        shared = {
            "prompt": number,
            "place": np.arange(len(one)),
            "token": _token_texts(model, one),
            "content": one.content,
        }
        started = _started(one.content, position)
        for reader, score, cut in readers:
            own, so_far = score(streams), np.where(started, score(running), np.nan)
            rows.append(
                pd.DataFrame({**shared, "reader": reader, "score": own, "running": so_far, "cut": cut})
            )
    return TokenScores(
        frame=pd.concat(rows, ignore_index=True),
        prompts=tuple(prompts.texts),
        detector="" if detector is None else detector.name,
        position=position,
        model=fingerprint(model).name,
    )


def layer_scores(
    cache: ResidualCache, vectors: ContentVectors, layers: Sequence[int] | None = None
) -> Float[np.ndarray, "layer prompt"]:
    """The two-vector score of each prompt at each layer, on one scale for all layers.

    (cos(h, dangerous mean) - cos(h, safe mean)) / (1 - cos(dangerous mean, safe mean)): 1 at the dangerous
    mean, -1 at the safe one, 0 equally near to both (and where the two means are the same). Row i is
    `layers[i]`, by default those of `vectors`.

    Raises:
        MismatchError: a cache of another model, position or template, or without one of the layers.
        OptionError: no layers.
    """
    vectors.model.require(cache.model, "the vectors")
    require_same_reading("the vectors", vectors, "a cache", cache)
    chosen = vectors.layers if layers is None else layers
    if not chosen:
        raise OptionError("no layers given, expected at least one")
    return np.stack([_relative(cache.layer(layer), vectors, layer) for layer in chosen])


def class_bands(
    train: ResidualCache, vectors: ContentVectors, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Where the training prompts lie: the middle 80% of each class's `layer_scores`, a row a layer.

    Columns: `layer`, and `low` and `high` of `safe` and `dangerous`.

    Raises:
        PromptError: a cache without prompts of both classes.
        and what `layer_scores` raises.
    """
    labels = train.prompts.labels
    chosen = vectors.layers if layers is None else layers
    scores = layer_scores(train, vectors, chosen)
    frame = pd.DataFrame({"layer": list(chosen)})
    for name, rows in (("safe", ~labels), ("dangerous", labels)):
        if not rows.any():
            raise PromptError(f"{train.prompts.name} has no {name} prompt: expected prompts of both classes")
        frame[f"{name}_low"], frame[f"{name}_high"] = np.quantile(scores[:, rows], _MIDDLE, axis=1)
    return frame


def nearest_prompts(cache: ResidualCache, train: ResidualCache, *, layer: int, k: int = 5) -> pd.DataFrame:
    """The k prompts of `train` nearest to each prompt of `cache`, by cosine around the mean of `train`.

    Columns: `prompt` (its number in `cache`), `rank` from 1, `text`, `label`, `kind`, `cosine`.

    Raises:
        MismatchError: caches of two models, positions or templates, or a layer that is not cached.
        OptionError: k below 1.
    """
    train.model.require(cache.model, "the training cache")
    require_same_reading("the training cache", train, "a cache", cache)
    if k < 1:
        raise OptionError(f"k={k} given, expected 1 or more")
    centre = train.layer(layer).mean(dim=0)
    known = torch.nn.functional.normalize(train.layer(layer) - centre, dim=1)
    given = torch.nn.functional.normalize(cache.layer(layer) - centre, dim=1)
    cosines, found = (given @ known.T).topk(min(k, len(train)), dim=1)
    rows = [
        {
            "prompt": number,
            "rank": rank + 1,
            "text": (near := train.prompts.prompts[row]).text,
            "label": near.label,
            "kind": near.kind,
            "cosine": cosine,
        }
        for number, (cosines_of, rows_of) in enumerate(zip(cosines.tolist(), found.tolist(), strict=True))
        for rank, (cosine, row) in enumerate(zip(cosines_of, rows_of, strict=True))
    ]
    return pd.DataFrame(rows)


def attention_patterns(
    model: ResidualModel, prompt: str, *, layers: Sequence[int], template: tok.Template = "auto"
) -> AttentionPatterns:
    """The attention pattern of every head at some layers, for one prompt in its template.

    Raises:
        PromptError: an empty prompt, or one longer than the context.
        OptionError: a layer out of range, twice, or none.
    """
    chosen = check_layers(model, layers)
    (one,) = tok.encode(model, as_prompts([prompt]).texts, template=template)
    found = _heard(model, one, chosen, pattern_hook)
    return AttentionPatterns(
        pattern=torch.stack([found[layer] for layer in chosen]),
        tokens=tuple(_token_texts(model, one)),
        layers=tuple(chosen),
        model=fingerprint(model).name,
    )


def _heard(
    model: ResidualModel, one: tok.Encoded, layers: Sequence[int], hook_of: Callable[[int], str]
) -> dict[int, Tensor]:
    """What a hook of each layer sees in one pass over one prompt, without the axis of the batch."""
    found: dict[int, Tensor] = {}

    def into(layer: int) -> Hook:
        def hook_fn(value: Tensor, hook: Any) -> None:
            found[layer] = value[0].float().cpu()

        return hook_fn

    hooks = [(hook_of(layer), into(layer)) for layer in layers]
    run_blocks(model, tok.pad(model, [one], [0]).tokens, hooks, last_layer=max(0, *layers))
    return found


def _way_of_reading(detector: Detector | None, vectors: ContentVectors | None) -> tuple[str, str]:
    """(position, template) of what is given."""
    first = detector or vectors
    if first is None:
        raise OptionError("neither a detector nor vectors given: expected one of them, or both")
    if vectors is not None and detector is not None:
        require_same_reading("vectors", vectors, "a detector", detector)
    if first.position not in _RUNNING:
        raise OptionError(
            f"position {first.position!r} given, which has no running score: "
            f"expected one of {', '.join(_RUNNING)}"
        )
    return first.position, first.template


def _chosen_layers(
    model: ResidualModel, vectors: ContentVectors | None, layers: Sequence[int] | None
) -> list[int]:
    """The layers of which a score is given; each has a vector."""
    if vectors is None:
        if layers is not None:
            raise OptionError(
                f"layers={list(layers)} given without vectors: expected vectors=..., or no layers"
            )
        return []
    chosen = check_layers(model, vectors.layers if layers is None else layers, embed=True)
    for layer in chosen:
        vectors.row(layer)
    return chosen


def _running(h: Float[Tensor, "pos d_model"], content: np.ndarray, position: str) -> Tensor:
    """At each token, what `position` reads of the prompt up to it."""
    own = torch.from_numpy(content)[:, None]
    if position == "content_mean":
        return (h * own).cumsum(dim=0) / own.cumsum(dim=0).clamp_min(1)
    if position == "max":
        # Before the first content token there is nothing: any finite number will do, as it is not shown.
        return h.masked_fill(~own, -torch.inf).cummax(dim=0).values.nan_to_num(neginf=0.0)
    if position == "content_last":
        last = np.maximum.accumulate(np.where(content, np.arange(len(content)), 0))
        return h[torch.from_numpy(last)]
    return h


def _started(content: np.ndarray, position: str) -> np.ndarray:
    return np.ones(len(content), dtype=bool) if position == "last" else content.cumsum() > 0


def _readers(detector: Detector | None, vectors: ContentVectors | None, layers: Sequence[int]) -> list[Any]:
    """(name, function from streams to scores, cut) of each reader."""
    made: list[Any] = []
    if detector is not None:

        def of_detector(streams: dict[int, Tensor]) -> np.ndarray:
            return detector.score_resid(torch.stack([streams[layer] for layer in detector.layers]))

        made.append((DETECTOR, of_detector, detector.threshold))
    if vectors is not None:
        for layer in layers:
            name = "embed" if layer == EMBED else f"layer {layer}"
            made.append((name, partial(_of_layer, vectors=vectors, layer=layer), 0.0))
    return made


def _of_layer(streams: dict[int, Tensor], vectors: ContentVectors, layer: int) -> np.ndarray:
    return _relative(streams[layer], vectors, layer)


def _relative(h: Tensor, vectors: ContentVectors, layer: int) -> np.ndarray:
    row = vectors.row(layer)
    safe, dangerous = vectors.safe_mean[row].double(), vectors.dangerous_mean[row].double()
    apart = 1 - torch.cosine_similarity(dangerous, safe, dim=0)
    if not apart > 0:
        return np.zeros(len(h))
    to = [torch.cosine_similarity(h.double(), mean[None]) for mean in (dangerous, safe)]
    return ((to[0] - to[1]) / apart).numpy()


def _token_texts(model: ResidualModel, one: tok.Encoded) -> list[str]:
    """Each token as text. A character that takes several tokens stands at the last of them."""
    ids = one.ids.tolist()
    texts: list[str] = []
    first = before = shown = 0
    for end in range(1, len(ids) + 1):
        # With the tokens before it, because some tokenizers drop the blank of a text's first word.
        known, now = (
            model.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            for part in (ids[first:before], ids[first:end])
        )
        new = now[len(known) + shown :]
        if new.endswith(_HALF) and end < len(ids):
            new = new.rstrip(_HALF)
            shown += len(new)
            texts.append(new + UNFINISHED)
        else:
            texts.append(new)
            first, before, shown = before, end, 0
    return texts
