"""Ctrl-C and timers at any moment: the model is as it was."""

import os
import random
import signal
import threading
import time

import pytest
import torch
import torch._dynamo  # whose stance is watched
import torch.nn.functional as F
from nets import data, seeded, small_net
from torch import nn
from traces import same, trace

from interpgrad import InterpretableGradientLoss, fast_double_backward, input_gradients, metrics, saliency

# Ctrl-C may come inside of a callback of another package, which cannot raise it; and a warning as an error is another.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

INTERRUPTS = 300  # of each call


class Timeout(Exception):  # noqa: N818
    """What the handler of a timer raises."""


def raises_timeout(*_):
    raise Timeout


def attentive_net():
    """Batch norm, attention, dropout."""
    torch.manual_seed(0)
    net = small_net().float()
    net.insert(9, nn.Sequential(nn.Unflatten(1, (8, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)))
    net.insert(10, nn.Flatten())
    return net


def plain(model, x, y):
    InterpretableGradientLoss(model)(x, y)


def shared(model, x, y):
    reg = InterpretableGradientLoss(model)
    with reg.shared_forward():
        logits = model(x)
    F.cross_entropy(logits, y) + reg(x, y)


def both(model, x, y):
    input_gradients(model, x, y)


def fast(model, x, y):
    x = x.clone().requires_grad_()
    with fast_double_backward():
        model(x)


def smoothed(model, x, y):
    saliency.smooth_gradient(model, x, y, samples=2)


def maps(model, x, y):
    saliency.grad_cam(model, x, "4", y)


def faithful(model, x, y):
    metrics.faithfulness(model, x, torch.rand(len(x), 8, 8, generator=seeded(0)), y)


CALLS = [plain, shared, both, fast, smoothed, maps, faithful]


def contexts_of_autocast():
    """That torch counts: at one too many it never casts weights anew."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def outside(model):
    """What is not the model's: modes and the attention kernels, by name."""
    return {
        ("function modes", torch._C._len_torch_function_stack()),
        ("flash", torch.backends.cuda.flash_sdp_enabled()),
        ("mem_efficient", torch.backends.cuda.mem_efficient_sdp_enabled()),
        ("math", torch.backends.cuda.math_sdp_enabled()),
        ("gradients", torch.is_grad_enabled()),
        ("stance of torch.compile", torch._dynamo.eval_frame._stance.stance),
        ("contexts of autocast", contexts_of_autocast()),
        ("training", tuple(module.training for module in model.modules())),
        ("state", tuple(model.state_dict())),
    }


@pytest.fixture(params=["Ctrl-C", "timer"])
def interrupt(request):
    """A function (seconds) that interrupts the main thread so much later; the exception is the second result."""
    if request.param == "timer":
        before = signal.signal(signal.SIGALRM, raises_timeout)
        yield lambda delay: signal.setitimer(signal.ITIMER_REAL, delay), Timeout
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    else:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)

        def later(delay):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

        yield later, KeyboardInterrupt
        signal.signal(signal.SIGINT, before)


def left_behind(call, model, x, y, later, exception, delay):
    """What is not as before after one interrupt, and whether it was raised: Python swallows it inside a destructor."""
    before, surroundings, raised = trace(model), outside(model), False
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        later(delay)
        call(model, x, y)
        for _ in range(20):  # it comes in any case
            time.sleep(0.1)
    except exception:
        raised = True
    after = trace(model)
    if call in (shared, fast):  # the user's own forward pass counts the batch and draws numbers
        model.load_state_dict(state)
        for key in ("buffers", "random state"):
            before.pop(key), after.pop(key)
    changed = [key for key in before if not same(before[key], after[key])]
    return changed + [value for value in outside(model) if value not in surroundings], raised


@pytest.mark.cpu("what makes tensors on a device is a function mode, which torch itself loses where it is interrupted")
def test_interrupted_at_random_times(interrupt):
    """At most one of a thousand leaves something behind: Python runs handlers between any two instructions."""
    later, exception = interrupt
    (x, y), chance = data(), random.Random(0)
    x, raised, left = x.float(), 0, []
    for call in CALLS:
        model = attentive_net().train()
        call(model, x, y)
        began = time.perf_counter()
        call(model, x, y)
        duration = time.perf_counter() - began
        for _ in range(INTERRUPTS):
            found, came = left_behind(call, model, x, y, later, exception, chance.uniform(1e-6, duration))
            raised += came
            if found:
                left.append((call.__name__, found))
                model = attentive_net().train()
    total = INTERRUPTS * len(CALLS)
    assert len(left) <= total / 1000, left
    assert raised >= 0.95 * total


def test_a_signal_is_handled_when_it_comes():
    """By the user's own handler, which nobody replaces."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)
    expected, seen = reg(x, y), []

    def handler(*_):
        seen.append(signal.getsignal(signal.SIGINT))

    before = signal.signal(signal.SIGINT, handler)
    try:
        model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        assert torch.equal(reg(x, y), expected)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [handler]
