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
    "Detect": page_detect,
    "Layers": page_layers,
    "Vectors": page_vectors,
    "Steer": page_steer,
    "Compare": page_compare,
    "Data": page_data,
}


def main() -> None:
    st.set_page_config(page_title="lens_safety", layout="wide")
    session = None
    with parts.sentences():
        session = parts.Session(parts.options(sys.argv[1:]))
    if session is None:
        st.stop()
    # Without icons: a browser would fetch the page's icon from a font server.
    pages = [
        st.Page(lambda room=room: room.show(session), title=title, url_path=title.lower())
        for title, room in PAGES.items()
    ]
    chosen = st.navigation(pages)
    parts.sidebar(session)
    chosen.run()


if __name__ == "__main__":
    main()
