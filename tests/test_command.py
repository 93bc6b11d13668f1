"""`python -m interpgrad explain`, and what reads classifiers by name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("torchvision", "timm", "PIL", "matplotlib"):
    pytest.importorskip(name)
import timm  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402

from interpgrad import __main__, plot, published, saliency  # noqa: E402

pytestmark = pytest.mark.cpu("the command runs on the CPU")


@pytest.fixture
def files(tmp_path):
    """A photograph, and the weights of a ResNet-18 of ten classes as a training stores them."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "weights.pt")
    pixels = (255 * torch.rand(90, 120, 3)).byte().numpy()
    Image.fromarray(pixels).resize((120, 90)).save(tmp_path / "photo.png")
    return tmp_path, model


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["interpgrad", "explain", *map(str, arguments)])
    __main__.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("method", ["grad_cam", "eigen_cam", "gradient", "guided_gradient"])
def test_the_picture_is_the_map_over_the_photograph(files, method, monkeypatch, capsys):
    folder, model = files
    output = folder / "out.png"
    options = ["--model", "resnet18", "--weights", folder / "weights.pt", "--classes", 10, "--size", 64]
    said = run(monkeypatch, capsys, folder / "photo.png", *options, "--map", method, "--class", 4, "-o", output)

    image = published.square(64)(Image.open(folder / "photo.png").convert("RGB"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image - mean[:, None, None]) / std[:, None, None])[None]
    probability = model(x).softmax(1)[0, 4].item()
    if method in saliency.CAMS:
        shown, where = saliency.CAMS[method](model, x, "layer4", 4)[0], " at layer4"
    else:
        total, where = getattr(saliency, method)(model, x, 4).abs().sum(1)[0], ""
        shown = (total / total.quantile(0.99)).clamp(max=1)
    assert said == f"{output}: {method}{where} of class 4, probability {probability:.3f}\n"
    written = torch.tensor(__import__("numpy").asarray(Image.open(output).convert("RGB"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(written, plot.overlay(image, shown), rtol=0, atol=2 / 255)


BAD = {
    "no photograph": (["none.png"], {}, "expected a photograph in none.png, could not read it: "),
    "no model": ([], {"--model": "resnett18"}, "got 'resnett18': close to it are resnet18"),
    "no weights": ([], {"--weights": "none.pt"}, "expected a checkpoint at none.pt, found no file."),
    "no such class": ([], {"--class": 10}, "expected a class from 0 to 9, got 10."),
    "no such layer": ([], {"--layer": "layer5"}, "expected the dotted name of a layer of the model, got 'layer5': "),
    "another network's": ([], {"--model": "resnet34"}, "expected the weights of a ResNet in "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name, files, monkeypatch, capsys):
    folder, _ = files
    images, changed, message = BAD[name]
    options = {"--model": "resnet18", "--weights": folder / "weights.pt", "--classes": 10} | changed
    arguments = [each for pair in options.items() for each in pair]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *(images or [folder / "photo.png"]), *arguments, "-o", folder / "out.png")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("interpgrad: expected")
    assert not (folder / "out.png").exists()
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *(images or [folder / "photo.png"]), *arguments, "-o", folder / "out.png")
    assert message in capsys.readouterr().err


def test_models_of_timm_and_their_images():
    torch.manual_seed(0)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    path = Path("vit.safetensors")
    assert not path.exists()
    with pytest.raises(published.BadInputError, match=r"expected a checkpoint at .*, found no file"):
        published.classifier("vit_tiny_patch16_224", str(path), 7)
    preprocessing = published.timm_preprocessing(expected)
    shown = preprocessing.show(Image.new("RGB", (300, 280), (255, 0, 0)))
    assert shown.shape == (3, 224, 224)
    torch.testing.assert_close(shown[:, 100, 100], torch.tensor([1.0, 0.0, 0.0]))


def test_the_last_layer_with_positions():
    model = torchvision.models.resnet18(num_classes=10).eval()
    assert published.last_layer(model, torch.rand(1, 3, 64, 64)) == "layer4"
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)).eval()
    assert published.last_layer(swin, torch.rand(1, 3, 64, 64)) == "norm"
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    with pytest.raises(published.BadInputError, match=r"found none: name one, for instance blocks.1.norm1"):
        published.last_layer(vit, torch.rand(1, 3, 64, 64))
    with pytest.raises(published.BadInputError, match="expected a last layer whose output is"):
        published.last_layer(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)), torch.rand(1, 3, 2, 2))


def test_it_is_a_command():
    command = [sys.executable, "-m", "interpgrad", "explain", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "grad_cam" in result.stdout
    assert "--weights" in result.stdout
