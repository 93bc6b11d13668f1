"""Measure finished runs: input gradients, and the faithfulness of saliency and class activation maps.

    cd benchmarks/studies/paper
    python measure.py runs/without-0 runs/with-0 --data DIR --limit 1000

Writes figures.json and one JSON file for each method into the folder of each run; started again, does what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[3] / "examples")]
from classifiers import Network, network_of
from comparisons import randomized, smoothed
from evaluate import TITLES, Task, add_protocol, evaluate_once
from figures import evaluate
from images import BadInputError, Images
from networks import build
from quickstart import picture, positive
from train import read

from interpgrad import plot, saliency
from interpgrad.published import last_layer


def load(folder: Path, images: Images) -> Network:
    """The network of a finished run."""
    if not (folder / "run.json").exists():
        raise BadInputError(f"expected a finished run in {folder}, found no run.json: train.py --output {folder}.")
    record = json.loads((folder / "run.json").read_text())["network"]
    model = build(record["name"], len(record["classes"]), record["width"], images.train[0])
    stored = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(stored["run"]["model"])
    return network_of(folder.name, model)


def some(images: Images, count: int | None, device: torch.device | str = "cpu") -> Images:
    """Of the test images so many, taken evenly."""
    x, y = images.test
    chosen = torch.linspace(0, len(x) - 1, min(count or len(x), len(x))).long()
    return Images(images.name, images.classes, images.train, (x[chosen].to(device), y[chosen].to(device)))


def gradients_of(network: Network, many: Images, few: Images, *, brief: bool = False) -> dict[str, Any]:
    """Figures of both gradients on many images; of their smoothed and randomized kin on a few, unless in brief."""
    found: dict[str, Any] = {name: evaluate(network.model, many, name) for name in ("log_prob", "logit")}
    if brief:
        return found
    return found | {"smoothed": smoothed(network.model, few), "randomized": randomized(network.model, few)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is measured, and on which images."""
    parser.add_argument("--data", default="cifar100", help="cifar10, cifar100 or a folder (%(default)s)")
    parser.add_argument("--figures", type=positive, help="gradients of at most so many images (all)")
    parser.add_argument("--brief", action="store_true", help="without SmoothGrad and random weights, which take long")
    add_protocol(parser)


def measure(folders: list[Path], options: argparse.Namespace) -> None:
    """What is missing of these runs."""
    images = read(options.data, 100)
    many, few = (some(images, count, options.device) for count in (options.figures, options.limit))
    task = Task(images.name, TensorDataset(*some(images, options.limit).test), images.classes)
    for folder in folders:
        network, options.output = load(folder, images), folder
        figures = folder / "figures.json"
        network.model.to(options.device)
        if not figures.exists():
            save({"torch": torch.__version__} | gradients_of(network, many, few, brief=options.brief), figures)
        layer = last_layer(network.model, few.test[0][:2])
        for method in options.methods:
            evaluate_once(network, task, layer, method, options)
        print(f"measured {folder}")


def pictures(folders: list[Path], options: argparse.Namespace) -> None:
    """The paper's "Gradient visualization" and "Qualitative results" of two runs, without the loss and with it."""
    images = read(options.data, 100)
    networks = [load(folder, images) for folder in folders]
    options.pictures.mkdir(parents=True, exist_ok=True)
    few = some(images, 6)
    picture(*(network.model for network in networks), few, options.pictures / "gradients.png")
    (x, y), columns = few.test, {}
    for method in (each for each in options.methods if each in saliency.CAMS):
        for network, name in zip(networks, ("without", "with"), strict=True):
            columns[f"{TITLES[method]}\n{name}"] = saliency.CAMS[method](
                network.model, x, last_layer(network.model, x[:2]), y
            )
    labels = [images.classes[int(label)] for label in y]
    figure = plot.cams(x, columns, labels=labels, title=f"Class activation maps of the class, held-out {images.name}")
    figure.savefig(options.pictures / "maps.png", dpi=80)


def save(found: dict[str, Any], path: Path) -> None:
    """All or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of train.py")
    parser.add_argument(
        "--pictures", type=Path, help="draw the first two runs' gradients and maps in this folder instead"
    )
    add_options(parser)
    options = parser.parse_args()
    try:
        if options.pictures:
            pictures(options.runs[:2], options)
        else:
            measure(options.runs, options)
    except BadInputError as reason:
        print(f"measure: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
