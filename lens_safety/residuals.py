"""Residual streams: every layer of every prompt from one forward pass a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .files import building_from, load_tensors, save_tensors
from .models import ModelFingerprint, check_layers, fingerprint, n_hooks
from .passes import Passes
from .progress import track
from .prompts import Prompt, PromptSet, as_prompts
from .show import card
from .store import Store, StoredRows
from .types import EMBED, FileError, MismatchError, OptionError, ResidualModel

_KIND = "ResidualCache"


@dataclass(frozen=True)
class ResidualCache:
    """One vector per layer and prompt, read from the residual stream at `position`.

    `resid[i]` is layer `layers[i]`, hook `blocks.{layers[i]}.hook_resid_post`; the embedding (the
    input of block 0) stands apart as `embed`. float32, in the order of `prompts`.
    """

    resid: Float[Tensor, "layer prompt d_model"]
    embed: Float[Tensor, "prompt d_model"]
    layers: tuple[int, ...]
    prompts: PromptSet
    position: str
    template: str
    model: ModelFingerprint
    hook: str = field(default="resid_post")

    def __len__(self) -> int:
        return len(self.prompts)

    def layer(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """The rows of one layer by its number (-1 = the embedding), whatever its place in `resid`."""
        if layer == EMBED:
            return self.embed
        if layer not in self.layers:
            raise MismatchError(
                f"layer {layer} given, expected one of the cached layers {_ranges(self.layers)}; "
                "extract it, or leave layers=None for all"
            )
        return self.resid[self.layers.index(layer)]

    def __getitem__(self, rows: "slice | Sequence[int] | np.ndarray") -> "ResidualCache":
        """The cache of some of the prompts."""
        chosen = torch.from_numpy(np.arange(len(self))[rows].copy())
        return replace(
            self,
            resid=self.resid[:, chosen],
            embed=self.embed[chosen],
            prompts=self.prompts[chosen.numpy()],
        )

    def _repr_html_(self) -> str:
        norms = self.resid.norm(dim=-1)
        frame = pd.DataFrame({"layer": self.layers, "median_norm": norms.median(dim=1).values.tolist()})
        return card(
            f"Residual streams of {self.model.name}: {len(self)} prompts of {self.prompts.name}, "
            f"{len(self.layers)} layers x {self.resid.shape[-1]} dimensions, {self.hook} read at "
            f"{self.position} ({self.template} template)",
            frame,
            "ls.layer_table(cache)" if self.prompts.is_labelled else "detector.score(cache)",
        )

    def save(self, path: str | Path) -> Path:
        """Write safetensors with a JSON header; whole or not at all."""
        return save_tensors(path, _KIND, {"resid": self.resid, "embed": self.embed}, _header(self))

    @classmethod
    def load(cls, path: str | Path) -> "ResidualCache":
        """Read what `save` wrote. Raises `FileError` for a damaged file, another kind or version."""
        tensors, header = load_tensors(path, _KIND)
        with building_from(path):
            prompts = PromptSet(tuple(Prompt(**row) for row in header["prompts"]), header["name"])
            layers = tuple(header["layers"])
            d_model = header["model"]["d_model"]
            shapes = {
                "resid": (len(layers), len(prompts), d_model),
                "embed": (len(prompts), d_model),
            }
            for name, shape in shapes.items():
                if tuple(tensors[name].shape) != shape:
                    raise FileError(
                        f"{path} holds a tensor of shape {tuple(tensors[name].shape)}, its header says "
                        f"{shape}; make it again"
                    )
            return cls(
                resid=tensors["resid"],
                embed=tensors["embed"],
                layers=layers,
                prompts=prompts,
                position=header["position"],
                template=header["template"],
                model=ModelFingerprint.from_dict(header["model"]),
                hook=header["hook"],
            )


def residual_streams(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    *,
    position: tok.Position = "content_mean",
    template: tok.Template = "auto",
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    store: Store | None = None,
    truncate: bool = False,
    share_prefix: bool = True,
    progress: bool = True,
) -> ResidualCache:
    """The residual stream of every layer at one position of every prompt, one forward pass a batch.

    resid[layer, prompt] = sum_pos w[prompt, pos] * hook_resid_post[layer][prompt, pos], with w from
    `position` (see `tokens.weights_of`; "max" is the elementwise maximum over content tokens). The
    reduction happens inside the hook, in float32; no block above the highest layer runs, nor the
    unembedding, nor a token behind the last one that is read, nor equal prompts twice. Values do not
    depend on batch size, order, padding or a shared prefix (within float rounding).

    Args:
        position: "content_mean", "content_last", "last", "max", an integer, or a callable on
            (token ids, content mask).
        layers: which layers, all by default; rows come in the order given.
        batch_tokens: padded tokens a batch, 1,024 by default on a CPU and 16,384 on a GPU. A batch that
            runs out of memory is halved and run again.
        share_prefix: run the tokens that all prompts begin with (a chat template's system message) once.
            Hooks of yours on the model, and `steering`, see every prompt whole whatever this says.
        store: a folder, or a `ResidualStore`, in which finished batches are kept; a run that was
            interrupted, one with more prompts or one with fewer layers computes only what is missing there.

    Raises:
        PromptError: an empty prompt, or one too long for the context (unless `truncate`).
        OptionError: an unknown position or template, a layer out of range, or a store for a hooked model.
        FileError: a damaged store, or a position or template that a store cannot name.
    """
    prompts = as_prompts(prompts)
    chosen = check_layers(model, range(model.cfg.n_layers) if layers is None else layers)
    made = ResidualCache(
        resid=torch.zeros(len(chosen), len(prompts), model.cfg.d_model),
        embed=torch.zeros(len(prompts), model.cfg.d_model),
        layers=tuple(chosen),
        prompts=prompts,
        position=tok.position_name(position),
        template=tok.template_name(model, template),
        model=fingerprint(model),
    )
    encoded = tok.encode(model, prompts.texts, template=template, truncate=truncate)
    stored = None if store is None else _stored(store, model, made, truncate)
    missing = list(range(len(prompts))) if stored is None else _filled(made, stored)
    passes = Passes(
        model,
        [encoded[row] for row in missing],
        position,
        [EMBED, *chosen],
        batch_tokens=batch_tokens,
        share_prefix=share_prefix,
    )
    batches = track(passes.batches, f"residual streams of {prompts.name}", progress, size=len)
    for found, streams in passes.run(batches):
        rows = [missing[number] for number in found]
        made.embed[rows], made.resid[:, rows] = streams[0], streams[1:]
        if stored is not None:
            stored.keep([prompts.prompts[row].text for row in rows], streams)
    return made


def _stored(store: Store, model: ResidualModel, made: ResidualCache, truncate: bool) -> StoredRows:
    if n_hooks(model):
        raise OptionError(
            "store= given while hooks or `steering` are on the model: expected none, since what is stored "
            "belongs to the model alone; leave store out here"
        )
    return StoredRows(
        store,
        made.model,
        position=made.position,
        template=made.template,
        layers=[EMBED, *made.layers],
        cut_at=model.cfg.n_ctx if truncate else None,
    )


def _filled(made: ResidualCache, stored: StoredRows) -> list[int]:
    """Copy the rows that are in the store into `made`; the numbers of those that are not."""
    missing = set(range(len(made)))
    for rows, streams in stored.find(made.prompts.texts):
        made.embed[rows], made.resid[:, rows] = streams[0], streams[1:]
        missing -= set(rows)
    return sorted(missing)


def _header(cache: ResidualCache) -> dict[str, Any]:
    return {
        "layers": list(cache.layers),
        "prompts": cache.prompts.to_frame().to_dict("records"),
        "name": cache.prompts.name,
        "position": cache.position,
        "template": cache.template,
        "hook": cache.hook,
        "model": cache.model.to_dict(),
    }


def _ranges(layers: Sequence[int]) -> str:
    return f"{min(layers)} to {max(layers)}" if len(layers) > 3 else ", ".join(map(str, layers))
