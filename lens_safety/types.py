"""The words everything else is written in: axes, tensors, the model protocol, the errors.

Axis names (used in every shape):

    layer    one row per named layer, in the order of `layers`; layer L is `blocks.{L}.hook_resid_post`
    prompt   one row per prompt, in the order the prompts were given
    batch    rows of one forward pass
    pos      token positions of one forward pass
    d_model  the width of the residual stream
    d_vocab  the vocabulary
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

EMBED = -1
"""The layer number of the embedding (the input of block 0) in tables and detectors."""

Resid = Float[Tensor, "batch pos d_model"]
Tokens = Int[Tensor, "batch pos"]
TokenMask = Bool[Tensor, "batch pos"]
Scores = Float[np.ndarray, " prompt"]
Labels = Bool[np.ndarray, " prompt"]
Hook = Callable[..., Any]


@runtime_checkable
class ResidualModel(Protocol):
    """What `HookedTransformer` and `TransformerBridge` share, and all that this package asks of a model."""

    cfg: Any
    tokenizer: Any

    def hooks(self, fwd_hooks: Any = ...) -> AbstractContextManager[Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class LensSafetyError(ValueError):
    """Anything a user can mend. The message says what was given, what was expected, and what to do."""


class PromptError(LensSafetyError):
    """A prompt, a prompt file or a set of labels that cannot be used."""


class ModelError(LensSafetyError):
    """A model that cannot be found, loaded or hooked."""


class FileError(LensSafetyError):
    """A saved file that is missing, corrupted, or of another kind or version."""


class MismatchError(LensSafetyError):
    """Two things that do not belong together: a detector and another model, vectors of another width."""


class OptionError(LensSafetyError):
    """An option outside its range: a layer, a position, a method, an operator."""


def one_of(given: object, allowed: "list[str] | tuple[str, ...]", what: str) -> None:
    """Raise `OptionError` unless `given` is among `allowed`."""
    if given not in allowed:
        raise OptionError(f"unknown {what} {given!r}: expected one of {', '.join(allowed)}")
