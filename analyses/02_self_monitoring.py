"""Question: can a model monitor itself - tone or content vectors - and are the two one direction?

Method: at each layer the cosine of the tone and the content direction, against the cosines that the same
prompts give with shuffled labels; the AUROC on `contrast` of the content direction before and after the
tone direction is projected out of every residual stream; the share of polite and rude, safe and dangerous
requests that are flagged, before and after.
Control: the permutation band; the 2 x 2 table.
Reading: cosines outside the band say that content vectors carry tone. If detection is no worse without the
tone direction, danger is elsewhere; if rude but safe prompts are flagged less, tone was a shortcut.

    python analyses/02_self_monitoring.py [--model NAME] [--data FOLDER] [--seed 0]
"""

import lens_safety as ls
from lens_safety.session import Session, run


def main() -> None:
    session = Session.start(__file__, __doc__)
    personas, contrast = session.read("personas"), session.read("contrast")
    tone = ls.content_vectors(personas, method="tone")
    for name in ("content", "instructions"):
        train = session.read(name)
        result = ls.tone_content(train, tone, contrast, seed=session.seed)
        session.show(result.frame, f"Tone and content directions by layer ({name})", name)
        session.show(result.cells, f"Flagged at layer {result.layer} ({name})", f"{name}_cells")
        session.draw(ls.plots.tone_cells, result, name=f"{name}_cells")


if __name__ == "__main__":
    run(main)
