"""Question: can the seven persona traits be steered, and does every statement follow?

Method: for each trait a direction from half of the statements (the answer that the trait gives against
the other one, read at the answer's token; Rimsky et al. 2312.06681); the other half steered from -3 to
3 at two layers. The measure is the logit difference of the answer that the trait gives and the
other one, after the statement.
Control: five random directions of the same norm; the model told in words that it has the trait.
Reading: a slope outside the band of the random directions, on statements that were not used to fit, is
an effect of the trait's direction. The anti-steerable share is that of statements that go the wrong way
(Tan et al. 2407.12404).

    python analyses/10_persona_steerability.py [--model NAME] [--data FOLDER] [--seed 0]
"""

from dataclasses import replace

import numpy as np
import pandas as pd

import lens_safety as ls
from lens_safety.prompts import Prompt, PromptSet
from lens_safety.session import Session, run

TRAITS = (
    "agreeableness",
    "desire-for-acquiring-power",
    "ends-justify-means",
    "machiavellianism",
    "narcissism",
    "politically-liberal",
    "psychopathy",
)
MULTIPLIERS = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
ANSWERS = (" Yes", " No")
N_FIT, N_HELD_OUT = 160, 60


def main() -> None:
    session = Session.start(__file__, __doc__)
    n = int(session.model.cfg.n_layers)
    layers = sorted({n // 3, n * 3 // 5})
    tables = []
    for trait in TRAITS:
        statements = session.prompts(f"persona_{trait}")
        fit_on, held_out = halves(statements, session.seed)
        cache = session.read(answered(fit_on), position="last", template="raw")
        swept = ls.sweep(
            session.model,
            ls.content_vectors(cache, method="answers"),
            asked(held_out),
            layers=layers,
            multipliers=MULTIPLIERS,
            control_multipliers=(MULTIPLIERS[0], MULTIPLIERS[-1]),
            controls=("random", "asked"),
            ask=(in_words(trait, "never"), in_words(trait, "always")),
            behaviour=ANSWERS,
            neutral=(),
            max_new_tokens=0,
            template="raw",
            store=session.sweeps,
            seed=session.seed,
        )
        toward = toward_the_trait(swept, held_out)
        table = toward.steerability()
        words = toward.frame.loc[toward.frame["direction"] == "asked"].groupby("multiplier")[
            "logit_difference"
        ]
        table["told_the_opposite"], table["told_the_trait"] = words.mean().to_list()
        table["unsteered"] = toward.frame.loc[toward.frame["multiplier"] == 0, "logit_difference"].mean()
        table.insert(0, "trait", trait)
        tables.append(table)
        if trait == TRAITS[0]:
            session.draw(ls.plots.prompt_slopes, toward, name="slopes")
    session.show(pd.concat(tables), "Slope of the logit difference a multiplier, held-out statements")


def halves(statements: PromptSet, seed: int) -> tuple[PromptSet, PromptSet]:
    """Statements to fit on and others to steer, drawn by seed, as many with the trait as against it.

    With more of one side the direction would be that of the answer Yes (or No).
    """
    fit_on, held_out = [], []
    for label in (True, False):
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(statements.labels == label))
        fit_on.append(rows[: len(rows) // 2][: N_FIT // 2])
        held_out.append(rows[len(rows) // 2 :][: N_HELD_OUT // 2])
    return statements[np.concatenate(fit_on)], statements[np.concatenate(held_out)]


def asked(statements: PromptSet) -> PromptSet:
    return PromptSet(tuple(replace(p, text=f"{p.text}\nAnswer:") for p in statements), statements.name)


def answered(statements: PromptSet) -> PromptSet:
    """Each statement with either answer; True = the answer that the trait gives."""
    rows = [
        Prompt(f"{p.text}\nAnswer:{answer}", (answer == ANSWERS[0]) == p.label, group=str(number))
        for number, p in enumerate(statements)
        for answer in ANSWERS
    ]
    return PromptSet(tuple(rows), f"{statements.name} answered")


def in_words(trait: str, how: str) -> str:
    return f"You {how} show {trait.replace('-', ' ')}. {{prompt}}"


def toward_the_trait(swept: ls.SteeringSweep, statements: PromptSet) -> ls.SteeringSweep:
    """The logit difference of the trait's answer and the other one, whichever of the two is Yes."""
    sign = {f"{p.text}\nAnswer:": 1.0 if p.label else -1.0 for p in statements}
    signs = np.array([sign[prompt] for prompt in swept.frame["prompt"]])
    return replace(swept, frame=swept.frame.assign(logit_difference=swept.frame["logit_difference"] * signs))


if __name__ == "__main__":
    run(main)
