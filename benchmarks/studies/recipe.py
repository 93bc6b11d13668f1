"""The sweep behind the recipe: every setting of interest, several seeds, what matters most first.

    cd benchmarks/studies
    python recipe.py --json results/recipe.json
    python recipe.py --json results/recipe.json --groups object schedule     # these alone

One process per core, one thread each. Interrupted and started again, it runs what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from comparisons import randomized, smoothed
from jobs import run_missing

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from figures import evaluate
from images import digits_on_photographs
from quickstart import train
from training import CRITERIA, PAPER, PLAIN, RECIPE, Setting

EPOCHS = 8
WEIGHTS = (0.1, 0.3, 1.0, 0.03, 3.0, 0.0075)
BASE = Setting()  # the recipe, but for its schedule
OBJECTS = [Setting(lam, criterion) for criterion in CRITERIA for lam in WEIGHTS[:3]]
# name of a group -> its settings and seeds; a setting keeps the figures it has, whatever group they were made for
GROUPS: dict[str, tuple[list[Setting], int]] = {
    "object": ([PLAIN, RECIPE, PAPER, *OBJECTS], 3),
    "schedule": (
        [dataclasses.replace(BASE, every=every) for every in (2, 4, 8)]
        + [dataclasses.replace(BASE, start=1 - share) for share in (1 / 2, 1 / 3, 1 / 5)]
        + [Setting(lam, every=every, start=0.5) for every, lam in ((4, 0.3), (4, 1.0), (1, 1.0))],
        3,
    ),
    "five seeds": ([PLAIN, RECIPE, PAPER, *OBJECTS], 5),
    "weight": ([Setting(lam, criterion) for lam in WEIGHTS for criterion in CRITERIA], 3),
    "coupled": ([Setting(lam, criterion, batch_norm="coupled") for lam in WEIGHTS for criterion in CRITERIA], 3),
    "low-pass": ([dataclasses.replace(setting, low_pass=False) for setting in OBJECTS], 3),
    "warm-up": ([dataclasses.replace(setting, warmup=0.0) for setting in OBJECTS], 3),
    "all": (
        [
            Setting(lam, criterion, low_pass=low_pass, batch_norm=batch_norm, warmup=warmup)
            for batch_norm, warmup, low_pass, criterion, lam in itertools.product(
                ("frozen", "coupled"), (0.5, 0.0), (True, False), CRITERIA, WEIGHTS
            )
        ],
        3,
    ),
}


def measure(setting: Setting, seed: int) -> dict[str, Any]:
    """Both gradients' figures of one trained network; of the compared two, all there are."""
    images = digits_on_photographs(6000, 1000)
    (run,) = train(images, [setting], seed, EPOCHS)
    figures: dict[str, Any] = {name: evaluate(run.model, images, name) for name in ("log_prob", "logit")}
    if setting in (PLAIN, BASE, RECIPE):
        figures |= {"smoothed": smoothed(run.model, images), "randomized": randomized(run.model, images)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="results, added to after every network")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="(all, in this order)")
    parser.add_argument("--jobs", type=int, help="processes (one per core)")
    options = parser.parse_args()
    todo = [
        (str(setting), seed, (setting,))
        for settings, seeds in (GROUPS[name] for name in options.groups)
        for seed, setting in itertools.product(range(seeds), settings)
    ]
    run_missing(options.json, todo, measure, options.jobs, {"epochs": EPOCHS})


if __name__ == "__main__":
    main()
