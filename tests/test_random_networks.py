"""The hunt: networks drawn at random against the literal reference, `--hypothesis-profile=long` for thousands."""

import copy

import frozen
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import relative_difference
from random_networks import RandomNet
from test_frozen import assert_is_the_reference


@settings(max_examples=max(200, settings().max_examples))
@given(st.integers(0, 2**31))
def test_random_networks(seed):
    """Delta, the guided gradient, the penalty and its gradient, plain and shared."""
    model, reference = RandomNet(seed), RandomNet(seed, reference=True)
    x, y = model.images()
    shaken = frozen.reference(copy.deepcopy(reference), x + 1e-14 * torch.randn_like(x), y)
    prepared = frozen.reference(reference, x, y)
    for value, other in zip(prepared[:2], shaken[:2], strict=True):  # no ties that rounding breaks, no cancellation
        assume(relative_difference(other.detach(), value.detach()) < 1e-13)
    delta, guided = (part.detach().flatten(1).norm(dim=1) for part in prepared[:2])
    assume((guided > 1e-9 * delta).all())  # of zero, be it rounded, the direction is anything
    for shared in (True, False):
        assert_is_the_reference(copy.deepcopy(model), reference, x, y, shared, prepared=prepared, floor=0.01)
