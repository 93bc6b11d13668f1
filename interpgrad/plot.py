"""Figures of gradients, class activation maps, insertion and deletion curves. Needs matplotlib (the extra "plot").

Every function but `overlay` and `save` takes tensors and returns a matplotlib Figure that belongs to no window and no
global state: save it with `figure.savefig(path)`. Colours are told apart by every kind of colour vision; what is
compared shares one scale. An image without a batch is a batch of one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interpgrad.metrics import area

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIGNED, _POSITIVE = "PuOr_r", "inferno"
_LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito
_FONT = 9
_ROUNDING = 1e-3  # by which images may leave [0, 1]


def gradients(
    images: Tensor, columns: Mapping[str, Tensor], *, labels: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Images beside their gradients: one row per image, one column per gradient.

    Each gradient is summed over the colours and scaled to unit norm: a sure network's are small everywhere. One colour
    scale serves the whole figure, centred at 0.

    Args:
        images: (N, 3, H, W) or (N, 1, H, W) in [0, 1].
        columns: heading -> gradients (N, C, H, W), for instance of one or two models.
        labels: one for each image.
        title: above the figure.

    Raises ValueError for shapes that do not match, or nothing to show.

    >>> figure = gradients(torch.rand(2, 3, 8, 8), {"δ": torch.randn(2, 3, 8, 8), "δᴳ": torch.randn(2, 3, 8, 8)})
    >>> len(figure.axes)  # three columns, two rows, the colour bar
    7
    """
    images, columns = _checked(images, columns, labels, dims=4)
    shown = {name: _unit_norm(values.detach().float().cpu().sum(1)) for name, values in columns.items()}
    limit = float(torch.stack(list(shown.values())).abs().flatten().quantile(0.995)) or 1.0
    figure, grid = _grid(images, 1 + len(shown), title)
    for row, image in enumerate(images):
        _photograph(grid[row][0], image, labels[row] if labels else None)
        for axis, values in zip(grid[row][1:], shown.values(), strict=True):
            drawn = axis.imshow(values[row].numpy(), cmap=_SIGNED, vmin=-limit, vmax=limit)
    _headings(grid[0], ["image", *shown])
    bar = figure.colorbar(
        drawn, ax=[axis for row in grid for axis in row], shrink=0.6, aspect=30, pad=0.01, extend="both"
    )
    bar.set_label("gradient, summed over\ncolours, unit norm", fontsize=_FONT)
    return figure


def cams(
    images: Tensor,
    columns: Mapping[str, Tensor],
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    opacity: float = 0.6,
) -> Figure:
    """Images overlaid with maps: one row per image, one column per method or model.

    Args:
        images: (N, 3, H, W) or (N, 1, H, W) in [0, 1].
        columns: heading -> maps (N, H, W) in [0, 1].
        labels: one for each image.
        title: above the figure.
        opacity: of the overlay, in [0, 1].

    Raises ValueError for shapes that do not match, or nothing to show.

    >>> figure = cams(torch.rand(2, 3, 8, 8), {"Grad-CAM": torch.rand(2, 8, 8)}, labels=["cat", "dog"])
    """
    images, columns = _checked(images, columns, labels, dims=3)
    figure, grid = _grid(images, 1 + len(columns), title)
    for row, image in enumerate(images):
        _photograph(grid[row][0], image, labels[row] if labels else None)
        for axis, maps in zip(grid[row][1:], columns.values(), strict=True):
            _photograph(axis, image.float().mean(0, keepdim=True), None)
            drawn = axis.imshow(
                maps[row].detach().float().cpu().numpy(),
                cmap=_POSITIVE,
                vmin=0,
                vmax=1,
                alpha=opacity,
                interpolation="bilinear",
            )
    _headings(grid[0], ["image", *columns])
    bar = figure.colorbar(drawn, ax=[axis for row in grid for axis in row], shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("saliency", fontsize=_FONT)
    return figure


def overlay(image: Tensor, saliency_map: Tensor, *, opacity: float = 0.6) -> Tensor:
    """An image, made grey, under a map, as a picture (3, H, W) in [0, 1].

    Args:
        image: (3, H, W) or (1, H, W) in [0, 1].
        saliency_map: (H, W) in [0, 1].
        opacity: of the map, in [0, 1].

    Raises ValueError for shapes that do not match, or values outside of [0, 1].

    >>> overlay(torch.rand(3, 8, 8), torch.rand(8, 8)).shape
    torch.Size([3, 8, 8])
    """
    colormaps = _matplotlib("matplotlib").colormaps

    images, shown = _checked(image.detach(), {"saliency_map": saliency_map.detach()}, None, dims=3)
    given, grey = shown["saliency_map"], images[0].mean(0)
    if len(images) > 1 or not (given.min() >= 0 and given.max() <= 1) or not 0 <= opacity <= 1:
        raise ValueError(
            f"expected one image, a map and an opacity in [0, 1], got {len(images)} images, a map from "
            f"{float(given.min()):.3g} to {float(given.max()):.3g}, and {opacity}: see saliency.scale."
        )
    colours = torch.from_numpy(colormaps[_POSITIVE](shown["saliency_map"][0].detach().float().cpu().numpy()))[..., :3]
    picture: Tensor = (1 - opacity) * grey.float().cpu() + opacity * colours.permute(2, 0, 1).float()
    return picture.clamp(0, 1)  # rounding alone


def save(picture: Tensor, path: str | Path) -> None:
    """Write a picture (3, H, W) in [0, 1] to a file, pixel for pixel; its name says the format, for instance ".png"."""
    if picture.dim() != 3 or len(picture) != 3 or not picture.is_floating_point():
        raise ValueError(f"expected a picture (3, H, W) in [0, 1], got {picture.dtype} of {tuple(picture.shape)}.")
    _matplotlib("matplotlib.image").imsave(path, picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy())


def curves(insertion: Mapping[str, Tensor], deletion: Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """Insertion and deletion curves, means over the images, the area under each shaded and in the legend.

    Args:
        insertion: name -> probabilities (N, steps + 1) or (steps + 1,), from `metrics.insertion_curve`.
        deletion: likewise.
        title: above the figure.

    Raises ValueError for tensors that are no curves, or nothing to show.

    >>> figure = curves({"model": torch.rand(4, 9)}, {"model": torch.rand(4, 9)})
    """
    figure: Figure = _matplotlib("matplotlib.figure").Figure(figsize=(7.2, 3.1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("insertion", insertion, "revealed"), ("deletion", deletion, "deleted"))
    for axis, (name, named, what) in zip(axes, panels, strict=True):
        if not named:
            raise ValueError(f"expected at least one {name} curve, got none.")
        for index, (label, curve) in enumerate(named.items()):
            if curve.dim() not in (1, 2) or curve.shape[-1] < 2 or not curve.numel():
                raise ValueError(
                    f"expected curves (N, steps + 1) or (steps + 1,) of at least 2 points, got {tuple(curve.shape)} "
                    f"for {label!r}."
                )
            height = curve.detach().double().cpu().reshape(-1, curve.shape[-1]).mean(0)
            share = [100 * step / (len(height) - 1) for step in range(len(height))]
            colour, style = _LINES[index % len(_LINES)], ("-", "--", ":", "-.")[index % 4]
            legend = f"{label}: {100 * float(area(height)):.1f}"
            axis.plot(share, height.numpy(), color=colour, linestyle=style, label=legend)
            axis.fill_between(share, height.numpy(), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=name, xlabel=f"pixels {what}, most salient first (%)", xlim=(0, 100), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(title="area × 100", fontsize=_FONT, title_fontsize=_FONT, frameon=False)
    axes[0].set_ylabel("probability of the class")
    figure.suptitle(title or "", fontsize=_FONT + 1)
    return figure


def _grid(images: Tensor, columns: int, title: str | None) -> tuple[Figure, list[list[Axes]]]:
    panel = min(max(1.55, images.shape[-1] / 100), 4)  # inches: at the usual 100 dots each a pixel is one, up to 400
    height = max(panel * len(images) * images.shape[-2] / images.shape[-1], 2.1)  # of the colour bar's label
    figure: Figure = _matplotlib("matplotlib.figure").Figure(
        figsize=(panel * columns + 0.9, height + 0.6), layout="constrained"
    )
    grid = figure.subplots(len(images), columns, squeeze=False)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize=_FONT + 1)
    return figure, grid.tolist()


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        raise ImportError(
            'expected matplotlib, which figures are made with, to be installed: pip install "interpgrad[plot]".'
        ) from reason


def _photograph(axis: Axes, image: Tensor, label: str | None) -> None:
    pixels = image.detach().float().cpu().expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()  # rounding alone
    axis.imshow(pixels)
    if label:
        axis.set_ylabel(label, fontsize=_FONT)


def _headings(axes: Sequence[Axes], names: Sequence[str]) -> None:
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=_FONT)


def _unit_norm(maps: Tensor) -> Tensor:
    return torch.nn.functional.normalize(maps.flatten(1), eps=1e-30).view_as(maps)


def _checked(
    images: Tensor, columns: Mapping[str, Tensor], labels: Sequence[str] | None, dims: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both with a batch dimension."""
    if images.dim() == 3:
        images = images[None]
        columns = {name: values[None] if values.dim() == dims - 1 else values for name, values in columns.items()}
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected images (N, 3, H, W) or (N, 1, H, W) in [0, 1], got {tuple(images.shape)}.")
    low, high = (float(end) for end in images.detach().aminmax())
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:
        raise ValueError(
            f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}: pass them as they were before "
            "they were normalized, x * std + mean."
        )
    if not columns:
        raise ValueError("expected at least one column to show beside the images, got none.")
    for name, values in columns.items():
        if values.dim() != dims or len(values) != len(images) or values.shape[-2:] != images.shape[-2:]:
            shape = "(N, C, H, W)" if dims == 4 else "(N, H, W)"
            raise ValueError(
                f"expected {name!r} of shape {shape}, as the images {tuple(images.shape)}, got {tuple(values.shape)}."
            )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"expected a label for each of the {len(images)} images, got {len(labels)}.")
    return images, dict(columns)
