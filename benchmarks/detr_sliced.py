"""Sliced inference at 3840 x 2048: ours beside the loop over tiles that is common practice, one network for all.

Canvases are 12 x 8 frames of 320 x 256 pixels with exact boxes, from `--root` (the split `val` of a data set in frames
of that size) or drawn. Tiles begin elsewhere than frames do, so that objects lie across their borders. The clock runs
from the image in the host's memory to its merged detections, and ends when the device is done.

`loop` cuts on the host, sends each batch of tiles by itself, takes its detections back to the host, and merges them
there by torchvision's `batched_nms`; with a batch of 1 that is what SAHI does by default, and its 0.5 is the threshold.
`ours` is `lit_detr.sliced.detect_sliced`, which does all of this on the device; `ours, whole` looks at the whole image
as well. All take at most 300 detections of a tile, above the same score.

`agreement` is the mean share of detections with a score above 0.3 that have a partner of the same class at an IoU of
0.5, here and in `loop, batch 1`. Without `--ckpt` the network is trained on the frames for a few seconds first.

    python benchmarks/detr_sliced.py --root DATA/drone_ir [--ckpt FILE] [--tile 320 --frame 640] [--tiny] --out FILE
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Results, Row, spread, table
from lightning.pytorch import Trainer
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from lit_detr.canvas import Canvas, grid_canvas
from lit_detr.data import DetectionData
from lit_detr.merging import Merged
from lit_detr.metrics import DetectionAP
from lit_detr.module import LitDETR
from lit_detr.sliced import best, detect_sliced
from lit_detr.tiles import tile_grid

FRAME = (256, 320)  # of the data set
OVERLAP, MOST, LEAST, CLEAR = 0.25, 300, 0.01, 0.3
ROW_S = 20  # a row must end before the deadline
COLUMNS = ("canvas", "tile", "input", "way", "images_s", "s", "iqr_s", "tiles", "detections", "agreement", "ap")
COLUMNS += ("ap_tiny", "allocated_gb", "reserved_gb", "speedup")


class Way(NamedTuple):
    """A way to detect in a large image."""

    tool: str
    batch: int
    whole: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.tool}{', whole' if self.whole else ''}, batch {self.batch}"


class Case(NamedTuple):
    """What all ways share."""

    model: LitDETR
    images: list[np.ndarray]
    canvases: list[Canvas]
    tile: int
    frame: int
    device: torch.device


def ways(batch: int) -> list[Way]:
    """The first is what the others are compared with."""
    return [Way("loop", 1), Way("loop", batch), Way("ours", batch), Way("ours", 1), Way("ours", batch, whole=True)]


# ---- ways ------------------------------------------------------------------------------------------------------------


def ours(case: Case, way: Way, image: np.ndarray) -> Merged:
    """One call."""
    options: dict[str, Any] = {"overlap": OVERLAP, "batch": way.batch, "frame": case.frame, "whole": way.whole}
    return detect_sliced(case.model, image, case.tile, **options, most=MOST, min_score=LEAST, device=case.device)[0]


@torch.no_grad()
def loop(case: Case, way: Way, image: np.ndarray) -> Merged:
    """Cut, send, take back; merge on the host."""
    starts = tile_grid((image.shape[1], image.shape[2]), (case.tile, case.tile), OVERLAP)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, len(starts), way.batch):
        own = starts[first : first + way.batch]
        cut = np.stack([image[:, y : y + case.tile, x : x + case.tile] for y, x in own])
        tiles = torch.from_numpy(cut).to(case.device).float() / 255
        if case.frame != case.tile:
            tiles = torch.nn.functional.interpolate(tiles, (case.frame, case.frame), mode="bilinear")
        output = case.model(tiles)
        boxes, scores, labels = (v.cpu() for v in best(output.logits[-1], output.boxes[-1], MOST))
        boxes = boxes * case.tile + torch.from_numpy(own[:, [1, 0, 1, 0]])[:, None]
        keep = scores > LEAST
        found.append((boxes[keep], scores[keep], labels[keep]))
    boxes, scores, labels = (torch.cat(v) for v in zip(*found, strict=True))
    keep = batched_nms(boxes, scores, labels, 0.5)
    return Merged(boxes[keep], scores[keep], labels[keep])


WAYS: dict[str, Callable[[Case, Way, np.ndarray], Merged]] = {"ours": ours, "loop": loop}


def detect(case: Case, way: Way, image: np.ndarray) -> Merged:
    """A way, in the precision of the device."""
    cast = torch.autocast("cuda", torch.bfloat16) if case.device.type == "cuda" else nullcontext()
    with cast:
        return WAYS[way.tool](case, way, image)


# ---- what they are measured on ---------------------------------------------------------------------------------------


def frames(root: Path | None, count: int, tiny: bool) -> DetectionData:
    """Frames of the data set, or drawn ones."""
    options: dict[str, Any] = {"image_size": list(FRAME), "num_workers": 0, "batch_size": 2 if tiny else 16}
    if root is not None:
        return DetectionData(root=str(root), format="coco", **options)
    return DetectionData(format="synthetic", synthetic_train=8 if tiny else 200, synthetic_val=count, **options)


def trained(data: DetectionData, device: torch.device, steps: int, tiny: bool) -> LitDETR:
    """A network that finds something."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"strides": [4, 8, 16, 32]}
    if tiny:
        options = {"backbone": "resnet10t", "hidden": 32, "heads": 4, "feedforward": 64, "decoder_layers": 1}
        options |= {"queries": 20, "eval_queries": 20, "noise_queries": 10}
    model = LitDETR(**options)
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if device.type == "cuda" else "32-true",
            max_steps=steps,
            limit_val_batches=0,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        ).fit(model, datamodule=data)
    return model


def canvases(data: DetectionData, count: int, columns: int, rows: int) -> list[Canvas]:
    """Frames of the split `val` side by side, others in each canvas."""
    samples = data.prepared("val").samples
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        chosen = [samples[i] for i in rng.choice(len(samples), columns * rows, replace=len(samples) < columns * rows)]
        out.append(grid_canvas([data.image_of(s) for s in chosen], chosen, columns, rows))
    return out


def shifted(size: tuple[int, int], tile: int) -> float:
    """Share of the tiles' inner starts that are not borders between frames.

    >>> shifted((2048, 3840), 640)
    1.0
    """
    starts = tile_grid(size, (tile, tile), OVERLAP)
    ends = np.array(size) - tile
    inner = [(s, f) for row in starts for s, e, f in zip(row, ends, FRAME, strict=True) if 0 < s < e]
    return float(np.mean([s % f != 0 for s, f in inner])) if inner else 1.0


# ---- rows ------------------------------------------------------------------------------------------------------------


def agreement(a: Merged, b: Merged) -> float:
    """Mean share of the clear detections of each that the other has too.

    >>> one = Merged(torch.tensor([[0.0, 0, 9, 9]]), torch.ones(1), torch.zeros(1))
    >>> agreement(one, one), agreement(one, Merged(one.boxes + 9, one.scores, one.labels))
    (1.0, 0.0)
    """
    first, second = ([v[m.scores > CLEAR].cpu() for v in (m.boxes, m.labels)] for m in (a, b))
    if not len(first[0]) or not len(second[0]):
        return float(len(first[0]) == len(second[0]))
    pairs = (box_iou(first[0], second[0]) >= 0.5) & (first[1][:, None] == second[1])
    return round((pairs.any(1).float().mean().item() + pairs.any(0).float().mean().item()) / 2, 4)


def measure(case: Case, way: Way, reference: Sequence[Merged], repeats: int) -> Row:
    """A row's values."""
    cuda = case.device.type == "cuda"
    for image in case.images[:2]:  # cuDNN's trials, and memory that is allocated once
        detect(case, way, image)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    found: list[Merged] = []
    seconds: list[float] = []
    for n in range(max(repeats, len(case.images))):
        begin = time.perf_counter()
        result = detect(case, way, case.images[n % len(case.images)])
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if n < len(case.images):
            found.append(result)
    middle = spread(seconds)
    row: Row = {"images_s": round(1 / middle.median, 3), "s": round(middle.median, 5), "iqr_s": round(middle.iqr, 5)}
    if cuda:
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    row["detections"] = round(float(np.mean([int((f.scores > CLEAR).sum()) for f in found])), 1)
    row["agreement"] = round(float(np.mean([agreement(f, r) for f, r in zip(found, reference, strict=True)])), 4)
    return {**row, "runs": len(seconds), **precision(case, found)}


def precision(case: Case, found: Sequence[Merged]) -> Row:
    """AP on the whole canvases."""
    metric = DetectionAP(case.model.class_names)
    for i, (canvas, own) in enumerate(zip(case.canvases, found, strict=True)):
        sample = canvas.sample(str(i), i)
        truth = {"boxes": sample.boxes, "labels": sample.labels, "area": sample.area}
        metric.update([i], [own._asdict()], [{k: torch.from_numpy(v) for k, v in truth.items()}])
    figures = metric.compute()
    return {k: round(figures[k].item(), 4) for k in ("ap", "ap50", "ap_tiny", "ar50_1500")}


def main(args: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detr_sliced.json"))
    parser.add_argument("--root", type=Path, help="data set in COCO's layout; drawn frames by default")
    parser.add_argument("--ckpt", type=Path, help="of a LitDETR for these classes")
    parser.add_argument("--tile", type=int, default=640)
    parser.add_argument("--frame", type=int, default=None, help="what a tile is scaled to; by default its own size")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--canvases", type=int, default=8)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no row should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = parser.parse_args(args)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    columns, rows, count = (2, 2, 1) if options.tiny else (12, 8, options.canvases)
    tile = 256 if options.tiny else options.tile
    frame, batch = (tile if options.tiny else options.frame or tile), 4 if options.tiny else options.batch
    size = rows * FRAME[0], columns * FRAME[1]
    key: Row = {
        "canvas": f"{size[1]}x{size[0]}",
        "frames": options.root.name if options.root else "drawn",
        "tile": tile,
        "input": frame,
        "weights": options.ckpt.name if options.ckpt else "trained briefly",
    }
    results = Results(options.out)
    todo = [way for way in ways(batch) if results.get(**key, way=way.name) is None]
    if todo and time.time() + ROW_S * (not options.tiny) < options.deadline:
        data = frames(options.root, columns * rows, options.tiny)
        data.setup("fit")
        model = (
            LitDETR.load_from_checkpoint(options.ckpt, map_location="cpu", weights_only=True)
            if options.ckpt
            else trained(data, device, 2 if options.tiny else 300, options.tiny)
        )
        scenes = canvases(data, count, columns, rows)
        channels = int(model.hparams["in_channels"])
        images = [np.ascontiguousarray(c.image[:channels]) for c in scenes]
        case = Case(model.eval().to(device), images, scenes, tile, frame, device)
        reference = [detect(case, ways(batch)[0], image) for image in images]
        tiles = len(tile_grid(size, (tile, tile), OVERLAP))
        for way in todo:
            if time.time() + ROW_S * (not options.tiny) > options.deadline:
                continue
            row = measure(case, way, reference, 1 if options.tiny else 30)
            row |= {**way._asdict(), "tiles": tiles, "shifted": round(shifted(size, tile), 3)}
            added = results.add({**key, "way": way.name}, row)
            print(f"{way.name}: {added['images_s']} images/s, AP {added['ap']}", flush=True)
    print(table(relative(results.rows), COLUMNS))


def relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed over that of the loop with a batch of 1 on the same images."""
    out = []
    for row in rows:
        same = ("canvas", "frames", "tile", "input", "weights")
        base = [r["s"] for r in rows if r["way"] == "loop, batch 1" and all(r[k] == row[k] for k in same)]
        out.append({**row, "speedup": base[0] / row["s"]} if base else row)
    return out


if __name__ == "__main__":
    main()
