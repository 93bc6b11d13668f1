"""The training scripts, run on tiny images: resumed bit for bit, interrupted, in their options, by two processes."""

import argparse
import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nets import run_script
from PIL import Image
from safetensors.torch import load_file
from torch import nn

pytestmark = [pytest.mark.cpu("the examples choose their device"), pytest.mark.slow]
ROOT = Path(__file__).parent.parent

# 7 batches of 4 an epoch: `every` 3 divides neither an epoch nor two of them.
COMMON = {
    "timm": "--model test_resnet --img-size 32 --num-classes 2 --clip-grad 1 --model-ema 0.9",
    "torchvision": "--model shufflenet_v2_x0_5 --size 32 --clip-grad-norm 1 --model-ema-decay 0.9",
    "lightning": "--model shufflenet_v2_x0_5 --size 32 --accelerator cpu",
    "accelerate": "--model shufflenet_v2_x0_5 --size 32 --cpu",
}
CHECKPOINTS = {
    "timm": ("output/last.pth.tar", ["state_dict", "state_dict_ema"]),
    "torchvision": ("output/checkpoint.pth", ["model", "ema"]),
    "lightning": ("output/last.ckpt", ["state_dict"]),
    "accelerate": ("output/last", []),
}


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
    common = f"--batch-size 4 --workers 0 --lam 0.1 --every 3 --start-step 0 --warmup 0 {COMMON[name]}".split()
    return [sys.executable, "-W", "ignore", script, str(folder), *common, *arguments]


def environment(cwd):
    return os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(cwd), "CUDA_VISIBLE_DEVICES": ""}


def run(name, folder, cwd, *arguments):
    cwd.mkdir(exist_ok=True)
    if name in ("timm", "torchvision"):  # the others' packages keep a state of the process
        script, *options = command(name, folder, *arguments)[3:]
        result = run_script(script, *options, cwd=cwd)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout + result.stderr
    result = subprocess.run(
        command(name, folder, *arguments), capture_output=True, text=True, cwd=cwd, env=environment(cwd), timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def weights(name, cwd):
    """Of the network, and of its average."""
    path, parts = CHECKPOINTS[name]
    if not parts:
        return load_file(cwd / path / "model.safetensors")
    checkpoint = torch.load(cwd / path, map_location="cpu", weights_only=False)
    return {f"{part} {key}": value for part in parts for key, value in checkpoint.get(part, {}).items()}


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """Of each script: what it shows in four epochs, and the weights at their end."""

    @functools.cache
    def train(name):
        cwd = tmp_path_factory.mktemp(name)
        return run(name, folder, cwd, "--epochs", "4"), weights(name, cwd)

    return train


def assert_resumed_is(expected, name, folder, cwd):
    run(name, folder, cwd, "--epochs", "4", "--resume", CHECKPOINTS[name][0])
    found = weights(name, cwd)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize("name", COMMON)
def test_the_scripts_are_short(name):
    assert len((ROOT / "examples" / f"train_{name}.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("name", COMMON)
def test_a_resumed_run_is_the_uninterrupted_one(name, folder, uninterrupted, tmp_path):
    """Two epochs and two more, of 7 steps each, where the loss is computed at every third."""
    shown, expected = uninterrupted(name)
    assert "term" in shown
    assert "cosine" in shown
    checked = run(name, folder, tmp_path, "--epochs", "4", "--stop-after", "2", "--check")
    assert "can be used with the interpretable gradient loss:\nnote   activations: guided at" in checked
    halfway = weights(name, tmp_path)
    assert any(not torch.equal(value, expected[key]) for key, value in halfway.items())
    assert_resumed_is(expected, name, folder, tmp_path)


def test_a_model_that_fails_the_check_is_not_trained(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    loss_options = importlib.import_module("loss_options")
    parser = argparse.ArgumentParser()
    loss_options.add_arguments(parser)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    loss_options.check(linear, 4, parser.parse_args([]))
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit):
        loss_options.check(linear, 4, parser.parse_args(["--check"]))
    assert "error  the loss: expected at least one activation" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMON)
def test_an_interrupted_run_can_be_resumed(name, folder, uninterrupted, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        arguments = command(name, folder, "--epochs", "4")
        heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
        process = subprocess.Popen(
            arguments, stdout=log, stderr=log, cwd=tmp_path, env=environment(tmp_path), preexec_fn=heeded
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / CHECKPOINTS[name][0]).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        while process.poll() is None:  # again, should it have come where Python has to ignore it
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            time.sleep(1)
    assert process.returncode != 0, (tmp_path / "log").read_text()
    assert_resumed_is(uninterrupted(name)[1], name, folder, tmp_path)


MIXES = ["--mixup", "0.4", "--cutmix", "0.4", "--smoothing", "0.1"]
OPTIONS = {
    "timm: mixed labels in bf16": ("timm", [*MIXES, "--amp", "bfloat16"]),
    "timm: binary cross-entropy in fp16 with a scaler": ("timm", ["--bce-loss", *MIXES, "--amp", "float16"]),
    "timm: accumulation, channels_last, warm-up": (
        "timm",
        ["--grad-accum-steps", "2", "--channels-last", "--warmup-epochs", "1", "--batch-size", "5"],
    ),
    "timm: a transformer": ("timm", ["--model", "test_vit", "--img-size", "160", "--opt", "adamw"]),
    "torchvision": (
        "torchvision",
        ["--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--label-smoothing", "0.1", "--lr-warmup-epochs", "1"],
    ),
    "torchvision in bf16": ("torchvision", ["--amp", "bfloat16"]),
    "lightning in bf16": ("lightning", ["--precision", "bf16-mixed"]),
    "accelerate in bf16": ("accelerate", ["--mixed-precision", "bf16", "--grad-accum-steps", "2"]),
}


def test_a_run_that_is_not_resumed_begins_anew(folder, tmp_path):
    """Lightning resumes unasked if a callback saves on exceptions."""
    for _ in range(2):
        assert "Restored" not in run("lightning", folder, tmp_path, "--epochs", "1")


def test_timm_without_held_out_images(tmp_path):
    (tmp_path / "train" / "dark").mkdir(parents=True)
    arguments = command("timm", tmp_path)
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path))
    assert result.returncode != 0
    assert f"expected {tmp_path / 'val'}, with one folder of images per class" in result.stderr


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, folder, tmp_path):
    name, arguments = OPTIONS[options]
    assert "nan" not in run(name, folder, tmp_path, "--epochs", "2", "--stop-after", "1", *arguments).lower()
    assert all(value.isfinite().all() for value in weights(name, tmp_path).values() if value.is_floating_point())


@pytest.mark.parametrize("name", COMMON)
def test_two_processes(name, folder, tmp_path):
    """Under torchrun, or as Lightning starts them."""
    arguments = command(name, folder, "--epochs", "1")
    if name == "lightning":
        arguments += ["--strategy", "ddp", "--devices", "2"]
    else:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0"]
        arguments[1:3] = [*launcher, "--rdzv-backend", "c10d"]
    env = environment(tmp_path)
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "accuracy" in result.stdout
    assert all(value.isfinite().all() for value in weights(name, tmp_path).values() if value.is_floating_point())
