"""The study of methods at equal accuracy: methods are what their names say, an interrupted study goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = [pytest.mark.cpu("the examples choose their device"), pytest.mark.slow]
ROOT = Path(__file__).parent.parent
for name in ("sklearn", "torchvision", "tabulate"):
    pytest.importorskip(name)

import pareto  # noqa: E402
from PIL import Image  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder of five classes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 26), ("test", 8)):
        for label in range(5):
            target = tmp_path / "photos" / split / str(label)
            target.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(40 * label, 40 * label + 90, (32, 32, 3), generator=generator).byte()
                Image.fromarray(pixels.numpy()).save(target / f"{index}.png")
    return tmp_path / "photos"


def test_penalties_are_their_formulas():
    delta = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    padded = F.pad(delta, (1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2))

    expected = (delta - windows / 9).square().sum((1, 2, 3))
    torch.testing.assert_close(pareto.squared_high_pass(delta, None), expected)
    torch.testing.assert_close(pareto.squared_norm(delta, None), delta.square().sum((1, 2, 3)))


@pytest.mark.parametrize("architecture", ["small_resnet", "resnet18"])
def test_networks_differ_in_their_activation_alone(architecture):
    for activation, wanted, other in (("ReLU", "relu", "silu"), ("SiLU", "silu", "relu")):
        torch.manual_seed(0)
        model = pareto.network_of(architecture, 4, 8, activation).eval()
        called = " ".join(str(node.target) for node in make_fx(model)(torch.rand(2, 3, 32, 32)).graph.nodes)
        assert wanted in called
        assert other not in called


def test_attacked_images_are_one_step_away():
    model = pareto.network_of("small_resnet", 4, 16, "SiLU").eval()
    x, y = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 3])
    moved = pareto.attacked(model, x, y, 0.25)
    torch.testing.assert_close((moved - x).flatten(1).norm(dim=1), torch.full((3,), 0.25))
    before, after = (F.cross_entropy(model(each), y, reduction="none") for each in (x, moved))
    assert (after > before).all()


def test_a_tiny_study(folder, tmp_path):
    path = tmp_path / "pareto.json"
    names = ["SiLU, high-pass norm 0.03", "ReLU, adversarial 0.1"]
    command = [
        sys.executable,
        ROOT / "benchmarks" / "studies" / "pareto.py",
        "--data",
        folder,
        "--json",
        path,
        "--images",
        130,
    ]
    command += ["--networks", tmp_path / "networks", "--epochs", 1, "--jobs", 1, "--seeds", "0", "1", "--names"]
    for chosen in (names[:1], names):
        subprocess.run([*map(str, command), *chosen], check=True, timeout=300, cwd=tmp_path)
    stored = json.loads(path.read_text())
    assert list(stored["results"]) == names
    for title, seeds in stored["results"].items():
        assert list(seeds) == ["0", "1"]
        assert list(stored["between seeds"][title]) == ["0 1"]
        assert all(0 <= figures["grid pointing"] <= 1 for figures in seeds.values())
        assert len({json.dumps(figures) for figures in seeds.values()}) == 2
