"""Each analysis runs from its command, on a tiny model and a draw of its prompts, and explains itself."""

import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import require_data, write_tiny_model

import lens_safety as ls
from lens_safety import detect, plots, steer
from lens_safety.types import OptionError

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "analyses").glob("[01]*.py"))}
ROWS = 60
"""Prompts a set: three pairs of each of ten categories, one for each fold."""
FEWER = {
    "07_shortcuts_and_transfer": 36,
    "09_steering_strength": 30,
    "10_persona_steerability": 12,
    "11_operators": 8,
    "12_sentiment": 8,
}
"""Of scripts that read each prompt several times."""

INTERVAL = {"accuracy", "accuracy_low", "accuracy_high", "auroc", "auroc_low", "auroc_high"}
CELLS = {"tone", "label", "n", "flagged", "flagged_low", "flagged_without_tone"}
LAYERS = {"layer", "cosine", "null_low", "null_high", "auroc", "auroc_without_tone"}
PAIRED = {"first", "second", "accuracy_difference", "mcnemar_holm", "auroc_difference_low", "delong_holm"}
EFFECTS = {"multiplier", "dose", "change", "band_low", "band_high", "p_value", "nll_change", "kl"}
TABLES = {
    "00_shipped_detector": {
        "": {"detector", "set", "n_safe", "n_dangerous", "fpr", "tpr", "decided", "ece"} | INTERVAL,
        "parts": {"by", "type"} | INTERVAL,
        "paired": PAIRED,
    },
    "01_tone_vectors": {
        "": {"detector", "set", "majority", "tpr", "fpr"} | INTERVAL,
        "tone_by_label": {"detector", "tone", "safe_flagged", "dangerous_flagged"},
    },
    "02_self_monitoring": {
        f"{train}{part}": columns
        for train in ("content", "instructions")
        for part, columns in (("", LAYERS), ("_cells", CELLS))
    },
    "03_extended_evaluation": {
        "": {"detector", "chosen", "auroc_cv", "oracle_accuracy"} | INTERVAL,
        "controls": {"control"} | INTERVAL,
        "paired": PAIRED,
        "protocol": {
            "method",
            "study_layer",
            "study_accuracy",
            "honest_accuracy",
            "cost_of_choosing_on_test",
        },
    },
    "04_training_size": {"": {"method", "labels", "seeds"} | INTERVAL},
    "05_layers_weighting_ensembles_categories": {
        "": {"detector", "tpr", "fpr"} | INTERVAL,
        "paired": PAIRED,
        "layers": {"layer", "auroc", "auroc_low", "auroc_high"},
        "category_matrix": {"train", "test", "inside", "auroc", "auroc_low"},
        "experts": {"detector"} | INTERVAL,
    },
    "06_across_models": {
        "": {"model", "train", "test", "method", "relative_depth", "tfidf_auroc"} | INTERVAL
    },
    "07_shortcuts_and_transfer": {
        "transfer": {"train", "test", "inside", "auroc"},
        "audit": {"train", "test", "kind", "name", "auroc_low", "gap", "rank_correlation"},
    },
    "08_languages": {"": {"set", "language", "n", "tpr", "fpr", "tfidf_auroc"} | INTERVAL},
    "09_steering_strength": {"": {"vectors", "asked"} | EFFECTS, "layers": EFFECTS}
    | {f"{name}_cliff": {"layer", "side", "multiplier", "dose"} for name in ("content", "tone")}
    | {f"{name}_consistency": {"read_layer", "washed_out", "silent"} for name in ("content", "tone")},
    "10_persona_steerability": {
        "": {"trait", "layer", "n", "slope", "anti_steerable", "random_low", "outside_band", "told_the_trait"}
    },
    "11_operators": {"": {"operator", "kl_asked", "repeated"} | EFFECTS},
    "12_sentiment": {"": {"side", "chosen", "unsteered", "asked"} | EFFECTS, "chosen_on": EFFECTS},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the results and residual streams of all scripts, which share them."""
    folder = tmp_path_factory.mktemp("analyses")
    write_tiny_model(folder / "tiny", "llama", chat=True, n_ctx=512)
    return folder


@pytest.fixture
def play(room: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a script from its command line in this process; its tables by name."""
    require_data()

    def undrawn(figure, path, **options):
        raise OptionError("no time for pictures")

    monkeypatch.setattr(plots, "save_image", undrawn)
    # Thousands of small fits: three folds and one strength tell as well whether a script runs.
    fit = ls.Detector.fit
    monkeypatch.setattr(ls.Detector, "fit", lambda *given, **o: fit(*given, **({"folds": 3} | o)))
    monkeypatch.setattr(detect, "STRENGTHS", (0.003,))
    # And two neutral prompts, where the KL of hundreds of plans is measured.
    monkeypatch.setattr(steer, "load_prompts", lambda name: ls.load_prompts(name)[:2])

    def call(name: str, *arguments: str) -> dict[str, pd.DataFrame]:
        rows = str(FEWER.get(name, ROWS))
        own = ["--model", str(room / "tiny"), "--results", str(room / "results"), "--rows", rows]
        own += ["--store", str(room / "store"), *arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), *own])
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        written = (room / "results").glob(f"{name}*.tiny.csv")
        return {
            path.name.removesuffix(".tiny.csv").removeprefix(name).strip("_"): pd.read_csv(path)
            for path in written
        }

    return call


def test_each_script_is_run():
    assert set(TABLES) == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_docstring_asks_says_how_holds_against_and_reads(name: str):
    source = SCRIPTS[name].read_text(encoding="utf-8")
    explained = source.split('"""')[1]
    parts = ["Question: ", "Method: ", "Control: ", "Reading: ", f"python analyses/{name}.py"]
    places = [explained.find(part) for part in parts]
    assert min(places) == 0
    assert places == sorted(places)
    asked = explained.splitlines()[0]
    assert asked.endswith("?")
    for part in parts[:-1]:
        assert len(re.findall(rf"^{part}", explained, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_writes_its_tables(name: str, play, room: Path, capsys):
    tables = play(name)
    assert set(tables) == set(TABLES[name])
    for part, columns in TABLES[name].items():
        assert len(tables[part]), part
        assert columns <= set(tables[part].columns), part
        check(tables[part])
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "error" not in shown.err
    for path in (room / "results").glob(f"{name}*.html"):
        assert "Plotly.newPlot" in path.read_text(encoding="utf-8")


def test_the_shipped_detector_is_written_with_its_card(play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ls, "__file__", str(tmp_path / "__init__.py"))
    tables = play("00_shipped_detector", "--ship")
    detector = ls.Detector.load(tmp_path / "detectors" / "built_in.safetensors")
    assert detector.model.name == "tiny"
    assert detector.band > 0
    card = (tmp_path / "detectors" / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].strip("| ") for line in card.splitlines() if line.startswith("| ")]
    assert rows == ["set", *dict.fromkeys(tables[""]["set"])]
    assert f"({detector.n_safe} safe, {detector.n_dangerous} dangerous)" in card
    assert f"layers {', '.join(map(str, detector.layers))} at" in " ".join(card.split())


def check(frame: pd.DataFrame) -> None:
    """Intervals are intervals; shares, accuracies and AUROCs lie between 0 and 1."""
    for column in [c for c in frame.columns if f"{c}_low" in frame]:
        known = frame.dropna(subset=[f"{column}_low", f"{column}_high"])
        value, low, high = (known[f"{column}{end}"].to_numpy() for end in ("", "_low", "_high"))
        assert (low <= high).all(), column
        if not any(word in column for word in ("difference", "change", "control", "slope")):
            assert ((value >= 0) & (value <= 1)).all(), column
