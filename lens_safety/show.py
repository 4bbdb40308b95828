"""How a result shows itself in a notebook: what it is, a small table, the call that comes next."""

from html import escape
from typing import Any

import numpy as np
import pandas as pd

from .intervals import interval_text

ROWS = 12
"""The longest table that a result shows of itself."""

_LONGEST = 90


def card(what: str, frame: pd.DataFrame, step: str, *, note: str = "") -> str:
    """HTML of a line, a table of at most 12 rows, and the next call. Texts are escaped."""
    shown = frame.head(ROWS).map(_cell)
    notes = [note] if note else []
    if len(frame) > len(shown):
        notes.append(f"{len(shown)} of {len(frame)} rows")
    with pd.option_context("display.max_colwidth", None, "display.max_columns", None):
        # Escaped text holds no "<td>", so this touches the cells alone; Jupyter would align them right.
        table = shown.to_html(index=False, border=0, justify="left")
    table = table.replace("<td>", '<td style="text-align: left">')
    small = f"<p><small>{escape('; '.join(notes))}</small></p>" if notes else ""
    return f"<p>{escape(what)}</p>{table}{small}<p>Next: <code>{escape(step)}</code></p>"


def pick(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The columns that matter, an estimate and its interval (`_low`, `_high`) in one cell."""
    shown = pd.DataFrame(index=frame.index)
    for name in names:
        shown[name] = _with_interval(frame, name) if f"{name}_low" in frame else frame[name]
    return shown


def _with_interval(frame: pd.DataFrame, name: str) -> pd.Series:
    """Two digits, or three that count where the whole column is small."""
    columns = [name, f"{name}_low", f"{name}_high"]
    small = bool(np.nanmax(np.abs(frame[columns].to_numpy(dtype=float)), initial=0.0) < 0.1)
    text = _small_interval if small else interval_text
    return pd.Series([text(row, name) for _, row in frame[columns].iterrows()], index=frame.index)


def _small_interval(row: Any, name: str) -> str:
    if np.isnan(row[name]):
        return "—"
    return f"{_plain(row[name])} [{_plain(row[f'{name}_low'])}, {_plain(row[f'{name}_high'])}]"


def _plain(value: float) -> str:
    """Three digits that count; a dash for what is not defined."""
    if not np.isfinite(value):
        return "—" if np.isnan(value) else str(value)
    if 0 < abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(max(digits, 0), 5)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _cell(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return _plain(float(value))
    if value is None:
        return "—"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
