"""Classifiers of torchvision and timm by name, with what was published with them: weights, how images are prepared."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad.saliency.layer import is_grid


class BadInputError(Exception):
    """What the user gave cannot be used; the message says why and what would be."""


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
    v2 = _package("torchvision.transforms.v2")
    if v2 is None:
        raise BadInputError("expected torchvision, which prepares photographs, to be installed: pip install it.")
    show: Callable[[Any], Tensor] = v2.Compose(
        [v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    return show


def classifier(name: str, path: str | None = None, classes: int | None = None) -> tuple[nn.Module, Preprocessing]:
    """A classifier of torchvision or timm, in evaluation mode: with published weights, or those in a file.

    `classes` is how many the weights in the file are of; None is as many as the published ones.

    Raises BadInputError for an unknown name, weights that cannot be had or read, or are another network's.
    """
    if path and not Path(path).is_file():
        raise BadInputError(f"expected a checkpoint at {path}, found no file.")
    model, preprocessing = _published(name, pretrained=path is None, classes=classes)
    if path:
        fill(model, _weights_in(path), path)
    return model.eval(), preprocessing


def last_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the last layer, called once, whose output (N, K, h, w) is a grid of more than one pixel.

    Raises BadInputError where there is none, or where tokens come after it: there one has to be chosen.
    """
    called: list[str] = []
    grids: list[str] = []
    norms: list[str] = []  # of tokens

    def note(name: str, output: object) -> None:
        called.append(name)
        if not isinstance(output, Tensor) or len(output) != len(images):
            return
        if output.dim() == 3 and "norm" in name.rpartition(".")[2]:
            norms.append(name)
        shapes = (output.shape[2:], output.shape[1:3]) if output.dim() == 4 else ()  # channels first, or last
        if any(each.numel() > 1 and is_grid(each, images.shape[2:], padded=True) for each in shapes):
            grids.append(name)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    once = [name for name in grids if called.count(name) == 1]
    if not once or (norms and called.index(norms[-1]) > called.index(once[-1])):
        first = [name for name in norms if name.endswith("1")]  # norm1, ln_1: of a block, what its attention sees
        near = f", for instance {first[-1]}" if first else ""
        raise BadInputError(f"expected a last layer whose output is (N, K, h, w), found none: name one{near}.")
    return once[-1]


def _published(name: str, *, pretrained: bool, classes: int | None) -> tuple[nn.Module, Preprocessing]:
    timm, models = _package("timm"), _package("torchvision.models")
    settings = {} if classes is None else {"num_classes": classes}

    try:
        if models and name in models.list_models(models):
            model = models.get_model(name, weights="DEFAULT" if pretrained else None, **settings)
            return model, torchvision_preprocessing(name)
        if timm and timm.is_model(name):
            model = timm.create_model(name, pretrained=pretrained, **settings)
            return model, timm_preprocessing(model)
    except OSError as reason:
        raise BadInputError(f"expected the published weights of {name}, could not get them: {reason}.") from reason
    names = [*(models.list_models(models) if models else ()), *(timm.list_models() if timm else ())]
    close = difflib.get_close_matches(name, names)
    raise BadInputError(
        f"expected the name of a classifier of torchvision or timm, got {name!r}: close to it are "
        f"{', '.join(close) or 'none'}."
    )


def _package(name: str) -> Any:
    """The package, or None where it is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name.partition(".")[0]) else None


def torchvision_preprocessing(name: str) -> Preprocessing:
    """That of the default weights of a classifier of torchvision."""
    weights = _package("torchvision.models").get_model_weights(name).DEFAULT
    published = weights.transforms()
    show = weights.transforms(mean=Preprocessing.mean, std=Preprocessing.std)  # normalized later
    return Preprocessing(show, tuple(published.mean), tuple(published.std))


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """That of the weights a classifier of timm was published with."""
    data, v2 = _package("timm.data"), _package("torchvision.transforms.v2")
    config = data.resolve_model_data_config(model)
    show = v2.Compose([data.create_transform(**config, normalize=False), v2.ToDtype(torch.float32, scale=True)])
    return Preprocessing(show, config["mean"], config["std"])


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """What a file that is no checkpoint raises, in words."""
    try:
        yield
    except Exception as reason:  # of pickle, zip files and safetensors, whatever they are
        said = str(reason) or type(reason).__name__
        raise BadInputError(f"expected a checkpoint of tensors in {path}, could not read it: {said}.") from reason


def _weights_in(path: str) -> dict[str, Tensor]:
    """Also of a training's checkpoint, and of what DDP or torch.compile wrapped."""
    with reading(path):
        if path.endswith(".safetensors"):
            return dict(_package("safetensors.torch").load_file(path))
        stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict):
        raise BadInputError(f"expected a state_dict in {path}, got {type(stored).__name__}.")
    for key in ("state_dict", "model_state_dict", "model"):
        stored = stored[key] if isinstance(stored.get(key), dict) else stored
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in stored.items()}


def fill(model: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load these weights, which came from the file."""
    try:
        model.load_state_dict(state)
    except RuntimeError as reason:
        raise BadInputError(f"expected the weights of a {type(model).__name__} in {path}: {reason}.") from reason
