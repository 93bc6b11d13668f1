"""The experiments of the paper's Tables 1 to 4, in its reading and in others, as a queue of runs.

    cd benchmarks/studies/paper
    python all_runs.py --data cifar100 --output runs                  # everything: see --dry-run first
    python all_runs.py --data cifar100 --output runs --dry-run        # what is missing, and GPU hours
    python all_runs.py --data DIR --output runs --scale 0.25 --epochs 3 --networks resnet18 --jobs 2

Each run is trained (train.py) and measured (measure.py) in a folder of its own, OUTPUT/NAME-SEED, and locked while it
is. So several processes and machines that see the folder can work on it at once; what is interrupted goes on later.
tables.py makes RESULTS.md of what there is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import filelock
import measure
import torch
import train
from networks import NETWORKS
from runs import BEST, name_of
from slides import WEIGHTS

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[3] / "examples")]
from images import BadInputError, Images
from markdown_table import markdown_table
from quickstart import positive
from training import PAPER, PLAIN, RECIPE, Setting

# The paper prints the gradient of the cross-entropy. Which batch statistics, and which cosine, it does not say:
# "clamped" is F.cosine_similarity on the gradients of the mean loss, whose epsilon forgets confident samples.
READINGS = {
    "coupled": PAPER,
    "clamped": replace(PAPER, error="original cos"),
    "frozen": replace(PAPER, batch_norm="frozen"),
}


@dataclass(frozen=True)
class Experiment:
    """One of the runs."""

    network: str
    reading: str
    setting: Setting
    seed: int

    @property
    def folder(self) -> str:
        return f"{name_of(self.network, self.reading, self.setting.error.split()[-1], self.setting.lam)}-{self.seed}"


def grid(
    networks: list[str], readings: list[str], weights: list[float], errors: list[str], seeds: int
) -> Iterator[Experiment]:
    """Every run, each once, what matters most first: a whole table of one seed says nothing."""
    found: dict[Experiment, None] = {}
    for network, seed in itertools.product(networks, range(seeds)):
        found[Experiment(network, "without", PLAIN, seed)] = None
        found[Experiment(network, "recipe", RECIPE, seed)] = None
    for reading, network, seed in itertools.product(readings, networks, range(seeds)):  # Tables 1 and 2
        found[Experiment(network, reading, replace(READINGS[reading], lam=BEST[network]), seed)] = None
    for reading, lam, seed in itertools.product(readings, weights, range(seeds)):  # Table 4
        if "resnet18" in networks:
            found[Experiment("resnet18", reading, replace(READINGS[reading], lam=lam), seed)] = None
    for reading, error, seed in itertools.product(readings, errors, range(seeds)):  # Table 3
        if "resnet18" in networks and reading != "clamped":
            setting = replace(READINGS[reading], lam=BEST["resnet18"], error=error)
            found[Experiment("resnet18", reading, setting, seed)] = None
    yield from found


def done(experiment: Experiment, output: Path, methods: list[str]) -> bool:
    folder = output / experiment.folder
    maps = [folder / f"{experiment.folder}-{method}.json" for method in methods]
    return all(path.exists() for path in (folder / "run.json", folder / "figures.json", *maps))


def training_options(experiment: Experiment, options: argparse.Namespace) -> argparse.Namespace:
    """Those of train.py."""
    words = ["--network", experiment.network, "--seed", str(experiment.seed), "--data", options.data]
    words += ["--epochs", str(options.epochs), "--batch", str(options.batch_size), "--amp", options.amp]
    words += ["--device", options.device, "--output", str(options.output / experiment.folder)]
    words += ["--width", str(options.scale * NETWORKS[experiment.network][1])]
    words += ["--limit", str(options.limit_training)] if options.limit_training else []
    words += ["--one-cycle"] if options.one_cycle else []
    found = train.arguments(words)
    vars(found).update(asdict(experiment.setting))
    return found


def run(experiment: Experiment, options: argparse.Namespace) -> str:
    """Train and measure it, unless it is done or somebody else is at it."""
    folder = options.output / experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / "lock", timeout=0):
            if done(experiment, options.output, options.methods):
                return "done"
            began = time.perf_counter()
            if not (folder / "run.json").exists():
                train.train(training_options(experiment, options))
            measure.measure([folder], options)
            return f"{(time.perf_counter() - began) / 60:.1f} minutes"
    except filelock.Timeout:
        return "at work elsewhere"


def estimate(experiments: list[Experiment], options: argparse.Namespace) -> str:
    """What the missing runs need, by the time of a few steps of each kind, measured here and now."""
    images = train.read(options.data, options.limit_training)
    steps = options.epochs * max(1, len(images.train[0]) // options.batch_size)
    seconds: dict[tuple[str, Setting], float] = {}

    def per_step(experiment: Experiment, lam: float) -> float:
        """With the loss, or without: its weight does not change its time."""
        setting = replace(experiment.setting, lam=lam, every=1, start=0.0, warmup=0) if lam else PLAIN
        if (experiment.network, setting) not in seconds:
            found = training_options(replace(experiment, setting=setting), options)
            seconds[experiment.network, setting] = _seconds_per_step(found, images)
        return seconds[experiment.network, setting]

    rows, total = [], 0.0
    for experiment in experiments:
        lam, every, start = experiment.setting.lam, experiment.setting.every, experiment.setting.start
        share = (1 - start) / every if lam else 0.0
        mean = (1 - share) * per_step(experiment, 0.0) + (share * per_step(experiment, 1.0) if share else 0.0)
        total += mean * steps / 3600
        rows.append([experiment.folder, f"{options.batch_size / mean:.0f}", f"{mean * steps / 3600:.2f}"])
    table = markdown_table(["missing run", "images/s", f"hours on {options.device}"], rows)
    return f"{table}\n\n{len(rows)} runs, {total:.1f} hours of training on one {options.device}; measuring adds to it."


def _seconds_per_step(options: argparse.Namespace, images: Images, steps: int = 5) -> float:
    options.one_cycle = False  # which refuses steps beyond the last one
    run = train.start(options, images)
    x, y = (part[: options.batch].to(options.device) for part in images.train)
    run.step(x, y)
    began = time.perf_counter()
    for _ in range(steps):
        hits = run.step(x, y)
    float(hits.sum())  # waits for the device
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--networks", nargs="+", choices=list(BEST), default=list(BEST), help="(both)")
    parser.add_argument("--readings", nargs="*", choices=READINGS, default=list(READINGS), help="(all)")
    parser.add_argument("--weights", nargs="*", type=float, default=list(WEIGHTS), help="of Table 4 (%(default)s)")
    errors = ["hi", "mae", "mse"]
    parser.add_argument("--errors", nargs="*", choices=errors, default=errors, help="of Table 3, beside cos (all)")
    parser.add_argument("--seeds", type=positive, default=3, help="(%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the networks' widths (%(default)s)")
    parser.add_argument("--epochs", type=positive, default=200, help="(%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=128, help="of the training (%(default)s)")
    parser.add_argument("--one-cycle", action="store_true", help="the learning rate of short trainings")
    parser.add_argument("--limit-training", type=positive, help="at most so many images of a folder")
    parser.add_argument("--amp", choices=train.AMP, default="none", help="(%(default)s)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing and how long it takes, and stop")
    measure.add_options(parser)
    options = parser.parse_args()
    experiments = list(grid(options.networks, options.readings, options.weights, options.errors, options.seeds))
    missing = [each for each in experiments if not done(each, options.output, options.methods)]
    try:
        if options.dry_run:
            print(estimate(missing, options))
            return
        one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)} if options.jobs > 1 else {}
        with ProcessPoolExecutor(options.jobs, get_context("spawn"), **one_thread) as pool:
            pending = {each: pool.submit(run, each, options) for each in missing}
            for number, (experiment, result) in enumerate(pending.items(), 1):
                print(f"{number}/{len(pending)} {experiment.folder}: {result.result()}", flush=True)
    except BadInputError as reason:
        print(f"all_runs: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
