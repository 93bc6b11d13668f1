"""The loss against a literal Algorithm 1, and its settings."""

import contextlib
import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from algorithm1 import algorithm1
from hypothesis import given
from hypothesis import strategies as st
from nets import data, small_net
from torch import nn

from interpgrad import InterpretableGradientLoss, input_gradients, low_pass
from interpgrad.criteria import cross_entropy

ERRORS = ["cos", "mae", "mse", "hi"]


def gradients_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_same_gradients(ours, expected):
    largest = max(reference.abs().max() for reference in expected if reference is not None)
    for value, reference in zip(ours, expected, strict=True):
        if reference is None:
            assert value is None
        else:  # a bias before batch norm has no gradient but rounding errors: hence the bound on the scale
            scale = max(reference.abs().max(), 1e-6 * largest)
            assert (value - reference).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("error", ERRORS)
def test_parameter_gradients_equal_algorithm_1(error, shared, training, inplace):
    reference = small_net().train(training)
    model = small_net(inplace=inplace).train(training)
    model.load_state_dict(reference.state_dict())
    x, y = data()
    expected = algorithm1(reference, x, y, error, lam=0.3)
    reg = InterpretableGradientLoss(model, error=error, lam=0.3, criterion="cross_entropy", batch_norm="coupled")
    if shared:
        with reg.shared_forward():
            logits = model(x)
        value = reg(x, y)
        assert torch.equal(logits, copy.deepcopy(reference)(x))
    else:
        value = reg(x, y)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(0.3 * reg.penalty, expected.detach(), rtol=1e-9, atol=0)
    assert not reg.penalty.requires_grad
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference))


@pytest.mark.parametrize("error", ERRORS)
def test_cosine_for_the_log(error):
    """Of the gradients themselves, whatever is compared."""
    (x, y), model = data(), small_net()
    reg = InterpretableGradientLoss(model, error=error, transform=lambda gradient: gradient.sum(1))
    assert reg.cosine is None
    reg(x, y)
    delta, guided = (gradient.flatten(1) for gradient in input_gradients(model, x, y))
    torch.testing.assert_close(reg.cosine, F.cosine_similarity(delta, guided).mean())
    assert not reg.cosine.requires_grad


def test_the_whole_loss_of_a_shared_forward_equals_the_plain_one():
    x, y = data()
    gradients = []
    for shared in (False, True):
        model = small_net().train()
        reg = InterpretableGradientLoss(model, lam=0.5)
        if shared:
            with reg.shared_forward():
                logits = model(x)
        else:
            logits = model(x)
        gradients.append(gradients_of(F.cross_entropy(logits, y) + reg(x, y), model))
    assert_same_gradients(*gradients)


def test_order_of_the_terms_does_not_matter():
    """The penalty before the classification loss, each with a backward pass of its own."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, lam=0.5)
    with reg.shared_forward():
        logits = model(x)
    penalty = reg(x, y)
    penalty.backward(retain_graph=True)
    F.cross_entropy(logits, y).backward()
    split = [parameter.grad for parameter in model.parameters()]
    model = small_net()
    total = F.cross_entropy(model(x), y) + InterpretableGradientLoss(model, lam=0.5)(x, y)
    assert_same_gradients(split, gradients_of(total, model))


def test_gradient_equals_finite_differences():
    """With the guided branch held fixed, as the paper detaches it, in a direction that crosses no kink."""
    model, (x, y) = small_net().eval(), data()
    _, fixed = input_gradients(model, x, y, criterion="cross_entropy")
    held = lambda delta, _: 1 - F.cosine_similarity(delta.flatten(1), fixed.flatten(1))  # noqa: E731
    reg = InterpretableGradientLoss(model, lambda d, g: held(d, g), lam=1.0, criterion="cross_entropy")
    ours = gradients_of(InterpretableGradientLoss(model, "cos", lam=1.0, criterion="cross_entropy")(x, y), model)
    directions = [torch.randn_like(parameter) for parameter in model.parameters()]
    slope = sum((g * d).sum() for g, d in zip(ours, directions, strict=True) if g is not None)
    step = 1e-7
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(sign * step * direction)
            values.append(reg(x, y))
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.sub_(sign * step * direction)
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(slope), rel=1e-5)


@given(st.integers(1, 5), st.integers(0, 1000), st.sampled_from(ERRORS))
def test_penalty_of_a_batch_is_the_mean_of_its_samples(n, seed, error):
    model, (x, y) = small_net().eval(), data(n=n, seed=seed)
    reg = InterpretableGradientLoss(model, error, lam=2.0)
    alone = [reg(x[i : i + 1], y[i : i + 1]) for i in range(n)]
    torch.testing.assert_close(reg(x, y), torch.stack(alone).mean(), rtol=1e-9, atol=1e-12)


@given(st.permutations(range(5)), st.sampled_from(ERRORS))
def test_permuting_the_batch_changes_nothing(order, error):
    model, (x, y) = small_net().train(), data(n=5)
    reg = InterpretableGradientLoss(model, error, lam=1.0)
    value = reg(x[order], y[order])
    expected = reg(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, model))


@given(st.integers(1, 5), st.integers(1, 13))
def test_every_computes_one_call_of_k_and_multiplies_it(every, calls):
    model, (x, y) = small_net().eval(), data()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    full = InterpretableGradientLoss(model, lam=1.0)(x, y)
    forwards.clear()
    reg = InterpretableGradientLoss(model, lam=1.0, every=every)
    for call in range(calls):
        value = reg(x, y)
        if call % every == 0:
            torch.testing.assert_close(value, every * full, rtol=1e-12, atol=0)
        else:
            assert value == 0
            assert value.shape == ()
            (value + sum(parameter.sum() for parameter in model.parameters())).backward()
            value.backward()
    assert len(forwards) == -(-calls // every)


def test_every_with_a_shared_forward_is_free_on_skipped_steps():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, lam=1.0, every=3)
    for call in range(6):
        with reg.shared_forward():
            assert bool(model._forward_pre_hooks) == (call % 3 == 0)
            logits = model(x)
        value = reg(x, y)
        assert (value != 0) == (call % 3 == 0)
        (F.cross_entropy(logits, y) + value).backward()


@pytest.mark.parametrize("shared", [False, True])
def test_every_where_a_step_calls_more_than_once(shared):
    """SAM, LBFGS: by the number of the step all its calls are computed, or none."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, every=2, start=2, warmup=4)
    seen = []
    for step in range(7):
        for _ in range(2):  # with the weights perturbed in between
            with reg.shared_forward(step) if shared else contextlib.nullcontext():
                model(x) if shared else None
            seen.append(reg(x, y, step=step).item())
            with torch.no_grad():
                model[0].weight += 1e-3
    once = InterpretableGradientLoss(small_net(), every=2, start=2, warmup=4)
    computed = [bool(once(x, y, step=step)) for step in range(7)]
    assert computed == [False, False, False, False, True, False, True]  # a weight of 0 at the start of the warm-up
    assert [bool(value) for value in seen] == [each for each in computed for _ in range(2)]
    assert int(reg.state_dict()["_extra_state"]) == 7
    for step in (-1, 1.0, "1"):
        with pytest.raises(ValueError, match="expected step to be the number of an optimizer's step"):
            reg(x, y, step=step)


def test_lbfgs_minimizes_one_function_a_step():
    """With a strong Wolfe search the loss falls, since every call of a step is of the same function."""
    model, (x, y) = small_net().eval(), data()
    reg = InterpretableGradientLoss(model, "mse", lam=0.1, every=2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    for step in range(4):
        values = []

        def closure(step=step, values=values):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + reg(x, y, step=step)
            loss.backward()
            values.append(loss.item())
            return loss

        optimizer.step(closure)
        assert len(values) > 1
        assert min(values) < values[0]


def test_images_that_come_again_and_are_skipped():
    """Said once: an even number of calls a step would leave the term in the first of them."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, every=2)
    reg(x, y)
    with pytest.warns(UserWarning, match=r"every=2: the images .* this call is skipped.* reg\(x, y, step=i\)"):
        reg(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (x.clone(), x.clone(), x):
            reg(images, y)
            images += 0  # a buffer that is filled anew
            reg(images, y)
    assert pickle.loads(pickle.dumps(reg))._computed is None


def test_every_counter_survives_a_checkpoint():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, every=3)
    reg(x, y)
    state = reg.state_dict()
    assert len(state) == 1
    assert not list(reg.parameters())
    resumed = InterpretableGradientLoss(model, every=3)
    resumed.load_state_dict(state)
    assert [bool(resumed(x, y)) for _ in range(3)] == [False, False, True]


def test_the_counter_is_kept_off_the_default_device():
    """On a GPU a checkpoint would have to be waited for, and on "meta" it would be lost."""
    reg = InterpretableGradientLoss(small_net())
    with torch.device("meta"):
        assert reg.state_dict()["_extra_state"].device.type == "cpu"


def test_start_waits_for_its_step_and_costs_nothing_before():
    """Zero, and the model is called once, to be tried; `every` and `warmup` count from there."""
    model, (x, y) = small_net(), data()
    full = InterpretableGradientLoss(model, lam=0.5)(x, y)
    reg = InterpretableGradientLoss(model, lam=0.5, start=3, every=2, warmup=4)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    terms = [reg(x, y) for _ in range(3)]
    assert [float(term) for term in terms] == [0.0] * 3
    assert all(term.requires_grad for term in terms)
    assert len(calls) == 1
    assert reg.logs() == {}
    with torch.no_grad():
        assert reg(x, y) == 0
        assert float(reg.penalty) == pytest.approx(float(full) / 0.5)
    state = reg.state_dict()
    reg = InterpretableGradientLoss(model, lam=0.5, start=3, every=2, warmup=4)
    reg.load_state_dict(state)
    with torch.enable_grad():
        later = [float(reg(x, y)) for _ in range(6)]
    assert later == pytest.approx([0, 0, 2 * float(full) * 0.5, 0, 2 * float(full), 0])
    for start in (-1, 0.5, "half"):
        with pytest.raises(ValueError, match="expected start to be a number of calls, an integer of at least 0"):
            InterpretableGradientLoss(model, start=start)


@pytest.mark.parametrize("every", [1, 3])
def test_warmup_grows_linearly_and_survives_a_checkpoint(every):
    model, (x, y) = small_net().eval(), data()
    full = float(InterpretableGradientLoss(model, lam=0.5)(x, y))
    reg = InterpretableGradientLoss(model, lam=0.5, warmup=8, every=every)
    for call in range(12):
        if call == 5:
            state = reg.state_dict()
            reg = InterpretableGradientLoss(model, lam=0.5, warmup=8, every=every)
            reg.load_state_dict(state)
        expected = every * full * min(1, call / 8) if call % every == 0 else 0
        assert float(reg(x, y)) == pytest.approx(expected, rel=1e-12)
    for warmup in (-1, 0.5):
        with pytest.raises(ValueError, match="expected warmup to be a number of calls, an integer of at least 0"):
            InterpretableGradientLoss(model, warmup=warmup)


def test_logs():
    model, (x, y) = small_net().eval(), data()
    reg = InterpretableGradientLoss(model, "mse", lam=0.5, every=2, warmup=4)
    assert reg.logs() == {}
    for call in range(4):
        value = reg(x, y)
        if call % 2 == 0:
            logs = {"penalty": float(reg.penalty), "cosine": float(reg.cosine), "term": float(value)}
        assert reg.logs() == logs
        assert all(type(each) is float for each in reg.logs().values())
    assert reg.logs()["term"] == pytest.approx(0.5 * 2 / 4 * 2 * float(reg.penalty))


def test_low_pass():
    gradient = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    padded = F.pad(gradient, (1, 1, 1, 1))
    literal = sum(padded[:, :, i : i + 7, j : j + 6] for i in range(3) for j in range(3)) / 9
    torch.testing.assert_close(low_pass(gradient), literal)
    for dims in (1, 2, 3):
        impulse = torch.zeros(1, 1, *[9] * dims)
        impulse[(0, 0, *[4] * dims)] = 5**dims
        assert float(low_pass(impulse, size=5).sum()) == pytest.approx(5**dims)
        assert torch.equal(low_pass(impulse, size=1), impulse)
    for size in (2, 0, 3.0):
        with pytest.raises(ValueError, match="expected size to be a positive odd number of pixels"):
            low_pass(gradient, size)
    with pytest.raises(ValueError, match="spatial dimensions"):
        low_pass(gradient.flatten(1))


SUMMED = {
    "nn.CrossEntropyLoss": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")),
    "with weights": (
        nn.CrossEntropyLoss(torch.arange(1.0, 5.0).double()),
        nn.CrossEntropyLoss(torch.arange(1.0, 5.0).double(), reduction="sum"),
    ),
    "F.cross_entropy": (F.cross_entropy, functools.partial(F.cross_entropy, reduction="sum")),
    "functools.partial": (
        functools.partial(F.cross_entropy, label_smoothing=0.1, reduction="mean"),
        functools.partial(F.cross_entropy, label_smoothing=0.1, reduction="sum"),
    ),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "cross_entropy"),
}


@pytest.mark.parametrize("name", SUMMED)
def test_losses_that_average_are_summed(name, device):
    """The gradient of a sample, and the value, must not depend on the size of its batch."""
    (criterion, summed), model, (x, y) = SUMMED[name], small_net().eval(), data(n=4)
    for each in (criterion, summed):
        if isinstance(each, nn.Module):
            each.to(device)  # with its weights
    alone = input_gradients(model, x[:1], y[:1], criterion=criterion)
    for whole, one, expected in zip(
        input_gradients(model, x, y, criterion=criterion),
        alone,
        input_gradients(model, x, y, criterion=summed),
        strict=True,
    ):
        torch.testing.assert_close(whole[:1], one, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-15)
    if isinstance(criterion, nn.Module) and name != "sum":
        assert criterion.reduction == "mean"  # as the user left it


def test_no_grad_returns_the_value_and_ignores_every():
    model, (x, y) = small_net().eval(), data()
    expected = InterpretableGradientLoss(model, lam=0.7)(x, y)
    reg = InterpretableGradientLoss(model, lam=0.7, every=4)
    with torch.no_grad():
        for _ in range(2):  # with the one below three, no multiple of `every`
            value = reg(x, y)
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
            assert not value.requires_grad
        with reg.shared_forward():
            model(x)
        assert reg(x, y) == value
    assert reg(x, y) != 0, "validation must not count as a training call"


def test_validation_between_a_shared_forward_and_its_loss():
    model, (x, y) = small_net().eval(), data()
    reg = InterpretableGradientLoss(model, lam=1.0)
    expected = reg(x, y)
    with reg.shared_forward():
        model(x)
    with torch.no_grad():
        reg(*data(seed=1))
    torch.testing.assert_close(reg(x, y), expected)


def test_lam_may_change_between_steps_and_a_step_scales_with_it():
    model, (x, y) = small_net().eval(), data()
    reg = InterpretableGradientLoss(model, lam=0.1)
    first = reg(x, y)
    reg.lam = 0.4
    torch.testing.assert_close(reg(x, y), 4 * first)


@pytest.mark.parametrize("shared", [False, True])
def test_lam_0_trains_bit_for_bit_like_no_regularizer(shared):
    states = []
    for regularized in (False, True):
        model = small_net(inplace=True).train()
        model.insert(3, nn.Dropout(0.3))
        torch.manual_seed(1)
        reg = InterpretableGradientLoss(model, lam=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            x, y = data(n=6, seed=step)
            if regularized and shared:
                with reg.shared_forward():
                    logits = model(x)
            else:
                logits = model(x)
            loss = F.cross_entropy(logits, y)
            if regularized:
                loss = loss + reg(x, y)
                assert reg.penalty is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_training_with_the_loss_lowers_it():
    model, (x, y) = small_net().train(), data(n=16)
    reg = InterpretableGradientLoss(model, lam=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    penalties = []
    for _ in range(30):
        with reg.shared_forward():
            logits = model(x)
        loss = F.cross_entropy(logits, y) + reg(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalties.append(float(reg.penalty))
    assert penalties[-1] < 0.8 * penalties[0]


def test_callable_error_and_transform():
    model, (x, y) = small_net().eval(), data()
    delta, guided = input_gradients(model, x, y)
    pool = lambda gradient: F.avg_pool2d(gradient, 2)  # noqa: E731
    reg = InterpretableGradientLoss(model, lambda d, g: (d - g).abs().amax((1, 2, 3)), lam=1.0, transform=pool)
    expected = (pool(delta) - pool(guided)).abs().amax((1, 2, 3)).mean()
    torch.testing.assert_close(reg(x, y).detach(), expected, rtol=1e-9, atol=0)


def test_criterion_logit():
    model, (x, y) = small_net().eval(), data()
    pair = input_gradients(model, x, y, criterion="logit")
    expected = 1 - F.cosine_similarity(*(gradient.flatten(1) for gradient in pair)).mean()
    reg = InterpretableGradientLoss(model, lam=1.0, criterion="logit")
    torch.testing.assert_close(reg(x, y).detach(), expected, rtol=1e-9, atol=0)


class WithOutput(nn.Module):
    """A model with another output, and more arguments than the images."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = small_net().eval(), wrap

    def forward(self, pixel_values, scale=1.0, *, shift=0.0):
        return self.wrap(self.net(pixel_values * scale) + shift)


class ModelOutput(dict):
    """As in Hugging Face's transformers."""

    @property
    def logits(self):
        return self["logits"]


OUTPUTS = {
    "logits": lambda z: ModelOutput(logits=z),
    "tuple": lambda z: (z, z + 1),
    "list": lambda z: [z, None],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_and_model_arguments(kind):
    x, y = data()
    model = WithOutput(OUTPUTS[kind])
    expected = InterpretableGradientLoss(nn.Sequential(model.net), lam=1.0)(2 * x, y)
    # delta is twice that of the scaled images, which cos does not see
    reg = InterpretableGradientLoss(model, lam=1.0)
    shift = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(reg(x, y, 2.0, shift=shift), expected)
    with reg.shared_forward():
        model(x, 2.0)
    torch.testing.assert_close(reg(x, y), expected)
    with reg.shared_forward():
        model(shift=0.0, scale=2.0, pixel_values=x)
    torch.testing.assert_close(reg(x, y), expected)


def test_gradient_flows_into_images_that_require_one():
    """Images made by a differentiable augmentation or a generator: the penalty is a function of them."""
    model, (x, y) = small_net().eval(), data()
    brightness = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    reg = InterpretableGradientLoss(model, lam=1.0, criterion="cross_entropy")
    (plain,) = torch.autograd.grad(reg(x * brightness, y), brightness)
    images = x * brightness
    with reg.shared_forward():
        model(images)
    (shared,) = torch.autograd.grad(reg(images, y), brightness)
    inputs = x * brightness
    (stock,) = torch.autograd.grad(algorithm1_cos(model, inputs, y), brightness)
    torch.testing.assert_close(plain, stock, rtol=1e-9, atol=0)
    torch.testing.assert_close(shared, stock, rtol=1e-9, atol=0)


def algorithm1_cos(model, inputs, y):
    (delta,) = torch.autograd.grad(F.cross_entropy(model(inputs), y, reduction="sum"), inputs, create_graph=True)
    _, guided = input_gradients(model, inputs.detach(), y, criterion="cross_entropy")
    return (1 - F.cosine_similarity(delta.flatten(1), guided.flatten(1))).mean()


@pytest.mark.parametrize("margin", [32, 64])
def test_confident_samples_keep_their_gradient(margin):
    """Near saturation delta is 1e-12 and less: neither cos nor the criterion may lose it in single precision."""
    model, x, y = small_net().eval().float(), data()[0].float(), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        model[-1].bias[0] = margin
    delta, _ = input_gradients(model, x, y)
    assert delta.flatten(1).norm(dim=1).max() < 1e-12
    ours = gradients_of(InterpretableGradientLoss(model, lam=1.0)(x, y), model)
    model.double()
    exact = gradients_of(InterpretableGradientLoss(model, lam=1.0)(x.double(), y), model)
    flat = [torch.cat([g.double().flatten() for g in each if g is not None]) for each in (ours, exact)]
    assert F.cosine_similarity(*flat, dim=0) > 0.9999
    assert float(flat[0].norm()) == pytest.approx(float(flat[1].norm()), rel=1e-3)


def test_cross_entropy_is_that_of_torch():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True) * 30
    for y in (torch.tensor([0, 4, -100, 2, 3, 1]), F.softmax(torch.randn(6, 5, dtype=torch.float64), 1)):
        value, expected = cross_entropy(logits, y), F.cross_entropy(logits, y, reduction="sum")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)
    maps = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    y = torch.randint(5, (2, 3, 3))
    assert cross_entropy(maps, y) == F.cross_entropy(maps, y, reduction="sum")


@pytest.mark.parametrize("margin", [-60, -30, -12, -3, 0, 3, 12, 30])
def test_second_derivative_of_cross_entropy(margin):
    """In single precision, of two classes, whose second derivative is p (1 - p)."""
    logits = torch.tensor([[-margin / 2, margin / 2]], requires_grad=True)
    (first,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])), logits, create_graph=True)
    (second,) = torch.autograd.grad(first[0, 1], logits)
    p = 1 / (1 + math.exp(-margin))
    rounding = 1e-7 if margin > 0 else 0  # of p near 1, beside a first derivative of that size
    assert first[0, 1].item() == pytest.approx(p, rel=1e-5)
    assert second[0, 1].item() == pytest.approx(p / (1 + math.exp(margin)), rel=1e-5, abs=rounding)


def test_cross_entropy_of_other_targets():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 1])
    torch.testing.assert_close(cross_entropy(logits, y.to(torch.uint8)), F.cross_entropy(logits, y, reduction="sum"))
    for masked in (1, 2, 3):  # classes ruled out
        ruled_out = torch.zeros(3, 4, dtype=torch.float64)
        ruled_out[:, :masked] = -torch.inf
        (gradient,) = torch.autograd.grad(cross_entropy(logits + ruled_out, torch.full((3,), 3)), logits)
        expected = logits.softmax(1) if masked == 0 else (logits + ruled_out).softmax(1)
        torch.testing.assert_close(gradient, expected.detach() - F.one_hot(torch.full((3,), 3), 4))


def test_zero_gradients_give_error_1_and_no_nan():
    """A linear head that starts at zero: delta is exactly zero."""
    model, (x, y) = small_net().eval(), data()
    nn.init.zeros_(model[-1].weight)
    reg = InterpretableGradientLoss(model, lam=1.0)
    value = reg(x, y)
    value.backward()
    assert value == 1
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("criterion", ["log_prob", "logit", "cross_entropy"])
@pytest.mark.parametrize(("ignored", "shared"), [(255, False), (-100, True)])
@pytest.mark.parametrize("error", [*ERRORS, lambda d, t: (d - t).square().sum((1, 2, 3)).sqrt()])
def test_ignored_images_are_left_out(error, shared, ignored, criterion):
    """The mean is that of the others' batch; alone, they are 0 and have no gradient: not even that of a root at 0."""
    model, (x, y) = small_net().eval(), data(5)
    kept = torch.tensor([True, False, True, True, False])
    y = torch.where(kept, y, ignored)

    def computed(x, y, **options):
        reg = InterpretableGradientLoss(model, error, 1.0, criterion=criterion, ignore_index=ignored, **options)
        if shared:
            with reg.shared_forward():
                model(x)
        return reg, reg(x, y)

    for target in (y, y[:, None]):
        (reg, value), (of_part, expected) = computed(x, target), computed(x[kept], y[kept])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        assert_same_gradients(gradients_of(value, model), gradients_of(expected, model))
        assert reg.logs() == pytest.approx(of_part.logs(), rel=1e-12)
    reg, values = computed(x, y, reduction="none")
    torch.testing.assert_close(values[kept], computed(x[kept], y[kept], reduction="none")[1], rtol=1e-12, atol=0)
    assert reg.logs() == pytest.approx(of_part.logs(), rel=1e-12)
    assert not values[~kept].any()
    assert all(each is None or not each.any() for each in gradients_of(values[~kept].sum(), model))
    reg, value = computed(x, torch.full_like(y, ignored))
    assert value == 0
    assert set(reg.logs().values()) == {0.0}
    assert all(each is None or not each.any() for each in gradients_of(value, model))


def test_ignored_images_of_other_targets():
    """Of a binary classifier; of pixels, of which an image has some or none; probabilities have none."""
    x, y = data(3)
    binary = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    pixels = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)).double()
    of_pixels = torch.arange(3 * 36).view(3, 6, 6) % 4
    of_pixels[0, :3], of_pixels[1] = 255, 255
    for model, target in (
        (binary, torch.tensor([1, 255, 0])),
        (binary, torch.tensor([0.3, 255, 0.9]).double()[:, None]),
        (pixels, of_pixels),
    ):
        reg = InterpretableGradientLoss(model, ignore_index=255)
        torch.testing.assert_close(reg(x, target), reg(x[[0, 2]], target[[0, 2]]))
    one_hot, model = F.one_hot(y, 4), small_net().eval()
    expected = InterpretableGradientLoss(model)(x, y)
    assert InterpretableGradientLoss(model, ignore_index=0)(x, one_hot) == expected


class TestSharedForward:
    """Ways to use it that are not the two lines of the README."""

    def setup_method(self):
        self.model, (self.x, self.y) = small_net().eval(), data()
        self.reg = InterpretableGradientLoss(self.model, lam=1.0)
        self.expected = self.reg(self.x, self.y)
        self.forwards = 0
        self.model.register_forward_hook(self.count)

    def count(self, *_):
        self.forwards += 1

    def test_two_regularizers(self):
        other = InterpretableGradientLoss(self.model, "mse", lam=1.0)
        plain = gradients_of(self.reg(self.x, self.y) + other(self.x, self.y), self.model)
        with self.reg.shared_forward(), other.shared_forward():
            self.model(self.x)
        shared = self.reg(self.x, self.y) + other(self.x, self.y)
        assert_same_gradients(gradients_of(shared, self.model), plain)
        assert self.forwards == 3

    def test_loss_inside_the_block(self):
        with self.reg.shared_forward():
            self.model(self.x)
            value = self.reg(self.x, self.y)
        assert self.forwards == 1
        torch.testing.assert_close(value, self.expected)
        torch.testing.assert_close(self.reg(self.x, self.y), self.expected)

    def test_other_calls_inside_the_block(self):
        with self.reg.shared_forward():
            self.model(self.x)
            InterpretableGradientLoss(self.model)(*data(seed=3))
            with torch.no_grad():
                self.model(data(seed=4)[0])
        torch.testing.assert_close(self.reg(self.x, self.y), self.expected)

    def test_users_own_pre_hook(self):
        self.model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        expected = self.reg(self.x, self.y)
        with self.reg.shared_forward():
            self.model(self.x)
        torch.testing.assert_close(self.reg(self.x, self.y), expected)

    def test_images_by_keyword_among_others(self):
        class Masked(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, mask=None):
                return self.net(x if mask is None else x * mask)

        model = Masked(self.model)
        reg = InterpretableGradientLoss(model, lam=1.0)
        with reg.shared_forward():
            model(mask=torch.ones_like(self.x), x=self.x)
        torch.testing.assert_close(reg(self.x, self.y), self.expected)

    def test_model_that_calls_itself(self):
        class Pyramid(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, levels=1):
                return self.net(x) + (self(x * 0.5, levels - 1) if levels else 0)

        model = Pyramid(self.model)
        reg = InterpretableGradientLoss(model, lam=1.0)
        expected = reg(self.x, self.y)
        with reg.shared_forward():
            model(self.x)
        torch.testing.assert_close(reg(self.x, self.y), expected)

    def test_a_call_that_fails_is_not_the_recorded_one(self):
        with self.reg.shared_forward():
            self.model(self.x)
            with pytest.raises(RuntimeError):
                self.model(self.x[:, :2])
        torch.testing.assert_close(self.reg(self.x, self.y), self.expected)

    def test_a_criterion_in_place_leaves_the_users_logits_alone(self):
        reg = InterpretableGradientLoss(self.model, criterion=lambda z, y: z.mul_(2).logsumexp(1).sum())
        with reg.shared_forward():
            logits = self.model(self.x)
        before = logits.clone()
        reg(self.x, self.y)
        assert torch.equal(logits, before)

    def test_distributed_data_parallel(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(self.model, static_graph=True)
            for given in (wrapped, self.model):
                reg = InterpretableGradientLoss(given, lam=1.0)
                with reg.shared_forward():
                    logits = wrapped(self.x)
                value = reg(self.x, self.y)
                torch.testing.assert_close(value, self.expected)
                self.model.zero_grad()
                (F.cross_entropy(logits, self.y) + value).backward()
                total = F.cross_entropy(self.model(self.x), self.y) + self.reg(self.x, self.y)
                assert_same_gradients([p.grad for p in self.model.parameters()], gradients_of(total, self.model))
        finally:
            torch.distributed.destroy_process_group()
