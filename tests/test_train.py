"""The training scripts: one tiny epoch, and a resumed run that is the uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("lightning")
pytest.importorskip("accelerate")

from PIL import Image  # noqa: E402

# 7 batches of 4 an epoch (the last of 3, or none): `every` 3 divides neither an epoch nor two of them.
COMMON = {
    "timm": ["--img-size", "32", "--num-classes", "2", "--clip-grad", "1", "--model-ema", "0.9", "--workers", "0"],
    "torchvision": ["--size", "32", "--clip-grad-norm", "1", "--model-ema-decay", "0.9", "--workers", "0"],
    "lightning": ["--size", "32", "--workers", "0", "--accelerator", "cpu"],
    "accelerate": ["--size", "32", "--workers", "0", "--cpu"],
}
CHECKPOINTS = {
    "timm": ("output/last.pth.tar", "state_dict"),
    "torchvision": ("output/checkpoint.pth", "model"),
    "lightning": ("output/last.ckpt", "state_dict"),
    "accelerate": ("output/last", None),
}
OUTPUT = {"torchvision": "--output-dir"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 14), ("val", 3)):
        for name, brightness in (("dark", 0), ("light", 128)):
            target = root / split / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(brightness, brightness + 128, (40, 44, 3), generator=generator).byte()
                Image.fromarray(pixels.numpy()).save(target / f"{index}.png")
    return root


def command(name, folder, *arguments):
    script = str(ROOT / "examples" / f"train_{name}.py")
    common = ["--batch-size", "4", "--lam", "0.1", "--every", "3", *COMMON[name]]
    return [sys.executable, "-W", "ignore", script, str(folder), *common, *arguments]


def environment(cwd):
    return os.environ | {"OMP_NUM_THREADS": "2", "HOME": str(cwd), "CUDA_VISIBLE_DEVICES": ""}


def run(name, folder, cwd, *arguments):
    cwd.mkdir(exist_ok=True)
    result = subprocess.run(
        command(name, folder, *arguments), capture_output=True, text=True, cwd=cwd, env=environment(cwd), timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def weights(name, cwd):
    path, key = CHECKPOINTS[name]
    if key is None:
        from safetensors.torch import load_file

        return load_file(cwd / path / "model.safetensors")
    return torch.load(cwd / path, map_location="cpu", weights_only=False)[key]


@pytest.mark.parametrize("name", COMMON)
def test_a_resumed_run_is_the_uninterrupted_one(name, folder, tmp_path):
    shown = run(name, folder, tmp_path / "whole", "--epochs", "4")
    assert "lam_R" in shown
    run(name, folder, tmp_path / "parts", "--epochs", "4", "--stop-after", "2")
    halfway = weights(name, tmp_path / "parts")
    run(name, folder, tmp_path / "parts", "--epochs", "4", "--resume", CHECKPOINTS[name][0])
    whole, parts = weights(name, tmp_path / "whole"), weights(name, tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    assert any(not torch.equal(value, whole[key]) for key, value in halfway.items())


@pytest.mark.parametrize("name", COMMON)
def test_an_interrupted_run_leaves_a_checkpoint(name, folder, tmp_path):
    process = subprocess.Popen(
        command(name, folder, "--epochs", "1000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    while b"epoch" not in (seen := process.stderr.read1().lower()):  # the progress bar of the first epoch
        assert seen, "it ended by itself"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    resumed = CHECKPOINTS[name][0]
    if name == "lightning" and not (tmp_path / resumed).exists():
        resumed = "output/interrupted.ckpt"
    run(name, folder, tmp_path, "--epochs", "1000", "--stop-after", "1", "--resume", resumed)
    assert weights(name, tmp_path) if name != "lightning" else True


TIMM = {
    "mixup and bf16": ["--mixup", "0.4", "--cutmix", "0.4", "--smoothing", "0.1", "--amp", "bfloat16"],
    "fp16 with a scaler, binary cross-entropy": ["--bce-loss", "--mixup", "0.4", "--amp", "float16", "--channels-last"],
    "accumulation": ["--grad-accum-steps", "2", "--warmup-epochs", "1", "--epochs", "2"],
    "a transformer": ["--model", "vit_tiny_patch16_224", "--opt", "adamw"],
}


@pytest.mark.parametrize("options", TIMM)
def test_options_of_timm(options, folder, tmp_path):
    shown = run("timm", folder, tmp_path, "--epochs", "1", *TIMM[options])
    assert "nan" not in shown
    assert all(value.isfinite().all() for value in weights("timm", tmp_path).values() if value.is_floating_point())


def test_options_of_torchvision(folder, tmp_path):
    options = ["--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--label-smoothing", "0.1", "--amp", "bfloat16"]
    run("torchvision", folder, tmp_path, "--epochs", "2", "--lr-warmup-epochs", "1", *options)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_two_processes(name, folder, tmp_path):
    """Under torchrun with gloo."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    arguments = command(name, folder, "--epochs", "1")[3:]
    result = subprocess.run(
        launcher + arguments,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path) | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "accuracy" in result.stdout
