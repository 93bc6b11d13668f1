"""The sweep behind the defaults of quickstart.py: lambda x criterion x low-pass, three seeds each.

    python examples/sweep.py --json sweep.json       # about half an hour on two cores
    python examples/sweep.py --json sweep.json       # again: runs what is missing, prints the table

One process per core, one thread each: the times are not comparable to anything and are left out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from images import digits_on_photographs
from quickstart import PLAIN, Setting, evaluate, table, train
from tqdm import tqdm

SEEDS = (0, 1, 2)
SETTINGS = [
    PLAIN,
    Setting(0.0075, "cross_entropy", low_pass=False, batch_norm="coupled"),  # the paper's
    *(Setting(0.3, criterion, batch_norm="coupled") for criterion in ("logit", "log_prob")),
    *(Setting(0.3, criterion) for criterion in ("cross_entropy", "logit", "log_prob")),
    Setting(1.0, "log_prob"),
]


def measure(setting: Setting, seed: int) -> dict[str, float]:
    """Figures of one trained network: of the logit's gradient the cosine, of the log-probability's the rest."""
    torch.set_num_threads(1)
    images = digits_on_photographs(6000, 1000)
    (run,) = train(images, [setting], seed, epochs=8, quiet=True)
    of_log_prob, of_logit = (evaluate(run, images, criterion) for criterion in ("log_prob", "logit"))
    del of_log_prob["ms/step"]
    return of_log_prob | {"cosine of the logit": of_logit["cosine"]}


def title(setting: Setting) -> str:
    if not setting.lam:
        return "without"
    return f"{setting.batch_norm}, {setting.criterion}, λ = {setting.lam:g}" + (
        ", low-pass" if setting.low_pass else ""
    )


def missing(results: dict[str, dict[str, dict[str, float]]]) -> Iterator[tuple[Setting, int]]:
    for seed in SEEDS:
        for setting in SETTINGS:
            if str(seed) not in results.get(title(setting), {}):
                yield setting, seed


def main() -> None:
    parser = argparse.ArgumentParser(description="The sweep behind the defaults of quickstart.py.")
    parser.add_argument("--json", type=Path, required=True, help="results, added to after every network")
    options = parser.parse_args()
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else {}
    todo = list(missing(results))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        pending = [(setting, seed, pool.submit(measure, setting, seed)) for setting, seed in todo]
        for setting, seed, future in tqdm(pending, desc="networks"):
            results.setdefault(title(setting), {})[str(seed)] = future.result()
            stored = {"torch": torch.__version__, "settings": [asdict(each) for each in SETTINGS], "results": results}
            options.json.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    print(table({name: list(seeds.values()) for name, seeds in results.items()}))


if __name__ == "__main__":
    main()
