"""Transforms of both gradients before they are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor], Tensor]
TransformName = Literal["low_pass"]

_MEANS = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def low_pass(gradient: Tensor, size: int = 3) -> Tensor:
    """The mean over a neighbourhood of `size` pixels in each dimension, zeros beyond the border: same shape.

    For the loss's `transform`: neighbouring pixels' gradients need not agree one by one.

    Args:
        gradient: (N, C, *spatial), of one to three spatial dimensions.
        size: odd, in pixels. Another one: `transform=functools.partial(low_pass, size=5)`.

    Raises:
        ValueError: the size is not odd, or there are no spatial dimensions.

    >>> import torch
    >>> low_pass(torch.eye(3)[None, None])[0, 0, 1]
    tensor([0.2222, 0.3333, 0.2222])
    """
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"expected size to be a positive odd number of pixels, got {size!r}: the mean has a centre.")
    if gradient.dim() not in _MEANS:
        raise ValueError(
            f"expected gradients (N, C, *spatial) of one to three spatial dimensions, got {tuple(gradient.shape)}."
        )
    # Padded beforehand: CUDA's backward pass in channels_last forgets the offset of its own padding (pytorch #188344).
    padded = F.pad(gradient, [size // 2] * 2 * (gradient.dim() - 2))
    mean: Tensor = _MEANS[gradient.dim()](padded, size, stride=1)
    return mean


def transform_of(transform: TransformName | Transform | None) -> Transform | None:
    """The transform of this name, or the callable itself."""
    if transform == "low_pass":
        return low_pass
    if transform is not None and not callable(transform):
        raise ValueError(
            f'expected transform to be "low_pass", a callable (gradient) -> tensor, or None, got {transform!r}.'
        )
    return transform
