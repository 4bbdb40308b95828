"""One self-contained HTML page from results: it opens offline and can be mailed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .detect import Detector
from .directions import ContentVectors
from .evaluate import DetectionReport, DetectorComparison
from .files import write_text
from .intervals import Estimate, interval_text
from .responses import CONTENT, SteeringSweep
from .separation import LayerTable


def report(
    path: str | Path,
    *,
    table: LayerTable,
    content: ContentVectors,
    tone: ContentVectors,
    detector: Detector,
    reports: Sequence[DetectionReport],
    comparison: DetectorComparison,
    steering: SteeringSweep,
    settings: dict[str, Any],
) -> Path:
    """Write the page of a study: where, how well, tone against content, the vector, steering, the record."""
    figures = {
        "layers": plots.layer_curve(table),
        "comparison": plots.comparison(comparison),
        "tone": plots.tone_and_content(tone, content),
        "vector": plots.vector(content, detector.layer),
        "steering": plots.dose_response(steering),
    } | {f"scores-{i}": plots.score_distribution(one) for i, one in enumerate(reports)}
    page = _environment().get_template("report.html")
    return write_text(
        path,
        page.render(
            plotly_js=plots.plotly_js(),
            figures={name: plots.fragment(figure, name) for name, figure in figures.items()},
            summary=_summary(table, detector, reports, comparison, steering),
            table=table,
            detector=detector,
            reports=[(one, _by_type(one)) for one in reports],
            comparison=_comparison_rows(comparison),
            sets=list(dict.fromkeys(comparison.overall["set"])),
            cosine=float(content.cosine(tone)[content.row(detector.layer)]),
            steering=steering,
            texts=_texts(steering),
            several=False,
            settings=settings,
        ),
    )


def sweep_report(path: str | Path, sweep: SteeringSweep) -> Path:
    """Write the page of a sweep: layer x multiplier, a dose-response curve a layer, effects, texts."""
    figures = {f"layer-{layer}": plots.dose_response(sweep, layer) for layer in sweep.layers}
    if len(sweep.layers) > 1:
        figures["map"] = plots.steering_map(sweep)
    page = _environment().get_template("sweep.html")
    return write_text(
        path,
        page.render(
            plotly_js=plots.plotly_js(),
            figures={name: plots.fragment(figure, name) for name, figure in figures.items()},
            sweep=sweep,
            several=len(sweep.layers) > 1,
            measure=sweep.measure.replace("_", " "),
            effects=sweep.effects().to_dict("records"),
            texts=_texts(sweep) if sweep.max_new_tokens else [],
        ),
    )


def _by_type(report: DetectionReport) -> list[dict[str, Any]]:
    """The rows of all prompts and of each type."""
    frame = report.frame
    return frame.loc[frame["by"].isin(("all", "type"))].to_dict("records")  # type: ignore[return-value]


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lens_safety", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = interval_text
    environment.filters["number"] = _number
    environment.filters["range"] = lambda row, low, high: f"{_number(row[low])} to {_number(row[high])}"
    environment.filters["word"] = lambda text: str(text).replace("_", " ")
    return environment


def _number(value: float) -> str:
    return "—" if np.isnan(value) else f"{value:.2g}"


def _summary(
    table: LayerTable,
    detector: Detector,
    reports: Sequence[DetectionReport],
    comparison: DetectorComparison,
    steering: SteeringSweep,
) -> list[tuple[str, str]]:
    best = table.frame.set_index("layer").loc[table.best_layer]
    chosen = f"layer {detector.layer}, threshold {detector.threshold:.2g}"
    lines = [
        (
            "Where",
            f"The classes lie furthest apart at layer {table.best_layer}: cross-validated AUROC "
            f"{Estimate.from_columns(best, 'auroc', table.n_safe + table.n_dangerous)}; with shuffled labels "
            f"97.5% stay under {best['auroc_shuffled']:.2f}.",
        )
    ]
    for one in reports:
        lines.append(
            (
                f"How well: {one.source}",
                f"{detector.method} ({chosen}, both chosen on {detector.source}): accuracy "
                f"{one.accuracy}, AUROC {one.auroc} on {one.n} held-out prompts.",
            )
        )
    lines.append(("Tone or content", _tone_line(comparison)))
    lines.append(("Steering", _steering_line(steering)))
    return lines


def _tone_line(comparison: DetectorComparison) -> str:
    overall = comparison.overall
    parts = []
    for name in dict.fromkeys(overall["set"]):
        rows = overall[overall["set"] == name].set_index("detector")
        tone = [rows.loc[d, "auroc"] for d in rows.index if d.startswith("tone")]
        content = [rows.loc[d, "auroc"] for d in rows.index if d.startswith("content")]
        parts.append(f"{max(tone):.2f} against {max(content):.2f} on {name}")
    return f"Best AUROC of tone vectors against content vectors: {'; '.join(parts)}."


def _steering_line(steering: SteeringSweep) -> str:
    effects = steering.effects()
    most = effects["multiplier"].abs().max()
    said = "; ".join(
        f"at multiplier {row['multiplier']:g} (dose {row['dose']:.2f}) the text's danger score moves by "
        f"{row['change']:+.4f} [{row['change_low']:+.4f}, {row['change_high']:+.4f}] (random directions: "
        f"{row['band_low']:+.4f} to {row['band_high']:+.4f}) at {row['nll_change']:+.2f} nats a token"
        for row in effects.loc[effects["multiplier"].abs() == most].to_dict("records")
    )
    return f"At layer {min(steering.layers)}, {said}."


def _comparison_rows(comparison: DetectorComparison) -> list[tuple[str, list[dict[str, Any]]]]:
    overall = comparison.overall
    return [
        (name, overall.loc[overall["detector"] == name].to_dict("records"))
        for name in dict.fromkeys(overall["detector"])
    ]


def _texts(steering: SteeringSweep) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each prompt the content-steered texts, from the most negative multiplier to the most positive."""
    rows = steering.curves()
    rows = rows.loc[rows["direction"] == CONTENT]
    return [
        (prompt, rows.loc[rows["prompt"] == prompt].to_dict("records"))
        for prompt in dict.fromkeys(steering.frame["prompt"])
    ]
