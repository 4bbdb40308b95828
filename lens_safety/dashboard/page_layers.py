"""Layers: where safe and dangerous prompts lie apart."""

import streamlit as st

from ..plots import layer_curve
from . import parts

_FORMATS = {
    "auroc": "%.3f",
    "auroc_low": "%.3f",
    "auroc_high": "%.3f",
    "auroc_shuffled": "%.3f",
    "cohens_d": "%.2f",
    "separation": "%.4f",
    "magnitude": "%.2f",
    "relative_magnitude": "%.3f",
    "split_half_cosine": "%.3f",
}


def show(session: parts.Session) -> None:
    """The page."""
    parts.page(
        "Layers", "How far apart safe and dangerous prompts lie, from the embedding to the last layer."
    )
    with parts.sentences():
        made = session.table()
        best = made.frame.loc[made.frame["layer"] == made.best_layer].iloc[0]
        columns = st.columns(3)
        columns[0].metric("Best layer", made.best_layer, help="Highest cross-validated AUROC.")
        columns[1].metric("AUROC there", f"{best['auroc']:.3f}", help="Cross-validated; chance is 0.5.")
        columns[2].metric("Cohen's d there", f"{best['cohens_d']:.2f}", help="In standard deviations.")
        n = made.n_safe + made.n_dangerous
        st.caption(
            f"95% interval [{best['auroc_low']:.3f}, {best['auroc_high']:.3f}], n = {n} "
            f"({made.n_safe} safe, {made.n_dangerous} dangerous), bootstrapped by group. The best of many "
            "layers flatters: report held-out prompts."
        )
        parts.figure(layer_curve(made), "layer_curve")
        parts.table(made.frame.drop(columns=["layer", "is_zero"]), "layers", _FORMATS)
        st.caption(
            "Separation: 1 − cos of the class means. Magnitude: L2 norm of the content vector; relative: "
            "over the median residual norm. auroc_shuffled: the 97.5% quantile with shuffled labels."
        )
