from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    FINGERPRINT,
    N_LAYERS,
    cache_of,
    constant_cache,
    labelled,
    planted_cache,
    relabelled,
)
from safetensors.torch import save_file

import lens_safety as ls
from lens_safety import directions
from lens_safety.files import load_tensors, save_tensors

MEANS = ("vectors", "safe_mean", "dangerous_mean")


def test_a_planted_direction_is_found_at_its_layer_with_its_length():
    cache, direction = planted_cache(4000)
    vectors = ls.content_vectors(cache)
    assert float(vectors.unit[1] @ direction) > 0.99
    assert float(vectors.norms[1]) == pytest.approx(3.0, rel=0.1)
    assert float(vectors.norms[0]) < 0.3


def test_a_planted_direction_is_not_found_from_shuffled_labels():
    cache, direction = planted_cache(4000, shift=1.0)
    assert float(ls.content_vectors(cache).unit[1] @ direction) > 0.98
    rng = np.random.default_rng(0)
    shuffled = [
        ls.content_vectors(relabelled(cache, rng.permutation(cache.prompts.labels))) for _ in range(20)
    ]
    assert np.mean([abs(float(vectors.unit[1] @ direction)) for vectors in shuffled]) < 0.4
    assert max(float(vectors.norms[1]) for vectors in shuffled) < 0.3


def test_flipping_the_labels_flips_the_sign_exactly():
    cache, _ = planted_cache()
    vectors = ls.content_vectors(cache)
    flipped = ls.content_vectors(relabelled(cache, ~cache.prompts.labels))
    assert torch.equal(flipped.vectors, -vectors.vectors)
    assert torch.equal(flipped.safe_mean, vectors.dangerous_mean)
    assert (flipped.n_safe, flipped.n_dangerous) == (vectors.n_dangerous, vectors.n_safe)


def test_a_vector_is_the_dangerous_mean_minus_the_safe_mean_worked_by_hand():
    resid = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [5.0, 4.0], [0.0, 9.0]]])
    vectors = ls.content_vectors(cache_of(resid, [False, True, False, False]))
    assert torch.equal(vectors.dangerous_mean, torch.tensor([[3.0, 2.0]]))
    assert torch.allclose(vectors.safe_mean, torch.tensor([[2.0, 13 / 3]]))
    assert torch.equal(vectors.vectors, vectors.dangerous_mean - vectors.safe_mean)
    assert (vectors.n_safe, vectors.n_dangerous) == (3, 1)


def test_means_are_taken_over_raw_residuals_before_the_difference_not_over_unit_ones():
    resid = torch.tensor([[[10.0, 0.0], [0.0, 2.0], [0.0, 1.0], [4.0, 0.0]]])
    vectors = ls.content_vectors(cache_of(resid, [True, True, False, False]))
    assert torch.equal(vectors.vectors, torch.tensor([[3.0, 0.5]]))


def test_resid_norm_is_the_median_norm_of_the_training_prompts():
    resid = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 100.0]]])
    vectors = ls.content_vectors(cache_of(resid, [True, False, False]))
    assert torch.equal(vectors.resid_norm, torch.tensor([5.0]))


@pytest.mark.parametrize("name", MEANS)
def test_sums_differences_and_multiples_act_on_the_vectors_and_on_both_means(name: str):
    a, b = (ls.content_vectors(planted_cache(seed=seed)[0]) for seed in (0, 1))
    of_a, of_b = getattr(a, name), getattr(b, name)
    assert torch.equal(getattr(a + b, name), of_a + of_b)
    assert torch.equal(getattr(a - b, name), of_a - of_b)
    assert torch.equal(getattr(2 * a, name), 2 * of_a)
    assert torch.equal(getattr(a * 2, name), 2 * of_a)
    assert torch.equal(getattr(-a, name), -of_a)


def test_what_was_combined_is_said_and_nothing_is_edited_in_place():
    a, b = (ls.content_vectors(planted_cache(seed=seed)[0]) for seed in (0, 1))
    before = a.vectors.clone()
    assert (2 * a - b).method == "(2 * (content)) - (content)"
    assert torch.equal(a.vectors, before)
    assert a.method == "content"


def test_vectors_of_other_layers_or_another_model_do_not_add():
    cache, _ = planted_cache()
    vectors = ls.content_vectors(cache)
    fewer = ls.content_vectors(replace(cache, resid=cache.resid[:2], layers=(0, 1)))
    with pytest.raises(ls.MismatchError, match="same layers"):
        _ = vectors + fewer
    other = replace(vectors, model=replace(FINGERPRINT, name="other", probe=(9.0, 9.0, 9.0, 9.0)))
    with pytest.raises(ls.MismatchError, match="other weights"):
        _ = vectors - other


def test_a_layer_is_named_by_its_number_not_by_its_row():
    cache, _ = planted_cache()
    picked = replace(cache, resid=cache.resid[[2, 0]], layers=(2, 0))
    vectors = ls.content_vectors(picked)
    assert torch.equal(vectors.layer(2), ls.content_vectors(cache).vectors[2])
    with pytest.raises(ls.MismatchError, match="layer 1 given"):
        vectors.layer(1)


def test_unit_vectors_have_norm_one_and_the_vectors_direction():
    vectors = ls.content_vectors(planted_cache()[0])
    assert torch.allclose(vectors.unit.norm(dim=1), torch.ones(N_LAYERS))
    assert torch.allclose(vectors.unit * vectors.norms[:, None], vectors.vectors, atol=1e-6)


def test_equal_classes_have_no_direction_and_give_zeros_never_nan():
    vectors = ls.content_vectors(constant_cache())
    assert bool(vectors.is_zero.all())
    assert torch.equal(vectors.unit, torch.zeros(N_LAYERS, D_MODEL))
    assert (vectors.cosine(ls.content_vectors(planted_cache()[0])) == 0).all()
    assert np.isfinite(vectors.dose(2.0)).all()
    assert list(vectors.to_frame()["is_zero"]) == [True] * N_LAYERS


def test_a_planted_direction_is_not_called_zero():
    vectors = ls.content_vectors(planted_cache()[0])
    assert not bool(vectors.is_zero.any())


def test_the_cosine_is_one_with_itself_minus_one_with_its_negative_and_blind_to_length():
    vectors = ls.content_vectors(planted_cache()[0])
    assert vectors.cosine(vectors) == pytest.approx(np.ones(N_LAYERS), abs=1e-6)
    assert vectors.cosine(-3 * vectors) == pytest.approx(-np.ones(N_LAYERS), abs=1e-6)


def test_the_cosine_matches_layers_by_number():
    cache, _ = planted_cache()
    picked = ls.content_vectors(replace(cache, resid=cache.resid[[2, 1]], layers=(2, 1)))
    assert picked.cosine(ls.content_vectors(cache)) == pytest.approx(np.ones(2), abs=1e-6)


def test_the_dose_is_the_added_norm_over_the_median_residual_norm():
    resid = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [3.0, 6.0]]])
    vectors = ls.content_vectors(cache_of(resid, [False, False, True]))
    assert vectors.dose(-1.5) == pytest.approx([1.5 * 2 / 5])
    assert vectors.dose(0.0) == pytest.approx([0.0])


def test_random_vectors_have_the_norms_that_they_stand_in_for_and_consistent_means():
    vectors = ls.content_vectors(planted_cache()[0])
    drawn = ls.random_vectors(vectors, seed=4)
    assert torch.allclose(drawn.norms, vectors.norms)
    assert torch.allclose(drawn.dangerous_mean - drawn.safe_mean, drawn.vectors, atol=1e-5)
    middle = vectors.safe_mean + vectors.dangerous_mean
    assert torch.allclose(drawn.dangerous_mean + drawn.safe_mean, middle, atol=1e-5)


def test_random_vectors_repeat_by_seed_and_differ_between_seeds():
    vectors = ls.content_vectors(planted_cache()[0])
    first = ls.random_vectors(vectors, seed=0).vectors
    assert torch.equal(first, ls.random_vectors(vectors, seed=0).vectors)
    assert not torch.allclose(first, ls.random_vectors(vectors, seed=1).vectors)


def test_random_vectors_are_nearly_orthogonal_to_the_direction_on_average():
    vectors = ls.content_vectors(planted_cache()[0])
    cosines = np.array([ls.random_vectors(vectors, seed=s).cosine(vectors) for s in range(300)])
    assert abs(cosines.mean()) < 0.03
    assert np.sqrt((cosines**2).mean()) == pytest.approx(1 / np.sqrt(D_MODEL), rel=0.15)


def test_saved_vectors_come_back_bit_for_bit(tmp_path):
    vectors = 1.5 * ls.content_vectors(planted_cache()[0])
    back = ls.ContentVectors.load(vectors.save(tmp_path / "vectors.safetensors"))
    for name in (*MEANS, "resid_norm"):
        assert torch.equal(getattr(back, name), getattr(vectors, name))
    plain = ("layers", "method", "n_safe", "n_dangerous", "position", "template", "source", "model")
    assert [getattr(back, name) for name in plain] == [getattr(vectors, name) for name in plain]


def test_a_missing_damaged_or_foreign_file_is_refused(tmp_path):
    cache, _ = planted_cache()
    whole = ls.content_vectors(cache).save(tmp_path / "vectors.safetensors").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("not tensors")
    save_file({"vectors": torch.zeros(3, 16)}, tmp_path / "bare")
    cache.save(tmp_path / "cache")
    says = {
        "absent": "no file",
        "half": "is damaged",
        "text": "is damaged",
        "bare": "holds something else, expected ContentVectors",
        "cache": "holds ResidualCache, expected ContentVectors",
    }
    for name, reason in says.items():
        with pytest.raises(ls.FileError, match=reason):
            ls.ContentVectors.load(tmp_path / name)


@pytest.mark.parametrize("name", [*MEANS, "resid_norm"])
def test_a_file_whose_tensors_belie_its_header_is_refused(name: str, tmp_path):
    path = ls.content_vectors(planted_cache()[0]).save(tmp_path / "vectors")
    tensors, header = load_tensors(path, "ContentVectors")
    tensors[name] = tensors[name][:-1]
    save_tensors(path, "ContentVectors", tensors, header)
    with pytest.raises(ls.FileError, match=f"{name} of shape"):
        ls.ContentVectors.load(path)


def test_vectors_with_nan_are_not_written(tmp_path):
    broken = float("nan") * ls.content_vectors(planted_cache()[0])
    with pytest.raises(ls.FileError, match="NaN"):
        broken.save(tmp_path / "vectors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [[True] * 6, [False] * 6])
def test_one_class_alone_has_no_direction(labels: list[bool]):
    with pytest.raises(ls.PromptError, match="at least one of each"):
        ls.content_vectors(relabelled(planted_cache(6)[0], labels))


def test_prompts_without_labels_have_no_direction():
    cache, _ = planted_cache(6)
    unknown = ls.PromptSet(tuple(ls.Prompt(text) for text in cache.prompts.texts))
    with pytest.raises(ls.PromptError, match="no label"):
        ls.content_vectors(replace(cache, prompts=unknown))


def test_tone_vectors_point_from_the_helpful_to_the_harmful_persona(tiny):
    personas = labelled(["a kite for the garden", "make a cake", "how do I"], [False, True, False])
    tone = ls.tone_vectors(tiny, personas, template="raw", progress=False)
    cache = ls.residual_streams(tiny, personas, template="raw", progress=False)
    assert torch.equal(tone.vectors, cache.resid[:, 1] - cache.resid[:, [0, 2]].mean(dim=1))
    assert (tone.method, tone.position, tone.template) == ("tone", "content_mean", "raw")


def test_tone_vectors_take_the_built_in_personas_unless_told_otherwise(tiny, monkeypatch):
    built_in = {"personas": labelled()}
    monkeypatch.setattr(directions, "load_prompts", built_in.__getitem__)
    tone = ls.tone_vectors(tiny, layers=[2], progress=False)
    assert torch.equal(tone.vectors, ls.tone_vectors(tiny, labelled(), progress=False).vectors[2:])
    assert (tone.layers, tone.template) == ((2,), "chat")


def test_cosines_across_models_are_refused():
    vectors = ls.content_vectors(planted_cache(30)[0])
    other = replace(vectors, model=replace(vectors.model, probe=(9.0, 9.0, 9.0, 9.0)))
    with pytest.raises(ls.MismatchError, match="other weights"):
        vectors.cosine(other)
