"""What the pages show, computed: no page is drawn here, so scripts and tests can call it."""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..decoding import continuation_nll, stream
from ..detect import Detector, shipped_for
from ..directions import ContentVectors, random_vectors
from ..evaluate import DetectorComparison
from ..files import cache_folder
from ..intervals import bootstrap_mean
from ..models import fingerprint
from ..plans import SteeringPlan
from ..prompts import BUILT_IN, DATA_VARIABLE, PromptSet, load_prompts
from ..public_sets import PUBLIC_SETS, cached_path, public_sets
from ..residuals import ResidualCache, residual_streams
from ..steer import Continued, divergence, steering_plan
from ..sweep import repeated_4grams
from ..tokens import named_position, named_template
from ..types import FileError, OptionError, ResidualModel

ROWS = ("unsteered", "steered", "random direction")
"""How the rows of a steered batch are called, in order."""


@dataclass(frozen=True)
class Reading:
    """One prompt as a detector reads it, with the residual streams that it was read from."""

    cache: ResidualCache
    detector: Detector
    score: float
    probability: float
    verdict: str

    @property
    def text(self) -> str:
        return self.cache.prompts.texts[0]


@dataclass(frozen=True)
class Strength:
    """What the controls of the page say: one layer, one operator, one multiplier."""

    layer: int
    operator: str = "add"
    multiplier: float = 2.0
    positions: str = "all"


@dataclass(frozen=True)
class Run:
    """Results on disk: a folder that `lens-safety study` or `lens-safety sweep` wrote."""

    name: str
    kind: str
    folder: Path
    settings: dict[str, Any]


def own_detector(model: ResidualModel, train: ResidualCache) -> Detector:
    """The detector that comes with the package where it belongs to the model, else one fitted on `train`."""
    return shipped_for(model) or Detector.fit(train)


def read_set(model: ResidualModel, prompts: PromptSet, position: str, template: str) -> ResidualCache:
    """Residual streams of all layers, from the user's cache folder where they are there."""
    return residual_streams(
        model,
        prompts,
        position=named_position(position),
        template=named_template(template),
        store=cache_folder() / "residuals",
        progress=False,
    )


def read_prompt(model: ResidualModel, text: str, detector: Detector) -> Reading:
    """Score, probability and verdict of one prompt, from one pass through the model.

    Raises:
        PromptError: an empty prompt, or one longer than the context.
        MismatchError: a detector of another model.
    """
    detector.verify(model)
    cache = residual_streams(
        model,
        [text],
        position=named_position(detector.position),
        template=named_template(detector.template),
        progress=False,
    )
    score = detector.score(cache)
    return Reading(
        cache=cache,
        detector=detector,
        score=float(score[0]),
        probability=float(detector.probability(score)[0]),
        verdict=detector.verdicts(score)[0],
    )


def steered_plans(
    model: ResidualModel, vectors: ContentVectors, strength: Strength, *, seed: int = 0
) -> list[SteeringPlan]:
    """The plans of `ROWS`: nothing, the direction, and a random direction of the same norm."""
    control = random_vectors(vectors, seed=seed)
    rows = [(vectors, 0.0), (vectors, strength.multiplier), (control, strength.multiplier)]
    return [
        steering_plan(
            model,
            one,
            layers=[strength.layer],
            multiplier=multiplier,
            operator=strength.operator,
            positions=strength.positions,
        )
        for one, multiplier in rows
    ]


def written(
    model: ResidualModel, text: str, plans: Sequence[SteeringPlan], *, max_new_tokens: int = 40
) -> Generator[list[str], None, None]:
    """After each token the texts so far, a row for each plan, all in one batch."""
    texts = [""] * len(plans)
    pieces = stream(model, [text] * len(plans), max_new_tokens=max_new_tokens)
    # Closed here, so that a page that is left in the middle leaves the model as it was.
    with SteeringPlan.stack(plans).on(model), closing(pieces):  # type: ignore[type-var]
        for new in pieces:
            texts = [before + piece for before, piece in zip(texts, new, strict=True)]
            yield texts


def damage(
    model: ResidualModel,
    text: str,
    texts: Sequence[str],
    plans: Sequence[SteeringPlan],
    neutral: Sequence[Continued],
    detector: Detector,
) -> pd.DataFrame:
    """A row for each of `ROWS`: what its text is like, and what the steering costs.

    `kl` with `kl_low` and `kl_high`, the 95% interval over the neutral prompts (0 unsteered); `nll`, nats
    a token of the text under the unsteered model; `repeated_4grams`, a share; `score` of the detector for
    the text alone. NaN for what an empty text does not have.
    """
    kl = [np.zeros(len(neutral)), *divergence(model, plans[1:], neutral)]
    nll = continuation_nll(model, [text] * len(texts), texts)
    rows = [
        {
            "text": name,
            **bootstrap_mean(row).columns("kl"),
            "nll": float(loss),
            "repeated_4grams": repeated_4grams(made),
            "score": _score(model, detector, made),
        }
        for name, row, loss, made in zip(ROWS, kl, nll, texts, strict=True)
    ]
    return pd.DataFrame(rows)


def drawn(prompts: PromptSet, most: int, *, seed: int = 0) -> PromptSet:
    """At most about `most` prompts in their order: whole groups, drawn at random."""
    if len(prompts) <= most:
        return prompts
    groups = prompts.groups
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    sizes = np.bincount(groups)[order].cumsum()
    return prompts[np.isin(groups, order[: max(1, int((sizes <= most).sum()))])]


def set_names(*, both_classes: bool = False) -> list[str]:
    """The sets that can be read without a network: built-in ones, then public ones that are here."""
    built_in = [name for name in BUILT_IN if not both_classes or _is_labelled(name)]
    public = [entry for name, entry in PUBLIC_SETS.items() if is_here(name)]
    return built_in + [e.name for e in public if not both_classes or 0 < e.dangerous < e.rows]


def is_here(name: str) -> bool:
    """Whether a public set's file lies in the data folder or in the user's cache."""
    folder = os.environ.get(DATA_VARIABLE)
    beside = [Path(folder) / f"{name}.jsonl"] if folder else []
    return any(path.is_file() for path in [*beside, cached_path(name)])


def set_table() -> pd.DataFrame:
    """Every set: `name`, `prompts`, `labels`, `categories`, `languages`, `licence`, `address`, `here`."""
    rows = [_built_in_row(name) for name in BUILT_IN]
    public = public_sets().rename(columns={"rows": "prompts"})
    public["here"] = [is_here(name) for name in public["name"]]
    columns = ["name", "prompts", "labels", "licence", "address", "here"]
    return pd.concat([pd.DataFrame(rows), public.loc[:, columns]])


def runs_on_disk(root: Path) -> tuple[list[Run], list[str]]:
    """(studies and sweeps below a folder, by name; a sentence for each file that cannot be read)."""
    runs, broken = [], []
    for kind in ("study", "sweep"):
        for path in sorted(root.rglob(f"{kind}.json")):
            name = str(path.parent.relative_to(root)) if path.parent != root else root.name
            try:
                settings = json.loads(path.read_text(encoding="utf-8")) if kind == "study" else {}
                if not isinstance(settings, dict) or not (path.parent / _TABLE[kind]).is_file():
                    raise FileError(f"no {_TABLE[kind]} beside it")
                runs.append(Run(name, kind, path.parent, settings))
            except (OSError, ValueError) as error:
                broken.append(f"{path} cannot be read ({error}): make it again")
    return runs, broken


def run_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row a study: what it was fitted on and chose."""

    def row(run: Run) -> dict[str, Any]:
        of = run.settings
        return {
            "run": run.name,
            "model": _inside(of, "model", "name"),
            "fitted on": _inside(of, "train", "name"),
            "n": _inside(of, "train", "n"),
            **{
                name: of.get(name) for name in ("method", "position", "layer", "threshold", "seed", "seconds")
            },
        }

    return pd.DataFrame([row(run) for run in runs])


def detection_of(runs: Sequence[Run]) -> DetectorComparison:
    """The detectors of several studies under each other; with several, each is named with its run.

    Raises:
        FileError: a table that is damaged or holds other columns.
    """
    frames = []
    for run in runs:
        frame = read_table(run.folder / "detection.csv")
        if missing := _NEEDED - set(frame):
            raise FileError(f"{run.name}/detection.csv has no column {min(missing)}: make the study again")
        if len(runs) > 1:
            frame["detector"] = [f"{name} ({run.name})" for name in frame["detector"]]
        frames.append(frame)
    models = dict.fromkeys(str(_inside(run.settings, "model", "name")) for run in runs)
    return DetectorComparison(pd.concat(frames, ignore_index=True), ", ".join(models), seed=0)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV of results. Raises `FileError` for one that cannot be read."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a table ({error}): make it again") from error


def saved_detectors(root: Path, model: ResidualModel) -> dict[str, Detector]:
    """The detectors below a folder that belong to the model, by their path."""
    found: dict[str, Detector] = {}
    for path in sorted(root.rglob("*detector*.safetensors")):
        try:
            detector = Detector.load(path)
        except (FileError, OptionError):
            # Of another kind or version: `Compare` is where a broken file is named.
            continue
        if not detector.model.difference(fingerprint(model)):
            found[str(path.relative_to(root))] = detector
    return found


_NEEDED = {"detector", "set", "by", "type", "n_safe", "n_dangerous", "majority"} | {
    f"{name}{end}" for name in ("auroc", "accuracy") for end in ("", "_low", "_high")
}
_TABLE = {"study": "detection.csv", "sweep": "sweep.csv"}


@cache
def _built_in_row(name: str) -> dict[str, Any]:
    one = load_prompts(name)
    n = sum(prompt.label is True for prompt in one)
    return {
        "name": name,
        "prompts": len(one),
        "labels": f"{n} dangerous, {len(one) - n} safe" if one.is_labelled else "none",
        "categories": len({p.category for p in one if p.category}),
        "languages": ", ".join(dict.fromkeys(p.language for p in one)),
        "licence": "MIT",
        "address": "built in",
        "here": True,
    }


@cache
def _is_labelled(built_in: str) -> bool:
    return load_prompts(built_in).is_labelled


def _score(model: ResidualModel, detector: Detector, text: str) -> float:
    return float(detector.score([text], model=model, truncate=True)[0]) if text.strip() else float("nan")


def _inside(settings: dict[str, Any], part: str, name: str) -> Any:
    found = settings.get(part)
    return found.get(name) if isinstance(found, dict) else None
