"""Faithfulness metrics: against the slides' formulas and algorithms in loops, and peers where protocols coincide."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets import data, seeded, small_net
from torch import nn
from traces import assert_same_trace, trace

from interpgrad import metrics, saliency
from interpgrad.metrics import functional

torchmetrics = pytest.importorskip("torchmetrics")

NAMES = ("AD", "AG", "AI", "INS", "DEL")


def task(n=3, size=8, seed=0):
    """A model, images, continuous maps without ties, classes."""
    x, y = data(n, size, seed=seed)
    return small_net(seed).eval(), x, torch.rand(n, size, size, generator=seeded(seed)), y


def probability(model, image, c):
    with torch.no_grad():
        return float(model(image[None]).double().softmax(1)[0, c])


def literal_kernel(blur, sigma, reflected):
    """The weights of a blur by its definition: a point filtered by a Gaussian, reflected at the edges or cut off."""
    half, line = blur // 2, []
    if not reflected:
        line = [math.exp(-i * i / (2 * sigma**2)) for i in range(-half, half + 1)]
        return {
            (i, j): line[i + half] * line[j + half] / sum(line) ** 2
            for i in range(-half, half + 1)
            for j in range(-half, half + 1)
        }
    radius = int(4 * sigma + 0.5)
    gaussian = {i: math.exp(-i * i / (2 * sigma**2)) for i in range(-radius, radius + 1)}
    for pixel in range(blur):
        seen = 0
        for offset, weight in gaussian.items():
            place = pixel + offset
            while not 0 <= place < blur:
                place = -1 - place if place < 0 else 2 * blur - 1 - place
            seen += weight * (place == half)
        line.append(seen / sum(gaussian.values()))
    return {(i, j): line[i + half] * line[j + half] for i in range(-half, half + 1) for j in range(-half, half + 1)}


def literal_curve(kind, model, image, saliency_map, c, blur=11, sigma=5.0, pixels=None, reflected=True):
    """The slides' Algorithms 1 and 2, pixel by pixel. (Algorithm 1 prints p_0 = f(x) for f(x'), compare RISE.)"""
    _, height, width = image.shape
    pixels = pixels or width
    if kind == "insertion":
        weights = literal_kernel(blur, sigma, reflected)
        current = torch.zeros_like(image)
        for row in range(height):
            for column in range(width):
                for (i, j), weight in weights.items():
                    if 0 <= row + i < height and 0 <= column + j < width:
                        current[:, row, column] += weight * image[:, row + i, column + j]
        final = image
    else:
        current, final = image.clone(), torch.zeros_like(image)
    order = sorted(range(height * width), key=lambda p: (-float(saliency_map[p // width, p % width]), p))
    curve = [probability(model, current, c)]
    while order:
        for pixel in order[:pixels]:
            current[:, pixel // width, pixel % width] = final[:, pixel // width, pixel % width]
        order = order[pixels:]
        curve.append(probability(model, current, c))
    return curve


def literal_area(curve):
    steps = len(curve) - 1
    return sum((curve[i] + curve[i + 1]) / 2 * (1 / steps) for i in range(steps))


@pytest.mark.parametrize("protocol", ["rise", "ca_stream"])
@pytest.mark.parametrize("size", [8, 12])
def test_insertion_and_deletion_are_the_slides_algorithms(protocol, size):
    model, x, maps, y = task(size=size)
    details = {"rise": (11, 5.0, size, True), "ca_stream": (5, 5.0, 8 * size, False)}[protocol]
    for kind in ("insertion", "deletion"):
        expected = [literal_curve(kind, model, *each, *details) for each in zip(x, maps, y, strict=True)]
        curves = getattr(metrics, f"{kind}_curve")(model, x, maps, y, protocol=protocol)
        torch.testing.assert_close(curves, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        areas = torch.tensor([literal_area(curve) for curve in expected], dtype=torch.float64)
        torch.testing.assert_close(getattr(metrics, kind)(model, x, maps, y, protocol=protocol), areas)
        torch.testing.assert_close(metrics.area(curves), areas)


def gkern(side, sigma):
    """RISE's: a point, filtered by scipy."""
    ndimage = pytest.importorskip("scipy.ndimage")
    point = torch.zeros(side, side, dtype=torch.float64)
    point[side // 2, side // 2] = 1
    return torch.tensor(ndimage.gaussian_filter(point.cpu().numpy(), sigma))


@pytest.mark.parametrize(("side", "sigma"), [(11, 5.0), (5, 5.0), (11, 2.4), (31, 2.5), (3, 9.0), (1, 1.0)])
def test_the_kernel_of_rise(side, sigma):
    """What a point is blurred to."""
    point = torch.zeros(1, 2, side, side, dtype=torch.float64)
    point[0, 0, side // 2, side // 2] = 1
    found = functional._blur(point, metrics.Protocol("own", side, sigma, 1, reflected=True))[0]
    torch.testing.assert_close(found[0], gkern(side, sigma), rtol=0, atol=1e-12)
    assert not found[1].any()
    single = functional._blur(point.float(), metrics.Protocol("own", side, sigma, 1, reflected=True))[0, 0]
    torch.testing.assert_close(single, gkern(side, sigma).float(), rtol=1e-6, atol=1e-8)


def test_rise():
    """The published evaluation's loop, on numpy order and with its own sum and kernel."""
    model, x, maps, y = task(size=10)
    hw, step = 100, 10
    for image, saliency_map, c in zip(x, maps, y, strict=True):
        for mode in ("insertion", "deletion"):
            blurred = F.conv2d(image[None], gkern(11, 5).expand(3, 1, 11, 11), padding=5, groups=3)
            start, finish = (blurred, image[None]) if mode == "insertion" else (image[None], torch.zeros_like(blurred))
            start, scores = start.clone(), []
            salient_order = saliency_map.flatten().cpu().numpy().argsort()[::-1]
            for i in range((hw + step - 1) // step + 1):
                scores.append(model(start).softmax(1)[0, c].item())
                coords = salient_order[step * i : step * (i + 1)].copy()
                start.view(3, hw)[:, coords] = finish.reshape(3, hw)[:, coords]
            auc = (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)
            ours = getattr(metrics, mode)(model, image[None], saliency_map[None], int(c))
            assert float(ours) == pytest.approx(auc, abs=1e-12)


@pytest.mark.parametrize("seed", [3, 8])
def test_torch_cam(seed):
    """Average drop and increase of torch-cam, which masks in the space of the model: mean 0 and deviation 1."""
    torchcam = pytest.importorskip("torchcam.metrics")
    methods = pytest.importorskip("torchcam.methods")
    model, x, _, _ = task(6, seed=seed)
    model = model.float()
    x = x.float()
    # Without a kink in the resizing: torch-cam's map is not stretched to [0, 1] again after it.
    extractor = methods.GradCAM(model, "2", input_shape=(3, 8, 8))
    peer = torchcam.ClassificationMetric(extractor, lambda logits: logits.softmax(1))
    peer.update(x)
    extractor.remove_hooks()
    maps = saliency.grad_cam(nn.Sequential(model, nn.Softmax(1)), x, "0.2")  # of the probability, as the peer
    found = metrics.faithfulness(model, x, maps)
    assert found["AD"].max() > 0.1
    assert float(found["AD"].mean()) == pytest.approx(100 * peer.summary()["avg_drop"], abs=1e-3)
    assert float(found["AI"].mean()) == pytest.approx(100 * peer.summary()["conf_increase"], abs=1e-3)


@pytest.mark.parametrize("normalized", [False, True])
def test_masking_happens_on_the_denormalized_image(normalized):
    model, x, maps, y = task()
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)) if normalized else ((0, 0, 0), (1, 1, 1))
    found = metrics.faithfulness(model, x, maps, y, **({"mean": mean, "std": std} if normalized else {}))
    for n in range(3):
        masked = x[n].clone()
        for c in range(3):
            masked[c] = ((x[n, c] * std[c] + mean[c]) * maps[n] - mean[c]) / std[c]
        before, after = probability(model, x[n], y[n]), probability(model, masked, y[n])
        assert float(found["AD"][n]) == pytest.approx(100 * max(0, before - after) / before, abs=1e-10)
        assert float(found["AG"][n]) == pytest.approx(100 * max(0, after - before) / (1 - before), abs=1e-10)
        assert float(found["AI"][n]) == 100 * (after > before)


probabilities = arrays("float64", 5, elements=st.floats(0, 1, allow_subnormal=False))


@given(probabilities, probabilities)
def test_metrics_of_probabilities(y, o):
    y, o = torch.from_numpy(y), torch.from_numpy(o)
    drop, gain, increase = metrics.average_drop(y, o), metrics.average_gain(y, o), metrics.average_increase(y, o)
    for values in (drop, gain, increase):
        assert ((values >= 0) & (values <= 1)).all()  # and no NaN, also at exactly 0 and 1
    for n in range(5):
        assert float(drop[n]) == (max(0, y[n] - o[n]) / y[n] if y[n] > 0 else 0)
        assert float(gain[n]) == (max(0, o[n] - y[n]) / (1 - y[n]) if y[n] < 1 else 0)
        assert float(increase[n]) == (o[n] > y[n])
        as_printed = metrics.average_gain(y, o, denominator="y")[n]
        assert float(as_printed) == (max(0, o[n] - y[n]) / y[n] if y[n] > 0 else 0)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_batches_and_chunks_do_not_matter(samples, chunk_size, seed):
    model, x, maps, _ = task(samples, seed=seed)
    together = metrics.faithfulness(model, x, maps, chunk_size=chunk_size)
    for n in range(samples):
        alone = metrics.faithfulness(model, x[n : n + 1], maps[n : n + 1])
        for name in NAMES:
            torch.testing.assert_close(together[name][n], alone[name][0])
    for name, function in (("INS", metrics.insertion), ("DEL", metrics.deletion)):
        torch.testing.assert_close(100 * function(model, x, maps, chunk_size=chunk_size), together[name])


def test_ties_and_constant_maps_are_deterministic():
    """Equally salient pixels change in reading order; a map of ones masks nothing."""
    model, x, _, y = task()
    for value in (0.0, 0.5, 1.0):
        maps = torch.full((3, 8, 8), value)
        reading_order = torch.linspace(1, 0, 64).view(1, 8, 8).expand(3, 8, 8)
        for function in (metrics.insertion, metrics.deletion):
            assert torch.equal(function(model, x, maps, y), function(model, x, reading_order, y))
    unmasked = metrics.faithfulness(model, x, torch.ones(3, 8, 8), y)
    for name in ("AD", "AG", "AI"):
        assert not unmasked[name].any()
    black = metrics.faithfulness(model, x, torch.zeros(3, 8, 8), y)
    curve = metrics.deletion_curve(model, x, torch.zeros(3, 8, 8), y)
    torch.testing.assert_close(black["AD"], 100 * metrics.average_drop(curve[:, 0], curve[:, -1]))


def test_certain_models_give_no_nan():
    """Probabilities of exactly 1 and exactly 0."""
    model, x, maps, _ = task()
    with torch.no_grad():
        model[-1].weight *= 1e6
        model[-1].bias *= 1e6
    for target in range(4):
        for values in metrics.faithfulness(model, x, maps, target).values():
            assert ((values >= 0) & (values <= 100)).all()


def test_maps_of_any_resolution():
    model, x, _, y = task()
    small = torch.rand(3, 4, 5)
    resized = F.interpolate(small[:, None], (8, 8), mode="bilinear")[:, 0]
    for name, values in metrics.faithfulness(model, x, small, y).items():
        assert torch.equal(values, metrics.faithfulness(model, x, resized, y)[name])


def test_the_whole_image_is_inserted_and_deleted():
    """Curves begin and end where they must, also when the steps do not divide the pixels."""
    model, x, maps, y = task(size=10)
    inserted = metrics.insertion_curve(model, x, maps, y, protocol="ca_stream")
    deleted = metrics.deletion_curve(model, x, maps, y, protocol="ca_stream")
    assert inserted.shape == deleted.shape == (3, 3)  # 100 pixels, 80 per step
    with torch.no_grad():
        p, black = (model(each).softmax(1)[range(3), y] for each in (x, torch.zeros_like(x)))
    torch.testing.assert_close(inserted[:, -1], p)
    torch.testing.assert_close(deleted[:, 0], p)
    torch.testing.assert_close(deleted[:, -1], black)


@given(arrays("float64", (3, 7), elements=st.floats(0, 1)))
def test_the_area_is_that_of_the_slides(curves):
    found = metrics.area(torch.tensor(curves))
    torch.testing.assert_close(found, torch.tensor([literal_area(curve) for curve in curves], dtype=torch.float64))


def test_directions():
    """Confidence that rises under the map, or early, or falls early, is the better one."""
    low, high = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.5])
    functions = {"AD": metrics.average_drop, "AG": metrics.average_gain, "AI": metrics.average_increase}
    better = {name: (function(low, high).mean(), function(high, low).mean()) for name, function in functions.items()}
    curves = torch.tensor([[0.1, 0.9, 1.0], [0.1, 0.1, 1.0]])  # an early rise and a late one
    better["INS"] = tuple(metrics.area(curves))
    better["DEL"] = tuple(metrics.area(1 - curves))
    assert {name: bool(good > bad) for name, (good, bad) in better.items()} == metrics.HIGHER_IS_BETTER
    assert tuple(better) == NAMES


def test_protocols_are_named():
    text = {name: str(protocol) for name, protocol in metrics.PROTOCOLS.items()}
    assert "11x11" in text["rise"]
    assert "(sigma 5, reflected into the kernel, zero padding)" in text["rise"]
    assert "(sigma 5, zero padding)" in text["ca_stream"]
    assert "1 x W" in text["rise"]
    assert "5x5" in text["ca_stream"]
    assert "8 x W" in text["ca_stream"]
    own = metrics.Protocol("own", blur=3, sigma=1.0, rows=2)
    model, x, maps, y = task()
    assert metrics.insertion_curve(model, x, maps, y, protocol=own).shape == (3, 5)


# ---- the torchmetrics.Metric


def test_metric_is_the_mean_over_batches():
    model, x, maps, y = task(7)
    for options in ({}, {"protocol": "ca_stream", "denominator": "y", "mean": [0.5] * 3, "std": [0.2] * 3}):
        metric = metrics.Faithfulness(model, **options)
        for part in (slice(0, 3), slice(3, 7)):
            metric.update(x[part], maps[part], y[part])
        expected = metrics.faithfulness(model, x, maps, y, **options)
        for name, value in metric.compute().items():
            assert float(value) == pytest.approx(float(expected[name].mean()))
        metric.reset()
        metric.update(x[:2], maps[:2])
        again = metrics.faithfulness(model, x[:2], maps[:2], **options)
        assert float(metric.compute()["INS"]) == pytest.approx(float(again["INS"].mean()))


def test_metric_counts_forward_passes():
    """y, o, and S steps of each curve: the image itself is evaluated once for all five."""
    model, x, maps, _ = task(2)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    metrics.Faithfulness(model).update(x, maps)
    assert sum(seen) == 2 * (1 + 1 + 8 + 8)


def test_metric_collection_and_state():
    model, x, maps, y = task(4)
    collection = torchmetrics.MetricCollection(
        {"rise": metrics.Faithfulness(model), "late": metrics.Faithfulness(model, protocol="ca_stream")}
    )
    collection.update(x, maps, target=y)
    found = collection.compute()
    assert len(found) == 10
    metric = metrics.Faithfulness(model)
    assert not list(metric.parameters())
    assert not metric.state_dict()
    batch = metric(x, maps, y)  # torchmetrics' forward: the batch's values, and accumulation
    assert batch.keys() == set(NAMES)
    torch.testing.assert_close(metric.compute(), batch)


SYNC = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_metrics import NAMES, task
from interpgrad.metrics import Faithfulness
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=int(sys.argv[1]), world_size=2)
model, x, maps, y = task(5)
own = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
metric = Faithfulness(model)
metric.update(x[own], maps[own], y[own])
found = metric.compute()
if dist.get_rank() == 0:
    print(*(float(found[name]) for name in NAMES))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.cpu("its processes compute on the CPU")
def test_two_processes_are_one(tmp_path):
    code = SYNC.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"))
    command = [sys.executable, "-W", "ignore", "-c", code]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], results
    model, x, maps, y = task(5)
    metric = metrics.Faithfulness(model)
    metric.update(x, maps, y)
    expected = metric.compute()
    for name, text in zip(NAMES, results[0][0].split(), strict=True):
        assert float(text) == pytest.approx(float(expected[name]), abs=1e-9)


# ---- no trace, errors


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(fails):
    model, x, maps, y = task()
    model.train()
    model[1].eval()
    F.cross_entropy(model(x), y).backward()
    if fails:
        model[11].register_forward_pre_hook(lambda *_: 1 / 0)
    before = trace(model)
    for function in (metrics.faithfulness, metrics.insertion, metrics.deletion):
        if fails:
            with pytest.raises(ZeroDivisionError):
                function(model, x, maps)
        else:
            function(model, x, maps)
    assert_same_trace(before, trace(model))


@pytest.mark.parametrize("function", [metrics.faithfulness, metrics.insertion, metrics.deletion])
def test_bad_input(function):
    model, x, maps, _ = task()
    nan = maps.clone()
    nan[1, 2, 3] = float("nan")
    for arguments, error, message in (
        ((x.long(), maps), TypeError, "expected x to be a floating point tensor, got a tensor of torch.int64"),
        ((x, maps.long()), TypeError, "expected maps to be a floating point tensor"),
        ((x, maps[:2]), ValueError, "expected one map for each of the 3 images, got 2"),
        ((x, maps[:, None]), ValueError, r"expected maps of shape \(N, h, w\), not empty, got \(3, 1, 8, 8\)"),
        ((x[:0], maps[:0]), ValueError, "not empty"),
        ((x, nan), ValueError, r"expected finite maps, got NaN or infinity in 1 of 3 \(index 1\)"),
        ((x / nan[:, None], maps), ValueError, r"expected finite images, got NaN or infinity in 1 of 3 \(index 1\)"),
        ((x, maps * 3), ValueError, r"expected maps in \[0, 1\], got values from .*: scale each map"),
        ((x, maps, 4), ValueError, "expected class indices from 0 to 3, got 4 to 4"),
        ((x, maps, torch.zeros(2, dtype=torch.long)), ValueError, "one for each of the 3 images"),
    ):
        with pytest.raises(error, match=message):
            function(model, *arguments)
    with pytest.raises(ValueError, match=r"expected protocol to be one of \['rise', 'ca_stream'\]"):
        function(model, x, maps, protocol="riser")
    with pytest.raises(ValueError, match="chunk_size of at least 1"):
        function(model, x, maps, chunk_size=0)
    with pytest.raises(ValueError, match=r"logits of shape \(N, classes\)"):
        function(nn.Conv2d(3, 3, 1).double(), x, maps)


class Told(nn.Module):
    """A model with a strength for each image and a mode for all; as CLIP's, the images come second."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, strength=None, pixel_values=None, mode=None):
        assert mode == "square"
        return self.net(pixel_values * strength[:, None, None, None]) * strength[:, None] ** 2


def evaluated(name, model, x, maps, y, kwargs, chunk_size):
    """Per image, of every function; of the metric, its means."""
    if name == "Faithfulness":
        metric = metrics.Faithfulness(model, chunk_size=chunk_size)
        metric.update(x, maps, y, model_kwargs=kwargs)
        return torch.stack(list(metric.compute().values()))[None]
    found = getattr(metrics, name)(model, x, maps, y, chunk_size=chunk_size, model_kwargs=kwargs)
    return torch.stack(list(found.values()), 1) if isinstance(found, dict) else found


FUNCTIONS = ("insertion", "deletion", "insertion_curve", "deletion_curve", "faithfulness", "Faithfulness")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_further_arguments_follow_their_image(name, given):
    _, x, maps, y = task(5)
    model, strength = Told().eval(), torch.rand(5, dtype=x.dtype, generator=seeded(1)) + 0.5
    targets = y if given else [None] * 5
    alone = torch.cat(
        [
            evaluated(name, model, image[None], each[None], c, {"strength": s[None], "mode": "square"}, 64)
            for image, each, c, s in zip(x, maps, targets, strength, strict=True)
        ]
    )
    alone = alone.mean(0, keepdim=True) if name == "Faithfulness" else alone
    for chunk_size in (64, 7, 2):
        kwargs = {"strength": strength, "mode": "square"}
        together = evaluated(name, model, x, maps, y if given else None, kwargs, chunk_size)
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    other = evaluated(name, model, x, maps, y, {"strength": strength.flip(0), "mode": "square"}, 64)
    assert (other - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_further_arguments_without_a_row_for_each_image(name):
    _, x, maps, y = task()
    message = r"expected model_kwargs\['strength'\] to have one row for each of the 3 images, got shape \(1, 3\)"
    with pytest.raises(ValueError, match=message):
        evaluated(name, Told(), x, maps, y, {"strength": x.new_ones(1, 3), "mode": "square"}, 64)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 100))
def test_the_grid_pointing_game(side, count, seed):
    """By loops over cells: what is put where, and the share of each."""
    x = torch.randn(count * side**2, 2, 3, 4, generator=seeded(seed))
    maps = torch.randn(count, 3 * side, 4 * side, generator=seeded(seed + 1))
    mosaics, shares = metrics.grid(x, side), metrics.grid_pointing(maps, side)
    for index in range(count):
        positive = maps[index].clamp(min=0)
        for row in range(side):
            for column in range(side):
                cell = row * side + column
                window = (slice(3 * row, 3 * row + 3), slice(4 * column, 4 * column + 4))
                assert torch.equal(mosaics[index][:, window[0], window[1]], x[index * side**2 + cell])
                torch.testing.assert_close(shares[index, cell], positive[window].sum() / positive.sum())


def test_grids_of_another_size():
    assert not metrics.grid_pointing(-torch.ones(1, 4, 4)).any()
    for images in (torch.zeros(3, 1, 2, 2), torch.zeros(0, 1, 2, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match=r"expected images .* that they fill grids of 2x2"):
            metrics.grid(images)
    for maps in (torch.zeros(1, 5, 4), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match=r"expected maps .* of 2x2 equal cells, got shape"):
            metrics.grid_pointing(maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_grid_pointing_game_in_half_precision(dtype):
    """Whose sums end at 65504."""
    shares = metrics.grid_pointing(torch.full((1, 40, 40), 3e4, dtype=dtype))
    torch.testing.assert_close(shares, torch.full((1, 4), 0.25))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_grid_pointing_game_of_maps_that_are_not_finite(value):
    maps = torch.ones(3, 4, 4)
    maps[1, 2, 3] = float(value)
    with pytest.raises(ValueError, match=r"expected finite maps, got NaN or infinity in 1 of 3 \(index 1\)"):
        metrics.grid_pointing(maps)


def test_bad_probabilities():
    y = torch.tensor([0.5, 0.5])
    for bad in (torch.tensor([0.5, 1.5]), torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match=r"expected o to hold probabilities in \[0, 1\]: apply softmax"):
            metrics.average_drop(y, bad)
    with pytest.raises(ValueError, match="of one shape"):
        metrics.average_increase(y, y[:1])
    with pytest.raises(ValueError, match='expected denominator="1-y"'):
        metrics.average_gain(y, y, denominator="o")
    with pytest.raises(ValueError, match="mean and std to have 1 value or 3"):
        metrics.faithfulness(*task()[:3], mean=(1, 2), std=(1, 2))


def test_faithfulness_without_torchmetrics():
    code = (
        "import sys\nsys.modules['torchmetrics'] = None\n"
        "import interpgrad.metrics as metrics\n"
        "assert metrics.insertion\n"
        "try:\n    metrics.Faithfulness\nexcept ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "pip install torchmetrics" in result.stdout
