"""Steer: one prompt continued three ways at once, token by token, and what each way costs."""

import time
from contextlib import closing
from typing import Any

import pandas as pd
import streamlit as st

from ..operators import OPERATORS, named_operator
from . import parts, work

POSITIONS = ("all", "prompt", "generated", "content")
_FORMATS = {
    **dict.fromkeys(("kl", "kl_low", "kl_high", "score"), "%.3f"),
    "nll": "%.2f",
    "repeated_4grams": "percent",
}


def show(session: parts.Session) -> None:
    """The page."""
    parts.page(
        "Steer", "The residual stream pushed along the direction, beside a random one of the same norm."
    )
    with parts.sentences():
        prompt, strength, length = controls(session)
        if st.button("Write", type="primary", key="write"):
            st.session_state.pop("steered", None)
            st.session_state["steered"] = write(session, prompt, strength, length)
        elif known := st.session_state.get("steered"):
            fill(boxes(known["strength"]), known["texts"])
        if known := st.session_state.get("steered"):
            costs(session, known)


def controls(session: parts.Session) -> tuple[str, work.Strength, int]:
    vectors, best = session.vectors(), session.table().best_layer
    st.session_state.setdefault("steer_prompt", parts.prompt_set("neutral").texts[0])
    prompt = st.text_area("Prompt", key="steer_prompt", height=80)
    first, second = st.columns(2), st.columns(3)
    layer = first[0].slider("Layer", 0, len(vectors.layers) - 1, best, key="steer_layer")
    multiplier = first[1].slider(
        "Multiplier",
        -8.0,
        8.0,
        4.0,
        0.5,
        key="multiplier",
        help="Below 0 toward safe, above toward dangerous.",
    )
    operator = second[0].selectbox("Operator", list(OPERATORS), key="operator")
    positions = second[1].selectbox("Positions", POSITIONS, key="positions")
    length = second[2].slider("Longest text (tokens)", 5, 120, 40, 5, key="length")
    dose = float(vectors.dose(multiplier)[vectors.row(layer)])
    st.caption(
        f"h becomes {parts.escaped(named_operator(operator).equation)}. At layer {layer} the multiplier "
        f"{multiplier:g} is a dose of {dose:+.2f} (norm of what is added over the median residual norm); "
        "where the text breaks, the damage below says."
    )
    return prompt, work.Strength(layer, operator, multiplier, positions), length


def boxes(strength: work.Strength) -> list[Any]:
    """A card for each row, with its name; what they hold is set by `fill`."""
    names = ("unsteered", f"multiplier {strength.multiplier:+g}", "random direction, same norm")
    made = []
    for column, name in zip(st.columns(3), names, strict=True):
        with column.container(border=True):
            st.caption(name)
            made.append(st.empty())
    return made


def fill(places: list[Any], texts: list[str]) -> None:
    for place, text in zip(places, texts, strict=True):
        place.html(parts.plain(text))


def write(session: parts.Session, prompt: str, strength: work.Strength, length: int) -> dict[str, Any]:
    """Continue the prompt, showing each token as it comes."""
    texts, started, first = [""] * len(work.ROWS), time.perf_counter(), 0.0
    plans = work.steered_plans(session.model, session.vectors(), strength)
    # Closed before the lock is given back: a click in the middle of a text ends this run of the page.
    pieces = closing(work.written(session.model, prompt, plans, max_new_tokens=length))
    with session.own.lock, pieces as written:
        # The first token before the cards, so that a prompt that cannot be read leaves none empty.
        texts = next(written, texts)
        first = time.perf_counter() - started
        places = boxes(strength)
        fill(places, texts)
        for texts in written:
            fill(places, texts)
    return {"prompt": prompt, "texts": texts, "plans": plans, "strength": strength, "first": first}


def costs(session: parts.Session, known: dict[str, Any]) -> None:
    """What the texts are like and what the steering costs, measured once a text."""
    if "costs" not in known:
        detector = next(iter(session.detectors().values()))
        neutral = session.neutral()
        with st.spinner("Measuring the damage …"), session.own.lock:
            known["costs"] = work.damage(
                session.model, known["prompt"], known["texts"], known["plans"], neutral, detector
            )
        known["n"] = len(neutral)
    frame: pd.DataFrame = known["costs"]
    steered, control = frame.iloc[1], frame.iloc[2]
    columns = st.columns(3)
    for column, name, what, style in (
        (columns[0], "kl", "KL on neutral text (nats)", ".3f"),
        (columns[1], "nll", "NLL of the text (nats a token)", ".2f"),
        (columns[2], "repeated_4grams", "Repeated 4-grams", ".0%"),
    ):
        column.metric(what, format(steered[name], style), help=f"Random direction: {control[name]:{style}}")
    parts.table(frame, "costs", _FORMATS)
    st.caption(
        f"KL(unsteered ‖ steered) of the next token, n = {known['n']} neutral prompts, with the 95% interval "
        "of their mean. NLL of each text under the unsteered model. Score: the detector's, of the text "
        "alone; it was fitted on requests and reads other text poorly. One prompt is one case: "
        f"`lens-safety sweep` measures many. First token after {known['first']:.2f} s."
    )
