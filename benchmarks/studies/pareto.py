"""Every way to a cleaner input gradient against those that cost nothing, at several strengths, for equal accuracy.

    cd benchmarks/studies
    python pareto.py --data DIR --json results/pareto.json     # CIFAR-10: 10,000 images, 8 epochs

One process per core, one thread each. Interrupted and started again, it runs what is missing. Networks and gradients
are kept in --networks: the agreement between seeds is of pairs of them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jobs import results_in, run_missing, write
from networks import NETWORKS, BasicBlock
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from classifiers import Block
from figures import scaled, unit
from images import Images, photographs
from training import PLAIN, Run, augment, one_cycle

from interpgrad import InterpretableGradientLoss, input_gradients, low_pass, metrics, plot, saliency

EPOCHS, BATCH, SEEDS = 8, 128, (0, 1, 2)
EXAMINED = 250  # test images of the maps, evenly from the classes
SAMPLES = (4, 16)  # of SmoothGrad, a rival at evaluation


def squared_norm(delta: Tensor, _: Tensor) -> Tensor:
    """||delta||_2^2: with cross-entropy's gradient the penalty of Drucker and LeCun."""
    return delta.flatten(1).square().sum(1)


def squared_high_pass(delta: Tensor, _: Tensor) -> Tensor:
    """||delta - its 3x3 mean||_2^2: of the norm what varies from pixel to pixel."""
    return squared_norm(delta - low_pass(delta), delta)


# name of a term -> its settings beside the weight; all of the log-probability with constant statistics
TERMS: dict[str, dict[str, Any]] = {
    "guided": {"transform": low_pass},
    "low-pass": {"target": "low_pass"},
    "norm": {"target": "zero", "error": squared_norm},
    "high-pass norm": {"target": "zero", "error": squared_high_pass},
}


@dataclass(frozen=True)
class Method:
    """How a network is made and trained."""

    activation: str = "ReLU"
    term: str = ""
    lam: float = 0.0  # of the term; grows from 0 over the first half
    noise: float = 0.0  # standard deviation, in pixels of [0, 1], added to training images
    attack: float = 0.0  # L2 length of one gradient step, in pixels of [0, 1], added to training images

    def __str__(self) -> str:
        parts = [self.activation]
        parts += [f"{self.term} {self.lam:g}"] if self.term else []
        parts += [f"noise {self.noise:g}"] if self.noise else []
        parts += [f"adversarial {self.attack:g}"] if self.attack else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Study:
    """What all methods share."""

    data: Path
    images: int
    epochs: int
    architecture: str
    width: float
    networks: Path  # where they are kept, with their gradients

    def images_of(self) -> Images:
        return _read(self.data, self.images)

    def network(self, method: Method) -> nn.Sequential:
        classes = len(self.images_of().classes)
        return network_of(self.architecture, classes, self.width, method.activation)


def network_of(architecture: str, classes: int, width: float, activation: str) -> nn.Sequential:
    """A network of images in [0, 1], whose first layer standardizes the colours."""
    network = NETWORKS[architecture][0](classes, width)
    if architecture != "small_resnet":
        network = nn.Sequential(nn.BatchNorm2d(3, affine=False), *network)
    if activation == "SiLU":
        for index, layer in enumerate(network):
            if isinstance(layer, (Block, BasicBlock)):
                layer.rectify = F.silu
            elif isinstance(layer, nn.ReLU):
                network[index] = nn.SiLU()
    return network


@functools.cache
def _read(data: Path, count: int) -> Images:
    return photographs(data, count)


RELU, SILU = Method(), Method("SiLU")
METHODS = [RELU, SILU]
METHODS += [replace(RELU, noise=noise) for noise in (0.035, 0.02, 0.05)]
METHODS += [replace(RELU, term="guided", lam=lam) for lam in (0.3, 1.0, 0.1)]
METHODS += [replace(RELU, term="high-pass norm", lam=lam) for lam in (0.01, 0.03, 0.003)]
METHODS += [replace(SILU, term="high-pass norm", lam=lam) for lam in (0.03, 0.01)]
METHODS += [replace(SILU, term="guided", lam=lam) for lam in (0.3, 1.0)]
METHODS += [replace(SILU, noise=noise) for noise in (0.035, 0.05)]
METHODS += [replace(RELU, attack=attack) for attack in (0.1, 0.05)]
METHODS += [replace(RELU, term="low-pass", lam=lam) for lam in (0.3, 1.0, 0.1)]
METHODS += [replace(RELU, term="norm", lam=lam) for lam in (0.003, 0.01, 0.001)]


class Training(Run):
    """The run of a method."""

    method = RELU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.term:
            settings = TERMS[self.method.term]
            self.regularizer = InterpretableGradientLoss(
                self.model, lam=self.method.lam, warmup=self.steps // 2, **settings
            )

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        method = self.method
        if method.noise:
            x = x + method.noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(self.done))
        if method.attack:
            x = attacked(self.model, x, y, method.attack)
        if not method.term:
            logits = self.model(x)
            return F.cross_entropy(logits, y), logits
        with self.regularizer.shared_forward():
            logits = self.model(x)
        return F.cross_entropy(logits, y) + self.regularizer(x, y), logits


def attacked(model: nn.Module, x: Tensor, y: Tensor, length: float) -> Tensor:
    """Images one step of this L2 length up the gradient of the cross-entropy, as inference sees it."""
    gradient, _ = input_gradients(model, x, y, criterion="cross_entropy")
    return x + length * F.normalize(gradient.flatten(1), eps=1e-30).view_as(x)


def trained(method: Method, study: Study, seed: int) -> tuple[nn.Module, float]:
    """The network in evaluation mode, and the median time of a step in ms."""
    x, y = study.images_of().train
    torch.manual_seed(seed)
    model = study.network(method).to(memory_format=torch.channels_last)
    steps = study.epochs * (len(x) // BATCH)
    run = one_cycle(PLAIN, model, steps, kind=type("Training", (Training,), {"method": method}))
    generator = torch.Generator().manual_seed(seed)
    while run.done < steps:
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
            run.step(augment(x[chosen], generator), y[chosen])
    return model.eval(), statistics.median(run.milliseconds)


def measure(method: Method, study: Study, seed: int) -> dict[str, Any]:
    """The figures of one trained network. It is stored, with its gradients of the examined images."""
    model, milliseconds = trained(method, study, seed)
    x, y = study.images_of().test
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"accuracy": accuracy(model, x, y), "accuracy under noise 0.1": accuracy(model, noisy, y)}
    few = slice(None, None, max(1, len(x) // (4 * EXAMINED)))
    parts = zip(x[few].split(250), y[few].split(250), strict=True)
    stepped = torch.cat([attacked(model, *each, 0.25) for each in parts])
    found |= {"accuracy after a step of 0.25": accuracy(model, stepped, y[few]), "ms/step": milliseconds}
    every = slice(None, None, max(1, len(x) // EXAMINED))
    delta, figures = explained(model, x[every], y[every], len(study.images_of().classes))
    study.networks.mkdir(parents=True, exist_ok=True)
    torch.save({"network": model.state_dict(), "delta": delta.half()}, study.networks / f"{method}, {seed}.pt")
    return found | figures


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((found == y).double().mean())


def explained(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, dict[str, Any]]:
    """Unit gradients of the log-probability; figures of them and what is made of them afterwards, means over images."""
    delta = unit(saliency.gradient(model, x, y, criterion="log_prob"))
    smooth = functools.partial(saliency.smooth_gradient, model, x, y, criterion="log_prob", chunk_size=250)
    maps = {"delta": delta, "delta, 3x3 mean": unit(low_pass(delta))}
    maps |= {f"SmoothGrad {count}": unit(smooth(samples=count)) for count in SAMPLES}
    other = (y + torch.randint(1, classes, y.shape, generator=torch.Generator().manual_seed(0))) % classes
    with torch.no_grad():
        logits = model(x)
        confidence = logits.double().softmax(1).gather(1, y[:, None]).mean()
    top = [unit(saliency.gradient(model, x, each)) for each in logits.topk(2).indices.unbind(1)]
    found: dict[str, Any] = {
        "agreement with SmoothGrad": cosine(delta, smooth(samples=32)),
        "smooth": float(low_pass(delta).flatten(1).norm(dim=1).mean()),
        "cosine of the two top classes": cosine(*top),
        "cosine with another class": cosine(delta, saliency.gradient(model, x, other, criterion="log_prob")),
        "grid pointing": grid_pointing(model, x, y),
    }
    for name, each in maps.items():
        pixels = scaled(each.abs().sum(1)).float()
        for metric in (metrics.insertion, metrics.deletion):
            area = metric(model, x, pixels, y, chunk_size=500)
            found[f"{metric.__name__} of {name}"] = float(area.mean() / confidence)
    return delta, found


def grid_pointing(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean share of |delta| in the cell of its class, of 2x2 grids of the surest images of different classes."""
    with torch.no_grad():
        sure = model(x).softmax(1).gather(1, y[:, None]).squeeze(1)
    surest = sure.argsort(descending=True).tolist()
    of_classes = [[index for index in surest if y[index] == label] for label in y.unique()]
    ranks = zip(*of_classes, strict=False)  # of each rank one of each class
    grids = [rank[first : first + 4] for rank in ranks for first in range(0, len(rank) - 3, 4)]
    shares = []
    for cells in torch.tensor(grids).split(64):
        mosaic = metrics.grid(x[cells.flatten()])
        for cell in range(4):
            maps = saliency.gradient(model, mosaic, y[cells[:, cell]]).abs().sum(1)
            shares.append(metrics.grid_pointing(maps)[:, cell])
    return float(torch.cat(shares).mean())


def cosine(a: Tensor, b: Tensor) -> float:
    return float((unit(a) * unit(b)).flatten(1).sum(1).mean())


def between_seeds(folder: Path, title: str, seeds: list[str]) -> dict[str, float]:
    """Of each pair of seeds the mean cosine of the gradients of the same images."""
    gradients = {seed: torch.load(folder / f"{title}, {seed}.pt")["delta"] for seed in seeds}
    return {f"{a} {b}": cosine(gradients[a], gradients[b]) for a, b in itertools.combinations(seeds, 2)}


# of the picture: at most half a point of accuracy
SHOWN = [RELU, replace(RELU, noise=0.035), replace(RELU, term="guided", lam=0.3), SILU, replace(SILU, noise=0.05)]
SHOWN += [replace(SILU, term="high-pass norm", lam=0.03)]


def picture(study: Study, path: Path) -> None:
    """The gradients of networks of seed 0, on the first test image of each class and the second of the first two."""
    images = study.images_of()
    y = images.test[1]
    first = [int((y == label).nonzero()[0]) for label in y.unique()]
    chosen = sorted([*first, first[0] + 1, first[1] + 1])
    x, y = images.test[0][chosen], y[chosen]
    columns = {}
    for method in SHOWN:
        model = study.network(method).eval()
        model.load_state_dict(torch.load(study.networks / f"{method}, 0.pt")["network"])
        columns[str(method).replace(", ", "\n")] = saliency.gradient(model, x, y, criterion="log_prob")
        if method == RELU:
            columns["ReLU\nSmoothGrad 16"] = saliency.smooth_gradient(model, x, y, samples=16, criterion="log_prob")
    figure = plot.gradients(x, columns, labels=[images.classes[int(label)] for label in y])
    figure.savefig(path, dpi=55)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--json", type=Path, required=True, help="results, added to after every network")
    parser.add_argument("--networks", type=Path, default=Path("pareto-networks"), help="(%(default)s)")
    parser.add_argument("--architecture", choices=NETWORKS, default="small_resnet", help="(%(default)s)")
    parser.add_argument("--width", type=float, help="channels of its first stage (its own)")
    parser.add_argument("--names", nargs="+", choices=list(map(str, METHODS)), help="(all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="of training (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--picture", type=Path, help="of seed 0's networks, once they are there")
    parser.add_argument("--jobs", type=int, help="processes (one per core)")
    options = parser.parse_args()
    methods = [method for method in METHODS if not options.names or str(method) in options.names]
    width = options.width or NETWORKS[options.architecture][1]
    study = Study(options.data, options.images, options.epochs, options.architecture, width, options.networks)
    todo = [(str(method), seed, (method, study)) for seed in options.seeds for method in methods]
    about = {"architecture": study.architecture, "width": width, "epochs": study.epochs, "images": study.images}
    about |= {"examined": EXAMINED, "protocol": str(metrics.PROTOCOLS["rise"])}
    run_missing(options.json, todo, measure, options.jobs, about)
    results = results_in(options.json)
    pairs = {title: between_seeds(study.networks, title, list(seeds)) for title, seeds in results.items()}
    write(options.json, {"torch": torch.__version__} | about | {"between seeds": pairs, "results": results})
    if options.picture:
        picture(study, options.picture)


if __name__ == "__main__":
    main()
