"""The loss with frozen statistics, slowly and literally, with stock autograd; shares no code with the library.

f_s is the network whose batch norms are written with detached mean and variance; v is the derivative of the object at
the logits of the actual forward pass; delta = J_s^T v, and the guided gradient is the ATen oracle's.
"""

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from oracle import deterministic, oracle_gradients
from torch.nn.attention import SDPBackend, sdpa_kernel


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """F.batch_norm without updates, whose statistics are constants; of one row alone its own."""
    shape, dims = (1, -1, *[1] * (x.dim() - 2)), [0, *range(2, x.dim())]
    source = x if len(x) == 1 and running_mean is None else x.detach()
    mean = source.mean(dims) if training else running_mean
    variance = source.var(dims, unbiased=False) if training else running_var
    y = (x - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    """F.instance_norm without updates, whose statistics are constants where inference has running ones."""
    shape, dims = (1, -1, *[1] * (x.dim() - 2)), list(range(2, x.dim()))
    source = x if running_mean is None else x.detach()
    if use_input_stats:
        mean, variance = source.mean(dims, keepdim=True), source.var(dims, unbiased=False, keepdim=True)
    else:
        mean, variance = running_mean.view(shape), running_var.view(shape)
    y = (x - mean) / (variance + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def hardsigmoid(x, inplace=False):
    """Stock's has no double backward. ATen has its slope in single precision, also in double: it is asked for it."""
    clamped = x.clamp(-3, 3)
    slope = torch.ops.aten.hardsigmoid_backward(torch.ones_like(x[:1]), torch.zeros_like(x[:1]))
    return torch.ops.aten.hardsigmoid(x.detach()) + slope * (clamped - clamped.detach())


@contextlib.contextmanager
def constant_statistics():
    replaced = {"batch_norm": batch_norm, "instance_norm": instance_norm, "hardsigmoid": hardsigmoid}
    with mock.patch.multiple(F, **replaced), sdpa_kernel(SDPBackend.MATH):
        yield


def objective(name, logits, y):
    log_p = logits.log_softmax(1)
    value = {"logit": logits, "log_prob": log_p, "cross_entropy": -log_p}[name]
    return (value * y).sum() if y.is_floating_point() else value.gather(1, y[:, None]).sum()


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output


def reference(network, images, y, criterion="log_prob", activations="all"):
    """(delta, guided, logits); delta and the logits have graphs. The network's running statistics are updated once."""
    with deterministic():
        logits = logits_of(network(images))
    constant = criterion in ("log_prob", "logit")
    z = logits.detach().requires_grad_() if constant else logits
    value = objective(criterion, z, y) if isinstance(criterion, str) else criterion(z, y)
    (v,) = torch.autograd.grad(value, z, create_graph=not constant)

    x = images.clone().requires_grad_()
    with constant_statistics(), deterministic():
        output = (logits_of(network(x)) * v).sum()
    _, guided = oracle_gradients(output, x, activations)
    (delta,) = torch.autograd.grad(output, x, create_graph=True)
    return delta, guided, logits


ERRORS = {
    "cos": lambda d, g: 1 - (d * g).sum(1) / (d.square().sum(1).sqrt() * g.square().sum(1).sqrt()),
    "mae": lambda d, g: (d - g).abs().sum(1) / d.shape[1],
    "mse": lambda d, g: (d - g).square().sum(1) / d.shape[1],
    "hi": lambda d, g: -torch.minimum(d.abs(), g.abs()).sum(1) / (d.abs().sum(1) * g.abs().sum(1)),
    "outside": lambda d, m: 1 - (m * d * d).sum(1) / (d * d).sum(1),
}


def penalty(delta, guided, error):
    """R."""
    return ERRORS[error](delta.flatten(1), guided.flatten(1)).mean()
