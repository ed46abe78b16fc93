"""Drawn frames with as many objects as asked for, for the measurements of lit_detr: in memory, or as image files.

Objects are bright or dark rectangles on a background of drawn frames, at random places, and may overlap: so any number
of them finds room in a frame of any size. Memory and speed know no difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lit_detr.samples import DetectionSample, DetectionTable
from lit_detr.synthetic import SyntheticDetections

CLASSES = ["bright", "dark", "flat"]
BACKGROUNDS = 16  # drawn anew; frames take turns with them


@dataclass(frozen=True)
class Scenes:
    """Frames by name, as `SyntheticDetections` gives them.

    Args:
        size: Height and width in pixels.
        boxes: Fewest and most objects of a frame.
        counts: Frames by split.
        sides: Range of an object's sides in pixels, drawn evenly on a logarithmic scale.
        channels: Equal channels of a frame.
        seed: Of everything random.

    Example:
        >>> scenes = Scenes((64, 96), (5, 5), {"train": 2})
        >>> sample = scenes.read().splits["train"][1]
        >>> sample.name, sample.boxes.shape, scenes.image(sample.name).shape
        ('train_00001', (5, 4), (3, 64, 96))
    """

    size: tuple[int, int]
    boxes: tuple[int, int]
    counts: dict[str, int]
    sides: tuple[float, float] = (4.0, 24.0)
    channels: int = 3
    seed: int = 0

    def read(self) -> DetectionTable:
        """The table of the data set; its samples have no files."""
        splits = {s: [self._sample(s, i) for i in range(n)] for s, n in self.counts.items()}
        return DetectionTable(splits, CLASSES, list(range(1, len(CLASSES) + 1)))

    def image(self, name: str) -> NDArray[np.uint8]:
        """(channels, H, W) of a frame."""
        split, _, number = name.rpartition("_")
        boxes, labels = self._objects(split, int(number))
        frame = self._background(int(number) % BACKGROUNDS).copy()
        for (x1, y1, x2, y2), label in zip(boxes.astype(int).tolist(), labels.tolist(), strict=True):
            part = frame[y1:y2, x1:x2]
            part[:] = (np.minimum(part, 195) + 60, np.maximum(part, 60) - 60, np.full_like(part, 128))[label]
        return np.repeat(frame[None], self.channels, axis=0)

    def write(self, folder: Path) -> None:
        """The same as JPEG files in COCO's layout, `annotations/<split>.json` and `<split>/`."""
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
        for split, samples in self.read().splits.items():
            (folder / split).mkdir(exist_ok=True)
            with ThreadPoolExecutor() as pool:  # OpenCV lets them run in parallel
                list(pool.map(lambda s, to=folder / split: self._save(s, to), samples))
            images = [
                {"id": i, "file_name": f"{s.name}.jpg", "height": self.size[0], "width": self.size[1]}
                for i, s in enumerate(samples)
            ]
            content = {"images": images, "categories": categories, "annotations": list(_annotations(samples))}
            (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))

    def _save(self, sample: DetectionSample, folder: Path) -> None:
        image = np.ascontiguousarray(self.image(sample.name).transpose(1, 2, 0))
        if not cv2.imwrite(str(folder / f"{sample.name}.jpg"), image):
            raise OSError(f"{folder / sample.name}.jpg could not be written")

    def _sample(self, split: str, number: int) -> DetectionSample:
        boxes, labels = self._objects(split, number)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        name = f"{split}_{number:05d}"
        crowd = np.zeros(len(boxes), bool)
        return DetectionSample(name, Path(), boxes, labels, area, crowd, self.size, number, name)

    def _objects(self, split: str, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(N, 4) boxes at whole pixels, and their classes."""
        rng = np.random.default_rng((self.seed, sorted(self.counts).index(split), number))
        count = int(rng.integers(self.boxes[0], self.boxes[1] + 1))
        height, width = self.size
        low, high = self.sides
        sides = np.rint(np.exp(rng.uniform(np.log(low), np.log(min(high, height, width)), (count, 2)))).clip(1)
        corner = np.floor(rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides + 1))
        boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
        return boxes, rng.integers(0, len(CLASSES), count)

    def _background(self, number: int) -> NDArray[np.uint8]:
        drawn = _BACKGROUNDS.get((self.size, number))
        if drawn is None:
            empty = SyntheticDetections(
                num_train=BACKGROUNDS, num_val=0, num_test=0, size=self.size, channels=1, objects=0
            )
            drawn = _BACKGROUNDS[self.size, number] = empty.image(f"train_{number:04d}")[0]
        return drawn


_BACKGROUNDS: dict[tuple[tuple[int, int], int], NDArray[np.uint8]] = {}  # a profile's frames share them with the next


def _annotations(samples: list[DetectionSample]) -> Iterator[dict[str, object]]:
    found = ((i, box, label) for i, s in enumerate(samples) for box, label in zip(s.boxes, s.labels, strict=True))
    for n, (image, box, label) in enumerate(found, 1):
        x1, y1, x2, y2 = (float(v) for v in box)
        bbox = [x1, y1, x2 - x1, y2 - y1]
        yield {
            "id": n,
            "image_id": image,
            "category_id": int(label) + 1,
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": 0,
        }
