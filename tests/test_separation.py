from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import D_MODEL, cache_of, constant_cache, planted_cache, relabelled
from sklearn.metrics import roc_auc_score

import lens_safety as ls
from lens_safety.residuals import ResidualCache


def table_of(cache: ResidualCache, **options) -> ls.LayerTable:
    return ls.layer_table(cache, **{"n_resamples": 200, "n_shuffles": 20, **options})


def row_of(table: ls.LayerTable, layer: int) -> dict:
    frame = table.to_frame()
    return frame[frame["layer"] == layer].iloc[0].to_dict()


def held_out_scores(cache: ResidualCache, layer: int, folds: int = 5, seed: int = 0) -> np.ndarray:
    """The definition in the docstring, a fold and a row at a time."""
    h, labels = cache.layer(layer).double().numpy(), cache.prompts.labels
    scores = np.full(len(labels), np.nan)
    for held in cache.prompts.folds(folds, seed=seed):
        others = np.setdiff1d(np.arange(len(labels)), held)
        safe = h[[i for i in others if not labels[i]]].mean(axis=0)
        dangerous = h[[i for i in others if labels[i]]].mean(axis=0)
        v = dangerous - safe
        for i in held:
            scores[i] = (h[i] - (safe + dangerous) / 2) @ v / np.linalg.norm(v)
    return scores


def test_the_planted_layer_is_the_best_and_scores_high():
    table = table_of(planted_cache(80, layer=2)[0])
    planted = row_of(table, 2)
    assert table.best_layer == 2
    assert planted["auroc"] > 0.9
    assert planted["auroc_low"] > 0.8
    assert planted["cohens_d"] > 1.5
    assert planted["split_half_cosine"] > 0.7


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_a_layer_of_noise_is_at_chance(layer: int):
    noise = row_of(table_of(planted_cache(400)[0]), layer)
    assert 0.4 < noise["auroc"] < 0.6
    assert noise["auroc_low"] < 0.51
    assert noise["auroc_high"] > 0.49
    assert abs(noise["cohens_d"]) < 0.3
    assert abs(noise["split_half_cosine"]) < 0.3


def test_the_interval_holds_the_estimate_and_narrows_with_more_prompts():
    few, many = (row_of(table_of(planted_cache(n, shift=1.0)[0]), 1) for n in (60, 600))
    for row in (few, many):
        assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
    assert many["auroc_high"] - many["auroc_low"] < 0.5 * (few["auroc_high"] - few["auroc_low"])


def test_shuffled_labels_stay_below_a_planted_layer_and_above_chance():
    planted = row_of(table_of(planted_cache(200)[0]), 1)
    assert 0.5 < planted["auroc_shuffled"] < 0.7 < planted["auroc"]


def test_separation_and_magnitude_worked_by_hand():
    resid = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [4.0, 0.0], [0.0, 5.0]]])
    row = row_of(table_of(cache_of(resid, [False, True, False, True])), 0)
    assert row["separation"] == pytest.approx(1.0)
    assert row["magnitude"] == pytest.approx(5.0)
    assert row["relative_magnitude"] == pytest.approx(5 / 3)
    slanted = torch.tensor([[[2.0, 0.0], [3.0, 3.0], [4.0, 0.0], [5.0, 5.0]]])
    row = row_of(table_of(cache_of(slanted, [False, True, False, True])), 0)
    assert row["separation"] == pytest.approx(1 - 1 / np.sqrt(2), abs=1e-6)


def test_auroc_and_effect_size_are_those_of_held_out_projections():
    cache, _ = planted_cache(50, shift=1.0)
    labels = cache.prompts.labels
    for layer in (-1, 0, 1, 2):
        row, scores = row_of(table_of(cache), layer), held_out_scores(cache, layer)
        safe, dangerous = scores[~labels], scores[labels]
        pooled = np.sqrt((dangerous.var(ddof=1) + safe.var(ddof=1)) / 2)
        assert row["cohens_d"] == pytest.approx((dangerous.mean() - safe.mean()) / pooled, rel=1e-4)
        assert row["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


def test_flipping_the_labels_changes_no_figure_of_a_layer():
    cache, _ = planted_cache(60)
    table, flipped = table_of(cache), table_of(relabelled(cache, ~cache.prompts.labels))
    for name in ("separation", "magnitude", "auroc"):
        assert list(flipped.frame[name]) == pytest.approx(list(table.frame[name]), abs=0.03)


@pytest.mark.parametrize("n", [22, 23, 41])
def test_a_layer_without_a_direction_is_at_chance_exactly_and_said_to_be_zero(n: int):
    cache = constant_cache(n)
    cache = replace(cache, embed=cache.resid[0])
    table = table_of(cache)
    assert not table.to_frame().isna().to_numpy().any()
    for layer in (-1, 0, 1, 2):
        row = row_of(table, layer)
        assert row["is_zero"]
        assert (row["auroc"], row["auroc_low"], row["auroc_high"]) == (0.5, 0.5, 0.5)
        assert row["cohens_d"] == row["split_half_cosine"] == 0
        assert row["separation"] == pytest.approx(0, abs=1e-6)


def test_a_layer_with_a_direction_is_not_said_to_be_zero():
    assert not table_of(planted_cache()[0]).to_frame()["is_zero"].to_numpy().any()


def test_copies_of_a_prompt_in_one_group_do_not_lift_noise_above_chance():
    noise = torch.randn(6, 40, 48, generator=torch.Generator().manual_seed(0))
    copies = noise.repeat_interleave(5, dim=1)
    labels = np.repeat(np.arange(40) % 2 == 1, 5)
    groups = [f"copies of {i // 5}" for i in range(200)]
    honest = table_of(cache_of(copies, labels, groups=groups)).frame["auroc"].to_numpy()[1:]
    leaky = table_of(cache_of(copies, labels)).frame["auroc"].to_numpy()[1:]
    assert honest.mean() < 0.6
    assert leaky.mean() > 0.8


def test_copies_of_a_prompt_in_one_group_do_not_narrow_the_interval():
    cache, _ = planted_cache(40, shift=2.0)
    once = cache_of(cache.resid, cache.prompts.labels)
    copies, labels = cache.resid.repeat_interleave(6, dim=1), np.repeat(cache.prompts.labels, 6)
    groups = [f"copies of {i // 6}" for i in range(240)]
    widths = [
        row["auroc_high"] - row["auroc_low"]
        for row in (
            row_of(table_of(once), 1),
            row_of(table_of(cache_of(copies, labels, groups=groups)), 1),
            row_of(table_of(cache_of(copies, labels)), 1),
        )
    ]
    assert widths[1] > 0.7 * widths[0]
    assert widths[2] < 0.6 * widths[0]


def test_a_table_repeats_by_seed_and_differs_between_seeds():
    cache, _ = planted_cache(40, shift=1.0)
    first = table_of(cache, seed=3).frame
    pd.testing.assert_frame_equal(first, table_of(cache, seed=3).frame)
    other = table_of(cache, seed=4).frame
    for name in ("auroc", "auroc_low", "auroc_shuffled"):
        assert not np.allclose(first[name], other[name])


def test_the_order_of_prompts_does_not_matter_beyond_the_folds():
    cache, _ = planted_cache(80)
    order = np.random.default_rng(1).permutation(len(cache))
    table, shuffled = table_of(cache).frame, table_of(cache[order]).frame
    for name in ("separation", "magnitude", "relative_magnitude"):
        assert np.allclose(table[name], shuffled[name], atol=1e-5)
    assert np.allclose(table["auroc"], shuffled["auroc"], atol=0.15)


def test_layers_stand_in_the_caches_order_under_their_own_numbers():
    cache, _ = planted_cache(40)
    picked = replace(cache, resid=cache.resid[[2, 1]], layers=(2, 1))
    table = table_of(picked)
    assert list(table.frame["layer"]) == [-1, 2, 1]
    assert list(table.frame["name"]) == ["embed", "layer 2", "layer 1"]
    assert table.best_layer == 1


def test_the_best_layer_is_a_block_and_the_first_of_equals():
    cache, _ = planted_cache(40)
    equal = replace(cache, embed=cache.resid[1], resid=cache.resid[[0, 1, 1]])
    table = table_of(equal)
    assert row_of(table, -1)["auroc"] == row_of(table, 1)["auroc"] == row_of(table, 2)["auroc"]
    assert table.best_layer == 1


def test_a_small_class_takes_fewer_folds_and_a_single_prompt_is_refused():
    cache, _ = planted_cache(20)
    assert table_of(relabelled(cache, np.arange(20) < 3)).folds == 3
    with pytest.raises(ls.PromptError, match="1 groups of the rarer class"):
        table_of(relabelled(cache, np.arange(20) < 1))


def test_unknown_labels_are_refused():
    cache, _ = planted_cache(20)
    unknown = ls.PromptSet(tuple(ls.Prompt(text) for text in cache.prompts.texts))
    with pytest.raises(ls.PromptError, match="no label"):
        table_of(replace(cache, prompts=unknown))


def test_a_saved_table_comes_back_equal(tmp_path):
    table = table_of(planted_cache(40)[0])
    back = ls.LayerTable.load(table.save(tmp_path / "table.json"))
    pd.testing.assert_frame_equal(back.frame, table.frame, check_exact=True, check_dtype=False)
    plain = ("n_safe", "n_dangerous", "folds", "seed", "source", "position", "model", "best_layer")
    assert [getattr(back, name) for name in plain] == [getattr(table, name) for name in plain]


def test_top_dimensions_worked_by_hand():
    resid = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [2.0, 5.0, 0.0, -2.0]]])
    vectors = ls.content_vectors(cache_of(resid, [False, True]))
    top = ls.top_dimensions(vectors, 0, k=3)
    assert list(top["dimension"]) == [1, 3, 0]
    assert list(top["value"]) == [4.0, -2.0, 1.0]
    assert list(top["share"]) == pytest.approx([16 / 21, 4 / 21, 1 / 21])
    assert list(top["cumulative_share"]) == pytest.approx([16 / 21, 20 / 21, 1])
    assert list(top["safe_mean"]) == [1.0, 0.0, 1.0]
    assert list(top["dangerous_mean"]) == [5.0, -2.0, 2.0]


def test_all_dimensions_carry_the_whole_difference_in_falling_order():
    vectors = ls.content_vectors(planted_cache()[0])
    top = ls.top_dimensions(vectors, 1, k=D_MODEL)
    assert sorted(top["dimension"]) == list(range(D_MODEL))
    assert top["share"].is_monotonic_decreasing
    assert sum(top["share"]) == pytest.approx(1, abs=1e-5)
    flipped = ls.top_dimensions(-vectors, 1, k=D_MODEL)
    assert list(flipped["value"]) == [-value for value in top["value"]]


@pytest.mark.parametrize("k", [0, -1, D_MODEL + 1])
def test_a_number_of_dimensions_that_are_not_there_is_refused(k: int):
    with pytest.raises(ls.OptionError, match="dimensions"):
        ls.top_dimensions(ls.content_vectors(planted_cache()[0]), 1, k=k)


def test_top_dimensions_of_a_layer_without_a_vector_are_refused():
    with pytest.raises(ls.MismatchError, match="layer 7"):
        ls.top_dimensions(ls.content_vectors(planted_cache()[0]), 7)


def test_the_share_of_a_zero_vector_is_zero_and_not_nan():
    vectors = ls.content_vectors(constant_cache(20))
    exact = replace(vectors, vectors=torch.zeros_like(vectors.vectors))
    assert list(ls.top_dimensions(exact, 0, k=2)["share"]) == [0.0, 0.0]
