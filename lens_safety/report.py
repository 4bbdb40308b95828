"""Self-contained HTML pages from results, one family: they open offline and can be mailed or printed."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .audit import ShortcutAudit
from .detect import Detector
from .directions import ContentVectors
from .evaluate import DetectionReport, DetectorComparison, PairedTests
from .files import write_text
from .findings import (
    Finding,
    measure_name,
    number_text,
    shown,
    strength_text,
    study_findings,
    sweep_findings,
)
from .plots.style import page_colours, palette, rgba, templates
from .responses import ASKED, CONTENT, UNSTEERED, SteeringSweep
from .separation import LayerTable

_TEXTS = 2000
"""The most texts that a page shows, so that it stays small; prompts are left out whole."""

_BEAR_IN_MIND = (
    "A probe of one model on small sets, not a guard: detectors of the residual stream are not robust to "
    "somebody who attacks them with access to the weights (2412.09565)."
)


def report(
    path: str | Path,
    *,
    table: LayerTable,
    content: ContentVectors,
    tone: ContentVectors,
    detector: Detector,
    reports: Sequence[DetectionReport],
    comparison: DetectorComparison,
    audit: ShortcutAudit,
    wording: PairedTests,
    steering: SteeringSweep,
    settings: dict[str, Any],
) -> Path:
    """Write the page of a study: where, how well, what drives it, what steering does, the record.

    `wording`: the detector paired with a text baseline, a row a held-out set.
    """
    findings = study_findings(
        table=table,
        content=content,
        tone=tone,
        detector=detector,
        reports=reports,
        comparison=comparison,
        wording=wording,
        steering=steering,
    )
    figures = {
        "layers": plots.layer_curve(table),
        "audit": plots.shortcut_audit(audit),
        "comparison": plots.comparison(comparison),
        "tone": plots.tone_and_content(tone, content),
        "vector": plots.vector(content, start=detector.layer),
        "steering": plots.dose_response(steering),
    } | {f"scores-{i}": plots.score_distribution(one) for i, one in enumerate(reports)}
    return _write(
        path,
        "study.html",
        figures,
        findings,
        kind="Study",
        title=f"Danger in {detector.model.name}",
        subtitle=_read_from(detector),
        record=_flat(settings),
        table=table,
        detector=detector,
        reports=[(one, _by_type(one)) for one in reports],
        comparison=_comparison_rows(comparison),
        sets=list(dict.fromkeys(comparison.overall["set"])),
        audit=audit,
        steering=steering,
        texts=_texts(steering),
    )


def sweep_report(path: str | Path, sweep: SteeringSweep) -> Path:
    """Write the page of a sweep: layer x multiplier, dose-response by layer, damage, effects, texts."""
    effects = sweep.effects()
    figures = {f"layer-{layer}": plots.dose_response(sweep, layer) for layer in sweep.layers}
    if len(sweep.layers) > 1:
        figures["map"] = plots.steering_map(sweep)
    columns = {"kl": "kl", "nll": "nll_change"}
    if paid := [name for name, column in columns.items() if np.isfinite(effects[column].to_numpy()).any()]:
        figures["damage"] = plots.damage_frontier(sweep, damage=paid[0])
    return _write(
        path,
        "sweep.html",
        figures,
        sweep_findings(sweep, effects),
        kind="Steering sweep",
        title=f"Steering {sweep.model}",
        subtitle=f"{sweep.operator} at {sweep.positions} positions · layers "
        f"{', '.join(map(str, sweep.layers))} · {sweep.n_prompts} prompts · up to {sweep.max_new_tokens} "
        f"tokens, greedy · seed {sweep.seed}",
        record=_flat(_sweep_settings(sweep)),
        sweep=sweep,
        measure=measure_name(sweep),
        effects=effects.to_dict("records"),
        texts=_texts(sweep),
    )


def _write(
    path: str | Path, template: str, figures: dict[str, Any], findings: Sequence[Finding], **given: Any
) -> Path:
    """Fill in a page. What every page has in common is named here once."""
    summary = [(one.title, one.line) for one in findings if one.line]
    page = environment().get_template(template)
    return write_text(
        path,
        page.render(
            plotly_js=plots.plotly_js(),
            figures={name: plots.fragment(figure, name) for name, figure in figures.items()},
            findings=findings,
            summary=[*summary, ("Bear in mind", _BEAR_IN_MIND)],
            themes=page_colours(),
            colours=_colours(),
            **given,
        ),
    )


def environment() -> Any:
    """Templates of pages, with the filters that write numbers and intervals."""
    environment = templates()
    environment.filters["interval"] = lambda row, name: " ".join(shown(row, name, signed=False))
    environment.filters["signed"] = lambda row, name: " ".join(shown(row, name))
    environment.filters["number"] = number_text
    environment.filters["range"] = lambda row, low, high: (
        f"{number_text(row[low])} to {number_text(row[high])}"
    )
    environment.filters["strength"] = strength_text
    environment.filters["word"] = lambda text: str(text).replace("_", " ")
    return environment


def _colours() -> dict[str, str]:
    """Each colour of the figures and what stands for it on dark paper, in both ways of writing it."""
    pairs = palette("dark").items()
    return {light.lower(): dark.lower() for light, dark in pairs} | {
        rgba(light): rgba(dark) for light, dark in pairs
    }


def _read_from(detector: Detector) -> str:
    return (
        f"{detector.model.n_layers} layers, d_model {detector.model.d_model} · read at {detector.position}, "
        f"{detector.template} template · {detector.n_safe + detector.n_dangerous} training prompts "
        f"({detector.source}) · seed {detector.seed}"
    )


def _by_type(one: DetectionReport) -> list[dict[str, Any]]:
    """The rows of all prompts and of each type."""
    frame = one.frame
    return frame.loc[frame["by"].isin(("all", "type"))].to_dict("records")  # type: ignore[return-value]


def _comparison_rows(comparison: DetectorComparison) -> list[tuple[str, list[dict[str, Any]]]]:
    overall = comparison.overall
    return [
        (name, overall.loc[overall["detector"] == name].to_dict("records"))
        for name in dict.fromkeys(overall["detector"])
    ]


def _texts(sweep: SteeringSweep) -> dict[str, Any]:
    """The texts of the content vectors beside the unsteered ones, by prompt, layer and multiplier."""
    rows = sweep.frame.loc[sweep.frame["direction"].isin([CONTENT, UNSTEERED, ASKED])]
    rows = rows.assign(value=rows[sweep.measure])
    prompts = list(dict.fromkeys(rows["prompt"]))
    shown = prompts[: max(1, _TEXTS * len(prompts) // max(1, len(rows)))]
    rows = rows.loc[rows["prompt"].isin(shown)]
    order = rows["prompt"].map(shown.index)
    rows = rows.assign(order=order).sort_values(["order", "layer", "multiplier"], kind="stable")
    return {
        "rows": rows.to_dict("records") if sweep.max_new_tokens else [],
        "layers": sweep.layers,
        "measure": measure_name(sweep),
        "left_out": len(prompts) - len(shown),
    }


def _sweep_settings(sweep: SteeringSweep) -> dict[str, Any]:
    controls = [name for name in dict.fromkeys(sweep.frame["direction"]) if name not in (CONTENT, UNSTEERED)]
    return {
        "model": sweep.model,
        "operator": sweep.operator,
        "positions": sweep.positions,
        "layers": list(sweep.layers),
        "multipliers": sorted({m for _, m in sweep.strengths}),
        "controls": controls,
        "prompts": sweep.n_prompts,
        "measure": sweep.measure,
        "detector": sweep.detector or "none",
        "threshold": sweep.threshold,
        "max_new_tokens": sweep.max_new_tokens,
        "seed": sweep.seed,
        "versions": {"lens-safety": version("lens-safety")},
    }


def _flat(settings: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of a table, names joined by dots."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{before}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, one in enumerate(value, start=1):
                rows += _flat(one, f"{before}{name}.{number}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((before + name, text))
    return rows
