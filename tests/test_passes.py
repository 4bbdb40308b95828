"""Passes that share a prefix, equal prompts and nothing behind what is read give what plain passes give."""

import numpy as np
import pytest
import torch
from conftest import FRAMED, TEXTS, shapes_of_passes

import lens_safety as ls
from lens_safety import passes
from lens_safety.models import resid_hook
from lens_safety.tokens import Encoded, encode, shared_prefix

POSITIONS = {
    "content_mean": "content_mean",
    "content_last": "content_last",
    "last": "last",
    "max": "max",
    "first": 0,
    "template": lambda ids, content: ~content,
}


def streams(model, prompts, **options) -> torch.Tensor:
    cache = ls.residual_streams(model, list(prompts), progress=False, **options)
    return torch.cat([cache.embed[None], cache.resid])


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(((got - want).norm(dim=-1) <= 1e-4 * want.norm(dim=-1)).all())


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("template", ["chat", "raw"])
def test_a_shared_prefix_changes_no_vector(any_tiny, position: str, template: str):
    options = {"position": POSITIONS[position], "template": template}
    plain = streams(any_tiny, FRAMED, **options, share_prefix=False)
    with shapes_of_passes(any_tiny) as seen:
        shared = streams(any_tiny, FRAMED, **options)
    assert close(shared, plain)
    # What is read there stands before the texts, so that all of them are one text.
    if position == "first" or (position, template) == ("template", "raw"):
        assert sum(rows for rows, _ in seen) == 1
        return
    assert seen[0] == (1, shared_prefix(encode(any_tiny, FRAMED, template=template)))
    assert not close(shared[:, [1, 0, 2]], plain)


def test_a_shared_prefix_changes_no_vector_of_the_built_in_model(smol):
    texts = ["Which bread is easy to bake?", "Hi", "How do I repot a cactus without being stung?"]
    with shapes_of_passes(smol) as seen:
        shared = streams(smol, texts)
    assert seen[0] == (1, 24)
    assert close(shared, streams(smol, texts, share_prefix=False))


def test_of_the_template_only_what_is_read_or_needed_is_run(tiny):
    encoded = encode(tiny, TEXTS)
    prefix = int(np.flatnonzero(encoded[0].content)[0])
    with shapes_of_passes(tiny) as seen:
        streams(tiny, TEXTS, batch_tokens=1)
    assert seen == [(1, prefix), *sorted(((1, int(one.content.sum())) for one in encoded), reverse=True)]
    with shapes_of_passes(tiny) as seen:
        streams(tiny, TEXTS, batch_tokens=1, position="last", share_prefix=False)
    assert seen == sorted(((1, len(one)) for one in encoded), reverse=True)


def test_equal_prompts_are_run_once(tiny):
    with shapes_of_passes(tiny) as seen:
        twice = streams(tiny, [*TEXTS, *TEXTS[::-1]], share_prefix=False)
    assert sum(rows for rows, _ in seen) == len(TEXTS)
    assert torch.equal(twice[:, :5], twice[:, 5:].flip(1))
    assert close(twice[:, :5], streams(tiny, TEXTS))


def test_one_prompt_and_a_short_prefix_are_run_plainly(tiny):
    for texts, options in ((TEXTS[:1], {}), (["a cake", "a kite"], {"template": "raw"})):
        with shapes_of_passes(tiny) as seen:
            streams(tiny, texts, **options)
        assert len(seen) == 1


def test_no_block_above_the_highest_layer_runs_behind_a_prefix(tiny):
    seen: list[int] = []
    handle = tiny.blocks[2].register_forward_pre_hook(lambda *_: seen.append(2))
    try:
        got = streams(tiny, TEXTS, layers=[1])
        assert seen == []
        streams(tiny, TEXTS)
        assert seen != []
    finally:
        handle.remove()
    assert close(got, streams(tiny, TEXTS)[[0, 2]])


def test_hooks_of_the_caller_see_every_prompt_whole(tiny):
    widths: list[tuple[int, ...]] = []

    def see(resid, hook):
        widths.append(tuple(resid.shape[:2]))

    with tiny.hooks(fwd_hooks=[(resid_hook(0), see)]):
        hooked = streams(tiny, [*TEXTS, TEXTS[0]])
    assert widths == [(6, max(map(len, encode(tiny, TEXTS))))]
    assert close(hooked[:, :5], streams(tiny, TEXTS))


def test_steering_that_counts_tokens_from_the_end_is_what_it_is_for_one_prompt_alone(tiny):
    train = ls.residual_streams(tiny, ls.load_prompts("content")[np.arange(6)], progress=False)
    longest = max(range(3), key=lambda row: len(encode(tiny, FRAMED)[row]))
    with ls.steering(tiny, ls.content_vectors(train), layers=[0], multiplier=9.0, positions="last:2"):
        together = streams(tiny, FRAMED, position="last")[:, [longest]]
        alone = streams(tiny, [FRAMED[longest]], position="last")
    assert close(together, alone)
    assert not close(together, streams(tiny, FRAMED, position="last")[:, [longest]])


def test_a_batch_behind_a_prefix_that_is_out_of_memory_is_halved(tiny, monkeypatch: pytest.MonkeyPatch):
    want = streams(tiny, TEXTS)
    real, tried = passes.SharedPrefix.run_blocks, []

    def run(self, tokens, hooks):
        tried.append(len(tokens))
        if len(tokens) > 2:
            raise MemoryError
        real(self, tokens, hooks)

    monkeypatch.setattr(passes.SharedPrefix, "run_blocks", run)
    assert close(streams(tiny, TEXTS), want)
    assert tried == [5, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("texts", "n"),
    [([], 0), (["abc"], 0), (["abc", "abd"], 2), (["abc", "abc"], 2), (["ab", "abcd"], 1), (["b", "a"], 0)],
)
def test_the_shared_prefix_leaves_a_token_of_each_prompt(texts: list[str], n: int):
    made = [Encoded(np.array([ord(c) for c in t]), np.ones(len(t), dtype=bool)) for t in texts]
    assert shared_prefix(made) == n
