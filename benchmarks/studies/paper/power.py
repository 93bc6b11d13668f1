"""Which of the slides' differences could have been seen at all, at the spread between seeds."""

from __future__ import annotations

import math

from markdown_table import markdown_table
from runs import name_of
from scipy import stats
from slides import ACCURACY, OF_MAPS
from summary import COLUMNS, Stored

POWER = """## What seeds could have shown

Two single runs, as in the slides, differ by chance: by more than the value under "1 seed" in one of twenty
comparisons, at the deviation between our seeds. With k seeds of each, the smallest difference that a t-test at 5%
finds; ✓ where the slides' is larger."""


def power(stored: Stored) -> str:
    """Which of the slides' differences so many seeds could show, at the spread between our seeds."""
    base = stored.get(name_of("resnet18", "without"), {})
    claims = {"accuracy": ACCURACY["resnet18"]}
    claims |= {
        f"grad_cam {metric}": tuple(OF_MAPS["resnet18"]["grad_cam"][side][index] for side in (0, 1))
        for index, metric in enumerate(COLUMNS)
    }
    rows = []
    for figure, (baseline, ours) in claims.items():
        deviation = base.get(figure, {}).get("deviation")
        cells = [figure.replace("grad_cam", "Grad-CAM"), f"{baseline:.2f} → {ours:.2f} ({ours - baseline:+.2f})"]
        if deviation is None:
            rows.append([*cells, *["missing"] * 5])
            continue
        least = {1: float(stats.norm.ppf(0.975)) * deviation * math.sqrt(2)}
        least |= {k: float(stats.t.ppf(0.975, 2 * k - 2)) * deviation * math.sqrt(2 / k) for k in (3, 5, 10)}
        seen = [f"{value:.2f}{' ✓' if abs(ours - baseline) > value else ''}" for value in least.values()]
        rows.append([*cells, f"{deviation:.2f}", *seen])
    headings = ["ResNet-18", "slides, one run each", "deviation between our seeds", "1 seed"]
    headings += [f"{k} seeds" for k in (3, 5, 10)]
    return markdown_table(headings, rows)
