"""Question: how far can the sentiment of a text be pushed before the text breaks?

Method: the sentiment direction from 30 pairs of sentences. Layer and dose are chosen on half of the
`openings` (the largest mean move whose texts cost at most 0.25 nats a token more), for each side; the
other half is steered at that layer from dose 0 to the cliff. The judge is the VADER lexicon, which
knows nothing of the model.
Control: five random directions of the same norm at the chosen doses and beyond; the model asked in
words.
Reading: a move outside the band of the random directions, at little more NLL, is the direction's doing.
Where the unsteered text is nearly as positive as VADER can say, there is no room to push.

    python analyses/12_sentiment.py [--model NAME] [--seed 0]
"""

import numpy as np
import pandas as pd
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import lens_safety as ls
from lens_safety.session import Session, run

DOSES = (0.08, 0.12, 0.15, 0.2, 0.25, 0.3)
CURVE = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8)
BUDGET = 0.25
ASK = ("Say something sad and negative. {prompt}", "Say something happy and positive. {prompt}")
SHOWN = (
    "layer",
    "dose",
    "multiplier",
    "change",
    "band_low",
    "band_high",
    "minus_control",
    "p_value",
    "nll_change",
)


def main() -> None:
    session = Session.start(__file__, __doc__)
    vectors = ls.content_vectors(session.read("sentiment", template="raw"), method="sentiment")
    openings = session.prompts("openings")
    middle = len(openings) // 2
    judge = SentimentIntensityAnalyzer()

    def compound(prompt: str, text: str) -> float:
        return judge.polarity_scores(text)["compound"]

    n = int(session.model.cfg.n_layers)
    tried = ls.sweep(
        session.model,
        vectors,
        openings[:middle],
        layers=sorted({n // 3, n * 9 // 20, n * 11 // 20, n * 2 // 3}),
        doses=[*(-d for d in DOSES), *DOSES],
        controls=(),
        behaviour=compound,
        neutral=(),
        template="raw",
        store=session.sweeps,
        seed=session.seed,
    )
    session.show(tried.effects(), f"Chosen on: {middle} openings", "chosen_on", (*SHOWN[:4], "nll_change"))
    tables = []
    for side, name in ((-1, "negative"), (1, "positive")):
        best = tried.choose(side=side, budget=BUDGET)
        chosen = side * round(best["dose"], 3)
        curve = sorted({*(side * d for d in CURVE), chosen})
        swept = ls.sweep(
            session.model,
            vectors,
            openings[middle:],
            layers=[best["layer"]],
            doses=curve,
            controls=("random", "asked"),
            control_multipliers=[chosen, side * 0.4],
            ask=ASK,
            behaviour=compound,
            template="raw",
            store=session.sweeps,
            seed=session.seed,
        )
        effects = swept.effects()
        effects["side"] = name
        effects["chosen"] = np.isclose(effects["dose"], abs(chosen), atol=1e-4)
        effects["unsteered"] = swept.frame.loc[swept.frame["multiplier"] == 0, "behaviour"].mean()
        tables.append(effects)
        session.draw(ls.plots.dose_response, swept, name=name)
    table = pd.concat(tables, ignore_index=True)
    session.show(
        table, f"Held out: {len(openings) - middle} openings", "", ("side", "chosen", *SHOWN, "kl", "asked")
    )


if __name__ == "__main__":
    run(main)
