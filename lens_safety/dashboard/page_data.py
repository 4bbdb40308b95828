"""Data: the prompt sets, and the prompts in them."""

import streamlit as st

from . import parts, work

_COLUMNS = ["text", "label", "kind", "category", "language", "group", "source"]
_ANY = "any"


def show(session: parts.Session) -> None:
    """The page."""
    parts.page("Data", "Prompt sets that come with the package, and public ones with their licences.")
    with parts.sentences():
        parts.table(work.set_table(), "sets", {"prompts": "%d"})
        st.caption(
            "A public set that is not here is fetched from its address by ls.load_prompts(name), never by "
            "this page."
        )
        st.subheader("Browse", anchor=False)
        columns = st.columns([2, 1, 2])
        name = columns[0].selectbox("Set", work.set_names(), key="browsed")
        frame = parts.prompt_set(name).to_frame()
        frame["label"] = parts.words(frame["label"].tolist())
        label = columns[1].selectbox("Label", [_ANY, *sorted(set(frame["label"]))], key="label")
        words = columns[2].text_input("Words in the text", key="words")
        kept = frame["text"].str.contains(words, case=False, regex=False)
        if label != _ANY:
            kept &= frame["label"] == label
        by = [column for column in ("category", "kind") if len(set(frame[column])) > 1]
        if by:
            part = st.selectbox(by[0].capitalize(), [_ANY, *sorted(set(frame[by[0]]))], key=f"{name} {by[0]}")
            if part != _ANY:
                kept &= frame[by[0]] == part
        shown = frame.loc[kept]
        st.caption(f"{len(shown):,} of {len(frame):,} prompts.")
        used = [column for column in _COLUMNS if any(frame[column] != "")]
        parts.table(shown.loc[:, used], "prompts")
