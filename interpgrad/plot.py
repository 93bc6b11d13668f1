"""Figures of gradients, class activation maps, insertion and deletion curves. Needs matplotlib (the extra "plot").

Every function takes tensors and returns a matplotlib Figure that belongs to no window and no global state: save it with
`figure.savefig(path)`. Colours are told apart by every kind of colour vision; what is compared shares one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def gradients(
    images: Tensor, columns: Mapping[str, Tensor], *, labels: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Images beside their gradients: one row per image, one column per gradient.

    Each gradient is summed over the colours and scaled to unit norm, since a sure network's are small everywhere and
    all we ask is where they lie; one colour scale serves the whole figure, centred at 0.

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
    _check(images, columns, labels, dims=4)
    shown = {name: _unit_norm(values.detach().float().cpu().sum(1)) for name, values in columns.items()}
    limit = float(torch.stack(list(shown.values())).abs().flatten().quantile(0.995)) or 1.0
    figure, grid = _grid(len(images), 1 + len(shown), title)
    for row, image in enumerate(images):
        _photograph(grid[row][0], image, labels[row] if labels else None)
        for axis, values in zip(grid[row][1:], shown.values(), strict=True):
            drawn = axis.imshow(values[row].numpy(), cmap=_SIGNED, vmin=-limit, vmax=limit)
    _headings(grid[0], ["image", *shown])
    bar = figure.colorbar(
        drawn, ax=[axis for row in grid for axis in row], shrink=0.6, aspect=30, pad=0.01, extend="both"
    )
    bar.set_label("gradient, summed over colours, unit norm", fontsize=_FONT)
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
    _check(images, columns, labels, dims=3)
    figure, grid = _grid(len(images), 1 + len(columns), title)
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


def curves(insertion: Mapping[str, Tensor], deletion: Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """Insertion and deletion curves, means over the images, the area under each shaded and in the legend.

    Args:
        insertion: name -> probabilities (N, steps + 1) or (steps + 1,), from `metrics.insertion_curve`.
        deletion: likewise.
        title: above the figure.

    Raises ValueError for tensors that are no curves, or nothing to show.

    >>> figure = curves({"model": torch.rand(4, 9)}, {"model": torch.rand(4, 9)})
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
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


def _grid(rows: int, columns: int, title: str | None) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.55 * columns + 0.9, 1.55 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize=_FONT + 1)
    return figure, grid.tolist()


def _photograph(axis: Axes, image: Tensor, label: str | None) -> None:
    pixels = image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    axis.imshow(pixels)
    if label:
        axis.set_ylabel(label, fontsize=_FONT)


def _headings(axes: Sequence[Axes], names: Sequence[str]) -> None:
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=_FONT)


def _unit_norm(maps: Tensor) -> Tensor:
    return torch.nn.functional.normalize(maps.flatten(1), eps=1e-30).view_as(maps)


def _check(images: Any, columns: Mapping[str, Tensor], labels: Sequence[str] | None, dims: int) -> None:
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected images (N, 3, H, W) or (N, 1, H, W) in [0, 1], got {tuple(images.shape)}.")
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
