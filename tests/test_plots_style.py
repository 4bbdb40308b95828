import json
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

import lens_safety as ls
from lens_safety.plots import style, themed


def channels(colour: str) -> np.ndarray:
    """Linear red, green and blue."""
    raw = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(raw <= 0.04045, raw / 12.92, ((raw + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2."""
    dark, light = sorted(float(channels(c) @ [0.2126, 0.7152, 0.0722]) for c in (first, second))
    return (light + 0.05) / (dark + 0.05)


def as_a_deuteranope_sees(colour: str) -> np.ndarray:
    """Linear channels without the green-sensitive cones (Machado et al. 2009, severity 1)."""
    seen = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    return np.clip(seen @ channels(colour), 0, 1)


def figure() -> go.Figure:
    made = go.Figure()
    made.add_bar(y=[1, -1], marker_color=[style.DANGEROUS, style.SAFE], hovertext=[f"color:{style.SOFT}", ""])
    made.add_scatter(y=[1, 2], fill="tozeroy", fillcolor=style.pale(style.DANGEROUS), line_color="#123456")
    made.add_heatmap(z=[[1, -1]], colorscale=style.DIVERGING)
    made.add_hline(0.5, line_color=style.INK)
    made.update_layout(sliders=[{"steps": [{"method": "update", "args": [{}, {"title.text": "x"}]}]}])
    made.layout.sliders[0].steps[0].args = [{}, {"title.text": style.heading("t", "n")}]
    return style.styled(made, "A title", "a note", 300)


def plain(made: go.Figure) -> str:
    """All of a figure but its template and its hover texts."""
    parts: Any = json.loads(str(made.to_json()))
    parts["layout"].pop("template")
    parts["data"][0].pop("hovertext", None)
    return json.dumps(parts, sort_keys=True).lower()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_reads_and_marks_stand_out_on_the_paper_of_each_theme(theme: str):
    colours = style.palette(theme)
    paper = colours[style.PAPER]
    assert min(contrast(colours[c], paper) for c in (style.INK, style.SOFT)) > 4.5
    assert min(contrast(colours[c], paper) for c in (style.SAFE, style.DANGEROUS, style.CONTROL)) > 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_safe_and_dangerous_differ_without_green_cones_and_red_and_green_would_not(theme: str):
    def apart(first: str, second: str) -> float:
        return float(np.abs(as_a_deuteranope_sees(first) - as_a_deuteranope_sees(second)).max())

    colours = style.palette(theme)
    assert apart(colours[style.SAFE], colours[style.DANGEROUS]) > 0.3
    assert apart("#A05A50", "#6B7A50") < 0.1


def test_each_theme_has_a_colour_of_its_own_for_each_meaning():
    both = [*style.palette("light").values(), *style.palette("dark").values()]
    assert len(set(both)) == len(both) == 20


def test_the_middle_of_the_diverging_scale_is_the_paper_of_the_theme():
    for theme in ("light", "dark"):
        template: Any = style.pio.templates[style.TEMPLATES[theme]]
        paper = template.layout.paper_bgcolor
        assert style.diverging(theme)[1] == (0.5, paper)
        assert style.sequential(theme)[0] == (0.0, paper)


def test_themed_changes_the_template_and_every_house_colour_and_only_those():
    light = figure()
    before = light.to_json()
    dark: Any = themed(light, "dark")
    assert light.to_json() == before
    assert dark.layout.template.layout.paper_bgcolor == style.palette("dark")[style.PAPER]
    for colour in (style.DANGEROUS, style.SAFE, style.INK, style.SOFT, style.PAPER, "rgba(213, 94, 0, 0.18)"):
        assert colour.lower() in plain(light), colour
        assert colour.lower() not in plain(dark), colour
    meant = style.palette("dark")
    assert list(dark.data[0].marker.color) == [meant[style.DANGEROUS], meant[style.SAFE]]
    assert dark.data[2].colorscale[1] == (0.5, meant[style.PAPER])
    assert dark.data[1].fillcolor == style.pale(meant[style.DANGEROUS])
    assert dark.data[1].line.color == "#123456"
    assert dark.data[0].hovertext[0] == f"color:{style.SOFT}"


def test_themed_there_and_back_is_the_same_figure():
    light = figure()
    assert plain(themed(themed(light, "dark"), "light")) == plain(light)
    assert plain(themed(themed(light, "dark"), "dark")) == plain(themed(light, "dark"))


def test_an_unknown_theme_is_refused():
    for call in (lambda: themed(figure(), "sepia"), lambda: style.diverging("sepia")):
        with pytest.raises(ls.OptionError, match="unknown theme 'sepia': expected one of light, dark"):
            call()


def lines_of(made: Any) -> list[str]:
    return [re.sub("<[^>]+>", "", line) for line in made.layout.title.text.split("<br>")]


def test_titles_and_notes_break_for_a_narrow_page_and_make_room():
    title = "Scores on the adversarial prompts of the held-out half: AUROC 0.96 [0.91, 1.00]"
    note = (
        "a model with a name · n = 60 · a part that alone is longer than one line of a note on a narrow page"
    )
    made: Any = style.styled(go.Figure(), title, note, 300)
    lines = lines_of(made)
    assert " ".join(lines[:3]) == title
    assert max(map(len, lines[:3])) <= 36
    assert max(map(len, lines)) <= 52
    assert lines[3] == "a model with a name · n = 60"
    assert made.layout.title.text.count("<b>") == 3
    short: Any = style.styled(go.Figure(), "Short", "note", 300)
    assert made.layout.margin.t - short.layout.margin.t == 21 * (len(lines) - 2)
    assert made.layout.height > short.layout.height == 300


def test_an_interval_is_never_torn_from_its_number():
    made = style.styled(go.Figure(), "Some scores on this set: AUROC 0.96 [0.91, 1.00]", "", 300)
    assert lines_of(made)[1] == "AUROC 0.96 [0.91, 1.00]"


def test_markup_in_a_title_is_shown_as_text():
    text: Any = style.styled(go.Figure(), "a <b>bold</b> set", "x < y & z", 300).layout.title.text
    assert "a &lt;b&gt;bold&lt;/b&gt; set" in text
    assert "x &lt; y &amp; z" in text


def test_the_legend_stands_below_the_heading_and_pushes_the_axes():
    made: Any = style.styled(go.Figure(), "A title", "a note", 400)
    legend = made.layout.legend
    assert (legend.yref, legend.yanchor) == ("container", "top")
    first_entry = 400 * (1 - legend.y) + legend.borderwidth
    assert 59 < first_entry < made.layout.margin.t
