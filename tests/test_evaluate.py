"""Table 2 of one network or two: its figures, its files, going on after an interruption, its complaints."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision

pytestmark = [pytest.mark.cpu("the examples choose their device"), pytest.mark.slow]
ROOT = Path(__file__).parent.parent
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

import classifiers  # noqa: E402
import evaluate  # noqa: E402
from PIL import Image  # noqa: E402

from interpgrad import metrics, published  # noqa: E402


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """evaluate.py with these arguments, in an empty folder: what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def checkpoints(tmp_path):
    """Two small networks, untrained but for their statistics."""
    for seed, name in enumerate(("without", "with")):
        torch.manual_seed(seed)
        model = classifiers.small_resnet(10)
        model.train()(torch.rand(32, 3, 32, 32))
        classifiers.save(model, [str(digit) for digit in range(10)], tmp_path / f"{name}.pt")
    return tmp_path / "without.pt", tmp_path / "with.pt"


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("dark", "light"):
        target = tmp_path / "photos" / "test" / name
        target.mkdir(parents=True)
        for index in range(3):
            pixels = torch.randint(0, 256, (70, 90, 3), generator=generator).byte()
            Image.fromarray(pixels.numpy()).save(target / f"{index}.png")
    return tmp_path / "photos"


QUICK = ("--limit", 6, "--methods", "grad_cam", "axiom_cam", "--protocol", "ca_stream")


def test_table_of_one_network(run, checkpoints):
    """Every figure is what the library says of the same images."""
    text = run(checkpoints[0], "--limit", 5, "--plot")
    network = classifiers.load(str(checkpoints[0]), 10)
    task = evaluate.read_task(None, network.preprocessing.show, 5)
    ((x, y),) = task.batches(64)
    rows = list(csv.DictReader(Path("evaluation/table.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == list(evaluate.TITLES)
    for row in rows:
        maps = evaluate.maps_of(row["method"], network.model, x, "6", None, "log_prob", {})
        assert float(row["size"]) == pytest.approx(100 * float(maps.mean()), abs=1e-4)
        for name, values in metrics.faithfulness(network.model, x, maps).items():
            assert float(row[name]) == pytest.approx(float(values.mean()), abs=1e-4)
    accuracy = 100 * float((network.model(x).argmax(1) == y).float().mean())
    assert f"accuracy without {accuracy:.1f}%" in text
    assert "protocol rise: insertion from a 11x11" in text
    assert "layer 6" in text
    assert Path("evaluation/table.md").read_text() in text
    for name in ("gradients", "cams", "curves"):
        assert Path(f"evaluation/{name}.png").stat().st_size > 10_000


def test_comparison_of_two(run, checkpoints):
    text = run(checkpoints[0], "--compare", checkpoints[1], *QUICK)
    stored = json.loads(Path("evaluation/results.json").read_text())
    assert [row["network"] for row in stored["rows"]] == ["without", "with", "difference"] * 2
    before, after, difference = stored["rows"][:3]
    for name in evaluate.METRICS:
        mean, low, high = difference[name]
        assert mean == pytest.approx(after[name] - before[name])
        assert low <= mean <= high
    assert "paired bootstrap" in text
    assert re.search(r"\| Grad-CAM +\| difference +\| [+-]\d+\.\d\d \[", text)


def test_a_network_does_not_differ_from_itself(run, checkpoints):
    text = run(checkpoints[0], "--compare", checkpoints[0], *QUICK)
    assert text.count("+0.00 [+0.00, +0.00]") == 2 * len(evaluate.METRICS)
    assert "*" not in text.replace("* where", "")


def test_bootstrap_covers_the_mean_difference(monkeypatch):
    """95% intervals of 100 experiments, of differences with mean 1: neither all nor few of them hold it."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        before = rng.standard_normal(40)
        after = before + 1 + rng.standard_normal(40)
        mean, low, high = evaluate.bootstrap(before.tolist(), after.tolist(), rng)
        assert mean == pytest.approx(float((after - before).mean()), abs=1e-6)
        covered += low <= 1 <= high
    assert 86 <= covered <= 100


def test_goes_on_after_an_interruption(run, checkpoints, monkeypatch):
    original, seen = evaluate.evaluate, []

    def interrupted(network, task, layer, method, options):
        seen.append(method)
        if seen == ["grad_cam", "axiom_cam"]:
            raise KeyboardInterrupt
        return original(network, task, layer, method, options)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints[0], *QUICK)
    run(checkpoints[0], *QUICK)
    assert seen == ["grad_cam", "axiom_cam", "axiom_cam"]
    run(checkpoints[0], *QUICK)
    assert len(seen) == 3
    run(checkpoints[0], *QUICK, "--target", "label")  # other settings: nothing of it may be used
    assert len(seen) == 5
    checkpoints[1].rename(checkpoints[0])  # other weights under the same name
    run(checkpoints[0], *QUICK)
    assert len(seen) == 7


def test_folder_and_weights_of_a_torchvision_model(run, folder, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, tmp_path / "m.pt")
    text = run("resnet18:m.pt", "--data", folder, "--size", 64, "--methods", "grad_cam", "--protocol", "ca_stream")
    assert "6 images of 64x64" in text
    assert "layer layer4" in text
    network = classifiers.load("resnet18:m.pt", 2, 64)
    assert network.preprocessing.mean == (0.485, 0.456, 0.406)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.model(x), model.eval()(x))


def photograph():
    return Image.fromarray(torch.randint(0, 256, (300, 400, 3)).byte().numpy())


@pytest.mark.parametrize("name", ["inception_v3", "efficientnet_b3", "vit_h_14"])
def test_a_network_of_torchvision_is_shown_what_it_was_published_for(name):
    """Its own size, crop, interpolation and normalization, which are not those of ResNet-50."""
    found, picture = published.torchvision_preprocessing(name), photograph()
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (found.mean, found.std))
    expected = torchvision.models.get_model_weights(name).DEFAULT.transforms()(picture)
    assert expected.shape[-1] != 224
    torch.testing.assert_close((found.show(picture) - mean) / std, expected)


@pytest.mark.parametrize("name", ["tf_efficientnet_b1", "vit_tiny_patch16_224", "mobilenetv3_large_100"])
def test_a_network_of_timm_is_shown_what_it_was_published_for(name):
    model, picture = timm.create_model(name), photograph()
    found = published.timm_preprocessing(model)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (found.mean, found.std))
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture)
    torch.testing.assert_close((found.show(picture) - mean) / std, expected)


def test_networks_without_weights_of_ones_own_are_shown_published_images(run, folder, tmp_path):
    """Through the whole script: 160 pixels for timm's network for tests, as the table says."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save({"state_dict": {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "m.pt")
    text = run("test_resnet:m.pt", "--data", folder, "--limit", 2, "--methods", "grad_cam", "--protocol", "ca_stream")
    assert "2 images of 160x160" in text


def test_cifar(run, checkpoints, tmp_path):
    """As torchvision stores it."""
    import pickle

    data = tmp_path / "cifar" / "cifar-10-batches-py"
    data.mkdir(parents=True)
    pixels = torch.randint(0, 256, (8, 3072), generator=torch.Generator().manual_seed(0)).byte().numpy()
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    for name in names:
        (data / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(8))}))
    (data / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda _: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        text = run(checkpoints[0], "--data", tmp_path / "cifar", *QUICK)
    assert "cifar, 6 images of 32x32" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch"], "expected the name of a classifier of torchvision or timm"),
        (["resnet18:missing.pt"], "expected a checkpoint at missing.pt, found no file"),
        (["without.pt", "--data", "missing"], "expected missing to hold test/ or val/"),
        (["broken.pt"], "expected a checkpoint of tensors in broken.pt"),
        (["foreign.pt"], "it names no architecture: give it as NAME:foreign.pt"),
        (["resnet18:foreign.pt"], "expected the weights of a ResNet in foreign.pt"),
        (
            ["without.pt", "--compare", "resnet18:big.pt"],
            "expected networks that are shown the same images, got Compose(",
        ),
    ],
)
def test_complaints(arguments, message, run, checkpoints, tmp_path, capsys):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "foreign.pt")
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "big.pt")
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
