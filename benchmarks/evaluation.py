"""How fast maps and metrics are, against pytorch-grad-cam and RISE's loop, after a check that they are the same.

    python benchmarks/evaluation.py --json evaluation.json                     # ResNet-18, random weights and images
    python benchmarks/evaluation.py --checkpoint networks/with.pt --data DIR   # of quickstart.py, layer 6

One process, the same network, images and classes; contenders alternate, medians over the repetitions. The peers run as
their documentation shows: pytorch-grad-cam on the batch, RISE's evaluation image by image.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from overhead import build, provenance
from torch import Tensor, nn
from tqdm import tqdm

from interpgrad import metrics, saliency

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from markdown_table import markdown_table

PEERS = {
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMPlusPlus",
    "axiom_cam": "XGradCAM",
    "score_cam": "ScoreCAM",
    "ablation_cam": "AblationCAM",
}
PARITY = 1e-3  # largest difference of two maps in [0, 1]


def peer_maps(name: str, model: nn.Module, x: Tensor, layer: nn.Module, classes: Tensor) -> Tensor:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(int(each)) for each in classes]
    with contextlib.redirect_stderr(io.StringIO()), getattr(pytorch_grad_cam, name)(model, [layer]) as cam:
        return torch.as_tensor(np.asarray(cam(x, targets)))


@contextlib.contextmanager
def corners_not_aligned() -> Any:
    """For the check of parity: the peer's Score-CAM resizes with aligned corners, the authors' code does not."""
    original = nn.UpsamplingBilinear2d
    nn.UpsamplingBilinear2d = lambda size: nn.Upsample(size, mode="bilinear")  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        nn.UpsamplingBilinear2d = original  # type: ignore[misc]


@contextlib.contextmanager
def large_gradients(model: nn.Module) -> Any:
    """For the check of parity: the peer adds 1e-6 to Grad-CAM++'s denominator, which is of the order of G²."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    weight = head.weight.detach().clone()
    with torch.no_grad():
        head.weight *= 1e4
    try:
        yield
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)


def rise_areas(model: nn.Module, x: Tensor, maps: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Insertion and deletion as RISE's evaluation computes them: one image, one step, one forward pass."""
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(scipy.ndimage.gaussian_filter(point, 5)).float().expand(3, 1, 11, 11)
    found: dict[str, list[float]] = {"INS": [], "DEL": []}
    pixels, step = x.shape[2] * x.shape[3], x.shape[3]
    for image, saliency_map, c in zip(x, maps, classes, strict=True):
        order = np.flip(np.argsort(saliency_map.flatten().numpy()))
        for name in found:
            blurred = F.conv2d(image[None], kernel, padding=5, groups=3)
            start, finish = (
                (blurred, image[None]) if name == "INS" else (image[None].clone(), torch.zeros_like(blurred))
            )
            scores = []
            for index in range((pixels + step - 1) // step + 1):
                with torch.no_grad():
                    scores.append(float(model(start).softmax(1)[0, c]))
                coordinates = order[step * index : step * (index + 1)].copy()
                start.view(3, pixels)[:, coordinates] = finish.reshape(3, pixels)[:, coordinates]
            found[name].append((sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1))
    return {name: torch.tensor(values) for name, values in found.items()}


def alternate(contenders: dict[str, Callable[[], object]], repeat: int, name: str) -> dict[str, float]:
    """Seconds, the median of each."""
    times: dict[str, list[float]] = {each: [] for each in contenders}
    for _ in tqdm(range(repeat), desc=name, leave=False):
        for each, run in contenders.items():
            began = time.perf_counter()
            run()
            times[each].append(time.perf_counter() - began)
    return {each: statistics.median(values) for each, values in times.items()}


def sharpened(name: str) -> nn.Module:
    """A network of random weights with distinct scores, so that parity is not a matter of rounding."""
    torch.manual_seed(0)
    model = build(name).eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight *= 100
        head.bias += 100
    return model


def trained(checkpoint: Path) -> nn.Module:
    from classifiers import load

    return load(str(checkpoint), 10).model


def images_of(options: argparse.Namespace) -> Tensor:
    """Random ones for random weights; a trained network sees what it was trained for, which channels die on."""
    if options.checkpoint is None:
        return torch.rand(options.batch, 3, options.size, options.size)
    from evaluate import read_task

    from interpgrad.published import square

    images, _ = next(read_task(options.data, square(options.size), options.batch).batches(options.batch))
    return images


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = sharpened(options.model) if options.checkpoint is None else trained(options.checkpoint)
    layer = model.get_submodule(options.layer)
    x = images_of(options)
    with torch.no_grad():
        classes = model(x).argmax(1)
    rows = []
    for name, peer in PEERS.items():
        slow = name in ("score_cam", "ablation_cam")
        images = x[: options.slow_batch] if slow else x
        target = classes[: len(images)]

        def ours(name: str = name, images: Tensor = images, target: Tensor = target) -> Tensor:
            return saliency.CAMS[name](model, images, layer, target)

        def theirs(peer: str = peer, images: Tensor = images, target: Tensor = target) -> Tensor:
            return peer_maps(peer, model, images, layer, target)

        few = slice(0, 2) if slow else slice(None)
        with corners_not_aligned(), large_gradients(model) if name == "grad_cam_pp" else contextlib.nullcontext():
            pair = [run(images=images[few], target=target[few]) for run in (ours, theirs)]
        difference = float((pair[0] - pair[1]).abs().max())
        if difference > PARITY:
            sys.exit(f"evaluation: expected equal maps of {name}, they differ by {difference:.3g}.")
        seconds = alternate({"ours": ours, "peer": theirs}, options.slow_repeat if slow else options.repeat, name)
        rows.append(row(name, f"pytorch-grad-cam {peer}", len(images), seconds, difference))

    maps = saliency.grad_cam(model, x, layer)[: options.slow_batch]
    images, target = x[: options.slow_batch], classes[: options.slow_batch]

    def our_areas() -> dict[str, Tensor]:
        return {
            "INS": metrics.insertion(model, images, maps, target),
            "DEL": metrics.deletion(model, images, maps, target),
        }

    distinct = torch.rand(maps.shape)  # without ties, whose order RISE leaves to the sort
    expected = rise_areas(model, images[:2], distinct[:2], target[:2])
    found = {
        "INS": metrics.insertion(model, images[:2], distinct[:2], target[:2]),
        "DEL": metrics.deletion(model, images[:2], distinct[:2], target[:2]),
    }
    difference = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    if difference > PARITY:
        sys.exit(f"evaluation: expected equal areas, they differ by {difference:.3g}.")
    seconds = alternate(
        {"ours": our_areas, "peer": lambda: rise_areas(model, images, maps, target)}, options.slow_repeat, "INS + DEL"
    )
    rows.append(row("insertion and deletion", "RISE, image by image", len(images), seconds, difference))
    return rows


def row(name: str, peer: str, images: int, seconds: dict[str, float], difference: float) -> dict[str, Any]:
    return {
        "name": name,
        "peer": peer,
        "images": images,
        "images_per_second": images / seconds["ours"],
        "peer_images_per_second": images / seconds["peer"],
        "speedup": seconds["peer"] / seconds["ours"],
        "largest_difference": difference,
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{result['model']}, {result['size']}²",
            each["name"],
            str(each["images"]),
            f"{each['images_per_second']:.1f}",
            each["peer"],
            f"{each['peer_images_per_second']:.1f}",
            f"{each['speedup']:.1f}",
        ]
        for result in results
        for each in result["rows"]
    ]
    return markdown_table(["network", "", "images", "images/s", "peer", "its images/s", "faster by"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18_cifar", help="torchvision or timm name (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="of quickstart.py --save, in the place of --model")
    parser.add_argument("--data", type=Path, help="its images, a folder as for evaluate.py (digits on photographs)")
    parser.add_argument("--layer", default="layer4", help="dotted name (%(default)s)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images of the gradient methods (%(default)s)")
    parser.add_argument("--slow-batch", type=int, default=4, help="images of the others (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of the gradient methods (%(default)s)")
    parser.add_argument("--slow-repeat", type=int, default=3, help="repetitions of the others (%(default)s)")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    name = options.model if options.checkpoint is None else "small_resnet, trained"
    result = {"model": name, "size": options.size, "layer": options.layer, "rows": measure(options)}
    print(table([result]))
    if options.json:
        earlier = json.loads(options.json.read_text())["results"] if options.json.exists() else []
        options.json.write_text(json.dumps(provenance("cpu") | {"results": [*earlier, result]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
