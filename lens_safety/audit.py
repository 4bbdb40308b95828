"""Audits: how much of a detector is style, what carries over to other prompts, how many labels it takes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .baselines import WORDINGS, TextBaseline, shuffled
from .detect import Detector, Over
from .directions import ContentVectors, content_vectors
from .evaluate import DetectionReport, evaluate, report_scores
from .files import Result
from .intervals import Estimate, bootstrap, group_weights, proportion
from .metrics import auroc, weighted_auroc
from .prompts import PromptSet
from .residuals import ResidualCache
from .scorers import Method
from .show import card, pick
from .store import Store
from .types import EMBED, Labels, MismatchError, OptionError, PromptError, ResidualModel

Rewording = Callable[[str, np.random.Generator], str]

MASK = "something"
DANGER_STEMS = (
    r"abus|attack|bomb|blackmail|burn|cheat|cocaine|crack|drug|explod|exploit|explosi|extort|fake|"
    r"forge(?!t)|forging|fraud|gun|hack|harass|hate|heroin|hijack|hurt|kidnap|kill|launder|malware|meth\b|"
    r"methamph|murder|overdos|phish|poison|rape|ransom|robs?\b|robb|scam|shoot|smuggl|spy|stabs?\b|stabb|"
    r"stalk|steal|stole|suicid|terror|threat|torture|traffick|virus|weapon"
)
"""Beginnings of words that sound of danger, for the audit that masks them; not those of "forget", "robot"."""


@dataclass(frozen=True)
class ShortcutAudit(Result):
    """How much of a detector's score is style: a row for each comparison on the same held-out prompts.

    `kind` is "detector", "baseline" (other scorers fitted on the same training prompts) or "rewording"
    (the same detector on changed texts). Columns: `auroc`, `accuracy`, `tpr`, `fpr` with intervals;
    `gap`: the detector's AUROC - this row's; `rank_correlation` (Spearman) with the detector's scores
    on the unchanged texts.
    """

    frame: pd.DataFrame
    detector: str
    source: str
    model: str
    n: int
    seed: int

    def _repr_html_(self) -> str:
        return card(
            f"How much of {self.detector} is style: {self.source}, {self.n} prompts, {self.model}",
            pick(self.frame, "kind", "name", "auroc", "gap", "rank_correlation", "tpr", "fpr"),
            "ls.plots.shortcut_audit(audit)",
            note="gap: the detector's AUROC less this row's",
        )


@dataclass(frozen=True)
class TransferMatrix(Result):
    """AUROC of a detector fitted on one set (rows) and tested on another (columns).

    Columns: `train`, `test`, `inside` (True on the diagonal, where the AUROC is cross-validated),
    `auroc` with interval, `accuracy` at the frozen threshold, `n_train`, `n_test`, `overlap` (test texts
    that stand in the training set and were left out). `train` "all but X" is the leave-one-set-out row.
    """

    frame: pd.DataFrame
    method: str
    model: str
    seed: int

    def matrix(self, value: str = "auroc") -> pd.DataFrame:
        """Training sets down, test sets across."""
        names = list(dict.fromkeys(self.frame["train"])), list(dict.fromkeys(self.frame["test"]))
        wide = self.frame.pivot(index="train", columns="test", values=value)
        return wide.reindex(index=names[0], columns=names[1])

    def _repr_html_(self) -> str:
        return card(
            f"Trained on one set, tested on another: {self.method}, {self.model}",
            pick(self.frame, "train", "test", "inside", "auroc", "accuracy", "n_train", "n_test"),
            "ls.plots.transfer_matrix(matrix)",
            note="inside: cross-validated in the training set itself",
        )


@dataclass(frozen=True)
class LabelCurve(Result):
    """Held-out AUROC and accuracy against the number of training labels.

    One row for each size and seed: `labels`, `seed`, `auroc`, `accuracy`, `detector` (method and layers).
    `summary()` has the mean and the band (lowest and highest seed) of each size.
    """

    frame: pd.DataFrame
    method: str
    train: str
    test: str
    model: str
    n_test: int

    def summary(self) -> pd.DataFrame:
        """A row a size: mean, `_low` and `_high` (lowest and highest of the seeds) of both measures."""
        rows = []
        for size, part in self.frame.groupby("labels", sort=True):
            row: dict[str, float] = {"labels": int(str(size)), "seeds": len(part)}
            for name in ("auroc", "accuracy"):
                values = part[name].to_numpy()
                row |= Estimate(values.mean(), values.min(), values.max(), len(part)).columns(name)
            rows.append(row)
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return card(
            f"{self.method} fitted on more and more labels of {self.train}, {self.model}, tested on "
            f"{self.n_test} prompts of {self.test}",
            pick(self.summary(), "labels", "seeds", "auroc", "accuracy"),
            "ls.plots.label_curve(curve)",
            note="mean, and the lowest and highest seed",
        )


@dataclass(frozen=True)
class ToneContent(Result):
    """Tone and content directions side by side.

    `frame`, a row a layer: `cosine` of the two directions, `null_low` and `null_high` (the middle 95% of
    the cosine when the content labels are shuffled), and the AUROC of the content direction on the test
    prompts, `auroc`, and after the tone direction is projected out, `auroc_without_tone`. `cells`: the
    2 x 2 table at the detector's layer, a row for each tone and label: `tone`, `label`, `n`, mean
    `score`, `flagged` (share above the threshold, with interval), before and after (`_without_tone`).
    """

    frame: pd.DataFrame
    cells: pd.DataFrame
    layer: int
    source: str
    model: str
    seed: int

    def _repr_html_(self) -> str:
        names = ("score", "flagged")
        return card(
            f"Tone and content at layer {self.layer}: {self.source}, {self.model}",
            pick(self.cells, "tone", "label", "n", *names, *(f"{name}_without_tone" for name in names)),
            "ls.plots.tone_cells(tone)",
            note="without tone: after the tone direction is projected out",
        )


def shortcut_audit(
    detector: Detector,
    cache: ResidualCache,
    *,
    train: ResidualCache,
    model: ResidualModel | None = None,
    n_resamples: int = 500,
    store: Store | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ShortcutAudit:
    """Ask how much of a detector's score on held-out prompts is style.

    Baselines fitted on `train` (which must be what the detector was fitted on): TF-IDF, naive Bayes,
    length, and the detector's method on the embedding layer. With `model`, the detector reads changed
    texts too: words in random order, danger words masked, and politely and rudely framed. A detector of
    meaning has a wide gap to the baselines, falls when words are shuffled, and does not move with tone.
    Changed texts are looked up in `store`, as by `residual_streams`.

    Raises:
        MismatchError: `train` is not what the detector was fitted on.
        PromptError, MismatchError: what `evaluate` refuses.
    """
    if train.prompts.text_digests != detector.fitted_on:
        raise MismatchError(
            f"train={train.prompts.name} given, but the detector was fitted on {detector.source}: expected "
            "the same prompts, so that the baselines have seen what it has seen"
        )
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    own = evaluate(detector, cache, **options)
    rows = [("detector", "as it is", own)]
    for kind in WORDINGS:
        baseline = TextBaseline.fit(train.prompts, kind, seed=seed)  # type: ignore[arg-type]
        rows.append(("baseline", WORDINGS[kind], baseline.report(cache.prompts, **options)))
    if detector.method != "tone":
        embed = Detector.fit(train, method=detector.method, layers=[EMBED], seed=seed)  # type: ignore[arg-type]
        rows.append(("baseline", "embedding layer", evaluate(embed, cache, **options)))
    for name, change in REWORDINGS.items() if model is not None else ():
        prompts = reworded(cache.prompts, change, seed=seed)
        scores = detector.score(prompts, model=model, truncate=True, store=store, progress=progress)
        report = report_scores(
            scores,
            prompts,
            threshold=detector.threshold,
            detector=detector.name,
            model=detector.model.name,
            **options,
        )
        rows.append(("rewording", name, report))
    frame = pd.DataFrame([_audit_row(kind, name, report, own) for kind, name, report in rows])
    return ShortcutAudit(frame, own.detector, own.source, own.model, own.n, seed)


def reworded(prompts: PromptSet, change: Rewording, *, seed: int = 0) -> PromptSet:
    """The same prompts, labels and groups with changed texts."""
    rng = np.random.default_rng(seed)
    return replace(prompts, prompts=tuple(replace(p, text=change(p.text, rng)) for p in prompts))


def shuffle_words(text: str, rng: np.random.Generator) -> str:
    """The words in random order; a bag of words stays what it was."""
    return " ".join(rng.permutation(text.split()).tolist())


def mask_danger_words(text: str, rng: np.random.Generator) -> str:
    """Each word that begins like one of `DANGER_STEMS` becomes "something"."""
    return _DANGER.sub(MASK, text)


def polite(text: str, rng: np.random.Generator) -> str:
    """The same request between kind words."""
    return f"Hello, I hope you are well. {text} Thank you so much for your kind help!"


def rude(text: str, rng: np.random.Generator) -> str:
    """The same request between unkind words."""
    return f"Listen, you stupid machine. {text} And hurry up, I am sick of your nonsense!"


_DANGER = re.compile(rf"\b(?:{DANGER_STEMS})\w*", re.IGNORECASE)
REWORDINGS: dict[str, Rewording] = {
    "words shuffled": shuffle_words,
    "danger words masked": mask_danger_words,
    "polite frame": polite,
    "rude frame": rude,
}


def transfer_matrix(
    caches: Mapping[str, ResidualCache] | Sequence[ResidualCache],
    *,
    method: Method = "logistic",
    over: Over = "best",
    layers: Sequence[int] | None = None,
    leave_one_out: bool = True,
    n_resamples: int = 500,
    seed: int = 0,
) -> TransferMatrix:
    """Fit on each set, test on each, and (`leave_one_out`) fit on all other sets together.

    On the diagonal the AUROC is that of out-of-fold scores inside the set, which flatters: layers and
    strengths were chosen by it. Everywhere else nothing of the test set was seen; its texts that stand in
    the training set too are left out. A set with one class only is tested on and not fitted on.

    Raises:
        OptionError: fewer than two sets, or two of the same name.
        PromptError: a set without labels or too small to fit on, or no set with both classes.
    """
    named = _named(caches)
    rows = []
    for train_name, train, tests in _fitted_and_tested(named, leave_one_out and len(named) > 2):
        if not _both_classes(train.prompts.labels):
            continue
        detector = Detector.fit(train, method=method, over=over, layers=layers, seed=seed)
        for test_name, test in tests.items():
            shown = {"train": train_name, "test": test_name, "n_train": len(train)}
            rows.append(shown | _transfer_cell(detector, train, test, n_resamples, seed))
    if not rows:
        raise PromptError(
            f"{', '.join(named)} have one class only each: expected a set with safe and dangerous prompts"
        )
    model = next(iter(named.values())).model.name
    return TransferMatrix(pd.DataFrame(rows), f"{method}, {over}", model, seed)


def category_matrix(
    cache: ResidualCache,
    *,
    method: Method = "logistic",
    over: Over = "best",
    layers: Sequence[int] | None = None,
    n_resamples: int = 500,
    seed: int = 0,
) -> TransferMatrix:
    """The transfer matrix of the harm categories of one set: fit on one, test on another.

    Categories with one class only are left out. Raises `OptionError` where fewer than two remain.
    """
    of = np.array([prompt.category for prompt in cache.prompts])
    labels = cache.prompts.labels
    parts: dict[str, ResidualCache] = {}
    for name in dict.fromkeys(of.tolist()):
        if name and _both_classes(labels[of == name]):
            part = cache[of == name]
            parts[name] = replace(part, prompts=replace(part.prompts, name=name))
    if len(parts) < 2:
        raise OptionError(
            f"{cache.prompts.name} has {len(parts)} categories with safe and dangerous prompts: expected at "
            "least two; the field `category` names them"
        )
    return transfer_matrix(parts, method=method, over=over, layers=layers, n_resamples=n_resamples, seed=seed)


def label_curve(
    train: ResidualCache,
    test: ResidualCache,
    *,
    sizes: Sequence[int] = (10, 25, 50, 100, 200),
    seeds: int = 5,
    method: Method = "two-vector",
    over: Over = "best",
    layers: Sequence[int] | None = None,
) -> LabelCurve:
    """Held-out AUROC and accuracy of detectors fitted on more and more of the training prompts.

    For each size and seed, half of that many prompts of each class are drawn in random order of groups
    (a group whole before the next begins); the largest size is all prompts. Sizes above that, and those
    for which a class has too few prompts, are left out.

    Raises:
        OptionError: a size below 10, or fewer than 10 training prompts.
        PromptError: a prompt without a label, or one that stands in both sets.
    """
    if not sizes or min(*sizes, len(train)) < 10:
        raise OptionError(
            f"sizes={tuple(sizes)} and {len(train)} training prompts given: expected at least 10 labels, "
            "five of each class"
        )
    seen = len(set(train.prompts.texts) & set(test.prompts.texts))
    if seen:
        raise PromptError(
            f"{seen} prompts of {test.prompts.name} stand in {train.prompts.name}: expected held-out prompts"
        )
    dangerous = int(train.prompts.labels.sum())
    halves = {size: (size // 2, (size + 1) // 2) for size in sizes}
    served = [size for size, (a, b) in halves.items() if a <= len(train) - dangerous and b <= dangerous]
    chosen = sorted({*served, len(train)})
    rows = []
    for size in chosen:
        for seed in range(1 if size == len(train) else seeds):
            part = train if size == len(train) else train[_draw(train.prompts, size, seed)]
            folds = max(2, min(5, part.prompts.groups_of_rarer_class))
            detector = Detector.fit(part, method=method, over=over, layers=layers, folds=folds, seed=seed)
            scores = detector.score(test)
            right = (scores > detector.threshold) == test.prompts.labels
            rows.append(
                {
                    "labels": len(part),
                    "seed": seed,
                    "auroc": auroc(scores, test.prompts.labels),
                    "accuracy": float(right.mean()),
                    "detector": detector.name,
                }
            )
    return LabelCurve(
        pd.DataFrame(rows),
        f"{method}, {over}",
        train.prompts.name,
        test.prompts.name,
        train.model.name,
        len(test),
    )


def tone_content(
    train: ResidualCache,
    tone: ContentVectors,
    test: ResidualCache,
    *,
    n_shuffles: int = 200,
    seed: int = 0,
) -> ToneContent:
    """Are tone and content one direction, and does detection need the tone?

    At each layer: the cosine of the tone and the content direction against the cosines that the same
    prompts give with shuffled labels; and the AUROC on `test` of the content direction (one-vector),
    before and after the tone direction u is projected out of every row, h - (h . u) u. Then, at the layer
    that `train` chooses, the 2 x 2 table of `test` by tone and label: `test` holds prompts of the kinds
    "polite" and "rude" (the built-in `contrast`).

    Raises:
        PromptError: no prompts of the kinds "polite" and "rude" in `test`, or a label missing.
        MismatchError: caches and vectors of different models, layers, positions or templates.
    """
    kinds = np.array(test.prompts.kinds)
    toned = np.isin(kinds, ("polite", "rude"))
    if not all((kinds == kind).any() for kind in ("polite", "rude")):
        raise PromptError(
            f"{test.prompts.name} has no prompts of the kinds 'polite' and 'rude': expected both, as in the "
            "built-in set contrast"
        )
    _require_alike(train, tone)
    _require_alike(train, test)
    content = content_vectors(train)
    unit = tone.unit[[tone.row(layer) for layer in train.layers]]
    projected, test_projected = without_direction(train, unit), without_direction(test, unit)
    cosines = content.cosine(tone).astype(np.float64)
    null = np.stack([_shuffled_cosine(train, unit, seed + i) for i in range(n_shuffles)])
    frame = pd.DataFrame(
        {
            "layer": train.layers,
            "cosine": cosines,
            "null_low": np.percentile(null, 2.5, axis=0),
            "null_high": np.percentile(null, 97.5, axis=0),
            "auroc": _auroc_by_layer(content, test),
            "auroc_without_tone": _auroc_by_layer(content_vectors(projected), test_projected),
        }
    )
    detector = Detector.fit(train, method="one-vector", seed=seed)
    bare = Detector.fit(projected, method="one-vector", layers=[detector.layer], seed=seed)
    reports = evaluate(detector, test[toned], seed=seed), evaluate(bare, test_projected[toned], seed=seed)
    cells = [_cell(reports, kind, label) for kind in ("polite", "rude") for label in (False, True)]
    return ToneContent(frame, pd.DataFrame(cells), detector.layer, test.prompts.name, train.model.name, seed)


def without_direction(cache: ResidualCache, unit: Float[Tensor, "layer d_model"]) -> ResidualCache:
    """h - (h . u) u at each layer: the residual streams without what they have along a direction."""
    along = torch.einsum("lpd,ld->lp", cache.resid, unit)
    return replace(cache, resid=cache.resid - along[:, :, None] * unit[:, None, :])


def joined(caches: Sequence[ResidualCache], name: str) -> ResidualCache:
    """Several sets as one; of texts that stand in several the first is taken.

    Raises `MismatchError` for caches of different models, layers, positions or templates, `OptionError`
    for none.
    """
    if not caches:
        raise OptionError("no caches given to join: expected at least one")
    first = caches[0]
    for cache in caches[1:]:
        _require_alike(first, cache)
    prompts = [prompt for cache in caches for prompt in cache.prompts]
    rows = sorted({prompt.text: row for row, prompt in reversed(list(enumerate(prompts)))}.values())
    whole = replace(
        first,
        resid=torch.cat([cache.resid for cache in caches], dim=1),
        embed=torch.cat([cache.embed for cache in caches]),
        prompts=PromptSet(tuple(prompts), name),
    )
    return whole[np.array(rows)]


def _require_alike(first: ResidualCache, other: ResidualCache | ContentVectors) -> None:
    name = other.source if isinstance(other, ContentVectors) else other.prompts.name
    other.model.require(first.model, f"what was read of {name}")
    # Vectors may have more layers: they are taken by number.
    same = ("position", "template") + (() if isinstance(other, ContentVectors) else ("layers",))
    for what in same:
        if getattr(other, what) != getattr(first, what):
            raise MismatchError(
                f"{first.prompts.name} and {name} with different {what} given ({getattr(first, what)}, "
                f"{getattr(other, what)}): expected the same"
            )


def _audit_row(kind: str, name: str, report: DetectionReport, own: DetectionReport) -> dict[str, Any]:
    from scipy.stats import spearmanr

    row: dict[str, Any] = {"kind": kind, "name": name}
    for measure in ("auroc", "accuracy", "tpr", "fpr"):
        row |= report.estimate(measure).columns(measure)
    varied = len(set(report.scores)) > 1 and len(set(own.scores)) > 1
    correlation = float(np.asarray(spearmanr(report.scores, own.scores))[0]) if varied else float("nan")
    return row | {"gap": own.auroc.value - report.auroc.value, "rank_correlation": correlation}


def _named(caches: Mapping[str, ResidualCache] | Sequence[ResidualCache]) -> dict[str, ResidualCache]:
    if isinstance(caches, Mapping):
        named = dict(caches)
    else:
        named = {cache.prompts.name: cache for cache in caches}
        if len(named) < len(caches):
            raise OptionError("two sets of the same name given: expected a dict of name -> cache")
    if len(named) < 2:
        raise OptionError(f"{len(named)} sets given: expected at least two")
    return named


def _fitted_and_tested(
    named: dict[str, ResidualCache], leave_one_out: bool
) -> Iterator[tuple[str, ResidualCache, dict[str, ResidualCache]]]:
    """Each set with all sets to test on, then all sets but one with that one; joined one at a time."""
    for name, cache in named.items():
        yield name, cache, named
    for left_out, cache in named.items() if leave_one_out else ():
        name = f"all but {left_out}"
        yield name, joined([c for n, c in named.items() if n != left_out], name), {left_out: cache}


def _both_classes(labels: Labels) -> bool:
    return bool(labels.any() and not labels.all())


def _transfer_cell(
    detector: Detector, train: ResidualCache, test: ResidualCache, n_resamples: int, seed: int
) -> dict[str, Any]:
    if train is test:
        value = Estimate(detector.auroc_cv, float("nan"), float("nan"), len(train))
        return {"inside": True, **value.columns("auroc"), "accuracy": detector.accuracy_cv} | {
            "n_test": len(test),
            "overlap": 0,
        }
    seen = set(train.prompts.texts)
    fresh = np.array([text not in seen for text in test.prompts.texts])
    if not fresh.any():
        raise PromptError(
            f"every prompt of {test.prompts.name} stands in {train.prompts.name}: expected different sets"
        )
    held_out = test[fresh]
    scores, labels = detector.score(held_out), held_out.prompts.labels
    weights = group_weights(held_out.prompts.groups, n_resamples=n_resamples, seed=seed)
    made = bootstrap(lambda w: weighted_auroc(scores, labels, w), weights)
    right = float(((scores > detector.threshold) == labels).mean())
    return {"inside": False, **made.columns("auroc"), "accuracy": right} | {
        "n_test": len(held_out),
        "overlap": int((~fresh).sum()),
    }


def _draw(prompts: PromptSet, size: int, seed: int) -> np.ndarray:
    """Rows: size / 2 of each class, group after group in random order."""
    labels, groups = prompts.labels, prompts.groups
    order = np.random.default_rng(seed).permutation(groups.max() + 1)[groups]
    ranked = np.argsort(order, kind="stable")
    taken = [ranked[labels[ranked] == label][: (size + int(label)) // 2] for label in (False, True)]
    return np.sort(np.concatenate(taken))


def _shuffled_cosine(train: ResidualCache, unit: Tensor, seed: int) -> np.ndarray:
    return (content_vectors(shuffled(train, seed=seed)).unit * unit).sum(dim=1).double().numpy()


def _auroc_by_layer(vectors: ContentVectors, test: ResidualCache) -> list[float]:
    """AUROC of the projection on each layer's vector."""
    labels = test.prompts.labels
    along = [test.layer(layer) @ vectors.layer(layer) for layer in vectors.layers]
    return [auroc(scores.double().numpy(), labels) for scores in along]


def _cell(reports: tuple[DetectionReport, DetectionReport], kind: str, label: bool) -> dict[str, Any]:
    plain, bare = reports
    of = (np.array(plain.kinds) == kind) & (plain.labels == label)
    row: dict[str, Any] = {"tone": kind, "label": "dangerous" if label else "safe", "n": int(of.sum())}
    for report, suffix in ((plain, ""), (bare, "_without_tone")):
        flagged = proportion(int((report.scores[of] > report.threshold).sum()), int(of.sum()))
        mean = float(report.scores[of].mean()) if of.any() else float("nan")
        row |= {f"score{suffix}": mean} | flagged.columns(f"flagged{suffix}")
    return row
