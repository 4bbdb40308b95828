"""Texts coloured by the scores of their tokens, and what heads look at, drawn by circuitsvis.

A view is HTML that is alive in a notebook and in a saved page, and needs no network. Texts of prompts are
shown, never run.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..files import write_text
from ..readings import DETECTOR, AttentionPatterns, TokenScores
from ..types import OptionError
from .style import ACCENT, CONTROL, DANGEROUS, INK, SAFE, pale, signed, styled, templates

ENDS = ("#73B1D4", "#E28E4D")
"""Blue and vermilion of the house style, so pale that black text is readable on them."""

_HINT = "Point at a token, tap it, or use the arrow keys to read its scores."
_JOINER = "\u2060"


@dataclass(frozen=True)
class View:
    """Something to look at in a notebook or a page: HTML, and the same in plain text.

    `html` is a fragment for a page that holds `plots.circuits_js()` once; `page()` and `save(path)` make a
    whole page that opens offline.
    """

    title: str
    html: str = field(repr=False)
    text: str = field(repr=False)

    def page(self) -> str:
        """One self-contained HTML page."""
        return _page([self])

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all."""
        return save_views([self], path)

    def _repr_html_(self) -> str:
        return f"<script>{circuits_js()}</script>{self.html}"


def token_view(
    scores: TokenScores,
    prompt: int = 0,
    *,
    reader: str | None = DETECTOR,
    running: bool = True,
    template: bool = False,
) -> View:
    """One prompt, each token coloured by how far its score lies above (orange) or below (blue) the cut.

    `running` colours by the score of the prompt up to each token, so that one sees where it turns
    dangerous; else by the token's own. `reader` None gives all of them and a selector. `template` shows the
    tokens of the chat template too (they are always shown where the position is "last").

    Raises:
        OptionError: a prompt or reader that `scores` does not have.
    """
    return _token_view(scores, [prompt], reader, running, template)


def token_views(
    scores: TokenScores,
    *,
    reader: str | None = DETECTOR,
    running: bool = True,
    template: bool = False,
) -> View:
    """All prompts side by side, on one scale of colours; otherwise as `token_view`."""
    return _token_view(scores, range(len(scores.prompts)), reader, running, template)


def attention_view(patterns: AttentionPatterns, layer: int, heads: Sequence[int] | None = None) -> View:
    """What heads of one layer look at: a small map a head, and the chosen one large.

    Raises:
        OptionError: a layer or head that `patterns` does not have, or no heads.
    """
    pattern = patterns.pattern[_row(patterns, layer)].numpy()
    chosen = list(range(len(pattern))) if heads is None else list(heads)
    if not chosen or not set(chosen) <= set(range(len(pattern))):
        raise OptionError(f"heads {chosen} given, expected some of 0 to {len(pattern) - 1}")
    data = {
        "heads": [f"head {head}" for head in chosen],
        "tokens": [_visible(token) for token in patterns.tokens],
        "attention": [np.round(pattern[head], 3).astype(float).tolist() for head in chosen],
    }
    text = "\n".join(_strongest(pattern[head], patterns.tokens, head) for head in chosen)
    return _view(
        "attention_view.html",
        f"Attention at layer {layer}",
        [
            f"{patterns.model} · {len(chosen)} of {len(pattern)} heads · {len(patterns.tokens)} tokens",
            "Each row is the token that is being read (destination); its weights over the tokens up to it "
            "(source) sum to 1. Grey: later tokens, which it cannot see.",
        ],
        data,
        text,
        colour=ACCENT,
    )


def prompt_layers(
    scores: TokenScores, prompt: int = 0, *, mark: int | None = None, bands: pd.DataFrame | None = None
) -> go.Figure:
    """One prompt's score at each layer that was read: -1 at the safe mean, 1 at the dangerous one.

    `mark` outlines a layer; `bands`, of `class_bands`, shows where the training prompts of each class lie.

    Raises:
        OptionError: scores that were taken without vectors, or a prompt that is not there.
    """
    names = [reader for reader in scores.readers if reader != DETECTOR]
    if not names:
        raise OptionError("scores of a detector alone given: expected token_scores(..., vectors=...)")
    values = np.array([scores.of(prompt, name)["running"].iloc[-1] for name in names])
    layers = [name.removeprefix("layer ") for name in names]
    figure = go.Figure(_class_bands(bands))
    figure.add_scatter(
        x=layers,
        y=values,
        mode="lines+markers",
        name="this prompt",
        line={"color": INK, "width": 1.5},
        marker={
            "color": signed(values),
            "size": [12 if layer == str(mark) else 7 for layer in layers],
            "line": {"color": INK, "width": [2 if layer == str(mark) else 0 for layer in layers]},
        },
        hovertemplate="layer %{x}: %{y:.3f}<extra></extra>",
        showlegend=bands is not None,
    )
    figure.add_hline(0, line={"color": CONTROL, "width": 1})
    figure.update_xaxes(title_text="layer (resid_post)", type="category", nticks=16)
    figure.update_yaxes(title_text="score (±1: class means)")
    note = f"{scores.model} · read at {scores.position} · −1 at the safe mean, 1 at the dangerous mean"
    room = (340, 16) if bands is None else (440, 60)
    return styled(figure, "The prompt at each layer", note, room[0], above=room[1])


def circuits_js() -> str:
    """The source of circuitsvis' components, to be inlined once a page; a second time it does nothing."""
    source = (package_files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    source = source.partition("//# sourceMappingURL")[0].replace("</script", r"<\/script")
    return f"window.CircuitsVis = window.CircuitsVis || (() => {{{source}\nreturn CircuitsVis; }})();"


def save_views(views: Sequence[View], path: str | Path) -> Path:
    """Write several views as one page that opens offline, whole or not at all.

    Raises:
        OptionError: no views.
    """
    if not views:
        raise OptionError("no views given, expected at least one")
    return write_text(path, _page(views))


def _class_bands(bands: pd.DataFrame | None) -> list[go.Scatter]:
    if bands is None:
        return []
    layers = [str(layer) for layer in bands["layer"]]
    return [
        go.Scatter(
            x=[*layers, *layers[::-1]],
            y=[*bands[f"{name}_high"], *bands[f"{name}_low"][::-1]],
            fill="toself",
            fillcolor=pale(colour),
            line_width=0,
            mode="lines",
            name=f"{name} training prompts, middle 80%",
            hoverinfo="skip",
        )
        for name, colour in (("safe", SAFE), ("dangerous", DANGEROUS))
    ]


def _token_view(
    scores: TokenScores, prompts: Sequence[int], reader: str | None, running: bool, template: bool
) -> View:
    readers = scores.readers if reader is None else (reader,)
    whole = template or scores.position == "last"
    column = "running" if running else "score"
    rows = {(p, r): _shown(scores.of(p, r), whole) for p in prompts for r in readers}
    data = {
        "readers": [_scale(r, [rows[p, r] for p in prompts], column) for r in readers],
        "prompts": [_prompt(p, [rows[p, r] for r in readers], column) for p in prompts],
    }
    shown = "Running score at" if running else "Own score of"
    return _view(
        "token_view.html",
        f"{shown} each token",
        [_provenance(scores, readers), _reading(scores, running)],
        data,
        "\n\n".join(_as_text(prompt, readers) for prompt in data["prompts"]),
        colours=ENDS,
        hint=_HINT,
    )


def _shown(rows: pd.DataFrame, whole: bool) -> pd.DataFrame:
    return rows if whole else rows.loc[rows["content"]].reset_index(drop=True)


def _provenance(scores: TokenScores, readers: Sequence[str]) -> str:
    by = f"detector: {scores.detector}" if readers == (DETECTOR,) else f"{len(readers)} readers"
    if len(readers) == 1 and readers != (DETECTOR,):
        by = f"class means of {readers[0]}"
    return f"{scores.model} · {by} · read at {scores.position}"


def _reading(scores: TokenScores, running: bool) -> str:
    if not running:
        return "Each token alone. Orange: above the cut, towards dangerous; blue: below it, towards safe."
    return (
        "All tokens up to this one, put together as the position says; the last is the prompt's score. "
        "Orange: above the cut, dangerous; blue: below it, safe."
    )


def _scale(reader: str, rows: Sequence[pd.DataFrame], column: str) -> dict[str, Any]:
    """The cut of a reader and how far its colours reach on either side."""
    values = pd.concat(rows)
    cut = float(values["cut"].iloc[0])
    far = np.abs(values[column] - cut).max()
    reach = float(far) if far > 0 else 1e-9
    return {
        "name": reader,
        "reach": reach,
        "low": f"{cut - reach:.3g} safe",
        "cut": f"cut {cut:.3g}",
        "high": f"{cut + reach:.3g} dangerous",
    }


def _prompt(number: int, by_reader: Sequence[pd.DataFrame], column: str) -> dict[str, Any]:
    tokens = [_visible(token) for token in by_reader[0]["token"]]
    return {
        "name": f"prompt {number}",
        "tokens": tokens,
        "shown": [_inert(token) for token in tokens],
        "by": [
            {
                "values": [_short(value) for value in rows[column] - rows["cut"]],
                "said": [
                    _said(i, token, row)
                    for i, (token, row) in enumerate(zip(tokens, _dicts(rows), strict=True))
                ],
                "verdict": f"Prompt {number}: {_verdict(rows)}",
            }
            for rows in by_reader
        ],
    }


def _dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return rows.to_dict("records")  # type: ignore[return-value]


def _said(place: int, token: str, row: dict[str, Any]) -> str:
    """A token in words: itself, its own score, the running score, how far from the cut."""
    said = f"{place + 1} “{token}”: own score {row['score']:.4g}"
    if np.isnan(row["running"]):
        return f"{said}, no running score before the first token of the text"
    above = row["running"] - row["cut"]
    side = "above" if above > 0 else "below"
    return f"{said}, running {row['running']:.4g}, {abs(above):.2g} {side} the cut"


def _verdict(rows: pd.DataFrame) -> str:
    """How a prompt ends, and the token from which on it is on that side of the cut."""
    above = (rows["running"] > rows["cut"]).to_numpy()
    side = "above the cut: dangerous" if above[-1] else "below the cut: safe"
    end = f"ends at {rows['running'].iloc[-1]:.3g}, {side}"
    changes = np.flatnonzero(np.diff(above.astype(int)))
    if not len(changes):
        return f"{end}, from the first token on"
    turn = int(changes[-1]) + 1
    return f"{end}, from token {turn + 1} on, “{_visible(rows['token'].iloc[turn]).strip()}”"


def _as_text(prompt: dict[str, Any], readers: Sequence[str]) -> str:
    parts = [
        "\n".join([f"{by['verdict']} ({reader})", *by["said"]])
        for reader, by in zip(readers, prompt["by"], strict=True)
    ]
    return "\n\n".join(parts)


def _strongest(pattern: np.ndarray, tokens: Sequence[str], head: int) -> str:
    """A head in words: its largest weight on a token other than the first, where there is one."""
    seen = pattern[1:, 1:] if len(tokens) > 1 else pattern
    skipped = int(len(tokens) > 1)
    to, source = (int(i) + skipped for i in np.unravel_index(seen.argmax(), seen.shape))
    reads, read = f"“{_visible(tokens[to])}” ({to})", f"“{_visible(tokens[source])}” ({source})"
    return f"head {head}: {reads} looks most at {read}, weight {pattern[to, source]:.2f}"


def _row(patterns: AttentionPatterns, layer: int) -> int:
    if layer not in patterns.layers:
        have = ", ".join(map(str, patterns.layers))
        raise OptionError(f"layer {layer} given, expected one that was read: {have}")
    return patterns.layers.index(layer)


def _short(value: float) -> float | None:
    """Four digits; nothing where the score is not defined."""
    return None if np.isnan(value) else float(f"{value:.4g}")


def _visible(token: str) -> str:
    """A token with its line breaks to be seen."""
    return token.replace("\r", "").replace("\n", "↵") or "∅"


def _inert(token: str) -> str:
    """What stays text when it is read as HTML, as circuitsvis reads it in the text (not in the tooltip)."""
    held = token.replace("<", f"<{_JOINER}").replace("&", f"&{_JOINER}")
    return held.replace("↵", "↵\n")


def _view(name: str, title: str, lines: list[str], data: dict[str, Any], text: str, **inside: Any) -> View:
    key = hashlib.sha256(json.dumps([name, title, lines, data]).encode()).hexdigest()[:16]
    html = (
        templates()
        .get_template(name)
        .render(key=key, title=title, lines=lines, data=data, text=text, **inside)
    )
    return View(title, html, text)


def _page(views: Sequence[View]) -> str:
    page = templates().get_template("view_page.html")
    return page.render(title=views[0].title, source=circuits_js(), fragments=[view.html for view in views])
