from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import D_MODEL, N_LAYERS, cache_of, labelled, planted_cache, relabelled
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

import lens_safety as ls
from lens_safety import audit
from lens_safety.audit import REWORDINGS, category_matrix, joined, label_curve, reworded, shuffled
from lens_safety.baselines import WORDINGS
from lens_safety.intervals import proportion
from lens_safety.prompts import Prompt, PromptSet
from lens_safety.residuals import ResidualCache

AXES = torch.eye(D_MODEL)
OTHER_MODEL = (9.0, 2.0, 3.0, 4.0)
FAST: dict[str, Any] = {"method": "one-vector", "layers": [1]}


def along(
    direction: torch.Tensor, name: str, n: int = 80, *, seed: int = 0, shift: float = 3.0, **fields
) -> ResidualCache:
    """Noise, with the dangerous prompts (every second) moved along a unit direction at layer 1."""
    cache, _ = planted_cache(n, shift=0.0, seed=seed, name=name)
    resid = cache.resid.clone()
    resid[1, torch.from_numpy(cache.prompts.labels)] += shift * direction
    rows = tuple(replace(prompt, **fields) for prompt in cache.prompts)
    return replace(cache, resid=resid, prompts=PromptSet(rows, name))


def with_prompts(cache: ResidualCache, **columns: list) -> ResidualCache:
    rows = [
        replace(prompt, **{name: values[i] for name, values in columns.items()})
        for i, prompt in enumerate(cache.prompts)
    ]
    return replace(cache, prompts=replace(cache.prompts, prompts=tuple(rows)))


def auroc_of(detector: ls.Detector, cache: ResidualCache) -> float:
    return float(roc_auc_score(cache.prompts.labels, detector.score(cache)))


def returns(made, tmp_path) -> None:
    """Saved and loaded, a result is what it was."""
    back = type(made).load(made.save(tmp_path / "made.json"))
    for name, value in vars(made).items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(getattr(back, name), value, check_exact=True)
        else:
            assert getattr(back, name) == value


# --- rewordings ---------------------------------------------------------------------------------------


def changed(name: str, text: str, seed: int = 0) -> str:
    return REWORDINGS[name](text, np.random.default_rng(seed))


def test_danger_words_are_masked_whole_and_others_are_left():
    masked = changed(
        "danger words masked", "Kill it, KILLING spree; bombs! He stole, robs and exploits a gun."
    )
    assert masked == (
        "something it, something spree; something! He something, something and something a something."
    )
    plain = (
        "The skilful robot forgets its method, explores a stable and a robust shrapnel-free skill, Robert."
    )
    assert changed("danger words masked", plain) == plain


def test_shuffled_words_are_the_same_words_in_an_order_of_the_seed():
    text = "one two  three four five six seven"
    made = [changed("words shuffled", text, seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert all(sorted(one.split()) == sorted(text.split()) and one != text for one in made)


def test_frames_keep_the_request_and_differ_in_tone():
    polite, rude = (changed(f"{tone} frame", "How do I bake bread?") for tone in ("polite", "rude"))
    assert all("How do I bake bread?" in text for text in (polite, rude))
    assert "Thank you" in polite
    assert "stupid" in rude
    # About the same length, so that length does not stand in for tone.
    assert abs(len(polite) - len(rude)) < 15


def test_reworded_prompts_keep_everything_but_their_texts():
    prompts = PromptSet((Prompt("one two three", True, group="g", kind="k"), Prompt("four", False)), "p")
    made = reworded(prompts, REWORDINGS["polite frame"])
    assert made.name == "p"
    assert [replace(p, text="") for p in made] == [replace(p, text="") for p in prompts]
    assert all(old in new and old != new for old, new in zip(prompts.texts, made.texts, strict=True))


# --- the shortcut audit -------------------------------------------------------------------------------

WORDS = ["how", "do", "I", "make", "a", "cake", "kite", "for", "the", "garden"]


def by_length(n: int, *, seed: int, name: str) -> PromptSet:
    """Texts of the same words, of which the dangerous ones are long: a style without meaning."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 1
    sizes = np.where(labels, rng.integers(18, 22, n), rng.integers(4, 6, n))
    return replace(labelled([" ".join(rng.choice(WORDS, size)) for size in sizes], labels), name=name)


def by_row(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index("name")


def test_a_detector_of_meaningless_style_is_exposed(tiny):
    train, test = (
        ls.residual_streams(tiny, by_length(40, seed=seed, name="ab"[seed]), position="max", progress=False)
        for seed in (0, 1)
    )
    detector = ls.Detector.fit(train, method="lda")
    made = ls.shortcut_audit(detector, test, train=train, model=tiny, n_resamples=20, progress=False)
    frame = by_row(made.frame)
    assert list(frame.index) == ["as it is", *WORDINGS.values(), "embedding layer", *REWORDINGS]
    assert list(frame["kind"]) == ["detector"] + ["baseline"] * 4 + ["rewording"] * 4
    assert frame.loc["as it is", "auroc"] > 0.97
    assert abs(frame.loc["length of the text", "gap"]) < 0.03
    assert frame.loc["length of the text", "auroc"] == 1
    # None of these words is a danger word, so nothing is masked.
    assert frame.loc["danger words masked", "rank_correlation"] == pytest.approx(1)
    for name, change in REWORDINGS.items():
        prompts = reworded(test.prompts, change)
        scores = detector.score(prompts, model=tiny)
        assert frame.loc[name, "auroc"] == pytest.approx(roc_auc_score(prompts.labels, scores))
        right = (scores > detector.threshold) == prompts.labels
        assert frame.loc[name, "accuracy"] == pytest.approx(right.mean())
        expected = np.corrcoef(rankdata(scores), rankdata(detector.score(test)))[0, 1]
        assert frame.loc[name, "rank_correlation"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def meaningful() -> tuple[ResidualCache, ResidualCache, ls.ShortcutAudit]:
    """A planted direction, and texts of random words in numbers that do not go with the label."""
    made = []
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        cache = along(AXES[0], name, seed=seed)
        texts = [" ".join(rng.choice(WORDS, rng.integers(6, 15))) for _ in range(80)]
        assert len(set(texts)) == 80
        made.append(with_prompts(cache, text=texts))
    train, test = made
    detector = ls.Detector.fit(train, layers=[1])
    return train, test, ls.shortcut_audit(detector, test, train=train, n_resamples=20)


def test_a_detector_of_meaning_has_a_wide_gap_to_every_baseline(meaningful):
    train, test, made = meaningful
    frame = by_row(made.frame)
    assert set(made.frame["kind"]) == {"detector", "baseline"}
    own = frame.loc["as it is"]
    assert own["auroc"] == pytest.approx(auroc_of(ls.Detector.fit(train, layers=[1]), test))
    assert (own["gap"], own["rank_correlation"]) == (0, pytest.approx(1))
    others = made.frame[made.frame["kind"] == "baseline"]
    assert (others["gap"] > 0.25).all()
    assert (others["gap"] + others["auroc"]).to_numpy() == pytest.approx(np.full(4, own["auroc"]))
    assert (others["rank_correlation"].abs() < 0.4).all()
    embed = ls.Detector.fit(train, layers=[-1])
    assert frame.loc["embedding layer", "auroc"] == pytest.approx(auroc_of(embed, test))
    assert (made.n, made.source, made.model) == (80, "b", "planted")


def test_a_tone_detector_has_no_embedding_baseline(meaningful):
    train, test, _ = meaningful
    detector = ls.Detector.fit(train, method="tone", vectors=ls.content_vectors(train))
    made = ls.shortcut_audit(detector, test, train=train, n_resamples=5)
    assert list(made.frame["name"]) == ["as it is", *WORDINGS.values()]


def test_scores_that_are_all_alike_have_no_rank_correlation(meaningful):
    train, test, _ = meaningful
    flat = replace(test, embed=torch.ones_like(test.embed))
    detector = ls.Detector.fit(train, layers=[1])
    row = by_row(ls.shortcut_audit(detector, flat, train=train, n_resamples=5).frame).loc["embedding layer"]
    assert row["auroc"] == 0.5
    assert np.isnan(row["rank_correlation"])


def test_an_audit_against_other_training_prompts_or_on_them_is_refused(meaningful):
    train, test, _ = meaningful
    detector = ls.Detector.fit(train, layers=[1])
    with pytest.raises(ls.MismatchError, match="train=a given, but the detector was fitted on a"):
        ls.shortcut_audit(detector, test, train=train[:70])
    with pytest.raises(ls.PromptError, match="fitted on 80 of the 80"):
        ls.shortcut_audit(detector, train, train=train)


# --- transfer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transferred() -> tuple[dict[str, ResidualCache], ls.TransferMatrix]:
    caches = {
        "one": along(AXES[0], "one", 120, seed=1),
        "same": along(AXES[0], "same", 100, seed=2),
        "other": along(AXES[1], "other", 80, seed=3),
        "opposite": along(-AXES[0], "opposite", 60, seed=4),
    }
    return caches, ls.transfer_matrix(list(caches.values()), **FAST, n_resamples=50)


def test_what_is_shared_carries_over_and_what_is_not_does_not(transferred):
    wide = transferred[1].matrix()
    assert list(wide.columns) == ["one", "same", "other", "opposite"]
    assert list(wide.index) == [*wide.columns, *(f"all but {name}" for name in wide.columns)]
    assert min(wide.loc["one", "same"], wide.loc["same", "one"]) > 0.9
    unrelated = [wide.loc["one", "other"], wide.loc["same", "other"], wide.loc["other", "one"]]
    assert all(0.25 < value < 0.75 for value in unrelated)
    assert 0.4 < np.mean(unrelated) < 0.6
    assert max(wide.loc["one", "opposite"], wide.loc["opposite", "same"]) < 0.1


def test_each_cell_is_a_detector_fitted_down_and_tested_across(transferred):
    caches, made = transferred
    detectors = {name: ls.Detector.fit(cache, **FAST) for name, cache in caches.items()}
    for row in made.frame[~made.frame["train"].str.startswith("all but")].to_dict("records"):
        detector, test = detectors[row["train"]], caches[row["test"]]
        assert row["inside"] == (row["train"] == row["test"])
        assert (row["n_train"], row["n_test"]) == (len(caches[row["train"]]), len(test))
        if row["inside"]:
            assert (row["auroc"], row["accuracy"]) == (detector.auroc_cv, detector.accuracy_cv)
            assert np.isnan([row["auroc_low"], row["auroc_high"]]).all()
            assert row["auroc"] < auroc_of(detector, test) + 1e-9
        else:
            assert row["auroc"] == pytest.approx(auroc_of(detector, test))
            assert row["accuracy"] == (detector.predict(test) == test.prompts.labels).mean()
            assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
    assert made.frame["overlap"].sum() == 0


def test_leaving_one_set_out_fits_on_all_others_and_tests_on_it_alone(transferred):
    caches, made = transferred
    left = made.frame[made.frame["train"].str.startswith("all but")]
    assert (
        list(left["train"])
        == [f"all but {name}" for name in left["test"]]
        == made.matrix().index[4:].tolist()
    )
    assert not left["inside"].any()
    assert list(left["n_train"]) == [360 - len(caches[name]) for name in left["test"]]
    rest = joined([cache for name, cache in caches.items() if name != "same"], "rest")
    expected = auroc_of(ls.Detector.fit(rest, **FAST), caches["same"])
    assert left.set_index("test").loc["same", "auroc"] == pytest.approx(expected)
    two = ls.transfer_matrix({name: caches[name] for name in ("one", "same")}, **FAST, n_resamples=5)
    without = ls.transfer_matrix(caches, **FAST, n_resamples=5, leave_one_out=False)
    assert (len(two.frame), len(without.frame)) == (4, 16)


def test_test_labels_choose_nothing_in_a_transfer(transferred):
    one, same = (transferred[0][name] for name in ("one", "same"))
    shuffles = relabelled(same, np.random.default_rng(0).permutation(same.prompts.labels))
    cell = ls.transfer_matrix({"one": one, "same": shuffles}, **FAST, n_resamples=5).frame.iloc[1]
    detector = ls.Detector.fit(one, **FAST)
    assert cell["accuracy"] == (detector.predict(same) == shuffles.prompts.labels).mean()
    assert 0.3 < cell["auroc"] < 0.7


def test_texts_of_the_training_set_are_left_out_and_counted():
    train, test = along(AXES[0], "train", 60, seed=1), along(AXES[0], "test", 40, seed=2)
    # Seven test texts are training texts; with their labels turned they would spoil the AUROC.
    texts = [*train.prompts.texts[:7], *test.prompts.texts[7:]]
    labels = [not label if i < 7 else bool(label) for i, label in enumerate(test.prompts.labels)]
    mixed = with_prompts(test, text=texts, label=labels)
    row = ls.transfer_matrix([train, mixed], **FAST, n_resamples=5).frame.iloc[1]
    assert (row["overlap"], row["n_test"]) == (7, 33)
    assert row["auroc"] == pytest.approx(auroc_of(ls.Detector.fit(train, **FAST), mixed[7:]))
    with pytest.raises(ls.PromptError, match="every prompt of copy stands in train"):
        ls.transfer_matrix({"train": train, "copy": with_name(train[10:], "copy")}, **FAST)


def with_name(cache: ResidualCache, name: str) -> ResidualCache:
    return replace(cache, prompts=replace(cache.prompts, name=name))


def test_a_set_of_one_class_is_tested_on_and_not_fitted_on():
    both, safe = along(AXES[0], "both", 40), along(AXES[0], "safe", 40, seed=1)
    safe = safe[~safe.prompts.labels]
    frame = ls.transfer_matrix([both, safe], **FAST, n_resamples=5).frame
    assert list(zip(frame["train"], frame["test"], strict=True)) == [("both", "both"), ("both", "safe")]
    assert np.isnan(frame["auroc"][1])
    detector = ls.Detector.fit(both, **FAST)
    assert frame["accuracy"][1] == (~detector.predict(safe)).mean()
    with pytest.raises(ls.PromptError, match="safe, again have one class only each"):
        ls.transfer_matrix({"safe": safe, "again": with_name(safe[:5], "again")}, **FAST)


def test_sets_that_cannot_be_told_apart_or_do_not_belong_together_are_refused(transferred):
    one, same = (transferred[0][name] for name in ("one", "same"))
    with pytest.raises(ls.OptionError, match="two sets of the same name"):
        ls.transfer_matrix([one, with_name(same, "one")], **FAST)
    with pytest.raises(ls.OptionError, match="1 sets given"):
        ls.transfer_matrix([one], **FAST)
    with pytest.raises(ls.MismatchError, match="position"):
        ls.transfer_matrix([one, replace(same, position="last")], **FAST)
    unknown = with_prompts(same, label=[None] * len(same))
    with pytest.raises(ls.PromptError, match="no label"):
        ls.transfer_matrix([one, unknown], **FAST)


def test_categories_are_fitted_on_one_and_tested_on_another():
    drugs, fraud = (
        along(AXES[0], "d", 60, category="drugs"),
        along(AXES[1], "f", 50, seed=1, category="fraud"),
    )
    everyday = along(AXES[2], "e", 20, seed=2, category="everyday")
    everyday = everyday[~everyday.prompts.labels]
    whole = joined([drugs, everyday, fraud, along(AXES[2], "n", 10, seed=3)], "whole")
    shuffled_rows = whole[np.random.default_rng(0).permutation(len(whole))]
    made = category_matrix(whole, **FAST, n_resamples=5)
    assert set(made.frame["train"]) == set(made.frame["test"]) == {"drugs", "fraud"}
    assert made.frame.equals(
        ls.transfer_matrix({"drugs": drugs, "fraud": fraud}, **FAST, n_resamples=5).frame
    )
    other = category_matrix(shuffled_rows, **FAST, n_resamples=5).matrix()
    assert 0.25 < other.loc["drugs", "fraud"] < 0.75
    assert other.loc["drugs", "fraud"] == pytest.approx(made.matrix().loc["drugs", "fraud"], abs=1e-6)
    assert made.matrix().loc["drugs", "drugs"] > 0.9
    with pytest.raises(ls.OptionError, match="d has 1 categories"):
        category_matrix(drugs, **FAST)


# --- the label curve ----------------------------------------------------------------------------------


def in_pairs(cache: ResidualCache, size: int = 4) -> ResidualCache:
    return with_prompts(cache, group=[f"g{i // size}" for i in range(len(cache))])


def test_more_labels_do_not_hurt_where_there_is_something_to_learn():
    train, test = along(AXES[0], "train", 120, shift=2.5), along(AXES[0], "test", 200, seed=1, shift=2.5)
    summary = label_curve(train, test, sizes=(10, 40), seeds=4).summary()
    assert list(summary["labels"]) == [10, 40, 120]
    assert list(summary["seeds"]) == [4, 4, 1]
    assert (np.diff(summary["auroc"]) > -0.02).all()
    first, _, last = summary["auroc"].to_numpy()
    assert last > max(0.85, first)
    nothing = label_curve(shuffled(train), test, sizes=(10, 40), seeds=4).summary()
    assert nothing["auroc"].to_numpy().max() < 0.75


def test_a_point_of_the_curve_is_a_detector_of_that_many_labels(monkeypatch):
    train, test = in_pairs(along(AXES[0], "train", 96)), along(AXES[0], "test", 60, seed=1)
    parts: list[ResidualCache] = []
    fitted: list[ls.Detector] = []
    fit = ls.Detector.fit

    def kept(cache: ResidualCache, **given) -> ls.Detector:
        parts.append(cache)
        fitted.append(fit(cache, **given))
        return fitted[-1]

    monkeypatch.setattr(ls.Detector, "fit", kept)
    made = label_curve(train, test, sizes=(10, 33, 48, 1000), seeds=3, **FAST)
    assert (
        [len(part) for part in parts] == list(made.frame["labels"]) == [10] * 3 + [33] * 3 + [48] * 3 + [96]
    )
    for part in parts:
        n_dangerous = part.prompts.labels.sum()
        assert n_dangerous - (len(part) - n_dangerous) == len(part) % 2
        # A group has two rows of each class; only the last that is drawn may be cut.
        sizes = np.unique(part.prompts.groups, return_counts=True)[1]
        assert (sizes != 4).sum() <= 1
    texts = [frozenset(part.prompts.texts) for part in parts]
    assert len(set(texts)) == 10
    assert parts[-1] is train
    whole = fit(train, **FAST)
    last = made.frame.iloc[-1]
    assert last["auroc"] == pytest.approx(auroc_of(whole, test))
    assert last["accuracy"] == (whole.predict(test) == test.prompts.labels).mean()
    assert (last["detector"], last["seed"]) == ("one-vector at layer 1", 0)
    right = [(detector.predict(test) == test.prompts.labels).mean() for detector in fitted]
    assert list(made.frame["accuracy"]) == right
    at_zero = [((detector.score(test) > 0) == test.prompts.labels).mean() for detector in fitted]
    assert right != at_zero
    again = label_curve(train, test, sizes=(10, 33, 48), seeds=3, **FAST)
    pd.testing.assert_frame_equal(again.frame, made.frame)


def test_the_summary_is_the_mean_and_range_of_the_seeds():
    frame = pd.DataFrame(
        {"labels": [50, 10, 10], "seed": [0, 0, 1], "auroc": [0.9, 0.5, 0.8], "accuracy": [0.7, 0.4, 0.8]}
    )
    summary = ls.LabelCurve(frame, "m", "a", "b", "planted", 5).summary()
    assert list(summary["labels"]) == [10, 50]
    assert list(summary["auroc"]) == pytest.approx([0.65, 0.9])
    assert summary.iloc[0][["auroc_low", "auroc_high", "accuracy"]].to_list() == pytest.approx(
        [0.5, 0.8, 0.6]
    )
    assert summary.iloc[1][["auroc_low", "auroc_high", "seeds"]].to_list() == [0.9, 0.9, 1]


def test_sizes_that_a_class_cannot_serve_are_left_out():
    cache, test = along(AXES[0], "train", 80), along(AXES[0], "test", 40, seed=1)
    labels = cache.prompts.labels
    uneven = cache[np.sort(np.concatenate([np.flatnonzero(labels)[:12], np.flatnonzero(~labels)]))]
    made = label_curve(uneven, test, sizes=(10, 24, 25, 40), seeds=1, **FAST)
    assert list(made.frame["labels"]) == [10, 24, 52]


def test_too_few_labels_and_prompts_that_stand_in_both_sets_are_refused():
    train, test = along(AXES[0], "train", 40), along(AXES[0], "test", 40, seed=1)
    for sizes in ((9,), (10, 5), ()):
        with pytest.raises(ls.OptionError, match="at least 10 labels"):
            label_curve(train, test, sizes=sizes)
    with pytest.raises(ls.OptionError, match="8 training prompts"):
        label_curve(train[:8], test, sizes=(10,))
    seen = joined([test, train[3:5]], "mixed")
    with pytest.raises(ls.PromptError, match="2 prompts of mixed stand in train"):
        label_curve(train, seen, sizes=(10,))


# --- tone and content ---------------------------------------------------------------------------------


def toned(cache: ResidualCache) -> ResidualCache:
    """Two safe and dangerous prompts polite, the next two rude."""
    return with_prompts(cache, kind=["polite" if i % 4 < 2 else "rude" for i in range(len(cache))])


def tone_of(direction: torch.Tensor) -> ls.ContentVectors:
    vectors = ls.content_vectors(along(direction, "personas", 60, seed=9))
    exact = torch.stack([AXES[2], direction, AXES[2]])
    return replace(vectors, vectors=exact)


def test_where_tone_and_content_are_one_direction_detection_needs_the_tone():
    train, test = along(AXES[0], "train", 160), toned(along(AXES[0], "test", 120, seed=1))
    made = ls.tone_content(train, tone_of(AXES[0]), test, n_shuffles=40)
    row = made.frame.set_index("layer").loc[1]
    assert made.layer == 1
    assert row["cosine"] > 0.95
    assert row["cosine"] > row["null_high"]
    assert row["auroc"] > 0.95
    assert 0.3 < row["auroc_without_tone"] < 0.7
    assert list(made.frame["layer"]) == list(range(N_LAYERS))


def test_where_they_are_orthogonal_detection_does_not():
    train, test = along(AXES[0], "train", 160), toned(along(AXES[0], "test", 120, seed=1))
    frame = ls.tone_content(train, tone_of(AXES[1]), test, n_shuffles=40).frame.set_index("layer")
    row = frame.loc[1]
    assert row["null_low"] < row["cosine"] < row["null_high"]
    assert row["null_low"] < 0 < row["null_high"]
    assert row["auroc_without_tone"] == pytest.approx(row["auroc"], abs=0.02)
    assert row["auroc"] > 0.95
    assert (frame.loc[[0, 2], "auroc"] < 0.7).all()
    cosines = [
        (ls.content_vectors(shuffled(train, seed=seed)).unit * tone_of(AXES[1]).unit).sum(dim=1)[1]
        for seed in range(40)
    ]
    assert row["null_low"] == pytest.approx(np.percentile(cosines, 2.5), abs=1e-5)
    assert row["null_high"] == pytest.approx(np.percentile(cosines, 97.5), abs=1e-5)


def grid(points: list[tuple[float, float]], labels: list[bool], name: str, **columns: list) -> ResidualCache:
    cache = with_prompts(cache_of(torch.tensor([points], dtype=torch.float32), labels), **columns)
    return with_name(with_prompts(cache, text=[f"{name} {i}" for i in range(len(points))]), name)


def test_the_two_by_two_table_worked_by_hand():
    train = grid([(0, 0), (2, 0)] * 5, [False, True] * 5, "train")
    # The tone is u = (1, 1) / sqrt(2), so that h - (h . u) u = (x - y) / 2 * (1, -1).
    tone = ls.content_vectors(grid([(0, 0), (3, 3)], [False, True], "personas"))
    test = grid(
        [(0, -2), (3, 3), (2, 0), (0, 0), (1.5, 1), (4, 2), (5, 5)],
        [False, False, True, True, False, True, True],
        "test",
        kind=["polite"] * 4 + ["rude"] * 2 + ["plain"],
    )
    made = ls.tone_content(train, tone, test, n_shuffles=3)
    cells = made.cells.set_index(["tone", "label"])
    # Before: w = (1, 0), midpoint (1, 0), score x - 1. After: score (x - y - 1) / sqrt(2). Threshold 0.
    by_hand = {
        ("polite", "safe"): (2, 0.5, 1, 0, 1),
        ("polite", "dangerous"): (2, 0, 1, 0, 1),
        ("rude", "safe"): (1, 0.5, 1, -0.5, 0),
        ("rude", "dangerous"): (1, 3, 1, 1, 1),
    }
    assert list(cells.index) == list(by_hand)
    for key, (n, score, flagged, score_after, flagged_after) in by_hand.items():
        row = cells.loc[key]
        assert row["n"] == n
        assert row["score"] == pytest.approx(score, abs=1e-6)
        assert row["score_without_tone"] == pytest.approx(score_after / np.sqrt(2), abs=1e-6)
        for suffix, count in (("", flagged), ("_without_tone", flagged_after)):
            expected = proportion(count, n)
            got = [row[f"flagged{suffix}{end}"] for end in ("", "_low", "_high")]
            assert got == [expected.value, expected.low, expected.high]
    assert made.frame["cosine"].to_list() == pytest.approx([1 / np.sqrt(2)])


def test_a_cell_without_prompts_is_not_defined():
    train, test = along(AXES[0], "train", 40), along(AXES[0], "test", 20, seed=1)
    test = with_prompts(test, kind=["polite" if label else "rude" for label in test.prompts.labels])
    cells = ls.tone_content(train, tone_of(AXES[1]), test, n_shuffles=2).cells
    assert list(cells["n"]) == [0, 10, 10, 0]
    assert list(cells["score"].isna()) == list(cells["flagged"].isna()) == [True, False, False, True]


def test_tone_and_content_that_do_not_belong_together_are_refused():
    train, tone = along(AXES[0], "train", 40), tone_of(AXES[1])
    test = toned(along(AXES[0], "test", 20, seed=1))
    turned = replace(test, resid=test.resid.flip(0), layers=(2, 1, 0))
    for other in (turned, replace(test, position="last"), replace(test, template="raw")):
        with pytest.raises(ls.MismatchError, match="train and test with different"):
            ls.tone_content(train, tone, other, n_shuffles=2)
    with pytest.raises(ls.MismatchError, match="position"):
        ls.tone_content(train, replace(tone, position="last"), test, n_shuffles=2)
    with pytest.raises(ls.MismatchError, match="other weights"):
        ls.tone_content(train, tone, replace(test, model=replace(test.model, probe=OTHER_MODEL)))
    with pytest.raises(ls.PromptError, match="no prompts of the kinds 'polite' and 'rude'"):
        ls.tone_content(train, tone, along(AXES[0], "test", 20, seed=1))
    with pytest.raises(ls.PromptError, match="fitted on 40"):
        ls.tone_content(train, tone, toned(train), n_shuffles=2)


# --- joined, without_direction ------------------------------------------------------------------------


def test_joined_sets_keep_the_first_of_texts_that_stand_in_several():
    a, b = along(AXES[0], "a", 6), along(AXES[1], "b", 5, seed=1)
    repeated = with_prompts(b, text=[a.prompts.texts[4], *b.prompts.texts[1:4], a.prompts.texts[0]])
    made = joined([a, repeated], "both")
    assert made.prompts.name == "both"
    assert made.prompts.texts == [*a.prompts.texts, *b.prompts.texts[1:4]]
    assert list(made.prompts.labels) == [*a.prompts.labels, *b.prompts.labels[1:4]]
    assert torch.equal(made.resid, torch.cat([a.resid, b.resid[:, 1:4]], dim=1))
    assert torch.equal(made.embed, torch.cat([a.embed, b.embed[1:4]]))
    assert torch.equal(joined([a], "alone").resid, a.resid)


def test_sets_read_in_another_way_are_not_joined():
    a, b = along(AXES[0], "a", 6), along(AXES[1], "b", 5, seed=1)
    others = [
        (replace(b, position="last"), "different position"),
        (replace(b, template="raw"), "different template"),
        (replace(b, resid=b.resid[:2], layers=(0, 1)), "different layers"),
        (replace(b, model=replace(b.model, probe=OTHER_MODEL)), "other weights"),
    ]
    for other, what in others:
        with pytest.raises(ls.MismatchError, match=what):
            joined([a, other], "both")
    with pytest.raises(ls.OptionError, match="no caches"):
        joined([], "none")


def test_without_a_direction_nothing_lies_along_it_and_the_rest_is_as_it_was():
    cache = along(AXES[0], "a", 7)
    drawn = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0))
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    made = audit.without_direction(cache, unit)
    assert torch.einsum("lpd,ld->lp", made.resid, unit).abs().max() < 1e-5
    taken = torch.einsum("lpd,ld->lp", cache.resid, unit)[..., None] * unit[:, None]
    assert torch.allclose(made.resid + taken, cache.resid, atol=1e-5)
    assert torch.allclose(audit.without_direction(made, unit).resid, made.resid, atol=1e-5)
    assert torch.equal(made.embed, cache.embed)


# --- files --------------------------------------------------------------------------------------------


def test_saved_audits_come_back_equal(meaningful, transferred, tmp_path):
    train, test = along(AXES[0], "train", 40), toned(along(AXES[0], "test", 20, seed=1))
    curve = label_curve(train, test, sizes=(10,), seeds=2, **FAST)
    tone = ls.tone_content(train, tone_of(AXES[1]), test, n_shuffles=3)
    for made in (meaningful[2], transferred[1], curve, tone):
        returns(made, tmp_path)
        assert "<table" in made._repr_html_()
