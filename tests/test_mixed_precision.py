"""Autocast, loss scaling and half-precision models."""

import copy
import functools
import itertools

import frozen_oracle as frozen
import pytest
import torch
import torch.nn.functional as F
from nets import autocast, data, seeded, small_net
from test_frozen import gradients_of
from torch import nn

from interpgrad import InterpretableGradientLoss, input_gradients, low_pass, saliency

DTYPES = [torch.bfloat16, torch.float16]


def term(model, reg, x, y, shared):
    if shared:
        with reg.shared_forward():
            model(x)
    return reg(x, y)


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("error", ["cos", "mae", "mse", "hi"])
def test_the_gradient_of_the_penalty_points_where_that_of_single_precision_does(error, shared, training, dtype):
    """With the loss scaled as a GradScaler does: as far as nothing overflows."""
    model, (x, y) = small_net().train(training).float(), data(n=16, size=16)
    x = x.float()
    exact = flat_gradient(InterpretableGradientLoss(model, error, lam=1.0)(x, y), model)
    with autocast(dtype):
        value = term(model, InterpretableGradientLoss(model, error, lam=1.0), x, y, shared)
    assert value.dtype == torch.float32
    found, scale = torch.tensor(torch.inf), 2.0**16
    while not found.isfinite().all() and scale > 1:
        found, scale = flat_gradient(scale * value, model), scale / 2
    assert F.cosine_similarity(found, exact, dim=0) > 0.99


@pytest.mark.parametrize("transform", [None, low_pass])
@pytest.mark.parametrize("pooling", [nn.Identity(), nn.AvgPool2d(3, 1, 1)], ids=["plain", "padded pooling"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_single_precision_is_the_reference_in_double(layout, pooling, transform):
    """As networks are trained, with the kernels of the device; the reference is stock's on the CPU."""
    torch.manual_seed(0)
    stages = [(3, 8), (8, 16), (16, 32)]
    blocks = [
        [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.AvgPool2d(2)] for i, o in stages
    ]
    head = [pooling, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), *itertools.chain(*blocks), *head)
    x, y = data(n=32, size=16, classes=10)
    x = x.float()
    double = copy.deepcopy(model).cpu().double()
    with torch.device("cpu"):
        delta, guided, _ = frozen.reference(double, x.cpu().double(), y.cpu())
        compared = (delta, guided) if transform is None else (transform(delta), transform(guided))
        exact = gradients_of(frozen.penalty(*compared, "cos"), double)
    model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    with torch.backends.cudnn.flags(allow_tf32=False):
        value = term(model, InterpretableGradientLoss(model, lam=1.0, transform=transform), x, y, shared=True)
        found = [each.cpu().double() for each in gradients_of(value, model)]
    found, exact = (torch.cat([each.flatten() for each in gradients]) for gradients in (found, exact))
    assert (found - exact).norm() < 0.01 * exact.norm()  # rectifiers that rounding switches


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_in_half_precision(dtype):
    model, (x, y) = small_net().eval(), data(n=8)
    exact = InterpretableGradientLoss(model, lam=1.0)(x, y).item()
    value = InterpretableGradientLoss(model.to(dtype), lam=1.0)(x.to(dtype), y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, abs=0.02)


def trained(dtype, shared, normalize, steps=200):
    """Four classes that are learned perfectly. Cross-entropies, penalties, and how many steps the scaler skipped."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if normalize else nn.Identity
    sizes = [(3, 16, 1), (16, 32, 2), (32, 32, 2)]
    layers = [layer for i, o, stride in sizes for layer in (nn.Conv2d(i, o, 3, stride, 1), norm(o), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    scaler = torch.amp.GradScaler(torch.get_default_device().type, growth_interval=50, enabled=dtype == torch.float16)
    reg = InterpretableGradientLoss(model, lam=0.1)
    generator = seeded(1)
    means = 2 * torch.randn(4, 3, 16, 16, generator=generator)
    entropies, penalties, skipped = [], [], 0
    for _ in range(steps):
        y = torch.randint(4, (16,), generator=generator)
        x = means[y] + 0.5 * torch.randn(16, 3, 16, 16, generator=generator)
        with autocast(dtype):
            with reg.shared_forward() if shared else torch.enable_grad():
                logits = model(x)
            entropy, penalty = F.cross_entropy(logits.float(), y), reg(x, y)
        optimizer.zero_grad()
        before = scaler.get_scale()
        scaler.scale(entropy + penalty).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        entropies.append(entropy.item())
        penalties.append(penalty.item())
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    return torch.tensor(entropies), torch.tensor(penalties), skipped


@functools.cache
def trained_in_single_precision(normalize):
    return trained(torch.float32, True, normalize)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("normalize", [True, False], ids=["batch norm", "no norm"])
def test_two_hundred_steps_end_where_those_in_single_precision_do(normalize, shared, dtype):
    entropies, penalties, skipped = trained(dtype, shared, normalize)
    assert entropies.isfinite().all()
    assert penalties.isfinite().all()
    reference_entropies, reference_penalties, _ = trained_in_single_precision(normalize)
    for value, reference in ((entropies, reference_entropies), (penalties, reference_penalties)):
        torch.testing.assert_close(value[-20:].mean(), reference[-20:].mean(), rtol=0.1, atol=0)
    assert skipped <= 10


def test_samples_whose_gradient_underflows_at_half_precision_logits():
    """More confident than float16 can say: cross-entropies of 1e-9, below its smallest number."""
    model, x, y = confident_net(margin=21)
    exact = InterpretableGradientLoss(model, lam=1.0)(x, y)
    with autocast(torch.float16):
        value = InterpretableGradientLoss(model, lam=1.0)(x, y)
    torch.testing.assert_close(value, exact, atol=0.02, rtol=0)
    gradients = [flat_gradient(each, model) for each in (value, exact)]
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def confident_net(margin):
    model = small_net().eval().float()
    with torch.no_grad():
        model[-1].bias[0] = margin
    return model, data()[0].float(), torch.zeros(3, dtype=torch.long)


class Autocasting(nn.Module):
    """A model that switches autocast on by itself and returns single precision, as Accelerate makes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with autocast(torch.float16):
            return self.model(x).float()


@pytest.mark.parametrize("margin", [0, 8, 14, 40])
@pytest.mark.parametrize("settings", [{}, {"transform": lambda d: F.conv2d(d, torch.ones(1, 3, 3, 3) / 9)}])
def test_float16_wherever_autocast_is_switched_on(margin, settings):
    """The gradients run in half precision if the forward pass did: the loss is scaled for it."""
    model, x, y = confident_net(margin)
    reg = InterpretableGradientLoss(model, lam=1.0, **settings)
    expected = reg(x, y).item()
    for inside in (True, False):
        with autocast(torch.float16):
            with reg.shared_forward():
                model(x)
            if inside:
                value = reg(x, y)
        if not inside:
            value = reg(x, y)
        assert value.item() == pytest.approx(expected, abs=0.02)
    value = InterpretableGradientLoss(Autocasting(model), lam=1.0, **settings)(x, y)
    assert value.item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("margin", [0, 8, 14])
def test_saliency_in_float16(margin):
    """As the loss's gradients: scaled, so that a sure network's do not underflow."""
    model, x, y = confident_net(margin)
    for function in (saliency.gradient, saliency.guided_gradient, saliency.smooth_gradient):
        settings = {"samples": 3} if function is saliency.smooth_gradient else {}
        expected = function(model, x, y, criterion="log_prob", **settings)
        with autocast(torch.float16):
            found = function(model, x, y, criterion="log_prob", **settings)
        assert found.dtype == torch.float32
        # Sample by sample: the surest would not show in a norm of all.
        assert ((found - expected).flatten(1).norm(dim=1) < 0.05 * expected.flatten(1).norm(dim=1)).all()


def test_a_network_that_amplifies_its_gradients():
    """Beyond 65504, from 2^8 at the logits: the scale is lowered until float16 holds them."""
    model, (x, y) = small_net().eval().float(), data(n=8)
    with torch.no_grad():
        model[0].weight *= 1024
        model[-1].weight *= 1024
    x = x.float() / 1024
    exact = InterpretableGradientLoss(model, lam=1.0, criterion="logit")(x, y)
    assert 256 * input_gradients(model, x, y, criterion="logit")[0].abs().max() > torch.finfo(torch.float16).max
    with autocast(torch.float16):
        value = InterpretableGradientLoss(model, lam=1.0, criterion="logit")(x, y)
    torch.testing.assert_close(value, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_criteria_made_for_half_precision_logits(weighted):
    """A criterion is called once, on logits as the model returns them."""
    model, (x, y) = small_net().eval().half(), data(n=8)
    calls = []

    def criterion(logits, y):
        calls.append(logits.dtype)
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16) if weighted else None
        return F.cross_entropy(logits, y, weight=weight, reduction="sum")

    assert InterpretableGradientLoss(model, lam=1.0, criterion=criterion)(x.half(), y).isfinite()
    assert calls == [torch.float16]
