"""Settings over seeds: the gradients' figures, and every map under every metric, as differences to one of them.

    cd benchmarks/studies/paper
    python compare.py runs/cifar10 --base without --json ../results/cifar10.json

Reads what train.py and measure.py left in folders NAME-SEED, prints the tables, stores what they are made of.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[3] / "examples")]
from comparisons import both_gradients, paired_table, worth
from evaluate import METRICS, TITLES
from markdown_table import markdown_table


def interval(differences: Tensor) -> tuple[float, float, float]:
    """The mean of differences (seeds, images), and its 95% interval: over other seeds, and over other images.

    Both deviations of the mean are added in quadrature: Student's over the seeds' means, the normal one over the
    images' means. Of one seed, the images' alone.
    """
    seeds, images = differences.shape
    of_images = stats.norm.ppf(0.975) * float(differences.mean(0).std()) / math.sqrt(images)
    of_seeds = 0.0
    if seeds > 1:
        of_seeds = stats.t.ppf(0.975, seeds - 1) * float(differences.mean(1).std()) / math.sqrt(seeds)
    mean, half = float(differences.mean()), math.hypot(of_images, of_seeds)
    return mean, mean - half, mean + half


def read(folder: Path, methods: Iterable[str] = tuple(TITLES)) -> dict[str, dict[str, dict[str, Any]]]:
    """Name -> seed -> what was measured of that run, if these methods were."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-*/figures.json")):
        name, _, seed = path.parent.name.rpartition("-")
        maps = {method: path.parent / f"{path.parent.name}-{method}.json" for method in methods}
        if all(each.exists() for each in maps.values()):
            run = json.loads((path.parent / "run.json").read_text())
            figures = json.loads(path.read_text())
            values = {method: json.loads(each.read_text()) for method, each in maps.items()}
            for each in ("log_prob", "logit"):
                figures[each]["accuracy"] = run["accuracy"]  # on all test images
            found.setdefault(name, {})[seed] = {"run": run, "figures": figures, "maps": values}
    return found


def compared(runs: dict[str, dict[str, dict[str, Any]]], base: str) -> dict[str, Any]:
    """What the tables show."""
    runs = {base: runs[base]} | runs  # the base first
    first = next(iter(runs[base].values()))
    stored: dict[str, Any] = {
        "base": base,
        "images": first["maps"]["grad_cam"]["settings"]["images"],
        "protocol": first["maps"]["grad_cam"]["settings"]["protocol"],
        "torch": first["run"]["torch"],
        "settings": {name: each["run"]["setting"] for name, seeds in runs.items() for each in list(seeds.values())[:1]},
        "figures": {name: {seed: each["figures"] for seed, each in seeds.items()} for name, seeds in runs.items()},
        "maps": {},
    }
    for method in TITLES:
        for name, seeds in runs.items():
            row: dict[str, Any] = {}
            for metric in METRICS:
                row[metric] = {"mean": float(percent(seeds, list(seeds), method, metric).mean())}
                common = [seed for seed in seeds if seed in runs[base]]
                if name != base and common:
                    after, before = (percent(each, common, method, metric) for each in (seeds, runs[base]))
                    row[metric]["difference"] = interval(after - before)
            stored["maps"].setdefault(method, {})[name] = row
    return stored


def percent(runs: dict[str, dict[str, Any]], seeds: list[str], method: str, metric: str) -> Tensor:
    """A metric of every image, (seeds, images)."""
    maps = [runs[seed]["maps"][method] for seed in seeds]
    factors = [1 if "unit" in each["settings"] else 100 for each in maps]  # fractions of 1, as once stored
    values = [each["values"][metric] for each in maps]
    return torch.tensor(values, dtype=torch.float64) * torch.tensor(factors)[:, None]


def gradients_table(stored: dict[str, Any]) -> str:
    """Both gradients, and what averaging adds."""
    rows = {
        name: {
            seed: both_gradients(figures)
            | {"own": figures["smoothed"]["own"][3], "insertion": figures["smoothed"]["insertion"][0]}
            | {"random": figures["randomized"]["cosine, all layers"]}
            for seed, figures in seeds.items()
        }
        for name, seeds in stored["figures"].items()
    }
    base = stored["base"]
    lines = [paired_table(rows, base), ""]
    plain = [statistics.fmean(each) for each in zip(*_insertions(stored, base), strict=True)]
    for name in rows:
        if name != base:
            value = statistics.fmean(each[0] for each in _insertions(stored, name))
            curve = ", ".join(f"{each:.3f}" for each in plain)
            lines.append(
                f"By insertion, one gradient of *{name}* ({value:.3f}) is worth {worth(plain, value):.1f} samples of "
                f"SmoothGrad of *{base}* ({curve} at 0, 1, 2, 4, ... samples)."
            )
    return "\n".join(lines)


def _insertions(stored: dict[str, Any], name: str) -> list[list[float]]:
    return [figures["smoothed"]["insertion"] for figures in stored["figures"][name].values()]


def maps_table(stored: dict[str, Any]) -> str:
    """Means in percent, and differences to the base with their intervals; * where they exclude 0."""
    table = []
    for method, rows in stored["maps"].items():
        for name, row in rows.items():
            cells = [TITLES[method], name]
            for metric in METRICS:
                cell = f"{row[metric]['mean']:.1f}"
                if "difference" in row[metric]:
                    mean, low, high = row[metric]["difference"]
                    cell = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{'' if low <= 0 <= high else ' *'}"
                cells.append(cell)
            table.append(cells)
    seeds = ", ".join(f"{name} {len(each)}" for name, each in stored["figures"].items())
    foot = (
        f"{stored['images']}; seeds: {seeds}; {stored['protocol']}. In percent. The rows below *{stored['base']}* are "
        "differences to it, with 95% intervals over seeds and images."
    )
    return markdown_table(["map", "setting", *METRICS.values()], table) + f"\n\n{foot}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of folders NAME-SEED")
    parser.add_argument("--base", default="without", help="what the others are compared with (%(default)s)")
    parser.add_argument("--json", type=Path, help="store the result here")
    options = parser.parse_args()
    runs = read(options.runs)
    if options.base not in runs:
        print(
            f"compare: expected measured runs {options.base}-SEED in {options.runs}, found {list(runs)}.",
            file=sys.stderr,
        )
        sys.exit(2)
    stored = compared(runs, options.base)
    print(gradients_table(stored), "\n\n" + maps_table(stored))
    if options.json:
        options.json.write_text(json.dumps(stored, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
