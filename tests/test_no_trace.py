"""A call leaves nothing behind, on success and on every way to fail."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import data, small_net
from torch import nn
from traces import assert_same_trace, same, trace

from interpgrad import InterpretableGradientLoss, input_gradients
from interpgrad.cleanup import OfAllThreads


class Raises(nn.Module):
    def forward(self, x):
        raise OSError("the model itself raises midway")


def stateful_net(raises=False):
    net = small_net().train()
    net.insert(3, nn.Dropout(0.4))
    net.insert(5, torchvision.ops.StochasticDepth(0.5, "row"))
    net[5].eval()  # mixed modes must stay mixed
    if raises:
        net.append(Raises())
    x, y = data(seed=9)
    loss = F.cross_entropy(nn.Sequential(*[m for m in net if not isinstance(m, Raises)])(x), y)
    loss.backward()
    return net


def call_plain(reg, model, x, y):
    return reg(x, y)


def call_no_grad(reg, model, x, y):
    with torch.no_grad():
        return reg(x, y)


def call_input_gradients(reg, model, x, y):
    return input_gradients(model, x, y)


@pytest.mark.parametrize("call", [call_plain, call_no_grad, call_input_gradients])
def test_plain_calls_leave_no_trace(call):
    model, (x, y) = stateful_net(), data()
    reg = InterpretableGradientLoss(model)
    before, images = trace(model), x.clone()
    call(reg, model, x, y)
    assert_same_trace(before, trace(model))
    assert torch.equal(x, images)
    assert not x.requires_grad
    assert x.grad is None


FAILURES = {
    "the model raises": (lambda x, y: (x, y), {}, OSError),
    "integer images": (lambda x, y: ((x * 9).long(), y), {}, TypeError),
    "empty batch": (lambda x, y: (x[:0], y[:0]), {}, ValueError),
    "batch sizes differ": (lambda x, y: (x, y[:2]), {}, ValueError),
    "wrong image size": (lambda x, y: (x[:, :2], y), {}, RuntimeError),
    "target out of range": (lambda x, y: (x, y + 100), {}, ValueError),
    "criterion raises": (lambda x, y: (x, y), {"criterion": lambda z, y: 1 / 0}, ZeroDivisionError),
    "criterion is no scalar": (lambda x, y: (x, y), {"criterion": lambda z, y: z}, ValueError),
    "error raises": (lambda x, y: (x, y), {"error": lambda d, g: 1 / 0}, ZeroDivisionError),
    "error is no vector": (lambda x, y: (x, y), {"error": lambda d, g: d.sum()}, ValueError),
    "transform raises": (lambda x, y: (x, y), {"transform": lambda d: 1 / 0}, ZeroDivisionError),
}
OF_THE_CPU = pytest.mark.cpu("on CUDA a target out of range ends the process: a device-side assertion")


def failing(name):
    """A parameter of a test."""
    return pytest.param(name, marks=OF_THE_CPU) if name == "target out of range" else name


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("failure", [failing(name) for name in FAILURES])
def test_failed_calls_leave_no_trace(failure, shared):
    spoil, settings, error = FAILURES[failure]
    model = stateful_net(raises=failure == "the model raises")
    x, y = spoil(*data())
    reg = InterpretableGradientLoss(model, every=2, **settings)
    before = trace(model)
    with pytest.raises(error):
        if shared:
            with reg.shared_forward():
                model(x)
        reg(x, y)
    after = trace(model)
    if shared:  # the user's own forward pass updates the statistics and draws its masks, as it should
        for key in ("buffers", "random state"):
            before.pop(key), after.pop(key)
    assert_same_trace(before, after)
    assert reg.penalty is None
    assert int(reg.state_dict()["_extra_state"]) == 0, "a failed call must not count"


@pytest.mark.parametrize("training", [True, False])
def test_buffers_of_modules_reachable_under_two_names_or_filled_by_forward(training):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()
            self.features = self.net[:4]
            self.norm = self.net[1]
            self.register_buffer("tied", self.norm.running_mean)
            self.register_buffer("cache", None)

        def forward(self, x):
            self.cache = x.mean().detach()
            self.tied.add_(1)
            return self.net(x)

    model, (x, y) = Aliased().train(training), data()
    before = trace(model)
    InterpretableGradientLoss(model)(x, y).backward()
    input_gradients(model, x, y)
    model.zero_grad()
    after = trace(model)
    assert after["buffers"].pop("cache"), "what the pass has made stays"
    assert same(before["buffers"], after["buffers"])
    assert same(before["attributes"], after["attributes"])


def test_a_failed_loss_can_be_repeated():
    """The recorded forward pass is not lost with the wrong tensor."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)
    with reg.shared_forward():
        model(x)
    with pytest.raises(RuntimeError, match="another one"):
        reg(x.clone(), y)
    assert reg(x, y) > 0


def test_a_shared_forward_is_the_users_own():
    """Same logits, buffers and random numbers as without; hooks and kernels as before."""
    x, _ = data()
    results = []
    for shared in (False, True):
        model = stateful_net()
        torch.manual_seed(3)
        reg = InterpretableGradientLoss(model)
        hooks = trace(model)["hooks"]
        if shared:
            with reg.shared_forward():
                logits = model(x)
        else:
            logits = model(x)
        assert trace(model)["hooks"] == hooks
        results.append((logits.detach(), torch.get_rng_state(), {k: v.clone() for k, v in model.named_buffers()}))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_masks_of_dropout_and_stochastic_depth():
    """The shared forward uses the user's masks; the plain call draws its own, which depend on the generator."""
    model, (x, y) = stateful_net(), data()
    model[5].train()
    reg = InterpretableGradientLoss(model, lam=1.0)
    torch.manual_seed(5)
    with reg.shared_forward():
        model(x)
    torch.manual_seed(77)  # drawn from after the forward pass: must not matter
    shared = reg(x, y)
    torch.manual_seed(5)
    assert torch.equal(reg(x, y), shared)
    torch.manual_seed(6)
    assert not torch.equal(reg(x, y), shared)


def test_a_model_that_works_on_its_input_in_place_does_not_spoil_the_images():
    class Normalizes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x.mul_(2))

    x, y = data()
    images, model = x.clone(), Normalizes()
    delta, _ = input_gradients(model, x, y)
    assert torch.equal(x, images)
    torch.testing.assert_close(delta, 2 * input_gradients(model.net, 2 * x, y)[0])


def test_the_loss_is_registered_nowhere():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)
    holder = nn.ModuleDict({"model": model, "reg": reg})
    assert len(list(holder.parameters())) == len(list(model.parameters()))
    assert reg.model is model
    holder.eval()
    model.train()
    reg.eval()
    assert model.training, "the mode of the loss is not the mode of the model"
    clone = copy.deepcopy(holder)
    assert clone["reg"].model is clone["model"]
    torch.testing.assert_close(clone["reg"](x, y), reg(x, y))


def test_of_modules_given_as_settings_the_model_alone_is_not_registered():
    settings = {"criterion": nn.CrossEntropyLoss(torch.ones(4).double()), "transform": nn.Conv2d(3, 1, 3).double()}
    reg = InterpretableGradientLoss(small_net(), **settings)
    reg.model = small_net()
    assert sorted(reg.state_dict()) == ["_extra_state", "criterion.weight", "transform.bias", "transform.weight"]


def test_copies_and_pickles_between_a_shared_forward_and_its_loss():
    model, (x, y) = small_net().eval(), data()
    reg = InterpretableGradientLoss(model, lam=1.0)
    with reg.shared_forward():
        model(x)
    for clone in (copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        torch.testing.assert_close(clone(x, y), InterpretableGradientLoss(model, lam=1.0)(x, y))
    assert reg(x, y) > 0


def test_what_is_of_all_threads_is_taken_back_by_the_last_to_leave():
    """However they overlap, the state is the first one's again; and after the user changed it, the new one."""
    state = {}
    other = OfAllThreads(lambda: state["now"], lambda value: state.update(now=value), lambda before: f"not {before}")
    for before in ("before", "changed"):
        state["now"] = before
        first, second = other(), other()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert state["now"] == f"not {before}"
        second.__exit__(None, None, None)
        assert state["now"] == before
