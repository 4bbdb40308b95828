"""The steering context: it comes and goes without a trace; the damage of steering; multipliers by damage."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BATCH,
    ROWS,
    TEXTS,
    TOKENS,
    greedy_ids,
    labelled,
    listening,
    same,
    streams,
    vectors_of,
)

import lens_safety as ls
from lens_safety import decoding, steer
from lens_safety import tokens as tok
from lens_safety.models import full_logits, resid_hook
from lens_safety.operators import OPERATORS

OPERATOR = pytest.mark.parametrize("operator", [*OPERATORS, "clamp:3.5"])


@OPERATOR
def test_leaving_the_context_restores_every_bit(tiny, operator: str):
    base = streams(tiny)
    with ls.steering(tiny, vectors_of(tiny), layers=[0, 2], operator=operator):
        assert not same(streams(tiny), base)
    assert same(streams(tiny), base)


@OPERATOR
def test_an_exception_inside_the_context_restores_every_bit_and_is_not_swallowed(tiny, operator: str):
    base, vectors = streams(tiny), vectors_of(tiny)
    with pytest.raises(ZeroDivisionError), ls.steering(tiny, vectors, layers=[1], operator=operator):
        _ = 1 / 0
    assert same(streams(tiny), base)


def test_an_exception_in_the_middle_of_a_pass_restores_every_bit(tiny):
    base, vectors = streams(tiny), vectors_of(tiny)
    options: dict[str, Any] = {"layers": [1], "schedule": lambda step: 1 / 0}
    with pytest.raises(ZeroDivisionError), ls.steering(tiny, vectors, **options):
        streams(tiny)
    assert same(streams(tiny), base)
    with pytest.raises(ZeroDivisionError), ls.steering(tiny, vectors, multiplier=[1.0, 2.0], **options):
        ls.generate(tiny, ["a cake"] * 2)
    assert same(streams(tiny), base)
    assert not decoding.is_own_pass()


def test_after_the_context_prompts_are_shared_again(tiny):
    vectors, texts = vectors_of(tiny), [TEXTS[0]] * 2

    def rows_at_the_top() -> int:
        with listening(tiny, 2) as heard:
            ls.next_token_logits(tiny, texts)
        return len(heard[0])

    with ls.steering(tiny, vectors, layers=[1], multiplier=[1.0, 2.0]):
        assert rows_at_the_top() == 2
    assert rows_at_the_top() == 1
    with pytest.raises(ZeroDivisionError), ls.steering(tiny, vectors, layers=[1], multiplier=[1.0, 2.0]):
        _ = 1 / 0
    assert rows_at_the_top() == 1


def test_nothing_is_set_up_where_the_arguments_are_refused(tiny):
    base, vectors = streams(tiny), vectors_of(tiny)
    with (
        pytest.raises(ls.OptionError, match="layer 9 given"),
        ls.steering(tiny, vectors, layers=[1, 9]),
    ):
        pytest.fail("it was taken")
    assert same(streams(tiny), base)


@OPERATOR
def test_nothing_is_edited_in_place(tiny, operator: str):
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
    with ls.steering(tiny, vectors, layers=[1], multiplier=1.0) as outer:
        with ls.steering(tiny, vectors, layers=[1], multiplier=2.0) as inner:
            both = streams(tiny)[0][1]
        one = streams(tiny)[0][1]
    v = vectors.layer(1)
    assert torch.equal(both, base[1] + 1.0 * v + 2.0 * v)
    assert torch.equal(one, base[1] + 1.0 * v)
    assert (outer.fired, inner.fired) == ({1: 2}, {1: 1})


def test_an_ablation_inside_a_push_undoes_it_and_outside_it_does_not(tiny):
    vectors = vectors_of(tiny)
    u = vectors.unit[1]
    push: dict[str, Any] = {"layers": [1], "multiplier": 5.0}
    ablate: dict[str, Any] = {"layers": [1], "operator": "ablate"}
    with ls.steering(tiny, vectors, **ablate):
        alone = streams(tiny)
    with ls.steering(tiny, vectors, **push), ls.steering(tiny, vectors, **ablate):
        assert torch.allclose(streams(tiny)[0][1], alone[0][1], atol=1e-4)
    with ls.steering(tiny, vectors, **ablate), ls.steering(tiny, vectors, **push):
        late = streams(tiny)[0][1]
    assert torch.allclose(late @ u, (5 * vectors.norms[1]).expand(BATCH, TOKENS.shape[1]), atol=1e-3)


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


def test_the_record_says_the_dose_of_each_layer_and_multiplier(tiny):
    vectors = vectors_of(tiny)
    with ls.steering(tiny, vectors, layers=[2, 0], multiplier=[1.0, -2.0]) as record:
        pass
    ratio = (vectors.norms / vectors.resid_norm).tolist()
    frame = record.to_frame()
    assert frame["dose"].tolist() == pytest.approx([ratio[2], 2 * ratio[2], ratio[0], 2 * ratio[0]])
    assert frame["multiplier"].tolist() == [1.0, -2.0, 1.0, -2.0]


def test_half_precision_stays_half_precision_and_is_steered_by_the_rounded_vector(engine, tiny_folders):
    model = ls.load_model(tiny_folders["llama"], engine=engine, dtype=torch.bfloat16)
    vectors = vectors_of(model)
    base, base_logits = streams(model)
    with ls.steering(model, vectors, layers=[1], multiplier=1.5):
        steered, _ = streams(model)
    assert torch.equal(steered[1], base[1] + (1.5 * vectors.layer(1)).to(torch.bfloat16))
    for operator in OPERATORS:
        with ls.steering(model, vectors, layers=[0, 1], operator=operator, multiplier=ROWS):
            changed, logits = streams(model)
            assert len(ls.generate(model, ["a cake"] * BATCH, max_new_tokens=2)) == BATCH
        assert {h.dtype for h in changed} == {torch.bfloat16}
        assert torch.equal(logits[ROWS.index(0.0)], base_logits[ROWS.index(0.0)])
        assert not torch.equal(logits[0], base_logits[0])
    with ls.steering(model, vectors, layers=[1], operator="ablate"):
        ablated, _ = streams(model)
    share = (ablated[1].float() @ vectors.unit[1]).abs() / base[1].float().norm(dim=-1)
    assert float(share.max()) < 1e-2


# The damage of a plan


def plans_at(model, vectors, multipliers: list[float], **options) -> list[ls.SteeringPlan]:
    given: dict[str, Any] = {"layers": [1], **options}
    return [ls.steering_plan(model, vectors, multiplier=m, **given) for m in multipliers]


def kl_by_hand(model, vectors, text: str, n: int, push) -> float:
    """Mean KL(unsteered || steered) over the next n tokens, each predicted by the whole sequence."""
    start = len(tok.encode(model, [text])[0])
    ids = torch.tensor([[*tok.encode(model, [text])[0].ids.tolist(), *greedy_ids(model, text, n)[:-1]]])
    base = full_logits(model, ids)[0, start - 1 :].double().log_softmax(dim=-1)
    with model.hooks(fwd_hooks=[(resid_hook(1), lambda resid, hook: push(resid, start))]):
        steered = full_logits(model, ids)[0, start - 1 :].double().log_softmax(dim=-1)
    assert len(base) == n
    return float((base.exp() * (base - steered)).sum(dim=-1).mean())


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_the_damage_is_the_mean_divergence_of_the_next_token(any_tiny, endless, positions: str):
    vectors, multipliers, texts = vectors_of(any_tiny), [0.0, 2.0, -1.5], list(TEXTS[:2])
    plans = plans_at(any_tiny, vectors, multipliers, positions=positions)
    kl = ls.next_token_kl(any_tiny, plans, texts, n_tokens=4)
    assert kl.shape == (3, 2)
    for row, multiplier in enumerate(multipliers):

        def push(resid, start, m=multiplier):
            steered = resid + m * vectors.layer(1)
            return torch.cat([resid[:, :start], steered[:, start:]], 1) if positions != "all" else steered

        expected = [kl_by_hand(any_tiny, vectors, text, 4, push) for text in texts]
        assert kl[row] == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert np.abs(kl[0]).max() < 1e-6
    assert kl[1:].min() > 1e-4


def test_the_damage_of_nothing_is_zero_and_grows_with_the_multiplier(tiny):
    vectors = vectors_of(tiny)
    for sign in (1, -1):
        multipliers = [sign * m for m in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)]
        kl = ls.next_token_kl(tiny, plans_at(tiny, vectors, multipliers), list(TEXTS)).mean(axis=1)
        assert kl[0] < 1e-9
        assert np.all(np.diff(kl) > 0)


def test_a_plan_does_the_same_damage_beside_others_and_alone(any_tiny, monkeypatch):
    monkeypatch.setattr(steer, "_ROWS_A_PASS", 3)
    vectors = vectors_of(any_tiny)
    other = ls.random_vectors(vectors)
    plans = [
        *plans_at(any_tiny, vectors, [1.0, -2.0]),
        *plans_at(any_tiny, other, [1.0], layers=[0, 2]),
        *plans_at(any_tiny, vectors, [3.0], layers=[2]),
    ]
    together = ls.next_token_kl(any_tiny, plans, [TEXTS[0]], n_tokens=4)
    alone = [ls.next_token_kl(any_tiny, [plan], [TEXTS[0]], n_tokens=4)[0] for plan in plans]
    assert together == pytest.approx(np.array(alone), rel=1e-3, abs=1e-7)
    assert len(np.unique(together.round(6))) == 4


def test_plans_that_do_not_reach_the_continuation_do_no_damage(tiny, endless):
    plans = plans_at(tiny, vectors_of(tiny), [1.0, 2.0], positions="generated:20:30")
    assert not ls.next_token_kl(tiny, plans, list(TEXTS[:2]), n_tokens=4).any()
    assert ls.next_token_kl(tiny, plans, list(TEXTS[:2]), n_tokens=24).all()


def test_a_text_that_ends_at_once_has_its_one_next_token(tiny, monkeypatch):
    (end,) = greedy_ids(tiny, TEXTS[0], 1)
    monkeypatch.setattr(decoding, "end_of_text_ids", lambda tokenizer: [end])
    vectors = vectors_of(tiny)
    plans = plans_at(tiny, vectors, [0.0, 2.0])
    kl = ls.next_token_kl(tiny, plans, [TEXTS[0]])
    expected = kl_by_hand(tiny, vectors, TEXTS[0], 1, lambda resid, start: resid + 2.0 * vectors.layer(1))
    assert kl[:, 0] == pytest.approx([0, expected], rel=1e-2, abs=1e-6)


def test_the_damage_is_measured_on_the_neutral_prompts_unless_told_otherwise(tiny):
    plans = plans_at(tiny, vectors_of(tiny), [1.0])
    neutral = ls.load_prompts("neutral")
    kl = ls.next_token_kl(tiny, plans)
    assert kl.shape == (1, len(neutral))
    assert kl == pytest.approx(ls.next_token_kl(tiny, plans, neutral))
    assert ls.next_token_kl(tiny, [], list(TEXTS[:2])).shape == (0, 2)


def test_plans_that_do_not_stack_and_empty_prompts_have_no_damage(tiny):
    plans = plans_at(tiny, vectors_of(tiny), [1.0])
    mixed = [*plans, *plans_at(tiny, vectors_of(tiny), [1.0], operator="ablate")]
    with pytest.raises(ls.OptionError, match="plans with different operator given"):
        ls.next_token_kl(tiny, mixed, ["a cake"])
    with pytest.raises(ls.PromptError, match=r"prompt 0 of .* is empty"):
        ls.next_token_kl(tiny, plans, [" "])


def test_the_model_is_as_it_was_after_its_damage_was_measured(tiny):
    base = streams(tiny)
    ls.next_token_kl(tiny, plans_at(tiny, vectors_of(tiny), [2.0, 3.0]), ["a cake"])
    assert same(streams(tiny), base)


# Multipliers by their damage


@pytest.fixture
def few_neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer, "load_prompts", lambda name: labelled(TEXTS[:1]))


@pytest.mark.parametrize("target", [0.02, -0.02])
def test_a_multiplier_that_is_solved_for_does_its_damage_within_a_twentieth(tiny, few_neutral, target: float):
    vectors = vectors_of(tiny)
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=ls.TargetKL(target))
    kl = float(ls.next_token_kl(tiny, [plan]).mean())
    assert kl == pytest.approx(abs(target), rel=0.05)
    (multiplier,) = plan.to_frame()["multiplier"]
    assert np.sign(multiplier) == np.sign(target)
    with ls.steering(tiny, vectors, layers=[1], multiplier=ls.TargetKL(target)) as again:
        assert again.to_frame()["multiplier"].tolist() == [multiplier]


@pytest.mark.parametrize("options", [{"operator": "rotate"}, {"positions": "generated", "layers": [0, 2]}])
def test_a_multiplier_is_solved_for_whatever_is_steered(tiny, few_neutral, options):
    given: dict[str, Any] = {"layers": [1], **options}
    plan = ls.steering_plan(tiny, vectors_of(tiny), multiplier=ls.TargetKL(0.01), **given)
    assert float(ls.next_token_kl(tiny, [plan]).mean()) == pytest.approx(0.01, rel=0.05)


def test_a_multiplier_is_solved_for_in_the_template_that_is_named(tiny, few_neutral):
    vectors = vectors_of(tiny)
    asked = ls.TargetKL(0.02, template="raw")
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=asked)
    raw, chat = (float(ls.next_token_kl(tiny, [plan], template=t).mean()) for t in ("raw", "chat"))
    assert raw == pytest.approx(0.02, rel=0.05)
    assert chat != pytest.approx(0.02, rel=0.05)


def test_the_solved_multiplier_is_the_one_whose_damage_was_asked_for(tiny, few_neutral):
    vectors = vectors_of(tiny)
    for multiplier in (-0.7, 2.0):
        kl = float(ls.next_token_kl(tiny, plans_at(tiny, vectors, [multiplier])).mean())
        solved = ls.steering_plan(
            tiny, vectors, layers=[1], multiplier=ls.TargetKL(float(np.sign(multiplier)) * kl)
        )
        assert solved.writes[1].multiplier.tolist() == pytest.approx([multiplier], rel=0.02)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (0.0, "TargetKL(0.0) given, expected nats above 0, or below 0 for toward safe"),
        (float("nan"), "TargetKL(nan) given, expected nats above 0"),
        (float("inf"), "TargetKL(inf) given, expected nats above 0"),
        (1e6, "TargetKL(1000000.0) given, and multipliers 0.0156 to 64 reach KLs of"),
        (1e-30, "TargetKL(1e-30) given, and multipliers 0.0156 to 64 reach"),
    ],
)
def test_a_damage_that_no_multiplier_does_is_refused(tiny, few_neutral, target: float, says: str):
    vectors, base = vectors_of(tiny), streams(tiny)
    with pytest.raises(ls.OptionError, match=re.escape(says)):
        ls.steering_plan(tiny, vectors, layers=[1], multiplier=ls.TargetKL(target))
    assert same(streams(tiny), base)


def test_what_cannot_be_steered_is_refused_before_a_multiplier_is_solved_for(tiny, monkeypatch):
    monkeypatch.setattr(steer, "greedy_continuations", lambda *given, **options: pytest.fail("it was run"))
    vectors = vectors_of(tiny)
    for given, options, says in (
        (0.0 * vectors, {}, "the vector of layer 1 is zero"),
        (vectors, {"layers": [3]}, "layer 3 given"),
        (vectors, {"operator": "erase"}, "unknown operator"),
    ):
        with pytest.raises(ls.OptionError, match=says):
            ls.steering_plan(tiny, given, **{"layers": [1], "multiplier": ls.TargetKL(0.1), **options})
    other = replace(vectors, model=replace(vectors.model, probe=(1.0,) * 4))
    with pytest.raises(ls.MismatchError, match="other weights"):
        ls.steering_plan(tiny, other, layers=[1], multiplier=ls.TargetKL(0.1))


def test_a_solved_multiplier_stands_alone_and_not_in_a_mapping(tiny):
    vectors = vectors_of(tiny)
    with pytest.raises(ls.OptionError, match=r"multiplier TargetKL\(kl=0.1, .* given, expected a finite"):
        ls.steering_plan(tiny, vectors, layers=[1], multiplier={1: ls.TargetKL(0.1)})


def test_unknown_operators_and_positions_are_refused_by_name(tiny):
    vectors = vectors_of(tiny)
    for options, says in (
        ({"operator": "erase"}, "unknown operator 'erase': expected one of add, add-norm, ablate"),
        ({"positions": "middle"}, "unknown positions 'middle': expected all, prompt"),
        ({"sites": ("resid_mid",)}, "unknown site 'resid_mid': expected one of resid_pre"),
    ):
        with (
            pytest.raises(ls.OptionError, match=re.escape(says)),
            ls.steering(tiny, vectors, **{"layers": [1], **options}),
        ):
            pytest.fail(f"{options} was taken")
