"""The small network of quickstart.py, and networks to evaluate: what it saved, or any of torchvision and timm."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from images import SIZE, BadInputError
from torch import Tensor, nn

from interpgrad.published import Preprocessing, classifier, fill, reading, square


@dataclass
class Network:
    """A classifier, and what it wants images to be."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    fingerprint: str  # of the weights


class Block(nn.Module):
    """A residual block. It halves the resolution by averaging: a strided convolution would leave the
    checkerboard of its stride in every input gradient, standard and guided alike.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.rectify = F.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        h = self.rectify(self.norm1(self.conv1(x)))
        return self.rectify(self.norm2(self.conv2(h)) + self.shortcut(x))


def small_resnet(classes: int, width: float = 16) -> nn.Sequential:
    """Three blocks for images of 32x32 pixels in [0, 1]."""
    width = round(width)
    return nn.Sequential(
        nn.BatchNorm2d(3, affine=False),  # standardizes the colours, so that images stay in [0, 1] outside
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width),
        Block(width, 2 * width),
        Block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def save(model: nn.Module, classes: list[str], path: Path) -> None:
    """A checkpoint of quickstart.py's small_resnet, which `load` can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    torch.save({"architecture": "small_resnet", "classes": classes, "state_dict": state}, path)


def load(spec: str, classes: int, size: int | None = None) -> Network:
    """A network by its description.

    PATH is a checkpoint of quickstart.py, NAME:PATH the weights in a checkpoint for a classifier of torchvision
    or timm, NAME that classifier with the weights it was published with (downloaded once). Images are resized, cropped
    and normalized as was published with it; with a size, they are squares of so many pixels.
    """
    if Path(spec).is_file():
        with reading(spec):
            checkpoint = torch.load(spec, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint.get("architecture") != "small_resnet":
            raise BadInputError(
                f"expected {spec} to be saved by quickstart.py --save, but it names no architecture: "
                f"give it as NAME:{spec} with the name of a torchvision or timm model."
            )
        model, name = small_resnet(len(checkpoint["classes"])), Path(spec).stem
        fill(model, checkpoint["state_dict"], spec)
        return network_of(name, model, Preprocessing(square(size or SIZE)))
    name, _, path = spec.partition(":")
    model, preprocessing = classifier(name, path or None, classes if path else None)
    if size:
        preprocessing.show = square(size)
    return network_of(Path(path).stem if path else name, model, preprocessing)


def network_of(name: str, model: nn.Module, preprocessing: Preprocessing | None = None) -> Network:
    """The model with what evaluate.py asks of it, in evaluation mode; of images of 32x32 pixels, if nothing is said."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Network(name, model.eval(), preprocessing or Preprocessing(square(SIZE)), digest.hexdigest()[:16])
