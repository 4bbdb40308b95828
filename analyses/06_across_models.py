"""Question: do the findings hold in another model family?

Method: for one model: its best layer (and relative depth), two-vector and LDA detectors on the study's
rows, on the authored sets and on XSTest, every choice inside the training set. Run once a model; each run
prints its own rows beside those of the models that were run before.
Control: TF-IDF on the same sets, which is the same for every model.
Reading: what holds in one family only is about that model, not about danger.

    python analyses/06_across_models.py [--model NAME] [--data FOLDER] [--seed 0]
    python analyses/06_across_models.py --model gemma-3-270m      # after `make gemma`
"""

import pandas as pd

import lens_safety as ls
from lens_safety.detect import Method, Over
from lens_safety.session import Session, run

TESTS = {
    "persona_vector_study_train": ("persona_vector_study_test",),
    "content": ("validation", "adversarial"),
    "instructions": ("requests_val", "xstest"),
    "contrast": ("xstest",),
}
METHODS: tuple[tuple[Method, Over], ...] = (("two-vector", "best"), ("lda", "mean"))


def main() -> None:
    session = Session.start(__file__, __doc__)
    rows, reports = [], []
    for train_name, tests in TESTS.items():
        template = "raw" if train_name.startswith("persona_vector") else "auto"
        train = session.read(train_name, template=template)
        caches = [session.read(name, template=template) for name in tests]
        words = ls.TextBaseline.fit(train.prompts, seed=session.seed)
        reports += [(f"TF-IDF, fitted on {train_name}", words.report(cache.prompts)) for cache in caches]
        for method, over in METHODS:
            layers = session.spread if over == "mean" else None
            detector = ls.Detector.fit(train, method=method, over=over, layers=layers, seed=session.seed)
            about = {"model": session.model_name, "method": f"{method}, {over}", "train": train_name}
            depth = detector.layer / (train.model.n_layers - 1) if over == "best" else float("nan")
            for cache in caches:
                report = ls.evaluate(detector, cache)
                reports.append((f"{method}, {over}, fitted on {train_name}", report))
                row = about | {"test": cache.prompts.name, "n": report.n, "relative_depth": depth}
                for name in ("accuracy", "auroc", "tpr", "fpr"):
                    row |= report.estimate(name).columns(name)
                row |= words.report(cache.prompts).auroc.columns("tfidf_auroc")
                rows.append(row)
    path = session.show(pd.DataFrame(rows), f"{session.model_name}", columns=list(rows[0]))
    others = [pd.read_csv(other) for other in sorted(path.parent.glob("06_across_models.*.csv"))]
    wide = pd.concat(others).pivot(index=["train", "test", "method"], columns="model", values="auroc")
    print(wide.round(3).to_string())
    ls.compare(reports).save(session.path("", "json"))
    saved = sorted(path.parent.glob("06_across_models.*.json"))
    session.save_figure(ls.plots.models_side_by_side(*map(ls.DetectorComparison.load, saved)))


if __name__ == "__main__":
    run(main)
