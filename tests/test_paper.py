"""The experiments: networks, a training that is killed, a miniature of the whole way from training to tables."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from nets import run_script
from PIL import Image
from torch import nn

pytestmark = [pytest.mark.cpu("the experiments choose their device"), pytest.mark.slow]
STUDY = Path(__file__).parent.parent / "benchmarks" / "studies" / "paper"
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
import compare  # noqa: E402
import images  # noqa: E402
import networks  # noqa: E402
import results_tables  # noqa: E402
import slides  # noqa: E402
import train  # noqa: E402
from test_quickstart import folder  # noqa: E402, F401  # a fixture


def run(name, *arguments):
    if name == "all_runs.py" and "--dry-run" not in arguments:  # which starts processes
        command = [sys.executable, str(STUDY / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
    return run_script(STUDY / name, *arguments)


SMALL = ("--network", "small_resnet", "--width", 4, "--limit", 8, "--batch", 4, "--epochs", 3)


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11.22), ("mobilenet_v2", 2.37)])
def test_networks(name, parameters):
    """As many parameters as the paper's, and maps of 4x4 pixels before they are averaged."""
    build, _ = networks.NETWORKS[name]
    model = build(100)
    assert sum(each.numel() for each in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    x = torch.rand(2, 3, 32, 32)
    assert model(x).shape == (2, 100)
    averaged = next(index for index, layer in enumerate(model) if isinstance(layer, nn.AdaptiveAvgPool2d))
    assert model[:averaged](x).shape[2:] == (4, 4)
    assert sum(each.numel() for each in build(10, 0.25 if parameters < 3 else 16).parameters()) < 1e6


def weights(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)["run"]["model"]


def trained(monkeypatch, *arguments):
    """train.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.train(train.arguments())


def test_killed_and_continued(folder, tmp_path, monkeypatch):  # noqa: F811
    """At any moment: the weights are those of the run that was left alone, bit for bit."""
    options = (*SMALL, "--every", 2, "--data", folder)
    trained(monkeypatch, *options, "--output", tmp_path / "whole")
    command = [sys.executable, STUDY / "train.py", *options, "--output", tmp_path / "killed"]
    process = subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "run.json").exists()
    trained(monkeypatch, *options, "--output", tmp_path / "killed")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(images.BadInputError, match=r"\['lr'\] differ"):
        trained(monkeypatch, *options, "--lr", 0.3, "--output", tmp_path / "killed")


def test_from_training_to_tables(folder, tmp_path, monkeypatch):  # noqa: F811
    runs = tmp_path / "runs"
    for name, lam in (("without", 0), ("with", 0.3)):
        for seed in (0, 1):
            settings = ("--lam", lam, "--seed", seed, "--epochs", 1, "--one-cycle", "--rotation", 0)
            trained(monkeypatch, *SMALL, *settings, "--data", folder, "--output", runs / f"{name}-{seed}")
    result = run("measure.py", *sorted(runs.iterdir()), "--data", folder, "--limit", 4, "--protocol", "ca_stream")
    assert result.returncode == 0, result.stderr
    pair = runs / "without-0", runs / "with-0"
    result = run("measure.py", *pair, "--data", folder, "--pictures", tmp_path / "pictures", "--methods", "grad_cam")
    assert result.returncode == 0, result.stderr
    for name in ("gradients", "maps"):
        shown = Image.open(tmp_path / "pictures" / f"{name}.png").convert("L")
        assert shown.width > 200
        assert shown.getextrema()[0] < 100, "an empty picture"
    result = run("compare.py", runs, "--json", tmp_path / "compared.json")
    assert result.returncode == 0, result.stderr
    assert "4 images of 32x32; seeds: without 2, with 2" in result.stdout
    assert re.search(r"\| Score-CAM +\| with +\| [+-]\d+\.\d \[", result.stdout)
    assert re.search(r"one gradient of \*with\* \(\d\.\d+\) is worth (\d+\.\d|inf) samples", result.stdout)
    stored = json.loads((tmp_path / "compared.json").read_text())
    assert compare.maps_table(stored) in result.stdout
    before, after = (stored["maps"]["grad_cam"][name]["INS"] for name in ("without", "with"))
    mean, low, high = after["difference"]
    assert mean == pytest.approx(after["mean"] - before["mean"])
    assert low < mean < high


CAMS = ("grad_cam", "grad_cam_pp", "score_cam", "ablation_cam", "axiom_cam")
MINIATURE = ("--networks", "resnet18", "--readings", "coupled", "--weights", "--errors", "--scale", 0.0625)
MINIATURE += ("--epochs", 1, "--limit-training", 64, "--batch-size", 32, "--limit", 4, "--figures", 8)
MINIATURE += ("--methods", *CAMS, "--device", "cpu", "--brief", "--one-cycle", "--amp", "bf16")


def test_the_whole_pipeline_in_miniature(folder, tmp_path):  # noqa: F811
    """The queue, with a run that somebody else is at, and RESULTS.md."""
    runs, held = tmp_path / "runs", tmp_path / "runs" / "resnet18_recipe-1"
    options = (*MINIATURE, "--data", folder, "--output", runs)
    result = run("all_runs.py", *options, "--seeds", 2, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"\n6 runs, 0\.\d hours of training on one cpu", result.stdout)
    held.mkdir(parents=True)
    with filelock.FileLock(held / "lock"):
        result = run("all_runs.py", *options, "--seeds", 2, "--jobs", 2)
    assert result.returncode == 0, result.stderr
    assert "resnet18_recipe-1: at work elsewhere" in result.stdout
    assert result.stdout.count(" minutes") == 5
    assert not (held / "run.json").exists()
    result = run("all_runs.py", *options, "--seeds", 2)
    assert result.stdout.splitlines()[-1].startswith("1/1 resnet18_recipe-1: ")
    files = ("--json", tmp_path / "runs.json", "--output", tmp_path / "RESULTS.md")
    for source in ((runs,), ()):  # and again from what is stored
        result = run("results_tables.py", *source, *files)
        assert result.returncode == 0, result.stderr
        text = (tmp_path / "RESULTS.md").read_text()
        assert "3 settings, 6 runs: photos, 1 epochs, batches of 32, one cycle of the learning rate, " in text
        assert "bf16, width 4.0 of resnet18." in text
        assert re.search(r"\| RESNET-18, Grad-CAM, ours +\| slides +\| 28\.09 ", text)
        assert re.search(
            r"\| +\| paper's loss, coupled statistics +\| \d+\.\d\d ± \d+\.\d\d \([+-]\d+\.\d\d\) [~✓✗]", text
        )
        assert re.search(r"of 50 differences in the slides, .*25 missing\.", text)
        assert re.search(r"\| paper's loss, frozen statistics +\| missing +\|", text)
        assert "## Table 4" in text
        assert ("![maps](maps.png)" in text) == (tmp_path / "maps.png").exists()
        (tmp_path / "maps.png").touch()


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [
        ([1.0, 0.5, 1.5], "reproduced"),
        ([-1.0, -1.5, -0.5], "not reproduced"),
        ([1.0, -0.5, 2.5], "within the spread of seeds"),
    ],
)
def test_verdicts(difference, outcome):
    assert results_tables.verdict(2.0, {"difference": difference, "differences": [1, 2]}) == outcome
    assert results_tables.verdict(2.0, {"difference": difference, "differences": [1]}) == "within the spread of seeds"
    assert results_tables.verdict(2.0, None) == "missing"


def test_the_slides_figures_agree_with_each_other():
    """The same network stands in several of their tables (but for a digit of AG, and two of DEL)."""
    baseline, ours = slides.OF_MAPS["resnet18"]["grad_cam"]
    assert (slides.ACCURACY["resnet18"][0], *baseline) == slides.PLAIN
    assert slides.OF_ERRORS["cos"] == (slides.ACCURACY["resnet18"][1], *ours)
    assert slides.OF_WEIGHTS[7.5e-3] == pytest.approx(slides.OF_ERRORS["cos"], abs=0.011)


def test_the_interval_covers():
    """Of 200 experiments with deviations over seeds and images, about 95% hold the truth."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        seeds = torch.randn(3, 1, generator=generator, dtype=torch.float64)
        images = 5 * torch.randn(1, 50, generator=generator, dtype=torch.float64)
        noise = torch.randn(3, 50, generator=generator, dtype=torch.float64)
        _, low, high = compare.interval(1 + seeds + images + noise)
        covered += low <= 1 <= high
    assert 185 <= covered <= 200


def test_fractions_of_earlier_files():
    """Values that were stored before they were in percent are not taken for percent."""
    old = {"settings": {}, "values": {"AD": [0.5, 0.25]}}
    new = {"settings": {"unit": "percent"}, "values": {"AD": [50.0, 25.0]}}
    runs = {"0": {"maps": {"grad_cam": old}}, "1": {"maps": {"grad_cam": new}}}
    found = compare.percent(runs, ["0", "1"], "grad_cam", "AD")
    torch.testing.assert_close(found, torch.tensor([[50.0, 25.0], [50.0, 25.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "stored", "options"),
    [("RESULTS.md", "runs.json", ()), ("FULL-WIDTH.md", "full-width/runs.json", ("--present",))],
)
def test_results_are_those_stored(name, stored, options):
    """What results_tables.py makes of the stored runs."""
    results, text = STUDY / "results" / stored, STUDY / name
    again = text.with_name(f"AGAIN-{name}")
    try:
        assert run("results_tables.py", "--json", results, "--output", again, *options).returncode == 0
        assert again.read_text() == text.read_text()
    finally:
        again.unlink(missing_ok=True)
