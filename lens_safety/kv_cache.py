"""The key/value cache of a `HookedTransformer` that decodes: room laid out once, nothing computed twice.

TransformerLens' own cache copies all keys and values at each token; its attention turns all keys by their
rotary angles again and repeats them for every head that shares them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .models import device_of
from .types import ResidualModel


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
        else:
            self._keys[:, self._n : end], self._values[:, self._n : end] = keys, values
        self._n = end
        return self._keys[:, :end], self._values[:, :end]

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
