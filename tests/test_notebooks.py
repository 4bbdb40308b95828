"""The notebooks of `examples/`: what they keep is whole and of their code, and their code runs."""

import ast
import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from conftest import labelled, short_audit
from notebooks import EXAMPLES, FIGURE, PAGE, PICTURE, code_cells, code_hash, faults, keep, main, shown_text

import lens_safety as ls
from lens_safety.plots import View

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["detection_audit", "quickstart", "steering"]


@each
def test_what_is_kept_is_whole_and_of_this_code(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert faults(notebook) == []
    drawn = [cell for cell in code_cells(notebook) if "ls.plots." in cell.source]
    assert len(drawn) >= 3
    for cell in drawn:
        assert any(PICTURE in output.get("data", {}) for output in cell.outputs), cell.source


@each
def test_the_numbers_of_the_prose_stand_in_the_outputs(path):
    notebook = read(path)
    shown = set(re.findall(NUMBER, plain_signs(shown_text(notebook))))
    said = [n for cell in notebook.cells if cell.cell_type == "markdown" for n in quoted(cell.source)]
    assert len(said) >= 5
    assert [n for n in said if n not in shown] == []


@each
def test_the_code_runs_from_top_to_bottom(loaded, path, monkeypatch, capsys, tmp_path):
    """In this process and with the session's model; `make notebooks` runs them as a reader does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ls, "sweep", smaller(ls.sweep))
    monkeypatch.setattr(ls, "shortcut_audit", short_audit(ls.shortcut_audit))
    monkeypatch.setattr(ls, "residual_streams", fewer(ls.residual_streams))
    names: dict[str, Any] = {}
    for cell in code_cells(read(path)):
        value = run_cell(cell.source, names)
        printed = {"text"} if capsys.readouterr().out.strip() else set()
        assert printed | kind_of(value) == {kind for output in cell.outputs for kind in kept_kinds(output)}


def smaller(real):
    """The notebook's sweep on half of its prompts, with one control. Shorter texts would leave its budget."""

    def sweep(model, vectors, prompts, **options):
        return real(model, vectors, prompts[:4], **(options | {"n_random": 1, "neutral": ["Hi"]}))

    return sweep


def fewer(real):
    """Residual streams of at most 80 prompts of a part of a set; whole sets are read once a session."""

    def residual_streams(model, prompts, **options):
        part = prompts[:80] if 200 < len(prompts) < 400 else prompts
        return real(model, part, **options)

    return residual_streams


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """What a notebook would display: the value of a last line that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # type: ignore[attr-defined]


def kind_of(value: Any) -> set[str]:
    if isinstance(value, go.Figure | View):
        return {"picture"}
    if hasattr(value, "_repr_html_"):
        assert "<table" in value._repr_html_()
        return {"table"}
    return set() if value is None else {"text"}


def kept_kinds(output: Any) -> set[str]:
    data = output.get("data", {})
    return {"picture"} if PICTURE in data else {"table"} if PAGE in data else {"text"}


NUMBER = r"(?<![\w.])-?\d+\.\d+(?![\w.]*\d)"


def plain_signs(text: str) -> str:
    return text.replace("−", "-").replace("+", " ")


def quoted(prose: str) -> list[str]:
    """The decimal numbers of prose, signs made plain; code is left out."""
    return re.findall(NUMBER, plain_signs(re.sub(r"`[^`]*`", "", prose)))


def small(*sources: str) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Any:
    """A small notebook after `make notebooks`, which a real kernel and a real browser have made."""
    path = tmp_path_factory.mktemp("kept") / "small.ipynb"
    code = "import sys\nprint('1.25')\nprint('noise', file=sys.stderr)"
    figure = "import plotly.graph_objects as go\ngo.Figure(layout={'title': {'text': '<b>Two</b>'}})"
    nbformat.write(small(code, figure), path)
    main([path])
    return read(path)


def test_a_run_keeps_text_and_pictures_and_nothing_of_the_machine(kept):
    printed, drawn = (cell.outputs for cell in kept.cells)
    assert [output.text for output in printed] == ["1.25\n"]
    assert set(drawn[0].data) == {PICTURE, "text/plain"}
    assert drawn[0].data["text/plain"] == "Figure: Two"
    assert drawn[0].data[PICTURE].startswith("iVBOR")
    assert kept.metadata["language_info"] == {"name": "python"}
    assert faults(kept) == []
    assert shown_text(kept).split() == ["1.25", "Figure:", "Two"]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda nb: nb.cells[0].update(source="print('2')"), "other code"),
        (lambda nb: nb.cells[1].update(execution_count=None), "not all run"),
        (lambda nb: nb.cells.reverse(), "not all run"),
        (lambda nb: nb.cells[0].outputs[0].update(text="saved /home/me/a.csv"), "path"),
        (lambda nb: nb.cells[0].outputs[0].update(text="<object at 0x7f21aa0b3c10>"), "address"),
        (lambda nb: nb.cells[1].outputs[0].data.update({FIGURE: {}}), "script"),
        (lambda nb: nb.cells[1].outputs[0].data.update({PAGE: "<script>1</script>"}), "script"),
        (lambda nb: nb.cells[1].outputs[0].data.update({PICTURE: "A" * 1_600_000}), "larger"),
        (
            lambda nb: nb.cells[0].outputs.append(nbformat.v4.new_output("error", ename="KeyError")),
            "KeyError",
        ),
    ],
)
def test_what_is_wrong_with_kept_outputs_is_said(kept, spoil, fault):
    spoilt = copy.deepcopy(kept)
    spoil(spoilt)
    assert fault in "; ".join(faults(spoilt))


def test_a_line_that_moves_to_another_cell_is_other_code():
    assert code_hash(small("a = 1\nb = 2")) != code_hash(small("a = 1\n", "b = 2"))
    assert code_hash(small("a = 1")) == code_hash(small("a = 1"))


def test_a_cell_that_fails_ends_the_run_and_leaves_the_file(tmp_path):
    path = tmp_path / "broken.ipynb"
    nbformat.write(small("1 / 0"), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"(?s)broken.ipynb.*ZeroDivisionError"):
        main([path])
    assert path.read_bytes() == before


def test_a_progress_bar_that_is_done_and_a_view_are_not_kept_as_they_are(tiny_folders):
    model = ls.load_model(tiny_folders["llama"])
    cache = ls.residual_streams(model, labelled([f"a cake {i}" for i in range(20)]), progress=False)
    view = ls.plots.token_view(
        ls.token_scores(model, ["a cake"], detector=ls.Detector.fit(cache, layers=[1]))
    )
    notebook = small("1")
    notebook.cells[0].outputs = [
        nbformat.v4.new_output("display_data", {PAGE: "", "text/plain": ""}),
        nbformat.v4.new_output("execute_result", {PAGE: view._repr_html_(), "text/plain": repr(view)}),
    ]
    keep(notebook)
    (output,) = notebook.cells[0].outputs
    assert set(output.data) == {PICTURE, "text/plain"}
    assert output.data["text/plain"] == repr(view)
