"""What the runs come to: means over seeds, and differences to the runs without the loss, with intervals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from compare import interval, percent
from runs import network_of
from scipy import stats
from slides import OF_MAPS

COLUMNS = ("AD", "AG", "AI", "INS", "DEL")
Stored = dict[str, Any]  # name of a run -> figure, such as "accuracy" or "grad_cam AD" -> statistics


def summarized(runs: dict[str, Any]) -> Stored:
    """Of each run: mean and deviation over seeds, and of the paired differences to the run without, with intervals."""
    stored: Stored = {}
    for name, seeds in sorted(runs.items()):
        base = runs.get(f"{network_of(name)}_without", {})
        common = [seed for seed in seeds if seed in base and not name.endswith("_without")]
        row: dict[str, Any] = {}
        accuracies = {seed: 100 * each["run"]["accuracy"] for seed, each in seeds.items()}
        row["accuracy"] = _over_seeds(list(accuracies.values()))
        if common:
            found = [accuracies[seed] - 100 * base[seed]["run"]["accuracy"] for seed in common]
            row["accuracy"] |= _paired(found)
        for method in OF_MAPS["resnet18"]:
            for metric in COLUMNS:
                values = percent(seeds, list(seeds), method, metric)
                row[f"{method} {metric}"] = _over_seeds(values.mean(1).tolist())
                if common:
                    differences = percent(seeds, common, method, metric) - percent(base, common, method, metric)
                    mean, low, high = interval(differences)
                    row[f"{method} {metric}"] |= {"difference": [mean, low, high]}
                    row[f"{method} {metric}"] |= {"differences": differences.mean(1).tolist()}
        options = next(iter(seeds.values()))["run"]["options"]
        options |= {"data": Path(options["data"]).name}  # wherever that was
        row["about"] = {"seeds": len(seeds), "options": options, "cosine": _cosine(seeds)}
        stored[name] = row
    return stored


def _cosine(seeds: dict[str, Any]) -> dict[str, float]:
    return _over_seeds([each["figures"]["log_prob"]["cosine"] for each in seeds.values()])


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def _paired(found: list[float]) -> dict[str, Any]:
    """The mean difference with Student's 95% interval over seeds; of one seed there is none."""
    half = math.inf
    if len(found) > 1:
        half = float(stats.t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / math.sqrt(len(found))
    mean = statistics.fmean(found)
    return {"difference": [mean, mean - half, mean + half], "differences": found}
