"""How a result shows itself in a notebook: what it is, a small table, the call that comes next."""

from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

ROWS = 12
"""The longest table that a result shows of itself."""

_LONGEST = 90


def card(
    what: str,
    frame: pd.DataFrame,
    step: str,
    *,
    columns: Sequence[str] | None = None,
    of: int | None = None,
    index: bool = False,
    note: str = "",
) -> str:
    """HTML of a line, a table of at most 12 rows, intervals beside their estimates, and the next call.

    `of`: how many rows the whole table has, where `frame` is a choice of them. Texts are escaped.
    """
    total = len(frame) if of is None else of
    shown = as_text(frame.head(ROWS), columns)
    notes = [note] if note else []
    if total > len(shown):
        notes.append(f"{len(shown)} of {total} rows")
    with pd.option_context("display.max_colwidth", None, "display.max_columns", None):
        # Escaped text holds no "<td>", so this touches the cells alone; Jupyter would align them right.
        table = shown.to_html(index=index, border=0, justify="left")
    table = table.replace("<td>", '<td style="text-align: left">')
    small = f"<p><small>{escape('; '.join(notes))}</small></p>" if notes else ""
    return f"<p>{escape(what)}</p>{table}{small}<p>Next: <code>{escape(step)}</code></p>"


def spread(frame: pd.DataFrame, *kept: int) -> pd.DataFrame:
    """At most 12 rows, evenly spaced from the first to the last, the rows `kept` (by place) among them."""
    if len(frame) <= ROWS:
        return frame
    return frame.iloc[sorted({*places(len(frame), ROWS - len(kept)), *kept})]


def places(n: int, most: int = ROWS) -> list[int]:
    """At most `most` numbers below n, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()


def as_text(frame: pd.DataFrame, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Columns as text; `x`, `x_low` and `x_high` become one, such as "0.83 [0.81, 0.85]"."""
    names = [str(name) for name in frame.columns]
    bounds = {f"{name}_{end}" for name in names for end in ("low", "high")}
    wanted = [name for name in names if name not in bounds] if columns is None else columns
    made = {}
    for name in wanted:
        given = [frame[one].to_numpy() for one in (name, f"{name}_low", f"{name}_high") if one in names]
        made[name] = _with_interval(*given) if len(given) == 3 else [_cell(value) for value in given[0]]
    return pd.DataFrame(made, index=frame.index)


def properties(**values: object) -> pd.DataFrame:
    """A table of one row a property, for results that are no table."""
    names = [name.replace("_", " ") for name in values]
    return pd.DataFrame({"": names, "is": [_cell(value) for value in values.values()]})


def spans(numbers: Sequence[int]) -> str:
    """Numbers in a few words: "0 to 29" where none is left out, else "3, 7, 9"."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def plain(value: float) -> str:
    """Three digits that count; a dash for what is not defined."""
    if not np.isfinite(value):
        return "—" if np.isnan(value) else str(value)
    if 0 < abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(max(digits, 0), 5)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _with_interval(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[str]:
    digits = _digits(high - low)
    rows = zip(values, low, high, strict=True)
    return ["—" if np.isnan(v) else f"{v:.{digits}f} [{a:.{digits}f}, {b:.{digits}f}]" for v, a, b in rows]


def _digits(widths: np.ndarray) -> int:
    """As many as tell the ends of a usual interval of the column apart."""
    known = widths[np.isfinite(widths) & (widths > 0)]
    return 2 if not len(known) else int(np.clip(-np.floor(np.log10(np.median(known))), 2, 4))


def _cell(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return plain(float(value))
    if value is None:
        return "—"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
