"""Images and the further arguments that the model takes with them, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from interpgrad.model import call, class_logits, logits_of


class Inputs:
    """Images x (N, ...) and further arguments of the model by name, to be indexed by images.

    A tensor among these has one row for each image, which follows it into chunks and copies. Anything else, and a
    tensor without dimensions, is handed on as it is: captum's rule.
    """

    def __init__(self, x: Tensor, model_kwargs: Mapping[str, Any] | None) -> None:
        self.x, self.kwargs = x, dict(model_kwargs or {})
        for name, value in self.kwargs.items():
            if _has_rows(value) and len(value) != len(x):
                raise ValueError(
                    f"expected model_kwargs[{name!r}] to have one row for each of the {len(x)} images, got shape "
                    f"{tuple(value.shape)}: bind what is the same for all images in a module of your own."
                )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, images: slice | Tensor) -> Inputs:
        return Inputs(_rows(self.x, images), {name: _rows(value, images) for name, value in self.kwargs.items()})

    def split(self, size: int) -> list[Inputs]:
        """Parts of at most `size` images."""
        return [self[first : first + size] for first in range(0, len(self), size)]

    def with_images(self, x: Tensor) -> Inputs:
        """Other images with these arguments."""
        return Inputs(x, self.kwargs)

    def logits(self, model: nn.Module) -> Tensor:
        """The model's logits of classes, (N, classes)."""
        return class_logits(logits_of(call(model, self.x, (), self.kwargs)))

    @property
    def differ_beside_x(self) -> bool:
        """Whether the arguments are not the same for all images."""
        return any(map(_has_rows, self.kwargs.values()))


def check_finite(x: Tensor, what: str = "images") -> None:
    """Refuse images (N, ...), or maps, with NaN or infinity."""
    unusable = (~x.isfinite()).flatten(1).any(1)
    if unusable.any():
        raise ValueError(f"expected finite {what}, got NaN or infinity in {which(unusable)}: mend or drop them first.")


def which(marked: Tensor) -> str:
    """How many of a batch are marked (N,), and which, for a message: "2 of 9 (index 3, 4)"."""
    indices = marked.nonzero().flatten().tolist()
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"{len(indices)} of {len(marked)} (index {shown})"


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _rows(value: Any, images: slice | Tensor) -> Any:
    if not _has_rows(value):
        return value
    return value[images.to(value.device) if isinstance(images, Tensor) else images]
