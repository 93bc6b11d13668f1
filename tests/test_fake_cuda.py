"""The forward pass of every replaced layer on fake CUDA tensors: dtype and strides as stock's, autocast or not."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from interpgrad import fast_double_backward
from interpgrad.double_backward import _REPLACEMENTS, attention


def there_are_fakes():
    """Torch 2.6 asks the driver, also for tensors that do not exist."""
    try:
        with FakeTensorMode(), torch.device("cuda"):
            nn.Conv1d(1, 1, 1)(torch.empty(1, 1, 1))
    except RuntimeError:
        return False
    return True


pytestmark = [
    pytest.mark.cpu("fake tensors stand in for the device"),
    pytest.mark.skipif(not there_are_fakes(), reason="no fake CUDA tensors without a driver in this torch"),
]

IMAGES = {1: (2, 8, 9), 2: (2, 8, 9, 9), 3: (2, 8, 5, 5, 5)}
# name -> (how to make the layer, shape of its input); layers with parameters are modules
LAYERS = {
    **{
        f"conv{dims}d": (lambda dims=dims: CONVOLUTIONS[dims](8, 4, 3, padding="same"), IMAGES[dims]) for dims in IMAGES
    },
    **{
        f"conv_transpose{dims}d": (lambda dims=dims: TRANSPOSED[dims](8, 4, 3, stride=2, bias=False), IMAGES[dims])
        for dims in IMAGES
    },
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), IMAGES[2]),
    **{f"batch_norm{n}d": (lambda n=n: NORMS[n](8), IMAGES[n]) for n in IMAGES},
    "batch_norm of (N, C)": (lambda: nn.BatchNorm1d(8), (4, 8)),
    "batch_norm without weight": (lambda: nn.BatchNorm2d(8, affine=False), IMAGES[2]),
    "instance_norm": (lambda: nn.InstanceNorm2d(8, affine=True), IMAGES[2]),
    "layer_norm": (lambda: nn.LayerNorm(8), (2, 9, 8)),
    "layer_norm without bias": (lambda: nn.LayerNorm([9, 9], bias=False), IMAGES[2]),
    "group_norm": (lambda: nn.GroupNorm(4, 8), IMAGES[2]),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, padding=1), IMAGES[2]),
    "avg_pool3d": (lambda: nn.AvgPool3d(2), IMAGES[3]),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(4), IMAGES[2]),
    "adaptive_avg_pool3d": (lambda: nn.AdaptiveAvgPool3d(2), IMAGES[3]),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 2, padding=1), IMAGES[2]),
    "max_pool3d": (lambda: nn.MaxPool3d(2), IMAGES[3]),
    "relu": (lambda: F.relu, IMAGES[2]),
    "relu_": (lambda: nn.ReLU(inplace=True), IMAGES[2]),
    "leaky_relu": (lambda: F.leaky_relu, IMAGES[2]),
    "leaky_relu_": (lambda: nn.LeakyReLU(inplace=True), IMAGES[2]),
    "relu6": (lambda: F.relu6, IMAGES[2]),
    "hardtanh": (lambda: F.hardtanh, IMAGES[2]),
    "gelu": (lambda: F.gelu, IMAGES[2]),
    "silu": (lambda: F.silu, IMAGES[2]),
    "hardsigmoid": (lambda: F.hardsigmoid, IMAGES[2]),
}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=FORMATS[x.dim()]) if x.dim() in FORMATS else x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda x: torch.cat([x, x])[::2],
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def autocast_on(device, dtype):
    """As torch.autocast, which refuses to begin where there is no such device."""
    torch.set_autocast_dtype(device, dtype or torch.float16)
    torch.set_autocast_enabled(device, dtype is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name, autocast):
    build, shape = LAYERS[name]
    replaced = set()

    class Counting(fast_double_backward):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            replaced.update({func} & _REPLACEMENTS.keys())
            return super().__torch_function__(func, types, args, kwargs)

    with FakeTensorMode(), torch.device("cuda"), autocast_on("cuda", autocast):
        for dtype, training, view in itertools.product(DTYPES, (True, False), VIEWS):
            layer = build()
            if isinstance(layer, nn.Module):
                layer.train(training)
                for tensor in [*layer.parameters(), *layer.buffers()]:
                    if tensor.is_floating_point() and autocast is None:
                        tensor.data = torch.empty_like(tensor, dtype=dtype)
            x = VIEWS[view](torch.empty(shape, dtype=dtype)).requires_grad_()
            # Batch norm's kernels allocate by x.suggest_memory_format(); their stand-ins keep any strides.
            suggested = x.contiguous() if "batch_norm" in name and view == "transposed" else x
            expected = layer(suggested.clone())  # a copy of the same strides: some work in place
            with Counting():
                found = layer(x.clone())
            about = dtype, training, view
            assert (found.dtype, found.device) == (expected.dtype, expected.device), about
            assert found.stride() == expected.stride(), about
    assert replaced


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_autocast_of_norms_on_every_accelerator(device):
    with FakeTensorMode(), autocast_on(device, torch.float16):
        x = torch.empty(IMAGES[2], dtype=torch.float16, device=device)
        for norm in (lambda: F.group_norm(x, 4), lambda: F.layer_norm(x, x.shape[1:])):
            with fast_double_backward():
                found = norm()
            assert found.dtype == norm().dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype):
    """All three passes: half precision takes another way to the scores there."""
    with FakeTensorMode(), torch.device("cuda"):
        q, k, v, g = (torch.empty(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(4))
        mask = torch.empty(9, 9, dtype=dtype, requires_grad=True)
        with fast_double_backward():
            y = F.scaled_dot_product_attention(q, k, v, mask)
        assert (y.dtype, y.device, y.shape) == (g.dtype, g.device, g.shape)
        q, k = (each.detach().flatten(0, 1) for each in (q, k))
        settings = attention._Settings(0.5, (2, 3, 9, 9), (mask.shape, mask.dtype))
        p = torch.empty(6, 9, 9, dtype=dtype)
        first = attention._backward(q, k, p, settings)
        context = SimpleNamespace(saved_tensors=(p, q, k, p, p), settings=settings)
        with torch.no_grad():
            second = attention._WeightsBackward.backward(context, *first)[:4]
        for found, like in zip((*first, *second), (q, k, mask, p, q, k, p), strict=True):
            assert (found.dtype, found.device, found.shape) == (like.dtype, like.device, like.shape)
