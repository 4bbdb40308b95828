"""Question: how much of a detector is style, and what carries over to prompts in another style?

Method: the transfer matrix (fit on each set, test on each, and fit on all but one), and the shortcut audit
of a detector fitted on ordinary prompts (`content` and `instructions`) and of one fitted on all authored
sets, on four held-out sets: `adversarial`, XSTest, the public harmful requests and the study's rows.
Control: TF-IDF, naive Bayes, length and the embedding layer, fitted on the same prompts; for the second
detector also texts with words shuffled, danger words masked, polite and rude frames.
Reading: an AUROC that a word counter reaches too is wording. A row that falls to 0.5 off the diagonal is a
set whose detector does not carry over.

    python analyses/07_shortcuts_and_transfer.py [--model NAME] [--data FOLDER] [--seed 0]
"""

import pandas as pd

import lens_safety as ls
from lens_safety.prompts import PromptSet
from lens_safety.session import Session, run

SETS = (
    "content",
    "instructions",
    "categories",
    "contrast",
    "xstest",
    "requests_val",
    "persona_vector_study_train",
)
AUDITED = ("adversarial", "xstest", "requests_val", "persona_vector_study_test")
ROWS = 200
"""Prompts of an audited set, each of which is read five times."""


def main() -> None:
    session = Session.start(__file__, __doc__)
    caches = {name: session.read(name) for name in SETS}
    matrix = ls.transfer_matrix(caches, method="lda", layers=session.spread, seed=session.seed)
    session.show(matrix.frame, "Fit on one set, test on another", "transfer")
    session.draw(ls.plots.transfer_matrix, matrix, name="transfer")
    ordinary = ls.joined([caches["content"], caches["instructions"]], "ordinary prompts")
    authored = ls.joined([caches[name] for name in SETS[:4]], "all authored sets")
    frames = []
    for train, slug in ((ordinary, "ordinary"), (authored, "authored")):
        detector = ls.Detector.fit(train, method="lda", over="mean", layers=session.spread, seed=session.seed)
        audits = [
            ls.shortcut_audit(
                detector,
                session.read(sample(session, name)),
                train=train,
                model=session.model if slug == "authored" else None,
                store=session.store,
                seed=session.seed,
            )
            for name in AUDITED
        ]
        session.draw(ls.plots.shortcut_audit, *audits, name=f"audit_{slug}")
        for audit in audits:
            frame = audit.to_frame()
            frame.insert(0, "train", train.prompts.name)
            frame.insert(1, "test", audit.source)
            frames.append(frame)
    shown = ["train", "test", "name", "auroc", "tpr", "fpr", "gap", "rank_correlation"]
    session.show(pd.concat(frames, ignore_index=True), "Shortcut audit", "audit", shown)


def sample(session: Session, name: str) -> PromptSet:
    """The first rows of a set, as many of each class as there are up to half of `ROWS`."""
    prompts = session.prompts(name)
    labels = prompts.labels
    taken = {False: 0, True: 0}
    rows = []
    for row, label in enumerate(labels.tolist()):
        if taken[label] < ROWS // 2:
            taken[label] += 1
            rows.append(row)
    return prompts[rows]


if __name__ == "__main__":
    run(main)
