"""Makes the results tables of the README from `results/*.csv`, between the two markers there.

python analyses/results_table.py            # rewrites README.md
python analyses/results_table.py --check    # exit status 1 where the README is not what the files say
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from lens_safety.files import write_text
from lens_safety.intervals import interval_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DETECTION = "<!-- results: made by analyses/results_table.py -->", "<!-- end of results -->"
STEERING = "<!-- steering results: made by analyses/results_table.py -->", "<!-- end of steering results -->"
BENCHMARKS = "<!-- benchmarks: made by analyses/results_table.py -->", "<!-- end of benchmarks -->"
ENGINES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
MODELS = {"smollm2-135m-instruct": "SmolLM2-135M", "gemma-3-270m": "Gemma 3 270M"}


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = filled(readme, DETECTION, [shipped(), study_rows(), across_models(), languages()])
    made = filled(made, STEERING, [strengths(), sentiment(), operators(), personas()])
    made = filled(made, BENCHMARKS, benchmarks())
    if "--check" in sys.argv:
        sys.exit(
            0 if made == readme else "README.md is not what results/ says: run this script without --check"
        )
    print(write_text(ROOT / "README.md", made))


def filled(readme: str, marks: tuple[str, str], parts: list[str]) -> str:
    """The README with `parts` between the two marks."""
    before, rest = readme.split(marks[0])
    _, after = rest.split(marks[1])
    return "\n".join([f"{before}{marks[0]}", "\n\n".join(parts), f"{marks[1]}{after}"])


def has(name: str, model: str = "smollm2-135m-instruct") -> bool:
    return (RESULTS / f"{name}.{model}.csv").exists()


def read(name: str, model: str = "smollm2-135m-instruct") -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{name}.{model}.csv")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Any, *names: str) -> list[str]:
    return [interval_text(row, name) for name in names]


def shipped() -> str:
    frame = read("00_shipped_detector")
    words = frame.loc[frame["detector"] == "tfidf"].set_index("set")
    rows = []
    for _, row in frame.loc[frame["detector"] == "shipped"].iterrows():
        other = interval_text(words.loc[row["set"]], "auroc")
        n = f"{row['n_safe']} + {row['n_dangerous']}"
        rows.append([str(row["set"]), n, *cells(row, "auroc", "fpr", "tpr"), other])
    header = [
        "held-out set",
        "safe + dangerous",
        "AUROC",
        "safe flagged",
        "dangerous caught",
        "AUROC of TF-IDF",
    ]
    title = "**The detector that comes with the package** (`python analyses/00_shipped_detector.py`):"
    return f"{title}\n\n{table(header, rows)}"


def study_rows() -> str:
    rows = []
    for model, name in MODELS.items():
        frame = read("03_extended_evaluation", model)
        two_vector = frame.loc[frame["detector"].str.startswith("two-vector")].iloc[0]
        chosen = frame.loc[frame["chosen"]].iloc[0]
        rows.append(
            [f"{name}, two-vector ({two_vector['detector']})", *cells(two_vector, "accuracy", "auroc")]
        )
        rows.append(
            [f"{name}, chosen inside the 200: {chosen['detector']}", *cells(chosen, "accuracy", "auroc")]
        )
    controls = read("03_extended_evaluation_controls").set_index("control")
    for control in controls.index:
        rows.append([str(control), *cells(controls.loc[control], "accuracy", "auroc")])
    title = (
        "**The study's 1,800 rows, every choice made on its 200** (`python "
        "analyses/03_extended_evaluation.py`; all attempts in `results/`):"
    )
    return f"{title}\n\n{table(['detector', 'accuracy', 'AUROC'], rows)}"


def across_models() -> str:
    frames = {name: read("06_across_models", model) for model, name in MODELS.items()}
    keys = ["train", "test", "method"]
    rows = []
    first = next(iter(frames.values()))
    for _, row in first.iterrows():
        values = []
        for frame in frames.values():
            same = (frame[keys] == [row[key] for key in keys]).all(axis=1)
            values.append(interval_text(frame.loc[same].iloc[0], "auroc"))
        rows.append([str(row[key]).replace("persona_vector_", "") for key in keys] + values)
        rows[-1].append(interval_text(row, "tfidf_auroc"))
    header = ["fitted on", "tested on", "method", *frames, "TF-IDF"]
    title = "**Two model families, AUROC** (`python analyses/06_across_models.py`):"
    return f"{title}\n\n{table(header, rows)}"


def languages() -> str:
    frame = read("08_languages")
    frame = frame.loc[frame["method"].str.startswith("lda")]
    rows = [
        [str(row["set"]), str(row["language"]), str(row["n"]), *cells(row, "auroc", "fpr", "tpr")]
        for _, row in frame.iterrows()
    ]
    header = ["set", "language", "n", "AUROC", "safe flagged", "dangerous caught"]
    title = "**Fitted on English, read in other languages** (`python analyses/08_languages.py`):"
    return f"{title}\n\n{table(header, rows)}"


def strengths() -> str:
    frame = read("09_steering_strength")
    rows = []
    for _, row in frame.loc[frame["multiplier"].isin([-10, -4, 2, 4, 10, 20, 50, 100])].iterrows():
        known = row["band_low"] == row["band_low"]
        band = f"{row['band_low']:.1f} to {row['band_high']:.1f}" if known else "—"
        change = f"{row['change']:+.1f} [{row['change_low']:+.1f}, {row['change_high']:+.1f}]"
        price = [f"{row['kl']:.1f}", f"{row['nll_change']:+.1f}"]
        rows.append(
            [str(row["vectors"]), f"{row['multiplier']:+g}", f"{row['dose']:.2f}", change, band, *price]
        )
    where = f"layer {frame['layer'].iloc[0]}, {frame['n'].iloc[0]} neutral prompts"
    title = (
        "**Danger score of the text (an independent detector's) at the study's strengths and below, "
        f"{where}** (`python analyses/09_steering_strength.py`):"
    )
    header = [
        "vectors",
        "multiplier",
        "dose",
        "change",
        "random directions",
        "KL (nats)",
        "NLL (nats a token)",
    ]
    return f"{title}\n\n{table(header, rows)}"


def sentiment() -> str:
    rows = []
    for model, name in MODELS.items():
        if not has("12_sentiment", model):
            continue
        frame = read("12_sentiment", model)
        for _, row in frame.loc[frame["chosen"]].iterrows():
            signed = f"{row['multiplier'] / abs(row['multiplier']) * row['dose']:+.2f}"
            band = f"{row['band_low']:.2f} to {row['band_high']:.2f}"
            where = [name, f"layer {row['layer']}, dose {signed}", str(row["n"]), f"{row['unsteered']:.2f}"]
            rows.append(
                [*where, *cells(row, "change"), band, f"{row['asked']:+.2f}", *cells(row, "nll_change")]
            )
    header = ["model", "chosen on other openings", "n", "unsteered", "change", "random directions"]
    title = (
        "**Sentiment, judged by VADER** (`python analyses/12_sentiment.py [--model gemma-3-270m --rows 40]`):"
    )
    return f"{title}\n\n{table([*header, 'asked in words', 'NLL (nats a token)'], rows)}"


def operators() -> str:
    frame = read("11_operators")
    wide = frame.pivot(index="operator", columns="kl_asked", values=["change", "change_low", "change_high"])
    asked = sorted(set(frame["kl_asked"]))
    rows = []
    for operator in dict.fromkeys(frame["operator"]):
        row = [str(operator)]
        for kl in asked:
            own = {f"change{end}": wide.loc[operator, (f"change{end}", kl)] for end in ("", "_low", "_high")}
            row.append(interval_text(own, "change"))
        rows.append(row)
    title = (
        "**Change of VADER's score at the same KL, toward negative and positive** (`python "
        "analyses/11_operators.py`):"
    )
    header = ["operator", *(f"{abs(kl):g} nats, {'negative' if kl < 0 else 'positive'}" for kl in asked)]
    return f"{title}\n\n{table(header, rows)}"


def personas() -> str:
    frame = read("10_persona_steerability")
    rows = []
    for _, row in frame.iterrows():
        band = f"{row['random_low']:+.3f} to {row['random_high']:+.3f}"
        slope = f"{row['slope']:+.3f} [{row['slope_low']:+.3f}, {row['slope_high']:+.3f}]"
        told = f"{row['told_the_trait'] - row['told_the_opposite']:+.2f}"
        outside = "yes" if bool(row["outside_band"]) else "no"
        share = interval_text(row, "anti_steerable")
        rows.append([str(row["trait"]), str(row["layer"]), slope, band, outside, share, told])
    header = [
        "trait",
        "layer",
        "slope",
        "random directions",
        "outside them",
        "anti-steerable",
        "told in words",
    ]
    title = (
        "**Persona statements, logit difference of the trait's answer a multiplier** (`python "
        "analyses/10_persona_steerability.py`):"
    )
    return f"{title}\n\n{table(header, rows)}"


def benchmarks() -> list[str]:
    """A table for each machine, number of threads and data type on which benchmarks were run."""
    frame = pd.read_csv(RESULTS / "benchmarks.csv")
    return [benchmark_table(part) for _, part in frame.groupby(["device", "threads", "dtype"], sort=False)]


def benchmark_table(frame: pd.DataFrame) -> str:
    keys = ["benchmark", "key", "model"]
    rows = []
    for _, same in frame.sort_values("benchmark", kind="stable").groupby(keys, sort=False):
        first = same.iloc[0]
        compared = first["ours"] if pd.isna(first["theirs"]) else f"{first['ours']} / {first['theirs']}"
        asked = "" if pd.isna(first["asked"]) else f"≤ {first['asked']:g}"
        values = [benchmark_cell(same.loc[same["engine"] == engine]) for engine in ENGINES]
        note = "" if pd.isna(first["note"]) else str(first["note"]).replace("|", "\\|")
        times = f"{first['n_prompts']} x {first['rounds']}"
        name = f"{first['benchmark']}: `{first['key']}`"
        rows.append([name, compared, str(first["model"]), *values, asked, times, note])
    first = frame.iloc[0]
    title = (
        f"**Ours over theirs, below 1 is less (`make benchmark`): {first['device']}, {first['threads']} "
        f"threads, {first['dtype']}, {first['versions']}**, medians"
    )
    header = [
        "benchmark",
        "ours / theirs",
        "model",
        *ENGINES.values(),
        "asked for",
        "prompts x rounds",
        "note",
    ]
    return f"{title}\n\n{table(header, rows)}"


def benchmark_cell(row: pd.DataFrame) -> str:
    """The ratio with what it is made of; what was measured alone; a dash where nothing was."""
    if row.empty:
        return "—"
    one = row.iloc[0]
    made = []
    for unit, name in (("s", "seconds"), ("MiB", "mib")):
        pair = [one[f"{name}_{side}"] for side in ("ours", "theirs")]
        shown = [f"{value:.4g}" for value in pair if not pd.isna(value)]
        if shown:
            made.append(f"{' / '.join(shown)} {unit}")
    if pd.isna(one["ratio"]):
        return ", ".join(made) or "none"
    return f"**{one['ratio']:.2f}** ({', '.join(made)})"


if __name__ == "__main__":
    main()
