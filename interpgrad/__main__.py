"""Explain a photograph on the command line.

    python -m interpgrad explain cat.jpg --model resnet50 -o cat.png
    python -m interpgrad explain cat.jpg --model resnet50 --map guided_gradient --class 281 -o cat.png
    python -m interpgrad explain scan.png --model vit_small_patch16_224 --weights mine.pt --classes 4 \
        --map layer_cam --layer blocks.11.norm1 -o scan-explained.png

Needs torchvision or timm, and the extra "plot".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from interpgrad import plot, saliency
from interpgrad.model import class_logits, logits_of
from interpgrad.published import BadInputError, classifier, last_layer, square

GRADIENTS = {
    each.__name__: each
    for each in (saliency.gradient, saliency.guided_gradient, saliency.smooth_gradient, saliency.integrated_gradients)
}


def explain(options: argparse.Namespace) -> str:
    """Write the picture; what there is to say of it."""
    model, preprocessing = classifier(options.model, options.weights, options.classes)
    if options.size is not None and options.size < 1:
        raise BadInputError(f"expected a size of at least 1 pixel, got {options.size}.")
    show = square(options.size) if options.size else preprocessing.show
    image = show(_photograph(options.image))[None]
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    x = (image - mean) / std
    try:
        with torch.no_grad():
            probabilities = class_logits(logits_of(model(x))).softmax(1)[0]
    except AssertionError as reason:  # of timm's models, for images of another size
        raise BadInputError(f"expected images that {options.model} takes: {reason}.") from reason
    label = int(probabilities.argmax()) if options.label is None else options.label
    if not 0 <= label < len(probabilities):
        raise BadInputError(f"expected a class from 0 to {len(probabilities) - 1}, got {label}.")
    if options.map in GRADIENTS:
        maps, where = _magnitude(GRADIENTS[options.map](model, x, label)), ""
    else:
        layer = options.layer or last_layer(model, x)
        maps, where = saliency.CAMS[options.map](model, x, layer, label), f" at {layer}"
    plot.save(plot.overlay(image[0], maps[0], opacity=options.opacity), options.output)
    return f"{options.output}: {options.map}{where} of class {label}, probability {float(probabilities[label]):.3f}"


def _photograph(path: str) -> object:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise BadInputError("expected Pillow, which reads photographs, to be installed: pip install pillow.") from None
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except OSError as reason:
        raise BadInputError(f"expected a photograph in {path}, could not read it: {reason}.") from reason
    if image.mode[:1] in ("I", "F"):
        raise BadInputError(f"expected a photograph of 8 bits a colour in {path}, got one of mode {image.mode}.")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return image.convert("RGB")


def _magnitude(gradient: Tensor) -> Tensor:
    """Summed over the colours, from 0 to the value that one pixel of a hundred exceeds."""
    total = gradient.abs().sum(1)
    most = total.flatten(1).quantile(0.99, dim=1)[:, None, None]
    return (total / most.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m interpgrad", description="Explain a photograph.")
    command = parser.add_subparsers(required=True, metavar="explain").add_parser(
        "explain", help="a saliency map over a photograph; published weights are downloaded once"
    )
    command.add_argument("image", help="a photograph")
    command.add_argument("--model", required=True, help="name of a classifier of torchvision or timm")
    command.add_argument("--weights", metavar="FILE", help="a state_dict, in the place of the published weights")
    command.add_argument("--classes", type=int, help="of the weights in the file, if not as many as the published ones")
    command.add_argument(
        "--map", choices=[*saliency.CAMS, *GRADIENTS], default="grad_cam", help="the method (%(default)s)"
    )
    command.add_argument("--layer", help="of a class activation map, if not the last with positions")
    command.add_argument("--class", dest="label", type=int, help="the class to explain, if not the predicted one")
    command.add_argument("--size", type=int, help="the photograph's middle, as a square of so many pixels")
    command.add_argument("--opacity", type=float, default=0.6, help="of the map, in [0, 1] (%(default)s)")
    command.add_argument("-o", "--output", type=Path, required=True, help="the picture")
    try:
        print(explain(parser.parse_args()))
    except (BadInputError, ImportError, ValueError, RuntimeError, OSError) as reason:
        print(f"interpgrad: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
