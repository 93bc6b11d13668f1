"""What stock takes is taken inside of fast_double_backward; what it refuses is refused, with the same type of error.

Calls are written as text, which names the test: of `x` (2, 3, 8, 8), and of what `NAMES` has.
"""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpgrad import fast_double_backward, graph


def wave(*shape):
    return torch.arange(1, 1 + math.prod(shape), dtype=torch.float64).sin().view(shape).clone()  # no view


def autocast(function, *tensors):
    with torch.autocast("cpu", torch.bfloat16):
        return function(*tensors)


NAMES = {
    "F": F,
    "autocast": autocast,
    "math": math,
    "nn": nn,
    "numpy": numpy,
    "torch": torch,
    "wave": wave,
    "w": wave(3, 3, 2, 2),
    "b": wave(3),
    "mean": wave(3),
    "var": wave(3).exp(),
}


def each(calls, values):
    return [call.format(value) for call in calls for value in values]


SIZES = each(
    (
        "F.conv2d(x, w, stride={})",
        "F.conv2d(x, w, padding={})",
        "F.conv2d(x, w, dilation={}, padding='same')",
        "F.conv_transpose2d(x, w, stride=3, output_padding={})",
        "F.avg_pool2d(x, {})",
        "F.avg_pool2d(x, 2, {})",
        "F.max_pool2d(x, {})",
        "F.max_pool2d(x, 2, {})",
        "F.max_pool2d(x, 2, dilation={})",
        "F.max_pool3d(x, 2, {})",
        "F.adaptive_avg_pool2d(x, {})",
        "F.adaptive_avg_pool3d(x, {})",
    ),
    (
        *("numpy.int64(2)", "(numpy.int64(2), 2)", "torch.tensor(2)", "[torch.tensor(2)] * 2", "numpy.array([2, 2])"),
        *("torch.tensor([2, 2])", "range(2, 4)", "torch.Size([2, 2])", "True", "(True, True)", "2.0", "(2.0, 2.0)"),
        *("[2]", "[None]", "[]", "None", "0", "(0, 2)", "-1", "(-1, 2)", "(2, 2, 2)", "numpy.int64(0)", "False"),
    ),
)
NUMBERS = each(
    (
        "F.leaky_relu(x, {})",
        "F.leaky_relu(x * 1, {}, inplace=True)",
        "F.leaky_relu_((x * 1)[1], {})",
        "F.hardtanh(x, {}, 1)",
        "F.hardtanh_(x * 1, -1, {})",
        "F.hardtanh((x * 1)[1], {}, 1, True)",
        "F.elu_((x * 1)[1], {})",
        "F.celu((x * 1)[1], {}, inplace=True)",
        "F.batch_norm(x, mean, var, training=True, eps={})",
        "F.batch_norm(x, mean, var, eps={})",
        "F.batch_norm(x, mean, var, training=True, momentum={})",
        "F.instance_norm(x, eps={})",
        "F.instance_norm(x, mean, var, momentum={})",
        "F.group_norm(x, 3, eps={})",
        "F.layer_norm(x, (8,), eps={})",
    ),
    (
        *("torch.tensor(0.2)", "torch.tensor(0.2, requires_grad=True)", "torch.tensor([0.2])", "numpy.float32(0.2)"),
        *("numpy.int64(1)", "1", "True", "None", "'0.2'", "0.2j", "math.nan", "-0.5", "math.inf", "0", "-1e-9"),
    ),
)
FLAGS = each(
    (
        "F.batch_norm(x, mean, var, training={})",
        "F.instance_norm(x, mean, var, use_input_stats={})",
        "F.avg_pool2d(x, 3, ceil_mode={})",
        "F.avg_pool2d(x, 3, count_include_pad={})",
        "F.max_pool2d(x, 3, ceil_mode={})",
        "F.relu(x * 1, inplace={})",
    ),
    ("1", "None", "numpy.True_", "torch.tensor(True)"),
)
PARAMETERS = each(
    (
        "F.conv2d(x, w, {})",
        "F.conv_transpose2d(x, w, {})",
        "autocast(F.conv2d, x.float(), w.float(), {})",
        "F.batch_norm(x, mean, var, {})",
        "F.batch_norm(x, {}, var)",
        "F.batch_norm(x, mean, {}, training=True)",
        "F.instance_norm(x, mean, var, b, {})",
        "F.instance_norm(x, {}, var, use_input_stats=True)",
        "torch.instance_norm(x, None, None, mean, {}, False, 0.1, 1e-5, True)",
        "F.group_norm(x, 1, {})",
        "F.layer_norm(x, (8,), wave(8), {})",
    ),
    (
        *("b.float()", "b.half()", "b.long()", "b * 1j", "wave(4)", "b[:, None]", "b.numpy()", "1.0"),
        *("b.clone().requires_grad_()", "b.clone().requires_grad_() * 1"),
    ),
)
IN_PLACE = each(
    ("F.{}(x, inplace=True)", "F.{}(x[:1], inplace=True)", "F.{}((x * 1)[1], inplace=True)"),
    ("relu", "relu6", "leaky_relu", "hardtanh", "silu", "hardsigmoid", "elu", "celu", "selu", "hardswish", "mish"),
)
OTHERS = [
    "F.conv1d(x, w)",
    "F.conv_transpose1d(x, w)",
    "F.conv3d(x, wave(3, 2, 2, 2, 2))",
    "F.conv2d(x, wave(3, 3, 2), padding='same')",
    "F.conv2d(x, wave(3, 3, 2, 2, 2), padding='same')",
    "F.conv2d(x, w, padding='same', dilation=(1, 1, 1))",
    "F.conv2d(x, w, groups=numpy.int64(1))",
    "F.adaptive_avg_pool2d(x[0, 0], (2, 2))",
    "F.adaptive_avg_pool3d(x[0], (2, 2, 2))",
    "F.avg_pool2d(x, 2, divisor_override=numpy.int64(3))",
    "F.instance_norm(x, use_input_stats=False)",
    "torch.instance_norm(x, None, None, None, None, False, 0.1, 1e-5, True)",
    "F.instance_norm(x[0, 0])",
    "F.instance_norm(x[0, 0, 0, 0])",
    "torch.batch_norm(x, None, None, mean, var, True, 0.1, 0.0, True)",
    "F.group_norm(x, 3.0)",
    "F.group_norm(x, True)",
    "F.group_norm(x, numpy.int64(3))",
    "F.layer_norm(x, numpy.array([8]))",
    "F.layer_norm(x, torch.tensor([8]))",
    "F.layer_norm(x, (8.0,))",
    "F.elu_((x * 1)[1], 0.5, 2.0, 3.0)",
    "F.elu_((x * 1)[1], alpha=0.5, scale=2.0, input_scale=3.0)",
    "F.hardtanh(x, 1, -1)",
    "F.hardtanh((x * 1)[1], 1, -1, True)",
    "F.hardtanh_((x * 1)[1], 1, -1)",
    "x.relu_()",
    "F.threshold_((x * 1)[1], numpy.float64(0.1), 2)",
    "(x * 1)[1].clamp_(torch.zeros(8).double(), torch.ones(8).double())",
    "nn.LazyConv2d(3, 2).double()(x)",
    "nn.LazyBatchNorm2d().double()(x)",
    "nn.LazyInstanceNorm2d(affine=True).double()(x)",
]
CALLS = SIZES + NUMBERS + FLAGS + PARAMETERS + IN_PLACE + OTHERS


def outcome(call, inside):
    """The value, the image as it is afterwards, the first and second derivative; up to an error's type."""
    x = wave(2, 3, 8, 8).requires_grad_()
    names = {name: value.clone() if isinstance(value, Tensor) else value for name, value in NAMES.items()} | {"x": x}
    torch.manual_seed(0)
    found = []
    try:
        if inside:
            with fast_double_backward():
                y = eval(call, names)
        else:
            y = eval(call, names)
        found += [y.detach().clone(), names["mean"], names["var"], x.detach()]
        (first,) = torch.autograd.grad((y - 0.3).pow(3).sum(), x, create_graph=True)
        found.append(first.detach())
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    except Exception as error:
        return [*(found or [x.detach()]), type(error)]
    return found


@pytest.mark.cpu("errors of kernels differ, on a GPU")
@pytest.mark.parametrize("call", CALLS)
def test_same_as_stock(call):
    stock, ours = outcome(call, inside=False), outcome(call, inside=True)
    if len(stock) == 6 and isinstance(stock[-1], type):  # of which stock has no second derivative
        stock, ours = stock[:5], ours[:5]
    assert len(stock) == len(ours)
    for value, expected in zip(ours, stock, strict=True):
        if isinstance(expected, Tensor):
            precise = 1e-9 if expected.dtype == torch.float64 else 1e-3
            scale = max(1.0, float(expected.double().abs().nan_to_num(0).max())) if expected.numel() else 1.0
            torch.testing.assert_close(value, expected, rtol=0, atol=precise * scale, equal_nan=True)
        else:
            assert value is expected


ON_VIEWS = {
    "F.leaky_relu_((x * 1)[1], torch.tensor(0.2))": "LeakyRelu",
    "F.leaky_relu((x * 1)[1], numpy.float32(0.2), True)": "LeakyRelu",
    "F.hardtanh_((x * 1)[1], -1, numpy.int64(1))": "Hardtanh",
    "F.elu_((x * 1)[1], 0.5, 2.0, 3.0)": "Elu",
    "F.elu((x * 1)[1], numpy.float32(0.5), True)": "Elu",
    "(x * 1)[1].clamp_(min=torch.tensor(0.0))": "Clamp",
}


@pytest.mark.parametrize("call", ON_VIEWS)
def test_activations_on_views_are_met(call):
    """Also where they are left to stock, whose graph hides them."""
    x = wave(2, 3, 8, 8).requires_grad_()
    with fast_double_backward():
        y = eval(call, NAMES | {"x": x})
    assert ON_VIEWS[call] in graph.operations(y, until=x)
