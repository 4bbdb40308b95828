"""The benchmarks run from their commands on tiny models: what they print and keep, never how fast it is."""

import argparse
import importlib
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import D_MODEL, N_LAYERS, write_tiny_model

import lens_safety as ls

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "analyses" / "benchmarks"
COMPARED = {
    "chat_vs_floor",
    "chat_vs_body",
    "chat_last_vs_floor",
    "plain_vs_floor",
    "vs_run_with_cache",
    "vs_run_with_cache_sorted",
    "vs_run_with_cache_names",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_tiny_model(folder / "tiny", "llama", n_ctx=1024)
    write_tiny_model(folder / "wide", "gemma3", chat=False, n_ctx=512)
    return folder


@pytest.fixture
def play(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a script from its command line in this process: the JSON it prints, and its rows by key."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(script: str, *options: str) -> tuple[dict[str, Any], pd.DataFrame]:
        rows = tmp_path / "benchmarks.csv"
        common = ("--model", str(tiny / "tiny"), "--csv", str(rows), "--json")
        monkeypatch.setattr(sys, "argv", [script, *common, *options])
        importlib.import_module(script.removesuffix(".py")).main()
        return json.loads(capsys.readouterr().out), pd.read_csv(rows).set_index("key")

    return run


def test_extraction_prints_and_keeps_its_ratios(play, tiny: Path, engine: str):
    few = ("--engine", engine, "--prompts", "5", "--rounds", "1")
    ratios, rows = play("extraction.py", *few, "--gemma", str(tiny / "wide"))
    compared = COMPARED | ({"vs_bridge_run_with_cache_names"} if engine == "hooked" else set())
    assert set(ratios) == compared | {"vs_fastest_peer", "gemma_vs_full_forward"}
    assert ratios.pop("vs_fastest_peer") is None
    assert all(value > 0 for value in ratios.values())
    assert rows["ratio"].to_dict() == ratios
    assert set(rows["engine"]) == {engine}
    assert rows.loc["chat_vs_floor", "asked"] == 0.62
    assert rows.loc["gemma_vs_full_forward", "model"] == "wide"


def test_shapes_are_compared_with_the_default(play, engine: str):
    ratios, rows = play("shapes.py", "--engine", engine, "--prompts", "3", "--rounds", "1")
    assert set(ratios) == {f"{2**n} tokens a batch" for n in (9, 11, 12, 13, 14)} | {"bfloat16"}
    assert all(value > 0 for value in ratios.values())
    assert set(rows["theirs"]) == {"1024 tokens a batch"}


def test_what_could_not_be_measured_is_kept_with_its_reason(play, tmp_path: Path, monkeypatch, capsys):
    peers = importlib.import_module("peers")

    def refused(folder: Path, requirement: str) -> Path:
        raise peers.PeerError(f"ERROR: no {requirement}")

    monkeypatch.setattr(peers, "environment", refused)
    few = ("--prompts", "2", "--rounds", "1", "--peers", "--envs", str(tmp_path))
    ratios, rows = play("extraction.py", *few, "--gemma", str(tmp_path / "nowhere"))
    assert ratios["gemma_vs_full_forward"] is None
    assert ratios["vs_fastest_peer"] is None
    assert rows.loc["vs_saklas", "note"] == f"none: ERROR: no {peers.PEERS['saklas']}"
    assert rows.loc["vs_saklas", "theirs"] == peers.PEERS["saklas"]
    assert "nowhere" in str(rows.loc["gemma_vs_full_forward", "note"])


def test_a_peer_that_reads_something_else_does_not_count(tiny: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    extraction = importlib.import_module("extraction")
    model = ls.load_model(tiny / "tiny")
    prompts = extraction.benchmark_prompts(5)

    def strangers(stack, script, requirements, job, envs):
        own = ls.residual_streams(model, prompts[job["rows"]], position="last", progress=False)
        read = {
            f"{name} 1.0": [own.layer(layer - off).tolist() for layer in job["layers"]]
            for name, off in (("ours", 0), ("below", 1))
        }
        return dict.fromkeys(read, list), read, {}

    monkeypatch.setattr(extraction, "start_peers", strangers)
    encoded = extraction.encode(model, prompts.texts)
    options = argparse.Namespace(model=str(tiny / "tiny"), envs=None)
    found = extraction.peers_of(ExitStack(), model, prompts, encoded, options)
    assert set(found.runs) == {"ours 1.0"}
    assert "reads something else" in found.absent["below 1.0"]
    both = replace(
        found, runs=dict.fromkeys(["ours 1.0", "slow 2.0"], list), notes=found.notes | {"slow 2.0": ""}
    )
    medians = {"ours 1.0": 4.0, "slow 2.0": 8.0, extraction.LAST: 1.0}
    rows = {row.key: row for row in extraction.peer_rows(medians, both)}
    assert rows["vs_fastest_peer"].ratio == rows["vs_ours"].ratio == 0.25
    assert rows["vs_below"].ratio is None


def test_a_peer_is_asked_in_its_own_process(tmp_path: Path, monkeypatch):
    """A stand-in that serves as the peers do: its answers, its noise, its last words."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    peers = importlib.import_module("peers")
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import json, sys\n"
        "package, job = sys.argv[1], json.load(open(sys.argv[2]))\n"
        "if job.get('broken') == package: sys.exit('it is broken')\n"
        "print(json.dumps(package + ' 1.0'), flush=True)\n"
        "for number, _ in enumerate(sys.stdin): print(json.dumps([number, job['n']]), flush=True)\n"
    )
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    monkeypatch.setattr(peers, "environment", lambda folder, requirement: Path(sys.executable))
    asked = {"good": "good==1", "bad": "bad==2"}
    with ExitStack() as stack:
        job = {"n": 7, "broken": "bad"}
        ready, first, absent = peers.start_peers(stack, script.name, asked, job, tmp_path)
        assert first == {"good 1.0": [0, 7]}
        assert ready["good 1.0"]() == [1, 7]
        assert absent == {"bad==2": "it is broken"}


def test_detection_runs_no_block_above_its_layer(play, engine: str):
    found, rows = play("detection.py", "--engine", engine, "--prompts", "2", "--rounds", "1")
    assert found["detect_third_vs_full_forward"] > 0
    assert found["blocks_run"] == found["blocks_needed"] == N_LAYERS // 3 + 1
    assert rows.loc["detect_third_vs_full_forward", "note"].endswith("2 blocks run, 2 needed")


def test_scaling_compares_the_most_prompts_with_fewer(play, tiny: Path, monkeypatch):
    """Each number in this process; from the command line they have one each."""
    monkeypatch.delenv("LENS_SAFETY_DATA", raising=False)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    scaling = importlib.import_module("scaling")
    given = argparse.Namespace(model=str(tiny / "tiny"), engine="auto", one=9)
    one = scaling.measured(given)
    n_bytes = (N_LAYERS + 1) * 9 * D_MODEL * 4
    assert one.result == n_bytes / 2**20
    assert one.peak >= one.before > 10
    few, some, most = (
        replace(one, n=n, seconds=s, peak=peak, result=result)
        for n, s, peak, result in ((100, 0.2, 90.0, 10.0), (500, 0.1, 150.0, 50.0), (9000, 0.1, 300.0, 190.0))
    )
    rows = {row.key: row for row in scaling.growth([few, some, most])}
    assert (rows["memory_growth"].mib_ours, rows["memory_growth"].mib_theirs) == (110, 100)
    assert rows["memory_growth"].ratio == 1.1
    assert rows["time_growth"].ratio == 0.5


def test_short_prompts_differ_and_fewer_are_the_beginning_of_more(monkeypatch):
    monkeypatch.delenv("LENS_SAFETY_DATA", raising=False)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    scaling = importlib.import_module("scaling")
    many = scaling.short_prompts(9000)
    assert len(set(many)) == 9000
    assert many[:40] == scaling.short_prompts(40)
    assert max(map(len, many[:40])) <= scaling.LONGEST


def test_steering_says_what_a_token_costs(play, engine: str, monkeypatch):
    # Eight prompts of one length are more than the tiny tokenizer makes.
    monkeypatch.setattr(importlib.import_module("steering"), "MULTIPLIERS", [-1.0, 0.0, 1.0])
    found, rows = play("steering.py", "--engine", engine, "--tokens", "3", "--layer", "1", "--rounds", "1")
    assert found["tokens_identical"]
    for what in ("first_token_s", "per_token_s"):
        assert {f"{what}_steered", f"{what}_unsteered"} <= set(found)
        assert rows.loc[what, "seconds_ours"] == found[f"{what}_steered"]
    # Kept as ours over theirs, printed as how many times faster.
    assert rows.loc["batched_short", "ratio"] == pytest.approx(1 / found["batched_short"], rel=0.02)


def test_rows_take_the_place_of_those_of_the_same_comparison(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    measuring = importlib.import_module("measuring")
    on = measuring.Conditions("hooked", "tiny", 5, 3, 2, "float32", "cpu", "torch 2")
    path = tmp_path / "benchmarks.csv"
    first, second = (
        measuring.timed("extraction", "a", {"x": x, "y": 2.0}, "x", "y", asked=0.5) for x in (1.0, 3.0)
    )
    measuring.keep(path, [first, measuring.Row("extraction", "b", "x", "z", note="none: why")], on)
    measuring.keep(path, [second], replace(on, engine="bridge"))
    measuring.keep(path, [second], on)
    kept = pd.read_csv(path)
    assert list(kept.columns) == measuring.COLUMNS
    assert sorted(kept[["key", "engine", "ratio"]].fillna("none").itertuples(index=False, name=None)) == [
        ("a", "bridge", 1.5),
        ("a", "hooked", 1.5),
        ("b", "hooked", "none"),
    ]


def test_the_table_of_the_readme_holds_every_row(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    measuring, tables = (importlib.import_module(name) for name in ("measuring", "results_table"))
    on = measuring.Conditions("hooked", "tiny", 5, 3, 2, "float32", "cpu", "torch 2")
    faster = measuring.timed("extraction", "a", {"x": 1.0, "y": 2.0}, "x", "y", asked=0.62)
    alone = measuring.Row("scaling", "at_9", "a prompt of 9", seconds_ours=0.25, mib_ours=12.0)
    absent = measuring.Row("extraction", "vs_z", "x", "z==1", note="none: no | z")
    path = tmp_path / "benchmarks.csv"
    measuring.keep(path, [faster, alone, absent], on)
    measuring.keep(path, [faster], replace(on, device="a GPU"))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    on_cpu, on_gpu = tables.benchmarks()
    assert "| extraction: `a` | x / y | tiny | **0.50** (1 / 2 s) | — | ≤ 0.62 | 5 x 3 |  |" in on_cpu
    assert "| scaling: `at_9` | a prompt of 9 | tiny | 0.25 s, 12 MiB | — |  | 5 x 3 |  |" in on_cpu
    assert "| extraction: `vs_z` | x / z==1 | tiny | none | — |  | 5 x 3 | none: no \\| z |" in on_cpu
    assert "a GPU, 2 threads, float32" in on_gpu
    readme = f"before {tables.BENCHMARKS[0]}old{tables.BENCHMARKS[1]} after"
    assert on_gpu in tables.filled(readme, tables.BENCHMARKS, [on_gpu])
