"""Train the same small ResNet without and with the interpretable gradient loss, and look at its gradients.

    python examples/quickstart.py                     # digits on photographs: about five minutes on two cores
    python examples/quickstart.py --quick             # one minute: does it run?
    python examples/quickstart.py --data DIR          # your photographs: DIR/train/CLASS/*, DIR/test/CLASS/*

Prints a table (mean and standard deviation over the seeds) and writes the picture demo.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from images import BadInputError, Images, digits_on_photographs, photographs
from torch import Tensor, nn
from tqdm import tqdm

from interpgrad import InterpretableGradientLoss, input_gradients, low_pass


@dataclass(frozen=True)
class Setting:
    """How one of the compared networks is trained. The defaults are the choice argued for in README.md."""

    lam: float = 0.3
    criterion: str = "log_prob"
    low_pass: bool = True
    error: str = "cos"
    batch_norm: str = "frozen"


PLAIN = Setting(lam=0)


@dataclass
class Run:
    """One network in training: its model, its regularizer, the time of each of its steps in ms.

    The weight of the loss grows from zero over the first half of the steps: on a network that has not learned
    anything yet, a large weight keeps it from ever doing so (README.md).
    """

    setting: Setting
    model: nn.Module
    regularizer: InterpretableGradientLoss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    milliseconds: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        if self.setting.lam:
            with self.regularizer.shared_forward():
                logits = self.model(x)
            loss = F.cross_entropy(logits, y) + self.regularizer(x, y)
        else:
            loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.milliseconds.append(1000 * (time.perf_counter() - start))


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

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def small_resnet(classes: int, width: int = 16) -> nn.Module:
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


def train(
    images: Images, settings: list[Setting], seed: int, epochs: int, batch: int = 64, quiet: bool = False
) -> list[Run]:
    """Train one network per setting, from the same weights, on the same batches, step by step in turn."""
    x, y = images.train
    steps = max(1, len(x) // batch)
    runs = [start(setting, len(images.classes), seed, epochs * steps) for setting in settings]
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=epochs * steps, desc=f"seed {seed}", unit="step", leave=False, disable=quiet) as progress:
        for _ in range(epochs):
            for chosen in torch.randperm(len(x), generator=generator)[: steps * batch].chunk(steps):
                for run in runs:
                    run.step(augment(x[chosen], images, chosen), y[chosen])
                progress.update()
    return runs


def start(setting: Setting, classes: int, seed: int, steps: int) -> Run:
    torch.manual_seed(seed)
    model = small_resnet(classes)
    regularizer = InterpretableGradientLoss(
        model,
        setting.error,
        setting.lam,
        criterion=setting.criterion,
        batch_norm=setting.batch_norm,
        warmup=steps // 2,
        transform=low_pass if setting.low_pass else None,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    return Run(setting, model, regularizer, optimizer, schedule)


def augment(x: Tensor, images: Images, chosen: Tensor) -> Tensor:
    """Mirror every other photograph; a mirrored digit would be another sign."""
    if images.evidence is not None:
        return x
    return torch.where((chosen % 2 == 0)[:, None, None, None], x, x.flip(3))


def evaluate(run: Run, images: Images, criterion: str) -> dict[str, float]:
    """Accuracy, and the input gradients of the test images, in evaluation mode; means over the images."""
    x, y = images.test
    run.model.eval()
    delta, guided = gradients(run.model, x, y, criterion)
    with torch.no_grad():
        accuracy = (run.model(x).argmax(1) == y).float().mean()
    saliency = delta.abs().sum(1).flatten(1)
    figures = {
        "accuracy": accuracy,
        "cosine": F.cosine_similarity(delta.flatten(1), guided.flatten(1)).mean(),
        "smooth": low_pass(delta).flatten(1).norm(dim=1).mean(),  # of 1, the norm of delta
    }
    if images.evidence is not None:
        evidence = images.evidence.flatten(1)
        figures["on digit"] = ((saliency * evidence).sum(1) / saliency.sum(1).clamp(min=1e-300)).mean()
        figures["pointing"] = evidence.gather(1, saliency.argmax(1, keepdim=True)).float().mean()
    with torch.no_grad():
        first, second = run.model(x).topk(2).indices.unbind(1)
    of_classes = [gradients(run.model, x, each, "logit")[0].flatten(1) for each in (first, second)]
    figures["classes"] = F.cosine_similarity(*of_classes).mean()
    return {name: float(value) for name, value in figures.items()} | {"ms/step": statistics.median(run.milliseconds)}


def gradients(model: nn.Module, x: Tensor, y: Tensor, criterion: str) -> tuple[Tensor, Tensor]:
    """Both input gradients, each image's of unit norm: a sure network's are small, and all we ask is where."""
    pairs = [input_gradients(model, a, b, criterion=criterion) for a, b in zip(x.split(250), y.split(250), strict=True)]
    delta, guided = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    return F.normalize(delta.flatten(1), eps=1e-300).view_as(x), F.normalize(guided.flatten(1), eps=1e-300).view_as(x)


OBJECTS = {"log_prob": "log-probability", "logit": "logit", "cross_entropy": "cross-entropy"}

HEADINGS = {
    "accuracy": "accuracy",
    "cosine": "cos(δ, δᴳ)",
    "smooth": "smooth: ‖mean₃ₓ₃ δ‖/‖δ‖",
    "on digit": "δ on digit",
    "pointing": "pointing game",
    "classes": "cos(δ₁, δ₂)",
    "cosine of the logit": "cos(δ, δᴳ) of the logit",
    "cosine of the loss": "cos(δ, δᴳ) of the loss",
    "ms/step": "ms per step",
}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: mean ± standard deviation over the seeds."""
    names = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(HEADINGS[name] for name in names) + " |", "| --- |" + " --- |" * len(names)]
    for title, seeds in rows.items():
        cells = []
        for name in names:
            values = [figures[name] for figures in seeds]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and name != "ms/step" else ""
            cells.append(
                f"{statistics.fmean(values):.1f}" if name == "ms/step" else f"{statistics.fmean(values):.3f}{spread}"
            )
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(plain: Run, regularized: Run, images: Images, path: Path, rows: int = 6) -> None:
    """Held-out images: input, input gradient without and with the loss, guided gradient, one scale per row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = torch.linspace(0, len(images.test[0]) - 1, rows).long()  # over all classes of a folder
    x, y = (part[shown] for part in images.test)
    criterion = regularized.setting.criterion
    delta_plain, _ = gradients(plain.model, x, y, criterion)
    delta, guided = gradients(regularized.model, x, y, criterion)
    columns = {"δ without": delta_plain, "δ with": delta, "δᴳ with (guided)": guided}

    figure, axes = plt.subplots(rows, 4, figsize=(7.2, 1.85 * rows), layout="constrained", squeeze=False)
    for row in range(rows):
        maps = {title: gradient[row].sum(0) for title, gradient in columns.items()}
        limit = float(torch.stack(list(maps.values())).abs().quantile(0.995))
        axes[row, 0].imshow(x[row].permute(1, 2, 0).clamp(0, 1))
        axes[row, 0].set_ylabel(images.classes[int(y[row])])
        for axis, (title, values) in zip(axes[row, 1:], maps.items(), strict=True):
            image = axis.imshow(values, cmap="coolwarm", vmin=-limit, vmax=limit)
            axis.set_title(title if row == 0 else "", fontsize=10)
        figure.colorbar(image, ax=axes[row, 3], ticks=[-limit, 0, limit], format="%.2f", fraction=0.05)
    axes[0, 0].set_title("held-out image", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        f"Input gradient of the {OBJECTS[criterion]}, {images.name}\n"
        "summed over colours; each map scaled to unit norm, one colour scale per row",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(
    images: Images, settings: list[Setting], seeds: list[int], epochs: int, measure: Callable[[Run], dict[str, float]]
) -> tuple[list[list[dict[str, float]]], list[Run]]:
    """The figures of each setting, a list over seeds, and the networks of the last seed."""
    figures: list[list[dict[str, float]]] = [[] for _ in settings]
    runs: list[Run] = []
    for seed in seeds:
        runs = train(images, settings, seed, epochs)
        for row, run in zip(figures, runs, strict=True):
            row.append(measure(run))
    return figures, runs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a run of a minute, too short to conclude anything")
    parser.add_argument("--data", type=Path, help="folder with train/ and test/ (or val/), one folder per class")
    parser.add_argument("--limit", type=positive, help="at most this many training images")
    parser.add_argument("--lam", type=float, default=Setting.lam, help="weight of the loss (%(default)s)")
    parser.add_argument("--criterion", choices=OBJECTS, default=Setting.criterion, help="(%(default)s)")
    parser.add_argument("--batch-norm", choices=["frozen", "coupled"], default=Setting.batch_norm, help="(%(default)s)")
    parser.add_argument(
        "--low-pass",
        action=argparse.BooleanOptionalAction,
        default=Setting.low_pass,
        help="compare the gradients after a 3x3 mean",
    )
    parser.add_argument("--error", choices=["cos", "mae", "mse", "hi"], default=Setting.error, help="(%(default)s)")
    parser.add_argument("--epochs", type=positive, help="(8, quick: 2)")
    parser.add_argument("--seeds", type=positive, help="number of seeds (3)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture (%(default)s)")
    parser.add_argument("--json", type=Path, help="store the figures of every seed here")
    parser.add_argument("--save", type=Path, help="store the networks of the last seed in this folder, for evaluate.py")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def main() -> None:
    options = arguments()
    try:
        if options.data is None:
            count, test = (2000, 500) if options.quick else (6000, 1000)
            images = digits_on_photographs(min(count, options.limit or count), test)
        else:
            images = photographs(options.data, options.limit)
    except BadInputError as reason:
        print(f"quickstart: {reason}", file=sys.stderr)
        sys.exit(2)
    epochs = options.epochs or (2 if options.quick else 8)
    seeds = list(range(options.seeds or 3))
    setting = Setting(options.lam, options.criterion, options.low_pass, options.error, options.batch_norm)
    print(f"{images.name}: {len(images.train[0])} training and {len(images.test[0])} test images, {epochs} epochs")

    began = time.perf_counter()
    measure = lambda run: evaluate(run, images, options.criterion)  # noqa: E731
    figures, runs = compare(images, [PLAIN, setting], seeds, epochs, measure)
    rows = {"without": figures[0], f"with, λ = {setting.lam:g}": figures[1]}
    print(
        f"\nmean ± standard deviation over {len(seeds)} seeds, δ of the {OBJECTS[options.criterion]}\n\n{table(rows)}\n"
    )
    if images.evidence is not None:
        print(f"chance: {images.evidence.float().mean():.3f} of the pixels belong to a digit")
    if options.save:
        from networks import save

        for run, name in zip(runs, ("without", "with"), strict=True):
            save(run.model, images.classes, options.save / f"{name}.pt")
    picture(runs[0], runs[1], images, options.output)
    print(f"wrote {options.output} ({time.perf_counter() - began:.0f} s)")
    if options.json:
        stored = {"task": images.name, "epochs": epochs, "setting": asdict(setting), "torch": torch.__version__}
        options.json.write_text(json.dumps(stored | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
