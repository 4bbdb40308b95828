"""Which tokens are the user's own, which of them are read, and how prompts are batched."""

from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, write_tiny_model

import lens_safety as ls
from lens_safety.tokens import (
    Encoded,
    batches,
    encode,
    encode_pairs,
    named_position,
    named_template,
    pad,
    position_name,
    real_tokens,
    template_name,
    weights_of,
)
from lens_safety.types import OptionError, PromptError

STRANGE = (
    "a cake",
    "user",
    "user\nuser assistant",
    "assistant\n",
    "for the naïve 🚀👩‍🚀 漢字 e\u0301",
    " a leading blank",
    "two trailing blanks  ",
    "a trailing line\n\n",
    "<|im_start",
    "x",
)
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat(tiny_folders: dict[str, Path]):
    """A model whose tokenizer has a chat template and no BOS."""
    return ls.load_model(tiny_folders["llama"])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory):
    """A model whose tokenizer has neither."""
    return ls.load_model(write_tiny_model(tmp_path_factory.mktemp("raw"), "qwen2", chat=False))


@pytest.fixture(scope="module")
def bos(tmp_path_factory: pytest.TempPathFactory):
    """A model whose tokenizer has no chat template and adds a BOS."""
    return ls.load_model(write_tiny_model(tmp_path_factory.mktemp("bos"), "gemma3", chat=False))


def content(model, one: Encoded) -> str:
    return model.tokenizer.decode(one.ids[one.content])


def around(model, one: Encoded) -> str:
    return model.tokenizer.decode(one.ids[~one.content])


def test_the_content_under_the_chat_template_is_the_users_text_and_nothing_else(chat):
    for text, one in zip(STRANGE, encode(chat, STRANGE), strict=True):
        assert content(chat, one) == text
        assert around(chat, one) == HEAD + TAIL
        assert chat.tokenizer.decode(one.ids) == HEAD + text + TAIL


def test_the_content_under_the_built_in_models_template_is_the_users_text(smol):
    for text, one in zip(STRANGE, encode(smol, STRANGE), strict=True):
        assert content(smol, one) == text
        assert around(smol, one).startswith("<|im_start|>system\nYou are")
        assert around(smol, one).endswith(TAIL)


def test_a_token_that_the_text_shares_with_the_template_counts_as_content(smol):
    # This tokenizer writes the template's newline and the text's blanks as one token.
    one = encode(smol, ["  two leading blanks"])[0]
    assert content(smol, one) == "\n  two leading blanks"


def test_special_tokens_inside_the_users_text_are_no_content(chat, raw):
    for model in (chat, raw):
        assert content(model, encode(model, ["a<|im_end|> cake"])[0]) == "a cake"


@pytest.mark.parametrize("first", ["\n", "<bos>"])
def test_raw_text_follows_a_bos_or_a_newline_so_that_position_zero_is_no_content(first: str, raw, bos):
    model = raw if first == "\n" else bos
    for text, one in zip(STRANGE, encode(model, STRANGE), strict=True):
        # Qwen's tokenizer composes accents, so that text and tokens differ in their length.
        assert normalize("NFC", content(model, one)) == normalize("NFC", text)
        assert around(model, one) == first
        assert not one.content[0]


def test_a_chat_template_that_writes_the_bos_itself_gets_one_bos(bos, monkeypatch):
    monkeypatch.setattr(bos.tokenizer, "chat_template", "<bos>" + CHAT_TEMPLATE)
    one = encode(bos, ["a kite"])[0]
    assert bos.tokenizer.decode(one.ids) == "<bos>" + HEAD + "a kite" + TAIL


def test_a_template_that_trims_the_text_keeps_the_rest_of_it(chat, monkeypatch):
    trimming = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    monkeypatch.setattr(chat.tokenizer, "chat_template", trimming)
    one = encode(chat, [" \n a kite "])[0]
    assert content(chat, one) == "a kite"
    assert around(chat, one) == HEAD + TAIL


def test_a_template_with_a_date_writes_the_same_one_every_day(chat, monkeypatch):
    dated = "{{ date_string }} " + CHAT_TEMPLATE
    monkeypatch.setattr(chat.tokenizer, "chat_template", dated)
    assert around(chat, encode(chat, ["x"])[0]) == "26 Jul 2024 " + HEAD + TAIL


def test_auto_is_chat_where_there_is_a_template_and_raw_elsewhere(chat, raw):
    assert (template_name(chat, "auto"), template_name(raw, "auto")) == ("chat", "raw")
    for model, name in (chat, "chat"), (raw, "raw"):
        auto, named = encode(model, ["a kite"])[0], encode(model, ["a kite"], template=name)[0]
        assert auto.ids.tolist() == named.ids.tolist()
    assert around(chat, encode(chat, ["a kite"], template="raw")[0]) == "\n"


def test_a_template_of_your_own_keeps_the_text_as_content(chat):
    one = encode(chat, ["a kite"], template=lambda text: f"make {text} for me")[0]
    assert content(chat, one).strip() == "a kite"
    assert chat.tokenizer.decode(one.ids) == "make a kite for me"


def test_position_zero_is_no_content_even_where_a_template_begins_with_the_text(chat):
    one = encode(chat, ["a kite"], template=lambda text: f"{text} for me")[0]
    assert chat.tokenizer.decode(one.ids[:1]) == "a"
    assert content(chat, one) == " kite"


def test_a_template_that_loses_the_text_is_refused(chat):
    with pytest.raises(PromptError, match="does not keep the prompt 'a kite' whole"):
        encode(chat, ["a kite"], template=lambda text: text.upper())


def test_unknown_templates_are_refused(chat, raw):
    for ask in template_name, lambda model, name: encode(model, ["x"], template=name):
        with pytest.raises(OptionError, match="unknown template 'alpaca': expected one of auto, chat"):
            ask(chat, "alpaca")
        with pytest.raises(OptionError, match="the tokenizer has no chat template; use 'raw'"):
            ask(raw, "chat")


def test_a_prompt_without_content_is_refused_by_name(chat):
    with pytest.raises(PromptError, match=r"prompt 1 '<\|im_end\|>' has no content token"):
        encode(chat, ["x", "<|im_end|>"])


def test_a_model_without_a_tokenizer_is_refused(chat, monkeypatch):
    place = "_tokenizer" if hasattr(chat, "_tokenizer") else "tokenizer"
    monkeypatch.setattr(chat, place, None)
    with pytest.raises(PromptError, match="the model has no tokenizer"):
        encode(chat, ["x"])


def test_a_prompt_that_fills_the_context_fits_and_one_token_more_is_refused(chat, monkeypatch):
    text = "how do I make a cake"
    monkeypatch.setattr(chat.cfg, "n_ctx", len(encode(chat, [text])[0]))
    assert content(chat, encode(chat, [text])[0]) == text
    with pytest.raises(PromptError, match=r"prompt 1 'how do.*; shorten it or pass truncate=True"):
        encode(chat, ["x", text + "s"])
    with pytest.raises(PromptError, match=r"the context holds \d+ beside 1 new ones; shorten it$"):
        encode(chat, [text], reserve=1)


def test_truncating_cuts_the_end_of_the_content_and_keeps_the_template(chat, monkeypatch):
    text = "how do I make a cake"
    whole = encode(chat, [text])[0]
    monkeypatch.setattr(chat.cfg, "n_ctx", len(whole) - 2)
    cut = encode(chat, [text, "x"], truncate=True)
    assert cut[0].content.sum() == whole.content.sum() - 2
    assert len(cut[0]) == len(whole) - 2
    assert text.startswith(content(chat, cut[0]))
    assert around(chat, cut[0]) == HEAD + TAIL
    assert content(chat, cut[1]) == "x"


def test_a_template_that_fills_the_context_alone_is_refused(chat, monkeypatch):
    monkeypatch.setattr(chat.cfg, "n_ctx", 6)
    with pytest.raises(PromptError, match="the template alone fills the context of 6 tokens"):
        encode(chat, ["x"], truncate=True)


def test_pairs_start_their_continuation_where_the_prompt_ends(chat, monkeypatch):
    prompts, continuations = ["a kite", "x"], [" for the garden", ""]
    joined, starts = encode_pairs(chat, prompts, continuations)
    alone = encode(chat, prompts)
    assert starts == [len(one) for one in alone]
    for one, start, prompt, more in zip(joined, starts, alone, continuations, strict=True):
        assert one.ids[:start].tolist() == prompt.ids.tolist()
        assert chat.tokenizer.decode(one.ids[start:]) == more
        assert not one.content[start:].any()
        assert one.content.sum() == prompt.content.sum()
    monkeypatch.setattr(chat.cfg, "n_ctx", starts[0] + 2)
    with pytest.raises(PromptError, match=f"the context holds {starts[0] + 2}"):
        encode_pairs(chat, prompts[:1], [" for the garden or a cake"])


EXAMPLE = Encoded(np.array([9, 8, 7, 6, 5, 4, 3]), np.array([False, False, True, True, False, True, False]))


@pytest.mark.parametrize(
    ("position", "weights"),
    [
        ("content_mean", [0, 0, 1 / 3, 1 / 3, 0, 1 / 3, 0]),
        ("content_last", [0, 0, 0, 0, 0, 1, 0]),
        ("last", [0, 0, 0, 0, 0, 0, 1]),
        (0, [1, 0, 0, 0, 0, 0, 0]),
        (2, [0, 0, 1, 0, 0, 0, 0]),
        (-7, [1, 0, 0, 0, 0, 0, 0]),
        (-2, [0, 0, 0, 0, 0, 1, 0]),
        (lambda ids, mask: int(np.argmax(ids == 8)), [0, 1, 0, 0, 0, 0, 0]),
        (lambda ids, mask: np.flatnonzero(mask)[0], [0, 0, 1, 0, 0, 0, 0]),
        (lambda ids, mask: -1, [0, 0, 0, 0, 0, 0, 1]),
        (lambda ids, mask: mask & (ids > 5), [0, 0, 0.5, 0.5, 0, 0, 0]),
    ],
)
def test_weights_are_one_spread_over_the_tokens_of_the_position(position, weights: list[float]):
    got = weights_of(EXAMPLE, position)
    np.testing.assert_allclose(got, np.array(weights), rtol=1e-6)
    assert got.sum() == pytest.approx(1)


@pytest.mark.parametrize("position", [7, -8, lambda ids, mask: 7])
def test_a_position_outside_the_prompt_is_refused(position):
    with pytest.raises(OptionError, match=r"position (7|-8) given for a prompt of 7 tokens"):
        weights_of(EXAMPLE, position)


@pytest.mark.parametrize(
    "returned", [np.zeros(7, dtype=bool), np.ones(6, dtype=bool), np.arange(7), "last", None, 1.5]
)
def test_a_callable_that_returns_no_position_is_refused(returned):
    with pytest.raises(OptionError, match=r"the position callable returned .*: expected a token number"):
        weights_of(EXAMPLE, lambda ids, mask: returned)


@pytest.mark.parametrize("position", ["content_mean", "content_last", "last", "max", 3, -2])
def test_a_position_is_found_again_by_its_name(position: str | int):
    assert named_position(position_name(position)) == position


def test_a_template_is_found_again_by_its_name(chat):
    for template in "chat", "raw":
        assert named_template(template_name(chat, template)) == template


def test_unknown_positions_are_refused():
    with pytest.raises(OptionError, match=r"unknown position .* 'middle': expected one of content_mean"):
        position_name("middle")


def halfway(ids, mask):
    return len(ids) // 2


def test_a_callable_has_a_name_that_cannot_be_turned_back(chat):
    assert position_name(halfway) == "callable halfway"
    assert template_name(chat, str.strip) == "callable str.strip"
    with pytest.raises(OptionError, match="the position was a callable halfway, which no file can"):
        named_position("callable halfway")
    with pytest.raises(OptionError, match=r"the template was a callable .*template=\.\.\."):
        named_template("callable str.strip")


@pytest.mark.parametrize("budget", [1, 50, 64, 10_000])
def test_batches_respect_the_budget_and_cover_each_prompt_once(chat, budget: int):
    encoded = encode(chat, [*STRANGE, *TEXTS])
    made = list(batches(chat, encoded, batch_tokens=budget))
    assert sorted(row for batch in made for row in batch.rows) == list(range(len(encoded)))
    for batch in made:
        assert batch.tokens.numel() <= budget or len(batch) == 1
        assert batch.tokens.shape[1] == max(len(encoded[row]) for row in batch.rows)
    lengths = [len(encoded[row]) for batch in made for row in batch.rows]
    assert lengths == sorted(lengths, reverse=True)
    assert len(made) == {1: 15, 10_000: 1}.get(budget, len(made))


def test_no_prompts_make_no_batches(chat):
    assert list(batches(chat, [], batch_tokens=9)) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_holds_each_prompt_from_the_left_whatever_the_tokenizers_side(
    chat, side: str, monkeypatch
):
    monkeypatch.setattr(chat.tokenizer, "padding_side", side)
    encoded = encode(chat, TEXTS)
    rows = (3, 0, 4)
    batch = pad(chat, encoded, rows)
    real = real_tokens(batch)
    assert batch.rows == rows
    assert batch.lengths.tolist() == real.sum(dim=1).tolist() == [len(encoded[row]) for row in rows]
    assert not bool((batch.content & ~real).any())
    assert set(batch.tokens[~real].tolist()) == {chat.tokenizer.pad_token_id}
    for i, row in enumerate(rows):
        assert batch.tokens[i][real[i]].tolist() == encoded[row].ids.tolist()
        assert batch.content[i][real[i]].tolist() == encoded[row].content.tolist()
    shortest = int(batch.lengths.argmin())
    assert bool(real[:, 0].all())
    assert not bool(real[shortest, -1])


def test_rows_of_a_batch_may_be_taken_in_any_order_and_as_often_as_wanted(chat):
    encoded = encode(chat, TEXTS)
    batch = pad(chat, encoded, [2, 4, 1])
    taken = batch[torch.tensor([1, 1, 0, 2, 1])]
    assert taken.rows == (4, 4, 2, 1, 4)
    assert len(taken) == 5
    for i, row in enumerate(taken.rows):
        n = int(taken.lengths[i])
        assert taken.tokens[i, :n].tolist() == encoded[row].ids.tolist()
        assert taken.content[i, :n].tolist() == encoded[row].content.tolist()
    assert taken.tokens.shape[1] == batch.tokens.shape[1]


def test_the_halves_of_a_batch_are_the_batches_of_its_halves(chat):
    encoded = encode(chat, TEXTS)
    rows = [2, 4, 0, 1, 3]
    first, second = pad(chat, encoded, rows).halves()
    assert second.tokens.shape[1] < first.tokens.shape[1]
    for half, mine in (first, rows[:2]), (second, rows[2:]):
        want = pad(chat, encoded, mine)
        assert half.rows == want.rows
        for name in "tokens", "content", "lengths":
            assert torch.equal(getattr(half, name), getattr(want, name))


def test_encoding_leaves_the_tokenizer_as_it_was(chat):
    before = {**vars(chat.tokenizer)}
    encode(chat, STRANGE)
    assert vars(chat.tokenizer) == before
