from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cache_of, labelled, planted_cache, relabelled

import lens_safety as ls
from lens_safety.evaluate import compare
from lens_safety.prompts import Prompt, PromptSet
from lens_safety.types import Scores

COUNTED = ("accuracy", "tpr", "fpr")
SCORES = np.array([0.9, 0.2, 0.6, 0.4, 0.1, 0.8, 0.3])
LABELS = [True, False, True, False, True, False, False]
KINDS = ["standard"] * 4 + ["idiom"] * 2 + ["chatter"]


def small_set() -> PromptSet:
    rows = zip(LABELS, KINDS, strict=True)
    prompts = (Prompt(f"text {i}", label, kind=kind) for i, (label, kind) in enumerate(rows))
    return PromptSet(tuple(prompts), "by hand")


def report_on(scores: Scores, prompts: PromptSet, **options) -> ls.DetectionReport:
    values = {"threshold": 0.5, "n_resamples": 100, **options}
    return ls.report_scores(scores, prompts, detector="given scores", model="none", **values)


def row_of(report: ls.DetectionReport, kind: str) -> dict:
    frame = report.to_frame()
    return frame[frame["type"] == kind].iloc[0].to_dict()


def fitted(n: int = 60) -> ls.Detector:
    return ls.Detector.fit(planted_cache(n)[0], layer=1)


def wordy(n: int, *, seed: int, name: str) -> PromptSet:
    """Sentences of common words; dangerous ones name a weapon, safe ones a dish."""
    rng = np.random.default_rng(seed)
    common = ["how", "do", "I", "make", "the", "best", "for", "my", "old", "friend", "today"]
    told = {True: ["bomb", "poison", "malware"], False: ["soup", "bread", "salad"]}
    texts, labels = [], np.arange(n) % 2 == 1
    for i, label in enumerate(labels):
        words = [*rng.choice(common, 6), rng.choice(told[bool(label)]), f"n{i}"]
        texts.append(" ".join(rng.permutation(words)))
    return replace(labelled(texts, labels), name=name)


def test_counts_rates_and_auroc_worked_by_hand():
    row = row_of(report_on(SCORES, small_set()), "all")
    assert (row["n_safe"], row["n_dangerous"]) == (4, 3)
    assert row["accuracy"] == pytest.approx(5 / 7)
    assert row["tpr"] == pytest.approx(2 / 3)
    assert row["fpr"] == pytest.approx(1 / 4)
    assert row["auroc"] == pytest.approx((4 + 3 + 0) / 12)
    assert row["majority"] == pytest.approx(4 / 7)


def test_each_type_has_its_own_row_in_order_of_appearance():
    report = report_on(SCORES, small_set())
    assert list(report.frame["type"]) == ["all", "standard", "idiom", "chatter"]
    standard, idiom = row_of(report, "standard"), row_of(report, "idiom")
    assert [standard[name] for name in (*COUNTED, "auroc")] == [1, 1, 0, 1]
    assert [idiom[name] for name in (*COUNTED, "auroc")] == [0, 0, 1, 0]
    assert (standard["majority"], idiom["majority"]) == (0.5, 0.5)


def test_what_one_class_alone_cannot_say_is_nan_with_its_interval():
    row = row_of(report_on(SCORES, small_set()), "chatter")
    for name in ("auroc", "tpr"):
        assert np.isnan([row[name], row[f"{name}_low"], row[f"{name}_high"]]).all()
    assert (row["accuracy"], row["fpr"], row["majority"]) == (1, 0, 1)


def test_a_score_at_the_threshold_is_not_flagged():
    row = row_of(report_on(SCORES, small_set(), threshold=0.8), "all")
    assert (row["tpr"], row["fpr"]) == (pytest.approx(1 / 3), 0)


def test_proportions_carry_the_wilson_interval_worked_by_hand():
    row = row_of(report_on(SCORES, small_set()), "all")
    p, n, z = 5 / 7, 7, 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert row["accuracy_low"] == pytest.approx(middle - half, abs=1e-6)
    assert row["accuracy_high"] == pytest.approx(middle + half, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 20.0])
def test_every_interval_holds_its_estimate(shift: float):
    test, _ = planted_cache(50, seed=1, shift=shift)
    row = row_of(ls.evaluate(fitted(), test, n_resamples=200), "all")
    for name in (*COUNTED, "auroc"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row[f"{name}_low"] < row[f"{name}_high"] or row[name] in (0, 1)


def test_the_auroc_interval_is_wider_where_prompts_are_copies_in_groups():
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2 == 1
    scores = np.repeat(rng.normal(size=24) + labels, 6)
    resid, copied = torch.zeros(1, 144, 2), np.repeat(labels, 6)
    groups = [f"copies of {i // 6}" for i in range(144)]
    grouped = report_on(scores, cache_of(resid, copied, groups=groups).prompts).auroc
    single = report_on(scores, cache_of(resid, copied).prompts).auroc
    assert grouped.value == single.value
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)


def test_a_report_repeats_by_seed_and_its_auroc_interval_differs_between_seeds():
    detector, test = fitted(), planted_cache(40, seed=1, shift=1.0)[0]
    first, same, other = (ls.evaluate(detector, test, n_resamples=100, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first.frame, same.frame)
    assert (first.auroc.low, first.auroc.high) != (other.auroc.low, other.auroc.high)
    assert first.auroc.value == other.auroc.value


def test_a_report_says_what_the_frozen_detector_gives_on_fresh_prompts():
    detector, test = fitted(), planted_cache(80, seed=1)[0]
    report = ls.evaluate(detector, test, n_resamples=100)
    hits = detector.predict(test) == test.prompts.labels
    assert np.array_equal(report.scores, detector.score(test))
    assert np.array_equal(report.labels, test.prompts.labels)
    assert (report.accuracy.value, report.accuracy.n) == (hits.mean(), 80)
    assert report.auroc.value > 0.9
    assert (report.threshold, report.model) == (detector.threshold, "planted")
    assert report.detector == "two-vector at layer 1, fitted on test prompts"


def test_shuffled_test_labels_are_at_chance():
    test, _ = planted_cache(300, seed=1)
    shuffled = relabelled(test, np.random.default_rng(0).permutation(test.prompts.labels))
    report = ls.evaluate(fitted(), shuffled, n_resamples=100)
    assert report.auroc.low < 0.5 < report.auroc.high
    assert 0.4 < report.accuracy.value < 0.6


def test_permuting_the_test_prompts_permutes_the_scores_and_nothing_else():
    detector, test = fitted(), planted_cache(50, seed=1)[0]
    order = np.random.default_rng(0).permutation(50)
    report = ls.evaluate(detector, test, n_resamples=100)
    permuted = ls.evaluate(detector, test[order], n_resamples=100)
    assert permuted.scores == pytest.approx(report.scores[order], abs=1e-12)
    assert np.array_equal(permuted.labels, report.labels[order])
    drawn = ["auroc_low", "auroc_high"]
    pd.testing.assert_frame_equal(permuted.frame.drop(columns=drawn), report.frame.drop(columns=drawn))


def test_any_training_prompt_is_refused_whatever_its_order_or_label():
    train, _ = planted_cache(30)
    detector = ls.Detector.fit(train)
    held_out, _ = planted_cache(10, seed=1, name="held out")
    assert ls.evaluate(detector, held_out, n_resamples=10).n == 10
    with pytest.raises(ls.PromptError, match="fitted on 30 of the 30 prompts"):
        ls.evaluate(detector, train[::-1])
    mixed = PromptSet((*held_out.prompts.prompts[:9], Prompt(train.prompts.texts[4], False)), "mixed")
    with pytest.raises(ls.PromptError, match="fitted on 1 of the 10 prompts of mixed"):
        ls.evaluate(detector, replace(held_out, prompts=mixed))


def test_unlabelled_prompts_and_another_position_are_refused():
    detector, test = fitted(), planted_cache(20, seed=1)[0]
    unknown = PromptSet(tuple(Prompt(text) for text in test.prompts.texts))
    with pytest.raises(ls.PromptError, match="no label"):
        ls.evaluate(detector, replace(test, prompts=unknown))
    with pytest.raises(ls.MismatchError, match="reads position"):
        ls.evaluate(detector, replace(test, position="last"))


def test_the_oracle_is_never_below_the_honest_accuracy_and_gains_from_a_bad_threshold():
    for seed in range(1, 6):
        test, _ = planted_cache(40, seed=seed, shift=1.0)
        honest, skewed = fitted(), replace(fitted(), threshold=9.0)
        oracle = ls.oracle_accuracy(honest, test)
        assert oracle.value >= ls.evaluate(honest, test, n_resamples=20).accuracy.value
        assert oracle == ls.oracle_accuracy(skewed, test)
        assert oracle.value > ls.evaluate(skewed, test, n_resamples=20).accuracy.value == 0.5


def test_the_oracle_worked_by_hand():
    resid = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 2.0]]])
    detector = ls.Detector.fit(cache_of(resid, [False, False, True, True]), layer=0, folds=2)
    ordered = torch.tensor([[[0.0, 1.0], [0.5, 1.0], [1.0, 1.0], [1.0, 0.5], [1.0, 0.0]]])
    # From the most dangerous to the safest: flag the first four and one of five is wrong.
    test = cache_of(ordered, [True, False, True, True, False])
    test = replace(test, prompts=labelled("abcde", test.prompts.labels))
    oracle = ls.oracle_accuracy(detector, test)
    assert (oracle.value, oracle.n) == (pytest.approx(4 / 5), 5)
    assert ls.evaluate(detector, test, n_resamples=20).accuracy.value < 4 / 5


def test_words_alone_separate_texts_that_name_what_they_are_about():
    train, test = wordy(40, seed=0, name="a"), wordy(60, seed=1, name="b")
    report = ls.tfidf_report(train, test, n_resamples=20)
    assert report.auroc.value > 0.95
    assert report.accuracy.value > 0.9
    assert (report.n, report.source) == (60, "b")
    assert report.detector.endswith("fitted on a")


def test_words_alone_are_at_chance_after_training_on_shuffled_labels():
    train, test = wordy(80, seed=0, name="a"), wordy(200, seed=1, name="b")
    rng = np.random.default_rng(0)
    aurocs = [
        ls.tfidf_report(
            labelled(train.texts, rng.permutation(train.labels)), test, n_resamples=20
        ).auroc.value
        for _ in range(5)
    ]
    assert 0.3 < np.mean(aurocs) < 0.7


def test_the_baseline_chooses_its_threshold_without_the_test_labels():
    train, test = wordy(40, seed=0, name="a"), wordy(30, seed=1, name="b")
    report = ls.tfidf_report(train, test, n_resamples=20)
    flipped = ls.tfidf_report(train, labelled(test.texts, ~test.labels), n_resamples=20)
    assert report.threshold == flipped.threshold
    assert np.array_equal(report.scores, flipped.scores)
    assert flipped.auroc.value == pytest.approx(1 - report.auroc.value)


def test_the_baseline_needs_enough_prompts_of_both_classes():
    train = wordy(8, seed=0, name="few")
    with pytest.raises(ls.PromptError, match="4 groups of the rarer class"):
        ls.tfidf_report(train, train)


def test_a_saved_report_comes_back_equal(tmp_path):
    report = report_on(SCORES, small_set())
    back = ls.DetectionReport.load(report.save(tmp_path / "report.json"))
    pd.testing.assert_frame_equal(back.frame, report.frame, check_exact=True)
    assert np.array_equal(back.scores, report.scores)
    assert np.array_equal(back.labels, report.labels)
    assert back.labels.dtype == bool
    plain = ("kinds", "threshold", "detector", "source", "model", "seed", "n", "auroc", "accuracy")
    assert [getattr(back, name) for name in plain] == [getattr(report, name) for name in plain]


def test_reports_put_under_each_other_keep_their_rows_under_their_names():
    first, second = report_on(SCORES, small_set()), report_on(-SCORES, small_set(), threshold=-0.5)
    both = compare([("plus", first), ("minus", second)])
    assert list(both.frame["detector"]) == ["plus"] * 4 + ["minus"] * 4
    assert set(both.frame["set"]) == {"by hand"}
    for name in ("type", "accuracy", "fpr_high"):
        assert list(both.frame[name]) == [*first.frame[name], *second.frame[name]]
    assert list(both.overall["auroc"]) == [first.auroc.value, second.auroc.value]


def test_nothing_to_compare_is_refused():
    with pytest.raises(ls.OptionError, match="no reports given"):
        compare([])
