"""interpgrad.check: what the report says of a model is so."""

import contextlib
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from flops import count_flops
from nets import Apply, data, small_net
from test_messages import OnceDifferentiable, net_with, raises
from test_no_trace import FAILURES, failing, stateful_net
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint
from traces import assert_same_trace, trace

from interpgrad import InterpretableGradientLoss, check, input_gradients


def findings(model, x=None, **settings):
    """The report's, by subject; each has one."""
    report = check(model, data()[0] if x is None else x, **settings)
    found = {finding.subject: finding for finding in report.findings}
    assert len(found) == len(report.findings)
    assert report.ok == (not any(each.severity == "error" for each in report.findings))
    assert {each.severity for each in report.findings} <= {"error", "note"}
    return {subject: finding.message for subject, finding in found.items()}


def test_report():
    report = check(small_net(), data()[0])
    lines = str(report).splitlines()
    assert report.ok
    assert lines[0] == "Sequential can be used with the interpretable gradient loss:"
    assert lines[1].startswith("note   activations: guided at Relu x3. Nothing to do.")
    assert len(lines) == 1 + len(report.findings)
    assert [finding.subject for finding in report.findings] == ["activations", "batch statistics", "cost"]
    report = check(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double(), data()[0])
    assert not report.ok
    assert str(report).startswith("Sequential cannot be used as it is")
    assert "error  the loss: expected at least one activation" in str(report)


# What a network has, whose findings the words are, and how many times the forward pass's operations a step is.
ARCHITECTURES = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), 64, {"activations": ["Relu x17"]}, 7),
    "resnet18 in evaluation mode": (
        lambda: torchvision.models.resnet18(num_classes=4).eval(),
        64,
        {"running statistics": ["20 layers", "model.train()"]},
        7,
    ),
    "mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(num_classes=4),
        64,
        {"activations": ["Hardtanh x35"], "batch statistics": ["52 layers, constants"]},
        7,
    ),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        64,
        {"activations": ["Relu x14, Hardswish x19"], "activations left alone": ["Hardsigmoid x9", "Replace"]},
        9,
    ),
    "efficientnet_b0": (
        lambda: torchvision.models.efficientnet_b0(num_classes=4),
        64,
        {
            "activations": ["Silu x49"],
            "activations left alone": ["Sigmoid x16"],
            "batch statistics": ["49 layers"],
            "cost": ["9 forward passes' worth", "3.00 times", "batch norm meets smooth activations or gates"],
        },
        9,
    ),
    "efficientnet_b0 in evaluation mode": (
        lambda: torchvision.models.efficientnet_b0(num_classes=4).eval(),
        64,
        {"cost": ["7 forward passes' worth", "2.33 times", "every=4"]},
        7,
    ),
    "convnext_atto": (lambda: timm.create_model("convnext_atto", num_classes=4), 64, {"activations": ["Gelu x12"]}, 7),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=4),
        64,
        {"activations": ["Gelu x12"], "attention": ["scaled_dot_product_attention x12", "written out", "smaller"]},
        7,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    build, size, expected, passes = ARCHITECTURES[name]
    model, x, y = build(), torch.randn(2, 3, size, size), torch.tensor([1, 2])
    found = findings(model, x)
    for subject, words in expected.items():
        for each in words:
            assert each in found[subject], found
    assert f"about {passes} forward passes' worth" in found["cost"]
    assert ("attention" in found) == (name == "vit")
    assert ("batch statistics" in found) == any(
        isinstance(part, nn.BatchNorm2d) and part.training for part in model.modules()
    )
    # The cost is counted.
    reg = InterpretableGradientLoss(model)
    with count_flops() as forward, torch.no_grad():
        model(x)
    with count_flops() as regularized:
        with reg.shared_forward():
            logits = model(x)
        (F.cross_entropy(logits, y) + reg(x, y)).backward()
    assert regularized.get_total_flops() / forward.get_total_flops() == pytest.approx(passes, abs=0.2)


def test_settings():
    assert "functions of the batch" in findings(small_net(), batch_norm="coupled")["batch statistics"]
    mixed = net_with(nn.SiLU())
    assert 'activations="relu" alone, got Silu beside them' in findings(mixed, activations="relu")["the loss"]
    assert findings(mixed, activations="relu")["activations left alone"].startswith("Silu x1")
    assert "0-dim tensor" in findings(small_net(), criterion=lambda z, y: z)["the loss"]
    x, y = data()
    assert "indices, or probabilities" in findings(small_net(), y=torch.zeros(3, 2))["the loss"]
    assert check(small_net(), x, y).ok
    efficientnet = torchvision.models.efficientnet_b0(num_classes=4)
    coupled = findings(efficientnet, torch.randn(2, 3, 64, 64), batch_norm="coupled")
    assert "about 7 forward passes' worth" in coupled["cost"]


def test_wrong_calls_raise():
    x, y = data()
    with raises(TypeError, "expected x to be a floating point tensor"):
        check(small_net(), x.long())
    with raises(ValueError, "one target for each of the 3 images"):
        check(small_net(), x, y[:2])
    with raises(ValueError, "expected criterion to be one of"):
        check(small_net(), x, criterion="ce")
    with raises(ValueError, "expected activations="):
        check(small_net(), x, activations="gelu")
    with raises(ValueError, "expected batch_norm="):
        check(small_net(), x, batch_norm="eval")


def test_activations_in_place_on_views():
    def on_a_slice(function):
        def apply(h):
            function(h[:, :2])
            return h

        return net_with(Apply(apply))

    found = findings(on_a_slice(lambda h: F.hardswish(h, inplace=True)))
    assert "Relu x3, Hardswish x1" in found["activations"]
    assert "Elu x1" in findings(on_a_slice(F.elu_))["activations"]
    assert "Relu x4" in findings(on_a_slice(torch.relu_))["activations"]
    assert "Relu x3. Nothing" in findings(on_a_slice(lambda h: h.mul_(2)))["activations"]


def test_clamps_that_are_no_activations():
    found = findings(net_with(Apply(lambda h: h.clamp(min=-1).clamp(min=0))))
    assert "ClampMin x1" in found["activations"] or "Clamp x1" in found["activations"]
    assert "Clamp x1" in found["activations left alone"] or "ClampMin x1" in found["activations left alone"]


def test_statistics_of_each_sample():
    found = findings(net_with(nn.InstanceNorm2d(6).double()))
    assert "1 layers of instance norm" in found["statistics of each sample"]
    assert "2 layers" in found["batch statistics"]
    assert "running statistics" not in found
    running = net_with(nn.InstanceNorm2d(6, track_running_stats=True).double()).eval()
    assert "3 layers" in findings(running)["running statistics"]


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class FailsInTheSecondPass(Square):
    """Whose gradient cannot be differentiated, which nobody sees before it is."""

    class Gradient(Function):
        @staticmethod
        def forward(ctx, gradient):
            return gradient * 1

        @staticmethod
        def backward(ctx, outer):
            raise RuntimeError("no second derivative of this")

    @staticmethod
    def backward(ctx, gradient):
        return FailsInTheSecondPass.Gradient.apply(2 * ctx.saved_tensors[0] * gradient)


def test_functions_of_the_user():
    found = findings(net_with(Apply(Square.apply)))
    assert found["autograd Functions"].startswith("Square x1.")
    assert "the loss" not in found
    found = findings(net_with(Apply(OnceDifferentiable.apply)))
    assert "double backward, got one without: OnceDifferentiable" in found["the loss"]
    assert "Replace it" in found["the loss"]
    assert "Relu x3" in found["activations"], "what was met before the error is told"
    found = findings(net_with(Apply(FailsInTheSecondPass.apply)))
    assert "no second derivative of this" in found["the loss"]
    assert "cost" not in found


def test_a_compiled_model():
    model = torch.compile(small_net(), backend="aot_eager")
    found = findings(model)
    assert "Call the loss without shared_forward()" in found["torch.compile"]
    assert "Relu x3" in found["activations"]
    part = small_net()
    part[0].compile(backend="aot_eager")
    assert "torch.compile" in findings(part)
    assert "torch.compile" not in findings(small_net())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model():
    report = check(nn.Sequential(torch.jit.script(small_net())), data()[0])
    assert [finding.severity for finding in report.findings] == ["error"]
    assert "TorchScript" in str(report)
    assert "use the nn.Module it was scripted from" in str(report)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.net = nn.Conv2d(3, 3, 1).double(), small_net()

        def forward(self, x):
            return checkpoint(self.net, self.stem(x), use_reentrant=reentrant)

    model = Checkpointed()
    before = trace(model)
    found = findings(model)
    assert_same_trace(before, trace(model))
    if reentrant:
        assert "use_reentrant=False" in found["the loss"]
    else:
        assert "run again in every backward pass" in found["checkpointing"]
        assert "the loss" not in found
    assert "checkpointing" not in findings(small_net())


def test_no_path_to_the_images():
    found = findings(nn.Sequential(Apply(lambda h: h.detach()), small_net()))
    assert "torch.no_grad() or .detach()" in found["the loss"]


@pytest.mark.parametrize("criterion", ["log_prob", "logit", "cross_entropy"])
@pytest.mark.parametrize("off", [4, -5, -101])
def test_targets_out_of_range(criterion, off):
    """Named on a GPU too, where the loss itself does not look: there CUDA ends the process."""
    x, y = data()
    found = check(small_net(), x, torch.where(y == y[0], off, y), criterion=criterion)
    assert re.search(r"expected class indices from 0 to 3.* got .*number of classes", str(found)), found
    assert check(small_net(), x, torch.where(y == y[0], -100, y), criterion=criterion).ok
    if x.is_cpu:
        with pytest.raises(ValueError, match="expected class indices from 0 to 3, or -100"):
            input_gradients(small_net(), x, torch.where(y == y[0], off, y), criterion=criterion)
        one_logit = nn.Sequential(small_net(), nn.Linear(4, 1).double())
        with pytest.raises(ValueError, match="expected class indices from 0 to 1, or -100"):
            input_gradients(one_logit, x, torch.where(y == y[0], off, 1), criterion=criterion)


def test_an_output_without_logits():
    assert "wrap the model" in findings(nn.Sequential(small_net(), Apply(lambda z: {"features": z})))["the loss"]


@pytest.mark.parametrize("failure", [None, "the model raises", failing("target out of range"), "wrong image size"])
def test_leaves_no_trace(failure):
    model, (x, y) = stateful_net(raises=failure == "the model raises"), data()
    x, y = FAILURES[failure][0](x, y) if failure else (x, y)
    before, images = trace(model), x.clone()
    with torch.no_grad():  # as it finds it
        before["grad mode"] = False
        with contextlib.suppress(OSError, IndexError):
            assert check(model, x, y).ok == (failure is None)
        assert_same_trace(before, trace(model))
    assert torch.equal(x, images)
    assert x.grad is None


def test_one_of_two_errors_of_the_loss():
    """What check says is what the loss raises."""
    model, (x, y) = net_with(Apply(OnceDifferentiable.apply)), data()
    with pytest.raises(RuntimeError) as raised:
        InterpretableGradientLoss(model)(x, y)
    assert findings(model)["the loss"] == str(raised.value)


def test_a_models_own_error_is_the_models():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.weight).flatten(1) @ torch.ones(3, 4, dtype=x.dtype)

    (finding,) = check(Broken(), data()[0]).findings
    assert finding.severity == "error"
    assert finding.subject == "the model"
    assert "shapes cannot be multiplied" in finding.message


def test_a_frozen_network_cannot_be_used():
    report = check(small_net().requires_grad_(False), data()[0])
    assert not report.ok
    assert "error  parameters: none requires a gradient" in str(report)


def test_rectifiers_are_told_of_smooth_ones():
    """Where there are no others."""
    assert "With SiLU instead of ReLU seeds agreed more" in findings(net_with(nn.ReLU()))["activations"]
    assert "With SiLU" not in findings(net_with(nn.SiLU()))["activations"]


def test_other_targets_need_no_rectifiers():
    """A mask in the loss of a tanh network: nothing is guided, and a step costs one pass less."""
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double(), data()
    assert not check(model, x, y).ok
    for target in ("given", "zero", "low_pass", lambda passes: passes.x):
        report = check(model, x, y, target=target)
        assert report.ok
        assert "activations" not in {finding.subject for finding in report.findings}
        assert "about 6 forward passes' worth" in str(report)
    with pytest.raises(ValueError, match="expected target to be one of"):
        check(model, x, y, target="gudied")
    report = check(model, x, y, target=lambda passes: passes.gradient(guided=True))
    assert "error  the loss: expected at least one activation" in str(report)
