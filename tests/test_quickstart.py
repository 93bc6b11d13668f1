"""The main job: its images, its figures, its complaints."""

import functools
import json
from pathlib import Path

import pytest
import torch
from nets import run_script

pytestmark = [pytest.mark.cpu("the examples choose their device"), pytest.mark.slow]
ROOT = Path(__file__).parent.parent
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

import classifiers  # noqa: E402
import comparisons  # noqa: E402
import figures  # noqa: E402
import images  # noqa: E402
import training  # noqa: E402
from PIL import Image  # noqa: E402


def run(*arguments, cwd):
    return run_script(ROOT / "examples" / "quickstart.py", *arguments, cwd=cwd)


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
    monkeypatch.setattr(figures, "gradients", lambda *_: (delta, 2 * delta))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    found = figures.evaluate(model, task, "logit")
    assert found["accuracy"] == 0.5
    assert found["cosine"] == pytest.approx(1)
    assert found["classes"] == pytest.approx(1)
    assert found["on digit"] == pytest.approx((3 / 4 + 1 / 1024) / 2)
    assert found["pointing"] == 0.5  # the flat map points at its first pixel, beside the evidence
    # Under a 5x5 mean the first image has a plateau around its pixel, whose first lies two rows and columns before it.
    assert found["pointing, mean"] == 0
    border = 1 - (4 * 30 * (1 - (6 / 9) ** 2) + 4 * (1 - (4 / 9) ** 2)) / 1024
    assert found["smooth"] == pytest.approx((1 / 3 + border**0.5) / 2)


def test_worth_in_samples_of_smoothgrad():
    """The numbers of samples at the measured points, their geometric mean halfway, and both ends."""
    measured = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97]
    for samples, value in zip((0, *comparisons.SAMPLES), measured, strict=True):
        assert comparisons.worth(measured, value) == pytest.approx(samples)
    assert comparisons.worth(measured, 0.75) == pytest.approx(8**0.5)
    assert comparisons.worth(measured, 0.4) == 0
    assert comparisons.worth(measured, 0.98) == float("inf")


def test_a_random_network_is_told_from_a_trained_one():
    """Redrawn weights change delta, those of the last layer alone less than all; the network stays as it was."""
    torch.manual_seed(0)
    model = classifiers.small_resnet(10)
    task = images.digits_on_photographs(64, 30)
    model.train()(task.train[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = comparisons.randomized(model, task)
    assert abs(found["cosine, all layers"]) < abs(found["ranks, last layer"]) <= 1
    assert found["ranks, all layers"] < found["ranks, last layer"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_smoothgrad_of_no_noise_is_the_gradient(monkeypatch):
    monkeypatch.setattr(
        comparisons.saliency, "smooth_gradient", lambda model, x, y, samples, **options: plain(model, x, y)
    )
    plain = functools.partial(comparisons.saliency.gradient, criterion="log_prob")
    torch.manual_seed(0)
    model = classifiers.small_resnet(10)
    task = images.digits_on_photographs(64, 20)
    model.train()(task.train[0])
    found = comparisons.smoothed(model, task)
    assert found["own"] == pytest.approx([1.0] * len(comparisons.SAMPLES))
    assert found["insertion"] == pytest.approx([found["insertion"][0]] * (1 + len(comparisons.SAMPLES)))
    assert found["pointing"] == [found["pointing"][0]] * (1 + len(comparisons.SAMPLES))


def test_augmentation_is_a_crop_mirrored_or_not():
    """Each result is one of the 2 x 81 images that cropping and mirroring give; rotation by 0 degrees is none."""
    x = torch.rand(20, 3, 8, 8)
    padded = torch.nn.functional.pad(x, (4,) * 4, mode="reflect")
    crops = [padded[:, :, top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
    possible = torch.stack(crops + [crop.flip(3) for crop in crops], 1)
    result = training.augment(x, torch.Generator().manual_seed(0))
    assert (possible == result[:, None]).flatten(2).all(2).any(1).all()
    assert len({tuple(row.tolist()) for row in (possible == result[:, None]).flatten(2).all(2)}) > 10
    turned = training._rotated(x, torch.tensor([0.0] * 19 + [torch.pi / 2]))
    assert torch.allclose(turned[:19], x[:19], atol=1e-5)
    assert torch.allclose(turned[19], x[19].rot90(1, (1, 2)), atol=1e-5) or torch.allclose(
        turned[19], x[19].rot90(-1, (1, 2)), atol=1e-5
    )


def test_a_tiny_run_on_digits(tmp_path):
    result = run("--quick", "--epochs", 1, "--seeds", 1, "--limit", 128, "--json", "demo.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| without " in result.stdout
    assert "| with, λ =" in result.stdout
    assert "pointing game" in result.stdout
    picture = Image.open(tmp_path / "demo.png")
    assert picture.width > 800
    assert picture.convert("L").getextrema()[0] < 100, "an empty picture"
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    for found in (row for seeds in rows.values() for row in seeds):
        assert 0 <= found["accuracy"] <= 1
        assert -1 <= found["cosine"] <= 1
        assert 0 < found["smooth"] <= 1
        assert found["ms/step"] > 0


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
