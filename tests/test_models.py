"""The loss on models as their libraries make them, and around them: checkpointing and threads."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from nets import SPELLINGS, Rectified, data, on_slice, seeded, small_net
from oracle import oracle_gradients, relative_difference
from torch import nn
from torch.utils.checkpoint import checkpoint

from interpgrad import InterpretableGradientLoss, input_gradients, metrics, saliency

TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    # Its published layer scale, 1e-6, makes a new network linear in all but name: delta and guided are equal.
    "convnext_atto": {"ls_init_value": 0.5},
    "efficientnet_b0": {},
    "mobilenetv3_small_100": {},
}


def timm_model(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **TIMM[name])


def images(n=8, size=32):
    x, y = data(n, size)
    return x.float(), y


def gradients_of(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in gradients]


def assert_same_gradients(value, model, expected, reference):
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(gradients_of(value, model), gradients_of(expected, reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_twenty_steps_with_smooth_activations(name):
    """The penalty is finite and falls."""
    model, (x, y) = timm_model(name), images()
    reg = InterpretableGradientLoss(model, lam=1.0, activations="all")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    penalties = []
    for _ in range(20):
        with reg.shared_forward():
            logits = model(x)
        loss = F.cross_entropy(logits, y) + reg(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalties.append(reg.penalty)
    penalties = torch.stack(penalties)
    assert penalties.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert penalties[-5:].mean() < 0.98 * penalties[:5].mean()


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_fused_attention_has_the_gradients_of_explicit_attention(name, shared):
    """Fused kernels have no double backward: the recorded forward selects the one that has, for itself alone."""
    fused, (x, y) = timm_model(name).double().eval(), data(2, 32)
    explicit = copy.deepcopy(fused)
    for model in (fused, explicit):
        layers = [part for part in model.modules() if hasattr(part, "fused_attn")]
        assert layers
        for layer in layers:
            layer.fused_attn = model is fused
    values = []
    for model in (fused, explicit):
        reg = InterpretableGradientLoss(model, lam=1.0, activations="all")
        if shared:
            with reg.shared_forward():
                model(x)
        values.append(reg(x, y))
    assert_same_gradients(values[0], fused, values[1], explicit)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


HUGGING_FACE = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            num_labels=4,
            hidden_dropout_prob=0.0,
        )
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        )
    ),
}


class Logits(nn.Module):
    """The model as one that returns a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_image_models(name):
    """Outputs with .logits, images by the keyword pixel_values."""
    torch.manual_seed(0)
    model, (x, y) = HUGGING_FACE[name]().double(), data(2, 32)
    reference = copy.deepcopy(model).eval()
    image = x.clone().requires_grad_()
    loss = F.cross_entropy(reference(pixel_values=image, return_dict=True).logits, y, reduction="sum")
    for ours, theirs in zip(
        input_gradients(model.eval(), x, y, criterion="cross_entropy"),
        oracle_gradients(loss, image, "all"),
        strict=True,
    ):
        assert relative_difference(ours, theirs) < 1e-9
    reg = InterpretableGradientLoss(model, lam=1.0, activations="all")
    expected = InterpretableGradientLoss(Logits(reference), lam=1.0, activations="all")(x, y)
    assert_same_gradients(reg(x, y), model, expected, Logits(reference))
    with reg.shared_forward():
        output = model(pixel_values=x, labels=y)
    expected = InterpretableGradientLoss(Logits(reference), lam=1.0, activations="all")(x, y)
    value = reg(x, y)
    assert_same_gradients(value, model, expected, Logits(reference))
    assert output.loss.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_outputs(name):
    """In training mode a named tuple, of which the logits are the first."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=4, init_weights=False, aux_logits=True)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model, (x, y) = model.double().train(), data(2, {"googlenet": 64, "inception_v3": 299}[name])
    reference = copy.deepcopy(model)
    image = x.clone().requires_grad_()
    output = reference(image)
    assert isinstance(output, tuple)
    oracle = oracle_gradients(F.cross_entropy(output.logits, y, reduction="sum"), image)
    paper = input_gradients(model, x, y, criterion="cross_entropy", batch_norm="coupled")
    for ours, theirs in zip(paper, oracle, strict=True):
        assert relative_difference(ours, theirs) < 1e-9
    reg = InterpretableGradientLoss(model, lam=1.0)
    with reg.shared_forward():
        logits, *auxiliary = model(x)
    (F.cross_entropy(logits, y) + sum(0.4 * F.cross_entropy(each, y) for each in auxiliary) + reg(x, y)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TwoInputs(nn.Module):
    """Images and a table of measurements."""

    def __init__(self):
        super().__init__()
        self.net, self.table = small_net(), nn.Linear(5, 4).double()

    def forward(self, x, measured, *, weight=1.0):
        return self.net(x) + weight * self.table(measured)


def test_several_inputs():
    model, (x, y) = TwoInputs(), data()
    measured = torch.randn(3, 5, dtype=torch.float64, generator=seeded(0))
    given = model.table(measured).detach()

    class Given(nn.Module):
        def forward(self, x):
            return model.net(x) + 0.5 * given

    expected = InterpretableGradientLoss(Given(), lam=1.0)(x, y)
    reg = InterpretableGradientLoss(model, lam=1.0)
    value = reg(x, y, measured, weight=0.5)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(gradients_of(value, model.net), gradients_of(expected, model.net), strict=True):
        torch.testing.assert_close(ours, theirs)
    with reg.shared_forward():
        model(x, measured, weight=0.5)
    torch.testing.assert_close(reg(x, y), expected)


class Keywords(nn.Module):
    """Which takes its arguments by name alone."""

    def __init__(self):
        super().__init__()
        self.net, self.table = small_net().eval(), nn.Embedding(5, 4).double()

    def forward(self, *, pixel_values, input_ids=None):
        return self.net(pixel_values) + (0 if input_ids is None else self.table(input_ids))


def test_arguments_by_name_alone():
    model, (x, y) = Keywords(), data()
    ids = torch.tensor([0, 3, 1])

    class Bound(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.model, self.options = model, options

        def forward(self, x):
            return self.model(pixel_values=x, **self.options)

    for options in ({"input_ids": ids}, {}):
        expected = InterpretableGradientLoss(Bound(**options))(x, y)
        reg = InterpretableGradientLoss(model)
        assert reg(x, y, **options) == expected
        with reg.shared_forward():
            model(**options, pixel_values=x)
        assert reg(x, y) == expected
        maps = saliency.eigen_cam(model, x, "net.6", y, model_kwargs=options)
        assert torch.equal(maps, saliency.eigen_cam(Bound(**options), x, "model.net.6", y))


class FakeQuantize(nn.Module):
    """Of activations, in eight bits: the gradient is passed straight through where nothing was cut off."""

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)


def test_quantization_aware_training():
    net, (x, y) = small_net().eval().float(), images(3, 8)
    model = nn.Sequential(*net[:3], FakeQuantize(), *net[3:])
    image = x.clone().requires_grad_()
    oracle = oracle_gradients(F.cross_entropy(copy.deepcopy(model)(image), y, reduction="sum"), image)
    for ours, theirs in zip(input_gradients(model, x, y, criterion="cross_entropy"), oracle, strict=True):
        assert relative_difference(ours, theirs) < 1e-5
    InterpretableGradientLoss(model, lam=1.0)(x, y).backward()
    assert all(each.grad.isfinite().all() and each.grad.any() for each in [net[0].weight, net[4].weight])


class Checkpointed(nn.Module):
    """Every layer of a sequence recomputed in the backward pass."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_non_reentrant_checkpointing(shared, training):
    """Equal gradients, of the whole loss, and statistics as without it: torch counts a recomputed batch twice."""
    model, (x, y) = small_net().train(training), data()
    reference, alone = copy.deepcopy(model), Checkpointed(copy.deepcopy(model))
    model = Checkpointed(model)
    values = []
    for each in (model, reference):
        reg = InterpretableGradientLoss(each, lam=1.0)
        if shared:
            with reg.shared_forward():
                logits = each(x)
        else:
            logits = each(x)
        values.append(F.cross_entropy(logits, y) + reg(x, y))
    assert_same_gradients(values[0], model, values[1], reference)
    F.cross_entropy(alone(x), y).backward()
    for (name, buffer), expected in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_checkpointed_attention(shared):
    """Recomputed on the kernel it was recorded with, in the inner backward passes and the user's."""
    model, (x, y) = timm_model("vit_tiny_patch16_224").double(), data(2, 32)
    reference = copy.deepcopy(model)
    model.set_grad_checkpointing()
    values = []
    for each in (model, reference):
        reg = InterpretableGradientLoss(each, lam=1.0, activations="all")
        if shared:
            with reg.shared_forward():
                logits = each(x)
        else:
            logits = each(x)
        values.append(F.cross_entropy(logits, y) + reg(x, y))
    assert_same_gradients(values[0], model, values[1], reference)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_two_regularizers_in_two_threads_do_not_see_each_other(device):
    """Each with a model, an order of steps and settings of its own: bit for bit what each does alone.

    But for the order of sums on a GPU, where both share a thread of the engine, whose counter decides it.
    """
    batches = [[data(seed=10 * index + step) for step in range(6)] for index in range(2)]

    def train(index, found, model, barrier=None):
        reg = InterpretableGradientLoss(
            model, ["cos", "mse"][index], lam=1.0, criterion=["cross_entropy", "logit"][index]
        )
        for step, (x, y) in enumerate(batches[index]):
            if barrier:
                barrier.wait()
            if (step + index) % 2:
                with reg.shared_forward():
                    logits = model(x)
            else:
                logits = model(x)
            model.zero_grad()
            (F.cross_entropy(logits, y) + reg(x, y)).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        found[index] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    alone, together, barrier = {}, {}, threading.Barrier(2, timeout=60)
    for index in range(2):
        train(index, alone, small_net(seed=index))
    threads = [
        threading.Thread(target=train, args=(index, together, small_net(seed=index), barrier)) for index in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        torch.testing.assert_close(together[index], alone[index], rtol=0, atol=0 if device.type == "cpu" else 1e-12)


ON_SLICES = {name: rectify for name, (rectify, _) in SPELLINGS.items() if "slice" in name or "view" in name}
ON_SLICES |= {f"{smooth.__name__} on a slice": on_slice(smooth) for smooth in (F.elu_, F.selu_, F.celu_, torch.tanh_)}
ON_SLICES |= {"F.hardsigmoid on a slice": on_slice(lambda view: F.hardsigmoid(view, True))}
ON_SLICES |= {"F.silu on a slice": on_slice(lambda view: F.silu(view, True))}
ON_SLICES |= {"F.elu on a slice": on_slice(lambda view: F.elu(view, 1.0, True))}
ON_SLICES |= {"F.celu on a slice": on_slice(lambda view: F.celu(view, inplace=True))}
ON_SLICES |= {"F.selu on a slice": on_slice(lambda view: F.selu(view, True))}


@pytest.mark.parametrize("name", ON_SLICES)
def test_in_place_on_slices_where_backward_passes_run_on_another_thread(name, device):
    """As on a GPU: nodes are ordered by numbers that each thread counts for itself."""
    rectify, (x, y) = ON_SLICES[name], data()
    model = Rectified(lambda h: F.relu_(rectify(h * 1) * 1))
    reg = InterpretableGradientLoss(model, lam=1.0)
    expected = torch.autograd.grad(reg(x, y), list(model.parameters()), allow_unused=True)
    with reg.shared_forward():
        model(x)
    with ThreadPoolExecutor(1, initializer=torch.set_default_device, initargs=(device,)) as worker:
        value = worker.submit(reg, x, y).result()
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected)


def test_many_threads_on_one_model():
    """Losses, gradients, maps and metrics at once: the values of each alone, and the model as it was."""

    class Checkpointed(nn.Module):  # backward passes work on its buffers, too
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    model, (x, y) = Checkpointed().train(), data(n=4)
    maps = torch.rand(4, 8, 8, generator=seeded(0))
    calls = [
        lambda: InterpretableGradientLoss(model)(x, y),
        lambda: input_gradients(model, x, y)[1],
        lambda: saliency.guided_gradient(model, x, y),
        lambda: saliency.grad_cam(model, x, "net.4", y),
        lambda: saliency.ablation_cam(model, x, "net.4", y),
        lambda: metrics.faithfulness(model, x, maps, y)["AD"],
    ]
    expected = [call().detach() for call in calls]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [id(buffer) for buffer in model.buffers()]
    failures = []

    def run(turn):
        try:
            for index in range(3 * len(calls)):
                which = (index * (turn + 1)) % len(calls)
                assert torch.equal(calls[which]().detach(), expected[which]), which
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(module.training for module in model.modules())
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_attention_kernels_under_interleaved_threads():
    """The choice of kernel is the process's: the first to come selects, the last to leave restores."""

    class Attention(nn.Module):
        def __init__(self, entered, proceed):
            super().__init__()
            self.net, self.entered, self.proceed = small_net(), entered, proceed

        def forward(self, x):
            self.entered.set()
            assert self.proceed.wait(60)
            q = x.flatten(2).transpose(1, 2)
            return self.net(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).view_as(x))

    (x, y), failures = data(), []
    first_in, second_in, first_out, now = (threading.Event() for _ in range(4))
    now.set()

    def run(model, after=None):
        try:
            if after:
                assert after.wait(60)
            InterpretableGradientLoss(model)(x.float(), y).backward()
        except Exception as failure:
            failures.append(failure)

    first = threading.Thread(target=run, args=(Attention(first_in, second_in).float(),))
    second = threading.Thread(target=run, args=(Attention(second_in, first_out).float(), first_in))
    first.start(), second.start()
    first.join()
    first_out.set()
    second.join()
    assert not failures
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
