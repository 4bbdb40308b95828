import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    TEXTS,
    cache_of,
    constant_cache,
    labelled,
    paired,
    planted_cache,
    relabelled,
    require_engine,
    write_tiny_model,
)
from safetensors import safe_open
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lens_safety as ls
from lens_safety.detect import CALIBRATIONS, OVER, _scales
from lens_safety.files import load_tensors, save_tensors
from lens_safety.metrics import abstain_band, best_threshold, fpr_threshold
from lens_safety.scorers import COSINE, LINEAR, METHODS, STRENGTHS, apply_scorer, fit_scorer

METHOD = pytest.mark.parametrize("method", METHODS)
FITTED_METHOD = pytest.mark.parametrize("method", [m for m in METHODS if m != "tone"])
"""Those that learn from the cache; "tone" takes its means from elsewhere."""
VECTOR_METHOD = pytest.mark.parametrize("method", ["two-vector", "one-vector"])


def by_hand(method: str, h: np.ndarray, safe: np.ndarray, dangerous: np.ndarray) -> float:
    if method == "one-vector":
        v = dangerous - safe
        return float((h - (safe + dangerous) / 2) @ v / np.linalg.norm(v))

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    return cos(h, dangerous) - cos(h, safe)


def held_out_scores(
    method: str, h: np.ndarray, labels: np.ndarray, held: np.ndarray, away: np.ndarray
) -> list[float]:
    """The scores of the rows `held` by the class means of the rows that are not `away`."""
    rest = np.setdiff1d(np.arange(len(h)), away)
    safe, dangerous = (h[rest][labels[rest] == kind].mean(axis=0) for kind in (False, True))
    return [by_hand(method, h[i], safe, dangerous) for i in held]


def out_of_fold(method: str, h: np.ndarray, labels: np.ndarray, folds: list[np.ndarray]) -> np.ndarray:
    scores = np.full(len(h), np.nan)
    for held in folds:
        scores[held] = held_out_scores(method, h, labels, held, away=held)
    return scores


def log_odds(scores: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Platt's log odds of danger at the scores `asked`, learnt from scores and labels; never falling."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=1000))
    model.fit(scores[:, None], labels)
    if model.named_steps["logisticregression"].coef_[0, 0] <= 0:
        return np.full(len(asked), np.log(labels.mean() / (1 - labels.mean())))
    return model.decision_function(asked[:, None])


def fit(cache: ls.ResidualCache, method, **options: Any) -> ls.Detector:
    """A detector of any method; the tones are the cache's own class means, as if they came from elsewhere."""
    tones = {"vectors": ls.content_vectors(cache)} if method == "tone" else {}
    return ls.Detector.fit(cache, method=method, **tones, **options)


def tiny_detector(model) -> ls.Detector:
    cache = ls.residual_streams(model, labelled(), progress=False)
    return ls.Detector.fit(cache, layers=[1], folds=2)


@METHOD
@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_layer_is_chosen_and_finds_danger_in_fresh_prompts(method, layer: int):
    detector = fit(planted_cache(100, layer=layer)[0], method)
    fresh, _ = planted_cache(200, layer=layer, seed=1)
    assert detector.layer == layer
    assert roc_auc_score(fresh.prompts.labels, detector.score(fresh)) > 0.9
    assert (detector.predict(fresh) == fresh.prompts.labels).mean() > 0.85


@METHOD
def test_a_layer_of_noise_tells_nothing_about_fresh_prompts(method):
    noise = fit(planted_cache(100)[0], method, layers=[0])
    fresh, _ = planted_cache(400, seed=1)
    assert 0.4 < roc_auc_score(fresh.prompts.labels, noise.score(fresh)) < 0.6


@METHOD
def test_shuffled_training_labels_find_nothing_on_average(method):
    train, fresh = planted_cache(60)[0], planted_cache(200, seed=1)[0]
    rng = np.random.default_rng(0)
    shuffled = [relabelled(train, rng.permutation(train.prompts.labels)) for _ in range(24)]
    scores = [fit(cache, method, layers=[1], folds=2).score(fresh) for cache in shuffled]
    aurocs = [roc_auc_score(fresh.prompts.labels, one) for one in scores]
    # The first principal direction is the planted one whatever the labels; only its sign is by chance.
    assert abs(np.mean(aurocs) - 0.5) < (0.25 if method == "pca" else 0.15)


def planted_everywhere(n: int, *, seed: int) -> ls.ResidualCache:
    """Noise of its own in every layer around one planted direction."""
    caches = [planted_cache(n, layer=layer, seed=seed)[0] for layer in range(3)]
    return replace(caches[0], resid=torch.stack([cache.resid[i] for i, cache in enumerate(caches)]))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("method", ["two-vector", "lda"])
def test_layers_together_find_danger_in_fresh_prompts_and_not_from_shuffled_labels(method, over):
    train, fresh = planted_everywhere(100, seed=0), planted_everywhere(200, seed=1)
    detector = ls.Detector.fit(train, method=method, over=over)
    assert len(detector.layers) == (1 if over == "best" else 3)
    assert roc_auc_score(fresh.prompts.labels, detector.score(fresh)) > (0.9 if over == "best" else 0.95)
    assert (detector.predict(fresh) == fresh.prompts.labels).mean() > 0.85
    rng = np.random.default_rng(0)
    shuffled = [relabelled(train, rng.permutation(train.prompts.labels)) for _ in range(12)]
    scores = [ls.Detector.fit(cache, method=method, over=over, folds=3).score(fresh) for cache in shuffled]
    assert abs(np.mean([roc_auc_score(fresh.prompts.labels, one) for one in scores]) - 0.5) < 0.2


@METHOD
def test_flipping_the_training_labels_flips_the_order_of_scores(method):
    train, fresh = planted_cache(60)[0], planted_cache(40, seed=1)[0]
    scores = fit(paired(train), method, layers=[1]).score(fresh)
    flipped = paired(relabelled(train, ~train.prompts.labels))
    opposite = fit(flipped, method, layers=[1]).score(fresh)
    assert opposite == pytest.approx(-scores, abs=1e-4)


def test_the_vector_scores_worked_by_hand():
    resid = torch.tensor([[[3.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, 4.0]]])
    train = cache_of(resid, [False, False, True, True])
    test = cache_of(torch.tensor([[[3.0, 4.0], [-2.0, 0.0]]]), [True, False])
    cosine = ls.Detector.fit(train, method="two-vector", layers=[0], folds=2)
    assert cosine.score(test) == pytest.approx([4 / 5 - 3 / 5, 0 - (-1)])
    # v = (-4, 3), midpoint (2, 1.5)
    projection = ls.Detector.fit(train, method="one-vector", layers=[0], folds=2)
    assert projection.score(test) == pytest.approx([(-4 + 7.5) / 5, (16 - 4.5) / 5])


@VECTOR_METHOD
def test_the_vector_scores_are_their_formula(method):
    train, fresh = planted_cache(40)[0], planted_cache(7, seed=1)[0]
    detector = ls.Detector.fit(train, method=method, layers=[1])
    h, labels = train.layer(1).double().numpy(), train.prompts.labels
    means = h[~labels].mean(axis=0), h[labels].mean(axis=0)
    expected = [by_hand(method, row, *means) for row in fresh.layer(1).double().numpy()]
    assert detector.score(fresh) == pytest.approx(expected, abs=1e-5)


LAYERS = [2, 0]
"""Two layers, not in order, of which neither is the planted one."""


def alone(cache: ls.ResidualCache, method, **options) -> list[ls.Detector]:
    """A detector for each of `LAYERS`."""
    return [fit(cache, method, layers=[layer], **options) for layer in LAYERS]


def danger_in_each_layer(n: int, *, seed: int):
    layers = [planted_cache(n, shift=4.0, layer=layer, seed=seed)[0].resid[layer] for layer in (0, 1, 2)]
    return replace(planted_cache(n, seed=seed)[0], resid=torch.stack(layers))


@pytest.mark.parametrize("method", ["tone", "two-vector", "softmax", "pca", "lda"])
def test_mean_is_the_mean_of_the_layers_log_odds(method):
    train, fresh = (danger_in_each_layer(n, seed=seed) for n, seed in ((60, 0), (30, 1)))
    each = alone(train, method)
    p = np.stack([one.probability(one.score(fresh)) for one in each])
    together = fit(train, method, over="mean", layers=LAYERS)
    assert together.score(fresh) == pytest.approx(np.log(p / (1 - p)).mean(axis=0), abs=1e-6)
    assert together.layers == (2, 0)


@pytest.mark.parametrize("method", ["tone", "two-vector", "softmax", "pca", "lda"])
def test_vote_is_the_share_of_layers_above_their_own_threshold(method):
    train, fresh = planted_cache(60)[0], planted_cache(30, seed=1)[0]
    votes = np.stack([one.predict(fresh) for one in alone(train, method)])
    scores = fit(train, method, over="vote", layers=LAYERS).score(fresh)
    assert np.array_equal(scores, votes.mean(axis=0))
    assert len(set(scores)) > 1


@FITTED_METHOD
def test_concat_is_the_method_on_layers_side_by_side(method):
    caches = [planted_cache(n, seed=seed)[0] for n, seed in ((60, 0), (30, 1), (20, 2))]
    wide = [cache_of(torch.cat([c.resid[2], c.resid[0]], dim=1)[None], c.prompts.labels) for c in caches]
    beside = {**dict.fromkeys(COSINE, "neutral"), "lda": "unlabelled"}.get(method)
    more, more_wide = ({beside: one} if beside else {} for one in (caches[2], wide[2]))
    detector = fit(caches[0], method, over="concat", layers=LAYERS, **more)
    of_wide = fit(wide[0], method, **more_wide)
    # The folds depend on the groups and labels only, so that the threshold is the same as well.
    assert np.array_equal(detector.score(caches[1]), of_wide.score(wide[1]))
    assert detector.threshold == of_wide.threshold


def test_a_detector_of_several_layers_has_no_layer_of_its_own():
    several = ls.Detector.fit(planted_cache(40)[0], over="vote")
    with pytest.raises(ls.OptionError, match=re.escape("reads 3 layers (vote): expected one; use .layers")):
        _ = several.layer
    assert several.name == "two-vector, vote of layers 0 to 2"
    assert ls.Detector.fit(planted_cache(40)[0]).name == "two-vector at layer 1"


@pytest.mark.parametrize("over", OVER)
def test_neutral_text_is_the_origin_of_the_cosines(over):
    train, fresh, neutral = (planted_cache(n, seed=seed)[0] for n, seed in ((60, 0), (30, 1), (20, 2)))
    origin = neutral.resid.mean(dim=1, keepdim=True)
    moved = [replace(cache, resid=cache.resid - origin) for cache in (train, fresh)]
    detector = ls.Detector.fit(train, over=over, neutral=neutral)
    by_subtraction = ls.Detector.fit(moved[0], over=over)
    assert detector.score(fresh) == pytest.approx(by_subtraction.score(moved[1]), abs=1e-4)
    assert detector.threshold == pytest.approx(by_subtraction.threshold, abs=1e-4)
    assert not np.allclose(detector.score(fresh), ls.Detector.fit(train, over=over).score(fresh), atol=1e-3)


def test_unlabelled_text_reaches_the_covariance_of_lda():
    train, fresh, more = (planted_cache(n, seed=seed)[0] for n, seed in ((40, 0), (30, 1), (50, 2)))
    hidden = replace(more, prompts=ls.PromptSet(tuple(ls.Prompt(t) for t in more.prompts.texts)))
    scores = ls.Detector.fit(train, method="lda", layers=[1], unlabelled=hidden).score(fresh)
    h, labels, groups = train.layer(1), train.prompts.labels, train.prompts.groups
    fitted = fit_scorer(h, labels, groups, "lda", unlabelled=more.layer(1))
    assert np.array_equal(scores, apply_scorer(fresh.layer(1), fitted))
    assert not np.allclose(scores, ls.Detector.fit(train, method="lda", layers=[1]).score(fresh), rtol=1e-3)


def overlapping() -> tuple[ls.ResidualCache, np.ndarray, np.ndarray]:
    """A cache whose classes overlap, its one-vector scores out of fold at layer 1, and its labels."""
    cache, _ = planted_cache(100, shift=1.0)
    h, labels = cache.layer(1).double().numpy(), cache.prompts.labels
    return cache, out_of_fold("one-vector", h, labels, cache.prompts.folds(5, seed=0)), labels


def test_platt_probabilities_are_scikit_learns_on_the_out_of_fold_scores():
    cache, scores, labels = overlapping()
    detector = ls.Detector.fit(cache, method="one-vector", layers=[1])
    asked = np.linspace(-5, 5, 101)
    unpenalised = LogisticRegression(C=1e6, max_iter=1000).fit(scores[:, None], labels)
    expected = unpenalised.predict_proba(asked[:, None])[:, 1]
    p = detector.probability(asked)
    assert p == pytest.approx(expected, abs=0.005)
    assert (np.diff(p) > 0).all()
    assert detector.probability(scores).mean() == pytest.approx(labels.mean(), abs=1e-3)
    assert detector.probability(np.array([-1e9, 1e9])) == pytest.approx([0, 1])


def test_isotonic_probabilities_are_scikit_learns_on_the_out_of_fold_scores():
    cache, scores, labels = overlapping()
    detector = ls.Detector.fit(cache, method="one-vector", layers=[1], calibration="isotonic")
    asked = np.linspace(-5, 5, 101)
    p = detector.probability(asked)
    assert p == pytest.approx(
        IsotonicRegression(out_of_bounds="clip").fit(scores, labels).predict(asked), abs=1e-3
    )
    assert (np.diff(p) >= 0).all()
    assert {p.min(), p.max()} <= {0, 1}
    assert len(np.unique(p)) > 3


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(
    "cache", [constant_cache(), planted_cache(40, shift=100.0)[0]], ids=["tied", "apart"]
)
def test_probabilities_are_finite_where_scores_are_tied_or_wholly_apart(calibration, cache):
    detector = ls.Detector.fit(cache, calibration=calibration)
    p = detector.probability(detector.score(cache))
    if np.ptp(detector.score(cache)) == 0:
        assert p == pytest.approx(cache.prompts.labels.mean(), abs=1e-3)
    else:
        assert np.array_equal(p > 0.5, cache.prompts.labels)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_the_abstain_band_holds_its_share_of_the_out_of_fold_scores(share: float):
    cache, scores, _ = overlapping()
    detector = ls.Detector.fit(cache, method="one-vector", layers=[1], abstain=share)
    verdicts = np.array(detector.verdicts(scores))
    assert (verdicts == "unsure").mean() == pytest.approx(share, abs=0.01)
    certain = verdicts != "unsure"
    assert np.array_equal(verdicts[certain] == "dangerous", (scores > detector.threshold)[certain])


def test_verdicts_worked_by_hand():
    detector = ls.Detector.fit(planted_cache(20)[0], threshold=1.0)
    scores = np.array([0.25, 0.5, 1.0, 1.5, 1.75])
    assert detector.verdicts(scores) == ["safe", "safe", "safe", "dangerous", "dangerous"]
    unsure = ["safe", "unsure", "unsure", "unsure", "dangerous"]
    assert replace(detector, band=0.5).verdicts(scores) == unsure


@METHOD
def test_cosine_scores_are_blind_to_length_and_linear_scores_are_not(method):
    train, fresh = planted_cache(40)[0], planted_cache(7, seed=1)[0]
    detector = fit(train, method, layers=[1])
    longer = detector.score(replace(fresh, resid=3 * fresh.resid))
    same = np.allclose(longer, detector.score(fresh), rtol=0.05, atol=1e-6)
    assert same == (method in COSINE) == (method not in LINEAR)


@pytest.mark.parametrize(("seed", "preferred"), [(6, 0), (4, 1), (9, 2)])
def test_logistic_scores_are_scikit_learns_with_the_strength_that_its_folds_prefer(seed: int, preferred: int):
    train, fresh = planted_cache(60, shift=1.5, seed=seed)[0], planted_cache(30, seed=1)[0]
    x, labels = train.layer(1).double().numpy(), train.prompts.labels
    everyone = np.arange(len(labels))
    splits = [(np.setdiff1d(everyone, held), held) for held in train.prompts.folds(5, seed=0)]
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8)) for c in STRENGTHS]
    aurocs = [
        roc_auc_score(labels, cross_val_predict(m, x, labels, cv=splits, method="decision_function"))
        for m in models
    ]
    assert int(np.argmax(aurocs)) == preferred
    best = models[preferred].fit(x, labels)
    detector = ls.Detector.fit(train, method="logistic", layers=[1])
    assert detector.auroc_cv == pytest.approx(max(aurocs), abs=1e-6)
    expected = best.decision_function(fresh.layer(1).double().numpy())
    assert detector.score(fresh) == pytest.approx(expected, abs=1e-3)


@METHOD
@pytest.mark.parametrize("n", [20, 23])
def test_prompts_that_are_all_alike_are_tied_and_never_nan(method, n: int):
    detector = fit(constant_cache(n), method)
    scores = detector.score(constant_cache(n + 8))
    assert np.ptp(scores) == 0
    assert np.isfinite([detector.threshold, detector.auroc_cv, detector.accuracy_cv]).all()


@METHOD
@pytest.mark.parametrize("n", [20, 21, 22, 23, 41])
def test_without_a_direction_rounding_ranks_nothing_and_cross_validation_is_at_chance(method, n):
    detector = fit(constant_cache(n), method)
    assert detector.auroc_cv == 0.5
    assert (detector.score(constant_cache(n)) == 0).all()


@METHOD
def test_a_dimension_that_never_varies_does_no_harm(method):
    train, fresh = planted_cache(60)[0], planted_cache(60, seed=1)[0]
    for cache in (train, fresh):
        cache.resid[:, :, 3] = 0.1
    scores = fit(train, method, layers=[1]).score(fresh)
    assert roc_auc_score(fresh.prompts.labels, scores) > 0.85


def test_a_layer_may_be_named_and_minus_one_is_the_embedding():
    cache, _ = planted_cache(60)
    swapped = replace(cache, embed=cache.resid[1], resid=cache.resid[[0, 2, 0]])
    of_embed = ls.Detector.fit(swapped, layers=[-1])
    of_layer = ls.Detector.fit(cache, layers=[1])
    assert (of_embed.layer, of_layer.layer) == (-1, 1)
    assert np.array_equal(of_embed.score(swapped), of_layer.score(cache))
    assert ls.Detector.fit(cache, layers=[0]).layer == 0


def test_a_layer_that_is_not_cached_is_refused_in_fitting_and_in_scoring():
    cache, _ = planted_cache(40)
    few = replace(cache, resid=cache.resid[:1], layers=(0,))
    with pytest.raises(ls.MismatchError, match="layer 1 given"):
        ls.Detector.fit(few, layers=[1])
    with pytest.raises(ls.MismatchError, match="layer 1 given"):
        ls.Detector.fit(cache, layers=[1]).score(few)


def test_layers_are_matched_by_number_whatever_their_place():
    cache, _ = planted_cache(40)
    detector = ls.Detector.fit(cache, layers=[1])
    picked = replace(cache, resid=cache.resid[[2, 1]], layers=(2, 1))
    assert np.array_equal(detector.score(picked), detector.score(cache))
    assert ls.Detector.fit(picked).layer == 1


def test_the_best_layer_is_that_with_the_best_cross_validated_auroc_and_the_first_of_equals():
    cache, _ = planted_cache(60, shift=1.0)
    alone = [ls.Detector.fit(cache, layers=[layer]).auroc_cv for layer in cache.layers]
    best = ls.Detector.fit(cache)
    assert best.layer == int(np.argmax(alone))
    assert best.auroc_cv == max(alone)
    assert max(alone) > min(alone)
    strong, _ = planted_cache(60)
    assert ls.Detector.fit(replace(strong, resid=strong.resid[[1, 0, 1]])).layer == 0


@pytest.mark.parametrize("method", ["two-vector", "logistic"])
@pytest.mark.parametrize("over", OVER)
def test_streams_that_were_read_elsewhere_have_the_scores_of_the_cache(method, over):
    cache, _ = planted_cache(60)
    fresh, _ = planted_cache(20, seed=1, name="fresh")
    detector = fit(cache, method, over=over, layers=None if over == "best" else (2, 1))
    rows = [fresh.layers.index(layer) for layer in detector.layers]
    scores = detector.score_resid(fresh.resid[rows])
    assert np.array_equal(scores, detector.score(fresh))
    if over != "best":
        assert not np.allclose(detector.score_resid(fresh.resid[rows[::-1]]), scores)


def test_streams_of_other_layers_than_the_detectors_are_refused():
    cache, _ = planted_cache(60)
    for given in (1, 3):
        with pytest.raises(ls.OptionError, match=rf"{given} layers given, expected those .*\(0, 1\)"):
            ls.Detector.fit(cache, over="mean", layers=(0, 1)).score_resid(cache.resid[:given])


def test_a_given_threshold_is_taken_and_predictions_lie_strictly_above_it():
    cache, _ = planted_cache(40)
    scores = ls.Detector.fit(cache, layers=[1]).score(cache)
    at_a_score = ls.Detector.fit(cache, layers=[1], threshold=float(scores[3]))
    assert at_a_score.threshold == scores[3]
    assert np.array_equal(at_a_score.predict(cache), scores > scores[3])
    assert not at_a_score.predict(cache)[3]


@pytest.mark.parametrize(
    ("options", "beside", "reason"),
    [
        ({"method": "svm"}, (), "unknown method 'svm': expected one of tone, two-vector, "),
        ({"over": "sum"}, (), "unknown way over layers 'sum': expected one of best, mean, vote, concat"),
        ({"calibration": "beta"}, (), "unknown calibration 'beta': expected one of platt, isotonic"),
        ({"method": "tone"}, (), "'tone' given without vectors: expected vectors=tone_vectors(model)"),
        ({"method": "lda"}, ("vectors",), "'lda' given with vectors: expected one of tone, two-vector, one-"),
        ({"over": "concat"}, ("vectors",), "'concat' given with vectors: expected 'best', 'mean' or 'vote'"),
        ({"method": "pca"}, ("neutral",), "'pca' given with neutral text: expected one of tone, two-vector,"),
        ({"method": "logistic"}, ("unlabelled",), "'logistic' given with unlabelled text: expected 'lda'"),
        ({"layers": ()}, (), "layers=() given: expected at least one layer, or None for all"),
        ({"folds": 1}, (), "folds=1 given, expected at least 2 for over='best'"),
        ({"folds": 2, "over": "vote"}, (), "folds=2 given, expected at least 3 for over='vote'"),
        ({"threshold": "eer"}, (), "threshold='eer' given, expected a finite number or one of accuracy, you"),
        ({"threshold": float("nan")}, (), "threshold=nan given, expected a finite number or one of accuracy"),
        ({"threshold": float("inf")}, (), "threshold=inf given, expected a finite number or one of accuracy"),
        ({"threshold": "fpr", "target_fpr": 0.0}, (), "target_fpr=0 given, expected a rate between 0 and 1"),
        ({"threshold": "fpr"}, (), "0.05 cannot be certified on 20 safe prompts: the least that they can"),
        ({"abstain": 1.0}, (), "abstain=1 given, expected a share of prompts, at least 0 and below 1"),
    ],
)
def test_a_bad_option_is_refused_in_one_sentence(options, beside, reason: str):
    cache, _ = planted_cache(40)
    given = {name: ls.content_vectors(cache) if name == "vectors" else cache for name in beside}
    with pytest.raises(ls.OptionError, match=re.escape(reason)) as refused:
        inspect.unwrap(ls.Detector.fit)(ls.Detector, cache, **options, **given)
    assert "\n" not in str(refused.value)


def test_good_options_are_not_refused_without_type_checks_either():
    fitted = inspect.unwrap(ls.Detector.fit)(ls.Detector, planted_cache(40)[0], threshold="accuracy")
    assert fitted.method == "two-vector"


@pytest.mark.parametrize("rule", ["accuracy", "youden", "f1"])
def test_a_rule_is_applied_to_the_out_of_fold_scores(rule):
    cache = relabelled(planted_cache(50, shift=2.0, seed=3)[0], np.arange(50) % 4 == 1)
    h, labels = cache.layer(1).double().numpy(), cache.prompts.labels
    scores = out_of_fold("one-vector", h, labels, cache.prompts.folds(5, seed=0))
    cuts = {name: best_threshold(scores, labels, name) for name in ("accuracy", "youden", "f1")}
    assert len(set(cuts.values())) == 3
    detector = ls.Detector.fit(cache, method="one-vector", layers=[1], threshold=rule)
    assert detector.threshold == pytest.approx(cuts[rule], abs=1e-5)


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_a_false_positive_rate_is_certified_on_the_out_of_fold_scores(target: float):
    cache, _ = planted_cache(120, shift=1.0)
    h, labels = cache.layer(1).double().numpy(), cache.prompts.labels
    scores = out_of_fold("one-vector", h, labels, cache.prompts.folds(5, seed=0))
    detector = ls.Detector.fit(
        cache, method="one-vector", layers=[1], threshold="fpr", target_fpr=target, abstain=0.2
    )
    assert detector.threshold == pytest.approx(fpr_threshold(scores, labels, target), abs=1e-5)
    assert (scores[~labels] > detector.threshold + 1e-5).mean() < target
    assert detector.band == pytest.approx(abstain_band(scores, detector.threshold, 0.2), abs=1e-5)


@VECTOR_METHOD
def test_threshold_and_figures_come_from_out_of_fold_scores(method):
    cache, _ = planted_cache(40, shift=1.0)
    h, labels = cache.layer(1).double().numpy(), cache.prompts.labels
    scores = out_of_fold(method, h, labels, cache.prompts.folds(4, seed=9))
    detector = ls.Detector.fit(cache, method=method, layers=[1], folds=4, seed=9)
    assert detector.threshold == pytest.approx(best_threshold(scores, labels), abs=1e-5)
    assert detector.auroc_cv == pytest.approx(roc_auc_score(labels, scores))
    assert detector.accuracy_cv == pytest.approx(((scores > detector.threshold) == labels).mean())


@FITTED_METHOD
def test_cross_validation_sees_through_noise_that_the_fit_itself_separates(method):
    noise = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(0))
    cache = cache_of(noise, np.arange(40) % 2 == 1)
    detector = ls.Detector.fit(cache, method=method, layers=[0])
    # One principal direction has too little freedom to separate noise.
    assert roc_auc_score(cache.prompts.labels, detector.score(cache)) > (0.75 if method == "pca" else 0.9)
    assert detector.auroc_cv < 0.75


@FITTED_METHOD
def test_each_fold_is_scored_by_the_method_fitted_on_the_others(method):
    loose, _ = planted_cache(40, shift=1.0)
    half = (*paired(loose[:20]).prompts, *loose[20:].prompts)
    cache = replace(loose, prompts=ls.PromptSet(half))
    h, labels, groups = cache.layer(1), cache.prompts.labels, cache.prompts.groups
    tried = np.full((len(STRENGTHS), 40), np.nan)
    for held in cache.prompts.folds(4, seed=9):
        rest = np.setdiff1d(np.arange(40), held)
        for row, strength in zip(tried, STRENGTHS, strict=True):
            fitted = fit_scorer(h[rest], labels[rest], groups[rest], method, strength=strength, seed=9)
            row[held] = apply_scorer(h[held], fitted)
    scores = max(tried, key=lambda row: roc_auc_score(labels, row))
    detector = ls.Detector.fit(cache, method=method, layers=[1], folds=4, seed=9)
    assert detector.threshold == best_threshold(scores, labels)
    assert detector.auroc_cv == pytest.approx(roc_auc_score(labels, scores))


@pytest.mark.parametrize("over", ["mean", "vote"])
def test_layers_are_put_together_by_what_other_folds_say_of_them(over):
    cache, _ = planted_cache(60, shift=1.0)
    labels, folds = cache.prompts.labels, cache.prompts.folds(5, seed=0)
    h = [cache.layer(layer).double().numpy() for layer in (0, 1, 2)]
    scores = np.full(60, np.nan)
    for held in folds:
        others = [fold for fold in folds if fold is not held]
        rest = np.concatenate(others)
        heard = np.zeros((3, len(held)))
        for row, one in zip(heard, h, strict=True):
            inner = [held_out_scores("two-vector", one, labels, f, away=np.append(held, f)) for f in others]
            known, asked = (
                np.concatenate(inner),
                np.array(held_out_scores("two-vector", one, labels, held, held)),
            )
            if over == "mean":
                row[:] = log_odds(known, labels[rest], asked)
            else:
                row[:] = asked > best_threshold(known, labels[rest])
        scores[held] = heard.mean(axis=0)
    detector = ls.Detector.fit(cache, over=over)
    assert detector.auroc_cv == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert detector.threshold == pytest.approx(best_threshold(scores, labels), abs=1e-5)


def test_a_layer_that_points_the_wrong_way_out_of_fold_does_not_turn_the_mean_round():
    scores = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    labels = np.array([False, False, True, True])
    both = _scales(scores, labels)
    assert both["slope"][0] > 0
    assert (both["slope"][1], both["intercept"][1]) == (0, 0)
    neither = _scales(scores[1:], labels)
    assert neither["slope"][0] == pytest.approx(1 / scores[1].std())
    assert neither["slope"][0] * 1.5 + neither["intercept"][0] == pytest.approx(0)


@pytest.mark.parametrize("over", ["mean", "vote"])
def test_many_layers_of_noise_put_together_stay_at_chance_in_cross_validation(over):
    aurocs = []
    for seed in range(3):
        noise = torch.randn(20, 60, 8, generator=torch.Generator().manual_seed(seed))
        aurocs.append(ls.Detector.fit(cache_of(noise, np.arange(60) % 2 == 1), over=over).auroc_cv)
    assert np.mean(aurocs) < 0.62


def test_groups_that_leave_one_class_beside_two_folds_are_refused():
    labels, groups = (np.array(list(row), dtype=int) for row in ("00001101001", "01222300102"))
    cache = cache_of(torch.randn(1, 11, 4), labels == 1, groups=[str(group) for group in groups])
    assert ls.Detector.fit(cache, folds=3).over == "best"
    for over in ("mean", "vote"):
        with pytest.raises(ls.PromptError, match="so uneven that two folds leave one class only"):
            ls.Detector.fit(cache, folds=3, over=over)


@pytest.mark.parametrize(
    ("method", "over"),
    [*((m, "best") for m in METHODS if m not in ("tone", "pca")), *(("lda", over) for over in OVER[1:])],
)
def test_copies_of_a_prompt_in_one_group_do_not_flatter_cross_validation(method, over):
    # Each group has a dimension of its own, which tells its label to whoever has seen one of the group.
    labels = np.repeat(np.arange(30) % 2 == 1, 4)
    noise = torch.randn(1, 120, 30, generator=torch.Generator().manual_seed(1))
    copies = torch.eye(30).repeat_interleave(4, dim=0) + 1e-3 * noise
    groups = [f"copies of {i // 4}" for i in range(120)]
    grouped, loose = cache_of(copies, labels, groups=groups), cache_of(copies, labels)
    assert ls.Detector.fit(grouped, method=method, over=over).auroc_cv < 0.6
    assert ls.Detector.fit(loose, method=method, over=over).auroc_cv > 0.98


@pytest.mark.parametrize(
    ("method", "over"), [*((m, "best") for m in METHODS), *(("lda", over) for over in OVER[1:])]
)
def test_test_labels_change_neither_detector_nor_score_nor_prediction(method, over):
    detector = fit(planted_cache(60)[0], method, over=over)
    test, _ = planted_cache(40, seed=1)
    scores, predictions = detector.score(test), detector.predict(test)
    frame = detector.to_frame()
    parameters = {name: tensor.clone() for name, tensor in detector.parameters.items()}
    shuffled = relabelled(test, np.random.default_rng(0).permutation(test.prompts.labels))
    unknown = replace(test, prompts=ls.PromptSet(tuple(ls.Prompt(t) for t in test.prompts.texts)))
    for other in (shuffled, unknown):
        assert np.array_equal(detector.score(other), scores)
        assert np.array_equal(detector.predict(other), predictions)
    assert detector.to_frame().equals(frame)
    assert all(torch.equal(detector.parameters[name], tensor) for name, tensor in parameters.items())


@METHOD
def test_scores_do_not_depend_on_the_other_prompts_of_a_cache(method):
    detector = fit(planted_cache(60)[0], method)
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
    first, second = (fit(cache, method) for _ in range(2))
    assert torch.equal(cache.resid, before)
    assert first.threshold == second.threshold
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, second.parameters[name])


@pytest.mark.parametrize("method", ["tone", "two-vector", "one-vector"])
def test_class_means_from_elsewhere_are_kept_as_they_are(method):
    vectors = ls.content_vectors(planted_cache(100)[0])
    few = planted_cache(6, seed=1)[0]
    detector = ls.Detector.fit(few, method=method, vectors=vectors, layers=[1])
    safe, dangerous = vectors.safe_mean[1], vectors.dangerous_mean[1]
    if method == "one-vector":
        assert torch.allclose(detector.parameters["weight"][0], vectors.unit[1], atol=1e-6)
        assert torch.equal(detector.parameters["centre"][0], (safe + dangerous) / 2)
    else:
        assert torch.equal(detector.parameters["safe_mean"][0], safe)
        assert torch.equal(detector.parameters["dangerous_mean"][0], dangerous)
    fresh, _ = planted_cache(200, seed=2)
    assert roc_auc_score(fresh.prompts.labels, detector.score(fresh)) > 0.9
    against = relabelled(few, ~few.prompts.labels)
    same = ls.Detector.fit(against, method=method, vectors=vectors, layers=[1])
    assert np.array_equal(same.score(fresh), detector.score(fresh))


def test_with_means_from_elsewhere_the_cache_chooses_layer_and_threshold():
    vectors = ls.content_vectors(planted_cache(100, layer=1)[0])
    cache, _ = planted_cache(30, seed=1)
    detector = ls.Detector.fit(cache, vectors=vectors)
    alone = ls.Detector.fit(cache, vectors=vectors, layers=[1], threshold=0.0)
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
        ls.Detector.fit(cache, vectors=vectors, layers=[-1])
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
    with pytest.raises(ls.PromptError, match="2 groups of the rarer class: expected at least 5"):
        ls.Detector.fit(planted_cache(4)[0])
    grouped = cache_of(cache.resid, np.arange(20) < 10, groups=[f"{i // 5}" for i in range(20)])
    with pytest.raises(ls.PromptError, match="2 groups of the rarer class"):
        ls.Detector.fit(grouped)


def test_a_cache_with_nan_is_refused_not_scored():
    cache, _ = planted_cache(20)
    detector = ls.Detector.fit(cache)
    cache.resid[:, 3] = float("nan")
    with pytest.raises(ls.OptionError, match="1 are NaN"):
        detector.score(cache)
    for method in METHODS:
        with pytest.raises(ls.OptionError, match="layer 0 of test prompts holds NaN or infinity in 1 of 20"):
            fit(cache, method)


@FITTED_METHOD
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_texts_score_as_their_cache_does(tiny, method, layer: int):
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    detector = ls.Detector.fit(cache, method=method, layers=[layer], folds=2)
    scores = detector.score(cache)
    assert np.ptp(scores) > 1e-3
    for given in (list(TEXTS), labelled()):
        assert detector.score(given, model=tiny) == pytest.approx(scores, abs=1e-5)
    assert np.array_equal(detector.predict(list(TEXTS), model=tiny), detector.predict(cache))


@pytest.mark.parametrize("over", OVER[1:])
def test_texts_score_as_their_cache_does_over_several_layers(tiny, over):
    prompts = labelled((*TEXTS, "a garden"))
    cache = ls.residual_streams(tiny, prompts, progress=False)
    detector = ls.Detector.fit(cache, over=over, layers=[2, -1], folds=3)
    assert detector.layers == (2, -1)
    scores = detector.score(cache)
    assert np.ptp(scores) > 1e-3
    assert detector.score(prompts.texts, model=tiny) == pytest.approx(scores, abs=1e-5)


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
    detector = ls.Detector.fit(cache, layers=[1], folds=2)
    assert detector.position == "-2"
    assert detector.score(list(TEXTS), model=tiny) == pytest.approx(detector.score(cache), abs=1e-5)


def test_a_callable_position_scores_its_cache_and_says_why_texts_cannot(tiny):
    def second(ids: np.ndarray, content: np.ndarray) -> int:
        return 1

    cache = ls.residual_streams(tiny, labelled(), position=second, template="raw", progress=False)
    detector = ls.Detector.fit(cache, layers=[1], folds=2)
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


@pytest.mark.parametrize(
    ("method", "over", "calibration"),
    [
        *(("two-vector", over, calibration) for over in OVER for calibration in CALIBRATIONS),
        *((m, "best", "platt") for m in METHODS if m != "two-vector"),
        ("logistic", "mean", "isotonic"),
    ],
)
def test_a_saved_detector_scores_bit_for_bit_as_before(method, over, calibration, tmp_path):
    cache, _ = planted_cache(40)
    origin = {"neutral": planted_cache(20, seed=2)[0]} if method in COSINE else {}
    detector = fit(cache, method, over=over, calibration=calibration, abstain=0.2, **origin)
    back = ls.Detector.load(detector.save(tmp_path / "detector.safetensors"))
    fresh, _ = planted_cache(40, seed=1)
    assert np.array_equal(back.score(fresh), detector.score(fresh))
    assert np.array_equal(back.predict(fresh), detector.predict(fresh))
    scores = detector.score(fresh)
    assert np.array_equal(back.probability(scores), detector.probability(scores))
    assert back.verdicts(scores) == detector.verdicts(scores)
    assert {"safe", "dangerous"} <= set(back.verdicts(scores))
    assert back.to_frame().equals(detector.to_frame())
    assert back.model == detector.model


def test_a_detector_on_given_means_is_saved_as_well(tmp_path):
    vectors = ls.content_vectors(planted_cache(40)[0])
    detector = ls.Detector.fit(planted_cache(30, seed=1)[0], vectors=vectors)
    back = ls.Detector.load(detector.save(tmp_path / "detector"))
    assert torch.equal(back.parameters["safe_mean"][0], vectors.safe_mean[detector.layer])


def test_the_file_is_plain_tensors_and_json_never_a_pickle(tmp_path):
    detector = ls.Detector.fit(planted_cache(40)[0], method="logistic")
    path = detector.save(tmp_path / "detector")
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["lens_safety"])
        assert set(file.keys()) == {"weight", "centre", "bias", "calibration"}
    assert header["threshold"] == detector.threshold
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + size + 4 * (2 * D_MODEL + 1) + 8 * 2


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


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("method", ["two-vector", "lda"])
def test_a_file_whose_tensors_belie_its_header_is_refused(method, over, tmp_path):
    path = fit(planted_cache(40)[0], method, over=over).save(tmp_path / "detector")
    tensors, header = load_tensors(path, "Detector")
    header = {name: header[name] for name in header if name not in ("kind", "version")}
    changes = [
        *(({**tensors, name: tensors[name][..., :-1]}, header) for name in tensors),
        *(({**tensors, name: tensors[name].sum()}, header) for name in tensors),
        *(({other: tensors[other] for other in tensors if other != name}, header) for name in tensors),
        *((tensors, {other: header[other] for other in header if other != name}) for name in header),
        ({**tensors, "more": tensors["calibration"]}, header),
        (tensors, {**header, "model": {**header["model"], "d_model": 5}}),
        (tensors, {**header, "method": "softmax" if method == "lda" else "lda"}),
        (tensors, {**header, "over": "vote" if over == "mean" else "mean"}),
        (tensors, {**header, "calibration": "isotonic"}),
        (tensors, {**header, "layers": []}),
        (tensors, {**header, "layers": [*header["layers"], 2]}),
        (tensors, {**header, "threshold": float("nan")}),
        (tensors, {**header, "band": "wide"}),
    ]
    for number, (changed, said) in enumerate(changes):
        save_tensors(tmp_path / f"changed{number}", "Detector", changed, said)
        with pytest.raises(ls.FileError, match="does not hold what its header says"):
            ls.Detector.load(tmp_path / f"changed{number}")
    save_tensors(tmp_path / "same", "Detector", tensors, header)
    assert ls.Detector.load(tmp_path / "same").method == method


@pytest.mark.parametrize("what", ["vectors", "neutral", "unlabelled"])
def test_what_is_given_beside_a_cache_must_belong_to_it(what: str):
    cache, _ = planted_cache(30)
    other = ls.content_vectors(cache) if what == "vectors" else cache
    method = "lda" if what == "unlabelled" else "two-vector"

    def given(**changes: object) -> ls.Detector:
        return ls.Detector.fit(cache, method=method, **{what: replace(other, **changes)})  # type: ignore[arg-type]

    assert given().layer == 1
    for change in ({"position": "last"}, {"template": "raw"}):
        with pytest.raises(ls.MismatchError, match=f"{what} read .* expected the same position and template"):
            given(**change)
    with pytest.raises(ls.MismatchError, match=f"given as {what} was made with .* other weights"):
        given(model=replace(cache.model, probe=(9.0, 9.0, 9.0, 9.0)))
    if what != "vectors":
        with pytest.raises(ls.MismatchError, match="layer 1 given"):
            given(resid=cache.resid[:1], layers=(0,))
        with pytest.raises(ls.OptionError, match="NaN or infinity in 30 of 30"):
            given(resid=cache.resid * torch.inf)


@pytest.mark.parametrize("what", ["method", "over", "calibration"])
def test_a_file_with_an_unknown_method_is_refused(what: str, tmp_path):
    path = ls.Detector.fit(planted_cache(30)[0]).save(tmp_path / "d.safetensors")
    tensors, header = load_tensors(path, "Detector")
    save_tensors(path, "Detector", tensors, {**header, what: "magic"})
    with pytest.raises(ls.FileError, match=f"unknown {what} 'magic'"):
        ls.Detector.load(path)
