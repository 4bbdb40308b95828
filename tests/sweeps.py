"""Sweeps whose answers are known by hand."""

import numpy as np
import pandas as pd

import lens_safety as ls
from lens_safety.responses import CONTENT, NOWHERE, UNSTEERED

PROMPTS = [f"prompt {i}" for i in range(8)]


def row(direction: str, layer: int, m: float, prompt: str, **values: float) -> dict:
    nothing = dict.fromkeys(("behaviour", "logit_difference", "score", "inside_score", "projection"), np.nan)
    plain = {"nll": 1.0, "kl": 0.0, "repeated_4grams": 0.0, "distinct_2grams": 1.0}
    key = {"direction": direction, "layer": layer, "multiplier": m, "dose": abs(m) / 10, "prompt": prompt}
    return key | {"group": PROMPTS.index(prompt), "text": "t"} | nothing | plain | values


def made(rows: list[dict], layers: tuple[int, ...] = (3,)) -> ls.SteeringSweep:
    frame = pd.DataFrame(rows)
    return ls.SteeringSweep(
        frame=frame,
        flow=np.zeros((len(frame), 2)),
        layers=layers,
        layers_read=(3, 4),
        norms=(2.0, 4.0),
        operator="add",
        positions="all",
        detector="",
        threshold=0.5,
        max_new_tokens=5,
        seed=0,
        model="m",
    )


def linear(slope: float = 0.5, randoms: tuple[float, ...] = (-0.1, 0.0, 0.1)) -> ls.SteeringSweep:
    """behaviour = i + slope * m, and random directions with small slopes; damage m ** 2 / 10."""
    rows = [row(UNSTEERED, NOWHERE, 0.0, p, behaviour=float(i)) for i, p in enumerate(PROMPTS)]
    for m in (-4.0, -2.0, 2.0, 4.0):
        for i, p in enumerate(PROMPTS):
            hurt = {"nll": 1 + m * m / 10, "kl": m * m / 20}
            rows.append(row(CONTENT, 3, m, p, behaviour=i + slope * m, **hurt))
            for number, own in enumerate(randoms, start=1):
                rows.append(row(f"random {number}", 3, m, p, behaviour=i + own * m, **hurt))
    return made(rows)
