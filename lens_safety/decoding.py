"""Decoding: the text that follows prompts, with a key/value cache and prompts that are run once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import tokens as tok
from .kv_cache import Cache, SharedPrefix, cache_options, n_shared
from .models import (
    borrowed,
    device_of,
    end_of_text_ids,
    engine_of,
    full_cache,
    n_hooks,
    unembedding_few,
    unembedding_only,
)
from .progress import track
from .prompts import PromptSet, as_prompts
from .types import OptionError, ResidualModel, Tokens

PAD = -(2**31)
"""The place of a pad in a pass over prompts: neither of the prompt's last tokens nor generated."""

_FEW = 16
"""Rows up to which a matrix product with the unembedding is faster the other way round."""

Choose = Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]]


@dataclass
class Pass:
    """What a hook may want to know of the forward pass that runs.

    Attributes:
        place: each position's number among the generated tokens: 0 is the first of them, -1 the last
            token of the prompt. One row for all, or one for each row of the pass.
        content: the prompts' content tokens; False on generated ones.
        rows: which row of the pass each row of the batch is, where equal prompts are run once; a hook
            that tells rows apart takes `fan_out(resid)` first, which later blocks then see.
        running: rows whose text has not ended.
    """

    place: Int[Tensor, "#batch pos"]
    content: Bool[Tensor, "#batch pos"]
    rows: Int[Tensor, " row"] | None = None
    running: Bool[Tensor, " row"] | None = None

    def fan_out(self, values: Tensor) -> Tensor:
        """A row for each row of the batch, from a row for each prompt that is run (or as they are)."""
        if self.rows is None or len(values) == len(self.rows):
            return values
        return values[self.rows.to(values.device)]


@dataclass(frozen=True)
class RowsApart:
    """What hooks ask of the passes that they see.

    `prompts` and `continuations` say where they tell the rows of a prompt apart, in a pass over prompts and
    in one over prompts with their continuations: "never"; "inside" the pass, after `fan_out`; or from the
    "start", so that equal prompts are run as often as they are given. `whole`: they look at a prompt as a
    whole, so that none of it may be run ahead. `n_hooks` is how many they are.
    """

    prompts: str = "never"
    continuations: str = "never"
    whole: bool = False
    n_hooks: int = 0

    def beside(self, other: "RowsApart") -> "RowsApart":
        """What both ask together."""
        order = ("never", "inside", "start")
        return RowsApart(
            max(self.prompts, other.prompts, key=order.index),
            max(self.continuations, other.continuations, key=order.index),
            self.whole or other.whole,
            self.n_hooks + other.n_hooks,
        )


_current: ContextVar[Pass | None] = ContextVar("current_pass", default=None)
_apart: ContextVar["RowsApart"] = ContextVar("rows_apart")


def current_pass(n_positions: int) -> Pass:
    """The pass that runs. In a call from outside this package several positions are a prompt, whose first
    token is not content, and one position is a generated token."""
    known = _current.get()
    if known is not None:
        return known
    place = torch.arange(n_positions)[None] - (n_positions if n_positions > 1 else 0)
    content = torch.ones(1, n_positions, dtype=torch.bool)
    content[:, :1] = False
    return Pass(place, content if n_positions > 1 else torch.zeros_like(content))


def is_own_pass() -> bool:
    """Whether the pass that runs is one of this package, which knows the prompts' lengths."""
    return _current.get() is not None


@contextmanager
def this_pass(one: Pass) -> Iterator[None]:
    """Let hooks see `one` while the model runs."""
    state = _current.set(one)
    try:
        yield
    finally:
        _current.reset(state)


@contextmanager
def rows_apart(asked: RowsApart) -> Iterator[None]:
    """Say what hooks ask of the passes inside, beside those of outer contexts."""
    state = _apart.set(_asked().beside(asked))
    try:
        yield
    finally:
        _apart.reset(state)


def _asked() -> RowsApart:
    return _apart.get(RowsApart())


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
    share_prompts: bool = True,
    share_prefix: bool = True,
    progress: bool = False,
) -> list[str]:
    """The text that follows each prompt, in order, decoded in batches with a key/value cache.

    Temperature 0 is greedy; above it tokens are sampled from softmax(logits / temperature), cut to
    the `top_k` likeliest and to the smallest set with probability `top_p`, with a generator seeded
    by `seed`. A row ends at an end-of-text or end-of-turn token. Works inside `steering`; one
    multiplier per row then needs all prompts in one batch (`batch_size=None`).

    A prompt that is given several times (to be steered several ways) is run once, up to the first block
    that the rows' steering tells apart; its keys and values are then copied to its rows. So is what all
    prompts begin with (a chat template's system message), where no steering tells it apart.

    Args:
        share_prompts: False runs every row of the prompt pass, also for a hook of your own that tells
            rows apart.
        share_prefix: False runs every prompt whole. Hooks of your own on the model see it whole anyway.

    Raises:
        PromptError: an empty prompt, or one that leaves no room in the context.
        OptionError: a negative temperature, or a length, batch size, top_k or top_p out of range.
    """
    prompts = as_prompts(prompts)
    choose = _chooser(max_new_tokens, temperature, top_k, top_p, seed)
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size={batch_size} given, expected 1 or more")
    encoded = tok.encode(model, prompts.texts, template=template, reserve=max_new_tokens)
    size = batch_size or len(encoded)
    texts: list[str] = []
    starts = range(0, len(encoded), size)
    for start in track(starts, "generating", progress):
        part = encoded[start : start + size]
        columns = list(_decode(model, part, max_new_tokens, choose, share_prompts, share_prefix))
        texts += _texts(model.tokenizer, columns)
    return texts


def stream(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    template: tok.Template = "auto",
    share_prompts: bool = True,
    share_prefix: bool = True,
) -> Iterator[list[str]]:
    """What `generate` gives, as it is written: after each token the new piece of each row's text.

    Arguments as there. The pieces of a row join to the text that `generate` returns; a piece is empty while
    a character is unfinished or a row has ended. Keep a `steering` context open until the last piece.
    """
    prompts = as_prompts(prompts)
    choose = _chooser(max_new_tokens, temperature, top_k, top_p, seed)
    encoded = tok.encode(model, prompts.texts, template=template, reserve=max_new_tokens)
    columns: list[Tensor] = []
    shown = [""] * len(encoded)
    for column in _decode(model, encoded, max_new_tokens, choose, share_prompts, share_prefix):
        columns.append(column)
        # Half of a character that takes several tokens decodes to this sign.
        whole = [text.rstrip("\ufffd") for text in _texts(model.tokenizer, columns)]
        yield [text[len(before) :] for text, before in zip(whole, shown, strict=True)]
        shown = [max(pair, key=len) for pair in zip(whole, shown, strict=True)]
    last = _texts(model.tokenizer, columns)
    if any(len(text) > len(before) for text, before in zip(last, shown, strict=True)):
        yield [text[len(before) :] for text, before in zip(last, shown, strict=True)]


def next_token_logits(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    *,
    template: tok.Template = "auto",
    share_prompts: bool = True,
    share_prefix: bool = True,
) -> Float[Tensor, "prompt d_vocab"]:
    """The logits of the first token after each prompt, in order; of the steered model inside `steering`.

    `share_prompts` and `share_prefix` as in `generate`.
    """
    encoded = tok.encode(model, as_prompts(prompts).texts, template=template)
    decoding = Decoding(model, encoded, share=share_prompts, share_prefix=share_prefix)
    return decoding.prefill(room=0)


def continuation_nll(
    model: ResidualModel,
    prompts: PromptSet | Sequence[str],
    continuations: Sequence[str],
    *,
    template: tok.Template = "auto",
    batch_tokens: int = 1024,
    share_prefix: bool = True,
) -> Float[np.ndarray, " prompt"]:
    """Mean negative log-likelihood, in nats a token, of each continuation after its prompt.

    Outside `steering` this is what a steered text costs under the unsteered model; inside it the tokens
    of a continuation count as generated ones. NaN where a continuation is empty. `share_prefix` as in
    `generate`.
    """
    prompts = as_prompts(prompts)
    if len(prompts) != len(continuations):
        raise OptionError(f"{len(prompts)} prompts and {len(continuations)} continuations given")
    encoded, starts = tok.encode_pairs(model, prompts.texts, continuations, template=template)
    n_new = np.array([len(one) - start for one, start in zip(encoded, starts, strict=True)])
    nll = np.full(len(encoded), np.nan)
    if not n_new.any():
        return nll
    size = max(1, batch_tokens // int(n_new.max()))
    order = list(range(len(encoded)))
    if len(encoded) > size:
        # Rows of one prompt together, so that it is run once. One batch keeps the order that steering knows.
        place = {text: number for number, text in enumerate(dict.fromkeys(prompts.texts))}
        order = sorted(np.flatnonzero(n_new).tolist(), key=lambda row: place[prompts.texts[row]])
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        own = [encoded[row] for row in rows]
        nll[rows] = _forced_nll(model, own, [starts[row] for row in rows], share_prefix)
    return nll


def _forced_nll(
    model: ResidualModel, encoded: Sequence[tok.Encoded], starts: Sequence[int], share_prefix: bool
) -> Float[np.ndarray, " row"]:
    """Mean negative log-likelihood of what follows each row's prompt, fed in one pass behind the prompts."""
    given = [
        tok.Encoded(one.ids[:start], one.content[:start]) for one, start in zip(encoded, starts, strict=True)
    ]
    new = [torch.from_numpy(one.ids[start:]) for one, start in zip(encoded, starts, strict=True)]
    targets = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=-1).to(device_of(model))
    decoding = Decoding(model, given, share_prefix=share_prefix)
    n = targets.shape[1]
    logits = decoding.prefill(room=n - 1)[:, None]
    if n > 1:
        # Pads stand behind every real token of their row, so that none looks at them.
        logits = torch.cat([logits, decoding.feed(targets[:, :-1].clamp_min(0))], dim=1)
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=-1, reduction="none"
    )
    return (losses.sum(dim=1) / (targets >= 0).sum(dim=1)).cpu().numpy()


def continuation_logits(
    model: ResidualModel,
    batch: tok.Batch,
    starts: Sequence[int],
    *,
    rows: Int[Tensor, " row"] | None = None,
) -> list[Float[Tensor, "new d_vocab"]]:
    """For each row the logits that predict its tokens from `starts` on, in one pass; float32.

    `rows` runs each row of the batch for several rows of a steering, as in `Pass`.
    """
    if rows is not None and not _shares(model, len(batch), _asked().continuations):
        batch, starts, rows = batch[rows], [starts[row] for row in rows.tolist()], None
    first = torch.tensor(starts, device=batch.tokens.device)
    places = torch.arange(batch.tokens.shape[1], device=first.device)[None] - first[:, None]
    longest = int((batch.lengths - first).max())
    if longest == 0:
        return [torch.empty(0, int(model.cfg.d_vocab)) for _ in (starts if rows is None else rows)]
    # Only the positions that predict a token of a continuation go through the unembedding.
    read = (first[:, None] - 1 + torch.arange(longest, device=first.device)).clamp_max(len(places[0]) - 1)
    one = Pass(places, batch.content, rows)
    logits = _logits_at(model, batch.tokens, read, one).float()
    n_new = one.fan_out(batch.lengths - first).tolist()
    return [own[:n] for own, n in zip(one.fan_out(logits), n_new, strict=True)]


def greedy_continuations(
    model: ResidualModel, texts: Sequence[str], n_tokens: int, *, template: tok.Template = "auto"
) -> tuple[list[tok.Encoded], list[int]]:
    """Each prompt followed by the model's own greedy continuation, and where that starts.

    The continuation of a text that ends at once is its end.
    """
    choose = _chooser(n_tokens, 0.0, None, None, 0)
    encoded = tok.encode(model, texts, template=template, reserve=n_tokens)
    made = torch.stack(list(_decode(model, encoded, n_tokens, choose)), dim=1).cpu().numpy()
    end = end_of_text_ids(model.tokenizer)[:1]
    return [
        tok.Encoded(
            np.concatenate([one.ids, new := row[row >= 0] if row[0] >= 0 else np.array(end)]),
            np.concatenate([one.content, np.zeros(len(new), dtype=bool)]),
        )
        for one, row in zip(encoded, made, strict=True)
    ], [len(one) for one in encoded]


class Decoding:
    """Prompts being continued with a key/value cache, on either engine.

    Equal prompts are run once, and so is the beginning that all of them share. The prompt pass is padded on
    the right, so that it needs no mask. Its keys and values are then moved to the right end, so that new
    tokens follow each row's own and pads count for nothing.
    """

    def __init__(
        self,
        model: ResidualModel,
        encoded: Sequence[tok.Encoded],
        *,
        share: bool = True,
        share_prefix: bool = True,
    ):
        self._model = model
        self._hooked = engine_of(model) == "hooked"
        keys = [one.ids.tobytes() for one in encoded]
        first = {key: keys.index(key) for key in dict.fromkeys(keys)}
        run, self._rows = list(range(len(keys))), None
        if share and len(first) < len(keys) and _shares(model, len(first), _asked().prompts):
            run = list(first.values())
            self._rows = torch.tensor([run.index(first[key]) for key in keys], device=device_of(model))
        asked = _asked()
        # Hooks of the caller may tell places apart.
        ahead = share and share_prefix and asked.prompts == "never" and not asked.whole
        ahead = ahead and n_hooks(model) == asked.n_hooks
        self._n_ahead = n_shared([encoded[row] for row in run]) if ahead else 0
        self._ahead = encoded[0].first(self._n_ahead)
        self._batch = tok.pad(model, [one.after(self._n_ahead) for one in encoded], run)
        self._longest = self._n_ahead + self._batch.tokens.shape[1]
        self.running = torch.ones(len(encoded), dtype=torch.bool, device=device_of(model))

    def prefill(self, room: int) -> Float[Tensor, "batch d_vocab"]:
        """Run the prompts; the next-token logits of every row. `room` new tokens may follow."""
        batch, real = self._batch, tok.real_tokens(self._batch)
        places = torch.arange(real.shape[1], device=real.device) - batch.lengths[:, None]
        one = Pass(torch.where(real, places, PAD), batch.content, self._rows, self.running)
        self._cache = self._begun()
        logits = _logits_at(
            self._model,
            batch.tokens,
            batch.lengths[:, None] - 1,
            one,
            cache_options(self._cache, batch.tokens, n_before=self._n_ahead),
        )
        lengths = one.fan_out(batch.lengths) + self._n_ahead
        pads = self._longest - lengths[:, None]
        self._mask = torch.arange(self._longest, device=lengths.device)[None] >= pads
        if room:
            self._lay_out(pads, room)
        return one.fan_out(logits)[:, 0]

    def _begun(self) -> Any:
        """The cache that the prompt pass fills, with what all prompts begin with already in it."""
        n_rows = len(self._batch)
        if not self._n_ahead:
            return Cache(self._model, n_rows) if self._hooked else full_cache()
        tokens = torch.from_numpy(self._ahead.ids)[None].to(device_of(self._model))
        content = torch.from_numpy(self._ahead.content)[None].to(tokens.device)
        place = torch.arange(self._n_ahead, device=tokens.device)[None] - self._longest
        with this_pass(Pass(place, content, None, self.running)):
            prefix = SharedPrefix(self._model, tokens, [], last_layer=int(self._model.cfg.n_layers) - 1)
        return prefix.continued(n_rows)

    def feed(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch new d_vocab"]:
        """Feed new tokens; the next-token logits after each of them."""
        number = self._mask.shape[1] - self._longest
        self._mask = torch.cat([self._mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        place = torch.arange(tokens.shape[1], device=tokens.device)[None] + number
        one = Pass(place, torch.zeros_like(place, dtype=torch.bool), None, self.running)
        options = cache_options(self._cache, tokens)
        if not self._hooked:
            options["attention_mask"] = self._mask.long()
            if not bool(self._mask.all()):
                options["position_ids"] = (self._mask.cumsum(dim=1) - 1)[:, -tokens.shape[1] :]
        with ExitStack() as stack:
            if self._hooked:
                stack.enter_context(self._cache.attended(self._model))
            if tokens.numel() <= _FEW:
                stack.enter_context(unembedding_few(self._model))
            stack.enter_context(this_pass(one))
            stack.enter_context(borrowed(self._model))
            return _call(self._model, tokens, options)

    def _lay_out(self, pads: Int[Tensor, "row 1"], room: int) -> None:
        """A row of keys and values for each row of the batch, pads on the left."""
        longest = self._longest
        order = (torch.arange(longest, device=pads.device) - pads) % longest

        def laid(values: Tensor, pos: int) -> Tensor:
            rows = values if self._rows is None or len(values) == len(self._rows) else values[self._rows]
            if not bool(pads.any()):
                return rows
            shape = [len(rows), 1, 1, 1]
            shape[pos] = longest
            return rows.gather(pos, order.view(shape).expand(rows.shape))

        if self._hooked:
            self._cache.lay_out(lambda values: laid(values, 1), self._mask, room)
            return
        for layer in self._cache.layers:
            layer.keys, layer.values = laid(layer.keys, 2), laid(layer.values, 2)


def _shares(model: ResidualModel, n_unique: int, where: str) -> bool:
    """Whether prompts may be run once: not where hooks tell rows apart at once, nor on the bridge inside a
    pass over several prompts, whose mask has a row for each."""
    return where == "never" or (where == "inside" and (n_unique == 1 or engine_of(model) == "hooked"))


def _logits_at(
    model: ResidualModel,
    tokens: Tokens,
    read: Int[Tensor, "batch read"],
    one: Pass,
    options: dict[str, Any] | None = None,
) -> Float[Tensor, "row read d_vocab"]:
    """Logits at some positions of right-padded tokens; the others do not reach the unembedding."""

    def positions(n_rows: int) -> Tensor:
        return read if len(read) == n_rows else one.fan_out(read)

    with this_pass(one), borrowed(model), unembedding_only(model, positions):
        return _call(model, tokens, options or {})


def _call(model: ResidualModel, tokens: Tokens, options: dict[str, Any]) -> Float[Tensor, "row read d_vocab"]:
    return model(tokens, padding_side="right", return_type="logits", **options)


def _decode(
    model: ResidualModel,
    encoded: Sequence[tok.Encoded],
    n: int,
    choose: Choose,
    share: bool = True,
    share_prefix: bool = True,
) -> Iterator[Int[Tensor, " batch"]]:
    """The tokens of each step, -1 where a row has ended."""
    ends = torch.tensor(end_of_text_ids(model.tokenizer), device=device_of(model))
    decoding = Decoding(model, encoded, share=share, share_prefix=share_prefix)
    logits = decoding.prefill(room=n - 1)
    for step in range(n):
        chosen = choose(logits)
        decoding.running = decoding.running & ~torch.isin(chosen, ends)
        yield torch.where(decoding.running, chosen, -1)
        if step + 1 == n or not bool(decoding.running.any()):
            return
        logits = decoding.feed(chosen[:, None])[:, -1]


def _texts(tokenizer: Any, columns: Sequence[Tensor]) -> list[str]:
    rows = torch.stack(list(columns), dim=1).cpu()
    return [tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in rows]


def _chooser(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Choose:
    """What picks the next token of each row; raises `OptionError` for an option out of range."""
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens} given, expected 1 or more")
    if not 0 <= temperature < float("inf"):
        raise OptionError(f"temperature={temperature} given, expected 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise OptionError(f"top_k={top_k} given, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"top_p={top_p} given, expected above 0 and at most 1")
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: _choose(logits, temperature, top_k, top_p, generator)


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Int[Tensor, " batch"]:
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
