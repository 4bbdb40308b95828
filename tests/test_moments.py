"""Moments: sums that stream past give what all rows at once give, whatever the order and the chunks."""

from dataclasses import replace
from functools import reduce
from importlib import import_module
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, cache_of, constant_cache, labelled, planted_cache

import lens_safety as ls
from lens_safety.files import load_tensors, save_tensors
from lens_safety.metrics import cohens_d
from lens_safety.moments import ClassMoments, Moments
from lens_safety.residuals import ResidualCache
from lens_safety.scorers import fit_scorer
from lens_safety.types import FileError, MismatchError, OptionError, PromptError

ROOM = import_module("lens_safety.moments")
MORE = ("a garden", *TEXTS, "how do I make a garden or a kite", "cake cake cake")


def streamed(model, prompts=None, **options) -> Moments:
    return ls.moments(model, labelled(MORE) if prompts is None else prompts, progress=False, **options)


def read(model, prompts=None, **options) -> ResidualCache:
    prompts = labelled(MORE) if prompts is None else prompts
    return ls.residual_streams(model, prompts, progress=False, **options)


def by_hand(cache: ResidualCache, label: bool) -> dict[str, torch.Tensor]:
    """The sums of a class from all its rows at once, in double precision."""
    rows = torch.cat([cache.embed[None], cache.resid])[:, torch.from_numpy(cache.prompts.labels == label)]
    x = rows.double()
    d = x - x.mean(dim=1, keepdim=True)
    squares = (d**2).sum(dim=2)
    return {
        "mean": x.mean(dim=1),
        "scatter": torch.einsum("spi,spj->sij", d, d),
        "third": torch.einsum("sp,spi->si", squares, d),
        "fourth": (squares**2).sum(dim=1),
        "norms": rows.norm(dim=2).sort(dim=1).values,
    }


def sums(one: ClassMoments) -> dict[str, torch.Tensor]:
    assert one.spread is not None
    return {"mean": one.mean, "norms": one.norms.sort(dim=1).values, **vars(one.spread)}


def far(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest distance between two sums, relative to the sum."""
    assert set(got) == set(want)
    return max(float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-30)) for name in want)


def apart(one: Moments, other: Moments) -> float:
    assert (one.safe.n, one.dangerous.n) == (other.safe.n, other.dangerous.n)
    return max(far(sums(one.safe), sums(other.safe)), far(sums(one.dangerous), sums(other.dangerous)))


def same_vectors(got: ls.ContentVectors, want: ls.ContentVectors, rtol: float) -> None:
    for name in ("vectors", "safe_mean", "dangerous_mean", "resid_norm"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=rtol, atol=rtol)
    plain = ("layers", "method", "n_safe", "n_dangerous", "position", "template", "source", "model")
    for name in plain:
        assert getattr(got, name) == getattr(want, name), name


@pytest.mark.parametrize("position", ["content_mean", "last"])
def test_they_are_those_of_all_rows_at_once_in_double_precision(tiny, position):
    # 60 tokens a batch: several batches, of which some have one class only.
    got, cache = streamed(tiny, position=position, batch_tokens=60), read(tiny, position=position)
    for one, label in (got.safe, False), (got.dangerous, True):
        assert one.n == int((cache.prompts.labels == label).sum()) == 4
        assert all(tensor.dtype == torch.float64 for name, tensor in sums(one).items() if name != "norms")
        assert far(sums(one), by_hand(cache, label)) < 1e-5
    same_vectors(got.content_vectors(), ls.content_vectors(cache), 1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_order_batches_and_chunks_change_nothing(tiny, monkeypatch: pytest.MonkeyPatch, batch_tokens: int):
    whole = streamed(tiny)
    monkeypatch.setattr(ROOM, "CHUNK", 3)
    prompts = labelled(MORE)
    shuffled = prompts[np.array([6, 0, 3, 7, 5, 1, 2, 4])]
    for some in (shuffled, iter(shuffled), list(prompts)):
        assert apart(streamed(tiny, some, batch_tokens=batch_tokens), whole) < 1e-5
    in_two = streamed(tiny, prompts[:5]) + streamed(tiny, prompts[5:], batch_tokens=batch_tokens)
    assert apart(in_two, whole) < 1e-5
    assert apart(streamed(tiny, labelled(MORE[::-1])), whole) > 0.01


def test_an_iterator_is_read_a_chunk_at_a_time(tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ROOM, "CHUNK", 3)
    taken, at_pass = [], []

    def prompts():
        for prompt in labelled(MORE):
            taken.append(prompt)
            yield prompt

    handle = tiny.register_forward_pre_hook(lambda *_: at_pass.append(len(taken)))
    try:
        got = streamed(tiny, prompts(), share_prefix=False)
    finally:
        handle.remove()
    assert at_pass == [3, 6, 8]
    assert (len(got), got.source) == (8, "prompts")


def test_batches_are_as_large_as_asked_for_and_long_prompts_cut_where_allowed(tiny):
    sizes = []
    handle = tiny.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        for batch_tokens in (1, 10_000):
            streamed(tiny, batch_tokens=batch_tokens, share_prefix=False)
    finally:
        handle.remove()
    assert sizes == [1] * 8 + [8]
    long = labelled(["a cake or a kite " * 40, "x"])
    with pytest.raises(PromptError, match="pass truncate=True"):
        streamed(tiny, long)
    assert apart(streamed(tiny, long, truncate=True), Moments.of(read(tiny, long, truncate=True))) < 1e-5


def test_layers_and_what_they_were_read_from_are_kept(tiny):
    cache = read(tiny, layers=[2, 0], template="raw")
    got = streamed(tiny, layers=[2, 0], template="raw")
    assert (got.layers, got.position, got.template, got.source) == (
        (2, 0),
        "content_mean",
        "raw",
        "test prompts",
    )
    assert got.model == ls.fingerprint(tiny)
    same_vectors(got.content_vectors(), ls.content_vectors(cache), 1e-5)
    assert apart(got, Moments.of(cache)) < 1e-5


def test_the_table_has_the_figures_of_the_layer_table():
    cache, _ = planted_cache(40)
    frame, table = Moments.of(cache).to_frame(), ls.layer_table(cache, n_resamples=4, n_shuffles=2).frame
    for name in ("layer", "name", "is_zero"):
        assert frame[name].tolist() == table[name].tolist()
    for name in ("separation", "magnitude", "relative_magnitude"):
        np.testing.assert_allclose(frame[name], table[name], rtol=1e-4, atol=1e-6)


def test_cohens_d_is_that_of_the_projections():
    (cache, _), (other, _) = planted_cache(41), planted_cache(30, seed=5)
    got, vectors = Moments.of(cache), ls.content_vectors(other)
    for used, found in (
        (ls.content_vectors(cache), got.to_frame()["cohens_d_in_sample"].to_numpy()[1:]),
        (vectors, got.cohens_d(vectors)),
    ):
        scores = torch.einsum("lpd,ld->lp", cache.resid.double(), used.unit.double()).numpy()
        want = [cohens_d(row, cache.prompts.labels) for row in scores]
        np.testing.assert_allclose(found, want, rtol=1e-5)
    flattered, honest = got.to_frame()["cohens_d_in_sample"].to_numpy()[1:], got.cohens_d(vectors)
    assert (flattered > honest).all()
    assert honest[1] > 2 > abs(honest[0])
    np.testing.assert_allclose(got.cohens_d(-vectors), -honest)
    some = Moments.of(replace(cache, resid=cache.resid[[2, 0]], layers=(2, 0)))
    np.testing.assert_allclose(some.cohens_d(vectors), honest[[2, 0]])


@pytest.mark.parametrize("shrinkage", [0, 0.1, 0.75])
def test_lda_is_that_of_scikit_learn(shrinkage: float):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    cache, _ = planted_cache(47, shift=2.0)
    got = Moments.of(cache).lda(shrinkage)
    for row in range(3):
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None)
        want = peer.fit(cache.resid[row].double().numpy(), cache.prompts.labels).coef_[0]
        np.testing.assert_allclose(got.unit[row], want / np.linalg.norm(want), atol=1e-5)
    own = ls.content_vectors(cache)
    assert ((got.vectors * own.vectors).sum(dim=1) > 0).all()
    torch.testing.assert_close(got.norms, own.norms)
    assert got.method == f"lda (shrinkage {shrinkage})"


def test_lda_shrinks_by_itself_as_the_detector_does():
    # Features of unequal size, so that the share is neither 0 nor 1.
    cache, _ = planted_cache(47, shift=2.0)
    cache = replace(cache, resid=cache.resid * torch.linspace(0.2, 3, 16))
    labels, groups = cache.prompts.labels, cache.prompts.groups
    got = (Moments.of(cache[:20]) + Moments.of(cache[20:])).lda()
    for row in range(3):
        want = fit_scorer(cache.resid[row], labels, groups, "lda")["weight"]
        torch.testing.assert_close(got.unit[row], want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got.unit, Moments.of(cache).lda(0).unit, atol=1e-2)


def test_a_sum_is_the_moments_of_all_rows_and_associative():
    cache, _ = planted_cache(31)
    parts = [Moments.of(cache[rows]) for rows in (slice(0, 1), slice(1, 9), slice(9, 11), slice(11, 31))]
    before = [(sums(part.safe)["scatter"].clone(), part.safe.mean.clone()) for part in parts]
    whole, (a, b, c, d) = Moments.of(cache), parts
    for total in (((a + b) + c) + d, a + (b + (c + d)), d + a + c + b):
        assert apart(total, whole) < 1e-12
        assert total.source == "test prompts"
    assert not torch.allclose((a + b + d).safe.mean, whole.safe.mean, atol=1e-3)
    for part, (scatter, mean) in zip(parts, before, strict=True):
        assert torch.equal(sums(part.safe)["scatter"], scatter)
        assert torch.equal(part.safe.mean, mean)


def test_a_large_mean_beside_a_small_spread_costs_no_digits():
    """Mean 1e4, spread 1: sums of squares in single precision have no digit left."""
    generator = torch.Generator().manual_seed(0)
    resid = 1e4 + torch.randn(3, 400, 16, generator=generator)
    cache = cache_of(resid, np.arange(400) % 2 == 1)
    total = reduce(add, [Moments.of(cache[start : start + 7]) for start in range(0, 400, 7)])
    kept = {name: value[1:] for name, value in sums(total.safe).items()}
    want = {name: value[1:] for name, value in by_hand(cache, False).items()}
    assert far(kept, want) < 1e-9
    rows = resid[:, ::2]
    naive = rows.mT @ rows - 200 * rows.mean(dim=1)[:, :, None] * rows.mean(dim=1)[:, None]
    assert float((naive - want["scatter"]).norm() / want["scatter"].norm()) > 0.5


def test_one_class_is_enough_to_be_added_to_but_not_for_a_direction():
    cache, _ = planted_cache(20)
    labels = cache.prompts.labels
    safe, dangerous = Moments.of(cache[~labels]), Moments.of(cache[labels])
    assert (safe.safe.n, safe.dangerous.n, len(safe)) == (10, 0, 10)
    one_sentence = "of test prompts are of 0 dangerous and 10 safe prompts: expected at least one of each"
    for needs_both in (safe.content_vectors, safe.to_frame, safe.lda):
        with pytest.raises(PromptError, match=one_sentence):
            needs_both()
    assert "one class only" in safe._repr_html_()
    assert apart(safe + dangerous, Moments.of(cache)) < 1e-12
    same_vectors((dangerous + safe).content_vectors(), ls.content_vectors(cache), 1e-6)


def test_a_class_of_one_prompt_has_a_direction_and_no_effect_size():
    cache, _ = planted_cache(20)
    got = Moments.of(cache[:10]) + Moments.of(cache[11:12])
    few = Moments.of(cache[np.array([0, 2, 4, 1])])
    assert np.isfinite(got.to_frame()["cohens_d_in_sample"].to_numpy()).all()
    assert np.isnan(few.to_frame()["cohens_d_in_sample"]).all()
    assert few.content_vectors().n_dangerous == 1


def test_equal_classes_have_no_direction_and_no_effect():
    got = Moments.of(constant_cache())
    frame = got.to_frame()
    assert frame["is_zero"].to_numpy().all()
    assert frame["cohens_d_in_sample"].tolist() == [0.0] * 4
    assert (got.lda().unit == 0).all()
    assert (got.lda(0.5).unit == 0).all()


def test_classes_that_do_not_vary_are_told_apart_by_their_means():
    labels = np.arange(12) % 2 == 1
    rows = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
    got = Moments.of(cache_of(rows[:, labels.astype(int)], labels))
    torch.testing.assert_close(got.lda().unit, got.content_vectors().unit)
    assert np.isposinf(got.to_frame()["cohens_d_in_sample"].to_numpy()[1:]).all()


def test_means_alone_are_enough_for_content_vectors_and_separation(tiny):
    got, whole = streamed(tiny, scatter=False), streamed(tiny)
    assert got.safe.spread is got.dangerous.spread is None
    same_vectors(got.content_vectors(), whole.content_vectors(), 1e-6)
    lacks = set(whole.to_frame()) - set(got.to_frame())
    assert lacks == {"cohens_d_in_sample"}
    twice = got + got
    torch.testing.assert_close(twice.safe.mean, got.safe.mean)
    assert twice.safe.n == 2 * got.safe.n
    for needs_scatter in (got.lda, lambda: got.cohens_d(whole.content_vectors())):
        with pytest.raises(MismatchError, match=r"without a scatter given: expected .* scatter=True"):
            needs_scatter()


def test_prompts_without_a_label_are_refused(tiny):
    for prompts in (list(TEXTS), ls.PromptSet(tuple(ls.Prompt(text) for text in TEXTS))):
        with pytest.raises(PromptError, match="has no label: expected every prompt to be labelled"):
            streamed(tiny, prompts)
    with pytest.raises(PromptError, match="given one string"):
        streamed(tiny, TEXTS[0])
    with pytest.raises(PromptError, match="holds no prompts"):
        streamed(tiny, iter(()))
    with pytest.raises(PromptError, match="has no label"):
        Moments.of(replace(planted_cache(4)[0], prompts=ls.PromptSet((ls.Prompt("x"),) * 4)))


def test_moments_that_do_not_belong_together_are_refused():
    cache, _ = planted_cache(20)
    got = Moments.of(cache)
    for other, says in (
        (replace(got, model=replace(got.model, probe=(9.0,) * 4)), "left moments of a sum was made with"),
        (replace(got, position="last"), "position content_mean and last given: expected the same"),
        (replace(got, template="raw"), "template chat and raw given"),
        (replace(got, layers=(0, 2, 1)), r"layers \(0, 1, 2\) and \(0, 2, 1\) given"),
        (Moments.of(cache, scatter=False), "scatter kept: True and False given"),
    ):
        with pytest.raises(MismatchError, match=says):
            _ = got + other
    named = got + replace(got, source="others")
    assert named.source == "test prompts + others"
    with pytest.raises(MismatchError, match="the vectors was made with"):
        got.cohens_d(replace(ls.content_vectors(cache), model=replace(got.model, tokenizer="u")))


def test_a_shrinkage_out_of_range_is_refused():
    got = Moments.of(planted_cache(17)[0])
    for shrinkage in (-0.1, 2):
        with pytest.raises(OptionError, match=f"shrinkage={shrinkage} given, expected 0 to 1"):
            got.lda(shrinkage)
    with pytest.raises(OptionError, match="shrinkage=0 given with 17 prompts: expected at least 18"):
        got.lda(0)
    assert Moments.of(planted_cache(18)[0]).lda(0).norms.isfinite().all()


@pytest.mark.parametrize("scatter", [True, False])
def test_what_is_saved_is_loaded(tmp_path: Path, scatter: bool):
    cache, _ = planted_cache(9)
    for some in (cache, cache[cache.prompts.labels]):
        got = Moments.of(some, scatter=scatter)
        again = Moments.load(got.save(tmp_path / "moments.safetensors"))
        for mine, theirs in (got.safe, again.safe), (got.dangerous, again.dangerous):
            assert mine.n == theirs.n
            assert torch.equal(mine.mean, theirs.mean)
            assert torch.equal(mine.norms, theirs.norms)
            assert (mine.spread is None) == (theirs.spread is None) == (not scatter)
            if scatter:
                assert all(torch.equal(sums(mine)[name], sums(theirs)[name]) for name in sums(mine))
        for name in ("layers", "position", "template", "source", "model"):
            assert getattr(again, name) == getattr(got, name)


def test_a_damaged_file_is_refused(tmp_path: Path):
    cache, _ = planted_cache(9)
    path = Moments.of(cache).save(tmp_path / "moments.safetensors")
    tensors, header = load_tensors(path, "Moments")
    tensors["safe.scatter"] = tensors["safe.scatter"][:, :3]
    save_tensors(path, "Moments", tensors, header)
    with pytest.raises(FileError, match=r"safe\.scatter of shape \(4, 3, 16\) instead of \(4, 16, 16\)"):
        Moments.load(path)
    with pytest.raises(FileError, match="expected Moments"):
        Moments.load(ls.content_vectors(cache).save(tmp_path / "vectors.safetensors"))
