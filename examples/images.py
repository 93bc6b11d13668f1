"""The images the examples train on: digits on photographs, or a folder of photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.published import BadInputError

SIZE = 32  # pixels, height and width of every image
_SCAN = 16  # pixels, height and width of a digit
_INK = 0.3  # ink from which on a pixel counts as the digit


@dataclass
class Images:
    """A classification task: images (N, 3, 32, 32) in [0, 1], labels (N,), names of the classes."""

    name: str
    classes: list[str]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    evidence: Tensor | None = None  # (N, 32, 32) bool: where in the test images the evidence lies, if known
    train_evidence: Tensor | None = None  # the same of the training images

    def to(self, device: torch.device | str) -> Images:
        """The same on another device."""
        pairs = [(x.to(device), y.to(device)) for x, y in (self.train, self.test)]
        masks = [None if each is None else each.to(device) for each in (self.evidence, self.train_evidence)]
        return Images(self.name, self.classes, *pairs, *masks)


def digits_on_photographs(train: int, test: int) -> Images:
    """Scanned handwritten digits at random places on crops of two photographs, all bundled with scikit-learn.

    The test set shares neither a scan nor a part of a photograph with the training set.
    """
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    scans = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
    scans = F.interpolate(scans, (_SCAN, _SCAN), mode="bilinear")
    labels = torch.tensor(digits.target)
    shuffled = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    halves = [photo.tensor_split(2, dim=2) for photo in photos]

    def compose(count: int, own: Tensor, half: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        backgrounds = torch.stack([_textured_crop([pair[half] for pair in halves], generator) for _ in range(count)])
        chosen = own[torch.randint(len(own), (count,), generator=generator)]
        return *_draw(scans[chosen], backgrounds, generator), labels[chosen]

    for_test = len(scans) // 4
    train_images, train_ink, train_labels = compose(train, shuffled[for_test:], half=0, seed=1)
    test_images, test_ink, test_labels = compose(test, shuffled[:for_test], half=1, seed=2)
    return Images(
        "digits on photographs",
        [str(digit) for digit in range(10)],
        (train_images, train_labels),
        (test_images, test_labels),
        test_ink[:, 0] > _INK,
        train_ink[:, 0] > _INK,
    )


def _textured_crop(photos: list[Tensor], generator: torch.Generator) -> Tensor:
    """A random square of a random photograph, not of plain sky: a flat background would leave gradients free."""
    while True:
        photo = photos[_integer(len(photos), generator)]
        side = 48 + _integer(153, generator)
        top, left = (_integer(length - side + 1, generator) for length in photo.shape[1:])
        crop = F.interpolate(photo[None, :, top : top + side, left : left + side], (SIZE, SIZE), mode="area")[0]
        if crop.std((1, 2)).mean() > 0.1:
            return crop


def _draw(scans: Tensor, backgrounds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits in a random colour, lighter or darker than what they cover, and their ink (N, 1, 32, 32)."""
    ink = torch.zeros(len(scans), 1, SIZE, SIZE)
    for image, scan in zip(ink, scans, strict=True):
        top, left = torch.randint(SIZE - _SCAN + 1, (2,), generator=generator).tolist()
        image[:, top : top + _SCAN, left : left + _SCAN] = scan
    covered = (backgrounds * ink).sum((1, 2, 3)) / (3 * ink.sum((1, 2, 3)))
    dark = torch.rand(len(scans), 3, 1, 1, generator=generator) * 0.3
    colour = torch.where(covered[:, None, None, None] > 0.5, dark, 1 - dark)
    return backgrounds * (1 - ink) + colour * ink, ink


def photographs(folder: Path, limit: int | None, test: int | None = None) -> Images:
    """An ImageFolder with train/ and test/ (or val/), each with one folder per class, resized to 32x32.

    `limit` bounds the training images, `test` the test images, both taken evenly from the classes.
    """
    splits = [folder / "train", folder / "test" if (folder / "test").is_dir() else folder / "val"]
    for split in splits:
        if not split.is_dir():
            raise BadInputError(
                f"expected {folder} to hold train/ and test/ (or val/) with one folder of images per class, "
                f"but {split} is no folder."
            )
    classes, other = (sorted(entry.name for entry in split.iterdir() if entry.is_dir()) for split in splits)
    if classes != other or not classes:
        differing = ", ".join(sorted(set(classes) ^ set(other))) or "none found"
        raise BadInputError(
            f"expected the same class folders in {splits[0]} and {splits[1]}, they differ in: {differing}."
        )
    per_class = [None if count is None else max(1, count // len(classes)) for count in (limit, test)]
    read = [_read(split, classes, count) for split, count in zip(splits, per_class, strict=True)]
    return Images(folder.name, classes, *read)


def cifar(name: str, folder: Path) -> Images:
    """CIFAR-10 or CIFAR-100 ("cifar10", "cifar100"), downloaded into the folder if it is not there."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, test = (dataset(str(folder), train=part, download=True) for part in (True, False))
    parts = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() / 255, torch.tensor(part.targets))
        for part in (train, test)
    ]
    return Images(name, list(train.classes), *parts)


def _read(split: Path, classes: list[str], per_class: int | None) -> tuple[Tensor, Tensor]:
    from PIL import UnidentifiedImageError
    from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (split / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not paths:
            raise BadInputError(f"expected images in {split / name}, found none ({', '.join(IMG_EXTENSIONS)}).")
        for path in paths[:per_class]:
            try:
                picture = default_loader(str(path))
            except (OSError, UnidentifiedImageError) as reason:
                raise BadInputError(f"expected an image in {path}, could not read it: {reason}.") from reason
            images.append(pil_to_tensor(center_crop(resize(picture, SIZE), SIZE)))
            labels.append(label)
    return torch.stack(images) / 255, torch.tensor(labels)


def _integer(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))
