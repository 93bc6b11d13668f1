"""What users reported, each with the test that showed it."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import data, small_net
from torch import nn

import interpgrad
from interpgrad import InterpretableGradientLoss, fast_double_backward, input_gradients, metrics, saliency


def same(ours, expected):
    for value, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


# Wrappers and compilation


class Delegating(nn.Module):
    """As PEFT's wrappers: what it lacks it asks of the network inside, which may be compiled."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, x):
        return self.network((x - 0.5) / 0.2)


def test_a_wrapper_around_a_compiled_network_is_not_skipped():
    net, (x, y) = small_net().eval(), data()
    expected = input_gradients(Delegating(net), x, y)
    same(input_gradients(Delegating(torch.compile(net, backend="eager")), x, y), expected)


class OnFeatures(nn.Module):
    """A network with a function for its last activation."""

    def __init__(self, activation):
        super().__init__()
        self.network, self.activation = small_net().eval(), activation

    def forward(self, x):
        *first, _, last = self.network
        for layer in first:
            x = layer(x)
        return last(self.activation(x))


def test_compiled_functions_run_eagerly_in_a_plain_call():
    x, y = data()
    expected = input_gradients(OnFeatures(F.relu), x, y)
    compiled = OnFeatures(torch.compile(lambda h: h.relu(), backend="eager"))
    same(input_gradients(compiled, x, y), expected)
    model = OnFeatures(F.relu)
    model.forward = torch.compile(model.forward, backend="eager")
    same(input_gradients(model, x, y), expected)


def test_a_compiled_function_in_a_shared_forward():
    """Right, where torch.compile has run it eagerly inside, or an error."""
    model, (x, y) = OnFeatures(torch.compile(lambda h: h.relu() * 2, backend="eager")), data()
    reg = InterpretableGradientLoss(model, lam=1.0)
    expected = InterpretableGradientLoss(OnFeatures(lambda h: h.relu() * 2), lam=1.0)(x, y)
    with reg.shared_forward():
        model(x)
    try:
        same([reg(x, y)], [expected])
    except RuntimeError as error:
        assert "under torch.compile hides its activations; call the loss without" in str(error)  # noqa: PT017


def test_a_compiled_training_step():
    """The loss is left alone by it: the right value, at a break of the graph."""
    model, (x, y) = small_net(), data(n=8)
    reg = InterpretableGradientLoss(model, lam=1.0)

    def step():
        loss = F.cross_entropy(model(x), y) + reg(x, y)
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = step()
    same(torch.compile(step, backend="eager")(), expected)


# A shared forward pass and its loss


def test_logits_edited_in_place_after_a_shared_forward():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, lam=1.0)
    with reg.shared_forward():
        model(x)
    expected = reg(x, y)
    with reg.shared_forward():
        logits = model(x)
    logits /= 0.1  # a temperature
    logits[:, 0] = -torch.inf  # a mask
    same([reg(x, y)], [expected])


@pytest.mark.parametrize("change", ["weights", "mode"])
def test_a_forgotten_shared_forward_is_not_used_later(change):
    model, (x, y) = small_net(), data()
    reg, fresh = (InterpretableGradientLoss(model, lam=1.0) for _ in range(2))
    with reg.shared_forward():
        model(x)
    if change == "weights":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.1
    else:
        model.eval()
    same([reg(x, y)], [fresh(x, y)])


def test_a_checkpoint_from_before_the_loss_was_there():
    class Training(nn.Module):
        def __init__(self, with_loss):
            super().__init__()
            self.model = small_net()
            if with_loss:
                self.reg = InterpretableGradientLoss(self.model, every=4)

    module = Training(with_loss=True)
    module.reg._step = 3
    module.load_state_dict(Training(with_loss=False).state_dict())
    assert module.reg._step == 3
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"reg._extra_state": torch.tensor(1)})


def test_deepcopy_of_the_model_inside_a_shared_forward():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model, lam=1.0)
    with reg.shared_forward():
        copied = copy.deepcopy(model)
        model(x)
    expected = reg(x, y)
    same([InterpretableGradientLoss(copied, lam=1.0)(x, y)], [expected])


# One logit for each image


class Binary(nn.Module):
    """One logit, (N, 1) or (N,)."""

    def __init__(self, flat):
        super().__init__()
        self.network, self.flat = small_net(classes=1).eval(), flat

    def forward(self, x):
        logits = self.network(x)
        return logits[:, 0] if self.flat else logits


class Doubled(nn.Module):
    """The same as two."""

    def __init__(self, binary):
        super().__init__()
        self.binary = binary

    def forward(self, x):
        z = self.binary(x).reshape(-1, 1) / 2
        return torch.cat([-z, z], 1)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("criterion", ["log_prob", "logit", "cross_entropy"])
def test_one_logit(flat, criterion):
    """As two of the same softmax, for classes in every shape, for probabilities and for the predicted class."""
    model, (x, _) = Binary(flat), data(n=4)
    y = torch.tensor([0, 1, 1, 0])
    settings = {"criterion": criterion, "lam": 1.0}
    expected = input_gradients(Doubled(model), x, y, criterion=criterion)
    for target in (y, y[:, None], y.double(), y[:, None].double(), y.bool()):
        same(input_gradients(model, x, target, criterion=criterion), expected)
    same(input_gradients(model, x, criterion=criterion), input_gradients(Doubled(model), x, criterion=criterion))
    ours = InterpretableGradientLoss(model, **settings)(x, y)
    theirs = InterpretableGradientLoss(Doubled(model), **settings)(x, y)
    same([ours], [theirs])
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]  # of biases R is no function
    same(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights))
    for function in (saliency.gradient, saliency.guided_gradient):
        same([function(model, x, y, criterion=criterion)], [function(Doubled(model), x, y, criterion=criterion)])


def test_the_gradient_of_one_logit_is_that_of_binary_cross_entropy():
    model, (x, _) = Binary(flat=True).double(), data(n=4)
    y = torch.tensor([0.0, 1.0, 0.3, 0.9], dtype=torch.float64)
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    same(input_gradients(model, x, y, criterion="cross_entropy"), input_gradients(model, x, y, criterion=criterion))
    assert input_gradients(model, x, y)[0].abs().max() > 0


def test_maps_and_metrics_of_one_logit():
    model, (x, _) = Binary(flat=False), data(n=4)
    for name, method in saliency.CAMS.items():
        ours = method(model, x, "network.4")
        expected = method(Doubled(model), x, "binary.network.4")
        torch.testing.assert_close(ours, expected, msg=name)
    maps = torch.rand(4, 8, 8, dtype=torch.float64)
    ours, expected = (metrics.faithfulness(each, x, maps) for each in (model, Doubled(model)))
    same(ours.values(), expected.values())
    assert ours["INS"].std() > 0


def test_cross_entropy_of_one_logit_is_refused():
    model, (x, y) = Binary(flat=False), data(n=4)
    for criterion in (F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(
            ValueError, match="expected a criterion for one logit, got cross-entropy, which is constant"
        ):
            input_gradients(model, x, y * 0, criterion=criterion)


# Operations in the forward pass


def through(function):
    """A small network around a function of its feature maps (N, 6, 8, 8)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1).double(), nn.Linear(6, 4).double()

        def forward(self, x):
            return self.head(function(self.conv(x)).relu().mean((2, 3)))

    return Net()


FUNCTIONS = {
    "relu6 in place, then more in place": lambda h: F.relu6(h * 3, inplace=True).add_(0.1).mul_(2),
    "hardtanh in place, then more in place": lambda h: F.hardtanh(h * 3, inplace=True).add_(0.1),
    "vmap": lambda h: torch.func.vmap(lambda image: F.hardtanh(F.relu(image) - 0.1))(h),
    "jvp": lambda h: torch.func.jvp(lambda z: F.silu(z), (h,), (torch.ones_like(h),))[1],
    "complex convolution": lambda h: F.conv2d(
        torch.complex(h, h), torch.full((6, 6, 1, 1), 0.2 + 0.1j, dtype=torch.complex128)
    ).abs(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_that_stock_takes(name):
    model, (x, y) = through(FUNCTIONS[name]), data(n=3)
    images = x.clone().requires_grad_()
    logits = model(images)
    v = torch.zeros_like(logits).scatter(1, y[:, None], 1)
    (expected,) = torch.autograd.grad(logits, images, v)
    delta, _ = input_gradients(model, x, y, criterion="logit")
    same([delta], [expected])
    InterpretableGradientLoss(model, lam=1.0)(x, y).backward()
    assert model.conv.weight.grad.isfinite().all()
    assert model.conv.weight.grad.any()


class Tokens(nn.Module):
    """Tokens of which every sample has another number, as a nested tensor or padded."""

    def __init__(self, layout=None):
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.embed, self.norm = nn.Conv2d(3, 6, 2, stride=2).double(), nn.LayerNorm(6).double()
        self.mix, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        h = self.embed(x).flatten(2).transpose(1, 2)
        parts = [tokens[: 2 + index] for index, tokens in enumerate(h)]
        if self.layout is None:
            h = nn.utils.rnn.pad_sequence([F.relu(self.norm(self.mix(part))) for part in parts], batch_first=True)
        else:
            h = F.relu(self.norm(self.mix(torch.nested.as_nested_tensor(parts, layout=self.layout))))
            h = torch.nested.to_padded_tensor(h, 0.0)
        return self.head(h.mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    """Both gradients are right; stock has no double backward of them, and the loss says so in its words."""
    x, y = data(n=3)
    expected = input_gradients(Tokens(), x, y)
    model = Tokens(torch.jagged)
    same(input_gradients(model, x, y), expected)
    images = x.clone().requires_grad_()
    log_prob = F.log_softmax(model(images), 1).gather(1, y[:, None]).sum()
    same(torch.autograd.grad(log_prob, images, retain_graph=True), expected[:1])
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.grad(log_prob, images, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        InterpretableGradientLoss(model, lam=1.0)(x, y)
    with pytest.raises(RuntimeError, match=r"make them with layout=torch\.jagged"):
        input_gradients(Tokens(torch.strided), x, y)


def test_hardsigmoid_whose_saved_tensors_are_kept_on_the_cpu():
    model, (x, y) = through(F.hardsigmoid), data(n=3)
    reg = InterpretableGradientLoss(model, lam=1.0)
    expected = torch.autograd.grad(reg(x, y), model.conv.weight)
    with torch.autograd.graph.save_on_cpu():
        value = reg(x, y)
        found = torch.autograd.grad(value, model.conv.weight)
    same(found, expected)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_batched_gradients(norm):
    """A Jacobian with is_grads_batched keeps its graph, and is the one of single gradients."""
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d(5), "layer": nn.GroupNorm(1, 5), "none": nn.Identity()}
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norms[norm], nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    outer = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4)

    logits = model(x)
    rows = [torch.autograd.grad(logits, x, each, create_graph=True)[0] for each in outer]
    expected = torch.stack(rows).square().sum()
    with fast_double_backward():
        logits = model(x)
    (jacobian,) = torch.autograd.grad(logits, x, outer, create_graph=True, is_grads_batched=True)
    found = jacobian.square().sum()
    same([found], [expected])
    parameters = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    same(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters))


def test_random_numbers_of_python_and_numpy():
    """A plain call gives back what a forward pass draws of any generator."""

    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_net()

        def forward(self, x):
            return self.network(x * (1 + random.random() + float(np.random.rand())))

    model, (x, y) = Draws(), data()
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    InterpretableGradientLoss(model)(x, y)
    assert (random.random(), np.random.rand()) == expected


def test_fully_sharded_modules_of_the_first_kind_are_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp")

    class Sharded(fsdp.FullyShardedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)
            self.network = small_net()

        def forward(self, x):
            return self.network(x)

    x, y = data()
    model = nn.Sequential(Sharded())
    with pytest.raises(RuntimeError, match="got a FullyShardedDataParallel module: use FSDP2"):
        InterpretableGradientLoss(model)(x, y)
    with pytest.raises(RuntimeError, match="got a FullyShardedDataParallel module: use FSDP2"):
        with InterpretableGradientLoss(model).shared_forward():
            model(x)


# What is accepted, and what is said


def test_targets_in_other_forms():
    model, (x, y) = small_net(), data()
    for criterion in ("log_prob", "logit", "cross_entropy"):
        expected = input_gradients(model, x, y, criterion=criterion)
        one_hot = F.one_hot(y, 4)
        for target in (
            y.tolist(),
            y.cpu().numpy(),
            y[:, None],
            y.int(),
            one_hot,
            one_hot.bool(),
            one_hot.cpu().numpy().copy(),
        ):
            same(input_gradients(model, x, target, criterion=criterion), expected)
        with pytest.raises(TypeError, match="expected y to hold a target for each image, got int"):
            input_gradients(model, x, 3, criterion=criterion)
    with pytest.raises(ValueError, match=r"expected one target for each of the 3 images, got y of shape \(2,\)"):
        input_gradients(model, x, [0, 1])


def test_a_model_that_returns_its_loss_first():
    class Two(nn.Module):
        def __init__(self, *outputs):
            super().__init__()
            self.network, self.outputs = small_net(), outputs

        def forward(self, x):
            return (*self.outputs, self.network(x)) if self.network else self.outputs

    x, y = data()
    same(input_gradients(Two(torch.tensor(1.0)), x, y), input_gradients(small_net(), x, y))
    broken = Two(torch.tensor(1.0))
    broken.network = None
    with pytest.raises(TypeError, match="a tuple that begins with a tensor, got tuple"):
        input_gradients(broken, x, y)


def test_an_error_in_a_list():
    with pytest.raises(ValueError, match=r"expected error to be one of 'cos', .*, got \['cos'\]"):
        InterpretableGradientLoss(small_net(), error=["cos"])


def test_mean_and_std_of_any_kind():
    model, (x, _) = small_net().eval(), data()
    maps = torch.rand(3, 8, 8, dtype=torch.float64)
    expected = metrics.faithfulness(model, x, maps, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    tensors = torch.tensor([0.5] * 3), torch.full((3, 1, 1), 0.2, dtype=x.dtype)
    for mean, std in ((0.5, 0.2), tensors, (np.full(3, 0.5), [0.2])):
        same(metrics.faithfulness(model, x, maps, mean=mean, std=std).values(), expected.values())
    with pytest.raises(ValueError, match="expected mean and std to have 1 value or 3, one per channel, got 2"):
        metrics.faithfulness(model, x, maps, mean=[0.5, 0.5], std=0.2)


def test_maps_that_rounding_took_out_of_their_range():
    model, (x, _) = small_net().eval(), data()
    maps = torch.rand(3, 8, 8, dtype=torch.float64)
    maps[:, 0, 0], maps[:, 1, 1] = 1.0, 0.0
    expected = metrics.faithfulness(model, x, maps)
    maps[:, 0, 0], maps[:, 1, 1] = 1 + 1e-7, -1e-7
    same(metrics.faithfulness(model, x, maps).values(), expected.values())
    with pytest.raises(ValueError, match=r"expected maps in \[0, 1\]"):
        metrics.faithfulness(model, x, maps * 1.1)


def test_images_with_nan():
    x, _ = data()
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite images, got NaN or infinity in 1 of 3"):
        metrics.faithfulness(small_net().eval(), x, torch.rand(3, 8, 8))


def test_a_layer_off_the_way_to_the_logits():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.aside = small_net(), nn.Conv2d(3, 2, 3).double()

        def forward(self, x):
            self.unused = self.aside(x)
            return self.network(x)

    x, _ = data()
    with pytest.raises(RuntimeError, match="expected a layer on the way to the logits, got 'aside'"):
        saliency.grad_cam(Auxiliary(), x, "aside")


def test_smoothgrads_complaints():
    model, (x, y) = small_net(), data()
    with pytest.raises(ValueError, match="one for each of the 3 images, got shape"):
        saliency.smooth_gradient(model, x, y[:2])
    with pytest.raises(ValueError, match="chunk_size of at least 1"):
        saliency.smooth_gradient(model, x, y, chunk_size=0)


def test_submodules_without_an_import_of_their_own():
    for name in ("saliency", "metrics", "plot", "errors"):
        assert getattr(interpgrad, name) is sys.modules[f"interpgrad.{name}"]
    with pytest.raises(AttributeError, match="has no attribute 'sailency'"):
        interpgrad.sailency  # noqa: B018


def test_clones_of_metrics_hold_the_same_model():
    collection = pytest.importorskip("torchmetrics").MetricCollection
    first, second = small_net(seed=0).eval(), small_net(seed=0).eval()
    metrics_of_both = collection({"a": metrics.Faithfulness(first), "b": metrics.Faithfulness(second)})
    cloned = metrics_of_both.clone(prefix="val_")
    assert cloned["val_a" if "val_a" in cloned else "a"].model is first
    (x, _), maps = data(), torch.rand(3, 8, 8, dtype=torch.float64)
    for each in (metrics_of_both, cloned):
        each.update(x, maps)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter *= 1.5
    for each in (metrics_of_both, cloned):
        each.update(x, maps)
        found = each.compute()
        values = {name: float(value) for name, value in found.items() if name.endswith("INS")}
        assert len(set(values.values())) == 2, values
