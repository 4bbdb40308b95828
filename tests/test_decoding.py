"""Decoding: the key/value cache, shared prompts, padding and streaming change no token."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    FRAMED,
    N_LAYERS,
    TEXTS,
    TOKENS,
    greedy_ids,
    labelled,
    listening,
    same,
    shapes_of_passes,
    streams,
    vectors_of,
)
from torch import Tensor

import lens_safety as ls
from lens_safety import decoding
from lens_safety import tokens as tok
from lens_safety.decoding import _choose, continuation_logits
from lens_safety.models import engine_of, full_logits, resid_hook

LONG = "how do I make a cake or a kite for the garden, make the cake a kite, do I or do I make a kite for it?"


def spelt_out(ids: list[int]) -> str:
    """What `spelt` makes of ids."""
    return " ".join(map(str, ids))


def decoded(model, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True)


class Forced:
    """Stands in for the choice of tokens: takes the given ones, and keeps the logits."""

    def __init__(self, chosen: list[int]):
        self.chosen = torch.tensor(chosen)
        self.heard: list[Tensor] = []

    def __call__(self, logits: Tensor, *options) -> Tensor:
        self.heard.append(logits)
        step = (len(self.heard) - 1) % len(self.chosen)
        return self.chosen[step].expand(len(logits))

    def take(self) -> Tensor:
        """The logits of every step since the last call, `[batch step d_vocab]`, batch after batch."""
        n, heard, self.heard = len(self.chosen), self.heard, []
        return torch.cat([torch.stack(heard[i : i + n], dim=1) for i in range(0, len(heard), n)])


def forced(monkeypatch: pytest.MonkeyPatch, n: int, seed: int = 1) -> Forced:
    drawn = torch.randint(4, 300, (n,), generator=torch.Generator().manual_seed(seed))
    made = Forced(drawn.tolist())
    monkeypatch.setattr(decoding, "_choose", made)
    return made


# The cache


@pytest.mark.parametrize("batch_size", [None, 2])
def test_each_steps_logits_are_those_of_the_whole_sequence_without_cache_or_padding(
    any_tiny, batch_size, endless, monkeypatch
):
    n, texts = 12, [*TEXTS[:3], LONG]
    choice = forced(monkeypatch, n)
    ls.generate(any_tiny, texts, max_new_tokens=n, batch_size=batch_size)
    made = choice.take()
    encoded = tok.encode(any_tiny, texts)
    # Longer than the window of Gemma's layers, and beside prompts that are not.
    assert min(map(len, encoded)) < 32 < max(map(len, encoded)) - 16
    for row, one in enumerate(encoded):
        ids = torch.cat([torch.from_numpy(one.ids), choice.chosen])[None]
        expected = full_logits(any_tiny, ids)[0, len(one) - 1 : -1]
        assert torch.allclose(made[row], expected, atol=1e-4)
        assert not torch.allclose(made[row], made[row - 1], atol=1e-2)


def test_greedy_tokens_are_those_of_the_whole_sequence_without_a_cache(any_tiny, spelt, endless):
    texts = [*TEXTS[:2], LONG]
    expected = [spelt_out(greedy_ids(any_tiny, text, 8)) for text in texts]
    assert ls.generate(any_tiny, texts, max_new_tokens=8) == expected
    assert len(set(expected)) > 1


def test_the_built_in_models_greedy_text_is_that_of_the_whole_sequence_without_a_cache(smol, endless):
    texts = ["The hotel we stayed in was", "My"]
    expected = [decoded(smol, greedy_ids(smol, text, 8, "raw")) for text in texts]
    assert ls.generate(smol, texts, max_new_tokens=8, template="raw") == expected
    assert all(len(text.split()) > 3 for text in expected)


def test_a_cache_that_forgets_a_token_is_seen(tiny, endless, monkeypatch):
    texts, n = list(TEXTS[:2]), 4
    choice = forced(monkeypatch, n)
    ls.generate(tiny, texts, max_new_tokens=n)
    whole = choice.take()
    feed = decoding.Decoding.feed

    def forgetting(self, tokens):
        self._mask[:, 2] = False
        if engine_of(tiny) == "hooked":
            self._cache._mask = self._mask.int()
        return feed(self, tokens)

    monkeypatch.setattr(decoding.Decoding, "feed", forgetting)
    ls.generate(tiny, texts, max_new_tokens=n)
    assert not torch.allclose(choice.take(), whole, atol=1e-3)


def test_the_order_of_prompts_is_the_order_of_texts(tiny, spelt, endless):
    texts = ls.generate(tiny, list(TEXTS), max_new_tokens=6, batch_size=2)
    backwards = ls.generate(tiny, list(TEXTS[::-1]), max_new_tokens=6, batch_size=2)
    assert backwards == texts[::-1]
    assert len(set(texts)) == len(TEXTS)


def test_the_callers_padding_side_stays_and_changes_nothing(any_tiny, spelt, endless):
    tokenizer, made = any_tiny.tokenizer, {}
    before = tokenizer.padding_side
    try:
        for side in ("left", "right"):
            tokenizer.padding_side = side
            texts = ls.generate(any_tiny, [*TEXTS[:3], LONG], max_new_tokens=6)
            made[side] = [
                texts,
                ls.next_token_logits(any_tiny, list(TEXTS)).tolist(),
                ls.continuation_nll(any_tiny, list(TEXTS[:2]), [" a kite", " or"]).tolist(),
                [pieces for pieces in ls.stream(any_tiny, list(TEXTS[:2]), max_new_tokens=3)],
            ]
            assert tokenizer.padding_side == side
    finally:
        tokenizer.padding_side = before
    assert made["left"] == made["right"]


# Prompts that are given several times are run once


def test_shared_prompts_give_the_logits_of_prompts_run_apart_and_alone(any_tiny, endless, monkeypatch):
    vectors, n = vectors_of(any_tiny), 4
    texts = [TEXTS[0], LONG, TEXTS[0], TEXTS[1], LONG]
    multipliers = [3.0, -3.0, -3.0, 2.0, 0.0]
    choice = forced(monkeypatch, n)
    ls.generate(any_tiny, texts, max_new_tokens=n)
    plain = choice.take()
    for positions in ("all", "prompt", "generated", "content", "last:2", "generated:1:3"):
        options: dict[str, Any] = {"layers": [1], "positions": positions}
        with ls.steering(any_tiny, vectors, multiplier=multipliers, **options):
            ls.generate(any_tiny, texts, max_new_tokens=n)
            shared = choice.take()
            ls.generate(any_tiny, texts, max_new_tokens=n, share_prompts=False)
            apart = choice.take()
        assert torch.allclose(shared, apart, atol=1e-4)
        with ls.steering(any_tiny, vectors, multiplier=multipliers[2], **options):
            ls.generate(any_tiny, [texts[2]], max_new_tokens=n)
        assert torch.allclose(choice.take()[0], shared[2], atol=1e-4)
        assert not torch.allclose(plain[2], shared[2], atol=1e-2)
        assert torch.allclose(plain[4], shared[4], atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_rows_of_one_generation_are_steered_each_by_its_own_multiplier(tiny, spelt, endless, positions):
    vectors, multipliers = vectors_of(tiny), [0.0, 4.0, -4.0]
    options = {"layers": [1, 2], "positions": positions}
    with ls.steering(tiny, vectors, multiplier=multipliers, **options):
        together = ls.generate(tiny, [TEXTS[0]] * 3, max_new_tokens=10)
    for text, multiplier in zip(together, multipliers, strict=True):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            assert ls.generate(tiny, [TEXTS[0]], max_new_tokens=10) == [text]
    assert together[0] == ls.generate(tiny, [TEXTS[0]], max_new_tokens=10)[0]
    assert len(set(together)) == 3


def rows_seen(model, texts: list[str], n: int, **options) -> list[list[int]]:
    """How many rows each layer sees in each call of a generation."""
    with contextlib.ExitStack() as stack:
        heard = [stack.enter_context(listening(model, layer)) for layer in range(N_LAYERS)]
        ls.generate(model, texts, max_new_tokens=n, **options)
    return [[len(h) for h in calls] for calls in heard]


def test_a_prompt_is_run_once_however_often_it_is_given(tiny, endless):
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0], TEXTS[1]]
    assert rows_seen(tiny, texts, 3) == [[2, 5, 5]] * 3
    assert rows_seen(tiny, texts, 3, share_prompts=False) == [[5, 5, 5]] * 3
    assert rows_seen(tiny, list(TEXTS), 3) == [[5, 5, 5]] * 3


def test_blocks_below_the_steered_layer_run_a_shared_prompt_once_and_those_above_once_a_row(tiny, endless):
    vectors, texts = vectors_of(tiny), [TEXTS[0]] * 4
    multipliers = [1.0, 2.0, 3.0, -1.0]
    for layers, seen in (([1], [1, 4, 4]), ([2], [1, 1, 4]), ([0, 2], [4, 4, 4])):
        with ls.steering(tiny, vectors, layers=layers, multiplier=multipliers):
            assert rows_seen(tiny, texts, 2) == [[n, 4] for n in seen]
    with ls.steering(tiny, vectors, layers=[1], multiplier=multipliers, positions="generated"):
        assert rows_seen(tiny, texts, 2) == [[1, 4]] * 3
    with ls.steering(tiny, vectors, layers=[1], multiplier=2.0):
        assert rows_seen(tiny, texts, 2) == [[1, 4]] * 3
    with ls.steering(tiny, vectors, layers=[1], multiplier=multipliers, sites=("attn_out",)):
        assert rows_seen(tiny, texts, 2) == [[4, 4]] * 3


def test_of_several_shared_prompts_the_lower_blocks_are_shared_where_the_engine_can(tiny, endless):
    texts = [TEXTS[0], TEXTS[1]] * 2
    first = 2 if engine_of(tiny) == "hooked" else 4
    with ls.steering(tiny, vectors_of(tiny), layers=[1], multiplier=[1.0, 2.0, 3.0, -1.0]):
        assert rows_seen(tiny, texts, 2) == [[first, 4], [4, 4], [4, 4]]
    with ls.steering(
        tiny, vectors_of(tiny), layers=[1], multiplier=[1.0, 2.0, 3.0, -1.0], positions="generated"
    ):
        assert rows_seen(tiny, texts, 2) == [[2, 4]] * 3


def test_contexts_inside_each_other_tell_rows_apart_where_either_does(tiny, spelt, endless):
    vectors, texts = vectors_of(tiny), [TEXTS[0]] * 2
    one: dict[str, Any] = {"layers": [2], "multiplier": 2.0}
    each: dict[str, Any] = {"layers": [0], "multiplier": [3.0, -3.0]}
    with ls.steering(tiny, vectors, **each), ls.steering(tiny, vectors, **one):
        inside = ls.generate(tiny, texts, max_new_tokens=4)
    with ls.steering(tiny, vectors, **one), ls.steering(tiny, vectors, **each):
        assert ls.generate(tiny, texts, max_new_tokens=4) == inside
        assert ls.generate(tiny, texts, max_new_tokens=4, share_prompts=False) == inside
    assert inside[0] != inside[1]


def test_a_hook_of_ones_own_that_tells_rows_apart_needs_prompts_that_are_not_shared(tiny, endless):
    column = torch.tensor([0.0, 5.0, -5.0])[:, None, None]

    def push(resid, hook):
        return resid + column

    with tiny.hooks(fwd_hooks=[(resid_hook(1), push)]):
        logits = ls.next_token_logits(tiny, [TEXTS[0]] * 3, share_prompts=False)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
    assert torch.equal(logits[0], ls.next_token_logits(tiny, [TEXTS[0]] * 3, share_prompts=False)[0])


# A prefix that all prompts share


def n_prefix(model) -> int:
    return tok.shared_prefix(tok.encode(model, FRAMED))


def test_what_all_prompts_begin_with_is_run_once_and_changes_nothing(any_tiny, monkeypatch):
    choose = forced(monkeypatch, 4)
    with shapes_of_passes(any_tiny) as seen:
        ls.generate(any_tiny, FRAMED, max_new_tokens=4)
    shared = choose.take()
    ls.generate(any_tiny, FRAMED, max_new_tokens=4, share_prefix=False)
    whole = choose.take()
    assert torch.allclose(shared, whole, atol=1e-4)
    assert not torch.allclose(shared[[1, 0, 2]], whole, atol=1e-2)
    longest = max(len(one) for one in tok.encode(any_tiny, FRAMED))
    assert seen[:3] == [(1, n_prefix(any_tiny)), (3, longest - n_prefix(any_tiny)), (3, 1)]


def fitted(model) -> ls.Detector:
    return ls.Detector.fit(ls.residual_streams(model, labelled(), progress=False), layers=[0], folds=2)


READERS = {
    "next_token_logits": lambda model, **options: ls.next_token_logits(model, FRAMED, **options),
    "stream": lambda model, **options: list(ls.stream(model, FRAMED, max_new_tokens=2, **options)),
    "continuation_nll": lambda model, **options: torch.from_numpy(
        ls.continuation_nll(model, FRAMED, ["a kite", "a cake", "how"], **options)
    ),
    "score": lambda model, **options: torch.from_numpy(fitted(model).score(FRAMED, model=model, **options)),
    "predict": lambda model, **options: fitted(model).predict(FRAMED, model=model, **options).tolist(),
}


@pytest.mark.parametrize("name", READERS)
def test_a_prefix_is_shared_or_not_as_asked_and_changes_nothing(tiny, endless, name):
    found = {}
    for share_prefix in (True, False):
        with shapes_of_passes(tiny) as seen:
            found[share_prefix] = READERS[name](tiny, share_prefix=share_prefix)
        assert ((1, n_prefix(tiny)) in seen) is share_prefix
    if isinstance(found[True], Tensor):
        assert torch.allclose(found[True], found[False], atol=1e-4)
    else:
        assert found[True] == found[False]


STEERED_ALIKE = {
    "all": {"positions": "all", "multiplier": 2.0},
    "prompt": {"positions": "prompt", "multiplier": 2.0},
    "generated, by row": {"positions": "generated", "multiplier": [2.0, -2.0, 0.0]},
}


@pytest.mark.parametrize("name", STEERED_ALIKE)
def test_a_prefix_is_shared_where_steering_does_not_tell_it_apart(tiny, name, monkeypatch):
    choose = forced(monkeypatch, 3)
    with ls.steering(tiny, vectors_of(tiny), layers=[0, 1], **STEERED_ALIKE[name]):
        with shapes_of_passes(tiny) as seen:
            ls.generate(tiny, FRAMED, max_new_tokens=3)
        shared = choose.take()
        ls.generate(tiny, FRAMED, max_new_tokens=3, share_prefix=False)
        whole = choose.take()
    assert seen[0] == (1, n_prefix(tiny))
    assert torch.allclose(shared, whole, atol=1e-4)
    ls.generate(tiny, FRAMED, max_new_tokens=3)
    assert not torch.allclose(shared, choose.take(), atol=1e-2)


TOLD_APART = {
    "rows": {"multiplier": [2.0, -2.0, 0.0]},
    "from the end": {"positions": "last:30"},
    "by content": {"positions": "content"},
    "by a gate": {"when": fitted},
}


@pytest.mark.parametrize("name", TOLD_APART)
def test_prompts_are_run_whole_where_steering_tells_their_beginning_apart(tiny, name, monkeypatch):
    choose = forced(monkeypatch, 3)
    options = {"multiplier": 2.0} | TOLD_APART[name]
    if callable(options.get("when")):
        options["when"] = options["when"](tiny)
    with ls.steering(tiny, vectors_of(tiny), layers=[0, 1], **options):
        with shapes_of_passes(tiny) as seen:
            ls.generate(tiny, FRAMED, max_new_tokens=3)
        shared = choose.take()
        ls.generate(tiny, FRAMED, max_new_tokens=3, share_prefix=False)
    assert seen[0] == (3, max(len(one) for one in tok.encode(tiny, FRAMED)))
    assert torch.equal(shared, choose.take())


def test_a_hook_of_ones_own_sees_whole_prompts(tiny):
    vectors = vectors_of(tiny)
    with listening(tiny, 1) as heard, ls.steering(tiny, vectors, layers=[0]):
        ls.generate(tiny, FRAMED, max_new_tokens=2)
    assert heard[0].shape[:2] == (3, max(len(one) for one in tok.encode(tiny, FRAMED)))


def test_a_continuation_costs_the_same_behind_a_shared_prefix(tiny):
    continuations = ["a kite", "a cake for the kite", "how"]
    with shapes_of_passes(tiny) as seen:
        together = ls.continuation_nll(tiny, FRAMED, continuations)
    assert seen[0] == (1, n_prefix(tiny))
    alone = [
        ls.continuation_nll(tiny, [prompt], [continuation])[0]
        for prompt, continuation in zip(FRAMED, continuations, strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-4)


# Steering while generating


def test_generated_leaves_the_prompt_alone_and_steers_every_later_token(tiny, endless):
    vectors, texts = vectors_of(tiny), list(TEXTS[:3])
    with listening(tiny, 1) as plain:
        ls.generate(tiny, texts, max_new_tokens=4)
    with (
        ls.steering(tiny, vectors, layers=[1], multiplier=1.5, positions="generated"),
        listening(tiny, 1) as steered,
    ):
        ls.generate(tiny, texts, max_new_tokens=4)
    longest = max(len(one) for one in tok.encode(tiny, texts))
    assert [tuple(h.shape) for h in steered] == [(3, longest, D_MODEL)] + [(3, 1, D_MODEL)] * 3
    assert torch.equal(steered[0], plain[0])
    # The first generated token is chosen before anything is steered, so its input is the same.
    assert torch.equal(steered[1], plain[1] + 1.5 * vectors.layer(1))


def test_a_prompt_of_one_token_is_still_a_prompt_inside_generate(tiny, endless, monkeypatch):
    vectors, one = vectors_of(tiny), tok.Encoded(np.array([70]), np.array([True]))
    monkeypatch.setattr(tok, "encode", lambda model, texts, **options: [one])
    with listening(tiny, 1) as plain:
        ls.generate(tiny, ["x"], max_new_tokens=2)
    with (
        ls.steering(tiny, vectors, layers=[1], positions="generated"),
        listening(tiny, 1) as steered,
    ):
        ls.generate(tiny, ["x"], max_new_tokens=2)
    assert [h.shape[1] for h in steered] == [1, 1]
    assert torch.equal(steered[0], plain[0])
    assert torch.equal(steered[1], plain[1] + vectors.layer(1))


def test_what_a_pass_knows_is_gone_after_generate_even_after_an_error_inside_it(tiny):
    vectors, base = vectors_of(tiny), streams(tiny)

    def fail(resid, hook):
        raise ZeroDivisionError

    with (
        ls.steering(tiny, vectors, layers=[1], positions="generated"),
        pytest.raises(ZeroDivisionError),
        tiny.hooks(fwd_hooks=[(resid_hook(2), fail)]),
    ):
        ls.generate(tiny, ["a cake"])
    assert not decoding.is_own_pass()
    single = streams(tiny, TOKENS[:, :1])[0][1]
    with ls.steering(tiny, vectors, layers=[1], positions="generated"):
        assert same(streams(tiny), base)
        assert torch.equal(streams(tiny, TOKENS[:, :1])[0][1], single + vectors.layer(1))


def test_a_large_multiplier_changes_the_built_in_models_text_and_zero_does_not(smol):
    prompts = labelled(["a nice day", "a bloody murder"], [False, True])
    vectors = ls.content_vectors(ls.residual_streams(smol, prompts, layers=[20], progress=False))
    texts = ["My day was"] * 2
    with ls.steering(smol, vectors, layers=[20], multiplier=[0.0, 8.0]):
        made = ls.generate(smol, texts, max_new_tokens=6)
    assert made[0] == ls.generate(smol, texts[:1], max_new_tokens=6)[0] != made[1]


# The end of a text


def ending(ids: dict[str, list[int]]) -> tuple[str, str, int]:
    """A token that one text makes early but not at once, and another never makes: (one, other, token)."""
    return next(
        (a, b, token)
        for a in TEXTS
        for b in TEXTS
        for token in ids[a][1:4]
        if token != ids[a][0] and token not in ids[b]
    )


def test_a_row_ends_at_its_end_token_and_the_others_go_on(tiny, spelt, monkeypatch):
    ids = {text: greedy_ids(tiny, text, 10) for text in TEXTS}
    short, long, end = ending(ids)
    monkeypatch.setattr(decoding, "end_of_text_ids", lambda tokenizer: [end])
    made = ls.generate(tiny, [short, long], max_new_tokens=10)
    cut = ids[short][: ids[short].index(end)]
    assert made == [spelt_out(cut), spelt_out(ids[long])]
    assert 1 <= len(cut) <= 3
    pieces = list(ls.stream(tiny, [short, long], max_new_tokens=10))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == made
    assert [row[0] for row in pieces[len(cut) :]] == [""] * (10 - len(cut))


def test_decoding_stops_when_every_row_has_ended(tiny, monkeypatch):
    first = greedy_ids(tiny, TEXTS[0], 1)[0]
    monkeypatch.setattr(decoding, "end_of_text_ids", lambda tokenizer: [first])
    with listening(tiny, 0) as heard:
        assert ls.generate(tiny, [TEXTS[0]], max_new_tokens=9) == [""]
    assert len(heard) == 1


def test_a_hook_may_know_which_rows_still_run(tiny, spelt, endless, monkeypatch):
    ids = {text: greedy_ids(tiny, text, 10) for text in TEXTS}
    short, long, end = ending(ids)
    monkeypatch.setattr(decoding, "end_of_text_ids", lambda tokenizer: [end])
    running: list[list[bool]] = []

    def look(resid, hook):
        known = decoding.current_pass(resid.shape[1]).running
        assert known is not None
        running.append(known.tolist())

    with tiny.hooks(fwd_hooks=[(resid_hook(0), look)]):
        ls.generate(tiny, [short, long], max_new_tokens=10)
    ended = ids[short].index(end)
    assert running == [[call <= ended, True] for call in range(10)]


def test_special_tokens_are_left_out_of_the_text(tiny, endless, monkeypatch):
    special = tiny.tokenizer.convert_tokens_to_ids("<|im_start|>")
    monkeypatch.setattr(decoding, "_choose", lambda logits, *options: torch.tensor([special]))
    assert ls.generate(tiny, ["a cake"], max_new_tokens=3) == [""]


@pytest.mark.parametrize("n", [1, 5])
def test_exactly_as_many_tokens_are_made_as_were_asked_for(tiny, spelt, endless, n: int):
    with ls.steering(tiny, vectors_of(tiny), layers=[1], multiplier=0.0) as record:
        made = ls.generate(tiny, [TEXTS[0]], max_new_tokens=n)
    assert record.fired == {1: n}
    assert made == [spelt_out(greedy_ids(tiny, TEXTS[0], n))]


# Streaming

WORDS = ("é漢🚀 a kite", "née 🚀🚀", "abc", "漢字")


@pytest.mark.parametrize("word", WORDS)
def test_the_pieces_of_a_stream_join_to_the_text_and_hold_whole_characters(tiny, endless, monkeypatch, word):
    ids = tiny.tokenizer(word, add_special_tokens=False)["input_ids"]
    choice = Forced(ids)
    monkeypatch.setattr(decoding, "_choose", choice)
    texts = ls.generate(tiny, list(TEXTS[:2]), max_new_tokens=len(ids))
    assert texts == [word] * 2
    choice.heard.clear()
    pieces = list(ls.stream(tiny, list(TEXTS[:2]), max_new_tokens=len(ids)))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts
    assert not any("\ufffd" in piece for row in pieces for piece in row)
    assert len(pieces) == len(ids)
    # Some characters take several tokens: nothing of them is shown before the last.
    empty = sum(row[0] == "" for row in pieces)
    assert (empty > 0) == (word != "abc")


def test_a_text_that_ends_inside_a_character_streams_to_what_generate_gives(tiny, endless, monkeypatch):
    ids = tiny.tokenizer("a 漢🚀", add_special_tokens=False)["input_ids"]
    for n in range(1, len(ids) + 1):
        monkeypatch.setattr(decoding, "_choose", Forced(ids[:n]))
        (text,) = ls.generate(tiny, [TEXTS[0]], max_new_tokens=n)
        monkeypatch.setattr(decoding, "_choose", Forced(ids[:n]))
        pieces = [piece for (piece,) in ls.stream(tiny, [TEXTS[0]], max_new_tokens=n)]
        assert "".join(pieces) == text
        assert n <= len(pieces) <= n + 1


def test_greedy_and_sampled_streams_are_what_generate_gives_as_it_comes(tiny, endless):
    texts = list(TEXTS[:3])
    for options in ({}, {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 7}):
        pieces = list(ls.stream(tiny, texts, max_new_tokens=12, **options))
        expected = ls.generate(tiny, texts, max_new_tokens=12, **options)
        assert ["".join(row) for row in zip(*pieces, strict=True)] == expected


def test_a_stream_gives_each_piece_before_the_next_token_is_made(tiny, spelt, endless):
    with listening(tiny, 0) as heard:
        for calls, _ in enumerate(ls.stream(tiny, ["a cake"], max_new_tokens=4), start=1):
            assert len(heard) == calls


def test_a_stream_is_steered_by_the_context_around_it(tiny, spelt, endless):
    vectors, texts = vectors_of(tiny), [TEXTS[0]] * 2
    with ls.steering(tiny, vectors, layers=[1], multiplier=[4.0, -4.0]):
        pieces = list(ls.stream(tiny, texts, max_new_tokens=6))
        assert ["".join(row) for row in zip(*pieces, strict=True)] == ls.generate(
            tiny, texts, max_new_tokens=6
        )
    assert pieces[-1][0] != pieces[-1][1]


def test_a_streams_options_are_checked(tiny):
    with pytest.raises(ls.OptionError, match="max_new_tokens=0 given"):
        next(ls.stream(tiny, ["a cake"], max_new_tokens=0))
    with pytest.raises(ls.PromptError, match=r"prompt 0 of .* is empty"):
        next(ls.stream(tiny, [" "]))


# Sampling


def test_sampling_repeats_by_seed_and_differs_between_seeds(tiny, spelt, endless):
    def drawn(seed: int) -> list[str]:
        texts = list(TEXTS[:2])
        return ls.generate(tiny, texts, max_new_tokens=10, temperature=1.0, seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_sampling_leaves_the_callers_random_state_alone(tiny, endless):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ls.generate(tiny, ["a cake"], max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-5}], ids=lambda o: next(iter(o))
)
def test_sampling_that_leaves_one_choice_is_greedy(tiny, spelt, endless, options):
    texts = list(TEXTS[:3])
    greedy = ls.generate(tiny, texts, max_new_tokens=10)
    hot = {"temperature": 3.0, "max_new_tokens": 10, "seed": 3}
    assert ls.generate(tiny, texts, **{**hot, **options}) == greedy
    assert ls.generate(tiny, texts, **hot) != greedy


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_their_definition(options, expected):
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    generator = torch.Generator().manual_seed(0)
    drawn = _choose(logits.expand(20000, 4), generator=generator, **options)
    shares = torch.bincount(drawn, minlength=4)[order] / 20000
    assert shares.tolist() == pytest.approx(expected, abs=0.015)
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


# Options and prompts


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 given, expected 1 or more"),
        ({"temperature": -0.1}, "temperature=-0.1 given, expected 0"),
        ({"temperature": float("inf")}, "temperature=inf given"),
        ({"temperature": float("nan")}, "temperature=nan given"),
        ({"top_k": 0}, "top_k=0 given, expected 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0 given, expected above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 given"),
        ({"batch_size": 0}, "batch_size=0 given, expected 1 or more"),
        ({"batch_size": -2}, "batch_size=-2 given, expected 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(tiny, options, says: str):
    with pytest.raises(ls.OptionError, match=says):
        ls.generate(tiny, ["a cake"], **options)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "holds no prompts: expected at least one"),
        (["a cake", " "], "prompt 1 of .* is empty: expected text; leave it out"),
        ("a cake", "expected a list of prompts, given one string"),
        (["a cake", "<|im_end|>"], r"prompt 1 '<\|im_end\|>' has no content token"),
    ],
)
def test_no_prompts_an_empty_prompt_and_a_lone_string_are_refused(tiny, prompts, says: str):
    for ask in (
        lambda: ls.generate(tiny, prompts),
        lambda: ls.next_token_logits(tiny, prompts),
        lambda: ls.continuation_nll(tiny, prompts, [" a"] * len(prompts)),
        lambda: next(ls.stream(tiny, prompts)),
    ):
        with pytest.raises(ls.PromptError, match=says):
            ask()


def test_a_prompt_may_fill_the_context_with_its_text_to_the_last_token_and_no_further(tiny, endless):
    room = tiny.cfg.n_ctx - len(tok.encode(tiny, [TEXTS[0]])[0])
    with listening(tiny, 0) as heard:
        ls.generate(tiny, [TEXTS[0]], max_new_tokens=room)
    assert len(heard) == room
    with pytest.raises(ls.PromptError, match=f"beside {room + 1} new ones"):
        ls.generate(tiny, [TEXTS[0]], max_new_tokens=room + 1)


def test_the_chat_template_is_used_unless_told_otherwise(tiny, spelt, endless):
    texts = list(TEXTS[:2])
    chat, raw = (ls.generate(tiny, texts, max_new_tokens=8, template=t) for t in ("chat", "raw"))
    assert ls.generate(tiny, texts, max_new_tokens=8) == chat != raw
    logits = [ls.next_token_logits(tiny, texts, template=t) for t in ("chat", "raw")]
    assert torch.equal(ls.next_token_logits(tiny, texts), logits[0])
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_the_model_is_given_back_as_it_was_lent(tiny, spelt):
    prompts = ["a cake", "a kite for the garden"]
    assert not tiny.training
    texts = ls.generate(tiny, prompts, max_new_tokens=3)
    tiny.train()
    try:
        assert ls.generate(tiny, prompts, max_new_tokens=3) == texts
        ls.next_token_logits(tiny, prompts)
        assert tiny.training
    finally:
        tiny.eval()
    assert torch.is_grad_enabled()
    assert full_logits(tiny, TOKENS).shape == (*TOKENS.shape, tiny.cfg.d_vocab)


# The next token


def test_next_token_logits_are_those_of_each_prompt_alone(any_tiny):
    texts = [*TEXTS[:3], LONG, TEXTS[0]]
    logits = ls.next_token_logits(any_tiny, texts)
    for row, one in enumerate(tok.encode(any_tiny, texts)):
        expected = full_logits(any_tiny, torch.from_numpy(one.ids)[None])[0, -1]
        assert torch.allclose(logits[row], expected, atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_next_token_logits_inside_steering_are_the_steered_models(any_tiny):
    vectors = vectors_of(any_tiny)
    texts, multipliers = [TEXTS[0], LONG, TEXTS[0]], [2.0, -1.0, 0.0]
    with ls.steering(any_tiny, vectors, layers=[1], multiplier=multipliers):
        logits = ls.next_token_logits(any_tiny, texts)
        apart = ls.next_token_logits(any_tiny, texts, share_prompts=False)
    assert torch.allclose(logits, apart, atol=1e-4)
    base = ls.next_token_logits(any_tiny, texts)
    for row, (one, multiplier) in enumerate(zip(tok.encode(any_tiny, texts), multipliers, strict=True)):
        hook = (resid_hook(1), lambda resid, hook, m=multiplier: resid + m * vectors.layer(1))
        with any_tiny.hooks(fwd_hooks=[hook]):
            expected = full_logits(any_tiny, torch.from_numpy(one.ids)[None])[0, -1]
        assert torch.allclose(logits[row], expected, atol=1e-4)
        assert torch.allclose(logits[row], base[row], atol=1e-3) == (multiplier == 0)


# The cost of a continuation


def nll_by_hand(model, prompt: str, continuation: str) -> float:
    ids = tok.encode(model, [prompt])[0].ids.tolist()
    more = model.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    log_p = full_logits(model, torch.tensor([ids + more]))[0].log_softmax(dim=-1)
    terms = [-float(log_p[len(ids) - 1 + i, token]) for i, token in enumerate(more)]
    return sum(terms) / len(terms)


CONTINUATIONS = (" for the garden", " a", " make how do I a kite", " cake", " the the the")


@pytest.mark.parametrize("batch_tokens", [1, 64, 1024])
def test_the_cost_of_a_continuation_is_its_mean_negative_log_likelihood(any_tiny, batch_tokens: int):
    costs = ls.continuation_nll(any_tiny, list(TEXTS), list(CONTINUATIONS), batch_tokens=batch_tokens)
    expected = [nll_by_hand(any_tiny, *pair) for pair in zip(TEXTS, CONTINUATIONS, strict=True)]
    assert costs == pytest.approx(expected, abs=1e-4)
    assert np.ptp(costs) > 0.1


def test_an_empty_continuation_has_no_cost_and_leaves_the_others_theirs(tiny):
    costs = ls.continuation_nll(tiny, list(TEXTS[:3]), [" a kite", "", " cake"])
    assert np.isnan(costs).tolist() == [False, True, False]
    assert costs[2] == pytest.approx(nll_by_hand(tiny, TEXTS[2], " cake"), abs=1e-4)
    assert np.isnan(ls.continuation_nll(tiny, list(TEXTS[:2]), ["", ""])).all()


def test_there_is_one_continuation_for_each_prompt(tiny):
    with pytest.raises(ls.OptionError, match="2 prompts and 1 continuations"):
        ls.continuation_nll(tiny, ["a cake", "a kite"], [" for"])


def test_a_continuation_that_does_not_fit_is_refused_not_cut(tiny):
    with pytest.raises(ls.PromptError, match="the context holds 128"):
        ls.continuation_nll(tiny, ["a cake"], [" kite" * 200])


def test_likely_words_cost_less_than_the_same_words_shuffled(smol):
    likely = " the sun is shining and the birds are singing in the trees"
    shuffled = " trees singing the in and birds is the are the sun shining"
    costs = ls.continuation_nll(smol, ["It is a lovely morning,"] * 2, [likely, shuffled])
    assert costs[0] < costs[1] - 1


def test_steering_changes_the_cost_of_a_text_and_multiplier_zero_does_not(tiny):
    vectors, args = vectors_of(tiny), (["a cake"], [" for the garden"])
    base = ls.continuation_nll(tiny, *args)
    with ls.steering(tiny, vectors, layers=[1], multiplier=0.0):
        assert ls.continuation_nll(tiny, *args) == base
    with ls.steering(tiny, vectors, layers=[1], multiplier=3.0):
        assert abs(ls.continuation_nll(tiny, *args) - base) > 1e-3
    assert ls.continuation_nll(tiny, *args) == base


@pytest.mark.parametrize("positions", ["content", "generated", "generated:1:3"])
def test_the_tokens_of_a_continuation_are_steered_as_while_they_were_generated(
    any_tiny, endless, monkeypatch, positions: str
):
    """Teacher forcing equals decoding, under each of the positions and a schedule."""
    vectors, texts, words = vectors_of(any_tiny), [TEXTS[0], LONG], " for the kite do"
    ids = any_tiny.tokenizer(words, add_special_tokens=False)["input_ids"]
    n, choice = len(ids), Forced(ids)
    monkeypatch.setattr(decoding, "_choose", choice)
    options: dict[str, Any] = {"layers": [0, 1], "multiplier": 3.0, "positions": positions}
    with ls.steering(any_tiny, vectors, **options, schedule=ls.ExponentialDecay(3)):
        ls.generate(any_tiny, texts, max_new_tokens=n)
        made = choice.take()
        teacher = continuation(any_tiny, texts, choice.chosen)
        costs = ls.continuation_nll(any_tiny, texts, [words] * len(texts))
    assert torch.allclose(torch.stack(teacher), made, atol=1e-4)
    expected = [float(torch.nn.functional.cross_entropy(logits, choice.chosen)) for logits in made]
    assert costs == pytest.approx(expected, abs=1e-4)
    unsteered = continuation(any_tiny, texts, choice.chosen)
    # The last token of the prompt alone is before the first generated one.
    first = 2 if positions == "generated:1:3" else int(positions == "generated")
    assert all(
        torch.allclose(a[:first], b[:first], atol=1e-4) for a, b in zip(teacher, unsteered, strict=True)
    )
    assert not any(
        torch.allclose(a[first], b[first], atol=1e-3) for a, b in zip(teacher, unsteered, strict=True)
    )


def followed(model, texts: list[str], new: Tensor) -> tuple[tok.Batch, list[int]]:
    """Each prompt followed by the same tokens, as one batch; and where those start."""
    encoded = tok.encode(model, texts)
    joined = [
        tok.Encoded(
            np.concatenate([one.ids, new.numpy()]),
            np.concatenate([one.content, np.zeros(len(new), dtype=bool)]),
        )
        for one in encoded
    ]
    return tok.pad(model, joined, range(len(joined))), [len(one) for one in encoded]


def continuation(model, texts: list[str], new: Tensor, **options) -> list[Tensor]:
    return continuation_logits(model, *followed(model, texts, new), **options)


@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_one_pass_over_a_batch_serves_many_rows_of_steering(any_tiny, positions: str, site: str):
    vectors, texts = vectors_of(any_tiny), [TEXTS[0], LONG]
    new = torch.tensor([70, 80, 90, 100])
    multipliers = [2.0, -2.0, 3.0, 0.0, -3.0]
    options: dict[str, Any] = {"layers": [1], "positions": positions, "sites": (site,)}
    for prompts, rows in ((texts, [0, 1, 1, 0, 0]), (texts[:1], [0] * 5)):
        with ls.steering(any_tiny, vectors, multiplier=multipliers, **options):
            together = continuation(any_tiny, prompts, new, rows=torch.tensor(rows))
        assert len(together) == 5
        for row in (1, 4):
            with ls.steering(any_tiny, vectors, multiplier=multipliers[row], **options):
                (alone,) = continuation(any_tiny, [prompts[rows[row]]], new)
            assert torch.allclose(together[row], alone, atol=1e-4)
        assert not torch.allclose(together[1], together[2], atol=1e-2)


def test_where_nothing_is_steered_every_row_has_its_own_logits_all_the_same(tiny):
    vectors, new = vectors_of(tiny), torch.tensor([70, 80, 90])
    (plain,) = continuation(tiny, [TEXTS[0]], new)
    options: dict[str, Any] = {"layers": [1], "positions": "generated:7:9"}
    with ls.steering(tiny, vectors, multiplier=[1.0, 2.0], **options):
        made = continuation(tiny, [TEXTS[0]], new, rows=torch.tensor([0, 0]))
    assert len(made) == 2
    assert all(torch.equal(one, plain) for one in made)


def test_an_empty_continuation_has_no_logits_in_any_row(tiny):
    none = torch.tensor([], dtype=torch.long)
    assert [len(one) for one in continuation(tiny, [TEXTS[0]], none, rows=torch.tensor([0, 0]))] == [0, 0]


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_the_rows_of_a_cost_are_steered_in_the_order_of_the_prompts(tiny, positions: str):
    vectors, multipliers = vectors_of(tiny), [3.0, -3.0, 0.0, 2.0, -2.0]
    options: dict[str, Any] = {"layers": [1], "positions": positions}
    with ls.steering(tiny, vectors, multiplier=multipliers, **options):
        together = ls.continuation_nll(tiny, list(TEXTS), list(CONTINUATIONS))
    for row, multiplier in enumerate(multipliers):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            alone = ls.continuation_nll(tiny, [TEXTS[row]], [CONTINUATIONS[row]])
        assert together[row] == pytest.approx(float(alone[0]), abs=1e-4)
    # The prompts are not in the order of their lengths, in which batches are made.
    lengths = [len(one) for one in tok.encode_pairs(tiny, list(TEXTS), list(CONTINUATIONS))[0]]
    assert lengths != sorted(lengths, reverse=True)


def test_more_rows_than_a_batch_holds_are_not_steered_each_its_own_way(tiny):
    multipliers, given = [3.0, -3.0, 0.0, 2.0, -2.0], (list(TEXTS), list(CONTINUATIONS))
    with (
        pytest.raises(ls.OptionError, match="5 multipliers given for a batch of 1 rows"),
        ls.steering(tiny, vectors_of(tiny), layers=[1], multiplier=multipliers),
    ):
        ls.continuation_nll(tiny, *given, batch_tokens=1)
