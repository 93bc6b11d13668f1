"""Which operations stand between a regularized step and the limit: their time on a GPU in it and in a plain step.

    python benchmarks/kernels.py --models resnet18_cifar --size 32 --batch 512 --amp bf16 --layout channels_last

A regularized step should take 7/3 of a plain step's time in each operation. What an operation takes beyond that is its
excess; what passes while no kernel runs is the row "idle". In ms per step, the largest excess first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from overhead import IN_GRAPHS as CONTENDERS
from overhead import LIMIT, Step, contenders, inputs, provenance
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

from markdown_table import markdown_table  # isort: skip  (overhead knows where it is)

STEPS = 5


def milliseconds(model: nn.Module, step: Step) -> dict[str, float]:
    """Of each operation that starts kernels, the time of these in one step; and "idle"."""

    def steps() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            model.zero_grad()
            step().backward()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start) / STEPS

    steps()
    wall = steps()  # a profiler slows it down
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        steps()
    found = {
        event.key: event.self_device_time_total / 1000 / STEPS
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CPU and event.self_device_time_total > 0
    }
    return found | {"idle": max(0.0, wall - sum(found.values()))}


def measure(name: str, precision: str, layout: str, options: argparse.Namespace) -> dict[str, Any]:
    model, x, y, autocast = inputs(name, precision, layout, options)
    steps = contenders(model, x, y, autocast, "all")
    configuration = {"model": name, "size": options.size, "batch": options.batch}
    configuration |= {"precision": precision, "layout": layout}
    return configuration | {"ms": {contender: milliseconds(model, steps[contender]) for contender in CONTENDERS}}


def table(result: dict[str, Any], rows: int = 12) -> str:
    """The operations of the largest excess, and the sum of all."""
    plain, regularized = (result["ms"][contender] for contender in CONTENDERS)
    lines = []
    for name in plain | regularized:
        before, after = plain.get(name, 0.0), regularized.get(name, 0.0)
        lines.append((name, before, after, after - LIMIT * before))
    lines.sort(key=lambda line: -line[-1])
    total = tuple(sum(column) for column in list(zip(*lines, strict=True))[1:])
    shown = [*lines[:rows], ("together", *total)]
    cells = [[name, *(f"{value:.2f}" for value in values)] for name, *values in shown]
    what = ", ".join(str(result[part]) for part in ("model", "size", "batch", "precision", "layout"))
    return f"{what}\n\n{markdown_table(['ms', 'plain', 'regularized', 'beyond 7/3'], cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18_cifar"], help="as overhead.py (%(default)s)")
    parser.add_argument("--size", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--amp", nargs="+", default=["bf16"], choices=["fp32", "bf16", "fp16"], help="(bf16)")
    layouts = ["contiguous", "channels_last"]
    parser.add_argument("--layout", nargs="+", default=layouts[1:], choices=layouts, help="(channels_last)")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    options = parser.parse_args()
    options.device = "cuda"
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, torch.cuda.is_available() says there is none.")
    results = json.loads(options.json.read_text())["results"] if options.json and options.json.exists() else []
    for configuration in itertools.product(options.models, options.amp, options.layout):
        results.append(measure(*configuration, options))
        print(table(results[-1]), end="\n\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(provenance("cuda") | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
