"""Convolution and batch norm under fast_double_backward against stock autograd, in double precision."""

import gc
import math
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from flops import count_flops
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import autocast, data, seeded, small_net
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from interpgrad import InterpretableGradientLoss, fast_double_backward
from interpgrad.double_backward.engine import Root

double = {"dtype": torch.float64}


def assert_close(ours, stock):
    assert (ours is None) == (stock is None)
    if stock is not None:
        torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-9 * max(1.0, float(stock.detach().abs().max())))


def derivatives(function, tensors, fast, seed=0):
    """The value, the first and all second derivatives of a function of tensors, None where there is none."""
    generator = seeded(seed)
    draw = lambda like: torch.randn(like.shape, generator=generator, **double)  # noqa: E731
    inputs = [each for each in tensors if each is not None and each.requires_grad]
    if fast:
        with fast_double_backward():
            y = function(*tensors)
    else:
        y = function(*tensors)
    g = draw(y).requires_grad_()
    first = torch.autograd.grad(y, inputs, g, create_graph=True)
    found = [y, *first]
    some_graph = [each for each in first if each.requires_grad]
    outer = [draw(each) for each in first]
    for wanted in (first[:1], first):  # the input gradient alone, as in a penalty; and all of them mixed
        pairs = [(d, a) for d, a in zip(wanted, outer, strict=False) if any(d is each for each in some_graph)]
        if pairs:
            outputs, a = zip(*pairs, strict=True)
            found += torch.autograd.grad(outputs, [g, *inputs], a, retain_graph=True, allow_unused=True)
    return found


def assert_same_derivatives(function, *tensors):
    for ours, stock in zip(
        derivatives(function, tensors, fast=True), derivatives(function, tensors, fast=False), strict=True
    ):
        if stock is None or not stock.any():
            assert ours is None or not (ours.abs() > 1e-9).any()
        else:
            assert_close(ours, stock)


@st.composite
def convolutions(draw):
    """A convolution that fits its input: the function, x, weight, bias."""
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.integers(1, 3))
    per_group_in, per_group_out = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    integers = lambda low, high: [draw(st.integers(low, high)) for _ in range(dims)]  # noqa: E731
    kernel, size, dilation = integers(1, 3), integers(3, 6), integers(1, 2)
    stride, padding = integers(1, 3), integers(0, 2)
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        settings["output_padding"] = [
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        ]
        out = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(
                size, stride, padding, dilation, kernel, settings["output_padding"], strict=True
            )
        ]
        assume(min(out) > 0)
    elif draw(st.booleans()):
        settings["stride"], settings["padding"] = 1, draw(st.sampled_from(["same", "valid"]))
        assume(
            settings["padding"] == "same"
            or all(n > d * (k - 1) for n, d, k in zip(size, dilation, kernel, strict=True))
        )
    generator = seeded(draw(st.integers(0, 1000)))
    tensor = lambda *shape: torch.randn(*shape, generator=generator, **double)  # noqa: E731
    channels = groups * per_group_in
    x = tensor(draw(st.integers(1, 3)), channels, *size)
    shape = (channels, per_group_out) if transposed else (groups * per_group_out, per_group_in)
    weight, bias = tensor(*shape, *kernel), tensor(groups * per_group_out) if draw(st.booleans()) else None
    for each in (x, weight, bias):
        if each is not None:
            each.requires_grad_(draw(st.sampled_from([True, True, True, False])))
    assume(any(each is not None and each.requires_grad for each in (x, weight, bias)))
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
    return (lambda x, weight, bias: function(x, weight, bias, **settings)), x, weight, bias


@settings(max_examples=300)
@given(convolutions())
def test_convolutions(problem):
    function, *tensors = problem
    assert_same_derivatives(function, *tensors)


@st.composite
def batch_norms(draw):
    dims, training = draw(st.integers(0, 3)), draw(st.booleans())
    shape = (draw(st.integers(2, 4)), draw(st.integers(1, 3)), *(draw(st.integers(1, 4)) for _ in range(dims)))
    generator = seeded(draw(st.integers(0, 1000)))
    tensor = lambda *size: torch.randn(*size, generator=generator, **double)  # noqa: E731
    channels = shape[1]
    weight, bias = (tensor(channels), tensor(channels)) if draw(st.booleans()) else (None, None)
    running = (
        (tensor(channels), tensor(channels).square() + 0.1) if not training or draw(st.booleans()) else (None, None)
    )
    x = tensor(*shape)
    x.requires_grad_()
    for each in (weight, bias):
        if each is not None:
            each.requires_grad_(draw(st.booleans()))

    def function(x, weight, bias):
        copies = [None if each is None else each.clone() for each in running]
        return F.batch_norm(x, *copies, weight, bias, training, momentum=0.3, eps=1e-3)

    return function, x, weight, bias


@settings(max_examples=300)
@given(batch_norms())
def test_batch_norms(problem):
    function, *tensors = problem
    assert_same_derivatives(function, *tensors)


@st.composite
def row_norms(draw):
    """A layer norm or a group norm: the function, x, weight, bias."""
    generator = seeded(draw(st.integers(0, 1000)))
    tensor = lambda *size: torch.randn(*size, generator=generator, **double)  # noqa: E731
    dims = draw(st.integers(0, 3))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), *(draw(st.integers(1, 4)) for _ in range(dims)))
    if draw(st.booleans()):
        rows = shape[draw(st.integers(1, len(shape) - 1)) :]
        parameters, function = rows, lambda x, w, b: F.layer_norm(x, rows, w, b, eps=1e-3)
    else:
        groups = draw(st.integers(1, 3))
        shape = (shape[0], groups * shape[1], *shape[2:])
        assume(math.prod(shape) > shape[0] * groups)
        parameters, function = shape[1:2], lambda x, w, b: F.group_norm(x, groups, w, b, eps=1e-3)
    x = tensor(*shape)
    if draw(st.booleans()):
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if len(shape) == 4 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    weight = tensor(*parameters) if draw(st.booleans()) else None
    # stock's double backward of a layer norm with a bias and no weight raises
    bias = tensor(*parameters) if weight is not None and draw(st.booleans()) else None
    x.requires_grad_()
    for each in (weight, bias):
        if each is not None:
            each.requires_grad_(draw(st.booleans()))
    return function, x, weight, bias


@settings(max_examples=300)
@given(row_norms())
def test_row_norms(problem):
    function, *tensors = problem
    assert_same_derivatives(function, *tensors)


def fast(function):
    def inside(*tensors):
        with fast_double_backward():
            return function(*tensors)

    return inside


@pytest.mark.parametrize("transposed", [False, True])
def test_third_derivatives_of_convolution(transposed):
    """gradgradcheck of the data gradient, itself a first derivative: what falls to stock formulas."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 2, 4, 4, **double, requires_grad=True), torch.randn(2, 2, 3, 3, **double, requires_grad=True)
    conv = fast(lambda x, w: (F.conv_transpose2d if transposed else F.conv2d)(x, w, padding=1))
    assert gradcheck(conv, (x, w))
    assert gradgradcheck(conv, (x, w))
    data_gradient = lambda x, w: torch.autograd.grad(conv(x * 1, w).pow(3).sum(), x, create_graph=True)[0]  # noqa: E731
    assert gradgradcheck(data_gradient, (x, w))


@pytest.mark.parametrize("training", [True, False])
def test_third_derivatives_of_batch_norm(training):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 2, 2, **double, requires_grad=True)
    w, b = torch.randn(2, **double, requires_grad=True), torch.randn(2, **double, requires_grad=True)
    mean, var = torch.randn(2, **double), torch.rand(2, **double) + 0.5
    norm = fast(lambda x, w, b: F.batch_norm(x, mean.clone(), var.clone(), w, b, training, 0.1, 0.1))
    assert gradcheck(norm, (x, w, b))
    assert gradgradcheck(norm, (x, w, b))
    data_gradient = lambda x, w, b: torch.autograd.grad(norm(x, w, b).pow(3).sum(), x, create_graph=True)[0]  # noqa: E731
    assert gradgradcheck(data_gradient, (x, w, b))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_third_derivatives_of_row_norms(norm):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, **double, requires_grad=True)
    shape = (4, 3) if norm == "layer" else (4,)
    w, b = torch.randn(shape, **double, requires_grad=True), torch.randn(shape, **double, requires_grad=True)
    stock = (
        (lambda x, w, b: F.layer_norm(x, shape, w, b)) if norm == "layer" else lambda x, w, b: F.group_norm(x, 2, w, b)
    )
    ours = fast(stock)
    assert gradcheck(ours, (x, w, b))
    assert gradgradcheck(lambda x, b: ours(x, None, b), (x, b))  # of layer norms, stock raises here
    assert gradgradcheck(ours, (x, w, b))
    data_gradient = lambda x, w, b: torch.autograd.grad(ours(x, w, b).pow(3).sum(), x, create_graph=True)[0]  # noqa: E731
    assert gradgradcheck(data_gradient, (x, w, b))


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_row_norms_with_a_bias_alone(kind):
    """Kernels of CUDA, and of releases before 2.12, give group norm's bias no gradient without a weight."""
    norms = {
        "layer": ((4, 3), lambda x, w, b: F.layer_norm(x, (4, 3), w, b)),
        "group": ((4,), lambda x, w, b: F.group_norm(x, 2, w, b)),
    }
    shape, norm = norms[kind]
    x, b = torch.randn(2, 4, 3, **double, requires_grad=True), torch.randn(shape, **double, requires_grad=True)
    expected, y = norm(x, torch.ones(shape, **double), b).pow(3).sum(), fast(norm)(x, None, b).pow(3).sum()
    for create_graph in (False, True):
        first, second = (
            torch.autograd.grad(each, (x, b), retain_graph=True, create_graph=create_graph) for each in (expected, y)
        )
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-11)
    first, second = (torch.autograd.grad(each[0].pow(2).sum(), x) for each in (first, second))
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-11)


POINTWISE = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x * 1),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -2, 0.5),
    "hardtanh in place": lambda x: F.hardtanh_(x * 1),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu in place": lambda x: F.leaky_relu_(x * 1, 0.2),
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "average pool": lambda x: F.avg_pool2d(x.view(1, 1, 5, 7), 3, 2, 1),
    "average pool, given names": lambda x: F.avg_pool2d(
        x.view(1, 1, 5, 7), kernel_size=(2, 3), ceil_mode=True, divisor_override=3
    ),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x.view(1, 1, 5, 7), (None, 2)),
    "adaptive average pool, global": lambda x: F.adaptive_avg_pool2d(x.view(1, 1, 5, 7), 1),
    "max pool": lambda x: F.max_pool2d(x.view(1, 1, 5, 7), 3, 2, padding=1),
    "max pool of torch, without a batch": lambda x: torch.max_pool2d(x.view(1, 5, 7), 2, dilation=2),
    "max pool with indices": lambda x: F.max_pool2d(x.view(1, 1, 5, 7), 2, return_indices=True)[0],
    "max pool in three dimensions": lambda x: F.max_pool3d(x.view(1, 1, 1, 5, 7), (1, 2, 2)),
    "average pool in three dimensions": lambda x: F.avg_pool3d(x.view(1, 1, 1, 5, 7), (1, 2, 2)),
    "adaptive average pool in three dimensions": lambda x: F.adaptive_avg_pool3d(x.view(1, 1, 1, 5, 7), (1, 2, 3)),
    "root": Root.apply,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions(name):
    torch.manual_seed(0)
    x = (4 * torch.randn(5, 7, **double)).requires_grad_()
    function = fast(POINTWISE[name])
    assert gradcheck(function, x)
    assert gradgradcheck(function, x)
    slope = lambda x: torch.autograd.grad(function(x * 1).pow(3).sum(), x, create_graph=True)[0]  # noqa: E731
    assert gradgradcheck(slope, x)
    if name not in ("hardsigmoid", "root"):  # of which stock has no double backward, or does not know
        assert_same_derivatives(POINTWISE[name], x)


MODULES = {
    "circular padding": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect padding": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "same padding, even kernel": nn.Conv2d(3, 4, 4, padding="same"),
    "transposed": nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3, bias=False),
    "patches": nn.Conv2d(3, 4, (2, 4), stride=(2, 4)),
    "patches that do not fit": nn.Conv2d(3, 4, 3, stride=3),
    "batch norm": nn.BatchNorm2d(3),
    "batch norm in evaluation": nn.BatchNorm2d(3).eval(),
    "cumulative average": nn.BatchNorm2d(3, momentum=None),
    "no running statistics": nn.BatchNorm2d(3, track_running_stats=False).eval(),
    "not affine": nn.BatchNorm2d(3, affine=False),
    "instance norm": nn.InstanceNorm2d(3, affine=True),
    "instance norm with running statistics": nn.InstanceNorm2d(3, track_running_stats=True),
    "instance norm in evaluation": nn.InstanceNorm2d(3, track_running_stats=True).eval(),
    "norm and in-place activation": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, device):
    module = MODULES[name].double().to(device)
    x = data()[0].requires_grad_()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    results = []
    for is_fast in (False, True):
        module.load_state_dict(state)
        results.append((derivatives(module, (x,), is_fast), dict(module.named_buffers())))
        buffers = [{key: value.clone() for key, value in buffers.items()} for _, buffers in results]
    for stock, ours in zip(results[0][0], results[1][0], strict=True):
        assert_close(ours, stock)
    torch.testing.assert_close(buffers[0], buffers[1])


@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid(inplace):
    """Of which stock has no double backward: against the same function in arithmetic."""
    torch.manual_seed(0)
    weights = torch.randn(5, 5, **double, requires_grad=True)
    same_as = lambda x, w: (((x @ w) / 6 + 0.5).clamp(0, 1) ** 2).sum(1)  # noqa: E731
    ours = lambda x, w: (F.hardsigmoid(x @ w, inplace) ** 2).sum(1)  # noqa: E731
    x = (4 * torch.randn(6, 5, **double)).requires_grad_()
    tensors = (x, weights)
    for value, expected in zip(derivatives(ours, tensors, True), derivatives(same_as, tensors, False), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)  # stock's 1 / 6 is one of single precision
    first = [torch.autograd.grad(fast(ours)(x, weights).sum(), x)[0], torch.autograd.grad(ours(x, weights).sum(), x)[0]]
    assert torch.equal(*first)


class RowNorms(nn.Module):
    """A group norm and a layer norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.group, self.layer = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.group(self.conv(x)).relu()
        return self.head(self.layer(h.flatten(2).transpose(1, 2)).mean(1))


def row_norm_net():
    return RowNorms().double()


NETS = pytest.mark.parametrize("net", [small_net, row_norm_net])


def penalty_gradients(model, x, is_fast, repeat=1):
    """Parameter gradients of a gradient penalty, of the loss beside it, several backward passes over one graph."""
    x = x.clone().requires_grad_()
    if is_fast:
        with fast_double_backward():
            y = model(x)
    else:
        y = model(x)
    (delta,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    loss = delta.square().sum() + y.sum()
    parameters = [each for each in model.parameters() if each.requires_grad]
    for _ in range(repeat):
        result = torch.autograd.grad(loss, parameters, retain_graph=True)
    return result


class Twice(nn.Module):
    """One convolution used twice (tied weights), its output used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        h = self.norm(self.conv(x))
        return self.conv(F.relu(h)) + h + h.sigmoid()


FROZEN = [
    (small_net, ()),
    (small_net, ("0.weight",)),
    (small_net, ("1.weight", "1.bias")),
    (small_net, ("0.weight", "0.bias", "4.weight")),
    (row_norm_net, ()),
    (row_norm_net, ("conv.weight",)),
    (row_norm_net, ("group.weight", "layer.bias")),
    (row_norm_net, ("layer.weight", "group.weight")),
]


@pytest.mark.parametrize(("net", "frozen"), FROZEN)
def test_frozen_parameters(net, frozen):
    model, (x, _) = net(), data()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for ours, stock in zip(penalty_gradients(model, x, True), penalty_gradients(model, x, False), strict=True):
        assert_close(ours, stock)


@pytest.mark.parametrize("repeat", [1, 3])
def test_tied_weights_outputs_used_twice_and_retained_graphs(repeat):
    model, (x, _) = Twice().double(), data()
    for ours, stock in zip(penalty_gradients(model, x, True, repeat), penalty_gradients(model, x, False), strict=True):
        assert_close(ours, stock)


@NETS
def test_first_derivatives_are_bit_for_bit_those_of_stock(net):
    model, (x, y) = net().float(), data()
    results = []
    for is_fast in (False, True):
        model.zero_grad()
        if is_fast:
            with fast_double_backward():
                logits = model(x.float())
        else:
            logits = model(x.float())
        F.cross_entropy(logits, y).backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for stock, ours in zip(*results, strict=True):
        assert torch.equal(stock, ours)


def test_contexts_nest_interleave_and_restore():
    conv, (x, _) = nn.Conv2d(3, 4, 3).double(), data()

    def replaced():
        y = conv(x)  # whose node lives as long
        return y.grad_fn.name() == "_ConvolutionBackward"

    assert not replaced()
    with fast_double_backward() as outer:
        assert replaced()
        with fast_double_backward():
            assert replaced()
        assert replaced()
        with pytest.raises(RuntimeError, match="size of tensor"), fast_double_backward():
            conv(x) + torch.zeros(7, **double)
        assert replaced()
        with torch.no_grad():
            assert conv(x).grad_fn is None
    assert not replaced()
    first, second = fast_double_backward(), fast_double_backward()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert replaced()
    second.__exit__(None, None, None)
    assert not replaced()
    with outer:
        assert replaced()


def test_other_threads_are_left_alone():
    conv, (x, _) = nn.Conv2d(3, 4, 3).double(), data()
    names = []
    with fast_double_backward():
        thread = threading.Thread(target=lambda: names.append(conv(x).grad_fn.name()))
        thread.start()
        thread.join()
    assert names == ["ConvolutionBackward0"]


def test_errors_of_stock_are_kept():
    x, _ = data()
    with fast_double_backward():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm1d(3).double()(torch.randn(1, 3, **double, requires_grad=True))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, (3, 3))
        with pytest.raises(RuntimeError, match="divisible"):
            F.group_norm(x, 2)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.group_norm(x[:1, :, :1, :1], 3)
        with pytest.raises(RuntimeError, match="channels"):
            nn.Conv2d(5, 4, 3).double()(x)
        weight = torch.randn(4, 3, 3, 3, **double, requires_grad=True)
        with pytest.raises(RuntimeError, match="not supported for strided"):
            F.conv2d(x, weight, stride=2, padding="same")
        with pytest.raises(RuntimeError, match="Invalid padding string"):
            F.conv2d(x, weight, padding="some")


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)], ids=["no batch dimension", "empty batch"])
def test_unbatched_and_empty_inputs(shape):
    conv = nn.Conv2d(3, 4, 3).double()
    assert_same_derivatives(conv, torch.randn(shape, **double, requires_grad=True))


def test_memory_formats_and_views():
    """Channels last stays channels last, where stock's kernels have it; strided views are as good as copies."""
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)).double().to(memory_format=torch.channels_last)
    )
    x = data(n=4)[0].to(memory_format=torch.channels_last).requires_grad_()
    stock = model(x)
    (expected,) = torch.autograd.grad(stock.pow(2).sum(), x, create_graph=True)
    with fast_double_backward():
        y = model(x)
    (delta,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    assert y.is_contiguous(memory_format=torch.channels_last) or not x.is_cpu
    assert (y.stride(), delta.stride()) == (stock.stride(), expected.stride())
    assert_same_derivatives(model, x)
    view = torch.randn(4, 8, 8, 6, **double).permute(0, 3, 1, 2)[:, ::2]
    assert_same_derivatives(model, view.detach().requires_grad_())


@NETS
def test_meta_tensors(net):
    model, x = net().to("meta"), torch.empty(3, 3, 8, 8, device="meta", **double)
    gradients = penalty_gradients(model, x, is_fast=True)
    assert [each.shape for each in gradients] == [each.shape for each in model.parameters()]


@NETS
def test_fake_tensors(net):
    model = net()
    with FakeTensorMode(allow_non_fake_inputs=True):
        gradients = penalty_gradients(model, torch.empty(3, 3, 8, 8, **double), is_fast=True)
        assert [each.shape for each in gradients] == [each.shape for each in model.parameters()]


@NETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_stock_autocast(dtype, net):
    """The same dtypes at every step, and values as close as half precision allows."""
    model, x = net().float(), data(n=8)[0].float()
    results = []
    for is_fast in (True, False):
        with autocast(dtype):
            results.append(penalty_gradients(model, x, is_fast))
    for ours, stock in zip(*results, strict=True):
        assert ours.dtype == stock.dtype
    ours, stock = (torch.cat([each.flatten() for each in result]) for result in results)
    if not stock.isfinite().all():  # stock's second derivative of layer norm overflows in float16
        stock = torch.cat([each.flatten() for each in penalty_gradients(model, x, False)])
    assert F.cosine_similarity(ours, stock, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("net", "training"), [(small_net, True), (small_net, False), (row_norm_net, True)])
def test_models_in_half_precision(dtype, net, training):
    model, x = net().to(dtype).train(training), data(n=8)[0].to(dtype)
    exact = torch.cat([each.flatten() for each in penalty_gradients(net().train(training), x.double(), False)])
    ours = torch.cat([each.flatten() for each in penalty_gradients(model, x, True)]).double()
    stock = torch.cat([each.flatten() for each in penalty_gradients(model, x, False)]).double()
    error = lambda value: float((value - exact).norm() / exact.norm())  # noqa: E731
    # stock's second derivative of layer norm overflows in float16
    assert error(ours) < (1.5 * error(stock) if stock.isfinite().all() else 0.02)


def test_checkpointed_layers_are_left_to_stock():
    """They are recomputed outside of the context, so they must have run stock operations inside."""
    model, (x, _) = small_net(), data()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    for ours, stock in zip(penalty_gradients(Checkpointed(), x, True), penalty_gradients(model, x, False), strict=True):
        assert_close(ours, stock)


def test_no_reference_cycles():
    """The graph is freed with its last user, not by the garbage collector."""
    model, (x, _) = small_net(), data()
    gc.collect()
    gc.disable()
    try:
        with fast_double_backward():
            y = model(x.requires_grad_())
        (delta,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        node = weakref.ref(delta.grad_fn)
        delta.sum().backward()
        del y, delta
        assert node() is None
    finally:
        gc.enable()


def saved_bytes(model, x, is_fast):
    """Bytes kept for the double backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks:
        if is_fast:
            with fast_double_backward():
                y = model(x)
        else:
            y = model(x)
        torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    return sum(storages.values())


@NETS
def test_saves_no_more_than_stock(net):
    model, x = net().train(), data(n=16)[0]
    assert saved_bytes(model, x, is_fast=True) <= saved_bytes(model, x, is_fast=False)


def cifar_resnet18():
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


COUNTED = {
    "resnet18": (cifar_resnet18, 32),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=10), 32),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=10), 32),
    "resnext50_32x4d": (lambda: torchvision.models.resnext50_32x4d(num_classes=10), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
@pytest.mark.parametrize("name", COUNTED)
def test_counted_flops_of_a_regularized_step(name, batch_norm):
    build, size = COUNTED[name]
    model, x, y = build().train(), torch.randn(2, 3, size, size), torch.tensor([1, 2])
    reg = InterpretableGradientLoss(model, batch_norm=batch_norm)
    with count_flops() as plain:
        F.cross_entropy(model(x), y).backward()
    with count_flops() as regularized:
        with reg.shared_forward():
            logits = model(x)
        (F.cross_entropy(logits, y) + reg(x, y)).backward()
    with count_flops() as own_forward:
        (F.cross_entropy(model(x), y) + reg(x, y)).backward()
    with count_flops() as forward, torch.no_grad():
        model(x)
    first_layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with count_flops() as first, torch.no_grad():
        first_layer(x)
    linear = [2 * len(x) * module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    # Nobody needs the first layer's data gradient in an ordinary backward pass; only delta and its guided twin do.
    # Nobody needs the gradient for the derivative at the logits, which is a constant.
    plain, regularized, own_forward, forward, first = (
        counter.get_total_flops() for counter in (plain, regularized, own_forward, forward, first)
    )
    assert plain == 3 * forward - first
    assert regularized == 7 * forward - first - linear[-1]
    assert 7 / 3 <= regularized / plain <= 2.40
    # In the plain call's own graph nothing of the penalty flows back through the forward pass, frozen; coupled, it does
    # from the last batch norm on.
    back = 0 if batch_norm == "frozen" else 2 * (forward - sum(linear)) - first
    assert own_forward == regularized + forward + back


@pytest.mark.parametrize(("batch_norm", "passes"), [("frozen", 9), ("coupled", 7)])
def test_counted_flops_where_the_second_derivative_is_taken_apart(batch_norm, passes):
    """Of a network of batch norm, smooth activations and gates."""
    model, x, y = torchvision.models.efficientnet_b0(num_classes=10), torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    reg = InterpretableGradientLoss(model, batch_norm=batch_norm)
    with count_flops() as forward, torch.no_grad():
        model(x)
    with count_flops() as regularized:
        with reg.shared_forward():
            logits = model(x)
        (F.cross_entropy(logits, y) + reg(x, y)).backward()
    assert regularized.get_total_flops() / forward.get_total_flops() == pytest.approx(passes, abs=0.1)
