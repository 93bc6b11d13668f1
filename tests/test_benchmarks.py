"""The benchmark runs and says what it measured; the README says what is stored."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import fsdp2_runs, run_script

ROOT = Path(__file__).parent.parent
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

import overhead  # noqa: E402
import tables  # noqa: E402


@pytest.mark.parametrize("file", sorted({file for file, _ in tables.TABLES}))
def test_tables_are_the_stored_results(file):
    assert (ROOT / file).read_text() == tables.rendered(file), "run python benchmarks/tables.py"


def test_cells_stay_what_they_are():
    """Of a table of |δ| and of figures with trailing zeros."""
    lines = tables.markdown_table(["", "|δ|"], [["a", "0.10"], ["b", "1e5"], ["c", ""]]).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == ["", r"\|δ\|"]
    assert cells[2:] == [["a", "0.10"], ["b", "1e5"], ["c", ""]]


@pytest.mark.parametrize("file", sorted({file for file, _ in tables.TABLES}))
def test_rows_have_as_many_cells_as_their_headings(file):
    """A | that is not escaped breaks a table on the page, and in nothing else."""
    for block in re.findall(r"(?:^\|.*\n)+", tables.rendered(file), re.MULTILINE):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def run(*arguments, cwd, script="overhead.py"):
    if script != "scaling.py":
        return run_script(ROOT / "benchmarks" / script, *arguments, cwd=cwd)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]  # it starts processes
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.slow
def test_a_tiny_run(tmp_path):
    options = ["--batch", 8, "--repeat", 9, "--seconds", 0, "--size", 64, "--json", "o.json", "--plot", "o.png"]
    variants = ["--amp", "fp32", "bf16", "--layout", "contiguous", "channels_last"]
    result = run("--models", "squeezenet1_1", *options, *variants, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "o.json").read_text())
    assert {"machine", "threads", "torch", "commit", "date"} <= stored.keys()
    found = {(each["precision"], each["layout"]) for each in stored["results"]}
    assert found == {(amp, layout) for amp in ("fp32", "bf16") for layout in ("contiguous", "channels_last")}
    for each in stored["results"]:
        assert not each["wrong"]
        assert each["repetitions"] == overhead.FEWEST
        assert each["rows"]["plain step"]["ratio"] == 1
        for row in each["rows"].values():
            assert row["ms"] > 0
            assert row["peak_mib"] > 0
            assert row["of_limit"] == pytest.approx(7 / 3 / row["ratio"])
    assert (tmp_path / "o.png").stat().st_size > 10_000
    again = run("--models", "squeezenet1_1", *options, *variants, "--missing", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == ""
    assert json.loads((tmp_path / "o.json").read_text())["results"] == stored["results"]


@pytest.mark.slow
def test_contenders_with_a_wrong_gradient_are_not_timed(tmp_path):
    """DenseNet calls F.relu: replacing modules misses it."""
    result = run("--models", "densenet121", "--batch", 8, "--repeat", 2, "--json", "o.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (each,) = json.loads((tmp_path / "o.json").read_text())["results"]
    assert list(each["wrong"]) == ["as usually written, three forwards"]
    assert "wrong gradient" in result.stdout


@pytest.mark.slow
def test_unknown_model(tmp_path):
    result = run("--models", "nonesuch", cwd=tmp_path)
    assert result.returncode != 0
    assert "expected resnet18_cifar, small_resnet or a model of torchvision or timm, got 'nonesuch'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_peak_is_that_of_the_step():
    """A step that holds one more tensor of known size."""
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)

    def step(extra=0):
        held = torch.empty(extra, dtype=torch.uint8)
        return model(x).sum() + 0 * held.numel()

    difference = overhead.peak_bytes(model, x, lambda: step(2**20)) - overhead.peak_bytes(model, x, step)
    assert 0.9 * 2**20 < difference < 1.1 * 2**20


@pytest.mark.slow
def test_a_tiny_evaluation(tmp_path):
    """Every contender computes what its peer does, and is timed."""
    pytest.importorskip("pytorch_grad_cam")
    options = ["--model", "resnet18", "--layer", "layer1", "--size", 32, "--batch", 2, "--slow-batch", 2]
    result = run(*options, "--repeat", 1, "--slow-repeat", 1, "--json", "e.json", cwd=tmp_path, script="evaluation.py")
    assert result.returncode == 0, result.stderr
    (stored,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert len(stored["rows"]) == 6
    for row in stored["rows"]:
        assert row["largest_difference"] < 1e-3
        assert row["speedup"] == pytest.approx(row["images_per_second"] / row["peer_images_per_second"])


@pytest.mark.slow
@fsdp2_runs
def test_what_the_loss_sends(tmp_path):
    """As docs/explanation/scaling.md says: with a shared forward no more than a plain step, and no later."""
    result = run("--model", "resnet18", "--size", 32, "--json", "s.json", cwd=tmp_path, script="scaling.py")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    plain, own, shared, skipped = (rows[kind]["sent"] for kind in rows)
    assert plain["DDP"] == own["DDP"] == shared["DDP"] == skipped["DDP"]
    assert plain["DDP"]["megabytes"]["allreduce"] == pytest.approx(4 * 11_689_512 / 1e6)
    assert plain["FSDP2"] == shared["FSDP2"] == skipped["FSDP2"]
    # For a forward pass more, and the first of its backward passes.
    gathers = [each["FSDP2"]["calls"]["allgather"] for each in (plain, own)]
    assert gathers[0] < gathers[1] < 2 * gathers[0]
    assert rows["step skipped by every"]["gflop"] == rows["plain step"]["gflop"]
    assert 7 / 3 < rows["shared forward"]["gflop"] / rows["plain step"]["gflop"] < 2.4
