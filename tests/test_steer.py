import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, TEXTS, labelled
from torch import Tensor

import lens_safety as ls
from lens_safety import steer
from lens_safety import tokens as tok
from lens_safety.models import full_logits, resid_hook
from lens_safety.steer import OPERATORS, _choose

OPERATOR = pytest.mark.parametrize("operator", OPERATORS)
BATCH, POS = 5, 11
TOKENS = torch.randint(4, 300, (BATCH, POS), generator=torch.Generator().manual_seed(0))
ROWS = [-2.0, 0.0, 1.5, 3.0, 0.5]


def vectors_of(model) -> ls.ContentVectors:
    return ls.content_vectors(ls.residual_streams(model, labelled(), template="raw", progress=False))


@contextmanager
def listening(model, layer: int) -> Iterator[list[Tensor]]:
    """The residual streams of every call at one layer, as hooks registered until now leave them."""
    heard: list[Tensor] = []

    def keep(resid, hook):
        heard.append(resid)

    with model.hooks(fwd_hooks=[(resid_hook(layer), keep)]):
        yield heard


def streams(model, tokens: Tensor = TOKENS) -> tuple[list[Tensor], Tensor]:
    """The residual stream of each layer, and the logits."""
    with (
        listening(model, 0) as first,
        listening(model, 1) as second,
        listening(model, 2) as third,
    ):
        logits = full_logits(model, tokens)
    return [*first, *second, *third], logits


def same(first: tuple[list[Tensor], Tensor], second: tuple[list[Tensor], Tensor]) -> bool:
    pairs = zip([*first[0], first[1]], [*second[0], second[1]], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def greedy_ids(model, text: str, n: int, template: str = "auto") -> list[int]:
    """The reference: the whole growing sequence through the model for each token, no cache."""
    ids = torch.from_numpy(tok.encode(model, [text], template=template)[0].ids)[None]
    start = ids.shape[1]
    for _ in range(n):
        ids = torch.cat([ids, full_logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, start:].tolist()


def decoded(model, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends a text, so that lengths are known."""
    monkeypatch.setattr(steer, "end_of_text_ids", lambda tokenizer: [])


@pytest.fixture
def spelt(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are token numbers, because most of a random model's tokens decode to the same sign."""

    def spell(ids, **options) -> str:
        return " ".join(str(int(i)) for i in ids)

    monkeypatch.setattr(tiny.tokenizer, "decode", spell)


def test_add_gives_the_residual_plus_multiplier_times_vector_bit_for_bit(tiny):
    vectors = vectors_of(tiny)
    base, base_logits = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=-2.5):
        steered, logits = streams(tiny)
    assert torch.equal(steered[1], base[1] + -2.5 * vectors.layer(1))
    assert torch.equal(steered[0], base[0])
    assert not torch.allclose(steered[2], base[2], atol=1e-2)
    assert not torch.allclose(logits, base_logits, atol=1e-2)


def test_a_positive_multiplier_raises_the_projection_on_the_direction_and_a_negative_lowers_it(
    tiny,
):
    vectors = vectors_of(tiny)
    projections = []
    for multiplier in (-1.0, 0.0, 1.0):
        with ls.steering(tiny, vectors, layers=[2], multiplier=multiplier):
            projections.append(streams(tiny)[0][2] @ vectors.unit[2])
    low, middle, high = projections
    assert torch.allclose(high - middle, vectors.norms[2].expand(BATCH, POS), atol=1e-4)
    assert torch.allclose(middle - low, vectors.norms[2].expand(BATCH, POS), atol=1e-4)


@OPERATOR
def test_multiplier_zero_is_the_identity_bit_for_bit(tiny, operator):
    base = streams(tiny)
    with ls.steering(tiny, vectors_of(tiny), layers=[0, 1, 2], multiplier=0.0, operator=operator):
        assert same(streams(tiny), base)


@OPERATOR
def test_leaving_the_context_restores_every_bit(tiny, operator):
    base = streams(tiny)
    with ls.steering(tiny, vectors_of(tiny), layers=[0, 2], operator=operator):
        assert not same(streams(tiny), base)
    assert same(streams(tiny), base)


def test_an_exception_inside_the_context_restores_every_bit_and_is_not_swallowed(tiny):
    base, vectors = streams(tiny), vectors_of(tiny)
    with pytest.raises(ZeroDivisionError), ls.steering(tiny, vectors, layers=[1]):
        _ = 1 / 0
    assert same(streams(tiny), base)


def test_ablation_leaves_no_projection_in_any_row_or_position(tiny):
    vectors = vectors_of(tiny)
    u = vectors.unit[1]
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator="ablate"):
        ablated, _ = streams(tiny)
    share = (ablated[1] @ u).abs() / base[1].norm(dim=-1)
    assert share.shape == (BATCH, POS)
    assert float(share.max()) < 1e-5
    assert float(((base[1] @ u).abs() / base[1].norm(dim=-1)).median()) > 1e-2


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 2.0])
def test_ablation_takes_its_share_of_the_projection_and_nothing_beside_it(tiny, multiplier: float):
    vectors = vectors_of(tiny)
    u = vectors.unit[1]
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator="ablate", multiplier=multiplier):
        ablated, _ = streams(tiny)
    along = (base[1] @ u)[..., None] * u
    assert torch.allclose(ablated[1], base[1] - multiplier * along, atol=1e-5)


@OPERATOR
def test_ablation_alone_is_blind_to_the_length_and_the_sign_of_the_vector(tiny, operator):
    vectors = vectors_of(tiny)
    kept = []
    for scaled in (vectors, -3 * vectors):
        with ls.steering(tiny, scaled, layers=[1], operator=operator):
            kept.append(streams(tiny)[0][1])
    assert torch.allclose(*kept, atol=1e-5) == (operator == "ablate")


@OPERATOR
def test_each_row_is_steered_by_its_own_multiplier_as_if_all_had_it(tiny, operator):
    vectors = vectors_of(tiny)
    options = {"layers": [0, 1], "operator": operator}
    with ls.steering(tiny, vectors, multiplier=ROWS, **options):
        mixed, mixed_logits = streams(tiny)
    for row, multiplier in enumerate(ROWS):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            alone, logits = streams(tiny)
        assert torch.equal(mixed_logits[row], logits[row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(mixed, alone, strict=True))
    assert not torch.allclose(mixed[1][0], mixed[1][3])


def test_as_many_multipliers_as_rows_are_needed_and_one_serves_all(tiny):
    base, vectors = streams(tiny), vectors_of(tiny)
    with (
        pytest.raises(ls.OptionError, match="2 multipliers given for a batch of 5 rows"),
        ls.steering(tiny, vectors, layers=[1], multiplier=[1.0, 2.0]),
    ):
        streams(tiny)
    assert same(streams(tiny), base)
    with ls.steering(tiny, vectors, layers=[1], multiplier=[1.0]):
        listed = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=1.0):
        assert same(streams(tiny), listed)


def test_several_layers_are_steered_as_by_hooks_written_by_hand(tiny):
    vectors = vectors_of(tiny)

    def by_hand(layer: int):
        return resid_hook(layer), lambda resid, hook: resid + 1.5 * vectors.layer(layer)

    with tiny.hooks(fwd_hooks=[by_hand(2), by_hand(0)]):
        expected = streams(tiny)
    with ls.steering(tiny, vectors, layers=[2, 0], multiplier=1.5) as record:
        assert same(streams(tiny), expected)
    assert record.layers == (2, 0)


def test_each_layers_hook_fires_once_a_pass_and_only_inside_the_context(tiny):
    with ls.steering(tiny, vectors_of(tiny), layers=[2, 0]) as record:
        assert record.fired == {2: 0, 0: 0}
        streams(tiny)
        streams(tiny)
    streams(tiny)
    assert record.fired == {2: 2, 0: 2}


def test_contexts_nest_and_their_pushes_add_up(tiny):
    vectors = vectors_of(tiny)
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=1.0):
        with ls.steering(tiny, vectors, layers=[1], multiplier=2.0):
            both = streams(tiny)[0][1]
        one = streams(tiny)[0][1]
    v = vectors.layer(1)
    assert torch.equal(both, base[1] + 1.0 * v + 2.0 * v)
    assert torch.equal(one, base[1] + 1.0 * v)


def test_the_record_says_the_dose_of_each_layer_and_multiplier(tiny):
    vectors = vectors_of(tiny)
    with ls.steering(tiny, vectors, layers=[2, 0], multiplier=[1.0, -2.0]) as record:
        pass
    ratio = (vectors.norms / vectors.resid_norm).tolist()
    expected = [[ratio[2], 2 * ratio[2]], [ratio[0], 2 * ratio[0]]]
    assert np.array(record.dose) == pytest.approx(np.array(expected))
    assert record.multiplier == (1.0, -2.0)


def test_a_hook_of_the_users_own_survives_the_context(tiny):
    vectors = vectors_of(tiny)
    with listening(tiny, 1) as heard:
        with ls.steering(tiny, vectors, layers=[1]):
            streams(tiny)
        streams(tiny)
    assert len(heard) == 2


def test_a_hook_that_was_added_for_good_survives_the_context(tiny):
    vectors, heard = vectors_of(tiny), []
    tiny.add_hook(resid_hook(1), lambda resid, hook: heard.append(resid))
    try:
        with ls.steering(tiny, vectors, layers=[1]):
            streams(tiny)
        streams(tiny)
    finally:
        tiny.reset_hooks()
    assert len(heard) == 2


@OPERATOR
def test_nothing_is_edited_in_place(tiny, operator):
    vectors = vectors_of(tiny)
    tensors = ("vectors", "safe_mean", "dangerous_mean", "resid_norm")
    before = [getattr(vectors, name).clone() for name in tensors]
    base, _ = streams(tiny)
    with (
        listening(tiny, 1) as earlier,
        ls.steering(tiny, vectors, layers=[1], operator=operator),
        listening(tiny, 1) as later,
    ):
        full_logits(tiny, TOKENS)
    assert torch.equal(earlier[0], base[1])
    assert not torch.allclose(later[0], base[1], atol=1e-3)
    assert all(torch.equal(getattr(vectors, n), b) for n, b in zip(tensors, before, strict=True))


def test_layers_vectors_and_multipliers_that_cannot_be_used_are_refused(tiny):
    vectors, base = vectors_of(tiny), streams(tiny)
    broken = vectors.vectors.clone()
    broken[1, 3] = float("nan")
    other = replace(vectors, model=replace(vectors.model, probe=(1.0,) * (N_LAYERS + 1)))
    fewer = ls.content_vectors(ls.residual_streams(tiny, labelled(), layers=[0, 2], progress=False))
    cases = [
        (vectors, {"layers": [N_LAYERS]}, ls.OptionError, "layer 3 given, expected 0 to 2"),
        (vectors, {"layers": [-1]}, ls.OptionError, "layer -1 given"),
        (vectors, {"layers": []}, ls.OptionError, "no layers given"),
        (0.0 * vectors, {}, ls.OptionError, "the vector of layer 1 is zero"),
        (replace(vectors, vectors=broken), {}, ls.OptionError, "layer 1 holds NaN"),
        (other, {}, ls.MismatchError, "other weights"),
        (fewer, {}, ls.MismatchError, "layer 1 given, expected one of the layers with a vector"),
        (vectors, {"multiplier": float("nan")}, ls.OptionError, "multiplier nan given"),
        (vectors, {"multiplier": float("inf")}, ls.OptionError, "multiplier inf given"),
        (vectors, {"multiplier": 1e39}, ls.OptionError, "a finite number"),
        (vectors, {"multiplier": [1.0, float("nan")]}, ls.OptionError, "a finite number"),
        (vectors, {"multiplier": []}, ls.OptionError, "a finite number"),
    ]
    for given, options, error, says in cases:
        with (
            pytest.raises(error, match=says),
            ls.steering(tiny, given, **{"layers": [1], **options}),
        ):
            pytest.fail(f"{options} was taken")
    assert same(streams(tiny), base)


def test_half_precision_stays_half_precision_and_is_steered_by_the_rounded_vector(engine, tiny_folders):
    model = ls.load_model(tiny_folders["llama"], engine=engine, dtype=torch.bfloat16)
    vectors = vectors_of(model)
    base, _ = streams(model)
    with ls.steering(model, vectors, layers=[1], multiplier=1.5):
        steered, _ = streams(model)
    assert steered[1].dtype == torch.bfloat16
    assert torch.equal(steered[1], base[1] + (1.5 * vectors.layer(1)).to(torch.bfloat16))
    with ls.steering(model, vectors, layers=[1], operator="ablate"):
        ablated, _ = streams(model)
    assert ablated[1].dtype == torch.bfloat16
    share = (ablated[1].float() @ vectors.unit[1]).abs() / base[1].float().norm(dim=-1)
    assert float(share.max()) < 1e-2


def test_a_vector_that_is_zero_or_nan_at_another_layer_does_no_harm(tiny):
    vectors = vectors_of(tiny)
    odd = vectors.vectors.clone()
    odd[0], odd[2] = 0.0, float("nan")
    base, _ = streams(tiny)
    with ls.steering(tiny, replace(vectors, vectors=odd), layers=[1]):
        assert torch.equal(streams(tiny)[0][1], base[1] + vectors.layer(1))


def test_unknown_operators_and_positions_are_refused_by_name(tiny):
    unchecked, vectors = inspect.unwrap(ls.steering), vectors_of(tiny)
    with pytest.raises(ls.OptionError, match="unknown operator 'erase': expected one of add, ablate"):
        next(unchecked(tiny, vectors, layers=[1], operator="erase"))
    with pytest.raises(ls.OptionError, match="unknown positions 'prompt': expected one of all"):
        next(unchecked(tiny, vectors, layers=[1], positions="prompt"))


def test_outside_generate_generated_means_a_pass_over_a_single_token(tiny):
    vectors = vectors_of(tiny)
    base, single = streams(tiny), streams(tiny, TOKENS[:, :1])
    with ls.steering(tiny, vectors, layers=[1], positions="generated") as record:
        assert same(streams(tiny), base)
        steered, _ = streams(tiny, TOKENS[:, :1])
    assert torch.equal(steered[1], single[0][1] + vectors.layer(1))
    assert record.fired == {1: 2}


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


def test_all_positions_inside_generate_include_the_prompt(tiny, endless):
    vectors = vectors_of(tiny)
    with listening(tiny, 1) as plain:
        ls.generate(tiny, [TEXTS[0]], max_new_tokens=1)
    with ls.steering(tiny, vectors, layers=[1]), listening(tiny, 1) as steered:
        ls.generate(tiny, [TEXTS[0]], max_new_tokens=1)
    assert torch.equal(steered[0], plain[0] + vectors.layer(1))


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


def test_the_prompts_mark_is_gone_after_generate_even_after_an_error_inside_it(tiny):
    vectors, base = vectors_of(tiny), streams(tiny)

    def fail(resid, hook):
        raise ZeroDivisionError

    with (
        ls.steering(tiny, vectors, layers=[1], positions="generated"),
        pytest.raises(ZeroDivisionError),
        tiny.hooks(fwd_hooks=[(resid_hook(2), fail)]),
    ):
        ls.generate(tiny, ["a cake"])
    single = streams(tiny, TOKENS[:, :1])[0][1]
    with ls.steering(tiny, vectors, layers=[1], positions="generated"):
        assert same(streams(tiny), base)
        assert torch.equal(streams(tiny, TOKENS[:, :1])[0][1], single + vectors.layer(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_each_steps_logits_are_those_of_the_whole_sequence_without_cache_or_padding(
    architecture, batch_size, engine, tiny_folders, tiny_models, endless, monkeypatch
):
    key = ("steer", architecture, engine)
    if key not in tiny_models:
        tiny_models[key] = ls.load_model(tiny_folders[architecture], engine=engine)
    model, texts, n = tiny_models[key], list(TEXTS[:3]), 12
    chosen = torch.randint(4, 300, (n,), generator=torch.Generator().manual_seed(1))
    heard: list[Tensor] = []

    def choose(logits: Tensor, *options) -> Tensor:
        heard.append(logits)
        return chosen[(len(heard) - 1) % n].expand(len(logits))

    monkeypatch.setattr(steer, "_choose", choose)
    ls.generate(model, texts, max_new_tokens=n, batch_size=batch_size)
    made = torch.cat([torch.stack(heard[i : i + n]) for i in range(0, len(heard), n)], dim=1)
    for row, one in enumerate(tok.encode(model, texts)):
        ids = torch.cat([torch.from_numpy(one.ids), chosen])[None]
        expected = full_logits(model, ids)[0, len(one) - 1 : -1]
        assert torch.allclose(made[:, row], expected, atol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_greedy_text_is_that_of_the_whole_sequence_without_a_cache(
    tiny, spelt, endless, batch_size: int | None
):
    texts = list(TEXTS)
    expected = [decoded(tiny, greedy_ids(tiny, text, 12)) for text in texts]
    assert ls.generate(tiny, texts, max_new_tokens=12, batch_size=batch_size) == expected
    assert len(set(expected)) == len(texts)


def test_the_built_in_models_greedy_text_is_that_of_the_whole_sequence_without_a_cache(smol, endless):
    texts = ["The hotel we stayed in was", "My"]
    expected = [decoded(smol, greedy_ids(smol, text, 12, "raw")) for text in texts]
    assert ls.generate(smol, texts, max_new_tokens=12, template="raw") == expected
    assert all(len(text.split()) > 5 for text in expected)


def test_the_order_of_prompts_is_the_order_of_texts(tiny, spelt, endless):
    texts = ls.generate(tiny, list(TEXTS), max_new_tokens=6, batch_size=2)
    backwards = ls.generate(tiny, list(TEXTS[::-1]), max_new_tokens=6, batch_size=2)
    assert backwards == texts[::-1]
    assert len(set(texts)) == len(TEXTS)


def test_a_row_ends_at_its_end_token_and_the_others_go_on(tiny, spelt, monkeypatch):
    ids = {text: greedy_ids(tiny, text, 10) for text in TEXTS}
    # A token that one row makes early but not at once, and another row never makes.
    short, long, end = next(
        (a, b, token)
        for a in TEXTS
        for b in TEXTS
        for token in ids[a][1:4]
        if token != ids[a][0] and token not in ids[b]
    )
    monkeypatch.setattr(steer, "end_of_text_ids", lambda tokenizer: [end])
    made = ls.generate(tiny, [short, long], max_new_tokens=10)
    cut = ids[short][: ids[short].index(end)]
    assert made == [decoded(tiny, cut), decoded(tiny, ids[long])]
    assert 1 <= len(cut) <= 3


def test_decoding_stops_when_every_row_has_ended(tiny, monkeypatch):
    first = greedy_ids(tiny, TEXTS[0], 1)[0]
    monkeypatch.setattr(steer, "end_of_text_ids", lambda tokenizer: [first])
    with listening(tiny, 0) as heard:
        assert ls.generate(tiny, [TEXTS[0]], max_new_tokens=9) == [""]
    assert len(heard) == 1


def test_special_tokens_are_left_out_of_the_text(tiny, endless, monkeypatch):
    special = tiny.tokenizer.convert_tokens_to_ids("<|im_start|>")
    monkeypatch.setattr(steer, "_choose", lambda logits, *options: torch.tensor([special]))
    assert ls.generate(tiny, ["a cake"], max_new_tokens=3) == [""]


@pytest.mark.parametrize("n", [1, 5])
def test_exactly_as_many_tokens_are_made_as_were_asked_for(tiny, spelt, endless, n: int):
    with ls.steering(tiny, vectors_of(tiny), layers=[1], multiplier=0.0) as record:
        made = ls.generate(tiny, [TEXTS[0]], max_new_tokens=n)
    assert record.fired == {1: n}
    assert made == [decoded(tiny, greedy_ids(tiny, TEXTS[0], n))]


def test_sampling_repeats_by_seed_and_differs_between_seeds(tiny, endless):
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
def test_sampling_that_leaves_one_choice_is_greedy(tiny, endless, options):
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


def test_no_prompts_an_empty_prompt_and_a_lone_string_are_refused(tiny):
    for prompts in ([], [" "], "a cake"):
        with pytest.raises(ls.PromptError):
            ls.generate(tiny, prompts)


def test_a_prompt_may_fill_the_context_with_its_text_to_the_last_token_and_no_further(tiny, endless):
    room = tiny.cfg.n_ctx - len(tok.encode(tiny, [TEXTS[0]])[0])
    with listening(tiny, 0) as heard:
        ls.generate(tiny, [TEXTS[0]], max_new_tokens=room)
    assert len(heard) == room
    with pytest.raises(ls.PromptError, match=f"beside {room + 1} new ones"):
        ls.generate(tiny, [TEXTS[0]], max_new_tokens=room + 1)


def test_the_chat_template_is_used_unless_told_otherwise(tiny, endless):
    texts = list(TEXTS[:2])
    chat, raw = (ls.generate(tiny, texts, max_new_tokens=8, template=t) for t in ("chat", "raw"))
    assert ls.generate(tiny, texts, max_new_tokens=8) == chat != raw


def test_the_model_is_given_back_as_it_was_lent(tiny):
    tokenizer, prompts = tiny.tokenizer, ["a cake", "a kite for the garden"]
    tokenizer.padding_side = "right"
    texts = ls.generate(tiny, prompts, max_new_tokens=3)
    assert tokenizer.padding_side == "right"
    assert not tiny.training
    tiny.train()
    try:
        assert ls.generate(tiny, prompts, max_new_tokens=3) == texts
        assert tiny.training
    finally:
        tiny.eval()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_rows_of_one_generation_are_steered_each_by_its_own_multiplier(tiny, endless, positions):
    vectors, multipliers = vectors_of(tiny), [0.0, 4.0, -4.0]
    options = {"layers": [1, 2], "positions": positions}
    with ls.steering(tiny, vectors, multiplier=multipliers, **options):
        together = ls.generate(tiny, [TEXTS[0]] * 3, max_new_tokens=10)
    for text, multiplier in zip(together, multipliers, strict=True):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            assert ls.generate(tiny, [TEXTS[0]], max_new_tokens=10) == [text]
    assert together[0] == ls.generate(tiny, [TEXTS[0]], max_new_tokens=10)[0]
    assert len(set(together)) == 3


def test_a_large_multiplier_changes_the_built_in_models_text_and_zero_does_not(smol):
    prompts = labelled(["a nice day", "a bloody murder"], [False, True])
    vectors = ls.content_vectors(ls.residual_streams(smol, prompts, layers=[20], progress=False))
    made = []
    for multiplier in (0.0, 8.0):
        with ls.steering(smol, vectors, layers=[20], multiplier=multiplier):
            made.append(ls.generate(smol, ["My day was"], max_new_tokens=6))
    assert made[0] == ls.generate(smol, ["My day was"], max_new_tokens=6) != made[1]


def nll_by_hand(model, prompt: str, continuation: str) -> float:
    ids = tok.encode(model, [prompt])[0].ids.tolist()
    more = model.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    log_p = full_logits(model, torch.tensor([ids + more]))[0].log_softmax(dim=-1)
    terms = [-float(log_p[len(ids) - 1 + i, token]) for i, token in enumerate(more)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("batch_tokens", [1, 64, 1024])
def test_the_cost_of_a_continuation_is_its_mean_negative_log_likelihood(tiny, batch_tokens: int):
    continuations = [" for the garden", " a", " make how do I a kite", " cake", " the the the"]
    costs = ls.continuation_nll(tiny, list(TEXTS), continuations, batch_tokens=batch_tokens)
    expected = [nll_by_hand(tiny, *pair) for pair in zip(TEXTS, continuations, strict=True)]
    assert costs == pytest.approx(expected, abs=1e-4)
    assert np.ptp(costs) > 0.1


def test_an_empty_continuation_has_no_cost_and_leaves_the_others_theirs(tiny):
    costs = ls.continuation_nll(tiny, list(TEXTS[:3]), [" a kite", "", " cake"])
    assert np.isnan(costs).tolist() == [False, True, False]
    assert costs[2] == pytest.approx(nll_by_hand(tiny, TEXTS[2], " cake"), abs=1e-4)


def test_there_is_one_continuation_for_each_prompt(tiny):
    with pytest.raises(ls.OptionError, match="2 prompts and 1 continuations"):
        ls.continuation_nll(tiny, ["a cake", "a kite"], [" for"])


def test_steering_changes_the_cost_of_a_text_and_multiplier_zero_does_not(tiny):
    vectors, args = vectors_of(tiny), (["a cake"], [" for the garden"])
    base = ls.continuation_nll(tiny, *args)
    with ls.steering(tiny, vectors, layers=[1], multiplier=0.0):
        assert ls.continuation_nll(tiny, *args) == base
    with ls.steering(tiny, vectors, layers=[1], multiplier=3.0):
        assert abs(ls.continuation_nll(tiny, *args) - base) > 1e-3
    assert ls.continuation_nll(tiny, *args) == base


def test_likely_words_cost_less_than_the_same_words_shuffled(smol):
    likely = " the sun is shining and the birds are singing in the trees"
    shuffled = " trees singing the in and birds is the are the sun shining"
    costs = ls.continuation_nll(smol, ["It is a lovely morning,"] * 2, [likely, shuffled])
    assert costs[0] < costs[1] - 1


def test_a_continuation_that_does_not_fit_is_refused_not_cut(tiny):
    with pytest.raises(ls.PromptError, match="the context holds 128"):
        ls.continuation_nll(tiny, ["a cake"], [" kite" * 200])


def test_a_layer_that_is_named_twice_is_refused(tiny):
    vectors = ls.content_vectors(ls.residual_streams(tiny, labelled(), progress=False))
    with (
        pytest.raises(ls.OptionError, match="expected each layer once"),
        ls.steering(tiny, vectors, layers=[1, 1]),
    ):
        pass
