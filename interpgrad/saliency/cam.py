"""Class activation maps: channels of a layer, weighted, summed, rectified and scaled to [0, 1].

N images (C, H, W), K channels A of a layer's output (h, w each), y the target's logit, G = dy / dA. Every method is a
weight w (N, K) for the channels; the map is ReLU(sum_k w_k A_k), resized to (H, W) by bilinear interpolation and
scaled to [0, 1] for each image (a map that is constant up to rounding becomes 0). Any factor an image's weights share
is lost in the scaling.

All functions take

    model         an image classifier; run in evaluation mode, and left as it was
    x             images (N, C, H, W), as the model takes them
    layer         a module of the model, or its dotted name, called once in a forward pass
    target        class indices (N,), one for all, or None for the predicted classes
    reshape       a callable that makes (N, K, h, w) of the layer's output, for transformers: see `layer.Layer`
    chunk_size    at most so many images (Ablation-CAM, Score-CAM: changed copies of images) at once; None is all
    model_kwargs  further arguments of the model by name, as of `saliency.gradient`

return maps (N, H, W), and raise ValueError or TypeError for a layer that is none of the model's or whose output is not
(N, K, h, w), for a target that is no class, for x that is no batch of finite floating point images, for a map with NaN
or infinity, for a tensor of model_kwargs without a row for each image; RuntimeError for a layer that was not reached or
called twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpgrad.autocast import at_least_single, without_autocast
from interpgrad.forward import check_images
from interpgrad.inputs import Inputs, check_finite, which
from interpgrad.model import classes_to_explain, evaluation_mode
from interpgrad.saliency.ablation import ablated_scores, in_chunks
from interpgrad.saliency.gradient_maps import chunks
from interpgrad.saliency.layer import Layer, Reshape

_IMAGES = 64  # at once through the whole network, where the copies run through its end only


def grad_cam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    target: Any = None,
    *,
    reshape: Reshape | None = None,
    chunk_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Grad-CAM: w_k is the mean of G_k.

    Source: Selvaraju et al., arXiv 1610.02391, equation 1. Arguments and errors: see the module.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> grad_cam(model, torch.randn(2, 3, 8, 8), layer="1").shape
    torch.Size([2, 8, 8])
    """
    probe, inputs = _prepare(model, x, layer, reshape, model_kwargs)
    return _from_gradients(lambda _, g: g.mean((2, 3)), probe, inputs, target, chunk_size)


def grad_cam_pp(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    target: Any = None,
    *,
    reshape: Reshape | None = None,
    chunk_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Grad-CAM++: w_k is the sum of alpha ReLU(G_k), with alpha = G² / (2 G² + G³ sum(A_k)).

    This is the paper's alpha for exp(y) in the place of the score. Where G is not 0 it is 1 / (2 + G sum(A_k)), which
    does not underflow for small gradients; where the denominator is 0 it is G², as in the authors' code.

    Source: Chattopadhyay et al., arXiv 1710.11063, equations 5 and 19. Arguments and errors: see the module.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> grad_cam_pp(model, torch.randn(2, 3, 8, 8), layer="1").shape
    torch.Size([2, 8, 8])
    """

    def weights(a: Tensor, g: Tensor) -> Tensor:
        denominator = 2 + g * a.sum((2, 3), keepdim=True)
        alpha = torch.where(denominator == 0, g.square(), 1 / denominator)
        return (alpha * g.clamp(min=0)).sum((2, 3))

    probe, inputs = _prepare(model, x, layer, reshape, model_kwargs)
    return _from_gradients(weights, probe, inputs, target, chunk_size)


def axiom_cam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    target: Any = None,
    *,
    reshape: Reshape | None = None,
    chunk_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Axiom-based Grad-CAM (XGrad-CAM): w_k is the sum of G_k A_k / sum(A_k), 0 where sum(A_k) is.

    Source: Fu et al., arXiv 2008.02312, equation 8. Arguments and errors: see the module.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> axiom_cam(model, torch.randn(2, 3, 8, 8), layer="1").shape
    torch.Size([2, 8, 8])
    """

    def weights(a: Tensor, g: Tensor) -> Tensor:
        total = a.sum((2, 3))
        return torch.where(total == 0, 0, (g * a).sum((2, 3)) / total)

    probe, inputs = _prepare(model, x, layer, reshape, model_kwargs)
    return _from_gradients(weights, probe, inputs, target, chunk_size)


def score_cam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    target: Any = None,
    *,
    reshape: Reshape | None = None,
    chunk_size: int | None = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Score-CAM: w is the softmax over k of the target's logit for x times A_k, resized and scaled to [0, 1].

    A constant A_k (a dead channel, for a ReLU) scales to 0: the black image, whose logits are computed once for the
    images of a chunk, unless model_kwargs differ between them.

    Source: Wang et al., arXiv 1910.01279, Algorithm 1. Arguments and errors: see the module.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> score_cam(model, torch.randn(2, 3, 8, 8), layer="1").shape
    torch.Size([2, 8, 8])
    """
    probe, inputs = _prepare(model, x, layer, reshape, model_kwargs)
    maps = []
    with evaluation_mode(model, gradients=False):
        for images, given in chunks(inputs, target, chunk_size):
            a, classes, _ = _read(probe, images, given)
            black = images if images.differ_beside_x else images[:1]
            of_black = probe.run(black.with_images(torch.zeros_like(black.x)), lambda _: None)
            scores = of_black.expand(len(images), -1).gather(1, classes[:, None]).repeat(1, a.shape[1])
            varying = ~_is_constant(a, a.abs().amax((2, 3)))
            for of_image, channel in in_chunks(varying.nonzero(), chunk_size):
                copies = images[of_image]
                masks = _scaled(_resize(a[of_image, channel], x.shape[-2:]))[:, None]
                logits = probe.run(copies.with_images(copies.x * masks.to(x.dtype)), lambda _: None)
                scores[of_image, channel] = logits.gather(1, classes[of_image, None]).squeeze(1).to(scores.dtype)
            maps.append(_map(scores.softmax(1), a, images))
    return scale(torch.cat(maps))


def ablation_cam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    target: Any = None,
    *,
    reshape: Reshape | None = None,
    chunk_size: int | None = 512,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Ablation-CAM: w_k is by how much y drops when A_k is set to 0.

    The paper divides the drop by y. For y > 0 that is lost in the scaling; for y < 0 it would turn the map into that
    of the evidence against the target, and is left out. The network before the layer runs once for all the copies of
    an image in a chunk, and only what follows it on each: if that follows from the layer's output alone, or broadcasts
    with it (a residual branch); else every copy runs through the whole network. Channels that are 0 already weigh 0.

    Source: Desai and Ramaswamy, WACV 2020, equation 5. Arguments and errors: see the module.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    >>> ablation_cam(model, torch.randn(2, 3, 8, 8), layer="1").shape
    torch.Size([2, 8, 8])
    """
    probe, inputs = _prepare(model, x, layer, reshape, model_kwargs)
    maps = []
    with evaluation_mode(model, gradients=False):
        for images, given in chunks(inputs, target, _IMAGES if chunk_size is None else min(chunk_size, _IMAGES)):
            a, classes, score = _read(probe, images, given)
            alive = a.flatten(2).any(2)
            ablated = score[:, None].expand(alive.shape).clone()
            ablated[alive] = ablated_scores(probe, images, classes, score, alive.nonzero(), chunk_size)
            maps.append(_map(score[:, None] - ablated, a, images))
    return scale(torch.cat(maps))


xgrad_cam = axiom_cam  # its other name

_CAMS: tuple[Any, ...] = (grad_cam, grad_cam_pp, score_cam, ablation_cam, axiom_cam)
CAMS: dict[str, Callable[..., Tensor]] = {cam.__name__: cam for cam in _CAMS}


def scale(maps: Tensor) -> Tensor:
    """Maps (N, H, W), each scaled from its minimum and maximum to [0, 1]; a constant one becomes 0.

    What every class activation map has passed through, and what `interpgrad.metrics` asks of other maps.

    Raises ValueError for maps of another shape, with NaN or infinity.

    >>> scale(torch.tensor([[[-1.0, 0.0], [1.0, 3.0]]]))
    tensor([[[0.0000, 0.2500],
             [0.5000, 1.0000]]])
    """
    if maps.dim() != 3:
        raise ValueError(f"expected maps (N, H, W), got shape {tuple(maps.shape)}: sum gradients over their colours.")
    dtype = torch.result_type(maps, 1.0)
    found = _scaled(at_least_single(maps.to(dtype)))  # the range of half precision ends at 65504
    unusable = found.isnan().flatten(1).any(1)
    if unusable.any():
        raise ValueError(
            f"expected maps of a finite range, got NaN or infinity in {which(unusable)}: mend or drop them, or compute "
            "them in a wider precision."
        )
    return found.to(dtype)


def _scaled(maps: Tensor) -> Tensor:
    """The same in the precision of the maps; NaN where one has NaN or infinity."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    spread = high - low
    return torch.where(spread == 0, 0, (maps - low) / spread)


def _prepare(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    reshape: Reshape | None,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Layer, Inputs]:
    check_images(x)
    if x.dim() != 4:
        raise ValueError(f"expected x to be images (N, C, H, W), got shape {tuple(x.shape)}.")
    check_finite(x)
    return Layer(model, layer, reshape), Inputs(x.detach(), model_kwargs)


def _from_gradients(
    weights: Callable[[Tensor, Tensor], Tensor], probe: Layer, inputs: Inputs, target: Any, chunk_size: int | None
) -> Tensor:
    """Maps whose weights are a function of A and G, (N, K, h, w) both."""
    maps = []
    with evaluation_mode(probe.model, gradients=True):
        for images, given in chunks(inputs, target, chunk_size):
            leaf = torch.empty(0)

            def begin_graph(output: Tensor) -> Tensor:
                nonlocal leaf
                leaf = output.detach().requires_grad_()
                return leaf.clone()  # what follows may work in place

            logits = probe.run(images, begin_graph)
            classes = classes_to_explain(given, logits)
            score = logits.gather(1, classes[:, None]).sum()
            gradient = None
            if score.requires_grad:
                (gradient,) = torch.autograd.grad(score, leaf, allow_unused=True)
            if gradient is None:
                raise RuntimeError(
                    f"expected a layer on the way to the logits, got {probe.name!r}, from which none comes: choose one "
                    "that they depend on."
                )
            with torch.no_grad():
                a, g = probe.channels(leaf), probe.channels(gradient)
                maps.append(_map(weights(a, g), a, images))
    return scale(torch.cat(maps))


def _read(probe: Layer, images: Inputs, given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A (N, K, h, w), the classes (N,) and their logits (N,)."""
    read = []
    logits = probe.run(images, lambda output: read.append(probe.channels(output).clone()))
    classes = classes_to_explain(given, logits)
    return read[0], classes, logits.gather(1, classes[:, None]).squeeze(1)


def _map(weights: Tensor, a: Tensor, images: Inputs) -> Tensor:
    """The map (N, H, W) before it is scaled."""
    with without_autocast(a.device):
        summed = torch.einsum("nk,nkhw->nhw", weights.to(a.dtype), a).clamp(min=0)
    terms = (weights.abs() * a.abs().amax((2, 3))).sum(1)
    summed = torch.where(_is_constant(summed, terms)[:, None, None], 0, summed)
    return _resize(summed, images.x.shape[-2:])


def _is_constant(maps: Tensor, terms: Tensor) -> Tensor:
    """Whether maps (..., h, w), sums of magnitudes `terms` (...), are constant up to rounding; never where one has NaN.

    Asked before they are resized, which rounds again: scaling would stretch the rounding to a map of noise.
    """
    spread = maps.amax((-2, -1)) - maps.amin((-2, -1))
    return (spread == 0) | (spread < 8 * torch.finfo(maps.dtype).eps * terms)  # measured: up to 1.2, of 2048 channels


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
