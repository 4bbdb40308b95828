import io
import os
import sys
from types import SimpleNamespace

import pytest
import rich.console

from lens_safety.progress import track

CELL = """
from lens_safety.progress import track
print("before")
done = [item for item in track(["a", "bb", "ccc"], "reading <i>", size=len)]
print(*done)
list(track([1, 2], "silent", False))
for item in track([1, 2], "broken"):
    raise KeyboardInterrupt
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_all_items_come_in_order_and_nothing_is_drawn_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track("abc", "reading")) == ["a", "b", "c"]
    assert stream.getvalue() == ""


def test_a_terminal_sees_a_bar_that_vanishes(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(["a", "bb"], "reading", size=len)) == ["a", "bb"]
    assert "reading" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    # Its last words move the cursor up and erase the line.
    assert stream.getvalue().endswith("\x1b[2K")
    shown = stream.getvalue()
    assert list(track(["a"], "reading", False)) == ["a"]
    assert stream.getvalue() == shown


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook was asked to display, in order."""
    display = pytest.importorskip("IPython.display")
    heard: list[dict[str, str]] = []
    handle = SimpleNamespace(update=lambda data, raw: heard.append(data))

    def shown(data, *, raw, display_id):
        heard.append(data)
        return handle

    monkeypatch.setattr(display, "display", shown)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    return heard


def test_a_notebook_sees_one_bar_that_is_emptied(notebook, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("lens_safety.progress._EVERY", 0.0)
    assert list(track(["a", "bb"], "reading <i>", size=len)) == ["a", "bb"]
    texts = [data["text/plain"].partition(",")[0] for data in notebook]
    assert texts == ["reading <i>: 0/3", "reading <i>: 1/3", "reading <i>: 3/3", ""]
    assert 'value="1" max="3"' in notebook[1]["text/html"]
    assert "reading &lt;i&gt;" in notebook[0]["text/html"]
    assert notebook[-1] == {"text/html": "", "text/plain": ""}
    assert list(track(["a"], "reading", False)) == ["a"]
    assert len(notebook) == 4
    assert stream.getvalue() == ""


def test_a_notebook_is_told_at_most_ten_times_a_second(notebook):
    list(track(range(500), "reading"))
    assert 3 <= len(notebook) < 50


def test_a_saved_notebook_keeps_no_trace_of_a_bar(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell(CELL)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    # The kernel's own files belong to this test alone.
    folders = {name: str(tmp_path) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=60)
    client.execute(env={**os.environ, **folders, "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    *outputs, error = cell.outputs
    assert error["ename"] == "KeyboardInterrupt"
    streams = [(out["name"], out["text"]) for out in outputs if out["output_type"] == "stream"]
    assert streams == [("stdout", "before\n"), ("stdout", "a bb ccc\n")]
    drawn = [out["data"] for out in outputs if out["output_type"] == "display_data"]
    assert drawn == [{"text/html": "", "text/plain": ""}] * 2
