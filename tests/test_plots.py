from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import D_MODEL, N_LAYERS, planted_cache

import lens_safety as ls
from lens_safety import plots
from lens_safety.evaluate import compare
from lens_safety.sweep import CONTENT, RANDOM, SteeringSweep


def titles(figure) -> set[str]:
    axes = [a for a in figure.layout if str(a).startswith(("xaxis", "yaxis"))]
    return {str(figure.layout[axis].title.text).replace("<br>", " ") for axis in axes}


def line_heights(figure) -> list[float]:
    return [shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1]


@pytest.fixture(scope="module")
def study_parts():
    cache, _ = planted_cache(60)
    held_out, _ = planted_cache(40, seed=1, name="held out")
    detector = ls.Detector.fit(cache)
    report = ls.evaluate(detector, held_out, n_resamples=50)
    return cache, ls.content_vectors(cache), detector, report


def test_layer_curve_shows_band_control_chance_and_best_layer(study_parts):
    table = ls.layer_table(study_parts[0], n_resamples=50, n_shuffles=5)
    figure: Any = plots.layer_curve(table)
    by_name = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(by_name["AUROC"].y, table.frame["auroc"])
    np.testing.assert_allclose(by_name["shuffled labels, 97.5%"].y, table.frame["auroc_shuffled"])
    band = np.array(by_name["95% interval"].y)
    np.testing.assert_allclose(band[: N_LAYERS + 1], table.frame["auroc_high"])
    np.testing.assert_allclose(band[N_LAYERS + 1 :][::-1], table.frame["auroc_low"])
    assert 0.5 in line_heights(figure)
    assert [s.x0 for s in figure.layout.shapes if s.x0 == s.x1] == [table.best_layer] * 3
    assert {"AUROC (cross-validated)", "separation 1 − cos", "layer (resid_post)"} <= titles(figure)
    assert "planted" in figure.layout.title.text
    assert "n = 60" in figure.layout.title.text


def test_vector_shows_all_dimensions_their_distribution_and_the_largest(study_parts):
    vectors = study_parts[1]
    figure: Any = plots.vector(vectors, 1, k=5)
    every, histogram, top = figure.data
    np.testing.assert_allclose(every.y, vectors.layer(1))
    np.testing.assert_allclose(histogram.x, vectors.layer(1))
    assert len(top.x) == 5
    assert abs(top.x[-1]) == pytest.approx(float(vectors.layer(1).abs().max()))
    assert {"dimension", "value (resid units)", "dimensions"} <= titles(figure)


def test_signs_have_their_colours(study_parts):
    vectors = study_parts[1]
    figure: Any = plots.top_dimensions(vectors, 1, k=D_MODEL)
    bars = figure.data[0]
    for value, colour in zip(bars.x, bars.marker.color, strict=True):
        assert colour == (plots.DANGEROUS if value > 0 else plots.SAFE)


def test_score_distribution_shows_every_prompt_and_the_threshold(study_parts):
    report = study_parts[3]
    figure: Any = plots.score_distribution(report)
    shown = {trace.name.split(" (")[0]: np.sort(trace.x) for trace in figure.data}
    np.testing.assert_allclose(shown["dangerous"], np.sort(report.scores[report.labels]))
    np.testing.assert_allclose(shown["safe"], np.sort(report.scores[~report.labels]))
    assert [s.x0 for s in figure.layout.shapes] == [report.threshold]
    assert "score (higher = more dangerous)" in titles(figure)


def test_comparison_shows_intervals_and_the_commoner_class(study_parts):
    report = study_parts[3]
    figure: Any = plots.comparison(compare([("tone, a", report), ("content, b", report)]))
    (trace,) = figure.data
    assert list(trace.y) == ["content, b", "tone, a"]
    low = trace.x[0] - trace.error_x.arrayminus[0]
    assert low == pytest.approx(report.accuracy.low)
    assert [s.x0 for s in figure.layout.shapes] == [0.5]
    assert "accuracy (n = 40)" in titles(figure)


def test_dose_response_shows_the_random_control_through_the_same_baseline():
    frame = pd.DataFrame(
        {
            "direction": [CONTENT] * 6 + [RANDOM] * 4,
            "multiplier": [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0],
            "dose": [0.1, 0.1, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
            "prompt": ["a", "b"] * 5,
            "text": "t",
            "score": np.arange(10.0),
            "nll": 1.0,
            "repeated_4grams": 0.0,
        }
    )
    figure: Any = plots.dose_response(SteeringSweep(frame, 1, "all", 0.25, 5, 0, "m"))
    first = {trace.name: trace for trace in figure.data[:2]}
    np.testing.assert_allclose(first["content vector"].y, [0.5, 2.5, 4.5])
    np.testing.assert_allclose(first["random direction"].y, [6.5, 2.5, 8.5])
    assert 0.25 in line_heights(figure)
    assert "NLL (nats a token)" in titles(figure)
    assert "n = 2 prompts" in figure.layout.title.text


def test_tone_and_content_shows_the_cosine_and_chance(study_parts):
    vectors = study_parts[1]
    figure: Any = plots.tone_and_content(ls.random_vectors(vectors), vectors)
    np.testing.assert_allclose(figure.data[0].y, vectors.cosine(ls.random_vectors(vectors)))
    assert figure.layout.shapes[0].y1 == pytest.approx(1.96 / D_MODEL**0.5)


def test_a_saved_figure_opens_offline(study_parts, tmp_path):
    page = plots.save_html(plots.top_dimensions(study_parts[1], 1, k=3), tmp_path / "top.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
