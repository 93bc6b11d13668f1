"""Frozen statistics against the literal reference, in every spelling of batch norm, and what follows from them."""

import collections
import contextlib
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import frozen_oracle as frozen
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from architectures import NAMES, architecture
from nets import Apply, autocast, data, seeded, small_net
from oracle import deterministic, oracle_gradients, relative_difference
from test_private import take_away
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from interpgrad import (
    InterpretableGradientLoss,
    check,
    fast_double_backward,
    input_gradients,
    low_pass,
    private,
    saliency,
)


def gradients_of(value, model, **settings):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True, **settings)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def relative_error(ours, expected, floor=1e-5):
    """The largest of the gradients' errors, each relative to the largest magnitude expected of that parameter."""
    # A bias before batch norm has no gradient but rounding errors, nor has anything where delta is the guided gradient:
    # hence the bounds on the scale, of an error that is about 1.
    errors = torch.stack([(a - b).abs().max() for a, b in zip(ours, expected, strict=True)])
    magnitudes = torch.stack([reference.abs().max() for reference in expected])
    return (errors / magnitudes.clamp(min=floor * magnitudes.max().clamp(min=0.1))).max()


def assert_same_gradients(ours, expected, floor=1e-5):
    assert relative_error(ours, expected, floor) <= 1e-9


def assert_is_the_reference(
    model, reference, x, y, shared, error="cos", criterion="log_prob", prepared=None, floor=1e-5, target="guided"
):
    """Delta, the guided gradient, the penalty and its gradient."""
    delta, guided, _ = prepared or frozen.reference(reference, x, y, criterion)
    mask = torch.arange(x[:, :1].numel()).view_as(x[:, :1]) % 3 == 0
    constant = {"guided": guided, "low_pass": low_pass(delta.detach()), "given": mask.expand_as(x).to(x.dtype)}[target]
    expected = frozen.penalty(delta, constant, error)
    reg = InterpretableGradientLoss(model, error, lam=1.0, criterion=criterion, target=target)
    with deterministic():
        if shared:
            with reg.shared_forward():
                model(x)
        value = reg(x, y, target=mask) if target == "given" else reg(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-15)  # 1 - cosine, rounded at 1
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference, retain_graph=True), floor)
    return delta, guided


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    """Every error, three targets, from shared forward passes and others."""
    model, size = architecture(name, training=True)
    reference = copy.deepcopy(model)
    x, y = data(n=3, size=size, classes=10)
    delta, guided, logits = frozen.reference(reference, x, y)
    with deterministic():
        ours = input_gradients(model, x, y)
    assert relative_difference(ours[0], delta.detach()) < 1e-9
    assert relative_difference(ours[1], guided) < 1e-9
    others = {"low_pass": "cos", "given": "outside"}
    cases = [(error, "guided") for error in frozen.ERRORS if error != "outside"]
    cases += [(error, target) for target, error in others.items()]
    for index, (error, target) in enumerate(cases):
        settings = {"error": error, "target": target, "prepared": (delta, guided, logits)}
        assert_is_the_reference(model, reference, x, y, shared=index % 2 == 1, **settings)


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("criterion", ["logit", "cross_entropy", "callable"])
@pytest.mark.parametrize("name", ["tv resnet18", "tv mobilenet_v3_small"])
def test_objects(name, criterion, shared):
    """V is differentiated, or not, through the logits of the actual forward pass."""
    if criterion == "callable":
        criterion = lambda z, y: (1 - z.gather(1, y[:, None]).tanh()).square().sum()  # noqa: E731
    model, size = architecture(name, training=True)
    x, y = data(n=3, size=size, classes=10)
    assert_is_the_reference(model, copy.deepcopy(model), x, y, shared, criterion=criterion)


@pytest.mark.parametrize("soft", [False, True])
def test_probabilities_and_ignored_targets(soft):
    model, (x, y) = small_net(), data(n=4)
    target = F.one_hot(y, 4).double() if soft else y
    expected = frozen.reference(copy.deepcopy(model), x, y)[0].detach()
    assert relative_difference(input_gradients(model, x, target)[0], expected) < 1e-9
    mixed = 0.7 * F.one_hot(y, 4).double() + 0.3 * F.one_hot(y.flip(0), 4).double()
    expected = frozen.reference(copy.deepcopy(model), x, mixed)[0].detach()
    assert relative_difference(input_gradients(model, x, mixed)[0], expected) < 1e-9
    ignored = torch.where(torch.arange(4) == 1, -100, y)
    delta, _ = input_gradients(model, x, ignored)
    assert not delta[1].any()
    assert delta[0].any()


# How batch norm may be called, and the same with F.batch_norm, which the reference replaces. Each takes a layer.
class Normalize(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, h):
        return self.call(self.layer, h)


def functional(layer, h):
    return F.batch_norm(
        h, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, 0.1, layer.eps
    )


def own_statistics(layer, h):
    return F.batch_norm(h, None, None, layer.weight, layer.bias, True, 0.1, layer.eps)


def aten(layer, h):
    running = (layer.running_mean, layer.running_var)
    return torch.ops.aten.native_batch_norm(h, layer.weight, layer.bias, *running, layer.training, 0.1, layer.eps)[0]


def of_torch(layer, h):
    running = (layer.running_mean, layer.running_var)
    return torch.batch_norm(h, layer.weight, layer.bias, *running, layer.training, 0.1, layer.eps, False)


def instance(layer, h):
    return F.instance_norm(
        h, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, 0.1, layer.eps
    )


def instance_of_torch(layer, h):
    running = (layer.running_mean, layer.running_var)
    return torch.instance_norm(h, layer.weight, layer.bias, *running, layer.training, 0.1, layer.eps, False)


def call(layer, h):
    return layer(h)


def as_tokens(layer, h):
    return layer(h.flatten(2)).view_as(h)


def as_volume(layer, h):
    return layer(h.unsqueeze(2)).squeeze(2)


def transposed(layer, h):
    """Of channels that are not contiguous."""
    return layer(h.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)).view_as(h)


def without_bias():
    layer = nn.BatchNorm2d(6)
    layer.bias = None
    return layer


def standardized(layer, h):
    """A convolution by weights that batch norm standardizes, as timm has it; its bias is their gain."""
    rows = layer.weight.reshape(1, 6, -1)
    weight = F.batch_norm(rows, None, None, weight=layer.bias, training=True, momentum=0.0, eps=1e-5)
    return F.conv2d(h, weight.view_as(layer.weight), padding=1)


def standardized_by_hand(layer, h):
    rows = layer.weight.flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return F.conv2d(h, (rows * layer.bias[:, None]).view_as(layer.weight), padding=1)


def checkpointed(layer, h):
    return checkpoint(layer, h, use_reentrant=False)


SPELLINGS = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), call, call),
    "BatchNorm2d without affine parameters": (lambda: nn.BatchNorm2d(6, affine=False), call, call),
    "BatchNorm2d without running statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), call, call),
    "BatchNorm2d without a bias": (without_bias, call, call),
    "standardized weights": (lambda: nn.Conv2d(6, 6, 3), standardized, standardized_by_hand),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), as_tokens, as_tokens),
    "BatchNorm1d of a transposed tensor": (lambda: nn.BatchNorm1d(6), transposed, transposed),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), as_volume, as_volume),
    "LazyBatchNorm2d": (lambda: nn.LazyBatchNorm2d(), call, call),
    "timm BatchNormAct2d": (lambda: timm.layers.BatchNormAct2d(6), call, call),
    "SyncBatchNorm alone": (lambda: nn.SyncBatchNorm(6), call, call),
    "F.batch_norm": (lambda: nn.BatchNorm2d(6), functional, functional),
    "F.batch_norm with nothing": (lambda: nn.BatchNorm2d(6), own_statistics, own_statistics),
    "torch.batch_norm": (lambda: nn.BatchNorm2d(6), of_torch, functional),
    "torch.ops.aten.native_batch_norm": (lambda: nn.BatchNorm2d(6), aten, functional),
    "checkpointed": (lambda: nn.BatchNorm2d(6), checkpointed, call),
    "InstanceNorm2d with running statistics": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        call,
        call,
    ),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), call, call),
    "F.instance_norm": (lambda: nn.BatchNorm2d(6), instance, instance),
    "torch.instance_norm": (lambda: nn.BatchNorm2d(6), instance_of_torch, instance),
}


class Net(nn.Module):
    """Around one spelling, used twice, with a piecewise linear or a smooth activation."""

    def __init__(self, layer, spelling, activation):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm1, self.norm2 = Normalize(layer(), spelling), Normalize(layer(), spelling)
        self.head = nn.Linear(6 * 16, 4)
        self.activation = activation
        self.double()

    def forward(self, x):
        h = self.activation(self.norm1(self.conv1(x)))
        h = F.avg_pool2d(self.activation(self.norm2(self.conv2(h)) + h), 2)
        return self.head(h.flatten(1))


def pair_of_nets(spelling, activation):
    layer, call, plain = SPELLINGS[spelling]
    model, reference = Net(layer, call, activation), Net(layer, plain, activation)
    x, _ = data(n=5)
    with torch.no_grad():
        for net in (model, reference):
            net(x)  # lazy layers are made
            generator = seeded(1)
            for value in (*net.parameters(), *net.buffers()):
                if value.dim() == 1 and value.is_floating_point():
                    value.uniform_(0.5, 1.5, generator=generator)
    return model, reference


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("activation", [F.relu, F.silu], ids=["relu", "silu"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, activation, shared):
    model, reference = pair_of_nets(spelling, activation)
    x, y = data(n=5)
    assert_is_the_reference(model, reference, x, y, shared)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_forward_pass_buffers_and_the_users_backward_pass_are_stock(spelling):
    """The classification loss of a shared forward: values, statistics and gradients, after the inner passes."""
    model, stock = pair_of_nets(spelling, F.silu)
    x, y = data(n=5)
    reg = InterpretableGradientLoss(model, lam=1.0)
    with reg.shared_forward():
        logits = model(x)
    reg(x, y)
    expected = stock(x)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (F.cross_entropy(each, y) for each in (logits, expected))
    assert_same_gradients(gradients_of(ours, model), gradients_of(theirs, stock))
    if spelling != "checkpointed":  # torch counts a recomputed batch again
        for (name, value), buffer in zip(model.named_buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(value, buffer, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "with nothing" not in name])
def test_in_evaluation_mode_both_are_the_same(spelling):
    """Where there are running statistics."""
    model, reference = (net.eval() for net in pair_of_nets(spelling, F.silu))
    if spelling == "BatchNorm2d without running statistics":
        model, reference = model.train(), reference.train()
    x, y = data(n=5)
    delta, guided = assert_is_the_reference(model, reference, x, y, shared=True)
    if model.training:
        return
    image = x.clone().requires_grad_()
    stock = oracle_gradients(reference(image).log_softmax(1).gather(1, y[:, None]).sum(), image, "all")
    for value, expected in zip(input_gradients(model, x, y, batch_norm="coupled"), stock, strict=True):
        assert relative_difference(value, expected) < 1e-9
    assert relative_difference(delta.detach(), stock[0]) < 1e-9
    assert relative_difference(guided, stock[1]) < 1e-9


# Statistics of each sample, or of a weight, on nodes of stock batch norm


class Instances(nn.Module):
    """A normalization of (N, 6, 6, 6) between a convolution and an activation, or a convolution by such a weight."""

    def __init__(self, norm, activation=F.silu):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), norm, nn.Linear(216, 4)
        self.activation = activation
        self.double()

    def forward(self, x):
        return self.head(self.activation(self.norm(self.conv(x))).flatten(1))


class StandardizedWeight(Instances):
    """As timm's StdConv2d."""

    def forward(self, x):
        rows = self.conv.weight.reshape(1, 6, -1)
        weight = self.norm(rows).view_as(self.conv.weight)
        return self.head(self.activation(F.conv2d(x, weight, self.conv.bias)).flatten(1))


class OnAThread(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with ThreadPoolExecutor(1) as worker:
            return worker.submit(self.net, x).result()


class Mapped(OnAThread):
    def forward(self, x):
        return torch.func.vmap(lambda image: self.net(image[None])[0])(x)


def exported(net):
    return torch.export.export(net, (data(n=4)[0],)).module()


def instance_by_hand(h, eps=1e-5):
    centred = h - h.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()


def without_statistics(h):
    rows = h.reshape(1, -1, 6, 6)
    return torch.ops.aten._native_batch_norm_legit.no_stats(rows, None, None, True, 0.1, 1e-5)[0].view_as(h)


def instance_of_aten(h):
    return torch.ops.aten.instance_norm(h, None, None, None, None, True, 0.1, 1e-5, True)


def rows_standardized(rows):
    return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)


def rows_by_hand(rows):
    return (rows - rows.mean(2, keepdim=True)) / (rows.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()


def with_instance_norm(activation, **settings):
    return Instances(nn.InstanceNorm2d(6, **settings), activation)


def with_weight(activation, norm=rows_standardized):
    return StandardizedWeight(Apply(norm), activation)


# Each net, what it normalizes by hand, and its epsilon.
OF_EACH_SAMPLE = {
    "eps=1": (lambda f: with_instance_norm(f, eps=1), 1.0),
    "eps of numpy": (lambda f: with_instance_norm(f, eps=np.float64(1e-5)), 1e-5),
    "single eps of numpy": (lambda f: with_instance_norm(f, eps=np.float32(0.5)), 0.5),
    "momentum=True": (lambda f: with_instance_norm(f, momentum=True), 1e-5),
    "a tensor": (lambda f: with_instance_norm(f, eps=torch.tensor(0.5)), 0.5),
    "no statistics": (lambda f: Instances(Apply(without_statistics), f), 1e-5),
    "aten": (lambda f: Instances(Apply(instance_of_aten), f), 1e-5),
    "vmap": (lambda f: Mapped(with_instance_norm(f)), 1e-5),
    "a thread": (lambda f: OnAThread(with_instance_norm(f)), 1e-5),
    "exported": (lambda f: exported(with_instance_norm(f)), 1e-5),
    "weights on a thread": (lambda f: OnAThread(with_weight(f)), None),
    "exported weights": (lambda f: exported(with_weight(f)), None),
}


def by_hand(activation, eps):
    if eps is None:
        return with_weight(activation, rows_by_hand)
    return Instances(Apply(functools.partial(instance_by_hand, eps=eps)), activation)


@pytest.mark.filterwarnings("ignore:.*(treespec|legacy|deprecated)")
@pytest.mark.parametrize("activation", [F.relu, F.silu], ids=["relu", "silu"])
@pytest.mark.parametrize("name", OF_EACH_SAMPLE)
def test_statistics_of_each_sample_on_stock_nodes(name, activation):
    """They are no batch's, and differentiated: both gradients, the penalty's, and what check says."""
    make, eps = OF_EACH_SAMPLE[name]
    (x, y), model, reference = data(n=4), make(activation), by_hand(activation, eps)
    image = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(image).gather(1, y[:, None]).sum(), image)
    assert relative_difference(input_gradients(model, x, y, criterion="logit")[0], expected) < 1e-9
    if name not in ("exported", "exported weights"):  # torch's exported modules have one mode
        assert relative_difference(saliency.gradient(model.eval(), x, y), expected) < 1e-9
    found = []
    for net in (model, reference):
        loss = InterpretableGradientLoss(net, lam=1.0)(x, y)
        found.append([loss, *gradients_of(loss, net)])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)
    report = str(check(model, x, y))
    assert "statistics of each sample: 1 layers" in report
    assert "batch statistics" not in report


@pytest.mark.parametrize("setting", ["eps", "momentum"])
@pytest.mark.parametrize(("number", "error"), [(Fraction(1, 3), TypeError), (10**400, OverflowError)], ids=str)
def test_numbers_that_stock_refuses(number, error, setting):
    x = data()[0].requires_grad_()
    for norm in (F.batch_norm, F.instance_norm):
        statistics = {"running_mean": torch.zeros(3).double(), "running_var": torch.ones(3).double()}
        for context in (contextlib.nullcontext(), fast_double_backward()):
            with context, pytest.raises(error):
                norm(x, **statistics, **{setting: number})


def test_rows_of_a_node_by_either_name(monkeypatch):
    h, found = data(n=4)[0].requires_grad_(), []
    for rows in (h, h[:1]):
        found.append(F.batch_norm(rows, None, None, training=True).grad_fn)
    assert [private.rows_of(node) for node in found] == [4, 1]
    take_away("_input_metadata", monkeypatch)
    assert [private.rows_of(node) for node in found] == [4, 1]


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d, functools.partial(nn.InstanceNorm2d, track_running_stats=True)])
def test_running_statistics_on_stock_nodes(layer, images):
    """Those of a batch, or of one row beside running ones, which inference uses: constants, on a thread as well."""
    found, (x, y) = [], data(n=images)
    for around in (OnAThread, lambda net: net):
        model = around(Instances(layer(6)))
        assert "batch statistics: 1 layers, constants" in str(check(model, x, y))
        found.append(input_gradients(model, x, y))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("criterion", ["log_prob", "cross_entropy"])
@pytest.mark.parametrize("activation", [F.relu, F.silu], ids=["relu", "silu"])
def test_gradient_penalties_on_the_gradient_of_the_penalty(activation, criterion):
    """Derivatives of higher order, as of a meta-learner, where they are apart from the user's pass and where not."""
    model, reference = pair_of_nets("BatchNorm2d", activation)
    x, y = data(n=5)
    delta, guided, _ = frozen.reference(reference, x, y, criterion)
    expected = gradients_of(frozen.penalty(delta, guided, "cos"), reference, create_graph=True)
    value = InterpretableGradientLoss(model, lam=1.0, criterion=criterion)(x, y)
    ours = gradients_of(value, model, create_graph=True)
    thirds = [
        gradients_of(sum((g * g).sum() for g in first if g.requires_grad), net)
        for first, net in ((ours, model), (expected, reference))
    ]
    assert_same_gradients(*thirds)


@pytest.mark.parametrize("activation", [F.relu, F.silu], ids=["relu", "silu"])
def test_gradient_in_the_images(activation):
    model, reference = pair_of_nets("BatchNorm2d", activation)
    (x, y), shift = data(n=5), torch.zeros(3, 1, 1, dtype=torch.float64, requires_grad=True)
    ours = InterpretableGradientLoss(model, lam=1.0, criterion="cross_entropy")(x + shift, y)
    image = x.clone().requires_grad_()
    v = torch.autograd.grad(F.cross_entropy(z := reference(image), y, reduction="sum"), z, create_graph=True)[0]
    with frozen.constant_statistics():
        (delta,) = torch.autograd.grad((reference(image) * v).sum(), image, create_graph=True, retain_graph=True)
    # v is a function of the images too, but is no part of what delta is the derivative of
    guided = frozen.reference(reference, x, y, "cross_entropy")[1]
    with frozen.constant_statistics():
        other = image.detach().requires_grad_()
        through_v = torch.autograd.grad(v, image, (w := torch.zeros_like(v)), retain_graph=True)[0]
        assert not w.any()
        assert not through_v.any()
        (delta,) = torch.autograd.grad((reference(other) * v).sum(), other, create_graph=True)
    value = frozen.penalty(delta, guided, "cos")
    expected = sum(torch.autograd.grad(value, [image, other], allow_unused=True, materialize_grads=True))
    found = torch.autograd.grad(ours, shift)[0]
    torch.testing.assert_close(found, expected.sum((0, 2, 3)).view(3, 1, 1), rtol=1e-9, atol=1e-12)


def test_delta_of_a_sample_does_not_depend_on_the_others_targets():
    model, (x, y) = small_net(), data(n=5)
    others = torch.cat([y[:1], (y[1:] + 1) % 4])
    for batch_norm in ("frozen", "coupled"):
        first, second = (input_gradients(model, x, each, batch_norm=batch_norm) for each in (y, others))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a[0], b[0]) == (batch_norm == "frozen")


def test_the_penalty_of_a_part_of_the_batch_is_its_part():
    """Of samples whose targets are ignored there is none; coupled, their delta is not even zero."""
    model, (x, y) = small_net(), data(n=5)
    kept = torch.tensor([True, False, True, True, False])
    of_part = InterpretableGradientLoss(model, "mse", lam=1.0)(x, torch.where(kept, y, -100))
    masked = lambda d, g: torch.where(kept, (d - g).square().mean((1, 2, 3)), 0) * 5 / 3  # noqa: E731
    expected = InterpretableGradientLoss(model, masked, lam=1.0)(x, y)
    torch.testing.assert_close(of_part, expected, rtol=1e-12, atol=0)
    assert_same_gradients(gradients_of(of_part, model), gradients_of(expected, model))
    assert input_gradients(model, x, torch.where(kept, y, -100), batch_norm="coupled")[0][1].any()


class Operations(TorchDispatchMode):
    """Counts what runs inside."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


PIECEWISE_LINEAR = [
    "tv resnet18",
    "tv densenet121",
    "tv googlenet",
    "tv mobilenet_v2",
    "timm cspresnet50",
    "timm dla46_c",
]


def operations_of_a_step(model, x, y, **settings):
    """Of the backward pass of the classification loss, of the penalty, and of both."""
    reg = InterpretableGradientLoss(model, lam=1.0, **settings)
    counts = []
    for classified, penalized in ((True, False), (False, True), (True, True)):
        with deterministic(), reg.shared_forward():
            logits = model(x)
        loss = F.cross_entropy(frozen.logits_of(logits), y) if classified else 0
        loss = loss + reg(x, y) if penalized else loss
        with Operations() as mode:
            loss.backward()
        counts.append(mode.counts)
    return counts


@pytest.mark.parametrize("name", [each for each in NAMES if each.values[0] in PIECEWISE_LINEAR])
def test_the_penalty_of_a_piecewise_linear_network_sends_nothing_into_its_forward_pass(name):
    """So the backward pass of both computes what the two do, and not what a sum in the middle would need."""
    model, size = architecture(name, training=True)
    x, y = data(n=3, size=size, classes=10)
    alone, penalty, both = operations_of_a_step(model, x, y)
    for heavy in ("convolution_backward", "convolution", "native_batch_norm_backward", "threshold_backward", "mm"):
        assert both[heavy] == alone[heavy] + penalty[heavy], heavy
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert penalty["convolution_backward"] <= convolutions  # one weight gradient each
    _, coupled, _ = operations_of_a_step(model, x, y, batch_norm="coupled")
    assert coupled["convolution_backward"] > 1.5 * convolutions


@pytest.mark.parametrize(("batch_norm", "reaches"), [("frozen", False), ("coupled", True)])
def test_no_gradient_of_the_penalty_arrives_at_an_activation(batch_norm, reaches):
    model, (x, y) = small_net(), data()
    reg, arrived = InterpretableGradientLoss(model, lam=1.0, batch_norm=batch_norm), []

    def watch(layer, args, h):
        h.register_hook(lambda gradient: arrived.append(layer))

    for layer in model[:-1]:
        layer.register_forward_hook(watch)
    with reg.shared_forward():
        model(x)
    value = reg(x, y)
    arrived.clear()
    value.backward()
    assert bool(arrived) == reaches


def test_two_losses_of_different_settings_on_one_forward_pass():
    (x, y), values, references = data(n=5), [], []
    settings = [{"batch_norm": "coupled"}, {"batch_norm": "frozen", "criterion": "cross_entropy"}, {"error": "mse"}]
    for activation in (F.relu, F.silu):
        model, single = pair_of_nets("BatchNorm2d", activation)
        first, second, third = (InterpretableGradientLoss(model, lam=1.0, **each) for each in settings)
        with first.shared_forward(), second.shared_forward(), third.shared_forward():
            logits = model(x)
        values = F.cross_entropy(logits, y) + second(x, y) + first(x, y) + third(x, y)
        references = F.cross_entropy(single(x), y)
        references = references + sum(InterpretableGradientLoss(single, lam=1.0, **each)(x, y) for each in settings)
        torch.testing.assert_close(values, references, rtol=1e-9, atol=0)
        assert_same_gradients(gradients_of(values, model), gradients_of(references, single))


@pytest.mark.cpu("a device has one thread for backward passes, which cannot wait for itself")
def test_a_backward_pass_in_the_middle_of_an_inner_one_is_not_frozen():
    """Another thread takes plain gradients of the very graph."""
    model, _ = pair_of_nets("BatchNorm2d", F.relu)
    (x, y), parameters, found = data(n=5), list(model.parameters()), []
    reg = InterpretableGradientLoss(model)
    with reg.shared_forward():
        logits = model(x)
    loss = F.cross_entropy(logits, y)
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    passes = []

    def interrupt(_):
        passes.append(threading.get_ident())
        if len(passes) == 2:  # of delta: the first is the guided one
            gradients = lambda: found.extend(torch.autograd.grad(loss, parameters, retain_graph=True))  # noqa: E731
            worker = threading.Thread(target=gradients)
            worker.start()
            worker.join()

    handle = logits.grad_fn.next_functions[1][0].register_prehook(interrupt)
    reg(x, y)
    handle.remove()
    assert len(passes) == 3
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [F.relu, F.silu], ids=["relu", "silu"])
def test_autocast(activation, dtype):
    model, reference = pair_of_nets("BatchNorm2d", activation)
    (x, y), model = data(n=5), model.float()
    delta, guided, _ = frozen.reference(reference, x, y)
    expected = gradients_of(frozen.penalty(delta, guided, "cos"), reference)
    reg, x = InterpretableGradientLoss(model, lam=1.0), x.float()
    with autocast(dtype):
        with reg.shared_forward():
            model(x)
        value = reg(x, y)
    ours = gradients_of(value, model)
    flat = [torch.cat([each.flatten().double() for each in found]) for found in (ours, expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99
