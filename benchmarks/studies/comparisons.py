"""Networks compared: what averaging adds to a gradient, what random weights change, differences by seed."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from figures import HEADINGS, cell, gradients, pointing, scaled, unit
from images import Images
from markdown_table import markdown_table

from interpgrad import metrics, saliency

SAMPLES = (1, 2, 4, 8, 16, 32)  # of SmoothGrad


def smoothed(
    model: nn.Module, images: Images, criterion: str = "log_prob", samples: tuple[int, ...] = SAMPLES
) -> dict[str, Any]:
    """What averaging over noisy copies of the images adds, for these numbers of copies.

    "own" is the cosine of delta and its SmoothGrad. "insertion" is the mean area under the class's probability while
    pixels are inserted in the order of |delta|, then of |SmoothGrad|, divided by the mean probability on the whole
    image, so that networks of different confidence can be compared; "pointing" likewise, where the evidence is known.
    """
    model.eval()
    x, y = images.test
    delta = saliency.gradient(model, x, y, criterion=criterion, chunk_size=250)
    with torch.no_grad():
        confidence = model(x).double().softmax(1).gather(1, y[:, None]).squeeze(1)
    found: dict[str, Any] = {"own": [], "insertion": []} | ({} if images.evidence is None else {"pointing": []})
    for count in (0, *samples):
        mean = delta
        if count:
            mean = saliency.smooth_gradient(
                model, x, y, samples=count, criterion=criterion, chunk_size=250, generator=_seeded(count, x.device)
            )
            found["own"].append(float(F.cosine_similarity(unit(mean).flatten(1), unit(delta).flatten(1)).mean()))
        maps = mean.abs().sum(1)
        area = metrics.insertion(model, x, scaled(maps), y, chunk_size=500)
        found["insertion"].append(float(area.mean() / confidence.mean()))
        if images.evidence is not None:
            found["pointing"].append(float(pointing(maps, images.evidence).mean()))
    return found


def worth(samples: list[float], value: float) -> float:
    """How many SmoothGrad samples reach the value: between measured points linearly in their logarithm.

    `samples` is the figure at 0 samples (the gradient itself) and at `SAMPLES`. 0 where not even the gradient is
    needed, infinite where no measured number reaches it.
    """
    if value <= samples[0]:
        return 0.0
    pairs = list(zip(SAMPLES, samples[1:], strict=True))
    if value <= pairs[0][1]:
        return 1.0
    for (few, low), (many, high) in itertools.pairwise(pairs):
        if low < value <= high:
            return float(few * (many / few) ** ((value - low) / (high - low)))
    return float("inf")


def randomized(model: nn.Module, images: Images, criterion: str = "log_prob", draws: int = 3) -> dict[str, float]:
    """The cosine, and the rank correlation of |.|, of delta with that of a network with random weights.

    Of the last layer, or of all; means over the images and the draws. After Adebayo et al., "Sanity Checks for Saliency
    Maps", arXiv 1810.03292: an explanation that does not change explains the images, not the network.
    """
    model.eval()
    x, y = images.test
    delta, _ = gradients(model, x, y, criterion)
    found: dict[str, list[float]] = {}
    layers = [module for module in model.modules() if hasattr(module, "reset_parameters")]
    for name, chosen in {"last layer": layers[-1:], "all layers": layers}.items():
        for draw in range(draws):
            other = copy.deepcopy(model).cpu()  # whose draws are the same wherever the images are
            of_other = [module for module in other.modules() if hasattr(module, "reset_parameters")]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1000 + draw)
                for module in of_other[len(layers) - len(chosen) :]:
                    # Not the running statistics: without them the activations of an untrained network die out.
                    _redraw(module)
            changed, _ = gradients(other.to(x.device), x, y, criterion)
            cosine = F.cosine_similarity(delta.flatten(1), changed.flatten(1)).mean()
            ranks = [_ranks(each.abs().sum(1)) for each in (delta, changed)]
            found.setdefault(f"cosine, {name}", []).append(float(cosine))
            found.setdefault(f"ranks, {name}", []).append(float(F.cosine_similarity(*ranks).mean()))
    return {name: statistics.fmean(values) for name, values in found.items()}


def paired_table(rows: dict[str, dict[str, dict[str, float]]], base: str) -> str:
    """A Markdown table of figures by title and seed.

    Mean ± standard deviation of the row `base`; of the others the mean, and in brackets the mean ± standard deviation
    of the differences to it, seed by seed.
    """
    names = list(next(iter(rows[base].values())))
    table = []
    for title, seeds in rows.items():
        cells = [title, str(len(seeds))]
        for name in names:
            if title == base:
                cells.append(cell(name, [each[name] for each in seeds.values()]))
            else:
                cells.append(change(name, [(rows[base][seed][name], seeds[seed][name]) for seed in seeds]))
        table.append(cells)
    return markdown_table(["", "seeds", *(HEADINGS[name] for name in names)], table)


def change(name: str, pairs: list[tuple[float, float]]) -> str:
    """Of pairs before and after: the mean after, and in brackets mean ± standard deviation of the differences."""
    differences = [after - before for before, after in pairs]
    return f"{statistics.fmean(after for _, after in pairs):.3f} ({cell(name, differences, '+')})"


def both_gradients(figures: dict[str, Any]) -> dict[str, float]:
    """The figures of the log-probability's gradient, and of the logit's the cosine, a part of which can be bought."""
    return figures["log_prob"] | {"logit cosine": figures["logit"]["cosine"]}


def _ranks(maps: Tensor) -> Tensor:
    """Centred ranks of the pixels, whose cosine is Spearman's correlation."""
    ranks = maps.flatten(1).argsort(1).argsort(1).double()
    return ranks - ranks.mean(1, keepdim=True)


def _redraw(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
        elif not isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.zeros_(parameter)


def _seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
