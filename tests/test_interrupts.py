"""Ctrl-C and timers at any moment: the model is as it was, and what was raised is what is caught."""

import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from nets import data, seeded, small_net
from torch import nn
from traces import assert_same_trace, trace

from interpgrad import InterpretableGradientLoss, fast_double_backward, input_gradients, metrics, saliency, signals

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


def outside(model):
    """What is not the model's: modes, the attention kernels, handlers."""
    return (
        torch._C._len_torch_function_stack(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
        [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)],
        [module.training for module in model.modules()],
        list(model.state_dict()),
    )


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


@pytest.mark.parametrize("call", CALLS)
def test_interrupted_at_random_times(call, interrupt):
    later, exception = interrupt
    model, (x, y) = attentive_net().train(), data()
    x, chance = x.float(), random.Random(0)
    call(model, x, y)
    began = time.perf_counter()
    call(model, x, y)
    duration = time.perf_counter() - began
    raised = 0
    for _ in range(INTERRUPTS):
        before, surroundings = trace(model), outside(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            later(chance.uniform(1e-6, duration))
            call(model, x, y)
            for _ in range(20):  # it comes in any case
                time.sleep(0.1)
        except exception:
            raised += 1
        assert (signals._users, signals._noted) == (0, [])
        assert outside(model) == surroundings
        if call in (shared, fast):  # the user's own forward pass counts the batch and draws numbers
            model.load_state_dict(state)
        else:
            assert_same_trace(before, trace(model))
    assert raised >= 0.95 * INTERRUPTS  # Python swallows what is raised inside a destructor


def test_handlers_that_do_not_raise_are_called_once_and_the_call_goes_on():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)
    expected, seen = reg(x, y), []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        for shared_forward in (True, False):
            model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
            if shared_forward:
                with reg.shared_forward():
                    model(x)
            value = reg(x, y)
            assert torch.equal(value, expected)
        assert len(seen) >= 2
        assert signal.getsignal(signal.SIGINT) is not signals._handle
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_not_kept_waiting():
    model, (x, y) = small_net(), data()
    later = []

    def twice(*_):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        later.append("reached")

    model.register_forward_pre_hook(twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            InterpretableGradientLoss(model)(x, y)
        assert not later
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert signals._users == 0
    signals._noted.clear()


def test_handlers_set_inside_are_kept():
    model, (x, _) = small_net(), data()
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with InterpretableGradientLoss(model).shared_forward():
            model(x)
            signal.signal(signal.SIGUSR1, raises_timeout)
        assert signal.getsignal(signal.SIGUSR1) is raises_timeout
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_have_nothing_to_do_with_signals():
    model, (x, y) = small_net(), data()
    found = []
    thread = threading.Thread(target=lambda: found.append(InterpretableGradientLoss(model)(x, y)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], InterpretableGradientLoss(model)(x, y))
