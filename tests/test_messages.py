"""Every error: expected, received, remedy."""

import contextlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from nets import Apply, data, seeded, small_net
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from interpgrad import InterpretableGradientLoss, check, graph, input_gradients


def raises(error, *parts):
    """The message must name what was expected, what was received, and the way out."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def net_with(middle):
    """A small network with something in its middle."""
    net = small_net()
    net.insert(4, middle)
    return net


CUSTOM = torch.library.Library("interpgrad_tests", "FRAGMENT")  # held: some releases still look for what was in one


def test_unknown_names_and_settings():
    model = small_net()
    with raises(ValueError, "expected error to be one of 'cos', 'mae', 'mse', 'hi' or a callable", "got 'cosine'"):
        InterpretableGradientLoss(model, "cosine")
    with raises(ValueError, 'expected activations="relu" or activations="all"', "got 'gelu'"):
        InterpretableGradientLoss(model, activations="gelu")
    with raises(
        ValueError, "expected criterion to be one of 'log_prob', 'logit', 'cross_entropy' or a callable", "got 'ce'"
    ):
        InterpretableGradientLoss(model, criterion="ce")
    with raises(ValueError, "expected every to be an integer of at least 1", "got 0"):
        InterpretableGradientLoss(model, every=0)
    with raises(TypeError, "expected model to be an nn.Module", "got function", "pass the module"):
        InterpretableGradientLoss(lambda x: x)


def test_criteria():
    class Averages(nn.Module):
        reduction = "mean"

    for criterion in (None, nn.CrossEntropyLoss, 3):
        with raises(ValueError, "expected criterion to be one of 'log_prob', 'logit', 'cross_entropy' or a callable"):
            InterpretableGradientLoss(small_net(), criterion=criterion)
    with raises(ValueError, 'got Averages with reduction="mean"', 'make it with reduction="sum"'):
        InterpretableGradientLoss(small_net(), criterion=Averages())
    with raises(ValueError, 'expected batch_norm="frozen" or batch_norm="coupled", got \'eval\''):
        InterpretableGradientLoss(small_net(), batch_norm="eval")
    x, _ = data()
    for y in (torch.zeros(3, 2).long(), torch.zeros(3, 2).double()):
        with raises(ValueError, "indices, or probabilities of the shape of the logits, (3, 4)", "of shape (3, 2)"):
            InterpretableGradientLoss(small_net())(x, y)


@pytest.mark.parametrize("entry", ["loss", "shared", "input_gradients"])
def test_images(entry):
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)

    def call(images, targets):
        if entry == "input_gradients":
            return input_gradients(model, images, targets)
        if entry == "shared":
            with reg.shared_forward():
                model(images)
        return reg(images, targets)

    with raises(TypeError, "expected x to be a floating point tensor", "got a tensor of torch.int64", "x / 255"):
        call(x.long(), y)
    with raises(ValueError, "expected x to hold at least one image (N, C, H, W)", "got shape (0, 3, 8, 8)", "skip"):
        call(x[:0], y[:0])
    with raises(ValueError, "one target for each of the 3 images", "got y of shape (2,)", "same batch"):
        call(x, y[:2])
    with raises(RuntimeError, "got torch.inference_mode()", "use torch.no_grad()"), torch.inference_mode():
        reg(x, y) if entry == "shared" else call(x, y)


def test_images_made_under_inference_mode():
    model, (x, y) = small_net(), data()
    with torch.inference_mode():
        images = x + 1
    with raises(RuntimeError, "got a tensor made under it", "use torch.no_grad()"):
        input_gradients(model, images, y)


def test_not_a_tensor():
    with raises(TypeError, "expected x to be a floating point tensor, got list"):
        InterpretableGradientLoss(small_net())([1.0], torch.zeros(1))


@pytest.mark.parametrize(
    ("criterion", "received"), [(lambda z, y: z.sum(1), "a tensor of shape (3,)"), (lambda z, y: 1.0, "float")]
)
def test_criterion_without_a_scalar(criterion, received):
    with raises(ValueError, "expected the criterion to return a 0-dim tensor", received, 'reduction="sum"'):
        InterpretableGradientLoss(small_net(), criterion=criterion)(*data())


def test_error_without_a_value_per_sample():
    with raises(ValueError, "one value per sample, shape (3,)", "got (3, 3)", "reduce over all dimensions"):
        InterpretableGradientLoss(small_net(), lambda d, g: (d - g).sum((2, 3)))(*data())


def test_model_output():
    x, y = data()
    expected = InterpretableGradientLoss(small_net())(x, y)
    for output in (lambda z: {"aux": z.sum(), "out": z}, lambda z: {"logits": z, "out": 2 * z}):
        assert InterpretableGradientLoss(nn.Sequential(small_net(), Apply(output)))(x, y) == expected
    model = nn.Sequential(small_net(), Apply(lambda z: {"features": z}))
    with raises(TypeError, 'a dict with "logits" or "out", or a tuple that begins with a tensor, got dict', "wrap"):
        InterpretableGradientLoss(model)(x, y)


class Captioned(nn.Module):
    """As CLIP: the images are not the first parameter."""

    def __init__(self):
        super().__init__()
        self.net, self.table = small_net(), nn.Embedding(5, 4).double()

    def forward(self, input_ids=None, pixel_values=None, scale=1.0, **_):
        return {"logits": scale * self.net(pixel_values) + self.table(input_ids).mean(1)}


def test_images_are_the_argument_that_is_not_named():
    model, (x, y) = Captioned(), data()
    ids = torch.tensor([[0, 1], [2, 3], [4, 4]])
    bound = Apply(lambda images: model(ids, images))
    bound.inner = model
    expected = InterpretableGradientLoss(bound)(x, y)
    assert InterpretableGradientLoss(model)(x, y, input_ids=ids) == expected
    for args, kwargs in (((ids, x), {}), ((), {"scale": 1.0, "input_ids": ids, "pixel_values": x})):
        reg = InterpretableGradientLoss(model)
        with reg.shared_forward():
            model(*args, **kwargs)
        assert reg(x, y) == expected
    arguments = {"input_ids": ids, "scale": 2.0}
    doubled = Apply(lambda images: model(ids, images, 2.0))
    doubled.inner = model
    for ours, reference in zip(
        input_gradients(model, x, y, model_kwargs=arguments), input_gradients(doubled, x, y), strict=True
    ):
        assert torch.equal(ours, reference)
    assert check(model, x, y, model_kwargs=arguments).ok
    assert check(nn.DataParallel(model), x, y, model_kwargs=arguments).ok
    with raises(TypeError, "expected x to be a floating point tensor, got a tensor of torch.int64"):
        with InterpretableGradientLoss(model).shared_forward():
            model(ids, x.long())


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double()
    x, y = data()
    with raises(RuntimeError, "expected layers that have their parameters, got a LazyConv2d without", "model(x)"):
        InterpretableGradientLoss(model)(x, y)
    model(x)
    InterpretableGradientLoss(model)(x, y).backward()


@pytest.mark.parametrize("criterion", ["log_prob", "logit", "cross_entropy"])
def test_ignore_index(criterion):
    """Images, or pixels, that are left out, and the others as if they were alone."""
    x, y = data()
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)).double()
    for net, target in ((small_net().eval(), y), (model, torch.randint(4, (3, 6, 6), generator=seeded(0)))):
        ignored, stock = target.clone(), target.clone()
        ignored[1], stock[1] = 255, -100
        for dtype in (torch.long, torch.uint8):
            ours = input_gradients(net, x, ignored.to(dtype), criterion=criterion, ignore_index=255)
            for value, expected in zip(ours, input_gradients(net, x, stock, criterion=criterion), strict=True):
                assert torch.equal(value, expected)
        reg = InterpretableGradientLoss(net, "mse", criterion=criterion, ignore_index=255)
        assert reg(x, ignored) == InterpretableGradientLoss(net, "mse", criterion=criterion)(x, stock) > 0
        assert check(net, x, ignored, criterion=criterion, ignore_index=255).ok
        with raises(ValueError, "expected class indices from 0 to 3, or -100 for images to ignore", "to 255"):
            InterpretableGradientLoss(net, criterion=criterion)(x, ignored)
    binary = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    left, _ = input_gradients(binary, x, torch.tensor([255.0, 1, 1]), criterion=criterion, ignore_index=255)
    right, _ = input_gradients(binary, x, torch.tensor([255, 1, 1]), criterion=criterion, ignore_index=255)
    torch.testing.assert_close(left, right)
    assert not left[0].any()
    assert left[1].any()
    one_hot = torch.nn.functional.one_hot(y, 4)
    expected, _ = input_gradients(small_net(), x, one_hot, criterion=criterion)
    assert torch.equal(input_gradients(small_net(), x, one_hot, criterion=criterion, ignore_index=0)[0], expected)
    for wrong in (None, True, 255.0):
        with raises(ValueError, f"expected ignore_index to be an integer, got {wrong}"):
            InterpretableGradientLoss(net, ignore_index=wrong)
    assert InterpretableGradientLoss(net, "mse", ignore_index=np.int64(255))(x, ignored) > 0
    with raises(ValueError, "expected ignore_index for a criterion by name, got 255 for", "give it to that one"):
        InterpretableGradientLoss(net, criterion=nn.CrossEntropyLoss(), ignore_index=255)


def test_no_activation_of_the_family():
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Sigmoid(), nn.Linear(8, 4)).double()
    with raises(RuntimeError, 'activations="relu"', "got Gelu x1, Sigmoid x1", 'Pass activations="all"'):
        InterpretableGradientLoss(smooth, activations="relu")(*data())
    assert InterpretableGradientLoss(smooth)(*data()) > 0
    mixed = nn.Sequential(smooth, nn.ReLU(), nn.Linear(4, 4), nn.SiLU()).double()
    with raises(RuntimeError, 'activations="relu" alone', "got Gelu, Silu beside them", 'pass activations="all"'):
        InterpretableGradientLoss(mixed, activations="relu")(*data())
    squashing = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with raises(RuntimeError, 'activations="all"', "got Tanh x1", "replace"):
        InterpretableGradientLoss(squashing, activations="all")(*data())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    with raises(RuntimeError, "got none of any kind", "would equal the input gradient"):
        input_gradients(linear, *data())
    clipped = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), Apply(lambda h: h.clamp(min=-1))).double()
    with raises(RuntimeError, "got Clamp x1"):  # clamps, but not at zero
        input_gradients(clipped, *data())


def test_no_activation_on_a_slice():
    def scale_a_slice(h):
        h[:, :2].mul_(2)
        return h

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Apply(scale_a_slice), nn.Flatten(), nn.Linear(144, 4)).double()
    with raises(RuntimeError, "expected at least one activation"):
        input_gradients(model, *data())


def test_shared_forward_without_a_forward_or_with_another_tensor():
    model, (x, y) = small_net(), data()
    reg = InterpretableGradientLoss(model)
    with raises(RuntimeError, "expected a forward pass inside shared_forward(), got none", "logits = model(x)"):
        with reg.shared_forward():
            pass
    with reg.shared_forward():
        model(x)
    with raises(RuntimeError, "passed to the model inside shared_forward(), got another one", "same x"):
        reg(x + 0, y)


def test_shared_forward_of_a_model_whose_images_are_not_first():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, t, x):
            return self.net(x) * t[:, None]

    model, (x, y) = Timed(), data()
    t = torch.rand(3, dtype=x.dtype)
    for kwargs in ({}, {"x": x, "t": t}):
        reg = InterpretableGradientLoss(model)
        with reg.shared_forward():
            model(**kwargs) if kwargs else model(t, x)
        with raises(RuntimeError, "expected the images to be the first floating point argument", "got", "(3,)", "t=t"):
            reg(x, y)
        with raises(RuntimeError, "passed to the model inside shared_forward(), got another one"):
            reg(x + 0, y)
    assert InterpretableGradientLoss(model)(x, y, t=t) > 0  # the way out


class OnceDifferentiable(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class OnceDifferentiableUnderAutocast(OnceDifferentiable):
    forward = staticmethod(torch.amp.custom_fwd(OnceDifferentiable.forward, device_type="cpu"))
    backward = staticmethod(torch.amp.custom_bwd(OnceDifferentiable.backward, device_type="cpu"))


@pytest.mark.parametrize("function", [OnceDifferentiable, OnceDifferentiableUnderAutocast])
@pytest.mark.parametrize("shared", [False, True])
def test_once_differentiable_function(shared, function):
    model, (x, y) = net_with(Apply(function.apply)), data()
    reg = InterpretableGradientLoss(model)
    with raises(RuntimeError, "double backward", "OnceDifferentiable", "@once_differentiable", "Replace it"):
        if shared:
            with reg.shared_forward():
                model(x)
        reg(x, y)
    input_gradients(model, x, y)  # which differentiates once


@pytest.mark.cpu("the operation is the CPU's")
def test_operation_without_a_double_backward():
    """The fused attention, called past the backend selection."""

    def attend(h):
        q = h.flatten(2)[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0][:, 0].view_as(h)

    model = net_with(Apply(attend))
    with raises(RuntimeError, "double backward", "_scaled_dot_product_flash_attention_for_cpu", "another backend"):
        InterpretableGradientLoss(model)(*data())


@pytest.mark.cpu("the operator is the CPU's")
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_operator_without_an_autograd_kernel():
    CUSTOM.define("thrice(Tensor x) -> Tensor")
    CUSTOM.impl("thrice", lambda x: torch.from_numpy(3 * x.detach().numpy()), "CPU")
    model = net_with(Apply(lambda h: torch.ops.interpgrad_tests.thrice(h) + h))
    with raises(RuntimeError, "double backward", "custom operator", "autograd kernel"):
        InterpretableGradientLoss(model)(*data())


def test_quantization_with_learned_steps():
    scale, zero = nn.Parameter(torch.tensor([0.05])), nn.Parameter(torch.tensor([0.0]))
    quantize = Apply(lambda h: torch._fake_quantize_learnable_per_tensor_affine(h, scale, zero, -128, 127, 1.0))
    model, (x, y) = net_with(quantize).float(), data()
    with raises(RuntimeError, "double backward", "_fake_quantize_learnable_per_tensor_affine_backward"):
        InterpretableGradientLoss(model)(x.float(), y)


def test_sync_batch_norm_of_another_library():
    """Which leaves a node of this name, and not a layer of torch's class."""
    real = torch.nn.modules._functions.SyncBatchNorm
    fake = type(
        real.__name__,
        (Function,),
        {"forward": staticmethod(lambda ctx, x: x * 1), "backward": staticmethod(lambda ctx, g: g)},
    )
    with raises(RuntimeError, "SyncBatchNorm", "torch.nn.SyncBatchNorm"):
        InterpretableGradientLoss(net_with(Apply(fake.apply)))(*data())


def test_reentrant_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=True)

    with raises(RuntimeError, "CheckpointFunctionBackward", "use_reentrant=False"):
        InterpretableGradientLoss(Checkpointed())(*data())


COMPILED = """
import torch
from interpgrad import graph
x = torch.randn(2, 3, requires_grad=True)
output = torch.compile(torch.nn.Linear(3, 4), backend="aot_eager")(x)
graph.refuse_opaque(graph.operations(output, until=x))
"""


@pytest.mark.slow
def test_a_compiled_graph():
    """In a process of its own: other tests leave the compiler in a state of theirs."""
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert re.search("(?s)OpaqueGraphError.*CompiledFunctionBackward.*torch.compile", found.stderr), found.stderr


def test_compiled_model():
    model, (x, y) = small_net().eval(), data()
    compiled = torch.compile(model, backend="aot_eager")
    reg = InterpretableGradientLoss(compiled)
    with raises(RuntimeError, "torch.compile", "call the loss without shared_forward()"), reg.shared_forward():
        compiled(x)
    expected = InterpretableGradientLoss(model)(x, y)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    value = InterpretableGradientLoss(compiled)(x, y)
    torch.testing.assert_close(value, expected)
    for ours, eager in zip(torch.autograd.grad(value, parameters, allow_unused=True), gradients, strict=True):
        torch.testing.assert_close(ours, eager)
    part = nn.Sequential(Apply(torch.compile(model.forward, backend="aot_eager")))  # no module says it is compiled
    # Whether a compiler follows into the loss's context depends on the release: never a silent difference.
    with contextlib.suppress(graph.OpaqueGraphError):
        torch.testing.assert_close(InterpretableGradientLoss(part)(x, y), expected)
    model.compile(backend="aot_eager")
    model(x)
    torch.testing.assert_close(InterpretableGradientLoss(model)(x.detach(), y), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_model():
    model, (x, y) = small_net().eval(), data()
    scripted = torch.jit.script(model)
    for _ in range(4):  # until TorchScript has seen enough to fuse the graph
        scripted(x.clone().requires_grad_()).sum().backward()
    reg = InterpretableGradientLoss(nn.Sequential(scripted))
    with raises(RuntimeError, "TorchScript", "nn.Module it was scripted from"):
        reg(x, y)


@pytest.mark.parametrize("where", ["model", "criterion"])
def test_no_path_to_the_images(where):
    detach = Apply(lambda h: h.detach())
    model = nn.Sequential(detach, small_net()) if where == "model" else small_net()
    criterion = (lambda z, y: z.detach().sum()) if where == "criterion" else "log_prob"
    with raises(RuntimeError, "depends on the images", "torch.no_grad() or .detach()"):
        InterpretableGradientLoss(model, criterion=criterion)(*data())
