"""Saliency maps: against the papers' formulas written out in loops, and against peers where they are right."""

import copy
import subprocess
import sys

import evaluation
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import autocast, data, seeded, small_net
from torch import nn
from traces import assert_same_trace, trace

from interpgrad import input_gradients, saliency
from interpgrad.saliency import CAMS
from interpgrad.saliency import ablation as ablation_module

LAYER = "6"  # of small_net: the second ReLU, 8 channels of 4 x 4


def literal_map(weights, a, size):
    """ReLU of the weighted sum, resized, scaled to [0, 1], image by image."""
    maps = []
    for w, channels in zip(weights, a, strict=True):
        total = sum(w[k] * channels[k] for k in range(len(channels))).clamp(min=0)
        total = F.interpolate(total[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        spread = total.max() - total.min()
        maps.append((total - total.min()) / spread if spread > 0 else torch.zeros_like(total))
    return torch.stack(maps)


def split(model, x, classes, layer=LAYER):
    """A, G and the logits by stock autograd, the model an nn.Sequential."""
    head, tail = model[: int(layer) + 1], model[int(layer) + 1 :]
    a = head(x).detach().requires_grad_()
    logits = tail(a)
    (g,) = torch.autograd.grad(logits[range(len(x)), classes].sum(), a)
    return a.detach(), g, logits.detach(), tail


def literal_weights(name, model, x, classes, layer=LAYER):
    """Every weight by the paper's formula, in loops."""
    a, g, logits, tail = split(model, x, classes, layer)
    samples, channels, height, width = a.shape
    if name in ("hires_cam", "layer_cam"):  # a weight for each position: Draelos and Carin, 4; Jiang et al., 6 and 7
        return (g if name == "hires_cam" else torch.maximum(g, torch.zeros_like(g))), a
    w = torch.zeros(samples, channels, dtype=a.dtype)
    for n in range(samples):
        for k in range(channels):
            if name == "grad_cam":  # Selvaraju et al., equation 1
                w[n, k] = sum(g[n, k, i, j] for i in range(height) for j in range(width)) / (height * width)
            elif name == "axiom_cam":  # Fu et al., equation 8
                total = a[n, k].sum()
                if total != 0:
                    w[n, k] = sum(a[n, k, i, j] / total * g[n, k, i, j] for i in range(height) for j in range(width))
            elif name == "grad_cam_pp":  # Chattopadhyay et al., equations 5 and 19, Y = exp(score)
                y = logits[n, classes[n]].exp()
                for i in range(height):
                    for j in range(width):
                        d = g[n, k, i, j]
                        first, second, third = y * d, y * d**2, y * d**3
                        denominator = 2 * second + (a[n, k] * third).sum()
                        alpha = second / denominator if denominator != 0 else 0
                        w[n, k] += alpha * max(first, torch.zeros(()))
            elif name == "score_cam":  # Wang et al., Algorithm 1
                mask = F.interpolate(a[n, k][None, None], x.shape[-2:], mode="bilinear", align_corners=False)
                spread = mask.max() - mask.min()
                mask = (mask - mask.min()) / spread if spread > 0 else torch.zeros_like(mask)
                w[n, k] = model(x[n : n + 1] * mask)[0, classes[n]].detach()
            elif name == "ablation_cam":  # Desai and Ramaswamy, equation 5
                ablated = a[n : n + 1].clone()
                ablated[0, k] = 0
                y = logits[n, classes[n]]
                w[n, k] = (y - tail(ablated)[0, classes[n]].detach()) / y
        if name == "score_cam":
            w[n] = w[n].softmax(0)
        elif name == "eigen_cam":  # Muhammad and Yeasin, equation 3; activations are not negative
            w[n] = torch.from_numpy(np.linalg.svd(a[n].flatten(1).T.numpy())[2][0]).abs()
    return w, a


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize("seed", range(3))
def test_formulas(name, seed):
    model = small_net(seed).eval()
    with torch.no_grad():
        model[-1].bias += 10  # the paper's Ablation-CAM divides by the score: positive here
    x, peaks = data(5, seed=seed)[0], []
    for classes in (model(x).argmax(1), torch.tensor([0, 1, 2, 3, 0])):
        weights, a = literal_weights(name, model, x, classes)
        expected = literal_map(weights, a, x.shape[-2:])
        torch.testing.assert_close(CAMS[name](model, x, LAYER, classes), expected, rtol=1e-9, atol=1e-9)
        peaks.append(float(expected.amax()))
    assert max(peaks) == 1  # not all of it rectified away


@pytest.mark.parametrize("name", [name for name in CAMS if name != "eigen_cam"])
def test_formulas_where_activations_are_negative(name):
    """Before batch norm: behind a rectifier ReLU(G A) and ReLU(G) A are the same."""
    model = small_net().eval()
    with torch.no_grad():
        model[-1].bias += 10
    x, classes = data(5)[0], torch.tensor([0, 1, 2, 3, 0])
    weights, a = literal_weights(name, model, x, classes, "4")
    assert (a < 0).any()
    expected = literal_map(weights, a, x.shape[-2:])
    torch.testing.assert_close(CAMS[name](model, x, "4", classes), expected, rtol=1e-9, atol=1e-9)


def test_ablation_cam_of_a_negative_score():
    """The paper's (y - y_k) / y changes its sign with y, and peers with it; the drop itself does not."""
    model = small_net().eval()
    with torch.no_grad():
        model[-1].bias -= 100
    x, classes = data()
    weights, a = literal_weights("ablation_cam", model, x, classes)
    ours = saliency.ablation_cam(model, x, LAYER, classes)
    torch.testing.assert_close(ours, literal_map(-weights, a, x.shape[-2:]), rtol=1e-9, atol=1e-9)
    assert (ours - literal_map(weights, a, x.shape[-2:])).abs().max() > 0.5
    pytest.importorskip("pytorch_grad_cam")
    peer = peer_map("AblationCAM", model.float(), x.float(), LAYER, classes)
    assert (ours - peer).abs().max() > 0.5


# ---- peers

PEERS = {
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMPlusPlus",
    "score_cam": "ScoreCAM",
    "ablation_cam": "AblationCAM",
    "axiom_cam": "XGradCAM",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
}  # its Eigen-CAM centres A, and leaves the sign to chance
# Layers whose output is that of a ReLU: elsewhere the peer's Ablation-CAM writes -1e7 into a channel, not 0.
ARCHITECTURES = {
    "resnet18": (lambda: torchvision.models.resnet18(), "layer2", 64),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(), "features.6", 32),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(), "features.4", 64),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False), "inception3a", 64),
    "regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(), "trunk_output.block2", 64),
}


def peer_map(name, model, x, layer, classes):
    """pytorch-grad-cam's map. Its Score-CAM resizes with aligned corners, which the authors' code does not."""
    with evaluation.corners_not_aligned():
        return evaluation.peer_maps(name, model, x, model.get_submodule(layer), classes)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PEERS)
def test_pytorch_grad_cam(name, architecture, capfd):
    pytest.importorskip("pytorch_grad_cam")
    torch.manual_seed(1)
    build, layer, size = ARCHITECTURES[architecture]
    model = build().eval()
    head = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    with torch.no_grad():
        # The peer adds 1e-6 to Grad-CAM++'s denominator, of the order of G²: scores so large that this is nothing.
        # Positive ones: its Ablation-CAM divides by them.
        head.weight *= 1e5 if name == "grad_cam_pp" else 10
        if head.bias is not None:
            head.bias += 20
    x = torch.rand(2, 3, size, size)
    classes = copy.deepcopy(model).double()(x.double()).argmax(1)  # not by the device's rounding
    ours = CAMS[name](model, x, layer, classes)
    expected = peer_map(PEERS[name], model, x, layer, classes)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


def test_grad_cam_pp_of_small_gradients():
    """G² is nothing to the peers' 1e-6 and 1e-8, and underflows in single precision; the formula has no such scale."""
    x, classes = data()
    model = small_net().eval()
    weights, a = literal_weights("grad_cam_pp", model, x, classes)
    expected = literal_map(weights, a, x.shape[-2:])
    with torch.no_grad():  # the same function of 1e20 times larger activations: G is smaller by as much
        model[3] = nn.Sequential(model[3])
        scaled = small_net().eval()
        scaled[4].weight *= 1
        scaled[5].weight *= 1e20
        scaled[5].bias *= 1e20
        scaled[9].weight /= 1e20
    ours = saliency.grad_cam_pp(scaled.float(), x.float(), LAYER, classes)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)


def test_torch_cam_loses_the_denominator_of_grad_cam_pp():
    """It divides a copy that indexing made, so its alpha is G² alone; ours is held against the formula."""
    methods = pytest.importorskip("torchcam.methods")
    model, (x, classes) = small_net().eval(), data()
    weights, a = literal_weights("grad_cam_pp", model, x, classes)
    expected = literal_map(weights, a, a.shape[-2:])
    extractor = methods.GradCAMpp(model, LAYER, input_shape=(3, 8, 8))
    (peer,) = extractor(classes.tolist(), model(x))
    extractor.remove_hooks()
    assert peer.shape == expected.shape
    _, g, _, _ = split(model, x, classes)
    without = torch.einsum("nk,nkhw->nhw", (g.square() * g.clamp(min=0)).sum((2, 3)), a).clamp(min=0)
    without -= without.amin((1, 2), keepdim=True)
    without /= without.amax((1, 2), keepdim=True) + 1e-8  # the peer's own
    torch.testing.assert_close(peer.to(without), without)
    assert (peer - expected).abs().max() > 0.05
    ours = saliency.grad_cam_pp(model, x, LAYER, classes)
    torch.testing.assert_close(ours, literal_map(weights, a, x.shape[-2:]))


def test_vision_transformer_with_reshape():
    pytest.importorskip("pytorch_grad_cam")
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    nn.init.normal_(model.head.weight)
    x, reshape = torch.rand(2, 3, 64, 64), lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    layer = model.blocks[-1].norm1
    classes = model(x).detach().argmax(1)
    ours = saliency.grad_cam(model, x, layer, reshape=reshape)
    with pytorch_grad_cam.GradCAM(model, [layer], reshape_transform=reshape) as cam:
        expected = torch.as_tensor(cam(x, [ClassifierOutputTarget(int(c)) for c in classes]))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)

    # Ablation-CAM: a channel of the image's tokens, not of the class token, which reshape drops.
    def score(tokens=None):
        handle = layer.register_forward_hook(lambda *_: tokens)
        try:
            return model(x)[range(2), classes].detach()
        finally:
            handle.remove()

    seen = []
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    y = score()
    handle.remove()
    drops = torch.zeros(2, seen[0].shape[2])
    for k in range(drops.shape[1]):
        tokens = seen[0].clone()
        tokens[:, 1:, k] = 0
        drops[:, k] = y - score(tokens)
    ablated = saliency.ablation_cam(model, x, layer, reshape=reshape)
    torch.testing.assert_close(ablated, literal_map(drops, reshape(seen[0]), (64, 64)), rtol=0, atol=1e-3)


TRANSFORMERS = {
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), "blocks.1.norm1", 1),
    "timm deit distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
        "blocks.1.norm1",
        2,
    ),
    "timm registers": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, reg_tokens=4),
        "blocks.1.norm1",
        5,
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=10),
        "encoder.layers.encoder_layer_1.ln_1",
        1,
    ),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)),
        "layers.2.blocks.0.norm1",
        None,
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [2, 2], num_classes=10),
        "features.3.0.norm1",
        None,
    ),
}


CASES = [(name, method) for name in TRANSFORMERS for method in ("grad_cam", "layer_cam")]
CASES += [(name, "ablation_cam") for name in ("torchvision vit", "torchvision swin")]  # the others have many channels


@pytest.mark.parametrize(("name", "method"), CASES)
def test_transformers_need_no_reshape(name, method):
    """Tokens become the grid that they are of, whatever comes before them; Swin's channels come first."""
    make, layer, others = TRANSFORMERS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(2, 3, 64, 64)
    for parameter in model.parameters():
        if not parameter.any():  # heads, position tables
            nn.init.normal_(parameter, std=0.1)

    def reshape(output):
        return output.movedim(3, 1) if others is None else output[:, others:].transpose(1, 2).unflatten(2, (4, 4))

    cam, shown = CAMS[method], 0
    for target in range(5):
        expected = cam(model, x, layer, target, reshape=reshape)
        shown += expected.std() > 0.01
        assert torch.equal(cam(model, x, layer, target), expected)
    assert shown


def test_tokens_of_images_that_are_not_square():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 96), depth=1).eval()
    nn.init.normal_(model.head.weight)
    x = torch.rand(1, 3, 32, 96)
    expected = saliency.grad_cam(
        model, x, "blocks.0.norm1", 0, reshape=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (2, 6))
    )
    assert torch.equal(saliency.grad_cam(model, x, "blocks.0.norm1", 0), expected)


class Tokens(nn.Module):
    """Named as a transformer of timm, or not."""

    def __init__(self, count, prefix=None):
        super().__init__()
        if prefix is not None:
            self.num_prefix_tokens = prefix
        self.count, self.layer, self.head = count, nn.Identity(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1)[:, : 6 * self.count].unflatten(1, (self.count, 6))).mean(1))


def test_tokens_that_are_no_grid():
    message = r"expected the output of layer 'layer' to be \(N, K, h, w\), got \(1, 10, 6\)"
    with pytest.raises(ValueError, match=message):
        saliency.grad_cam(Tokens(10), torch.rand(1, 3, 16, 32), "layer", 0)


def test_other_sequences_are_no_grid():
    """Of as many rows as a grid has positions, but of a model that nothing says to be a vision transformer."""
    x = torch.rand(1, 3, 16, 32)
    with pytest.raises(ValueError, match="expected the output of layer 'layer' to be"):
        saliency.grad_cam(Tokens(8), x, "layer", 0)
    assert saliency.grad_cam(Tokens(8, prefix=0), x, "layer", 0).shape == (1, 16, 32)
    assert saliency.grad_cam(Tokens(8, prefix=1), x, "layer", 0).shape == (1, 16, 32)  # CaiT: the class comes later


def test_windows_are_no_images():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)).eval()
    with pytest.raises(ValueError, match=r"to have one row for each of the 2 images, got shape \(128, 4, 96\)"):
        saliency.grad_cam(model, torch.rand(2, 3, 64, 64), "layers.0.blocks.0.attn")


@pytest.mark.parametrize("size", [(64, 64), (100, 100), (60, 80)])
def test_swin_of_images_that_its_windows_do_not_divide(size):
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [2, 2], num_classes=10).eval()
    x = torch.rand(2, 3, *size)
    expected = saliency.eigen_cam(model, x, "features.3", reshape=lambda maps: maps.movedim(3, 1))
    assert torch.equal(saliency.eigen_cam(model, x, "features.3"), expected)


def test_channels_that_may_be_first_or_last_are_asked_for():
    model = torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [2, 2], num_classes=10).eval()
    with pytest.raises(ValueError, match="to say where its channels are, got \\(1, 24, 24, 24\\)"):
        saliency.eigen_cam(model, torch.rand(1, 3, 96, 96), "features.1")


@pytest.mark.parametrize("name", CAMS)
def test_several_layers_are_the_mean_of_their_maps(name):
    model, (x, y) = small_net().eval(), data()
    alone = [CAMS[name](model, x, layer, y) for layer in ("2", LAYER)]
    together = CAMS[name](model, x, ["2", model[int(LAYER)]], y)
    torch.testing.assert_close(together, saliency.scale((alone[0] + alone[1]) / 2))
    assert torch.equal(CAMS[name](model, x, layer=(LAYER,), target=y), saliency.scale(alone[1]))
    with pytest.raises(ValueError, match="expected at least one layer, got an empty list"):
        CAMS[name](model, x, [], y)


@pytest.mark.parametrize("name", CAMS)
def test_volumes(name):
    """A volume that repeats an image in its depth has that image's map in every slice."""
    torch.manual_seed(0)
    flat = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(2), nn.Flatten(), nn.Linear(80, 4)
    ).double()
    deep = nn.Sequential(
        nn.Conv3d(3, 5, (1, 3, 3), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.AvgPool3d((6, 2, 2)),
        nn.Flatten(2),
        nn.Flatten(),
        nn.Linear(80, 4),
    ).double()
    state = flat.state_dict()
    deep.load_state_dict(state | {"0.weight": state["0.weight"][:, :, None]})
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    volume = x[:, :, None].expand(-1, -1, 6, -1, -1)
    expected = CAMS[name](flat, x, "1", 1)
    found = CAMS[name](deep, volume, "1", 1)
    assert expected.std() > 0.05
    if name == "grad_cam_pp":  # its alpha asks for the sum over all positions
        assert torch.equal(found[:, 0], found[:, 5])
    else:
        torch.testing.assert_close(found, expected[:, None].expand(-1, 6, -1, -1))


# ---- the three ways of Ablation-CAM


def ways(monkeypatch):
    """Which ways were finished."""
    used = []
    for name in ("_after_layer", "_after_layer_one_by_one", "_whole_network"):
        way = getattr(ablation_module, name)

        def noted(*args, name=name, way=way):
            result = way(*args)
            used.append(name)
            return result

        monkeypatch.setattr(ablation_module, name, noted)
    return used


def literal_ablation(model, x, layer, classes):
    module, seen = model.get_submodule(layer), []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        y = model(x)[range(len(x)), classes]
        handle.remove()
        drops = torch.zeros(seen[0].shape[:2], dtype=x.dtype)
        for k in range(drops.shape[1]):
            output = seen[0].clone()
            output[:, k] = 0
            handle = module.register_forward_hook(lambda *_, output=output: output)
            drops[:, k] = y - model(x)[range(len(x)), classes]
            handle.remove()
    return literal_map(drops, seen[0], x.shape[-2:])


class Residual(nn.Module):
    """A layer beside a skip connection, and one whose shape is remembered from before it."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.kind = nn.Linear(8 if kind == "cat" else 4, 4), kind

    def forward(self, x):
        before = self.stem(x).relu()
        h = self.branch(before)
        if self.kind == "add":
            h = h + before
        elif self.kind == "cat":
            h = torch.cat([h, before], 1)
        elif self.kind in ("gate", "tile"):  # keeps the number of rows, and gates some copies by another image
            gate, copies = before.mean((1, 2, 3)), -(-len(h) // len(x))
            gate = gate.repeat_interleave(copies) if self.kind == "gate" else gate.repeat(copies)
            h = h * gate[: len(h), None, None, None]
        elif self.kind == "batch size":
            h = h.view(len(x), -1, *x.shape[2:])[:, :4]
        return self.head(h.relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("plain", "_after_layer"),
        ("add", "_after_layer_one_by_one"),
        ("gate", "_after_layer_one_by_one"),
        ("tile", "_after_layer_one_by_one"),
        ("cat", "_whole_network"),
        ("batch size", "_whole_network"),
    ],
)
def test_layers_inside_of_residual_branches(kind, way, monkeypatch):
    torch.manual_seed(0)
    model, (x, classes) = Residual(kind).double().eval(), data()
    expected = literal_ablation(model, x, "branch", classes)
    used = ways(monkeypatch)
    for chunk_size in (64, None, 3, 1):
        ours = saliency.ablation_cam(model, x, "branch", classes, chunk_size=chunk_size)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        assert chunk_size != 64 or used[-1] == way  # a single image in a chunk broadcasts with its copies


# ---- invariances


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(CAMS)),
    st.integers(1, 4),
    st.sampled_from([None, 1, 2, 7]),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_map_depends_on_its_image_alone(name, samples, chunk_size, target, module):
    """Neither on the batch, nor on the size of the chunks; one target for all equals that target for each."""
    model = small_net().eval()
    x = data(samples)[0]
    together = CAMS[name](model, x, model[6] if module else LAYER, target, chunk_size=chunk_size)
    alone = torch.cat([CAMS[name](model, image[None], LAYER, torch.tensor([target])) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert together.shape == (samples, 8, 8)
    assert ((together >= 0) & (together <= 1)).all()


@settings(max_examples=20)
@given(st.sampled_from(["grad_cam", "ablation_cam", "axiom_cam"]), st.floats(1e-3, 1e3))
def test_scaled_logits_leave_linear_methods_alone(name, factor):
    model, x = small_net().eval(), data()[0]
    before = CAMS[name](model, x, LAYER)
    with torch.no_grad():
        model[-1].weight *= factor
        model[-1].bias *= factor
    torch.testing.assert_close(CAMS[name](model, x, LAYER), before, rtol=1e-7, atol=1e-7)


def test_names():
    """XGrad-CAM is Axiom-CAM; `scale` is what every map has passed through, and leaves it as it is."""
    assert saliency.xgrad_cam is saliency.axiom_cam
    model, x = small_net().eval(), data()[0]
    maps = saliency.xgrad_cam(model, x, LAYER)
    assert torch.equal(saliency.scale(maps), maps)
    other = torch.rand(3, 8, 8)
    torch.testing.assert_close(saliency.scale(3 - 2 * other), 1 - saliency.scale(other))
    with pytest.raises(ValueError, match=r"expected maps \(N, H, W\), got shape \(3, 3, 8, 8\)"):
        saliency.scale(x)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8]
)
def test_scale_in_every_precision(dtype):
    """The range of float16 ends at 65504, that of int8 at 127; the dtype is that of maps / 2."""
    top = {torch.float16: 60000, torch.int8: 100, torch.uint8: 200}.get(dtype, 1e30)
    bottom = 0 if dtype == torch.uint8 else -top
    maps = torch.tensor([[[bottom, (top + bottom) / 2, top]]]).to(dtype)
    scaled = saliency.scale(maps)
    assert scaled.dtype == (maps / 2).dtype
    torch.testing.assert_close(scaled, torch.tensor([[[0, 0.5, 1]]], dtype=scaled.dtype))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_maps_that_are_not_finite(value):
    maps = torch.rand(12, 4, 4)
    maps[3, 1, 2] = float(value)
    maps[7] = float(value)
    with pytest.raises(
        ValueError, match=r"expected maps of a finite range, got NaN or infinity in 2 of 12 \(index 3, 7\)"
    ):
        saliency.scale(maps)
    with pytest.raises(ValueError, match=r"in 12 of 12 \(index 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        saliency.scale(maps * float("nan"))
    with pytest.raises(ValueError, match="in 1 of 1"):
        saliency.scale(torch.tensor([[[-3e38, 0, 3e38]]]))


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_images_and_layers_that_are_not_finite(name, value):
    """Also where a rectifier or a chunk would hide which image it is."""
    model, x = small_net().eval(), data(5)[0]
    broken = x.clone()
    broken[3, 0, 0, 0] = float(value)
    with pytest.raises(ValueError, match=r"expected finite images, got NaN or infinity in 1 of 5 \(index 3\)"):
        CAMS[name](model, broken, LAYER, chunk_size=2)
    known = x[3, 0, 0, 0]
    model[0].register_forward_hook(
        lambda _, args, output: torch.where(args[0][:, :1, :1, :1] == known, float(value), output)
    )
    with pytest.raises(ValueError, match=r"expected maps of a finite range, got NaN or infinity in 1 of 5 \(index 3\)"):
        CAMS[name](model, x, LAYER, 1, chunk_size=2)


class OneValue(nn.Module):
    """A layer "a" of random values, but for one of the first channel in the second image."""

    def __init__(self, value):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.a, self.head, self.value = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Linear(4, 3), value

    def forward(self, x):
        h = self.conv(x)
        h[x[:, 0, 0, 0] == 2, 0, 2, 2] = self.value
        return self.head(self.a(h).clamp(-1, 1).mean((2, 3)))


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_value_that_is_not_finite(name, value):
    """Whatever the sign of its channel's weight: a rectifier would make 0 of minus infinity."""
    x = torch.rand(3, 3, 9, 9, generator=seeded(0))
    x[1, 0, 0, 0] = 2
    for target in range(3):
        with pytest.raises(ValueError, match=r"expected maps of a finite range, got NaN or infinity in 1 of 3"):
            CAMS[name](OneValue(float(value)), x, "a", target)


@pytest.mark.parametrize("name", CAMS)
def test_the_predicted_class_is_the_default(name):
    model, x = small_net().eval(), data(8)[0]
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
    predicted = model(x).argmax(1)
    assert len(predicted.unique()) > 1
    assert torch.equal(CAMS[name](model, x, LAYER), CAMS[name](model, x, LAYER, predicted))


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize("channels", [1, 7])
def test_any_number_of_channels_and_dead_ones(name, channels):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    ).double()
    x = data()[0]
    assert CAMS[name](model, x, "1").shape == (3, 8, 8)
    with torch.no_grad():
        model[0].bias -= 100  # all channels dead
    maps = CAMS[name](model, x, "1")
    assert torch.equal(maps, torch.zeros_like(maps))


class Broadcast(nn.Module):
    """A layer "spread" of one value per channel, on 1 x 1 or more pixels that differ by a factor of 1 + pattern."""

    def __init__(self, pattern):
        super().__init__()
        self.stem, self.spread = nn.Conv2d(3, 16, 3), Times(1 + pattern)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.spread(self.stem(x).relu().mean((2, 3), keepdim=True)).mean((2, 3)))


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, h):
        return h * self.factor


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_maps_are_zero(name, dtype):
    """Not the rounding of their sum or of the resizing, stretched to [0, 1]; and what is more than rounding stays."""
    torch.manual_seed(0)
    x = torch.rand(20, 3, 30, 30).to(dtype)
    steps = torch.linspace(-1, 1, 49).view(7, 7)
    for pattern in (torch.zeros(1, 1), torch.zeros(7, 7), torch.finfo(dtype).eps * steps.sign()):
        maps = CAMS[name](Broadcast(pattern).to(dtype), x, "spread", 1)
        assert torch.equal(maps, torch.zeros_like(maps))
    varying = Broadcast(1e-4 * steps)
    with torch.no_grad():
        varying.head.weight.abs_()
    assert (CAMS[name](varying.to(dtype), x, "spread", 1).amax((1, 2)) == 1).all()


class ManyChannels(nn.Module):
    """A layer "layer" of this many channels, each constant; of one kind, or all of the same value and weight."""

    def __init__(self, channels, kind):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, channels, 3), nn.Identity(), nn.Linear(channels, 4)
        with torch.no_grad():
            if kind != "mixed":
                self.head.weight.abs_()
                self.stem.weight.abs_()
            if kind == "equal":
                self.head.weight[:] = self.head.weight[:, :1]
                self.stem.weight[:], self.stem.bias[:] = self.stem.weight[:1].clone(), self.stem.bias[:1].clone()

    def forward(self, x):
        return self.head(self.layer(self.stem(x).relu().mean((2, 3), keepdim=True).expand(-1, -1, 7, 7)).mean((2, 3)))


@pytest.mark.parametrize("channels", [64, 1024, 4096])
@pytest.mark.parametrize("kind", ["positive", "mixed", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_maps_of_many_channels(channels, kind, dtype):
    """The rounding of a sum grows with its terms, most where they are alike."""
    torch.manual_seed(0)
    model, x = ManyChannels(channels, kind).to(dtype), torch.rand(40, 3, 5, 5).to(dtype)
    for name in CAMS.keys() - {"score_cam", "ablation_cam"}:  # of which each channel takes a pass
        assert not CAMS[name](model, x, "layer", 1).any(), name


@pytest.mark.parametrize("big", [1e2, 1e5, 1e7])
def test_a_large_value_beside_a_map(big):
    """Whose rounding is its own pixel's."""
    ramp, spike = torch.linspace(0, 1, 49).view(7, 7), torch.zeros(7, 7)
    spike[3, 3] = big
    layer = nn.Identity()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            h = self.layer(torch.stack([ramp, spike])[None] + 0 * x.mean())
            logit = (h[:, 0] - h[:, 1]).mean((1, 2))
            return torch.stack([logit, -logit], 1)

    expected = torch.where(spike > 0, 0, ramp)[None]
    torch.testing.assert_close(saliency.grad_cam(Net(), torch.rand(1, 3, 7, 7), layer, 0), expected)


def test_constant_channels_of_score_cam():
    """Masks of 0, whatever resizing makes of a constant; in a layer without a rectifier they count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)).double()
    x = torch.rand(5, 3, 30, 30, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = -1 / 3
        model[3].weight *= 10
        a = model[0](x)
        masked = x * saliency.scale(F.interpolate(a[:, :1], (30, 30), mode="bilinear")[:, 0])[:, None]
        weights = torch.stack([model(masked)[:, 1], model(0 * x)[:, 1]], 1).softmax(1)
    torch.testing.assert_close(saliency.score_cam(model, x, "0", 1), literal_map(weights, a, (30, 30)))


def test_the_sum_of_channels_is_not_cast():
    """In bfloat16 a map would have 8 bits."""
    model, x = small_net().float().eval(), data()[0].float()
    model[6].register_forward_hook(lambda _, __, output: output.float())
    for name in ("grad_cam_pp", "score_cam"):
        with autocast(torch.bfloat16):
            maps = CAMS[name](model, x, LAYER)
        assert maps.dtype == torch.float32
        assert not torch.equal(maps, maps.bfloat16().float())


def test_layers_followed_by_in_place_activations():
    inplace, plain, x = small_net(inplace=True).eval(), small_net().eval(), data()[0]
    for name, cam in CAMS.items():
        torch.testing.assert_close(cam(inplace, x, "5"), cam(plain, x, "5"), msg=name)


def test_half_precision():
    model, x = small_net().eval(), data()[0]
    for name, cam in CAMS.items():
        maps = cam(small_net().eval().bfloat16(), x.bfloat16(), LAYER, 1)
        assert maps.dtype == torch.float32
        assert (maps - cam(model, x, LAYER, 1)).abs().mean() < 0.05, name


# ---- gradients


def test_gradients_are_those_of_input_gradients():
    model, (x, y) = small_net().eval(), data()
    delta, guided = input_gradients(model, x, y, criterion="logit")
    for chunk_size in (None, 2):
        torch.testing.assert_close(saliency.gradient(model, x, y, chunk_size=chunk_size), delta)
        torch.testing.assert_close(saliency.guided_gradient(model, x, y, chunk_size=chunk_size), guided)
    of_loss = input_gradients(model, x, y, criterion="cross_entropy")
    torch.testing.assert_close(saliency.gradient(model, x, y, criterion="cross_entropy"), of_loss[0])
    torch.testing.assert_close(saliency.guided_gradient(model, x, y, criterion="cross_entropy"), of_loss[1])
    model.train()  # and yet in evaluation mode
    torch.testing.assert_close(saliency.gradient(model, x, y), delta)


def test_captum():
    attr = pytest.importorskip("captum.attr")
    model, (x, y) = small_net().eval(), data()
    expected = attr.Saliency(model).attribute(x.clone().requires_grad_(), y, abs=False)
    torch.testing.assert_close(saliency.gradient(model, x, y), expected)
    expected = attr.GuidedBackprop(small_net().eval()).attribute(x.clone().requires_grad_(), y)
    torch.testing.assert_close(saliency.guided_gradient(model, x, y), expected)


@pytest.mark.parametrize("baseline", [0.0, 0.5, "black corner"])
def test_integrated_gradients(baseline):
    """captum's at the middles of equal parts, whatever the chunks; and the axiom of completeness."""
    attr = pytest.importorskip("captum.attr")
    model, (x, y) = small_net().eval(), data()
    if baseline == "black corner":
        baseline = torch.ones(1, 3, 8, 8, dtype=x.dtype)
        baseline[..., :4, :4] = 0
    expected = attr.IntegratedGradients(model).attribute(x, baseline, y, n_steps=9, method="riemann_middle")
    for chunk_size in (4, None):
        ours = saliency.integrated_gradients(model, x, y, baseline=baseline, steps=9, chunk_size=chunk_size)
        torch.testing.assert_close(ours, expected)
    exact = saliency.integrated_gradients(model, x, y, baseline=baseline, steps=2000).flatten(1).sum(1)
    start = torch.as_tensor(baseline, dtype=x.dtype).expand_as(x)
    rows = range(len(x))
    torch.testing.assert_close(exact, (model(x)[rows, y] - model(start)[rows, y]).detach(), rtol=1e-2, atol=1e-4)
    assert torch.equal(
        saliency.integrated_gradients(model, x, steps=3),
        saliency.integrated_gradients(model, x, model(x).argmax(1), steps=3),
    )
    with pytest.raises(ValueError, match=r"expected baseline to be a number or a tensor that broadcasts to \(.*, got"):
        saliency.integrated_gradients(model, x, y, baseline=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="expected steps >= 1, an integer, got 0"):
        saliency.integrated_gradients(model, x, y, steps=0)


def test_guided_grad_cam():
    """captum's, but for a factor of each image, at a layer of the images' size, which it resizes in another way."""
    attr = pytest.importorskip("captum.attr")
    model, (x, y) = small_net().eval(), data()
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.ReLU))
    ours = saliency.guided_grad_cam(model, x, layer, y)
    peer = small_net().eval()
    expected = attr.GuidedGradCam(peer, peer.get_submodule(layer)).attribute(x.clone().requires_grad_(), y)
    maps = saliency.grad_cam(model, x, layer, y)
    torch.testing.assert_close(ours, maps[:, None] * saliency.guided_gradient(model, x, y))
    torch.testing.assert_close(F.normalize(ours.flatten(1)), F.normalize(expected.detach().flatten(1)))


def test_smooth_gradient():
    model, (x, y) = small_net().eval(), data()
    torch.testing.assert_close(
        saliency.smooth_gradient(model, x, y, noise=0, samples=3), saliency.gradient(model, x, y)
    )
    generator = seeded(5)
    expected = torch.zeros_like(x)
    for n, image in enumerate(x):
        for _ in range(6):
            noisy = image + 0.2 * (image.max() - image.min()) * torch.randn(
                image.shape, dtype=x.dtype, generator=generator
            )
            expected[n] += saliency.gradient(model, noisy[None], y[n : n + 1])[0] / 6
    for chunk_size in (None, 64, 4, 1):
        generator.manual_seed(5)
        ours = saliency.smooth_gradient(model, x, y, noise=0.2, samples=6, chunk_size=chunk_size, generator=generator)
        torch.testing.assert_close(ours, expected)
    assert torch.equal(saliency.smooth_gradient(model, x), saliency.smooth_gradient(model, x))
    predicted = model(x).argmax(1)
    assert torch.equal(saliency.smooth_gradient(model, x), saliency.smooth_gradient(model, x, predicted))
    with pytest.raises(ValueError, match=r"expected noise >= 0 and samples >= 1"):
        saliency.smooth_gradient(model, x, samples=0)


# ---- no trace, errors

GRADIENTS = {name: getattr(saliency, name) for name in ("gradient", "guided_gradient", "smooth_gradient")}


@pytest.mark.parametrize("name", [*GRADIENTS, *CAMS])
@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(name, fails):
    model, (x, y) = small_net(inplace=True).train(), data()
    model[5].eval()  # a frozen batch norm among modules in training
    F.cross_entropy(model(x), y).backward()
    x.requires_grad_()
    arguments = (LAYER,) if name in CAMS else ()
    before = trace(model)
    if fails:
        model[11].register_forward_pre_hook(lambda *_: 1 / 0)
        before = trace(model)
        with pytest.raises(ZeroDivisionError):
            ({**GRADIENTS, **CAMS}[name])(model, x, *arguments)
    else:
        maps = ({**GRADIENTS, **CAMS}[name])(model, x, *arguments)
        assert not maps.requires_grad
    assert_same_trace(before, trace(model))
    assert x.grad is None
    with torch.no_grad():
        if not fails:
            assert torch.equal(({**GRADIENTS, **CAMS}[name])(model, x, *arguments), maps)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused, self.pair = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), Pair()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        h = self.body(self.body(x).relu())
        return self.head(self.pair(h)[0].mean((2, 3)))


class Pair(nn.Module):
    def forward(self, h):
        return h, h


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("body", RuntimeError, "expected layer 'body' to be called once in a forward pass, it was called again"),
        ("unused", RuntimeError, "expected layer 'unused' to be called in the forward pass, it was not"),
        ("pair", TypeError, "expected layer 'pair' to return a tensor, got tuple"),
        ("head", ValueError, r"expected the output of layer 'head' to be \(N, K, h, w\), got \(3, 4\)"),
        ("bodi", ValueError, "expected the dotted name of a layer of the model, got 'bodi': close to it are 'body'"),
        ("", ValueError, "expected the dotted name"),
        (nn.ReLU(), ValueError, "expected a layer of the model, got a ReLU that is not part of it"),
        (3, TypeError, "expected layer to be a module of the model or its dotted name, got int"),
    ],
)
def test_layers_that_cannot_serve(name, layer, error, message):
    model = Odd().double()
    before = trace(model)
    with pytest.raises(error, match=message):
        CAMS[name](model, data()[0], layer)
    assert_same_trace(before, trace(model))


@pytest.mark.parametrize("name", CAMS)
def test_bad_input(name):
    model, x = small_net(), data()[0]
    for arguments, error, message in (
        ((x.long(), LAYER), TypeError, "floating point"),
        ((x[:0], LAYER), ValueError, "at least one image"),
        ((x.flatten(1), LAYER), ValueError, r"images \(N, C, H, W\)"),
        ((x, LAYER, 4), ValueError, "expected class indices from 0 to 3, got 4 to 4"),
        ((x, LAYER, torch.tensor([0, 1])), ValueError, "one class index or one for each of the 3 images"),
        ((x, LAYER, torch.tensor([0.0, 1, 2])), TypeError, "class indices"),
    ):
        with pytest.raises(error, match=message):
            CAMS[name](model, *arguments)
    with pytest.raises(ValueError, match="chunk_size of at least 1"):
        CAMS[name](model, x, LAYER, chunk_size=0)


def test_wrapped_models():
    model, x = small_net().eval(), data()[0]
    for name, cam in CAMS.items():
        expected = cam(model, x, LAYER)
        assert torch.equal(cam(nn.DataParallel(model), x, LAYER), expected), name
        assert torch.equal(cam(torch.compile(model), x, LAYER), expected), name
    for part in (model[6], model):
        part.compile(backend="eager")
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                model(x)  # compiled without the hook that reads the layer
            for name, cam in CAMS.items():
                torch.testing.assert_close(cam(model, x, LAYER), cam(small_net().eval(), x, LAYER), msg=name)


CONDITION = """
import sys
import torch
from torch import nn
from interpgrad import measure, saliency

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        h = self.conv(x)
        return self.head(torch.cond(h.sum() > 0, torch.relu, torch.neg, (h,)).relu().flatten(1))

model, x, y = Net(), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
model(x)  # imports the compiler
for function in (saliency.gradient, saliency.integrated_gradients, lambda *_: measure(model, [(x, y)])):
    try:
        print(function(model, x, y).shape)
    except RuntimeError as error:
        print(error)
"""


def test_higher_order_operators_once_the_compiler_is_imported():
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", CONDITION], capture_output=True, text=True)
    assert found.stdout.count("expected a graph of single operations, got the higher-order operator") == 3, found


# ---- further arguments of the model


class Told(nn.Module):
    """A strength and an index into a table for each image, and a mode for all; before and after the layer "conv"."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(5, 4))
        with torch.no_grad():  # a constant channel: for Score-CAM, the black image
            self.conv.weight[0], self.conv.bias[0] = 0, -0.5

    def forward(self, x, strength, index=None, *, mode="product"):
        mixed = x + strength[:, None, None, None] * x.flip(3)
        logits = self.head(self.act(self.conv(mixed)).mean((2, 3)))
        if mode == "product":
            return logits * self.table[index]
        return logits[torch.arange(len(logits))[:, None], (torch.arange(4) + index[:, None]) % 4]


class Captioned(nn.Module):
    """As CLIP's: the images come second, and all are passed by name."""

    def __init__(self):
        super().__init__()
        self.told = Told()

    def forward(self, input_ids=None, pixel_values=None, strength=None):
        return self.told(pixel_values, strength, input_ids[:, 0])


ALL = {**GRADIENTS, **CAMS}


def explained(name, model, x, y, kwargs, **options):
    arguments = ("told.conv" if isinstance(model, Captioned) else "conv", y) if name in CAMS else (y,)
    return ALL[name](model, x, *arguments, model_kwargs=kwargs, **options)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["product", "rows"])
@pytest.mark.parametrize("given", [False, True])
def test_further_arguments_follow_their_image(name, mode, given):
    model, (x, y) = Told().double().eval(), data(5)
    y = y if given else None
    strength, index = torch.rand(5, dtype=x.dtype, generator=seeded(1)) + 0.5, torch.tensor([3, 0, 1, 4, 2])
    kwargs = {"strength": strength, "index": index, "mode": mode}
    options = {"generator": seeded(2), "samples": 3} if name == "smooth_gradient" else {}
    alone = [
        explained(
            name,
            model,
            x[n][None],
            y if y is None else y[n],
            {**kwargs, "strength": s[None], "index": i[None]},
            **options,
        )
        for n, (s, i) in enumerate(zip(strength, index, strict=True))
    ]
    alone = torch.cat(alone)
    for chunk_size in (None, 64, 7, 2, 1):
        if options:
            options["generator"].manual_seed(2)
        together = explained(name, model, x, y, kwargs, chunk_size=chunk_size, **options)
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    if options:
        options["generator"].manual_seed(2)
    captions = {"input_ids": index[:, None], "strength": strength}
    captioned = Captioned().double().eval()
    if mode == "product":
        ours = explained(name, captioned, x, y, captions, chunk_size=2, **options)
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-9)
    if options:
        options["generator"].manual_seed(2)
    other = explained(name, model, x, y, {**kwargs, "strength": strength.flip(0)}, **options)
    assert (other - alone).abs().max() > 0.1 * alone.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_further_arguments_without_a_row_for_each_image(name):
    model, (x, y) = Told().double(), data()
    message = (
        r"expected model_kwargs\['strength'\] to have one row for each of the 3 images, got shape \(2,\): bind what is "
        "the same for all images in a module of your own"
    )
    with pytest.raises(ValueError, match=message):
        explained(name, model, x, y, {"strength": x.new_ones(2), "index": y})
