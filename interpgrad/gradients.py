"""The input gradient, which the penalty differentiates, and the backward passes that targets are made of.

In stock PyTorch, for a network of ReLU modules without batch norm, both gradients are:

    >>> import torch, torch.nn as nn, torch.nn.functional as F
    >>> def literal(model, x, y):
    ...     x, guiding = x.clone().requires_grad_(), False
    ...     def clamp(module, grad_output):
    ...         return (grad_output[0].clamp(min=0),) if guiding else None
    ...     handles = [m.register_full_backward_pre_hook(clamp) for m in model.modules() if isinstance(m, nn.ReLU)]
    ...     logits = model(x)
    ...     v = F.one_hot(y, logits.shape[1]) - logits.detach().softmax(1)  # of the log-probability: a constant
    ...     guiding = True
    ...     (guided,) = torch.autograd.grad(logits, x, v, retain_graph=True)
    ...     guiding = False
    ...     (delta,) = torch.autograd.grad(logits, x, v, create_graph=True)
    ...     for handle in handles:
    ...         handle.remove()
    ...     return delta, guided

The rest of this file is what makes it right on any network: activations of every spelling, constant batch statistics,
half precision, and an error where something cannot be differentiated twice.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(2, 3, 2, 2), torch.tensor([0, 2])
    >>> for ours, expected in zip(input_gradients(model, x, y, create_graph=True), literal(model, x, y)):
    ...     torch.testing.assert_close(ours, expected)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad import frozen, graph
from interpgrad.autocast import at_least_single, without_autocast
from interpgrad.criteria import IGNORED, Criterion, CriterionName
from interpgrad.double_backward import sync_batch_norm
from interpgrad.forward import Forward, check_batch, forward_without_trace
from interpgrad.guided import guided_backward
from interpgrad.model import class_logits, exclusive_use
from interpgrad.settings import Activations, Settings, Statistics

_ATTEMPTS = 4  # at a scale for float16


def input_gradients(
    model: nn.Module,
    x: Tensor,
    y: Any = None,
    *,
    criterion: CriterionName | Criterion = "log_prob",
    batch_norm: Statistics = "frozen",
    activations: Activations = "all",
    ignore_index: int = IGNORED,
    create_graph: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The input gradient of a function of the logits, and the guided one, from one forward pass.

    The forward pass leaves no trace: buffers, `.grad`, modes, hooks and the random state are as before.

    Args:
        model: any module taking images; its output is the logits (N, C), an object with `.logits`, a dict with "logits"
            or "out", or a tuple that begins with the logits. In training mode, batch norm uses the batch's statistics.
        x: images, floating point, (N, C, H, W) or any shape that begins with N.
        y: what `criterion` takes beside the logits: class indices (N,) or probabilities (N, C) for the
            built-in ones. None means the predicted class.
        criterion: as of `InterpretableGradientLoss`, and so are
        batch_norm: and
        activations: and
        ignore_index: which say whose gradient is taken, and how.
        create_graph: whether the first gradient can be differentiated again, in x and the parameters.
        model_kwargs: further arguments of the model. The images are the first that these do not name.

    Returns:
        `(delta, guided)`, both of the shape of x. `guided` is always detached.

    Raises:
        TypeError, ValueError: x is no floating point tensor, is empty, or does not match y in size; the
            criterion does not return a scalar; the output holds no logits; an unknown name.
        RuntimeError: under `torch.inference_mode()`; no activation of the family was met, or others beside "relu";
            an operation hides its activations or cannot be differentiated twice.

    Source: Torres et al., arXiv 2404.15024, Algorithm 1 (its reading: "cross_entropy", "coupled"); Springenberg et al.,
    arXiv 1412.6806.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> delta, guided = input_gradients(model, torch.randn(2, 3, 2, 2), torch.tensor([0, 2]))
    >>> delta.shape, guided.shape
    (torch.Size([2, 3, 2, 2]), torch.Size([2, 3, 2, 2]))
    """
    check_batch(x, y)
    settings = Settings(criterion, batch_norm, activations, ignore_index)
    with exclusive_use(model), torch.enable_grad():
        forward = forward_without_trace(model, x, (), model_kwargs, batch_norm=batch_norm)
        y = class_logits(forward.logits.detach()).argmax(1) if y is None else y
        with backward_passes(forward, y, settings, create_graph=create_graph) as passes:
            guided = passes.gradient(guided=True)
            return passes.attached_delta, guided


@contextmanager
def backward_passes(
    forward: Forward, y: Any, settings: Settings, *, create_graph: bool, verified: set[frozenset[str]] | None = None
) -> Iterator[Passes]:
    """The backward passes over the graph of a forward pass, to be run while the context lasts.

    `create_graph`: whether delta is to be differentiated. `verified` remembers the sets of operations that are known
    to have a double backward.
    """
    logits, freezes = forward.logits, settings.batch_norm == "frozen"
    if not logits.requires_grad:
        raise graph.no_path_to_images()
    v = settings.derivative(logits, y, create_graph)
    operations = graph.operations(logits, until=forward.image)
    if create_graph:
        graph.refuse_opaque(operations)
        graph.refuse_once_differentiable(operations)
    if create_graph or freezes:
        graph.refuse_sync_batch_norm(operations)
    network = frozen.RecordedGraph(operations, functools.partial(forward.inner_passes, create_graph=create_graph))
    with network.inner(), network.frozen_pass(logits) if freezes else nullcontext(logits) as output:
        given = forward.x.detach(), y, output.detach().clone(), v.detach().clone()
        verified = set() if verified is None else verified
        passes = Passes(*given, v, forward, network, output, settings, create_graph, verified)
        try:
            yield passes
        finally:
            passes._over = True


@dataclass(eq=False)
class Passes:
    """What a target may be made of: the forward pass, and backward passes over its graph.

    Attributes:
        x: the images, (N, C, H, W): the user's own, not to be changed in place.
        y: the targets of this call, as they were given.
        logits: of the network, detached.
        v: the criterion's derivative at the logits, of their shape, detached.
        delta: the input gradient J^T v, of the shape of x, detached; taken when it is first asked for.
    """

    x: Tensor
    y: Any
    logits: Tensor
    v: Tensor
    _v: Tensor
    _forward: Forward
    _network: frozen.RecordedGraph
    _output: Tensor
    _settings: Settings
    _create_graph: bool
    _verified: set[frozenset[str]]
    _over: bool = False

    @property
    def delta(self) -> Tensor:  # noqa: D102
        return self.attached_delta.detach().clone()

    def gradient(self, v: Tensor | None = None, guided: bool = False) -> Tensor:
        """J^T v of the shape of x, detached: one backward pass.

        Args:
            v: any vector at the logits, of their shape; None is that of the criterion.
            guided: whether the pass is that of guided backpropagation.

        Raises:
            ValueError: v is not of the shape of the logits.
            RuntimeError: guided, and no activation of the family was met; the loss has returned.
        """
        if self._over:
            raise RuntimeError("expected a backward pass while the target is made, got one after: keep its result.")
        if v is not None and v.shape != self.logits.shape:
            raise ValueError(
                f"expected v to have the shape of the logits, {tuple(self.logits.shape)}, got {tuple(v.shape)}."
            )
        v = self._v.detach() if v is None else v.detach()
        if not guided:
            return self._scaled(self._backward, v)
        graph.refuse_opaque(self._network.operations)
        with guided_backward(self._network.operations, self._settings.activations):
            return self._scaled(self._backward, v)

    @functools.cached_property
    def attached_delta(self) -> Tensor:
        """Delta on its graph, if it is to be differentiated."""
        return self._scaled(self._differentiable, self._v) if self._create_graph else self.gradient()

    @functools.cached_property
    def _meets_float16(self) -> bool:
        dtypes = (self._forward.image.dtype, self._output.dtype)
        return torch.float16 in dtypes or graph.casts_to(torch.float16, self._network.operations)

    def _differentiable(self, v: Tensor) -> Tensor:
        """J^T v on a graph. Where that reaches batch norm in the forward pass, it is differentiated separately."""
        image, network = self._forward.image, self._network
        norms = frozen.batch_statistics(network.operations) if self._settings.batch_norm == "frozen" else set()
        # Where v is a function of the logits, that derivative runs through the user's graph, which is coupled.
        leaf = v.detach().requires_grad_() if norms and v.requires_grad else v
        names = frozenset((*network.operations, *graph.operations(v, until=self._forward.logits)))
        verified = names in self._verified
        with nullcontext() if verified else graph.refusing_detached(network.operations):
            delta = self._backward(leaf, create_graph=True)
        if not verified:
            # Where v was a leaf, delta's graph ends there, and not in the backward pass of the criterion.
            for gradient, until in ((delta, image), (v, self._forward.logits)):
                graph.refuse_failing_double_backward(gradient, until, network.operations)
            self._verified.add(names)
        if not norms or (leaf is v and norms.isdisjoint(graph.nodes(delta, until=image))):
            return delta
        inputs = [each for each in graph.leaves(delta, until=image) if each is not image and each is not leaf]
        inputs += [image] if self._forward.x.requires_grad else []
        return frozen.separately(network, delta, [leaf, *inputs], [v, *inputs])

    def _backward(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """One pass. The graph is kept: it is also the one of the user's own loss."""
        output = self._output
        (gradient,) = torch.autograd.grad(
            output,
            self._forward.image,
            v.to(output.dtype),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        if gradient is None:
            raise graph.no_path_to_images()
        return gradient

    def _scaled(self, backward: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """backward(v), which is linear in v. Where float16 is met, of v times a scale, by which the result is divided.

        Gradients inside the network underflow there. The largest one at the logits becomes about 2^8; a power of two,
        so nothing is rounded. Less where the network amplifies its gradients beyond what float16 holds.
        """
        # A target may have switched either: delta is to be differentiated, and nothing is cast.
        with torch.enable_grad(), without_autocast(self._forward.image.device):
            if not self._meets_float16:
                return backward(v)
            v = at_least_single(v)
            agreed = functools.partial(sync_batch_norm.smallest, self._network.operations)  # its sums are of all ranks
            exponent = agreed((8 - v.detach().abs().max().log2().ceil()).clamp(-100, 100))
            for _ in range(_ATTEMPTS):
                gradient = backward(v * exponent.exp2())
                if bool(agreed(gradient.isfinite().all().float())):
                    break
                exponent = exponent - 6
            return at_least_single(gradient) / exponent.exp2().to(gradient.device)
