"""Operators: each equation against one written by hand, on bare tensors and at the hook."""

import inspect
import math
import re

import pytest
import torch
from conftest import BATCH, D_MODEL, POS, ROWS, same, streams, vectors_of
from torch import Tensor

import lens_safety as ls
from lens_safety.operators import (
    OPERATORS,
    Add,
    Clamp,
    Directions,
    Rotate,
    named_operator,
    operator_name,
)

NAMES = (*OPERATORS, "clamp:3.5", "rotate:70")
OPERATOR = pytest.mark.parametrize("operator", NAMES)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


H = 3 * drawn(BATCH, POS, D_MODEL, seed=1)
SAFE, DANGEROUS = drawn(1, 1, D_MODEL, seed=2) + 1, drawn(1, 1, D_MODEL, seed=3) - 1
DIRECTIONS = Directions(DANGEROUS - SAFE, SAFE, DANGEROUS)


def applied(operator: str, m: float | Tensor, h: Tensor = H, directions: Directions = DIRECTIONS) -> Tensor:
    strength = m if isinstance(m, Tensor) else torch.full((1, 1, 1), m)
    return named_operator(operator)(h, directions, strength)


def by_hand(operator: str, h: Tensor, v: Tensor, safe: Tensor, dangerous: Tensor, m: float) -> Tensor:
    """The new h of one token, in float64; the rotation as the exponential of its generator."""
    h, v, safe, dangerous = h.double(), v.double(), safe.double(), dangerous.double()
    name, _, value = operator.partition(":")
    u = v / v.norm()
    along = h @ u
    pole = dangerous if m >= 0 else safe
    if name == "add":
        return h + m * v
    if name == "add-norm":
        return (h + m * v) / (h + m * v).norm() * h.norm()
    if name == "ablate":
        return h - m * along * u
    if name == "clamp" and value:
        return h + m * (float(value) - along) * u
    if name == "clamp":
        return h + abs(m) * (pole @ u - along) * u
    if name == "toward":
        return (1 - abs(m)) * h + abs(m) * pole
    turn = (torch.outer(u, h) - torch.outer(h, u)) / (h @ h - along**2).sqrt()
    return torch.linalg.matrix_exp(math.radians(m * float(value or 15)) * turn) @ h


def error(got: Tensor, want: Tensor) -> float:
    """The largest distance of a token from where it should be, over its norm."""
    assert got.shape == want.shape
    return float(((got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)).max())


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between vectors, in float64."""
    cosine = torch.cosine_similarity(a.double(), b.double(), dim=-1)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def test_every_operator_is_tested():
    assert {name.partition(":")[0] for name in NAMES} == set(OPERATORS)


@OPERATOR
@pytest.mark.parametrize("multiplier", [1.5, 0.4, -0.7])
def test_at_the_hook_the_residual_stream_becomes_what_the_equation_says(tiny, operator: str, multiplier):
    vectors = vectors_of(tiny)
    base, base_logits = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator=operator, multiplier=multiplier):
        steered, logits = streams(tiny)
    poles = (vectors.layer(1), vectors.safe_mean[1], vectors.dangerous_mean[1])
    expected = torch.stack([by_hand(operator, h, *poles, multiplier) for h in base[1].flatten(0, 1)])
    assert error(steered[1], expected.view_as(base[1])) < 1e-5
    assert error(steered[1], base[1]) > 1e-2
    assert torch.equal(steered[0], base[0])
    assert not torch.allclose(logits, base_logits, atol=1e-2)


@pytest.mark.parametrize("multiplier", [1.0, -2.5, 0.1])
def test_add_gives_the_residual_plus_multiplier_times_vector_bit_for_bit(tiny, multiplier: float):
    vectors = vectors_of(tiny)
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], multiplier=multiplier):
        steered, _ = streams(tiny)
    assert torch.equal(steered[1], base[1] + multiplier * vectors.layer(1))
    assert not torch.equal(steered[1], base[1] - multiplier * vectors.layer(1))
    assert torch.equal(steered[0], base[0])
    assert not torch.allclose(steered[2], base[2], atol=1e-2)


@OPERATOR
def test_multiplier_zero_is_the_identity_bit_for_bit(tiny, operator: str):
    base, vectors = streams(tiny), vectors_of(tiny)
    options = {"layers": [0, 1, 2], "operator": operator, "sites": ("resid_pre", "attn_out", "resid_post")}
    with ls.steering(tiny, vectors, multiplier=0.0, **options):
        assert same(streams(tiny), base)
    with ls.steering(tiny, vectors, multiplier=0.01, **options):
        assert not same(streams(tiny), base)


@OPERATOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_multiplier_zero_is_the_identity_for_any_stream_and_dtype(operator: str, dtype):
    v = DIRECTIONS.vector[0, 0]
    odd = torch.stack([torch.zeros(D_MODEL), v, -3 * v, 1e-3 * v, 900 * H[0, 0], 1e-4 * H[0, 1]])
    for h in (H.to(dtype), odd[None].to(dtype)):
        kept = applied(operator, 0.0, h)
        assert kept.dtype == dtype
        assert torch.equal(kept, h)


@OPERATOR
@HALVES
def test_half_precision_stays_so_and_is_the_equation_rounded(operator: str, dtype):
    got = applied(operator, 0.6, H.to(dtype))
    assert got.dtype == dtype
    assert error(got, applied(operator, 0.6, H.to(dtype).float())) < 1e-2
    assert error(got, H) > 2e-2


@OPERATOR
def test_each_row_is_steered_by_its_own_multiplier_as_if_all_had_it(tiny, operator: str):
    vectors = vectors_of(tiny)
    options = {"layers": [0, 1], "operator": operator}
    with ls.steering(tiny, vectors, multiplier=ROWS, **options):
        mixed, mixed_logits = streams(tiny)
    for row, multiplier in enumerate(ROWS):
        with ls.steering(tiny, vectors, multiplier=multiplier, **options):
            alone, logits = streams(tiny)
        assert torch.equal(mixed_logits[row], logits[row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(mixed, alone, strict=True))
        if row:
            assert not torch.allclose(mixed_logits[0], logits[0], atol=1e-3)


@OPERATOR
def test_each_row_and_position_has_its_own_multiplier_and_each_row_its_own_direction(operator: str):
    m = drawn(BATCH, POS, 1, seed=4)
    own = Directions(*(drawn(BATCH, 1, D_MODEL, seed=seed) for seed in (5, 6, 7)))
    got = applied(operator, m, directions=own)
    for row in range(BATCH):
        poles = (own.vector[row, 0], own.safe_mean[row, 0], own.dangerous_mean[row, 0])
        want = [by_hand(operator, H[row, pos], *poles, float(m[row, pos])) for pos in range(POS)]
        assert error(got[row], torch.stack(want)) < 1e-4


@OPERATOR
def test_neither_the_stream_nor_the_directions_are_edited(operator: str):
    given = (H, DIRECTIONS.vector, DIRECTIONS.safe_mean, DIRECTIONS.dangerous_mean)
    before = [tensor.clone() for tensor in given]
    assert not torch.equal(applied(operator, 0.5), H)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


HAND = Directions(torch.tensor([[[2.0, 0]]]), torch.tensor([[[0.0, 1]]]), torch.tensor([[[2.0, 1]]]))


@pytest.mark.parametrize(
    ("operator", "m", "expected"),
    [
        ("add", 0.5, (4, 4)),
        ("add", -2, (-1, 4)),
        ("add-norm", 0.5, (5 / math.sqrt(2), 5 / math.sqrt(2))),
        ("add-norm", -1.5, (0, 5)),
        ("ablate", 1, (0, 4)),
        ("ablate", 0.5, (1.5, 4)),
        ("ablate", -1, (6, 4)),
        ("clamp", 1, (2, 4)),
        ("clamp", -1, (0, 4)),
        ("clamp", 0.5, (2.5, 4)),
        ("clamp", -0.5, (1.5, 4)),
        ("clamp:7", 1, (7, 4)),
        ("clamp:7", 0.5, (5, 4)),
        ("clamp:7", -1, (-1, 4)),
        ("clamp:-7", 1, (-7, 4)),
        ("toward", 1, (2, 1)),
        ("toward", -1, (0, 1)),
        ("toward", 0.5, (2.5, 2.5)),
        ("toward", -0.5, (1.5, 2.5)),
        ("rotate:90", 1, (4, -3)),
        ("rotate:90", -1, (-4, 3)),
        ("rotate:90", 2, (-3, -4)),
        ("rotate:180", 0.5, (4, -3)),
        ("rotate:53.13010235415598", 1, (5, 0)),
    ],
)
def test_the_operators_worked_by_hand(operator: str, m: float, expected: tuple[float, float]):
    """h = (3, 4), v = (2, 0), class means (0, 1) and (2, 1)."""
    got = applied(operator, float(m), torch.tensor([[[3.0, 4]]]), HAND)
    assert got[0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_positive_multiplier_raises_the_projection_by_the_norm_and_a_negative_lowers_it(tiny):
    vectors = vectors_of(tiny)
    projections = []
    for multiplier in (-1.0, 0.0, 1.0):
        with ls.steering(tiny, vectors, layers=[2], multiplier=multiplier):
            projections.append(streams(tiny)[0][2] @ vectors.unit[2])
    low, middle, high = projections
    assert torch.allclose(high - middle, vectors.norms[2].expand(BATCH, POS), atol=1e-4)
    assert torch.allclose(middle - low, vectors.norms[2].expand(BATCH, POS), atol=1e-4)


@pytest.mark.parametrize("operator", [name for name in NAMES if name not in ("ablate", "clamp:3.5")])
def test_every_operator_with_two_sides_pushes_toward_the_side_of_its_sign(operator: str):
    # Between the class means, so that either of them is ahead.
    h = (SAFE + DANGEROUS) / 2 + 0.1 * H
    moves = [(applied(operator, m, h) - h) @ DIRECTIONS.unit[0, 0] for m in (0.3, -0.3)]
    between = ((h @ DIRECTIONS.unit[0, 0]) - (SAFE @ DIRECTIONS.unit[0, 0])) / DIRECTIONS.vector.norm()
    assert bool(((between > 0) & (between < 1)).all())
    if operator == "add-norm":
        # The norm is kept at the cost of the projection: what rises is the cosine.
        cosine = [angle(applied(operator, m, h), DIRECTIONS.vector) for m in (0.3, 0.0, -0.3)]
        assert bool((cosine[0] < cosine[1]).all() & (cosine[1] < cosine[2]).all())
    else:
        assert bool((moves[0] > 0).all())
        assert bool((moves[1] < 0).all())


def test_add_with_the_norm_kept_has_the_direction_of_the_sum_and_the_norm_of_before(tiny):
    vectors = vectors_of(tiny)
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator="add-norm", multiplier=2.0):
        steered, _ = streams(tiny)
    assert torch.allclose(steered[1].norm(dim=-1), base[1].norm(dim=-1), rtol=1e-5)
    total = base[1] + 2.0 * vectors.layer(1)
    assert torch.allclose(torch.cosine_similarity(steered[1], total, dim=-1), torch.ones(BATCH, POS))
    assert not torch.allclose(total.norm(dim=-1), base[1].norm(dim=-1), rtol=1e-2)


def test_a_sum_of_nothing_has_no_norm_to_keep_and_is_not_nan():
    assert torch.equal(applied("add-norm", 1.0, -DIRECTIONS.vector), torch.zeros(1, 1, D_MODEL))
    assert torch.equal(applied("add-norm", 1.0, torch.zeros(1, 1, D_MODEL)), torch.zeros(1, 1, D_MODEL))


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
    across = base[1] - (base[1] @ u)[..., None] * u
    assert error(ablated[1], across) < 1e-5


@OPERATOR
def test_ablation_alone_is_blind_to_the_length_and_the_sign_of_the_vector(operator: str):
    turned = Directions(-3 * DIRECTIONS.vector, -3 * SAFE, -3 * DANGEROUS)
    kept = [applied(operator, 1.0, directions=one) for one in (DIRECTIONS, turned)]
    assert torch.allclose(kept[0], kept[1], atol=1e-4) == (operator == "ablate")


@pytest.mark.parametrize("value", [3.5, -2.0, 0.0])
def test_a_clamp_sets_every_projection_to_its_value_and_nothing_beside_it(tiny, value: float):
    vectors = vectors_of(tiny)
    u = vectors.unit[1]
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator=f"clamp:{value}"):
        clamped, _ = streams(tiny)
    assert torch.allclose(clamped[1] @ u, torch.full((BATCH, POS), value), atol=1e-4)
    assert float((base[1] @ u).std()) > 1e-2
    beside, base_beside = (h - (h @ u)[..., None] * u for h in (clamped[1], base[1]))
    assert torch.allclose(beside, base_beside, atol=1e-4)


@pytest.mark.parametrize("multiplier", [1.0, -1.0])
def test_without_a_value_the_projection_becomes_that_of_the_class_mean_on_the_multipliers_side(
    tiny, multiplier: float
):
    vectors = vectors_of(tiny)
    u = vectors.unit[1]
    means = {1.0: vectors.dangerous_mean[1], -1.0: vectors.safe_mean[1]}
    with ls.steering(tiny, vectors, layers=[1], operator="clamp", multiplier=multiplier):
        clamped, _ = streams(tiny)
    assert torch.allclose(clamped[1] @ u, (means[multiplier] @ u).expand(BATCH, POS), atol=1e-4)
    assert float((means[1.0] - means[-1.0]) @ u) > 1e-2


@pytest.mark.parametrize("multiplier", [1.0, -1.0])
def test_a_whole_step_toward_a_class_mean_arrives_there(tiny, multiplier: float):
    vectors = vectors_of(tiny)
    mean = (vectors.dangerous_mean if multiplier > 0 else vectors.safe_mean)[1]
    with ls.steering(tiny, vectors, layers=[1], operator="toward", multiplier=multiplier):
        steered, _ = streams(tiny)
    assert error(steered[1], mean.expand(BATCH, POS, D_MODEL)) < 1e-5
    with ls.steering(tiny, vectors, layers=[1], operator="toward", multiplier=0.5 * multiplier):
        half, _ = streams(tiny)
    assert error(half[1], mean.expand(BATCH, POS, D_MODEL)) > 0.05


@pytest.mark.parametrize(("degrees", "multiplier"), [(15, 1.0), (40, -1.0), (20, 2.0), (30, -0.5)])
def test_a_rotation_keeps_the_norm_and_reaches_its_angle_in_the_plane_of_h_and_v(
    tiny, degrees: int, multiplier: float
):
    vectors = vectors_of(tiny)
    v = vectors.layer(1)
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator=Rotate(degrees), multiplier=multiplier):
        turned, _ = streams(tiny)
    assert torch.allclose(turned[1].norm(dim=-1), base[1].norm(dim=-1), rtol=1e-5)
    assert torch.allclose(
        angle(turned[1], base[1]), torch.tensor(abs(degrees * multiplier)).double(), atol=1e-2
    )
    left = torch.deg2rad(angle(base[1], v) - degrees * multiplier)
    cosine = torch.cosine_similarity(turned[1].double(), v.double(), dim=-1)
    assert torch.allclose(cosine, left.cos(), atol=1e-4)
    basis = torch.linalg.qr(torch.stack([base[1], v.expand_as(base[1])], dim=-1)).Q
    outside = turned[1] - (basis @ (basis.mT @ turned[1][..., None]))[..., 0]
    assert float((outside.norm(dim=-1) / base[1].norm(dim=-1)).max()) < 1e-5


def test_a_rotation_by_their_angle_lays_h_along_v():
    h = H[2:3, 3:4]
    turned = applied(f"rotate:{float(angle(h, DIRECTIONS.vector))}", 1.0, h)
    assert error(turned, h.norm() * DIRECTIONS.unit) < 1e-3


@pytest.mark.parametrize("length", [2.5, 1.0, -1.0, -40.0, 1e-3, 0.0])
def test_what_lies_along_v_has_no_plane_to_turn_in_and_stays(length: float):
    h = length * DIRECTIONS.vector
    assert torch.equal(applied("rotate:70", 1.0, h), h)
    beside = h + 0.1 * H[:1, :1]
    assert not torch.allclose(applied("rotate:70", 1.0, beside), beside, atol=1e-2)


class Shrink:
    """An operator of one's own."""

    equation = "h (1 - m / 2)"

    def __call__(self, h, directions, m):
        return h * (1 - m / 2)

    def __repr__(self) -> str:
        return "Shrink()"


def test_an_operator_of_ones_own_steers_and_stands_in_the_plan(tiny):
    vectors = vectors_of(tiny)
    base, _ = streams(tiny)
    with ls.steering(tiny, vectors, layers=[1], operator=Shrink(), multiplier=0.5) as plan:
        steered, _ = streams(tiny)
    assert torch.equal(steered[1], base[1] * 0.75)
    row = plan.to_frame().iloc[0]
    assert (row["operator"], row["h becomes"]) == ("Shrink()", "h (1 - m / 2)")


@pytest.mark.parametrize(
    "name", [*(name for name in OPERATORS if name != "rotate"), "clamp:3.5", "rotate:70"]
)
def test_an_operator_is_found_again_by_its_name(name: str):
    assert operator_name(named_operator(name)) == name
    assert named_operator(operator_name(named_operator(name))) == named_operator(name)


def test_names_stand_for_their_operators():
    assert named_operator("add") == Add() != named_operator("add-norm") == Add(keep_norm=True)
    assert named_operator("clamp") == Clamp() != named_operator("clamp:-2") == Clamp(-2.0)
    assert named_operator("rotate") == Rotate() == Rotate(15) != named_operator("rotate:30") == Rotate(30)
    mine = Shrink()
    assert named_operator(mine) is mine


def test_a_value_with_many_digits_keeps_them_in_the_name():
    exact = Clamp(1.2345678901)
    assert named_operator(operator_name(exact)) == exact


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("erase", "unknown operator 'erase': expected one of add, add-norm, ablate, clamp, toward, rotate, "),
        ("", "unknown operator '': expected one of add"),
        ("Add", "unknown operator 'Add': expected one of add"),
        ("add:3", "unknown operator 'add:3': expected one of add"),
        ("toward:1", "clamp:VALUE, rotate:DEGREES"),
        ("clamp:high", "operator 'clamp:high' given, expected a number after the colon"),
        ("rotate:1:2", "operator 'rotate:1:2' given, expected a number"),
        ("clamp:nan", "Clamp(value=nan) given, expected a finite projection, or None"),
        ("clamp:inf", "Clamp(value=inf) given"),
        ("rotate:0", "Rotate(degrees=0.0) given, expected an angle above 0"),
        ("rotate:-5", "Rotate(degrees=-5.0) given, expected an angle above 0"),
        ("rotate:nan", "Rotate(degrees=nan) given"),
        (3, "operator 3 given, expected a name or an object such as Rotate(30)"),
        (None, "operator None given, expected a name"),
        (Rotate, "given, expected a name or an object such as Rotate(30)"),
    ],
)
def test_what_names_no_operator_is_refused_in_one_sentence(given, says: str):
    with pytest.raises(ls.OptionError, match=re.escape(says)) as refused:
        inspect.unwrap(named_operator)(given)
    assert "\n" not in str(refused.value)
