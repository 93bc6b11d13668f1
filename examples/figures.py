"""What can be said of a network's input gradients, as numbers. In evaluation mode, on held-out images."""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from images import Images
from markdown_table import markdown_table
from torch import Tensor, nn

from interpgrad import input_gradients, low_pass

OBJECTS = {"log_prob": "log-probability", "logit": "logit", "cross_entropy": "cross-entropy"}

HEADINGS = {
    "accuracy": "accuracy",
    "cosine": "cos(δ, δᴳ)",
    "smooth": "smooth: ‖mean₃ₓ₃ δ‖/‖δ‖",
    "on digit": "δ on digit",
    "pointing": "pointing game",
    "pointing, mean": "after a 5×5 mean",
    "classes": "cos(δ₁, δ₂)",
    "logit cosine": "cos(δ, δᴳ) of the logit",
    "insertion": "insertion of |δ|/y",
    "own": "cos(δ, its SmoothGrad)",
    "random": "cos(δ, δ of random weights)",
    "ms/step": "ms per step",
}


def gradients(model: nn.Module, x: Tensor, y: Tensor, criterion: str) -> tuple[Tensor, Tensor]:
    """Both input gradients, each image's of unit norm: a sure network's are small, and all we ask is where."""
    pairs = [input_gradients(model, a, b, criterion=criterion) for a, b in zip(x.split(250), y.split(250), strict=True)]
    return tuple(unit(torch.cat(parts)) for parts in zip(*pairs, strict=True))  # type: ignore[return-value]


def evaluate(model: nn.Module, images: Images, criterion: str = "log_prob") -> dict[str, float]:
    """Accuracy, and of the input gradients of the test images; means over the images.

    "cosine" of delta and the guided gradient; "smooth", the share of delta's norm that survives a 3x3 mean; "on digit",
    the share of |delta| on the evidence; "pointing", how often the largest |delta| is there, and "pointing, mean",
    the same after a 5x5 mean; "classes", the cosine of the logits' gradients of the two most probable classes.
    """
    model.eval()
    x, y = images.test
    delta, guided = gradients(model, x, y, criterion)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(250)])
    found = {
        "accuracy": (logits.argmax(1) == y).double(),
        "cosine": F.cosine_similarity(delta.flatten(1), guided.flatten(1)),
        "smooth": low_pass(delta).flatten(1).norm(dim=1),
    }
    if images.evidence is not None:
        saliency_of_pixels = delta.abs().sum(1).flatten(1)
        evidence = images.evidence.flatten(1)
        total = saliency_of_pixels.sum(1).clamp(min=1e-300)
        found["on digit"] = (saliency_of_pixels * evidence).sum(1) / total
        found["pointing"] = pointing(delta.abs().sum(1), images.evidence)
        found["pointing, mean"] = pointing(_mean(delta.abs().sum(1)), images.evidence)
    of_classes = [gradients(model, x, each, "logit")[0].flatten(1) for each in logits.topk(2).indices.unbind(1)]
    found["classes"] = F.cosine_similarity(*of_classes)
    return {name: float(value.mean()) for name, value in found.items()}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: mean ± standard deviation over the seeds."""
    names = list(next(iter(rows.values()))[0])
    cells = [[title, *(cell(name, [each[name] for each in seeds]) for name in names)] for title, seeds in rows.items()]
    return markdown_table(["", *(HEADINGS[name] for name in names)], cells)


def cell(name: str, values: list[float], sign: str = "") -> str:
    if name == "ms/step":
        return f"{statistics.fmean(values):{sign}.1f}"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{spread}"


def unit(gradient: Tensor) -> Tensor:
    """Each image's gradient (N, ...) of unit norm, in double precision; zeros stay."""
    return F.normalize(gradient.double().flatten(1), eps=1e-300).view_as(gradient)


def _mean(maps: Tensor) -> Tensor:
    """The 5x5 mean of maps (N, h, w)."""
    return F.avg_pool2d(maps[:, None], 5, stride=1, padding=2)[:, 0]


def pointing(maps: Tensor, evidence: Tensor) -> Tensor:
    """1 where the largest value of a map (N, h, w) lies on the evidence, else 0."""
    return evidence.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True)).squeeze(1).double()


def scaled(maps: Tensor) -> Tensor:
    """Maps (N, h, w) of magnitudes, each divided by its largest."""
    return maps / maps.flatten(1).amax(1).clamp(min=torch.finfo(maps.dtype).tiny)[:, None, None]
