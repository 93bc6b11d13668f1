"""Train a classifier to look at the right pixels: at a digit, and not at a patch that gives the class away.

    python examples/right_reasons.py              # three networks of each kind
    python examples/right_reasons.py --quick      # under a minute: does it run?

Every image is a digit on a photograph, with a grey patch in one corner, the decoy. In training its grey level says the
class. In the test it lies and says another one. After Ross et al., "Right for the Right Reasons", arXiv 1703.03717.

Somebody has marked the relevant pixels: all but the decoy, in all images or in a tenth; or the digit, roughly. The loss
keeps the input gradient δ on them. Its rivals replace the other pixels: by noise, a random grey, or other images.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from classifiers import small_resnet
from images import SIZE, digits_on_photographs
from markdown_table import markdown_table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from interpgrad import InterpretableGradientLoss, plot, saliency

DECOY = 7  # pixels, its height and width
GREY = torch.linspace(0.05, 0.95, 10).reshape(10, 1, 1, 1)  # its level for each class
OFTEN = {"share": 0.1, "often": 20}  # a tenth of the images, each drawn 20 times as often as another
CONTENDERS = {  # the arguments of `train`
    "without": {},
    "loss": {"lam": 30},
    "noise": {"fill": torch.rand_like},
    "loss, a tenth marked": {"lam": 100, "share": 0.1},  # rarer, so heavier
    "noise, a tenth marked": {"fill": torch.rand_like, "share": 0.1},
    "noise, a tenth, drawn often": {"fill": torch.rand_like, **OFTEN},
    "grey, a tenth, drawn often": {"fill": lambda x: torch.rand(len(x), 1, 1, 1), **OFTEN},
    "loss, digit marked": {"lam": 3, "marked": "digit"},
    "other images, digit marked": {"fill": lambda x: x.roll(1, 0), "marked": "digit"},
    "no decoy in training": {"decoy": False},
}


class Task:
    """Training images without and with the decoy, test images with it, and where it and the digit are."""

    def __init__(self, train: int, test: int) -> None:
        images = digits_on_photographs(train, test)
        (self.clean, self.y), (test_clean, self.test_y) = images.train, images.test
        generator = torch.Generator().manual_seed(3)
        corner, test_corner = (random_corners(count, generator) for count in (train, test))
        other = (self.test_y + torch.randint(1, 10, (test,), generator=generator)) % 10
        self.decoyed = torch.where(corner, GREY[self.y], self.clean)
        self.truthful = torch.where(test_corner, GREY[self.test_y], test_clean)
        self.lying = torch.where(test_corner, GREY[other], test_clean)
        surroundings = F.max_pool2d(images.train_evidence[:, None].float(), 5, stride=1, padding=2)  # two pixels more
        self.relevant = {"all but the decoy": ~corner, "digit": surroundings > 0}
        self.test_decoy, self.test_digit = test_corner[:, 0], images.evidence


def random_corners(count: int, generator: torch.Generator) -> Tensor:
    """(N, 1, H, W) bool: a square in one of the four corners of each image."""
    first = torch.arange(SIZE) < DECOY
    rows, columns = torch.where(torch.rand(2, count, 1, generator=generator) < 0.5, first, first.flip(0))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def train(task, seed, epochs, lam=0, fill=None, marked="all but the decoy", share=1, often=1, decoy=True) -> nn.Module:
    """A network. In the images that are marked, `fill` makes what replaces the irrelevant pixels."""
    torch.manual_seed(seed)
    model = small_resnet(10).to(memory_format=torch.channels_last)  # the faster layout on a CPU
    is_marked = torch.arange(len(task.y)) < share * len(task.y)
    relevant = task.relevant[marked] | ~is_marked[:, None, None, None]  # not marked: every pixel may be relevant
    data = TensorDataset(task.decoyed if decoy else task.clean, task.y, relevant)
    sampler = WeightedRandomSampler(torch.where(is_marked, often, 1.0), len(data))
    loader = DataLoader(data, batch_size=64, sampler=sampler, drop_last=True)
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    reg = InterpretableGradientLoss(model, error="outside", target="given", lam=lam, warmup=steps // 2)
    for _ in range(epochs):
        for x, y, mask in loader:
            x = torch.where(mask, x, fill(x)) if fill else x
            loss = F.cross_entropy(model(x), y)
            if lam:
                loss = loss + reg(x, y, target=mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(model: nn.Module, task: Task) -> tuple[dict[str, float], Tensor]:
    """What the network answers to test images, where its input gradient is while the decoy lies, and that gradient."""
    with torch.no_grad():
        lying, truthful = (model(x).argmax(1) for x in (task.lying, task.truthful))
    delta = saliency.gradient(model, task.lying, task.test_y, criterion="log_prob", chunk_size=250)
    shares = F.normalize(delta.abs().sum(1).double().flatten(1), p=1, eps=1e-300).unflatten(1, (SIZE, SIZE))
    found = {
        "accuracy, decoy lies": lying == task.test_y,
        "decoy truthful": truthful == task.test_y,
        "decoy changes answer": lying != truthful,
        "δ on decoy": (shares * task.test_decoy).sum((1, 2)),
        "δ on digit": (shares * task.test_digit).sum((1, 2)),
    }
    return {name: float(values.double().mean()) for name, values in found.items()}, delta


def picture(deltas: dict[str, Tensor], task: Task, path: Path) -> None:
    """The first six test images, whose decoys lie, and their input gradients in some networks."""
    columns = {f"δ, {name}": deltas[name][:6] for name in ("without", "loss", "noise")}
    labels, title = [str(int(y)) for y in task.test_y[:6]], "δ of the digit's log-probability; the grey patch lies"
    plot.gradients(task.lying[:6], columns, labels=labels, title=title).savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a classifier to look at the right pixels.")
    parser.add_argument("--quick", action="store_true", help="one short training of each kind, to see that it runs")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of each network (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("right_reasons.png"), help="the picture (%(default)s)")
    parser.add_argument("--json", type=Path, help="store the figures of every network here")
    options = parser.parse_args()
    seeds, epochs = (1, 1) if options.quick else (options.seeds, options.epochs)
    task = Task(1000, 200) if options.quick else Task(6000, 1000)
    rows, deltas, seconds = {name: [] for name in CONTENDERS}, {}, {}
    for seed in range(seeds):
        for name, how in CONTENDERS.items():
            start = time.perf_counter()
            model = train(task, seed, epochs, **how)
            seconds[name] = time.perf_counter() - start
            figures, deltas[name] = measure(model, task)
            rows[name].append(figures | {"time, ratio": seconds[name] / seconds["without"]})
            print(f"seed {seed}, {name}: {seconds[name]:.0f} s", flush=True)
    table = []
    for name, row in rows.items():
        values = torch.tensor([list(figures.values()) for figures in row])
        deviations, means = torch.std_mean(values, 0, correction=min(1, seeds - 1))
        table.append([name, *(f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(means, deviations, strict=True))])
    print(markdown_table(["", *rows["without"][0]], table))
    picture(deltas, task, options.output)
    if options.json:
        options.json.write_text(json.dumps({"epochs": epochs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
