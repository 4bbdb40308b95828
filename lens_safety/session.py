"""What every analysis script needs: arguments, a model, residual streams read once, a results folder."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from . import tokens as tok
from .files import Result, building_from, read_json, write_csv, write_text
from .intervals import interval_text
from .models import fingerprint, load_model
from .prompts import DATA_VARIABLE, PromptSet, load_prompts
from .residuals import ResidualCache, residual_streams
from .responses import SteeringSweep
from .types import LensSafetyError, OptionError, ResidualModel

_INTERVAL = ("_low", "_high")
_WIDTH = 160
"""Columns of a table that is written to a file or a pipe."""


def run(main: Callable[[], None]) -> None:
    """Run an analysis: what a user can mend is one sentence on stderr and exit status 2."""
    try:
        main()
    except LensSafetyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class Session:
    """One run of an analysis: `read` prompt sets, `show` and save tables, save figures.

    Residual streams are kept in `store` and computed once a prompt, whichever script asks first. Files go
    to `results/NN_name.MODEL.csv` and `.html`.
    """

    number: str
    model: ResidualModel
    model_name: str
    results: Path
    store: Path
    seed: int
    rows: int
    _read: dict[tuple[str, str, str], ResidualCache] = field(default_factory=dict)

    @classmethod
    def start(cls, script: str, question: str | None, arguments: Sequence[str] | None = None) -> "Session":
        """Parse an analysis script's command line and load its model. `script` is the script's `__file__`."""
        parser = argparse.ArgumentParser(description=(question or "").strip().partition("\n")[0])
        parser.add_argument("--model", help="hub name, folder or .gguf file; the built-in model by default")
        parser.add_argument("--data", help=f"folder of the public data sets; default: {DATA_VARIABLE}")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results")
        parser.add_argument("--store", type=Path, default=Path("runs/residuals"), help="residual streams")
        parser.add_argument(
            "--rows", type=int, default=0, help="at most so many prompts a set (a quick look)"
        )
        given = parser.parse_args(arguments)
        if given.data:
            os.environ[DATA_VARIABLE] = given.data
        if given.rows < 0:
            parser.error(f"--rows {given.rows} given, expected a number of prompts, or 0 for all")
        model = load_model(given.model)
        shown = fingerprint(model).name.rpartition("/")[2]
        name = re.sub(r"[^a-z0-9]+", "-", shown.lower()).strip("-")
        number = Path(script).stem
        return cls(number, model, name, given.results, given.store, given.seed, given.rows)

    def prompts(self, prompts: str | PromptSet) -> PromptSet:
        """A prompt set; with `--rows` a draw of it, groups whole, labels, kinds and categories mixed."""
        chosen = load_prompts(prompts) if isinstance(prompts, str) else prompts
        return _drawn(chosen, self.rows, self.seed) if 0 < self.rows < len(chosen) else chosen

    def read(
        self,
        prompts: str | PromptSet,
        *,
        position: tok.Position = "content_mean",
        template: tok.Template = "auto",
    ) -> ResidualCache:
        """Every layer of every prompt, from the store where it is there."""
        chosen = self.prompts(prompts)
        key = (chosen.digest, tok.position_name(position), tok.template_name(self.model, template))
        if key not in self._read:
            self._read[key] = residual_streams(
                self.model, chosen, position=position, template=template, store=self.store
            )
        return self._read[key]

    @property
    def sweeps(self) -> Path:
        """The folder of sweeps, so that one that was cut short goes on."""
        return self.store.parent / "sweeps"

    def show(self, frame: pd.DataFrame, title: str, name: str = "", columns: Sequence[str] = ()) -> Path:
        """Print a table (intervals beside their estimates) and write all of its columns as CSV."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        table = Table(title=title, title_justify="left")
        shown = [c for c in columns or frame.columns if not str(c).endswith(_INTERVAL)]
        for column in shown:
            numbers = frame[column].dtype.kind in "fib"
            table.add_column(str(column).replace("_", " "), overflow="fold", no_wrap=numbers)
        for _, row in frame.iterrows():
            table.add_row(*(_cell(row, column) for column in shown))
        console.print(table)
        path = write_csv(self.path(name, "csv"), frame)
        console.print(f"[dim]{path}[/]")
        return path

    def draw(
        self,
        plot: Callable[..., Any],
        *results: Result,
        name: str = "",
        options: dict[str, Any] | None = None,
    ) -> Path:
        """Save `plot(*results, **options)`, one of `plots`, as `save_figure` does, and as JSON what it shows.

        From that file `analyses/figures.py` draws it again, without a model; it holds no texts.
        """
        recipe = {"plot": plot.__name__, "options": options or {}}
        kept = recipe | {"results": [_slim(result).as_json() for result in results]}
        write_text(self.path(name, "json"), json.dumps(_short(kept), separators=(",", ":")) + "\n")
        return self.save_figure(drawn_again(self.path(name, "json")), name)

    def save_figure(self, figure: Any, name: str = "") -> Path:
        """An HTML file that opens offline, and a PNG where the extra `figures` is installed."""
        from .plots import save_html, save_image

        path = save_html(figure, self.path(name, "html"))
        try:
            path = save_image(figure, self.path(name, "png"), width=900)
        except OptionError as error:
            print(f"no PNG: {error}", file=sys.stderr)
        Console().print(f"[dim]{path}[/]")
        return path

    @property
    def spread(self) -> list[int]:
        """About six layers from the last down to a quarter of the depth, for detectors on large sets."""
        n = int(self.model.cfg.n_layers)
        return list(range(n - 1, n // 4, -max(1, n // 7)))[::-1]

    def path(self, name: str, ending: str) -> Path:
        """Where this script's file of that name goes."""
        return self.results / f"{self.number}{f'_{name}' if name else ''}.{self.model_name}.{ending}"


def drawn_again(path: str | Path) -> Any:
    """The figure of a file that `Session.draw` wrote. Raises `FileError` for any other file."""
    from . import plots

    kept = read_json(path, "what a figure was drawn from")
    kinds = {kind.__name__: kind for kind in Result.__subclasses__()}
    with building_from(path):
        results = [kinds[values["kind"]].from_json(values, path) for values in kept["results"]]
        draw, options = vars(plots)[kept["plot"]], kept["options"]
    return draw(*results, **options)


def _slim(result: Result) -> Result:
    """A sweep without what no figure of it shows: texts, prompts (their numbers stay), flows."""
    if not isinstance(result, SteeringSweep):
        return result
    numbers = pd.factorize(result.frame["prompt"])[0]
    frame = result.frame.assign(text="", prompt=[str(number) for number in numbers])
    return replace(result, frame=frame, flow=np.zeros((len(frame), 0)), layers_read=(), norms=())


def _short(value: Any) -> Any:
    """Numbers with six digits, in whatever holds them."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_short(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _drawn(prompts: PromptSet, most: int, seed: int) -> PromptSet:
    """At most `most` prompts (one group at least): every k-th group in the order of what groups hold."""
    groups = prompts.groups
    held: dict[int, list[tuple[str, ...]]] = {}
    for group, p in zip(groups.tolist(), prompts, strict=True):
        held.setdefault(group, []).append((str(p.label), p.kind, p.category, p.language))
    rng = np.random.default_rng(seed)
    chance, start = rng.permutation(len(held)), rng.random()
    order = np.array(sorted(held, key=lambda group: (sorted(held[group]), chance[group])))

    def every(n: int) -> np.ndarray:
        return np.isin(groups, order[((np.arange(n) + start) * len(order) / n).astype(int)])

    n = next((n for n in range(min(most, len(order)), 1, -1) if every(n).sum() <= most), 1)
    return prompts[every(n)]


def _cell(row: Any, column: str) -> str:
    value = row[column]
    if isinstance(value, float):
        return interval_text(row, column) if f"{column}_low" in row else f"{value:.3g}"
    return str(value)
