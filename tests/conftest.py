"""Settings every test shares."""

import os
import sys

import hypothesis
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Deterministic, and without deadlines: shared machines are slow at times, which is no property of the code.
hypothesis.settings.register_profile("interpgrad", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("interpgrad")


def pytest_addoption(parser):
    parser.addoption("--device", type=torch.device, default=torch.device("cpu"), help="where the tests run: cuda")
    parser.addoption("--nightly", action="store_true", help="all architectures, where a commit has eight")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core: one thread each, and in the programs it starts
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    config.addinivalue_line("markers", "cpu(reason): a test that the device given by --device cannot run")
    config.addinivalue_line("markers", "nightly: a test that --nightly alone runs")
    config.addinivalue_line("markers", "slow: a test that make test-fast leaves out")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--nightly"):
        left = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=left)
    if config.getoption("--device").type != "cpu":
        for item in items:
            for marker in item.iter_markers("cpu"):
                item.add_marker(pytest.mark.skip(reason=f"on the CPU alone: {marker.args[0]}"))


def pytest_terminal_summary(terminalreporter):
    """How many of PyTorch's own samples were compared."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name} in {report.nodeid}: {value}")


class DrawnOnTheCPU(TorchFunctionMode):
    """Weights and images are the same on every device: drawn on the CPU, and moved."""

    MADE = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm})
    FILLED = frozenset({torch.Tensor.uniform_, torch.Tensor.normal_})
    # Of nn.init, those that hand themselves to a mode, which is off in what they call.
    FILLED |= {nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_}

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = torch.device(kwargs.get("device") or self.device).type == self.device.type
        drawn_here = kwargs.get("generator") is not None and kwargs["generator"].device.type == self.device.type
        if func in self.MADE and here and not drawn_here:
            recorded = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs | {"device": "cpu"}).to(self.device).requires_grad_(recorded)
        if func in self.FILLED:
            filled, *rest = (kwargs.pop("tensor"), *args) if "tensor" in kwargs else args
            drawn = func(torch.empty_like(filled, device="cpu", requires_grad=False), *rest, **kwargs)
            with torch.no_grad():
                return filled.copy_(drawn)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def device(pytestconfig):
    """Where tensors and modules are made: what --device says."""
    device = pytestconfig.getoption("--device")
    if device.type == "cpu":
        yield device
    else:
        torch.set_default_device(device)
        torch.backends.cudnn.allow_tf32 = False  # what is compared in single precision is computed in it
        torch.backends.cudnn.deterministic = True  # and what is compared bit for bit, in one order
        with DrawnOnTheCPU(device):
            yield device
        torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _fresh():
    """No test depends on those before it in its process."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it compiles one function, as nn.Sequential's forward, only so many times
