"""The networks of the paper's experiments in their form for images of 32x32 pixels.

He et al., "Deep Residual Learning", arXiv 1512.03385; Sandler et al., "MobileNetV2", arXiv 1801.04381. A 3x3 stem and
no max-pooling, as the code base has them that the paper trains with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from classifiers import small_resnet


class Normalize(nn.Module):
    """Standardizes images (N, 3, H, W) in [0, 1] with constants, so that gradients are those of the pixels."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", images.mean((0, 2, 3))[:, None, None])
        self.register_buffer("std", images.std((0, 2, 3))[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and what they are added to."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.rectify = F.relu

    def forward(self, x: Tensor) -> Tensor:
        h = self.rectify(self.norm1(self.conv1(x)))
        return self.rectify(self.norm2(self.conv2(h)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *conv_norm_relu6(inputs, hidden, 1),
            *conv_norm_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.added else self.layers(x)


def conv_norm_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


def resnet18(classes: int, width: float = 64) -> nn.Sequential:
    """ResNet-18 whose four stages have width, 2, 4 and 8 times as many channels; 11.22M parameters for 100 classes."""
    first = round(width)
    layers: list[nn.Module] = [nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    inputs = first
    for stage in range(4):
        outputs = first * 2**stage
        layers += [BasicBlock(inputs, outputs, 2 if stage else 1), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def mobilenet_v2(classes: int, width: float = 1.0) -> nn.Sequential:
    """MobileNet-V2 with its channels times width; 2.37M parameters for 100 classes."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1)]
    inputs, last = round(32 * width), round(1280 * width)
    layers = conv_norm_relu6(3, inputs, 1)
    for expansion, channels, blocks, stride in stages:
        for block in range(blocks):
            outputs = round(channels * width)
            layers.append(InvertedResidual(inputs, outputs, 1 if block else stride, expansion))
            inputs = outputs
    layers += [*conv_norm_relu6(inputs, last, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(last, classes, 1), nn.Flatten()]
    return nn.Sequential(*layers)


NETWORKS: dict[str, tuple[Callable[..., nn.Sequential], float]] = {
    "resnet18": (resnet18, 64),
    "mobilenet_v2": (mobilenet_v2, 1.0),
    "small_resnet": (small_resnet, 16),
}


def build(name: str, classes: int, width: float | None, images: Tensor) -> nn.Sequential:
    """The network of this name, its width by default its own, on images in [0, 1] like these of the training set."""
    network, own = NETWORKS[name]
    return nn.Sequential(Normalize(images), *network(classes, width or own))
