"""The pages of a study and a sweep: what they contain, and what a browser makes of them."""

import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Heard, browser
from pages import MARKUP, study_parts, swept

import lens_safety as ls
from lens_safety import plots
from lens_safety.findings import shown
from lens_safety.plots.style import PAPER, palette

WIDTHS = (1280, 390)
MOST = 8_000_000
SLOW = 60_000
"""Milliseconds that a busy machine may take for a page."""


class Page(HTMLParser):
    """What a page is made of: ids, addresses, and the tags and classes inside each section."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.linked: list[str] = []
        self.fetched: list[str] = []
        self.sections: dict[str, Counter[str]] = {}
        self.said: dict[str, str] = {}
        self._section, self._script = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = {key: value or "" for key, value in attrs}
        self._script = tag in ("script", "style")
        if tag == "section":
            self._section = named["id"]
            self.sections[self._section] = Counter()
        if "id" in named:
            self.ids.append(named["id"])
        if tag == "a":
            self.linked.append(named["href"])
        elif tag in ("script", "img", "link", "iframe"):
            self.fetched += [named[key] for key in ("src", "href") if key in named]
        if self._section:
            self.sections[self._section].update([tag, *named.get("class", "").split()])

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if not self._script:
            self.said[self._section] = self.said.get(self._section, "") + data


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return study_parts()


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "study": ls.report(folder / "study.html", **parts),
        "sweep": ls.sweep_report(folder / "sweep.html", swept()),
    }


@pytest.fixture(scope="module")
def pages(files) -> dict[str, Page]:
    return {name: Page(path.read_text(encoding="utf-8")) for name, path in files.items()}


@pytest.mark.parametrize("name", ["study", "sweep"])
def test_a_page_is_one_small_file_with_plotly_once_that_fetches_nothing(files, pages, name):
    assert files[name].stat().st_size < MOST
    assert files[name].read_text(encoding="utf-8").count(plots.plotly_js()[:500]) == 1
    assert pages[name].fetched == ["data:,"]


@pytest.mark.parametrize("name", ["study", "sweep"])
def test_ids_are_unique_and_the_contents_lead_to_every_section(pages, name):
    page = pages[name]
    assert len(set(page.ids)) == len(page.ids)
    inside = [address.removeprefix("#") for address in page.linked]
    assert set(inside) <= set(page.ids)
    assert [one for one in inside if one != "results"] == list(page.sections)


def test_each_section_of_a_study_has_its_figure_number_interval_and_caveat(pages):
    page = pages["study"]
    assert list(page.sections) == ["summary", "where", "how-well", "drives", "steering", "record"]
    for name in ("where", "how-well", "drives", "steering"):
        has = page.sections[name]
        assert has["figure"] == has["plotly-graph-div"] == has["figcaption"] >= 1
        assert has["value"] == has["interval"] >= 1
        assert has["caveat"] == 1
    assert page.sections["summary"]["dt"] == 5
    assert {name: has["figure"] for name, has in page.sections.items() if has["figure"]} == {
        "where": 1,
        "how-well": 2,
        "drives": 4,
        "steering": 1,
    }


def test_a_study_says_the_numbers_of_its_results(parts, pages):
    said = pages["study"].said
    accuracy = parts["reports"][1].accuracy
    assert (
        f"{accuracy.value:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]accuracy on held out 1, n = 40"
        in (said["how-well"].replace("\n", ""))
    )
    row = parts["wording"].frame.iloc[0]
    assert " ".join(shown(row, "auroc_difference")) in said["drives"]
    assert f"AUROC at layer {parts['table'].best_layer}, the best" in said["where"]
    assert "the danger score moves by −2.00 [−2.00, −2.00] at multiplier −4 (dose 0.40)" in said["summary"]
    assert "random directions: −0.4 to 0.4; +1.60 nats a token" in said["summary"]
    assert MARKUP in said["record"]


def test_a_sweep_has_a_map_for_several_layers_only(tmp_path, pages):
    assert list(pages["sweep"].sections) == [
        "summary",
        "map",
        "curves",
        "damage",
        "effects",
        "texts",
        "record",
    ]
    one = Page(ls.sweep_report(tmp_path / "one.html", swept((1,))).read_text(encoding="utf-8"))
    assert list(one.sections) == ["summary", "curves", "damage", "effects", "texts", "record"]
    assert one.sections["curves"]["figure"] == 1
    assert pages["sweep"].sections["curves"]["figure"] == 2


def test_a_sweep_says_its_largest_effects_its_slopes_and_its_price(pages):
    said = {name: " ".join(text.split()) for name, text in pages["sweep"].said.items()}
    assert "−4.00 [−4.00, −4.00]change of the danger score at layer 2, multiplier −4" in said["map"]
    assert "+4.00 [+4.00, +4.00]change of the danger score at layer 2, multiplier +4" in said["map"]
    assert "+0.50 [+0.50, +0.50]danger score a multiplier, slope at layer 1" in said["curves"]
    assert "+1.60 [+1.60, +1.60]nats a token more at layer 2" in said["damage"]
    assert "The cliff (one nat) is reached on 4 of 4 sides" in said["summary"]
    assert "8 of 8 changes lie outside the band" in said["summary"]


def test_texts_beyond_the_room_of_a_page_are_left_out_by_prompt_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["lens_safety.report"], "_TEXTS", 27)
    page = Page(ls.sweep_report(tmp_path / "few.html", swept()).read_text(encoding="utf-8"))
    # 9 rows a prompt, and three prompts fit.
    assert page.said["texts"].count("unsteered 0") == 3
    assert "5 more prompts are left out" in page.said["texts"]


@pytest.mark.parametrize(
    ("given", "signed", "expected"),
    [
        ((0.93456, 0.9, 0.97), False, ("0.93", "[0.90, 0.97]")),
        ((0.00261, 0.0011, 0.0042), True, ("+0.0026", "[+0.0011, +0.0042]")),
        ((-1.5, -2.0, -1.0), True, ("−1.50", "[−2.00, −1.00]")),
        ((-1.5, -1.5, -1.5), True, ("−1.50", "[−1.50, −1.50]")),
        ((np.nan, np.nan, np.nan), True, ("—", "")),
    ],
)
def test_an_estimate_is_shown_to_the_digits_that_its_interval_leaves(given, signed, expected):
    row = dict(zip(("x", "x_low", "x_high"), given, strict=True))
    assert shown(row, "x", signed=signed) == expected


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def opened(chromium, files) -> dict[str, tuple[Any, Heard]]:
    """Both pages, wide and light."""
    made = {}
    for name, path in files.items():
        page = chromium.new_page(viewport={"width": WIDTHS[0], "height": 900}, color_scheme="light")
        page.set_default_timeout(SLOW)
        page.on("dialog", lambda dialog: pytest.fail(f"the page ran a text: {dialog.message}"))
        heard = Heard(page)
        page.goto(path.as_uri(), wait_until="load")
        made[name] = page, heard
    return made


@pytest.mark.parametrize("name", ["study", "sweep"])
def test_a_page_fits_its_window_draws_every_figure_and_is_silent(opened, name):
    page, heard = opened[name]
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(
            f"document.querySelector('.contents details').open === {str(width > 1000).lower()}"
        )
        page.wait_for_function(
            "[...document.querySelectorAll('.main-svg')].every(s => s.clientWidth <= innerWidth)"
        )
        assert page.evaluate("document.documentElement.scrollWidth") == width
        too_wide = "e => e.getBoundingClientRect().right > innerWidth && !e.closest('.scroll, .plot, .skip')"
        assert page.evaluate(f"[...document.querySelectorAll('main *')].filter({too_wide}).length") == 0
    page.set_viewport_size({"width": WIDTHS[0], "height": 900})
    drawn = (
        "[...document.querySelectorAll('.plotly-graph-div')].map(g => g.querySelectorAll('.main-svg').length)"
    )
    assert min(page.evaluate(drawn)) >= 1
    assert heard.errors == heard.left == []


def test_the_slider_of_the_vector_changes_its_layer(opened, parts):
    page, _ = opened["study"]
    values = "() => [...document.getElementById('figure-vector').data[0].y]"
    content, detector = parts["content"], parts["detector"]
    np.testing.assert_allclose(page.evaluate(values), content.layer(detector.layer), atol=1e-3)
    rail = page.locator("#figure-vector .slider-rail-touch-rect")
    rail.scroll_into_view_if_needed()
    box = rail.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    assert detector.layer != 2
    first = f"{float(content.layer(2)[0]):.2f}"
    page.wait_for_function(f"({values})()[0].toFixed(2) === '{first}'")
    np.testing.assert_allclose(page.evaluate(values), content.layer(2), atol=1e-3)


def test_figures_follow_the_colours_of_the_page_and_print_in_light_ones(opened):
    page, heard = opened["study"]
    layouts = "[...document.querySelectorAll('.plotly-graph-div')].map(g => g._fullLayout)"
    paper, widths = (
        f"{layouts}.map(one => one.paper_bgcolor.toLowerCase())",
        f"{layouts}.map(one => one.width)",
    )
    light, dark = PAPER.lower(), palette("dark")[PAPER].lower()
    assert set(page.evaluate(paper)) == {light}
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{paper}.every(colour => colour === '{dark}')")
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert body == f"rgb({', '.join(str(int(dark[i : i + 2], 16)) for i in (1, 3, 5))})"
    before = page.evaluate(widths)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(f"{paper}.every(colour => colour === '{light}')")
    assert set(page.evaluate(widths)) == {670}
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.wait_for_function(f"{paper}.every(colour => colour === '{dark}')")
    assert page.evaluate(widths) == before
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"{paper}.every(colour => colour === '{light}')")
    assert heard.errors == []


def column(page: Any, number: int) -> list[str]:
    cells = (
        f"[...document.querySelectorAll('.texts tbody tr')].filter(r => !r.hidden).map(r => r.cells[{number}]"
    )
    return page.evaluate(f"{cells}.textContent)")


def test_a_click_on_a_head_sorts_numbers_as_numbers(opened):
    page, _ = opened["sweep"]
    button = page.locator(".texts thead button").nth(2)
    state = "document.querySelectorAll('.texts thead th')[2].getAttribute('aria-sort')"
    button.click()
    assert page.evaluate(state) == "ascending"
    values = [float(text.replace("−", "-")) for text in column(page, 2)]
    assert values == sorted(values)
    assert values[0] == -4
    button.click()
    assert page.evaluate(state) == "descending"
    values = [float(text.replace("−", "-")) for text in column(page, 2)]
    assert values == sorted(values, reverse=True)
    # The unsteered texts have no layer and stay last either way.
    for _ in range(2):
        page.locator(".texts thead button").nth(1).click()
        assert column(page, 1)[-8:] == ["—"] * 8
    page.locator(".texts thead button").nth(0).click()
    assert column(page, 0) == sorted(column(page, 0))


def test_texts_are_filtered_by_words_and_layer(opened):
    page, _ = opened["sweep"]
    page.locator(".filter input").fill("PROMPT content")
    assert len(column(page, 0)) == 64
    page.locator(".filter select").select_option("2")
    assert set(column(page, 1)) == {"2"}
    assert page.locator(".filter output").text_content() == "32 of 72 texts"
    page.locator(".filter input").fill("nowhere")
    assert column(page, 0) == []
    page.locator(".filter input").fill("")
    assert set(column(page, 1)) == {"2", "—"}
    page.locator(".filter select").select_option("")
    assert len(column(page, 0)) == 72


@pytest.mark.parametrize("name", ["study", "sweep"])
def test_markup_in_names_prompts_and_texts_is_text(opened, pages, name):
    page, _ = opened[name]
    assert page.locator(".texts b, .texts script, .record b, h2 b, figcaption b").count() == 0
    assert all(MARKUP in text for text in column(page, 0))
    assert MARKUP in pages[name].said["steering" if name == "study" else "texts"]
