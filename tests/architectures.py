"""Real architectures, small, in float64: how to build one, the size of its images."""

import itertools

import pytest
import timm
import torch
import torchvision
from torch import nn


def narrow(model):
    """With linear layers of 64 in the place of 4096, whose weights fill a gigabyte and take most of the time."""
    layers = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
    widths = [layers[0].in_features, *[64] * (len(layers) - 1), layers[-1].out_features]
    made = iter([nn.Linear(*pair) for pair in itertools.pairwise(widths)])
    model.classifier = nn.Sequential(
        *(next(made) if isinstance(layer, nn.Linear) else layer for layer in model.classifier)
    )
    return model


ARCHITECTURES = {
    "tv alexnet": (lambda: narrow(torchvision.models.alexnet()), 64),
    "tv vgg11_bn": (lambda: narrow(torchvision.models.vgg11_bn()), 32),
    "tv resnet18": (lambda: torchvision.models.resnet18(), 64),
    "tv resnext50": (lambda: torchvision.models.resnext50_32x4d(), 48),
    "tv densenet121": (lambda: torchvision.models.densenet121(), 64),
    "tv squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(), 64),
    "tv googlenet": (lambda: torchvision.models.googlenet(init_weights=False), 64),
    "tv inception_v3": (lambda: torchvision.models.inception_v3(init_weights=False, aux_logits=False), 80),
    "tv mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 48),
    "tv mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 48),
    "tv mnasnet0_5": (lambda: torchvision.models.mnasnet0_5(), 48),
    "tv shufflenet_v2": (lambda: torchvision.models.shufflenet_v2_x0_5(), 48),
    "tv regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(), 48),
    "tv efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 48),
    "timm resnet10t": (lambda: timm.create_model("resnet10t"), 48),
    "timm ghostnet_100": (lambda: timm.create_model("ghostnet_100"), 48),
    "timm dla46_c": (lambda: timm.create_model("dla46_c"), 64),
    "timm selecsls42": (lambda: timm.create_model("selecsls42"), 64),
    "timm repvgg_a0": (lambda: timm.create_model("repvgg_a0"), 48),
    "timm ese_vovnet19b_slim": (lambda: timm.create_model("ese_vovnet19b_slim"), 48),
    "timm cspresnet50": (lambda: timm.create_model("cspresnet50"), 48),
    "timm res2net50_14w_8s": (lambda: timm.create_model("res2net50_14w_8s"), 48),
    "timm hrnet_w18_small": (lambda: timm.create_model("hrnet_w18_small"), 64),
    "timm dpn48b": (lambda: timm.create_model("dpn48b"), 48),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto", ls_init_value=1.0), 64),
    "timm vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), 64),
}

# What a commit is tested with. The others run with --nightly.
OFTEN = {"tv resnet18", "tv vgg11_bn", "tv squeezenet1_1", "tv shufflenet_v2", "tv efficientnet_b0"}
OFTEN |= {"tv mobilenet_v3_small", "timm convnext_atto", "timm vit_tiny"}
NAMES = [pytest.param(each, marks=[] if each in OFTEN else pytest.mark.nightly) for each in ARCHITECTURES]


def architecture(name, training):
    """The model, with running statistics through which deeper layers see the images, and the size of its images."""
    build, size = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build().double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    return model, size
