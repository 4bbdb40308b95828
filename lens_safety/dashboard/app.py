"""The script that Streamlit runs, again at every click: the pages and the sidebar."""

import sys

import streamlit as st

from lens_safety.dashboard import (
    page_compare,
    page_data,
    page_detect,
    page_layers,
    page_steer,
    page_vectors,
    parts,
)

PAGES = {
    "Detect": (page_detect, ":material/policy:"),
    "Layers": (page_layers, ":material/stacked_line_chart:"),
    "Vectors": (page_vectors, ":material/bar_chart:"),
    "Steer": (page_steer, ":material/explore:"),
    "Compare": (page_compare, ":material/compare_arrows:"),
    "Data": (page_data, ":material/database:"),
}


def main() -> None:
    st.set_page_config(page_title="lens_safety", layout="wide")
    session = None
    with parts.sentences():
        session = parts.Session(parts.options(sys.argv[1:]))
    if session is None:
        st.stop()
    pages = [
        st.Page(lambda room=room: room.show(session), title=title, icon=icon, url_path=title.lower())
        for title, (room, icon) in PAGES.items()
    ]
    chosen = st.navigation(pages)
    parts.sidebar(session)
    chosen.run()


if __name__ == "__main__":
    main()
