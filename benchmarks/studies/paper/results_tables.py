"""RESULTS.md: the paper's Tables 1 to 4 beside what the runs gave, and which of its claims that bears out.

    cd benchmarks/studies/paper
    python results_tables.py runs --json results/runs.json --output RESULTS.md

The JSON holds what the tables are made of, so that they can be made again without the runs: leave out the folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import compare
from compare import METRICS, TITLES
from markdown_table import markdown_table
from power import POWER, power
from runs import BEST, KINDS, name_of, network_of
from slides import ACCURACY, OF_ERRORS, OF_MAPS, OF_WEIGHTS, PLAIN
from summary import COLUMNS, Stored, summarized

MODELS = {"resnet18": "RESNET-18", "mobilenet_v2": "MOBILENET-V2"}
ERRORS = {"cos": "Cosine", "hi": "Histogram", "mae": "MAE", "mse": "MSE"}


def verdict(claimed: float, found: dict[str, Any] | None) -> str:
    """What a claimed difference became: its sign is what can be compared between networks of another size."""
    if found is None or "difference" not in found:
        return "missing"
    _, low, high = found["difference"]
    if len(found["differences"]) < 2 or low <= 0 <= high:
        return "within the spread of seeds"
    return "reproduced" if (low > 0) == (claimed > 0) else "not reproduced"


MARKS = {"reproduced": " ✓", "not reproduced": " ✗", "within the spread of seeds": " ~", "missing": ""}


class Table:
    """One of the four: rows of the slides, rows of ours below them, and a verdict on each of their differences."""

    def __init__(self, title: str, columns: list[str], stored: Stored, present: bool) -> None:
        self.title, self.stored, self.present = title, stored, present
        self.headings = ["", "", *columns]
        self.rows: list[list[str]] = []
        self.verdicts: dict[str, Counter[str]] = {}

    def add(
        self,
        label: str,
        slides: tuple[float, ...],
        base: tuple[float, ...] | None,
        names: dict[str, str],
        figures: list[str],
    ) -> None:
        """The slides' figures; those of the runs `names`, of each kind; `base`, what the slides' are compared with."""
        if self.present and not (names := {kind: name for kind, name in names.items() if name in self.stored}):
            return
        self.rows.append([label, "slides", *(f"{value:.2f}" for value in slides)])
        for kind, name in names.items():
            cells = []
            if name not in self.stored:
                self.rows.append(["", KINDS.get(kind, kind), "missing", *[""] * (len(figures) - 1)])
            for position, figure in enumerate(figures):
                found = self.stored.get(name, {}).get(figure)
                mark = ""
                if base is not None and slides[position] != base[position]:
                    outcome = verdict(slides[position] - base[position], found)
                    self.verdicts.setdefault(kind, Counter())[outcome] += 1
                    mark = MARKS[outcome]
                cells.append("missing" if found is None else _cell(found) + mark)
            if name in self.stored:
                self.rows.append(["", KINDS.get(kind, kind), *cells])

    def __str__(self) -> str:
        lines = [f"## {self.title}", "", markdown_table(self.headings, self.rows), ""]
        for kind, outcomes in self.verdicts.items():
            counts = ", ".join(f"{outcomes[name]} {name}" for name in MARKS if outcomes[name])
            lines.append(f"- {KINDS[kind]}: of {outcomes.total()} differences in the slides, {counts}.")
        return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    spread = "" if found["deviation"] is None else f" ± {found['deviation']:.2f}"
    if "difference" not in found:
        return f"{found['mean']:.2f}{spread}"
    return f"{found['mean']:.2f}{spread} ({found['difference'][0]:+.2f})"


def four_tables(stored: Stored, present: bool) -> list[Table]:
    """Those of the paper; of what is present alone, those that say something of its loss."""
    table = functools.partial(Table, stored=stored, present=present)
    arrows = [METRICS[metric] for metric in COLUMNS]
    of_cam = [f"grad_cam {metric}" for metric in COLUMNS]
    one = table("Table 1: accuracy", ["ACC"])
    for network, (baseline, ours) in ACCURACY.items():
        one.add(
            f"{MODELS[network]}, baseline", (baseline,), None, {"without": name_of(network, "without")}, ["accuracy"]
        )
        runs = {kind: name_of(network, kind) for kind in KINDS}
        one.add(f"{MODELS[network]}, λ = {BEST[network]:g}", (ours,), (baseline,), runs, ["accuracy"])
    two = table("Table 2: interpretability metrics", arrows)
    for network, methods in OF_MAPS.items():
        for method, (baseline, ours) in methods.items():
            figures = [f"{method} {metric}" for metric in COLUMNS]
            title = f"{MODELS[network]}, {TITLES[method]}"
            two.add(f"{title}, baseline", baseline, None, {"without": name_of(network, "without")}, figures)
            two.add(f"{title}, ours", ours, baseline, {kind: name_of(network, kind) for kind in KINDS}, figures)
    three = table("Table 3: error functions, ResNet-18, Grad-CAM", ["ACC", *arrows])
    three.add("Baseline", PLAIN, None, {"without": name_of("resnet18", "without")}, ["accuracy", *of_cam])
    for error, slides in OF_ERRORS.items():
        runs = {kind: name_of("resnet18", kind, error) for kind in ("coupled", "frozen")}
        three.add(ERRORS[error], slides, PLAIN, runs, ["accuracy", *of_cam])
    four = table("Table 4: regularization coefficient, ResNet-18, Grad-CAM", ["ACC", *arrows])
    four.add("λ = 0", PLAIN, None, {"without": name_of("resnet18", "without")}, ["accuracy", *of_cam])
    for lam, slides in OF_WEIGHTS.items():
        runs = {kind: name_of("resnet18", kind, lam=lam) for kind in KINDS if kind != "recipe"}
        four.add(f"λ = {lam:g}", slides, PLAIN, runs, ["accuracy", *of_cam])
    return [each for each in (one, two, three, four) if each.verdicts or not present]


def rendered(stored: Stored, pictures: list[Path], present: bool = False) -> str:
    """RESULTS.md."""
    parts = ["# The paper's experiments", START, INTRODUCTION.format(told=_told(stored))]
    parts += [*map(str, four_tables(stored, present)), POWER, power(stored), END]
    parts += ["## Pictures\n\n" + PICTURES] if pictures else []
    parts += [f"![{path.stem}]({path.as_posix()})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def _told(stored: Stored) -> str:
    """What was run."""
    if not stored:
        return "No run is stored."
    options = next(iter(stored.values()))["about"]["options"]
    widths = {f"{row['about']['options']['width']} of {network_of(name)}" for name, row in stored.items()}
    runs = sum(row["about"]["seeds"] for row in stored.values())
    rate = "one cycle of the learning rate" if options["one_cycle"] == "True" else "a learning rate in steps"
    training = f"{options['data']}, {options['epochs']} epochs, batches of {options['batch']}, {rate}"
    precision = options["amp"].replace("none", "fp32")
    return f"{len(stored)} settings, {runs} runs: {training}, {precision}, width {', '.join(sorted(widths))}."


START, END = "<!-- --8<-- [start:tables] -->", "<!-- --8<-- [end:tables] -->"  # what docs/evidence/paper.md shows
INTRODUCTION = """Made by `results_tables.py` from the runs of `all_runs.py`; do not edit. {told}

The slides' figures are of one run each. Ours: mean ± standard deviation over seeds, in brackets the mean difference to
the network of the same seed without the loss. Marks on differences: ✓ reproduced (the 95% interval, over seeds and
images, excludes 0 and the sign is the slides'), ✗ not reproduced (it excludes 0 on the other side), ~ within the
spread of seeds. What was not run is missing. Networks, images and lengths of training smaller than the paper's change
the figures themselves: compare signs and sizes of differences, not levels."""

PICTURES = """The slides' "Gradient visualization" and "Qualitative results", for the network without the loss and the
one with the paper's loss of the first seed (`measure.py --pictures`)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the runs (what the JSON holds)")
    parser.add_argument("--json", type=Path, required=True, help="what the tables are made of")
    parser.add_argument("--output", type=Path, required=True, help="RESULTS.md")
    parser.add_argument("--present", action="store_true", help="leave out what was not run")
    options = parser.parse_args()
    if options.runs:
        stored = summarized(compare.read(options.runs, list(OF_MAPS["resnet18"])))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(stored, ensure_ascii=False).replace('}, "', '},\n"') + "\n")
    pictures = [options.json.with_name(f"{name}.png") for name in ("gradients", "maps")]
    found = [Path(os.path.relpath(each, options.output.parent)) for each in pictures if each.exists()]
    options.output.write_text(rendered(json.loads(options.json.read_text()), found, options.present))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
