"""What the input gradient is compared with: every target against literal formulas, in every use of the loss."""

import copy
import functools
import itertools
import threading
import warnings

import frozen_oracle as frozen
import pytest
import torch
import torch.nn.functional as F
from flops import count_flops
from nets import Checkpointed, autocast, data, small_net
from oracle import oracle_gradients, relative_difference
from test_frozen import assert_same_gradients, gradients_of
from torch import nn

from interpgrad import InterpretableGradientLoss, errors, input_gradients, low_pass
from interpgrad.double_backward import rectifier

MASK = torch.arange(3 * 64).view(3, 1, 8, 8) % 3 == 0


def towards_the_runner_up(passes):
    """A callable that asks for everything."""
    v = F.one_hot(passes.logits.topk(2, 1).indices[:, 1], 4).to(passes.logits.dtype)
    return passes.delta - 0.5 * passes.gradient(v) + passes.gradient(v, guided=True)


TARGETS = {
    "guided": {"target": "guided"},
    "low_pass": {"target": "low_pass"},
    "zero": {"target": "zero", "error": "mse"},
    "given": {"target": "given"},
    "mask": {"target": "given", "error": "outside"},
    "callable": {"target": towards_the_runner_up},
}
MAP = torch.linspace(-1, 1, 64).view(8, 8).sin()


def given(name, x):
    """What the call takes beside x and y."""
    target = {"given": MAP, "mask": MASK}.get(name)
    return {} if target is None else {"target": target.to(x.device)}


def loss_of(model, name, x, y, shared=False, logits=None, **settings):
    """Cross-entropy and the term."""
    reg = InterpretableGradientLoss(model, lam=1.0, **TARGETS[name] | settings)
    if shared:
        with reg.shared_forward():
            logits = model(x)
    else:
        logits = model(x)
    return F.cross_entropy(logits, y) + reg(x, y, **given(name, x))


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_literal_reference(name, shared):
    """Frozen statistics, with a forward pass for each gradient."""
    model, (x, y) = small_net(), data()
    reference = copy.deepcopy(model)
    delta, guided, logits = frozen.reference(reference, x, y)
    d = delta.detach()
    if name == "callable":
        v = F.one_hot(logits.topk(2, 1).indices[:, 1], 4)
        with frozen.constant_statistics():
            inputs = x.clone().requires_grad_()
            of_v = oracle_gradients((copy.deepcopy(reference)(inputs) * v).sum(), inputs)
        made = d - 0.5 * of_v[0] + of_v[1]
    else:
        made = {
            "guided": guided,
            "low_pass": F.conv2d(d, torch.ones(3, 1, 3, 3, dtype=d.dtype) / 9, padding=1, groups=3),
            "zero": torch.zeros_like(d),
            "given": MAP.to(d).expand_as(d),
            "mask": MASK.to(d).expand_as(d),
        }[name]
    expected = frozen.penalty(delta, made, TARGETS[name].get("error", "cos"))
    reg = InterpretableGradientLoss(model, lam=1.0, **TARGETS[name])
    if shared:
        with reg.shared_forward():
            model(x)
    value = reg(x, y, **given(name, x))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-15)
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference))


def assert_is_the_penalty(stock, x, score, **settings):
    """The class has the value and the gradient of a penalty in stock autograd."""
    model = small_net(classes=1)
    reference = copy.deepcopy(model)
    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(reference(images)), images, create_graph=True)
    expected = stock(gradient)
    reg = InterpretableGradientLoss(
        model, target="zero", criterion=lambda logits, _: score(logits), batch_norm="coupled", **settings
    )
    value = reg(x, None)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference))


def test_r1():
    """Mescheder et al., arXiv 1801.04406: gamma / 2 times the mean squared norm, as in the how-to."""
    assert_is_the_penalty(
        lambda gradient: 10 / 2 * gradient.flatten(1).square().sum(1).mean(),
        data()[0],
        lambda scores: scores.sum(),
        error=lambda delta, zero: delta.flatten(1).square().sum(1),
        lam=10 / 2,
    )


def test_wgan_gp():
    """Gulrajani et al., arXiv 1704.00028."""
    assert_is_the_penalty(
        lambda gradient: 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean(),
        torch.lerp(data()[0], data(seed=1)[0], torch.rand(3, 1, 1, 1, dtype=torch.float64)),
        lambda scores: scores.sum(),
        error=lambda delta, zero: (delta.flatten(1).norm(dim=1) - 1).square(),
        lam=10,
    )


def test_the_classical_gradient_penalty():
    """Drucker and LeCun, 1992: the mean square of the cross-entropy's input gradient."""
    model, (x, y) = small_net(), data()
    reference, images = copy.deepcopy(model), x.clone().requires_grad_()
    loss = F.cross_entropy(reference(images), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    expected = gradient.square().mean()
    settings = {"criterion": "cross_entropy", "batch_norm": "coupled"}
    value = InterpretableGradientLoss(model, "mse", lam=1.0, target="zero", **settings)(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference))


def test_right_for_the_right_reasons():
    """Ross et al., arXiv 1703.03717, equation 1: squares of the irrelevant gradient of all log-probabilities' sum."""
    model, (x, y) = small_net(), data()
    reference, images = copy.deepcopy(model), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference(images).log_softmax(1).sum(), images, create_graph=True)
    relevant = MASK.to(x)
    expected = ((1 - relevant) * gradient).square().sum() / len(x)
    reg = InterpretableGradientLoss(
        model,
        error=lambda delta, mask: ((1 - mask) * delta).square().flatten(1).sum(1),
        lam=1.0,
        target="given",
        criterion=lambda logits, y: logits.log_softmax(1).sum(),
        batch_norm="coupled",
    )
    value = reg(x, y, target=MASK.to(x.device))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference))


@pytest.mark.parametrize(("name", "limit"), [("guided", 7 / 3), ("low_pass", 2), ("zero", 2), ("mask", 2)])
def test_counted_flops(name, limit):
    """Of a step with a shared forward pass: no guided pass where the target needs none."""
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(12)))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    x, y = data()
    with count_flops() as plain:
        F.cross_entropy(model(x), y).backward()
    with count_flops() as regularized:
        loss_of(model, name, x, y, shared=True).backward()
    assert regularized.get_total_flops() / plain.get_total_flops() == pytest.approx(limit, rel=0.015)


@pytest.mark.parametrize("name", ["low_pass", "zero", "given", "mask"])
def test_a_network_without_rectifiers(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 4)).double()
    loss_of(model, name, *data()).backward()
    with pytest.raises(RuntimeError, match="at least one activation"):
        loss_of(model, "guided", *data())


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("name", TARGETS)
def test_checkpointing(name, shared):
    model, (x, y) = small_net(), data()
    reference, alone = copy.deepcopy(model), copy.deepcopy(model)
    value, expected = loss_of(Checkpointed(model), name, x, y, shared), loss_of(reference, name, x, y, shared)
    torch.testing.assert_close(value, expected)
    assert_same_gradients(gradients_of(value, model), gradients_of(expected, reference))
    F.cross_entropy(Checkpointed(alone)(x), y).backward()  # torch counts a recomputed batch twice
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), alone.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TARGETS)
def test_autocast(name, dtype):
    """Near single precision, with a scale in float16: the images' gradients underflow without."""
    model, (x, y) = small_net().float().eval(), data()
    x = x.float()
    with torch.no_grad():
        model[-1].weight *= 1e-3 if dtype == torch.float16 else 1
    terms, gradients = [], []
    scale = 2.0**16 if name == "zero" else 1  # as torch.amp.GradScaler has it; the others are scale-free
    for enabled in (True, False):
        with autocast(dtype) if enabled else torch.enable_grad():
            term = InterpretableGradientLoss(model, lam=1.0, **TARGETS[name])(x, y, **given(name, x))
        assert term.dtype == torch.float32
        terms.append(term.detach())
        gradients.append(torch.cat([gradient.double().flatten() for gradient in gradients_of(scale * term, model)]))
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(*terms, rtol=tolerance, atol=0)
    assert F.cosine_similarity(*gradients, dim=0, eps=0) > 1 - tolerance


@pytest.mark.parametrize("name", TARGETS)
def test_every_start_and_warmup(name):
    model, (x, y) = small_net().eval(), data()
    settings, target = TARGETS[name], given(name, x)
    full = float(InterpretableGradientLoss(model, lam=1.0, **settings)(x, y, **target).detach())
    reg = InterpretableGradientLoss(model, lam=1.0, every=2, start=2, warmup=4, **settings)
    with torch.no_grad():
        assert reg(x, y, **target) == 0
    values = [float(reg(x, y, **target).detach()) for _ in range(7)]
    assert values == pytest.approx([0, 0, 0, 0, 2 * full * 0.5, 0, 2 * full])
    with torch.no_grad():
        torch.testing.assert_close(float(reg(x, y, **target)), full)


@pytest.mark.parametrize("name", TARGETS)
def test_a_separate_backward_pass_where_smooth_activations_meet_batch_norm(name):
    model, (x, y) = small_net(), data()
    for index in (2, 6):
        model[index] = nn.SiLU()
    plain, shared = (loss_of(model, name, x, y, shared) for shared in (False, True))
    found = gradients_of(plain, model)
    assert_same_gradients(found, gradients_of(shared, model))
    delta, guided, logits = frozen.reference(model, x, y)
    d = delta.detach()
    if name != "callable":
        made = {"guided": guided, "low_pass": low_pass(d), "zero": 0 * d, "given": MAP.to(d), "mask": MASK.to(d)}[name]
        error = TARGETS[name].get("error", "cos")
        term = frozen.penalty(delta, made.expand_as(d), error)
        expected = gradients_of(F.cross_entropy(logits, y) + term, model)
        assert_same_gradients(found, expected)


def test_threads_wait_for_each_other():
    model, (x, y) = small_net().eval(), data()
    expected = {name: loss_of(model, name, x, y).detach() for name in TARGETS}
    found = {}

    def call(name):
        for _ in range(3):
            found[name] = loss_of(model, name, x, y).detach()

    threads = [threading.Thread(target=call, args=(name,)) for name in TARGETS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pair", list(itertools.combinations(TARGETS, 2)), ids=" and ".join)
def test_two_terms_on_one_shared_forward(pair):
    model, (x, y) = small_net(), data()
    reference, calls = copy.deepcopy(model), []
    model.register_forward_hook(lambda *_: calls.append(1))
    first, second = (InterpretableGradientLoss(model, lam=1.0, **TARGETS[name]) for name in pair)
    with first.shared_forward(), second.shared_forward():
        logits = model(x)
    loss = F.cross_entropy(logits, y)
    for reg, name in zip((first, second), pair, strict=True):
        loss = loss + reg(x, y, **given(name, x))
    assert len(calls) == 1
    expected = F.cross_entropy(reference(x), y)
    for name in pair:
        expected = expected + InterpretableGradientLoss(reference, lam=1.0, **TARGETS[name])(x, y, **given(name, x))
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients_of(loss, model), gradients_of(expected, reference))


class Remembered(nn.Module):
    """The mean map of the batches so far."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 8, 8, dtype=torch.float64))

    def forward(self, passes):
        self.mean = 0.9 * self.mean + 0.1 * passes.delta.mean(0, keepdim=True)
        return self.mean


def test_a_module_is_registered():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, target=Remembered())
    assert sorted(reg.state_dict()) == ["_extra_state", "target.mean"]
    assert not list(reg.parameters())
    reg(x, y)
    resumed = InterpretableGradientLoss(model, target=Remembered())
    resumed.load_state_dict(reg.state_dict())
    assert torch.equal(resumed.target.mean, reg.target.mean)
    assert reg.target.mean.any()
    assert reg.float().target.mean.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float64


def test_checkpoints_of_before_the_loss_was_there():
    model = small_net()
    holder = nn.ModuleDict({"model": model, "reg": InterpretableGradientLoss(model, target=Remembered(), every=3)})
    holder["reg"](*data())
    before = {f"model.{name}": value for name, value in model.state_dict().items()}
    holder.load_state_dict(before)
    assert int(holder["reg"].get_extra_state()) == 1
    with pytest.raises(RuntimeError, match=r"reg\.target\.mean"):  # but a later one that lacks something is told of
        holder.load_state_dict(before | {"reg._extra_state": torch.tensor(2)})


def test_what_passes_offer():
    model, (x, y) = small_net(), data()
    kept = []

    def target(passes):
        kept.append(passes)
        assert torch.equal(passes.x, x)
        assert passes.y is y
        torch.testing.assert_close(passes.v, F.one_hot(y, 4) - passes.logits.softmax(1))
        assert not any(each.requires_grad for each in (passes.x, passes.logits, passes.v, passes.delta))
        torch.testing.assert_close(passes.gradient(), passes.delta)
        torch.testing.assert_close(passes.gradient(-2 * passes.v), -2 * passes.delta)
        with pytest.raises(ValueError, match=r"expected v to have the shape of the logits, \(3, 4\), got \(3,\)"):
            passes.gradient(passes.v[:, 0])
        expected = input_gradients(model, x, y)
        torch.testing.assert_close((passes.delta, passes.gradient(guided=True)), expected)
        return passes.delta.requires_grad_() * 2  # what has a graph is a constant all the same

    reg = InterpretableGradientLoss(model, target=target)
    assert float(reg(x, y).detach()) == pytest.approx(0, abs=1e-12)
    with pytest.raises(RuntimeError, match="got one after: keep its result"):
        kept[0].gradient()


@pytest.mark.parametrize("target", ["given", "callable"])
def test_a_target_with_a_graph_is_a_constant(target):
    """Of the model's own parameters, through which no gradient runs."""
    model, (x, y) = small_net(), data()
    gradients = []
    for detached in (False, True):

        def made(passes=None, detached=detached):
            scaled = x.cos() * model[0].weight.sum()
            return scaled.detach() if detached else scaled

        reg = InterpretableGradientLoss(model, "mse", lam=1.0, target="given" if target == "given" else made)
        gradients.append(gradients_of(reg(x, y, **{"target": made()} if target == "given" else {}), model))
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


def test_delta_is_taken_once():
    model, (x, y) = small_net(), data()
    operations = []
    for ask in (False, True):
        reg = InterpretableGradientLoss(
            model, target=lambda passes, ask=ask: torch.ones_like(passes.delta if ask else passes.x)
        )
        with count_flops() as counter:
            reg(x, y)
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1]


BAD = {
    "missing": ({}, None, TypeError, 'got none for a loss with target="given": reg'),
    "not asked for": ({"target": "guided"}, MAP, TypeError, "got Tensor for a loss with target='guided'"),
    "no tensor": ({}, [0.5], TypeError, "floating point or bool, got list"),
    "integers": (
        {},
        MAP.int(),
        TypeError,
        r"got a tensor of torch.int32: use torch.as_tensor\(t\).float\(\)",
    ),
    "shape": ({}, MAP[None].repeat(5, 1, 1), ValueError, r"\(3, 3, 8, 8\), or one that broadcasts to it, got \(5, 8"),
    "as many images as channels": ({}, MAP.repeat(3, 1, 1), ValueError, "what its first dimension is, got .3, 8, 8."),
    "device": ({}, MAP.to("meta"), ValueError, r"as the images, got meta: use t.to\(x.device\)"),
    "NaN": ({}, MAP / 0, ValueError, "expected a finite target, got NaN or infinity"),
    "of a callable": ({"target": lambda passes: 3}, None, TypeError, "floating point or bool, got int"),
    "NaN of a callable": ({"target": lambda passes: passes.x / 0}, None, ValueError, "expected a finite target"),
    "mask shape": ({"error": "outside"}, MASK[:, :, :4], ValueError, r"a mask \(N, 1, H, W\), .* got \(3, 1, 4, 8\)"),
    "mask above 1": ({"error": "outside"}, MASK * 255.0, ValueError, "in .0, 1., got values from 0 to 255"),
    "mask below 0": ({"error": "outside"}, MAP, ValueError, "expected a mask in .0, 1., got values from -"),
}


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("name", BAD)
def test_bad_targets(name, shared):
    """Nothing is lost: the call can be repeated."""
    settings, target, kind, message = BAD[name]
    model, (x, y) = small_net().eval(), data()
    settings = {"target": "given"} | settings
    made = settings["target"]
    reg = InterpretableGradientLoss(model, **settings)
    if shared:
        with reg.shared_forward():
            model(x)
    target = target.to(x.device) if isinstance(target, torch.Tensor) and name != "device" else target
    with pytest.raises(kind, match=message):
        reg(x, y, **{} if target is None else {"target": target})
    assert reg.penalty is None
    assert int(reg.get_extra_state()) == 0
    if callable(made):
        reg.target = lambda passes: passes.x
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    assert reg(x, y, **{"target": MASK.to(x.device)} if made == "given" else {}).isfinite()
    assert len(forwards) == (not shared)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "smooth"}, "expected target to be one of 'guided', 'low_pass', 'zero', 'given' or a callable"),
        ({"target": None}, "or a callable .passes. -> tensor, got None"),
        ({"target": "zero"}, 'got error="cos" for target="zero", which has no direction: use "mse"'),
        ({"target": "zero", "error": "hi"}, 'got error="hi" for target="zero"'),
        ({"error": "outside"}, 'got target="guided", which is no mask: use target="given"'),
        ({"error": "outside", "target": "low_pass"}, 'got target="low_pass", which is no mask'),
        ({"error": "outside", "target": "zero"}, 'got target="zero", which is no mask'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        InterpretableGradientLoss(small_net(), **settings)


def test_a_mask_of_zeros_is_named_once():
    model, (x, y) = small_net(), data()
    mask = MASK.to(x.device) & torch.tensor([True, False, False]).view(3, 1, 1, 1)
    reg = InterpretableGradientLoss(model, "outside", target="given")
    with pytest.warns(UserWarning, match="mask: 2 of 3 images have one of zeros, an error of 1 and no gradient"):
        reg(x, y, target=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg(x, y, target=mask)
        InterpretableGradientLoss(model, "outside", target="given")(x, y, target=MASK[:, 0].to(x.device))


def test_masks_in_other_forms():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, "outside", target="given")
    mask = MASK.to(x.device)
    expected = reg(x, y, target=mask)
    for form in (mask[:, 0], mask.expand_as(x), mask.double(), mask.float(), mask[:, 0].half()):
        torch.testing.assert_close(reg(x, y, target=form), expected)
    summed = InterpretableGradientLoss(model, "outside", target="given", transform=lambda delta: delta.sum(1))
    keeping = InterpretableGradientLoss(model, "outside", target="given", transform=lambda d: d.sum(1, keepdim=True))
    torch.testing.assert_close(summed(x, y, target=mask[:, 0]), keeping(x, y, target=mask))
    delta = input_gradients(model, x, y)[0].sum(1)
    literal = 1 - (delta.square() * mask[:, 0]).sum((1, 2)) / delta.square().sum((1, 2))
    torch.testing.assert_close(summed.penalty, literal.mean())


def test_a_mask_of_ones_contributes_nothing():
    """An image that nobody annotated: the gradient is that of the others."""
    model, (x, y) = small_net().eval(), data()
    mask = MASK.to(x.device).clone()
    mask[1:] = True
    reg = InterpretableGradientLoss(model, "outside", lam=3.0, target="given")
    whole = reg(x, y, target=mask)
    alone = InterpretableGradientLoss(model, "outside", lam=1.0, target="given")(x[:1], y[:1], target=mask[:1])
    torch.testing.assert_close(whole, alone)
    assert_same_gradients(gradients_of(whole, model), gradients_of(alone, model))
    none = reg(x, y, target=torch.ones_like(mask))
    assert none == 0
    assert not any(gradient.any() for gradient in gradients_of(none, model))


@pytest.mark.parametrize("name", TARGETS)
def test_logs(name):
    """The cosine where two directions are compared."""
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, **TARGETS[name])
    reg(x, y, **given(name, x))
    assert set(reg.logs()) == {"penalty", "term"} | (set() if name in ("zero", "mask") else {"cosine"})


def test_recipe():
    model = small_net()
    reg = InterpretableGradientLoss.recipe(model, 100)
    found = (reg.lam, reg.every, reg.start, reg.warmup, reg.transform)
    assert found == (0.3, 4, 50, 25, low_pass)
    changed = InterpretableGradientLoss.recipe(model, 100, lam=1.0, target="given", error="outside", transform=None)
    assert (changed.lam, changed.every, changed.target, changed.transform) == (1.0, 4, "given", None)
    for steps in (0, 2.5, None):
        with pytest.raises(ValueError, match=r"number of training steps, .* pass epochs \* len\(loader\)"):
            InterpretableGradientLoss.recipe(model, steps)


def test_all_settings_are_printed():
    reg = InterpretableGradientLoss(small_net(), "mae", target=towards_the_runner_up, transform=low_pass)
    assert repr(reg) == (
        "InterpretableGradientLoss(error='mae', lam=0.0075, target=towards_the_runner_up, criterion='log_prob', "
        "batch_norm='frozen', every=1, start=0, warmup=0, activations='all', ignore_index=-100, transform=low_pass, "
        "reduction='mean')"
    )


class Relu(torch.autograd.Function):
    """A user's own, of a native name: halves."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, g):
        return g / 2


def test_functions_are_known_by_what_they_are_and_not_by_their_names(monkeypatch):
    model, (x, y) = small_net(), data()

    class Halved(nn.Module):
        def forward(self, h):
            return Relu.apply(h)

    class Half(nn.Module):
        def forward(self, h):
            return h / 2

    halved, plain = (nn.Sequential(*model[:2], half, *model[2:]) for half in (Halved(), Half()))
    for found, expected in zip(input_gradients(halved, x, y), input_gradients(plain, x, y), strict=True):
        assert relative_difference(found, expected) < 1e-12
    expected = input_gradients(model, x, y)
    renamed = type("Rectify", (rectifier.Relu,), {})  # the node takes its name from the class
    monkeypatch.setattr(rectifier, "Relu", renamed)
    for found, each in zip(input_gradients(model, x, y), expected, strict=True):
        assert torch.equal(found, each)


def test_bad_calls_are_refused_at_skipped_steps():
    reg, (x, y) = InterpretableGradientLoss(small_net(), target="given", every=2), data()
    reg(x, y, target=MAP.to(x.device))
    with pytest.raises(TypeError, match="expected a target at this call"):
        reg(x, y)


@pytest.mark.parametrize("name", ["batch norm", "float16"])
def test_what_a_callable_switches_off_is_not_off_for_delta(name):
    """And what it changes in place is a copy."""
    model, (x, y) = small_net().float(), data(n=4)
    model[2], x = nn.SiLU(), x.float()

    def inside(passes):
        changed = passes.delta.clamp_(min=0)
        for each in (passes.v, passes.logits):
            each.zero_()
        return changed

    def switched(passes):
        with torch.no_grad(), autocast(torch.bfloat16):
            return inside(passes)

    gradients = []
    for target in (switched, lambda passes: passes.delta.clamp(min=0)):
        with autocast(torch.float16) if name == "float16" else torch.enable_grad():
            term = InterpretableGradientLoss(copy.deepcopy(model), lam=1.0, target=target)
            value = term(x, y)
        gradients.append([value.detach(), *gradients_of(value, term.model)])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)
    assert any(gradient.any() for gradient in gradients[0][1:])


def test_known_errors_may_be_given_as_functions():
    mask = MASK.clone()
    for error in (errors.outside, errors.mse):
        by_name, by_function = (
            InterpretableGradientLoss(small_net(), each, target="given", transform=low_pass)
            for each in (error.__name__, error)
        )
        x, y = data()
        given = {"target": mask.to(x.device) if error is errors.outside else MAP.to(x.device)}
        assert torch.equal(by_name(x, y, **given), by_function(x, y, **given))
    with pytest.raises(ValueError, match="which has no direction"):
        InterpretableGradientLoss(small_net(), errors.cos, target="zero")


class Unhashable:
    """As a dataclass with a method of this name is."""

    __hash__ = None

    def __call__(self, first, second=None):
        return _wide(first, 3) if second is None else (first - second).flatten(1).norm(dim=1)


def test_callables_without_a_hash():
    assert InterpretableGradientLoss(small_net(), Unhashable(), target=Unhashable())(*data()).isfinite()
    with pytest.raises(ValueError, match="a mask"):
        InterpretableGradientLoss(small_net(), "outside", target=Unhashable())(*data())


def test_a_callable_with_settings_of_its_own():
    wide = InterpretableGradientLoss(small_net(), target=functools.partial(_wide, size=5))
    assert wide(*data()).isfinite()


def _wide(passes, size):
    return low_pass(passes.delta, size)
