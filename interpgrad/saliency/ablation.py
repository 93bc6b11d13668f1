"""The scores of images whose copies have one channel of a layer set to 0: three ways, the fastest that is right.

N images, K channels; pairs (P, 2) of the index of an image and a channel, sorted by image; classes (N,), the ones to
score; scores, their logits: (N,) of the images, (P,) of the copies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from interpgrad.inputs import Inputs
from interpgrad.saliency.layer import Layer


def ablated_scores(
    probe: Layer, images: Inputs, classes: Tensor, scores: Tensor, pairs: Tensor, chunk_size: int | None
) -> Tensor:
    """The scores (P,) of the copies, at most `chunk_size` at once."""
    for way in (_after_layer, _after_layer_one_by_one):
        try:
            return way(probe, images, classes, scores, pairs, chunk_size)
        except _NotFromLayerError:
            continue
    return _whole_network(probe, images, classes, scores, pairs, chunk_size)


def in_chunks(pairs: Tensor, chunk_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (P, 2) of image and channel as two index tensors, in chunks."""
    for chunk in torch.split(pairs, chunk_size or max(1, len(pairs))):
        if len(chunk):
            yield chunk[:, 0], chunk[:, 1]


class _NotFromLayerError(Exception):
    """The logits do not follow from the layer's output alone."""


def _after_layer(
    probe: Layer, images: Inputs, classes: Tensor, score: Tensor, pairs: Tensor, chunk_size: int | None
) -> Tensor:
    """The network up to the layer runs once for the images of a chunk; from there on, it is given the copies."""
    found = []
    for of_image, channel in in_chunks(pairs, chunk_size):
        first, last = int(of_image[0]), int(of_image[-1]) + 1
        # None where it would be if what belongs to the images were repeated to the number of copies.
        untouched = first + (torch.arange(last - first, device=pairs.device) + len(channel) + 1) % (last - first)
        rows = torch.cat([of_image, untouched])

        def copies(output: Tensor, rows: Tensor = rows - first, channel: Tensor = channel) -> Tensor:
            result = output[rows]
            probe.ablate(result[: len(channel)], channel)
            return result

        try:
            logits = probe.run(images[first:last], copies)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as reason:
            raise _NotFromLayerError from reason
        # The copies left as they were must score as the images did, or the network mixes what it has no right to.
        if logits.shape[:1] != rows.shape or not _close(
            logits.gather(1, classes[rows, None])[len(channel) :, 0], score[untouched]
        ):
            raise _NotFromLayerError
        found.append(logits[: len(channel)].gather(1, classes[of_image, None]).squeeze(1))
    return torch.cat([score[:0], *found])


def _after_layer_one_by_one(
    probe: Layer, images: Inputs, classes: Tensor, score: Tensor, pairs: Tensor, chunk_size: int | None
) -> Tensor:
    """The same image by image: a residual branch of one image broadcasts with the copies."""
    found = [
        _after_layer(probe, images, classes, score, pairs[pairs[:, 0] == index], chunk_size)
        for index in range(len(images))
    ]
    return torch.cat(found)


def _whole_network(
    probe: Layer, images: Inputs, classes: Tensor, score: Tensor, pairs: Tensor, chunk_size: int | None
) -> Tensor:
    """Every copy runs through the whole network."""
    found = [score[:0]]
    for of_image, channel in in_chunks(pairs, chunk_size):
        logits = probe.run(images[of_image], functools.partial(_copy_ablated, probe, channel))
        found.append(logits.gather(1, classes[of_image, None]).squeeze(1))
    return torch.cat(found)


def _copy_ablated(probe: Layer, channel: Tensor, output: Tensor) -> Tensor:
    return probe.ablate(output.clone(), channel)


def _close(scores: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if torch.finfo(expected.dtype).bits >= 32 else 3e-2
    return bool((scores - expected).abs().max() <= tolerance * expected.abs().max())
