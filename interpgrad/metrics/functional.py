"""The faithfulness metrics as functions. The package says what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpgrad.autocast import at_least_single
from interpgrad.inputs import Inputs, check_finite
from interpgrad.model import classes_to_explain, evaluation_mode

__all__ = ["HIGHER_IS_BETTER", "PROTOCOLS", "Protocol", "area", "average_drop", "average_gain", "average_increase"]
__all__ += ["deletion", "deletion_curve", "faithfulness", "grid", "grid_pointing", "insertion", "insertion_curve"]

_PerChannel = float | Sequence[float] | Tensor | None
_ROUNDING = 1e-5  # by which maps may leave [0, 1]

HIGHER_IS_BETTER = {"AD": False, "AG": True, "AI": True, "INS": True, "DEL": False}


class Protocol(NamedTuple):
    """What peers disagree on in insertion and deletion; printed with every table.

    Attributes:
        name: of the protocol.
        blur: pixels, the side of the Gaussian kernel that makes the start of insertion, zero padded.
        sigma: pixels, its standard deviation.
        rows: image rows' worth of pixels changed per step.
        reflected: whether the Gaussian beyond the kernel is reflected into it, or cut off and the rest normalized.
    """

    name: str
    blur: int
    sigma: float
    rows: int
    reflected: bool = False

    def __str__(self) -> str:
        """One line for the foot of a table."""
        beyond = ", reflected into the kernel" if self.reflected else ""
        return (
            f"protocol {self.name}: insertion from a {self.blur}x{self.blur} Gaussian blur (sigma {self.sigma:g}"
            f"{beyond}, zero padding), deletion to 0 in normalized space, {self.rows} x W pixels per step"
        )


PROTOCOLS = {
    "rise": Protocol("rise", blur=11, sigma=5.0, rows=1, reflected=True),  # RISE's own evaluation
    "ca_stream": Protocol("ca_stream", blur=5, sigma=5.0, rows=8),  # the paper's authors' later evaluator
}


def average_drop(y: Tensor, o: Tensor) -> Tensor:
    """max(0, y - o) / y per sample, a fraction of 1; 0 where y is 0.

    Args:
        y: probabilities (N,) on the images.
        o: probabilities (N,) on the images under their maps.

    Raises ValueError for different shapes, or values outside of [0, 1].

    >>> average_drop(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.9]))
    tensor([0.5000, 0.0000])
    """
    _check_probabilities(y, o)
    return _ratio((y - o).clamp(min=0), y)


def average_gain(y: Tensor, o: Tensor, *, denominator: str = "1-y") -> Tensor:
    """max(0, o - y) / (1 - y) per sample, a fraction of 1; 0 where y is 1.

    Arguments and errors as of `average_drop`. `denominator="y"` divides by y instead, as the paper's slides print it;
    the published definition and the authors' evaluator have 1 - y.

    >>> average_gain(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.9]))
    tensor([0.0000, 0.8000])
    """
    _check_probabilities(y, o)
    if denominator not in ("1-y", "y"):
        raise ValueError(f'expected denominator="1-y" or denominator="y", got {denominator!r}.')
    return _ratio((o - y).clamp(min=0), y if denominator == "y" else 1 - y)


def average_increase(y: Tensor, o: Tensor) -> Tensor:
    """1 where o > y, else 0, per sample. Arguments and errors as of `average_drop`.

    >>> average_increase(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.9]))
    tensor([0., 1.])
    """
    _check_probabilities(y, o)
    return (o > y).to(y.dtype)


def insertion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Any = None,
    *,
    protocol: str | Protocol = "rise",
    chunk_size: int = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The area (N,), a fraction of 1, under `insertion_curve`, whose arguments and errors it shares."""
    curve = insertion_curve(model, x, maps, target, protocol=protocol, chunk_size=chunk_size, model_kwargs=model_kwargs)
    return area(curve)


def deletion(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Any = None,
    *,
    protocol: str | Protocol = "rise",
    chunk_size: int = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The area (N,), a fraction of 1, under `deletion_curve`, whose arguments and errors it shares."""
    curve = deletion_curve(model, x, maps, target, protocol=protocol, chunk_size=chunk_size, model_kwargs=model_kwargs)
    return area(curve)


def insertion_curve(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Any = None,
    *,
    protocol: str | Protocol = "rise",
    chunk_size: int = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Probabilities (N, steps + 1) of the class while the blurred images are revealed, most salient pixels first.

    Args:
        model: an image classifier; run in evaluation mode, and left as it was.
        x: images (N, C, H, W), as the model takes them.
        maps: saliency (N, h, w), in [0, 1].
        target: class indices (N,), one for all, or None for the classes predicted for x.
        protocol: "rise", "ca_stream" or a `Protocol`.
        chunk_size: at most so many images at once.
        model_kwargs: further arguments of the model by name, as of `interpgrad.saliency.gradient`.

    Raises:
        TypeError, ValueError: x or maps of the wrong type or shape, maps with NaN or outside of [0, 1], a target that
            is no class, an unknown protocol, a tensor of model_kwargs without a row for each image.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    >>> insertion_curve(model, torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4)).shape
    torch.Size([2, 5])
    """
    with evaluation_mode(model, gradients=False):
        images = _Perturbation(model, x, maps, target, protocol, chunk_size, model_kwargs)
        return images.inserted(range(images.steps + 1))


def deletion_curve(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Any = None,
    *,
    protocol: str | Protocol = "rise",
    chunk_size: int = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Probabilities (N, steps + 1) of the class while pixels are set to 0, most salient first.

    Arguments and errors as of `insertion_curve`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    >>> deletion_curve(model, torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4)).shape
    torch.Size([2, 5])
    """
    with evaluation_mode(model, gradients=False):
        images = _Perturbation(model, x, maps, target, protocol, chunk_size, model_kwargs)
        return images.deleted(range(images.steps + 1))


def area(curve: Tensor) -> Tensor:
    """The area (N,) under curves (N, steps + 1) of width 1, or of one (steps + 1,), by the trapezoidal rule.

    >>> area(torch.tensor([[0.0, 0.5, 1.0]]))
    tensor([0.5000])
    """
    return torch.trapezoid(curve) / (curve.shape[-1] - 1)


def grid(x: Tensor, side: int = 2) -> Tensor:
    """Images (M, C, side H, side W) of side x side of the images (M side², C, H, W) each, in reading order.

    For the grid pointing game: see `grid_pointing`. ValueError for a number of images that does not fill the grids.

    >>> grid(torch.arange(4.0).view(4, 1, 1, 1))
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    if x.dim() != 4 or not len(x) or len(x) % side**2:
        raise ValueError(
            f"expected images (N, C, H, W), so many that they fill grids of {side}x{side}, got shape {tuple(x.shape)}."
        )
    cells = x.view(-1, side, side, *x.shape[1:])
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(cells), x.shape[1], side * x.shape[2], side * x.shape[3])


def grid_pointing(maps: Tensor, side: int = 2) -> Tensor:
    """The share (M, side²), in [0, 1], of each map's positive values that lies in each cell of its grid.

    The grid pointing game: sure images of different classes are put into one by `grid`, the map (M, H, W) explains the
    class of a cell, and its share there is the score. Chance is 1 / side². A map without positive values has shares 0.

    Source: Böhle et al., "Convolutional Dynamic Alignment Networks", arXiv 2104.00032, section 4.2. ValueError for a
    map that the cells do not divide, or with NaN or infinity.

    >>> grid_pointing(torch.tensor([[[3.0, 1.0], [-1.0, 0.0]]]))
    tensor([[0.7500, 0.2500, 0.0000, 0.0000]])
    """
    if maps.dim() != 3 or maps.shape[1] % side or maps.shape[2] % side:
        raise ValueError(f"expected maps (M, H, W) of {side}x{side} equal cells, got shape {tuple(maps.shape)}.")
    check_finite(maps, "maps")
    positive = at_least_single(maps).clamp(min=0)  # half precision ends at 65504
    cells = F.avg_pool2d(positive[:, None], (maps.shape[1] // side, maps.shape[2] // side)).flatten(1)
    return _ratio(cells, cells.sum(1, keepdim=True))


def faithfulness(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Any = None,
    *,
    mean: _PerChannel = None,
    std: _PerChannel = None,
    protocol: str | Protocol = "rise",
    denominator: str = "1-y",
    chunk_size: int = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """All five metrics per sample in percent, {"AD", "AG", "AI", "INS", "DEL"} -> (N,), from shared forward passes.

    Arguments and errors as of `insertion_curve`, `denominator` as of `average_gain`. `mean` and `std`, one value per
    channel, are what the images were normalized with; None if they were not.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    >>> sorted(faithfulness(model, torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4)))
    ['AD', 'AG', 'AI', 'DEL', 'INS']
    """
    with evaluation_mode(model, gradients=False):
        images = _Perturbation(model, x, maps, target, protocol, chunk_size, model_kwargs)
        y, o = images.probability, images.masked(mean, std)
        # The image itself ends the one curve and begins the other.
        inserted = torch.cat([images.inserted(range(images.steps)), y[:, None]], 1)
        deleted = torch.cat([y[:, None], images.deleted(range(1, images.steps + 1))], 1)
    fractions = {
        "AD": average_drop(y, o),
        "AG": average_gain(y, o, denominator=denominator),
        "AI": average_increase(y, o),
        "INS": area(inserted),
        "DEL": area(deleted),
    }
    return {name: 100 * values for name, values in fractions.items()}


class _Perturbation:
    """Images whose pixels change in the order of their saliency, and the probabilities of the class explained."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        maps: Tensor,
        target: Any,
        protocol: str | Protocol,
        chunk_size: int,
        model_kwargs: Mapping[str, Any] | None,
    ) -> None:
        _check_images(x, maps, chunk_size)
        self.protocol = _resolve(protocol)
        self.model, self.inputs, self.chunk_size = model, Inputs(x.detach(), model_kwargs), chunk_size
        self.maps = _resize(maps.detach().clamp(0, 1), x.shape[-2:])
        self.per_step = self.protocol.rows * x.shape[-1]
        # One order for insertion and deletion.
        order = self.maps.flatten(1).argsort(dim=1, descending=True, stable=True)
        self.rank = order.argsort(dim=1).view_as(self.maps)[:, None]
        self.steps = -(-x.shape[-2] * x.shape[-1] // self.per_step)
        logits = torch.cat([images.logits(model) for images in self.inputs.split(chunk_size)])
        self.classes = classes_to_explain(target, logits)
        self.probability = _probability(logits, self.classes)

    def masked(self, mean: _PerChannel, std: _PerChannel) -> Tensor:
        """The probabilities (N,) of the images under their maps."""
        settings = ((mean, 0.0), (std, 1.0))
        shift, spread = (
            _per_channel(default if value is None else value, self.inputs.x) for value, default in settings
        )
        found = []
        for images, maps, classes in zip(
            self.inputs.split(self.chunk_size),
            torch.split(self.maps, self.chunk_size),
            torch.split(self.classes, self.chunk_size),
            strict=True,
        ):
            x = images.x
            masked = ((x * spread + shift) * maps[:, None].to(x.dtype) - shift) / spread
            found.append(_probability(images.with_images(masked).logits(self.model), classes))
        return torch.cat(found)

    def inserted(self, steps: range) -> Tensor:
        """The probabilities (N, len(steps)) after so many steps of insertion."""
        blurred = self.inputs.with_images(_blur(self.inputs.x, self.protocol))
        return self._replaced(blurred, self.inputs.x, steps)

    def deleted(self, steps: range) -> Tensor:
        """The probabilities (N, len(steps)) after so many steps of deletion."""
        return self._replaced(self.inputs, torch.zeros_like(self.inputs.x), steps)

    def _replaced(self, before: Inputs, after: Tensor, steps: range) -> Tensor:
        samples = torch.arange(len(after), device=after.device).repeat_interleave(len(steps))
        changed = (torch.tensor(steps, device=after.device) * self.per_step).repeat(len(after))
        found = []
        for of_image, count in zip(
            torch.split(samples, self.chunk_size), torch.split(changed, self.chunk_size), strict=True
        ):
            copies = before[of_image]
            images = torch.where(self.rank[of_image] < count[:, None, None, None], after[of_image], copies.x)
            found.append(_probability(copies.with_images(images).logits(self.model), self.classes[of_image]))
        return torch.cat(found).view(len(after), len(steps))


def _probability(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax probabilities (N,) of the classes, in double precision: 1 - y is a denominator."""
    return logits.double().softmax(1).gather(1, classes[:, None]).squeeze(1)


def _blur(x: Tensor, protocol: Protocol) -> Tensor:
    """A Gaussian blur, zero padded, so that it darkens towards the border as RISE's does."""
    line = _line(protocol, x).view(1, 1, -1, 1).expand(x.shape[1], 1, -1, 1)
    padding = protocol.blur // 2
    vertical = F.conv2d(x, line, padding=(padding, 0), groups=x.shape[1])
    return F.conv2d(vertical, line.transpose(2, 3), padding=(0, padding), groups=x.shape[1])


def _line(protocol: Protocol, x: Tensor) -> Tensor:
    """The kernel of the blur along one dimension, (blur,), its sum 1.

    RISE's is a point filtered by scipy.ndimage.gaussian_filter, which reflects at the edges of the kernel and is cut
    off at 4 sigma. A point in the centre of an odd number of pixels has an image in the centre of every reflection.
    """
    reach = int(4 * protocol.sigma + 0.5) if protocol.reflected else protocol.blur // 2
    reflections = -(-(reach - protocol.blur // 2) // protocol.blur)
    side = protocol.blur * (2 * reflections + 1)
    offsets = torch.arange(side, dtype=x.dtype, device=x.device) - (side - 1) / 2
    line = torch.exp(-offsets.square() / (2 * protocol.sigma**2)) * (offsets.abs() <= reach)
    return (line / line.sum()).view(-1, protocol.blur).sum(0)


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0)


def _per_channel(value: float | Sequence[float] | Tensor, x: Tensor) -> Tensor:
    values, channels = torch.as_tensor(value, dtype=x.dtype, device=x.device).flatten(), x.shape[1]
    if len(values) not in (1, channels):
        raise ValueError(f"expected mean and std to have 1 value or {channels}, one per channel, got {len(values)}.")
    return values.view(1, -1, 1, 1)


def _resolve(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"expected protocol to be one of {list(PROTOCOLS)} or a Protocol, got {protocol!r}.")
    return PROTOCOLS[protocol]


def _check_images(x: Any, maps: Any, chunk_size: int) -> None:
    for name, value, dims in (("x", x, 4), ("maps", maps, 3)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            received = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"expected {name} to be a floating point tensor, got {received}.")
        if value.dim() != dims or not value.numel():
            shape = "(N, C, H, W)" if dims == 4 else "(N, h, w)"
            raise ValueError(f"expected {name} of shape {shape}, not empty, got {tuple(value.shape)}.")
    if len(maps) != len(x):
        raise ValueError(f"expected one map for each of the {len(x)} images, got {len(maps)}.")
    check_finite(maps, "maps")
    check_finite(x)
    if maps.min() < -_ROUNDING or maps.max() > 1 + _ROUNDING:
        raise ValueError(
            f"expected maps in [0, 1], got values from {float(maps.min()):.3g} to {float(maps.max()):.3g}: scale each "
            "map, (map - min) / (max - min), as interpgrad.saliency.scale does."
        )
    if chunk_size < 1:
        raise ValueError(f"expected chunk_size of at least 1, got {chunk_size}.")


def _check_probabilities(y: Tensor, o: Tensor) -> None:
    if y.shape != o.shape:
        raise ValueError(f"expected y and o of one shape, got {tuple(y.shape)} and {tuple(o.shape)}.")
    for name, value in (("y", y), ("o", o)):
        if not ((value >= 0) & (value <= 1)).all():  # also false for NaN
            raise ValueError(f"expected {name} to hold probabilities in [0, 1]: apply softmax to logits.")
