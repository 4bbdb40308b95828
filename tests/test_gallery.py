"""The gallery holds every figure and view of `plots`, and in a browser nothing in it is cut or overlaps."""

import importlib.util
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import pytest
from browsing import Heard, browser
from conftest import write_tiny_model

import lens_safety as ls
from lens_safety import plots

SCRIPT = Path(__file__).parents[1] / "analyses" / "gallery.py"

HINTS = ("Canvas2D: Multiple readback", "[.WebGL-")
"""What Chromium says of the speed of a canvas when it draws without a graphics card."""

CUT_OR_OVERLAPPING = """
() => {
  // What a reader reads, by what it is; the rotated and the wrapped ones are boxes too.
  const kinds = {
    title: ".gtitle", axis: ".xtitle, .ytitle, .x2title, .x3title, .x4title, .y2title, .y3title, .y4title",
    bar: ".cbtitle, [class*=cb][class$=title]", legend: ".legendtext", note: ".annotation-text",
    slider: ".slider-label", tick: ".xtick text, .ytick text, .x2tick text, .x3tick text, .x4tick text," +
      " .y2tick text, .y3tick text, .y4tick text, .cbaxis text", number: ".heatmap-label text",
  };
  const said = [];
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    const box = plot.getBoundingClientRect(), seen = [];
    for (const [kind, chosen] of Object.entries(kinds))
      for (const element of plot.querySelectorAll(chosen)) {
        const r = element.getBoundingClientRect(), text = element.textContent;
        const shown = getComputedStyle(element).opacity !== "0" && r.width > 0 && r.height > 0;
        if (shown && text.trim()) seen.push({ kind, text, r, element });
      }
    const name = plot.dataset.figure ?? plot.id;
    for (const { kind, text, r } of seen)
      if (Math.max(box.left - r.left, r.right - box.right, box.top - r.top, r.bottom - box.bottom) > 1)
        said.push(`${name}: ${kind} "${text}" is cut`);
    seen.forEach((a, i) => seen.slice(i + 1).forEach(b => {
      if ((a.kind === "tick" && b.kind === "tick") || a.element.contains(b.element)) return;
      const x = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
      const y = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
      if (x > 2 && y > 3) said.push(`${name}: ${a.kind} "${a.text}" overlaps ${b.kind} "${b.text}"`);
    }));
  }
  return said;
}
"""


def figures_of_plots(names: typing.Iterable[str] = tuple(plots.__all__)) -> set[str]:
    """The functions that make a figure or a view from results; those that change a figure are not meant."""
    found = set()
    for name in names:
        made = getattr(plots, name)
        hints = {} if isinstance(made, type) else typing.get_type_hints(made)
        given = list(hints.values())[:1]
        if hints.get("return") in (go.Figure, plots.View) and given != [go.Figure]:
            found.add(name)
    return found


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up there.
    sys.modules["gallery"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(gallery: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery of a tiny model and a draw of the prompts, made by the command."""
    folder = tmp_path_factory.mktemp("gallery")
    write_tiny_model(folder / "tiny", "llama", n_ctx=512)
    given = ["gallery.py", "--model", str(folder / "tiny"), "--rows", "24", "--store", str(folder / "store")]
    fit = ls.Detector.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", given)
        # Few strengths: a wide range is still one.
        patch.setattr(gallery, "STRONG", (-50.0, -2.0, 2.0, 50.0))
        patch.setattr(gallery, "OPERATORS", {"add": gallery.MAP, "rotate:5": (-2.0, 2.0)})
        # Three folds tell as well whether a figure is whole.
        patch.setattr(ls.Detector, "fit", lambda *cache, **o: fit(*cache, **({"folds": 3} | o)))
        gallery.main()
    return folder / "gallery" / "index.html"


def test_every_figure_and_view_stands_in_the_gallery(gallery: ModuleType, monkeypatch: pytest.MonkeyPatch):
    shown = [entry for group in gallery.GROUPS.values() for entry in group]
    assert {entry.plot for entry in shown} == figures_of_plots()
    assert len(figures_of_plots()) > 25
    assert "themed" not in figures_of_plots()
    for entry in shown:
        assert entry.plot in entry.draw.__code__.co_names
        assert entry.says.endswith(".")

    def brand_new(cache: str) -> go.Figure:
        return go.Figure()

    monkeypatch.setattr(plots, "brand_new", brand_new, raising=False)
    assert "brand_new" in figures_of_plots([*plots.__all__, "brand_new"])


def test_in_a_browser_every_figure_is_drawn_and_none_is_cut_at_both_widths(page: Path, gallery: ModuleType):
    with browser() as chromium:
        shown = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        shown.set_default_timeout(60_000)
        heard = Heard(shown)
        shown.goto(page.as_uri())
        n = len([e for group in gallery.GROUPS.values() for e in group])
        assert shown.locator("article").count() == n
        assert shown.locator("nav ol ol a").count() == n
        for width, theme in ((1280, "light"), (390, "dark")):
            shown.set_viewport_size({"width": width, "height": 900})
            shown.locator(f"button[data-wanted={theme}]").click()
            drawn_everywhere(shown, theme)
            assert shown.evaluate(CUT_OR_OVERLAPPING) == [], width
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert [error for error in heard.errors if not error.startswith(HINTS)] == []
        assert heard.left == []


def test_a_cut_or_overlapping_text_is_seen(gallery: ModuleType):
    figure: Any = go.Figure(go.Scatter(y=[1, 2]))
    figure.update_layout(
        height=300, margin_b=4, margin_l=80, xaxis_title="an axis that is cut", xaxis_automargin=False
    )
    for text in ("one note", "upon another"):
        figure.add_annotation(x=0.5, y=1.5, text=text, showarrow=False)
    with browser() as chromium:
        shown = chromium.new_page(viewport={"width": 390, "height": 600})
        shown.set_content(figure.to_html(include_plotlyjs=True, default_height="300px"))
        said = shown.evaluate(CUT_OR_OVERLAPPING)
    names = {line.partition(": ")[2] for line in said}
    assert {'tick "0" is cut', 'note "one note" overlaps note "upon another"'} <= names


def drawn_everywhere(shown: Any, theme: str) -> None:
    """Scroll as a reader does, until each figure is drawn in the theme and each view has its canvas."""
    for place in shown.locator("article").all():
        place.scroll_into_view_if_needed()
    undrawn = f"""() => [...document.querySelectorAll("[data-figure]")].every(
        place => place.dataset.drawn === "{theme}" && place.querySelector("svg, canvas"))"""
    shown.wait_for_function(undrawn)
    assert shown.locator("article .colored-tokens").count() >= 2
    assert shown.locator("article .ls-heads canvas").count() >= 1
