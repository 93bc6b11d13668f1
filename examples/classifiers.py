"""The small network of quickstart.py, and networks to evaluate: what it saved, or any of torchvision and timm."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from images import SIZE, BadInputError
from torch import Tensor, nn

UNCHANGED = (0.0,) * 3, (1.0,) * 3  # images in [0, 1]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Network:
    """A classifier and the images it wants: their side in pixels, the mean and deviation they are normalized with."""

    name: str
    model: nn.Module
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
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
    or timm, NAME that classifier with the weights it was published with (downloaded once).
    """
    if Path(spec).is_file():
        checkpoint = _read(Path(spec))
        if checkpoint.get("architecture") != "small_resnet":
            raise BadInputError(
                f"expected {spec} to be saved by quickstart.py --save, but it names no architecture: "
                f"give it as NAME:{spec} with the name of a torchvision or timm model."
            )
        model, name = small_resnet(len(checkpoint["classes"])), Path(spec).stem
        _fill(model, checkpoint["state_dict"], spec)
        return network_of(name, model, size or SIZE)
    name, _, path = spec.partition(":")
    if path and not Path(path).is_file():
        raise BadInputError(f"expected a checkpoint at {path}, found no file.")
    model, side, normalization = _published(name, classes if path else None)
    if path:
        _fill(model, _read(Path(path)), path)
    return network_of(Path(path).stem if path else name, model, size or side, normalization)


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


def network_of(
    name: str,
    model: nn.Module,
    size: int = SIZE,
    normalization: tuple[tuple[float, ...], ...] = ((0.0,) * 3, (1.0,) * 3),
) -> Network:
    """The model with what evaluate.py asks of it, in evaluation mode."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Network(name, model.eval(), size, *normalization, digest.hexdigest()[:16])


def _published(name: str, classes: int | None) -> tuple[nn.Module, int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """A model of torchvision or timm; with its published weights if the number of classes is None."""
    import torchvision

    try:
        if name in torchvision.models.list_models():
            settings = {"weights": "DEFAULT"} if classes is None else {"weights": None, "num_classes": classes}
            return torchvision.models.get_model(name, **settings), 224, IMAGENET
        with contextlib.suppress(ImportError):
            import timm

            if timm.is_model(name):
                settings = {"pretrained": True} if classes is None else {"num_classes": classes}
                model = timm.create_model(name, **settings)
                config = model.pretrained_cfg
                return model, config["input_size"][-1], (tuple(config["mean"]), tuple(config["std"]))
    except OSError as reason:
        raise BadInputError(f"expected the published weights of {name}, could not get them: {reason}.") from reason
    raise BadInputError(
        f"expected a checkpoint, NAME:CHECKPOINT or the NAME of a torchvision or timm model, got {name!r}: no such "
        "file, no such model."
    )


def _read(path: Path) -> dict[str, object]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as reason:
        raise BadInputError(f"expected a checkpoint of tensors in {path}, could not read it: {reason}.") from reason
    for key in ("state_dict", "model", "model_state_dict"):  # as trainers wrap it
        if "architecture" not in checkpoint and isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint


def _fill(model: nn.Module, state: dict[str, Tensor], path: str) -> None:
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as reason:
        raise BadInputError(f"expected the weights of a {type(model).__name__} in {path}: {reason}.") from reason
