"""What is where in the pictures."""

import math

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from lit_patchnerf import pictures
from lit_patchnerf.pictures import comparison, draw_grid

BAR, GAP = 24, 4
GREY = (48, 48, 48)


def scene(height=40, width=400, seed=0):
    return np.random.default_rng(seed).integers(20, 200, (height, width, 3), dtype=np.uint8)


def panels(picture, count):
    """The pictures below their lines of text."""
    width = (picture.shape[1] - (count - 1) * GAP) // count
    return [picture[BAR:, i * (width + GAP) : i * (width + GAP) + width] for i in range(count)]


def test_original_reconstruction_error():
    target = scene()
    found = target.copy()
    found[5, 7] += 10
    picture = comparison(target, found, "frame 3")
    assert picture.dtype == np.uint8
    assert picture.shape == (40 + BAR, 3 * 400 + 2 * GAP, 3)
    first, second, third = panels(picture, 3)
    np.testing.assert_array_equal(first, target)
    np.testing.assert_array_equal(second, found)
    black, error = (cv2.applyColorMap(np.full((1, 1), v, np.uint8), cv2.COLORMAP_INFERNO)[0, 0, ::-1] for v in (0, 80))
    np.testing.assert_array_equal(third[5, 7], error)  # 8 times 10
    rest = np.delete(third.reshape(-1, 3), 5 * 400 + 7, axis=0)
    assert (rest == black).all()
    assert (picture[: BAR - 2, 400 : 400 + GAP] == GREY).all()


def test_captions(monkeypatch):
    written = []
    monkeypatch.setattr(pictures.cv2, "putText", lambda image, text, *_: written.append(text))
    target, found = scene(seed=1), scene(seed=2)
    comparison(target, found, "frame 3, held out", gain=4)
    expected = peak_signal_noise_ratio(torch.tensor(found).float(), torch.tensor(target).float(), data_range=255.0)
    assert written == ["frame 3, held out", f"reconstruction  {expected:.2f} dB", "error x 4"]
    written.clear()
    comparison(target, target, error=False)
    assert written == ["original", "reconstruction  90.00 dB"]  # HNeRV's formula ends there
    written.clear()
    comparison(target, found, psnr_db=31.5, error=False)
    assert written[1] == "reconstruction  31.50 dB"
    written.clear()
    comparison(target[:, :60], found[:, :60], "a caption that is much longer than " * 5, least_width=1, error=False)
    widths = [cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0] for text in written]
    assert max(widths) <= 60 - 12
    assert written[0].startswith("a")


def test_tensors_and_arrays_give_one_picture():
    target, found = scene(seed=1), scene(seed=2)
    expected = comparison(target, found)
    as_bytes = [torch.from_numpy(x).permute(2, 0, 1) for x in (target, found)]
    for kind in (torch.uint8, torch.float32, torch.float64):
        scale = 1 if kind == torch.uint8 else 255
        given = [(x.to(kind) / scale).to(kind) if scale > 1 else x for x in as_bytes]
        np.testing.assert_array_equal(comparison(*given), expected)
    floats = [x.float() / 255 for x in as_bytes]
    given = floats[0], (floats[1] * 3 - 1).requires_grad_()  # beyond the range, and with a graph
    assert comparison(*given).shape == expected.shape
    assert comparison(*(x.bfloat16() for x in floats)).shape == expected.shape


def test_psnr_is_that_of_unrounded_colours(monkeypatch):
    written = []
    monkeypatch.setattr(pictures.cv2, "putText", lambda image, text, *_: written.append(text))
    target = torch.full((3, 8, 320), 0.5)
    comparison(target, target + 0.001)  # a quarter of a level
    assert written[1] == f"reconstruction  {-10 * math.log10(1e-6 + 1e-9):.2f} dB"


@pytest.mark.parametrize(("width", "expected"), [(30, 330), (319, 638), (320, 320), (960, 960), (2000, 960)])
def test_sizes(width, expected):
    picture = comparison(scene(10, width), scene(10, width, seed=1), error=False)
    assert picture.shape[1] == 2 * expected + GAP
    if width == 30:  # pixels stay squares
        np.testing.assert_array_equal(panels(picture, 2)[0][::11, ::11], scene(10, width))


def test_grid():
    picture = np.zeros((40, 80, 3), np.uint8)
    out = draw_grid(picture, (2, 4))
    assert not picture.any()
    rows, cols = np.flatnonzero(out[:, 1, 0]), np.flatnonzero(out[1, :, 0])
    assert rows.tolist() == [20]
    assert cols.tolist() == [20, 40, 60]
    assert set(np.unique(out)) == {0, 128}
    np.testing.assert_array_equal(draw_grid(picture, (1, 1)), picture)
    bright = draw_grid(np.full((4, 4, 3), 255, np.uint8), (2, 2))
    assert bright[2, 0, 0] == 255  # no overflow
    shown = panels(comparison(np.zeros((40, 400, 3), np.uint8), np.zeros((40, 400, 3), np.uint8), grid=(2, 4)), 3)
    for panel in shown:
        assert (panel[20] >= 128).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"a reconstruction of \(8, 8\) pixels, expected \(8, 9\)"):
        comparison(np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), torch.zeros(1, 8, 8), torch.zeros(8, 8)):
        with pytest.raises(ValueError, match="expected"):
            comparison(wrong, wrong)
    with pytest.raises(ValueError, match="an array of float64, expected uint8"):
        comparison(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)))
