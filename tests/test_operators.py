"""Operators that hide what is in them, or their derivatives: right, or refused with their name."""

import itertools

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
import torchvision
from nets import Apply, data, seeded, small_net
from test_messages import net_with, raises
from torch import nn

from interpgrad import InterpretableGradientLoss, check, fast_double_backward, input_gradients, saliency

aten = torch.ops.aten
double = {"dtype": torch.float64}


def assert_refused(model, *parts):
    """By the loss before anything is backpropagated, and by check."""
    x, y = data()
    with raises(RuntimeError, *parts):
        InterpretableGradientLoss(model)(x, y)
    assert parts[-1] in str(check(model, x, y))


# Higher-order operators. On the first call of each the compiler is imported: both ways were silent once.


def _while_loop(h):
    loop = torch._higher_order_ops.while_loop
    return loop(lambda i, _: i < 2, lambda i, h: (i + 1, torch.relu(h - 0.1)), (torch.tensor(0), h))[1]


def _scan(h):
    step = lambda carry, row: (carry + row, torch.relu(row + carry))  # noqa: E731
    return torch._higher_order_ops.scan(step, torch.zeros_like(h[0]), h)[1]


HIGHER_ORDER = {
    "cond": lambda h: torch.cond(h.sum() > 0, torch.relu, lambda h: torch.relu(h + 1), (h,)),
    "map": lambda h: torch._higher_order_ops.map(lambda row: torch.relu(row - 0.1), h),
    "scan": _scan,
    "switch": lambda h: torch._higher_order_ops.switch(torch.tensor(1), [torch.neg, torch.relu], (h,)),
    "while_loop": _while_loop,
}


@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_higher_order_operators(name):
    pytest.importorskip(f"torch._higher_order_ops.{name}")
    function = HIGHER_ORDER[name]
    leaf = data()[0].requires_grad_()
    if torch.autograd.grad(net_with(Apply(function))(leaf).sum(), leaf, allow_unused=True)[0] is None:
        pytest.skip(f"{name} has no derivative in this torch")
    assert_refused(net_with(Apply(function)), "got the higher-order operator", "hides the activations")
    x, y = data()
    with pytest.raises(RuntimeError, match="got the higher-order operator") as raised:
        input_gradients(net_with(Apply(function)), x, y)
    assert name.replace("_", "") in str(raised.value).lower().replace("_", "")
    with fast_double_backward(), torch.no_grad():
        assert torch.equal(function(torch.ones(3, 4, **double)), function(torch.ones(3, 4, **double)))


def test_higher_order_operators_that_hide_nothing():
    """The ordinary gradient through one, and the loss of a network that has one of constants alone."""
    pytest.importorskip("torch._higher_order_ops.scan")
    x, y = data()
    model = net_with(Apply(_scan)).eval()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).gather(1, y[:, None]).sum(), leaf)
    torch.testing.assert_close(saliency.gradient(model, x, y), expected)
    table = torch.ones(3, 8, **double)
    of_constants = net_with(Apply(lambda h: h + _scan(table).sum()))
    by_hand = net_with(Apply(lambda h: h + torch.relu(table + table.cumsum(0) - table).sum()))
    found = [InterpretableGradientLoss(each.eval())(x, y) for each in (of_constants, by_hand)]
    torch.testing.assert_close(*found)


def test_a_higher_order_operator_of_single_operations():
    """An associative scan with any function is written out by torch, and guided."""
    pytest.importorskip("torch._higher_order_ops.associative_scan")
    add = lambda a, b: torch.relu(a + b)  # noqa: E731

    def scan(h):
        return torch._higher_order_ops.associative_scan(add, h, 0, combine_mode="generic")

    def by_hand(h):
        return torch.stack(list(itertools.accumulate(h.unbind(), add)))

    x, y = data(n=2)
    for ours, expected in zip(
        input_gradients(net_with(Apply(scan)), x, y), input_gradients(net_with(Apply(by_hand)), x, y), strict=True
    ):
        torch.testing.assert_close(ours, expected)


# Operators of libraries


@pytest.fixture(scope="module")
def library():
    """An operator without autograd kernel, one without a derivative of its own, and cubes whose backward calls them."""
    fragment = torch.library.Library("interpgrad_tests", "FRAGMENT")
    fragment.define("opaque(Tensor g, Tensor x) -> Tensor")
    fragment.impl(
        "opaque", lambda g, x: torch.from_numpy(3 * g.numpy(force=True) * np.square(x.numpy(force=True))), "CPU"
    )

    @torch.library.custom_op("interpgrad_tests::underived", mutates_args=())
    def underived(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 3 * g * x.square()

    def cube(name, inner):
        @torch.library.custom_op(f"interpgrad_tests::{name}", mutates_args=())
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x**3

        forward.register_autograd(
            lambda ctx, g: inner(g, *ctx.saved_tensors),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        )
        return forward

    return {
        "opaque": cube("cube_opaque", torch.ops.interpgrad_tests.opaque),
        "underived": cube("cube_underived", underived),
        "composite": cube("cube_composite", lambda g, x: 3 * g * x.square()),
        "keep": fragment,
    }


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_operators_that_a_backward_calls(library):
    assert_refused(net_with(Apply(library["opaque"])), "double backward", "its backward calls one without an autograd")
    assert "interpgrad_tests.underived" in str(check(net_with(Apply(library["underived"])), *data()))
    x, y = data()
    found = [
        InterpretableGradientLoss(net_with(Apply(function)))(x, y)
        for function in (library["composite"], lambda h: h * h * h)
    ]
    torch.testing.assert_close(*found)


class InNumpy(torch.autograd.Function):
    """h^3, whose backward has no graph, and is not marked so."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h**3

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return torch.from_numpy(3 * g.numpy(force=True) * h.numpy(force=True) ** 2)


def test_functions_that_cut_a_gradient_from_its_graph():
    assert_refused(net_with(Apply(InNumpy.apply)), "double backward", "InNumpy", "returns a gradient without a graph")


STATISTICS = ["frozen", "coupled"]


def assert_refuses_criterion(function, batch_norm, *parts):
    """By the loss and by check, with batch norm and without."""
    (x, y), settings = data(), {"criterion": lambda z, _: function(z).sum(), "batch_norm": batch_norm}
    for model in (small_net(), small_net().eval()):
        with raises(RuntimeError, *parts):
            InterpretableGradientLoss(model, **settings)(x, y)
        report = check(model, x, y, **settings)
        assert not report.ok
        assert parts[-1] in str(report)


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
@pytest.mark.parametrize("batch_norm", STATISTICS)
def test_operators_that_the_backward_of_a_criterion_calls(library, batch_norm):
    refused = "double backward", "its backward calls one without an autograd"
    assert_refuses_criterion(library["opaque"], batch_norm, *refused)
    (x, y), found = data(), []
    for function in (library["composite"], lambda z: z * z * z):
        model, criterion = small_net(), lambda z, _, function=function: function(z).sum()
        loss = InterpretableGradientLoss(model, lam=1.0, criterion=criterion, batch_norm=batch_norm)(x, y)
        found.append(
            (loss, *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True, materialize_grads=True))
        )
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("batch_norm", STATISTICS)
def test_criteria_that_cut_a_gradient_from_its_graph(batch_norm):
    refused = "double backward", "InNumpy", "returns a gradient without a graph"
    assert_refuses_criterion(InNumpy.apply, batch_norm, *refused)
    x, y = data()
    settings = {"criterion": lambda z, _: InNumpy.apply(z).sum(), "batch_norm": batch_norm}
    ours, expected = (
        input_gradients(small_net(), x, y, **each) for each in (settings, {**settings, "criterion": cubes})
    )
    torch.testing.assert_close(ours, expected)


def cubes(z, _):
    return (z**3).sum()


def test_operators_of_torchvision():
    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset, self.last = nn.Conv2d(3, 18, 3, padding=1), nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=seeded(0)))

        def forward(self, x):
            h = torchvision.ops.deform_conv2d(x, self.offset(x), self.weight, padding=1)
            return self.last(h.relu().mean((2, 3)))

    class Regions(Deformable):
        def forward(self, x):
            boxes = [torch.tensor([[0.0, 0, 6, 6]], **double)] * len(x)
            return self.last(torchvision.ops.roi_align(self.offset(x)[:, :4].relu(), boxes, 2).mean((2, 3)))

    for model in (Deformable().double(), Regions().double()):
        assert_refused(model, "expected operations with a double backward", "not supported")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_check_finds_scripted_functions():
    """They become one node at their second call, in which the loss refuses them."""
    scripted = torch.jit.script(twice_rectified)
    assert "a TorchScript graph hides its activations" in str(check(net_with(Apply(scripted)), data()[0]))


def twice_rectified(h):
    return torch.relu(h * 2.0) + torch.relu(h - 0.1)


# Batch norm in every spelling. Each takes x, running mean and variance, weight and bias.

SPELLINGS = {
    "native_batch_norm": lambda h, m, v, w, b: aten.native_batch_norm(h, w, b, m, v, True, 0.1, 1e-5)[0],
    "_native_batch_norm_legit": lambda h, m, v, w, b: aten._native_batch_norm_legit(h, w, b, m, v, True, 0.1, 1e-5)[0],
    "_native_batch_norm_legit.no_stats": lambda h, m, v, w, b: aten._native_batch_norm_legit.no_stats(
        h, w, b, True, 0.1, 1e-5
    )[0],
    "_native_batch_norm_legit_functional": lambda h, m, v, w, b: aten._native_batch_norm_legit_functional(
        h, w, b, m, v, True, 0.1, 1e-5
    )[0],
    "_batch_norm_with_update": lambda h, m, v, w, b: aten._batch_norm_with_update(h, w, b, m, v, 0.1, 1e-5)[0],
    "_batch_norm_with_update_functional": lambda h, m, v, w, b: aten._batch_norm_with_update_functional(
        h, w, b, m, v, 0.1, 1e-5
    )[0],
}


def by_hand(h, _, __, w, b):
    standardized = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    return standardized * w + b


class Normalized(nn.Module):
    """A layer of batch norm in some spelling before smooth activations, where both flows meet."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.last = norm, nn.Linear(192, 6), nn.Linear(6, 4)
        self.weight, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))
        self.double()

    def forward(self, x):
        h = self.norm(self.first(x.flatten(1)), self.mean, self.variance, self.weight, self.bias)
        return self.last(F.gelu(h))


def penalty_gradients(norm, batch_norm):
    model, (x, y) = Normalized(norm), data()
    InterpretableGradientLoss(model, lam=1.0, batch_norm=batch_norm)(x, y).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_batch_norm_in_every_spelling(name, batch_norm):
    if not hasattr(aten, name.partition(".")[0]):
        pytest.skip(f"no {name} in this torch")
    expected = penalty_gradients(lambda h, m, v, w, b: F.batch_norm(h, m, v, w, b, True, 0.1, 1e-5), batch_norm)
    for ours, reference in zip(penalty_gradients(SPELLINGS[name], batch_norm), expected, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_check_finds_images_that_are_coupled():
    """Statistics by hand cannot be held constant: the first image's gradient depends on the other images."""
    x, y = data()
    assert "coupled images" in str(check(Normalized(by_hand), x, y))
    from_earlier = Normalized(lambda h, *_: h + 0.1 * h.cumsum(0))
    from_later = Normalized(lambda h, *_: h + 0.1 * h.flip(0).cumsum(0).flip(0))
    assert all("coupled images" in str(check(each, x, y)) for each in (from_earlier, from_later))
    assert "coupled images" not in str(check(Normalized(by_hand), x, y, batch_norm="coupled"))
    assert "coupled images" not in str(check(small_net(), x, y))
    assert "coupled images" not in str(check(Normalized(by_hand).eval(), x[:1], y[:1], batch_norm="coupled"))
    for name in SPELLINGS:
        if hasattr(aten, name.partition(".")[0]):
            report = str(check(Normalized(SPELLINGS[name]), x, y))
            assert "coupled images" not in report
            assert "batch statistics: 1 layers" in report


def test_running_statistics_in_every_spelling():
    norms = [lambda h, m, v, w, b: aten._native_batch_norm_legit_no_training(h, w, b, m, v, 0.1, 1e-5)[0]]
    norms += [lambda h, m, v, w, b: aten._batch_norm_no_update(h, w, b, m, v, 0.1, 1e-5)[0]]
    for norm in norms:
        assert "running statistics: 1 layers" in str(check(Normalized(norm), *data()))


# Under a compiler, and what is not reverse mode


def layers():
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.GELU(), nn.LayerNorm(3))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(36, 4)).double()


def second_derivatives(model, function, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [*model.parameters()], allow_unused=True)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["inside", "outside", "broken"])
def test_under_torch_compile(how, fullgraph):
    """The context inside of what is compiled, also where its graph breaks, and outside."""
    x, _ = data()
    model = layers()
    expected = second_derivatives(model, model, x)

    def inside(x):
        with fast_double_backward():
            h = model[0](x)
            if how == "broken" and not fullgraph:
                torch._dynamo.graph_break()
            return model[1:](h)

    def outside(x):
        with fast_double_backward():
            return compiled(x)

    torch._dynamo.reset()
    compiled = torch.compile(model if how == "outside" else inside, backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        for ours, reference in zip(
            second_derivatives(model, outside if how == "outside" else compiled, x), expected, strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    assert type(F.relu(x.requires_grad_()).grad_fn).__name__ == "ReluBackward0", "nothing is left"
    torch._dynamo.reset()
    compiled = torch.compile(model if how == "outside" else inside, backend="aot_eager", fullgraph=fullgraph)
    if how == "broken" and not fullgraph:  # the compiler leaves it alone
        for ours, reference in zip(second_derivatives(model, compiled, x), expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
        return
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second_derivatives(model, outside if how == "outside" else compiled, x)


def test_forward_mode():
    model, (x, _) = layers().eval(), data()

    def pushed():
        with fw.dual_level():
            return fw.unpack_dual(model(fw.make_dual(x, torch.ones_like(x)))).tangent

    expected = pushed()
    jacobian = torch.func.jacfwd(lambda x: model(x).sum(0))(x)
    with fast_double_backward():
        torch.testing.assert_close(pushed(), expected)
        torch.testing.assert_close(torch.func.jacfwd(lambda x: model(x).sum(0))(x), jacobian)
        by_strategy = torch.autograd.functional.jacobian(
            lambda x: model[2](model[:2](x)).sum((0, 2, 3)), x, strategy="forward-mode", vectorize=True
        )
    reverse = torch.autograd.functional.jacobian(lambda x: model[:3](x).sum((0, 2, 3)), x)
    torch.testing.assert_close(by_strategy, reverse)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_inside():
    model, (x, _) = nn.Sequential(nn.ReLU(inplace=True), *layers(), nn.ReLU(inplace=True)).eval(), data()
    with fast_double_backward():
        traced = torch.jit.trace(model, x.clone())
    torch.testing.assert_close(traced(x.clone() + 1), model(x.clone() + 1))


def test_other_layouts():
    """Quantized and MKL-DNN tensors are pooled by stock."""
    x = torch.randn(1, 4, 4, 4, generator=seeded(0))
    quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    with fast_double_backward():
        assert torch.equal(F.max_pool2d(quantized, 2).dequantize(), F.max_pool2d(quantized.dequantize(), 2))
        if torch.backends.mkldnn.is_available():
            for pool in (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d):
                torch.testing.assert_close(pool(x.to_mkldnn(), 2).to_dense(), pool(x, 2))
