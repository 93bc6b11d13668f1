"""Attempts at a cleaner gradient of the log-probability on photographs, each against the plain loss, several seeds.

    cd benchmarks/studies
    python attempts.py --data DIR --json results/attempts.json     # CIFAR-10: 10,000 images

One process per core, one thread each. Interrupted and started again, it runs what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comparisons import smoothed
from jobs import run_missing
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from classifiers import Block, small_resnet
from figures import evaluate
from images import Images, photographs
from training import PLAIN, RECIPE, Run, Setting, augment, one_cycle

from interpgrad import InterpretableGradientLoss, saliency

EPOCHS, BATCH, SEEDS = 8, 128, (0, 1, 2)
IMAGES = 10_000
LAST = 6  # the index of the last stage in small_resnet


class UnguidedRelu(torch.autograd.Function):
    """A rectifier that guided backpropagation does not see: its gradient is the ordinary one in both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Rectifier(nn.Module):
    """The same as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return UnguidedRelu.apply(x)


def guided_in_last_stage(network: nn.Sequential) -> nn.Sequential:
    """The network with rectifiers in all stages but the last that guided backpropagation does not see."""
    for index, layer in enumerate(network[:LAST]):
        if isinstance(layer, Block):
            layer.rectify = UnguidedRelu.apply
        elif isinstance(layer, nn.ReLU):
            network[index] = Rectifier()
    return network


class AtLastStage(Run):
    """The gradients compared are those at the input of the last stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.regularizer
        settings = {"criterion": whole.criterion, "warmup": whole.warmup, "transform": whole.transform}
        self.regularizer = InterpretableGradientLoss(self.model[LAST:], lam=whole.lam, **settings)

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model[:LAST](x)
        with self.regularizer.shared_forward():
            logits = self.regularizer.model(features)
        return F.cross_entropy(logits, y) + self.regularizer(features, y), logits


class TowardsSmoothGrad(Run):
    """The target is not the guided gradient but the mean over noisy copies of the images."""

    samples = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regularizer.target = "given"

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        target = saliency.smooth_gradient(
            self.model, x, y, samples=self.samples, criterion="log_prob", chunk_size=None,
            generator=torch.Generator(x.device).manual_seed(self.done),
        )  # fmt: skip
        with self.regularizer.shared_forward():
            logits = self.model(x)
        return F.cross_entropy(logits, y) + self.regularizer(x, y, target=target), logits


@dataclass(frozen=True)
class Attempt:
    """What is different from the plain way of training with the loss."""

    setting: Setting
    kind: type[Run] = Run
    network: Callable[[nn.Sequential], nn.Sequential] = lambda network: network
    epochs: int = EPOCHS
    finetuned: bool = False  # the loss joins after a whole training without it


BASE = Setting()
STRONG = Setting(1.0)
ATTEMPTS = {
    "without": Attempt(PLAIN),
    "the loss": Attempt(BASE),
    "the loss, λ = 1": Attempt(STRONG),
    "the loss, differentiated log_prob": Attempt(Setting(criterion="differentiated log_prob")),
    "the loss, logit": Attempt(Setting(criterion="logit")),
    "slower ramp, λ = 1": Attempt(replace(STRONG, warmup=1.0)),
    "last stage guided": Attempt(BASE, network=guided_in_last_stage),
    "last stage guided, λ = 1": Attempt(STRONG, network=guided_in_last_stage),
    "gradient at the last stage": Attempt(BASE, AtLastStage),
    "gradient at the last stage, λ = 1": Attempt(STRONG, AtLastStage),
    "recipe": Attempt(RECIPE),
    "towards its own 3x3 mean": Attempt(replace(BASE, error="own mean", low_pass=False)),
    "towards its own SmoothGrad": Attempt(BASE, TowardsSmoothGrad),
    "twice as long, without": Attempt(PLAIN, epochs=2 * EPOCHS),
    "twice as long": Attempt(BASE, epochs=2 * EPOCHS),
    "twice as long, λ = 1": Attempt(STRONG, epochs=2 * EPOCHS),
    "fine-tuned, without": Attempt(PLAIN, finetuned=True),
    "fine-tuned": Attempt(BASE, finetuned=True),
}


def measure(name: str, data: Path, count: int, device: str, seed: int) -> dict[str, Any]:
    """Both gradients' figures of one trained network, and what averaging adds on a few images.

    Of fewer images than usual there are so many epochs that there are as many steps.
    """
    attempt = ATTEMPTS[name]
    images = photographs(data, count, 2_000).to(device)
    x, y = images.train
    torch.manual_seed(seed)
    model = attempt.network(small_resnet(len(images.classes))).to(device, memory_format=torch.channels_last)
    steps = attempt.epochs * (IMAGES // BATCH)
    runs = [one_cycle(attempt.setting, model, steps, kind=attempt.kind)]
    if attempt.finetuned:
        runs = [one_cycle(PLAIN, model, steps), one_cycle(attempt.setting, model, steps, lr=0.02)]
    generator = torch.Generator().manual_seed(seed)
    for run in runs:
        model.train()
        while run.done < steps:
            batches = torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]
            for chosen in batches[: steps - run.done]:
                run.step(augment(x[chosen], generator), y[chosen])
    trained = small_resnet(len(images.classes)).to(device)  # guided everywhere, however it was trained
    trained.load_state_dict(model.state_dict())
    x, y = images.test
    few = Images(images.name, images.classes, images.train, (x[::5], y[::5]))
    figures: dict[str, Any] = {each: evaluate(trained, images, each) for each in ("log_prob", "logit")}
    return figures | {"smoothed": smoothed(trained, few, samples=(8,))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--json", type=Path, required=True, help="results, added to after every network")
    parser.add_argument("--names", nargs="+", choices=ATTEMPTS, default=list(ATTEMPTS), help="(all, in this order)")
    parser.add_argument("--images", type=int, default=IMAGES, help="of training (%(default)s)")
    parser.add_argument("--jobs", type=int, help="processes (one per core)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    options = parser.parse_args()
    todo = [
        (name, seed, (name, options.data, options.images, options.device)) for seed in SEEDS for name in options.names
    ]
    run_missing(options.json, todo, measure, options.jobs, {"epochs": EPOCHS, "images": options.images})


if __name__ == "__main__":
    main()
