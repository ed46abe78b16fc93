import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cli.errors import InputError
from lit_landmarks import heatmaps as codec

METHODS = ("dark", "centroid", "quarter", "argmax", "softargmax")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_points(batch, landmarks, size, margin, seed=0):
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]]) - 1 - 2 * margin
    return margin + torch.rand(batch, landmarks, 2, generator=generator) * extent


def all_valid(points):
    return torch.ones(points.shape[:2], dtype=torch.bool)


def maps_at(points, size=(48, 64), sigma=2.0):
    return codec.encode(points, all_valid(points), size, sigma)


def with_noise(maps, std=0.03, seed=1):
    return maps + std * torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed))


class Recorder(TorchDispatchMode):
    """Fails on operations that wait for the device or whose result has a shape that depends on values."""

    FORBIDDEN = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "_to_copy.default_from_list")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in self.FORBIDDEN), name
        if "aten.index." in name:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


# Coordinates


def test_stride_mapping_keeps_the_frame_and_inverts():
    corners = torch.tensor([[-0.5, -0.5], [511.5, 639.5], [0.0, 100.0]])
    small = codec.to_heatmap(corners, 4)
    torch.testing.assert_close(small[:2], torch.tensor([[-0.5, -0.5], [127.5, 159.5]]))
    torch.testing.assert_close(codec.from_heatmap(small, 4), corners)
    torch.testing.assert_close(codec.to_heatmap(corners, 1), corners)


def test_stride_mapping_commutes_with_a_flip():
    x = torch.tensor([[3.2, 7.0]])
    flipped = torch.tensor([[63 - 3.2, 7.0]])
    small, small_flipped = codec.to_heatmap(x, 4), codec.to_heatmap(flipped, 4)
    torch.testing.assert_close(15 - small[:, 0], small_flipped[:, 0])


@pytest.mark.parametrize(("width", "low", "high"), [(256, 1.5, 2.0), (384, 2.5, 3.0), (512, 3.0, 3.5)])
def test_auto_sigma_lies_in_the_ranges_of_the_rule(width, low, high):
    assert low <= codec.auto_sigma(width) / 4 <= high


def test_visible_is_half_open_and_false_for_nan():
    points = torch.tensor(
        [[-0.5, -0.5], [-0.51, 0], [63.49, 47.49], [63.5, 0], [0, 47.5], [math.nan, 3], [3, math.nan]]
    )
    assert codec.visible(points, (48, 64)).tolist() == [True, False, True, False, False, False, False]


# Encoding


@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_encode_equals_a_double_loop(sigma):
    points = torch.tensor([[[3.3, 4.9], [0.0, -0.4], [11.7, 2.0]]])
    valid = torch.tensor([[True, True, False]])
    maps = codec.encode(points, valid, (8, 12), sigma)
    expected = np.zeros((3, 8, 12))
    for k, (x, y) in enumerate(points[0].tolist()):
        for row in range(8):
            for column in range(12):
                if valid[0, k]:
                    expected[k, row, column] = math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
    assert maps.dtype == torch.float32
    np.testing.assert_allclose(maps[0].numpy(), expected, atol=1e-7)


def test_encode_peaks_at_one_at_a_pixel_centre():
    assert maps_at(torch.tensor([[[5.0, 7.0]]]))[0, 0, 7, 5] == 1


def test_encode_ignores_nan_and_far_points():
    points = torch.tensor([[[math.nan, 3.0], [math.inf, 3.0], [4.0, 4.0], [1e6, 4.0]]])
    valid = torch.tensor([[False, False, True, True]])
    maps = codec.encode(points, valid, (8, 8), 1.0)
    assert torch.isfinite(maps).all()
    assert maps.amax((-2, -1)).tolist() == [[0, 0, 1, 0]]


def test_encode_takes_a_sigma_per_landmark_with_gradient():
    points = random_points(2, 3, (20, 20), 5)
    sigma = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    maps = codec.encode(points, all_valid(points), (20, 20), sigma)
    for k in range(3):
        torch.testing.assert_close(maps[:, k].detach(), maps_at(points, (20, 20), float(k + 1))[:, k])
    maps.sum().backward()
    assert (sigma.grad > 0).all()
    torch.testing.assert_close(maps_at(points, sigma=torch.tensor(2.0)), maps_at(points, sigma=2.0))


# Decoding


@pytest.mark.parametrize("sigma", [1.75, 2.0, 3.5])
def test_dark_is_exact_without_noise(sigma):
    points = random_points(4, 10, (96, 80), 3 * sigma)
    decoded = codec.decode(maps_at(points, (96, 80), sigma), "dark", sigma)
    assert (decoded.points - points).norm(dim=-1).max() < 1e-3
    torch.testing.assert_close(
        decoded.covariance, sigma**2 * torch.eye(2).expand(4, 10, 2, 2), rtol=1e-3, atol=1e-3 * sigma**2
    )
    assert ((decoded.score > 0.8) & (decoded.score <= 1)).all()


def test_errors_under_noise_at_512_stride_4():
    """Millimetres of a 1935 x 2400 image at 0.1 mm, letterboxed to 512 x 512."""
    points = random_points(4, 50, (128, 128), 6)
    noisy = with_noise(maps_at(points, (128, 128)))
    mm = 4 * 2400 / 512 * 0.1
    error = {m: mm * (codec.decode(noisy, m, 2.0).points - points).norm(dim=-1).mean().item() for m in METHODS}
    assert error["dark"] < 0.06
    assert error["dark"] < 0.6 * error["centroid"] < 0.6 * error["quarter"] < 0.6 * error["argmax"]
    assert error["softargmax"] < error["argmax"]


def slow_dark(image, sigma):
    """A loop over one map: scipy's blur, then the Taylor step on the logarithm."""
    blurred = gaussian_filter(image.astype(np.float64), sigma, mode="constant", truncate=8)
    row, column = np.unravel_index(blurred.argmax(), blurred.shape)
    log = np.log(np.maximum(blurred, 1e-6 * blurred.max()))
    g = [(log[row, column + 1] - log[row, column - 1]) / 2, (log[row + 1, column] - log[row - 1, column]) / 2]
    xx = log[row, column + 1] - 2 * log[row, column] + log[row, column - 1]
    yy = log[row + 1, column] - 2 * log[row, column] + log[row - 1, column]
    cross = log[row + 1, column + 1] - log[row + 1, column - 1] - log[row - 1, column + 1] + log[row - 1, column - 1]
    hessian = np.array([[xx, cross / 4], [cross / 4, yy]])
    return np.array([column, row]) - np.linalg.solve(hessian, g), -np.linalg.inv(hessian)


def test_dark_equals_a_slow_loop_with_scipy():
    points = random_points(2, 4, (64, 64), 16)  # far enough inside for the two border rules to agree
    noisy = with_noise(maps_at(points, (64, 64)))
    decoded = codec.decode(noisy, "dark", 2.0)
    for b in range(2):
        for k in range(4):
            expected, spread = slow_dark(noisy[b, k].numpy(), 2.0)
            np.testing.assert_allclose(decoded.points[b, k].numpy(), expected, atol=1e-3)
            np.testing.assert_allclose(decoded.covariance[b, k].numpy(), spread - 4 * np.eye(2), atol=2e-2)


def test_dark_is_close_to_a_least_squares_fit():
    """The fit of position and height is the best one can do under white noise."""
    points = random_points(1, 5, (40, 40), 8)
    noisy = with_noise(maps_at(points, (40, 40)))
    y, x = np.mgrid[:40, :40]
    decoded = codec.decode(noisy, "dark", 2.0).points[0].numpy()
    for k in range(5):
        image = noisy[0, k].numpy()

        def residual(p, image=image):
            return (p[2] * np.exp(-((x - p[0]) ** 2 + (y - p[1]) ** 2) / 8) - image).ravel()

        fit = least_squares(residual, [*points[0, k].tolist(), 1.0]).x[:2]
        assert np.linalg.norm(decoded[k] - fit) < 0.01


def test_covariance_follows_an_elongated_map():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    u, v = (x - 30 + y - 33) / 2**0.5, (x - 30 - y + 33) / 2**0.5
    image = torch.exp(-(u**2) / (2 * 5.0**2) - v**2 / (2 * 2.0**2))[None, None]
    covariance = codec.decode(image, "dark", 2.0).covariance[0, 0]
    torch.testing.assert_close(covariance, torch.tensor([[14.5, 10.5], [10.5, 14.5]]), atol=0.2, rtol=0)
    local = codec.decode(image, "centroid", 3.0).covariance[0, 0]
    assert local[0, 1] > 3  # the window cuts the tails off, the direction stays
    torch.testing.assert_close(local[0, 0], local[1, 1], atol=1e-3, rtol=0)


def test_covariance_stays_positive_definite():
    spikes = torch.zeros(1, 2, 16, 16)
    spikes[0, 0, 8, 8] = 1
    spikes[0, 1] = with_noise(spikes[0, 1], 1.0)
    for method in METHODS:
        eigenvalues = torch.linalg.eigvalsh(codec.decode(spikes, method, 2.0).covariance)
        assert (eigenvalues >= -1e-4).all()
    assert (torch.linalg.eigvalsh(codec.decode(spikes, "dark", 2.0).covariance)[0, 0] >= 0.0399).all()


@pytest.mark.parametrize("method", METHODS)
def test_decoding_is_translation_equivariant(method):
    point = torch.tensor([[[20.3, 17.8]]])
    noisy = with_noise(maps_at(point, (64, 64)))
    noisy[..., 40:, :] = noisy[..., :, 40:] = 0
    moved = torch.roll(noisy, (9, 5), (-2, -1))
    torch.testing.assert_close(
        codec.decode(moved, method, 2.0).points - codec.decode(noisy, method, 2.0).points,
        torch.tensor([[[5.0, 9.0]]]),
        atol=2e-4,
        rtol=0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_decoding_commutes_with_flip_and_transpose(method):
    maps = with_noise(maps_at(random_points(1, 4, (48, 64), 8)))
    plain = codec.decode(maps, method, 2.0)
    flipped = codec.decode(maps.flip(-1), method, 2.0)
    torch.testing.assert_close(63 - flipped.points[..., 0], plain.points[..., 0], atol=2e-4, rtol=0)
    torch.testing.assert_close(-flipped.covariance[..., 0, 1], plain.covariance[..., 0, 1], atol=1e-2, rtol=0)
    turned = codec.decode(maps.transpose(-1, -2), method, 2.0)
    torch.testing.assert_close(turned.points.flip(-1), plain.points, atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_points_do_not_depend_on_the_scale_of_a_map(method, scale):
    maps = with_noise(maps_at(random_points(1, 6, (48, 64), 8)))
    plain, scaled = codec.decode(maps, method, 2.0), codec.decode(scale * maps, method, 2.0)
    torch.testing.assert_close(scaled.points, plain.points, atol=1e-3, rtol=0)
    assert ((scaled.score >= 0) & (scaled.score <= 1)).all()


def test_dark_near_the_border():
    along = torch.arange(0, 9, 0.5)
    for points in (
        torch.stack((along, torch.full_like(along, 30.3)), -1),
        torch.stack((along, along), -1),
        torch.stack((63 - along, 47 - along), -1),
    ):
        error = (codec.decode(maps_at(points[None]), "dark", 2.0).points - points).norm(dim=-1)[0]
        assert error.max() < 0.25
        assert error[along >= 3].max() < 0.03  # a zero-padded blur is off by 0.12 px per axis there
        assert error[along >= 6].max() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_corner_and_small_map_decodes(method):
    corners = torch.tensor([[[0.0, 0.0], [63.0, 0.0], [0.0, 47.0], [63.0, 47.0]]])
    error = (codec.decode(maps_at(corners), method, 2.0).points - corners).norm(dim=-1)
    assert error.max() < 2.5
    tiny = codec.decode(torch.rand(1, 1, 3, 3), method, 2.0)
    assert torch.isfinite(tiny.points).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fill", [0.0, 1.0, -1.0, math.nan, math.inf])
def test_maps_without_a_peak_give_finite_points(method, fill):
    decoded = codec.decode(torch.full((1, 1, 12, 16), fill), method, 2.0)
    assert all(torch.isfinite(value).all() for value in decoded)
    assert codec.visible(decoded.points, (12, 16)).all()
    assert 0 <= decoded.score.item() <= 1


def test_quarter_moves_towards_the_larger_neighbour():
    points = torch.tensor([[[20.3, 11.6], [7.0, 30.1], [0.0, 20.2]]])
    decoded = codec.decode(maps_at(points), "quarter", 2.0).points
    torch.testing.assert_close(decoded, torch.tensor([[[20.25, 11.75], [7.0, 30.25], [0.0, 20.25]]]))


def test_centroid_equals_a_loop():
    noisy = with_noise(maps_at(torch.tensor([[[20.3, 1.6]]])))
    image = noisy[0, 0].numpy().astype(np.float64)
    row, column = np.unravel_index(image.argmax(), image.shape)
    mass = moment = 0.0
    for r in range(max(row - 4, 0), row + 5):
        for c in range(column - 4, column + 5):
            mass += max(image[r, c], 0)
            moment += max(image[r, c], 0) * np.array([c, r])
    np.testing.assert_allclose(codec.decode(noisy, "centroid", 2.0).points[0, 0].numpy(), moment / mass, atol=1e-4)


def test_softargmax_of_temperature_one_is_the_expectation_with_a_gradient():
    maps = torch.rand(1, 2, 8, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    points = codec.softargmax(maps, 2.0, temperature=1.0).points
    share = (maps / maps.sum((-2, -1), keepdim=True)).detach()
    expected = torch.stack(((share.sum(-2) * torch.arange(10)).sum(-1), (share.sum(-1) * torch.arange(8)).sum(-1)), -1)
    torch.testing.assert_close(points.detach(), expected)
    points.sum().backward()
    assert torch.isfinite(maps.grad).all()
    assert maps.grad.abs().sum() > 0


def test_unknown_method_is_named():
    with pytest.raises(InputError, match=r"'psychic'.*dark"):
        codec.decode(torch.zeros(1, 1, 4, 4), "psychic", 2.0)


# Precision and capture


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(method, dtype):
    maps = maps_at(random_points(2, 3, (48, 64), 8)).to(dtype)
    expected = codec.decode(maps.float(), method, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = codec.decode(maps, method, 2.0)
    for value, reference in zip(decoded, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference, rtol=0, atol=0)


def test_encode_is_float32_under_autocast():
    points = random_points(1, 2, (48, 64), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maps_at(points), maps_at(points))
        assert codec.encode(points.half(), all_valid(points), (48, 64), 2.0).dtype == torch.float32


def test_dark_tolerates_products_in_tf32(monkeypatch):
    """Matrix products rounded to 10 bits, as `torch.set_float32_matmul_precision("high")` has them on a GPU."""

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def rounded(heatmaps, sigma):
        class Rounded(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                    args = tuple(tf32(a) for a in args)
                return func(*args, **(kwargs or {}))

        with Rounded():
            return original(heatmaps, sigma)

    points = random_points(2, 10, (128, 128), 12)
    noisy = with_noise(maps_at(points, (128, 128), 3.5))
    exact = codec.decode(noisy, "dark", 3.5).points
    original = codec._matched_filter
    monkeypatch.setattr(codec, "_matched_filter", rounded)
    difference = (codec.decode(noisy, "dark", 3.5).points - exact).norm(dim=-1)
    assert 0 < difference.mean() < 3e-3  # a tenth of what 3 % noise does


@pytest.mark.parametrize("method", METHODS)
def test_no_operation_waits_for_the_device(method):
    points, valid = torch.rand(2, 3, 2) * 20, torch.tensor([[True, False, True]] * 2)
    with Recorder():
        maps = codec.encode(codec.to_heatmap(points, 4), valid & codec.visible(points, (48, 64)), (48, 64), 2.0)
        codec.decode(maps, method, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_capture_in_a_cuda_graph(method):
    points = random_points(2, 3, (48, 64), 8).cuda()
    valid = all_valid(points).cuda()

    def step():
        return codec.decode(codec.encode(points, valid, (48, 64), 2.0), method, 2.0).points

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # libraries allocate on first use
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    points.copy_(random_points(2, 3, (48, 64), 8, seed=5))
    graph.replay()
    torch.testing.assert_close(result, step())
