"""Reading single prompts: the score of each token, at each layer; the nearest known prompts; attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .detect import Detector
from .directions import ContentVectors
from .files import Result
from .models import fingerprint, pattern_hook, resid_hook, run_blocks
from .prompts import PromptSet, as_prompts
from .residuals import ResidualCache
from .types import EMBED, Hook, MismatchError, OptionError, ResidualModel

DETECTOR = "detector"
_RUNNING = ("content_mean", "content_last", "last", "max")


@dataclass(frozen=True)
class TokenScores(Result):
    """The score of each token of some prompts, by a detector and by the class means of each layer.

    A row for each prompt, token and reader. Columns: `prompt` (its number) and `place`; `token`, as text;
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
        title = f"{len(self.prompts)} prompts, {self.model}. Plot: ls.plots.token_view(scores)"
        return f"<p>{title}</p>{self.frame.head(12).round(3).to_html(index=False)}"


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
        n_heads = self.pattern.shape[1]
        return (
            f"<p>{n_heads} heads at layers {', '.join(map(str, self.layers))}, {len(self.tokens)} tokens, "
            f"{self.model}. Plot: ls.plots.attention_view(patterns)</p>"
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
        OptionError: neither a detector nor vectors, or a position whose running score is not defined.
        MismatchError: a detector or vectors of another model, or the two with different positions.
    """
    prompts = as_prompts(prompts)
    position, template = _way_of_reading(detector, vectors)
    for what, one in (("the detector", detector), ("the vectors", vectors)):
        if one is not None:
            one.model.require(fingerprint(model), what)
    chosen = () if vectors is None else tuple(vectors.layers if layers is None else layers)
    rows: list[pd.DataFrame] = []
    encoded = tok.encode(model, prompts.texts, template=tok.named_template(template))
    needed = sorted({*chosen, *(() if detector is None else detector.layers)})
    for number, one in enumerate(encoded):
        streams = _streams(model, one, needed)
        running = {layer: _running(h, one.content, position) for layer, h in streams.items()}
        names = _token_texts(model, one)
        for reader, score, cut in _readers(detector, vectors, chosen):
            rows.append(
                pd.DataFrame(
                    {
                        "prompt": number,
                        "place": np.arange(len(one)),
                        "token": names,
                        "content": one.content,
                        "reader": reader,
                        "score": score(streams),
                        "running": np.where(_started(one.content, position), score(running), np.nan),
                        "cut": cut,
                    }
                )
            )
    return TokenScores(
        frame=pd.concat(rows, ignore_index=True),
        prompts=prompts.texts,
        detector="" if detector is None else detector.name,
        position=position,
        model=fingerprint(model).name,
    )


def layer_scores(
    cache: ResidualCache, vectors: ContentVectors, layers: Sequence[int] | None = None
) -> Float[np.ndarray, "layer prompt"]:
    """The two-vector score of each prompt at each layer, on one scale for all layers.

    (cos(h, dangerous mean) - cos(h, safe mean)) / (1 - cos(dangerous mean, safe mean)): 1 at the dangerous
    mean, -1 at the safe one, 0 equally near to both. Row i is `layers[i]`, by default those of `vectors`.
    """
    vectors.model.require(cache.model, "the vectors")
    chosen = vectors.layers if layers is None else layers
    return np.stack([_relative(cache.layer(layer), vectors, layer) for layer in chosen])


def nearest_prompts(cache: ResidualCache, train: ResidualCache, *, layer: int, k: int = 5) -> pd.DataFrame:
    """The k prompts of `train` nearest to each prompt of `cache`, by cosine around the mean of `train`.

    Columns: `prompt` (its number in `cache`), `rank` from 1, `text`, `label`, `kind`, `cosine`.
    """
    train.model.require(cache.model, "the training cache")
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
    """The attention pattern of every head at some layers, for one prompt in its template."""
    (one,) = tok.encode(model, [prompt], template=template)
    found: dict[int, Tensor] = {}
    hooks = [(pattern_hook(layer), _into(found, layer)) for layer in layers]
    run_blocks(model, tok.pad(model, [one], [0]).tokens, hooks, last_layer=max(layers))
    return AttentionPatterns(
        pattern=torch.stack([found[layer] for layer in layers]),
        tokens=tuple(_token_texts(model, one)),
        layers=tuple(layers),
        model=fingerprint(model).name,
    )


def _into(found: dict[int, Tensor], layer: int) -> Hook:
    def hook_fn(value: Tensor, hook: Any) -> None:
        found[layer] = value[0].float().cpu()

    return hook_fn


def _way_of_reading(detector: Detector | None, vectors: ContentVectors | None) -> tuple[str, str]:
    """(position, template) of what is given."""
    first = detector or vectors
    if first is None:
        raise OptionError("neither a detector nor vectors given: expected one of them, or both")
    if vectors is not None and (vectors.position, vectors.template) != (first.position, first.template):
        raise MismatchError(
            f"vectors read at {vectors.position} ({vectors.template}) given beside a detector that reads "
            f"{first.position} ({first.template}): expected the same position and template"
        )
    if first.position not in _RUNNING:
        raise OptionError(
            f"position {first.position!r} has no running score: expected one of {', '.join(_RUNNING)}"
        )
    return first.position, first.template


def _streams(
    model: ResidualModel, one: tok.Encoded, layers: Sequence[int]
) -> dict[int, Float[Tensor, "pos d_model"]]:
    found: dict[int, Tensor] = {}
    hooks = [(resid_hook(layer), _into(found, layer)) for layer in layers]
    run_blocks(model, tok.pad(model, [one], [0]).tokens, hooks, last_layer=max(0, *layers))
    return found


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
    for layer in layers if vectors is not None else ():
        name = "embed" if layer == EMBED else f"layer {layer}"
        made.append((name, lambda streams, layer=layer: _relative(streams[layer], vectors, layer), 0.0))
    return made


def _relative(h: Tensor, vectors: ContentVectors, layer: int) -> np.ndarray:
    row = vectors.row(layer)
    safe, dangerous = vectors.safe_mean[row].double(), vectors.dangerous_mean[row].double()
    apart = 1 - torch.cosine_similarity(dangerous, safe, dim=0)
    if not apart > 0:
        return np.zeros(len(h))
    to = [torch.cosine_similarity(h.double(), mean[None]) for mean in (dangerous, safe)]
    return ((to[0] - to[1]) / apart).numpy()


def _token_texts(model: ResidualModel, one: tok.Encoded) -> list[str]:
    return [model.tokenizer.decode([int(token)]) for token in one.ids]
