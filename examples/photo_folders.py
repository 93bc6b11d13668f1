"""What train_accelerate.py and train_lightning.py share: loaders of a folder of photographs, and common options."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2


def loaders(data: Path, size: int, batch: int, workers: int) -> tuple[DataLoader, DataLoader]:
    convert = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *convert])
    plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *convert])
    held_out = data / "val" if (data / "val").is_dir() else data / "test"
    train, test = (torchvision.datasets.ImageFolder(*each) for each in ((data / "train", augment), (held_out, plain)))
    settings = {"batch_size": batch, "num_workers": workers}
    return DataLoader(train, shuffle=True, **settings), DataLoader(test, **settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, help="folder with train/, and val/ or test/, one folder for each class in it"
    )
    parser.add_argument("--model", default="resnet18", help="of torchvision (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--stop-after", type=int, help="epochs after which to stop, of all that are planned")
