"""Forward passes that read the residual stream: what has to run of each prompt, and what is read of it."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .kv_cache import SharedPrefix, n_shared
from .models import Arriving, device_of, n_hooks, resid_hook, run_blocks, sent_to
from .types import Hook, MismatchError, ResidualModel

BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384
"""Padded tokens a batch: small batches of one length keep a CPU's caches happy (measured by
`analyses/benchmarks/shapes.py`), a GPU has more to fill (not measured)."""

Read = tuple[list[int], Float[Tensor, "layer row d_model"]]


class Passes:
    """Passes over some prompts, each reading one vector a layer and prompt.

    vector[layer] = sum_pos w[pos] * resid[layer, pos], with w from `position` (for "max" the elementwise
    maximum where w > 0), in float32. Tokens behind the last one that is read are not run: attention is
    causal. Equal prompts are run once, and so is the beginning that all of them share, whose keys and
    values stand before the rest of each. While hooks of the caller are on the model, which may tell
    prompts and places apart, every prompt is run whole.

    Attributes:
        batches: what there is to run, longest first.
    """

    def __init__(
        self,
        model: ResidualModel,
        encoded: Sequence[tok.Encoded],
        position: tok.Position,
        layers: Sequence[int],
        *,
        batch_tokens: int | None,
        share_prefix: bool,
    ):
        self._model, self._layers, self._largest = model, list(layers), position == "max"
        plain = n_hooks(model) > 0
        weights = [_read_of(one, position) for one in encoded]
        ends = [len(w) if plain else int(np.flatnonzero(w)[-1]) + 1 for w in weights]
        run: dict[Any, list[int]] = {}
        for row, (one, end) in enumerate(zip(encoded, ends, strict=True)):
            key = row if plain else (one.ids[:end].tobytes(), weights[row][:end].tobytes())
            run.setdefault(key, []).append(row)
        self._rows = list(run.values())
        self._weights = [weights[rows[0]][: ends[rows[0]]] for rows in self._rows]
        ones = [encoded[rows[0]].first(ends[rows[0]]) for rows in self._rows]
        self._n = n_shared(ones) if share_prefix and not plain else 0
        self._prefix_ids = ones[0].ids[: self._n] if ones else np.empty(0, dtype=np.int64)
        self._prefix: SharedPrefix | None = None
        self._before: dict[int, Tensor] = {}
        rest = [one.after(self._n) for one in ones]
        if batch_tokens is None:
            batch_tokens = BATCH_TOKENS if device_of(model).type == "cpu" else GPU_BATCH_TOKENS
        self.batches = list(tok.batches(model, rest, batch_tokens=batch_tokens, n_before=self._n))

    def run(self, batches: Iterable[tok.Batch]) -> Iterator[Read]:
        """(numbers of the prompts, their vectors) of batches, in order.

        A GPU gets its next pass before the vectors of one have arrived.
        """
        ahead = 0 if device_of(self._model).type == "cpu" else 1
        underway: deque[tuple[tok.Batch, Arriving]] = deque()
        for batch in batches:
            for part, found in self._run_one(batch):
                underway.append((part, Arriving(found)))
                if len(underway) > ahead:
                    yield self._arrived(*underway.popleft())
        for one in underway:
            yield self._arrived(*one)

    def _arrived(self, batch: tok.Batch, found: Arriving) -> Read:
        places = [i for i, number in enumerate(batch.rows) for _ in self._rows[number]]
        return [row for number in batch.rows for row in self._rows[number]], found.wait()[:, places]

    def _run_one(self, batch: tok.Batch) -> Iterator[tuple[tok.Batch, Float[Tensor, "layer row d_model"]]]:
        """The batch and its vectors, on the model's device; halved and run again where memory runs out."""
        try:
            found = self._one_pass(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not _is_out_of_memory(error):
                raise
        else:
            yield batch, found
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for half in batch.halves():
            yield from self._run_one(half)

    def _one_pass(self, batch: tok.Batch) -> Float[Tensor, "layer row d_model"]:
        if self._n and self._prefix is None:
            self._run_prefix()
        reduce = self._reducer(batch)
        # One tensor made before the pass: small ones made between a pass's large ones leave holes in memory.
        shape = len(self._layers), len(batch), self._model.cfg.d_model
        found = torch.empty(shape, dtype=torch.float32, device=batch.tokens.device)
        fired: list[int] = []

        def into(place: int, layer: int) -> tuple[str, Hook]:
            def hook_fn(resid: Tensor, hook: Any) -> None:
                found[place] = reduce(self._behind_prefix(resid, layer))
                fired.append(layer)

            return resid_hook(layer), hook_fn

        hooks = [into(place, layer) for place, layer in enumerate(self._layers)]
        if self._prefix is not None:
            self._prefix.run_blocks(batch.tokens, hooks)
        else:
            run_blocks(self._model, batch.tokens, hooks, last_layer=max(self._layers))
        if sorted(fired) != sorted(self._layers):
            raise MismatchError(
                f"hooks fired {len(fired)} times for {len(self._layers)} residual streams: another hook "
                "on this model interferes; reset its hooks"
            )
        return found

    def _run_prefix(self) -> None:
        """Run the common beginning; its own residual streams are kept where some of it is read."""
        is_read = any(w[: self._n].any() for w in self._weights)

        def into(layer: int) -> tuple[str, Hook]:
            def hook_fn(resid: Tensor, hook: Any) -> None:
                self._before[layer] = resid

            return resid_hook(layer), hook_fn

        tokens = sent_to(torch.from_numpy(self._prefix_ids)[None], device_of(self._model))
        hooks = [into(layer) for layer in self._layers if is_read]
        self._prefix = SharedPrefix(self._model, tokens, hooks, last_layer=max(self._layers))

    def _behind_prefix(self, resid: Tensor, layer: int) -> Tensor:
        if not self._before:
            return resid
        return torch.cat([self._before[layer].expand(len(resid), -1, -1), resid], dim=1)

    def _reducer(self, batch: tok.Batch) -> Any:
        """A function from `[batch pos d_model]` to `[batch d_model]`, in float32."""
        first = 0 if self._before else self._n
        device = batch.tokens.device
        weights = np.zeros((len(batch), batch.tokens.shape[1] + self._n - first), dtype=np.float32)
        for i, number in enumerate(batch.rows):
            own = self._weights[number][first:]
            weights[i, : len(own)] = own
        w = sent_to(torch.from_numpy(weights), device)
        if self._largest:
            outside = (w == 0)[:, :, None]
            return lambda resid: resid.float().masked_fill(outside, -torch.inf).amax(dim=1)
        if ((weights > 0).sum(axis=1) == 1).all():
            place, every = w.argmax(dim=1), torch.arange(len(batch), device=device)
            return lambda resid: resid[every, place].float()
        return lambda resid: torch.bmm(w[:, None, :], resid.float())[:, 0]


def _read_of(one: tok.Encoded, position: tok.Position) -> Float[np.ndarray, " pos"]:
    """The weight of each token; for "max" 1 where the maximum is taken."""
    return one.content.astype(np.float32) if position == "max" else tok.weights_of(one, position)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, the CPU's allocator only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
