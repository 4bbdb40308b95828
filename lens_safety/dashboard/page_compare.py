"""Compare: studies and sweeps on disk, side by side."""

import pandas as pd
import streamlit as st

from ..evaluate import DetectorComparison
from ..plots import comparison, dose_response
from ..responses import SteeringSweep
from . import parts, work

_SHOWN = (
    "detector",
    "set",
    "n_safe",
    "n_dangerous",
    "auroc",
    "auroc_low",
    "auroc_high",
    "accuracy",
    "tpr",
    "fpr",
)


def show(session: parts.Session) -> None:
    """The page."""
    root = session.options.runs
    parts.page("Compare", f"Results that lie in {parts.escaped(str(root))}, of any model.")
    runs, broken = work.runs_on_disk(root)
    for sentence in broken:
        st.warning(parts.escaped(sentence))
    if not runs:
        st.info(
            f"No results in {parts.escaped(str(root))} yet. Make some: `lens-safety study --out runs/study`, "
            "with `--model` for another model, or `lens-safety sweep --out runs/sweep`."
        )
    with parts.sentences():
        studies([run for run in runs if run.kind == "study"])
    with parts.sentences():
        sweeps([run for run in runs if run.kind == "sweep"])


def studies(runs: list[work.Run]) -> None:
    if not runs:
        return
    st.subheader("Detection", anchor=False)
    parts.table(work.run_table(runs), "runs", {"threshold": "%.4f", "seconds": "%.0f"})
    names = st.multiselect("Runs", [run.name for run in runs], [run.name for run in runs][:4], key="runs")
    if not names:
        return
    found = work.detection_of([run for run in runs if run.name in names])
    every = list(dict.fromkeys(found.overall["detector"]))
    few = every if len(names) == 1 else [name for name in every if not name.startswith("tone")]
    chosen = st.multiselect("Detectors", every, few, key=f"detectors {names}")
    measure = (
        st.segmented_control("Measure", ("auroc", "accuracy"), default="auroc", key="measured") or "auroc"
    )
    if not chosen:
        return
    kept = DetectorComparison(found.frame.loc[found.frame["detector"].isin(chosen)], found.model, found.seed)
    drawing = comparison(kept, measure=measure)
    parts.figure(drawing, "comparison")
    shown = kept.overall[[name for name in _SHOWN if name in kept.overall]]
    parts.table(pd.DataFrame(shown), "detection", dict.fromkeys(_SHOWN[4:], "%.3f"))
    st.caption(
        "95% intervals bootstrapped by group; layer and threshold were chosen on training prompts alone."
    )


def sweeps(runs: list[work.Run]) -> None:
    if not runs:
        return
    st.subheader("Steering", anchor=False)
    name = st.selectbox("Sweep", [run.name for run in runs], key="sweep")
    run = next(run for run in runs if run.name == name)
    made = SteeringSweep.load(run.folder / "sweep.json")
    layers = list(made.layers)
    layer = st.selectbox("Layer", layers, key="sweep_layer") if len(layers) > 1 else layers[0]
    parts.figure(dose_response(made, layer), "dose_response")
    effects = made.effects().dropna(axis="columns", how="all")
    numbers = [str(column) for column in effects if pd.api.types.is_float_dtype(effects[column])]
    parts.table(effects, "effects", dict.fromkeys(numbers, "%.3f"))
    st.caption(
        f"Change of {parts.escaped(made.measure)} against the unsteered text, n = {made.n_prompts} prompts, "
        "95% intervals; the band is what random directions of the same norm do."
    )
    with st.expander("Texts"):
        parts.table(made.frame.loc[:, ["direction", "layer", "multiplier", "prompt", "text"]], "texts")
