"""Planted results for the pages: fast, with markup in every text that a page shows."""

from dataclasses import replace
from typing import Any

from conftest import planted_cache
from sweeps import made, row

import lens_safety as ls
from lens_safety.audit import shortcut_audit
from lens_safety.evaluate import compare, paired_tests
from lens_safety.prompts import PromptSet
from lens_safety.responses import CONTENT, NOWHERE, UNSTEERED

MARKUP = "<b>bold</b> & <script>alert(1)</script>"


def study_parts(*, tests: int = 2) -> dict[str, Any]:
    """What `ls.report` takes, from planted caches and a sweep that is known by hand."""
    train, _ = planted_cache(60, name=f"train {MARKUP}")
    tone, _ = planted_cache(20, seed=9, layer=2, name="personas")
    held_out = [_typed(planted_cache(40, seed=1 + i)[0], f"held out {i}") for i in range(tests)]
    train = replace(train, prompts=PromptSet(train.prompts.prompts, f"train {MARKUP}"))
    detector = ls.Detector.fit(train)
    reports = [ls.evaluate(detector, cache, n_resamples=50) for cache in held_out]
    words = ls.TextBaseline.fit(train.prompts)
    rows = [("tone, 10 pairs", one) for one in reports] + [("content, 60 prompts", one) for one in reports]
    rows += [("TF-IDF, no model", words.report(one.prompts, n_resamples=50)) for one in held_out]
    return {
        "table": ls.layer_table(train, n_resamples=50, n_shuffles=5),
        "content": ls.content_vectors(train),
        "tone": ls.content_vectors(tone, method="tone"),
        "detector": detector,
        "reports": reports,
        "comparison": compare(rows),
        "audit": shortcut_audit(detector, held_out[0], train=train, n_resamples=50),
        "wording": paired_tests(rows[tests:]),
        "steering": swept((1,)),
        "settings": {"train": {"name": MARKUP, "n": 60}, "multipliers": [-4.0, 4.0], "tests": [{"n": 40}]},
    }


def swept(layers: tuple[int, ...] = (1, 2), prompts: int = 8) -> ls.SteeringSweep:
    """score = i + layer * m / 2, random directions near 0, damage m ** 2 / 10; markup in the texts."""
    names = [f"prompt {i} {MARKUP}" for i in range(prompts)]
    rows = [_row(UNSTEERED, NOWHERE, 0.0, i, name, 0.0) for i, name in enumerate(names)]
    for layer in layers:
        for m in (-4.0, -2.0, 2.0, 4.0):
            for i, name in enumerate(names):
                rows.append(_row(CONTENT, layer, m, i, name, layer / 2))
                rows += [_row(f"random {j}", layer, m, i, name, slope) for j, slope in ((1, -0.1), (2, 0.1))]
    return replace(made(rows, layers), detector="d" * 16)


def _row(direction: str, layer: int, m: float, number: int, name: str, slope: float) -> dict[str, Any]:
    values = {"score": number + slope * m, "nll": 1 + m * m / 10, "kl": m * m / 20}
    plain = row(direction, layer, m, "prompt 0", **values)
    return plain | {"prompt": name, "group": number, "text": f"{direction} {m:g} {MARKUP}"}


def _typed(cache: ls.ResidualCache, name: str) -> ls.ResidualCache:
    kinds = ("standard", "hostile_tone")
    prompts = [replace(prompt, kind=kinds[i // 2 % 2]) for i, prompt in enumerate(cache.prompts)]
    return replace(cache, prompts=PromptSet(tuple(prompts), name))
