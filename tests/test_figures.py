"""Figures of the README are drawn again from the results that analyses keep beside them."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import plotly.graph_objects as go
import pytest
from sweeps import linear
from test_plots import transfer

import lens_safety as ls
from lens_safety import plots
from lens_safety.session import Session, drawn_again
from lens_safety.types import FileError, OptionError, ResidualModel

SCRIPT = Path(__file__).parents[1] / "analyses" / "figures.py"
NAME = "12_sentiment_negative.smollm2-135m-instruct"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Each figure that was saved as a picture, by the picture's name; a Chromium draws none."""
    saved: dict[str, Any] = {}

    def save(figure: go.Figure, path: Path, **options: Any) -> Path:
        saved[path.name] = figure
        return path

    monkeypatch.setattr(plots, "save_image", save)
    return saved


def session(folder: Path, number: str = "12_sentiment") -> Session:
    # No figure is drawn by a model.
    model: Any = MagicMock(spec=ResidualModel)
    return Session(number, model, "smollm2-135m-instruct", folder, folder, 0, 0)


def figures(folder: Path, readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").write_text(readme, encoding="utf-8")
    given = ["figures.py", "--results", str(folder), "--readme", str(folder / "README.md")]
    monkeypatch.setattr(sys, "argv", given)
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_an_analysis_keeps_what_its_figure_shows_and_no_text(tmp_path: Path, pictures):
    sweep = linear()
    sweep = replace(
        sweep, frame=sweep.frame.assign(text="a secret", prompt="asked: " + sweep.frame["prompt"])
    )
    session(tmp_path).draw(plots.dose_response, sweep, name="negative", options={"measure": "nll"})
    kept = (tmp_path / f"{NAME}.json").read_text(encoding="utf-8")
    assert "secret" not in kept
    assert "asked:" not in kept
    assert len(kept) < 300_000
    drawn: Any = pictures[f"{NAME}.png"]
    expected: Any = plots.dose_response(sweep, measure="nll")
    assert drawn.layout == expected.layout
    for mine, theirs in zip(drawn.data, expected.data, strict=True):
        np.testing.assert_allclose(mine.y, theirs.y, rtol=1e-5)
    assert drawn.layout != plots.dose_response(sweep).layout


def test_the_figures_of_a_readme_are_drawn_again(tmp_path: Path, pictures, monkeypatch):
    session(tmp_path).draw(plots.dose_response, linear(), name="negative")
    matrix = transfer([("a", "a", True, 0.9), ("a", "b", False, 0.4)])
    session(tmp_path, "07_shortcuts_and_transfer").draw(plots.transfer_matrix, matrix, name="transfer")
    assert len(pictures) == 2
    before = dict(pictures)
    pictures.clear()
    figures(tmp_path, "".join(f"![it](results/{name})\n" for name in before), monkeypatch)
    assert pictures == before


def test_a_missing_result_file_is_named_with_its_command(tmp_path: Path, pictures, monkeypatch, capsys):
    session(tmp_path).draw(plots.dose_response, linear(), name="negative")
    pictures.clear()
    readme = f"![a](results/07_shortcuts_and_transfer_x.gemma-3-270m.png) ![b](results/{NAME}.png)"
    with pytest.raises(SystemExit) as stopped:
        figures(tmp_path, readme, monkeypatch)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "07_shortcuts_and_transfer_x.gemma-3-270m.json" in said
    assert "`python analyses/07_shortcuts_and_transfer.py --model gemma-3-270m`" in said
    assert NAME not in said
    assert set(pictures) == {f"{NAME}.png"}
    with pytest.raises(SystemExit):
        figures(tmp_path, "no picture", monkeypatch)
    assert "shows no picture" in capsys.readouterr().err


def test_what_no_figure_can_be_drawn_from_is_refused(tmp_path: Path):
    other = ls.plots.save_html(go.Figure(), tmp_path / "other.json")
    with pytest.raises(FileError, match="damaged or no JSON"):
        drawn_again(other)
    for kept in ({"plot": "roc"}, {"plot": "no_such", "results": [], "options": {}}, [], {"results": [{}]}):
        other.write_text(json.dumps(kept), encoding="utf-8")
        with pytest.raises(FileError, match=r"other\.json does not hold"):
            drawn_again(other)
    with pytest.raises(FileError, match="expected what a figure was drawn from"):
        drawn_again(tmp_path / "nowhere.json")
    other.write_text(json.dumps({"plot": "operators", "results": [], "options": {}}), encoding="utf-8")
    with pytest.raises((FileError, OptionError), match="no sweeps given"):
        drawn_again(other)
