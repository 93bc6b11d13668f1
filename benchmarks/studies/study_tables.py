"""The tables of README and docs that come from the studies' results."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scipy import stats

sys.path += [str(Path(__file__).parent / "paper"), str(Path(__file__).parents[2] / "examples")]
from markdown_table import markdown_table

RESULTS = Path(__file__).parent / "results"


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


def quickstart(stored: dict[str, Any]) -> str:
    """The table of the main job."""
    from figures import table

    return table(stored["rows"])


def groups(*names: str) -> Callable[[dict[str, Any]], str]:
    """These groups of the sweep, each network beside the one of the same seed without the loss."""

    def render(stored: dict[str, Any]) -> str:
        from comparisons import both_gradients, paired_table
        from recipe import GROUPS, PLAIN

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
        from comparisons import both_gradients, change
        from figures import HEADINGS
        from recipe import GROUPS, OBJECTS

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
    from comparisons import SAMPLES, worth
    from figures import HEADINGS
    from recipe import BASE, PLAIN, RECIPE

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
    from comparisons import both_gradients, paired_table

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


def small_data(stored: dict[str, Any]) -> str:
    """The recipe on few photographs, beside the network of the same seed without it."""
    from comparisons import paired_table

    tables = []
    for count in dict.fromkeys(title.partition(", ")[0] for title in stored["results"]):
        of_count = [title for title in stored["results"] if title.startswith(count)]
        rows = {
            title: {seed: figures["log_prob"] for seed, figures in sorted(stored["results"][title].items())}
            for title in of_count
        }
        tables.append(paired_table(rows, of_count[0]))
    return "\n\n".join(tables)


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
    network = {"resnet18": f"ResNet-18 of width {stored.get('width', 0):g}"}.get(
        stored.get("architecture"), "Small ResNet"
    )
    return (
        f"{network}, {stored['images']:,} images of CIFAR-10, {stored['epochs']} epochs; accuracy on 10,000 test "
        f"images, maps of {stored['examined']}. Gradients of the log-probability; {stored['protocol']}. "
        f"torch {stored['torch']}. *{PLAIN_NETWORK}*: mean ± standard deviation over seeds; others: of the paired "
        "differences to it."
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


# (file, marker) -> how to write it, and from which of results/
TABLES = {
    ("README.md", "gains"): (gains, "quickstart.json"),
    ("README.md", "right-reasons"): (right_reasons_in_short, "right-reasons.json"),
    ("docs/method-card.md", "gains"): (gains, "quickstart.json"),
    ("docs/evidence/digits.md", "quickstart"): (quickstart, "quickstart.json"),
    ("docs/evidence/digits.md", "averaged"): (averaged, "recipe.json"),
    ("docs/evidence/settings.md", "object"): (groups("object"), "recipe.json"),
    ("docs/evidence/settings.md", "schedule"): (groups("schedule"), "recipe.json"),
    ("docs/evidence/strength.md", "weight"): (groups("weight"), "recipe.json"),
    ("docs/evidence/statistics.md", "coupled"): (groups("coupled"), "recipe.json"),
    ("docs/evidence/statistics.md", "low-pass"): (effect("low-pass"), "recipe.json"),
    ("docs/evidence/strength.md", "warm-up"): (effect("warm-up"), "recipe.json"),
    ("docs/evidence/photographs.md", "cifar10-gradients"): (cifar10_gradients, "cifar10.json"),
    ("docs/evidence/photographs-maps.md", "cifar10-maps"): (cifar10_maps, "cifar10.json"),
    ("docs/evidence/photographs.md", "cifar10-cpu-gradients"): (cifar10_gradients, "cifar10-cpu.json"),
    ("docs/evidence/photographs.md", "resnet18-gradients"): (cifar10_gradients, "cifar10-resnet18.json"),
    ("docs/evidence/photographs-maps.md", "resnet18-maps"): (cifar10_maps, "cifar10-resnet18.json"),
    ("docs/evidence/photographs.md", "small-data"): (small_data, "small-data.json"),
    ("docs/evidence/attempts.md", "attempts"): (attempts, "attempts.json"),
    ("docs/evidence/pareto-all.md", "pareto"): (pareto, "pareto.json"),
    ("docs/evidence/pareto-all.md", "resnet18"): (pareto, "pareto-resnet18.json"),
    ("docs/evidence/pareto.md", "half"): (pareto_equal(0.005), "pareto.json"),
    ("docs/evidence/pareto.md", "one"): (pareto_equal(0.01), "pareto.json"),
    ("docs/evidence/pareto-all.md", "whole"): (pareto, "pareto-whole.json"),
    ("docs/evidence/right-reasons.md", "right-reasons"): (right_reasons, "right-reasons.json"),
}
