"""What Python costs a replaced layer: microseconds on small tensors, where the kernels take next to nothing.

    python benchmarks/layers.py --json benchmarks/results/layers-cpu.json --label now

Of each layer, stock and inside of fast_double_backward: its forward pass, a first backward pass (as the guided one and
the user's own are), one that makes a graph (delta's), and the backward pass through both. The lower quartile of many.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from overhead import provenance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from interpgrad import fast_double_backward

from markdown_table import markdown_table  # isort: skip  (overhead knows where it is)

STAGES = ("forward", "first", "first, on a graph", "double")
IMAGES, TOKENS = (8, 16, 4, 4), (1, 2, 16, 8)
Layer = Callable[..., Tensor]
LAYERS: dict[str, tuple[Layer, tuple[int, ...], list[tuple[int, ...]]]] = {
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), IMAGES, [(16, 16, 3, 3)]),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), IMAGES, [(16,), (16,)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), TOKENS, [(8,), (8,)]),
    "group norm": (lambda x, w, b: F.group_norm(x, 4, w, b), IMAGES, [(16,), (16,)]),
    "attention": (F.scaled_dot_product_attention, TOKENS, [TOKENS, TOKENS]),
    "ReLU": (F.relu, IMAGES, []),
    "GELU": (F.gelu, IMAGES, []),
    "max pooling": (lambda x: F.max_pool2d(x, 2), IMAGES, []),
    "two operations left to stock": (lambda x, w: x * 2 + w, IMAGES, [(16, 1, 1)]),
}


def measure(name: str, fast: bool, repeat: int) -> list[float]:
    layer, shape, shapes = LAYERS[name]
    leaf, parameters = torch.randn(shape).requires_grad_(), [torch.randn(each).requires_grad_() for each in shapes]
    g = torch.randn_like(layer(leaf, *parameters)).requires_grad_()
    of_delta, of_y = torch.randn_like(leaf), torch.randn_like(g)
    times: list[list[float]] = [[] for _ in STAGES]
    for _ in range(repeat):
        x = leaf.view_as(leaf)
        with fast_double_backward() if fast else sdpa_kernel(SDPBackend.MATH) if name == "attention" else nullcontext():
            clock = [time.perf_counter()]
            y = layer(x, *parameters)
            clock.append(time.perf_counter())
        torch.autograd.grad(y, leaf, g, retain_graph=True)
        clock.append(time.perf_counter())
        (delta,) = torch.autograd.grad(y, leaf, g, create_graph=True)
        clock.append(time.perf_counter())
        torch.autograd.backward([delta, y], [of_delta, of_y])
        clock.append(time.perf_counter())
        for each in (leaf, g, *parameters):
            each.grad = None
        for stage, start, end in zip(times, clock, clock[1:], strict=False):
            stage.append(1e6 * (end - start))
    return [sorted(stage)[repeat // 4] for stage in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--label", default="now", help="under this name (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    lines = []
    for name in LAYERS:
        found[name] = {kind: measure(name, kind == "interpgrad", options.repeat) for kind in ("stock", "interpgrad")}
        for kind, values in found[name].items():
            lines.append([name, kind, *(f"{each:.0f}" for each in values), f"{sum(values):.0f}"])
    print(markdown_table(["microseconds", "", *STAGES, "together"], lines))
    if options.json:
        stored = json.loads(options.json.read_text()) if options.json.exists() else {}
        stored[options.label] = provenance("cpu") | {"stages": STAGES, "microseconds": found}
        options.json.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
