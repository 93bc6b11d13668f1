"""Figures: what is on them, one colour scale for what is compared, nothing global."""

import importlib
import subprocess
import sys

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from interpgrad import plot  # noqa: E402


def scales(figure):
    """The limits of every mapped image (photographs have none)."""
    images = [image for axis in figure.axes for image in axis.images]
    return {image.get_clim() for image in images if image.get_array().ndim == 2}


def texts(figure):
    found = [axis.get_title() for axis in figure.axes] + [axis.get_ylabel() for axis in figure.axes]
    return {text for text in found if text}


def test_gradients():
    images, delta = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    delta[1] = 0  # a dead gradient is a flat field, not NaN
    figure = plot.gradients(images, {"δ": delta, "δᴳ": 1e-12 * delta}, labels=["a", "b", "c"], title="both")
    assert {"image", "δ", "δᴳ", "a", "b", "c"} <= texts(figure)
    ((low, high),) = scales(figure)
    assert low == -high
    drawn = [image.get_array() for axis in figure.axes for image in axis.images if image.get_array().ndim == 2]
    expected = delta[0].sum(0) / delta[0].sum(0).norm()
    for array in drawn[:2]:  # the first row: scaled to unit norm, however small
        torch.testing.assert_close(torch.tensor(array), expected)
    assert figure._suptitle.get_text() == "both"


def test_cams():
    maps = torch.rand(2, 8, 8)
    figure = plot.cams(torch.rand(2, 1, 8, 8), {"Grad-CAM": maps, "Score-CAM": maps.bfloat16()}, labels=["a", "b"])
    assert {"image", "Grad-CAM", "Score-CAM", "saliency"} <= texts(figure)
    assert scales(figure) == {(0, 1)}


def test_overlays():
    """Grey under the colours of the map, in these shares; what is written is what was given."""
    image, shown = torch.rand(3, 5, 7), torch.zeros(5, 7)
    shown[2, 3] = 1
    picture = plot.overlay(image, shown, opacity=0.25)
    colours = torch.tensor(matplotlib.colormaps["inferno"]([0.0, 1.0]))[:, :3].float()
    expected = 0.75 * image.mean(0) + 0.25 * torch.where(
        shown == 1, colours[1][:, None, None], colours[0][:, None, None]
    )
    torch.testing.assert_close(picture, expected)
    torch.testing.assert_close(plot.overlay(image[:1], shown, opacity=0), image[:1].expand(3, -1, -1))


def test_overlays_of_what_is_no_picture():
    image, shown = torch.rand(3, 5, 7), torch.rand(5, 7)
    bad = [(image, 5 * shown), (image, shown * float("nan")), (image.expand(2, -1, -1, -1), shown.expand(2, -1, -1))]
    for arguments in bad:
        with pytest.raises(ValueError, match="expected one image, a map and an opacity in"):
            plot.overlay(*arguments)
    with pytest.raises(ValueError, match="expected one image, a map and an opacity in"):
        plot.overlay(image, shown, opacity=5)
    with pytest.raises(ValueError, match=r"expected a picture \(3, H, W\) in \[0, 1\], got torch.uint8 of \(3, 5, 7\)"):
        plot.save(image.byte(), "picture.png")


def test_saved_pictures_are_pixel_for_pixel(tmp_path):
    picture = torch.randint(256, (3, 5, 7)) / 255
    plot.save(picture, tmp_path / "picture.png")
    read = torch.tensor(importlib.import_module("matplotlib.image").imread(tmp_path / "picture.png"))[..., :3].permute(
        2, 0, 1
    )
    torch.testing.assert_close(read, picture)


def test_one_image_needs_no_batch():
    image, delta = torch.rand(3, 8, 8), torch.randn(3, 8, 8)
    assert texts(plot.gradients(image, {"δ": delta})) == texts(plot.gradients(image[None], {"δ": delta[None]}))
    assert texts(plot.cams(image, {"m": delta[0].abs()})) >= {"image", "m"}


def test_panels_have_the_size_of_the_images():
    figure = plot.gradients(torch.rand(1, 3, 300, 200), {"δ": torch.randn(1, 3, 300, 200)})
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    assert 150 < box.width <= 200
    assert box.height == pytest.approx(1.5 * box.width)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="expected matplotlib, which figures are made with, to be installed"):
        plot.gradients(torch.rand(1, 3, 8, 8), {"δ": torch.randn(1, 3, 8, 8)})


def test_curves():
    rising = torch.linspace(0, 1, 5).repeat(3, 1)
    figure = plot.curves({"model": rising, "other": rising[0] / 2}, {"model": rising.flip(1), "other": rising})
    insertion, deletion = figure.axes
    assert [text.get_text() for text in insertion.get_legend().get_texts()] == ["model: 50.0", "other: 25.0"]
    assert list(deletion.lines[0].get_xdata()) == [0, 25, 50, 75, 100]
    assert list(deletion.lines[0].get_ydata()) == [1, 0.75, 0.5, 0.25, 0]
    assert len(insertion.collections) == 2  # shaded
    assert insertion.lines[0].get_linestyle() != insertion.lines[1].get_linestyle()  # not by colour alone


def test_no_global_state_and_no_display(tmp_path):
    code = (
        "import sys, torch\n"
        "from interpgrad import plot\n"
        "figure = plot.gradients(torch.rand(1, 3, 8, 8), {'δ': torch.randn(1, 3, 8, 8)})\n"
        f"figure.savefig({str(tmp_path / 'figure.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {"PATH": "", "MPLBACKEND": "", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment, timeout=300)
    assert (tmp_path / "figure.png").stat().st_size > 3000


def test_bad_input():
    images, gradient = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    for arguments, message in (
        ((images[0], {"δ": gradient}), r"expected 'δ' of shape \(N, C, H, W\), as the images \(1, 3, 8, 8\), got"),
        ((images[0, 0], {"δ": gradient}), r"expected images \(N, 3, H, W\)"),
        (
            (3 * images - 1, {"δ": gradient}),
            r"expected images in \[0, 1\], got values from -.* to .*: pass",
        ),
        ((images, {}), "at least one column"),
        ((images, {"δ": gradient[:1]}), r"expected 'δ' of shape \(N, C, H, W\), as the images"),
        ((images, {"δ": gradient[..., :4]}), "expected 'δ' of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.gradients(*arguments)
    with pytest.raises(ValueError, match=r"expected 'm' of shape \(N, H, W\)"):
        plot.cams(images, {"m": gradient})
    with pytest.raises(ValueError, match="a label for each of the 2 images, got 1"):
        plot.cams(images, {"m": gradient[:, 0]}, labels=["a"])
    with pytest.raises(ValueError, match="at least one insertion curve"):
        plot.curves({}, {})
    with pytest.raises(ValueError, match="at least 2 points"):
        plot.curves({"a": torch.rand(3, 1)}, {"a": torch.rand(3, 4)})
