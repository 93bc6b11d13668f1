"""The main job: its images, its figures, its complaints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from PIL import Image  # noqa: E402

sys.path.insert(0, str(ROOT / "examples"))
import images  # noqa: E402
import quickstart  # noqa: E402


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of two classes, in sizes that are not the network's."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, brightness in (("dark", 0), ("light", 128)):
            target = tmp_path / "photos" / split / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(brightness, brightness + 128, (40, 50, 3), generator=generator).byte()
                Image.fromarray(pixels.numpy()).save(target / f"{index}.png")
    return tmp_path / "photos"


def test_digits_are_where_the_evidence_says():
    """Between two compositions that differ in the digits' ink only, all difference lies under the ink."""
    task = images.digits_on_photographs(20, 30)
    x, y = task.test
    assert x.shape == (30, 3, 32, 32)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    assert task.evidence.shape == (30, 32, 32)
    assert task.evidence.flatten(1).any(1).all()
    assert 0.02 < float(task.evidence.float().mean()) < 0.2
    assert set(y.tolist()) <= set(range(10))
    again = images.digits_on_photographs(20, 30)
    assert torch.equal(again.test[0], x)
    assert torch.equal(again.train[0], task.train[0])


def test_figures_of_a_known_gradient(monkeypatch):
    """Figures by hand: delta of one pixel on the digit, guided twice as large."""
    delta = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    delta[0, 0, 5, 5], delta[0, 1, 20, 20] = 3.0, 1.0
    delta[1] = 1.0
    delta /= delta.flatten(1).norm(dim=1)[:, None, None, None]
    evidence = torch.zeros(2, 32, 32, dtype=torch.bool)
    evidence[0, 5, 5] = evidence[1, 0, 1] = True
    task = images.Images(
        "known", ["a", "b"], (delta, delta), (torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])), evidence
    )
    monkeypatch.setattr(quickstart, "gradients", lambda *_: (delta, 2 * delta))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    figures = quickstart.evaluate(
        quickstart.Run(quickstart.PLAIN, model, None, None, None, [1.0, 9.0, 2.0]), task, "logit"
    )
    assert figures["accuracy"] == 0.5
    assert figures["cosine"] == pytest.approx(1)
    assert figures["classes"] == pytest.approx(1)
    assert figures["on digit"] == pytest.approx((3 / 4 + 1 / 1024) / 2)
    assert figures["pointing"] == 0.5  # the flat map points at its first pixel, beside the evidence
    border = 1 - (4 * 30 * (1 - (6 / 9) ** 2) + 4 * (1 - (4 / 9) ** 2)) / 1024
    assert figures["smooth"] == pytest.approx((1 / 3 + border**0.5) / 2)
    assert figures["ms/step"] == 2.0


def test_a_tiny_run_on_digits(tmp_path):
    result = run("--quick", "--epochs", 1, "--seeds", 1, "--limit", 128, "--json", "demo.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| without |" in result.stdout
    assert "| with, λ =" in result.stdout
    assert "pointing game" in result.stdout
    picture = Image.open(tmp_path / "demo.png")
    assert picture.width > 800
    assert picture.convert("L").getextrema()[0] < 100, "an empty picture"
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    for figures in (row for seeds in rows.values() for row in seeds):
        assert 0 <= figures["accuracy"] <= 1
        assert -1 <= figures["cosine"] <= 1
        assert 0 < figures["smooth"] <= 1
        assert figures["ms/step"] > 0


def test_a_tiny_run_on_a_folder(folder, tmp_path):
    result = run("--data", folder, "--epochs", 2, "--seeds", 2, "--limit", 8, "--no-low-pass", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8 training and 6 test images" in result.stdout
    assert "digit" not in result.stdout
    assert (tmp_path / "demo.png").exists()


def complains(folder, cwd, *parts):
    result = run("--data", folder, cwd=cwd)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("quickstart: expected ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_missing_folder(tmp_path):
    complains(tmp_path / "nowhere", tmp_path, "train", "is no folder")


def test_missing_split(folder, tmp_path):
    (folder / "test").rename(folder / "other")
    complains(folder, tmp_path, "val is no folder")


def test_differing_classes(folder, tmp_path):
    (folder / "test" / "dark").rename(folder / "test" / "darker")
    complains(folder, tmp_path, "the same class folders", "dark, darker")


def test_empty_class(folder, tmp_path):
    for file in (folder / "train" / "dark").iterdir():
        file.unlink()
    complains(folder, tmp_path, "dark", "found none")


def test_unreadable_image(folder, tmp_path):
    (folder / "train" / "dark" / "0.png").write_bytes(b"no picture")
    complains(folder, tmp_path, "0.png", "could not read it")


def test_truncated_image(folder, tmp_path):
    path = folder / "train" / "light" / "2.png"
    path.write_bytes(path.read_bytes()[:1000])
    complains(folder, tmp_path, "2.png", "could not read it")


def test_bad_options(tmp_path):
    for options in (["--epochs", "0"], ["--seeds", "-1"], ["--limit", "x"], ["--criterion", "both"]):
        result = run(*options, cwd=tmp_path)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
