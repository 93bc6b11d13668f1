"""What a network's input gradients are like on held-out images, to be looked at after each epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad.autocast import at_least_single
from interpgrad.criteria import IGNORED, Criterion, CriterionName
from interpgrad.errors import cos
from interpgrad.forward import check_batch, forward_without_trace
from interpgrad.gradients import backward_passes
from interpgrad.model import class_logits, evaluation_mode
from interpgrad.settings import Settings

_NORMAL = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Measured:
    """Means over so many images, with half the width of their 95% intervals. `str()` is a line for a log."""

    images: int
    accuracy: float
    accuracy_margin: float
    cosine: float
    cosine_margin: float

    def __str__(self) -> str:
        accuracy = f"accuracy {self.accuracy:.3f} ± {self.accuracy_margin:.3f}"
        cosine = f"cosine {self.cosine:.3f} ± {self.cosine_margin:.3f}"
        return f"{accuracy}, {cosine} ({self.images:,} images)"


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    criterion: CriterionName | Criterion = "log_prob",
    limit: int | None = None,
) -> Measured:
    """Accuracy, and the cosine of the input gradient and the guided one, in evaluation mode.

    The model is left as it was. The intervals are over images: networks of other seeds differ by more.

    Args:
        model: a classifier, as of `interpgrad.input_gradients`.
        batches: of images (N, C, H, W) and class indices (N,): a DataLoader, or a list of pairs. They are moved to the
            device of the model.
        criterion: whose gradients are compared, as of the loss.
        limit: measure on the first so many images. None means all.

    Raises:
        TypeError: a batch is no pair of tensors. ValueError: there are no images, or y holds no class indices.
            Otherwise as `interpgrad.input_gradients`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batches = [(torch.randn(5, 3, 2, 2), torch.randint(3, (5,))) for _ in range(4)]
    >>> measure(model, batches, limit=12).images
    12
    """
    device = next((each.device for each in itertools.chain(model.parameters(), model.buffers())), None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"expected limit to be a number of images, or None, got {limit!r}.")
    right, cosines, left, settings = [], [], limit, Settings(criterion)
    for batch in batches:
        if left == 0:
            break
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
            received = ", ".join(type(each).__name__ for each in batch) if isinstance(batch, (tuple, list)) else batch
            raise TypeError(
                "expected batches of images and class indices, tensors (x, y), got "
                f"{received if isinstance(received, str) else type(batch).__name__}: pass pairs, for instance "
                '((b["pixel_values"], b["labels"]) for b in loader).'
            )
        check_batch(*batch[:2])
        x, y = (each[:left].to(device) for each in batch[:2])
        if y.is_floating_point() or y.numel() != len(x):
            raise ValueError(
                f"expected class indices (N,), one for each of the {len(x)} images, got {y.dtype} of shape "
                f"{tuple(y.shape)}: give probabilities as y.argmax(1)."
            )
        with evaluation_mode(model, gradients=True):
            forward = forward_without_trace(model, x)
            with backward_passes(forward, y, settings, create_graph=False) as passes:
                # The guided one first: it names what hides its activations.
                guided, delta = (at_least_single(passes.gradient(guided=each)) for each in (True, False))
        logits = class_logits(forward.logits.detach())
        kept = y.reshape(-1) != IGNORED
        right.append((logits.argmax(1) == y.reshape(-1))[kept].double().cpu())
        cosines.append(1 - cos(delta, guided)[kept].double().cpu())
        left = None if left is None else left - len(x)
    if not sum(map(len, right)):
        raise ValueError("expected at least one batch of images to count, got none.")
    (accuracy, accuracy_margin), (cosine, cosine_margin) = map(_interval, (torch.cat(right), torch.cat(cosines)))
    return Measured(sum(map(len, right)), accuracy, accuracy_margin, cosine, cosine_margin)


def _interval(values: Tensor) -> tuple[float, float]:
    deviation = float(values.std()) if len(values) > 1 else float("nan")
    return float(values.mean()), _NORMAL * deviation / len(values) ** 0.5
