from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

from lit_cli.errors import InputError
from lit_landmarks.synthetic import SYNTHETIC_NAMES, SyntheticCephalograms


def patch_at(image: np.ndarray, point: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and coordinates around a point."""
    cx, cy = np.rint(point).astype(int)
    y, x = np.mgrid[cy - radius : cy + radius + 1, cx - radius : cx + radius + 1]
    return image[y, x].astype(float), x, y


def along(image: np.ndarray, start: np.ndarray, direction: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Brightness at start + step * direction."""
    at = (start + steps[:, None] * direction).astype(np.float32)
    return cv2.remap(image.astype(np.float32), at[None, :, 0], at[None, :, 1], cv2.INTER_CUBIC)[0]


def up(points: np.ndarray) -> np.ndarray:
    """Unit vector that is "up" for the head: its lowest points are lowest along this, not along the image's rows."""
    axis = points[5] - points[4]  # pogonion to menton is (-7, 11) mm whatever the head
    angle = np.arctan2(axis[1], axis[0]) - np.arctan2(11, -7)
    return np.array([np.sin(angle), -np.cos(angle)])


def test_shapes_types_and_names() -> None:
    table = SyntheticCephalograms(num_train=3, num_test=2, size=(60, 48)).read()
    assert {split: len(samples) for split, samples in table.splits.items()} == {"train": 3, "test": 2}
    assert table.landmark_names == SYNTHETIC_NAMES
    assert table.num_landmarks == 8
    sample = table.splits["test"][1]
    assert sample.path is None
    assert sample.name == "test_0001"
    assert sample.points.shape == (8, 2)
    assert sample.points.dtype == np.float64
    assert sample.spacing == (4.0, 4.0)
    grey, colour = sample.read_image(1), sample.read_image(3)
    assert grey.shape == (1, 60, 48)
    assert colour.shape == (3, 60, 48)
    assert grey.dtype == colour.dtype == np.uint8
    np.testing.assert_array_equal(colour, np.repeat(grey, 3, axis=0))


@pytest.mark.parametrize("size", [(300, 240), (128, 128), (200, 400)])
def test_landmarks_lie_inside(size: tuple[int, int]) -> None:
    samples = SyntheticCephalograms(num_train=100, num_test=0, size=size).read().splits["train"]
    points = np.stack([s.points for s in samples])
    assert points.min() > 0
    assert (points.max(axis=(0, 1)) < (size[1] - 1, size[0] - 1)).all()
    assert points.std(axis=0).min() > 2 * size[0] / 300  # every landmark moves


def test_spacing_measures_the_same_head_at_every_size() -> None:
    tables = [SyntheticCephalograms(2, 0, size=size).read().splits["train"] for size in ((300, 240), (600, 480))]
    for small, large in zip(*tables, strict=True):
        assert small.spacing is not None
        assert large.spacing is not None
        np.testing.assert_allclose(small.points * 2 + 0.5, large.points)  # the half pixel of centres at integers
        assert small.spacing[0] == 2 * large.spacing[0] == pytest.approx(0.8)


def test_the_ear_rod_is_centred_on_porion() -> None:
    for sample in SyntheticCephalograms(num_train=6, num_test=0, seed=5).read().splits["train"]:
        porion = sample.points[SYNTHETIC_NAMES.index("porion")]
        values, x, y = patch_at(sample.read_image(1)[0], porion, 8)
        weight = np.clip(values - (values.max() + np.median(values)) / 2, 0, None)
        centroid = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
        assert np.abs(centroid - porion).max() < 0.1


def test_sella_is_the_middle_of_its_ring() -> None:
    for sample in SyntheticCephalograms(num_train=4, num_test=0, seed=6).read().splits["train"]:
        sella = sample.points[SYNTHETIC_NAMES.index("sella")]
        image = cv2.GaussianBlur(sample.read_image(1)[0], (0, 0), 1)
        steps = np.arange(3.5, 8, 0.05)
        vector = up(sample.points)
        radii = [steps[along(image, sella, sign * vector, steps).argmax()] for sign in (1, -1)]
        assert radii[0] == pytest.approx(radii[1], abs=0.8)
        assert np.mean(radii) == pytest.approx(5 / 0.8 * 0.96, rel=0.12)  # 5 mm, heads scaled by 0.9 to 1.02


@pytest.mark.parametrize(("name", "tolerance"), [("orbitale", 0.5), ("menton", 0.5)])
def test_extremal_points_lie_on_the_bright_line(name: str, tolerance: float) -> None:
    offsets = []
    for sample in SyntheticCephalograms(num_train=8, num_test=0, seed=7).read().splits["train"]:
        point = sample.points[SYNTHETIC_NAMES.index(name)]
        steps = np.arange(-3, 3.01, 0.05)
        profile = along(sample.read_image(1)[0], point, up(sample.points), steps)
        offsets.append(steps[profile.argmax()])
    assert abs(np.mean(offsets)) < tolerance


def test_an_image_depends_on_seed_split_and_number_alone() -> None:
    few = SyntheticCephalograms(num_train=2, num_test=1, size=(60, 48), seed=3).read().splits
    many = SyntheticCephalograms(num_train=4, num_test=2, size=(60, 48), seed=3).read().splits
    last_first = [s.read_image(1) for s in reversed(many["train"])][::-1]
    for a, b, image in zip(few["train"], many["train"], last_first, strict=False):
        np.testing.assert_array_equal(a.points, b.points)
        np.testing.assert_array_equal(a.read_image(1), image)
        assert a.stamp() == b.stamp()
    other = SyntheticCephalograms(num_train=1, num_test=1, size=(60, 48), seed=4).read().splits
    images = [*last_first, few["test"][0].read_image(1), other["train"][0].read_image(1)]
    stamps = [s.stamp() for s in (*many["train"], few["test"][0], other["train"][0])]
    assert len({i.tobytes() for i in images}) == len(images)
    assert len(set(stamps)) == len(stamps)


def test_samples_travel_to_workers() -> None:
    sample = SyntheticCephalograms(num_train=1, num_test=0, size=(60, 48)).read().splits["train"][0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(sample)).read_image(1), sample.read_image(1))


def test_fewer_landmarks_are_the_first_ones() -> None:
    table = SyntheticCephalograms(num_train=1, num_test=0, num_landmarks=3).read()
    assert table.landmark_names == ("sella", "nasion", "orbitale")
    assert table.splits["train"][0].points.shape == (3, 2)
    assert "test" not in table.splits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0, "num_test": 0}, "0 train and 0 test samples"),
        ({"num_train": -1}, "-1 train"),
        ({"size": (16, 100)}, "size is"),
        ({"num_landmarks": 9}, "expected 1 to 8"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SyntheticCephalograms(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_wrong_channels() -> None:
    sample = SyntheticCephalograms(num_train=1, num_test=0, size=(60, 48)).read().splits["train"][0]
    with pytest.raises(InputError, match="channels is 2"):
        sample.read_image(2)
