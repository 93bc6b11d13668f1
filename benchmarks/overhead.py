"""What a regularized training step costs, against a plain one and against the usual ways to write it.

    python benchmarks/overhead.py --models resnet18_cifar --size 32 --batch 32
    python benchmarks/overhead.py --models mobilenet_v2 resnet50 --size 224 --batch 128 --device cuda --amp fp32 bf16

All contenders run in one process, in turn, on the same model and images, after a check that they compute the same
gradient. Times are medians over the repetitions, in ms, with the interquartile range; ratios are to the plain step of
the same run. A regularized step is 7 forward units against 3, so 7/3 = 2.33 is the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import StochasticDepth
from tqdm import tqdm

from interpgrad import InterpretableGradientLoss, graph
from interpgrad.errors import cos
from interpgrad.guided import guided_backward

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from markdown_table import markdown_table

LIMIT = 7 / 3
LAM = 0.1
CHECK = 2.0**13  # times the penalty the rest is nothing; in float16 as a GradScaler has it
FEWEST = 3  # repetitions, however long they take
CHECKED = {  # who computes the same as whom
    "interpgrad, coupled, shared forward": [
        "as usually written, three forwards",
        "one shared forward, stock double backward",
    ],
    "interpgrad, shared forward": ["interpgrad, plain call"],
}
Step = Callable[[], Tensor]


def build(name: str, classes: int = 10) -> nn.Module:
    """A torchvision or timm model by name.

    resnet18_cifar has a 3x3 stem and no pooling after it, small_resnet is the network of examples/quickstart.py.
    """
    import torchvision

    if name == "small_resnet":
        from classifiers import small_resnet

        return small_resnet(classes)
    if name == "resnet18_cifar":
        model = torchvision.models.resnet18(num_classes=classes)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return model
    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name, num_classes=classes)
    with contextlib.suppress(ImportError):
        import timm

        if timm.is_model(name):
            return timm.create_model(name, num_classes=classes)
    sys.exit(f"overhead: expected resnet18_cifar, small_resnet or a model of torchvision or timm, got {name!r}.")


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient.clamp(min=0) * (y > 0)


class GuidedReLU(nn.Module):
    """What the usual implementations put in the place of nn.ReLU."""

    def __init__(self, maximum: float | None = None) -> None:
        super().__init__()
        self.maximum = maximum

    def forward(self, x: Tensor) -> Tensor:
        y = _GuidedReLU.apply(x)
        return y if self.maximum is None else y.clamp(max=self.maximum)


@contextlib.contextmanager
def swapped_relus(model: nn.Module) -> Iterator[None]:
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, (nn.ReLU, nn.ReLU6))
    ]
    for parent, name, child in swapped:
        setattr(parent, name, GuidedReLU(6.0 if isinstance(child, nn.ReLU6) else None))
    try:
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def contenders(
    model: nn.Module, x: Tensor, y: Tensor, autocast: Callable[[], Any], activations: str, lam: float = LAM
) -> dict[str, Step]:
    """The forward passes and the loss of one step each; the backward pass is the caller's.

    The usual ways, and "coupled", are in the paper's reading: the gradient of the cross-entropy, through the
    statistics of the batch. The others are as the loss is by default.
    """
    reg = InterpretableGradientLoss(model, lam=lam, activations=activations)
    unguided = InterpretableGradientLoss(model, lam=lam, activations=activations, target="low_pass")
    lazy = InterpretableGradientLoss(model, lam=lam, activations=activations, every=4)
    paper = InterpretableGradientLoss(
        model, lam=lam, criterion="cross_entropy", batch_norm="coupled", activations=activations
    )

    def differentiable_attention() -> Any:  # the others have no double backward
        return sdpa_kernel(SDPBackend.MATH)

    def input_gradient(images: Tensor, logits: Tensor, create_graph: bool) -> Tensor:
        loss = F.cross_entropy(logits, y, reduction="sum")
        return torch.autograd.grad(loss, images, retain_graph=True, create_graph=create_graph)[0]

    def plain() -> Tensor:
        with autocast():
            return F.cross_entropy(model(x), y)

    def usual() -> Tensor:
        with autocast(), differentiable_attention():
            images = x.clone().requires_grad_()
            delta = input_gradient(images, model(images), create_graph=True)
            guided_images = x.clone().requires_grad_()
            with swapped_relus(model):
                guided = input_gradient(guided_images, model(guided_images), create_graph=False)
            return F.cross_entropy(model(x), y) + lam * cos(delta.float(), guided.float()).mean()

    def stock() -> Tensor:
        with autocast(), differentiable_attention():
            images = x.clone().requires_grad_()
            logits = model(images)
            with guided_backward(graph.operations(logits, until=images), activations):
                guided = input_gradient(images, logits, create_graph=False)
            delta = input_gradient(images, logits, create_graph=True)
            return F.cross_entropy(logits, y) + lam * cos(delta.float(), guided.float()).mean()

    def own_forward() -> Tensor:
        with autocast():
            return F.cross_entropy(model(x), y) + reg(x, y)

    def shared(regularizer: InterpretableGradientLoss = reg) -> Tensor:
        with autocast():
            with regularizer.shared_forward():
                logits = model(x)
            return F.cross_entropy(logits, y) + regularizer(x, y)

    return {
        "plain step": plain,
        "as usually written, three forwards": usual,
        "one shared forward, stock double backward": stock,
        "interpgrad, coupled, shared forward": lambda: shared(paper),
        "interpgrad, plain call": own_forward,
        "interpgrad, shared forward": shared,
        "interpgrad, shared forward, target low_pass": lambda: shared(unguided),
        "interpgrad, shared forward, every=4": lambda: shared(lazy),
    }


def gradient(model: nn.Module, step: Step) -> Tensor:
    model.zero_grad()
    step().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def wrong_gradients(model: nn.Module, steps: dict[str, Step], half: bool) -> dict[str, float]:
    """Contenders whose gradient is not that of the shared forward, and by how much (relative norm).

    Infinite of those that need more memory than there is.
    """
    off = {}
    for reference, names in CHECKED.items():
        expected = gradient(model, steps[reference])
        for name in names:
            try:
                off[name] = float((gradient(model, steps[name]) - expected).norm() / expected.norm())
            except torch.cuda.OutOfMemoryError:
                off[name] = math.inf
    return {name: value for name, value in off.items() if not value < (0.3 if half else 0.01)}


def peak_bytes(model: nn.Module, x: Tensor, step: Step) -> int:
    """Peak of a whole step: parameters, buffers, images, gradients and all that lives in between."""
    model.zero_grad()
    static = sum(each.numel() * each.element_size() for each in [*model.parameters(), *model.buffers(), x])
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step().backward()
        torch.cuda.synchronize()
        return static + torch.cuda.max_memory_allocated() - base
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return static + peak


def milliseconds(model: nn.Module, step: Step, steps: int, device: str) -> float:
    """The mean over `steps` consecutive steps."""
    start = time.perf_counter()
    for _ in range(steps):
        model.zero_grad()
        step().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / steps


def inputs(
    name: str, precision: str, layout_name: str, options: argparse.Namespace
) -> tuple[nn.Module, Tensor, Tensor, Callable[[], Any]]:
    """The model in training, images and labels on their device, and the context of the precision."""
    torch.manual_seed(0)
    layout = getattr(torch, {"contiguous": "contiguous_format"}.get(layout_name, layout_name))
    model = build(name).train().to(options.device, memory_format=layout)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device).to(memory_format=layout)
    y = torch.randint(10, (options.batch,), device=options.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0  # the contenders must compute the same
        if hasattr(module, "drop_prob"):  # timm's stochastic depth
            module.drop_prob = 0.0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("layer_scale"):  # so small that both input gradients are one up to rounding
            nn.init.ones_(parameter)

    def autocast() -> Any:
        return torch.autocast(options.device, dtype) if dtype else contextlib.nullcontext()

    return model, x, y, autocast


CONFIGURATION = ("model", "batch", "precision", "layout", "size", "device")
IN_GRAPHS = ("plain step", "interpgrad, shared forward")


def in_cuda_graphs(model: nn.Module, steps: dict[str, Step], repeat: int) -> dict[str, float]:
    """Medians in ms of whole steps as CUDA graphs, which spare the host: at small images it is what takes the time."""
    captured: dict[str, torch.cuda.CUDAGraph] = {}
    times: dict[str, list[float]] = {}
    for contender in IN_GRAPHS:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(2):
                model.zero_grad()
                steps[contender]().backward()
        torch.cuda.synchronize()
        model.zero_grad()
        captured[contender], times[contender] = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(captured[contender]):
            steps[contender]().backward()
    for _ in range(1 + repeat):
        for contender, step in captured.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step.replay()
            torch.cuda.synchronize()
            times[contender].append(1000 * (time.perf_counter() - start))
    model.zero_grad()
    return {contender: statistics.median(values[1:]) for contender, values in times.items()}


def measure(name: str, precision: str, layout_name: str, options: argparse.Namespace) -> dict[str, Any]:
    gc.collect()  # the model before this one
    model, x, y, autocast = inputs(name, precision, layout_name, options)
    steps = contenders(model, x, y, autocast, options.activations)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # single precision is compared in it
        checked = contenders(model, x, y, autocast, options.activations, lam=CHECK)
        wrong = wrong_gradients(model, checked, half=precision != "fp32")
    for contender in wrong:
        del steps[contender]
    if options.each_step:
        del steps["interpgrad, shared forward, every=4"]

    times: dict[str, list[float]] = {contender: [] for contender in steps}
    start = time.perf_counter()
    with tqdm(total=(1 + options.repeat) * len(steps), desc=name, leave=False) as progress:
        for repetition in range(1 + options.repeat):
            if repetition > FEWEST and time.perf_counter() - start > options.seconds:
                break
            for contender, step in steps.items():
                value = milliseconds(model, step, 4 if "every" in contender else 1, options.device)
                if repetition:  # the first warms up
                    times[contender].append(value)
                progress.update()
    rows = {}
    for contender, step in steps.items():
        low, median, high = statistics.quantiles(times[contender], n=4)
        peak = peak_bytes(model, x, step if "every" not in contender else steps["interpgrad, shared forward"])
        rows[contender] = {"ms": median, "iqr": high - low, "peak_mib": peak / 2**20}
    graphs = {}
    if options.device == "cuda" and precision != "fp16":  # whose scale is looked at on the host
        graphs = in_cuda_graphs(model, steps, options.repeat)
    plain = rows["plain step"]
    for row in rows.values():
        row["ratio"] = row["ms"] / plain["ms"]
        row["of_limit"] = LIMIT / row["ratio"]
        row["peak_ratio"] = row["peak_mib"] / plain["peak_mib"]
        row["images_per_s"] = 1000 * options.batch / row["ms"]
    return {
        "model": name,
        "size": options.size,
        "batch": options.batch,
        "layout": layout_name,
        "precision": precision,
        "repetitions": len(times["plain step"]),
        "device": options.device,
        "activations": options.activations,
        "rows": rows,
        "wrong": wrong,
        "in_cuda_graphs": graphs,
    }


def provenance(device: str) -> dict[str, Any]:
    """Where and with what the figures were measured."""
    import torchvision

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, CPU"
    return platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """One model's rows as a Markdown table."""
    rows = []
    for name, row in result["rows"].items():
        limit = "" if name == "plain step" or "every" in name else f"{row['of_limit']:.0%}"
        cells = [name, f"{row['ms']:.1f}", f"{row['iqr']:.1f}", f"{row['ratio']:.2f}", limit]
        rows.append([*cells, f"{row['peak_mib']:.0f}", f"{row['peak_ratio']:.2f}", f"{row['images_per_s']:.0f}"])
    for name, off in result["wrong"].items():
        rows.append([name, f"wrong gradient (off by {off:.0%})" if off < math.inf else "out of memory", *6 * [""]])
    headings = ["", "ms", "IQR", "ratio", "of the 7/3 limit", "peak MiB", "ratio", "images/s"]
    what = f"{result['model']}, {result['size']}², batch {result['batch']}, {result['layout']}, {result['precision']}"
    found = f"{what}\n\n{markdown_table(headings, rows)}"
    if result.get("in_cuda_graphs"):
        plain, shared = (result["in_cuda_graphs"][contender] for contender in IN_GRAPHS)
        found += f"\n\nIn CUDA graphs: plain step {plain:.1f} ms, shared forward {shared:.1f} ms, {shared / plain:.2f}."
    return found


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Ratios to the plain step as bars, the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [
        name for name in dict.fromkeys(name for result in results for name in result["rows"]) if name != "plain step"
    ]
    colours = ["#bbbbbb", "#88ccee", "#332288", "#44aa99", "#117733", "#999933", "#ddcc77"]  # Paul Tol's muted scheme
    figure, axis = plt.subplots(figsize=(1.6 + 2.6 * len(results), 4), layout="constrained")
    width = 0.8 / len(names)
    for position, (name, colour) in enumerate(zip(names, colours, strict=False)):
        values = [result["rows"].get(name, {"ratio": math.nan})["ratio"] for result in results]
        places = [index + (position - (len(names) - 1) / 2) * width for index in range(len(results))]
        bars = axis.bar(places, values, width * 0.92, label=name, color=colour)
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axis.axhline(LIMIT, color="black", linewidth=1, linestyle="--", label="limit 7/3")
    labels = [
        f"{each['model']}\n{each['size']}², {each['batch']}, {each['layout']}\n{each['precision']}" for each in results
    ]
    axis.set_xticks(range(len(results)), labels, fontsize=8)
    axis.set_ylabel("time per step / plain step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["resnet18_cifar"], help="torchvision or timm names (%(default)s)"
    )
    parser.add_argument("--size", type=int, default=32, help="height and width of the images (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="one size or several (32)")
    parser.add_argument("--repeat", type=int, default=10, help="timed repetitions, at least 2 (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--activations", default="all", choices=["relu", "all"], help="of the loss (%(default)s)")
    parser.add_argument("--each-step", action="store_true", help="leave out every=4")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no more repetitions of a model after so many")
    parser.add_argument("--amp", nargs="+", default=["fp32"], choices=["fp32", "bf16", "fp16"], help="autocast (fp32)")
    layouts = ["contiguous", "channels_last"]
    parser.add_argument("--layout", nargs="+", default=layouts[:1], choices=layouts, help="memory format (contiguous)")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--missing", action="store_true", help="leave out what the file already holds")
    parser.add_argument("--plot", type=Path, help="write a bar chart of all results in the run, or in the file")
    options = parser.parse_args()
    if options.repeat < 2:
        parser.error("expected --repeat of at least 2, the quartiles need them.")
    return options


def main() -> None:
    options = arguments()
    for name in options.models:
        build(name)  # an unknown name must not surface after an hour
    results = json.loads(options.json.read_text())["results"] if options.json and options.json.exists() else []
    stored = {tuple(each[key] for key in CONFIGURATION) for each in results}
    for configuration in itertools.product(options.models, options.batch, options.amp, options.layout):
        name, batch, precision, layout = configuration
        if options.missing and (*configuration, options.size, options.device) in stored:
            continue
        results.append(measure(name, precision, layout, argparse.Namespace(**vars(options) | {"batch": batch})))
        print(table(results[-1]), end="\n\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(provenance(options.device) | {"results": results}, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
