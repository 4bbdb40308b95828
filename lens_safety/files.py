"""Files that are written whole or not at all: tensors with a JSON header, JSON, CSV, HTML."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor

from .types import FileError

VERSION = 1
"""Raised when the meaning of a saved file changes; other versions are refused."""

_HEADER = "lens_safety"

# `Self` would be shorter; beartype does not take it outside a class that it decorates itself.
SomeResult = TypeVar("SomeResult", bound="Result")


def cache_folder() -> Path:
    """Where converted models and fetched sets are kept: LENS_SAFETY_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("LENS_SAFETY_CACHE")
    return Path(chosen) if chosen else user_cache_path("lens_safety", appauthor=False)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it on success and vanishes on any exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, frame: pd.DataFrame) -> Path:
    """Write a table, floats with six significant digits, whole or not at all."""
    return write_text(path, frame.to_csv(index=False, float_format="%.6g"))


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict) -> Path:
    """Write tensors as safetensors, with `header` as JSON in the file's metadata.

    Raises:
        FileError: a tensor holds NaN or infinity; nothing is written then.
    """
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FileError(f"{name} holds NaN or infinity; nothing was written to {path}")
    metadata = json.dumps({"kind": kind, "version": VERSION, **header}, ensure_ascii=False)
    with atomic_path(path) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
            temporary,
            metadata={_HEADER: metadata},
        )
    return Path(path)


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_tensors` wrote, as (tensors, header).

    Raises:
        FileError: no such file, not a safetensors file, truncated, or of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileError(f"no file {path}: expected a saved {kind}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FileError(f"{path} is damaged or no safetensors file ({error}); make it again") from error
    check_kind(path, header, kind)
    return tensors, header


@contextmanager
def building_from(path: str | Path) -> Iterator[None]:
    """Turn a missing key or a wrong shape, met while building an object from `path`, into a `FileError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} does not hold what its header says ({error}); make it again") from error


class Result:
    """A frozen dataclass of a table, arrays and plain values that saves itself as one JSON file."""

    frame: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The table, yours to change."""
        return self.frame.copy()

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        return write_json(path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """What `save` writes: the kind, the version of the format, and each field."""
        values = {field.name: _encode(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__, "version": VERSION, **values}

    @classmethod
    def load(cls: type[SomeResult], path: str | Path) -> SomeResult:
        """Read what `save` wrote. Raises `FileError` for a damaged file, another kind or version."""
        values = read_json(path, f"a saved {cls.__name__}")
        return cls.from_json(values if isinstance(values, dict) else {}, path)

    @classmethod
    def from_json(cls: type[SomeResult], values: dict[str, Any], path: str | Path) -> SomeResult:
        """The result of what `as_json` gave; `path` is named where it is damaged or of another kind."""
        check_kind(path, values, cls.__name__)
        with building_from(path):
            return cls(**{field.name: _decode(values[field.name]) for field in fields(cls)})  # type: ignore[arg-type]


def read_json(path: str | Path, expected: str) -> Any:
    """The value of a JSON file. Raises `FileError` where it is missing or damaged."""
    if not Path(path).is_file():
        raise FileError(f"no file {path}: expected {expected}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise FileError(f"{path} is damaged or no JSON ({error}); make it again") from error


def check_kind(path: str | Path, header: dict, kind: str) -> None:
    """Raise `FileError` unless a file's header names this kind and this version."""
    if header.get("kind") != kind:
        raise FileError(f"{path} holds {header.get('kind', 'something else')}, expected {kind}")
    if header.get("version") != VERSION:
        raise FileError(
            f"{path} has format version {header.get('version')}, expected {VERSION}; make it again"
        )


def _encode(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        return {"frame": value.to_dict("list")}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, tuple):
        return {"tuple": list(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and "frame" in value:
        return pd.DataFrame(value["frame"])
    if isinstance(value, dict) and "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if isinstance(value, dict) and "tuple" in value:
        return tuple(value["tuple"])
    return value
