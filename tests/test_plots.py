import importlib.util
import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from browsing import CHROMIUMS
from conftest import D_MODEL, N_LAYERS, planted_cache, relabelled
from plotly.io import _kaleido
from sweeps import linear

import lens_safety as ls
from lens_safety import plots
from lens_safety.evaluate import compare
from lens_safety.plots import style


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
    np.testing.assert_allclose(every.y, vectors.layer(1), atol=5e-4)
    np.testing.assert_allclose(histogram.x, vectors.layer(1), atol=5e-4)
    assert len(top.x) == 5
    assert abs(top.x[-1]) == pytest.approx(float(vectors.layer(1).abs().max()), abs=5e-4)
    assert {"dimension", "value (resid units)", "dimensions"} <= titles(figure)


def test_signs_have_their_colours(study_parts):
    vectors = study_parts[1]
    figure: Any = plots.top_dimensions(vectors, 1, k=D_MODEL)
    bars = figure.data[0]
    for value, colour in zip(bars.x, bars.marker.color, strict=True):
        assert colour == (style.DANGEROUS if value > 0 else style.SAFE)


def test_score_distribution_shows_every_prompt_and_the_threshold(study_parts):
    report = study_parts[3]
    figure: Any = plots.score_distribution(report)
    shown = {trace.name.split(" (")[0]: np.sort(trace.x) for trace in figure.data}
    np.testing.assert_allclose(shown["dangerous"], np.sort(report.scores[report.labels]))
    np.testing.assert_allclose(shown["safe"], np.sort(report.scores[~report.labels]))
    assert [s.x0 for s in figure.layout.shapes] == [report.threshold]
    assert "score (higher = more dangerous)" in titles(figure)
    assert f"AUROC {report.auroc.value:.2f} [{report.auroc.low:.2f}, " in figure.layout.title.text
    safe = planted_cache(20, seed=2)[0]
    alone = ls.evaluate(study_parts[2], relabelled(safe, [False] * 20), n_resamples=5)
    untold: Any = plots.score_distribution(alone)
    assert "AUROC —" in untold.layout.title.text


def test_comparison_shows_intervals_and_the_commoner_class(study_parts):
    report = study_parts[3]
    figure: Any = plots.comparison(compare([("tone, a", report), ("content, b", report)]))
    (trace,) = figure.data
    assert list(trace.y) == ["content, b", "tone, a"]
    low = trace.x[0] - trace.error_x.arrayminus[0]
    assert low == pytest.approx(report.accuracy.low)
    assert [s.x0 for s in figure.layout.shapes] == [0.5]
    assert "accuracy (n = 40)" in titles(figure)


def test_comparison_leaves_a_gap_where_a_detector_was_not_tested_on_a_set(study_parts):
    report = study_parts[3]
    short = replace(report, source="another", frame=report.frame.assign(n_safe=7, majority=0.75))
    figure: Any = plots.comparison(compare([("a", report), ("a", short), ("b", report)]))
    first, second = figure.data
    assert list(np.isfinite(first.x)) == [True, True]
    assert list(second.y) == ["b", "a"]
    assert list(np.isfinite(second.x)) == [False, True]
    assert {"accuracy (n = 40)", "accuracy (n = 27)"} <= titles(figure)
    assert [s.x0 for s in figure.layout.shapes] == [0.5, 0.75]


def test_dose_response_shows_effect_damage_the_band_and_the_cliff():
    figure: Any = plots.dose_response(linear(), 3)
    band, curve = figure.data[:2]
    assert band.name == "3 random directions"
    assert curve.name == "content vector"
    assert list(curve.x) == [-4.0, -2.0, 0.0, 2.0, 4.0]
    np.testing.assert_allclose(curve.y, [1.5, 2.5, 3.5, 4.5, 5.5])
    np.testing.assert_allclose(sorted({round(y, 6) for y in band.y[:5]}), [3.5, 3.7, 3.9])
    assert 3.5 in line_heights(figure)
    assert {shape.x0 for shape in figure.layout.shapes} >= {-3.0, 3.0}
    assert {"behaviour of the text", "NLL (nats a token)", "KL on neutral text (nats)"} <= titles(figure)
    assert "n = 8 prompts" in figure.layout.title.text


def test_dose_response_without_kl_and_controls_has_fewer_panels():
    sweep = linear(randoms=())
    sweep = replace(sweep, frame=sweep.frame.assign(kl=np.nan))
    figure: Any = plots.dose_response(sweep)
    assert "KL on neutral text (nats)" not in titles(figure)
    assert {trace.name for trace in figure.data} == {"content vector"}


def test_dose_response_over_more_than_a_tenfold_of_multipliers_squeezes_its_axis():
    wide = {-4.0: -50.0, -2.0: -2.0, 0.0: 0.0, 2.0: 2.0, 4.0: 50.0}
    sweep = linear()
    frame = sweep.frame.assign(multiplier=[wide[m] for m in sweep.frame["multiplier"]])
    figure: Any = plots.dose_response(replace(sweep, frame=frame))
    place = np.arcsinh(np.array([-25, -1, 0, 1, 25]))
    content = next(trace for trace in figure.data if trace.name == "content vector")
    np.testing.assert_allclose(content.x, place)
    assert [row[0] for row in content.customdata] == [-50, -2, 0, 2, 50]
    np.testing.assert_allclose(figure.layout.xaxis4.tickvals, place)
    assert list(figure.layout.xaxis4.ticktext) == ["-50", "-2", "0", "2", "50"]
    assert "asinh scale" in figure.layout.xaxis4.title.text
    cliffs = sorted({s.x0 for s in figure.layout.shapes if s.x0 == s.x1})
    np.testing.assert_allclose(cliffs, np.arcsinh([-26 / 2, 26 / 2]))
    assert {a.x for a in figure.layout.annotations} == set(cliffs)
    plain: Any = plots.dose_response(sweep)
    np.testing.assert_allclose(plain.data[1].x, [-4, -2, 0, 2, 4])
    assert plain.layout.xaxis4.tickvals is None
    assert "asinh" not in plain.layout.xaxis4.title.text


def test_the_steering_map_is_layer_by_multiplier_around_no_change():
    figure: Any = plots.steering_map(linear())
    effect, damage = figure.data
    np.testing.assert_allclose(effect.z, [[-2.0, -1.0, 1.0, 2.0]])
    assert effect.zmin == -effect.zmax == -2.0
    assert list(effect.y) == ["3"]
    np.testing.assert_allclose(damage.z, [[0.8, 0.2, 0.2, 0.8]])


def test_prompt_slopes_shows_each_prompt_beside_the_random_slopes():
    figure: Any = plots.prompt_slopes(linear())
    violin, band = figure.data
    np.testing.assert_allclose(violin.y, [0.5] * 8)
    np.testing.assert_allclose(band.y, [0.0], atol=1e-9)
    np.testing.assert_allclose(band.error_y.array, [0.1])


def test_tone_and_content_shows_the_cosine_and_chance(study_parts):
    vectors = study_parts[1]
    figure: Any = plots.tone_and_content(ls.random_vectors(vectors), vectors)
    np.testing.assert_allclose(figure.data[0].y, vectors.cosine(ls.random_vectors(vectors)))
    assert figure.layout.shapes[0].y1 == pytest.approx(1.96 / D_MODEL**0.5)


def test_a_saved_figure_opens_offline(study_parts, tmp_path):
    page = plots.save_html(plots.top_dimensions(study_parts[1], 1, k=3), tmp_path / "top.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page


def audit_frame(values: list[float]) -> pd.DataFrame:
    """The detector, two baselines and a rewording with these AUROCs, each 0.1 wide to either side."""
    auroc = np.array(values)
    return pd.DataFrame(
        {
            "kind": ["detector", "baseline", "baseline", "rewording"],
            "name": ["as it is", "words", "length", "polite frame"],
            "auroc": auroc,
            "auroc_low": auroc - 0.1,
            "auroc_high": auroc + 0.05,
        }
    )


def test_shortcut_audit_shows_the_detector_beside_baselines_and_rewordings_with_chance():
    frames = audit_frame([0.9, 0.6, 0.5, 0.8]), audit_frame([0.7, 0.6, 0.08, 0.8])
    first, second = (ls.ShortcutAudit(f, "lda", s, "m", 40, 0) for f, s in zip(frames, "ab", strict=True))
    figure: Any = plots.shortcut_audit(first, second)
    assert len(figure.data) == 6
    assert [trace.name for trace in figure.data[:3]] == [
        "the detector",
        "baseline",
        "the detector, text changed",
    ]
    shown = {y: (x, trace) for trace in figure.data[3:] for x, y in zip(trace.x, trace.y, strict=True)}
    assert {name: x for name, (x, _) in shown.items()} == dict(
        zip(frames[1]["name"], frames[1]["auroc"], strict=True)
    )
    bar = shown["polite frame"][1].error_x
    assert (bar.arrayminus[0], bar.array[0]) == (pytest.approx(0.1), pytest.approx(0.05))
    assert [s.x0 for s in figure.layout.shapes] == [0.5, 0.5]
    assert figure.layout.xaxis.range[0] == figure.layout.xaxis2.range[0] < 0.08 - 0.1
    assert list(figure.layout.yaxis.categoryarray)[::-1] == frames[0]["name"].tolist()
    assert "AUROC (n = 40)" in titles(figure)
    assert "lda · m · 95% intervals" in figure.layout.title.text
    with pytest.raises(ls.OptionError, match="no audits given"):
        plots.shortcut_audit()


def transfer(rows: list[tuple[str, str, bool, float]]) -> ls.TransferMatrix:
    return ls.TransferMatrix(
        pd.DataFrame(rows, columns=["train", "test", "inside", "auroc"]), "lda, best", "m", 0
    )


SQUARE = [("a", "a", True, 0.9), ("a", "b", False, 0.25), ("b", "a", False, 0.6), ("b", "b", True, 0.8)]


@pytest.mark.parametrize("left_out", [False, True])
def test_transfer_matrix_shows_each_auroc_and_stars_what_was_cross_validated(left_out: bool):
    more = [("all but a", "a", False, 0.7)] if left_out else []
    figure: Any = plots.transfer_matrix(transfer(SQUARE + more))
    (heat,) = figure.data
    assert list(heat.x) == ["a", "b"]
    assert list(heat.y) == ["a", "b"] + ["all but a"] * left_out
    np.testing.assert_array_equal(heat.z[:2], [[0.9, 0.25], [0.6, 0.8]])
    assert [list(row) for row in heat.text[:2]] == [["0.90*", "0.25"], ["0.60", "0.80*"]]
    if left_out:
        assert list(heat.text[2]) == ["0.70", ""]
        np.testing.assert_array_equal(heat.z[2], [0.7, np.nan])
    assert (heat.zmin, heat.zmid, heat.zmax) == (0, 0.5, 1)
    assert {"tested on", "fitted on"} <= titles(figure)
    assert "white = chance" in figure.layout.title.text


def curve(method: str, middle: float) -> ls.LabelCurve:
    auroc = middle + np.array([-0.1, 0.1, 0.2])
    frame = pd.DataFrame({"labels": [10, 10, 50], "seed": [0, 1, 0], "auroc": auroc, "accuracy": auroc / 2})
    return ls.LabelCurve(frame, method, "train", "test", "m", 33)


@pytest.mark.parametrize(("measure", "scale"), [("auroc", 1), ("accuracy", 0.5)])
def test_label_curve_shows_the_mean_the_band_over_seeds_and_chance(measure: str, scale: float):
    figure: Any = plots.label_curve(curve("lda", 0.6), curve("logistic", 0.7), measure=measure)
    band, line, _, other = figure.data
    assert (line.name, other.name) == ("lda", "logistic")
    assert list(line.x) == [10, 50]
    np.testing.assert_allclose(line.y, np.array([0.6, 0.8]) * scale)
    np.testing.assert_allclose(other.y, np.array([0.7, 0.9]) * scale)
    np.testing.assert_allclose(band.y, np.array([0.7, 0.8, 0.8, 0.5]) * scale)
    assert list(band.x) == [10, 50, 50, 10]
    assert line_heights(figure) == [0.5]
    assert {"training labels (log scale)", "AUROC" if measure == "auroc" else "accuracy"} <= titles(figure)
    text = figure.layout.title.text.replace("<br>", " ")
    assert "tested on test (n = 33)" in text
    assert "lowest to highest seed" in text


def test_no_label_curve_is_dropped_and_none_at_all_is_refused():
    figure: Any = plots.label_curve(*(curve(f"method {i}", 0.5) for i in range(6)))
    assert [t.name for t in figure.data if t.name] == [f"method {i}" for i in range(6)]
    with pytest.raises(ls.OptionError, match="no label curves"):
        plots.label_curve()


def test_tone_cells_shows_the_share_flagged_before_and_after():
    flagged = {
        "flagged": np.array([0.0, 1.0, 0.5, 0.9]),
        "flagged_without_tone": np.array([0.1, 0.8, 0.2, 0.7]),
    }
    widths = {"flagged": (0.1, 0.2), "flagged_without_tone": (0.3, 0.4)}
    low = {f"{name}_low": flagged[name] - widths[name][0] for name in flagged}
    high = {f"{name}_high": flagged[name] + widths[name][1] for name in flagged}
    cells = pd.DataFrame(
        {
            "tone": ["polite", "polite", "rude", "rude"],
            "label": ["safe", "dangerous"] * 2,
            "n": [30, 20, 25, 40],
            **flagged,
            **low,
            **high,
        }
    )
    figure: Any = plots.tone_cells(ls.ToneContent(pd.DataFrame(), cells, 1, "contrast", "m", 0))
    before, after = figure.data
    assert list(before.x) == ["safe, polite", "dangerous, polite", "safe, rude", "dangerous, rude"]
    np.testing.assert_allclose(before.y, flagged["flagged"])
    np.testing.assert_allclose(after.y, flagged["flagged_without_tone"])
    for bars, (below, above) in zip((before, after), widths.values(), strict=True):
        np.testing.assert_allclose(bars.error_y.arrayminus, below)
        np.testing.assert_allclose(bars.error_y.array, above)
    assert (before.name, after.name) == ("as it is", "tone projected out")
    assert "share flagged" in titles(figure)
    assert "layer 1 · contrast, n = 20 a bar · 95% intervals" in figure.layout.title.text


def test_a_picture_is_written_where_kaleido_and_a_chromium_are(tmp_path):
    if importlib.util.find_spec("kaleido") is None:
        pytest.skip("needs kaleido (pip install 'lens-safety[figures]')")
    if not (os.environ.get("BROWSER_PATH") or any(map(shutil.which, CHROMIUMS))):
        pytest.skip("needs an installed Chromium")
    path = plots.save_image(
        go.Figure(go.Scatter(y=[1, 2])), tmp_path / "new" / "figure.PNG", width=300, scale=1.0
    )
    assert path == tmp_path / "new" / "figure.PNG"
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 300
    assert list(path.parent.iterdir()) == [path]


def test_what_a_picture_lacks_is_said_in_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"

    def refused(at) -> str:
        with pytest.raises(ls.OptionError) as caught:
            plots.save_image(go.Figure(), at)
        assert list(tmp_path.iterdir()) == []
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in (str(at), "pip install 'lens-safety[figures]'", "Chromium"))
        return message

    monkeypatch.setattr(_kaleido, "_KALEIDO_AVAILABLE", False)
    assert "(Image export requires the Kaleido package" in refused(path)

    def failing(text: str):
        def to_image(*args, **options):
            raise RuntimeError(text)

        monkeypatch.setattr(go.Figure, "to_image", to_image)

    failing(_kaleido.PLOTLY_GET_CHROME_ERROR_MSG)
    assert "(Kaleido requires Google Chrome to be installed)" in refused(path)
    failing("")
    assert "(RuntimeError)" in refused(path)
    monkeypatch.setattr(go.Figure, "to_image", lambda *args, **options: b"drawn")
    for other in ("figure", "figure.html"):
        assert "expected a .png, .svg or .pdf path" in refused(tmp_path / other)
