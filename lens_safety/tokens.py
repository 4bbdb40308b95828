"""From texts to token batches: the chat template, which tokens are content, which are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .models import device_of, sent_to
from .types import OptionError, PromptError, ResidualModel, TokenMask, Tokens, one_of

Template = str | Callable[[str], str]
Position = str | int | Callable[[np.ndarray, np.ndarray], "int | np.ndarray"]

TEMPLATES = ("auto", "chat", "raw")
POSITIONS = ("content_mean", "content_last", "last", "max")

# Llama 3's template writes today's date; a fixed one keeps a vector from changing overnight.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Encoded:
    """One prompt as token ids, with the mask of its content tokens.

    Content is the user's own text: no template, no special token, and never position 0, which is an
    attention sink with a norm far above the others.
    """

    ids: Int[np.ndarray, " pos"]
    content: Bool[np.ndarray, " pos"]

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, n: int) -> "Encoded":
        """The first n tokens."""
        return Encoded(self.ids[:n], self.content[:n])

    def after(self, n: int) -> "Encoded":
        """What follows the first n tokens."""
        return Encoded(self.ids[n:], self.content[n:])


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens of some prompts; `rows` says which, by their number in the prompt set."""

    tokens: Tokens
    content: TokenMask
    lengths: Int[Tensor, " batch"]
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def halves(self) -> "tuple[Batch, Batch]":
        middle = len(self) // 2
        return self._part(slice(0, middle)), self._part(slice(middle, None))

    def __getitem__(self, rows: Int[Tensor, " row"]) -> "Batch":
        """A batch of these rows, each as often as it is named."""
        numbers = tuple(self.rows[row] for row in rows.tolist())
        return Batch(self.tokens[rows], self.content[rows], self.lengths[rows], numbers)

    def _part(self, part: slice) -> "Batch":
        longest = int(self.lengths[part].max())
        return Batch(
            self.tokens[part, :longest],
            self.content[part, :longest],
            self.lengths[part],
            self.rows[part],
        )


def encode(
    model: ResidualModel,
    texts: Sequence[str],
    *,
    template: Template = "auto",
    truncate: bool = False,
    reserve: int = 0,
) -> list[Encoded]:
    """Token ids and content mask of each text. The caller's tokenizer is left as it was.

    Args:
        template: "chat" renders the text as one user message with the generation prompt, "raw" takes
            it as it is (after a BOS token, or a newline where the tokenizer adds none), "auto" is
            "chat" where the tokenizer has a chat template; a callable renders the text itself and
            must keep it whole.
        truncate: cut the end of a content that is too long for the context, instead of refusing.
        reserve: tokens to leave free at the end of the context (for generation).

    Raises:
        PromptError: a prompt longer than the context, or without any content token.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PromptError("the model has no tokenizer: expected one, to turn prompts into tokens")
    render = _renderer(tokenizer, template)
    limit = int(model.cfg.n_ctx) - reserve
    encoded = [_encode_one(tokenizer, text, *render(text)) for text in texts]
    for number, (text, one) in enumerate(zip(texts, encoded, strict=True)):
        if not one.content.any():
            raise PromptError(
                f"prompt {number} {text[:60]!r} has no content token (only special tokens or blanks); "
                "leave it out"
            )
        if len(one) > limit:
            if not truncate:
                raise PromptError(
                    f"prompt {number} {text[:60]!r} has {len(one)} tokens, the context holds {limit}"
                    f"{f' beside {reserve} new ones' if reserve else ''}; shorten it"
                    f"{'' if reserve else ' or pass truncate=True'}"
                )
            encoded[number] = _cut(one, limit)
    return encoded


def encode_pairs(
    model: ResidualModel,
    texts: Sequence[str],
    continuations: Sequence[str],
    *,
    template: Template = "auto",
) -> tuple[list[Encoded], list[int]]:
    """Each text as `encode` gives it, followed by its continuation's tokens; and where those start."""
    tokenizer = model.tokenizer
    limit = int(model.cfg.n_ctx)
    joined, starts = [], []
    for one, continuation in zip(encode(model, texts, template=template), continuations, strict=True):
        more = np.array(tokenizer(continuation, add_special_tokens=False)["input_ids"], dtype=np.int64)
        ids = np.concatenate([one.ids, more])
        if len(ids) > limit:
            raise PromptError(
                f"{continuation[:60]!r} and its prompt have {len(ids)} tokens, the context holds {limit}; "
                "shorten one of them"
            )
        joined.append(Encoded(ids, np.concatenate([one.content, np.zeros(len(more), dtype=bool)])))
        starts.append(len(one))
    return joined, starts


def template_name(model: ResidualModel, template: Template) -> str:
    """What "auto" resolves to, or the name of a callable: recorded with everything that is saved."""
    if callable(template):
        return f"callable {getattr(template, '__qualname__', repr(template))}"
    one_of(template, TEMPLATES, "template")
    has_chat = bool(getattr(model.tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise OptionError("template='chat' given, but the tokenizer has no chat template; use 'raw'")
    return ("chat" if has_chat else "raw") if template == "auto" else template


def position_name(position: Position) -> str:
    """The position as it is recorded, after a check that it is a known one."""
    if callable(position):
        return f"callable {getattr(position, '__qualname__', repr(position))}"
    if isinstance(position, int):
        return str(position)
    one_of(position, POSITIONS, "position (or an integer, or a callable)")
    return position


def named_position(name: str) -> Position:
    """The position that `position_name` recorded. Raises `OptionError` for a callable, which is lost."""
    _refuse_callable(name, "position")
    return int(name) if name.lstrip("-").isdigit() else name


def named_template(name: str) -> Template:
    """The template that `template_name` recorded. Raises `OptionError` for a callable, which is lost."""
    _refuse_callable(name, "template")
    return name


def _refuse_callable(name: str, what: str) -> None:
    if name.startswith("callable "):
        raise OptionError(
            f"the {what} was a {name}, which no file can hold: extract with "
            f"residual_streams(..., {what}=...) yourself and pass the cache"
        )


def weights_of(one: Encoded, position: Position) -> Float[np.ndarray, " pos"]:
    """How much each token counts in the vector that is read from a prompt; sums to 1.

    `content_mean`: 1/n on each content token. `content_last`, `last`, an integer: 1 on one token
    (negative integers count from the end). A callable gets (ids, content mask) and returns a token's
    number or a boolean mask, whose tokens are averaged. `max` has no weights.
    """
    weights = np.zeros(len(one), dtype=np.float32)
    if callable(position):
        chosen = position(one.ids, one.content)
        if not isinstance(chosen, int | np.integer):
            mask = np.asarray(chosen)
            if mask.dtype != bool or mask.shape != one.ids.shape or not mask.any():
                raise OptionError(
                    f"the position callable returned {chosen!r}: expected a token number or a boolean "
                    f"mask of {len(one)} tokens with at least one True"
                )
            weights[mask] = 1 / mask.sum()
            return weights
        position = int(chosen)
    if isinstance(position, int):
        if not -len(one) <= position < len(one):
            raise OptionError(f"position {position} given for a prompt of {len(one)} tokens")
        weights[position] = 1
    elif position == "last":
        weights[-1] = 1
    elif position == "content_last":
        weights[np.flatnonzero(one.content)[-1]] = 1
    else:
        weights[one.content] = 1 / one.content.sum()
    return weights


def batches(
    model: ResidualModel, encoded: Sequence[Encoded], *, batch_tokens: int, n_before: int = 0
) -> Iterator[Batch]:
    """Right-padded batches of prompts of like length, at most `batch_tokens` padded tokens each.

    Behind a prefix of `n_before` tokens, whose keys and values each row has too, at most so many of those.
    """
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]), reverse=True)
    while order:
        size = max(1, batch_tokens // max(len(encoded[order[0]]), n_before))
        rows, order = order[:size], order[size:]
        yield pad(model, encoded, rows)


def pad(model: ResidualModel, encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
    """One batch of the prompts with these numbers, padded on the right, on the model's device."""
    longest = max(len(encoded[row]) for row in rows)
    filler = getattr(model.tokenizer, "pad_token_id", None) or 0
    tokens = np.full((len(rows), longest), filler, dtype=np.int64)
    content = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        n = len(encoded[row])
        tokens[i, :n], content[i, :n] = encoded[row].ids, encoded[row].content
    device = device_of(model)
    lengths = torch.tensor([len(encoded[row]) for row in rows])
    return Batch(
        sent_to(torch.from_numpy(tokens), device),
        sent_to(torch.from_numpy(content), device),
        sent_to(lengths, device),
        tuple(rows),
    )


def shared_prefix(encoded: Sequence[Encoded]) -> int:
    """How many tokens all prompts begin with, short of the last one of the shortest."""
    if len(encoded) < 2:
        return 0
    n = min(len(one) for one in encoded) - 1
    same = np.all(np.stack([one.ids[:n] for one in encoded]) == encoded[0].ids[:n], axis=0)
    return n if same.all() else int(same.argmin())


def real_tokens(batch: Batch) -> TokenMask:
    """True where a token is the prompt's, False on pads."""
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return places[None, :] < batch.lengths[:, None]


def _renderer(tokenizer: Any, template: Template) -> Callable[[str], tuple[str, int, bool]]:
    """A function from a text to (rendered text, where the text starts in it, whether it is raw)."""
    if callable(template):
        return lambda text: (*_located(template(text), text), False)
    one_of(template, TEMPLATES, "template")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "raw" or (template == "auto" and not has_chat):
        return lambda text: (text, 0, True)
    if not has_chat:
        raise OptionError("template='chat' given, but the tokenizer has no chat template; use 'raw'")

    def chat(text: str) -> str:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            date_string=_DATE,
        )

    # What two texts without a common beginning share at the start is the template's own.
    pairs = zip(chat("a"), chat("b"), strict=False)
    shared = next((i for i, (x, y) in enumerate(pairs) if x != y), 0)
    return lambda text: (*_located(chat(text), text, shared), False)


def _located(rendered: str, text: str, start: int = 0) -> tuple[str, int]:
    for candidate in (text, text.strip()):
        place = rendered.find(candidate, start)
        if place >= 0:
            return rendered, place
    raise PromptError(f"the template does not keep the prompt {text[:60]!r} whole; use another template")


def _encode_one(tokenizer: Any, text: str, rendered: str, start: int, raw: bool) -> Encoded:
    out = tokenizer(rendered, add_special_tokens=raw, return_offsets_mapping=True)
    ids, offsets = np.array(out["input_ids"], dtype=np.int64), np.array(out["offset_mapping"])
    offsets = offsets.reshape(-1, 2)
    special = np.isin(ids, tokenizer.all_special_ids)
    length = len(text) if rendered.startswith(text, start) else len(text.strip())
    inside = (offsets[:, 0] < start + length) & (offsets[:, 1] > max(start, 0))
    content = inside & (offsets[:, 1] > offsets[:, 0]) & ~special
    if raw and not (len(ids) and special[0]):
        first = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids = np.concatenate([np.array(first, dtype=np.int64), ids])
        content = np.concatenate([np.zeros(len(first), dtype=bool), content])
    content[:1] = False
    return Encoded(ids, content)


def _cut(one: Encoded, limit: int) -> Encoded:
    """Drop the last content tokens until the prompt fits; what follows the content stays."""
    surplus = len(one) - limit
    content = np.flatnonzero(one.content)
    if surplus >= len(content):
        raise PromptError(f"the template alone fills the context of {limit} tokens; use 'raw'")
    keep = np.ones(len(one), dtype=bool)
    keep[content[-surplus:]] = False
    return Encoded(one.ids[keep], one.content[keep])
