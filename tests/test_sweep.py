import numpy as np
import pandas as pd
import pytest
from conftest import TEXTS, labelled

import lens_safety as ls
from lens_safety.sweep import CONTENT, RANDOM, SteeringSweep, repeated_4grams


@pytest.fixture
def swept(tiny):
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    vectors = ls.content_vectors(cache)
    result = ls.sweep(
        tiny, vectors, TEXTS[:2], layer=1, multipliers=(-2.0, 3.0), max_new_tokens=6, progress=False
    )
    return tiny, vectors, result


def test_every_direction_multiplier_and_prompt_has_its_row(swept):
    _, vectors, result = swept
    keys = result.frame[["direction", "multiplier", "prompt"]].apply(tuple, axis=1)
    expected = {(CONTENT, m, t) for m in (-2.0, 0.0, 3.0) for t in TEXTS[:2]}
    expected |= {(RANDOM, m, t) for m in (-2.0, 3.0) for t in TEXTS[:2]}
    assert set(keys) == expected
    assert len(keys) == len(expected)
    dose = result.frame.query("multiplier == 3")["dose"].to_numpy()
    np.testing.assert_allclose(dose, vectors.dose(3.0)[1])


def test_each_row_equals_a_run_with_that_multiplier_alone(swept):
    model, vectors, result = swept
    for multiplier in (-2.0, 3.0):
        with ls.steering(model, vectors, layers=[1], multiplier=multiplier):
            alone = ls.generate(model, TEXTS[:2], max_new_tokens=6)
        rows = result.frame.query("direction == 'content' and multiplier == @multiplier")
        assert list(rows["text"]) == alone
    unsteered = list(result.frame.query("multiplier == 0")["text"])
    assert unsteered == ls.generate(model, TEXTS[:2], max_new_tokens=6)


def test_nll_is_that_of_the_unsteered_model(swept):
    model, _, result = swept
    again = ls.continuation_nll(model, list(result.frame["prompt"]), list(result.frame["text"]))
    np.testing.assert_allclose(result.frame["nll"], again, rtol=1e-5)


def test_without_a_detector_the_score_is_undefined_and_the_summary_says_so(swept):
    _, _, result = swept
    assert result.frame["score"].isna().all()
    assert result.summary()["score"].isna().all()
    assert (result.summary()["n"] == 2).all()


def test_the_summary_pairs_each_prompt_with_its_own_baseline():
    frame = pd.DataFrame(
        {
            "direction": CONTENT,
            "multiplier": [0.0, 0.0, 2.0, 2.0],
            "dose": [0.0, 0.0, 0.1, 0.1],
            "prompt": ["a", "b", "b", "a"],
            "text": "t",
            "score": [1.0, 5.0, 6.0, 3.0],
            "nll": [1.0, 1.0, 2.0, 4.0],
            "repeated_4grams": 0.0,
        }
    )
    summary = SteeringSweep(frame, 1, "all", 0.0, 5, 0, "m").summary().set_index("multiplier")
    assert summary.loc[2.0, "score_change"] == pytest.approx(1.5)
    assert summary.loc[2.0, "nll"] == pytest.approx(3.0)
    assert summary.loc[2.0, "nll_low"] == pytest.approx(2.0)
    assert summary.loc[2.0, "nll_high"] == pytest.approx(4.0)


def test_repeated_4grams_by_hand():
    assert repeated_4grams("a b c d e f") == 0.0
    assert repeated_4grams("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repeated_4grams("no no no no no no") == pytest.approx(1 - 1 / 3)
    assert repeated_4grams("too short") == 0.0


@pytest.mark.parametrize("multipliers", [(), (1.0, 1.0)])
def test_bad_multipliers_are_refused(swept, multipliers):
    model, vectors, _ = swept
    with pytest.raises(ls.OptionError, match="expected at least one, each once"):
        ls.sweep(model, vectors, TEXTS[:1], layer=1, multipliers=multipliers, progress=False)


def test_a_saved_sweep_comes_back_whole(swept, tmp_path):
    result = swept[2]
    loaded = SteeringSweep.load(result.save(tmp_path / "sweep.json"))
    pd.testing.assert_frame_equal(loaded.frame, result.frame)
    assert loaded.layer == result.layer
