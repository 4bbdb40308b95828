"""`lens-safety`: parse, one library call, save or show. Results on stdout, progress and errors on stderr."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="lens-safety",
    help="Where danger is in a language model's residual stream, how well it is detected there, and what "
    "steering along it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
_INTERRUPTED = 130


# Spelled out here, because the rooms that they belong to import torch, and `--help` should not wait for it.
MethodName = Literal[
    "two-vector", "one-vector", "inverse-distance", "softmax", "pca", "lda", "logistic", "tone"
]
OverName = Literal["best", "mean", "vote", "concat"]
RuleName = Literal["accuracy", "youden", "f1", "fpr"]
CalibrationName = Literal["platt", "isotonic"]
EngineName = Literal["auto", "hooked", "bridge"]

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub name, folder or .gguf file; the built-in model by default."),
]
EngineOption = Annotated[EngineName, typer.Option(help="HookedTransformer or TransformerBridge.")]
PromptsOption = Annotated[
    str,
    typer.Option("--prompts", "-p", help="Training prompts: a built-in set, .jsonl, .csv, or a data set."),
]
PositionOption = Annotated[
    str, typer.Option(help="content_mean, content_last, last, max, or a token number.")
]
TemplateOption = Annotated[str, typer.Option(help="auto, chat or raw.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
MethodOption = Annotated[MethodName, typer.Option(help="How a prompt is scored.")]
OperatorOption = Annotated[
    str, typer.Option(help="add, add-norm, ablate, clamp, clamp:VALUE, toward, rotate or rotate:DEGREES.")
]
PositionsOption = Annotated[
    str, typer.Option(help="all, prompt, generated, content, last:K or generated:FROM:TO.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of folds, bootstrap and controls.")]


@app.command()
def study(
    model: ModelOption = None,
    prompts: PromptsOption = "content",
    test: Annotated[
        list[str] | None,
        typer.Option("--test", "-t", help="Held-out prompts; may be repeated. Default: the built-in two."),
    ] = None,
    position: PositionOption = "content_mean",
    template: TemplateOption = "auto",
    method: MethodOption = "two-vector",
    multipliers: Annotated[str, typer.Option(help="Steering multipliers, comma-separated.")] = "-4,-2,0,2,4",
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("runs/study"),
    engine: EngineOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Where danger is, how well it is detected, what steering does: a report and its data.

    Example: lens-safety study --out runs/mine
    """
    from .prompts import load_prompts
    from .study import TESTS
    from .study import study as run

    train, tests = load_prompts(prompts), [load_prompts(name) for name in test or TESTS]
    numbers = _numbers(multipliers)
    made = run(
        _load(model, engine),
        train=train,
        tests=tests,
        method=method,
        position=_position(position),
        template=template,
        multipliers=numbers,
        store=out_folder / "residuals",
        seed=seed,
    )
    files = made.save(out_folder)
    if as_json:
        files_shown = {name: str(path) for name, path in files.items()}
        _print_json(made.settings | {"detection": _records(made.comparison.overall), "files": files_shown})
        return
    _print_table(
        made.comparison.overall,
        ["detector", "set", "accuracy", "auroc", "tpr", "fpr"],
        f"Held-out prompts, {made.detector.model.name}",
    )
    _say(
        f"Layer {made.detector.layer} and its threshold were chosen inside {train.name}. "
        f"Results: {out_folder}/ (open {files['report.html']})"
    )


@app.command()
def layers(
    model: ModelOption = None,
    prompts: PromptsOption = "content",
    position: PositionOption = "content_mean",
    template: TemplateOption = "auto",
    csv: Annotated[Path | None, typer.Option("--out", help="Write the table as CSV too.")] = None,
    engine: EngineOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """How far safe and dangerous prompts lie apart at each layer.

    Example: lens-safety layers --prompts my_prompts.csv
    """
    from .files import write_csv
    from .separation import layer_table

    cache = _extract(_load(model, engine), prompts, position, template)
    table = layer_table(cache, seed=seed)
    if csv is not None:
        write_csv(csv, table.frame)
        _say(f"Table: {csv}")
    if as_json:
        _print_json({"best_layer": table.best_layer, "layers": _records(table.frame)})
        return
    shown = ["name", "auroc", "auroc_shuffled", "cohens_d", "separation", "relative_magnitude"]
    _print_table(table.frame, [*shown, "split_half_cosine"], f"{table.model}, {table.source}")
    _say(f"Best layer {table.best_layer} (highest cross-validated AUROC).")


@app.command()
def fit(
    out_file: Annotated[Path, typer.Option("--out", help="Where the detector is written.")] = Path(
        "runs/detector.safetensors"
    ),
    vectors: Annotated[
        Path | None, typer.Option("--vectors", help="Write the content vectors to this file too.")
    ] = None,
    model: ModelOption = None,
    prompts: PromptsOption = "content",
    method: MethodOption = "two-vector",
    layer: Annotated[
        int | None, typer.Option(help="Layer to read; chosen by cross-validation by default.")
    ] = None,
    over: Annotated[
        OverName, typer.Option(help="One layer, or all layers averaged, voting, or side by side.")
    ] = "best",
    threshold: Annotated[RuleName, typer.Option(help="What the threshold is chosen for.")] = "accuracy",
    target_fpr: Annotated[
        float, typer.Option(help="With --threshold fpr: certified share of safe prompts flagged.")
    ] = 0.05,
    abstain: Annotated[
        float, typer.Option(help="Share of prompts, nearest the threshold, that are called unsure.")
    ] = 0.0,
    calibration: Annotated[CalibrationName, typer.Option(help="How scores become probabilities.")] = "platt",
    position: PositionOption = "content_mean",
    template: TemplateOption = "auto",
    test: Annotated[
        list[str] | None,
        typer.Option("--test", "-t", help="Held-out prompts to report on; repeatable."),
    ] = None,
    engine: EngineOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a detector on labelled prompts, report it on held-out ones, and save it.

    Example: lens-safety fit --prompts my_train.jsonl --test my_test.jsonl --out runs/mine.safetensors
    """
    from .baselines import TextBaseline
    from .detect import Detector
    from .directions import content_vectors, tone_vectors
    from .evaluate import evaluate

    loaded = _load(model, engine)
    cache = _extract(loaded, prompts, position, template)
    tone = method == "tone"
    detector = Detector.fit(
        cache,
        method=method,
        over=over,
        layers=None if layer is None else [layer],
        threshold=threshold,
        target_fpr=target_fpr,
        abstain=abstain,
        calibration=calibration,
        vectors=tone_vectors(loaded, position=_position(position), template=template) if tone else None,
        seed=seed,
    )
    result = _records(detector.to_frame())[0] | {"file": str(detector.save(out_file)), "tests": []}
    if vectors is not None:
        result["vectors"] = str(content_vectors(cache).save(vectors))
    words = None
    for name in test or []:
        held_out = _extract(loaded, name, position, template)
        report = evaluate(detector, held_out, seed=seed)
        words = words or TextBaseline.fit(cache.prompts, seed=seed)
        wording = words.report(held_out.prompts, seed=seed)
        row = {"set": report.source, "n": report.n} | _records(report.frame)[0]
        row |= {"tfidf_accuracy": wording.accuracy.value, "tfidf_auroc": wording.auroc.value}
        result["tests"].append(row)
        if not as_json:
            shown = ["by", "type", "n_safe", "n_dangerous", "accuracy", "auroc", "tpr", "fpr"]
            _print_table(report.frame, shown, f"{report.source}, n = {report.n}")
            _say(
                f"TF-IDF and logistic regression, no language model: accuracy {wording.accuracy}, "
                f"AUROC {wording.auroc}"
            )
            _say(
                "Threshold chosen on the test scores, as in the study (no result): accuracy "
                f"{report.estimate('oracle_accuracy')}"
            )
    if as_json:
        _print_json(result)
        return
    _say(
        f"{detector.name}, threshold {detector.threshold:.4g}; inside {detector.source}: AUROC "
        f"{detector.auroc_cv:.3f}, accuracy {detector.accuracy_cv:.3f} (where the best layer was taken, "
        f"flattering). Detector: {out_file}"
    )


@app.command()
def detect(
    texts: Annotated[list[str] | None, typer.Argument(help="Prompts, or - for one a line on stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A .jsonl or .csv file, or a text file, one a line."),
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(
            help="A saved detector. Default: the one that comes with the built-in model; for another model "
            "one is fitted on built-in prompts."
        ),
    ] = None,
    model: ModelOption = None,
    truncate: Annotated[bool, typer.Option(help="Cut prompts that are too long for the context.")] = False,
    engine: EngineOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score prompts: score, calibrated probability of danger, verdict (safe, dangerous, unsure).

    Example: lens-safety detect "How do I kill time at the airport?"
    """
    import pandas as pd

    from .detect import Detector

    prompts = _texts(texts, file)
    saved = Detector.load(detector) if detector is not None else None
    loaded = _load(model, engine)
    used = saved or _default_detector(loaded, model)
    scores = used.score(prompts, model=loaded, truncate=truncate, progress=True)
    frame = pd.DataFrame(
        {
            "score": scores,
            "probability": used.probability(scores),
            "verdict": used.verdicts(scores),
            "text": prompts,
        }
    )
    title = f"{used.name}, fitted on {used.source}"
    if as_json:
        shown = {"detector": title, "threshold": used.threshold, "band": used.band}
        _print_json(shown | {"prompts": _records(frame)})
        return
    band = f", unsure within {used.band:.3g}" if used.band else ""
    _print_table(frame, list(frame), f"{title}; threshold {used.threshold:.4g}{band}")


@app.command()
def steer(
    texts: Annotated[list[str], typer.Argument(help="Prompts to continue.")],
    multiplier: Annotated[
        list[float] | None,
        typer.Option("--multiplier", "-x", help="Negative pushes toward safe; may be repeated."),
    ] = None,
    dose: Annotated[
        list[float] | None,
        typer.Option("--dose", help="Instead: shares of the layer's median residual norm; may be repeated."),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option("--layer", "-l", help="Layers to steer; by default the one that detects best."),
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="Saved vectors; by default from the built-in prompts.")
    ] = None,
    operator: OperatorOption = "add",
    positions: PositionsOption = "all",
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    template: TemplateOption = "auto",
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would be written where, and stop.")
    ] = False,
    model: ModelOption = None,
    engine: EngineOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts while the residual stream is pushed along a direction; unsteered beside steered.

    Example: lens-safety steer "Tell me about my new neighbour." -x -4 -x 4
    """
    import pandas as pd

    from .decoding import generate
    from .plans import Dose
    from .steer import steering_plan
    from .types import OptionError

    if multiplier and dose:
        raise OptionError("--multiplier and --dose given: expected one of them")
    saved = _saved_vectors(vectors, layer)
    loaded = _load(model, engine)
    direction, chosen = _direction(loaded, saved, layer)
    strengths = [Dose(d) for d in dose] if dose else multiplier or [-2.0, 0.0, 2.0]
    plans = [
        steering_plan(
            loaded, direction, layers=chosen, multiplier=one, operator=operator, positions=positions
        )
        for one in strengths
    ]
    if plan:
        frame = pd.concat([one.to_frame() for one in plans], ignore_index=True)
        if as_json:
            _print_json({"plan": _records(frame)})
        else:
            _print_table(frame, list(frame), "What is written where")
        return
    rows: list[dict[str, Any]] = []
    for one in plans:
        with one.on(loaded):
            made = generate(
                loaded,
                texts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                template=template,
                seed=seed,
            )
        write = one.writes[chosen[0]]
        common = {"multiplier": float(write.multiplier[0]), "dose": float(write.dose[0])}
        rows += [common | {"prompt": p, "text": text} for p, text in zip(texts, made, strict=True)]
    if as_json:
        _print_json({"layers": chosen, "operator": operator, "texts": rows})
        return
    _print_table(pd.DataFrame(rows), list(rows[0]), f"{operator} at layer {chosen}")


@app.command()
def sweep(
    vectors: Annotated[
        Path | None, typer.Option("--vectors", help="Saved vectors; by default from the built-in prompts.")
    ] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", "-p", help="Prompts to steer: a set's name, .jsonl or .csv.")
    ] = "neutral",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers, such as 12,20 or 10:20 or 10:20:2; by default the one that detects best."),
    ] = None,
    multipliers: Annotated[
        str, typer.Option(help="Multipliers, such as -4,4, or FROM:TO:COUNT such as -8:8:9.")
    ] = "-4:4:5",
    operator: OperatorOption = "add",
    positions: PositionsOption = "all",
    n_random: Annotated[int, typer.Option("--random", help="Random control directions.")] = 5,
    control_multipliers: Annotated[
        str | None, typer.Option(help="Multipliers of the controls; all of them by default.")
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option(help="A saved detector that scores the texts; else the built-in model's own."),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="Two answers, such as Yes,No, whose logits are compared.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 40,
    template: TemplateOption = "auto",
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("runs/sweep"),
    model: ModelOption = None,
    engine: EngineOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Steering at many strengths and layers beside controls: rows as CSV, the sweep file, a page.

    Example: lens-safety sweep --layers 10:20:5 --multipliers -8:8:9 --out runs/mine
    """
    from .detect import Detector
    from .files import write_csv
    from .prompts import load_prompts
    from .report import sweep_report
    from .sweep import CONTROLS
    from .sweep import sweep as run

    saved = Detector.load(detector) if detector is not None else None
    chosen = None if layers is None else _layers(layers)
    saved_vectors = _saved_vectors(vectors, chosen)
    numbers = _numbers(multipliers)
    of_controls = None if control_multipliers is None else _numbers(control_multipliers)
    held_out = load_prompts(prompts)
    loaded = _load(model, engine)
    direction, steered = _direction(loaded, saved_vectors, chosen)
    made = run(
        loaded,
        direction,
        held_out,
        layers=steered,
        multipliers=numbers,
        operator=operator,
        positions=positions,
        controls=[name for name in CONTROLS if name != "random" or n_random],
        n_random=n_random,
        control_multipliers=of_controls,
        detector=saved or _default_detector(loaded, model),
        behaviour=None if answers is None else _answers(answers),
        max_new_tokens=max_new_tokens,
        template=template,
        store=out_folder,
        seed=seed,
    )
    effects = made.effects()
    files = {
        "rows": write_csv(out_folder / "sweep.csv", made.frame),
        "effects": write_csv(out_folder / "effects.csv", effects),
        "sweep": made.save(out_folder / "sweep.json"),
        "page": sweep_report(out_folder / "sweep.html", made),
    }
    if as_json:
        _print_json(
            {"effects": _records(effects), "files": {name: str(path) for name, path in files.items()}}
        )
        return
    shown = ["layer", "multiplier", "dose", "change", "band_low", "band_high", "nll_change", "kl"]
    _print_table(effects, [*shown, "outside_band"], f"{made.model}: change of {made.measure}")
    _say(f"Results: {out_folder}/ (open {files['page']})")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """The models that are known to work, and which of them are on this machine."""
    import pandas as pd

    from .models import known_models

    rows = known_models()
    if as_json:
        _print_json({"models": rows})
        return
    _print_table(pd.DataFrame(rows), list(rows[0]), "Models")
    _say("Any Llama, Qwen, Gemma or GPT-2 style folder, .gguf file or hub name goes as --model too.")


@app.command()
def prompts(as_json: JsonOption = False) -> None:
    """The prompt sets that can be named: the built-in ones, and public ones with licence and address."""
    import pandas as pd

    from .prompts import BUILT_IN, load_prompts
    from .public_sets import public_sets

    built_in = [(name, load_prompts(name)) for name in BUILT_IN]
    rows = []
    for name, one in built_in:
        n = sum(prompt.label is True for prompt in one)
        labels = f"{n} dangerous, {len(one) - n} safe" if one.is_labelled else "none"
        rows.append(
            {"name": name, "rows": len(one), "labels": labels, "licence": "MIT", "address": "built in"}
        )
    frame = pd.concat([pd.DataFrame(rows), public_sets()], ignore_index=True)
    if as_json:
        _print_json({"prompts": _records(frame)})
        return
    _print_table(frame, ["name", "rows", "labels", "licence", "address"], "Prompt sets")


@app.command()
def cache(
    folder: Annotated[
        Path | None, typer.Option(help="The store; the user's cache folder by default.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is stored.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --clear: of this model only, as it is listed.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The residual streams that are kept on disk, so that no prompt is run twice; --clear removes them.

    Example: lens-safety cache --clear --model SmolLM2-135M-Instruct
    """
    from .files import cache_folder
    from .store import ResidualStore
    from .types import FileError, OptionError

    if model is not None and not clear:
        raise OptionError(f"--model {model!r} given without --clear: expected both, or neither to list all")
    if folder is not None and not folder.exists():
        raise FileError(f"no folder {folder}: expected one that --store or store= named")
    store = ResidualStore(cache_folder() / "residuals" if folder is None else folder)
    if clear:
        freed = store.clear(model)
        if as_json:
            _print_json({"folder": str(store.folder), "freed_bytes": freed})
        else:
            out.print(f"{freed / 1e6:,.1f} MB freed ({freed:,} bytes)", highlight=False)
        return
    frame = store.to_frame()
    total = sum(frame["bytes"].tolist())
    frame["last_used"] = frame["last_used"].astype(str)
    if as_json:
        _print_json({"folder": str(store.folder), "bytes": total, "rows": _records(frame)})
        return
    frame["MB"] = frame["bytes"] / 1e6
    shown = ["model", "template", "position", "layers", "prompts", "MB", "last_used"]
    _print_table(frame, shown, "Stored residual streams")
    _say(f"{store.folder}: {total / 1e6:,.1f} MB, at most {store.max_bytes / 1e6:,.0f} MB")


@app.command()
def doctor(
    model: ModelOption = None,
    engine: EngineOption = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; of the last two the drift is shown")
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Check an installation and a model: batch invariance, hooks, steering identities, precision."""
    from .doctor import checkup

    given = _load(model, engine, dtype)
    result = checkup(given, reference=None if dtype == "float32" else _load(model, engine))
    if as_json:
        _print_json({"passed": result.passed, "checks": _records(result.frame)})
    else:
        title = f"{result.model}, {result.engine}, TransformerLens {result.transformer_lens}, {result.dtype}"
        _print_table(result.frame, list(result.frame), title)
        _say("All checks passed." if result.passed else "Some checks failed: see the table.")
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def dashboard(
    model: ModelOption = None,
    engine: EngineOption = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of results that are compared.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port of the pages.")] = 8501,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own is open to a network.")
    ] = "127.0.0.1",
) -> None:
    """Pages in a browser: detect, layers, vectors, steer, compare, data. Ends with Ctrl-C.

    Example: lens-safety dashboard --port 8600
    """
    from .dashboard import address, command

    arguments = command(model=model, engine=engine, runs=runs, host=host, port=port)
    _say(f"Pages at {address(host, port)} (Ctrl-C ends them; the first one waits for the model)")
    # In this process's place, so that signals reach the server.
    os.execv(arguments[0], arguments)


def main() -> NoReturn:
    """Run the command line. Anything a user can mend is one sentence on stderr and exit status 2."""
    # Read when torch loads. Threads that spin for a core that another process has slow it down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:
            _say("interrupted: finished batches are kept, nothing was left half-written")
        raise
    except ValueError as error:
        from .types import LensSafetyError

        if not isinstance(error, LensSafetyError):
            raise
        err.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    sys.exit(0)


def _load(model: str | None, engine: EngineName, dtype: str | None = None) -> Any:
    with err.status("loading the model (the first time takes half a minute)"):
        from .models import load_model

        return load_model(model, engine=engine, dtype=dtype)


def _extract(model: Any, prompts: str, position: str, template: str) -> Any:
    from .prompts import load_prompts
    from .residuals import residual_streams

    return residual_streams(model, load_prompts(prompts), position=_position(position), template=template)


def _built_in_cache(model: Any) -> Any:
    """The built-in training prompts' residual streams, kept in the user's cache folder."""
    from .models import cache_folder
    from .prompts import load_prompts
    from .residuals import residual_streams

    return residual_streams(model, load_prompts("content"), store=cache_folder() / "residuals")


def _default_detector(model: Any, name: str | None) -> Any:
    from .detect import Detector, load_detector

    return load_detector() if name is None else Detector.fit(_built_in_cache(model))


def _saved_vectors(vectors: Path | None, layers: list[int] | None) -> Any:
    from .directions import ContentVectors
    from .types import OptionError

    if vectors is not None and not layers:
        raise OptionError("--vectors given without a layer: expected at least one to steer")
    return None if vectors is None else ContentVectors.load(vectors)


def _direction(model: Any, saved: Any, layers: list[int] | None) -> tuple[Any, list[int]]:
    """The saved vectors and the layers named, or content vectors of the built-in prompts and the layer that
    detects best by cross-validation."""
    from .detect import Detector
    from .directions import content_vectors

    if saved is not None and layers:
        return saved, layers
    cache = _built_in_cache(model)
    return content_vectors(cache), layers or [Detector.fit(cache).layer]


def _position(given: str) -> Any:
    from .tokens import named_position

    return named_position(given)


def _numbers(given: str) -> list[float]:
    """Numbers with commas between, or FROM:TO:COUNT, evenly spaced."""
    from .types import OptionError

    try:
        if given.count(":") == 2:
            first, last, count = given.split(":")
            n = int(count)
            if n < 2:
                raise ValueError
            return [float(first) + (float(last) - float(first)) * i / (n - 1) for i in range(n)]
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise OptionError(
            f"--multipliers {given!r} given, expected numbers with commas between, such as -4,-2,0,2,4, or "
            "FROM:TO:COUNT, such as -8:8:9"
        ) from None


def _layers(given: str) -> list[int]:
    """Layers with commas between, or FROM:TO or FROM:TO:STEP, the last one included."""
    from .types import OptionError

    try:
        if ":" in given:
            first, last, step = [*map(int, given.split(":")), 1][:3]
            return list(range(first, last + 1, step))
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise OptionError(
            f"--layers {given!r} given, expected layers such as 12,20, or FROM:TO:STEP, such as 10:20:2"
        ) from None


def _answers(given: str) -> tuple[str, str]:
    from .types import OptionError

    parts = given.split(",")
    if len(parts) != 2 or not all(part.strip() for part in parts):
        raise OptionError(f"--answers {given!r} given, expected two with a comma between, such as Yes,No")
    return parts[0], parts[1]


def _texts(texts: list[str] | None, file: Path | None) -> list[str]:
    from .types import OptionError

    if bool(texts) == (file is not None):
        raise OptionError("expected prompts as arguments, or --file F, or - for stdin, and one of them only")
    if file is not None:
        if file.suffix.lower() in (".jsonl", ".csv"):
            from .prompts import load_prompts

            return load_prompts(file).texts
        return _lines(_read(file), str(file))
    if texts == ["-"]:
        return _lines(sys.stdin.read(), "stdin")
    return list(texts or [])


def _read(file: Path) -> str:
    from .types import PromptError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read ({error}): expected a UTF-8 text file") from error


def _lines(text: str, what: str) -> list[str]:
    from .types import PromptError

    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise PromptError(f"{what} holds no prompts: expected one a line")
    return lines


def _records(frame: Any) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records", double_precision=10))


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """NaN and infinity have no place in JSON: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(frame: Any, columns: list[str], title: str) -> None:
    table = Table(title=_escape(title), title_justify="left", show_lines="text" in columns)
    for name in columns:
        side: Literal["left", "right"] = "right" if frame[name].dtype.kind in "fi" else "left"
        table.add_column(name.replace("_", " "), justify=side, overflow="fold")
    for _, row in frame.iterrows():
        table.add_row(*(_cell(row, name) for name in columns))
    out.print(table)


def _cell(row: Any, name: str) -> str:
    from .intervals import interval_text

    value = row[name]
    if isinstance(value, float) and (math.isnan(value) or f"{name}_low" in row):
        return interval_text(row, name)
    return f"{value:.3g}" if isinstance(value, float) else _escape(str(value))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _say(text: str) -> None:
    err.print(_escape(text), soft_wrap=True, highlight=False)
