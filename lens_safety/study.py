"""The main job: from a model and prompts to where danger is, how well it is detected, what steering does."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import tokens as tok
from .audit import ShortcutAudit, shortcut_audit
from .baselines import TextBaseline
from .detect import Detector
from .directions import ContentVectors, content_vectors
from .evaluate import DetectionReport, DetectorComparison, PairedTests, compare, evaluate, paired_tests
from .files import write_csv, write_json
from .prompts import PromptSet, load_prompts
from .report import report
from .residuals import ResidualCache, residual_streams
from .responses import SteeringSweep
from .scorers import Method
from .separation import LayerTable, layer_table
from .show import card, pick
from .sweep import sweep
from .types import PromptError, ResidualModel

TESTS = ("validation", "adversarial")
MULTIPLIERS = (-4.0, -2.0, 0.0, 2.0, 4.0)

_WORDING = "TF-IDF, no model"


@dataclass(frozen=True)
class Study:
    """All results of `study`.

    `reports` holds the chosen detector on each held-out set; `audit` asks on the first of them how much of
    its score is style; `wording` pairs it with TF-IDF on each.
    """

    table: LayerTable
    content: ContentVectors
    tone: ContentVectors
    detector: Detector
    reports: tuple[DetectionReport, ...]
    comparison: DetectorComparison
    audit: ShortcutAudit
    wording: PairedTests
    steering: SteeringSweep
    settings: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Every detector on every held-out set, by prompt type."""
        return self.comparison.to_frame()

    def _repr_html_(self) -> str:
        return card(
            f"Study of {self.detector.model.name}: {self.detector.name}, fitted on {self.detector.source}; "
            f"best layer {self.table.best_layer}",
            pick(self.comparison.overall, "set", "detector", "accuracy", "auroc", "tpr", "fpr"),
            'study.save("study")',
            note="also in it: " + ", ".join(f.name for f in fields(self) if f.name != "comparison"),
        )

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write everything into a folder, each file whole or not at all; the paths by file name."""
        folder = Path(folder)
        written = [
            write_csv(folder / "layers.csv", self.table.frame),
            write_csv(folder / "detection.csv", self.comparison.frame),
            write_csv(folder / "shortcuts.csv", self.audit.frame),
            write_csv(folder / "wording.csv", self.wording.frame),
            write_csv(folder / "steering.csv", self.steering.frame),
            self.content.save(folder / "vectors.safetensors"),
            self.tone.save(folder / "tone_vectors.safetensors"),
            self.detector.save(folder / "detector.safetensors"),
            write_json(folder / "study.json", self.settings),
            report(
                folder / "report.html",
                table=self.table,
                content=self.content,
                tone=self.tone,
                detector=self.detector,
                reports=self.reports,
                comparison=self.comparison,
                audit=self.audit,
                wording=self.wording,
                steering=self.steering,
                settings=self.settings,
            ),
        ]
        return {path.name: path for path in written}


def study(
    model: ResidualModel,
    *,
    train: PromptSet | None = None,
    tests: Sequence[PromptSet] | None = None,
    personas: PromptSet | None = None,
    neutral: PromptSet | None = None,
    method: Method = "two-vector",
    position: tok.Position = "content_mean",
    template: tok.Template = "auto",
    multipliers: Sequence[float] = MULTIPLIERS,
    max_new_tokens: int = 40,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Where, how well, and what happens, with every choice made on `train` alone.

    One pass a prompt set; the layer table, content and tone vectors; a detector whose layer and
    threshold cross-validation inside `train` chooses, evaluated on each of `tests` beside tone
    vectors, fewer examples, logistic regression and TF-IDF; a shortcut audit on the first of `tests`;
    and `neutral` prompts steered at the detector's layer along the content vector and, where it is
    pushed hardest, random directions of that norm.

    Args:
        store: a folder for finished batches, so that an interrupted study goes on where it was.

    Raises:
        PromptError: a test set that shares a text with `train`, or what the parts refuse.
    """
    started = time.monotonic()
    train = load_prompts("content") if train is None else train
    tests = [load_prompts(name) for name in TESTS] if tests is None else list(tests)
    personas = load_prompts("personas") if personas is None else personas
    neutral = load_prompts("neutral") if neutral is None else neutral
    for test in tests:
        _require_held_out(train, test)

    def extract(prompts: PromptSet) -> ResidualCache:
        return residual_streams(
            model, prompts, position=position, template=template, store=store, progress=progress
        )

    fitted_on, personas_read = extract(train), extract(personas)
    held_out = [extract(test) for test in tests]
    table = layer_table(fitted_on, seed=seed)
    content = content_vectors(fitted_on)
    tone = content_vectors(personas_read, method="tone")
    detector = Detector.fit(fitted_on, method=method, seed=seed)
    reports = tuple(evaluate(detector, cache, seed=seed) for cache in held_out)
    compared = _compared(detector, tone, fitted_on, personas_read, held_out, reports, seed)
    audit = shortcut_audit(
        detector, held_out[0], train=fitted_on, model=model, store=store, seed=seed, progress=progress
    )
    steered = sweep(
        model,
        content,
        neutral,
        layers=[detector.layer],
        multipliers=multipliers,
        control_multipliers=[min(multipliers), max(multipliers)],
        controls=("random",),
        detector=detector,
        max_new_tokens=max_new_tokens,
        template=template,
        store=store,
        seed=seed,
        progress=progress,
    )
    settings = _settings(table, detector, tests, steered) | {
        "train": _named(train),
        "multipliers": [float(m) for m in multipliers],
        "seconds": round(time.monotonic() - started, 1),
    }
    return Study(
        table=table,
        content=content,
        tone=tone,
        detector=detector,
        reports=reports,
        comparison=compare(compared),
        audit=audit,
        wording=paired_tests([(n, r) for n, r in compared if n in (_content_name(train), _WORDING)]),
        steering=steered,
        settings=settings,
    )


_VERSIONS = ("lens-safety", "transformer-lens", "torch", "transformers", "scikit-learn", "numpy")


def _settings(
    table: LayerTable, detector: Detector, tests: list[PromptSet], steered: SteeringSweep
) -> dict[str, Any]:
    """What was chosen and on what, for `study.json` and the page's record."""
    return {
        "model": detector.model.to_dict(),
        "tests": [_named(test) for test in tests],
        "position": detector.position,
        "template": detector.template,
        "method": detector.method,
        "layer": detector.layer,
        "threshold": detector.threshold,
        "best_layer_of_table": table.best_layer,
        "max_new_tokens": steered.max_new_tokens,
        "seed": detector.seed,
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _named(prompts: PromptSet) -> dict[str, Any]:
    return {"name": prompts.name, "n": len(prompts), "digest": prompts.digest}


def _content_name(train: PromptSet) -> str:
    return f"content, {len(train)} prompts"


def _require_held_out(train: PromptSet, test: PromptSet) -> None:
    shared = set(train.texts) & set(test.texts)
    if shared:
        raise PromptError(
            f"{len(shared)} texts of {test.name} stand in the training set {train.name} too (first: "
            f"{min(shared)[:60]!r}): expected held-out prompts; take them out of one of the two"
        )


def _compared(
    detector: Detector,
    tone: ContentVectors,
    train: ResidualCache,
    personas: ResidualCache,
    held_out: list[ResidualCache],
    reports: tuple[DetectionReport, ...],
    seed: int,
) -> list[tuple[str, DetectionReport]]:
    """Tone vectors (the study's way, then given every chance), content vectors, and text alone."""
    first = [p.group == personas.prompts.prompts[0].group for p in personas.prompts]
    one_pair = content_vectors(personas[np.array(first, dtype=bool)], method="tone, one pair")
    n_pairs = len(personas) // 2
    small = np.array([p.small for p in train.prompts], dtype=bool)
    detectors = {
        "tone, 1 pair, threshold 0": Detector.fit(train, vectors=one_pair, threshold=0.0, seed=seed),
        f"tone, {n_pairs} pairs": Detector.fit(train, vectors=tone, seed=seed),
    }
    if small.any():
        detectors[f"content, {int(small.sum())} prompts"] = Detector.fit(train[small], seed=seed)
    rows = [(name, evaluate(d, cache, seed=seed)) for name, d in detectors.items() for cache in held_out]
    rows += [(_content_name(train.prompts), report) for report in reports]
    if detector.method != "logistic":
        logistic = Detector.fit(train, method="logistic", seed=seed)
        name = f"logistic, {len(train)} prompts"
        rows += [(name, evaluate(logistic, cache, seed=seed)) for cache in held_out]
    words = TextBaseline.fit(train.prompts, seed=seed)
    return rows + [(_WORDING, words.report(cache.prompts, seed=seed)) for cache in held_out]
