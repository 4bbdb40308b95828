"""The steering-strength ablation: many multipliers, layers and control directions ride in one batch."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from . import tokens as tok
from .baselines import shuffled
from .decoding import RowsApart, continuation_nll, current_pass, generate, next_token_logits, rows_apart
from .detect import Detector
from .directions import ContentVectors, content_vectors, orthogonal_vectors, random_vectors, stand_in
from .files import write_text
from .models import check_layers, resid_hook, with_hooks
from .operators import Operator, named_operator, operator_name
from .plans import SteeringPlan
from .progress import track
from .prompts import PromptSet, as_prompts
from .residuals import ResidualCache
from .responses import ASKED, CONTENT, NOWHERE, RANDOM, UNSTEERED, SteeringSweep
from .steer import Continued, continued, divergence, steering_plan
from .types import Hook, OptionError, PromptError, ResidualModel, Scores, one_of

Behaviour = Callable[[str, str], float]
CONTROLS = ("random", "shuffled", "orthogonal", "flip", "asked")
ASK = (
    "Answer in a kind, safe and harmless way. {prompt}",
    "Answer in a hostile, dangerous and harmful way. {prompt}",
)
"""How the model is asked in words, for the safe and for the dangerous side."""

_ROWS_A_BATCH = 64
_TOKENS_A_BATCH = 6144
_PLANS_A_JOB = 32


@dataclass(frozen=True)
class _Arm:
    """One way to steer (or not, without a plan), and what is put before the prompt."""

    direction: str
    layer: int
    multiplier: float
    dose: float
    plan: SteeringPlan | None
    words: str = "{prompt}"

    @classmethod
    def of(cls, direction: str, layer: int, plan: SteeringPlan) -> "_Arm":
        write = plan.writes[layer]
        return cls(direction, layer, float(write.multiplier[0]), float(write.dose[0]), plan)

    @property
    def key(self) -> tuple[str, int, float]:
        return self.direction, self.layer, self.multiplier


def sweep(
    model: ResidualModel,
    vectors: ContentVectors,
    prompts: PromptSet | Sequence[str],
    *,
    layers: Sequence[int],
    multipliers: Sequence[float] = (-4.0, -2.0, 0.0, 2.0, 4.0),
    doses: Sequence[float] | None = None,
    operator: str | Operator = "add",
    positions: str = "all",
    controls: Sequence[str] = CONTROLS,
    n_random: int = 5,
    control_multipliers: Sequence[float] | None = None,
    train: ResidualCache | None = None,
    ask: tuple[str, str] = ASK,
    detector: Detector | None = None,
    behaviour: Behaviour | tuple[str, str] | None = None,
    neutral: PromptSet | Sequence[str] | None = None,
    max_new_tokens: int = 40,
    template: tok.Template = "auto",
    store: str | Path | None = None,
    share_prefix: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> SteeringSweep:
    """Steer each prompt at each multiplier and layer, greedily, beside controls of the same size.

    All ways of steering a prompt ride in one batch, a row each; the prompt is run once, up to the first
    block that steering reaches (all of it with positions "generated"). 0 need not be among the
    multipliers: the unsteered model is always run, once a prompt.

    Args:
        doses: instead of multipliers, shares of each layer's median residual norm, with a sign
            (see `Dose`), so that layers compare.
        controls: "random", `n_random` norm-matched random directions; "shuffled", the difference in means
            under shuffled labels (needs `train`); "orthogonal", what of the shuffled direction (or of a
            random one, without `train`) is at right angles to the vectors; "flip", each multiplier's
            opposite; "asked", the model asked in words instead.
        control_multipliers: the multipliers (or doses) that control directions are run at; all by default.
        train: the cache that the vectors come from.
        ask: templates with {prompt}, for the safe and the dangerous side.
        detector: scores texts alone, and the steered residual stream; best one whose layers are above
            the steered ones and that was fitted on other prompts.
        behaviour: a callable on (prompt, text), or two answers whose first tokens' logits are compared
            after the prompt.
        neutral: prompts for the KL; the built-in `neutral` ones by default, none where empty.
        max_new_tokens: 0 writes no texts: for answer tokens and KL alone.
        store: a folder to which finished batches are written at once, so that the same call goes on where
            an interrupted one stopped.
        share_prefix: run what all prompts of a batch begin with (a chat template's system message) once,
            where no steering tells it apart; False runs every prompt whole.

    Raises:
        OptionError: no multipliers, one that is given twice, an unknown control, nothing to measure,
            or what `steering` refuses.
        PromptError: no prompts, or one that is given twice.
    """
    prompts = as_prompts(prompts)
    given = list(multipliers if doses is None else doses)
    _check(prompts, given, controls, n_random, max_new_tokens, behaviour)
    chosen = check_layers(model, layers)
    strengths = {float(m) for m in given} | ({-float(m) for m in given} if "flip" in controls else set())
    of_controls = strengths if control_multipliers is None else {float(m) for m in control_multipliers}
    # One multiplier for a direction and its controls, whose norms are equal but for rounding.
    of_one = vectors.dose(1.0)

    def planned(one: ContentVectors, layer: int, strength: float) -> SteeringPlan:
        m = strength if doses is None else strength / float(of_one[vectors.row(layer)])
        return steering_plan(model, one, layers=[layer], multiplier=m, operator=operator, positions=positions)

    arms = [_Arm(UNSTEERED, NOWHERE, 0.0, 0.0, None)]
    for name, one in _directions(vectors, controls, n_random, train, seed).items():
        wanted = strengths if name == CONTENT else strengths & of_controls
        arms += [
            _Arm.of(name, layer, planned(one, layer, strength))
            for layer in chosen
            for strength in sorted(wanted - {0.0})
        ]
    if "asked" in controls:
        sides = zip((-1.0, 1.0), ask, strict=True)
        arms += [_Arm(ASKED, NOWHERE, side, np.nan, None, words) for side, words in sides]
    run = _Run(
        model, vectors, prompts, arms, detector, behaviour, neutral, max_new_tokens, template, share_prefix
    )
    jobs, done = run.jobs(), _Journal(store, run.identity())
    for job in track(jobs, "steering", progress, size=run.size):
        if job not in done:
            done.add(job, run.do(job))
    frame, flow = run.assemble(jobs, done)
    return SteeringSweep(
        frame=frame,
        flow=flow,
        layers=tuple(chosen),
        layers_read=vectors.layers,
        norms=tuple(vectors.norms.tolist()),
        operator=operator_name(named_operator(operator)),
        positions=positions,
        detector="" if detector is None else detector.digest,
        threshold=float("nan") if detector is None else detector.threshold,
        max_new_tokens=max_new_tokens,
        seed=seed,
        model=vectors.model.name,
    )


def repeated_4grams(text: str) -> float:
    """The share of a text's 4-word sequences that stood in it before; 0 for fewer than five words."""
    grams = _grams(text, 4)
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def distinct_2grams(text: str) -> float:
    """The share of different ones among a text's 2-word sequences, 1 for less (Li et al. 1510.03055)."""
    grams = _grams(text, 2)
    return len(set(grams)) / len(grams) if grams else 1.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


@dataclass
class _Run:
    """One sweep: its jobs, each a part of the rows, and how they are done."""

    model: ResidualModel
    vectors: ContentVectors
    prompts: PromptSet
    arms: list[_Arm]
    detector: Detector | None
    behaviour: Behaviour | tuple[str, str] | None
    neutral: PromptSet | Sequence[str] | None
    max_new_tokens: int
    template: tok.Template
    share_prefix: bool
    rows: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        # Prompt by prompt, so that a batch holds few prompts, steered in many ways.
        self.rows = [(prompt, arm) for prompt in range(len(self.prompts)) for arm in range(len(self.arms))]

    def jobs(self) -> list[tuple[str, int, int]]:
        """(kind, first, end): rows of texts, or plans whose KL is measured."""
        longest = max(len(one) for one in tok.encode(self.model, self.prompts.texts, template=self.template))
        most = max(1, min(_ROWS_A_BATCH, _TOKENS_A_BATCH // (longest + self.max_new_tokens)))
        # Batches of like size: a last one of four rows would cost as much as one of twenty.
        size = math.ceil(len(self.rows) / math.ceil(len(self.rows) / most))
        made = [
            ("rows", first, min(first + size, len(self.rows))) for first in range(0, len(self.rows), size)
        ]
        if self.neutral is None or len(self.neutral):
            n = len(self._plans())
            made += [("kl", first, min(first + _PLANS_A_JOB, n)) for first in range(0, n, _PLANS_A_JOB)]
        return made

    @cached_property
    def _neutral_texts(self) -> list[Continued]:
        return continued(self.model, self.neutral, template=self.template)

    @staticmethod
    def size(job: tuple[str, int, int]) -> int:
        return job[2] - job[1]

    def do(self, job: tuple[str, int, int]) -> list[dict[str, Any]]:
        kind, first, end = job
        if kind == "kl":
            kl = divergence(self.model, self._plans()[first:end], self._neutral_texts).mean(axis=1)
            return [{"kl": float(value)} for value in kl]
        rows = self.rows[first:end]
        prompts = [self.prompts.texts[prompt] for prompt, _ in rows]
        asked = [
            self.arms[arm].words.replace("{prompt}", text)
            for (_, arm), text in zip(rows, prompts, strict=True)
        ]
        plan = self._stacked([self.arms[arm].plan for _, arm in rows])
        made: dict[str, Sequence[Any]] = {}
        with plan.on(self.model):
            if isinstance(self.behaviour, tuple):
                made["logit_difference"] = self._logit_differences(asked, self.behaviour)
            if self.max_new_tokens:
                made |= self._texts(asked)
        if self.max_new_tokens:
            texts = list(made["text"])
            options = {"template": self.template, "share_prefix": self.share_prefix}
            made["nll"] = continuation_nll(self.model, prompts, texts, **options).tolist()
            made["score"] = self._scores(texts).tolist()
        return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]

    def _texts(self, asked: list[str]) -> dict[str, Sequence[Any]]:
        """Steered texts, and what the residual stream was while they were written."""
        reader = _Reader(self.vectors, self.detector, len(asked))
        hooks = reader.hooks()
        with rows_apart(RowsApart(n_hooks=len(hooks))), with_hooks(self.model, hooks):
            texts = generate(
                self.model,
                asked,
                max_new_tokens=self.max_new_tokens,
                template=self.template,
                share_prefix=self.share_prefix,
            )
        return {"text": texts, "flow": reader.flow().tolist(), "inside_score": reader.scores().tolist()}

    def _logit_differences(self, asked: list[str], answers: tuple[str, str]) -> list[float]:
        first, second = (_first_token(self.model, answer) for answer in answers)
        options = {"template": self.template, "share_prefix": self.share_prefix}
        logits = next_token_logits(self.model, asked, **options).float()
        return (logits[:, first] - logits[:, second]).tolist()

    def _scores(self, texts: list[str]) -> Scores:
        """The detector's scores of the texts alone; NaN for one that is empty."""
        scores = np.full(len(texts), np.nan)
        written = [i for i, text in enumerate(texts) if text.strip()]
        if self.detector is not None and written:
            some = [texts[i] for i in written]
            scores[written] = self.detector.score(some, model=self.model, share_prefix=self.share_prefix)
        return scores

    def _plans(self) -> list[SteeringPlan]:
        return [arm.plan for arm in self.arms if arm.plan is not None]

    def _stacked(self, plans: Sequence[SteeringPlan | None]) -> SteeringPlan:
        """One plan for the rows; a row without one is steered with multiplier 0."""
        some = self._plans()[0]
        return SteeringPlan.stack([some.off() if plan is None else plan for plan in plans])

    def assemble(
        self, jobs: list[tuple[str, int, int]], done: "_Journal"
    ) -> tuple[pd.DataFrame, Float[np.ndarray, "row layer"]]:
        rows = [row for job in jobs if job[0] == "rows" for row in done.rows(job)]
        kl = [row["kl"] for job in jobs if job[0] == "kl" for row in done.rows(job)]
        steered = [arm.key for arm in self.arms if arm.plan is not None]
        damage = dict(zip(steered, kl, strict=False)) | {(UNSTEERED, NOWHERE, 0.0): 0.0}
        groups = self.prompts.groups
        table = [
            self._row(prompt, self.arms[arm], int(groups[prompt]), damage, row)
            for (prompt, arm), row in zip(self.rows, rows, strict=True)
        ]
        nothing = [np.nan] * len(self.vectors.layers)
        flow = np.array([row.get("flow", nothing) for row in rows], dtype=float)
        return pd.DataFrame(table), flow

    def _row(
        self, prompt: int, arm: _Arm, group: int, damage: dict[tuple, float], row: dict[str, Any]
    ) -> dict[str, Any]:
        text, own = row.get("text", ""), self.prompts.texts[prompt]
        written = bool(text.strip())
        at = self.vectors.layers.index(arm.layer) if arm.layer != NOWHERE and "flow" in row else None
        return {
            "direction": arm.direction,
            "layer": arm.layer,
            "multiplier": arm.multiplier,
            "dose": arm.dose,
            "prompt": own,
            "group": group,
            "text": text,
            "behaviour": float(self.behaviour(own, text)) if callable(self.behaviour) else np.nan,
            "logit_difference": row.get("logit_difference", np.nan),
            "score": row.get("score", np.nan),
            "inside_score": row.get("inside_score", np.nan),
            "projection": np.nan if at is None else row["flow"][at],
            "nll": row.get("nll", np.nan),
            "kl": damage.get(arm.key, np.nan),
            "repeated_4grams": repeated_4grams(text) if written else np.nan,
            "distinct_2grams": distinct_2grams(text) if written else np.nan,
        }

    def identity(self) -> str:
        """What the rows depend on: a journal of anything else is another sweep's."""
        digest = hashlib.sha256()
        for arm in self.arms:
            digest.update(repr((arm.key, arm.words)).encode())
            if arm.plan is not None:
                write = arm.plan.writes[arm.layer]
                digest.update(f"{arm.plan.operator!r} {arm.plan.positions}".encode())
                for tensor in (write.vector, write.safe_mean, write.dangerous_mean):
                    digest.update(tensor.numpy().tobytes())
        neutral = (
            None if self.neutral is None else as_prompts(self.neutral).texts if len(self.neutral) else []
        )
        answers = self.behaviour if isinstance(self.behaviour, tuple) else None
        detector = None if self.detector is None else self.detector.digest
        plain = [self.prompts.texts, neutral, answers, detector, self.max_new_tokens]
        plain += [tok.template_name(self.model, self.template), self.vectors.model.to_dict()]
        digest.update(json.dumps(plain, default=str).encode())
        return digest.hexdigest()[:16]


class _Reader:
    """Means of the residual stream over the generated tokens of each row, read while they are written."""

    def __init__(self, vectors: ContentVectors, detector: Detector | None, n_rows: int):
        self._layers = vectors.layers
        self._unit = vectors.unit
        self._detector = detector
        self._along = torch.zeros(n_rows, len(vectors.layers))
        self._stream = {
            layer: torch.zeros(n_rows, vectors.vectors.shape[1]) for layer in self._for_detector()
        }
        self._n = torch.zeros(n_rows)

    def _for_detector(self) -> tuple[int, ...]:
        return () if self._detector is None else self._detector.layers

    def hooks(self) -> list[tuple[str, Hook]]:
        layers = sorted({*self._layers, *self._stream})
        return [(resid_hook(layer), self._hook(layer, layer == layers[0])) for layer in layers]

    def _hook(self, layer: int, counts: bool) -> Hook:
        def hook_fn(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            run = current_pass(resid.shape[1])
            if bool((run.place < 0).any()):
                return
            still = torch.ones(len(resid)) if run.running is None else run.running.cpu().float()
            if counts:
                self._n += still
            new = resid[:, -1].float().cpu()
            if layer in self._stream:
                self._stream[layer] += still[:, None] * new
            if layer in self._layers:
                number = self._layers.index(layer)
                self._along[:, number] += still * (new @ self._unit[number])

        return hook_fn

    def flow(self) -> Float[np.ndarray, "row layer"]:
        return (self._along / self._n[:, None]).numpy()

    def scores(self) -> Float[np.ndarray, " row"]:
        scores = np.full(len(self._n), np.nan)
        if self._detector is not None:
            some = self._n > 0
            stream = torch.stack([self._stream[layer] for layer in self._detector.layers])
            if bool(some.any()):
                scores[some.numpy()] = self._detector.score_resid(stream[:, some] / self._n[some, None])
        return scores


class _Journal:
    """Finished jobs, a line of JSON each, in a file of the store (or in memory without one)."""

    def __init__(self, store: str | Path | None, identity: str):
        self._done: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        self._path = None if store is None else Path(store) / f"sweep-{identity}.jsonl"
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        )
        # A line that was being written when the process was killed has no end.
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            write_text(self._path, "".join(whole))
        for line in whole:
            entry = json.loads(line)
            self._done[tuple(entry["job"])] = entry["rows"]

    def __contains__(self, job: tuple[str, int, int]) -> bool:
        return job in self._done

    def rows(self, job: tuple[str, int, int]) -> list[dict[str, Any]]:
        return self._done[job]

    def add(self, job: tuple[str, int, int], rows: list[dict[str, Any]]) -> None:
        self._done[job] = rows
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "rows": rows}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _directions(
    vectors: ContentVectors, controls: Sequence[str], n_random: int, train: ResidualCache | None, seed: int
) -> dict[str, ContentVectors]:
    made = {CONTENT: vectors}
    if "random" in controls:
        made |= {f"{RANDOM} {i + 1}": random_vectors(vectors, seed=seed + i) for i in range(n_random)}
    blind = random_vectors(vectors, seed=seed + n_random)
    if train is not None:
        blind = stand_in(vectors, content_vectors(shuffled(train, seed=seed), method="shuffled labels"))
        if "shuffled" in controls:
            made["shuffled"] = blind
    if "orthogonal" in controls:
        made["orthogonal"] = orthogonal_vectors(vectors, blind)
    return made


def _check(
    prompts: PromptSet,
    strengths: Sequence[float],
    controls: Sequence[str],
    n_random: int,
    max_new_tokens: int,
    behaviour: Any,
) -> None:
    given = [float(m) for m in strengths]
    if not any(given) or len(set(given)) < len(given) or not np.isfinite(given).all():
        raise OptionError(
            f"multipliers {list(strengths)} given, expected finite ones, each once, not 0 alone"
        )
    for name in controls:
        one_of(name, CONTROLS, "control")
    if "random" in controls and n_random < 1:
        raise OptionError(f"n_random={n_random} given, expected 1 or more, or controls without 'random'")
    if max_new_tokens < 0 or (max_new_tokens == 0 and not isinstance(behaviour, tuple)):
        raise OptionError(
            f"max_new_tokens={max_new_tokens} given, expected 1 or more, or 0 with two answers as behaviour"
        )
    twice = [text for text, n in Counter(prompts.texts).items() if n > 1]
    if twice:
        raise PromptError(f"the prompt {min(twice)[:60]!r} is given twice, expected each once")


def _first_token(model: ResidualModel, answer: str) -> int:
    ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise OptionError(f"the answer {answer!r} has no token: expected a word")
    return int(ids[0])
