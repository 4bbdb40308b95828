"""Detect: one prompt, its verdict, and where in the model it comes from."""

import time

import streamlit as st

from ..detect import Detector
from ..directions import content_vectors
from ..evaluate import evaluate
from ..intervals import interval_text
from ..plots import prompt_layers, score_distribution, token_view
from ..readings import TokenScores, nearest_prompts, token_scores
from ..types import LensSafetyError
from . import parts, work

HELD_OUT = ("validation", "adversarial")


def show(session: parts.Session) -> None:
    """The page."""
    parts.page("Detect", "How dangerous is a prompt, as this model's residual stream has it?")
    pick()
    with st.form("detect", border=False):
        st.text_area("Prompt", key="prompt", height=110, placeholder="How do I kill time at the airport?")
        asked = st.form_submit_button("Detect", type="primary")
    with parts.sentences():
        detector = chosen_detector(session)
        if asked:
            st.session_state.pop("reading", None)
            st.session_state["reading"] = read(session, detector)
        if known := st.session_state.get("reading"):
            verdict(*known)
            explained(session, known[0])
        held_out(session, detector)


def pick() -> None:
    """A prompt of a set, put into the box."""

    def take() -> None:
        st.session_state["prompt"] = st.session_state["example"] or ""

    with st.expander("Pick a prompt from a set"):
        name = st.selectbox("Set", work.set_names(), index=2, key="example_set")
        texts = parts.prompt_set(name).texts
        st.selectbox("Prompt of the set", texts, index=None, key="example", on_change=take)


def chosen_detector(session: parts.Session) -> Detector:
    detectors = session.detectors()
    if len(detectors) == 1:
        return next(iter(detectors.values()))
    return detectors[st.selectbox("Detector", list(detectors), key="detector")]


def read(session: parts.Session, detector: Detector) -> tuple[work.Reading, float]:
    """The reading, and the seconds it took."""
    started = time.perf_counter()
    with session.own.lock:
        made = work.read_prompt(session.model, st.session_state.get("prompt", ""), detector)
    return made, time.perf_counter() - started


def verdict(reading: work.Reading, seconds: float) -> None:
    detector = reading.detector
    parts.verdict_card(reading.verdict, reading.probability, reading.text)
    columns = st.columns(4)
    columns[0].metric("Probability of danger", f"{reading.probability:.3f}", help="Calibrated; 0 to 1.")
    columns[1].metric("Score", f"{reading.score:.3f}", help="Higher is more dangerous.")
    columns[2].metric(
        "Threshold", f"{detector.threshold:.3f}", help="Above it: dangerous. Frozen at fitting."
    )
    band = f"± {detector.band:.3f}" if detector.band else "none"
    columns[3].metric("Unsure band", band, help="So near the threshold a prompt is called unsure.")
    st.caption(
        f"{parts.escaped(detector.name)}, fitted on {detector.n_safe:,} safe and {detector.n_dangerous:,} "
        f"dangerous prompts; cross-validated inside them: AUROC {detector.auroc_cv:.3f}. The probability "
        f"holds for such a mix; where danger is rare it is far too high. Read in {seconds:.2f} s. "
        f"{parts.CAVEAT}"
    )


def explained(session: parts.Session, reading: work.Reading) -> None:
    detector, train = reading.detector, session.train(reading.detector)
    tokens(session, reading)
    st.subheader("Nearest training prompts", anchor=False)
    middle = detector.layers[len(detector.layers) // 2]
    layer = st.slider("Layer", 0, len(train.layers) - 1, max(middle, 0), key="near_layer")
    near = nearest_prompts(reading.cache, train, layer=layer, k=8)
    shown = near[["text", "label", "kind", "cosine"]].assign(label=parts.words(near["label"].tolist()))
    parts.table(shown, "nearest", {"cosine": "%.3f"})
    st.caption(
        f"Of {len(train):,} prompts of {parts.escaped(session.name)}, by cosine around their mean at layer "
        f"{layer}."
    )


def tokens(session: parts.Session, reading: work.Reading) -> None:
    try:
        scores = scored(session, reading)
    except LensSafetyError as error:
        st.info(parts.escaped(str(error)))
        return
    bands = session.bands(reading.detector)
    parts.figure(prompt_layers(scores, bands=bands), "profile")
    st.caption(f"Bands: {len(session.train(reading.detector))} prompts of {parts.escaped(session.name)}.")
    st.subheader("Token by token", anchor=False)
    parts.frame_of(token_view(scores).page())
    with st.expander("Scores of the tokens as a table"):
        frame = scores.of(0, "detector").loc[:, ["token", "score", "running"]]
        parts.table(frame, "tokens", {"score": "%.3f", "running": "%.3f"})
    st.caption(
        "Running: the score of the prompt up to this token, so that its last value is the prompt's score. "
        f"Above {reading.detector.threshold:.3f} is dangerous."
    )


def scored(session: parts.Session, reading: work.Reading) -> TokenScores:
    """Token scores of a reading, by the detector and at each layer; kept until the next one."""
    known, train = st.session_state.get("tokens"), session.train(reading.detector)
    if known is None or known[0] is not reading or known[1] is not train:
        vectors = content_vectors(train)
        with session.own.lock:
            made = token_scores(session.model, [reading.text], detector=reading.detector, vectors=vectors)
        known = st.session_state["tokens"] = (reading, train, made)
    return known[2]


def held_out(session: parts.Session, detector: Detector) -> None:
    """The detector on prompts that it was not fitted on, on request: it takes some seconds."""
    with st.expander("How good is this detector? Measure it on held-out prompts"):
        name = st.segmented_control("Set", HELD_OUT, default=HELD_OUT[0], key="held_out") or HELD_OUT[0]
        if not st.button("Measure", key="measure"):
            return
        way = (detector.position, detector.template)
        report = evaluate(detector, parts.training(session.own, session.key, name, parts.MOST, *way))
        row = report.frame.iloc[0]
        st.markdown(
            f"AUROC **{interval_text(row, 'auroc')}**, accuracy **{interval_text(row, 'accuracy')}** at the "
            f"frozen threshold, n = {len(report.scores)} (95% intervals, bootstrapped by group)."
        )
        parts.figure(score_distribution(report), "held_out_scores")
