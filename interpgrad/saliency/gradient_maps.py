"""Input gradients as saliency: plain, guided, smoothed, integrated. In evaluation mode, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad import graph
from interpgrad.criteria import Criterion, CriterionName
from interpgrad.forward import check_images, forward_without_trace
from interpgrad.gradients import backward_passes
from interpgrad.inputs import Inputs
from interpgrad.model import class_logits, classes_to_explain, evaluation_mode
from interpgrad.settings import Activations, Settings


def gradient(
    model: nn.Module,
    x: Tensor,
    target: Any = None,
    *,
    criterion: CriterionName | Criterion = "logit",
    chunk_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The input gradient of the target's logit, or of another function of the logits.

    Args:
        model: an image classifier taking x; run in evaluation mode, and left as it was.
        x: images (N, C, H, W), as the model takes them.
        target: class indices (N,), one for all, or None for the predicted classes.
        criterion: what to differentiate: "logit", "log_prob", "cross_entropy" or a callable
            `(logits, target) -> 0-dim tensor`, as in `interpgrad.input_gradients`.
        chunk_size: at most so many images at once; None is all.
        model_kwargs: further arguments of the model by name. A tensor has one row for each image; anything else is
            handed on as it is. x is the first parameter of the model's `forward` that they do not name.

    Returns:
        (N, C, H, W), the units of the criterion per unit of x; signed.

    Raises:
        TypeError, ValueError: x is no floating point tensor or empty; a target that is no class; a tensor of
            model_kwargs without a row for each image.

    Source: Simonyan et al., "Deep Inside Convolutional Networks", arXiv 1312.6034.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    >>> gradient(model, torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    inputs = Inputs(check_images(x).detach(), model_kwargs)
    return _gradient(model, inputs, target, Settings(criterion), chunk_size, guided=False)


def guided_gradient(
    model: nn.Module,
    x: Tensor,
    target: Any = None,
    *,
    criterion: CriterionName | Criterion = "logit",
    activations: Activations = "all",
    chunk_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The guided-backpropagation gradient of the target's logit.

    Arguments, result and errors as of `gradient`; `activations` is "all" for every rectifier, "relu" for the
    piecewise-linear family alone, and a RuntimeError says that no activation of the family was met.

    Source: Springenberg et al., "Striving for Simplicity", arXiv 1412.6806.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    >>> guided_gradient(model, torch.randn(2, 3, 8, 8), target=3).shape
    torch.Size([2, 3, 8, 8])
    """
    inputs = Inputs(check_images(x).detach(), model_kwargs)
    return _gradient(model, inputs, target, Settings(criterion, activations=activations), chunk_size, guided=True)


def _gradient(
    model: nn.Module, inputs: Inputs, target: Any, settings: Settings, chunk_size: int | None, *, guided: bool
) -> Tensor:
    parts: list[Tensor] = []
    with evaluation_mode(model, gradients=True):
        for images, given in chunks(inputs, target, chunk_size):
            forward = forward_without_trace(model, images.x, (), images.kwargs)
            classes = classes_to_explain(given, class_logits(forward.logits))
            with backward_passes(forward, classes, settings, create_graph=False) as passes:
                try:
                    parts.append(passes.gradient(guided=guided))
                except TypeError:  # torch.cond run outside of its compiler
                    graph.refuse_opaque(graph.operations(forward.logits, until=forward.image))
                    raise
    return torch.cat(parts)


def smooth_gradient(
    model: nn.Module,
    x: Tensor,
    target: Any = None,
    *,
    noise: float = 0.15,
    samples: int = 25,
    criterion: CriterionName | Criterion = "logit",
    chunk_size: int | None = 64,
    generator: torch.Generator | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """SmoothGrad: the mean input gradient over `samples` noisy copies of each image.

    Arguments, result and errors as of `gradient`. `noise` is the standard deviation of the Gaussian noise as a fraction
    of each image's range (max - min). `generator`, on the device of x, draws it; None is a new one seeded with 0, so
    that results repeat and the global random state is left alone. target=None is the class predicted without noise.

    Source: Smilkov et al., "SmoothGrad: removing noise by adding noise", arXiv 1706.03825.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    >>> smooth_gradient(model, torch.randn(2, 3, 8, 8), samples=4).shape
    torch.Size([2, 3, 8, 8])
    """
    inputs = Inputs(check_images(x).detach(), model_kwargs)
    if noise < 0 or samples < 1:
        raise ValueError(f"expected noise >= 0 and samples >= 1, got noise={noise} and samples={samples}.")
    x = inputs.x
    generator = generator or torch.Generator(x.device).manual_seed(0)
    sigma = noise * (x.flatten(1).amax(1) - x.flatten(1).amin(1))

    def noisy(image: int, _: int) -> Tensor:
        # Drawn one by one, so that the result does not depend on the size of the chunks.
        return x[image] + sigma[image] * torch.randn(x.shape[1:], dtype=x.dtype, device=x.device, generator=generator)

    return _mean_gradient(model, inputs, target, noisy, samples, criterion, chunk_size)


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: Any = None,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 50,
    criterion: CriterionName | Criterion = "logit",
    chunk_size: int | None = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Integrated gradients: (x - baseline) times the mean gradient on the straight line from the baseline to x.

    Arguments, result and errors as of `gradient`. `baseline` is a number or a tensor that broadcasts to x; 0 is black
    for images in [0, 1], grey for normalized ones. `steps` is the number of gradients, at the middles of equal parts
    (the Riemann sum that captum calls "riemann_middle"). The sum over an image is the change of the logit from the
    baseline to x, up to the error of that sum. target=None is the class predicted for x.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", arXiv 1703.01365, equation 1.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    >>> integrated_gradients(model, torch.randn(2, 3, 8, 8), steps=4).shape
    torch.Size([2, 3, 8, 8])
    """
    inputs = Inputs(check_images(x).detach(), model_kwargs)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected steps >= 1, an integer, got {steps!r}.")
    try:
        start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).detach().expand_as(x)
    except (RuntimeError, TypeError, ValueError):
        received = tuple(baseline.shape) if isinstance(baseline, Tensor) else repr(baseline)
        raise ValueError(
            f"expected baseline to be a number or a tensor that broadcasts to {tuple(x.shape)}, got {received}."
        ) from None
    difference = inputs.x - start

    def between(image: int, step: int) -> Tensor:
        return start[image] + (step + 0.5) / steps * difference[image]

    return difference * _mean_gradient(model, inputs, target, between, steps, criterion, chunk_size)


def _mean_gradient(
    model: nn.Module,
    inputs: Inputs,
    target: Any,
    copy: Callable[[int, int], Tensor],
    count: int,
    criterion: CriterionName | Criterion,
    chunk_size: int | None,
) -> Tensor:
    """The mean gradient over `count` copies of each image; target=None is the class predicted for the image itself."""
    chunks(inputs, target, chunk_size)  # for its complaints
    x, size, classes = inputs.x, chunk_size or len(inputs) * count, target
    if target is None:
        with evaluation_mode(model, gradients=False):
            logits = torch.cat([images.logits(model) for images, _ in chunks(inputs, None, chunk_size)])
            classes = classes_to_explain(None, logits)
    classes = torch.as_tensor(classes, device=x.device)
    classes = (classes[:, 0] if classes.dim() == 2 else classes).expand(len(x))
    total = torch.zeros_like(x)
    pairs = [(image, each) for image in range(len(x)) for each in range(count)]
    for part in (pairs[first : first + size] for first in range(0, len(pairs), size)):
        of_image = torch.tensor([image for image, _ in part])
        copies, drawn = inputs[of_image], torch.stack([copy(*pair) for pair in part])
        found = gradient(model, drawn, classes[of_image], criterion=criterion, model_kwargs=copies.kwargs)
        for index, of_one in enumerate(torch.split(found, of_image.bincount().tolist())):
            if len(of_one):
                total[index] += of_one.sum(0)  # in one order, unlike index_add_ on CUDA
    return total / count


def chunks(inputs: Inputs, target: Any, size: int | None) -> list[tuple[Inputs, Any]]:
    """Pairs of at most `size` images and their targets."""
    if size is not None and size < 1:
        raise ValueError(f"expected chunk_size of at least 1, or None, got {size}.")
    size = size or len(inputs)
    parts = inputs.split(size)
    if target is None or torch.as_tensor(target).dim() == 0:
        return [(images, target) for images in parts]
    target = torch.as_tensor(target)
    if len(target) != len(inputs):
        raise ValueError(
            f"expected target to be one class index or one for each of the {len(inputs)} images, got shape "
            f"{tuple(target.shape)}."
        )
    return list(zip(parts, torch.split(target, size), strict=True))
