"""What analysis scripts share: their arguments, prompts read once, tables and figures that are kept."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from conftest import TEXTS, labelled, write_tiny_model

import lens_safety as ls
from lens_safety import plots, session
from lens_safety.passes import Passes
from lens_safety.prompts import DATA_VARIABLE, Prompt, PromptSet
from lens_safety.session import Session, run
from lens_safety.types import OptionError

SCRIPT = "/somewhere/analyses/42_answer.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("session") / "Tiny-1.5B_Chat", "llama", n_ctx=512)


@pytest.fixture
def start(folder: Path, tmp_path: Path):
    """A session of a script with these further arguments."""

    def begin(*arguments: str) -> Session:
        own = ["--model", str(folder), "--results", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
        return Session.start(SCRIPT, "Question: which?\n\nMethod: so.", [*own, *arguments])

    return begin


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each forward pass."""
    real, seen = Passes._one_pass, []

    def count(own, batch):
        seen.append(len(batch))
        return real(own, batch)

    monkeypatch.setattr(Passes, "_one_pass", count)
    return seen


def test_arguments_are_read_and_have_defaults(start, folder, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, "before")
    made = start("--seed", "3", "--rows", "7", "--data", str(tmp_path))
    assert (made.seed, made.rows, made.number) == (3, 7, "42_answer")
    assert (made.results, made.store) == (tmp_path / "out", tmp_path / "store")
    assert ls.load_prompts(labelled(["a"]).save(tmp_path / "near.jsonl").stem).texts == ["a"]
    # No part of a name is lost at its full stop.
    assert made.model_name == "tiny-1-5b-chat"
    assert made.model.cfg.n_layers == 3
    plain = Session.start(SCRIPT, None, ["--model", str(folder)])
    assert (plain.seed, plain.rows) == (0, 0)
    assert (plain.results, plain.store) == (Path("results"), Path("runs/residuals"))


def test_without_a_model_the_built_in_one_is_read(monkeypatch, built_in):
    asked = []
    monkeypatch.setattr(session, "load_model", lambda name: asked.append(name) or built_in)
    assert Session.start(SCRIPT, "Question", []).model_name == "smollm2-135m-instruct"
    assert asked == [None]


@pytest.mark.parametrize("arguments", [["--rows", "-1"], ["--rows", "few"], ["--layer", "3"]])
def test_arguments_that_make_no_sense_are_refused_before_a_model_is_loaded(arguments, monkeypatch, capsys):
    monkeypatch.setattr(session, "load_model", lambda name: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        Session.start(SCRIPT, "Question", arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_asks_the_question(capsys):
    with pytest.raises(SystemExit):
        Session.start(SCRIPT, "Question: which?\n\nMethod: so.", ["--help"])
    shown = capsys.readouterr().out
    assert "Question: which?" in shown
    assert "Method" not in shown


def test_rows_0_and_small_sets_are_whole(start):
    content = ls.load_prompts("content")
    assert start().prompts("content") == content
    assert start("--rows", "200").prompts(content) is content


@pytest.mark.parametrize("rows", [1, 7, 80, 333])
@pytest.mark.parametrize("name", ["contrast", "categories", "languages", "adversarial"])
def test_rows_keeps_groups_whole_and_the_order(start, rows: int, name: str):
    whole = ls.load_prompts(name)
    drawn = start("--rows", str(rows)).prompts(name)
    in_whole, in_drawn = (Counter(p.group or p.text for p in prompts) for prompts in (whole, drawn))
    assert all(n == in_whole[group] for group, n in in_drawn.items())
    largest = max(in_whole.values())
    assert len(drawn) <= max(min(rows, len(whole)), largest)
    assert len(drawn) > min(rows, len(whole)) - 2 * largest
    places = [whole.texts.index(text) for text in drawn.texts]
    assert places == sorted(places)
    assert drawn.name == name


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_mixes_labels_kinds_and_categories_as_the_whole_set(start, seed: int):
    draw = start("--rows", "80", "--seed", str(seed)).prompts
    # One dangerous prompt in twenty: by chance alone a draw of 80 holds 1 to 8 of them.
    rare = labelled([f"text {i}" for i in range(400)], np.arange(400) % 20 == 0)
    assert Counter(draw(rare).labels.tolist()) == {True: 4, False: 76}
    assert Counter(prompt.category for prompt in draw("categories")) == dict.fromkeys(
        {prompt.category for prompt in ls.load_prompts("categories")}, 8
    )
    assert set(draw("contrast").kinds) == set(ls.load_prompts("contrast").kinds)


def test_a_draw_repeats_with_its_seed_and_differs_without(start):
    first, again, other = (start("--rows", "20", "--seed", s).prompts("content").texts for s in "001")
    assert first == again
    assert first != other


@pytest.mark.parametrize("n_layers", [3, 6, 12, 18, 24, 30, 48])
def test_spread_is_a_few_layers_at_equal_steps(start, monkeypatch, n_layers: int):
    made = start()
    monkeypatch.setattr(made.model.cfg, "n_layers", n_layers)
    layers = made.spread
    assert 2 <= len(layers) <= 9
    assert 0 <= min(layers) == layers[0]
    assert layers[-1] < n_layers
    assert len(set(np.diff(layers))) == 1


def test_a_set_is_read_once_a_session_and_once_a_store(start, passes, tmp_path):
    one = start()
    first = one.read(labelled(TEXTS))
    assert sum(passes) == len(TEXTS)
    assert one.read(labelled(TEXTS)) is first
    another = start()
    again = another.read(labelled(TEXTS))
    assert again is not first
    assert again.resid.equal(first.resid)
    assert sum(passes) == len(TEXTS)
    # What is not there yet, and only that, is computed.
    more = another.read(PromptSet((Prompt("a new kite", True), *labelled(TEXTS))))
    assert sum(passes) == len(TEXTS) + 1
    assert more.resid[:, 1:].equal(first.resid)
    assert list((tmp_path / "store").rglob("*.safetensors"))


def test_another_position_or_template_is_read_anew(start, passes):
    one = start()
    caches = [
        one.read(labelled(TEXTS)),
        one.read(labelled(TEXTS), position="last"),
        one.read(labelled(TEXTS), template="raw"),
    ]
    assert sum(passes) == 3 * len(TEXTS)
    assert [(cache.position, cache.template) for cache in caches] == [
        ("content_mean", "chat"),
        ("last", "chat"),
        ("content_mean", "raw"),
    ]
    assert one.read(labelled(TEXTS), template="chat") is caches[0]
    # The labels are part of what is asked for, though the store has the texts.
    assert one.read(labelled(TEXTS, [True] * 5)).prompts.labels.all()
    assert sum(passes) == 3 * len(TEXTS)


def test_rows_holds_for_what_is_read(start, passes):
    assert len(start("--rows", "10").read("content")) == sum(passes) <= 10


def test_a_table_is_printed_with_intervals_and_written_with_all_columns(start, tmp_path, capsys):
    frame = pd.DataFrame(
        {
            "detector": ["mine", "yours"],
            "n": [60, 1800],
            "auroc": [0.9, np.nan],
            "auroc_low": [0.8, np.nan],
            "auroc_high": [0.95, np.nan],
            "cost": [0.12345, 2.0],
        }
    )
    path = start().show(frame, "A title", "part", columns=["detector", "auroc", "n"])
    shown = capsys.readouterr().out
    assert path == tmp_path / "out" / "42_answer_part.tiny-1-5b-chat.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path), frame)
    assert "A title" in shown
    assert "0.90 [0.80, 0.95]" in shown
    assert "1800" in shown
    assert "—" in shown
    assert "cost" not in shown
    start().show(frame, "All of it")
    everything = capsys.readouterr().out
    assert "0.123" in everything
    assert "auroc low" not in everything
    assert pd.read_csv(tmp_path / "out" / "42_answer.tiny-1-5b-chat.csv").shape == (2, 6)


def test_a_figure_is_kept_as_html_and_as_a_picture_where_one_can_be_drawn(
    start, tmp_path, capsys, monkeypatch
):
    def cannot(figure, path, **options):
        raise OptionError(f"{path} cannot be drawn")

    monkeypatch.setattr(plots, "save_image", cannot)
    path = start().save_figure(go.Figure(go.Scatter(y=[1, 2])), "curve")
    assert path == tmp_path / "out" / "42_answer_curve.tiny-1-5b-chat.html"
    assert "Plotly.newPlot" in path.read_text()
    said = capsys.readouterr()
    assert said.err.startswith("no PNG: ")
    assert "cannot be drawn" in said.err
    assert "42_answer_curve.tiny-1-5b-chat.html" in said.out.replace("\n", "")
    monkeypatch.setattr(plots, "save_image", lambda figure, path, **options: path)
    assert start().save_figure(go.Figure()).name == "42_answer.tiny-1-5b-chat.png"
    assert capsys.readouterr().err == ""
    assert (tmp_path / "out" / "42_answer.tiny-1-5b-chat.html").is_file()


def test_run_makes_what_a_user_can_mend_one_sentence(capsys, monkeypatch):
    def main() -> None:
        ls.load_prompts("no such set")

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: no prompts 'no such set': expected")
    assert said.err.count("\n") == 1


def test_run_lets_a_mistake_of_ours_and_success_through():
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 / 0))
    done = []
    run(lambda: done.append(sys.argv))
    assert done
