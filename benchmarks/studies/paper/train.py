"""Train one network of the experiments, on CIFAR-10, CIFAR-100 or a folder of images.

    cd benchmarks/studies/paper
    python train.py --network resnet18 --data cifar100 --lam 0 --output runs/plain
    python train.py --network resnet18 --data cifar100 --lam 0.3 --output runs/with
    python train.py --network small_resnet --width 32 --one-cycle --epochs 8 --data DIR --output ...

Writes OUTPUT/checkpoint.pt after every epoch, all or nothing, and OUTPUT/run.json at the end. Killed at any moment and
started again, it goes on from there and ends at the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[3] / "examples")]
from images import BadInputError, Images, cifar, photographs
from networks import NETWORKS, build
from quickstart import positive
from training import Run, Setting, augment, one_cycle, sgd

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def start(options: argparse.Namespace, images: Images) -> Run:
    """The run before its first step."""
    torch.manual_seed(options.seed)
    model = build(options.network, len(images.classes), options.width, images.train[0]).to(options.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    epoch = max(1, len(images.train[0]) // options.batch)
    steps = options.epochs * epoch
    if options.one_cycle:
        return one_cycle(Setting.of(options), model, steps, options.lr, AMP[options.amp])
    optimizer = sgd(model, options.lr)
    rate = lambda step: min(1, (step + 1) / epoch) * 0.2 ** sum(step >= share * steps for share in (0.3, 0.6, 0.8))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return Run(Setting.of(options), model, steps, optimizer, schedule, AMP[options.amp])


def train_epoch(run: Run, x: Tensor, y: Tensor, epoch: int, options: argparse.Namespace) -> dict[str, float]:
    """One pass over the images; its draws depend on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(1000 * options.seed + epoch)
    torch.manual_seed(1000 * options.seed + epoch)
    run.model.train()
    hits, logs, began = torch.zeros((), device=x.device), {}, time.perf_counter()
    batches = torch.randperm(len(x), generator=generator).split(options.batch)
    batches = batches[: run.steps // options.epochs]
    with tqdm(batches, desc=f"epoch {epoch + 1}/{options.epochs}", unit="step", leave=False) as progress:
        for index, chosen in enumerate(progress):
            images, labels = augment(x[chosen.to(x.device)], generator, options.rotation), y[chosen.to(x.device)]
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            hits += (run.step(images, labels).argmax(1) == labels).sum()
            if index % 50 == 49:  # each reading of a value waits for the device
                logs = run.regularizer.logs()
                progress.set_postfix(accuracy=f"{float(hits) / (index + 1) / options.batch:.3f}", **_short(logs))
    seconds = time.perf_counter() - began
    count = len(batches) * options.batch
    return {"train accuracy": float(hits) / count, "images per second": count / seconds} | run.regularizer.logs()


def _short(logs: dict[str, float]) -> dict[str, str]:
    return {name: f"{logs[name]:.3g}" for name in ("term", "cosine") if name in logs}


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).double().mean())


def read(data: str, limit: int | None) -> Images:
    """Torchvision's CIFAR, downloaded once into ./data, or a folder."""
    if data in ("cifar10", "cifar100"):
        return cifar(data, Path("data"))
    return photographs(Path(data), limit)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18", help="(%(default)s)")
    parser.add_argument(
        "--width", type=float, help="scales the channels (64 resnet18, 1 mobilenet_v2, 16 small_resnet)"
    )
    parser.add_argument("--data", default="cifar100", help="cifar10, cifar100 or a folder (%(default)s)")
    parser.add_argument("--limit", type=positive, help="at most this many training images of a folder")
    parser.add_argument("--epochs", type=positive, default=200, help="(%(default)s)")
    parser.add_argument("--batch", type=positive, default=128, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate (%(default)s)")
    parser.add_argument("--one-cycle", action="store_true", help="instead of steps at 30, 60 and 80%%")
    parser.add_argument("--rotation", type=float, default=15.0, help="degrees, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--amp", choices=AMP, default="none", help="(%(default)s)")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--log", type=Path, help="folder for TensorBoard's events")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    Setting.add_arguments(parser.add_argument_group("interpretable gradient loss"), defaults=Setting())
    return parser.parse_args(words)


_NO_MATTER = ("output", "log", "device")  # what may change between a run and its continuation


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The finished run's record."""
    images = read(options.data, options.limit)
    run, history = start(options, images), []
    told = {name: str(value) for name, value in vars(options).items() if name not in _NO_MATTER}
    checkpoint = options.output / "checkpoint.pt"
    if checkpoint.exists():
        stored = torch.load(checkpoint, map_location=options.device, weights_only=True)
        if stored["options"] != told:
            differing = [name for name in told if stored["options"].get(name) != told[name]]
            raise BadInputError(f"expected the options that {checkpoint} was made with, {differing} differ.")
        run.load_state_dict(stored["run"])
        history = stored["history"]
    writer = None
    if options.log:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.log)
    x, y = (part.to(options.device) for part in images.train)
    for epoch in range(len(history), options.epochs):
        history.append(train_epoch(run, x, y, epoch, options))
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items()))
        for name, value in history[-1].items() if writer else ():
            writer.add_scalar(name, value, epoch + 1)
        save({"run": run.state_dict(), "history": history, "options": told}, checkpoint)
    found = accuracy(run.model, *(part.to(options.device) for part in images.test))
    print(f"accuracy on the {len(images.test[0])} test images: {found:.4f}")
    record = {"setting": asdict(run.setting), "options": told, "accuracy": found, "torch": torch.__version__}
    record |= {"network": {"name": options.network, "width": options.width, "classes": images.classes}}
    record |= {"history": history}
    (options.output / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def save(state: dict[str, Any], path: Path) -> None:
    """All or nothing, whenever it is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


if __name__ == "__main__":
    try:
        train(arguments())
    except BadInputError as reason:
        print(f"train: {reason}", file=sys.stderr)
        sys.exit(2)
