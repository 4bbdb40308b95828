"""Question: how many labels does it take, from 25 to 200?

Method: detectors fitted on 25, 50, 100 and all 200 of the study's training rows, five draws each, every
choice made inside the draw; read on the 1,800 rows.
Control: the band over draws; the chance line. Three methods side by side.
Reading: a curve that still climbs at 200 says that labels, not the model, are the limit.

    python analyses/04_training_size.py [--model NAME] [--data FOLDER] [--seed 0]
"""

import pandas as pd

import lens_safety as ls
from lens_safety.detect import Method, Over
from lens_safety.session import Session, run

METHODS: tuple[tuple[Method, Over], ...] = (("two-vector", "best"), ("lda", "mean"), ("logistic", "mean"))


def main() -> None:
    session = Session.start(__file__, __doc__)
    train = session.read("persona_vector_study_train", template="raw")
    test = session.read("persona_vector_study_test", template="raw")
    curves = [
        ls.label_curve(
            train,
            test,
            sizes=(25, 50, 100, 200),
            method=method,
            over=over,
            layers=session.spread if over == "mean" else None,
        )
        for method, over in METHODS
    ]
    summaries = []
    for curve in curves:
        summary = curve.summary()
        summary.insert(0, "method", curve.method)
        summaries.append(summary)
    session.show(pd.concat(summaries), "Held-out by number of labels (mean, lowest and highest draw)")
    session.draw(ls.plots.label_curve, *curves)


if __name__ == "__main__":
    run(main)
