from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sweeps import linear

import lens_safety as ls
from lens_safety import plots
from lens_safety.plots.damage import _log_ticks, frontier
from lens_safety.responses import Consistency


def titles(figure) -> set[str]:
    axes = [a for a in figure.layout if str(a).startswith(("xaxis", "yaxis"))]
    return {str(figure.layout[axis].title.text).replace("<br>", " ") for axis in axes}


def text(figure) -> str:
    return figure.layout.title.text.replace("<br>", " ")


@pytest.fixture(scope="module")
def sweep() -> ls.SteeringSweep:
    return linear()


def test_the_frontier_keeps_what_no_cheaper_row_outdoes():
    effects = pd.DataFrame(
        {
            "multiplier": [1.0, 2.0, 3.0, 4.0, 5.0, -1.0, -2.0, 6.0],
            "kl": [0.1, 0.2, 0.3, 0.3, 0.05, 0.1, 0.2, np.nan],
            "change": [1.0, 0.5, 2.0, 3.0, -1.0, -1.0, 2.0, 9.0],
        }
    )
    assert frontier(effects, 1, "kl")["multiplier"].tolist() == [1.0, 4.0]
    assert frontier(effects, -1, "kl")["multiplier"].tolist() == [-1.0]
    assert "gain" not in frontier(effects, 1, "kl")


def test_damage_frontier_has_every_point_the_frontier_the_control_and_a_budget(sweep):
    figure: Any = plots.damage_frontier(sweep, budget=0.5)
    random, safer, safest, worse, worst = figure.data
    np.testing.assert_allclose(sorted(safer.y), [-2, -1])
    np.testing.assert_allclose(safest.x, [0.2, 0.8])
    np.testing.assert_allclose(safest.y, [-1, -2])
    np.testing.assert_allclose(worst.y, [1, 2])
    assert len(random.x) == 3 * 4
    np.testing.assert_allclose(sorted(set(np.round(random.y, 6))), [-0.4, -0.2, 0, 0.2, 0.4])
    np.testing.assert_allclose(sorted(set(np.round(random.x, 6))), [0.2, 0.8])
    assert list(worse.customdata[0]) == [3, 2, 0.2]
    assert [s.x0 for s in figure.layout.shapes if s.x0 == s.x1] == [0.5]
    assert 0 in [s.y0 for s in figure.layout.shapes if s.y0 == s.y1]
    assert {"damage: KL on neutral prompts (nats)", "change of behaviour of the text"} <= titles(figure)
    for said in ("m", "n = 8 prompts", "95% intervals", "budget 0.5 nats"):
        assert said in text(figure)
    labels = [a.text for a in figure.layout.annotations]
    assert {"3 × -4", "3 × 4"} <= set(labels)


def test_damage_can_be_the_nll_with_its_interval(sweep):
    figure: Any = plots.damage_frontier(sweep, damage="nll")
    assert "damage: rise of the text's NLL (nats a token)" in titles(figure)
    np.testing.assert_allclose(figure.data[2].x, [0.4, 1.6])
    np.testing.assert_allclose(sorted(set(np.round(figure.data[0].x, 6))), [0.4, 1.6])
    assert figure.data[2].error_x.array is not None
    assert "budget" not in text(figure)


def test_damage_that_was_not_measured_is_refused(sweep):
    without = replace(sweep, frame=sweep.frame.assign(kl=np.nan))
    with pytest.raises(ls.OptionError, match="a sweep without KL"):
        plots.damage_frontier(without)
    with pytest.raises(ls.OptionError, match="a sweep without KL"):
        plots.operators(without)
    with pytest.raises(ls.OptionError, match="unknown damage 'luck'"):
        plots.damage_frontier(sweep, damage="luck")
    assert plots.damage_frontier(without, damage="nll").data


def test_operators_are_lines_of_effect_against_damage_beside_random_directions(sweep):
    turned = replace(linear(1.0, randoms=()), operator="rotate:5")
    figure: Any = plots.operators(sweep, turned)
    assert [t.name for t in figure.data] == ["random directions", "add", "add", "rotate:5", "rotate:5"]
    assert [t.showlegend for t in figure.data] == [True, False, True, False, True]
    _, less, more, _, turned_more = figure.data
    np.testing.assert_allclose(less.x, [0.2, 0.8])
    np.testing.assert_allclose(less.y, [-1, -2])
    np.testing.assert_allclose(more.y, [1, 2])
    np.testing.assert_allclose(turned_more.y, [2, 4])
    assert turned_more.error_y.array is not None
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["0.1", "0.2", "0.5", "1", "2", "5"]
    said = {"damage: KL on neutral prompts (nats, log scale)", "change of behaviour of the text"}
    assert said <= titles(figure)
    assert "layer 3 · n = 8 prompts" in text(figure)


def test_many_decades_of_damage_have_a_tick_each_and_no_damage_one():
    assert _log_ticks(np.array([0.002, 3.0, 0.0, np.nan])) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert _log_ticks(np.zeros(2)) == [1.0]


def test_one_operator_at_two_layers_is_two_lines(sweep):
    higher = replace(sweep, layers=(5,), frame=sweep.frame.assign(layer=sweep.frame["layer"].replace(3, 5)))
    figure: Any = plots.operators(sweep, higher)
    names = {t.name for t in figure.data}
    assert names == {"random directions", "add, layer 3", "add, layer 5"}


def test_operators_of_nothing_or_of_two_measures_are_refused(sweep):
    with pytest.raises(ls.OptionError, match="no sweeps given"):
        plots.operators()
    scored = replace(sweep, frame=sweep.frame.assign(score=sweep.frame["behaviour"], behaviour=np.nan))
    with pytest.raises(ls.OptionError, match="behaviour, score given: expected one measure"):
        plots.operators(sweep, scored)


def seen() -> Consistency:
    rows = []
    for layer in (3, 4):
        for m, left in ((-2.0, (-2.0, -1.0, 0.1)), (2.0, (2.0, 1.0, 0.5))):
            for read, moved in zip((layer, layer + 1, layer + 2), left, strict=True):
                row = {"layer": layer, "multiplier": m, "n": 9, "read_layer": read}
                values = {"projection_change": moved, "inside_change": m / 4, "text_change": m / 8}
                values |= {"silent": 0.5}
                for name, value in values.items():
                    row |= {name: value, f"{name}_low": value - 0.2, f"{name}_high": value + 0.3}
                washed = str(layer + 2) if m < 0 else "nowhere"
                rows.append(row | {"left": moved / m, "dangerous": 6, "washed_out": washed})
    return Consistency(pd.DataFrame(rows), "the detector, text alone", "lda at layer 5", "m")


def test_consistency_shows_what_is_left_seen_and_silent():
    figure: Any = plots.consistency(seen())
    by_name = {t.name: t for t in figure.data if t.name}
    assert list(by_name["multiplier -2"].x) == [3, 4, 5]
    np.testing.assert_allclose(by_name["multiplier 2"].y, [2, 1, 0.5])
    np.testing.assert_allclose(by_name["multiplier 2"].error_y.array, [0.3] * 3)
    crosses = [t for t in figure.data if t.type == "scatter" and t.marker.symbol == "x"]
    assert [list(t.x) for t in crosses] == [[5], []]
    np.testing.assert_allclose(by_name["score of the steered stream"].y, [-0.5, 0.5])
    np.testing.assert_allclose(by_name["score of the text alone"].y, [-0.25, 0.25])
    (bars,) = [t for t in figure.data if t.type == "bar"]
    assert list(bars.x) == ["-2", "2"]
    assert list(bars.y) == [0.5, 0.5]
    assert list(bars.customdata) == [6, 6]
    np.testing.assert_allclose(bars.error_y.arrayminus, [0.2, 0.2])
    assert [s.y0 for s in figure.layout.shapes] == [0, 0]
    assert {"layer read (resid_post)", "multiplier of the vector", "shift (content vectors)"} <= titles(
        figure
    )
    for said in ("lda at layer 5", "layer 3 steered", "n = 9", "judge: the detector, text alone"):
        assert said in text(figure)


def test_consistency_of_another_layer_and_of_one_that_was_not_steered():
    figure: Any = plots.consistency(seen(), 4)
    assert list(figure.data[0].x) == [4, 5, 6]
    with pytest.raises(ls.OptionError, match="layer 7 given, expected one that was steered"):
        plots.consistency(seen(), 7)
