"""Prompts with labels, and what keeps them honest: groups that no split may cut."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd
from jaxtyping import Int

from .files import write_text
from .public_sets import DATA_VARIABLE, PUBLIC_SETS, PublicSet, cached_path, digest_of, fetch
from .show import card, pick
from .types import Labels, PromptError

BUILT_IN = (
    "content",
    "validation",
    "adversarial",
    "contrast",
    "categories",
    "languages",
    "instructions",
    "personas",
    "neutral",
    "sentiment",
    "openings",
)
"""The authored sets. Their cards are in the README."""

_TRUE = {"true", "1", "dangerous"}
_FALSE = {"false", "0", "safe"}


@dataclass(frozen=True)
class Prompt:
    """One text. `label` True = dangerous, None = unknown.

    `group` names the prompts that stay on one side of a split (pairs, rewordings); `kind` is the
    prompt's type in reports (standard, borderline, idiom, ...); `small` marks the 25 + 25 subset.
    """

    text: str
    label: bool | None = None
    category: str = ""
    group: str = ""
    language: str = "en"
    source: str = ""
    kind: str = "standard"
    small: bool = False


@dataclass(frozen=True)
class PromptSet:
    """An ordered, immutable set of prompts. Indexing with a slice, mask or rows gives a `PromptSet`."""

    prompts: tuple[Prompt, ...]
    name: str = "prompts"

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, rows: int) -> Prompt: ...
    @overload
    def __getitem__(self, rows: "slice | Sequence[int] | np.ndarray") -> "PromptSet": ...
    def __getitem__(self, rows: "int | slice | Sequence[int] | np.ndarray") -> "Prompt | PromptSet":
        if isinstance(rows, int):
            return self.prompts[rows]
        chosen = np.arange(len(self))[rows]
        return replace(self, prompts=tuple(self.prompts[i] for i in chosen))

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def is_labelled(self) -> bool:
        return all(prompt.label is not None for prompt in self.prompts)

    @property
    def labels(self) -> Labels:
        """True = dangerous. Raises `PromptError` where a label is unknown."""
        for prompt in self.prompts:
            if prompt.label is None:
                raise PromptError(
                    f"prompt {prompt.text[:60]!r} of {self.name} has no label: expected every prompt "
                    "to be labelled safe or dangerous (a PromptSet, or a file with a label column)"
                )
        return np.array([prompt.label for prompt in self.prompts], dtype=bool)

    @property
    def groups(self) -> Int[np.ndarray, " prompt"]:
        """A number per prompt, equal inside a group; a prompt without a group is its own."""
        names: dict[str, int] = {}
        keys = [f"g:{p.group}" if p.group else f"t:{p.text}" for p in self.prompts]
        return np.array([names.setdefault(key, len(names)) for key in keys], dtype=np.int64)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(prompt.kind for prompt in self.prompts)

    @property
    def text_digests(self) -> tuple[str, ...]:
        """16 hexadecimal digits of each text's sha256, sorted: to know a text again without keeping it."""
        return tuple(sorted({hashlib.sha256(text.encode()).hexdigest()[:16] for text in self.texts}))

    @property
    def digest(self) -> str:
        """sha256 of texts and labels, in order."""
        return digest_of((prompt.text, prompt.label) for prompt in self.prompts)

    def small(self) -> "PromptSet":
        """The rows marked as the small set (25 + 25 in `content`)."""
        return self[np.array([prompt.small for prompt in self.prompts], dtype=bool)]

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame([asdict(prompt) for prompt in self.prompts])

    def _repr_html_(self) -> str:
        named = {True: "dangerous", False: "safe", None: "no label"}
        frame = self.to_frame().assign(label=[named[prompt.label] for prompt in self.prompts])
        counts = ", ".join(f"{n} {label}" for label, n in frame["label"].value_counts().items())
        told = [
            name
            for name in ("kind", "category", "language", "source")
            if len({getattr(prompt, name) for prompt in self.prompts}) > 1
        ]
        return card(
            f"{self.name}: {len(self)} prompts ({counts})",
            pick(frame, "text", "label", *told),
            "ls.residual_streams(model, prompts)",
        )

    def save(self, path: str | Path) -> Path:
        """Write JSON Lines, one prompt a line."""
        lines = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in self.prompts]
        return write_text(path, "".join(line + "\n" for line in lines))

    @property
    def groups_of_rarer_class(self) -> int:
        """How many groups hold a prompt of the rarer class: the most folds that can be made."""
        labels, groups = self.labels, self.groups
        return min(len(set(groups[labels])), len(set(groups[~labels])))

    def folds(self, n: int = 5, *, seed: int = 0) -> list[Int[np.ndarray, " row"]]:
        """The held-out rows of each of `n` grouped, stratified folds (scikit-learn's StratifiedGroupKFold).

        Raises:
            PromptError: fewer than `n` groups hold a safe prompt, or a dangerous one.
        """
        from sklearn.model_selection import StratifiedGroupKFold

        labels, groups = self.labels, self.groups
        fewest = self.groups_of_rarer_class
        if fewest < n:
            raise PromptError(
                f"{self.name} has {fewest} groups of the rarer class: expected at least {n} of safe "
                f"and of dangerous prompts for {n}-fold cross-validation; add prompts"
            )
        folds = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        splits = list(folds.split(labels, labels, groups))
        if any(len(set(labels[fitting])) < 2 for fitting, _ in splits):
            raise PromptError(
                f"the groups of {self.name} are so uneven that a fold leaves one class only to fit on: "
                "expected both classes outside every fold; make the groups smaller or add prompts"
            )
        return [held for _, held in splits]

    def split(self, *, seed: int = 0) -> "tuple[PromptSet, PromptSet]":
        """Two halves, stratified by label, with no group in both."""
        held = self.folds(2, seed=seed)[0]
        mask = np.zeros(len(self), dtype=bool)
        mask[held] = True
        return self[~mask], self[mask]


def as_prompts(prompts: "PromptSet | Sequence[str]") -> PromptSet:
    """A `PromptSet` as it is; strings become prompts with unknown labels.

    Raises:
        PromptError: no prompts, a lone string, an empty text, or one with half a character.
    """
    if isinstance(prompts, str):
        raise PromptError(f"expected a list of prompts, given one string: pass [{prompts[:40]!r}]")
    if not isinstance(prompts, PromptSet):
        prompts = PromptSet(tuple(Prompt(text) for text in prompts))
    if not prompts.prompts:
        raise PromptError(f"{prompts.name} holds no prompts: expected at least one")
    for number, prompt in enumerate(prompts.prompts):
        if not prompt.text.strip():
            raise PromptError(f"prompt {number} of {prompts.name} is empty: expected text; leave it out")
        if any("\ud800" <= character <= "\udfff" for character in prompt.text):
            raise PromptError(
                f"prompt {number} of {prompts.name} holds half a character (a lone surrogate, as "
                f"escapes that were cut leave it): {prompt.text[:40]!r}; mend it or leave it out"
            )
    return prompts


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """A built-in set, a file of your own, a set in the folder that LENS_SAFETY_DATA names, or a public set.

    A public set (`public_sets()` lists them) comes from that folder, else from the user's cache, else it is
    downloaded from where it was published, checked and cached.

    Files are JSON Lines (`.jsonl`) or CSV (`.csv`) with at least `text`, and `label` as true/false,
    1/0 or safe/dangerous (may be absent); other columns of `Prompt` are read where they stand.

    Raises:
        PromptError: nothing of that name; or, with file and line, empty text, an unknown label, one
            text with opposite labels, undecodable bytes, or a line that is no JSON object; or a public
            set that is not here and cannot be fetched.
    """
    name = str(name_or_path)
    if name in BUILT_IN:
        return _read(Path(str(package_files("lens_safety") / "prompt_sets" / f"{name}.jsonl")))
    if Path(name).is_file():
        return _read(Path(name))
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        for candidate in (Path(folder) / name, Path(folder) / f"{name}.jsonl"):
            if candidate.is_file():
                return _read(candidate)
    entry = PUBLIC_SETS.get(name.removesuffix(".jsonl"))
    if entry is not None:
        kept = _cached(entry)
        return _read(fetch(entry)) if kept is None else kept
    looked = f"no file {name} in {DATA_VARIABLE}={folder}" if folder else f"{DATA_VARIABLE} is not set"
    raise PromptError(
        f"no prompts {name!r}: expected a built-in set ({', '.join(BUILT_IN)}), a .jsonl or .csv file, "
        "a public set (public_sets() lists them), or the name of a file in the folder that "
        f"{DATA_VARIABLE} names ({looked})"
    )


def _cached(entry: PublicSet) -> PromptSet | None:
    """The cached copy of a public set; None where there is none, or one that is no longer what was kept."""
    path = cached_path(entry.name)
    if not path.is_file():
        return None
    try:
        prompts = _read(path)
    except PromptError:
        return None
    return prompts if prompts.digest == entry.digest else None


def _read(path: Path) -> PromptSet:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path} line {line}: bytes that are not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error})") from error
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)
    prompts: list[Prompt] = []
    seen: dict[str, tuple[bool | None, int]] = {}
    for line, row in rows:
        prompt = _prompt(path, line, row)
        label, first = seen.setdefault(prompt.text, (prompt.label, line))
        if label != prompt.label:
            raise PromptError(
                f"{path} line {line}: the same text stands on line {first} with another label; keep one"
            )
        prompts.append(prompt)
    if not prompts:
        raise PromptError(f"{path} line 1: no prompts in the file; expected at least one row")
    return PromptSet(tuple(prompts), name=path.stem)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"{path} line {line}: not JSON ({error.msg}); expected one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise PromptError(f"{path} line {line}: expected a JSON object with a text field")
        yield line, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        columns = next(reader, [])
        if "text" not in columns:
            raise PromptError(f"{path} line 1: columns {', '.join(columns) or 'none'}; expected text, label")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield line, dict(zip(columns, cells, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise PromptError(f"{path} line {line}: not CSV ({error})") from error


def _prompt(path: Path, line: int, row: dict) -> Prompt:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{path} line {line}: empty or missing text; fill it in or drop the row")
    extra = {
        field.name: str(row[field.name])
        for field in fields(Prompt)
        if field.name not in ("text", "label", "small") and row.get(field.name) not in (None, "")
    }
    small = str(row.get("small", "")).lower() == "true"
    return Prompt(text=text, label=_label(path, line, row.get("label")), small=small, **extra)


def _label(path: Path, line: int, given: object) -> bool | None:
    if given is None:
        return None
    word = str(given).strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise PromptError(
        f"{path} line {line}: unknown label {given!r}; expected true/false, 1/0 or safe/dangerous"
    )
