"""Faithfulness of class activation maps: the paper's Table 2 for one network, or for two side by side.

    python examples/quickstart.py --save networks
    python examples/evaluate.py networks/without.pt --compare networks/with.pt --plot
    python examples/evaluate.py resnet50 --data DIR --limit 1000        # torchvision's or timm's, published weights
    python examples/evaluate.py resnet18:model.pt --data DIR            # your weights

DATA holds test/ or val/ with one folder of images per class, or such folders, or CIFAR as torchvision stores it;
without it, the digits on photographs of quickstart.py. Writes table.md, table.csv and results.json (and pictures) into
the output folder, and one file for each network and method: interrupted and started again, it goes on after the last.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifiers import Network, load
from figures import OBJECTS, scaled
from images import SIZE, BadInputError, digits_on_photographs
from markdown_table import markdown_table
from quickstart import positive
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from interpgrad import metrics, plot, saliency
from interpgrad.published import last_layer, square

TITLES = {
    "gradient": "|δ|",
    "smooth_gradient": "SmoothGrad",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "score_cam": "Score-CAM",
    "ablation_cam": "Ablation-CAM",
    "axiom_cam": "Axiom-CAM",
}
# INS/y is insertion divided by the mean confidence in the whole images; the size of a map, its mean, is no merit, but
# AD, AG and AI reward it.
METRICS = {name: name + ("↑" if higher else "↓") for name, higher in metrics.HIGHER_IS_BETTER.items()}
METRICS |= {"INS/y": "INS/y↑", "size": "size"}
RESAMPLES = 10_000


@dataclass
class Task:
    """The images to explain, in [0, 1]; `name` says where they come from."""

    name: str
    images: Dataset[Any]
    classes: list[str]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from DataLoader(self.images, batch_size=size)


def read_task(data: Path | None, show: Callable[[Any], Tensor], limit: int | None) -> Task:
    """The images of a folder, or the built-in ones as they are, taken evenly up to the limit.

    `show` makes an image (3, H, W) in [0, 1] of a photograph.
    """
    if data is None:
        built_in = digits_on_photographs(10, min(1000, limit or 1000))
        return Task(built_in.name, TensorDataset(*built_in.test), built_in.classes)
    from torchvision import datasets

    try:
        if (data / "cifar-10-batches-py").is_dir():
            images = datasets.CIFAR10(str(data), train=False, transform=show)
        elif (data / "cifar-100-python").is_dir():
            images = datasets.CIFAR100(str(data), train=False, transform=show)
        else:
            inner = next((data / name for name in ("test", "val") if (data / name).is_dir()), data)
            images = datasets.ImageFolder(str(inner), show)
    except (FileNotFoundError, RuntimeError) as reason:
        raise BadInputError(
            f"expected {data} to hold test/ or val/ with one folder of images per class, or CIFAR: {reason}"
        ) from reason
    chosen = torch.linspace(0, len(images) - 1, min(limit or len(images), len(images))).long().tolist()
    return Task(data.name, Subset(images, chosen), list(images.classes))


def evaluate(network: Network, task: Task, layer: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every metric of every image, in percent, and how many images a second were explained, and measured."""
    mean, std = network.preprocessing.mean, network.preprocessing.std
    shift, spread = (torch.tensor(each, device=options.device).view(-1, 1, 1) for each in (mean, std))
    found: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    seconds = {"maps": 0.0, "metrics": 0.0}
    chunk = {"chunk_size": options.chunk} if options.chunk else {}
    confidence: list[Tensor] = []
    hits, count = 0, 0
    with tqdm(total=len(task.images), desc=f"{network.name}, {TITLES[method]}", unit="image", leave=False) as progress:  # type: ignore[arg-type]
        for images, labels in task.batches(options.batch):
            x = (images.to(options.device) - shift) / spread
            target = labels.to(options.device) if options.target == "label" else None
            began = time.perf_counter()
            maps = maps_of(method, network.model, x, layer, target, options.criterion, chunk)
            values_began = _now(options.device)
            values = metrics.faithfulness(
                network.model,
                x,
                maps,
                target,
                mean=mean,
                std=std,
                protocol=options.protocol,
                denominator=options.denominator,
                **chunk,
            )
            seconds["maps"] += values_began - began
            seconds["metrics"] += _now(options.device) - values_began
            with torch.no_grad():
                probabilities = network.model(x).double().softmax(1).cpu()
            hits += int((probabilities.argmax(1) == labels).sum())
            explained = labels if options.target == "label" else probabilities.argmax(1)
            confidence.append(probabilities.gather(1, explained[:, None]).squeeze(1))
            for name, value in (values | {"INS/y": values["INS"], "size": 100 * maps.mean((1, 2))}).items():
                found[name].append(value.cpu())
            count += len(x)
            progress.update(len(x))
    merged = {name: torch.cat(parts) for name, parts in found.items()}
    merged["INS/y"] /= torch.cat(confidence).mean()
    return {
        "network": network.name,
        "method": method,
        "layer": layer,
        "images": count,
        "accuracy": hits / count,
        "images_per_second": {name: count / max(value, 1e-9) for name, value in seconds.items()},
        "values": {name: values.tolist() for name, values in merged.items()},
    }


def maps_of(
    method: str, model: nn.Module, x: Tensor, layer: str, target: Tensor | None, criterion: str, chunk: dict[str, int]
) -> Tensor:
    """Maps in [0, 1]: class activation maps (N, h, w), or gradients' magnitudes (N, H, W), summed over colours."""
    if method in saliency.CAMS:
        return saliency.CAMS[method](model, x, layer, target, **chunk)
    function = saliency.gradient if method == "gradient" else saliency.smooth_gradient
    return scaled(function(model, x, target, criterion=criterion, **chunk).abs().sum(1))


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def evaluate_once(network: Network, task: Task, layer: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same, from the output folder if an earlier run finished it with these settings, and stored there."""
    height, width = task.images[0][0].shape[-2:]
    settings = {
        "weights": network.fingerprint,
        "images": f"{task.name}, {len(task.images)} images of {height}x{width}",  # type: ignore[arg-type]
        "shown": str(network.preprocessing),
        "layer": layer,
        "target": options.target,
        "protocol": str(metrics.PROTOCOLS[options.protocol]),
        "denominator": options.denominator,
        "unit": "percent",
        "criterion": options.criterion if method not in saliency.CAMS else None,
    }
    path = options.output / f"{network.name}-{method}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["settings"] == settings:
            return stored
    result = evaluate(network, task, layer, method, options) | {"settings": settings}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)  # all or nothing, whenever it is interrupted
    return result


def bootstrap(before: list[float], after: list[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """The mean difference after - before over the same images, and its 95% confidence interval (percentiles)."""
    difference = np.subtract(after, before)
    found = stats.bootstrap([difference], np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=rng)
    return float(difference.mean()), *map(float, found.confidence_interval)


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and network, in percent; of two networks, the differences below them."""
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(each["method"] for each in results):
        group = [each for each in results if each["method"] == method]
        for each in group:
            values = {name: statistics.fmean(each["values"][name]) for name in METRICS}
            speed = each["images_per_second"]
            rows.append(
                {"method": method, "network": each["network"]}
                | values
                | {"maps/s": speed["maps"], "metrics/s": speed["metrics"]}
            )
        if len(group) == 2:
            rng = np.random.default_rng(0)
            differences = {
                name: list(bootstrap(group[0]["values"][name], group[1]["values"][name], rng)) for name in METRICS
            }
            rows.append({"method": method, "network": "difference"} | differences)
    return rows


def report_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json stores and the table shows."""
    first = results[0]
    return {
        "settings": {name: value for name, value in first["settings"].items() if name != "weights"},
        "accuracy": {each["network"]: each["accuracy"] for each in results},
        "torch": torch.__version__,
        "rows": rows_of(results),
    }


def markdown(report: dict[str, Any]) -> str:
    """The table, with what it was measured on and how."""
    names = [name for name in METRICS if name in report["rows"][0]]
    rows = []
    for row in report["rows"]:
        if row["network"] == "difference":
            cells = [
                f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{'' if low <= 0 <= high else ' *'}"
                for mean, low, high in (row[name] for name in names)
            ] + ["", ""]
        else:
            cells = [f"{row[name]:.2f}" for name in names] + [f"{row['maps/s']:.1f}", f"{row['metrics/s']:.1f}"]
        rows.append([TITLES[row["method"]], row["network"], *cells])
    settings = report["settings"]
    accuracy = ", ".join(f"{name} {100 * value:.1f}%" for name, value in report["accuracy"].items())
    what = "the predicted class" if settings["target"] == "predicted" else "the labelled class"
    foot = (
        f"{settings['images']}; accuracy {accuracy}; maps of the logit of {what}, layer {settings['layer']}; "
        f"AG divided by {settings['denominator']}; {settings['protocol']}. In percent; images per second."
    )
    if any(row["network"] == "difference" for row in report["rows"]):
        foot += (
            " Differences: second network minus first, with the 95% confidence interval of a paired bootstrap over "
            f"the images ({RESAMPLES} resamples); * where it excludes 0. It says nothing about other seeds of training."
        )
    headings = ["method", "network", *(METRICS[name] for name in names), "maps/s", "metrics/s"]
    return markdown_table(headings, rows) + f"\n\n{foot}"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    columns = ["method", "network", *METRICS, *(f"{name} {end}" for name in METRICS for end in ("low", "high"))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            flat = {key: row[key] for key in ("method", "network")}
            for name in METRICS:
                value = row[name] if isinstance(row[name], list) else [row[name], "", ""]
                flat |= dict(zip((name, f"{name} low", f"{name} high"), value, strict=True))
            writer.writerow(flat)


def pictures(
    networks: list[Network], layers: list[str], task: Task, options: argparse.Namespace, shown: int = 5
) -> None:
    """gradients.png, cams.png and curves.png."""
    chosen = torch.linspace(0, len(task.images) - 1, shown).long().tolist()  # type: ignore[arg-type]
    images, labels = next(iter(DataLoader(Subset(task.images, chosen), batch_size=shown)))
    names = [task.classes[int(label)] for label in labels]
    of_gradients: dict[str, Tensor] = {}
    of_maps: dict[str, Tensor] = {}
    inserted: dict[str, Tensor] = {}
    deleted: dict[str, Tensor] = {}
    for network, layer in zip(networks, layers, strict=True):
        preprocessing = network.preprocessing
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
        x = ((images - mean) / std).to(options.device)
        suffix = f"\n{network.name}" if len(networks) > 1 else ""
        of_gradients[f"δ{suffix}"] = saliency.gradient(network.model, x, criterion=options.criterion)
        of_gradients[f"δᴳ (guided){suffix}"] = saliency.guided_gradient(network.model, x, criterion=options.criterion)
        of_gradients[f"SmoothGrad{suffix}"] = saliency.smooth_gradient(network.model, x, criterion=options.criterion)
        for method in (name for name in options.methods if name in saliency.CAMS):
            of_maps[f"{TITLES[method]}{suffix}"] = saliency.CAMS[method](network.model, x, layer)
        more, _ = next(task.batches(64))
        x = ((more - mean) / std).to(options.device)
        maps = maps_of(options.methods[0], network.model, x, layer, None, options.criterion, {})
        inserted[network.name] = metrics.insertion_curve(network.model, x, maps, protocol=options.protocol)
        deleted[network.name] = metrics.deletion_curve(network.model, x, maps, protocol=options.protocol)
    title = f"Input gradients of the predicted class's {OBJECTS[options.criterion]}, {task.name}"
    plot.gradients(images, of_gradients, labels=names, title=title).savefig(options.output / "gradients.png", dpi=150)
    of_maps = {name: of_maps[name] for name in sorted(of_maps, key=_method)}  # networks side by side
    title = f"Class activation maps of the predicted class, {task.name}"
    if of_maps:
        plot.cams(images, of_maps, labels=names, title=title).savefig(options.output / "cams.png", dpi=150)
    title = f"{TITLES[options.methods[0]]}, mean over {len(x)} images, protocol {options.protocol}"
    plot.curves(inserted, deleted, title=title).savefig(options.output / "curves.png", dpi=150)


def _method(column: str) -> int:
    return list(TITLES.values()).index(column.partition("\n")[0])


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """What is explained, and how it is measured."""
    parser.add_argument("--limit", type=positive, help="at most this many images, taken evenly")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="(all)")
    parser.add_argument("--target", choices=["predicted", "label"], default="predicted", help="(%(default)s)")
    parser.add_argument("--criterion", choices=OBJECTS, default="log_prob", help="whose gradients (%(default)s)")
    parser.add_argument("--protocol", choices=list(metrics.PROTOCOLS), default="rise", help="(%(default)s)")
    parser.add_argument("--denominator", choices=["1-y", "y"], default="1-y", help="of AG (%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="images read at once (%(default)s)")
    parser.add_argument("--chunk", type=positive, help="images in a forward pass (what each method prefers)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", help="checkpoint, NAME:checkpoint, or the name of a torchvision or timm model")
    parser.add_argument("--compare", metavar="NETWORK", help="a second one, on the same images")
    parser.add_argument("--data", type=Path, help="folder of images (default: the digits on photographs)")
    parser.add_argument("--layer", help="dotted name (the last with an output (N, K, h, w))")
    parser.add_argument("--size", type=positive, help="side of the images in pixels (as the network was published)")
    add_protocol(parser)
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder (%(default)s)")
    parser.add_argument("--plot", action="store_true", help="gradients.png, cams.png and curves.png too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        classes = len(read_task(options.data, square(SIZE), options.limit).classes)
        specs = [options.network, *([options.compare] if options.compare else [])]
        networks = [load(spec, classes, options.size) for spec in specs]
        if len({network.name for network in networks}) < len(networks):
            for index, network in enumerate(networks):
                network.name = f"{network.name} {index + 1}"
        if len({str(network.preprocessing) for network in networks}) > 1:
            shown = " and ".join(str(each.preprocessing) for each in networks)
            raise BadInputError(f"expected networks that are shown the same images, got {shown}: use --size.")
        task = read_task(options.data, networks[0].preprocessing.show, options.limit)
        for network in networks:
            network.model.to(options.device)
            network.name = re.sub(r"[^\w.+ -]", "_", network.name)
        sample = next(task.batches(2))[0].to(options.device)
        layers = [options.layer or last_layer(network.model, sample) for network in networks]
        options.output.mkdir(parents=True, exist_ok=True)
        results = [
            evaluate_once(network, task, layer, method, options)
            for method in options.methods
            for network, layer in zip(networks, layers, strict=True)
        ]
    except BadInputError as reason:
        print(f"evaluate: {reason}", file=sys.stderr)
        sys.exit(2)
    report = report_of(results)
    text = markdown(report)
    print(text)
    (options.output / "table.md").write_text(text + "\n")
    (options.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    write_csv(report["rows"], options.output / "table.csv")
    if options.plot:
        pictures(networks, layers, task, options)
    print(f"\nwrote {options.output}/")


if __name__ == "__main__":
    main()
