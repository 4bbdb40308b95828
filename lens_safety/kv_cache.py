"""Key/value caches: of a `HookedTransformer` that decodes, and of a prefix that many prompts share.

TransformerLens' own cache copies all keys and values at each token; its attention turns all keys by their
rotary angles again and repeats them for every head that shares them. Here room is laid out once and nothing
is computed twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .models import device_of, engine_of, full_cache, run_blocks
from .tokens import Encoded, shared_prefix
from .types import Hook, ResidualModel, Tokens

SHORTEST_PREFIX = 4
"""Tokens of a common prefix from which it is worth a pass of its own."""


class Entry:
    """One layer's keys and values, `[batch, pos, kv_head, d_head]` as TransformerLens sees them."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self._keys = self._values = torch.empty(shape, dtype=dtype, device=device)
        self._turned: Tensor | None = None
        self._n = self._n_turned = 0

    @property
    def past_keys(self) -> Tensor:
        return self._keys[:, : self._n]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = self._n + keys.shape[1]
        if self._n == 0:
            self._keys, self._values = keys, values
        elif self._turned is None:
            self._keys = torch.cat([self.past_keys, keys], dim=1)
            self._values = torch.cat([self._values[:, : self._n], values], dim=1)
        else:
            self._keys[:, self._n : end], self._values[:, self._n : end] = keys, values
        self._n = end
        return self._keys[:, :end], self._values[:, :end]

    def expanded(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the one row, as views for `n_rows`."""
        _, *rest = self.past_keys.shape
        return self.past_keys.expand(n_rows, *rest), self._values[:, : self._n].expand(n_rows, *rest)

    def repeat(self, n_rows: int) -> None:
        """Let the one row stand for `n_rows`."""
        self._keys, self._values = self.expanded(n_rows)

    def lay_out(self, laid: Callable[[Tensor], Tensor], room: int) -> None:
        """Move everything to memory with room for `room` more tokens; `laid` gives each row its own."""
        for name in ("_keys", "_values"):
            old = laid(getattr(self, name))
            new = _blank(old, room)
            new[:, : old.shape[1]] = old
            setattr(self, name, new)
        self._turned, self._n_turned = torch.empty_like(self._keys), 0

    def turned(self, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The keys turned by their rotary angles; only the new ones are turned, by `turn(keys, first)`."""
        if self._turned is None:
            return turn(self._keys[:, : self._n], 0)
        new = slice(self._n_turned, self._n)
        self._turned[:, new] = turn(self._keys[:, new], self._n_turned)
        self._n_turned = self._n
        return self._turned[:, : self._n]


class Ahead:
    """One layer's keys and values of a prefix, in front of those of each row of a pass; none is kept."""

    def __init__(self, prefix: Entry, n_rows: int):
        self.past_keys, self._values = prefix.expanded(n_rows)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.past_keys, keys], dim=1), torch.cat([self._values, values], dim=1)


class Cache:
    """The part of `TransformerLensKeyValueCache` that a `HookedTransformer` asks for."""

    def __init__(self, model: ResidualModel, n_rows: int):
        cfg = model.cfg
        shape = (n_rows, 0, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
        self._entries = [Entry(shape, cfg.dtype, device_of(model)) for _ in range(cfg.n_layers)]
        self._mask: Tensor | None = None
        self._shadows: list[tuple[Any, dict[str, Callable[..., Tensor]]]] | None = None

    def __getitem__(self, layer: int) -> Entry:
        return self._entries[layer]

    def ahead_of(self, n_rows: int) -> "AheadCache":
        """A cache with the one row of this one in front of each of `n_rows`."""
        return AheadCache([Ahead(entry, n_rows) for entry in self._entries])

    def repeat(self, n_rows: int) -> "Cache":
        """This cache, its one row standing for each of `n_rows`."""
        for entry in self._entries:
            entry.repeat(n_rows)
        return self

    def append_attention_mask(self, mask: Tensor) -> Tensor | None:
        """None, which spares each layer its mask, unless there are pads."""
        if self._mask is None:
            return None
        self._mask = torch.cat([self._mask, mask], dim=1)
        return self._mask

    def lay_out(self, laid: Callable[[Tensor], Tensor], mask: Tensor, room: int) -> None:
        for entry in self._entries:
            entry.lay_out(laid, room)
        if not bool(mask.all()):
            self._mask = mask.int()

    @contextmanager
    def attended(self, model: ResidualModel) -> Iterator[None]:
        """Attention over this cache without turning or repeating what stands in it; same hooks, same shapes.

        Methods of the attention modules are shadowed inside and are themselves again afterwards.
        """
        if self._shadows is None:
            self._shadows = [
                (block.attn, _shadow(block.attn, entry))
                for block, entry in zip(model.blocks, self._entries, strict=True)  # type: ignore[attr-defined]
            ]
        try:
            for attention, own in self._shadows:
                attention.__dict__.update(own)
            yield
        finally:
            for attention, own in self._shadows:
                for name in own:
                    attention.__dict__.pop(name, None)


class AheadCache:
    """The same part of a cache, of entries that nothing is added to."""

    def __init__(self, entries: Sequence[Ahead]):
        self._entries = entries

    def __getitem__(self, layer: int) -> Ahead:
        return self._entries[layer]

    def append_attention_mask(self, mask: Tensor) -> None:
        """None, which spares each layer its mask: what stands behind pads is not read."""


class SharedPrefix:
    """Tokens that many prompts begin with, run once; their keys and values precede each row of a pass."""

    def __init__(
        self, model: ResidualModel, tokens: Tokens, hooks: Sequence[tuple[str, Hook]], *, last_layer: int
    ):
        """`tokens` is one row; `hooks` see its pass."""
        self._model, self._n, self._last = model, tokens.shape[1], last_layer
        self._cache = Cache(model, 1) if engine_of(model) == "hooked" else full_cache()
        run_blocks(model, tokens, hooks, last_layer=last_layer, options=cache_options(self._cache, tokens))

    def run_blocks(self, tokens: Tokens, hooks: Sequence[tuple[str, Hook]]) -> None:
        """`models.run_blocks` over what follows the prefix, right-padded."""
        cache = self._in_front_of(len(tokens))
        options = cache_options(cache, tokens, n_before=self._n)
        run_blocks(self._model, tokens, hooks, last_layer=self._last, options=options)

    def continued(self, n_rows: int) -> Any:
        """A cache for `n_rows` that go on behind the prefix; it may be asked for once."""
        return self._cache.repeat(n_rows) if isinstance(self._cache, Cache) else self._in_front_of(n_rows)

    def _in_front_of(self, n_rows: int) -> Any:
        if isinstance(self._cache, Cache):
            return self._cache.ahead_of(n_rows)
        cache = full_cache()
        for number, layer in enumerate(self._cache.layers):
            cache.update(*(x.expand(n_rows, -1, -1, -1) for x in (layer.keys, layer.values)), number)
        return cache


def n_shared(encoded: Sequence[Encoded]) -> int:
    """The length of the prefix that all prompts share, 0 where it is not worth a pass of its own."""
    n = shared_prefix(encoded)
    return n if n >= SHORTEST_PREFIX else 0


def cache_options(cache: Any, tokens: Tokens, *, n_before: int = 0) -> dict[str, Any]:
    """What a model's forward pass is given for `tokens` without left pads, behind `n_before` cached ones."""
    if isinstance(cache, Cache | AheadCache):
        return {"past_kv_cache": cache, "attention_mask": torch.ones_like(tokens, dtype=torch.int)}
    options = {"past_key_values": cache, "use_cache": True}
    if n_before:
        options["attention_mask"] = tokens.new_ones(len(tokens), n_before + tokens.shape[1])
    return options


def _shadow(attention: Any, entry: Entry) -> dict[str, Callable[..., Tensor]]:
    own = {"calculate_attention_scores": _scores(attention), "calculate_z_scores": _z(attention)}
    cfg = attention.cfg
    if cfg.positional_embedding_type == "rotary" and not getattr(cfg, "use_dynamic_ntk_rope", False):
        own["apply_rotary"] = _rotary(attention, entry)
    return own


def _blank(like: Tensor, room: int) -> Tensor:
    """Room for more tokens, each head's keys one after another, as matrix products read them."""
    n, pos, heads, d_head = like.shape
    return like.new_empty((n, heads, pos + room, d_head)).transpose(1, 2)


def _rotary(attention: Any, entry: Entry) -> Callable[..., Tensor]:
    plain = type(attention).apply_rotary

    def apply_rotary(x: Tensor, past_kv_pos_offset: int = 0, attention_mask: Tensor | None = None) -> Tensor:
        # Queries come with the cache's length as their offset, keys from the first one on.
        if past_kv_pos_offset:
            return plain(attention, x, past_kv_pos_offset, attention_mask)
        return entry.turned(lambda keys, first: plain(attention, keys, first, attention_mask))

    return apply_rotary


def _scores(attention: Any) -> Callable[[Tensor, Tensor], Tensor]:
    cap = float(attention.cfg.attn_scores_soft_cap)

    def calculate_attention_scores(q: Tensor, k: Tensor) -> Tensor:
        rows, n_new, heads, d_head = q.shape
        shared = q.transpose(1, 2).reshape(rows, k.shape[2], -1, d_head)
        scores = (shared @ k.permute(0, 2, 3, 1) / attention.attn_scale).reshape(rows, heads, n_new, -1)
        return cap * torch.tanh(scores / cap) if cap > 0 else scores

    return calculate_attention_scores


def _z(attention: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def calculate_z_scores(v: Tensor, pattern: Tensor) -> Tensor:
        rows, heads, n_new, n = pattern.shape
        shared = pattern.reshape(rows, v.shape[2], -1, n) @ v.transpose(1, 2)
        return attention.hook_z(shared.reshape(rows, heads, n_new, -1).transpose(1, 2))

    return calculate_z_scores
