import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browsing import Heard, browser

import lens_safety as ls
from lens_safety.plots import View
from lens_safety.plots.token_views import ENDS
from lens_safety.readings import UNFINISHED

CUT = 0.5
READERS = {"detector": CUT, "layer 0": 0.0, "layer 1": 0.0}
PLAIN = ["How", " do", " I", " bake", "?"]
NASTY = ["</script>", "<script>", "window.ran=1", "<img src=x onerror=window.ran=1>", " &lt;", "\n", '"', "'"]
NASTY += ["`${window.ran=1}`", UNFINISHED, "🪁", "{{7*7}}"]


def scores_of(*texts: list[str], position: str = "content_mean") -> ls.TokenScores:
    """Each text between two tokens of a template; own scores are 0, 0.1, 0.2, ... and running their mean."""
    rows = []
    for number, words in enumerate(texts):
        content = np.array([False, *[True] * len(words), False])
        for place, reader in enumerate(READERS):
            own = np.where(content, np.arange(-1, len(words) + 1) / 10 + 0.02 * place, 9.0)
            sums = np.cumsum(own * content) / np.maximum(1, content.cumsum())
            shown = {"token": ["<|im_start|>", *words, "<|im_end|>"], "content": content}
            running = np.where(content.cumsum() > 0, sums, np.nan)
            numbers = {"prompt": number, "place": np.arange(len(content)), "cut": READERS[reader]}
            rows.append(
                pd.DataFrame({**numbers, **shown, "reader": reader, "score": own, "running": running})
            )
    return ls.TokenScores(
        frame=pd.concat(rows, ignore_index=True),
        prompts=tuple("".join(words) for words in texts),
        detector="two-vector at layer 1",
        position=position,
        model="planted model",
    )


def attention_of(words: list[str], n_heads: int = 3) -> ls.AttentionPatterns:
    """Head i gives weight 0.7 to the token before, the rest to the first one; layers 4 and 2."""
    n = len(words)
    pattern = torch.zeros(2, n_heads, n, n)
    pattern[..., 0] = 0.3
    pattern[..., torch.arange(1, n), torch.arange(n - 1)] += 0.7
    pattern[..., 0, 0] = 1.0
    pattern[1, 1] = torch.eye(n)
    return ls.AttentionPatterns(pattern=pattern, tokens=tuple(words), layers=(4, 2), model="planted model")


def data_of(view: View) -> dict:
    found = re.search(r"const data = (.*);\n", view.html)
    assert found is not None
    return json.loads(found.group(1))


def refused(words: str, call) -> None:
    with pytest.raises(ls.OptionError, match=words) as caught:
        call()
    assert "given" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_colours_are_how_far_the_running_score_lies_from_the_cut():
    view = ls.plots.token_view(scores_of(PLAIN))
    data = data_of(view)
    (reader,), (prompt,) = data["readers"], data["prompts"]
    running = np.cumsum([0.0, 0.1, 0.2, 0.3, 0.4]) / np.arange(1, 6)
    np.testing.assert_allclose(prompt["by"][0]["values"], running - CUT, atol=1e-4)
    assert prompt["tokens"] == PLAIN
    assert reader["reach"] == pytest.approx(CUT)
    assert (reader["low"], reader["cut"], reader["high"]) == ("0 safe", "cut 0.5", "1 dangerous")
    assert f"{ENDS[0]}, #fff, {ENDS[1]}" in view.html
    for said in ("planted model", "two-vector at layer 1", "content_mean", "Running score"):
        assert said in view.html


def test_own_scores_colour_the_text_when_asked_for():
    view = ls.plots.token_view(scores_of(PLAIN), running=False)
    values = data_of(view)["prompts"][0]["by"][0]["values"]
    np.testing.assert_allclose(values, np.array([0.0, 0.1, 0.2, 0.3, 0.4]) - CUT, atol=1e-4)
    assert view.title == "Own score of each token"


def test_a_token_is_said_with_both_scores_and_a_prompt_with_the_token_where_it_turns():
    long = [f" w{i}" for i in range(14)]
    view = ls.plots.token_view(scores_of(PLAIN, long), 1)
    lines = view.text.splitlines()
    # The mean of 0, 0.1, ..., i/10 is i/20: above 0.5 from token 12 on.
    assert lines[0] == (
        "Prompt 1: ends at 0.65, above the cut: dangerous, from token 12 on, “w11” (detector)"
    )
    assert lines[12] == "12 “ w11”: own score 1.1, running 0.55, 0.05 above the cut"
    assert lines[11] == "11 “ w10”: own score 1, running 0.5, 0 below the cut"
    assert ls.plots.token_view(scores_of(PLAIN)).text.startswith(
        "Prompt 0: ends at 0.2, below the cut: safe, from the first token on"
    )


def test_one_reader_has_no_selector_and_all_readers_have_one():
    scores = scores_of(PLAIN)
    assert "<select" not in ls.plots.token_view(scores).html
    view = ls.plots.token_view(scores, reader=None)
    options = re.findall(r"<option value=\"\d\">(.*?)</option>", view.html)
    assert options == [reader["name"] for reader in data_of(view)["readers"]] == list(READERS)
    assert len(data_of(view)["prompts"][0]["by"]) == 3
    assert "class means of layer 1" in ls.plots.token_view(scores, reader="layer 1").html


def test_prompts_side_by_side_share_a_scale():
    alone = [data_of(ls.plots.token_view(scores_of(PLAIN, PLAIN * 5), i)) for i in (0, 1)]
    both = data_of(ls.plots.token_views(scores_of(PLAIN, PLAIN * 5)))
    reaches = [one["readers"][0]["reach"] for one in alone]
    assert reaches[0] < reaches[1]  # 0.5 below the cut; 0.7 above it
    assert both["readers"][0]["reach"] == reaches[1]
    assert [prompt["tokens"] for prompt in both["prompts"]] == [PLAIN, PLAIN * 5]


def test_the_templates_tokens_are_shown_when_asked_for_and_where_they_decide():
    whole = data_of(ls.plots.token_view(scores_of(PLAIN), template=True))["prompts"][0]
    assert whole["tokens"] == ["<|im_start|>", *PLAIN, "<|im_end|>"]
    assert whole["by"][0]["values"][0] is None
    assert "no running score" in whole["by"][0]["said"][0]
    last = data_of(ls.plots.token_view(scores_of(PLAIN, position="last")))["prompts"][0]
    assert len(last["tokens"]) == len(PLAIN) + 2


def test_a_score_that_is_the_cut_everywhere_has_a_scale():
    scores = scores_of(PLAIN)
    scores.frame["running"] = scores.frame["cut"]
    assert data_of(ls.plots.token_view(scores))["readers"][0]["reach"] > 0


def test_attention_holds_the_chosen_heads_of_the_layer():
    patterns = attention_of(PLAIN)
    view = ls.plots.attention_view(patterns, 2, [1, 0])
    data = data_of(view)
    assert data["heads"] == ["head 1", "head 0"]
    np.testing.assert_allclose(data["attention"][0], np.eye(5))
    np.testing.assert_allclose(data["attention"][1], patterns.pattern[1, 0].numpy(), atol=1e-3)
    assert len(data_of(ls.plots.attention_view(patterns, 4))["heads"]) == 3
    assert "head 0: “ I” (2) looks most at “ do” (1), weight 0.70" in view.text
    assert "Attention at layer 2" in view.html
    assert "2 of 3 heads" in view.html


def test_a_prompts_layers_are_its_last_running_scores_with_one_outlined_on_the_classes_bands():
    bands = pd.DataFrame(
        {"layer": [0, 1], "safe_low": [-1, -2], "safe_high": [0, -1]}
        | {"dangerous_low": [0.5, 1], "dangerous_high": [1, 2]}
    )
    figure: Any = ls.plots.prompt_layers(scores_of(PLAIN), mark=1, bands=bands)
    unmarked: Any = ls.plots.prompt_layers(scores_of(PLAIN))
    safe, dangerous, points = figure.data
    assert (list(safe.y), list(dangerous.y)) == ([0, -1, -2, -1], [1, 2, 1, 0.5])
    assert "safe training prompts" in safe.name
    assert list(points.x) == ["0", "1"]
    np.testing.assert_allclose(points.y, [0.22, 0.24])
    assert list(points.marker.line.width) == [0, 2]
    assert len(unmarked.data) == 1
    assert figure.layout.xaxis.title.text == "layer (resid_post)"
    assert "class means" in figure.layout.yaxis.title.text
    assert list(unmarked.data[0].marker.line.width) == [0, 0]
    alone = scores_of(PLAIN)
    frame = alone.frame.loc[alone.frame["reader"] == "detector"]
    refused("detector alone", lambda: ls.plots.prompt_layers(replace(alone, frame=frame)))


def test_a_page_holds_circuitsvis_once_and_names_no_other_host(tmp_path):
    scores = scores_of(PLAIN, NASTY)
    views = [ls.plots.token_view(scores), ls.plots.token_views(scores), ls.plots.token_view(scores)]
    page = ls.plots.save_views(views, tmp_path / "views.html").read_text(encoding="utf-8")
    assert page.count("window.CircuitsVis = window.CircuitsVis ||") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?http|unpkg", page)
    assert page == ls.plots.save_views(views, tmp_path / "again.html").read_text(encoding="utf-8")
    assert "window.CircuitsVis = window.CircuitsVis ||" not in views[0].html
    assert views[0]._repr_html_().startswith("<script>window.CircuitsVis")
    assert len(repr(views[0])) < 100


def test_markup_of_a_prompt_is_no_markup_of_the_page():
    view = ls.plots.token_view(scores_of(NASTY), reader=None)
    assert view.html.count("<script>") == 1
    assert view.html.count("</script>") == 1
    assert "<img" not in view.html
    assert "<img" not in ls.plots.attention_view(attention_of(NASTY), 4).html


def test_what_is_not_there_is_refused():
    scores, patterns = scores_of(PLAIN), attention_of(PLAIN)
    refused("prompt 1 by 'detector'", lambda: ls.plots.token_view(scores, 1))
    refused("by 'layer 7'", lambda: ls.plots.token_view(scores, reader="layer 7"))
    refused("layer 3 given", lambda: ls.plots.attention_view(patterns, 3))
    refused(r"heads \[3\] given", lambda: ls.plots.attention_view(patterns, 4, [3]))
    refused(r"heads \[\] given", lambda: ls.plots.attention_view(patterns, 4, []))
    refused("no views given", lambda: ls.plots.save_views([], "views.html"))


def test_in_a_browser_views_are_alive_and_text_stays_text(tmp_path):
    scores = scores_of(PLAIN, NASTY)
    views = [ls.plots.token_views(scores, reader=None), ls.plots.attention_view(attention_of(NASTY), 4)]
    path = ls.plots.save_views(views, tmp_path / "views.html")
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 390, "height": 900}, color_scheme="dark")
        page.set_default_timeout(60_000)
        heard = Heard(page)
        page.goto(path.as_uri())
        area = page.locator(".ls-area").nth(1)
        spans = area.locator(".colored-tokens > span")
        spans.nth(len(NASTY) - 1).wait_for()
        shown = [text.replace("\u2060", "").replace("\xa0", " ") for text in spans.all_inner_texts()]
        assert [text.strip() for text in shown] == [t.strip().replace("\n", "↵") or "↵" for t in NASTY]
        spans.nth(3).hover()
        assert "onerror=window.ran=1" in area.locator(".colored-tokens > div").inner_text()
        said = page.locator(".ls-said").nth(1)
        assert said.inner_text().startswith("4 “<img src=x")
        area.focus()
        page.keyboard.press("ArrowRight")
        assert said.inner_text().startswith("5 “ &lt;”: own score 0.4, running 0.2, 0.3 below the cut")
        colour = "getComputedStyle(document.querySelectorAll('.colored-tokens > span > span')[4]).%s"
        before = page.evaluate(colour % "backgroundColor")
        page.locator("select").select_option("layer 1")
        assert page.locator("[data-end=cut]").inner_text() == "cut 0"
        page.wait_for_function(f"{colour % 'backgroundColor'} !== '{before}'")
        assert page.evaluate(colour % "color") == "rgb(0, 0, 0)"
        page.locator(".ls-heads canvas").nth(3).wait_for()
        page.locator("[role=button]").nth(2).focus()
        page.keyboard.press("Enter")
        page.get_by_text("head 2 Zoomed").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("window.ran") is None
        assert (heard.errors, heard.left) == ([], [])
