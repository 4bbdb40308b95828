"""Question: do other layers, weighted means, ensembles or per-category vectors beat one mean at one layer?

Method: (a) the study's variants on its own rows: every layer; inverse-distance and softmax weighted means;
all layers averaged, voting, side by side; one or three regions of the depth. (b) The authored `categories`:
fit on one harm category, test on another; and one detector a category, whose highest calibrated log odds is
the score, with one threshold or a threshold a category, against one detector for all; tested on `contrast`.
Control: the plain two-vector detector on the same rows, with McNemar's and DeLong's tests, Holm-adjusted.
Reading: a difference whose interval covers 0 is none. A category matrix with a strong diagonal only says
that categories have directions of their own; high values off it say that there is a common one.

    python analyses/05_layers_weighting_ensembles_categories.py [--model NAME] [--data FOLDER] [--seed 0]
"""

from typing import Any

import numpy as np
import pandas as pd

import lens_safety as ls
from lens_safety.metrics import best_threshold
from lens_safety.session import Session, run


def main() -> None:
    session = Session.start(__file__, __doc__)
    variants(session)
    per_category(session)


def variants(session: Session) -> None:
    """The study's variants on its own rows."""
    train = session.read("persona_vector_study_train", template="raw")
    test = session.read("persona_vector_study_test", template="raw")
    n = len(train.layers)
    tried = {
        "two-vector": ("two-vector", "best", None),
        "inverse-distance": ("inverse-distance", "best", None),
        "softmax": ("softmax", "best", None),
        "two-vector, mean of all layers": ("two-vector", "mean", None),
        "two-vector, vote of all layers": ("two-vector", "vote", None),
        "two-vector, early third": ("two-vector", "mean", train.layers[: n // 3]),
        "two-vector, middle third": ("two-vector", "mean", train.layers[n // 3 : 2 * n // 3]),
        "two-vector, late third": ("two-vector", "mean", train.layers[2 * n // 3 :]),
        "logistic": ("logistic", "best", None),
        "logistic, mean of all layers": ("logistic", "mean", None),
        "logistic, vote of all layers": ("logistic", "vote", None),
        "logistic, all layers side by side": ("logistic", "concat", None),
    }
    reports = [
        (name, ls.evaluate(ls.Detector.fit(train, method=m, over=o, layers=at, seed=session.seed), test))
        for name, (m, o, at) in tried.items()
    ]
    shown = ["detector", "accuracy", "auroc", "tpr", "fpr"]
    session.show(ls.compare(reports).overall, "Weighting and ensembles, 1,800 rows", columns=shown)
    tests = ls.paired_tests(reports).frame
    session.show(tests.loc[tests["first"] == "two-vector"], "Against the plain two-vector detector", "paired")
    layers = [
        {"layer": layer}
        | ls.evaluate(detector, test).auroc.columns("auroc")
        | {"auroc_cv": detector.auroc_cv}
        for layer in (-1, *train.layers)
        for detector in [ls.Detector.fit(train, layers=[layer], seed=session.seed)]
    ]
    session.show(pd.DataFrame(layers), "Every layer (two-vector)", "layers")


def per_category(session: Session) -> None:
    """A direction for all, or one a category?"""
    train, test = session.read("categories"), session.read("contrast")
    matrix = ls.category_matrix(train, layers=session.spread, seed=session.seed)
    session.show(matrix.frame, "Fit on one category, test on another", "category_matrix")
    session.draw(ls.plots.transfer_matrix, matrix, name="category_matrix")
    of = np.array([prompt.category for prompt in train.prompts])
    labels = train.prompts.labels
    names = [str(name) for name in np.unique(of)]
    options: dict[str, Any] = {"method": "logistic", "layers": session.spread, "seed": session.seed}
    experts = [ls.Detector.fit(train[(of == name) | ~labels], **options) for name in names]
    odds = np.stack([log_odds(expert, test) for expert in experts])
    # Thresholds come from the training set, where each expert's own are out of fold.
    own_cuts = np.array([log_odds_of(expert, np.array([expert.threshold]))[0] for expert in experts])
    pooled = ls.Detector.fit(train, **options)
    inside = np.stack([log_odds(expert, train) for expert in experts]).max(axis=0)
    reports = [
        ("one detector for all", ls.evaluate(pooled, test)),
        (
            "highest of the categories, one threshold",
            report(odds.max(axis=0), test, best_threshold(inside, labels)),
        ),
        ("a threshold a category", report((odds - own_cuts[:, None]).max(axis=0), test, 0.0)),
    ]
    shown = ["detector", "accuracy", "auroc", "tpr", "fpr"]
    session.show(ls.compare(reports).overall, "Fitted on categories, tested on contrast", "experts", shown)


def log_odds(expert: ls.Detector, cache: ls.ResidualCache) -> np.ndarray:
    return log_odds_of(expert, expert.score(cache))


def log_odds_of(expert: ls.Detector, scores: np.ndarray) -> np.ndarray:
    p = np.clip(expert.probability(scores), 1e-9, 1 - 1e-9)
    return np.log(p / (1 - p))


def report(scores: np.ndarray, test: ls.ResidualCache, threshold: float) -> ls.DetectionReport:
    return ls.report_scores(
        scores, test.prompts, threshold=threshold, detector="category experts", model=test.model.name
    )


if __name__ == "__main__":
    run(main)
