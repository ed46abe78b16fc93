import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cli.errors import InputError
from lit_landmarks import metrics
from tests.helpers.distributed import in_two_processes

CLASSES = (metrics.RadialError, metrics.MeanRadialError, metrics.SuccessDetectionRate)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def batches(sizes=(3, 2), landmarks=4, seed=0):
    """Arguments of `update`, one tuple per batch: predictions, targets, masks and spacings of two axes."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for size in sizes:
        target = 100 * torch.rand(size, landmarks, 2, generator=generator)
        prediction = target + 15 * torch.randn(size, landmarks, 2, generator=generator)
        valid = torch.rand(size, landmarks, generator=generator) > 0.25
        spacing = 0.1 + 0.1 * torch.rand(size, 2, generator=generator)
        result.append((prediction, target, valid, spacing))
    return result


def numpy_errors(batch):
    """(N, K) float64 errors of all batches, by a loop."""
    rows = []
    for prediction, target, valid, spacing in batch:
        for b in range(len(prediction)):
            row = []
            for k in range(prediction.shape[1]):
                d = [float(spacing[b, a]) * (float(prediction[b, k, a]) - float(target[b, k, a])) for a in (0, 1)]
                row.append(math.hypot(*d) if valid[b, k] else math.nan)
            rows.append(row)
    return np.array(rows)


def filled(kind=metrics.RadialError, data=None, **kwargs):
    metric = kind(**kwargs)
    for batch in batches() if data is None else data:
        metric.update(*batch)
    return metric


# Errors


@pytest.mark.parametrize(
    ("spacing", "factor"),
    [
        (None, (1, 1)),
        (0.5, (0.5, 0.5)),
        (torch.tensor(0.5), (0.5, 0.5)),
        (torch.tensor([0.5, 2.0]), ((0.5, 0.5), (2, 2))),
        (torch.tensor([[0.5, 2.0], [1.0, 3.0]]), ((0.5, 2), (1, 3))),
    ],
)
def test_radial_errors_of_every_spacing_per_image(spacing, factor):
    prediction, target, _, _ = batches((2,), 3)[0]
    factor = np.broadcast_to(np.array(factor, dtype=np.float64), (2, 2))
    expected = np.linalg.norm((prediction.double() - target.double()).numpy() * factor[:, None], axis=-1)
    errors = metrics.radial_errors(prediction, target, torch.ones(2, 3).bool(), spacing)
    assert errors.dtype == torch.float64
    np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-12)


def test_radial_errors_of_a_spacing_per_landmark():
    prediction, target, _, _ = batches((2,), 3)[0]
    valid = torch.ones(2, 3).bool()
    spacing = torch.arange(1.0, 7.0).view(2, 3)
    plain = metrics.radial_errors(prediction, target, valid)
    torch.testing.assert_close(metrics.radial_errors(prediction, target, valid, spacing), plain * spacing)
    with pytest.raises(ValueError, match=r"\(4,\).*\(2, 3\)"):
        metrics.radial_errors(prediction, target, valid, torch.ones(4))


def test_missing_and_failed_are_told_apart():
    nan = math.nan
    target = torch.tensor([[[0.0, 0.0], [nan, nan], [0.0, 0.0], [0.0, 0.0]]])
    prediction = torch.tensor([[[3.0, 4.0], [1.0, 1.0], [nan, 1.0], [nan, 1.0]]])
    valid = torch.tensor([[True, True, True, False]])
    errors = metrics.radial_errors(prediction, target, valid)
    np.testing.assert_array_equal(errors.numpy(), [[5, nan, math.inf, nan]])
    assert torch.isnan(metrics.radial_errors(prediction, target, valid, torch.tensor([nan]))).all()


def test_half_precision_coordinates_under_autocast_are_float64():
    prediction, target, valid, _ = batches((2,), 3)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = metrics.radial_errors(prediction.half(), target, valid)
    assert errors.dtype == torch.float64


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pixels", [(20, 0), (12, 16), (0, 20)])
def test_ties_survive_millimetres_in_binary(pixels, strict):
    """Errors of 2 mm from integers: float32 coordinates times 0.1 are not exactly 2."""
    target = torch.tensor([[[1234.0, 567.0]]])
    prediction = target + torch.tensor(pixels)
    errors = metrics.radial_errors(prediction, target, torch.tensor([[True]]), torch.tensor([0.1]))
    assert metrics.success(errors, 2.0, strict).item() is not strict
    assert metrics.success(errors * (1 - 1e-5), 2.0, strict).item()
    assert not metrics.success(errors * (1 + 1e-5), 2.0, strict).item()


# Figures


def test_figures_equal_numpy():
    errors = numpy_errors(batches())
    pooled = errors[~np.isnan(errors)]
    figures = {name: value.item() for name, value in filled(thresholds=[1, 2.5]).compute().items()}
    expected = {
        "mre": pooled.mean(),
        "sd": pooled.std(ddof=1),
        "median": np.median(pooled),
        "p95": np.percentile(pooled, 95),
        "image_mre": np.nanmean(np.nanmean(errors, 1)),
        "sdr_1mm": 100 * (pooled <= 1).mean(),
        "sdr_2.5mm": 100 * (pooled <= 2.5).mean(),
    }
    assert list(figures) == list(expected) == metrics.summary_keys([1, 2.5])
    assert figures == pytest.approx(expected, rel=1e-6)
    assert figures["mre"] != pytest.approx(figures["image_mre"], rel=1e-3)


def test_figures_per_landmark_and_image_equal_numpy():
    errors = numpy_errors(batches())
    metric = filled(thresholds=[2])
    per_landmark, per_image = metric.per_landmark(), metric.per_image()
    np.testing.assert_allclose(per_landmark["mre"].numpy(), np.nanmean(errors, 0), rtol=1e-6)
    np.testing.assert_allclose(per_landmark["sd"].numpy(), np.nanstd(errors, 0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(per_landmark["median"].numpy(), np.nanmedian(errors, 0), rtol=1e-6)
    np.testing.assert_allclose(per_landmark["p95"].numpy(), np.nanpercentile(errors, 95, axis=0), rtol=1e-6)
    count = (~np.isnan(errors)).sum(0)
    np.testing.assert_allclose(per_landmark["sdr_2mm"].numpy(), 100 * (errors <= 2).sum(0) / count, rtol=1e-6)
    np.testing.assert_array_equal(per_landmark["count"].numpy(), count)
    np.testing.assert_allclose(per_image["mre"].numpy(), np.nanmean(errors, 1), rtol=1e-6)
    np.testing.assert_allclose(per_image["max"].numpy(), np.nanmax(errors, 1), rtol=1e-6)
    np.testing.assert_array_equal(per_image["count"].numpy(), (~np.isnan(errors)).sum(1))
    np.testing.assert_allclose(metric.gather().numpy(), errors, rtol=1e-6)


def test_the_two_small_metrics_agree_with_the_large_one():
    figures = filled().compute()
    torch.testing.assert_close(filled(metrics.MeanRadialError).compute(), figures["mre"])
    for threshold in (2.0, 3.0):
        rate = filled(metrics.SuccessDetectionRate, threshold=threshold).compute()
        torch.testing.assert_close(rate, figures[metrics.threshold_key(threshold)])


def test_strict_excludes_ties():
    data = [(torch.tensor([[[20.0, 0.0], [0.0, 10.0]]]), torch.zeros(1, 2, 2), torch.ones(1, 2).bool(), 0.1)]
    assert filled(data=data).compute()["sdr_2mm"] == 100
    assert filled(data=data, strict=True).compute()["sdr_2mm"] == 50
    assert filled(metrics.SuccessDetectionRate, data, strict=True).compute() == 50


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_valid_is_nan():
    prediction, target, valid, spacing = batches((2,), 3)[0]
    for data in ([], [(prediction, target, torch.zeros_like(valid), spacing)]):
        metric = filled(data=data)
        assert all(torch.isnan(value) for value in metric.compute().values())
        assert (metric.per_landmark()["count"] == 0).all()
        assert torch.isnan(metric.per_image()["mre"]).all()
        for kind in (metrics.MeanRadialError, metrics.SuccessDetectionRate):
            assert torch.isnan(filled(kind, data).compute())


def test_one_error_has_no_deviation():
    figures = metrics.summarise(torch.tensor([[1.5, math.nan]]).double())
    assert figures["mre"] == figures["median"] == figures["p95"] == 1.5
    assert torch.isnan(figures["sd"])


def test_pixels_need_no_spacing_and_millimetres_do():
    prediction, target, valid, spacing = batches((2,), 3)[0]
    with pytest.raises(InputError, match=r"spacing.*'px'"):
        metrics.RadialError().update(prediction, target, valid)
    plain = filled(data=[(prediction, target, valid)], unit="px", thresholds=[2, 2.5])
    assert "sdr_2.5px" in plain.compute()
    ignored = filled(data=[(prediction, target, valid, spacing)], unit="px", thresholds=[2, 2.5])
    assert plain.compute() == ignored.compute()


@pytest.mark.parametrize("kwargs", [{"thresholds": []}, {"thresholds": [2, 0]}, {"unit": "inch"}])
def test_wrong_options_are_named(kwargs):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        metrics.RadialError(**kwargs)


# As metrics


def test_forward_gives_the_batch_and_accumulates():
    metric = metrics.RadialError()
    first, second = batches()
    torch.testing.assert_close(metric(*first), filled(data=[first]).compute(), equal_nan=True)
    metric(*second)
    torch.testing.assert_close(metric.compute(), filled().compute())
    metric.reset()
    metric.update(*second)
    torch.testing.assert_close(metric.compute(), filled(data=[second]).compute())


@pytest.mark.parametrize("kind", CLASSES)
def test_states_merge_exactly(kind):
    first, second = batches((3, 2))
    merged, other = filled(kind, [first]), filled(kind, [second])
    merged.merge_state(other)
    torch.testing.assert_close(merged.compute(), filled(kind).compute(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", CLASSES)
def test_states_stay_double_and_pickle(kind):
    metric = pickle.loads(pickle.dumps(filled(kind).half().float()))
    torch.testing.assert_close(metric.compute(), filled(kind).compute(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", CLASSES)
def test_reset_in_inference_mode_can_be_updated_outside(kind):
    metric = kind()
    with torch.inference_mode():
        metric.update(*batches()[0])
        metric.reset()
    for batch in batches():
        metric.update(*batch)
    torch.testing.assert_close(metric.compute(), filled(kind).compute())


@pytest.mark.parametrize("kind", CLASSES)
def test_update_does_not_wait_for_the_device(kind):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(word in str(func) for word in ("nonzero", "_local_scalar_dense", "masked_select")), func
            return func(*args, **(kwargs or {}))

    metric, data = kind(), batches()
    with Recorder():
        for batch in data:
            metric.update(*batch)


def _figures(rank):
    # The shares differ in size, and one process of the second metric has nothing at all.
    uneven = filled(data=batches((3, 2))[rank : rank + 1])
    lonely = filled(data=batches() if rank == 0 else [])
    small = [filled(kind, batches((3, 2))[rank : rank + 1]) for kind in CLASSES[1:]]
    return {
        "uneven": uneven.compute(),
        "lonely": lonely.compute(),
        "small": [metric.compute() for metric in small],
        "landmarks": uneven.per_landmark(),
        "images": uneven.per_image(),
        "own": len(uneven.errors),
    }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path):
    single = filled()
    for result in in_two_processes(_figures, tmp_path):
        torch.testing.assert_close(result["uneven"], single.compute(), rtol=0, atol=1e-14)
        torch.testing.assert_close(result["lonely"], single.compute(), rtol=0, atol=1e-14)
        for value, kind in zip(result["small"], CLASSES[1:], strict=True):
            torch.testing.assert_close(value, filled(kind).compute(), rtol=0, atol=1e-14)
        torch.testing.assert_close(result["landmarks"], single.per_landmark(), rtol=0, atol=1e-14)
        torch.testing.assert_close(result["images"], single.per_image(), rtol=0, atol=1e-14)
        assert result["own"] == 1  # back to its own share after each figure


# Intervals


def test_bootstrap_is_repeatable_and_leaves_the_global_generator_alone():
    errors = torch.from_numpy(numpy_errors(batches((20, 10))))
    state = torch.get_rng_state()
    first = metrics.bootstrap_interval(errors, torch.nanmean, num=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == metrics.bootstrap_interval(errors, torch.nanmean, num=100)
    assert first != metrics.bootstrap_interval(errors, torch.nanmean, num=100, seed=1)
    assert first[0] < errors.nanmean() < first[1]


def test_bootstrap_resamples_images():
    """The width is that of the mean of N image means, five times wider than one over independent landmarks."""
    image = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)).double()
    errors = image.expand(60, 25)
    low, high = metrics.bootstrap_interval(errors, torch.nanmean, num=1000)
    assert high - low == pytest.approx(2 * 1.96 * image.std().item() / 60**0.5, rel=0.15)
    narrow = metrics.bootstrap_interval(errors, torch.nanmean, num=1000, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * image.std().item() / 60**0.5, rel=0.15)


def test_bootstrap_of_nothing_is_nan():
    assert all(math.isnan(bound) for bound in metrics.bootstrap_interval(torch.zeros(0, 3), torch.nanmean))


# Real annotations


@pytest.mark.data
@pytest.mark.skipif("LIT_DATA" not in os.environ, reason="LIT_DATA names no folder")
def test_one_doctor_against_the_other_on_isbi2015_test1():
    folder = Path(os.environ["LIT_DATA"]) / "isbi2015" / "AnnotationsByMD"

    def points(doctor):
        files = [folder / f"400_{doctor}" / f"{number:03d}.txt" for number in range(151, 301)]
        rows = [file.read_text().splitlines()[:19] for file in files]
        return torch.tensor([[[float(v) for v in line.split(",")] for line in lines] for lines in rows])

    valid = torch.ones(150, 19).bool()
    rows = {}
    for strict in (False, True):
        metric = metrics.RadialError(strict=strict)
        metric.update(points("junior"), points("senior"), valid, 0.2)
        rows[strict] = {name: round(value.item(), 3) for name, value in metric.compute().items()}
    assert rows[False]["mre"] == 2.363
    sdr = [round(rows[False][metrics.threshold_key(t)], 2) for t in (2, 2.5, 3, 4)]
    assert sdr == pytest.approx([55.54, 63.93, 71.12, 81.51], abs=0.011)
    assert rows[True]["sdr_2mm"] == pytest.approx(55.19, abs=0.011)
