"""A pretended GPU: tensors that say they are on "cuda" and are computed on the CPU.

Nothing but a copy moves values between the two, and mixing them fails as it fails on a GPU, so that code
that forgets on which device a tensor is fails here too. What it cannot show is speed, or whether a copy that
is not waited for has arrived.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Far(torch.Tensor):
    """A tensor on the pretended GPU; `near` has its values. To torch's C++ it is one without values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device("meta"),
        )
        made.near = near
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.near!r})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Created(TorchDispatchMode):
    """Lets functions that create tensors create them there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_far(kwargs.get("device")) or any(isinstance(x, Far) for x in tree_flatten((args, kwargs))[0]):
            with _disable_current_modes():
                return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    far = any(isinstance(x, Far) for x in tensors)
    if far and name not in _COPIES:
        indexing = name in _INDEXED
        if indexing and not isinstance(args[0], Far):
            raise RuntimeError(f"{name}: indices on the GPU given for a tensor on the CPU")
        if not indexing and any(not isinstance(x, Far) and x.dim() for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    given = dict(kwargs)
    device = given.get("device")
    if device is not None:
        given["device"] = torch.device("cpu")
    given.pop("pin_memory", None)
    found = func(*tree_map(_near, args), **tree_map(_near, given))
    if name.endswith("_"):
        return args[0]
    if not (far if device is None else _is_far(device)):
        return found
    return tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, found)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Tensors may be made on "cuda" inside; what is pinned and what is waited for is noted as it happens."""
    seen: list[str] = []

    class Stream:
        def record_event(self) -> "Stream":
            return self

        def synchronize(self) -> None:
            seen.append("waited")

    def pin(values: Tensor) -> Tensor:
        assert not isinstance(values, Far), "only memory of the CPU can be pinned"
        seen.append("pinned")
        return values

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        patch.setattr(torch.Tensor, "pin_memory", pin)
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        try:
            with _Created():
                yield seen
        finally:
            torch._C._set_only_lift_cpu_tensors(False)  # type: ignore[attr-defined]


def moved(model: Any) -> Any:
    """The model, its weights on the pretended GPU."""
    roots = [model, *([model.original_model] if hasattr(model, "original_model") else [])]
    there: dict[int, Any] = {}
    for module in (module for root in roots for module in root.modules()):
        for tensors, made in ((module._parameters, _parameter), (module._buffers, Far)):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, Far):
                    tensors[name] = there.setdefault(id(tensor), made(tensor))
        if getattr(getattr(module, "cfg", None), "device", None) is not None:
            module.cfg.device = str(CUDA)
    return model


def _parameter(tensor: Tensor) -> Any:
    return torch.nn.Parameter(Far(tensor.data), requires_grad=False)
