"""What steering did: the rows of a sweep, effects beside their controls, damage, the cliff, the best dose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from .detect import Detector
from .files import Result
from .intervals import UNDEFINED, Estimate, bootstrap, group_weights, proportion
from .metrics import sign_flip_p
from .show import card, pick
from .types import MismatchError, OptionError, one_of

CONTENT, UNSTEERED, ASKED, RANDOM = "content", "unsteered", "asked", "random"
NOWHERE = -1
"""The layer of rows that no layer was steered for."""

MEASURES = ("behaviour", "logit_difference", "score", "inside_score", "projection")
DAMAGES = ("nll", "kl", "repeated_4grams")
CLIFF = 1.0
"""Nats of damage at the cliff."""

_N_BOOT = 1000


@dataclass(frozen=True)
class SteeringSweep(Result):
    """A row for each direction x layer x multiplier x prompt; `flow[i]` belongs to row i.

    Columns: `direction` ("content"; the controls "random 1", ..., "shuffled", "orthogonal"; "unsteered";
    "asked", where the model was asked in words, with the multiplier's sign for the side); `layer` (-1 where
    none was steered); `multiplier`; `dose` = norm(multiplier * v) / median residual norm; `prompt`; `group`;
    `text`. What the text is like:

        behaviour         the caller's measure of (prompt, text)
        logit_difference  logit of the first answer token - logit of the second, after the prompt
        score             the unsteered detector's score of the text alone (higher = more dangerous)
        inside_score      the detector's score of the steered residual stream, mean over the text's tokens
        projection        h . u at the steered layer, mean over the text's tokens, after steering
        nll               nats a token of the text under the unsteered model, after the prompt
        kl                KL(unsteered || steered) of the next token on neutral prompts, in nats
        repeated_4grams   the share of 4-word sequences that stood in the text before
        distinct_2grams   the share of different 2-word sequences

    NaN where something was not measured or a text is empty. `flow[i, l]` is the mean of h . u over the
    text's tokens at layer `layers_read[l]`, u the unit content vector of that layer.
    """

    frame: pd.DataFrame
    flow: Float[np.ndarray, "row layer"]
    layers: tuple[int, ...]
    layers_read: tuple[int, ...]
    norms: tuple[float, ...]
    operator: str
    positions: str
    detector: str
    threshold: float
    max_new_tokens: int
    seed: int
    model: str

    @property
    def n_prompts(self) -> int:
        return len(set(self.frame["prompt"]))

    @property
    def strengths(self) -> list[tuple[int, float]]:
        """(layer, multiplier) of the content vectors, in order."""
        rows = self._steered(CONTENT)
        return sorted(
            {(int(layer), float(m)) for layer, m in zip(rows["layer"], rows["multiplier"], strict=True)}
        )

    @property
    def measure(self) -> str:
        """The measure that effects are in by default: the first of `MEASURES` that was taken."""
        return next(
            (name for name in MEASURES if np.isfinite(self.frame[name].to_numpy()).any()), MEASURES[-1]
        )

    def summary(self, layer: int | None = None) -> pd.DataFrame:
        """A row for each direction, layer and multiplier: means over the prompts, 95% intervals.

        Intervals resample groups of prompts. The unsteered text stands in each curve at multiplier 0.
        """
        keys = ["direction", "layer", "multiplier", "dose"]
        rows = []
        for _, part in self.curves(layer).groupby(keys, sort=False):
            row: dict[str, Any] = part[keys].iloc[0].to_dict() | {"n": len(part)}
            for name in (*MEASURES, *DAMAGES, "distinct_2grams"):
                row |= _mean(part[name].to_numpy(), part["group"].to_numpy(), self.seed).columns(name)
            rows.append(row)
        return pd.DataFrame(rows)

    def curves(self, layer: int | None = None) -> pd.DataFrame:
        """The rows, with the unsteered ones repeated at multiplier 0 of each steered direction and layer."""
        steered = self.frame.loc[~self.frame["direction"].isin([UNSTEERED, ASKED])]
        if layer is not None:
            if layer not in self.layers:
                raise OptionError(f"layer {layer} given, expected one that was steered: {self.layers}")
            steered = steered.loc[steered["layer"] == layer]
        base = self._steered(UNSTEERED)
        pairs = steered[["direction", "layer"]].drop_duplicates().itertuples(index=False)
        zeros = [base.assign(direction=direction, layer=one) for direction, one in pairs]
        asked = self._steered(ASKED)
        rows = pd.concat([steered, *zeros, asked], ignore_index=True)
        return rows.sort_values(["direction", "layer", "multiplier"], kind="stable", ignore_index=True)

    def effects(self, measure: str | None = None) -> pd.DataFrame:
        """A row for each layer and multiplier of the content vectors: the effect beside its controls.

        Columns: `change` = measure of the steered text - that of the unsteered text, paired by prompt, and
        the same for `control` (the mean of the random directions), with `band_low` and `band_high`, the
        lowest and highest mean change of a single one; `minus_control` with a bootstrap interval over
        prompts and `p_value` by flipping its signs prompt by prompt; `outside_band`; `shuffled`,
        `orthogonal` and `flip` (the change at -multiplier), where they were run; `asked`; `nll_change`;
        `kl`; and `of_cliff` = multiplier / that of the cliff on its side.
        """
        name = self._known(measure)
        cliff = self.cliff()
        cliffs = {(int(layer), int(side)): float(at) for layer, side, at, _ in cliff.to_numpy()}
        rows = []
        for layer, m in self.strengths:
            part = self._at(CONTENT, layer, m)
            change, groups = self._change(part, name), part["group"].to_numpy()
            row: dict[str, Any] = {
                "layer": layer,
                "multiplier": m,
                "dose": float(part["dose"].to_numpy()[0]),
                "n": len(part),
            }
            row |= _mean(change.to_numpy(), groups, self.seed).columns("change")
            row |= self._beside_random(change, groups, layer, m, name)
            for control in ("shuffled", "orthogonal"):
                row[control] = self._mean_change(control, layer, m, name)
            row["flip"] = self._mean_change(CONTENT, layer, -m, name)
            row["asked"] = self._mean_change(ASKED, NOWHERE, float(np.sign(m)), name)
            nll = self._change(part, "nll")
            row |= _mean(nll.to_numpy(), groups, self.seed).columns("nll_change")
            row["kl"] = float(part["kl"].to_numpy().mean())
            row["of_cliff"] = m / cliffs[layer, int(np.sign(m))]
            rows.append(row)
        return pd.DataFrame(rows)

    def cliff(self) -> pd.DataFrame:
        """For each layer and side the multiplier at which the damage reaches one nat, and its dose.

        Damage is the larger of `kl` and the rise of `nll`; between two multipliers of the grid it is taken as
        linear. NaN where the grid ends before.
        """
        rows = []
        for layer in self.layers:
            part = self._steered(CONTENT)
            part = part.loc[part["layer"] == layer]
            of_one = float(part["dose"].to_numpy()[0] / abs(part["multiplier"].to_numpy()[0]))
            for side in (-1, 1):
                m = self._cliff_of(part, side)
                rows.append({"layer": layer, "side": side, "multiplier": m, "dose": abs(m) * of_one})
        return pd.DataFrame(rows)

    def steerability(self, measure: str | None = None) -> pd.DataFrame:
        """For each layer the slope of the measure against the multiplier, prompt by prompt (2407.12404).

        `slope` is its mean over prompts with a bootstrap interval; `anti_steerable` the share of prompts
        whose slope is below 0, with Wilson's interval; `random_low` and `random_high` the mean slopes of
        the random directions, where those were run at two multipliers or more; `outside_band`.
        """
        name, of_prompt = self._known(measure), self._groups
        rows = []
        for layer in self.layers:
            slopes = self.slopes(layer, name)
            groups = np.array([of_prompt[str(prompt)] for prompt in slopes.index])
            row: dict[str, Any] = {"layer": layer, "n": len(slopes)}
            row |= _mean(slopes.to_numpy(), groups, self.seed).columns("slope")
            row |= proportion(int((slopes < 0).sum()), len(slopes)).columns("anti_steerable")
            bands = [self.slopes(layer, name, direction).mean() for direction in self._random()]
            known = [value for value in bands if np.isfinite(value)]
            row["random_low"], row["random_high"] = (min(known), max(known)) if known else (np.nan, np.nan)
            row["outside_band"] = bool(known) and not min(known) <= row["slope"] <= max(known)
            rows.append(row)
        return pd.DataFrame(rows)

    def slopes(self, layer: int, measure: str | None = None, direction: str = CONTENT) -> pd.Series:
        """Each prompt's least-squares slope of the measure against the multiplier."""
        name = self._known(measure)
        rows = self.curves(layer)
        wide = rows.loc[rows["direction"] == direction].pivot_table(
            index="prompt", columns="multiplier", values=name, sort=False
        )
        if wide.shape[1] < 3:
            return pd.Series(dtype=float)
        m = wide.columns.to_numpy(dtype=float)
        return (wide.sub(wide.mean(axis=1), axis=0) * (m - m.mean())).sum(axis=1) / (
            (m - m.mean()) ** 2
        ).sum()

    def best(
        self, *, side: int, budget: float, damage: str = "nll", measure: str | None = None, seed: int = 0
    ) -> pd.DataFrame:
        """The (layer, multiplier) with the largest effect within a damage budget, honestly.

        Chosen on one half of the prompts (whole groups): the largest mean change of the measure in the
        direction of `side` (+1 or -1: of the multiplier) among those whose mean damage rises by at most
        `budget` nats. Reported on the other half: `change`, `damage`, each with its interval, and the band of
        the random directions there.

        Raises:
            OptionError: an unknown measure or damage, a side other than -1 and 1, or a budget that no
                multiplier of the grid keeps.
        """
        chosen_on = self._half(seed)
        best = self.choose(side=side, budget=budget, damage=damage, measure=measure, prompts=chosen_on)
        name = self._known(measure)
        part = self._at(CONTENT, best["layer"], best["multiplier"])
        held_out = part.loc[~part["prompt"].isin(chosen_on)]
        change, hurt = self._change(held_out, name), self._change(held_out, damage)
        groups = held_out["group"].to_numpy()
        row: dict[str, Any] = {"layer": best["layer"], "multiplier": best["multiplier"]}
        row |= {"dose": float(part["dose"].to_numpy()[0]), "n_chosen_on": len(chosen_on), "n": len(held_out)}
        row |= {"change_chosen_on": best["change"], "damage_chosen_on": best["damage"]}
        row |= _mean(change.to_numpy(), groups, self.seed).columns("change")
        row |= _mean(hurt.to_numpy(), groups, self.seed).columns("damage")
        row |= self._beside_random(change, groups, best["layer"], best["multiplier"], name)
        return pd.DataFrame([row])

    def choose(
        self,
        *,
        side: int,
        budget: float,
        damage: str = "nll",
        measure: str | None = None,
        prompts: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """The (layer, multiplier) of the largest mean change within the budget, on these prompts or on all.

        Flattering where it is read on the same prompts: steer others with it, or take `best`.
        """
        name = self._known(measure)
        if side not in (-1, 1):
            raise OptionError(f"side={side!r} given, expected 1 or -1")
        one_of(damage, DAMAGES, "damage")
        tried = self._tried(prompts, side, name, damage)
        within = [one for one in tried if one["damage"] <= budget]
        if not within:
            raise OptionError(
                f"budget {budget:g} given, and the least damage of the grid is "
                f"{min((one['damage'] for one in tried), default=np.nan):.3g}; widen one of them"
            )
        return max(within, key=lambda one: side * one["change"])

    def _tried(
        self, prompts: Sequence[str] | None, side: int, name: str, damage: str
    ) -> list[dict[str, Any]]:
        tried = []
        for layer, m in self.strengths:
            part = self._at(CONTENT, layer, m)
            if prompts is not None:
                part = part.loc[part["prompt"].isin(prompts)]
            dose = float(part["dose"].to_numpy()[0])
            if np.sign(m) == side:
                mean = {
                    key: float(self._change(part, of).mean())
                    for key, of in (("change", name), ("damage", damage))
                }
                tried.append({"layer": layer, "multiplier": m, "dose": dose, **mean})
        return tried

    def _half(self, seed: int) -> list[str]:
        """The prompts of half of the groups, drawn by seed."""
        order = np.random.default_rng(seed).permutation(sorted(set(self._groups.values())))
        first = set(order[: len(order) // 2].tolist())
        return [prompt for prompt, group in self._groups.items() if group in first]

    def _known(self, measure: str | None) -> str:
        if measure is None:
            return self.measure
        one_of(measure, (*MEASURES, *DAMAGES, "distinct_2grams"), "measure")
        return measure

    @property
    def _groups(self) -> dict[str, int]:
        return dict(zip(self.frame["prompt"], self.frame["group"].tolist(), strict=True))

    def _random(self) -> list[str]:
        return sorted({name for name in self.frame["direction"] if name.startswith(RANDOM)})

    def _steered(self, direction: str) -> pd.DataFrame:
        return self.frame.loc[self.frame["direction"] == direction]

    def _change(self, part: pd.DataFrame, name: str) -> pd.Series:
        """By prompt: the measure less that of the unsteered text. `kl` is a change already."""
        own = _by_prompt(part, name)
        return own if name == "kl" else own - _by_prompt(self._steered(UNSTEERED), name).reindex(own.index)

    def _mean_change(self, direction: str, layer: int, m: float, name: str) -> float:
        part = self._at(direction, layer, m)
        return float(self._change(part, name).mean()) if len(part) else np.nan

    def _beside_random(
        self, change: pd.Series, groups: Int[np.ndarray, " prompt"], layer: int, m: float, name: str
    ) -> dict[str, Any]:
        own = [
            self._change(part, name).reindex(change.index)
            for direction in self._random()
            if len(part := self._at(direction, layer, m))
        ]
        if not own:
            undefined = UNDEFINED.columns("minus_control")
            names = ("control", "band_low", "band_high", "p_value")
            return {**dict.fromkeys(names, np.nan), **undefined, "outside_band": False}
        control = pd.concat(own, axis=1).mean(axis=1)
        means = [float(one.mean()) for one in own]
        difference = (change - control).to_numpy()
        return {
            "control": float(control.mean()),
            "band_low": min(means),
            "band_high": max(means),
            **_mean(difference, groups, self.seed).columns("minus_control"),
            "p_value": sign_flip_p(difference[np.isfinite(difference)], seed=self.seed),
            "outside_band": not min(means) <= float(change.mean()) <= max(means),
        }

    def _at(self, direction: str, layer: int, m: float) -> pd.DataFrame:
        part = self._steered(direction)
        return part.loc[(part["layer"] == layer) & (part["multiplier"] == m)]

    def _cliff_of(self, rows: pd.DataFrame, side: int) -> float:
        damage, sizes = [0.0], [0.0]
        rows = rows.loc[np.sign(rows["multiplier"]) == side]
        for m in sorted(set(rows["multiplier"]), key=abs):
            one = rows.loc[rows["multiplier"] == m]
            rises = [float(one["kl"].mean()), float(self._change(one, "nll").mean()), 0.0]
            damage.append(float(np.nanmax(rises)))
            sizes.append(abs(float(m)))
            if damage[-1] >= CLIFF:
                return side * float(np.interp(CLIFF, damage[-2:], sizes[-2:]))
        return np.nan

    def _repr_html_(self) -> str:
        names = ("layer", "multiplier", "dose", "change", "band_low", "band_high", "nll_change", "kl")
        return card(
            f"Steering {self.model}: {self.operator}, layers {', '.join(map(str, self.layers))}, "
            f"{self.n_prompts} prompts, change of {self.measure.replace('_', ' ')}",
            pick(self.effects(), *names),
            "ls.plots.dose_response(sweep)",
            note="band: lowest and highest change by a random direction; kl and nll in nats",
        )


@dataclass(frozen=True)
class Consistency(Result):
    """Whether a detector sees steering: a row for each steered layer, multiplier and layer that was read.

    `projection_change` = mean over prompts of h . u (steered - unsteered) at `read_layer`, in units of that
    layer's content vector; `left` = its share of that at the steered layer; `inside_change` and `text_change`
    those of the detector's score of the steered stream and of the text alone; `dangerous` the texts that are
    judged dangerous, and `silent` the share of these whose steered stream the detector calls safe
    (steering against the detector). `washed_out` names the first read layer whose interval holds 0.
    """

    frame: pd.DataFrame
    judge: str
    detector: str
    model: str

    def _repr_html_(self) -> str:
        names = ("layer", "multiplier", "read_layer", "projection_change", "left", "silent", "washed_out")
        return card(
            f"Does {self.detector} see steering? {self.model}, judged by {self.judge}",
            pick(self.frame, *names),
            "consistency.to_frame()",
            note="silent: dangerous texts whose steered stream the detector calls safe",
        )


def consistency(
    detector: Detector, sweep: SteeringSweep, *, dangerous_above: float | int | None = None
) -> Consistency:
    """Detection meets steering: does a push move the detector at later layers, and where does it wash out?

    Texts are judged by the caller's behaviour measure where `dangerous_above` says from which value on it
    means danger; else by the detector's own reading of the text alone, without steering.

    Raises:
        MismatchError: a sweep that was not run with this detector.
    """
    if sweep.detector != detector.digest:
        raise MismatchError(
            f"the sweep was run with {'another detector' if sweep.detector else 'no detector'}: expected "
            f"{detector.name}; run sweep(..., detector=detector)"
        )
    column = {str(name): values.to_numpy() for name, values in sweep.frame.items()}
    judged = column["score"] > sweep.threshold
    if dangerous_above is not None:
        judged = column["behaviour"] > dangerous_above
    base = {column["prompt"][i]: i for i in np.flatnonzero(column["direction"] == UNSTEERED)}
    rows: list[dict[str, Any]] = []
    for layer, m in sweep.strengths:
        of_layer = (column["layer"] == layer) & (column["multiplier"] == m)
        at = np.flatnonzero(of_layer & (column["direction"] == CONTENT))
        own = np.array([base[prompt] for prompt in column["prompt"][at]])
        groups = column["group"][at]
        dangerous = judged[at]
        silent = dangerous & (column["inside_score"][at] <= sweep.threshold)
        common: dict[str, Any] = {"layer": layer, "multiplier": m, "n": len(at)}
        for name, of in (("inside_change", "inside_score"), ("text_change", "score")):
            values = column[of]
            common |= _mean(values[at] - values[own], groups, sweep.seed).columns(name)
        common |= {"dangerous": int(dangerous.sum())}
        common |= proportion(int(silent.sum()), int(dangerous.sum())).columns("silent")
        rows += _washing_out(sweep, common, sweep.flow[at] - sweep.flow[own], groups)
    judge = "the detector, text alone" if dangerous_above is None else f"behaviour above {dangerous_above:g}"
    return Consistency(pd.DataFrame(rows), judge, detector.name, sweep.model)


def _washing_out(
    sweep: SteeringSweep,
    common: dict[str, Any],
    moved: Float[np.ndarray, "prompt layer"],
    groups: Int[np.ndarray, " prompt"],
) -> list[dict[str, Any]]:
    rows, washed = [], ""
    start = sweep.layers_read.index(common["layer"])
    first = float(np.nanmean(moved[:, start])) / sweep.norms[start]
    for number in range(start, len(sweep.layers_read)):
        change = _mean(moved[:, number] / sweep.norms[number], groups, sweep.seed)
        if not washed and change.low <= 0 <= change.high:
            washed = str(sweep.layers_read[number])
        columns = change.columns("projection_change")
        rows.append(
            common | {"read_layer": sweep.layers_read[number]} | columns | {"left": change.value / first}
        )
    return [row | {"washed_out": washed or "nowhere"} for row in rows]


def _by_prompt(rows: pd.DataFrame, name: str) -> pd.Series:
    return pd.Series(rows[name].to_numpy(), index=list(rows["prompt"]))


def _mean(values: np.ndarray, groups: np.ndarray, seed: int) -> Estimate:
    """The mean with its 95% interval, groups resampled; rows that are NaN are left out."""
    known = np.isfinite(values)
    if not known.any():
        return UNDEFINED
    values, groups = values[known].astype(float), groups[known]

    def mean(w: np.ndarray) -> np.ndarray:
        return (w * values).sum(axis=1) / w.sum(axis=1)

    return bootstrap(mean, group_weights(groups, n_resamples=_N_BOOT, seed=seed))
