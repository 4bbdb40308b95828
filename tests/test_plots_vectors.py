import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, FINGERPRINT, N_LAYERS, cache_of, paired, planted_cache, relabelled

import lens_safety as ls
from lens_safety import plots
from lens_safety.plots import style
from lens_safety.prompts import PromptSet
from lens_safety.separation import linear_cka


def vectors_from(rows: Any, **changes: Any) -> ls.ContentVectors:
    """Vectors with these rows, a layer each."""
    made = torch.as_tensor(rows, dtype=torch.float32)
    n_layers, d_model = made.shape
    given = {"layers": tuple(range(n_layers)), "method": "content", "position": "last", "template": "raw"}
    return ls.ContentVectors(
        vectors=made,
        safe_mean=-made / 2,
        dangerous_mean=made / 2,
        resid_norm=torch.ones(n_layers),
        n_safe=7,
        n_dangerous=5,
        source="some prompts",
        model=replace(FINGERPRINT, n_layers=n_layers, d_model=d_model),
        **given | changes,
    )


HAND = [[3.0, 0.0, -4.0, 0.0], [0.0, 0.0, -0.5, 0.0], [0.0, 6.0, 0.0, 8.0]]


def text(figure: Any) -> str:
    return re.sub("<[^>]+>", "", figure.layout.title.text.replace("<br>", " "))


def axis_titles(figure: Any) -> list[str]:
    return [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]


def steps(figure: Any) -> list[Any]:
    return list(figure.layout.sliders[0].steps)


def test_the_slider_of_the_vector_changes_three_panels_title_and_share():
    figure: Any = plots.vector(vectors_from(HAND), k=2)
    assert [step.label for step in steps(figure)] == ["0", "1", "2"]
    assert figure.layout.sliders[0].active == 1
    assert (figure.layout.yaxis3.type, figure.layout.yaxis3.autotypenumbers) == ("category", "strict")
    for layer, step in enumerate(steps(figure)):
        traces, layout = step.args
        assert step.method == "update"
        assert traces["y"][0] == traces["x"][1] == pytest.approx(HAND[layer])
        assert f"The content vector at layer {layer}" in layout["title.text"]
        assert len(traces["x"][2]) == len(traces["y"][2]) == 2
    traces, layout = steps(figure)[2].args
    assert (traces["x"][2], traces["y"][2]) == ([6.0, 8.0], ["1", "3"])
    assert traces["customdata"][2] == pytest.approx([0.36, 0.64])
    assert traces["marker.color"][0] == [0, 1, 0, 1]
    assert layout["annotations[2].text"] == "top 2: 100% of ‖v‖²"
    assert figure.layout.annotations[2].text == "top 2: 100% of ‖v‖²"


def test_what_the_slider_starts_with_is_what_its_step_would_set():
    figure: Any = plots.vector(vectors_from(HAND), layer=[0, 2], k=2)
    traces, layout = steps(figure)[figure.layout.sliders[0].active].args
    every, spread, top = figure.data
    assert (list(every.y), list(spread.x), list(top.x)) == (
        traces["y"][0],
        traces["x"][1],
        traces["x"][2],
    )
    assert layout["title.text"] == figure.layout.title.text


def test_the_slider_starts_where_it_is_told_to():
    vectors = vectors_from(HAND)
    figure: Any = plots.vector(vectors, start=0)
    assert figure.layout.sliders[0].active == 0
    assert "layer 0" in figure.layout.title.text
    with pytest.raises(ls.OptionError, match=r"start=7 given, expected one of the layers shown: \[0, 2\]"):
        plots.vector(vectors, [0, 2], start=7)


def test_one_layer_has_no_slider_and_a_wrong_one_is_refused():
    vectors = vectors_from(HAND)
    assert not plots.vector(vectors, 1).layout.sliders
    with pytest.raises(ls.MismatchError, match="layer 9 given"):
        plots.vector(vectors, 9)
    with pytest.raises(ls.OptionError, match="no layers given"):
        plots.vector(vectors, [])


def test_thirty_layers_of_a_wide_model_stay_light():
    wide = vectors_from(torch.randn(30, 576, generator=torch.Generator().manual_seed(0)))
    assert len(plots.fragment(plots.vector(wide), "v")) < 600_000


def test_rounding_keeps_four_digits_of_the_largest_and_zeros():
    assert style.rounded([1234.56, 0.04]) == [1235.0, 0.0]
    assert style.rounded([0.00123456, -1e-9]) == [0.001235, 0.0]
    assert style.rounded([0.0, 0.0]) == [0.0, 0.0]


def test_dimension_map_shows_shares_of_each_layers_norm_around_zero():
    figure: Any = plots.dimension_map(vectors_from(HAND), k=2)
    (heat,) = figure.data
    assert list(heat.y) == ["2", "3"]
    np.testing.assert_allclose(heat.z, [[-0.8, -1.0, 0.0], [0.0, 0.0, 0.8]])
    assert heat.zmin == -heat.zmax == -1.0
    assert heat.colorscale[1] == (0.5, style.PAPER)
    assert "these 2 carry 64% to 100% of ‖v‖²" in text(figure)
    assert axis_titles(figure) == ["layer (resid_post)", "dimension"]
    for k in (0, 5):
        with pytest.raises(ls.OptionError, match=f"k={k} given, expected 1 to 4"):
            plots.dimension_map(vectors_from(HAND), k=k)


def test_cosine_map_of_one_set_and_of_two():
    content = vectors_from(HAND)
    figure: Any = plots.cosine_map(content)
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]], atol=1e-3)
    tone = vectors_from([[-3.0, 0.0, 4.0, 0.0]], method="tone")
    figure: Any = plots.cosine_map(tone, content)
    np.testing.assert_allclose(figure.data[0].z, [[-1, -0.8, 0]], atol=1e-3)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    assert axis_titles(figure) == ["layer, content", "layer, tone"]
    assert "|cos| &lt; 0.98 for 95% of random directions" in text(figure)
    with pytest.raises(ls.MismatchError, match="width 4 and 3 given"):
        plots.cosine_map(content, vectors_from([[1.0, 2.0, 3.0]]))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_linear_cka_worked_by_hand():
    first = torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]])
    second = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    both = torch.cat([first, second[:, :, :1]], dim=2)
    # Of two orthogonal directions of equal size the Gram matrices are orthogonal; of both together the
    # cosine with one is 1 / sqrt(2).
    plain = linear_cka(first, torch.cat([both, second]), debiased=False)
    np.testing.assert_allclose(plain, [[1 / np.sqrt(2), 0.0]], atol=1e-9)


def test_debiased_cka_is_the_ratio_of_unbiased_hsic():
    x, y = noise(1, 7, 3).double(), noise(1, 7, 5, seed=1).double()
    k, m = (part[0] @ part[0].T * (1 - torch.eye(7)) for part in (x, y))

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        """Song et al. 2012, equation 5."""
        n = len(a)
        ab = a @ b
        together = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * ab.sum()
        return float(ab.trace() + together) / (n * (n - 3))

    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    np.testing.assert_allclose(linear_cka(x.float(), y.float()), [[expected]], atol=1e-6)


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_does_not_see_rotation_scale_and_shift_but_sees_a_stretch(debiased: bool):
    x = noise(1, 40, 6)
    turn = torch.linalg.qr(noise(6, 6, seed=2)).Q
    same = 3 * x @ turn + 5
    assert linear_cka(x, same, debiased=debiased)[0, 0] == pytest.approx(1.0, abs=1e-5)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])
    assert linear_cka(x, stretched, debiased=debiased)[0, 0] < 0.8


def test_unrelated_wide_layers_are_alike_in_the_plain_form_only():
    x, y = noise(2, 30, 300), noise(3, 30, 200, seed=3)
    assert linear_cka(x, y).shape == (2, 3)
    assert np.abs(linear_cka(x, y)).max() < 0.15
    assert linear_cka(x, y, debiased=False).min() > 0.7


def test_cka_of_a_layer_without_variation_is_zero_and_three_prompts_are_refused():
    assert linear_cka(torch.full((1, 9, 4), 0.1), noise(1, 9, 4))[0, 0] == 0
    with pytest.raises(ls.OptionError, match="3 prompts given"):
        linear_cka(noise(1, 3, 4), noise(1, 3, 4))


def test_depth_map_finds_the_layer_that_another_width_shares():
    first = cache_of(noise(2, 40, 5), [False, True] * 20)
    # The other model has four layers; its third (depth 0.75) is the first's second, turned into more axes.
    other = noise(4, 40, 7, seed=4)
    other[2] = first.resid[1] @ torch.linalg.qr(noise(7, 5, seed=5)).Q.T
    figure: Any = plots.depth_map(first, cache_of(other, [False, True] * 20))
    heat, nearest = figure.data
    assert (list(heat.y), list(heat.x)) == ([0.5, 1.0], [0.25, 0.5, 0.75, 1.0])
    assert heat.z[1][2] == pytest.approx(1.0, abs=1e-3)
    assert max(heat.z[0]) < 0.3
    assert nearest.x[1] == 0.75
    assert heat.customdata[1][2] == "layers 1 and 2"
    assert "n = 40 prompts" in text(figure)
    control = float(text(figure).split("shuffled prompts: at most ")[1])
    assert control < 0.3
    with pytest.raises(ls.MismatchError, match="the same prompts in the same order"):
        plots.depth_map(first, first[::-1])


def test_layers_side_by_side_puts_models_of_any_depth_on_one_axis():
    table = ls.layer_table(planted_cache(60)[0], n_resamples=20, n_shuffles=2)
    deeper = replace(
        table, model="deeper", frame=table.frame.assign(layer=[-1, 3, 7, 11], auroc=[0.5, 0.6, 0.7, 0.9])
    )
    figure: Any = plots.layers_side_by_side(table, deeper)
    assert len(figure.data) == 10
    band, auroc, effect, magnitude, star = figure.data[:5]
    assert list(auroc.x) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(auroc.y, table.frame["auroc"])
    np.testing.assert_allclose(effect.y, table.frame["cohens_d"])
    np.testing.assert_allclose(magnitude.y, table.frame["relative_magnitude"])
    np.testing.assert_allclose(band.y[:4], table.frame["auroc_high"])
    np.testing.assert_allclose(band.y[4:][::-1], table.frame["auroc_low"])
    assert star.x[0] == pytest.approx((table.best_layer + 1) / 3)
    assert (list(figure.data[9].x), list(figure.data[9].y)) == ([1.0], [0.9])
    assert list(figure.data[6].x) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [t.name for t in figure.data if t.showlegend] == [
        f"{model}, {table.source} (n = 60)" for model in ("planted", "deeper")
    ]
    assert [s.y0 for s in figure.layout.shapes] == [0.5]
    assert "relative depth" in figure.layout.xaxis3.title.text
    with pytest.raises(ls.OptionError, match="no layer tables given"):
        plots.layers_side_by_side()


def test_projection_shows_every_prompt_at_its_principal_components():
    cache = planted_cache(60, shift=12.0)[0]
    figure: Any = plots.projection(cache, layer=1)
    safe, dangerous = figure.data
    assert (safe.name, dangerous.name) == ("safe (n = 30)", "dangerous (n = 30)")
    assert safe.marker.symbol != dangerous.marker.symbol
    assert (safe.marker.color, dangerous.marker.color) == (style.SAFE, style.DANGEROUS)
    h = cache.layer(1).double() - cache.layer(1).double().mean(dim=0)
    _, sizes, axes = torch.linalg.svd(h, full_matrices=False)
    np.testing.assert_allclose(np.abs(dangerous.x), (h @ axes[0]).abs()[1::2], atol=0.02)
    assert np.mean(safe.x) < 0 < np.mean(dangerous.x)
    share = float(sizes[0] ** 2 / (sizes**2).sum())
    assert axis_titles(figure)[0] == f"component 1 ({share:.0%} of variance)"
    assert "fitted on these very prompts" in text(figure)
    assert "n = 60" in text(figure)
    assert not figure.layout.sliders


def test_the_slider_of_a_projection_sets_each_layers_points():
    cache = planted_cache(30)[0]
    figure: Any = plots.projection(cache, dims=3)
    assert len(steps(figure)) == N_LAYERS
    for layer, step in enumerate(steps(figure)):
        alone: Any = plots.projection(cache, layer=layer, dims=3)
        traces, layout = step.args
        for axis in "xyz":
            for shown, one in zip(traces[axis], alone.data, strict=True):
                np.testing.assert_allclose(shown, one[axis])
        assert layout["title.text"] == alone.layout.title.text
        assert layout["scene.zaxis.title.text"] == alone.layout.scene.zaxis.title.text


def gap(figure: Any) -> float:
    """How far the classes lie apart across, in standard deviations within."""
    safe, dangerous = (np.array(trace.x) for trace in figure.data)
    return float((dangerous.mean() - safe.mean()) / np.sqrt((safe.var() + dangerous.var()) / 2))


def mean_gap(figure: Any) -> float:
    safe, dangerous = (np.mean(trace.x) for trace in figure.data)
    return float(dangerous - safe)


def test_lda_shows_a_planted_gap_and_none_where_labels_mean_nothing():
    wide = noise(1, 40, 120, seed=6)
    labels = np.arange(40) % 2 == 1
    nothing: Any = plots.projection(cache_of(wide, labels), method="lda", layer=0)
    assert abs(gap(nothing)) < 1
    planted: Any = plots.projection(planted_cache(60)[0], method="lda", layer=1)
    assert gap(planted) > 2
    assert "folds without its group" in text(planted)
    assert "held out" in axis_titles(planted)[0]
    assert "% of variance)" in axis_titles(planted)[1]


def test_a_pair_is_never_scored_by_a_fold_that_holds_its_twin():
    """Twins with opposite labels: a fit that saw the one would put the other on the wrong side."""
    torch_rows = noise(1, 40, 120, seed=7).repeat_interleave(2, dim=1)[:, :40]
    twins = paired(cache_of(torch_rows, np.arange(40) % 2 == 1))
    assert mean_gap(plots.projection(twins, method="lda", layer=0)) == pytest.approx(0.0, abs=1e-6)
    alone = relabelled(twins, twins.prompts.labels)
    assert mean_gap(plots.projection(alone, method="lda", layer=0)) < -0.3


def test_hover_texts_are_escaped_wrapped_and_cut():
    cache = planted_cache(6)[0]
    nasty = replace(cache.prompts[0], text="<b>x</b> " + "long words " * 60, category="<i>")
    prompts = PromptSet((nasty, *list(cache.prompts)[1:]), "p")
    figure: Any = plots.projection(replace(cache, prompts=prompts), layer=0)
    hover = figure.data[0].hovertext[0]
    assert hover.startswith("&lt;b&gt;x&lt;/b&gt; long")
    assert "&lt;i&gt;" in hover
    assert hover.count("<br>") > 4
    assert len(hover) < 500


def test_projection_colours_by_kind_category_and_language():
    cache = planted_cache(9)[0]
    languages = ["en", "de", "zh"] * 3
    made = (replace(p, language=name, label=None) for p, name in zip(cache.prompts, languages, strict=True))
    spoken = replace(cache, prompts=PromptSet(tuple(made), "p"))
    figure: Any = plots.projection(spoken, layer=0, colour="language")
    assert [trace.name for trace in figure.data] == ["de (n = 3)", "en (n = 3)", "zh (n = 3)"]
    assert len({(t.marker.color, t.marker.symbol) for t in figure.data}) == 3
    by_label: Any = plots.projection(spoken, layer=0)
    by_category: Any = plots.projection(spoken, layer=0, colour="category")
    assert [t.name for t in by_label.data] == ["unlabelled (n = 9)"]
    assert [t.name for t in by_category.data] == ["none (n = 9)"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "tsne"}, "unknown method 'tsne'"),
        ({"colour": "mood"}, "unknown colouring 'mood'"),
        ({"dims": 4}, "dims=4 given: expected 2 or 3"),
        ({"layer": []}, "0 layers and 8 prompts given"),
    ],
)
def test_a_projection_that_cannot_be_made_is_refused(options: dict, said: str):
    with pytest.raises(ls.OptionError, match=said):
        plots.projection(planted_cache(8)[0], **options)


def test_every_figure_survives_the_dark_theme():
    vectors = vectors_from(torch.randn(3, D_MODEL))
    for figure in (
        plots.vector(vectors),
        plots.dimension_map(vectors, k=5),
        plots.projection(planted_cache(9)[0]),
    ):
        dark = json.loads(str(plots.themed(figure, "dark").to_json()))
        dark["layout"].pop("template")
        for colour in (style.SAFE, style.DANGEROUS, style.SOFT):
            assert colour not in json.dumps(dark)
