"""Nothing reaches a kernel that CUDA would refuse, over the architecture list and the layers that are special."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, NAMES
from cuda_rules import CudaRules, Cudnn, RefusedOnCudaError
from torch import nn

from interpgrad import InterpretableGradientLoss, low_pass
from interpgrad.double_backward import batch_norm as our_batch_norm
from interpgrad.double_backward import pooling, row_norm
from interpgrad.model import logits_of

aten = torch.ops.aten
pytestmark = pytest.mark.cpu("the rules stand in for the device")


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    """Group norm's memory format is chosen as on CUDA, and autocast runs row norms in single precision."""
    monkeypatch.setattr(row_norm, "_memory_format", lambda _: torch.contiguous_format)
    monkeypatch.setattr(row_norm, "_AS_GIVEN", ())
    monkeypatch.setattr(pooling, "_FORGET_PADDING", ("cpu",))


def step(model, x, y, *, shared, autocast=None, batch_norm="frozen", transform=None, **rules):
    """One step under the rules: the loss and the user's backward pass, which is stock's own only if not shared."""
    reg = InterpretableGradientLoss(model, lam=1.0, batch_norm=batch_norm, transform=transform)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        with CudaRules(**rules) as mode:
            loss = 0
            if shared:
                with reg.shared_forward():
                    loss = F.cross_entropy(logits_of(model(x)).float(), y)
            loss = loss + reg(x, y)
    with mode:
        loss.backward()
    return mode.checked


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
@pytest.mark.parametrize("name", NAMES)
def test_architectures(name, batch_norm):
    """In training and evaluation, plain and shared, contiguous and channels_last, single, half and mixed precision."""
    build, size = ARCHITECTURES[name]
    size = max(32, size)
    torch.manual_seed(0)
    model = build()
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    checked = {}
    for index, (training, layout) in enumerate(
        itertools.product((True, False), (torch.contiguous_format, torch.channels_last))
    ):
        model.train(training).to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        shared = bool((index + training) % 2)
        if shared == (batch_norm == "frozen"):
            checked |= step(model, images, y, shared=shared, batch_norm=batch_norm, synchronizations=shared is False)
        else:
            checked |= step(model, images, y, shared=shared, batch_norm=batch_norm, autocast=torch.bfloat16)
    half = model.bfloat16()
    for training in (True, False):
        checked |= step(half.train(training), x.bfloat16(), y, shared=training, batch_norm=batch_norm)
    norms = {type(module) for module in model.modules()}
    assert {"R7", "R8"} <= checked.keys()
    assert {"R1", "R2", "R4"} <= checked.keys() or nn.BatchNorm2d not in norms
    assert "R5" in checked or nn.LayerNorm not in norms


def test_padded_averages_in_channels_last():
    """Of the network, and of both gradients."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for shared in (True, False):
        assert "R10" in step(model, x, torch.tensor([0, 1]), shared=shared, transform=low_pass)


class Special(nn.Module):
    """A layer between a convolution and a linear one, on what `view` makes of the feature maps (N, 8, 6, 6)."""

    def __init__(self, layer, view=lambda h: h):
        super().__init__()
        self.conv, self.layer, self.view = nn.Conv2d(3, 8, 3), layer, view
        self.head = nn.LazyLinear(4)

    def forward(self, x):
        h = F.relu(self.layer(self.view(self.conv(x))))
        return self.head(h.flatten(1))


class BiasAlone(nn.Module):
    """A norm as a function, with a bias and no weight."""

    def __init__(self, function, shape):
        super().__init__()
        self.function, self.bias = function, nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.function(x, self.bias)


def tokens(h):
    return h.flatten(2).transpose(1, 2)


SPECIAL = {
    "batch norm": lambda: Special(nn.BatchNorm2d(8)),
    "batch norm without weight": lambda: Special(nn.BatchNorm2d(8, affine=False)),
    "batch norm without running statistics": lambda: Special(nn.BatchNorm2d(8, track_running_stats=False)),
    "batch norm of (N, C)": lambda: Special(nn.BatchNorm1d(288), lambda h: h.flatten(1)),
    "batch norm of transposed tokens": lambda: Special(nn.BatchNorm1d(36), tokens),
    "batch norm of every other channel": lambda: Special(nn.BatchNorm2d(4), lambda h: h[:, ::2]),
    "batch norm of a crop": lambda: Special(nn.BatchNorm2d(8), lambda h: h[:, :, 1:, 1:]),
    "batch norm of what is expanded": lambda: Special(nn.BatchNorm2d(8), lambda h: h[:, :1].expand(-1, 8, -1, -1)),
    "batch norm in 3d": lambda: Special(nn.BatchNorm3d(8), lambda h: h[:, :, None]),
    "batch norm of one channel": lambda: Special(nn.BatchNorm2d(1), lambda h: h.mean(1, keepdim=True)),
    "instance norm": lambda: Special(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "instance norm without weight": lambda: Special(nn.InstanceNorm2d(8), lambda h: h[:, :, ::2]),
    "layer norm": lambda: Special(nn.LayerNorm(8), tokens),
    "layer norm without weight": lambda: Special(nn.LayerNorm(8, elementwise_affine=False), tokens),
    "layer norm without bias": lambda: Special(nn.LayerNorm([8, 6, 6], bias=False)),
    "group norm": lambda: Special(nn.GroupNorm(4, 8)),
    "group norm without weight": lambda: Special(nn.GroupNorm(2, 8, affine=False), lambda h: h[:, :, ::2]),
    "layer norm with a bias alone": lambda: Special(BiasAlone(lambda h, b: F.layer_norm(h, (6, 6), None, b), (6, 6))),
    "group norm with a bias alone": lambda: Special(BiasAlone(lambda h, b: F.group_norm(h, 4, None, b), (8,))),
    "grouped convolution": lambda: Special(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_layers(name, batch_norm, layout):
    model = SPECIAL[name]()
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    model(x)
    model.to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    for training, shared in itertools.product((True, False), (True, False)):
        model.train(training)
        step(model, x, y, shared=shared, batch_norm=batch_norm, synchronizations=False)
        step(model, x, y, shared=shared, batch_norm=batch_norm, autocast=torch.bfloat16)
    model.bfloat16()
    for training in (True, False):
        step(model.train(training), x.bfloat16(), y, shared=training, batch_norm=batch_norm)


def gradients(model, x, y, *, shared, batch_norm):
    reg = InterpretableGradientLoss(model, lam=1.0, batch_norm=batch_norm)
    loss = 0
    if shared:
        with reg.shared_forward():
            loss = F.cross_entropy(model(x), y)
    loss = loss + reg(x, y)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
@pytest.mark.parametrize("name", [name for name in SPECIAL if name.startswith("batch norm")])
def test_cudnn(name, batch_norm, layout, monkeypatch):
    """Its batch norm is given what it takes, and what it gives beyond the mask, or does not save, changes nothing."""
    torch.manual_seed(0)
    model = SPECIAL[name]()
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    model(x)
    model.to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    for training, shared in itertools.product((True, False), (True, False)):
        model.train(training)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = gradients(model, x, y, shared=shared, batch_norm=batch_norm)
        model.load_state_dict(state)
        with monkeypatch.context() as patch:
            cudnn = Cudnn()
            patch.setattr(our_batch_norm, "aten", cudnn)
            found = gradients(model, x, y, shared=shared, batch_norm=batch_norm)
        torch.testing.assert_close(found, expected)
        of_the_batch = training or not model.layer.track_running_stats
        assert bool(cudnn.forwards) == model.layer.affine
        assert bool(cudnn.backwards) == (model.layer.affine and of_the_batch and (shared or batch_norm == "coupled"))


@pytest.mark.parametrize(
    ("rule", "call"),
    {
        "R1": lambda x, w: aten.native_batch_norm_backward(x, x, None, None, None, w, w, True, 0.0, [True, True, True]),
        "R2": lambda x, w: aten.native_batch_norm_backward(x.half(), x, w, None, None, w, w, True, 0.0, [True] * 3),
        "R3": lambda x, w: aten.native_batch_norm(x, w, w, None, None, False, 0.1, 0.0),
        "R4": lambda x, w: aten.native_batch_norm_backward(
            x[:, :, ::2], x[:, :, ::2], w, None, None, w, w, True, 0.0, [True, True, True]
        ),
        "R5": lambda x, w: aten.native_layer_norm(x, [4], w.double(), None, 0.1),
        "R6": lambda x, w: aten.native_group_norm(x.transpose(2, 3), w, w, 2, 4, 16, 2, 0.1),
        "R7": lambda x, w: aten.convolution(x, x.double(), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        "R9": lambda x, w: (x.sum() + w.sum()).item(),
    }.items(),
)
def test_the_rules_refuse(rule, call):
    """They can fail: each does on the call it is made for."""
    with pytest.raises(RefusedOnCudaError, match=rule), CudaRules(synchronizations=False):
        call(torch.randn(2, 4, 4, 4), torch.ones(4))


def test_autocast_in_a_backward_pass_is_refused():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RefusedOnCudaError, match="R8"), CudaRules(), torch.autocast("cpu"):
        (x.exp() * 2).sum().backward()
