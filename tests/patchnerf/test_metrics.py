"""Figures of frames against numpy and torchmetrics; splits, baselines, seams; exact for two processes; no waiting."""

import hashlib
import math
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, peak_signal_noise_ratio

from lit_cli.errors import InputError
from lit_patchnerf import metrics
from lit_patchnerf.metrics import FrameMetrics, SeamRatio, held_out_beside_baselines, psnr, round_to_8bit
from lit_patchnerf.splits import blend_frames, blend_neighbours, nearest_neighbours, split_frames
from lit_patchnerf.ssim import ms_ssim, ssim
from tests.helpers.distributed import in_two_processes

SPLIT_OF = ["train", "train", "unused", "val", "val", "train"]


def frames(count=6, size=(16, 24), seed=0):
    """Originals of 256 levels, and predictions that are worse from frame to frame."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 256, (count, 3, *size), generator=g) / 255
    noise = torch.randn(target.shape, generator=g) * torch.linspace(0.01, 0.2, count)[:, None, None, None]
    return target + noise, target


def filled(numbers=range(6), kind=FrameMetrics, **options):
    metric = kind(**options)
    prediction, target = frames()
    for part in (list(numbers)[:4], list(numbers)[4:]):
        if part:
            metric.update(part, [SPLIT_OF[i] for i in part], prediction[part], target[part])
    return metric


def seams(numbers=range(6)):
    return filled(numbers, SeamRatio, patch=(8, 8))


def table(prediction, target):
    """The figures of each frame in float64."""
    x, y = prediction.double().numpy(), target.double().numpy()
    rounded = np.rint(np.clip(x, 0, 1) * 255) / 255
    decibel = [-10 * np.log10(((z - y) ** 2).mean((1, 2, 3)) + 1e-9) for z in (x, rounded)]
    return dict(zip(("psnr_db", "psnr_8bit_db"), decibel, strict=True))


def test_psnr():
    prediction, target = frames()
    expected = [peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(prediction, target, strict=True)]
    torch.testing.assert_close(psnr(prediction, target), torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert psnr(target, target).tolist() == pytest.approx([90] * 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(psnr(prediction, target), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_rounding_gives_every_level_back():
    levels = torch.arange(256) / 255
    torch.testing.assert_close(round_to_8bit(levels + 0.0019), levels, rtol=0, atol=0)
    torch.testing.assert_close(round_to_8bit(torch.tensor([-0.3, 1.7])), torch.tensor([0.0, 1.0]))


def test_figures_are_means_and_minima_of_frames():
    prediction, target = frames()
    expected = table(prediction, target)
    expected["ssim"] = ssim(prediction, target).numpy()
    figures = filled().compute()
    of = np.array(SPLIT_OF)
    for name, values in expected.items():
        for prefix, chosen in [("", of != ""), *((f"{s}_", of == s) for s in metrics.SPLITS)]:
            assert figures[prefix + name].item() == pytest.approx(values[chosen].mean(), rel=1e-5)
            assert figures[f"{prefix}{name}_min"].item() == pytest.approx(values[chosen].min(), rel=1e-5)
    assert figures["psnr_db"].dtype == torch.float32
    assert len(figures) == 4 * 4 * 2
    assert math.isnan(figures["ms_ssim"])  # 16 x 24 has no room for five scales
    rows = filled().per_frame()
    assert rows["frame"].tolist() == list(range(6))
    assert rows["split"].tolist() == [0, 0, 1, 2, 2, 0]
    np.testing.assert_allclose(rows["psnr_db"].numpy(), expected["psnr_db"], rtol=1e-5)


def test_ms_ssim_of_a_large_frame():
    prediction, target = frames(1, (176, 180))
    metric = FrameMetrics()
    metric.update([0], ["val"], prediction, target)
    figures = metric.compute()
    torch.testing.assert_close(figures["val_ms_ssim"], ms_ssim(prediction, target)[0])
    other = multiscale_structural_similarity_index_measure(prediction, target, data_range=1.0)
    assert figures["ms_ssim"].item() == pytest.approx(other.item(), abs=2e-3)  # the border differs


def test_numbers_may_be_tensors_and_structure_left_out():
    prediction, target = frames()
    metric = FrameMetrics(structural=False)
    metric.update(torch.arange(6), torch.tensor([0, 0, 1, 2, 2, 0]), prediction, target)
    figures, whole = metric.compute(), filled().compute()
    assert len(figures) == 2 * 4 * 2
    assert all(torch.equal(value, whole[name]) for name, value in figures.items())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_frames_is_nan():
    for metric in (FrameMetrics(), SeamRatio((8, 8))):
        assert all(torch.isnan(value) for value in metric.compute().values())
        assert not len(metric.per_frame()["frame"])
    assert torch.isnan(filled([0, 1]).compute()["val_psnr_db_min"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("make", [filled, seams])
def test_order_repetition_and_merging_do_not_matter(make):
    whole = make().compute()
    torch.testing.assert_close(make([5, 3, 1, 0, 2, 4, 3, 5]).compute(), whole, rtol=0, atol=1e-5, equal_nan=True)
    merged = make([0, 4])
    merged.merge_state(make([1, 2, 3, 5]))
    torch.testing.assert_close(merged.compute(), whole, rtol=0, atol=0, equal_nan=True)
    stored = pickle.loads(pickle.dumps(make()))
    torch.testing.assert_close(stored.compute(), whole, rtol=0, atol=0, equal_nan=True)
    stored.reset()
    assert torch.isnan(next(iter(stored.compute().values())))


@pytest.mark.parametrize("kind", [FrameMetrics, lambda: SeamRatio((8, 8))])
def test_update_does_not_wait_for_the_device(kind):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names = ("nonzero", "_local_scalar_dense", "masked_select", "lift_fresh")
            assert not any(name in str(func) for name in names), func
            return func(*args, **(kwargs or {}))

    metric, (prediction, target) = kind(), frames()
    with Recorder():
        metric.update(range(6), SPLIT_OF, prediction, target)


def _figures(rank):
    uneven = [make([[0, 3, 4, 5], [1, 2, 5]][rank]) for make in (filled, seams)]  # frame 5 is given out twice
    lonely = filled(range(6) if rank == 0 else [])
    return {
        "uneven": [metric.compute() for metric in uneven],
        "lonely": lonely.compute(),
        "rows": uneven[0].per_frame(),
        "own": len(uneven[0].rows),
    }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path):
    expected = [filled().compute(), seams().compute()]
    for result in in_two_processes(_figures, tmp_path):
        torch.testing.assert_close(result["uneven"], expected, rtol=0, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(result["lonely"], expected[0], rtol=0, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(result["rows"], filled().per_frame(), rtol=0, atol=1e-5, equal_nan=True)
        assert result["own"] == 1


def test_wrong_input_is_named():
    prediction, target = frames(2)
    metric = FrameMetrics()
    with pytest.raises(ValueError, match="1 frames and 2 splits of 2 images"):
        metric.update([0], ["val", "val"], prediction, target)
    with pytest.raises(ValueError, match=r"'test'.*train, unused, val"):
        metric.update([0, 1], ["val", "test"], prediction, target)
    with pytest.raises(ValueError, match=r"\(N, 3, h, w\)"):
        metric.update([0, 1], ["val", "val"], prediction, target[:1])
    with pytest.raises(ValueError, match="multiples"):
        SeamRatio((7, 8)).update([0, 1], ["val", "val"], prediction, target)
    with pytest.raises(InputError, match=r"data\.patch"):
        SeamRatio((0, 8))
    with pytest.raises(ValueError, match="figure"):
        held_out_beside_baselines(filled().compute(), {}, "psnr")


# Seams


def slow_seam(image, patch):
    """Mean absolute gradients across the borders and inside, pair of pixels by pair."""
    border, inside = [], []
    _, h, w = image.shape
    for r in range(h):
        for c in range(w):
            for r2, c2 in ((r + 1, c), (r, c + 1)):
                if r2 < h and c2 < w:
                    same = r // patch[0] == r2 // patch[0] and c // patch[1] == c2 // patch[1]
                    (inside if same else border).extend(np.abs(image[:, r, c] - image[:, r2, c2]))
    return np.mean(border), np.mean(inside)


@pytest.mark.parametrize("patch", [(4, 6), (8, 12), (16, 8), (8, 24), (1, 3)])
def test_gradients_are_those_of_loops(patch):
    image = frames(1)[0]
    border, inside = metrics.mean_gradients(image, patch)
    expected = slow_seam(image[0].double().numpy(), patch)
    assert (border.item(), inside.item()) == pytest.approx(expected, rel=1e-5)


def test_seams_are_seen():
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 24), indexing="ij")
    target = ((x + y) / 2).expand(1, 3, -1, -1)
    shifted = target + 0.1 * ((torch.arange(24) // 8) % 2)  # patches of another brightness
    for prediction, expected in ((target, 1.0), (target + 0.2, 1.0), (0.5 * target, 1.0), (shifted, None)):
        metric = SeamRatio((8, 8))
        metric.update([0], ["val"], prediction, target)
        value = metric.compute()["seam_ratio"].item()
        assert value > 2 if expected is None else value == pytest.approx(expected, rel=1e-4)


def test_one_patch_has_no_seams():
    metric = SeamRatio((16, 24))
    metric.update([0], ["val"], *frames(1))
    assert torch.isnan(metric.compute()["seam_ratio"])


def test_the_seams_of_all_frames_and_of_the_worst():
    prediction, target = frames()
    pairs = [[slow_seam(z.double().numpy(), (8, 8)) for z in images] for images in (prediction, target)]
    ours, true = (np.array(pair) for pair in pairs)
    each = (ours[:, 0] / ours[:, 1]) / (true[:, 0] / true[:, 1])
    whole = (ours[:, 0].mean() / ours[:, 1].mean()) / (true[:, 0].mean() / true[:, 1].mean())
    figures = seams().compute()
    assert figures["seam_ratio"].item() == pytest.approx(whole, rel=1e-5)
    assert figures["seam_ratio_max"].item() == pytest.approx(each.max(), rel=1e-5)
    np.testing.assert_allclose(seams().per_frame()["seam_ratio"].numpy(), each, rtol=1e-5)


# Baselines


def test_held_out_frames_stand_beside_their_baselines():
    whole = filled().compute()
    row = held_out_beside_baselines(whole, {"nearest": whole, "blend": whole}, "psnr_8bit_db")
    value = whole["val_psnr_8bit_db"].item()
    assert row == {
        "val_psnr_8bit_db": value,
        "val_psnr_8bit_db_nearest": value,
        "val_psnr_8bit_db_over_nearest": 0.0,
        "val_psnr_8bit_db_blend": value,
        "val_psnr_8bit_db_over_blend": 0.0,
    }


@pytest.mark.data
@pytest.mark.timeout(120)
def test_baselines_of_big_buck_bunny():
    """Frames with i % 10 of 6 or more are held out, those below are stored: 28.87 dB nearest, 30.34 dB blended."""
    path = Path(os.environ.get("LIT_DATA", "")) / "bunny" / "bigbuckbunny.mp4"
    if "LIT_DATA" not in os.environ or not path.is_file():
        pytest.skip("LIT_DATA names no folder with bunny")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("f25b31f155970c46")
    capture, decoded = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        decoded.append(read[1][40:680])
    video = torch.from_numpy(np.stack(decoded))  # BGR, which no figure here minds
    split, values = split_frames(len(video), "6_6_10"), {}
    for name, neighbours_of in (("nearest", nearest_neighbours), ("blend", blend_neighbours)):
        metric = FrameMetrics(structural=False)
        for frame in split.val:
            image = blend_frames(video, neighbours_of([frame], split.train))
            metric.update([frame], ["val"], image, video[frame][None].movedim(-1, 1) / 255)
        values[name] = metric.compute()["val_psnr_db"].item()
    assert values == pytest.approx({"nearest": 28.87, "blend": 30.34}, abs=0.01)
