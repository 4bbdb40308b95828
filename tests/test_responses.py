"""Effects, bands, cliffs and choices by hand, on small tables whose answers are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sweeps import PROMPTS, linear, made, row

import lens_safety as ls
from lens_safety.metrics import sign_flip_p
from lens_safety.responses import ASKED, CONTENT, NOWHERE, UNSTEERED


def test_an_effect_is_paired_with_the_unsteered_text_of_its_own_prompt():
    effects = linear().effects().set_index("multiplier")
    assert effects["change"].to_dict() == pytest.approx({-4.0: -2.0, -2.0: -1.0, 2.0: 1.0, 4.0: 2.0})
    # Without pairing the spread of the prompts (0 to 7) would be in the interval.
    np.testing.assert_allclose(effects["change_low"], effects["change_high"])
    assert effects.loc[4.0, "flip"] == pytest.approx(-2.0)
    assert effects.loc[2.0, "n"] == len(PROMPTS)


def test_the_band_spans_the_means_of_single_random_directions():
    effects = linear().effects().set_index("multiplier")
    assert effects.loc[4.0, "band_low"] == pytest.approx(-0.4)
    assert effects.loc[4.0, "band_high"] == pytest.approx(0.4)
    assert effects.loc[4.0, "control"] == pytest.approx(0.0)
    assert effects.loc[4.0, "minus_control"] == pytest.approx(2.0)
    assert effects["outside_band"].to_numpy().all()
    inside = linear(slope=0.05).effects()
    assert not inside["outside_band"].to_numpy().any()


def test_without_random_directions_nothing_is_outside_their_band():
    effects = linear(randoms=()).effects()
    assert effects["band_low"].isna().to_numpy().all()
    assert not effects["outside_band"].to_numpy().any()


def test_asked_is_the_change_by_words_on_the_side_of_the_multiplier():
    sweep = linear()
    words = [
        row(ASKED, NOWHERE, s, p, behaviour=i + 7 * s) for s in (-1.0, 1.0) for i, p in enumerate(PROMPTS)
    ]
    frame = pd.concat([sweep.frame, pd.DataFrame(words)], ignore_index=True)
    effects = replace(sweep, frame=frame, flow=np.zeros((len(frame), 2))).effects().set_index("multiplier")
    assert effects["asked"].to_dict() == pytest.approx({-4.0: -7.0, -2.0: -7.0, 2.0: 7.0, 4.0: 7.0})


def test_damage_and_cliff_by_hand():
    sweep = linear()
    effects = sweep.effects().set_index("multiplier")
    assert effects.loc[4.0, "nll_change"] == pytest.approx(1.6)
    assert effects.loc[-2.0, "kl"] == pytest.approx(0.2)
    # The rise of nll goes from 0.4 at 2 to 1.6 at 4: one nat at the middle.
    cliff = sweep.cliff().set_index("side")
    assert cliff["multiplier"].to_dict() == pytest.approx({-1: -3.0, 1: 3.0})
    assert cliff.loc[1, "dose"] == pytest.approx(0.3)
    assert effects.loc[4.0, "of_cliff"] == pytest.approx(4 / 3)
    harmless = replace(sweep, frame=sweep.frame.assign(nll=1.0, kl=0.0)).cliff()
    assert harmless["multiplier"].isna().to_numpy().all()


def test_kl_alone_can_be_the_cliff():
    sweep = linear()
    frame = sweep.frame.assign(nll=1.0, kl=sweep.frame["multiplier"].abs() / 2)
    assert replace(sweep, frame=frame).cliff().set_index("side")["multiplier"].to_dict() == pytest.approx(
        {-1: -2.0, 1: 2.0}
    )


def test_slopes_are_least_squares_and_anti_steerable_prompts_are_counted():
    sweep = linear()
    table = sweep.steerability()
    assert table.loc[0, "slope"] == pytest.approx(0.5)
    assert table.loc[0, "anti_steerable"] == 0
    assert table.loc[0, "random_low"] == pytest.approx(-0.1)
    assert table.loc[0, "outside_band"]
    wrong = sweep.frame["prompt"].isin(PROMPTS[:2]) & (sweep.frame["direction"] == CONTENT)
    turned = sweep.frame["behaviour"].where(~wrong, -sweep.frame["multiplier"])
    table = replace(sweep, frame=sweep.frame.assign(behaviour=turned)).steerability()
    assert table.loc[0, "anti_steerable"] == pytest.approx(2 / 8)
    assert table.loc[0, "slope"] < 0.5


def test_slopes_equal_polyfit_on_noise():
    sweep = linear()
    noise = np.random.default_rng(0).normal(size=len(sweep.frame))
    noisy = replace(sweep, frame=sweep.frame.assign(behaviour=noise))
    slopes = noisy.slopes(3)
    rows = noisy.curves(3).query("direction == 'content'")
    for prompt in PROMPTS:
        own = rows.loc[rows["prompt"] == prompt]
        slope = np.polyfit(own["multiplier"], own["behaviour"], 1)[0]
        assert slopes.to_dict()[prompt] == pytest.approx(slope)


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other():
    sweep = linear()
    half = sweep._half(0)
    # The two halves disagree: what is best on the first does nothing on the second.
    frame = sweep.frame.copy()
    first = frame["prompt"].isin(half) & (frame["direction"] == CONTENT) & (frame["multiplier"] == 2.0)
    frame.loc[first, "behaviour"] += 50.0
    other = ~frame["prompt"].isin(half) & (frame["direction"] == CONTENT) & (frame["multiplier"] == 2.0)
    frame.loc[other, "behaviour"] -= 1.0
    best = replace(sweep, frame=frame).best(side=1, budget=2.0).iloc[0]
    assert best["multiplier"] == 2.0
    assert best["change_chosen_on"] == pytest.approx(51.0)
    assert best["change"] == pytest.approx(0.0)
    assert best["n"] == best["n_chosen_on"] == 4


def test_the_budget_is_kept_and_a_budget_that_nothing_keeps_is_said():
    sweep = linear()
    assert sweep.choose(side=1, budget=2.0)["multiplier"] == 4.0
    assert sweep.choose(side=-1, budget=0.5)["multiplier"] == -2.0
    assert sweep.choose(side=1, budget=0.3, damage="kl")["multiplier"] == 2.0
    with pytest.raises(ls.OptionError, match=r"budget 0.01 given, and the least damage of the grid is 0.4"):
        sweep.best(side=1, budget=0.01)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"side": 0}, "side=0 given"),
        ({"damage": "pain"}, "unknown damage 'pain'"),
        ({"measure": "joy"}, "unknown measure"),
    ],
)
def test_unknown_words_are_refused(options, says: str):
    with pytest.raises(ls.OptionError, match=says):
        linear().best(**({"side": 1, "budget": 1.0} | options))


def test_groups_stay_together_in_the_halves_and_the_intervals():
    sweep = linear()
    grouped = replace(sweep, frame=sweep.frame.assign(group=sweep.frame["group"] // 4))
    assert sorted(grouped._half(0)) in (PROMPTS[:4], PROMPTS[4:])
    noise = np.random.default_rng(0).normal(size=len(sweep.frame)) + (sweep.frame["group"] // 4) * 10
    width = [
        (table["change_high"] - table["change_low"]).to_numpy().mean()
        for one in (sweep, grouped)
        if (table := replace(one, frame=one.frame.assign(behaviour=noise)).effects()) is not None
    ]
    assert width[0] > 0.1
    assert width[1] >= 0


def test_the_p_value_is_the_exact_sign_flip_of_a_few_rows():
    # All of 2^3 sign patterns: 2 of 8 are as extreme.
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip_p(np.array([1.0, -1.0])) == 1.0
    assert np.isnan(sign_flip_p(np.array([])))
    assert sign_flip_p(np.array([5.0])) == 1.0
    rng = np.random.default_rng(1)
    assert sign_flip_p(rng.normal(1, 1, size=40)) < 0.01
    assert sign_flip_p(rng.normal(0, 1, size=40)) > 0.05


def test_curves_hold_the_unsteered_text_at_zero_and_unknown_layers_are_refused():
    rows = linear().curves(3)
    zeros = rows.loc[rows["multiplier"] == 0]
    assert set(zeros["direction"]) == {CONTENT, "random 1", "random 2", "random 3"}
    assert len(zeros) == 4 * len(PROMPTS)
    with pytest.raises(ls.OptionError, match="layer 9 given"):
        linear().curves(9)


def test_summary_means_by_hand():
    summary = linear().summary().query("direction == 'content'").set_index("multiplier")
    assert summary.loc[0.0, "behaviour"] == pytest.approx(3.5)
    assert summary.loc[4.0, "behaviour"] == pytest.approx(5.5)
    assert summary.loc[4.0, "behaviour_low"] < 5.5 < summary.loc[4.0, "behaviour_high"]


def test_a_saved_sweep_comes_back_whole(tmp_path):
    sweep = linear()
    loaded = ls.SteeringSweep.load(sweep.save(tmp_path / "sweep.json"))
    pd.testing.assert_frame_equal(loaded.frame, sweep.frame)
    np.testing.assert_array_equal(loaded.flow, sweep.flow)
    assert loaded.norms == sweep.norms
    assert "dose_response" in loaded._repr_html_()


@pytest.fixture
def seen(tiny):
    """A sweep by hand: pushed by 2 vectors at layer 3, of which half is left at layer 4 (or nothing)."""
    from conftest import labelled

    detector = ls.Detector.fit(
        cache := ls.residual_streams(tiny, labelled(), progress=False),
        layers=[2],
        vectors=ls.content_vectors(cache),
        threshold=0.5,
    )
    rows = [row(UNSTEERED, NOWHERE, 0.0, p, score=0.0, inside_score=0.0) for p in PROMPTS]
    inside = [0.9, 0.9, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9]
    rows += [row(CONTENT, 3, 2.0, p, score=1.0, inside_score=s) for p, s in zip(PROMPTS, inside, strict=True)]
    flow = np.array([[0.0, 1.0]] * 8 + [[4.0, 5.0]] * 8)
    return detector, replace(made(rows), flow=flow, detector=detector.digest)


def test_consistency_by_hand(seen):
    detector, sweep = seen
    frame = ls.consistency(detector, sweep).frame.set_index("read_layer")
    # (4 - 0) / norm 2 at layer 3; (5 - 1) / norm 4 at layer 4.
    assert frame["projection_change"].to_dict() == pytest.approx({3: 2.0, 4: 1.0})
    assert frame["left"].to_dict() == pytest.approx({3: 1.0, 4: 0.5})
    assert frame.loc[3, "text_change"] == pytest.approx(1.0)
    assert frame.loc[3, "dangerous"] == 8
    assert frame.loc[3, "silent"] == pytest.approx(3 / 8)
    assert set(frame["washed_out"]) == {"nowhere"}


def test_a_push_that_washes_out_is_said_to(seen):
    detector, sweep = seen
    noise = np.random.default_rng(0).normal(size=8)
    flow = sweep.flow.copy()
    flow[8:, 1] = 1.0 + noise - noise.mean()
    frame = ls.consistency(detector, replace(sweep, flow=flow)).frame
    assert set(frame["washed_out"]) == {"4"}


def test_the_judge_can_be_the_behaviour(seen):
    detector, sweep = seen
    behaviour = np.r_[np.zeros(8), np.ones(2), np.zeros(6)]
    judged = ls.consistency(
        detector, replace(sweep, frame=sweep.frame.assign(behaviour=behaviour)), dangerous_above=0.5
    )
    assert set(judged.frame["dangerous"]) == {2}
    assert judged.frame["silent"].eq(0).to_numpy().all()
    assert judged.judge == "behaviour above 0.5"


def test_another_detectors_sweep_is_refused(seen):
    detector, sweep = seen
    for digest, says in (("", "no detector"), ("0123", "another detector")):
        with pytest.raises(ls.MismatchError, match=says):
            ls.consistency(detector, replace(sweep, detector=digest))
