"""Every result shows itself: what it is, a small table, a next call that works as written."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from dataclasses import replace
from functools import cache as once
from html import unescape
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FINGERPRINT, N_LAYERS, labelled, planted_cache
from sweeps import linear
from test_token_views import PLAIN, attention_of, scores_of

import lens_safety as ls
from lens_safety.files import Result
from lens_safety.operators import named_operator
from lens_safety.plans import Write
from lens_safety.show import ROWS, card, pick

VALUES = {"Dose", "ExponentialDecay", "LinearDecay", "ModelFingerprint", "Prompt", "TargetKL"}
"""Small values, which Python shows well."""

REPORTS = ("one", "two")


def result_classes() -> set[type]:
    """Dataclasses that the package shows at its door, and every `Result` of its rooms."""
    for found in pkgutil.iter_modules(ls.__path__):
        importlib.import_module(f"lens_safety.{found.name}")
    shown = (getattr(ls, name) for name in ls.__all__ if name not in VALUES)
    return {one for one in shown if dataclasses.is_dataclass(one) and isinstance(one, type)} | {
        one for one in Result.__subclasses__() if one.__module__.startswith("lens_safety.")
    }


@once
def results() -> dict[str, Any]:
    """One of each class, by the name that it has in the calls of its card."""
    cache, _ = planted_cache(24)
    prompts = labelled([f"<b>text</b> {i}" for i in range(24)])
    vectors = ls.content_vectors(cache)
    detector = ls.Detector.fit(cache, layers=[1])
    test = planted_cache(20, seed=1, name="other")[0]
    report = ls.evaluate(detector, test, n_resamples=20)
    named = [(name, report) for name in REPORTS]
    sweep, table = linear(), ls.layer_table(cache, n_resamples=20, n_shuffles=4)
    comparison = ls.compare(named)
    rate = {"tpr": 0.5, "tpr_low": 0.4, "tpr_high": 0.6, "fpr": 0.1, "fpr_low": 0.0, "fpr_high": 0.2}
    rate |= {"auroc": 0.83, "auroc_low": 0.811, "auroc_high": 0.84, "accuracy": 0.7}
    rate |= {"accuracy_low": 0.6, "accuracy_high": 0.8}
    style = {"kind": "detector", "name": "as it is", "gap": 0.0, "rank_correlation": 1.0} | rate
    sets = {"train": "a", "test": "b", "inside": False, "n_train": 24, "n_test": 20, "overlap": 0} | rate
    cells = {"tone": "rude", "label": True, "n": 9, "score": 0.1, "flagged": 0.5}
    cells |= {"flagged_low": 0.2, "flagged_high": 0.8, "score_without_tone": 0.1}
    cells |= {"flagged_without_tone": 0.5, "flagged_without_tone_low": 0.2, "flagged_without_tone_high": 0.8}
    seen = {"layer": 1, "multiplier": 2.0, "read_layer": 2, "projection_change": 1.0, "left": 0.5}
    seen |= {"projection_change_low": 0.9, "projection_change_high": 1.1, "washed_out": "nowhere"}
    seen |= {"silent": 0.1, "silent_low": 0.0, "silent_high": 0.2}
    check = {"check": "one pass", "measured": 0.0, "limit": 0.0, "passed": True, "what": "passes"}
    one = torch.ones(1)
    write = Write(*(vectors.vectors[:1],) * 3, multiplier=2 * one, dose=one)
    audit = ls.ShortcutAudit(pd.DataFrame([style]), "d", "set", "m", 20, 0)
    return {
        "audit": audit,
        "matrix": ls.TransferMatrix(pd.DataFrame([sets]), "logistic", "m", 0),
        "curve": ls.LabelCurve(
            pd.DataFrame([{"labels": 10, "seed": s, "auroc": 0.8 + s, "accuracy": 0.7} for s in (0, 0.1)]),
            *("two-vector", "a", "b", "m", 20),
        ),
        "tone": ls.ToneContent(pd.DataFrame(), pd.DataFrame([cells]), 1, "set", "m", 0),
        "baseline": ls.TextBaseline("length", None, 0.5, 0.6, "set"),
        "cache": cache,
        "moments": ls.Moments.of(cache),
        "prompts": prompts,
        "vectors": vectors,
        "detector": detector,
        "report": report,
        "comparison": comparison,
        "tests": ls.paired_tests(named),
        "table": table,
        "sweep": sweep,
        "consistency": ls.Consistency(pd.DataFrame([seen]), "behaviour", "d", "m"),
        "plan": ls.SteeringPlan(
            *({1: write}, named_operator("add"), "all", ("resid_post",)), *(None, None, "prompt", FINGERPRINT)
        ),
        "checkup": ls.Checkup(pd.DataFrame([check]), "m", "hooked", "3.9.0", "float32"),
        "study": ls.Study(
            *(table, vectors, vectors, detector, (report,), comparison),
            **{"audit": audit, "wording": ls.paired_tests(named), "steering": sweep},
            settings={},
        ),
        "scores": scores_of(PLAIN),
        "patterns": attention_of(PLAIN),
    }


def next_of(html: str) -> str:
    found = re.search(r"<p>Next: <code>(.*?)</code></p>$", html)
    assert found is not None, html
    return unescape(found.group(1))


def calls_of(step: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(step)) if isinstance(node, ast.Call)]


def fits(call: ast.Call, known: dict[str, Any]) -> bool:
    """Whether what is called exists and takes these arguments."""
    function = eval(ast.unparse(call.func), dict(known))
    plain = [object() for _ in call.args]
    inspect.signature(function).bind(*plain, **{str(k.arg): object() for k in call.keywords})
    return True


def test_every_result_class_has_a_card():
    classes = result_classes()
    assert {ls.Detector, ls.PromptSet, ls.Study, ls.TokenScores, ls.Checkup, ls.LabelCurve} <= classes
    for one in classes:
        own = vars(one).get("_repr_html_")
        assert own is not None, f"{one.__name__} does not show itself: give it a card"
        assert "card(" in inspect.getsource(own), f"{one.__name__} shows itself without a card"


def test_each_card_says_what_it_is_shows_a_small_table_and_a_next_call_that_exists():
    known = results() | {"ls": ls, "model": None, "test": None}
    assert {type(one) for one in results().values()} <= result_classes()
    for name, one in results().items():
        html = one._repr_html_()
        assert html.startswith("<p>"), name
        assert len(re.findall(r"</p>", html.split("<table")[0])) == 1, name
        rows = html.count("<tr")
        assert 2 <= rows <= ROWS + 1, name
        assert "<b>text" not in html, name
        assert not re.search(r"<th>\w+_low</th>", html.replace("<th>band_low</th>", "")), name
        step = next_of(html)
        used = name == "checkup" or re.search(rf"\b{name}\b", step)
        assert used, f"the next call of {name} does not use it: {step}"
        calls = calls_of(step)
        assert calls, name
        assert all(fits(call, known) for call in calls), step


@pytest.mark.parametrize("name", ["vectors", "report", "comparison", "table", "sweep", "scores", "patterns"])
def test_a_next_call_that_plots_gives_a_figure(name: str):
    step = next_of(results()[name]._repr_html_())
    assert step.startswith("ls.plots.")
    made = eval(step, {"ls": ls, name: results()[name]})
    assert type(made).__name__ in ("Figure", "View")


def test_a_next_call_that_does_not_exist_is_seen():
    for step in ("ls.plots.no_such_plot(table)", "ls.plots.layer_curve(table, colour=1)", "table.nothing()"):
        with pytest.raises((AttributeError, TypeError)):
            fits(calls_of(step)[0], results() | {"ls": ls})


def test_intervals_stand_in_the_cell_of_their_estimate():
    frame = pd.DataFrame(
        {"a": [0.83, np.nan], "a_low": [0.811, np.nan], "a_high": [0.84, np.nan], "n": [20, 0], "x": [1, 2]}
    )
    assert pick(frame, "n", "a").to_dict("list") == {
        "n": [20, 0],
        "a": ["0.83 [0.81, 0.84]", "—"],
    }
    small = pd.DataFrame({"a": [0.0004, -0.02], "a_low": [0.0001, -0.03], "a_high": [0.0007, 0.0]})
    assert pick(small, "a")["a"].tolist() == ["0.0004 [0.0001, 0.0007]", "-0.02 [-0.03, 0]"]
    assert "0.83 [0.81, 0.84]" in results()["audit"]._repr_html_()


def test_a_card_escapes_and_shortens():
    frame = pd.DataFrame({"<i>": ["<script>x</script>" + "y" * 200] * 30, "z": [1e-7] * 30})
    html = card("<b>bold</b>", frame, 'f("<u>")', note="a & b")
    for raw in ("<b>", "<i>", "<script>", "<u>", "y" * 100):
        assert raw not in html
    assert "a &amp; b; 12 of 30 rows" in html
    assert html.count("<tr") == ROWS + 1
    assert "1.0e-07" in html
    assert "rows" not in card("short", frame.head(3), "f()")


def test_a_cache_without_labels_is_to_be_scored():
    cache = replace(results()["cache"], prompts=ls.PromptSet(tuple(ls.Prompt(f"t {i}") for i in range(24))))
    assert next_of(cache._repr_html_()) == "detector.score(cache)"
    assert "no label" in cache.prompts._repr_html_()
    norms = cache.resid[2].norm(dim=1).median()
    assert len(cache.layers) == N_LAYERS
    assert f"{float(norms):.2f}"[:3] in cache._repr_html_()
