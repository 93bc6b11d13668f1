"""The networks of the tests: small, hand-written, in float64."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Torch's own: the streams of a CPU lack what FSDP2 asks of them, in torch 2.6.
FSDP2_RUNS = hasattr(torch.cpu.Stream, "record_event")
fsdp2_runs = pytest.mark.skipif(not FSDP2_RUNS, reason="no FSDP2 on CPUs in this torch")


def seeded(seed):
    """A generator of the tests' draws."""
    return torch.Generator("cpu").manual_seed(seed)


def autocast(dtype):
    """Mixed precision on the device of the tests."""
    return torch.autocast(torch.get_default_device().type, dtype, enabled=dtype != torch.float32)


def data(n=3, size=8, classes=4, seed=0):
    generator = seeded(seed)
    x = torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Checkpointed(nn.Module):
    """The whole model recomputed in the backward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


def small_net(seed=0, classes=4, inplace=False):
    """Convolutions, batch norm with non-trivial statistics, module ReLUs only."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(inplace),
        nn.Linear(16, classes),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
    return net


def relu_twice(h, relu):
    """A tensor that feeds a ReLU and a skip connection: the sum of both gradients must not be clamped."""
    return relu(h) + 0.5 * h


# Every spelling of a rectifier of the piecewise-linear family, and the same function with the plain F op (whose
# backward the ATen-level oracle knows). Each takes the tensor to rectify, a fresh one.
_SHARED = nn.ReLU()


def on_slice(inplace):
    def rectify(h):
        half = h.shape[1] // 2
        inplace(h[:, :half])
        return h

    return rectify


def _slice_reference(op):
    def rectify(h):
        half = h.shape[1] // 2
        return torch.cat([op(h[:, :half]), h[:, half:]], 1)

    return rectify


SPELLINGS = {
    "nn.ReLU": (nn.ReLU(), F.relu),
    "nn.ReLU inplace": (nn.ReLU(inplace=True), F.relu),
    "nn.ReLU made inside forward": (lambda h: nn.ReLU(inplace=True)(h), F.relu),
    "one module reused": (lambda h: _SHARED(_SHARED(h) - 0.1), lambda h: F.relu(F.relu(h) - 0.1)),
    "F.relu": (F.relu, F.relu),
    "F.relu inplace": (lambda h: F.relu(h, inplace=True), F.relu),
    "F.relu_": (lambda h: F.relu_(h), F.relu),
    "torch.relu": (torch.relu, F.relu),
    "torch.relu_": (torch.relu_, F.relu),
    "Tensor.relu": (lambda h: h.relu(), F.relu),
    "Tensor.relu_": (lambda h: h.relu_(), F.relu),
    "clamp(min=0)": (lambda h: h.clamp(min=0), F.relu),
    "clamp(0)": (lambda h: h.clamp(0), F.relu),
    "clamp_(min=0)": (lambda h: h.clamp_(min=0), F.relu),
    "torch.clamp(min=0.0)": (lambda h: torch.clamp(h, min=0.0), F.relu),
    "clamp(min=tensor)": (lambda h: h.clamp(min=torch.tensor(0.0, dtype=h.dtype)), F.relu),
    "clamp_min(0)": (lambda h: h.clamp_min(0), F.relu),
    "clamp_min_(0)": (lambda h: h.clamp_min_(0), F.relu),
    "torch.clip": (lambda h: torch.clip(h, 0), F.relu),
    "clamp(0, 6)": (lambda h: (3 * h).clamp(0, 6), lambda h: F.hardtanh(3 * h, 0, 6)),
    "torch.maximum with 0": (lambda h: torch.maximum(torch.zeros((), dtype=h.dtype), h), F.relu),
    "torch.max with zeros": (lambda h: torch.max(h, torch.zeros_like(h)), F.relu),
    "F.threshold": (lambda h: F.threshold(h, 0, 0), F.relu),
    "F.threshold_": (lambda h: F.threshold_(h, 0, 0), F.relu),
    "nn.Threshold": (nn.Threshold(0.1, 0.1), lambda h: F.threshold(h, 0.1, 0.1)),
    "nn.ReLU6": (nn.ReLU6(inplace=True), lambda h: F.hardtanh(h, 0, 6)),
    "F.relu6": (lambda h: F.relu6(3 * h), lambda h: F.hardtanh(3 * h, 0, 6)),
    "F.hardtanh_": (lambda h: F.hardtanh_(h), F.hardtanh),
    "nn.Hardtanh": (nn.Hardtanh(), F.hardtanh),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2, inplace=True), lambda h: F.leaky_relu(h, 0.2)),
    "F.leaky_relu_": (lambda h: F.leaky_relu_(h, 0.2), lambda h: F.leaky_relu(h, 0.2)),
    "F.prelu": (lambda h: F.prelu(h, h.new_tensor([0.2])), lambda h: F.leaky_relu(h, 0.2)),
    "nn.PReLU": (lambda h: nn.PReLU(init=0.25, device=h.device, dtype=h.dtype)(h), lambda h: F.leaky_relu(h, 0.25)),
    "F.rrelu in evaluation": (lambda h: F.rrelu(h, 0.2, 0.2), lambda h: F.leaky_relu(h, 0.2)),
    "F.rrelu in training": (lambda h: F.rrelu(h, 0.2, 0.2, training=True), lambda h: F.leaky_relu(h, 0.2)),
    "and a skip connection": (lambda h: relu_twice(h, F.relu), lambda h: relu_twice(h, F.relu)),
    "in place on a slice": (on_slice(torch.relu_), _slice_reference(F.relu)),
    "in place on a view": (lambda h: h.flatten(1).relu_().view_as(h), F.relu),
    "clamp_ on a slice": (on_slice(lambda v: v.clamp_(min=0)), _slice_reference(F.relu)),
    "clamp_min_ on a slice": (on_slice(lambda v: v.clamp_min_(0)), _slice_reference(F.relu)),
    "clamp_(0, 6) on a slice": (on_slice(lambda v: v.clamp_(0, 1)), _slice_reference(lambda h: F.hardtanh(h, 0, 1))),
    "hardtanh_ on a slice": (on_slice(F.hardtanh_), _slice_reference(F.hardtanh)),
    "leaky_relu_ on a slice": (
        on_slice(lambda v: F.leaky_relu_(v, 0.2)),
        _slice_reference(lambda h: F.leaky_relu(h, 0.2)),
    ),
}

SMOOTH = {
    "nn.GELU": nn.GELU(),
    "F.gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "F.silu": F.silu,
    "F.silu inplace": lambda h: F.silu(h, inplace=True),
    "F.hardswish": F.hardswish,
    "F.hardswish inplace": lambda h: F.hardswish(h, inplace=True),
    "F.elu": F.elu,
    "F.elu_": lambda h: F.elu_(h),
    "F.selu": F.selu,
    "F.celu": lambda h: F.celu(h, 0.7),
    "F.mish": F.mish,
    "F.mish inplace": lambda h: F.mish(h, inplace=True),
    "F.softplus": F.softplus,
}


class Rectified(nn.Module):
    """A network around one rectifier, used three times with a residual connection."""

    def __init__(self, rectify, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.rectify = rectify
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 64, 4)
        self.double()

    def forward(self, x):
        h = self.rectify(self.conv1(x))
        h = self.rectify(self.conv2(h) + h)
        return self.head(h.flatten(1))


class HidingPlaces(nn.Module):
    """Every spelling of the list above, one after the other, in one network; or their plain references."""

    def __init__(self, reference, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.rectifiers = [pair[reference] for pair in SPELLINGS.values()]
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(len(SPELLINGS)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in SPELLINGS)
        self.head = nn.Linear(6 * 64, 4)
        self.double()

    def forward(self, x):
        h = 0
        for conv, norm, rectify in zip(self.convs, self.norms, self.rectifiers, strict=True):
            h = rectify(norm(conv(x if isinstance(h, int) else h))) + 0.3 * h
        return self.head(h.flatten(1))


def run_script(path, *arguments, cwd=None):
    """A script in this process, with these arguments: what `subprocess.run` would return, without a new process."""
    out, err, argv, here = io.StringIO(), io.StringIO(), sys.argv, Path.cwd()
    threads, seed = torch.get_num_threads(), torch.get_rng_state()
    sys.argv = [str(path), *map(str, arguments)]
    code = 0
    try:
        os.chdir(cwd or here)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        err.write(stop.code if isinstance(stop.code, str) else "")
    finally:
        sys.argv = argv
        os.chdir(here)
        torch.set_num_threads(threads)
        torch.set_rng_state(seed)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
