"""The house style, and figures as files.

Blue is safe, vermilion is dangerous, grey is a control or chance (Okabe and Ito's colour-blind safe
palette). On dark paper the same hues are lighter.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from ..directions import ContentVectors
from ..files import atomic_path, write_text
from ..types import EMBED, OptionError, one_of

SAFE, DANGEROUS, CONTROL, ACCENT, SECOND = "#0072B2", "#D55E00", "#8A8F98", "#009E73", "#CC79A7"
SIXTH = "#E69F00"
COLOURS = (SAFE, DANGEROUS, ACCENT, SECOND, CONTROL, SIXTH)
INK, SOFT, FAINT, PAPER = "#1F2933", "#52606D", "#E4E7EB", "#FFFFFF"
_DARK = {
    SAFE: "#56B4E9",
    DANGEROUS: "#FF8A45",
    CONTROL: "#98A1AC",
    ACCENT: "#2CC295",
    SECOND: "#E5A3CB",
    SIXTH: "#F2C14E",
    INK: "#E8ECF0",
    SOFT: "#A9B4BF",
    FAINT: "#2E3843",
    PAPER: "#151B22",
}
"""What stands for each colour on dark paper: the same hue, lighter; ink and paper change places."""

TEMPLATES = {"light": "lens_safety", "dark": "lens_safety_dark"}
TEMPLATE = TEMPLATES["light"]
CONFIG = {"responsive": True, "displayModeBar": False}
_TITLE_WIDTH, _NOTE_WIDTH, _LINE = 36, 52, 21


def palette(theme: str = "light") -> dict[str, str]:
    """The theme's colour for each of the light colours. Raises `OptionError` for another theme."""
    one_of(theme, list(TEMPLATES), "theme")
    return dict(_DARK) if theme == "dark" else {colour: colour for colour in _DARK}


def diverging(theme: str = "light") -> list[tuple[float, str]]:
    """The colour scale of signed values: its middle, to be put on 0 or on chance, is the theme's paper."""
    colours = palette(theme)
    return [(0.0, colours[SAFE]), (0.5, colours[PAPER]), (1.0, colours[DANGEROUS])]


def sequential(theme: str = "light") -> list[tuple[float, str]]:
    """The colour scale of values from 0, which is the theme's paper."""
    colours = palette(theme)
    return [(0.0, colours[PAPER]), (1.0, colours[ACCENT])]


DIVERGING, SEQUENTIAL = diverging(), sequential()


def _template(theme: str) -> go.layout.Template:
    c = palette(theme)
    axis = {
        "gridcolor": c[FAINT],
        "linecolor": c[FAINT],
        "zerolinecolor": c[FAINT],
        "zeroline": False,
        "title": {"font": {"size": 12}, "standoff": 8},
        "tickfont": {"size": 12},
    }
    small = {"title": {"font": {"size": 11}}, "tickfont": {"size": 10}, "nticks": 5}
    scene = {name: small | {"backgroundcolor": c[PAPER], "gridcolor": c[FAINT]} for name in _SCENE}
    return go.layout.Template(
        layout={
            "font": {"family": "Inter, system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13},
            "font_color": c[INK],
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
            "paper_bgcolor": c[PAPER],
            "plot_bgcolor": c[PAPER],
            "colorway": [c[name] for name in COLOURS],
            "colorscale": {"diverging": diverging(theme), "sequential": sequential(theme)},
            "margin": {"l": 64, "r": 20, "b": 52},
            "xaxis": axis | {"ticks": "outside", "tickcolor": c[CONTROL], "tickangle": 0},
            "yaxis": axis | {"automargin": True},
            "scene": scene,
            "annotationdefaults": {"font": {"size": 12}},
            "legend": {"orientation": "h", "bgcolor": "rgba(0, 0, 0, 0)"},
            "sliderdefaults": {
                "bgcolor": c[FAINT],
                "bordercolor": c[CONTROL],
                "activebgcolor": c[ACCENT],
                "tickcolor": c[CONTROL],
                "font": {"size": 11},
            },
            "hoverlabel": {
                "align": "left",
                "bgcolor": c[PAPER],
                "bordercolor": c[CONTROL],
                "font": {"color": c[INK]},
            },
        }
    )


_SCENE = ("xaxis", "yaxis", "zaxis")
for _theme, _name in TEMPLATES.items():
    pio.templates[_name] = _template(_theme)


def themed(figure: go.Figure, theme: str) -> go.Figure:
    """A new figure in the theme "light" or "dark"; the given one stays as it is.

    The template changes, and so does each house colour that a trace, shape, slider or note carries.
    Raises `OptionError` for another theme.
    """
    meant = palette(theme)
    changes = {ours.lower(): meant[light] for light in meant for ours in (light, _DARK[light])}
    parts = figure.to_dict()
    layout = dict(parts["layout"])
    layout.pop("template", None)
    made = {
        "data": _recoloured(parts["data"], changes),
        "layout": _recoloured(layout, changes, notes=True),
        "frames": _recoloured(parts.get("frames", []), changes),
    }
    return go.Figure(made).update_layout(template=TEMPLATES[theme])


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
    """House style; `above` is the room in pixels for what stands between the title and the axes.

    Title and note are plain text; they break into lines that fit a page 390 pixels wide (a note best
    at its " · "). A legend stands below them and moves the axes down where it needs several rows.
    Heights: two lines of note are counted in `height`, further lines add to it.
    """
    lines = len(_title_lines(title)) + len(_note_lines(note))
    bottom = 38 + _LINE * (lines - 1)
    height += _LINE * max(0, lines - 3)
    # The clear border keeps the lowest row of the legend off what is written above the axes.
    border = 16
    legend = {"xref": "container", "x": 0, "xanchor": "left", "yref": "container", "yanchor": "top"}
    figure.update_layout(
        template=TEMPLATE,
        height=height,
        margin_t=bottom + above,
        title_text=heading(title, note),
        legend=legend | {"y": 1 - (bottom - border + 4) / height, "borderwidth": border},
        legend_bordercolor="rgba(0, 0, 0, 0)",
    )
    return figure


def heading(title: str, note: str) -> str:
    """The text of a figure's title: bold lines, then the note's in smaller, softer type."""
    bold = "<br>".join(f"<b>{escape(line, quote=False)}</b>" for line in _title_lines(title))
    style = f"font-size:12px;color:{SOFT}"
    small = (f"<br><span style='{style}'>{escape(line, quote=False)}</span>" for line in _note_lines(note))
    return bold + "".join(small)


SLIDER = 96
"""The height in pixels that a slider of layers adds to a figure."""


def layer_slider(
    figure: go.Figure, layers: Sequence[int], steps: list[tuple[dict, dict]], start: int
) -> None:
    """A slider over layers; step i changes the traces (a list an attribute) and the layout as given."""
    made = [
        {"label": layer_name(layer), "method": "update", "args": list(step)}
        for layer, step in zip(layers, steps, strict=True)
    ]
    slider = {
        "active": start,
        "steps": made,
        "currentvalue": {"prefix": "layer ", "font": {"size": 13}},
        "pad": {"t": 58, "b": 4},
        "transition": {"duration": 0},
    }
    figure.update_layout(sliders=[slider])


def chosen_layers(layer: int | Sequence[int] | None, known: Sequence[int]) -> list[int]:
    """The layers to show: one, several, or all that are known."""
    if layer is None:
        return list(known)
    return [layer] if isinstance(layer, int) else list(layer)


def layer_name(layer: int) -> str:
    return "embed" if layer == EMBED else str(layer)


def rounded(values: Any, digits: int = 4) -> list:
    """A list of the values with so many digits that the largest keeps `digits`: small in a page."""
    array = np.asarray(values, dtype=float)
    most = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    places = digits - 1 - int(np.floor(np.log10(most))) if most else 0
    return np.round(array, places).tolist()


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
    return f"{rgba(colour)}{opacity})"


def rgba(colour: str) -> str:
    """How "#0072B2" begins where an opacity follows: "rgba(0, 114, 178, "."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, "


def page_colours() -> dict[str, dict[str, str]]:
    """For each theme the colours of a page, by the names that its style sheet gives them."""
    named = {"paper": PAPER, "ink": INK, "soft": SOFT, "line": FAINT, "accent": SAFE}
    return {theme: {name: palette(theme)[colour] for name, colour in named.items()} for theme in TEMPLATES}


def templates() -> Any:
    """The package's page templates, whose texts are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lens_safety", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def provenance(vectors: ContentVectors) -> str:
    return (
        f"{vectors.model.name} · {vectors.source} ({vectors.n_safe} safe, {vectors.n_dangerous} dangerous)"
        f" · {vectors.position} · orange = higher for dangerous"
    )


def _title_lines(title: str) -> list[str]:
    return _wrapped_words(title, _TITLE_WIDTH) or [""]


def _note_lines(note: str) -> list[str]:
    """Whole parts as long as they fit a line; a part that is longer than a line breaks between words."""
    lines = [""]
    for part in note.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) <= _NOTE_WIDTH:
            lines[-1] = longer
        else:
            lines += _wrapped_words(part, _NOTE_WIDTH)
    return [line for line in lines if line] or [""]


def _wrapped_words(text: str, width: int) -> list[str]:
    """Lines of at most `width`; a name, its number and its interval stay together, as does "n = 60"."""
    kept = re.sub(r" (?=[-+]?[\d.]+ \[)| (?=\[)|(?<=\d,) (?=[-+\d])|(?<=\bn) (?==)|(?<=n =) ", "\u00a0", text)
    return [line.replace("\u00a0", " ") for line in wrap(kept, width)]


def _recoloured(value: Any, changes: dict[str, str], *, colour: bool = False, notes: bool = False) -> Any:
    """A copy with the house colours changed: in whatever is called a colour, and in the layout's notes."""
    if isinstance(value, dict):
        return {
            key: _recoloured(part, changes, colour=colour or "color" in str(key), notes=notes)
            for key, part in value.items()
        }
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_recoloured(part, changes, colour=colour, notes=notes) for part in value]
    if isinstance(value, str) and colour:
        return _recoloured_name(value, changes)
    if isinstance(value, str) and notes:
        return re.sub(r"(?<=color:)#\w{6}", lambda found: changes.get(found[0].lower(), found[0]), value)
    return value


def _recoloured_name(colour: str, changes: dict[str, str]) -> str:
    """Another house colour for "#0072B2" or for "rgba(0, 114, 178, 0.18)"; any other is kept."""
    parts = re.fullmatch(r"rgba\((\d+), ?(\d+), ?(\d+), ?([\d.]+)\)", colour)
    if parts is None:
        return changes.get(colour.lower(), colour)
    named = changes.get("#{:02x}{:02x}{:02x}".format(*map(int, parts.groups()[:3])))
    return pale(named, float(parts[4])) if named else colour
