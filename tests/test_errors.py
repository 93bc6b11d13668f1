"""The four errors: their formulas, invariances and derivatives."""

import numpy as np
import pytest
import torch
from algorithm1 import error_of_one
from hypothesis import given
from hypothesis import strategies as st
from nets import seeded
from torch.autograd import gradcheck, gradgradcheck

from interpgrad.errors import ERRORS, cos, hi

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def pair(shape, seed, dtype=torch.float64):
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("name", ERRORS)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_formulas(name, shape, seed):
    delta, guided = pair(shape, seed)
    literal = torch.stack([error_of_one(name, d, g) for d, g in zip(delta, guided, strict=True)])
    torch.testing.assert_close(ERRORS[name](delta, guided), literal, rtol=1e-9, atol=1e-12)


@given(
    shape=SHAPES,
    seed=st.integers(0, 2**31),
    exponents=st.tuples(st.floats(-30, 30), st.floats(-30, 30)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_cos_does_not_see_scale(shape, seed, exponents, dtype):
    delta, guided = pair(shape, seed, dtype)
    expected = cos(delta, guided)
    scales = [10.0**exponent for exponent in exponents]
    scaled = (delta * scales[0]).requires_grad_()
    value = cos(scaled, guided * scales[1])
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), scaled)
    unscaled = delta.clone().requires_grad_()
    (reference,) = torch.autograd.grad(cos(unscaled, guided).sum(), unscaled)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    largest = float(reference.abs().max()) + float(1 / delta.abs().max())
    assert float((gradient.double() * scales[0] - reference.double()).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("name", ["mae", "mse", "hi"])
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_symmetric(name, shape, seed):
    delta, guided = pair(shape, seed)
    torch.testing.assert_close(ERRORS[name](delta, guided), ERRORS[name](guided, delta))


@pytest.mark.parametrize("name", ERRORS)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_minimal_where_both_are_equal(name, shape, seed):
    """hi depends on the norm of delta too: its least value -1 / ||guided||_1 is reached, not only, at equality."""
    delta, guided = pair(shape, seed)
    least = ERRORS[name](guided, guided)
    assert (ERRORS[name](delta, guided) >= least - 1e-12).all()
    expected = -1 / guided.flatten(1).abs().sum(1) if name == "hi" else torch.zeros(shape[0], dtype=torch.float64)
    torch.testing.assert_close(least, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ERRORS)
def test_derivatives(name):
    delta, guided = pair((3, 2, 3, 3), seed=0)
    delta.requires_grad_()
    assert gradcheck(lambda d: ERRORS[name](d, guided), delta)
    assert gradgradcheck(lambda d: ERRORS[name](d, guided), delta)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("zero", ["delta", "guided", "both"])
def test_zero_samples(name, zero):
    delta, guided = pair((3, 2, 2, 2), seed=0)
    if zero in ("delta", "both"):
        delta[1] = 0
    if zero in ("guided", "both"):
        guided[1] = 0
    delta.requires_grad_()
    error = ERRORS[name](delta, guided)
    (gradient,) = torch.autograd.grad(error.sum(), delta)
    assert error.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0].any(), "the other samples must not be touched"
    if name in ("cos", "hi"):
        assert error[1] == {"cos": 1, "hi": 0}[name]
        assert not gradient[1].any()


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-45])
def test_cos_at_the_end_of_single_precision(scale):
    """Subnormal samples count as zero: the inverse of their norm overflows."""
    delta = torch.full((1, 2, 2, 2), scale, requires_grad=True)
    error = cos(delta, torch.ones(1, 2, 2, 2))
    (gradient,) = torch.autograd.grad(error.sum(), delta)
    assert gradient.isfinite().all()
    assert error.item() == (1.0 if scale < np.finfo(np.float32).tiny else pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("scale", [1e-10, 1e-18, 1e-20, 1e-24, 1e-37])
def test_hi_never_overflows_into_nan(scale):
    delta = torch.full((2, 2, 2, 2), scale)
    delta[1] = 1
    delta.requires_grad_()
    error = hi(delta, torch.full((2, 2, 2, 2), scale))
    (gradient,) = torch.autograd.grad(error.sum(), delta)
    assert error.isfinite().all()
    assert gradient.isfinite().all()
    assert (error[0] != 0) == (scale > 1e-19)


@pytest.mark.parametrize("error", [cos, hi])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_reach_the_user(error, value):
    delta, guided = pair((2, 1, 2, 2), seed=0)
    delta[0, 0, 0, 0] = value
    result = error(delta, guided)
    assert result[1].isfinite()
    assert result[0].isnan() or error is hi
