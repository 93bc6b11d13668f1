"""Counted floating-point operations: deterministic, unlike time."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops() -> FlopCounterMode:
    """A context that counts convolutions and matrix products inside, forward and backward; `get_total_flops()`.

    PyTorch's, but for the backward pass of convolutions, of which it takes grouped ones for dense.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(
    gradient: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    mask: Sequence[bool],
    **_: Any,
) -> int:
    """Each value of the output (of the input, if transposed) meets one filter, for each of the two gradients."""
    return sum(mask[:2]) * 2 * math.prod(x if transposed else gradient) * math.prod(weight[1:])
