from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import N_LAYERS, TEXTS, labelled, planted_cache

import lens_safety as ls
from lens_safety.models import resid_hook
from lens_safety.readings import UNFINISHED
from lens_safety.tokens import Position, encode

POSITIONS = ("content_mean", "content_last", "last", "max")
OVER = ("best", "mean", "vote", "concat")
TRAIN = labelled([f"{text} {i}" for i in range(4) for text in TEXTS])
PROMPTS = ["make a kite", "how do I make a cake or a garden", "do 🪁 for 蛋糕"]


def read(model, prompts: Any = TRAIN, position: Position = "content_mean", template="auto", layers=None):
    return ls.residual_streams(
        model, prompts, position=position, template=template, layers=layers, progress=False
    )


def last_running(scores: ls.TokenScores, reader: str) -> list[float]:
    """The running score after the last content token of each prompt; of the last token for "last"."""
    found = []
    for prompt in range(len(scores.prompts)):
        rows = scores.of(prompt, reader)
        rows = rows.loc[rows["content"] | (scores.position == "last")]
        found.append(float(rows["running"].iloc[-1]))
    return found


@pytest.mark.parametrize("position", POSITIONS)
def test_the_last_running_score_is_the_prompts_score(tiny, position):
    train, held_out = read(tiny, position=position), read(tiny, PROMPTS, position)
    vectors = ls.content_vectors(train)
    by_layer = ls.layer_scores(held_out, vectors)
    for over in OVER:
        detector = ls.Detector.fit(train, over=over, layers=[0, 2] if over != "best" else None)
        scores = ls.token_scores(tiny, PROMPTS, detector=detector, vectors=vectors)
        np.testing.assert_allclose(last_running(scores, "detector"), detector.score(held_out), atol=2e-5)
        assert set(scores.frame.loc[scores.frame["reader"] == "detector", "cut"]) == {detector.threshold}
        assert scores.readers == ("detector", *(f"layer {layer}" for layer in range(N_LAYERS)))
    for layer in range(N_LAYERS):
        np.testing.assert_allclose(last_running(scores, f"layer {layer}"), by_layer[layer], atol=2e-5)


def test_a_tokens_own_score_is_that_of_its_residual_stream(tiny):
    train = read(tiny, position="max")
    detector, vectors = ls.Detector.fit(train, method="logistic"), ls.content_vectors(train)
    scores = ls.token_scores(tiny, PROMPTS, detector=detector, vectors=vectors, layers=[2, 0])
    assert scores.readers == ("detector", "layer 2", "layer 0")
    for place in (0, 5, -1):
        alone = replace(read(tiny, PROMPTS, place), position="max")
        for reader, expected in (
            ("detector", detector.score(alone)),
            *zip(("layer 2", "layer 0"), ls.layer_scores(alone, vectors, [2, 0]), strict=True),
        ):
            found = [scores.of(i, reader)["score"].iloc[place] for i in range(len(PROMPTS))]
            np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_what_follows_a_token_does_not_change_its_scores(tiny, position):
    train = read(tiny, position=position, template="raw")
    vectors = ls.content_vectors(train)
    whole, start = (
        ls.token_scores(tiny, [text], detector=ls.Detector.fit(train), vectors=vectors)
        for text in ("make a cake for the garden", "make a cake")
    )
    for reader in start.readers:
        longer, shorter = (one.of(0, reader)[["score", "running"]].to_numpy() for one in (whole, start))
        assert len(longer) > len(shorter)
        np.testing.assert_allclose(longer[: len(shorter)], shorter, atol=1e-5, rtol=1e-5)
    # Any other beginning changes what comes after it.
    other = ls.token_scores(tiny, ["do a cake for the garden"], vectors=vectors)
    assert other.of(0, "layer 1")["running"].iloc[-1] != pytest.approx(
        whole.of(0, "layer 1")["running"].iloc[-1]
    )


def test_running_starts_with_the_first_content_token(tiny):
    scores = ls.token_scores(tiny, ["a kite"], vectors=ls.content_vectors(read(tiny)))
    rows = scores.of(0, "layer 1")
    first = int(rows["content"].argmax())
    assert first > 0
    running = rows["running"].to_numpy()
    assert np.isnan(running[:first]).all()
    assert running[first] == pytest.approx(rows["score"].iloc[first])
    assert np.isfinite(running[first:]).all()


def test_each_prompt_is_run_once(tiny):
    calls = []
    train = read(tiny)
    detector, vectors = ls.Detector.fit(train, over="concat"), ls.content_vectors(train)
    with tiny.hooks(fwd_hooks=[(resid_hook(0), lambda resid, hook: calls.append(len(resid)))]):
        ls.token_scores(tiny, PROMPTS, detector=detector, vectors=vectors)
    assert calls == [1, 1, 1]


def test_tokens_are_readable_and_as_many_as_the_model_sees(tiny):
    vectors = ls.content_vectors(read(tiny))
    text = "do 🪁 for 蛋糕é!"
    rows = ls.token_scores(tiny, [text], vectors=vectors).of(0, "layer 0")
    assert len(rows) == len(encode(tiny, [text])[0])
    own = rows.loc[rows["content"], "token"].tolist()
    assert not any("\ufffd" in token for token in own)
    assert "".join(own).replace(UNFINISHED, "") == text
    kite = own.index("🪁")
    assert own[kite - 3 : kite] == [UNFINISHED] * 3
    assert "<|im_start|>" in rows["token"].tolist()


def test_token_scores_are_saved_and_shown(tiny, tmp_path):
    scores = ls.token_scores(tiny, ["a <b>kite</b>"], vectors=ls.content_vectors(read(tiny)))
    loaded = ls.TokenScores.load(scores.save(tmp_path / "scores.json"))
    pd.testing.assert_frame_equal(loaded.frame, scores.frame)
    assert loaded.prompts == ("a <b>kite</b>",)
    assert "ls.plots.token_views(scores, reader=None)" in scores._repr_html_()
    assert len(scores.of(0, scores.readers[0])) == len(scores.frame) / N_LAYERS
    assert "<b>kite" not in scores._repr_html_()


def test_layer_scores_are_one_at_the_dangerous_mean_and_minus_one_at_the_safe_one():
    cache, _ = planted_cache(20)
    vectors = ls.content_vectors(cache)
    for mean, expected in ((vectors.dangerous_mean, 1), (vectors.safe_mean, -1)):
        at_mean = replace(cache[:1], resid=mean[:, None, :])
        np.testing.assert_allclose(ls.layer_scores(at_mean, vectors), expected, atol=1e-5)
    ends = torch.stack([vectors.dangerous_mean, vectors.safe_mean])
    near = torch.nn.functional.normalize(ends, dim=-1).sum(dim=0)
    between = replace(cache[:1], resid=near[:, None, :])
    np.testing.assert_allclose(ls.layer_scores(between, vectors), 0, atol=1e-5)
    same = replace(vectors, safe_mean=vectors.dangerous_mean)
    np.testing.assert_array_equal(ls.layer_scores(cache, same, [1]), np.zeros((1, 20)))


def test_a_known_prompt_is_its_own_nearest():
    train, _ = planted_cache(30)
    found = ls.nearest_prompts(train[[4, 11]], train, layer=1, k=3)
    assert found["prompt"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    own = found[found["rank"] == 1]
    assert own["text"].tolist() == [train.prompts.texts[4], train.prompts.texts[11]]
    assert own["label"].tolist() == [False, True]
    np.testing.assert_allclose(own["cosine"], 1, atol=1e-5)
    for _, rows in found.groupby("prompt"):
        assert rows["cosine"].is_monotonic_decreasing
    centred = train.layer(1) - train.layer(1).mean(dim=0)
    by_hand = torch.cosine_similarity(centred[4], centred).sort(descending=True).values[:3]
    np.testing.assert_allclose(found["cosine"].head(3), by_hand, atol=1e-5)
    assert len(ls.nearest_prompts(train[[0]], train, layer=1, k=99)) == 30


def test_attention_rows_are_causal_and_sum_to_one(any_tiny):
    patterns = ls.attention_patterns(any_tiny, "make a kite 🪁", layers=[2, 0], template="raw")
    pattern, n = patterns.pattern, len(patterns.tokens)
    assert pattern.shape == (2, any_tiny.cfg.n_heads, n, n)
    torch.testing.assert_close(pattern.sum(dim=-1), torch.ones(pattern.shape[:-1]))
    assert not pattern.triu(1).any()
    assert patterns.layers == (2, 0)
    assert patterns.tokens[-1] == "🪁"
    alone = ls.attention_patterns(any_tiny, "make a kite 🪁", layers=[0], template="raw")
    assert torch.equal(alone.pattern[0], pattern[1])
    assert "ls.plots.attention_view(patterns, layer=2)" in patterns._repr_html_()


def test_attention_is_the_same_on_both_engines(tiny, tiny_folders, tiny_models):
    if "bridge" not in tiny_models:
        tiny_models["bridge"] = ls.load_model(tiny_folders["llama"], engine="bridge")
    mine, other = (
        ls.attention_patterns(model, "make a kite", layers=[0, 1, 2]).pattern
        for model in (tiny, tiny_models["bridge"])
    )
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def refused(error: type[Exception], words: str, call) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    assert "given" in said


def test_what_cannot_be_read_is_refused_in_one_sentence(tiny):
    train = read(tiny)
    vectors, detector = ls.content_vectors(train), ls.Detector.fit(train)
    stranger = replace(vectors.model, d_model=17)
    one_place = ls.content_vectors(read(tiny, position=3))

    def scored(**readers):
        return lambda: ls.token_scores(tiny, ["a kite"], **readers)

    refused(ls.OptionError, "neither a detector nor vectors", scored())
    refused(ls.OptionError, "without vectors", scored(detector=detector, layers=[1]))
    refused(ls.OptionError, "position '3' given", scored(vectors=one_place))
    refused(ls.OptionError, "layer 3 given", scored(vectors=vectors, layers=[3]))
    refused(ls.OptionError, "each layer once", scored(vectors=vectors, layers=[1, 1]))
    refused(ls.OptionError, "no layers", scored(vectors=vectors, layers=[]))
    refused(ls.MismatchError, "17", scored(vectors=replace(vectors, model=stranger)))
    refused(ls.MismatchError, "17", scored(detector=replace(detector, model=stranger)))
    refused(
        ls.MismatchError,
        "same position",
        scored(detector=detector, vectors=replace(vectors, position="last")),
    )
    some = ls.content_vectors(read(tiny, layers=[0, 1]))
    refused(ls.MismatchError, "layer 2 given", scored(vectors=some, layers=[2]))
    refused(ls.PromptError, "one string", lambda: ls.token_scores(tiny, "a kite", vectors=vectors))
    scores = ls.token_scores(tiny, ["a kite"], vectors=vectors)
    refused(ls.OptionError, "prompt 1 by 'layer 0'", lambda: scores.of(1, "layer 0"))


def test_caches_and_layers_that_do_not_belong_are_refused(tiny):
    cache, _ = planted_cache(12)
    vectors, last = ls.content_vectors(cache), replace(cache, position="last")
    stranger = replace(cache, model=replace(cache.model, d_model=17))
    refused(ls.MismatchError, "17", lambda: ls.layer_scores(stranger, vectors))
    refused(ls.MismatchError, "same position", lambda: ls.layer_scores(last, vectors))
    refused(ls.MismatchError, "layer 7", lambda: ls.layer_scores(cache, vectors, [7]))
    refused(ls.OptionError, "no layers", lambda: ls.layer_scores(cache, vectors, []))
    refused(ls.MismatchError, "17", lambda: ls.nearest_prompts(stranger, cache, layer=1))
    refused(ls.MismatchError, "same position", lambda: ls.nearest_prompts(last, cache, layer=1))
    refused(ls.MismatchError, "layer 7", lambda: ls.nearest_prompts(cache, cache, layer=7))
    refused(ls.OptionError, "k=0", lambda: ls.nearest_prompts(cache, cache, layer=1, k=0))
    for layers, words in (([], "no layers"), ([3], "layer 3"), ([-1], "layer -1"), ([0, 0], "once")):
        refused(ls.OptionError, words, lambda layers=layers: ls.attention_patterns(tiny, "a", layers=layers))
    with pytest.raises(ls.PromptError, match="empty"):
        ls.attention_patterns(tiny, " ", layers=[0])


def test_the_bands_of_the_classes_are_the_middle_of_their_layer_scores():
    cache, _ = planted_cache(60)
    vectors = ls.content_vectors(cache)
    scores, labels = ls.layer_scores(cache, vectors), cache.prompts.labels
    bands = ls.class_bands(cache, vectors)
    assert list(bands["layer"]) == list(vectors.layers)
    low, high = np.quantile(scores[1, labels], [0.1, 0.9])
    assert (bands["dangerous_low"][1], bands["dangerous_high"][1]) == (low, high)
    inside = (scores[1, ~labels] >= bands["safe_low"][1]) & (scores[1, ~labels] <= bands["safe_high"][1])
    assert inside.mean() == pytest.approx(0.8, abs=0.05)
    assert bands["dangerous_low"].to_numpy()[1] > bands["safe_high"].to_numpy()[1]
    with pytest.raises(ls.PromptError, match="no dangerous prompt"):
        ls.class_bands(cache[~labels], vectors)
