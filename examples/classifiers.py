"""The small network of quickstart.py, and networks to evaluate: what it saved, or any of torchvision and timm."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images import SIZE, BadInputError
from torch import Tensor, nn


@dataclass
class Preprocessing:
    """What makes of a photograph what a network takes: `show` an image (3, H, W) in [0, 1], to be normalized."""

    show: Callable[[Any], Tensor]
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3

    def __str__(self) -> str:
        """How the photograph becomes the image, in one line."""
        return " ".join(repr(self.show).split())


def square(size: int) -> Callable[[Any], Tensor]:
    """A photograph's middle, as a square of so many pixels."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


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
        with _reading(spec):
            checkpoint = torch.load(spec, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint.get("architecture") != "small_resnet":
            raise BadInputError(
                f"expected {spec} to be saved by quickstart.py --save, but it names no architecture: "
                f"give it as NAME:{spec} with the name of a torchvision or timm model."
            )
        model, name = small_resnet(len(checkpoint["classes"])), Path(spec).stem
        _fill(model, checkpoint["state_dict"], spec)
        return network_of(name, model, Preprocessing(square(size or SIZE)))
    name, _, path = spec.partition(":")
    if path and not Path(path).is_file():
        raise BadInputError(f"expected a checkpoint at {path}, found no file.")
    model, preprocessing = _published(name, classes if path else None)
    if path:
        from timm.models import load_state_dict

        with _reading(path):
            weights = load_state_dict(path, use_ema=False, weights_only=True)
        _fill(model, weights, path)
    if size:
        preprocessing.show = square(size)
    return network_of(Path(path).stem if path else name, model, preprocessing)


def last_layer(network: Network, images: Tensor) -> str:
    """The name of the last layer with an output (N, K, h, w) of more than one pixel, called once."""
    calls: dict[str, int] = {}
    found: list[str] = []

    def note(name: str, output: object) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in network.model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            network.model(images)
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name in found if calls[name] == 1]
    if not once:
        raise BadInputError("expected a layer whose output is (N, K, h, w), found none: name one with --layer.")
    return once[-1]


def network_of(name: str, model: nn.Module, preprocessing: Preprocessing | None = None) -> Network:
    """The model with what evaluate.py asks of it, in evaluation mode; of images of 32x32 pixels, if nothing is said."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Network(name, model.eval(), preprocessing or Preprocessing(square(SIZE)), digest.hexdigest()[:16])


def _published(name: str, classes: int | None) -> tuple[nn.Module, Preprocessing]:
    """A classifier of torchvision or timm; with its published weights if the number of classes is None."""
    import timm
    from torchvision import models

    try:
        if name in models.list_models(models):
            settings = {"weights": "DEFAULT"} if classes is None else {"weights": None, "num_classes": classes}
            return models.get_model(name, **settings), torchvision_preprocessing(name)
        if timm.is_model(name):
            settings = {"pretrained": True} if classes is None else {"num_classes": classes}
            model = timm.create_model(name, **settings)
            return model, timm_preprocessing(model)
    except OSError as reason:
        raise BadInputError(f"expected the published weights of {name}, could not get them: {reason}.") from reason
    raise BadInputError(
        f"expected a checkpoint, NAME:CHECKPOINT or the NAME of a torchvision or timm model, got {name!r}: no such "
        "file, no such model."
    )


def torchvision_preprocessing(name: str) -> Preprocessing:
    """That of the default weights of a classifier of torchvision."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    published = weights.transforms()
    show = weights.transforms(mean=Preprocessing.mean, std=Preprocessing.std)  # normalized later
    return Preprocessing(show, tuple(published.mean), tuple(published.std))


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """That of the weights a classifier of timm was published with."""
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.transforms import v2

    config = resolve_model_data_config(model)
    show = v2.Compose([create_transform(**config, normalize=False), v2.ToDtype(torch.float32, scale=True)])
    return Preprocessing(show, config["mean"], config["std"])


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as reason:
        raise BadInputError(f"expected a checkpoint of tensors in {path}, could not read it: {reason}.") from reason


def _fill(model: nn.Module, state: dict[str, Tensor], path: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as reason:
        raise BadInputError(f"expected the weights of a {type(model).__name__} in {path}: {reason}.") from reason
