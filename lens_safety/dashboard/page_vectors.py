"""Vectors: which dimensions a direction is made of, and whether tone and content are one direction."""

import streamlit as st

from ..plots import tone_and_content, vector
from ..separation import top_dimensions
from . import parts

_FORMATS = {
    "value": "%.3f",
    "share": "percent",
    "cumulative_share": "percent",
    "safe_mean": "%.3f",
    "dangerous_mean": "%.3f",
}


def show(session: parts.Session) -> None:
    """The page."""
    parts.page("Vectors", "mean(dangerous) − mean(safe) of the chosen prompts, dimension by dimension.")
    with parts.sentences():
        vectors = session.vectors()
        best = session.table().best_layer
        columns = st.columns(2)
        layer = columns[0].slider("Layer", 0, len(vectors.layers) - 1, best, key="vector_layer")
        most = min(60, vectors.vectors.shape[1])
        k = columns[1].slider("Largest dimensions", 5, most, min(20, most), key="top")
        st.caption(f"Layer {best} is the one with the highest cross-validated AUROC.")
        parts.figure(vector(vectors, layer, k=k), "vector")
        with st.expander("Largest dimensions as a table"):
            parts.table(top_dimensions(vectors, layer, k), "top_dimensions", _FORMATS)
            st.caption("Values in residual-stream units; share = value² / ‖v‖².")
        tone = session.tone()
        parts.figure(tone_and_content(tone, vectors), "tone")
        st.caption(
            f"Tone: {tone.n_dangerous} harmful against {tone.n_safe} helpful personas. Content: "
            f"{vectors.n_dangerous} dangerous against {vectors.n_safe} safe prompts of "
            f"{parts.escaped(session.name)}."
        )
