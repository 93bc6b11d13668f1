"""The hunt: networks drawn at random against the literal reference, `--hypothesis-profile=long` for thousands."""

import copy

import frozen_oracle as frozen
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import relative_difference
from random_networks import RandomNet
from test_frozen import assert_is_the_reference, gradients_of, relative_error

FLOOR = 0.01  # of what is small beside the other parameters' gradients, the absolute error counts


def moved(network, x):
    """Copies, by about as much as rounding moves values."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 1e-14 * torch.randn_like(parameter))
    return network, x + 1e-14 * torch.randn_like(x)


def decided_by_rounding(network, x, y, prepared):
    """Whether the reference itself differs a rounding away: ties in max pooling, cancellation, directions of zero."""
    delta, guided = prepared[:2]
    if not (guided.flatten(1).norm(dim=1) > 1e-9 * delta.flatten(1).norm(dim=1)).all():
        return True
    other, x = moved(network, x)
    others = frozen.reference(other, x, y)
    if any(relative_difference(b.detach(), a.detach()) >= 1e-13 for a, b in zip(prepared[:2], others[:2], strict=True)):
        return True
    expected = gradients_of(frozen.penalty(delta, guided, "cos"), network, retain_graph=True)
    return relative_error(gradients_of(frozen.penalty(*others[:2], "cos"), other), expected, FLOOR) > 1e-9


@pytest.mark.slow
@settings(max_examples=max(200, settings().max_examples))
@given(st.integers(0, 2**31))
def test_random_networks(seed):
    """Delta, the guided gradient, the penalty and its gradient, plain and shared."""
    model, reference = RandomNet(seed), RandomNet(seed, reference=True)
    x, y = model.images()
    prepared = frozen.reference(reference, x, y)
    assume(not decided_by_rounding(reference, x, y, prepared))
    for shared in (True, False):
        assert_is_the_reference(copy.deepcopy(model), reference, x, y, shared, prepared=prepared, floor=FLOOR)
