"""Write the README's tables from the stored results, between their markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]


def overhead(stored: dict[str, Any]) -> str:
    """Time of a training step as a ratio to the plain one, contenders by configurations."""
    results = stored["results"]
    names = list(results[0]["rows"])[1:]
    headings = [*(name.removeprefix("interpgrad, ") for name in names), "peak memory"]
    lines = ["| | " + " | ".join(headings) + " |", "| --- |" + " --- |" * len(headings)]
    for each in results:
        rows, layout = each["rows"], ", channels_last" if each["layout"] == "channels_last" else ""
        cells = [f"{rows[name]['ratio']:.2f}" if name in rows else "wrong gradient" for name in names]
        cells.append(f"{rows['interpgrad, shared forward']['peak_ratio']:.2f}")
        lines.append(f"| {each['model']}, {each['size']}², batch {each['batch']}{layout} | " + " | ".join(cells) + " |")
    lines += [""]
    lines.append(
        f"Measured on {stored['date']}: {stored['machine']}, {stored['threads']} threads, torch {stored['torch']}, "
        f"fp32; medians of alternating steps, ratios to a plain step. The limit is 7/3 = 2.33."
    )
    return "\n".join(lines)


def faithfulness(stored: dict[str, Any]) -> str:
    """Table 2 of two networks."""
    from evaluate import markdown

    return markdown(stored)


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
    from quickstart import table

    return table(stored["rows"])


def sweep(stored: dict[str, Any]) -> str:
    """The table of the sweep."""
    from quickstart import table

    return table({name: list(seeds.values()) for name, seeds in stored["results"].items()})


# (file, marker) -> how to write it, and from what
TABLES = {
    ("README.md", "overhead"): (overhead, "overhead-cpu.json"),
    ("README.md", "quickstart"): (quickstart, "quickstart.json"),
    ("README.md", "faithfulness"): (faithfulness, "faithfulness-cifar10.json"),
    ("README.md", "evaluation"): (evaluation, "evaluation-cpu.json"),
    ("examples/README.md", "sweep"): (sweep, "sweep.json"),
    ("examples/README.md", "cifar10-small"): (quickstart, "quickstart-cifar10-small.json"),
    ("examples/README.md", "cifar10"): (quickstart, "quickstart-cifar10.json"),
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
