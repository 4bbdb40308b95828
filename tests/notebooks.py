"""Run the notebooks of `examples/` in fresh kernels and keep what they show: `make notebooks`.

Live, a figure or a token view is interactive. The saved file keeps a picture of each, so that it shows
without a network and without 5 MB of scripts, and a hash of its code, by which stale outputs are noticed.
"""

import base64
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
from browsing import browser
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lens_safety.files import write_text

EXAMPLES = Path(__file__).parents[1] / "examples"
FIGURE, PICTURE, PAGE, TEXT = "application/vnd.plotly.v1+json", "image/png", "text/html", "text/plain"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDTH, SCALE = 760, 1.4
MOST = 1_500_000
"""Bytes of a notebook with its outputs."""

_VIEW = "window.CircuitsVis"
_OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|work|usr|Users)/\w|[A-Z]:\\|0x[0-9a-f]{6,}")


def main(paths: list[Path]) -> None:
    """Run each notebook from top to bottom and write it back; the first error ends it, its file untouched."""
    for path in paths:
        start = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        try:
            run(notebook)
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")
        keep(notebook)
        if found := faults(notebook):
            sys.exit(f"{path.name}: {'; '.join(found)}")
        written = write_text(path, nbformat.writes(notebook) + "\n")
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {written.stat().st_size / 1e6:.2f} MB")


def run(notebook: Any) -> None:
    """Execute every cell in a new kernel, in an empty folder. Raises `CellExecutionError`."""
    # A figure is sent as data, once, and drawn afterwards.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PLOTLY_RENDERER": "plotly_mimetype"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=3600,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)


def keep(notebook: Any) -> None:
    """Pictures for figures and views, nothing that a reader does not need, and the hash of the code."""
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if _is_seen(output)]
        cell.metadata = nbformat.NotebookNode()
    _draw(notebook, lambda data: FIGURE in data, _figures)
    _draw(notebook, lambda data: _VIEW in data.get(PAGE, ""), _views)
    notebook.metadata = nbformat.from_dict(METADATA | {"lens_safety": {"code": code_hash(notebook)}})


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: Any) -> str:
    """SHA-256 of the code cells, each with its length, so that moving a line to the next cell changes it."""
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        code = cell.source.encode()
        digest.update(len(code).to_bytes(8, "big") + code)
    return digest.hexdigest()


def faults(notebook: Any) -> list[str]:
    """What is wrong with the kept outputs, a sentence each; none where they are whole and of this code."""
    cells = code_cells(notebook)
    found = []
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("its code cells were not all run once, in order")
    if notebook.metadata.get("lens_safety", {}).get("code") != code_hash(notebook):
        found.append("its outputs are of other code: run `make notebooks`")
    for cell in cells:
        for output in cell.outputs:
            found += [f"cell {cell.execution_count} {fault}" for fault in _faults_of(output)]
    if len(nbformat.writes(notebook)) > MOST:
        found.append(f"it is larger than {MOST / 1e6:g} MB")
    return found


def shown_text(notebook: Any) -> str:
    """All that the kept outputs say in words and numbers."""
    parts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            parts += [output.get("text", ""), data.get(TEXT, ""), _plain(data.get(PAGE, ""))]
    return "\n".join(parts)


def _faults_of(output: Any) -> list[str]:
    """A fault of one output; a word and a picture of a figure are all that a reader needs."""
    if output.output_type == "error":
        return [f"ended in {output.ename}"]
    data = output.get("data", {})
    said = "\n".join([output.get("text", ""), data.get(TEXT, ""), data.get(PAGE, "")])
    found = []
    if FIGURE in data or "<script" in said:
        found.append("keeps a script instead of a picture")
    if _OF_A_MACHINE.search(said):
        found.append("names a path or an address of the machine that ran it")
    return found


def _is_seen(output: Any) -> bool:
    """Not what libraries say on stderr, nor a progress bar that is done."""
    if output.output_type == "stream":
        return output.name == "stdout"
    return output.output_type == "error" or any(output.data.values())


def _draw(notebook: Any, wanted: Callable[[Any], bool], drawn: Callable[[list[Any]], list[bytes]]) -> None:
    """Put pictures in the place of what is wanted, all of them drawn by one browser."""
    outputs = [o for cell in code_cells(notebook) for o in cell.outputs if wanted(o.get("data", {}))]
    for output, picture in zip(outputs, drawn([o.data for o in outputs]), strict=True):
        words = output.data.get(TEXT) or _title(output.data[FIGURE])
        output.data = nbformat.from_dict({PICTURE: base64.b64encode(picture).decode(), TEXT: words})
        output.metadata = nbformat.NotebookNode()


def _figures(found: list[Any]) -> list[bytes]:
    import plotly.graph_objects as go
    import plotly.io as pio

    if not found:
        return []
    figures = [go.Figure({part: data[FIGURE][part] for part in ("data", "layout")}) for data in found]
    with tempfile.TemporaryDirectory() as folder:
        files: list[Any] = [Path(folder, f"{number}.png") for number in range(len(figures))]
        # Unlike a single figure's, the height of the layout is not taken by itself.
        heights = [figure.layout.height for figure in figures]
        pio.write_images(figures, files, width=WIDTH, height=heights, scale=SCALE)
        return [file.read_bytes() for file in files]


def _views(found: list[Any]) -> list[bytes]:
    if not found:
        return []
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": WIDTH, "height": 200}, device_scale_factor=SCALE)
        pictures = []
        for data in found:
            page.set_content(f"<!doctype html><body style='margin: 12px'>{data[PAGE]}</body>")
            page.wait_for_timeout(1500)
            pictures.append(page.screenshot(full_page=True))
        return pictures


def _title(figure: Any) -> str:
    title = figure["layout"].get("title", {}).get("text", "")
    return f"Figure: {_plain(title)}".strip()


def _plain(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html))).strip()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")))
