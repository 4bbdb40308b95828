import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    TEXTS,
    cache_of,
    constant_cache,
    labelled,
    planted_cache,
    relabelled,
    require_engine,
    write_tiny_model,
)
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lens_safety as ls
from lens_safety.detect import LOGISTIC_C, METHODS
from lens_safety.files import load_tensors, save_tensors
from lens_safety.metrics import best_threshold

METHOD = pytest.mark.parametrize("method", METHODS)
VECTOR_METHOD = pytest.mark.parametrize("method", ["two-vector", "one-vector"])


def by_hand(method: str, h: np.ndarray, safe: np.ndarray, dangerous: np.ndarray) -> float:
    if method == "one-vector":
        v = dangerous - safe
        return float((h - (safe + dangerous) / 2) @ v / np.linalg.norm(v))

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    return cos(h, dangerous) - cos(h, safe)


def tiny_detector(model) -> ls.Detector:
    cache = ls.residual_streams(model, labelled(), progress=False)
    return ls.Detector.fit(cache, layer=1, folds=2)


@METHOD
@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_layer_is_chosen_and_finds_danger_in_fresh_prompts(method, layer: int):
    detector = ls.Detector.fit(planted_cache(100, layer=layer)[0], method=method)
    fresh, _ = planted_cache(200, layer=layer, seed=1)
    assert detector.layer == layer
    assert roc_auc_score(fresh.prompts.labels, detector.score(fresh)) > 0.9
    assert (detector.predict(fresh) == fresh.prompts.labels).mean() > 0.85


@METHOD
def test_a_layer_of_noise_tells_nothing_about_fresh_prompts(method):
    noise = ls.Detector.fit(planted_cache(100)[0], method=method, layer=0)
    fresh, _ = planted_cache(400, seed=1)
    assert 0.4 < roc_auc_score(fresh.prompts.labels, noise.score(fresh)) < 0.6


@VECTOR_METHOD
def test_shuffled_training_labels_find_nothing_on_average(method):
    train, fresh = planted_cache(60)[0], planted_cache(200, seed=1)[0]
    rng = np.random.default_rng(0)
    shuffled = [relabelled(train, rng.permutation(train.prompts.labels)) for _ in range(40)]
    aurocs = [
        roc_auc_score(fresh.prompts.labels, ls.Detector.fit(cache, method=method, layer=1).score(fresh))
        for cache in shuffled
    ]
    assert 0.35 < np.mean(aurocs) < 0.65


@METHOD
def test_flipping_the_training_labels_flips_the_order_of_scores(method):
    train, fresh = planted_cache(60)[0], planted_cache(40, seed=1)[0]
    scores = ls.Detector.fit(train, method=method, layer=1).score(fresh)
    flipped = relabelled(train, ~train.prompts.labels)
    opposite = ls.Detector.fit(flipped, method=method, layer=1).score(fresh)
    assert opposite == pytest.approx(-scores, abs=1e-4)


def test_the_vector_scores_worked_by_hand():
    resid = torch.tensor([[[3.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
    train = cache_of(resid, [False, False, True, True])
    test = cache_of(torch.tensor([[[3.0, 4.0], [-2.0, 0.0]]]), [True, False])
    cosine = ls.Detector.fit(train, method="two-vector", layer=0, folds=2)
    assert cosine.score(test) == pytest.approx([4 / 5 - 3 / 5, 0 - (-1)])
    # v = (-4, 3), midpoint (2, 1.5)
    projection = ls.Detector.fit(train, method="one-vector", layer=0, folds=2)
    assert projection.score(test) == pytest.approx([(-4 + 7.5) / 5, (16 - 4.5) / 5])


@VECTOR_METHOD
def test_the_vector_scores_are_their_formula(method):
    train, fresh = planted_cache(40)[0], planted_cache(7, seed=1)[0]
    detector = ls.Detector.fit(train, method=method, layer=1)
    h, labels = train.layer(1).double().numpy(), train.prompts.labels
    means = h[~labels].mean(axis=0), h[labels].mean(axis=0)
    expected = [by_hand(method, row, *means) for row in fresh.layer(1).double().numpy()]
    assert detector.score(fresh) == pytest.approx(expected, abs=1e-5)


def test_the_two_vector_score_is_blind_to_length_and_the_one_vector_score_is_not():
    train, fresh = planted_cache(40)[0], planted_cache(7, seed=1)[0]
    longer = replace(fresh, resid=3 * fresh.resid)
    cosine, projection = (ls.Detector.fit(train, method=m, layer=1) for m in METHODS[:2])
    assert cosine.score(longer) == pytest.approx(cosine.score(fresh), abs=1e-6)
    assert not np.allclose(projection.score(longer), projection.score(fresh), rtol=0.1)


@pytest.mark.parametrize(("seed", "preferred"), [(6, 0), (4, 1), (9, 2)])
def test_logistic_scores_are_scikit_learns_with_the_strength_that_its_folds_prefer(seed: int, preferred: int):
    train, fresh = planted_cache(60, shift=1.5, seed=seed)[0], planted_cache(30, seed=1)[0]
    x, labels = train.layer(1).double().numpy(), train.prompts.labels
    everyone = np.arange(len(labels))
    splits = [(np.setdiff1d(everyone, held), held) for held in train.prompts.folds(5, seed=0)]
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)) for c in LOGISTIC_C]
    aurocs = [
        roc_auc_score(labels, cross_val_predict(m, x, labels, cv=splits, method="decision_function"))
        for m in models
    ]
    assert int(np.argmax(aurocs)) == preferred
    best = models[preferred].fit(x, labels)
    detector = ls.Detector.fit(train, method="logistic", layer=1)
    assert detector.auroc_cv == pytest.approx(max(aurocs), abs=1e-6)
    expected = best.decision_function(fresh.layer(1).double().numpy())
    assert detector.score(fresh) == pytest.approx(expected, abs=1e-5)


@METHOD
@pytest.mark.parametrize("n", [20, 23])
def test_prompts_that_are_all_alike_are_tied_and_never_nan(method, n: int):
    detector = ls.Detector.fit(constant_cache(n), method=method)
    scores = detector.score(constant_cache(n + 8))
    assert np.ptp(scores) == 0
    assert np.isfinite([detector.threshold, detector.auroc_cv, detector.accuracy_cv]).all()


@VECTOR_METHOD
@pytest.mark.parametrize("n", [20, 21, 22, 23, 41])
def test_without_a_direction_rounding_ranks_nothing_and_cross_validation_is_at_chance(method, n):
    detector = ls.Detector.fit(constant_cache(n), method=method)
    assert detector.auroc_cv == 0.5
    assert (detector.score(constant_cache(n)) == 0).all()


def test_a_dimension_that_never_varies_does_no_harm_to_logistic_scores():
    train, fresh = planted_cache(60)[0], planted_cache(60, seed=1)[0]
    for cache in (train, fresh):
        cache.resid[:, :, 3] = 0.1
    scores = ls.Detector.fit(train, method="logistic", layer=1).score(fresh)
    assert roc_auc_score(fresh.prompts.labels, scores) > 0.9


def test_a_layer_may_be_named_and_minus_one_is_the_embedding():
    cache, _ = planted_cache(60)
    swapped = replace(cache, embed=cache.resid[1], resid=cache.resid[[0, 2, 0]])
    of_embed = ls.Detector.fit(swapped, layer=-1)
    of_layer = ls.Detector.fit(cache, layer=1)
    assert (of_embed.layer, of_layer.layer) == (-1, 1)
    assert np.array_equal(of_embed.score(swapped), of_layer.score(cache))
    assert ls.Detector.fit(cache, layer=0).layer == 0


def test_a_layer_that_is_not_cached_is_refused_in_fitting_and_in_scoring():
    cache, _ = planted_cache(40)
    few = replace(cache, resid=cache.resid[:1], layers=(0,))
    with pytest.raises(ls.MismatchError, match="layer 1 given"):
        ls.Detector.fit(few, layer=1)
    with pytest.raises(ls.MismatchError, match="layer 1 given"):
        ls.Detector.fit(cache, layer=1).score(few)


def test_layers_are_matched_by_number_whatever_their_place():
    cache, _ = planted_cache(40)
    detector = ls.Detector.fit(cache, layer=1)
    picked = replace(cache, resid=cache.resid[[2, 1]], layers=(2, 1))
    assert np.array_equal(detector.score(picked), detector.score(cache))
    assert ls.Detector.fit(picked).layer == 1


def test_auto_takes_the_layer_with_the_best_cross_validated_auroc_and_the_first_of_equals():
    cache, _ = planted_cache(60, shift=1.0)
    alone = [ls.Detector.fit(cache, layer=layer).auroc_cv for layer in cache.layers]
    auto = ls.Detector.fit(cache)
    assert auto.layer == int(np.argmax(alone))
    assert auto.auroc_cv == max(alone)
    assert max(alone) > min(alone)
    strong, _ = planted_cache(60)
    assert ls.Detector.fit(replace(strong, resid=strong.resid[[1, 0, 1]])).layer == 0


def test_a_given_threshold_is_taken_and_predictions_lie_strictly_above_it():
    cache, _ = planted_cache(40)
    scores = ls.Detector.fit(cache, layer=1).score(cache)
    at_a_score = ls.Detector.fit(cache, layer=1, threshold=float(scores[3]))
    assert at_a_score.threshold == scores[3]
    assert np.array_equal(at_a_score.predict(cache), scores > scores[3])
    assert not at_a_score.predict(cache)[3]


def test_unknown_methods_and_thresholds_that_are_no_number_are_refused():
    cache, _ = planted_cache(20)
    unchecked = inspect.unwrap(ls.Detector.fit)
    with pytest.raises(ls.OptionError, match="unknown method 'svm': expected one of two-vector"):
        unchecked(ls.Detector, cache, method="svm")
    for threshold in ("f1", float("nan")):
        with pytest.raises(ls.OptionError, match=f"threshold={threshold!r} given"):
            unchecked(ls.Detector, cache, threshold=threshold)
    assert unchecked(ls.Detector, cache, threshold="accuracy").method == "two-vector"


@VECTOR_METHOD
def test_threshold_and_figures_come_from_out_of_fold_scores(method):
    cache, _ = planted_cache(40, shift=1.0)
    h, labels = cache.layer(1).double().numpy(), cache.prompts.labels
    scores = np.full(40, np.nan)
    for held in cache.prompts.folds(4, seed=9):
        rest = np.setdiff1d(np.arange(40), held)
        means = (h[rest][labels[rest] == kind].mean(axis=0) for kind in (False, True))
        safe, dangerous = means
        scores[held] = [by_hand(method, h[i], safe, dangerous) for i in held]
    detector = ls.Detector.fit(cache, method=method, layer=1, folds=4, seed=9)
    assert detector.threshold == pytest.approx(best_threshold(scores, labels), abs=1e-5)
    assert detector.auroc_cv == pytest.approx(roc_auc_score(labels, scores))
    assert detector.accuracy_cv == pytest.approx(((scores > detector.threshold) == labels).mean())


@METHOD
def test_cross_validation_sees_through_noise_that_the_fit_itself_separates(method):
    noise = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(0))
    cache = cache_of(noise, np.arange(40) % 2 == 1)
    detector = ls.Detector.fit(cache, method=method, layer=0)
    assert roc_auc_score(cache.prompts.labels, detector.score(cache)) > 0.9
    assert detector.auroc_cv < 0.75


@METHOD
def test_copies_of_a_prompt_in_one_group_do_not_flatter_cross_validation(method):
    noise = torch.randn(1, 30, 60, generator=torch.Generator().manual_seed(1))
    copies, labels = noise.repeat_interleave(4, dim=1), np.repeat(np.arange(30) % 2 == 1, 4)
    groups = [f"copies of {i // 4}" for i in range(120)]
    assert ls.Detector.fit(cache_of(copies, labels, groups=groups), method=method).auroc_cv < 0.7
    assert ls.Detector.fit(cache_of(copies, labels), method=method).auroc_cv > 0.9


@METHOD
def test_test_labels_change_no_score_and_no_prediction(method):
    detector = ls.Detector.fit(planted_cache(60)[0], method=method)
    test, _ = planted_cache(40, seed=1)
    scores, predictions = detector.score(test), detector.predict(test)
    shuffled = relabelled(test, np.random.default_rng(0).permutation(test.prompts.labels))
    unknown = replace(test, prompts=ls.PromptSet(tuple(ls.Prompt(t) for t in test.prompts.texts)))
    for other in (shuffled, unknown):
        assert np.array_equal(detector.score(other), scores)
        assert np.array_equal(detector.predict(other), predictions)


@METHOD
def test_scores_do_not_depend_on_the_other_prompts_of_a_cache(method):
    detector = ls.Detector.fit(planted_cache(60)[0], method=method)
    test, _ = planted_cache(40, seed=1)
    scores = detector.score(test)
    order = np.random.default_rng(0).permutation(40)
    assert detector.score(test[order]) == pytest.approx(scores[order], abs=1e-12)
    assert detector.score(test[3:4]) == pytest.approx(scores[3:4], abs=1e-12)


def test_the_layer_is_that_of_the_training_set_even_where_the_test_set_has_another():
    detector = ls.Detector.fit(planted_cache(100, layer=2)[0])
    test, _ = planted_cache(200, layer=0, seed=1)
    assert 0.3 < roc_auc_score(test.prompts.labels, detector.score(test)) < 0.7
    assert detector.layer == 2


@METHOD
def test_fitting_repeats_and_leaves_its_cache_alone(method):
    cache, _ = planted_cache(40)
    before = cache.resid.clone()
    first, second = (ls.Detector.fit(cache, method=method) for _ in range(2))
    assert torch.equal(cache.resid, before)
    assert first.threshold == second.threshold
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, second.parameters[name])


@VECTOR_METHOD
def test_class_means_from_elsewhere_are_kept_as_they_are(method):
    vectors = ls.content_vectors(planted_cache(100)[0])
    few = planted_cache(6, seed=1)[0]
    detector = ls.Detector.fit(few, method=method, vectors=vectors, layer=1)
    assert torch.equal(detector.parameters["safe_mean"], vectors.safe_mean[1])
    assert torch.equal(detector.parameters["dangerous_mean"], vectors.dangerous_mean[1])
    fresh, _ = planted_cache(200, seed=2)
    assert roc_auc_score(fresh.prompts.labels, detector.score(fresh)) > 0.9
    against = relabelled(few, ~few.prompts.labels)
    same = ls.Detector.fit(against, method=method, vectors=vectors, layer=1)
    assert np.array_equal(same.score(fresh), detector.score(fresh))


def test_with_means_from_elsewhere_the_cache_chooses_layer_and_threshold():
    vectors = ls.content_vectors(planted_cache(100, layer=1)[0])
    cache, _ = planted_cache(30, seed=1)
    detector = ls.Detector.fit(cache, vectors=vectors)
    alone = ls.Detector.fit(cache, vectors=vectors, layer=1, threshold=0.0)
    scores, labels = alone.score(cache), cache.prompts.labels
    assert detector.layer == 1
    assert detector.threshold == best_threshold(scores, labels)
    assert detector.auroc_cv == pytest.approx(roc_auc_score(labels, scores))


def test_means_from_elsewhere_must_fit_the_method_the_model_the_layer_and_both_classes():
    cache, _ = planted_cache(30)
    vectors = ls.content_vectors(cache)
    with pytest.raises(ls.OptionError, match="logistic"):
        ls.Detector.fit(cache, method="logistic", vectors=vectors)
    other = replace(vectors, model=replace(vectors.model, probe=(9.0, 9.0, 9.0, 9.0)))
    with pytest.raises(ls.MismatchError, match="other weights"):
        ls.Detector.fit(cache, vectors=other)
    with pytest.raises(ls.MismatchError, match="layer -1"):
        ls.Detector.fit(cache, vectors=vectors, layer=-1)
    with pytest.raises(ls.PromptError, match="one class only"):
        ls.Detector.fit(relabelled(cache, np.ones(30, dtype=bool)), vectors=vectors)


def test_unlabelled_one_sided_and_too_few_prompts_are_refused():
    cache, _ = planted_cache(20)
    unknown = ls.PromptSet(tuple(ls.Prompt(text) for text in cache.prompts.texts))
    with pytest.raises(ls.PromptError, match="no label"):
        ls.Detector.fit(replace(cache, prompts=unknown))
    with pytest.raises(ls.PromptError, match="0 groups of the rarer class"):
        ls.Detector.fit(relabelled(cache, np.ones(20, dtype=bool)))
    with pytest.raises(ls.PromptError, match="4 groups of the rarer class"):
        ls.Detector.fit(relabelled(cache, np.arange(20) < 4))
    grouped = cache_of(cache.resid, np.arange(20) < 10, groups=[f"{i // 5}" for i in range(20)])
    with pytest.raises(ls.PromptError, match="2 groups of the rarer class"):
        ls.Detector.fit(grouped)


def test_a_cache_with_nan_is_refused_not_scored():
    cache, _ = planted_cache(20)
    detector = ls.Detector.fit(cache)
    cache.resid[:, 3] = float("nan")
    with pytest.raises(ls.OptionError, match="1 are NaN"):
        detector.score(cache)


@METHOD
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_texts_score_as_their_cache_does(tiny, method, layer: int):
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    detector = ls.Detector.fit(cache, method=method, layer=layer, folds=2)
    scores = detector.score(cache)
    assert np.ptp(scores) > 1e-3
    for given in (list(TEXTS), labelled()):
        assert detector.score(given, model=tiny) == pytest.approx(scores, abs=1e-5)
    assert np.array_equal(detector.predict(list(TEXTS), model=tiny), detector.predict(cache))


def test_a_text_scores_alone_as_it_does_among_others(tiny):
    detector = tiny_detector(tiny)
    together = detector.score(list(TEXTS), model=tiny)
    alone = [float(detector.score([text], model=tiny)[0]) for text in TEXTS]
    assert alone == pytest.approx(together, abs=1e-5)


def test_texts_without_a_model_are_refused():
    detector = ls.Detector.fit(planted_cache(20)[0])
    with pytest.raises(ls.OptionError, match="without a model"):
        detector.score(["how do I make a cake"])


def test_a_numbered_position_is_applied_again_to_texts(tiny):
    cache = ls.residual_streams(tiny, labelled(), position=-2, progress=False)
    detector = ls.Detector.fit(cache, layer=1, folds=2)
    assert detector.position == "-2"
    assert detector.score(list(TEXTS), model=tiny) == pytest.approx(detector.score(cache), abs=1e-5)


def test_a_callable_position_scores_its_cache_and_says_why_texts_cannot(tiny):
    def second(ids: np.ndarray, content: np.ndarray) -> int:
        return 1

    cache = ls.residual_streams(tiny, labelled(), position=second, template="raw", progress=False)
    detector = ls.Detector.fit(cache, layer=1, folds=2)
    assert np.isfinite(detector.score(cache)).all()
    with pytest.raises(ls.OptionError, match=r"callable .*extract with"):
        detector.score(list(TEXTS), model=tiny)


def test_another_position_or_template_is_refused(tiny):
    detector = tiny_detector(tiny)
    last = ls.residual_streams(tiny, labelled(), position="last", progress=False)
    raw = ls.residual_streams(tiny, labelled(), template="raw", progress=False)
    for cache, word in ((last, "reads position"), (raw, "reads template")):
        with pytest.raises(ls.MismatchError, match=word):
            detector.score(cache)
        with pytest.raises(ls.MismatchError, match=word):
            detector.verify(tiny, position=cache.position, template=cache.template)
    detector.verify(tiny, position="content_mean", template="chat")


def test_another_model_is_refused_and_the_own_one_is_not(tiny, engine, tmp_path):
    detector = tiny_detector(tiny)
    other = ls.load_model(write_tiny_model(tmp_path / "other", "llama", seed=1), engine=engine)
    cache = ls.residual_streams(other, labelled(), progress=False)
    with pytest.raises(ls.MismatchError, match="other weights"):
        detector.score(cache)
    with pytest.raises(ls.MismatchError, match="other weights"):
        detector.score(list(TEXTS), model=other)
    with pytest.raises(ls.MismatchError, match="other weights"):
        detector.verify(other)
    detector.verify(tiny)


def test_a_detector_of_one_engine_scores_alike_on_the_other(tiny_folders: dict[str, Path]):
    require_engine("hooked")
    hooked, bridge = (ls.load_model(tiny_folders["llama"], engine=engine) for engine in ("hooked", "bridge"))
    detector = tiny_detector(hooked)
    expected = detector.score(list(TEXTS), model=hooked)
    assert detector.score(list(TEXTS), model=bridge) == pytest.approx(expected, abs=1e-4)


@METHOD
def test_a_saved_detector_scores_bit_for_bit_as_before(method, tmp_path):
    detector = ls.Detector.fit(planted_cache(40)[0], method=method)
    back = ls.Detector.load(detector.save(tmp_path / "detector.safetensors"))
    fresh, _ = planted_cache(40, seed=1)
    assert np.array_equal(back.score(fresh), detector.score(fresh))
    assert np.array_equal(back.predict(fresh), detector.predict(fresh))
    assert back.to_frame().equals(detector.to_frame())
    assert back.model == detector.model


def test_a_detector_on_given_means_is_saved_as_well(tmp_path):
    vectors = ls.content_vectors(planted_cache(40)[0])
    detector = ls.Detector.fit(planted_cache(30, seed=1)[0], vectors=vectors)
    back = ls.Detector.load(detector.save(tmp_path / "detector"))
    assert torch.equal(back.parameters["safe_mean"], vectors.safe_mean[detector.layer])


def test_the_file_is_plain_tensors_and_json_never_a_pickle(tmp_path):
    detector = ls.Detector.fit(planted_cache(40)[0], method="logistic")
    path = detector.save(tmp_path / "detector")
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["lens_safety"])
        assert set(file.keys()) == {"weight", "mean", "scale", "bias"}
    assert header["threshold"] == detector.threshold
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + size + 4 * (3 * D_MODEL + 1)


def test_a_missing_damaged_or_foreign_file_is_refused(tmp_path):
    cache, _ = planted_cache(20)
    whole = ls.Detector.fit(cache).save(tmp_path / "detector").read_bytes()
    for name, content in {"half": whole[:-9], "text": b"{}", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    ls.content_vectors(cache).save(tmp_path / "vectors")
    says = {
        "absent": "no file",
        "half": "is damaged",
        "text": "is damaged",
        "empty": "is damaged",
        "vectors": "holds ContentVectors, expected Detector",
    }
    for name, reason in says.items():
        with pytest.raises(ls.FileError, match=reason):
            ls.Detector.load(tmp_path / name)


@METHOD
def test_a_file_whose_tensors_belie_its_header_is_refused(method, tmp_path):
    path = ls.Detector.fit(planted_cache(20)[0], method=method).save(tmp_path / "detector")
    tensors, header = load_tensors(path, "Detector")
    first = next(iter(tensors))
    changes = [
        ({**tensors, first: tensors[first][:-1]}, header),
        ({name: tensors[name] for name in tensors if name != first}, header),
        (tensors, {name: header[name] for name in header if name != "threshold"}),
        (tensors, {**header, "model": {**header["model"], "d_model": 5}}),
    ]
    for number, (changed, said) in enumerate(changes):
        save_tensors(tmp_path / f"changed{number}", "Detector", changed, said)
        with pytest.raises(ls.FileError, match="does not hold what its header says"):
            ls.Detector.load(tmp_path / f"changed{number}")
    save_tensors(tmp_path / "same", "Detector", tensors, header)
    assert ls.Detector.load(tmp_path / "same").method == method


def test_vectors_read_elsewhere_in_the_prompt_are_refused():
    cache, _ = planted_cache(30)
    vectors = ls.content_vectors(cache)
    for change in ({"position": "last"}, {"template": "raw"}):
        with pytest.raises(ls.MismatchError, match="expected the same position and template"):
            ls.Detector.fit(cache, vectors=replace(vectors, **change))


def test_a_file_with_an_unknown_method_is_refused(tmp_path):
    path = ls.Detector.fit(planted_cache(30)[0]).save(tmp_path / "d.safetensors")
    tensors, header = load_tensors(path, "Detector")
    save_tensors(path, "Detector", tensors, {**header, "method": "magic"})
    with pytest.raises(ls.FileError, match="unknown method 'magic'"):
        ls.Detector.load(path)
