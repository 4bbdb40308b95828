"""What a page says of a result: its numbers with their intervals, its line in the summary, its caveat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .detect import Detector
from .directions import ContentVectors
from .evaluate import DetectionReport, DetectorComparison, PairedTests
from .intervals import Estimate
from .responses import SteeringSweep
from .separation import LayerTable, top_dimensions


class Number(NamedTuple):
    """A number as a page shows it: never without its interval, and saying what it is of."""

    value: str
    interval: str
    label: str


@dataclass(frozen=True)
class Finding:
    """A section of a page: its numbers, its line in the summary, and the sentence that bounds it."""

    id: str
    title: str
    line: str
    numbers: tuple[Number, ...]
    caveat: str


_TEXTS = Finding(
    "texts",
    "Texts",
    "",
    (),
    "Greedy texts: a word that changes early on changes all that follows.",
)


def study_findings(
    *,
    table: LayerTable,
    content: ContentVectors,
    tone: ContentVectors,
    detector: Detector,
    reports: Sequence[DetectionReport],
    comparison: DetectorComparison,
    wording: PairedTests,
    steering: SteeringSweep,
) -> list[Finding]:
    """Where, how well, what drives it, what steering does."""
    return [
        _where(table, detector.model.n_layers),
        _how_well(detector, reports),
        _drives(detector, content, tone, comparison, wording),
        _steering(steering),
    ]


def sweep_findings(sweep: SteeringSweep, effects: pd.DataFrame) -> list[Finding]:
    """Where and how hard (for several layers), dose and response, damage, effects, texts."""
    several = [_map(sweep, effects)] if len(sweep.layers) > 1 else []
    texts = [_TEXTS] if sweep.max_new_tokens else []
    return [*several, _curves(sweep), _damage(sweep, effects), _effects(effects), *texts]


def measure_name(sweep: SteeringSweep) -> str:
    """What the effects of a sweep are in, in words."""
    names = {"score": "danger score", "inside_score": "danger score of the stream"}
    return names.get(sweep.measure, sweep.measure.replace("_", " "))


def shown(row: Any, name: str, *, signed: bool = True) -> tuple[str, str]:
    """An estimate's columns as (value, interval).

    Rates have two digits; signed changes those that the width of their interval leaves meaning to.
    """
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if np.isnan(value):
        return "—", ""
    width = high - low
    digits = min(5, max(2, 1 - int(np.floor(np.log10(width))))) if signed and width > 1e-9 else 2
    texts = [minus(f"{one:{'+' if signed else ''}.{digits}f}") for one in (value, low, high)]
    return texts[0], f"[{texts[1]}, {texts[2]}]"


def number_text(value: float, digits: str = ".2g") -> str:
    """A number to two digits, a dash where it is not known."""
    return "—" if np.isnan(value) else minus(f"{value:{digits}}")


def strength_text(multiplier: float) -> str:
    """A multiplier with its sign."""
    return minus(f"{multiplier:+g}") if multiplier else "0"


def minus(text: str) -> str:
    """A number with the sign that is as wide as its plus."""
    return text.replace("-", "−")


def _where(table: LayerTable, n_layers: int) -> Finding:
    best = table.frame.set_index("layer").loc[table.best_layer]
    auroc = Estimate.from_columns(best, "auroc", table.n_safe + table.n_dangerous)
    value, interval = shown(best, "auroc", signed=False)
    return Finding(
        "where",
        "Where is it?",
        f"The classes lie furthest apart at layer {table.best_layer}: cross-validated AUROC {value} "
        f"{interval}, n = {auroc.n}; 97.5% of label shuffles stay under {best['auroc_shuffled']:.2f}.",
        (Number(value, interval, f"cross-validated AUROC at layer {table.best_layer}, the best"),),
        f"The best of {n_layers} layers is picked with some luck; held-out prompts, below, say how much.",
    )


def _how_well(detector: Detector, reports: Sequence[DetectionReport]) -> Finding:
    numbers, said = [], []
    for one in reports:
        row = one.frame.iloc[0]
        accuracy, auroc = shown(row, "accuracy", signed=False), shown(row, "auroc", signed=False)
        numbers.append(Number(*accuracy, f"accuracy on {one.source}, n = {one.n}"))
        both = f"accuracy {' '.join(accuracy)} and AUROC {' '.join(auroc)}"
        said.append(f"{both} on {one.source} (n = {one.n})")
    return Finding(
        "how-well",
        "How well is it detected?",
        f"{detector.method}, layer and threshold chosen on {detector.source}: {'; '.join(said)}.",
        tuple(numbers),
        "A mean over types hides the types: prompts whose style is at odds with their content score worse, "
        "and a threshold that was frozen on one kind of prompt is off on another.",
    )


def _drives(
    detector: Detector,
    content: ContentVectors,
    tone: ContentVectors,
    comparison: DetectorComparison,
    wording: PairedTests,
) -> Finding:
    numbers, said = [], []
    for row in wording.frame.to_dict("records"):
        value, interval = shown(row, "auroc_difference")
        numbers.append(Number(value, interval, f"AUROC above {row['second']} on {row['set']}"))
        said.append(f"{value} {interval} on {row['set']}")
    cosine = float(content.cosine(tone)[content.row(detector.layer)])
    d_model = content.vectors.shape[1]
    top = top_dimensions(content, detector.layer, min(20, d_model))
    share = f"the {len(top)} largest of {d_model} dimensions carry {top['share'].sum():.0%} of the vector"
    return Finding(
        "drives",
        "What drives it?",
        f"AUROC above that of the wording alone: {'; '.join(said)}. {_tone_line(comparison)} At layer "
        f"{detector.layer} the two directions have cosine {number_text(cosine, '.2f')}, and {share}.",
        tuple(numbers),
        "An audit finds the shortcuts that it looks for: a wide gap to the wording and no move under "
        "politeness do not show that the detector reads meaning and nothing else.",
    )


def _tone_line(comparison: DetectorComparison) -> str:
    overall = comparison.overall
    parts = []
    for name in dict.fromkeys(overall["set"]):
        rows = overall[overall["set"] == name].set_index("detector")["auroc"]
        tone, content = (
            rows[[one for one in rows.index if str(one).startswith(word)]].max()
            for word in ("tone", "content")
        )
        parts.append(f"{tone:.2f} against {content:.2f} on {name}")
    return f"Best AUROC of tone vectors against content vectors: {'; '.join(parts)}."


def _steering(steering: SteeringSweep) -> Finding:
    effects = steering.effects()
    most = effects["multiplier"].abs().max()
    rows = effects.loc[effects["multiplier"].abs() == most].to_dict("records")
    return Finding(
        "steering",
        "What does steering do?",
        f"At layer {min(steering.layers)}, {_said(rows, measure_name(steering))}.",
        tuple(_change(row, steering) for row in rows),
        "The score is a detector's reading of texts that its own direction wrote, so that a move of it is "
        "no proof of meaning: read the texts.",
    )


def _map(sweep: SteeringSweep, effects: pd.DataFrame) -> Finding:
    rows = _largest(effects)
    return Finding(
        "map",
        "Where and how hard?",
        f"Largest changes: {_said(rows, measure_name(sweep), layers=True)}.",
        tuple(_change(row, sweep) for row in rows),
        f"The largest of {len(effects)} changes is picked with some luck: sweep.best chooses on one half of "
        "the prompts and reads on the other.",
    )


def _effects(effects: pd.DataFrame) -> Finding:
    outside, n = int(effects["outside_band"].to_numpy().sum()), len(effects)
    said = f"{outside} of {n} changes lie outside the band of the random directions."
    if np.isnan(effects["band_low"].to_numpy()).all():
        said = "No random directions were run, so that no change has a control."
    return Finding(
        "effects",
        "Effects beside their controls",
        said,
        (),
        "The band spans few random directions, and the p-values are not adjusted for their number.",
    )


def _curves(sweep: SteeringSweep) -> Finding:
    measure, table = measure_name(sweep), sweep.steerability()
    numbers, said = [], []
    for row in table.loc[table["slope"].notna()].to_dict("records"):
        value, interval = shown(row, "slope")
        numbers.append(Number(value, interval, f"{measure} a multiplier, slope at layer {row['layer']}"))
        wrong = f"{row['anti_steerable']:.0%} of the prompts move the wrong way"
        said.append(f"{value} {interval} at layer {row['layer']} ({wrong})")
    return Finding(
        "curves",
        "Dose and response",
        f"Change of the {measure} a multiplier: {'; '.join(said)}." if said else "",
        tuple(numbers),
        "A slope is a straight line through a curve that bends, and turns where the text breaks.",
    )


def _damage(sweep: SteeringSweep, effects: pd.DataFrame) -> Finding:
    rows = [row for row in _largest(effects) if np.isfinite(row["nll_change"])]
    numbers = tuple(
        Number(*shown(row, "nll_change"), f"nats a token more at {_at(row)}, where the change is largest")
        for row in rows
    )
    said = "; ".join(f"{one.value} {one.interval} {one.label}" for one in numbers)
    reached = np.isfinite(sweep.cliff()["multiplier"].to_numpy())
    cliffs = f"The cliff (one nat) is reached on {int(reached.sum())} of {len(reached)} sides."
    return Finding(
        "damage",
        "What does it cost?",
        f"{said}. {cliffs}" if said else cliffs,
        numbers,
        "NLL and KL see text that the model finds unlikely, not text that is wrong.",
    )


def _largest(effects: pd.DataFrame) -> list[dict[str, Any]]:
    """On each side of 0 the row of the largest change."""
    sides = [effects.loc[np.sign(effects["multiplier"]) == side] for side in (-1, 1)]
    known = [part for part in sides if part["change"].notna().any()]
    return [part.loc[part["change"].abs().idxmax()].to_dict() for part in known]


def _said(rows: Sequence[dict[str, Any]], measure: str, *, layers: bool = False) -> str:
    """The changes of a measure in words, each with its interval, control and price."""
    return f"the {measure} moves by " + "; ".join(
        f"{' '.join(shown(row, 'change'))} at {_at(row) if layers else _strength_and_dose(row)} (random "
        f"directions: {number_text(row['band_low'])} to {number_text(row['band_high'])}; "
        f"{number_text(row['nll_change'], '+.2f')} nats a token)"
        for row in rows
    )


def _change(row: dict[str, Any], sweep: SteeringSweep) -> Number:
    return Number(*shown(row, "change"), f"change of the {measure_name(sweep)} at {_at(row)}, n = {row['n']}")


def _at(row: dict[str, Any]) -> str:
    return f"layer {row['layer']}, {_strength_and_dose(row)}"


def _strength_and_dose(row: dict[str, Any]) -> str:
    return f"multiplier {strength_text(row['multiplier'])} (dose {row['dose']:.2f})"
