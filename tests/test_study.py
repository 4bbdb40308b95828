import numpy as np
import pandas as pd
import pytest
from conftest import shapes_of_passes

import lens_safety as ls
from lens_safety.prompts import Prompt, PromptSet

WORDS = ("cake", "kite", "garden", "make", "how", "do", "for", "a", "the", "or")


def short_prompts(n: int, name: str, *, start: int = 0, label: bool | None = True) -> PromptSet:
    """n short texts, every second dangerous (or none labelled)."""
    rng = np.random.default_rng(start)
    made = []
    for i in range(start, start + n):
        text = f"{i} " + " ".join(rng.choice(WORDS, size=3 + i % 4))
        kind = "standard" if i % 4 < 2 else "idiom"
        made.append(Prompt(text, None if label is None else i % 2 == 1, kind=kind, small=i % 3 == 0))
    return PromptSet(tuple(made), name)


def personas() -> PromptSet:
    texts = ("do make a cake", "do make a kite", "how for the cake", "how for the kite")
    return PromptSet(
        tuple(Prompt(t, i % 2 == 1, group=f"pair {i // 2}") for i, t in enumerate(texts)), "personas"
    )


def small_study(model, test: PromptSet | None = None, **options):
    return ls.study(
        model,
        train=short_prompts(36, "train <b>set</b>"),
        tests=[test or short_prompts(12, "held out", start=100)],
        personas=personas(),
        neutral=short_prompts(2, "neutral", start=200, label=None),
        multipliers=(-1.0, 2.0),
        max_new_tokens=4,
        progress=False,
        **options,
    )


@pytest.fixture
def saved(tiny, tmp_path):
    made = small_study(tiny)
    return made, made.save(tmp_path), tmp_path


def test_the_study_writes_every_file_and_they_load(saved):
    made, files, folder = saved
    assert set(files) == {
        "report.html",
        "layers.csv",
        "detection.csv",
        "shortcuts.csv",
        "wording.csv",
        "steering.csv",
        "vectors.safetensors",
        "tone_vectors.safetensors",
        "detector.safetensors",
        "study.json",
    }
    assert {path.name for path in folder.iterdir()} == set(files)
    assert ls.Detector.load(files["detector.safetensors"]).threshold == made.detector.threshold
    assert ls.ContentVectors.load(files["vectors.safetensors"]).n_dangerous == 18
    assert len(pd.read_csv(files["layers.csv"])) == 4
    detection = pd.read_csv(files["detection.csv"])
    assert set(detection["type"]) == {"all", "standard", "idiom"}
    assert set(detection["detector"]) == {
        "tone, 1 pair, threshold 0",
        "tone, 2 pairs",
        "content, 12 prompts",
        "content, 36 prompts",
        "logistic, 36 prompts",
        "TF-IDF, no model",
    }


def test_the_study_gives_what_its_parts_give(saved):
    made, _, _ = saved
    report = made.reports[0]
    rows = made.comparison.frame.query("detector == 'content, 36 prompts'")
    pd.testing.assert_frame_equal(rows.drop(columns=["detector", "set"]).reset_index(drop=True), report.frame)
    assert made.steering.layers == (made.detector.layer,)
    assert made.settings["threshold"] == made.detector.threshold


def test_a_study_again_gives_the_same_tables(tiny, saved, tmp_path):
    again = small_study(tiny).save(tmp_path / "again")
    for name in ("layers.csv", "detection.csv", "steering.csv"):
        assert again[name].read_bytes() == (tmp_path / name).read_bytes()


def test_test_labels_reach_no_choice(tiny, saved):
    made = saved[0]
    shuffled = short_prompts(12, "held out", start=100)
    shuffled = PromptSet(tuple(Prompt(p.text, not p.label, kind=p.kind) for p in shuffled), "held out")
    other = small_study(tiny, shuffled)
    assert other.detector.layer == made.detector.layer
    assert other.detector.threshold == made.detector.threshold
    np.testing.assert_array_equal(other.reports[0].scores, made.reports[0].scores)
    assert other.reports[0].accuracy.value == pytest.approx(1 - made.reports[0].accuracy.value)


def test_a_text_in_both_training_and_test_is_refused(tiny):
    train = short_prompts(36, "train")
    with pytest.raises(ls.PromptError, match="1 texts of overlap stand in the training set"):
        ls.study(tiny, train=train, tests=[PromptSet(train.prompts[:1], "overlap")], progress=False)


def test_a_study_asks_on_its_first_set_what_drives_the_detector_and_pairs_it_with_the_wording(saved):
    made, files, _ = saved
    assert made.audit.source == "held out"
    assert set(made.audit.frame["kind"]) == {"detector", "baseline", "rewording"}
    assert made.audit.frame["auroc"].iloc[0] == made.reports[0].auroc.value
    (row,) = made.wording.frame.to_dict("records")
    assert (row["first"], row["second"]) == ("content, 36 prompts", "TF-IDF, no model")
    own, words = (made.comparison.overall.set_index("detector")["auroc"][row[n]] for n in ("first", "second"))
    assert row["auroc_difference"] == pytest.approx(own - words)
    assert len(pd.read_csv(files["shortcuts.csv"])) == len(made.audit.frame)
    assert "train &lt;b&gt;set&lt;/b&gt;" in files["report.html"].read_text(encoding="utf-8")


def test_an_interrupted_study_leaves_whole_files_and_goes_on_without_a_pass(tiny, tmp_path, monkeypatch):
    from lens_safety import study as door
    from lens_safety.study import Study

    assert callable(door)
    made = small_study(tiny, store=tmp_path / "residuals")
    made.save(tmp_path)
    with shapes_of_passes(tiny) as seen:
        again = small_study(tiny, store=tmp_path / "residuals")
    assert seen == []
    again.save(tmp_path / "again")
    tables = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert len(tables) == 5
    for name in tables:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    before = (tmp_path / "report.html").read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lens_safety.plots.plotly_js", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Study.save(made, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*.partial"))


def test_content_vectors_find_danger_on_held_out_prompts_and_tone_vectors_less(built_in_cache):
    content, validation = built_in_cache("content"), built_in_cache("validation")
    tone = ls.content_vectors(built_in_cache("personas"), method="tone")
    by_content = ls.evaluate(ls.Detector.fit(content), validation)
    by_tone = ls.evaluate(ls.Detector.fit(content, vectors=tone), validation)
    assert by_content.auroc.low > 0.6
    assert by_content.auroc.value > by_tone.auroc.value
