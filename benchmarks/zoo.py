"""The smallest network of every family of torchvision and timm: is the loss right on it, and what does it cost?

    python benchmarks/zoo.py --json benchmarks/results/zoo.json

In training mode and double precision, with small images: the input gradient against stock autograd, the guided one
against clamped ATen backward functions, the penalty's gradient in the parameters against stock double backward, as
relative differences. With frozen statistics the same against the literal reference of the tests, the largest of the
three. And the counted operations of a regularized step (single precision, frozen, shared forward) as a ratio to a plain
one. Interrupted and started again, it runs what is missing.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import frozen_oracle as frozen
import timm
import torch
import torch.nn.functional as F
import torchvision
from flops import count_flops
from oracle import RELU_BACKWARDS, SMOOTH_BACKWARDS, ClampBackwards
from timm.models._registry import _model_to_module
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from interpgrad import InterpretableGradientLoss, graph, input_gradients
from interpgrad.errors import cos
from interpgrad.guided import FAMILIES
from interpgrad.model import logits_of

SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 384)


def families() -> dict[str, str]:
    """Family -> its smallest classifier."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        parameters = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        smallest[family] = min(smallest.get(family, (parameters, name)), (parameters, name))
    found = {f"torchvision {family}": name for family, (_, name) in smallest.items()}
    smallest = {}
    for name in tqdm(candidates(), desc="families of timm", leave=False):
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            try:
                model = timm.create_model(name)
            except Exception:  # needs weights, or a package that is not there
                continue
        if getattr(model, "num_classes", 0):
            family, parameters = _model_to_module[name], sum(each.numel() for each in model.parameters())
            smallest[family] = min(smallest.get(family, (parameters, name)), (parameters, name))
    return found | {f"timm {family}": name for family, (_, name) in sorted(smallest.items())}


def candidates() -> list[str]:
    """Timm's models that do not say that they are large, unless their family has no other: making one takes time."""
    models: dict[str, list[str]] = {}
    for name in timm.list_models():
        models.setdefault(_model_to_module[name], []).append(name)
    large = re.compile("base|medium|large|huge|giant|so400m|_[lm]([0-9_]|$)|1[05][0-9]|[2-9][0-9]{2}d?$|b[4-8]|xl")
    few = {family: [name for name in names if not large.search(name)] for family, names in models.items()}
    return [name for family, names in models.items() for name in few[family] or names]


def build(family: str, name: str, size: int) -> nn.Module:
    """With 10 classes, without random layers, for images of this size."""
    torch.manual_seed(0)
    if family.startswith("torchvision"):
        accepted = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        options = {"image_size": size} if "image_size" in accepted or name.startswith("vit_") else {}
        options |= {"init_weights": False} if "init_weights" in accepted else {}
        model = torchvision.models.get_model(name, num_classes=10, **options)
    else:
        try:
            model = timm.create_model(name, num_classes=10, img_size=size)
        except TypeError:
            model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        for attribute in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            # Layers that begin as nothing hide what is inside them.
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
            elif not parameter.any() or "gamma" in parameter_name:
                nn.init.uniform_(parameter, 0.1, 0.5)
    return model.train()


def smallest_images(family: str, name: str) -> tuple[nn.Module, int]:
    """The network, and the smallest of the sizes that it takes."""
    for size in SIZES:
        try:
            model = build(family, name, size)
            logits_of(model(torch.randn(2, 3, size, size)))
            return model, size
        except Exception as error:
            reason = error
    raise reason


def by_stock(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Both gradients of the cross-entropy, and the penalty's in the parameters: PyTorch alone, and the oracle."""
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(F, "hardsigmoid", hardsigmoid):
        loss = F.cross_entropy(logits_of(model(x)), y, reduction="sum")
    with ClampBackwards(RELU_BACKWARDS | SMOOTH_BACKWARDS):
        (guided,) = torch.autograd.grad(loss, x, retain_graph=True)
    (delta,) = torch.autograd.grad(loss, x, create_graph=True)
    return delta.detach(), guided, parameter_gradients(cos(delta, guided).mean(), model)


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:  # noqa: ARG001
    """Which PyTorch cannot differentiate twice."""
    return ((x + 3) / 6).clamp(0, 1)


def parameter_gradients(penalty: Tensor, model: nn.Module) -> list[Tensor | None]:
    parameters = [each for each in model.parameters() if each.requires_grad]
    return list(torch.autograd.grad(penalty, parameters, allow_unused=True))


def difference(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Of all together, relative to what is expected."""
    pairs = [(zero_if_none(a, b), zero_if_none(b, a)) for a, b in zip(found, expected, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    return (error / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def zero_if_none(tensor: Tensor | None, like: Tensor | None) -> Tensor:
    return tensor if tensor is not None else torch.zeros(1) if like is None else torch.zeros_like(like)


def counted_ratio(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Operations of a regularized step over those of a plain one."""
    reg = InterpretableGradientLoss(model, lam=1.0)

    def regularized() -> Tensor:
        with reg.shared_forward():
            logits = logits_of(model(x))
        return F.cross_entropy(logits, y) + reg(x, y)

    def counted(loss: Callable[[], Tensor]) -> int:
        with count_flops() as counter:
            loss().backward()
        return counter.get_total_flops()

    return counted(regularized) / counted(lambda: F.cross_entropy(logits_of(model(x)), y))


def activations(model: nn.Module, x: Tensor) -> str:
    """What the guided pass finds to guide."""
    x = x.clone().requires_grad_()
    found = graph.operations(logits_of(model(x)), until=x)
    return ", ".join(sorted(name for name in found if name in FAMILIES["all"]))


def measure(family: str, name: str) -> dict[str, Any]:
    model, size = smallest_images(family, name)
    x, y = torch.randn(4, 3, size, size), torch.tensor([3, 7, 1, 8])
    result = {"model": name, "size": size, "activations": activations(model, x), "ratio": counted_ratio(model, x, y)}
    model, x = model.double(), x.double()
    stock = copy.deepcopy(model)
    coupled = differences(model, x, y, by_stock(stock, x, y), criterion="cross_entropy", batch_norm="coupled")
    result |= zip(("delta", "guided", "penalty"), coupled, strict=True)
    delta, guided, _ = frozen.reference(stock, x, y)
    expected = delta.detach(), guided, parameter_gradients(cos(delta, guided).mean(), stock)
    result["frozen"] = max(differences(model, x, y, expected))
    return result


def differences(
    model: nn.Module, x: Tensor, y: Tensor, expected: tuple[Tensor, Tensor, list[Tensor | None]], **settings: str
) -> list[float]:
    """Of both gradients and the penalty's from what is expected."""
    penalty = InterpretableGradientLoss(model, lam=1.0, **settings)(x, y)
    of_parameters = parameter_gradients(penalty, model)
    found = *([each] for each in input_gradients(model, x, y, **settings)), of_parameters
    return [difference(*pair) for pair in zip(found, ([expected[0]], [expected[1]], expected[2]), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="results, added to after every family")
    parser.add_argument("--families", nargs="+", help="these alone, such as 'timm resnet'")
    options = parser.parse_args()
    stored = json.loads(options.json.read_text()) if options.json.exists() else {"results": {}}
    stored |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    if "families" not in stored:  # which takes minutes to find
        stored["families"] = families()
        options.json.write_text(json.dumps(stored, indent=1) + "\n")
    todo = {
        family: name
        for family, name in stored["families"].items()
        if "ratio" not in stored["results"].get(family, {}) and (not options.families or family in options.families)
    }
    for family, name in tqdm(todo.items(), desc="families"):
        try:
            with warnings.catch_warnings(action="ignore"):
                stored["results"][family] = measure(family, name)
        except Exception as error:  # it belongs into the table
            stored["results"][family] = {"model": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        options.json.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
