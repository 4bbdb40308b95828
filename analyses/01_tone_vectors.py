"""Question: do tone vectors (a harmful against a helpful persona) detect dangerous prompts?

Method: tone vectors from one pair of personas (the study's way, threshold 0) and from all twelve, as
two-vector detectors; layer and threshold chosen on `content`, tested on `validation`, `adversarial` and the
study's own 1,800 rows. Then what they do detect: the 2 x 2 table of polite and rude, safe and dangerous
requests of `contrast`.
Control: content vectors from the same training prompts; TF-IDF, length and shuffled labels.
Reading: a tone detector whose AUROC is near or below 0.5 on `adversarial`, and that flags rude prompts
whatever they ask, detects style. The persona-vector study reports 38.5% for its tone vectors.

    python analyses/01_tone_vectors.py [--model NAME] [--data FOLDER] [--seed 0]
"""

import pandas as pd

import lens_safety as ls
from lens_safety.session import Session, run

TESTS = ("validation", "adversarial", "persona_vector_study_test")


def main() -> None:
    session = Session.start(__file__, __doc__)
    train, personas, contrast = (session.read(name) for name in ("content", "personas", "contrast"))
    one_pair = ls.content_vectors(personas[:2], method="tone, one pair")
    tone = ls.content_vectors(personas, method="tone")
    detectors = {
        "tone, 1 pair, threshold 0": ls.Detector.fit(train, method="tone", vectors=one_pair, threshold=0.0),
        "tone, 1 pair": ls.Detector.fit(train, method="tone", vectors=one_pair, seed=session.seed),
        "tone, 12 pairs": ls.Detector.fit(train, method="tone", vectors=tone, seed=session.seed),
        "content, 200 prompts": ls.Detector.fit(train, seed=session.seed),
    }
    reports = []
    for name in TESTS:
        test = session.read(name)
        reports += [(d, ls.evaluate(detector, test)) for d, detector in detectors.items()]
        reports += ls.control_reports(train, test, seed=session.seed)
    shown = ["detector", "set", "accuracy", "majority", "auroc", "tpr", "fpr"]
    comparison = ls.compare(reports)
    session.show(comparison.overall, "Tone and content vectors on held-out prompts", columns=shown)
    session.draw(ls.plots.comparison, comparison, options={"measure": "auroc"})
    rows = [
        {"detector": name} | row
        for name, detector in detectors.items()
        for row in tone_by_label(ls.evaluate(detector, contrast))
    ]
    session.show(pd.DataFrame(rows), "Share flagged, by tone and label (contrast)", "tone_by_label")


def tone_by_label(report: ls.DetectionReport) -> list[dict]:
    """Share flagged of the rude and the polite requests, safe and dangerous."""
    frame = report.frame.set_index("type")
    return [
        {"tone": tone, "safe_flagged": frame.loc[tone, "fpr"], "dangerous_flagged": frame.loc[tone, "tpr"]}
        for tone in ("polite", "rude")
    ]


if __name__ == "__main__":
    run(main)
