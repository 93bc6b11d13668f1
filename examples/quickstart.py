"""Train the same small ResNet without and with the interpretable gradient loss, and look at its gradients.

    python examples/quickstart.py                     # digits on photographs: about two minutes on two cores
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
from dataclasses import asdict
from pathlib import Path

import torch
from classifiers import save, small_resnet
from figures import evaluate, gradients, table
from images import BadInputError, Images, digits_on_photographs, photographs
from torch import nn
from tqdm import tqdm
from training import PLAIN, RECIPE, Run, Setting, augment, one_cycle

from interpgrad import plot


def train(images: Images, settings: list[Setting], seed: int, epochs: int, batch: int = 64) -> list[Run]:
    """Train one network per setting, from the same weights, on the same batches, step by step in turn."""
    x, y = images.train
    steps = max(1, len(x) // batch)
    runs = []
    for setting in settings:
        torch.manual_seed(seed)
        model = small_resnet(len(images.classes)).to(memory_format=torch.channels_last)  # the faster layout on a CPU
        runs.append(one_cycle(setting, model, epochs * steps))
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=epochs * steps, desc=f"seed {seed}", unit="step", leave=False) as progress:
        for _ in range(epochs):
            for chosen in torch.randperm(len(x), generator=generator)[: steps * batch].chunk(steps):
                batch_of_images = x[chosen] if images.evidence is not None else augment(x[chosen], generator)
                for run in runs:
                    run.step(batch_of_images, y[chosen])
                progress.update()
    return runs


def picture(plain: nn.Module, regularized: nn.Module, images: Images, path: Path, rows: int = 6) -> None:
    """Held-out images: input, input gradient without and with the loss, guided gradient."""
    shown = torch.linspace(0, len(images.test[0]) - 1, rows).long()  # over all classes of a folder
    x, y = (part[shown] for part in images.test)
    delta_plain, _ = gradients(plain, x, y, "log_prob")
    delta, guided = gradients(regularized, x, y, "log_prob")
    columns = {"δ without": delta_plain, "δ with": delta, "δᴳ with (guided)": guided}
    labels = [images.classes[int(label)] for label in y]
    title = f"Input gradient of the log-probability, held-out {images.name}"
    plot.gradients(x, columns, labels=labels, title=title).savefig(path, dpi=150)


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
    Setting.add_arguments(parser, defaults=RECIPE)
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
    setting = Setting.of(options)
    print(f"{images.name}: {len(images.train[0])} training and {len(images.test[0])} test images, {epochs} epochs")

    began = time.perf_counter()

    def measure(run: Run) -> dict[str, float]:
        figures = evaluate(run.model, images)
        return figures | {"ms/step": statistics.fmean(run.milliseconds)}

    figures, runs = compare(images, [PLAIN, setting], seeds, epochs, measure)
    rows = {"without": figures[0], f"with, {setting}": figures[1]}
    print(f"\nmean ± standard deviation over {len(seeds)} seeds, δ of the log-probability\n\n{table(rows)}\n")
    if images.evidence is not None:
        print(f"chance: {images.evidence.float().mean():.3f} of the pixels belong to a digit")
    if options.save:
        for run, name in zip(runs, ("without", "with"), strict=True):
            save(run.model, images.classes, options.save / f"{name}.pt")
    picture(runs[0].model, runs[1].model, images, options.output)
    print(f"wrote {options.output} ({time.perf_counter() - began:.0f} s)")
    if options.json:
        stored = {"task": images.name, "epochs": epochs, "setting": asdict(setting), "torch": torch.__version__}
        options.json.write_text(json.dumps(stored | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
