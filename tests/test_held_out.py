"""interpgrad.measure: held-out accuracy and cosine, with intervals."""

import pytest
import torch
import torch.nn.functional as F
from nets import small_net
from torch import nn
from traces import assert_same_trace, trace

from interpgrad import input_gradients, measure


def batches(count=4, size=5):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(size) % 4)
        for _ in range(count)
    ]


def test_means_and_margins_are_those_of_all_images():
    model, pairs = nn.Sequential(small_net(), nn.Dropout(0.5)).train(), batches()
    before = trace(model)
    found = measure(model, pairs)
    assert_same_trace(before, trace(model))

    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    model.eval()
    right = (model(x).argmax(1) == y).double()
    delta, guided = input_gradients(model, x, y)
    cosine = F.cosine_similarity(delta.flatten(1), guided.flatten(1), eps=1e-300)
    assert found.images == 20
    assert found.accuracy == pytest.approx(float(right.mean()))
    assert found.cosine == pytest.approx(float(cosine.mean()))
    assert found.accuracy_margin == pytest.approx(1.959964 * float(right.std()) / 20**0.5)
    assert found.cosine_margin == pytest.approx(1.959964 * float(cosine.std()) / 20**0.5)
    assert str(found) == (
        f"accuracy {found.accuracy:.3f} ± {found.accuracy_margin:.3f}, "
        f"cosine {found.cosine:.3f} ± {found.cosine_margin:.3f} (20 images)"
    )


def test_limit_and_generators():
    model, pairs = small_net(), batches()
    assert measure(model, iter(pairs), limit=7) == measure(model, [pairs[0], tuple(each[:2] for each in pairs[1])])
    assert measure(model, pairs, limit=100) == measure(model, pairs)


def test_images_to_ignore_count_nowhere():
    model, ((x, y), *_) = small_net(), batches()
    with_ignored = measure(model, [(x, torch.where(y == 1, -100, y))])
    assert with_ignored == measure(model, [(x[y != 1], y[y != 1])])


def test_wrong_batches():
    with pytest.raises(ValueError, match="expected at least one batch of images to count, got none"):
        measure(small_net(), [])
    with pytest.raises(TypeError, match=r"expected batches of images and class indices, tensors \(x, y\), got dict"):
        measure(small_net(), [{"pixel_values": torch.rand(1, 3, 8, 8)}])
    x, y = batches()[0]
    model = small_net()
    with pytest.raises(TypeError, match=r"expected x to be a floating point tensor, got a tensor of torch.uint8"):
        measure(model, [((255 * x).byte(), y)])
    with pytest.raises(ValueError, match=r"give probabilities as y.argmax"):
        measure(model, [(x, torch.rand(5, 4))])
    with pytest.raises(TypeError, match="got Tensor, list: pass pairs"):
        measure(model, [(x, y.tolist())])
    with pytest.raises(ValueError, match="expected at least one batch of images to count"):
        measure(model, [(x, torch.full_like(y, -100))])
    for limit in (0, -1, 2.5):
        with pytest.raises(ValueError, match="expected limit to be a number of images, or None, got"):
            measure(model, [(x, y)], limit=limit)
