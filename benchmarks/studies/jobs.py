"""Many trainings, one process per core, one thread each; what is done is stored, what is missing is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def results_in(path: Path) -> dict[str, dict[str, Any]]:
    """Title -> seed -> figures."""
    return json.loads(path.read_text())["results"] if path.exists() else {}


def run_missing(
    path: Path,
    todo: Iterable[tuple[str, int, tuple[Any, ...]]],
    measure: Callable[..., dict[str, Any]],
    processes: int | None,
    about: dict[str, Any],
) -> None:
    """Call `measure(*arguments, seed)` for each (title, seed, arguments) without figures, in this order."""
    results, pending = results_in(path), {}
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for title, seed, arguments in todo:
            if str(seed) not in results.get(title, {}) and (title, seed) not in pending.values():
                pending[pool.submit(measure, *arguments, seed)] = title, seed
        for future in tqdm(as_completed(pending), total=len(pending), desc="networks"):
            title, seed = pending[future]
            results.setdefault(title, {})[str(seed)] = future.result()
            write(path, {"torch": torch.__version__} | about | {"results": results})


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, a line for each seed; all or nothing, whenever it is interrupted."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False).replace('}}, "', '}},\n"') + "\n")
    partial.replace(path)
