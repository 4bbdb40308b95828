"""Question: which operator moves the text most for the same damage?

Method: the sentiment direction at one layer; for each operator the multipliers whose KL to the
unsteered next-token distribution on neutral prompts is 0.1 and 0.5 nats, solved on both sides; then
the `openings` that no other analysis chooses on, judged by the VADER lexicon, which knows nothing of
the model.
Control: the random directions of the same norm, added at the same multipliers as `add`.
Reading: at equal KL operators compare; a number in nats or degrees alone does not.

    python analyses/11_operators.py [--model NAME] [--seed 0]
"""

import pandas as pd
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import lens_safety as ls
from lens_safety.session import Session, run
from lens_safety.types import OptionError

OPERATORS = ("add", "add-norm", "ablate", "clamp", "toward", "rotate:5")
TARGETS = (0.1, 0.5)
SHOWN = (
    "operator",
    "kl_asked",
    "multiplier",
    "change",
    "band_low",
    "band_high",
    "nll_change",
    "repeated",
    "kl",
)


def main() -> None:
    session = Session.start(__file__, __doc__)
    vectors = ls.content_vectors(session.read("sentiment", template="raw"), method="sentiment")
    layer = int(session.model.cfg.n_layers) // 2
    openings = session.prompts("openings")
    held_out = openings[len(openings) // 2 :][:24]
    judge = SentimentIntensityAnalyzer()
    tables, sweeps = [], []
    for operator in OPERATORS:
        solved = {}
        for target in (*(-t for t in TARGETS), *TARGETS):
            multiplier = at_kl(session, vectors, layer, operator, target)
            if multiplier is not None:
                solved[multiplier] = target
        if not solved:
            continue
        swept = ls.sweep(
            session.model,
            vectors,
            held_out,
            layers=[layer],
            multipliers=list(solved),
            operator=operator,
            controls=("random",) if operator == "add" else (),
            behaviour=lambda prompt, text: judge.polarity_scores(text)["compound"],
            template="raw",
            store=session.sweeps,
            seed=session.seed,
        )
        table = swept.effects()
        summary = swept.summary(layer).query("direction == 'content'").set_index("multiplier")
        table["repeated"] = [summary["repeated_4grams"][m] for m in table["multiplier"]]
        table["kl_asked"] = [
            min(solved.items(), key=lambda one: abs(one[0] - m))[1] for m in table["multiplier"]
        ]
        table.insert(0, "operator", operator)
        tables.append(table)
        sweeps.append(swept)
    result = pd.concat(tables, ignore_index=True)
    session.show(result, f"Sentiment at equal KL, layer {layer}, {len(held_out)} openings", "", SHOWN)
    session.draw(ls.plots.operators, *sweeps)


def at_kl(
    session: Session, vectors: ls.ContentVectors, layer: int, operator: str, target: float
) -> float | None:
    """The multiplier of a KL, or None where the operator does not reach it."""
    try:
        plan = ls.steering_plan(
            session.model,
            vectors,
            layers=[layer],
            multiplier=ls.TargetKL(target, template="raw"),
            operator=operator,
        )
    except OptionError as error:
        print(f"{operator}: {error}")
        return None
    return float(plan.writes[layer].multiplier[0])


if __name__ == "__main__":
    run(main)
