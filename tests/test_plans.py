"""Plans: the table says what is written where, and at the hook exactly that is written."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BATCH,
    D_MODEL,
    FINGERPRINT,
    N_LAYERS,
    POS,
    ROWS,
    TEXTS,
    TOKENS,
    labelled,
    listening,
    same,
    streams,
    vectors_of,
)
from torch import Tensor

import lens_safety as ls
from lens_safety import plans
from lens_safety import tokens as tok
from lens_safety.models import full_logits, resid_hook

MORE = (*TEXTS, "a garden for the kite", "do I", "cake for the cake or the garden")
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


@contextmanager
def watched(
    model, plan: ls.SteeringPlan, layer: int, site: str = "resid_post"
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What a hook is given and what it leaves, call by call."""
    with listening(model, layer, site) as before, plan.on(model), listening(model, layer, site) as after:
        yield before, after


def pushes(before: Tensor, after: Tensor, v: Tensor) -> Tensor:
    """How many times v was added to each token, `[batch pos]`; exactly 0 where nothing changed."""
    change = after - before
    times = change @ v / (v @ v)
    assert torch.allclose(change, times[..., None] * v, atol=1e-4)
    return torch.where((change == 0).all(dim=-1), 0.0, times)


# The table


def test_the_table_has_a_row_for_each_layer_site_and_multiplier(tiny):
    vectors = vectors_of(tiny)
    plan = ls.steering_plan(
        tiny,
        vectors,
        layers=[2, 0],
        multiplier={2: [1.0, -2.0], 0: 0.5},
        operator="add",
        positions="last:2",
        sites=("resid_post", "attn_out"),
        schedule=ls.LinearDecay(5),
    )
    frame = plan.to_frame()
    ratio = (vectors.norms / vectors.resid_norm).tolist()
    assert frame["hook"].tolist() == [
        "blocks.2.hook_resid_post",
        "blocks.2.hook_resid_post",
        "blocks.2.hook_attn_out",
        "blocks.2.hook_attn_out",
        "blocks.0.hook_resid_post",
        "blocks.0.hook_attn_out",
    ]
    assert frame["multiplier"].tolist() == [1.0, -2.0, 1.0, -2.0, 0.5, 0.5]
    assert frame["rows"].tolist() == [0, 1, 0, 1, "all", "all"]
    doses = [ratio[2], 2 * ratio[2], ratio[2], 2 * ratio[2], ratio[0] / 2, ratio[0] / 2]
    assert frame["dose"].tolist() == pytest.approx(doses)
    for column, value in {
        "operator": "add",
        "h becomes": "h + m v",
        "positions": "last:2",
        "schedule": "LinearDecay(steps=5)",
        "when": "always",
    }.items():
        assert set(frame[column]) == {value}
    assert (plan.layers, plan.n_rows) == ((2, 0), 2)


def test_the_table_of_one_multiplier_says_all_rows_and_names_the_gate(tiny):
    gate = gate_of(tiny)
    frame = ls.steering_plan(
        tiny, vectors_of(tiny), layers=[1], operator="rotate:30", when=gate, per="token"
    ).to_frame()
    assert len(frame) == 1
    row = frame.iloc[0]
    assert (row["rows"], row["schedule"]) == ("all", "constant")
    assert (row["operator"], row["h becomes"]) == (
        "rotate:30",
        "h turned by m * 30 degrees toward v, norm kept",
    )
    assert row["when"] == "two-vector at layer 0, per token"


def test_a_plan_prints_its_table_before_anything_runs_and_changes_nothing_until_it_is_on(tiny):
    base = streams(tiny)
    plan = ls.steering_plan(tiny, vectors_of(tiny), layers=[1], multiplier=3.0, operator="clamp:2")
    for text in (str(plan), plan._repr_html_()):
        for part in ("blocks.1.hook_resid_post", "clamp:2", "h + m (2 - h . u) u", "3", "all"):
            assert part in text
    assert "with plan.on(model): ls.generate(model, prompts)" in plan._repr_html_()
    assert same(streams(tiny), base)
    assert plan.fired == {}
    with plan.on(tiny):
        assert not same(streams(tiny), base)
    assert same(streams(tiny), base)
    assert plan.fired == {}


def test_a_plan_does_what_steering_with_the_same_arguments_does(tiny):
    vectors = vectors_of(tiny)
    options: dict[str, Any] = {"layers": [0, 2], "multiplier": [0.5] * BATCH, "operator": "rotate"}
    with ls.steering(tiny, vectors, **options) as record:
        expected = streams(tiny)
    with ls.steering_plan(tiny, vectors, **options).on(tiny) as again:
        assert same(streams(tiny), expected)
    assert record.to_frame().equals(again.to_frame())
    assert record.fired == again.fired == {0: 1, 2: 1}


def test_a_plan_that_is_off_writes_where_it_did_and_changes_no_bit(tiny):
    plan = ls.steering_plan(
        tiny, vectors_of(tiny), layers=[2, 0], multiplier=[2.0] * BATCH, operator="toward"
    )
    base = streams(tiny)
    with plan.off().on(tiny) as record:
        assert same(streams(tiny), base)
    assert record.fired == {2: 1, 0: 1}
    frame = record.to_frame()
    assert not frame[["multiplier", "dose"]].to_numpy().any()
    columns = ["hook", "operator", "rows", "positions"]
    assert frame[columns].equals(plan.to_frame()[columns])
    assert plan.to_frame()["multiplier"].tolist() == [2.0] * 2 * BATCH


# Multipliers


def test_as_many_multipliers_as_rows_are_needed_and_one_serves_all(tiny):
    base, vectors = streams(tiny), vectors_of(tiny)
    with (
        pytest.raises(ls.OptionError, match="2 multipliers given for a batch of 5 rows: expected one"),
        ls.steering(tiny, vectors, layers=[1], multiplier=[1.0, 2.0]),
    ):
        streams(tiny)
    assert same(streams(tiny), base)
    with ls.steering(tiny, vectors, layers=[1], multiplier=[1.0]):
        listed = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=1.0):
        assert same(streams(tiny), listed)


def test_each_layer_has_the_multiplier_that_a_mapping_gives_it(tiny):
    vectors = vectors_of(tiny)
    column = torch.tensor(ROWS)[:, None, None]

    def by_hand(layer: int, m: float | Tensor):
        return resid_hook(layer), lambda resid, hook: resid + m * vectors.layer(layer)

    with tiny.hooks(fwd_hooks=[by_hand(0, 0.5), by_hand(2, column)]):
        expected = streams(tiny)
    with ls.steering(tiny, vectors, layers=[0, 2], multiplier={0: 0.5, 2: ROWS}):
        assert same(streams(tiny), expected)
    with ls.steering(tiny, vectors, layers=[0, 2], multiplier={2: 0.5, 0: ROWS}):
        assert not same(streams(tiny), expected)


@pytest.mark.parametrize("dose", [0.25, -0.6])
def test_a_dose_is_the_share_of_the_layers_median_norm_that_is_added_with_its_sign(tiny, dose: float):
    vectors = vectors_of(tiny)
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[0, 1], multiplier=ls.Dose(dose)) as plan:
        steered, _ = streams(tiny)
    frame = plan.to_frame()
    assert frame["dose"].tolist() == pytest.approx([abs(dose)] * 2)
    wanted = dose * vectors.resid_norm[:2] / vectors.norms[:2]
    assert frame["multiplier"].tolist() == pytest.approx(wanted.tolist())
    added = steered[0] - base[0]
    share = added.norm(dim=-1) / vectors.resid_norm[0]
    assert torch.allclose(share, torch.tensor(abs(dose)), rtol=1e-3)
    assert bool((torch.sign(added @ vectors.layer(0)) == np.sign(dose)).all())
    assert abs(float(wanted[0] - wanted[1])) > 1e-3


def test_doses_may_be_one_a_row_and_one_a_layer(tiny):
    vectors = vectors_of(tiny)
    given = {0: ls.Dose(0.1), 2: ls.Dose(ROWS)}
    write = ls.steering_plan(tiny, vectors, layers=[0, 2], multiplier=given).writes
    ratio = vectors.resid_norm / vectors.norms
    assert torch.allclose(write[0].multiplier, 0.1 * ratio[0])
    assert torch.allclose(write[2].multiplier, torch.tensor(ROWS) * ratio[2])


@pytest.mark.parametrize("operator", ["ablate", "clamp", "toward", "rotate"])
def test_only_what_is_added_has_a_dose(tiny, operator: str):
    with pytest.raises(ls.OptionError, match=f"a dose given for {operator}.*: only what is added has one"):
        ls.steering_plan(tiny, vectors_of(tiny), layers=[1], multiplier=ls.Dose(0.1), operator=operator)
    ls.steering_plan(tiny, vectors_of(tiny), layers=[1], multiplier=ls.Dose(0.1), operator="add-norm")


def test_several_layers_are_steered_as_by_hooks_written_by_hand(tiny):
    vectors = vectors_of(tiny)

    def by_hand(layer: int):
        return resid_hook(layer), lambda resid, hook: resid + 1.5 * vectors.layer(layer)

    with tiny.hooks(fwd_hooks=[by_hand(2), by_hand(0)]):
        expected = streams(tiny)
    with ls.steering(tiny, vectors, layers=[2, 0], multiplier=1.5) as record:
        assert same(streams(tiny), expected)
    assert record.layers == (2, 0)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (None, [1, 1, 1, 1, 1, 1]),
        (ls.LinearDecay(4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (ls.LinearDecay(1), [1, 0, 0, 0, 0, 0]),
        (ls.ExponentialDecay(1), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
        (ls.ExponentialDecay(2.0), [1, 0.5**0.5, 0.5, 0.5**1.5, 0.25, 0.5**2.5]),
        (lambda step: [2, -1, 0, 3, 0.5, 1][step], [2, -1, 0, 3, 0.5, 1]),
        (lambda step: 1.0 if step == 3 else 0.0, [0, 0, 0, 1, 0, 0]),
    ],
)
def test_each_step_has_the_factor_of_the_schedule(tiny, endless, schedule, factors: list[float]):
    vectors, texts = vectors_of(tiny), list(TEXTS[:2])
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=1.5, schedule=schedule)
    with watched(tiny, plan, 1) as (before, after):
        ls.generate(tiny, texts, max_new_tokens=6)
    assert len(before) == 6
    for factor, was, became in zip(factors, before, after, strict=True):
        pushed = pushes(was, became, vectors.layer(1))
        assert torch.allclose(pushed, torch.tensor(1.5 * factor), atol=1e-4)
        assert bool((pushed == 0).all()) == (factor == 0)


def test_a_schedule_counts_the_tokens_of_a_continuation_as_steps(tiny):
    vectors = vectors_of(tiny)
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=2.0, schedule=ls.LinearDecay(3))
    prompt, more = "a cake", " for the kite do I make"
    (whole,), (start,) = tok.encode_pairs(tiny, [prompt], [more])
    with watched(tiny, plan, 1) as (before, after):
        ls.continuation_nll(tiny, [prompt], [more])
    pushed = pushes(torch.cat(before, dim=1), torch.cat(after, dim=1), vectors.layer(1))[0]
    # The last token predicts nothing that is asked for, and is not run.
    n_new = len(whole) - start - 1
    factors = [1.0] * start + [max(0.0, 1 - (i + 1) / 3) for i in range(n_new)]
    assert n_new > 3
    assert pushed.tolist() == pytest.approx([2 * factor for factor in factors], abs=1e-4)


def test_a_schedule_multiplies_each_rows_own_multiplier(tiny, endless):
    vectors = vectors_of(tiny)
    plan = ls.steering_plan(
        tiny, vectors, layers=[1], multiplier=[2.0, -1.0], schedule=ls.ExponentialDecay(1)
    )
    with watched(tiny, plan, 1) as (before, after):
        ls.generate(tiny, ["a cake"] * 2, max_new_tokens=3)
    for step, (was, became) in enumerate(zip(before, after, strict=True)):
        pushed = pushes(was.expand_as(became), became, vectors.layer(1))
        assert torch.allclose(pushed, torch.tensor([[2.0], [-1.0]]) * 0.5**step, atol=1e-4)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_decay_over_no_steps_is_refused(steps: int):
    with pytest.raises(ls.OptionError, match=rf"LinearDecay\(steps={steps}\) given, expected 1 or more"):
        ls.LinearDecay(steps)
    with pytest.raises(ls.OptionError, match=rf"ExponentialDecay\(half_life={steps}\) given, expected"):
        ls.ExponentialDecay(steps)


# Positions

N_NEW = 5
STEPS: dict[str, list[bool]] = {
    "all": [True] * 4,
    "prompt": [False] * 4,
    "generated": [True] * 4,
    "content": [False] * 4,
    "last:2": [False] * 4,
    "last:1": [False] * 4,
    "last:999": [False] * 4,
    "generated:1:3": [False, True, True, False],
    "generated:0:1": [True, False, False, False],
}
"""Which of the generated tokens that are run are steered."""

POSITIONS = pytest.mark.parametrize("positions", STEPS)


def in_prompt(positions: str, one: tok.Encoded) -> list[bool]:
    """Which tokens of a prompt are steered, by hand."""
    n = len(one)
    if positions in ("all", "prompt"):
        return [True] * n
    if positions == "content":
        return one.content.tolist()
    if positions.startswith("last:"):
        k = int(positions[5:])
        return [i >= n - k for i in range(n)]
    return [False] * n


@POSITIONS
def test_in_generate_exactly_the_named_positions_are_steered(tiny, endless, positions: str):
    vectors, texts = vectors_of(tiny), list(TEXTS[:3])
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=-1.5, positions=positions)
    with watched(tiny, plan, 1) as (before, after):
        ls.generate(tiny, texts, max_new_tokens=N_NEW)
    encoded = tok.encode(tiny, texts)
    assert len({len(one) for one in encoded}) == 3
    prompt, *steps = (
        pushes(was, became, vectors.layer(1)) for was, became in zip(before, after, strict=True)
    )
    for row, one in enumerate(encoded):
        wanted = [-1.5 if steered else 0.0 for steered in in_prompt(positions, one)]
        assert prompt[row, : len(one)].tolist() == pytest.approx(wanted, abs=1e-4)
        made = [float(step[row, 0]) for step in steps]
        assert made == pytest.approx([-1.5 if steered else 0.0 for steered in STEPS[positions]], abs=1e-4)


@POSITIONS
def test_in_a_continuation_exactly_the_named_positions_are_steered(tiny, positions: str):
    vectors, texts = vectors_of(tiny), list(TEXTS[:3])
    more = [" a kite for", " how do I make the", " or"]
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=2.0, positions=positions)
    with watched(tiny, plan, 1) as (before, after):
        ls.continuation_nll(tiny, texts, more)
    prompt, new = (pushes(*pair, vectors.layer(1)) for pair in zip(before, after, strict=True))
    joined, starts = tok.encode_pairs(tiny, texts, more)
    for row, one in enumerate(tok.encode(tiny, texts)):
        # The last token predicts nothing that is asked for, and need not be run.
        n_new = len(joined[row]) - starts[row] - 1
        beyond = STEPS[positions][-1]
        made = [2.0 * steered for steered in [*STEPS[positions], *[beyond] * n_new][:n_new]]
        given = [2.0 * steered for steered in in_prompt(positions, one)]
        assert prompt[row, : len(one)].tolist() == pytest.approx(given, abs=1e-4)
        assert new[row, :n_new].tolist() == pytest.approx(made, abs=1e-4)
    assert new.shape[1] > 3


@pytest.mark.parametrize(
    ("positions", "several", "single"),
    [
        ("all", [True] * POS, True),
        ("prompt", [True] * POS, False),
        ("generated", [False] * POS, True),
        ("content", [False] + [True] * (POS - 1), False),
        ("last:3", [False] * (POS - 3) + [True] * 3, False),
    ],
)
def test_in_a_call_from_outside_several_positions_are_a_prompt_and_one_is_generated(
    tiny, positions: str, several: list[bool], single: bool
):
    vectors = vectors_of(tiny)
    plan = ls.steering_plan(tiny, vectors, layers=[1], positions=positions)
    with watched(tiny, plan, 1) as (before, after):
        full_logits(tiny, TOKENS)
        full_logits(tiny, TOKENS[:, :1])
    many, one = (pushes(was, became, vectors.layer(1)) for was, became in zip(before, after, strict=True))
    assert torch.allclose(many, torch.tensor(several).float().expand(BATCH, POS), atol=1e-4)
    assert torch.allclose(one, torch.tensor(float(single)).expand(BATCH, 1), atol=1e-4)


def test_a_window_of_generated_tokens_is_refused_where_tokens_have_no_number(tiny):
    base = streams(tiny)
    with (
        pytest.raises(ls.OptionError, match=r"positions 'generated:1:3' given outside generate"),
        ls.steering(tiny, vectors_of(tiny), layers=[1], positions="generated:1:3"),
    ):
        full_logits(tiny, TOKENS)
    assert same(streams(tiny), base)


@POSITIONS
def test_rows_with_multipliers_of_their_own_are_steered_at_the_named_positions(tiny, endless, positions):
    vectors, multipliers = vectors_of(tiny), [2.0, 0.0, -1.0, 0.5]
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[1]]
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=multipliers, positions=positions)
    with watched(tiny, plan, 1) as (before, after):
        ls.generate(tiny, texts, max_new_tokens=N_NEW)
    for call, (was, became) in enumerate(zip(before, after, strict=True)):
        # The prompts are given once or twice: a prompt's row is that of its text.
        was = was[[0, 1, 0, 1]] if len(was) == 2 else was
        became = became[[0, 1, 0, 1]] if len(became) == 2 else became
        pushed = pushes(was, became, vectors.layer(1))
        for row, one in enumerate(tok.encode(tiny, texts)):
            steered = in_prompt(positions, one) if call == 0 else [STEPS[positions][call - 1]]
            wanted = [multipliers[row] * here for here in steered]
            assert pushed[row, : len(wanted)].tolist() == pytest.approx(wanted, abs=1e-4)


# Several plans in one batch


def test_each_row_of_a_stack_is_steered_as_by_its_own_plan(tiny):
    vectors = vectors_of(tiny)
    others = [ls.random_vectors(vectors, seed=seed) for seed in range(2)]
    single = [
        ls.steering_plan(tiny, vectors, layers=[1], multiplier=2.0),
        ls.steering_plan(tiny, vectors, layers=[0, 2], multiplier={0: -1.0, 2: 3.0}),
        ls.steering_plan(tiny, others[0], layers=[1], multiplier=2.0),
        ls.steering_plan(tiny, others[1], layers=[2], multiplier=ls.Dose(0.4)),
        ls.steering_plan(tiny, vectors, layers=[1], multiplier=0.0),
    ]
    stacked = ls.SteeringPlan.stack(single)
    assert (stacked.layers, stacked.n_rows) == ((0, 1, 2), 5)
    tokens = TOKENS[:1].expand(5, -1)
    base, _ = streams(tiny, tokens)
    with stacked.on(tiny) as record:
        together, logits = streams(tiny, tokens)
    assert record.fired == {0: 1, 1: 1, 2: 1}
    for row, plan in enumerate(single):
        with plan.on(tiny):
            alone, alone_logits = streams(tiny, tokens)
        assert torch.equal(logits[row], alone_logits[row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(together, alone, strict=True))
    assert torch.equal(together[2][4], base[2][4])
    assert len({tuple(row.tolist()) for row in logits[:, -1]}) == 5


@pytest.mark.parametrize("operator", ["clamp", "toward"])
def test_each_row_of_a_stack_has_the_class_means_of_its_own_vectors(tiny, operator: str):
    vectors = vectors_of(tiny)
    both = [vectors, 2 * ls.random_vectors(vectors, seed=3)]
    single = [ls.steering_plan(tiny, one, layers=[1], operator=operator) for one in both]
    tokens = TOKENS[:1].expand(2, -1)
    with ls.SteeringPlan.stack(single).on(tiny):
        together, _ = streams(tiny, tokens)
    for row, plan in enumerate(single):
        with plan.on(tiny):
            assert torch.equal(together[1][row], streams(tiny, tokens)[0][1][row])
    assert not torch.allclose(together[1][0], together[1][1], atol=1e-2)


def test_the_table_of_a_stack_has_a_row_for_each_row_of_the_batch(tiny):
    vectors = vectors_of(tiny)
    single = [ls.steering_plan(tiny, vectors, layers=[layer], multiplier=2.0) for layer in (2, 0)]
    frame = ls.SteeringPlan.stack(single).to_frame()
    assert frame["hook"].tolist() == [resid_hook(layer) for layer in (0, 0, 2, 2)]
    assert frame["rows"].tolist() == [0, 1, 0, 1]
    assert frame["multiplier"].tolist() == [0, 2, 2, 0]
    assert (frame["dose"] == 0).tolist() == [True, False, False, True]


def test_a_stack_of_one_plan_is_that_plan(tiny):
    plan = ls.steering_plan(tiny, vectors_of(tiny), layers=[1], multiplier=2.0, schedule=ls.LinearDecay(3))
    stacked = ls.SteeringPlan.stack([plan])
    assert stacked.n_rows == 1
    assert str(stacked) == str(plan)


@pytest.mark.parametrize(
    "options",
    [
        {"operator": "ablate"},
        {"positions": "generated"},
        {"sites": ("resid_pre",)},
        {"schedule": ls.LinearDecay(3)},
        {"per": "token"},
        {"multiplier": [1.0, 2.0]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_plans_that_differ_in_more_than_directions_layers_and_multipliers_do_not_stack(tiny, options):
    vectors = vectors_of(tiny)
    plain = ls.steering_plan(tiny, vectors, layers=[1])
    other = ls.steering_plan(tiny, vectors, layers=[1], **options)
    for pair in ([plain, other], [other, plain]):
        says = "of 2 rows given" if "multiplier" in options else f"different {next(iter(options))} given"
        with pytest.raises(ls.OptionError, match=says):
            ls.SteeringPlan.stack(pair)
    ls.SteeringPlan.stack([plain, plain])


def test_no_plans_are_refused():
    with pytest.raises(ls.OptionError, match="no plans given"):
        ls.SteeringPlan.stack([])


# Sites


@pytest.mark.parametrize("site", SITES)
def test_a_site_is_steered_as_by_a_hook_written_by_hand(tiny, site: str):
    vectors = vectors_of(tiny)
    base = streams(tiny)
    hook = (f"blocks.1.hook_{site}", lambda resid, hook: resid - 2 * vectors.layer(1))
    with tiny.hooks(fwd_hooks=[hook]):
        expected = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=-2.0, sites=(site,)) as record:
        assert same(streams(tiny), expected)
    assert record.fired == {1: 1}
    assert not torch.allclose(expected[0][1], base[0][1], atol=1e-3)
    assert same(streams(tiny), base)


def test_the_stream_before_a_block_is_the_one_after_the_block_below(tiny):
    vectors = vectors_of(tiny).everywhere(1)
    with ls.steering(tiny, vectors, layers=[0], multiplier=1.5):
        after = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=1.5, sites=("resid_pre",)):
        before = streams(tiny)
    assert torch.equal(after[1], before[1])


def test_what_is_added_to_a_blocks_output_is_added_to_the_stream(any_tiny):
    vectors = vectors_of(any_tiny)
    base, _ = streams(any_tiny)
    with ls.steering(any_tiny, vectors, layers=[1], multiplier=2.0, sites=("mlp_out",)):
        steered, _ = streams(any_tiny)
    assert torch.allclose(steered[1], base[1] + 2.0 * vectors.layer(1), atol=1e-4)


def test_several_sites_are_steered_each_once_a_pass(tiny):
    vectors = vectors_of(tiny)
    hooks = [
        (f"blocks.{layer}.hook_{site}", lambda resid, hook, layer=layer: resid + vectors.layer(layer))
        for layer in (0, 2)
        for site in SITES
    ]
    with tiny.hooks(fwd_hooks=hooks):
        expected = streams(tiny)
    with ls.steering(tiny, vectors, layers=[0, 2], sites=SITES) as record:
        assert same(streams(tiny), expected)
        streams(tiny)
    assert record.fired == {0: 8, 2: 8}


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_pre"])
def test_rows_with_multipliers_of_their_own_are_told_apart_at_each_site(tiny, endless, spelt, site: str):
    vectors, multipliers = vectors_of(tiny), [0.0, 6.0, -6.0]
    texts, options = [TEXTS[0]] * 3, {"layers": [1], "sites": (site,)}
    with ls.steering(tiny, vectors, multiplier=multipliers, **options):
        together = ls.generate(tiny, texts, max_new_tokens=6)
        assert ls.generate(tiny, texts, max_new_tokens=6, share_prompts=False) == together
    for text, multiplier in zip(together, multipliers, strict=True):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            assert ls.generate(tiny, texts[:1], max_new_tokens=6) == [text]
    assert len(set(together)) == 3


def test_one_direction_ablated_everywhere_is_nowhere_in_the_model(any_tiny):
    vectors = vectors_of(any_tiny).everywhere(1)
    u = vectors.unit[0]
    places = [(layer, site) for layer in range(N_LAYERS) for site in SITES]

    def shares() -> list[float]:
        heard = {}
        for layer, site in places:
            with listening(any_tiny, layer, site) as calls:
                full_logits(any_tiny, TOKENS)
            heard[layer, site] = calls[0]
        return [float(((h @ u).abs() / h.norm(dim=-1)).max()) for h in heard.values()]

    assert min(shares()) > 1e-2
    options: dict[str, Any] = {"layers": range(N_LAYERS), "operator": "ablate"}
    with ls.steering(any_tiny, vectors, sites=("resid_pre", "attn_out", "mlp_out"), **options):
        assert max(shares()) < 1e-4


def test_a_vector_everywhere_is_that_of_its_layer(tiny):
    vectors = vectors_of(tiny)
    same_everywhere = vectors.everywhere(1)
    for name in ("vectors", "safe_mean", "dangerous_mean"):
        tensor = getattr(same_everywhere, name)
        assert torch.equal(tensor, getattr(vectors, name)[[1, 1, 1]])
    assert torch.equal(same_everywhere.resid_norm, vectors.resid_norm)
    assert same_everywhere.method == "content of layer 1"
    with pytest.raises(ls.MismatchError, match="layer 7 given"):
        vectors.everywhere(7)


# Conditional steering


def gate_of(
    model, texts=MORE[:4], *, layers=(0,), over: Any = "best", position: Any = "content_mean"
) -> ls.Detector:
    """A detector whose threshold lies in the middle of its scores of `texts`."""
    train = labelled(MORE, [i in (1, 2, 5, 6) for i in range(len(MORE))])
    cache = ls.residual_streams(model, train, position=position, progress=False)
    made = ls.Detector.fit(cache, layers=layers, over=over, folds=3)
    low, high = np.sort(made.score(list(texts), model=model))[len(texts) // 2 - 1 :][:2]
    assert high - low > 1e-4
    return replace(made, threshold=float(low + high) / 2)


GATES = pytest.mark.parametrize(
    "given",
    [
        {},
        {"position": "content_last"},
        {"position": "last"},
        {"layers": (1,)},
        {"layers": (0, 1), "over": "mean"},
        {"layers": (1, 0), "over": "concat"},
        {"layers": (-1,)},
    ],
    ids=str,
)


@GATES
def test_the_prompts_that_the_detector_calls_dangerous_are_steered_and_no_bit_of_the_others(
    tiny, endless, spelt, given
):
    vectors, texts = vectors_of(tiny), list(MORE[:4])
    gate = gate_of(tiny, **given)
    dangerous = gate.predict(texts, model=tiny)
    assert dangerous.sum() == 2
    options: dict[str, Any] = {"layers": [1], "multiplier": 3.0}
    with listening(tiny, 1) as base:
        plain = ls.generate(tiny, texts, max_new_tokens=4)
    with ls.steering(tiny, vectors, **options):
        steered = ls.generate(tiny, texts, max_new_tokens=4)
    plan = ls.steering_plan(tiny, vectors, **options, when=gate)
    with watched(tiny, plan, 1) as (before, after):
        made = ls.generate(tiny, texts, max_new_tokens=4)
    assert made == [s if risky else p for p, s, risky in zip(plain, steered, dangerous, strict=True)]
    assert all(p != s for p, s in zip(plain, steered, strict=True))
    assert len(base) == len(after) == 4
    for unsteered, was, became in zip(base, before, after, strict=True):
        for row, risky in enumerate(dangerous):
            if risky:
                assert torch.equal(became[row], was[row] + 3.0 * vectors.layer(1))
            else:
                assert torch.equal(became[row], unsteered[row])


def test_a_call_from_outside_is_gated_row_by_row(tiny):
    vectors = vectors_of(tiny)
    gate = gate_of(tiny)
    base, base_logits = streams(tiny)
    scores = gate.score_resid(base[0][:, 1:].mean(dim=1)[None])
    gate = replace(gate, threshold=float(np.sort(scores)[2:4].mean()))
    with ls.steering(tiny, vectors, layers=[1], multiplier=2.0, when=gate):
        steered, logits = streams(tiny)
    for row, risky in enumerate(scores > gate.threshold):
        assert torch.equal(steered[1][row], base[1][row] + 2.0 * vectors.layer(1) * bool(risky))
        assert torch.equal(logits[row], base_logits[row]) == (not risky)
    assert (scores > gate.threshold).sum() == 2


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_per_token_each_token_is_steered_that_the_detector_calls_dangerous(tiny, endless, layers):
    vectors, texts = vectors_of(tiny), list(MORE[:3])
    gate = gate_of(tiny, layers=layers, over="best" if len(layers) == 1 else "mean")
    # A threshold in the middle of the tokens' own scores.
    with listening(tiny, 0) as lower, listening(tiny, 1) as upper:
        ls.generate(tiny, texts, max_new_tokens=1)
    read = torch.stack([{0: lower, 1: upper}[layer][0] for layer in layers])
    gate = replace(gate, threshold=float(np.median(gate.score_resid(read.flatten(1, 2)))))
    plan = ls.steering_plan(tiny, vectors, layers=[1], multiplier=2.0, when=gate, per="token")
    with listening(tiny, 0) as lower, watched(tiny, plan, 1) as (before, after):
        ls.generate(tiny, texts, max_new_tokens=6)
    risky_steps = []
    for low, was, became in zip(lower, before, after, strict=True):
        read = torch.stack([{0: low, 1: was}[layer] for layer in layers])
        scores = gate.score_resid(read.flatten(1, 2)).reshape(was.shape[:2])
        risky = torch.from_numpy(scores > gate.threshold)
        assert torch.allclose(pushes(was, became, vectors.layer(1)), 2.0 * risky, atol=1e-4)
        risky_steps.append(risky)
    assert 0 < float(risky_steps[0].float().mean()) < 1
    assert len(risky_steps) == 6


@pytest.mark.parametrize("positions", ["all", "generated", "content"])
def test_gated_rows_with_multipliers_of_their_own_are_as_if_each_were_alone(tiny, endless, spelt, positions):
    vectors = vectors_of(tiny)
    gate = gate_of(tiny)
    texts = [MORE[0], MORE[1], MORE[2], MORE[1], MORE[0], MORE[2]]
    multipliers = [4.0, 4.0, 4.0, -4.0, -4.0, -4.0]
    options: dict[str, Any] = {"layers": [1], "positions": positions, "when": gate}
    with ls.steering(tiny, vectors, multiplier=multipliers, **options):
        together = ls.generate(tiny, texts, max_new_tokens=3)
        apart = ls.generate(tiny, texts, max_new_tokens=3, share_prompts=False)
    assert together == apart
    for text, multiplier, made in zip(texts, multipliers, together, strict=True):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            assert ls.generate(tiny, [text], max_new_tokens=3) == [made]
    dangerous = gate.predict(texts, model=tiny)
    plain = ls.generate(tiny, texts, max_new_tokens=3)
    assert 0 < dangerous.sum() < len(texts)
    assert all(made == p for made, p, risky in zip(together, plain, dangerous, strict=True) if not risky)
    assert any(made != p for made, p in zip(together, plain, strict=True))


def test_each_batch_of_prompts_is_decided_anew(tiny, endless, spelt):
    vectors, texts = vectors_of(tiny), list(MORE[:4])
    options: dict[str, Any] = {"layers": [1], "multiplier": 3.0, "when": gate_of(tiny)}
    with ls.steering(tiny, vectors, **options):
        together = ls.generate(tiny, texts, max_new_tokens=4)
        assert ls.generate(tiny, texts, max_new_tokens=4, batch_size=1) == together
        assert ls.generate(tiny, texts[::-1], max_new_tokens=4, batch_size=2) == together[::-1]


def test_next_token_logits_and_continuations_are_gated_by_the_prompt(tiny, monkeypatch):
    vectors, texts = vectors_of(tiny), list(MORE[:4])
    gate = gate_of(tiny)
    dangerous = gate.predict(texts, model=tiny)
    more = [" the kite do", " a", " for a cake", " or the"]

    def both() -> tuple[Tensor, np.ndarray]:
        return ls.next_token_logits(tiny, texts), ls.continuation_nll(tiny, texts, more)

    # A gate reads prompts as a whole: so they are run whole without it too, where bits are compared.
    monkeypatch.setattr("lens_safety.decoding.n_shared", lambda encoded: 0)
    base, base_nll = both()
    options: dict[str, Any] = {"layers": [1], "multiplier": 3.0}
    with ls.steering(tiny, vectors, **options):
        steered, steered_nll = both()
    with ls.steering(tiny, vectors, **options, when=gate):
        gated, gated_nll = both()
    pick = torch.from_numpy(dangerous)
    assert torch.equal(gated[~pick], base[~pick])
    assert torch.equal(gated[pick], steered[pick])
    assert not torch.allclose(base, steered, atol=1e-2)
    assert np.array_equal(gated_nll[~dangerous], base_nll[~dangerous])
    assert np.array_equal(gated_nll[dangerous], steered_nll[dangerous])
    assert np.abs(base_nll - steered_nll).min() > 1e-4


@dataclass
class Constant:
    """A gate of one's own."""

    threshold: float
    model: ls.ModelFingerprint
    layers: tuple[int, ...] = (0,)
    position: str = "last"
    name: str = "a constant"

    def score_resid(self, resid: Tensor) -> np.ndarray:
        return np.zeros(resid.shape[1])


@pytest.mark.parametrize("per", ["prompt", "token"])
def test_a_gate_that_is_always_open_or_never_is_as_if_there_were_no_gate_or_no_steering(
    tiny, endless, spelt, per: Any
):
    vectors, texts = vectors_of(tiny), list(TEXTS[:3])
    plain = ls.generate(tiny, texts, max_new_tokens=4)
    with ls.steering(tiny, vectors, layers=[0], multiplier=3.0):
        steered = ls.generate(tiny, texts, max_new_tokens=4)
    for threshold, expected in ((-1.0, steered), (0.0, plain), (1.0, plain)):
        gate = Constant(threshold, ls.fingerprint(tiny))
        with ls.steering(tiny, vectors, layers=[0], multiplier=3.0, when=gate, per=per):
            assert ls.generate(tiny, texts, max_new_tokens=4) == expected
    assert plain != steered


def test_a_step_without_a_prompt_before_it_has_no_decision(tiny):
    base = streams(tiny)
    with (
        pytest.raises(
            ls.OptionError, match=r"two-vector at layer 0 saw no prompt of 5 rows: expected a call"
        ),
        ls.steering(tiny, vectors_of(tiny), layers=[1], when=gate_of(tiny)),
    ):
        full_logits(tiny, TOKENS[:, :1])
    assert same(streams(tiny), base)


def test_a_detector_that_cannot_steer_here_is_refused(tiny):
    vectors, gate = vectors_of(tiny), gate_of(tiny, layers=(1,))
    other = replace(gate.model, probe=(1.0,) * (N_LAYERS + 1))
    cases: list[tuple[Any, dict[str, Any], type[ls.LensSafetyError], str]] = [
        (replace(gate, model=other), {}, ls.MismatchError, "the detector was made with llama-tiny"),
        (replace(gate, model=FINGERPRINT), {}, ls.MismatchError, "another tokenizer"),
        (gate, {"layers": [0]}, ls.MismatchError, "reads layer 1, above what is known where layer 0"),
        (gate, {"layers": [2, 0]}, ls.MismatchError, "expected layers up to 0; fit it with layers=[0]"),
        (gate, {"sites": ("resid_pre",)}, ls.MismatchError, "expected layers up to 0"),
        (gate, {"sites": ("resid_post", "mlp_out")}, ls.MismatchError, "expected layers up to 0"),
        (
            replace(gate, position="max"),
            {},
            ls.OptionError,
            "unknown position of the detector that steers 'max",
        ),
    ]
    for when, options, error, says in cases:
        with pytest.raises(error, match=re.escape(says)) as refused:
            ls.steering_plan(tiny, vectors, **{"layers": [1], **options}, when=when)
        assert "\n" not in str(refused.value)
    taken: list[dict[str, Any]] = [{}, {"layers": [2]}, {"layers": [2], "sites": ("attn_out", "resid_post")}]
    for options in taken:
        ls.steering_plan(tiny, vectors, **{"layers": [1], **options}, when=gate)
    with pytest.raises(ls.OptionError, match="when='detector' given, expected a detector"):
        inspect.unwrap(plans._check_gate)("detector", tiny, [1], ("resid_post",))


# What is refused


def test_layers_vectors_and_multipliers_that_cannot_be_used_are_refused(tiny):
    vectors, base = vectors_of(tiny), streams(tiny)
    broken = vectors.vectors.clone()
    broken[1, 3] = float("nan")
    endless_vector = vectors.vectors.clone()
    endless_vector[1, 3] = float("inf")
    other = replace(vectors, model=replace(vectors.model, probe=(1.0,) * (N_LAYERS + 1)))
    wide = replace(vectors, model=replace(vectors.model, d_model=D_MODEL + 8))
    fewer = ls.content_vectors(ls.residual_streams(tiny, labelled(), layers=[0, 2], progress=False))
    cases: list[tuple[ls.ContentVectors, dict[str, Any], type[ls.LensSafetyError], str]] = [
        (vectors, {"layers": [N_LAYERS]}, ls.OptionError, "layer 3 given, expected 0 to 2"),
        (vectors, {"layers": [-1]}, ls.OptionError, "layer -1 given, expected 0 to 2"),
        (vectors, {"layers": []}, ls.OptionError, "no layers given, expected at least one"),
        (vectors, {"layers": [1, 1]}, ls.OptionError, "layers [1, 1] given, expected each layer once"),
        (0.0 * vectors, {}, ls.OptionError, "the vector of layer 1 is zero: it has no direction"),
        (1e-9 * vectors, {}, ls.OptionError, "the vector of layer 1 is zero"),
        (replace(vectors, vectors=broken), {}, ls.OptionError, "layer 1 holds NaN or infinity"),
        (replace(vectors, vectors=endless_vector), {}, ls.OptionError, "layer 1 holds NaN or infinity"),
        (other, {}, ls.MismatchError, "other weights"),
        (wide, {}, ls.MismatchError, "which has 3 layers of width 16 instead of 3 of width 24"),
        (fewer, {}, ls.MismatchError, "layer 1 given, expected one of the layers with a vector: 0, 2"),
        (vectors, {"multiplier": float("nan")}, ls.OptionError, "multiplier nan given, expected a finite"),
        (vectors, {"multiplier": float("inf")}, ls.OptionError, "multiplier inf given"),
        (vectors, {"multiplier": 1e39}, ls.OptionError, "a finite number"),
        (vectors, {"multiplier": [1.0, float("nan")]}, ls.OptionError, "a finite number"),
        (vectors, {"multiplier": []}, ls.OptionError, "a finite number, or one per row of the batch"),
        (vectors, {"multiplier": ls.Dose(float("nan"))}, ls.OptionError, "multiplier nan given"),
        (vectors, {"multiplier": {1: "much"}}, ls.OptionError, "multiplier 'much' given"),
        (vectors, {"multiplier": {1: [[1.0], [2.0]]}}, ls.OptionError, "a finite number"),
        (vectors, {"multiplier": {1: [[1.0], [2.0, 3.0]]}}, ls.OptionError, "a finite number"),
        (
            vectors,
            {"multiplier": {0: 1.0}},
            ls.OptionError,
            "multipliers for layers [0] given, and layers [1]",
        ),
        (
            vectors,
            {"layers": [0, 1], "multiplier": {0: [1.0] * 2, 1: [1.0] * 3}},
            ls.OptionError,
            "expected the same number of rows at each layer",
        ),
        (vectors, {"operator": "erase"}, ls.OptionError, "unknown operator 'erase'"),
        (vectors, {"sites": ()}, ls.OptionError, "no sites given, expected some of resid_pre"),
        (vectors, {"sites": ("resid_mid",)}, ls.OptionError, "unknown site 'resid_mid': expected one of"),
        (vectors, {"sites": ("resid_post", "z")}, ls.OptionError, "unknown site 'z'"),
    ]
    for given, options, error, says in cases:
        with (
            pytest.raises(error, match=re.escape(says)) as refused,
            ls.steering(tiny, given, **{"layers": [1], **options}),
        ):
            pytest.fail(f"{options} was taken")
        assert "\n" not in str(refused.value)
    assert same(streams(tiny), base)


@pytest.mark.parametrize(
    "positions",
    [
        *("everywhere", "", "last", "last:", "last:-1", "last:1:2", "last:x", "Last:1", "all:1", "prompt:2"),
        *("content:1", "generated:1", "generated:1:2:3", "generated:a:b", "generated:-2:1", "generated::"),
    ],
)
def test_unknown_positions_are_refused_by_name(tiny, positions: str):
    expected = "all, prompt, generated, content, last:K or generated:FROM:TO"
    with pytest.raises(ls.OptionError, match=f"unknown positions '{positions}': expected {expected}"):
        ls.steering_plan(tiny, vectors_of(tiny), layers=[1], positions=positions)


@pytest.mark.parametrize("positions", ["last:0", "generated:3:3", "generated:4:2"])
def test_positions_that_name_no_token_are_refused(tiny, positions: str):
    with pytest.raises(ls.OptionError, match=f"positions '{positions}' given, which name no token"):
        ls.steering_plan(tiny, vectors_of(tiny), layers=[1], positions=positions)


def test_options_of_another_type_are_refused_in_one_sentence_without_type_checks_too():
    check = inspect.unwrap(plans._check_options)
    sites = ("resid_post",)
    for arguments, says in (
        ((3, sites, None, "prompt"), "unknown positions 3: expected all, prompt"),
        (("all", sites, None, "row"), "unknown per 'row': expected one of prompt, token"),
        (("all", sites, 0.5, "prompt"), "schedule 0.5 given, expected a callable step -> factor, or None"),
    ):
        with pytest.raises(ls.OptionError, match=re.escape(says)):
            check(*arguments)
    check("all", sites, abs, "prompt")


def test_a_plan_is_refused_by_another_model(tiny, any_tiny):
    plan = ls.steering_plan(tiny, vectors_of(tiny), layers=[1])
    if any_tiny is tiny:
        with plan.on(any_tiny):
            pass
        return
    with pytest.raises(ls.MismatchError, match="the vectors was made with llama-tiny"), plan.on(any_tiny):
        pytest.fail("the plan was taken")


def test_a_vector_that_is_zero_or_nan_at_another_layer_does_no_harm(tiny):
    vectors = vectors_of(tiny)
    odd = vectors.vectors.clone()
    odd[0], odd[2] = 0.0, float("nan")
    base, _ = streams(tiny)
    with ls.steering(tiny, replace(vectors, vectors=odd), layers=[1]):
        assert torch.equal(streams(tiny)[0][1], base[1] + vectors.layer(1))
