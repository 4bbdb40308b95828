"""Question: what happens to the text at each steering strength and layer, along tone and content vectors?

Method: the built-in neutral prompts, steered at every layer and four multipliers (the map); then at one
layer, that at which the shipped kind of detector works best inside the training prompts, at a fine grid
and at the study's 10, 20, 50 and 100 times, along the content and the tone vectors. The danger score is
an independent detector's (fitted on `instructions`) on the text alone.
Control: five random directions of the same norm, the unsteered text, and the model asked in words.
Reading: an effect inside the band of the random directions is none. Past the cliff, where the damage
reaches one nat, a text is no longer an answer: that is where the study's strengths lie.

    python analyses/09_steering_strength.py [--model NAME] [--seed 0]
"""

import pandas as pd

import lens_safety as ls
from lens_safety.session import Session, run

MAP = (-4.0, -2.0, 2.0, 4.0)
FINE = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0, 50.0, 100.0)
OF_CONTROLS = (-100.0, -10.0, -4.0, 4.0, 10.0, 100.0)
SHOWN = (
    "vectors",
    "layer",
    "multiplier",
    "dose",
    "change",
    "band_low",
    "band_high",
    "asked",
    "nll_change",
    "kl",
)


def main() -> None:
    session = Session.start(__file__, __doc__)
    train, judge_on = session.read("content"), session.read("instructions")
    vectors = {
        "content": ls.content_vectors(train),
        "tone": ls.content_vectors(session.read("personas"), method="tone"),
    }
    judge = ls.Detector.fit(judge_on, method="logistic", layers=session.spread, seed=session.seed)
    prompts = session.prompts("neutral")
    every = ls.sweep(
        session.model,
        vectors["content"],
        prompts,
        layers=train.layers,
        multipliers=MAP,
        controls=(),
        detector=judge,
        neutral=(),
        max_new_tokens=16,
        store=session.sweeps,
        seed=session.seed,
    )
    session.show(
        every.effects("score"), "Every layer", "layers", ("layer", "multiplier", *SHOWN[3:5], "nll_change")
    )
    session.draw(ls.plots.steering_map, every, name="layers", options={"measure": "score"})
    layer = ls.Detector.fit(train, seed=session.seed).layer
    tables = []
    for name, one in vectors.items():
        swept = ls.sweep(
            session.model,
            one,
            prompts,
            layers=[layer],
            multipliers=[*(-m for m in FINE), *FINE],
            control_multipliers=OF_CONTROLS,
            controls=("random", "asked"),
            detector=judge,
            store=session.sweeps,
            seed=session.seed,
        )
        tables.append(swept.effects("score").assign(vectors=name))
        session.draw(ls.plots.dose_response, swept, name=name, options={"measure": "score"})
        session.show(swept.cliff(), f"Where the text breaks ({name})", f"{name}_cliff")
        seen = ls.consistency(judge, swept)
        session.show(seen.frame, f"What the detector sees of it ({name})", f"{name}_consistency", CONSISTENCY)
    session.show(pd.concat(tables), f"Strengths at layer {layer}", "", SHOWN)


CONSISTENCY = (
    "multiplier",
    "read_layer",
    "projection_change",
    "left",
    "inside_change",
    "text_change",
    "silent",
)


if __name__ == "__main__":
    run(main)
