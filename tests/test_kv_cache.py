"""The decoding cache: the same numbers and the same hooks as TransformerLens' own, and a model given back."""

import pytest
import torch
from conftest import ARCHITECTURES, TEXTS, require_engine

import lens_safety as ls
from lens_safety import tokens as tok
from lens_safety.decoding import Decoding
from lens_safety.kv_cache import Entry
from lens_safety.models import full_logits, unembedding, unembedding_few

HEARD = (
    "hook_k",
    "hook_v",
    "hook_q",
    "hook_rot_k",
    "hook_rot_q",
    "hook_attn_scores",
    "hook_pattern",
    "hook_z",
)


@pytest.fixture(params=ARCHITECTURES)
def hooked(request, tiny_folders, tiny_models):
    require_engine("hooked")
    key = ("kv", request.param)
    if key not in tiny_models:
        tiny_models[key] = ls.load_model(tiny_folders[request.param], engine="hooked")
    return tiny_models[key]


def heard(model, run) -> dict[str, torch.Tensor]:
    """What each attention hook of block 1 saw last."""
    seen: dict[str, torch.Tensor] = {}

    def keep(value, hook):
        seen[hook.name] = value.detach().clone()

    names = [f"blocks.1.attn.{name}" for name in HEARD]
    there = [name for name in names if name in model.hook_dict]
    with model.hooks(fwd_hooks=[(name, keep) for name in there]):
        run()
    assert set(seen) == {name for name in there if "rot" not in name or model.cfg.rotary_dim}
    return seen


@pytest.mark.parametrize("n_new", [1, 3])
def test_attention_hooks_see_what_they_see_without_a_cache(hooked, n_new: int):
    encoded = tok.encode(hooked, [TEXTS[0]])
    more = torch.tensor([[7, 19, 23][:n_new]])
    decoding = Decoding(hooked, encoded)
    decoding.prefill(room=4)
    decoding.feed(torch.tensor([[5]]))
    cached = heard(hooked, lambda: decoding.feed(more))
    whole = torch.cat([torch.from_numpy(encoded[0].ids)[None], torch.tensor([[5]]), more], dim=1)
    plain = heard(hooked, lambda: full_logits(hooked, whole))
    for name, value in cached.items():
        last = name.rsplit(".", 1)[-1]
        want = plain[name]
        if last in ("hook_attn_scores", "hook_pattern"):
            want = want[:, :, -n_new:]
        elif last != "hook_rot_k":
            want = want[:, -n_new:]
        torch.testing.assert_close(value, want, atol=1e-4, rtol=1e-4)


def test_rows_of_different_lengths_equal_each_row_alone(hooked):
    rows = [TEXTS[0], TEXTS[3], TEXTS[1]]
    more = torch.tensor([[5, 9], [11, 40], [77, 3]])
    decoding = Decoding(hooked, tok.encode(hooked, rows))
    decoding.prefill(room=3)
    together = [decoding.feed(more[:, :1]), decoding.feed(more[:, 1:])]
    for row, text in enumerate(rows):
        ids = torch.cat([torch.from_numpy(tok.encode(hooked, [text])[0].ids), more[row]])
        alone = full_logits(hooked, ids[None])[0]
        torch.testing.assert_close(together[0][row, 0], alone[-2], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1][row, 0], alone[-1], atol=1e-4, rtol=1e-4)


def test_the_attention_is_the_models_own_again_afterwards(hooked):
    attention = hooked.blocks[0].attn
    before = set(attention.__dict__)
    decoding = Decoding(hooked, tok.encode(hooked, [TEXTS[0]]))
    decoding.prefill(room=3)
    decoding.feed(torch.tensor([[5]]))
    assert set(attention.__dict__) == before

    def fail(value, hook):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError), hooked.hooks(fwd_hooks=[("blocks.1.hook_resid_post", fail)]):
        decoding.feed(torch.tensor([[5]]))
    assert set(attention.__dict__) == before
    assert "forward" not in unembedding(hooked).__dict__


def test_only_new_keys_are_turned():
    entry = Entry((2, 0, 3, 4), torch.float32, torch.device("cpu"))
    first, second = torch.randn(2, 5, 3, 4), torch.randn(2, 1, 3, 4)
    entry.append(first, first)
    entry.lay_out(lambda values: values, 4)
    turns: list[tuple[int, int]] = []

    def turn(keys: torch.Tensor, start: int) -> torch.Tensor:
        turns.append((start, keys.shape[1]))
        return keys * 2

    entry.append(second, second)
    torch.testing.assert_close(entry.turned(turn), torch.cat([first, second], dim=1) * 2)
    keys, _ = entry.append(second + 1, second + 1)
    torch.testing.assert_close(entry.turned(turn), torch.cat([first, second, second + 1], dim=1) * 2)
    torch.testing.assert_close(keys, torch.cat([first, second, second + 1], dim=1))
    assert turns == [(0, 6), (6, 1)]


def test_the_unembedding_the_other_way_round_gives_the_same_logits_and_fires_its_hooks(tiny):
    ids = torch.from_numpy(tok.encode(tiny, [TEXTS[0]])[0].ids)[None]
    plain = full_logits(tiny, ids)
    fired: list[str] = []
    names = [name for name in ("unembed.hook_in", "unembed.hook_out") if name in tiny.hook_dict]
    hooks = [(name, lambda value, hook: fired.append(hook.name)) for name in names]
    with unembedding_few(tiny), tiny.hooks(fwd_hooks=hooks):
        other = full_logits(tiny, ids)
    torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)
    assert fired == names
    torch.testing.assert_close(full_logits(tiny, ids), plain, atol=0, rtol=0)
