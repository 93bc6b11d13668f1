"""The slides' Algorithm 1, slowly and literally, with stock double backward; shares no code with the library.

Module ReLUs only, replaced in a copy of the network by a guided ReLU: two forward passes, two backward
passes, errors sample by sample.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0) * (gradient > 0)


class GuidedReLU(nn.Module):
    def forward(self, x):
        return _GuidedReLU.apply(x)


def with_guided_relus(network):
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, GuidedReLU())
    return network


def error_of_one(name, delta, guided):
    a, b, m = delta.reshape(-1), guided.reshape(-1), delta.numel()
    if name == "mae":
        return sum((a - b).abs()) / m
    if name == "mse":
        return sum((a - b) ** 2) / m
    if name == "cos":
        return 1 - torch.dot(a, b) / (torch.sqrt(torch.dot(a, a)) * torch.sqrt(torch.dot(b, b)))
    return -sum(torch.minimum(a.abs(), b.abs())) / (sum(a.abs()) * sum(b.abs()))


def algorithm1(network, images, targets, error, lam):
    """lam * R, differentiable in the parameters of `network`."""
    x = images.clone().requires_grad_()
    loss = F.cross_entropy(network(x), targets, reduction="sum")
    (delta,) = torch.autograd.grad(loss, x, create_graph=True)

    x = images.clone().requires_grad_()
    guided_loss = F.cross_entropy(with_guided_relus(network)(x), targets, reduction="sum")
    (guided,) = torch.autograd.grad(guided_loss, x)

    errors = [error_of_one(error, d, g) for d, g in zip(delta, guided, strict=True)]
    return lam * sum(errors) / len(errors)
