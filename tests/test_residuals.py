"""Residual streams: one pass a batch, equal to one prompt at a time read by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, every_position, labelled, planted_cache

import lens_safety as ls
from lens_safety import files, passes, residuals
from lens_safety.files import save_tensors
from lens_safety.models import Engine, resid_hook
from lens_safety.residuals import ResidualCache
from lens_safety.tokens import batches, encode
from lens_safety.types import FileError, MismatchError, OptionError, PromptError

LONGER = (
    "Hi",
    "Which bread is easy to bake?",
    "How do I repot a cactus that has outgrown its pot without being stung?",
    "Write a letter to my neighbours about the street party on Saturday, and ask each of them to "
    "bring a salad, a cake or something to drink.",
    "Name three rivers.",
    "Tell me why the sky is blue, in words that a child of six understands.",
)


def streams(model, prompts=TEXTS, **options) -> ResidualCache:
    prompts = list(prompts) if isinstance(prompts, tuple) else prompts
    return ls.residual_streams(model, prompts, progress=False, **options)


def everything(cache: ResidualCache) -> torch.Tensor:
    return torch.cat([cache.embed[None], cache.resid])


def drift(got: ResidualCache, want: ResidualCache) -> float:
    """The largest distance between two rows, relative to the row."""
    a, b = everything(got), everything(want)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@contextmanager
def rows_of_passes(model) -> Iterator[list[int]]:
    """The rows of each forward pass that the model makes inside."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def calls(model, *names: str) -> Iterator[list[str]]:
    """The modules begun inside, of those with these names (the last part, or all of it)."""
    seen: list[str] = []

    def note(name: str):
        return lambda *_: seen.append(name)

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if name in names or name.rsplit(".", 1)[-1] in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


BY_HAND = {
    "content_mean": lambda x, content: x[:, content].mean(dim=1),
    "content_last": lambda x, content: x[:, int(content.nonzero()[-1])],
    "last": lambda x, content: x[:, -1],
    "max": lambda x, content: x[:, content].amax(dim=1),
    "0": lambda x, content: x[:, 0],
    "-2": lambda x, content: x[:, -2],
    "index": lambda x, content: x[:, int(content.nonzero()[0])],
    "mask": lambda x, content: x[:, ~content].mean(dim=1),
}
POSITIONS = {
    "0": 0,
    "-2": -2,
    "index": lambda ids, mask: np.flatnonzero(mask)[0],
    "mask": lambda ids, mask: ~mask,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_position_equals_reading_it_by_hand_from_one_prompt_at_a_time(tiny, name: str):
    cache = streams(tiny, position=POSITIONS.get(name, name))
    for row, one in enumerate(encode(tiny, TEXTS)):
        want = BY_HAND[name](every_position(tiny, one.ids), torch.from_numpy(one.content))
        torch.testing.assert_close(everything(cache)[:, row], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["content_mean", "last", "max"])
def test_batch_size_order_and_padding_change_nothing(tiny, position: str):
    alone = streams(tiny, position=position, batch_tokens=1)
    order = np.array([3, 0, 4, 2, 1])
    back = np.argsort(order)
    for batch_tokens in (1, 60, 10_000):
        together = streams(tiny, position=position, batch_tokens=batch_tokens)
        assert drift(together, alone) < 1e-4
        shuffled = streams(tiny, labelled()[order], position=position, batch_tokens=batch_tokens)
        assert drift(shuffled[back], alone) < 1e-4
    assert drift(alone[order], alone) > 0.1


def test_batch_size_order_and_padding_change_nothing_in_the_built_in_model(smol):
    alone = streams(smol, LONGER, batch_tokens=1)
    assert drift(streams(smol, LONGER, batch_tokens=4096), alone) < 1e-4
    shuffled = streams(smol, LONGER[::-1], batch_tokens=120)
    assert drift(shuffled[::-1], alone) < 1e-4
    assert drift(shuffled, alone) > 0.1


@pytest.mark.parametrize("template", ["chat", "raw", lambda text: f"I make {text} now"])
def test_other_texts_of_the_batch_do_not_reach_a_prompt(tiny, template):
    one = streams(tiny, TEXTS[:1], template=template)
    assert drift(streams(tiny, template=template)[:1], one) < 1e-4


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_a_batch_is_one_forward_pass_for_all_layers(tiny, batch_tokens: int):
    with rows_of_passes(tiny) as rows, calls(tiny, "blocks.0") as blocks:
        streams(tiny, position="last", batch_tokens=batch_tokens, share_prefix=False)
    made = list(batches(tiny, encode(tiny, TEXTS), batch_tokens=batch_tokens))
    assert rows == [len(batch) for batch in made]
    assert len(blocks) == len(made)


def test_nothing_above_the_highest_layer_runs(tiny):
    above = ("blocks.2", "ln_final", "unembed", "lm_head")
    with calls(tiny, *above) as seen:
        streams(tiny, layers=[1, 0])
    assert seen == []
    with calls(tiny, *above[1:]) as seen:
        streams(tiny)
    assert seen == []
    with calls(tiny, *above) as seen:
        tiny(torch.tensor([[1, 2, 3]]))
    assert {"blocks.2", "ln_final", "unembed"} <= set(seen)


def test_the_unembedding_of_the_built_in_model_does_not_run(smol):
    with calls(smol, "unembed", "lm_head") as seen:
        streams(smol, LONGER[:1])
    assert seen == []


def test_layers_come_in_the_order_given(tiny):
    whole = streams(tiny)
    some = streams(tiny, layers=(2, 0))
    assert (whole.layers, some.layers) == ((0, 1, 2), (2, 0))
    assert torch.equal(some.resid, whole.resid[[2, 0]])
    assert torch.equal(some.embed, whole.embed)


def test_a_layer_is_found_by_its_number_wherever_it_stands(tiny):
    some = streams(tiny, layers=[2, 0])
    assert torch.equal(some.layer(2), some.resid[0])
    assert torch.equal(some.layer(0), some.resid[1])
    assert torch.equal(some.layer(-1), some.embed)
    with pytest.raises(MismatchError, match="layer 1 given, expected one of the cached layers 2, 0;"):
        some.layer(1)


def test_rows_of_a_cache_keep_their_prompts():
    cache, _ = planted_cache(n=7)
    mask = np.array([i in (1, 4) for i in range(7)])
    for chosen, rows in (slice(2, 5), [2, 3, 4]), (mask, [1, 4]), ([6, 0], [6, 0]):
        some = cache[chosen]
        assert torch.equal(some.resid, cache.resid[:, rows])
        assert torch.equal(some.embed, cache.embed[rows])
        assert some.prompts.texts == [cache.prompts.texts[row] for row in rows]
        assert len(some) == len(rows)
    assert torch.equal(cache[::-1].layer(1), cache.layer(1).flip(0))


def test_strings_are_accepted_and_a_prompt_set_is_kept(tiny):
    prompts = labelled()
    from_set, from_strings = streams(tiny, prompts), streams(tiny, TEXTS)
    assert from_set.prompts is prompts
    assert from_strings.prompts.texts == list(TEXTS)
    assert not from_strings.prompts.is_labelled
    assert torch.equal(from_set.resid, from_strings.resid)


def test_a_cache_says_what_it_was_read_from(tiny):
    cache = streams(tiny, position=-2)
    assert (cache.position, cache.template, cache.hook) == ("-2", "chat", "resid_post")
    assert cache.model == ls.fingerprint(tiny)
    assert cache.resid.shape == (3, 5, 16)
    assert cache.resid.dtype == cache.embed.dtype == torch.float32
    assert not cache.resid.requires_grad
    assert bool(everything(cache).isfinite().all())


def test_a_half_precision_model_gives_single_precision_rows(engine: Engine, tiny, tiny_folders):
    half = ls.load_model(tiny_folders["llama"], engine=engine, dtype="bfloat16")
    cache = streams(half)
    assert cache.resid.dtype == torch.float32
    assert 1e-4 < drift(cache, streams(tiny)) < 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"position": "middle"}, "unknown position"),
        ({"position": 99}, "position 99 given for a prompt of"),
        ({"template": "alpaca"}, "unknown template 'alpaca'"),
        ({"layers": [3]}, "layer 3 given, expected 0 to 2"),
        ({"layers": [-1]}, "layer -1 given, expected 0 to 2"),
        ({"layers": []}, "no layers given"),
    ],
)
def test_options_out_of_range_are_refused(tiny, options: dict, says: str):
    with pytest.raises(OptionError, match=says):
        streams(tiny, **options)


def test_empty_and_too_long_prompts_are_refused_by_name(tiny):
    with pytest.raises(PromptError, match="prompt 1 of prompts is empty"):
        streams(tiny, ["x", "  "])
    long = "a cake or a kite " * 40
    with pytest.raises(PromptError, match=r"prompt 1 'a cake or .* pass truncate=True"):
        streams(tiny, ["x", long])
    cut = streams(tiny, ["x", long], truncate=True)
    assert drift(cut[:1], streams(tiny, ["x"])) < 1e-4


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, limit: int, error: type[BaseException]):
    """Batches of more than `limit` rows fail inside the model; the sizes that were tried."""
    real, tried = passes.run_blocks, []

    def run(model, tokens, hooks, *, last_layer):
        tried.append(len(tokens))
        if len(tokens) > limit:
            raise error
        real(model, tokens, hooks, last_layer=last_layer)

    monkeypatch.setattr(passes, "run_blocks", run)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("position", ["content_mean", "last", "max"])
def test_a_batch_that_is_out_of_memory_is_halved(
    tiny, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], position: str
):
    want = streams(tiny, position=position)
    tried = out_of_memory_above(monkeypatch, 2, error)
    got = streams(tiny, position=position, share_prefix=False)
    assert tried == [5, 2, 3, 1, 2]
    assert drift(got, want) < 1e-4


def test_one_prompt_that_is_out_of_memory_raises(tiny, monkeypatch: pytest.MonkeyPatch):
    tried = out_of_memory_above(monkeypatch, 0, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        streams(tiny, share_prefix=False)
    assert tried == [5, 2, 1]


def test_another_error_is_not_tried_again(tiny, monkeypatch: pytest.MonkeyPatch):
    tried = out_of_memory_above(monkeypatch, 0, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        streams(tiny, share_prefix=False)
    assert tried == [5]


def hooks_on(model) -> int:
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


def test_no_hook_stays_behind_also_after_an_exception(tiny, monkeypatch: pytest.MonkeyPatch):
    streams(tiny)
    assert hooks_on(tiny) == 0

    def fail(resid):
        assert hooks_on(tiny) > 0
        raise ZeroDivisionError

    monkeypatch.setattr(passes.Passes, "_reducer", lambda *_: fail)
    with pytest.raises(ZeroDivisionError):
        streams(tiny)
    assert hooks_on(tiny) == 0


def test_a_hook_of_the_callers_own_works_and_stays(tiny):
    plain = streams(tiny)
    with tiny.hooks(fwd_hooks=[(resid_hook(1), lambda resid, hook: resid + 1)]):
        before = hooks_on(tiny)
        steered = streams(tiny)
        again = streams(tiny)
        assert hooks_on(tiny) == before > 0
    torch.testing.assert_close(steered.resid[0], plain.resid[0])
    torch.testing.assert_close(steered.resid[1], plain.resid[1] + 1)
    assert torch.equal(again.resid, steered.resid)
    assert torch.equal(streams(tiny).resid, plain.resid)


def test_a_saved_cache_comes_back_as_it_was(tmp_path: Path):
    cache, _ = planted_cache(n=5)
    cache = replace(cache[[4, 0, 2]], layers=(2, 0, 1))
    back = ResidualCache.load(cache.save(tmp_path / "c.safetensors"))
    assert torch.equal(back.resid, cache.resid)
    assert torch.equal(back.embed, cache.embed)
    assert replace(back, resid=cache.resid, embed=cache.embed) == cache


def test_a_cache_of_unlabelled_prompts_comes_back_unlabelled(tiny, tmp_path: Path):
    back = ResidualCache.load(streams(tiny).save(tmp_path / "c.safetensors"))
    assert [prompt.label for prompt in back.prompts] == [None] * 5


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_cache_is_refused(tmp_path: Path, kept: int):
    path = planted_cache(n=4)[0].save(tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileError, match=r"c\.safetensors is damaged"):
        ResidualCache.load(path)


def test_a_cache_of_another_version_or_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = planted_cache(n=4)[0].save(tmp_path / "c.safetensors")
    vectors = save_tensors(tmp_path / "v.safetensors", "ContentVectors", {"x": torch.ones(1)}, {})
    with pytest.raises(FileError, match="holds ContentVectors, expected ResidualCache"):
        ResidualCache.load(vectors)
    monkeypatch.setattr(files, "VERSION", 2)
    with pytest.raises(FileError, match="format version 1, expected 2"):
        ResidualCache.load(path)


def test_a_cache_whose_tensors_are_not_what_its_header_says_is_refused(tmp_path: Path):
    cache, _ = planted_cache(n=4)
    header = residuals._header(cache)
    for resid, embed, shape in (
        (cache.resid[:, :3], cache.embed, "(3, 3, 16)"),
        (cache.resid[:2], cache.embed, "(2, 4, 16)"),
        (cache.resid, cache.embed[:3], "(3, 16)"),
    ):
        path = save_tensors(
            tmp_path / "c.safetensors", "ResidualCache", {"resid": resid, "embed": embed}, header
        )
        with pytest.raises(FileError) as caught:
            ResidualCache.load(path)
        assert f"holds a tensor of shape {shape}, its header says" in str(caught.value)
    path = save_tensors(tmp_path / "c.safetensors", "ResidualCache", {"resid": cache.resid}, header)
    with pytest.raises(FileError, match="does not hold what its header says"):
        ResidualCache.load(path)


def test_a_cache_that_is_not_finite_is_not_saved(tmp_path: Path):
    cache, _ = planted_cache(n=4)
    cache.resid[1, 2, 3] = float("nan")
    with pytest.raises(FileError, match="resid holds NaN or infinity"):
        cache.save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []
