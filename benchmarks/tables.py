"""Write the tables of README and docs from the stored results, between their markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scipy import stats

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "paper"), str(ROOT / "benchmarks")]
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
        f"Measured on {stored['date']}: {stored['machine']}, {stored['threads']} threads, torch {stored['torch']}, "
        f"fp32; medians of alternating steps, ratios to a plain step. The limit is 7/3 = 2.33."
    )


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
        title = f"{each['model']}, {each['size']}², batch {each['batch']}, {each['precision']}{_layout(each)}"
        lines.append([title, f"{each['rows']['plain step']['ms']:.1f} ms", *_ratios(each, names), *_in_a_graph(each)])
        lines[-1].append(f"{each['rows']['interpgrad, shared forward']['peak_ratio']:.2f}")
    return (
        f"{markdown_table(['', *headings], lines)}\n\n"
        f"Measured on {stored['date']}: {stored['machine']}, torch {stored['torch']}; medians of alternating steps, "
        f"ratios to the plain step of the same kind. The limit is 7/3 = 2.33."
    )


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


def gains(stored: dict[str, Any]) -> str:
    """What the recipe changes, on digits and on photographs: differences by seed, with intervals over the seeds."""
    digits, without = stored["rows"], "without"
    (recipe,) = digits.keys() - {without}
    photographs = json.loads((RESULTS / "cifar10-resnet18.json").read_text())["figures"]
    found = {
        "digits on photographs": [digits[without], digits[recipe]],
        "photographs (CIFAR-10, ResNet-18)": [
            [each["log_prob"] for _, each in sorted(photographs[name].items())]
            for name in ("resnet18_without", "resnet18_recipe")
        ],
    }
    columns = {"accuracy": "accuracy", "cosine": "cos(δ, δᴳ)", "smooth": "smoothness", "on digit": "δ on the digit"}
    lines = []
    for title, (before, after) in found.items():
        cells = [
            _change([each[name] for each in before], [each[name] for each in after]) if name in before[0] else ""
            for name in columns
        ]
        lines.append([title, *cells])
    return markdown_table(["with the recipe", *columns.values()], lines)


def _change(before: list[float], after: list[float]) -> str:
    """The mean before and after, and the 95% interval of the difference, Student's over the seeds."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    middle, seeds = statistics.fmean(differences), len(differences)
    half = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(differences) / math.sqrt(seeds)
    change = f"{statistics.fmean(before):.3f} → {statistics.fmean(after):.3f}"
    return f"{change} ({middle:+.3f}, {middle - half:+.3f} to {middle + half:+.3f})"


def evaluation(stored: dict[str, Any]) -> str:
    """Speed of maps and metrics against peers."""
    from evaluation import table

    return "\n".join(
        [
            table(stored["results"]),
            "",
            f"Measured on {stored['date']}: {stored['machine']}, {stored['threads']} threads, torch {stored['torch']}.",
        ]
    )


def quickstart(stored: dict[str, Any]) -> str:
    """The table of the main job."""
    from figures import table

    return table(stored["rows"])


def groups(*names: str) -> Callable[[dict[str, Any]], str]:
    """These groups of the sweep, each network beside the one of the same seed without the loss."""

    def render(stored: dict[str, Any]) -> str:
        from figures import both_gradients, paired_table
        from sweep import GROUPS, PLAIN

        titles = [str(PLAIN), *(str(setting) for name in names for setting in GROUPS[name][0])]
        found = stored["results"]
        rows = {
            title: {seed: both_gradients(figures) for seed, figures in sorted(found[title].items())}
            for title in dict.fromkeys(titles)
            if title in found
        }
        absent = [title for title in dict.fromkeys(titles) if title not in found]
        return paired_table(rows, str(PLAIN)) + (f"\n\nNot run yet: {'; '.join(absent)}." if absent else "")

    return render


def effect(group: str) -> Callable[[dict[str, Any]], str]:
    """Of a group that differs in one thing from the objects: each beside the same setting and seed with that thing."""

    def render(stored: dict[str, Any]) -> str:
        from figures import HEADINGS, both_gradients, change
        from sweep import GROUPS, OBJECTS

        found, lines = stored["results"], []
        names = list(both_gradients(found["without"]["0"]))
        for before, after in zip(OBJECTS, GROUPS[group][0], strict=True):
            old, new = (found.get(str(setting), {}) for setting in (before, after))
            seeds = sorted(old.keys() & new.keys())
            pairs = [(both_gradients(old[seed]), both_gradients(new[seed])) for seed in seeds]
            cells = [change(name, [(a[name], b[name]) for a, b in pairs]) for name in names if pairs]
            lines.append([str(after), str(len(seeds)), *cells])
        return markdown_table(["", "seeds", *(HEADINGS[each] for each in names)], lines)

    return render


def averaged(stored: dict[str, Any]) -> str:
    """What averaging over noisy images adds on the digits, and random weights change; over seeds."""
    from figures import HEADINGS, SAMPLES, worth
    from sweep import BASE, PLAIN, RECIPE

    found = {
        str(setting): [each for _, each in sorted(stored["results"][str(setting)].items()) if "smoothed" in each]
        for setting in (PLAIN, RECIPE, BASE)
    }

    def curve(title: str, name: str) -> list[float]:
        seeds = (each["smoothed"][name] for each in found[title])
        return [statistics.fmean(values) for values in zip(*seeds, strict=True)]

    lines = []
    for title, seeds in found.items():
        cells = [title, str(len(seeds)), _over_seeds(each["smoothed"]["own"][SAMPLES.index(8)] for each in seeds)]
        for name in ("insertion", "pointing"):
            cells.append(_over_seeds(each["smoothed"][name][0] for each in seeds))
            cells.append(f"{worth(curve(str(PLAIN), name), curve(title, name)[0]):.1f}")
        cells += [_over_seeds(each["randomized"][f"cosine, {layers}"] for each in seeds) for layers in RANDOMIZED]
        lines.append(cells)
    headings = ["", "seeds", HEADINGS["own"], HEADINGS["insertion"], "in samples", HEADINGS["pointing"], "in samples"]
    headings += [f"{HEADINGS['random']}, {layers}" for layers in RANDOMIZED]
    return markdown_table(headings, lines)


RANDOMIZED = ("last layer", "all layers")


def _over_seeds(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def cifar10_gradients(stored: dict[str, Any]) -> str:
    """All of CIFAR-10: both gradients."""
    from compare import gradients_table

    return gradients_table(stored)


def cifar10_maps(stored: dict[str, Any]) -> str:
    """All of CIFAR-10: maps under metrics."""
    from compare import maps_table

    return maps_table(stored)


def attempts(stored: dict[str, Any]) -> str:
    """The attempts, each beside the network of the same seed trained as long, and in the same way, without the loss."""
    from figures import both_gradients, paired_table

    rows = {}
    for title, seeds in stored["results"].items():
        rows[title] = {
            seed: both_gradients(figures) | {"insertion": figures["smoothed"]["insertion"][0]}
            for seed, figures in sorted(seeds.items())
        }
    groups: dict[str, dict[str, Any]] = {}  # by the network that the others are compared with
    for title, seeds in rows.items():
        base = f"{title.partition(',')[0]}, without"
        groups.setdefault(base if base in rows else "without", {})[title] = seeds
    return "\n\n".join(paired_table({base: group[base]} | group, base) for base, group in groups.items())


# what of it is shown -> the heading, and the direction that is the better
PARETO = {
    "accuracy": "accuracy ↑",
    "agreement with SmoothGrad": "agreement with its SmoothGrad ↑",
    "between seeds": "agreement between seeds ↑",
    "insertion of delta": "insertion of |δ|/y ↑",
    "deletion of delta": "deletion of |δ|/y ↓",
    "smooth": "smooth",
    "cosine of the two top classes": "cos of the two top classes ↓",
    "cosine with another class": "cos with another class ↓",
    "grid pointing": "grid pointing ↑",
    "accuracy under noise 0.1": "accuracy under noise 0.1 ↑",
    "accuracy after a step of 0.25": "accuracy after a step of 0.25 ↑",
}
IN_SHORT = ("accuracy", "agreement with SmoothGrad", "between seeds", "insertion of delta", "deletion of delta")
PLAIN_NETWORK = "ReLU"


class _Study:
    """What the study measured: title -> seed -> figures, and the agreement of pairs of seeds."""

    def __init__(self, stored: dict[str, Any]) -> None:
        self.results = dict(sorted(stored["results"].items(), key=lambda each: _family(each[0])))
        self.pairs = stored["between seeds"]

    def seeds(self, titles: Iterable[str]) -> list[str]:
        """Those that all of them have, and the plain network."""
        return sorted(set.intersection(*(set(self.results[title]) for title in (PLAIN_NETWORK, *titles))))

    def value(self, title: str, seed: str, name: str, seeds: list[str]) -> float:
        """A figure; a seed's agreement with others is the mean over these seeds."""
        if name != "between seeds":
            return float(self.results[title][seed][name])
        pairs = {pair: set(pair.split()) for pair in self.pairs[title]}
        return statistics.fmean(self.pairs[title][pair] for pair, of in pairs.items() if seed in of and of <= {*seeds})


def _family(title: str) -> tuple[str, str, float]:
    """The network, what was done to it, how strongly: "ReLU, noise 0.05" is ReLU, noise, 0.05."""
    network, _, method = title.partition(", ")
    name, _, strength = method.rpartition(" ")
    return network, name, float(strength or 0)


def _difference(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.fmean(values):+.3f} ± {statistics.stdev(values):.3f}"


def pareto(stored: dict[str, Any]) -> str:
    """Every method at every strength: differences to the plain ReLU network, seed by seed."""
    study, lines = _Study(stored), []
    for title in study.results:
        seeds, cells = study.seeds([title]), []
        for name in PARETO:
            values = [study.value(title, seed, name, seeds) for seed in seeds]
            mean = f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
            plain = [study.value(PLAIN_NETWORK, seed, name, seeds) for seed in seeds]
            differences = [value - other for value, other in zip(values, plain, strict=True)]
            cells.append(mean if title == PLAIN_NETWORK else _difference(differences))
        lines.append([title, str(len(seeds)), *cells])
    return f"{markdown_table(['', 'seeds', *PARETO.values()], lines)}\n\n{_about_pareto(stored)}"


def pareto_equal(price: float) -> Callable[[dict[str, Any]], str]:
    """Every family at the strength that costs so much accuracy, between the strengths that were trained."""

    def render(stored: dict[str, Any]) -> str:
        study = _Study(stored)
        families: dict[tuple[str, str], list[str]] = {}
        for title in study.results:
            network, name, _ = _family(title)
            families.setdefault((network, name), [network] if name else []).append(title)
        lines = [_at_price(study, titles, price) for titles in families.values() if titles != [PLAIN_NETWORK]]
        for name in ("delta, 3x3 mean", "SmoothGrad 4", "SmoothGrad 16"):
            lines.append(_afterwards(study, name))
        headings = ["", "strength", "seeds", *(PARETO[name] for name in IN_SHORT)]
        return f"{markdown_table(headings, lines)}\n\n{_about_pareto(stored)}"

    return render


def _at_price(study: _Study, titles: list[str], price: float) -> list[str]:
    """Differences to the plain network of a mixture of two neighbouring strengths, whose mean accuracy is so much less.

    The strongest, where even that costs less; the weakest, or the network without, where that costs more.
    """
    seeds = study.seeds(titles)

    def cost(title: str) -> float:
        accuracies = ((study.value(each, seed, "accuracy", seeds) for each in (PLAIN_NETWORK, title)) for seed in seeds)
        return statistics.fmean(plain - other for plain, other in accuracies)

    costs = list(map(cost, titles))
    last = next((index for index, each in enumerate(costs) if each >= price), len(costs) - 1)
    first = max(0, last - 1)
    spread = costs[last] - costs[first]
    share = min(1.0, max(0.0, (price - costs[first]) / spread)) if spread > 0 else 1.0
    network, name, high = _family(titles[last])
    low = _family(titles[first])[2]
    cells = []
    for figure in IN_SHORT:
        compared = (PLAIN_NETWORK, titles[first], titles[last])
        values = ([study.value(title, seed, figure, seeds) for title in compared] for seed in seeds)
        cells.append(_difference((1 - share) * weak + share * strong - plain for plain, weak, strong in values))
    strength = f"{(1 - share) * low + share * high:.2g}" if name else ""
    return [f"{network}, {name}" if name else network, strength, str(len(seeds)), *cells]


def _afterwards(study: _Study, name: str) -> list[str]:
    """What is made of the plain network's gradients, which costs no accuracy."""
    plain, cells = study.results[PLAIN_NETWORK], []
    for figure in IN_SHORT:
        key = figure.replace("delta", name)
        cells.append("" if key == figure else _difference(each[key] - each[figure] for each in plain.values()))
    return [f"{PLAIN_NETWORK}, {name.removeprefix('delta, ')} afterwards", "", str(len(plain)), *cells]


def _about_pareto(stored: dict[str, Any]) -> str:
    return (
        f"Small ResNet, {stored['images']:,} images of CIFAR-10, {stored['epochs']} epochs; accuracy on 10,000 test "
        f"images, maps of {stored['examined']}. Gradients of the log-probability; {stored['protocol']}. "
        f"torch {stored['torch']}. *{PLAIN_NETWORK}*: mean ± standard deviation over seeds; others: of the paired "
        "differences to it."
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


def right_reasons(stored: dict[str, Any]) -> str:
    """All contenders and figures."""
    columns = [each for each in stored["rows"]["without"][0] if each != "time, ratio"]  # other programs ran
    return _right_reasons(stored["rows"], columns)


def right_reasons_in_short(stored: dict[str, Any]) -> str:
    """What decides."""
    columns = ["accuracy, decoy lies", "δ on decoy"]
    chosen = ["without", "loss", "noise", "no decoy in training"]
    return _right_reasons({name: stored["rows"][name] for name in chosen}, columns)


def _right_reasons(rows: dict[str, list[dict[str, float]]], columns: list[str]) -> str:
    lines = [[name, *(_over_seeds(seed[each] for seed in seeds) for each in columns)] for name, seeds in rows.items()]
    return markdown_table(["", *columns], lines)


# (file, marker) -> how to write it, and from what
TABLES = {
    ("README.md", "gains"): (gains, "quickstart.json"),
    ("README.md", "costs"): (costs, "overhead-cuda.json"),
    ("docs/method-card.md", "gains"): (gains, "quickstart.json"),
    ("docs/method-card.md", "costs"): (costs, "overhead-cuda.json"),
    ("docs/evidence/index.md", "quickstart"): (quickstart, "quickstart.json"),
    ("docs/evidence/index.md", "object"): (groups("object"), "sweep.json"),
    ("docs/evidence/index.md", "schedule"): (groups("schedule"), "sweep.json"),
    ("docs/evidence/index.md", "weight"): (groups("weight"), "sweep.json"),
    ("docs/evidence/index.md", "coupled"): (groups("coupled"), "sweep.json"),
    ("docs/evidence/index.md", "low-pass"): (effect("low-pass"), "sweep.json"),
    ("docs/evidence/index.md", "warm-up"): (effect("warm-up"), "sweep.json"),
    ("docs/evidence/index.md", "averaged"): (averaged, "sweep.json"),
    ("docs/evidence/index.md", "attempts"): (attempts, "attempts.json"),
    ("docs/evidence/pareto.md", "pareto"): (pareto, "pareto.json"),
    ("docs/evidence/pareto.md", "half"): (pareto_equal(0.005), "pareto.json"),
    ("docs/evidence/pareto.md", "one"): (pareto_equal(0.01), "pareto.json"),
    ("docs/evidence/pareto.md", "whole"): (pareto, "pareto-whole.json"),
    ("docs/evidence/index.md", "cifar10-gradients"): (cifar10_gradients, "cifar10.json"),
    ("docs/evidence/index.md", "cifar10-maps"): (cifar10_maps, "cifar10.json"),
    ("docs/evidence/index.md", "cifar10-cpu-gradients"): (cifar10_gradients, "cifar10-cpu.json"),
    ("docs/evidence/index.md", "resnet18-gradients"): (cifar10_gradients, "cifar10-resnet18.json"),
    ("docs/evidence/index.md", "resnet18-maps"): (cifar10_maps, "cifar10-resnet18.json"),
    ("docs/evidence/cost.md", "overhead-cuda"): (overhead_cuda, "overhead-cuda.json"),
    ("README.md", "right-reasons"): (right_reasons_in_short, "right-reasons.json"),
    ("docs/evidence/right-reasons.md", "right-reasons"): (right_reasons, "right-reasons.json"),
    ("docs/evidence/cost.md", "targets-cuda"): (targets_cuda, "targets-cuda.json"),
    ("docs/evidence/cost.md", "kernels-cuda"): (kernels, "kernels-cuda.json"),
    ("docs/evidence/cost.md", "overhead"): (overhead, "overhead-cpu.json"),
    ("docs/evidence/evaluation.md", "evaluation"): (evaluation, "evaluation-cpu.json"),
    ("docs/evidence/zoo.md", "zoo"): (zoo, "zoo.json"),
    ("docs/explanation/scaling.md", "counted"): (counted, "scaling.json"),
    ("docs/explanation/scaling.md", "worked"): (worked, "scaling.json"),
    ("docs/explanation/scaling.md", "synchronized"): (synchronized, "scaling.json"),
}


def rendered(file: str) -> str:
    """The file with its tables as the stored results have them."""
    text = (ROOT / file).read_text()
    for (name, marker), (render, source) in TABLES.items():
        if name == file:
            body = render(json.loads((RESULTS / source).read_text()))
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
