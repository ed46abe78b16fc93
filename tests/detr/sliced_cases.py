"""Images of plain rectangles in COCO's layout, and a network that finds what it sees."""

import json

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import nn

from lit_detr.samples import Output

GREY = (120, 240)  # by class
SIZES = ((150, 210), (64, 64), (40, 200), (128, 128), (97, 300), (61, 33))
QUERIES = 40


def rectangles(rng, size, longest=14):
    """An image (1, H, W) and boxes that do not touch, with their classes."""
    image, boxes, labels = np.zeros((1, *size), np.uint8), [], []
    step = longest + 4
    for y in range(1, size[0] - step, step):
        for x in range(1, size[1] - step, step):
            if rng.random() < 0.6:
                h, w = rng.integers(4, longest, 2)
                y0, x0 = y + rng.integers(0, longest - h + 1), x + rng.integers(0, longest - w + 1)
                x0, y0, x1, y1 = (int(v) for v in (x0, y0, x0 + w, y0 + h))
                label = int(rng.integers(2))
                image[0, y0:y1, x0:x1] = GREY[label]
                boxes.append([x0, y0, x1, y1])
                labels.append(label)
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


class Seer(nn.Module):
    """Finds every rectangle of what it is shown, pieces of them included, more or less surely."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches, self.masks = [], []

    def forward(self, images, mask=None, targets=None, queries=None):
        self.batches.append(len(images))
        self.masks.append(mask)
        height, width = images.shape[-2:]
        logits = torch.full((len(images), QUERIES, 2), -30.0)
        boxes = torch.full((len(images), QUERIES, 4), 0.5)
        for b, image in enumerate((images[:, 0] * 255).round().numpy()):
            components, count = ndimage.label(image > GREY[0] / 2)
            assert count <= QUERIES
            for q, (rows, columns) in enumerate(ndimage.find_objects(components)):
                top = image[rows, columns].max()
                own = image[rows, columns] >= top / 2
                label = int(top > 180)
                r, c = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
                y0, x0, y1, x1 = (
                    rows.start + r[0],
                    columns.start + c[0],
                    rows.start + r[-1] + 1,
                    columns.start + c[-1] + 1,
                )
                values = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
                boxes[b, q] = torch.tensor(values)
                logits[b, q, label] = 2 + ((x0 * 7 + y0 * 13) % 10) / 10
        return Output(logits[None], boxes[None], logits, boxes)


def coco_folder(root, splits=("train", "val"), sizes=SIZES, seed=0, **options):
    """Writes the images and annotations of each split."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir()
    for split in splits:
        (root / split).mkdir()
        images, annotations = [], []
        for i, size in enumerate(sizes):
            image, boxes, labels = rectangles(rng, size, **options)
            if i in (1, 3, 4):  # nothing on most of them
                end = 91 if i == 4 else 0  # a gap of the grid that rectangles are drawn on
                own = boxes[:, 2] <= end
                image[..., end:], boxes, labels = 0, boxes[own], labels[own]
            cv2.imwrite(str(root / split / f"{i}.png"), image[0])
            images.append({"id": i, "file_name": f"{i}.png", "height": size[0], "width": size[1]})
            for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                box = [x0, y0, x1 - x0, y1 - y0]
                entry = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "bbox": box}
                annotations.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root
