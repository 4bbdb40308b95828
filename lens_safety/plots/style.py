"""The house style, and figures as files.

Blue is safe, vermilion is dangerous, grey is a control or chance (Okabe and Ito's colour-blind safe
palette).
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from ..directions import ContentVectors
from ..files import atomic_path, write_text
from ..types import OptionError

SAFE, DANGEROUS, CONTROL, ACCENT, SECOND = "#0072B2", "#D55E00", "#8A8F98", "#009E73", "#CC79A7"
COLOURS = (SAFE, DANGEROUS, ACCENT, SECOND, CONTROL, "#E69F00")
INK, FAINT, PAPER = "#1F2933", "#E4E7EB", "#FFFFFF"
TEMPLATE = "lens_safety"
DIVERGING = [(0, SAFE), (0.5, PAPER), (1, DANGEROUS)]
CONFIG = {"responsive": True, "displayModeBar": False}
_AXIS = {
    "gridcolor": FAINT,
    "zeroline": False,
    "title": {"font": {"size": 12}, "standoff": 8},
    "tickfont": {"size": 12},
}

pio.templates[TEMPLATE] = go.layout.Template(
    layout={
        "font": {"family": "Inter, system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13},
        "font_color": INK,
        "title": {
            "font": {"size": 16},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 12, "t": 18},
        },
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "colorway": [SAFE, DANGEROUS, ACCENT, SECOND, CONTROL],
        "margin": {"l": 64, "r": 20, "b": 52},
        "xaxis": _AXIS | {"ticks": "outside", "tickcolor": CONTROL, "tickangle": 0},
        "yaxis": _AXIS | {"automargin": True},
        "annotationdefaults": {"font": {"size": 12}},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1},
        "hoverlabel": {"align": "left"},
    }
)


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """One HTML file that opens offline (plotly.js inlined)."""
    return write_text(path, figure.to_html(include_plotlyjs=True, config=CONFIG))


def save_image(figure: go.Figure, path: str | Path, *, width: int = 760, scale: float = 2.0) -> Path:
    """PNG, SVG or PDF by the path's ending; needs the extra `figures` (kaleido) and a Chromium.

    Raises `OptionError` where either is missing, or for another ending.
    """
    ending = Path(path).suffix.lstrip(".").lower()
    try:
        if ending not in ("png", "svg", "pdf"):
            raise ValueError(f"ending {ending!r}")
        with atomic_path(path) as temporary:
            temporary.write_bytes(figure.to_image(format=ending, width=width, scale=scale))
    except (ValueError, RuntimeError, ImportError) as error:
        reason = [*str(error).strip().splitlines(), type(error).__name__][0].rstrip(".,")
        raise OptionError(
            f"{path} cannot be drawn ({reason}): expected a .png, .svg or .pdf "
            "path, kaleido (pip install 'lens-safety[figures]') and an installed Chromium"
        ) from error
    return Path(path)


def fragment(figure: go.Figure, name: str) -> str:
    """The figure as an HTML element, for a page that has plotly.js already."""
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        config=CONFIG,
    )


def plotly_js() -> str:
    """The source of plotly.js, to be inlined once a page."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def styled(figure: go.Figure, title: str, note: str, height: int, *, above: int = 16) -> go.Figure:
    """House style; `above` is the room in pixels for what stands between the title and the axes."""
    lines = [""]
    for part in note.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) <= 62:
            lines[-1] = longer
        else:
            lines.append(part)
    small = "".join(f"<br><span style='font-size:12px;color:#52606D'>{line}</span>" for line in lines)
    top = 44 + 17 * len(lines) + above
    figure.update_layout(template=TEMPLATE, height=height, margin_t=top, title_text=f"<b>{title}</b>{small}")
    return figure


def line(
    figure: go.Figure,
    x: Any,
    y: Any,
    name: str,
    colour: str,
    *,
    row: int | None = None,
    dash: str = "solid",
    legend: bool = True,
) -> None:
    trace = go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines",
        line={"color": colour, "dash": dash, "width": 2},
        showlegend=legend,
        hovertemplate=f"layer %{{x}}: {name} %{{y:.3f}}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=None if row is None else 1)


def error_bar(frame: pd.DataFrame, name: str) -> dict[str, Any]:
    """The error bar of an estimate's columns."""
    return {
        "type": "data",
        "array": frame[f"{name}_high"] - frame[name],
        "arrayminus": frame[name] - frame[f"{name}_low"],
    }


def wrapped(name: str, width: int = 13) -> str:
    """A long name in several lines, broken after underscores and spaces."""
    lines = [""]
    for part in re.findall(r"[^_ ]+[_ ]?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "<br>".join(lines)


def signed(values: np.ndarray) -> list[str]:
    return [DANGEROUS if value > 0 else SAFE for value in values]


def pale(colour: str, opacity: float = 0.18) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def provenance(vectors: ContentVectors) -> str:
    return (
        f"{vectors.model.name} · {vectors.source} ({vectors.n_safe} safe, {vectors.n_dangerous} dangerous)"
        f" · {vectors.position} · orange = higher for dangerous"
    )
