"""Both gradients against an ATen-level oracle: every spelling of an activation, and real architectures."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from architectures import NAMES, architecture
from nets import SMOOTH, SPELLINGS, Apply, HidingPlaces, Rectified, data, small_net
from oracle import deterministic, oracle_gradients, relative_difference
from torch import nn
from torch.utils.checkpoint import checkpoint

from interpgrad import InterpretableGradientLoss, check, input_gradients

PAPER = {"criterion": "cross_entropy", "batch_norm": "coupled"}


def assert_equal_gradients(model, reference, x, y, activations="relu"):
    """Both gradients of the model, in the paper's reading, equal those of the oracle on the reference model."""
    inputs = x.clone().requires_grad_()
    with deterministic():
        output = reference(inputs)
    logits = output[0] if isinstance(output, tuple) else output
    expected = oracle_gradients(F.cross_entropy(logits, y, reduction="sum"), inputs, activations)
    with deterministic():
        delta, guided = input_gradients(model, x, y, **PAPER, activations=activations)
    assert relative_difference(delta, expected[0]) < 1e-9
    assert relative_difference(guided, expected[1]) < 1e-9
    assert relative_difference(guided, delta) > 1e-3, "the guided gradient must be another one"
    assert not guided.requires_grad


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_piecewise_linear_family(spelling):
    rectify, reference = SPELLINGS[spelling]
    x, y = data()
    assert_equal_gradients(Rectified(rectify), Rectified(reference), x, y)


@pytest.mark.parametrize("spelling", SMOOTH)
def test_smooth_rectifiers_with_all(spelling):
    model = Rectified(SMOOTH[spelling])
    assert_equal_gradients(model, model, *data(), activations="all")


@pytest.mark.parametrize("training", [True, False])
def test_all_hiding_places_in_one_net(training):
    model, reference = HidingPlaces(0).train(training), HidingPlaces(1).train(training)
    reference.load_state_dict(model.state_dict(), strict=True)
    assert_equal_gradients(model, reference, *data())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_architectures(name, training):
    model, size = architecture(name, training)
    x, y = data(n=2, size=size, classes=10)
    assert_equal_gradients(model, copy.deepcopy(model), x, y, "all")


def test_activations_under_checkpointing():
    model = small_net()

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=False)

    assert_equal_gradients(Checkpointed(), copy.deepcopy(model), *data())


def test_activations_called_on_another_thread():
    """As under nn.DataParallel, where thread-local recording would miss them without a word."""
    model = small_net()

    class Threaded(nn.Module):
        def forward(self, x):
            results = []
            worker = threading.Thread(target=lambda: results.append(model(x)))
            worker.start()
            worker.join()
            return results[0]

    assert_equal_gradients(Threaded(), copy.deepcopy(model), *data())


def test_what_no_thread_of_ours_sees():
    """The one limit: in place on a view, on a thread of the model's own. Delta is right, that activation not guided."""
    x, y = data()
    found = []
    for threaded in (True, False):
        model = small_net()

        def rectify(h, threaded=threaded):
            call = lambda: torch.relu_(h[:, :3])  # noqa: E731
            worker = threading.Thread(target=call if threaded else int)
            worker.start()
            worker.join()
            return h if threaded else h * torch.cat([h[:, :3].detach() > 0, torch.ones_like(h[:, 3:])], 1)

        model.insert(2, Apply(rectify))
        found.append(input_gradients(model, x, y))
    for ours, expected in zip(*found, strict=True):
        assert relative_difference(ours, expected) < 1e-12


def test_functional_activation_inside_an_aten_composite():
    """A transformer layer calls its ReLU where neither a module nor a function mode need see it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True).double()

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(12, 4).double()

        def forward(self, x):
            return self.head(self.layer(x.flatten(1).unflatten(1, (16, 12))).mean(1))

    model = Tokens()
    assert_equal_gradients(model, model, *data())


def test_a_relu_that_no_image_passes_is_no_activation():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3).double(), nn.Parameter(torch.ones(4, 1, 1).double())

        def forward(self, x):
            return (self.conv(x).tanh() * F.relu(self.scale)).mean((2, 3))

    with pytest.raises(RuntimeError, match="at least one activation"):
        input_gradients(Scaled(), *data())


def test_hooks_are_gone_for_the_double_backward():
    """Differentiating delta again equals stock autograd: nothing guided is left on the graph."""
    model, (x, y) = small_net(), data()
    cross_entropy = lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum")  # noqa: E731
    delta, _ = input_gradients(model, x, y, criterion=cross_entropy, batch_norm="coupled", create_graph=True)
    (delta**2).sum().backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    (stock,) = torch.autograd.grad(cross_entropy(model(inputs), y), inputs, create_graph=True)
    (stock**2).sum().backward()
    for value, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(value, parameter.grad, rtol=1e-9, atol=1e-12)


def test_inplace_relu_stays_in_place_and_saves_only_its_output():
    """The forward pass runs PyTorch's own kernels: same storage, one saved tensor."""
    conv = nn.Conv2d(3, 6, 3).double()
    saved, storages = [], []

    class InPlace(nn.Module):
        def forward(self, x):
            h = conv(x)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
                out = F.relu(h, inplace=True)
            storages.extend([h.data_ptr(), out.data_ptr()])
            return out.mean((2, 3))

    input_gradients(InPlace(), *data())
    assert storages[0] == storages[1]
    assert saved in ([], [storages[0]])  # an output may be saved without passing the hooks


def test_y_none_is_the_predicted_class():
    model, (x, _) = small_net().eval(), data()
    predicted = model(x).argmax(1)
    for value, expected in zip(input_gradients(model, x), input_gradients(model, x, predicted), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_criterion_logit(soft):
    model, (x, y) = small_net().eval(), data()
    inputs = x.clone().requires_grad_()
    loss = sum(model(inputs)[i, y[i]] for i in range(len(y)))
    expected = oracle_gradients(loss, inputs)
    target = F.one_hot(y, 4).double() if soft else y
    for value, reference in zip(input_gradients(model, x, target, criterion="logit"), expected, strict=True):
        assert relative_difference(value, reference) < 1e-9


def test_soft_targets_and_custom_criterion():
    model, (x, y) = small_net().eval(), data()
    soft = F.softmax(torch.randn(len(y), 4, dtype=torch.float64), 1)
    bce = lambda logits, targets: F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")  # noqa: E731
    for criterion in ("cross_entropy", bce):
        inputs = x.clone().requires_grad_()
        literal = (
            -(soft * model(inputs).log_softmax(1)).sum() if criterion == "cross_entropy" else bce(model(inputs), soft)
        )
        expected = oracle_gradients(literal, inputs)
        for value, reference in zip(input_gradients(model, x, soft, criterion=criterion), expected, strict=True):
            assert relative_difference(value, reference) < 1e-9


BY_HAND = {
    "silu": (lambda h: h * torch.sigmoid(h), F.silu),
    "the other way round": (lambda h: h.sigmoid() * h, F.silu),
    "quick GELU": (lambda h: h * torch.sigmoid(1.702 * h), lambda h: F.silu(1.702 * h) / 1.702),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_products_with_a_gate_of_their_own(name):
    """SiLU and quick-GELU in arithmetic are guided as the function is; other gates are left alone."""
    by_hand, function = BY_HAND[name]
    x, y = data()
    nets = []
    for activation in (by_hand, function):
        net = small_net()
        net[2], net[6], net[10] = (Apply(activation) for _ in range(3))
        nets.append(net)
    for ours, expected in zip(*(input_gradients(net, x, y) for net in nets), strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(InterpretableGradientLoss(net)(x, y) for net in nets))
    assert "guided at x * sigmoid(a x) x3. Nothing" in str(check(nets[0], x))
    assert "left alone" not in str(check(nets[0], x))
    with pytest.raises(RuntimeError, match="expected activations of the family"):
        nets[0][2] = nn.ReLU()
        input_gradients(nets[0], x, y, activations="relu")
    for squashes in (lambda h: 2 * torch.sigmoid(2 * h) - 1, lambda h: h.detach() * torch.sigmoid(3 * h)):
        net = small_net()
        net.insert(3, Apply(squashes))
        assert "guided at Relu x3. Nothing" in str(check(net, x))
        input_gradients(net, x, y, activations="relu")
    gates = small_net()
    gates.insert(3, Apply(lambda h: h * torch.sigmoid(h.mean(1, keepdim=True)) * torch.sigmoid(h[:, :1])))
    assert "guided at Relu x3. Nothing" in str(check(gates, x))
    assert "Sigmoid x2, not guided" in str(check(gates, x))
