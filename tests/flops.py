"""Counted floating-point operations: deterministic, unlike time."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class CountFlops(TorchDispatchMode):
    """Counts convolutions and matrix products inside, forward and backward.

    Convolutions are counted here by hand: the registry takes the backward pass of grouped ones for dense.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is aten.convolution:
            self.total += self._convolution(result, args[0], args[1], transposed=args[6])
        elif func._overloadpacket is aten.convolution_backward:
            gradient, x, weight, mask = args[0], args[1], args[2], args[-1]
            self.total += sum(mask[:2]) * self._convolution(gradient, x, weight, transposed=args[7])
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    @staticmethod
    def _convolution(y, x, weight, transposed):
        """Each value of the output (of the input, if transposed) meets one filter."""
        return 2 * (x if transposed else y).numel() * math.prod(weight.shape[1:])
