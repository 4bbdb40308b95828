"""What benchmarks share: options, contenders that take turns, the file in which their figures are kept."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lens_safety.files import write_csv
from lens_safety.models import device_of, engine_of, fingerprint

PACKAGES = ("transformer-lens", "transformers", "torch")


@dataclass(frozen=True)
class Conditions:
    """Under which a figure was measured."""

    engine: str
    model: str
    n_prompts: int
    rounds: int
    threads: int
    dtype: str
    device: str
    versions: str


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` is ours over theirs, so below 1 ours took less; `asked` is what it may be.

    Seconds are medians of the rounds, memory is in MiB. `theirs` and its figures are empty for what is
    measured alone, `note` says why there are none where something could not be measured.
    """

    benchmark: str
    key: str
    ours: str
    theirs: str = ""
    seconds_ours: float | None = None
    seconds_theirs: float | None = None
    mib_ours: float | None = None
    mib_theirs: float | None = None
    ratio: float | None = None
    asked: float | None = None
    note: str = ""


COLUMNS = [field.name for kind in (Row, Conditions) for field in fields(kind)]
_SAME = ["benchmark", "key", "engine", "model", "dtype", "device"]


def options_of(doc: str | None, *, rounds: int | None = 3) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; its help is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("auto", "hooked", "bridge"), default="auto")
    parser.add_argument("--model", help="hub name, folder or .gguf file; the built-in model by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the ratios")
    parser.add_argument("--csv", type=Path, help="a file of benchmark rows to put these into")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="of which the median is taken")
    return parser


def conditions(model: Any, n_prompts: int, rounds: int) -> Conditions:
    device = device_of(model)
    return Conditions(
        engine=engine_of(model),
        model=fingerprint(model).name,
        n_prompts=n_prompts,
        rounds=rounds,
        threads=torch.get_num_threads(),
        dtype=fingerprint(model).dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each contender in each round, and what it gave in the last."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    given: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            given[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds, given


def medians_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(
    benchmark: str,
    key: str,
    medians: Mapping[str, float],
    ours: str,
    theirs: str,
    *,
    asked: float | None = None,
    note: str = "",
) -> Row:
    """The row of two contenders, of which either may be missing."""
    seconds = medians.get(ours), medians.get(theirs)
    ratio = None if seconds[0] is None or seconds[1] is None else round(seconds[0] / seconds[1], 3)
    return Row(benchmark, key, ours, theirs, *map(rounded, seconds), ratio=ratio, asked=asked, note=note)


def rounded(seconds: float | None) -> float | None:
    """To four digits: what one run says of the next is less than that."""
    return None if seconds is None else float(f"{seconds:.4g}")


def keep(path: Path | None, rows: Sequence[Row], under: Conditions) -> None:
    """Put rows into the file, in the place of those of the same comparison; None keeps them nowhere."""
    if path is None:
        return
    made = pd.DataFrame([asdict(row) | asdict(under) for row in rows], columns=COLUMNS)
    if path.is_file():
        before = pd.read_csv(path)
        again = set(made[_SAME].itertuples(index=False, name=None))
        others = [key not in again for key in before[_SAME].itertuples(index=False, name=None)]
        # A column that is empty on one side would make pandas doubt the type of both.
        made = pd.concat([before.loc[others].astype(object), made.astype(object)])
    write_csv(path, made)
    print(f"{len(rows)} rows in {path}", file=sys.stderr)
