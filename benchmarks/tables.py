"""Write the tables of README and docs from the stored results, between their markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

RESULTS, STUDIES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "studies"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks"), str(STUDIES)]
import study_tables  # noqa: E402
from markdown_table import markdown_table  # noqa: E402


def overhead(stored: dict[str, Any]) -> str:
    """Time of a training step as a ratio to the plain one, contenders by configurations."""
    results = stored["results"]
    names = list(results[0]["rows"])[1:]
    headings = [*(name.removeprefix("interpgrad, ") for name in names), "peak memory"]
    lines = []
    for each in results:
        lines.append([f"{each['model']}, {each['size']}², batch {each['batch']}{_layout(each)}", *_ratios(each, names)])
        lines[-1].append(f"{each['rows']['interpgrad, shared forward']['peak_ratio']:.2f}")
    return (
        f"{markdown_table(['', *headings], lines)}\n\n"
        f"{_measured_on(stored)}, fp32; medians of alternating steps, ratios to a plain step. The limit is 7/3 = 2.33."
    )


def _measured_on(stored: dict[str, Any]) -> str:
    return f"Measured on {stored['date']}: {stored['machine']}, {stored['threads']} threads, torch {stored['torch']}"


def _title(each: dict[str, Any]) -> str:
    return f"{each['model']}, {each['size']}², batch {each['batch']}, {each['precision']}{_layout(each)}"


def _layout(each: dict[str, Any]) -> str:
    return ", channels_last" if each["layout"] == "channels_last" else ""


def _ratios(each: dict[str, Any], names: Iterable[str]) -> list[str]:
    """To the plain step, of these contenders, or why there is none."""
    rows, wrong = each["rows"], each["wrong"]
    why = {name: "nan" if math.isnan(off) else "wrong gradient" for name, off in wrong.items()}
    return [f"{rows[name]['ratio']:.2f}" if name in rows else why[name] for name in names]


def overhead_cuda(stored: dict[str, Any]) -> str:
    """The same on a GPU, where whole steps as CUDA graphs show what the kernels take without the host."""
    names = [
        "as usually written, three forwards",
        "one shared forward, stock double backward",
        "interpgrad, coupled, shared forward",
        "interpgrad, plain call",
        "interpgrad, shared forward",
    ]
    headings = ["plain step", *(name.removeprefix("interpgrad, ") for name in names)]
    headings += ["plain step in a CUDA graph", "shared forward in a CUDA graph", "peak memory"]
    lines = []
    models = [each["model"] for each in stored["results"]]
    for each in sorted(stored["results"], key=lambda each: models.index(each["model"])):
        lines.append(
            [_title(each), f"{each['rows']['plain step']['ms']:.1f} ms", *_ratios(each, names), *_in_a_graph(each)]
        )
        lines[-1].append(f"{each['rows']['interpgrad, shared forward']['peak_ratio']:.2f}")
    return (
        f"{markdown_table(['', *headings], lines)}\n\n"
        f"Measured on {stored['date']}: {stored['machine']}, torch {stored['torch']}; medians of alternating steps, "
        f"ratios to the plain step of the same kind. The limit is 7/3 = 2.33."
    )


def transformers(stored: dict[str, Any]) -> str:
    """A step before and after a change, each to the plain step of its own run, beside stock's double backward."""
    names = "one shared forward, stock double backward", "interpgrad, shared forward"
    before, now = (stored[label]["results"] for label in ("before", "now"))
    lines = []
    for old, new in zip(before, now, strict=True):
        memory = [f"{each['rows'][names[1]]['peak_ratio']:.2f}" for each in (old, new)]
        ratios = [*_ratios(new, names[:1]), *_ratios(old, names[1:]), *_ratios(new, names[1:])]
        lines.append([_title(new), *ratios, *memory])
    headings = ["", "stock double backward", "before", "now", "memory, before", "memory, now"]
    return (
        f"{markdown_table(headings, lines)}\n\n"
        f"{_measured_on(stored['now'])}; medians of alternating steps, ratios to a plain step. "
        f"Before is commit {stored['before']['commit']}. The limit is 7/3."
    )


def layers(stored: dict[str, Any]) -> str:
    """Microseconds of a layer's four passes together, stock's and this package's before and after a change."""
    lines = []
    for name, kinds in stored["now"]["microseconds"].items():
        before = stored["before"]["microseconds"][name]["interpgrad"]
        lines.append([name, *(f"{sum(each):.0f}" for each in (kinds["stock"], before, kinds["interpgrad"]))])
    return markdown_table(["microseconds", "stock", "before", "now"], lines)


def kernels(stored: dict[str, Any]) -> str:
    """The operations whose kernels take more than their share."""
    from kernels import table

    return "\n\n".join(table(result, rows=6) for result in stored["results"])


def _in_a_graph(each: dict[str, Any]) -> list[str]:
    """The plain step's time, and the ratio to it of the regularized one."""
    if not each["in_cuda_graphs"]:
        return ["", ""]
    plain, regularized = each["in_cuda_graphs"].values()
    return [f"{plain:.1f} ms", f"{regularized / plain:.2f}"]


def costs(stored: dict[str, Any]) -> str:
    """The same, in short: three configurations, as the loss is meant to be used."""
    usual, call, shared = "as usually written, three forwards", "interpgrad, plain call", "interpgrad, shared forward"
    columns = ["as usually written", "plain call", "shared forward", "the same, in a CUDA graph", "recipe"]
    columns += ["memory, plain call", "memory, shared forward"]
    lines, in_the_papers_reading = [], []
    for configuration in (
        {"model": "resnet50", "batch": 128, "precision": "fp32", "layout": "contiguous"},
        {"model": "resnet50", "batch": 128, "precision": "bf16", "layout": "channels_last"},
        {"model": "resnet18_cifar", "batch": 512, "precision": "bf16", "layout": "channels_last"},
    ):
        (each,) = [each for each in stored["results"] if configuration.items() <= each.items()]
        rows = each["rows"]
        in_the_papers_reading.append(rows["interpgrad, coupled, shared forward"]["ratio"])
        cells = _ratios(each, (usual, call, shared))
        # The recipe has the loss at one of four steps of the second half.
        cells += [_in_a_graph(each)[1], f"{1 + (rows[shared]['ratio'] - 1) / 8:.2f}"]
        cells += [f"{rows[name]['peak_ratio']:.2f}" for name in (call, shared)]
        lines.append([f"{each['model']}, {each['size']}², {each['batch']}, {each['precision']}{_layout(each)}", *cells])
    low, high = min(in_the_papers_reading), max(in_the_papers_reading)
    return (
        f"{markdown_table(['', *columns], lines)}\n\n{stored['machine']}, {stored['date']}. *As usually written*: the "
        f"paper's reading, a forward pass for each gradient; here, shared, that takes {low:.2f} to {high:.2f}."
    )


def evaluation(stored: dict[str, Any]) -> str:
    """Speed of maps and metrics against peers."""
    from evaluation import table

    return "\n".join(
        [
            table(stored["results"]),
            "",
            f"{_measured_on(stored)}.",
        ]
    )


def zoo(stored: dict[str, Any]) -> str:
    """The smallest network of every family: how far the loss is off, and what it costs."""
    names, lines = ("delta", "guided", "penalty", "frozen"), []
    for family, each in stored["results"].items():
        if "ratio" in each:
            cells = [each["activations"], *(f"{each[name]:.0e}" for name in names), f"{each['ratio']:.2f}"]
        else:
            cells = [f"not measured: {each['error']}", *[""] * 5]
        lines.append([family, each["model"], *cells])
    measured = [each for each in stored["results"].values() if "ratio" in each]
    right = sum(max(each[name] for name in names) < 1e-6 for each in measured)
    families = f"of {len(stored['families'])}" if "families" in stored else "so far, timm's being incomplete"
    foot = (
        f"{len(measured)} families measured {families}, of which {right} agree to 1e-6. "
        f"torch {stored['torch']}, torchvision {stored['torchvision']}, timm {stored['timm']}."
    )
    headings = [
        "family",
        "model",
        "activations met",
        "δ off by",
        "δᴳ off by",
        "penalty's gradient off by",
        "all of them, frozen",
        "operations",
    ]
    return f"{markdown_table(headings, lines)}\n\n{foot}"


# The assumptions of docs/explanation/scaling.md: images of each GPU, what it sends and receives.
IMAGES = 128

GPUS = {8: (200e9, 20e-6), 64: (25e9, 50e-6)}  # bytes per second, seconds per collective


def counted(stored: dict[str, Any]) -> str:
    """Operations, memory and traffic of a step."""
    rows, plain = stored["rows"], stored["rows"]["plain step"]["gflop"]
    columns = ["GFLOP per image", "ratio", "memory per image", "fixed", "DDP", "FSDP2 gathers", "FSDP2 reduces"]
    lines = []
    for name, row in rows.items():
        sent, sharded = row["sent"]["DDP"], row["sent"]["FSDP2"]
        cells = [name, f"{row['gflop']:.2f}", f"{row['gflop'] / plain:.3f}"]
        cells += [f"{row['mb_per_image']:.0f} MB", f"{row['mb_fixed']:.0f} MB"]
        cells.append(f"{sent['megabytes']['allreduce']:.1f} MB")
        for kind in ("allgather", "reduce_scatter"):
            cells.append(f"{sharded['calls'][kind]} x, {sharded['megabytes'][kind]:.1f} MB")
        lines.append(cells)
    return markdown_table(["", *columns], lines)


def worked(stored: dict[str, Any]) -> str:
    """Milliseconds of a step and its communication under the assumptions."""
    rows = stored["rows"]
    configuration = {"model": "resnet50", "batch": IMAGES, "precision": "fp32", "layout": "channels_last"}
    measured = json.loads((RESULTS / "overhead-cuda.json").read_text())["results"]
    (timed,) = [each["rows"] for each in measured if configuration.items() <= each.items()]
    milliseconds = {name: row["ms"] for name, row in timed.items()}
    base = milliseconds["plain step"]
    milliseconds["every=4, mean"] = (milliseconds["interpgrad, shared forward"] + 3 * base) / 4
    lazy = (rows["shared forward"]["gflop"] + 3 * rows["plain step"]["gflop"]) / 4
    steps = [
        ("plain step", rows["plain step"]["gflop"], "plain step", "plain step"),
        ("plain call", rows["plain call"]["gflop"], "plain call", "interpgrad, plain call"),
        ("shared forward", rows["shared forward"]["gflop"], "shared forward", "interpgrad, shared forward"),
        ("every=4, mean", lazy, "shared forward", "every=4, mean"),
    ]
    columns = ["computing: counted", "measured", "memory"]
    columns += [f"{wrapper}, {gpus} GPUs" for wrapper in ("all-reduce", "FSDP2") for gpus in GPUS]
    lines = []
    for name, gflop, kind, contender in steps:
        cells = [name, f"{base * gflop / rows['plain step']['gflop']:.1f} ms"]
        cells.append(f"{milliseconds[contender]:.1f} ms")
        cells.append(f"{(IMAGES * rows[kind]['mb_per_image'] + rows[kind]['mb_fixed']) / 1000:.1f} GB")
        sent = rows[kind]["sent"]
        for wrapper, factor in (("DDP", 2), ("FSDP2", 1)):
            for gpus, (speed, _) in GPUS.items():
                share = factor * (gpus - 1) / gpus * sum(sent[wrapper]["megabytes"].values()) * 1e6
                cells.append(f"{1000 * share / speed:.1f} ms")
        lines.append(cells)
    return markdown_table(["", *columns], lines)


def synchronized(stored: dict[str, Any]) -> str:
    """What SyncBatchNorm adds to the loss's part of a step."""
    sent = stored["rows"]["shared forward"]["sent"]["SyncBatchNorm"]
    calls, megabytes = sent["calls"]["allreduce"], sent["megabytes"]["allreduce"]
    times = " and ".join(f"{1000 * calls * delay:.0f} ms on {gpus}" for gpus, (_, delay) in GPUS.items())
    return f"{calls} reductions of {megabytes:.1f} MB together: at one delay each, {times} GPUs."


def targets_cuda(stored: dict[str, Any]) -> str:
    """Time of a step with and without a guided pass, as ratios to the plain step."""
    names = ["interpgrad, shared forward", "interpgrad, shared forward, target low_pass"]
    lines = [
        [f"{each['model']}, {each['size']}², batch {each['batch']}, {each['precision']}{_layout(each)}"]
        + [f"{each['rows']['plain step']['ms']:.1f} ms", *_ratios(each, names)]
        + [f"{each['rows'][name]['peak_ratio']:.2f}" for name in names]
        for each in stored["results"]
    ]
    headings = ["", "plain step", "guided", "low_pass", "memory, guided", "memory, low_pass"]
    return (
        f"{markdown_table(headings, lines)}\n\n{stored['machine']}, torch {stored['torch']}, {stored['date']}; medians "
        "of alternating steps, shared forward. The processor was slower than that of the table above: in bf16 "
        "steps wait for Python."
    )


# (file, marker) -> how to write it, and from what
TABLES = {key: (render, STUDIES / "results" / source) for key, (render, source) in study_tables.TABLES.items()} | {
    key: (render, RESULTS / source)
    for key, (render, source) in {
        ("README.md", "costs"): (costs, "overhead-cuda.json"),
        ("docs/method-card.md", "costs"): (costs, "overhead-cuda.json"),
        ("docs/evidence/cost.md", "overhead-cuda"): (overhead_cuda, "overhead-cuda.json"),
        ("docs/evidence/cost.md", "targets-cuda"): (targets_cuda, "targets-cuda.json"),
        ("docs/evidence/cost.md", "kernels-cuda"): (kernels, "kernels-cuda.json"),
        ("docs/evidence/cost.md", "overhead"): (overhead, "overhead-cpu.json"),
        ("docs/evidence/cost-transformers.md", "transformers"): (transformers, "transformers-cpu.json"),
        ("docs/evidence/cost-transformers.md", "layers"): (layers, "layers-cpu.json"),
        ("docs/evidence/evaluation.md", "evaluation"): (evaluation, "evaluation-cpu.json"),
        ("docs/evidence/zoo.md", "zoo"): (zoo, "zoo.json"),
        ("docs/explanation/scaling.md", "counted"): (counted, "scaling.json"),
        ("docs/explanation/scaling.md", "worked"): (worked, "scaling.json"),
        ("docs/explanation/scaling.md", "synchronized"): (synchronized, "scaling.json"),
    }.items()
}


def rendered(file: str) -> str:
    """The file with its tables as the stored results have them."""
    text = (ROOT / file).read_text()
    for (name, marker), (render, source) in TABLES.items():
        if name == file:
            body = render(json.loads(source.read_text()))
            pattern = rf"(<!-- {marker} -->\n).*?(\n<!-- /{marker} -->)"
            text, count = re.subn(pattern, lambda match, body=body: match[1] + body + match[2], text, flags=re.DOTALL)
            if count != 1:
                raise SystemExit(
                    f"tables: expected the markers of {marker!r} once in {file}, found them {count} times."
                )
    return text


if __name__ == "__main__":
    for file in dict.fromkeys(name for name, _ in TABLES):
        (ROOT / file).write_text(rendered(file))
