"""Wrong settings are named by the constructor, a wrong model at the first call, which tries it."""

import functools
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import data, small_net
from torch import nn
from traces import assert_same_trace, trace

from interpgrad import InterpretableGradientLoss, interpretable_gradient_loss, low_pass, metrics
from interpgrad.transforms import transform_of

LATE = {"start": 10, "every": 4}


def call(reg, model, x, y, shared, **options):
    if not shared:
        return reg(x, y, **options)
    with reg.shared_forward():
        model(x)
    return reg(x, y, **options)


def tanh_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = small_net()

    def forward(self, x):
        return OnceDifferentiable.apply(self.layers(x))


def of_one_row(gradient):
    return gradient[:, :, 0]


def wrong_shape(passes):
    return torch.zeros(7, 5, dtype=passes.x.dtype, device=passes.x.device)


WRONG = {
    "no rectifier": (tanh_net, {}, RuntimeError, "expected at least one activation"),
    "no double backward": (Once, {}, RuntimeError, "once"),
    "target": (small_net, {"target": wrong_shape}, ValueError, "expected target to have the shape of the images"),
    "transform": (small_net, {"transform": of_one_row, "error": lambda delta, _: delta[:, 0]}, ValueError, "one value"),
    "ignored activations": (tanh_net, {"activations": "relu"}, RuntimeError, "expected at least one activation"),
}


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_or_setting_is_named_at_the_first_call(name, shared):
    make, settings, kind, message = WRONG[name]
    model, (x, y) = make(), data()
    with pytest.raises(kind, match=message):
        call(InterpretableGradientLoss(model, **LATE, **settings), model, x, y, shared)


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_the_trial_leaves_no_trace(shared):
    """Of the model, of the random states, of what is logged and stored; a target that draws numbers included."""

    def drawn(passes):
        random.random(), np.random.rand()
        return torch.rand_like(passes.x)

    model, (x, y) = nn.Sequential(small_net(), nn.Dropout(0.5)), data()
    reg = InterpretableGradientLoss(model, target=drawn, **LATE)
    if shared:
        with reg.shared_forward():
            model(x)
    before = trace(model), random.getstate(), np.random.get_state()[1].tolist()
    value = reg(x, y)
    after = trace(model), random.getstate(), np.random.get_state()[1].tolist()
    assert_same_trace(before[0], after[0])
    assert before[1:] == after[1:]
    assert value == 0
    assert reg.logs() == {}
    assert int(reg.state_dict()["_extra_state"]) == 1


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_there_is_one_trial_and_it_uses_a_shared_forward_pass(shared):
    model, (x, y) = small_net(), (torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 4)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    reg = InterpretableGradientLoss(model, target="given", **LATE)
    for _ in range(3):
        call(reg, model, x, y, shared, target=torch.rand_like(x))
    assert sizes == ([8, 8, 8] if shared else [8])


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda reg, model, x, y: reg(x.clone(), y), "expected the tensor that was passed to the model inside"),
        (lambda reg, model, x, y: F.cross_entropy(model(x), y).backward() or reg(x, y), None),
    ],
    ids=["another x", "a backward pass of another graph"],
)
def test_sharing_is_tried_too(misuse, message):
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, **LATE)
    with reg.shared_forward():
        model(x)
    if message:
        with pytest.raises(RuntimeError, match=message):
            misuse(reg, model, x, y)
    else:
        misuse(reg, model, x, y)


def test_the_double_backward_is_looked_for_while_the_weight_is_0():
    x, y = data()
    for settings in ({"lam": 0.0}, {"warmup": 10}, {"warmup": 10, "every": 4}):
        with pytest.raises(RuntimeError, match="once"):
            InterpretableGradientLoss(Once(), **settings)(x, y)


def test_further_arguments_are_those_of_the_two_images():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x, shift, *, scale, names):
            assert len(names) == len(x) == len(shift)
            return self.net(x) * scale + shift

    model, (x, y) = Conditioned(), (torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.arange(5) % 4)
    reg = InterpretableGradientLoss(model, **LATE)
    arguments = (torch.ones(5, 1),), {"scale": torch.tensor(2.0), "names": list("abcde")}
    with reg.shared_forward():
        model(x, *arguments[0], **arguments[1])
    assert reg(x, y, *arguments[0], **arguments[1]) == 0


def test_there_is_no_trial_where_the_first_call_is_computed():
    model, (x, y) = small_net(), data()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    reg = InterpretableGradientLoss(model, every=3)
    for _ in range(3):
        reg(x, y)
    assert len(calls) == 1
    with torch.no_grad():
        InterpretableGradientLoss(tanh_net(), target="zero", error="mse", **LATE)(x.flatten(1)[:, :192], y)


def test_after_an_error_the_next_call_tries_again():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, **LATE)
    with pytest.raises(RuntimeError):
        reg(model(x), y)  # logits in the place of images
    assert reg(x, y) == 0
    assert int(reg.state_dict()["_extra_state"]) == 1


NOT_WEIGHTS = ["0.3", -1, float("nan"), float("inf"), None, True, (0.3,)]


@pytest.mark.parametrize("lam", NOT_WEIGHTS, ids=str)
def test_lam_is_a_finite_number_of_at_least_0(lam):
    with pytest.raises(ValueError, match="expected lam to be a finite number of at least 0, got"):
        InterpretableGradientLoss(small_net(), lam=lam)


@pytest.mark.parametrize("lam", [0, 0.3, np.float32(0.3), torch.tensor(0.3)], ids=str)
def test_numbers_of_every_kind_are_weights(lam):
    model, (x, y) = small_net(), data()
    torch.testing.assert_close(
        InterpretableGradientLoss(model, lam=lam)(x, y),
        InterpretableGradientLoss(model, lam=float(lam))(x, y),
        rtol=1e-6,
        atol=0,
    )


def test_transforms_have_names():
    model, (x, y) = small_net(), data()
    by_name, by_function = (InterpretableGradientLoss(model, transform=each) for each in ("low_pass", low_pass))
    assert torch.equal(by_name(x, y), by_function(x, y))
    assert transform_of(None) is None
    for wrong in (3.0, "high_pass"):
        with pytest.raises(ValueError, match='expected transform to be "low_pass", a callable'):
            InterpretableGradientLoss(model, transform=wrong)
    assert InterpretableGradientLoss(model, every=np.int64(2)).every == 2
    for settings in ({"reduction": "sum"}, {"every": 2.0}, {"warmup": "10"}, {"every": True}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"expected {name}"):
            InterpretableGradientLoss(model, **settings)


@pytest.mark.parametrize("error", ["cos", "mae", "outside"])
def test_without_a_reduction_each_image_has_its_value(error):
    """Equal to the loss of that image alone; in evaluation mode, where images have no others."""
    model, (x, y) = small_net().eval(), data()
    settings = {"target": "given"} if error == "outside" else {}
    mask = (torch.rand(len(x), 1, *x.shape[2:]) > 0.5) if error == "outside" else None
    reg = InterpretableGradientLoss(model, error, lam=0.3, reduction="none", start=1, every=2, **settings)
    skipped = reg(x, y, target=mask)
    assert skipped.shape == (len(x),)
    assert not skipped.any()
    values = reg(x, y, target=mask)
    alone = InterpretableGradientLoss(model, error, lam=0.6, **settings)
    expected = [alone(x[[i]], y[[i]], target=None if mask is None else mask[[i]]) for i in range(len(x))]
    torch.testing.assert_close(values, torch.stack(expected))
    assert float(reg.penalty) == pytest.approx(float(values.mean()) / 0.6)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(values[1], parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected[1], parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_function_is_the_class():
    model, (x, y) = small_net(), data()
    mask = torch.rand(len(x), 1, *x.shape[2:], dtype=torch.float64).round()
    for settings in ({"transform": "low_pass"}, {"error": "mse", "target": "zero"}, {"criterion": "logit", "lam": 1.0}):
        ours = interpretable_gradient_loss(model, x, y, **settings)
        assert torch.equal(ours, InterpretableGradientLoss(model, **settings)(x, y))
    ours = interpretable_gradient_loss(model, x, y, "outside", target=mask, reduction="none")
    reg = InterpretableGradientLoss(model, "outside", target="given", reduction="none")
    assert torch.equal(ours, reg(x, y, target=mask))
    assert ours.shape == (len(x),)


def test_arguments_of_the_model_may_have_any_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x, *, step, target, y):
            return self.net(x) * step + target + y

    model, (x, y) = Named(), data()
    ours = interpretable_gradient_loss(model, x, y, model_kwargs={"step": 2, "target": 3, "y": 4})
    expected = InterpretableGradientLoss(model)._term_of(x, y, (), {"step": 2, "target": 3, "y": 4}, None, None)
    assert torch.equal(ours, expected)


def test_a_repeated_warning_is_given_once():
    """A mask of zeros is spoken of at the trial."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, "outside", target="given", start=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            reg(x, y, target=torch.zeros(len(x), 1, *x.shape[2:]))
    assert len(caught) == 1


def test_with_mixup_targets_and_a_criterion_of_ones_own():
    model, (x, _) = small_net(), data()
    probabilities = torch.rand(len(x), 4, dtype=torch.float64).softmax(1)
    criterion = functools.partial(F.cross_entropy, reduction="sum")
    for settings in ({}, {"criterion": criterion}):
        reg = InterpretableGradientLoss(model, **settings, **LATE)
        assert call(reg, model, x, probabilities, shared=True) == 0
    assert metrics.HIGHER_IS_BETTER  # plain imports: no import of their own


def test_a_backward_pass_before_the_loss():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)
    with reg.shared_forward():
        logits = model(x)
    F.cross_entropy(logits, y).backward()
    with pytest.raises(RuntimeError, match=r"got one that a backward pass has freed: call the loss before loss.backw"):
        reg(x, y)


def test_one_image_without_a_batch():
    model, (x, y) = small_net(), data()
    for target in (y[:1], y[0]):
        with pytest.raises(ValueError, match=r"expected one target for each of the 3 images, .* pass one image as a"):
            InterpretableGradientLoss(model)(x[0], target)


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_a_backbone_that_is_not_trained_at_first(shared):
    """Under no_grad for some steps: no fault before `start`, named after it."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head, self.waits = small_net(), nn.Linear(4, 4).double(), True

        def forward(self, x):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.waits):
                h = self.net(x)
            return self.head(h)

    model, (x, y) = Frozen(), data()
    reg = InterpretableGradientLoss(model, start=3)
    for _ in range(3):
        assert call(reg, model, x, y, shared) == 0
    with pytest.raises(RuntimeError, match="expected a criterion that depends on the images"):
        call(reg, model, x, y, shared)
    model.waits = False
    assert call(reg, model, x, y, shared) > 0
