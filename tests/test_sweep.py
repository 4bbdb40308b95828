"""A sweep: each row is what that steering alone gives; nothing is lost when it is cut short."""

import importlib
import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FRAMED, TEXTS, ended, forked, labelled, shapes_of_passes, write_tiny_model

import lens_safety as ls
from lens_safety import decoding
from lens_safety import tokens as tok
from lens_safety.models import full_logits, resid_hook
from lens_safety.responses import ASKED, CONTENT, NOWHERE, UNSTEERED
from lens_safety.sweep import _directions, distinct_2grams, repeated_4grams

PROMPTS = list(TEXTS[:3])
LAYERS, MULTIPLIERS = (0, 1), (-2.0, 3.0)
ASK = ("Kindly: {prompt}", "Rudely: {prompt}")


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends a text, so that every text has its full length."""
    monkeypatch.setattr(decoding, "end_of_text_ids", lambda tokenizer: [])


def length(prompt: str, text: str) -> float:
    return float(len(text))


@pytest.fixture
def parts(tiny):
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    vectors = ls.content_vectors(cache)
    return tiny, cache, vectors, ls.Detector.fit(cache, layers=[2], vectors=vectors, threshold=0.0)


def run(parts, **options) -> ls.SteeringSweep:
    model, cache, vectors, detector = parts
    given = {
        "layers": LAYERS,
        "multipliers": MULTIPLIERS,
        "train": cache,
        "detector": detector,
        "n_random": 2,
    }
    given |= {"behaviour": length, "ask": ASK, "max_new_tokens": 5, "progress": False}
    return ls.sweep(model, vectors, options.pop("prompts", PROMPTS), **(given | options))


def test_every_direction_layer_multiplier_and_prompt_has_its_row(parts, endless):
    swept = run(parts)
    keys = list(
        swept.frame[["direction", "layer", "multiplier", "prompt"]].itertuples(index=False, name=None)
    )
    directions = (CONTENT, "random 1", "random 2", "shuffled", "orthogonal")
    both_sides = sorted({*MULTIPLIERS, *(-m for m in MULTIPLIERS)})
    expected = {(d, layer, m, p) for d in directions for layer in LAYERS for m in both_sides for p in PROMPTS}
    expected |= {(UNSTEERED, NOWHERE, 0.0, p) for p in PROMPTS}
    expected |= {(ASKED, NOWHERE, m, p) for m in (-1.0, 1.0) for p in PROMPTS}
    assert set(keys) == expected
    assert len(keys) == len(expected)


@pytest.mark.parametrize("positions", ["all", "generated", "prompt", "last:2"])
def test_each_row_is_what_that_steering_alone_writes(parts, endless, positions: str):
    model, _, vectors, _ = parts
    swept = run(parts, positions=positions, controls=("random",), multipliers=(-2.0, 0.0, 3.0))
    directions = {CONTENT: vectors, "random 1": ls.random_vectors(vectors, seed=0)}
    for name, direction in directions.items():
        for layer in LAYERS:
            for m in MULTIPLIERS:
                with ls.steering(model, direction, layers=[layer], multiplier=m, positions=positions):
                    alone = [ls.generate(model, [p], max_new_tokens=5)[0] for p in PROMPTS]
                assert texts_of(swept, name, layer, m) == alone
    assert texts_of(swept, UNSTEERED, NOWHERE, 0.0) == ls.generate(model, PROMPTS, max_new_tokens=5)
    assert len(set(swept.frame["text"])) > 6


def test_what_all_prompts_begin_with_is_run_once_also_while_texts_are_read(parts, endless):
    model = parts[0]
    options = {"prompts": FRAMED, "positions": "generated", "controls": ("random",), "neutral": []}
    beginning = (1, tok.shared_prefix(tok.encode(model, FRAMED)))
    with shapes_of_passes(model) as seen:
        shared = run(parts, **options)
    assert seen[0] == beginning
    assert seen.count(beginning) == 2  # of the texts, and of their costs
    with shapes_of_passes(model) as seen:
        whole = run(parts, **options, share_prefix=False)
    assert beginning not in seen
    assert list(shared.frame["text"]) == list(whole.frame["text"])
    np.testing.assert_allclose(shared.flow, whole.flow, atol=1e-4)
    for column in ("inside_score", "nll", "score"):
        np.testing.assert_allclose(shared.frame[column], whole.frame[column], atol=1e-4)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_answers_are_compared_behind_a_shared_beginning_or_whole(parts, share_prefix: bool):
    model = parts[0]
    options = {"positions": "generated", "behaviour": ("cake", "kite"), "share_prefix": share_prefix}
    with shapes_of_passes(model) as seen:
        run(parts, prompts=FRAMED, neutral=[], controls=(), max_new_tokens=0, **options)
    assert ((1, tok.shared_prefix(tok.encode(model, FRAMED))) in seen) is share_prefix


def texts_of(swept: ls.SteeringSweep, direction: str, layer: int, m: float) -> list[str]:
    rows = swept.frame
    return list(
        rows.loc[
            (rows["direction"] == direction) & (rows["layer"] == layer) & (rows["multiplier"] == m), "text"
        ]
    )


def test_asking_in_words_is_the_unsteered_model_on_other_words(parts, endless):
    model = parts[0]
    swept = run(parts, controls=("asked",))
    for words, m in zip(ASK, (-1.0, 1.0), strict=True):
        asked = [words.replace("{prompt}", p) for p in PROMPTS]
        assert texts_of(swept, ASKED, NOWHERE, m) == ls.generate(model, asked, max_new_tokens=5)


def test_the_measures_of_a_row_are_those_of_its_text(parts, endless):
    model, _, vectors, detector = parts
    swept = run(parts, controls=())
    frame = swept.frame
    np.testing.assert_allclose(frame["behaviour"], [len(text) for text in frame["text"]])
    nll = ls.continuation_nll(model, list(frame["prompt"]), list(frame["text"]))
    np.testing.assert_allclose(frame["nll"], nll, rtol=1e-4)
    np.testing.assert_allclose(frame["score"], detector.score(list(frame["text"]), model=model), atol=1e-5)
    steered = frame.loc[frame["layer"] != NOWHERE]
    dose = [
        float(vectors.dose(m)[vectors.row(at)])
        for m, at in zip(steered["multiplier"], steered["layer"], strict=True)
    ]
    np.testing.assert_allclose(steered["dose"], dose, rtol=1e-5)
    assert frame.loc[frame["direction"] == UNSTEERED, "kl"].eq(0).to_numpy().all()


def test_kl_is_that_of_the_plan_on_the_neutral_prompts(parts, endless):
    model, _, vectors, _ = parts
    swept = run(parts, controls=(), neutral=["a kite", "how do I"])
    for layer in LAYERS:
        for m in MULTIPLIERS:
            plan = ls.steering_plan(model, vectors, layers=[layer], multiplier=m)
            kl = ls.next_token_kl(model, [plan], ["a kite", "how do I"]).mean()
            rows = swept.frame.query("direction == 'content' and layer == @layer and multiplier == @m")
            np.testing.assert_allclose(rows["kl"], kl, rtol=1e-4)
    assert np.ptp(swept.frame["kl"]) > 1e-3


def test_without_neutral_prompts_there_is_no_kl(parts):
    swept = run(parts, controls=(), neutral=[])
    assert swept.frame.loc[swept.frame["direction"] == CONTENT, "kl"].isna().to_numpy().all()


def test_flow_is_the_mean_projection_of_the_generated_tokens_at_each_layer(parts, endless):
    model, _, vectors, detector = parts
    swept = run(parts, controls=(), layers=[1])
    row = int(np.flatnonzero((swept.frame["multiplier"] == 3.0) & (swept.frame["prompt"] == PROMPTS[1]))[0])
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in vectors.layers}

    def listen(layer: int):
        def hook_fn(resid, hook):
            if resid.shape[1] == 1:
                seen[layer].append(resid[0, 0].float())

        return hook_fn

    hooks = [(resid_hook(layer), listen(layer)) for layer in vectors.layers]
    with ls.steering(model, vectors, layers=[1], multiplier=3.0), model.hooks(fwd_hooks=hooks):
        ls.generate(model, [PROMPTS[1]], max_new_tokens=5)
    means = torch.stack([torch.stack(seen[layer]).mean(dim=0) for layer in vectors.layers])
    np.testing.assert_allclose(swept.flow[row], (means * vectors.unit).sum(dim=1), rtol=1e-3, atol=1e-4)
    assert swept.frame["projection"].to_numpy()[row] == pytest.approx(swept.flow[row][1])
    score = detector.score_resid(means[2][None, None])[0]
    assert swept.frame["inside_score"].to_numpy()[row] == pytest.approx(score, abs=1e-4)


def test_two_answers_are_compared_by_the_logits_of_the_steered_model(parts):
    model, _, vectors, _ = parts
    swept = run(parts, controls=("random",), behaviour=(" a", " kite"), max_new_tokens=0, neutral=())
    first, second = (model.tokenizer(word)["input_ids"][0] for word in (" a", " kite"))
    for m in MULTIPLIERS:
        with ls.steering(model, vectors, layers=[1], multiplier=m):
            for prompt in PROMPTS:
                ids = tok.encode(model, [prompt])[0].ids
                logits = full_logits(model, torch.from_numpy(ids)[None])[0, -1]
                rows = swept.frame.query("direction == 'content' and layer == 1 and multiplier == @m")
                got = float(rows.set_index("prompt").loc[prompt, "logit_difference"])  # type: ignore[arg-type]
                assert got == pytest.approx(float(logits[first] - logits[second]), abs=1e-4)
    assert set(swept.frame["text"]) == {""}
    assert swept.measure == "logit_difference"


def test_doses_are_shares_of_each_layers_own_norm(parts):
    _, _, vectors, _ = parts
    swept = run(parts, doses=(-0.1, 0.2), controls=("random",), multipliers=())
    steered = swept.frame.loc[swept.frame["layer"] != NOWHERE]
    assert sorted({round(d, 5) for d in steered["dose"]}) == [0.1, 0.2]
    for layer in LAYERS:
        rows = steered.loc[steered["layer"] == layer]
        of_one = float(vectors.dose(1.0)[vectors.row(layer)])
        np.testing.assert_allclose(sorted(set(rows["multiplier"])), np.array([-0.1, 0.2]) / of_one, rtol=1e-5)


def test_control_multipliers_are_the_controls_alone(parts):
    swept = run(parts, controls=("random",), control_multipliers=[3.0])
    assert set(swept.frame.loc[swept.frame["direction"] == "random 1", "multiplier"]) == {3.0}
    assert set(swept.frame.loc[swept.frame["direction"] == CONTENT, "multiplier"]) == set(MULTIPLIERS)


def test_controls_have_the_vectors_norms_and_the_orthogonal_one_is_orthogonal(parts):
    _, cache, vectors, _ = parts
    made = _directions(vectors, ("random", "shuffled", "orthogonal"), 3, cache, 0)
    for name, one in made.items():
        torch.testing.assert_close(one.norms, vectors.norms, rtol=1e-4, atol=1e-6)
        if name != CONTENT:
            assert (torch.from_numpy(one.cosine(vectors)).abs() < 0.999).all()
    assert np.abs(made["orthogonal"].cosine(vectors)).max() < 1e-4
    assert np.abs(made["random 1"].cosine(made["random 2"])).max() < 0.9


@pytest.mark.parametrize("cut_after", [0, 1, 2])
def test_a_sweep_that_was_cut_short_goes_on_and_gives_the_same_rows(
    parts, endless, tmp_path, monkeypatch: pytest.MonkeyPatch, cut_after: int
):
    room = importlib.import_module("lens_safety.sweep")
    monkeypatch.setattr(room, "_ROWS_A_BATCH", 7)
    whole = run(parts, controls=("random",))
    run(parts, controls=("random",), store=tmp_path)
    journal = next(tmp_path.glob("sweep-*.jsonl"))
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    journal.write_text("".join(lines[:cut_after]) + lines[cut_after][:20])
    done: list[tuple] = []
    do = room._Run.do
    monkeypatch.setattr(room._Run, "do", lambda self, job: done.append(job) or do(self, job))
    again = run(parts, controls=("random",), store=tmp_path)
    assert len(done) == len(lines) - cut_after
    pd.testing.assert_frame_equal(again.frame, whole.frame)
    np.testing.assert_array_equal(again.flow, whole.flow)


def test_another_sweep_does_not_read_the_journal_of_this_one(parts, tmp_path):
    run(parts, controls=(), store=tmp_path)
    for other in (
        {"multipliers": (1.0,)},
        {"positions": "generated"},
        {"max_new_tokens": 4},
        {"operator": "rotate"},
    ):
        before = len(list(tmp_path.glob("*.jsonl")))
        run(parts, controls=(), store=tmp_path, **other)
        assert len(list(tmp_path.glob("*.jsonl"))) == before + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_sweep_survives_sigkill(tmp_path):
    model = ls.load_model(write_tiny_model(tmp_path / "tiny", "llama"))
    vectors = ls.content_vectors(ls.residual_streams(model, ls.load_prompts("content")[:40], progress=False))

    def sweep(place: Path) -> None:
        swept = ls.sweep(
            model,
            vectors,
            ls.load_prompts("openings")[:16],
            layers=[0, 1, 2],
            multipliers=[-2.0, 2.0],
            max_new_tokens=12,
            store=place,
            progress=False,
        )
        swept.frame.to_csv(place / "rows.csv", index=False)

    def journal(place: Path) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in place.glob("sweep-*.jsonl"))

    store, straight = tmp_path / "store", tmp_path / "straight"
    child, deadline = forked(lambda: sweep(store)), time.monotonic() + 120
    while journal(store).count("\n") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended(child, deadline) == -signal.SIGKILL
    kept = journal(store).splitlines()
    jobs = [json.loads(line)["job"] for line in kept if line.endswith("}")]
    assert jobs
    assert not (store / "rows.csv").exists()
    for place in (store, straight):
        sweep(place)
    assert (store / "rows.csv").read_text() == (straight / "rows.csv").read_text()
    assert journal(store).startswith("\n".join(kept[: len(jobs)]))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"multipliers": ()}, ls.OptionError, "each once"),
        ({"multipliers": (1.0, 1.0)}, ls.OptionError, "each once"),
        ({"multipliers": (0.0,)}, ls.OptionError, "not 0 alone"),
        ({"multipliers": (float("nan"),)}, ls.OptionError, "expected finite ones"),
        ({"controls": ("noise",)}, ls.OptionError, "unknown control 'noise'"),
        ({"n_random": 0}, ls.OptionError, "n_random=0 given"),
        ({"max_new_tokens": -1}, ls.OptionError, "max_new_tokens=-1 given"),
        ({"max_new_tokens": 0}, ls.OptionError, "0 with two answers"),
        ({"behaviour": ("", "b")}, ls.OptionError, "has no token"),
        ({"layers": [7]}, ls.OptionError, "layer 7 given"),
        ({"operator": "shove"}, ls.OptionError, "unknown operator 'shove'"),
        ({"positions": "middle"}, ls.OptionError, "unknown positions 'middle'"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_a_sentence(parts, options, error, says: str):
    with pytest.raises(error, match=says):
        run(parts, **options)


def test_prompts_are_given_once_and_are_not_empty(parts):
    model, _, vectors, _ = parts
    for prompts, says in ((["a cake", "a cake"], "given twice"), ([" "], "empty"), ([], "no prompts")):
        with pytest.raises(ls.PromptError, match=says):
            ls.sweep(model, vectors, prompts, layers=[1], progress=False)


def test_repeated_4grams_by_hand():
    assert repeated_4grams("a b c d e f") == 0.0
    assert repeated_4grams("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repeated_4grams("no no no no no no") == pytest.approx(1 - 1 / 3)
    assert repeated_4grams("too short") == 0.0


def test_distinct_2grams_by_hand():
    assert distinct_2grams("a b c") == 1.0
    assert distinct_2grams("a b a b") == pytest.approx(2 / 3)
    assert distinct_2grams("no no no no") == pytest.approx(1 / 3)
    assert distinct_2grams("one") == 1.0


def test_jobs_cover_each_row_once(parts, monkeypatch: pytest.MonkeyPatch):
    room = importlib.import_module("lens_safety.sweep")
    monkeypatch.setattr(room, "_ROWS_A_BATCH", 4)
    jobs: list[tuple[str, int, int]] = []
    do = room._Run.do
    monkeypatch.setattr(room._Run, "do", lambda self, job: jobs.append(job) or do(self, job))
    swept = run(parts, controls=())
    rows = [job for job in jobs if job[0] == "rows"]
    assert rows[0][1] == 0
    assert rows[-1][2] == len(swept.frame)
    assert all(a[2] == b[1] for a, b in pairwise(rows))
    assert max(job[2] - job[1] for job in rows) == 4
