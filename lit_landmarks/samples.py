"""What a data set is once it is read: samples with landmarks, grouped into splits.

Everything downstream sees only these two classes, so that a further on-disk format is one reader and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_cli.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "LandmarkSample", "LandmarkTable", "as_spacing", "find_images", "image_size"]

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".pxm"}
    | {".tif", ".tiff", ".webp"}
)
"""File names, in lower case, that OpenCV decodes to 8 or 16 bits. Which of them work depends on its build."""

_MAX_SPACING = 10.0  # mm; a larger value is a unit error (micrometres, dpi), no radiograph


def as_spacing(value: float | Sequence[float] | None, where: str) -> tuple[float, float] | None:
    """Check a pixel size.

    Args:
        value: mm per pixel, either one number or one along x and one along y; None if unknown.
        where: What to name in the error, such as a file and a line.

    Returns:
        mm per pixel along x and y, or None.

    Raises:
        InputError: The value is not one or two finite numbers above 0 and below 10 mm.

    Example:
        >>> as_spacing(0.1, "pixel_size")
        (0.1, 0.1)
    """
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    try:
        numbers = [float(v) for v in pair]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 2 or not all(0 < v < _MAX_SPACING for v in numbers):  # NaN fails the comparison as well
        raise InputError(
            f"{where}: pixel size is {value!r}, expected mm per pixel: one number, or two for x and y, "
            f"above 0 and below {_MAX_SPACING:g}"
        )
    return numbers[0], numbers[1]


def find_images(folder: str | Path) -> list[Path]:
    """List the images that lie directly in a folder.

    Args:
        folder: Where to look. Hidden files (such as the `._001.bmp` that macOS leaves behind) are passed over.

    Returns:
        The images in natural order: `2.png` before `10.png`.

    Raises:
        InputError: The folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected a folder of images")
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    found = [p for p in found if p.is_file()]
    if not found:
        raise InputError(f"{folder}: no image in this folder, expected {' '.join(sorted(IMAGE_SUFFIXES))}")
    return sorted(found, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[tuple[float, str]], str]:
    # Numbers before text; the name itself comes last and orders 1.png and 01.png, which are equal as numbers.
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(p), "") if p.isdecimal() else (math.inf, p.lower()) for p in parts], path.name


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file in pixels.

    Raises:
        InputError: The file is missing, damaged or no image.
    """
    height, width = _decode(path, cv2.IMREAD_GRAYSCALE).shape[:2]
    return width, height


@dataclass(frozen=True, slots=True, eq=False)  # eq=False: comparing arrays has no single truth value
class LandmarkSample:
    """One image and its landmarks.

    Args:
        path: The image file; None for images made in memory, whose class overrides `read_image` and `stamp`.
        name: Identifies the sample within its split, such as `001`.
        points: (K, 2), x then y, in original pixels with pixel centres at integers. NaN in both means missing. Points
            outside the image are allowed.
        spacing: mm per original pixel along x and y; None if unknown, so that nobody mistakes pixels for millimetres.

    Raises:
        InputError: The points are not (K, 2) or the spacing is out of range.

    Example:
        >>> sample = LandmarkSample(Path("001.png"), "001", np.array([[12.5, 30.0], [np.nan, np.nan]]), (0.1, 0.1))
        >>> sample.points.shape
        (2, 2)
    """

    path: Path | None
    name: str
    points: NDArray[np.float64]
    spacing: tuple[float, float] | None

    def __post_init__(self) -> None:
        points = np.asarray(self.points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 2:
            raise InputError(f"{self.path or self.name}: points have shape {points.shape}, expected (K, 2)")
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "spacing", as_spacing(self.spacing, str(self.path or self.name)))

    def read_image(self, channels: int) -> NDArray[np.uint8]:
        """Read the pixels as they are stored.

        An EXIF orientation is *not* applied: the points count pixels of the stored grid, and a file that was rotated by
        a viewer afterwards keeps that grid. An alpha channel is dropped. Of 16-bit files the bits in use are mapped to
        0..255: an image whose largest value needs 12 bits is divided by 4095 / 255. The brightness within the image
        stays linear, and a detector that delivers 10, 12 or 14 bits in a 16-bit file does not come out black.

        Args:
            channels: 1 for grey, 3 for RGB. Either is converted to the other.

        Returns:
            (channels, H, W).

        Raises:
            InputError: The file is missing, damaged, no image, or holds floating-point pixels.
        """
        if self.path is None:
            raise TypeError(f"sample {self.name} has no file: a class that makes its images overrides read_image")
        if channels not in (1, 3):
            raise InputError(f"channels is {channels!r}, expected 1 (grey) or 3 (RGB)")
        image = _to_uint8(_decode(self.path, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR), self.path)
        if channels == 1:
            return image[None]
        return np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))  # OpenCV delivers BGR

    def stamp(self) -> str:
        """Identify the pixels for a cache key without reading them: path, time of change in ns, size in bytes.

        Raises:
            InputError: The file is missing.
        """
        if self.path is None:
            raise TypeError(f"sample {self.name} has no file: a class that makes its images overrides stamp")
        try:
            status = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.path}: cannot read this image ({error.strerror})") from None
        return f"{self.path.resolve()}|{status.st_mtime_ns}|{status.st_size}"


@dataclass(frozen=True, slots=True, eq=False)
class LandmarkTable:
    """A whole data set: samples by split, all with the same landmarks.

    Args:
        splits: Samples by name of the split, such as `train`, `val`, `test`, `test1`.
        landmark_names: One name per landmark, in the order of the points.

    Raises:
        InputError: No sample at all, an empty split, a name that occurs twice in one split, two landmarks of one name,
            or a sample with another number of landmarks.

    Example:
        >>> sample = LandmarkSample(Path("001.png"), "001", np.zeros((2, 2)), None)
        >>> LandmarkTable({"train": [sample]}, ("sella", "nasion")).num_landmarks
        2
    """

    splits: dict[str, list[LandmarkSample]]
    landmark_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.splits:
            raise InputError("the data set has no split, expected at least one with samples")
        repeated = _first_repeated(self.landmark_names)
        if repeated is not None:
            raise InputError(f"two landmarks are called {repeated!r}, expected different names")
        for split, samples in self.splits.items():
            if not samples:
                raise InputError(f"split {split!r} is empty, expected at least one sample")
            repeated = _first_repeated([s.name for s in samples])
            if repeated is not None:
                files = ", ".join(str(s.path) for s in samples if s.name == repeated)
                raise InputError(f"split {split!r}: two samples are called {repeated!r} ({files}), expected one")
            for sample in samples:
                if len(sample.points) != self.num_landmarks:
                    raise InputError(
                        f"{sample.path or sample.name}: {len(sample.points)} landmarks, expected {self.num_landmarks} "
                        "as in the rest of the data set"
                    )

    @property
    def num_landmarks(self) -> int:
        """K, the number of landmarks of every sample."""
        return len(self.landmark_names)


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _decode(path: Path, mode: int) -> NDArray[Any]:
    # imdecode instead of imread: imread cannot open a path with umlauts on Windows and hides why a file failed.
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot read this image ({error.strerror})") from None
    try:
        image = cv2.imdecode(data, mode | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
    except cv2.error:
        image = None
    if image is None or math.prod(image.shape) == 0:
        raise InputError(f"{path}: damaged or no image, expected a file that OpenCV can decode")
    return image


def _to_uint8(image: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    if image.dtype == np.uint16:
        largest = (1 << max(8, int(image.max()).bit_length())) - 1
        return np.rint(image * np.float32(255 / largest)).astype(np.uint8)
    if image.dtype != np.uint8:
        raise InputError(f"{path}: pixels are {image.dtype}, expected 8 or 16 bits without sign")
    return image
