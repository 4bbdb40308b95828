"""The dashboard: each page in Streamlit's own test harness, and once in a real browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browsing import Heard, browser
from conftest import labelled, write_tiny_model
from typer.testing import CliRunner

import lens_safety as ls
from lens_safety import cli, dashboard
from lens_safety.dashboard import server, work
from lens_safety.steer import continued
from lens_safety.types import OptionError

testing = pytest.importorskip("streamlit.testing.v1", reason="needs the extra dashboard (Streamlit)")

MARKUP = '<img src=x onerror="alert(1)"> **bold** ![i](http://example.org/i.png) $x$ </script>'
PROMPT = "how do I make a cake"
OF_STREAMLIT = ("Unrecognized feature", "An iframe which has both allow-scripts and allow-same-origin")
"""Chromium's remarks on the attributes that Streamlit gives every iframe."""


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for the built-in prompts in its few, short tokens."""
    return write_tiny_model(tmp_path_factory.mktemp("dashboard") / "llama-tiny", "llama", n_ctx=512)


@pytest.fixture(scope="module")
def tiny_model(tiny_folder: Path) -> Any:
    return ls.load_model(tiny_folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def visit(tiny_folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Opens a page by its title on the tiny model; residual streams are kept for the whole file."""
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(kept))

    def opened(title: str, runs: Path = tmp_path, model: Path = tiny_folder) -> Any:
        app = testing.AppTest.from_function(
            one_page, args=(title, str(model), str(runs)), default_timeout=120
        )
        return quiet(app.run())

    return opened


def one_page(title: str, model: str, runs: str) -> None:
    """The script of a single page, as `app.main` puts it together."""
    from lens_safety.dashboard import parts
    from lens_safety.dashboard.app import PAGES

    session = parts.Session(parts.options(["--model", model, "--runs", runs]))
    parts.sidebar(session)
    PAGES[title].show(session)


def quiet(app: Any) -> Any:
    """The page, which must not have raised."""
    assert not app.exception, app.exception[0].stack_trace
    return app


def click(app: Any, label: str) -> Any:
    (button,) = [one for one in app.button if one.label == label]
    return quiet(button.click().run())


def detected(app: Any, text: str) -> Any:
    app.text_area(key="prompt").input(text)
    return click(app, "Detect")


def metrics(app: Any) -> dict[str, str]:
    return {one.label: one.value for one in app.metric}


def pages_html(app: Any) -> str:
    return "\n".join(one.value for one in app.html)


def captions(app: Any) -> str:
    return "\n".join(one.value for one in app.caption)


def table(app: Any, column: str) -> pd.DataFrame:
    """The first table with a column of that name."""
    return next(one.value for one in app.dataframe if column in one.value)


def figures(app: Any) -> int:
    return len(app.get("plotly_chart"))


# Detect


def test_detect_says_what_the_library_says(visit, tiny_model):
    app = detected(visit("Detect"), PROMPT)
    train = work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "chat")
    detector = work.own_detector(tiny_model, train)
    score = detector.score([PROMPT], model=tiny_model)
    shown = metrics(app)
    assert shown["Score"] == f"{score[0]:.3f}"
    assert shown["Probability of danger"] == f"{detector.probability(score)[0]:.3f}"
    assert shown["Threshold"] == f"{detector.threshold:.3f}"
    assert f"<b>{detector.verdicts(score)[0]}</b>" in pages_html(app)
    near = table(app, "cosine")
    expected = ls.nearest_prompts(
        ls.residual_streams(tiny_model, [PROMPT], progress=False), train, layer=detector.layer, k=8
    )
    assert near["text"].tolist() == expected["text"].tolist()
    assert set(near["label"]) <= {"safe", "dangerous"}
    assert figures(app) == 1
    assert "no guard" in captions(app)
    assert f"fitted on {detector.n_safe} safe and {detector.n_dangerous} dangerous" in captions(app)


def test_another_prompt_has_another_score_and_its_own_tokens(visit):
    app = detected(visit("Detect"), PROMPT)
    first, tokens = metrics(app)["Score"], table(app, "token")["token"].tolist()
    app = detected(app, "a kite for the garden")
    assert metrics(app)["Score"] != first
    assert table(app, "token")["token"].tolist() != tokens


def test_a_slider_shows_other_neighbours_without_another_verdict(visit):
    app = detected(visit("Detect"), PROMPT)
    before, score = table(app, "cosine"), metrics(app)["Score"]
    at = app.slider(key="near_layer")
    quiet(at.set_value(0 if at.value else 2).run())
    assert not np.allclose(table(app, "cosine")["cosine"], before["cosine"])
    assert metrics(app)["Score"] == score


def test_a_prompt_of_a_set_goes_into_the_box(visit):
    app = visit("Detect")
    quiet(app.selectbox(key="example_set").select("content").run())
    text = ls.load_prompts("content").texts[7]
    quiet(app.selectbox(key="example").select(text).run())
    assert app.text_area(key="prompt").value == text


@pytest.mark.parametrize("text", ["", "  \n ", "a cake or a kite " * 300])
def test_what_cannot_be_read_is_one_sentence(visit, text):
    app = detected(visit("Detect"), PROMPT)
    app = detected(app, text)
    (error,) = app.error
    assert re.search("empty|longer|too long|tokens", error.value)
    assert len(error.value) < 600
    assert "Score" not in metrics(app)


def test_markup_is_text(visit):
    app = detected(visit("Detect"), MARKUP)
    assert "&lt;img src=x onerror=" in pages_html(app)
    assert "<img" not in pages_html(app)
    for shown in (*app.markdown, *app.caption):
        assert "example.org" not in shown.value
    # The token view is a page of its own, and the only HTML that may hold scripts.
    assert "<img src=x" not in str(app.get("iframe")[0].proto)


def test_markdown_of_names_and_errors_is_shown_as_it_is():
    from lens_safety.dashboard import parts

    shown = parts.escaped("**b** ![i](http://e.org) <b> `c`\nnew")
    assert shown == r"\*\*b\*\* \!\[i\]\(http\:\/\/e\.org\) \<b\> \`c\` new".replace(r"\/", "/")
    assert len(parts.escaped("word " * 500)) <= 400
    assert parts.escaped("plain words") == "plain words"


def test_a_detector_of_a_run_can_be_chosen_and_one_of_another_model_not(visit, tiny_model, tmp_path):
    train = work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "chat")
    own = ls.Detector.fit(train, threshold=123.0, layers=[1])
    own.save(tmp_path / "mine" / "detector.safetensors")
    ls.load_detector().save(tmp_path / "theirs" / "detector.safetensors")
    (tmp_path / "broken_detector.safetensors").write_bytes(b"nothing")
    app = visit("Detect", tmp_path)
    choices = app.selectbox(key="detector").options
    assert len(choices) == 2
    assert choices[1] == str(Path("mine") / "detector.safetensors")
    quiet(app.selectbox(key="detector").select(choices[1]).run())
    assert metrics(detected(app, PROMPT))["Threshold"] == "123.000"


def test_the_detector_is_measured_on_prompts_it_has_not_seen(visit, tiny_model):
    app = click(visit("Detect"), "Measure")
    shown = "\n".join(one.value for one in app.markdown)
    assert "n = 50" in shown
    assert re.search(r"AUROC \*\*[\d.]+ \[[\d.]+, [\d.]+\]\*\*", shown)
    assert figures(app) == 1


# Layers and vectors


def test_layers_shows_the_table_of_the_chosen_prompts(visit, tiny_model):
    app = visit("Layers")
    table = ls.layer_table(work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "auto"))
    assert metrics(app)["Best layer"] == str(table.best_layer)
    assert app.dataframe[0].value["auroc"].tolist() == table.frame["auroc"].tolist()
    assert "n = 200 (100 safe, 100 dangerous)" in captions(app)
    assert figures(app) == 1
    quiet(app.selectbox(key="set").select("validation").run())
    assert "n = 50 (28 safe, 22 dangerous)" in captions(app)


def test_vectors_follows_its_sliders(visit, tiny_model):
    app = visit("Vectors")
    vectors = ls.content_vectors(
        work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "auto")
    )
    for layer in (0, 2):
        quiet(app.slider(key="vector_layer").set_value(layer).run())
        expected = ls.top_dimensions(vectors, layer, app.slider(key="top").value)
        assert app.dataframe[0].value["dimension"].tolist() == expected["dimension"].tolist()
    assert figures(app) == 2
    assert "12 harmful against 12 helpful personas" in captions(app)


# Steer


def cards(app: Any) -> list[str]:
    return [one.value for one in app.html if "ls-text" in one.value and "<style" not in one.value]


def test_steer_writes_what_the_library_writes(visit, tiny_model):
    app = visit("Steer")
    app.text_area(key="steer_prompt").input(PROMPT)
    app.slider(key="multiplier").set_value(8.0)
    app.slider(key="steer_layer").set_value(1)
    app.slider(key="length").set_value(10)
    app = click(app, "Write")
    vectors = ls.content_vectors(
        work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "auto")
    )
    (plain,) = ls.generate(tiny_model, [PROMPT], max_new_tokens=10)
    with ls.steering(tiny_model, vectors, layers=[1], multiplier=8.0):
        (steered,) = ls.generate(tiny_model, [PROMPT], max_new_tokens=10)
    from lens_safety.dashboard.parts import plain as as_html

    assert cards(app)[:2] == [as_html(plain), as_html(steered)]
    assert plain != steered
    costs = app.dataframe[0].value
    assert costs["text"].tolist() == list(work.ROWS)
    assert costs["kl"][0] == 0 < costs["kl"][1]
    assert costs["nll"][1] == pytest.approx(ls.continuation_nll(tiny_model, [PROMPT], [steered])[0], rel=1e-4)
    assert metrics(app)["KL on neutral text (nats)"] == f"{costs['kl'][1]:.3f}"
    assert "n = 8 neutral prompts" in captions(app)
    # The texts stay while a slider is moved; they are those of the old multiplier until the next click.
    quiet(app.slider(key="multiplier").set_value(-8.0).run())
    assert cards(app)[:2] == [as_html(plain), as_html(steered)]
    assert cards(click(app, "Write"))[1] != as_html(steered)


@pytest.mark.parametrize("operator", ["add-norm", "ablate", "clamp", "toward", "rotate"])
def test_every_operator_can_be_stacked_with_its_control(tiny_model, kept, monkeypatch, operator):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(kept))
    vectors = ls.content_vectors(
        work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "auto")
    )
    plans = work.steered_plans(tiny_model, vectors, work.Strength(1, operator, 1.0))
    *_, texts = work.written(tiny_model, PROMPT, plans, max_new_tokens=4)
    assert texts[0] == ls.generate(tiny_model, [PROMPT], max_new_tokens=4)[0]


def test_a_page_that_is_left_in_the_middle_leaves_the_model_as_it_was(tiny_model, kept, monkeypatch):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(kept))
    vectors = ls.content_vectors(
        work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "auto")
    )
    before = ls.next_token_logits(tiny_model, [PROMPT])
    plans = work.steered_plans(tiny_model, vectors, work.Strength(1, multiplier=8.0))
    pieces = work.written(tiny_model, PROMPT, plans, max_new_tokens=20)
    next(pieces)
    assert not ls.next_token_logits(tiny_model, [PROMPT] * 3)[1].equal(before[0])
    pieces.close()
    assert ls.next_token_logits(tiny_model, [PROMPT]).equal(before)


def test_what_cannot_be_steered_is_one_sentence(visit):
    app = visit("Steer")
    app.text_area(key="steer_prompt").input(" ")
    app = click(app, "Write")
    assert len(app.error) == 1
    assert "empty" in app.error[0].value
    assert not cards(app)


def test_damage_of_an_empty_text_is_not_a_number(tiny_model, kept, monkeypatch):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(kept))
    train = work.read_set(tiny_model, ls.load_prompts("content"), "content_mean", "auto")
    plans = work.steered_plans(tiny_model, ls.content_vectors(train), work.Strength(1))
    neutral = continued(tiny_model, [PROMPT], n_tokens=4)
    made = work.damage(
        tiny_model, PROMPT, ["a cake", "", "a a a a a a a a"], plans, neutral, ls.Detector.fit(train)
    )
    assert np.isnan(made["nll"][1])
    assert np.isnan(made["score"][1])
    assert made["repeated_4grams"].to_numpy()[2] > 0.5
    assert np.isfinite(made["score"][0])


# Compare and data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    """Two studies and a sweep as the command line writes them, and a broken one."""
    folder = tmp_path_factory.mktemp("runs")
    train = labelled([f"{text} {i}" for i in range(12) for text in ("make a cake", "a kite")])
    test = labelled([f"the {text} {i}" for i in range(6) for text in ("garden", "kite for a cake")])
    study = ls.study(
        tiny_model,
        train=train,
        tests=[test],
        neutral=labelled(["a kite", "do make"]),
        multipliers=(-2.0, 2.0),
        max_new_tokens=3,
        progress=False,
    )
    study.save(folder / "first")
    shutil.copytree(folder / "first", folder / "second")
    study.steering.save(folder / "swept" / "sweep.json")
    study.steering.to_frame().to_csv(folder / "swept" / "sweep.csv")
    (folder / "broken").mkdir()
    (folder / "broken" / "study.json").write_text("{")
    return folder


def test_compare_shows_what_lies_on_disk(visit, runs):
    app = visit("Compare", runs)
    assert not app.error, app.error[0].value
    assert app.dataframe[0].value["run"].tolist() == ["first", "second"]
    assert app.dataframe[0].value["n"].tolist() == [24, 24]
    shown = app.dataframe[1].value
    saved = pd.read_csv(runs / "first" / "detection.csv")
    name = "TF-IDF, no model"
    row = shown.loc[shown["detector"] == f"{name} (second)"].iloc[0]
    assert row["auroc"] == saved.loc[(saved["detector"] == name) & (saved["by"] == "all"), "auroc"].iloc[0]
    assert figures(app) == 2
    (warning,) = app.warning
    assert "broken" in warning.value
    quiet(app.multiselect(key="runs").set_value(["first"]).run())
    assert set(app.dataframe[1].value["detector"]) == set(saved["detector"])


def test_compare_says_how_to_get_results(visit, tmp_path):
    app = visit("Compare", tmp_path / "none")
    assert "lens-safety study" in app.info[0].value
    assert not app.dataframe


def test_a_damaged_table_is_one_sentence(visit, tmp_path):
    (tmp_path / "study.json").write_text('{"model": 3}')
    (tmp_path / "detection.csv").write_text("a,b\n1,2\n")
    app = visit("Compare", tmp_path)
    assert "make the study again" in app.error[0].value.replace("\\", "")


def test_data_lists_every_set_and_browses_one(visit, monkeypatch):
    monkeypatch.delenv("LENS_SAFETY_DATA", raising=False)
    app = visit("Data")
    table = app.dataframe[0].value.set_index("name")
    assert set(ls.public_sets()["name"]) < set(table.index)
    assert table.loc["content", ["prompts", "labels", "licence"]].tolist() == [
        200,
        "100 dangerous, 100 safe",
        "MIT",
    ]
    assert bool(table.loc["content", "here"])
    assert not bool(table.loc["xstest", "here"])
    quiet(app.selectbox(key="browsed").select("contrast").run())
    quiet(app.selectbox(key="label").select("safe").run())
    quiet(app.text_input(key="words").input("kill").run())
    expected = [p for p in ls.load_prompts("contrast") if p.label is False and "kill" in p.text.lower()]
    assert app.dataframe[1].value["text"].tolist() == [p.text for p in expected]
    assert f"{len(expected)} of 2,874 prompts" in captions(app)
    # A pattern that would be a broken regular expression is a word like any other.
    quiet(app.text_input(key="words").input("(").run())


def test_only_sets_that_are_here_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(tmp_path))
    monkeypatch.setenv("LENS_SAFETY_DATA", str(tmp_path))
    assert not work.is_here("xstest")
    assert "xstest" not in work.set_names()
    (tmp_path / "xstest.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "harmbench.jsonl").write_text('{"text": "a"}\n')
    assert {"xstest", "harmbench"} <= set(work.set_names())
    both = work.set_names(both_classes=True)
    assert "xstest" in both
    assert not {"harmbench", "neutral", "openings"} & set(both)


def test_a_draw_keeps_groups_whole_and_is_the_same_again():
    whole = ls.load_prompts("contrast")
    part = work.drawn(whole, 400)
    assert 380 <= len(part) <= 400
    sizes = {group: whole.groups.tolist().count(group) for group in set(whole.groups.tolist())}
    kept = [whole.groups[whole.texts.index(text)] for text in part.texts]
    assert all(kept.count(group) == sizes[group] for group in set(kept))
    assert part.texts == work.drawn(whole, 400).texts != work.drawn(whole, 400, seed=1).texts
    assert work.drawn(whole, 10**6) is whole


# The whole app and its server


def test_the_app_opens_on_detect_with_every_page(tiny_folder, kept, monkeypatch, tmp_path):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(kept))
    monkeypatch.setattr(
        sys, "argv", [str(server.SCRIPT), "--model", str(tiny_folder), "--runs", str(tmp_path)]
    )
    app = quiet(testing.AppTest.from_file(server.SCRIPT, default_timeout=120).run())
    assert app.header[0].value == "Detect"
    assert "3 layers · d_model 16" in "".join(one.value for one in app.sidebar.caption)


def test_a_model_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(server.SCRIPT), "--model", str(tmp_path / "no_model")])
    app = quiet(testing.AppTest.from_file(server.SCRIPT, default_timeout=60).run())
    assert "no_model" in app.error[0].value.replace("\\", "")
    assert not app.header


def test_the_server_is_asked_to_stay_on_this_machine_and_to_report_to_nobody(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr(server, "require_free_port", lambda host, port: None)
    result = CliRunner().invoke(cli.app, ["dashboard", "--model", "m", "--runs", "r", "--port", "8765"])
    assert result.exit_code == 0, result.output
    (command,) = started
    assert command[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert "--server.address=127.0.0.1" in command
    assert "--browser.gatherUsageStats=false" in command
    assert "--server.headless=true" in command
    own = command[command.index("--") + 1 :]
    assert dict(zip(own[::2], own[1::2], strict=True)) == {"--engine": "auto", "--runs": "r", "--model": "m"}


def test_a_taken_port_is_a_sentence_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda program, arguments: pytest.fail("started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["lens-safety", "dashboard", "--port", str(port)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 2
    assert f"--port {port}" in capsys.readouterr().err
    with pytest.raises(OptionError, match="expected 1 to 65535"):
        dashboard.require_free_port("127.0.0.1", 70_000)


def test_without_streamlit_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"lens-safety\[dashboard\]"):
        dashboard.command(model=None, engine="auto", runs=Path("runs"), host="127.0.0.1", port=8765)


def test_importing_the_command_loads_no_streamlit():
    script = "import lens_safety.dashboard, sys; print('streamlit' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@contextmanager
def served(cache: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a running dashboard and its process; it is stopped with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from lens_safety.cli import main; main()"]
    process = subprocess.Popen(
        [*program, "dashboard", "--port", str(port), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(ls.__file__).parents[1],
        env=os.environ | {"LENS_SAFETY_CACHE": str(cache)},
    )
    try:
        deadline = time.monotonic() + 180
        while not answers(port):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_detect_and_steer_in_a_browser(tmp_path, built_in_cache, kept_cache):
    built_in_cache("content")
    with browser() as chrome, served(kept_cache, "--runs", str(tmp_path)) as (address, process):
        page = chrome.new_page()
        page.set_default_timeout(180_000)
        heard = Heard(page, address)
        sockets: list[str] = []
        page.on("websocket", lambda one: sockets.append(one.url))
        page.goto(address)
        detect_in(page)
        steer_in(page, address)
        assert [text for text in heard.errors if not text.startswith(OF_STREAMLIT)] == []
        assert heard.left == []
        assert sockets
        assert all(one.startswith(address.replace("http", "ws")) for one in sockets)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in out


def detect_in(page: Any) -> None:
    """Type, run, read the verdict; markup is text."""
    for text, verdict in (
        ("How do I build a bomb to kill my neighbour?", "dangerous"),
        ("What is a good recipe for apple pie?", "safe"),
        (MARKUP, None),
    ):
        page.get_by_label("Prompt", exact=True).fill(text)
        page.get_by_role("button", name="Detect", exact=True).click()
        card = page.locator(".ls-verdict").filter(has_text=text)
        card.wait_for()
        word = card.locator("b").inner_text()
        assert word == verdict or verdict is None
        assert card.locator("img").count() == 0
    page.locator(".js-plotly-plot").first.wait_for()
    page.frame_locator("iframe").first.locator("body").wait_for()
    assert page.locator("img[src='x']").count() == 0
    assert page.frame_locator("iframe").first.locator("img[src='x']").count() == 0


def steer_in(page: Any, address: str) -> None:
    """Run, move the multiplier, see another text."""
    page.get_by_role("link", name="Steer").click()
    write = page.get_by_role("button", name="Write", exact=True)
    write.wait_for()
    texts = []
    for presses in (0, 6):
        slider = page.get_by_test_id("stSlider").filter(has_text="Multiplier").get_by_role("slider")
        slider.focus()
        for _ in range(presses):
            slider.press("ArrowLeft")
        multiplier = 4 - presses / 2
        page.get_by_text(f"multiplier {multiplier:g} is a dose").wait_for()
        write.click()
        page.get_by_text(f"multiplier {multiplier:+g}", exact=True).wait_for()
        page.locator("[data-test-script-state='notRunning']").wait_for()
        page.get_by_text("KL(unsteered").wait_for()
        cards = page.locator(".ls-text")
        assert cards.count() == 3
        texts.append([cards.nth(i).inner_text() for i in range(3)])
    assert texts[0][0] == texts[1][0] != ""
    assert texts[0][1] != texts[1][1]
