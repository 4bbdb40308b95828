"""Residual streams on disk: what was computed once is found again, within a bound of bytes."""

import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .files import VERSION, building_from, check_kind, save_tensors
from .models import ModelFingerprint
from .show import card
from .types import EMBED, FileError, OptionError

MAX_BYTES = 5_000_000_000
"""A store's bound: about 70,000 prompts of 30 layers of width 576."""

_KIND = "stored residual streams"
_SHARD = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.safetensors")
_PARTIAL = re.compile(rf"\.{_SHARD.pattern}\..*\.partial|\.tmp[0-9A-Za-z]{{6}}")
"""Temporary files: of `files.atomic_path`, and those that safetensors itself writes and renames."""

_ABANDONED = 3600.0
"""Seconds after which a temporary file is taken for one that a killed run left behind."""


class ResidualStore:
    """A folder of residual streams, found again by the model's fingerprint, template, position and prompt.

    `residual_streams(..., store=)` looks each prompt up and runs what is missing. A batch is one
    safetensors file (a shard), whole or not at all, named by what it holds: several processes may use one
    store at once. Prompts stand in it as hashes, not as text. Rows serve every run that wants their
    layers or some of them.

    When the store is larger than `max_bytes`, the shards that were used longest ago go; never one that the
    running call has read or written: what would not fit beside those is not kept. Two processes that write
    at once may pass the bound together, until the next write. Other files in the folder are left alone.

    Raises:
        FileError: the folder is a file.
        OptionError: `max_bytes` is not positive.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = MAX_BYTES):
        self.folder, self.max_bytes = Path(folder), max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise FileError(f"store {folder} is a file, expected a folder (it is made where there is none)")
        if max_bytes <= 0:
            raise OptionError(f"max_bytes={max_bytes} given, expected a positive number of bytes")

    def __repr__(self) -> str:
        return f"ResidualStore({str(self.folder)!r}, max_bytes={self.max_bytes})"

    def to_frame(self) -> pd.DataFrame:
        """A row a model, template and position, the last used first: layers, prompts, bytes, last_used (UTC).

        Raises:
            FileError: a damaged shard.
        """
        held: dict[tuple[str, str, str], list[tuple[_Shard, dict]]] = {}
        for shard in self._shards():
            if (opened := _open(shard.path)) is not None:
                header = opened[1]
                key = (header["model"], header["template"], header["position"])
                held.setdefault(key, []).append((shard, header))
        rows = [(*key, *_summary(shards)) for key, shards in held.items()]
        names = ["model", "template", "position", "layers", "prompts", "bytes", "last_used"]
        frame = pd.DataFrame(rows, columns=names)
        frame["last_used"] = pd.to_datetime(frame["last_used"], unit="ns", utc=True).dt.floor("s")
        return frame.sort_values("last_used", ascending=False, kind="stable", ignore_index=True)

    def clear(self, model: str | None = None) -> int:
        """Remove everything, or what one model (by its name) has; the bytes that were freed.

        Raises:
            OptionError: nothing of that model is here.
        """
        shards = self._shards()
        if model is None:
            return _removed(shards) + self._sweep(older_than=0.0)
        by_name: dict[str, list[_Shard]] = {}
        for shard in shards:
            if (opened := _open(shard.path)) is not None:
                by_name.setdefault(opened[1]["model"], []).append(shard)
        if model not in by_name:
            names = ", ".join(sorted(by_name)) or "it is empty"
            raise OptionError(
                f"{self.folder} holds nothing of {model!r}: expected one of its models ({names})"
            )
        return _removed(by_name[model]) + self._sweep(older_than=_ABANDONED)

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        used, bound = frame["bytes"].sum() / 1e6, self.max_bytes / 1e6
        what = f"ResidualStore {self.folder}: {used:,.1f} of {bound:,.0f} MB"
        shown = frame.assign(MB=frame["bytes"] / 1e6).drop(columns="bytes")
        return card(what, shown, "ls.residual_streams(model, prompts, store=store)")

    def _shards(self, key: str = "") -> list["_Shard"]:
        """What is here, by name; of one key where it is given."""
        return [shard for shard in self._files(_SHARD) if shard.path.name.startswith(key)]

    def _files(self, pattern: re.Pattern[str]) -> list["_Shard"]:
        found = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if pattern.fullmatch(entry.name):
                    # Another process may have removed it since it was listed.
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append(_Shard(Path(entry.path), stat.st_size, stat.st_mtime_ns))
        return sorted(found, key=lambda shard: shard.path.name)

    def _trim(self, spare: Collection[str]) -> int:
        """Remove the least recently used shards but those in `spare`, until the rest fits; its bytes."""
        self._sweep(older_than=_ABANDONED)
        shards = self._shards()
        left = sum(shard.bytes for shard in shards)
        for shard in sorted(shards, key=lambda shard: shard.used):
            if left > self.max_bytes and shard.path.name not in spare:
                _removed([shard])
                left -= shard.bytes
        return left

    def _sweep(self, *, older_than: float) -> int:
        """Remove temporary files that a killed run left behind; their bytes."""
        latest = time.time_ns() - int(older_than * 1e9)
        return _removed([file for file in self._files(_PARTIAL) if file.used <= latest])


Store = str | Path | ResidualStore
"""A store, or the folder of one."""


class StoredRows:
    """The rows of one call of `residual_streams` in a store: looked up before it, kept batch by batch.

    Raises:
        FileError: a position or template that is a callable.
    """

    def __init__(
        self,
        store: Store,
        model: ModelFingerprint,
        *,
        position: str,
        template: str,
        layers: Sequence[int],
        cut_at: int | None,
    ):
        if "callable" in position + template:
            raise FileError("store= needs a named position and template: a callable cannot be told apart")
        self._store = store if isinstance(store, ResidualStore) else ResidualStore(store)
        self._layers = list(layers)
        self._named = {"model": model.name, "position": position, "template": template}
        # The probe's last digits depend on the threads, the weights' hash does not.
        what = [VERSION, {**model.to_dict(), "probe": None}, position, template, cut_at]
        self._key = _digest(what)[:16]
        self._d_model = model.d_model
        self._used: set[str] = set()
        self._bytes: int | None = None
        self._is_full = False

    def find(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Float[Tensor, "layer row d_model"]]]:
        """(numbers of the texts, their rows) of each shard that has some of them.

        Raises:
            FileError: a damaged shard.
        """
        wanted: dict[str, list[int]] = {}
        for row, text in enumerate(texts):
            wanted.setdefault(_digest(text), []).append(row)
        for shard in self._store._shards(self._key):
            if not wanted:
                return
            opened = _open(shard.path)
            if opened is None or not set(self._layers) <= set(opened[1]["layers"]):
                continue
            file, header = opened
            found = [(i, wanted.pop(p)) for i, p in enumerate(header["prompts"]) if p in wanted]
            if found:
                self._touch(shard.path)
                places = [i for i, rows in found for _ in rows]
                yield [row for _, rows in found for row in rows], self._read(shard.path, file, header, places)

    def keep(self, texts: Sequence[str], streams: Float[Tensor, "layer row d_model"]) -> None:
        """Write a finished batch, equal texts once, where it fits.

        Raises:
            FileError: the folder cannot be written, or a value is NaN or infinite.
        """
        if self._is_full:
            return
        rows = {_digest(text): row for row, text in enumerate(texts)}
        name = f"{self._key}-{_digest([self._layers, list(rows)])[:16]}.safetensors"
        header = {**self._named, "layers": self._layers, "prompts": list(rows)}
        # A prompt's layers lie together, so that few prompts are read from few pages.
        tensor = streams[:, list(rows.values())].transpose(0, 1)
        path = self._store.folder / name
        _write(path, {"rows": tensor}, header)
        self._used.add(name)
        if self._bytes is not None:
            self._bytes += _size(path)
        if self._bytes is None or self._bytes > self._store.max_bytes:
            self._bytes = self._store._trim(self._used)
        if self._bytes > self._store.max_bytes:
            path.unlink(missing_ok=True)
            self._is_full = True

    def _read(
        self, path: Path, file: Any, header: dict, places: list[int]
    ) -> Float[Tensor, "layer row d_model"]:
        """Some prompts' rows: the file is mapped, so only they are read from it."""
        with building_from(path):
            tensor = file.get_tensor("rows")
        shape = (len(header["prompts"]), len(header["layers"]), self._d_model)
        if tuple(tensor.shape) != shape:
            raise _damaged(path, f"a tensor of shape {tuple(tensor.shape)}, its header says {shape}")
        layers = [header["layers"].index(layer) for layer in self._layers]
        return tensor[torch.tensor(places)[:, None], torch.tensor(layers)].transpose(0, 1)

    def _touch(self, path: Path) -> None:
        self._used.add(path.name)
        # It may be gone by now, or the store may be one that can only be read.
        with suppress(OSError):
            os.utime(path)


@dataclass(frozen=True)
class _Shard:
    """A file of the store; `used` is its time stamp in nanoseconds, set at each use."""

    path: Path
    bytes: int
    used: int


def _open(path: Path) -> tuple[Any, dict] | None:
    """A shard and its header, no tensor read yet; None where it has been removed since it was listed."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="pt")
        header = json.loads((file.metadata() or {})["lens_safety"])
        check_kind(path, header, _KIND)
        return file, {name: header[name] for name in ("model", "template", "position", "layers", "prompts")}
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _write(path: Path, tensors: dict[str, Tensor], header: dict) -> None:
    """`save_tensors`, and again where another process has just cleared its temporary file away."""
    from safetensors import SafetensorError

    for is_last in (False, False, True):
        try:
            save_tensors(path, _KIND, tensors, header)
            return
        except (OSError, SafetensorError) as error:
            if is_last or not isinstance(error, FileNotFoundError | SafetensorError):
                raise FileError(
                    f"store {path.parent} cannot be written ({error}): give another folder, or make room"
                ) from error


def _damaged(path: Path, why: object) -> FileError:
    return FileError(f"{path} is damaged ({why}): delete it, and its prompts are computed again")


def _removed(files: Sequence[_Shard]) -> int:
    """Remove files, those that another process was quicker to remove not counted; their bytes."""
    freed = 0
    for file in files:
        with suppress(FileNotFoundError):
            file.path.unlink()
            freed += file.bytes
    return freed


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _summary(shards: list[tuple[_Shard, dict]]) -> tuple[str, int, int, int]:
    """Layers, prompts, bytes and last use of some shards."""
    layers = {layer for _, header in shards for layer in header["layers"]} - {EMBED}
    prompts = {prompt for _, header in shards for prompt in header["prompts"]}
    files = [shard for shard, _ in shards]
    return _spans(layers), len(prompts), sum(f.bytes for f in files), max(f.used for f in files)


def _spans(layers: Collection[int]) -> str:
    """Layers as text, neighbours together: "0 to 3, 12"."""
    starts = sorted(layer for layer in layers if layer - 1 not in layers)
    ends = sorted(layer for layer in layers if layer + 1 not in layers)
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))
