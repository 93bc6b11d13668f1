"""What only a GPU shows: pytest --device cuda."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import torchvision
from oracle import relative_difference
from test_docs import code_blocks
from torch import nn

from interpgrad import InterpretableGradientLoss
from interpgrad.double_backward import batch_norm


@pytest.fixture(autouse=True)
def _cuda_alone(device):
    if device.type != "cuda":
        pytest.skip("on a CUDA device alone")


def network():
    """One of which every layer has a kernel of cuDNN's, as ResNet's have."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randn(8, 3, 64, 64), torch.randint(10, (8,))


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
def test_a_step_in_a_cuda_graph(batch_norm):
    """With a shared forward pass; replayed on other images, it gives the gradients of an eager step."""
    model, (x, y) = network(), batch()
    reg = InterpretableGradientLoss(model, lam=0.3, batch_norm=batch_norm)

    def step():
        model.zero_grad(set_to_none=False)
        with reg.shared_forward():
            logits = model(x)
        (F.cross_entropy(logits, y) + reg(x, y)).backward()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    penalty = reg.penalty
    for seed in (1, 2):
        for own, new in zip((x, y), batch(seed), strict=True):
            own.copy_(new)
        graph.replay()
        replayed = gradients(model).clone()
        step()
        assert relative_difference(replayed, gradients(model)) < 1e-3
        torch.testing.assert_close(penalty, reg.penalty, rtol=1e-3, atol=0.0)


def test_the_page_on_cuda_graphs():
    """Its code runs, and what it replays are the gradients of its eager step."""
    names = {"__name__": "page"}
    for block in code_blocks("docs/how-to/cuda-graphs.md"):
        exec(block, names)
    names["regularized"]()
    replayed = gradients(names["model"]).clone()
    names["gradients"](True)
    assert relative_difference(replayed, gradients(names["model"])) < 1e-3
    names["weight"].zero_()
    names["regularized"]()
    assert relative_difference(replayed, gradients(names["model"])) > 1e-2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_the_host_waits_for_nothing(dtype, shared):
    model, (x, y) = network(), batch()
    reg = InterpretableGradientLoss(model, lam=0.3)

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            with reg.shared_forward() if shared else contextlib.nullcontext():
                logits = model(x)
            loss = F.cross_entropy(logits, y) + reg(x, y)
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_stream_of_ones_own():
    model, (x, y) = network(), batch()
    reg = InterpretableGradientLoss(model, lam=0.3)
    expected = torch.autograd.grad(reg(x, y), list(model.parameters()), allow_unused=True)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        found = torch.autograd.grad(reg(x, y), list(model.parameters()), allow_unused=True)
    torch.cuda.current_stream().wait_stream(beside)
    for ours, same in zip(found, expected, strict=True):
        assert (ours is None) == (same is None)
        if ours is not None:
            assert relative_difference(ours, same) < 1e-3


def test_memory_does_not_grow():
    model, (x, y) = network(), batch()
    reg = InterpretableGradientLoss(model, lam=0.3)
    held = []
    for _ in range(8):
        with reg.shared_forward():
            logits = model(x)
        (F.cross_entropy(logits, y) + reg(x, y)).backward()
        del logits
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[2]


@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers(training):
    """cuDNN's have no double backward: PyTorch says so, or the gradients are those without cuDNN."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.head = nn.GRU(24, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(F.relu(self.rows(x.movedim(1, 2).flatten(2))[0][:, -1]))

    model = Rows().train(training)
    x, y = torch.randn(5, 3, 8, 8), torch.randint(4, (5,))
    reg = InterpretableGradientLoss(model, lam=1.0)
    with torch.backends.cudnn.flags(enabled=False):
        reg(x, y).backward()
    assert model.rows.weight_hh_l0.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"(?i)cudnn"):
        reg(x, y).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "slice", "one pixel", "rows", "volume"])
def test_scaling_is_rounded_once(dtype, layout):
    g = torch.randn(6, 16, 5, 7)
    if layout == "rows":
        g = g[..., 0, 0]
    if layout == "volume":
        g = g[..., None].expand(6, 16, 5, 7, 3).contiguous(memory_format=torch.channels_last_3d)
    if layout == "one pixel":
        g = g[..., :1, :1]
    g, scale = g.to(dtype), torch.rand(16) + 0.5
    g = g.to(memory_format=torch.channels_last) if layout == "channels last" else g
    g = g[..., ::2] if layout == "slice" else g
    found = batch_norm.scaled(g, scale)
    expected = (g.double() * batch_norm.channels(scale, g).double()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-7 if dtype == torch.float32 else 0, atol=0)
    assert found.stride() == torch.empty_like(g).stride()
