"""What the README and the examples show is run."""

import os
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import require_data, short_audit, short_sweep, write_tiny_model

import lens_safety as ls
from lens_safety import cli
from lens_safety.models import load_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("lens-safety ")
]


def test_the_python_of_the_readme_runs(loaded, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # KL on eight prompts takes half a minute; `make study` and the sweep's own tests measure it whole.
    monkeypatch.setattr(ls, "shortcut_audit", short_audit(ls.shortcut_audit))
    monkeypatch.setattr(ls, "sweep", short_sweep(ls.sweep, n=4, max_new_tokens=12, neutral=["Hi"]))
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 11
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    best, accuracy, score, verdicts, text, *matrix = capsys.readouterr().out.strip().splitlines()
    assert 0 <= int(best) < 30
    assert float(accuracy.split()[0]) > 0.3
    assert score.startswith("[")
    assert verdicts.endswith("['safe', 'dangerous']")
    assert len(text) > 20
    assert "adversarial" in matrix[0]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "persona_vector_study" not in c])
def test_each_command_of_the_readme_runs(loaded, command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(tmp_path))
    arguments = shlex.split(command)
    if arguments[1] == "sweep":
        # The texts take a minute.
        monkeypatch.setattr(import_module("lens_safety.sweep"), "sweep", short_sweep(ls.sweep))
    if arguments[1] == "study":
        # Minutes; `make study` runs it whole. What it finds in the built-in model other tests say.
        tiny = load_model(write_tiny_model(tmp_path / "tiny", "llama", n_ctx=512))
        monkeypatch.setattr(cli, "_load", lambda *model: tiny)
    started: list[list[str]] = []
    # The dashboard's server would take this process's place; its own tests start it.
    monkeypatch.setattr(os, "execv", lambda program, given: started.append(given))
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0, capsys.readouterr().err
    assert bool(started) == (arguments[1] == "dashboard")
    if "--out" in arguments:
        assert (tmp_path / arguments[arguments.index("--out") + 1]).exists()


def test_the_commands_of_the_readme_are_all_of_them():
    shown = {shlex.split(command)[1] for command in COMMANDS}
    assert shown == {
        "study",
        "layers",
        "fit",
        "detect",
        "steer",
        "sweep",
        "models",
        "prompts",
        "cache",
        "doctor",
        "dashboard",
    }


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_each_example_runs(loaded, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_studys_own_rows_are_detected_as_well_as_the_readme_says(built_in):
    """200 training rows and, for time's sake, every eighteenth of the 1,800 test rows."""
    require_data()
    train = ls.residual_streams(built_in, ls.load_prompts("persona_vector_study_train"), progress=False)
    test = ls.residual_streams(built_in, ls.load_prompts("persona_vector_study_test")[::18], progress=False)
    report = ls.evaluate(ls.Detector.fit(train), test)
    assert report.n == 100
    # Three and a half standard errors of 100 rows below the 0.77 and 0.84 of all 1,800.
    assert report.accuracy.value > 0.62
    assert report.auroc.value > 0.7


def test_the_results_tables_are_what_the_result_files_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results_table.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "analyses" / "results_table.py"), run_name="__main__")
    assert stopped.value.code == 0


def test_the_figures_of_the_readme_are_there():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(figures) == 6
    assert all((ROOT / figure).is_file() for figure in figures)
