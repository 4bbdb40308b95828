"""What all pages share: what is loaded once a server, the sidebar, and how texts and figures are shown."""

import argparse
import html
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from .. import plots
from ..detect import Detector
from ..directions import ContentVectors, content_vectors, tone_vectors
from ..models import fingerprint, load_model
from ..plots.style import CONFIG, CONTROL, DANGEROUS, SAFE
from ..prompts import PromptSet, load_prompts
from ..readings import class_bands
from ..residuals import ResidualCache
from ..separation import LayerTable, layer_table
from ..steer import Continued, continued
from ..types import LensSafetyError
from . import work

MOST = 400
"""Prompts of a set that are read unless more are asked for."""

COLOURS = {"safe": SAFE, "dangerous": DANGEROUS, "unsure": CONTROL}
CAVEAT = (
    "A detector of this kind is no guard: it was fitted on plain English requests, obfuscated, coded or very "
    "polite wording gets past it, and somebody who holds the weights can evade it."
)

_STYLE = """<style>
[data-testid="stMainBlockContainer"] { max-width: 1080px; padding-top: 3.2rem; }
.ls-verdict { border-left: 6px solid var(--ls); padding: .5rem 1rem .6rem; border-radius: 4px;
  background: color-mix(in srgb, var(--ls) 10%, transparent); }
.ls-verdict b { font-size: 1.45rem; letter-spacing: -.01em; }
.ls-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; min-height: 4.6em; }
.ls-quote { white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 7.5em; overflow-y: auto; opacity: .85; }
</style>"""


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    model: str | None
    engine: str
    runs: Path


@dataclass(frozen=True)
class Loaded:
    """The model and its lock: hooks are set on the model itself, so that one visitor at a time runs it.

    Nothing that is cached is asked for while the lock is held: the cache has locks of its own.
    """

    model: Any
    lock: Any


def options(arguments: Sequence[str]) -> Options:
    """The arguments behind the script's name."""
    parser = argparse.ArgumentParser(prog="lens-safety dashboard")
    parser.add_argument("--model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args(arguments)
    return Options(given.model, given.engine, given.runs)


@st.cache_resource(show_spinner="Loading the model …")
def loaded(name: str | None, engine: str) -> Loaded:
    """The model, once a server."""
    return Loaded(load_model(name, engine=engine), threading.RLock())  # type: ignore[arg-type]


@st.cache_resource(max_entries=16)
def prompt_set(name: str, most: int | None = None) -> PromptSet:
    """A set, or a draw of it."""
    whole = load_prompts(name)
    return whole if most is None else work.drawn(whole, most)


@st.cache_resource(max_entries=6, show_spinner="Reading prompts through the model; they are kept on disk …")
def training(
    _own: Loaded, model: str, name: str, most: int, position: str = "content_mean", template: str = "auto"
) -> ResidualCache:
    """Residual streams of a prompt set; `model` is the fingerprint that tells models apart."""
    with _own.lock:
        return work.read_set(_own.model, prompt_set(name, most), position, template)


@st.cache_resource(max_entries=6, show_spinner="Counting layer by layer …")
def table_of(_train: ResidualCache, model: str, name: str, most: int) -> LayerTable:
    return layer_table(_train)


@st.cache_resource(max_entries=6)
def bands_of(_train: ResidualCache, model: str, name: str, most: int, position: str) -> pd.DataFrame:
    return class_bands(_train, content_vectors(_train))


@st.cache_resource(max_entries=2, show_spinner="Reading the persona prompts …")
def tone_of(_own: Loaded, model: str) -> ContentVectors:
    with _own.lock:
        return tone_vectors(_own.model, progress=False)


@st.cache_resource(max_entries=2, show_spinner="Continuing the neutral prompts once …")
def neutral_of(_own: Loaded, model: str) -> list[Continued]:
    with _own.lock:
        return continued(_own.model)


@st.cache_resource(max_entries=4, ttl=60, show_spinner="Looking for detectors …")
def detectors_of(_own: Loaded, model: str, runs: str) -> dict[str, Detector]:
    """The model's own detector, and those of its runs on disk."""
    first = work.own_detector(_own.model, training(_own, model, "content", MOST))
    return {f"{first.name} (fitted on {first.source})": first} | work.saved_detectors(Path(runs), _own.model)


class Session:
    """The model and the prompts that a page works with, as the sidebar says."""

    def __init__(self, given: Options):
        self.options = given
        self.own = loaded(given.model, given.engine)
        self.name, self.most = "content", MOST

    @property
    def model(self) -> Any:
        return self.own.model

    @property
    def key(self) -> str:
        """What tells the model's results apart in the caches."""
        return fingerprint(self.model).weights + self.options.engine

    def train(self, detector: Detector | None = None) -> ResidualCache:
        """The chosen prompts' residual streams, read as the detector reads prompts."""
        way = () if detector is None else (detector.position, detector.template)
        return training(self.own, self.key, self.name, self.most, *way)

    def vectors(self) -> ContentVectors:
        return content_vectors(self.train())

    def table(self) -> LayerTable:
        return table_of(self.train(), self.key, self.name, self.most)

    def bands(self, detector: Detector) -> pd.DataFrame:
        way = f"{detector.position} {detector.template}"
        return bands_of(self.train(detector), self.key, self.name, self.most, way)

    def tone(self) -> ContentVectors:
        return tone_of(self.own, self.key)

    def neutral(self) -> list[Continued]:
        return neutral_of(self.own, self.key)

    def detectors(self) -> dict[str, Detector]:
        return detectors_of(self.own, self.key, str(self.options.runs))


def sidebar(session: Session) -> None:
    """The model, and which prompts directions come from."""
    of = fingerprint(session.model)
    with st.sidebar:
        st.markdown(f"**{escaped(of.name)}**")
        st.caption(f"{of.n_layers} layers · d_model {of.d_model} · {of.engine} · {of.dtype}")
        names = work.set_names(both_classes=True)
        session.name = st.selectbox(
            "Prompts that directions come from", names, key="set", help="Mean of dangerous − mean of safe."
        )
        n = len(prompt_set(session.name))
        if n > MOST:
            sizes = [size for size in (MOST, 1000, 2000) if size < n] + [n]
            key = f"most {session.name}"
            session.most = st.select_slider("Prompts read", sizes, key=key, help="Whole groups are drawn.")
        st.caption(
            f"{len(prompt_set(session.name, session.most)):,} of {n:,} prompts, kept on disk once read."
        )


@contextmanager
def sentences() -> Iterator[None]:
    """What a user can mend is one sentence on the page."""
    try:
        yield
    except LensSafetyError as error:
        st.error(escaped(str(error)), icon=":material/error:")


def page(title: str, what: str) -> None:
    st.html(_STYLE)
    st.header(title, anchor=False)
    st.caption(what)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is; of the first 400 characters, so that a sentence stays one."""
    short = text if len(text) <= 400 else f"{text[:399]}…"
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~<>$:&])", r"\\\1", short).replace("\n", " ")


def plain(text: str, style: str = "ls-text") -> str:
    """HTML that shows a text as it is."""
    return f'<div class="{style}">{html.escape(text) or "&nbsp;"}</div>'


def verdict_card(word: str, probability: float, text: str) -> None:
    """The verdict in its colour, and the text that it is about."""
    st.html(
        f'<div class="ls-verdict" style="--ls: {COLOURS[word]}"><b>{word}</b> &nbsp; '
        f"{probability:.1%} probability of danger{plain(text, 'ls-quote')}</div>"
    )


def figure(made: Any, key: str) -> None:
    """A figure of `plots`, in the page's light or dark colours."""
    theme = "dark" if st.context.theme.type == "dark" else "light"
    st.plotly_chart(
        plots.themed(made, theme), theme=None, config=CONFIG, key=f"{key} figure", width="stretch"
    )


def table(frame: pd.DataFrame, key: str, formats: Mapping[str, str] | None = None) -> None:
    """A table: texts as they are, numbers in the formats given by column, empty columns left out."""
    shown = frame.dropna(axis="columns", how="all")
    given = {name: style for name, style in (formats or {}).items() if name in shown}
    settings = {name: st.column_config.NumberColumn(format=style) for name, style in given.items()}
    st.dataframe(shown, hide_index=True, key=f"{key} table", column_config=settings, width="stretch")


def words(labels: Sequence[bool | None]) -> list[str]:
    """Labels as words."""
    return ["none" if label is None else "dangerous" if label else "safe" for label in labels]


def frame_of(content: str) -> None:
    """A page of its own inside the page (a circuitsvis view), which loads nothing from elsewhere."""
    st.iframe(content, height="content")
