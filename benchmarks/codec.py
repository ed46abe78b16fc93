"""What the heatmap codec alone costs, in millimetres: encode landmarks, decode the maps, compare, without any network.

The landmarks of ISBI 2015 Test1 (mean of both doctors) with `--root`, otherwise random points in a 1935 x 2400 frame of
0.1 mm, are letterboxed into each input size, encoded at each stride and decoded by each method, with and without
Gaussian noise of 3 % of the peak. Each case appears with the exact centre and with the centre rounded to a heatmap
pixel, which is the widespread way to encode. Runs on the CPU in about a minute.

    python benchmarks/codec.py --root data/isbi2015
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lit_landmarks import heatmaps as codec
from lit_landmarks.geometry import Letterbox, invert_affine, transform_points
from lit_landmarks.metrics import radial_errors

# height, width, stride, sigma in heatmap pixels
CASES = [
    (256, 256, 4, 2.0),
    (384, 384, 4, 2.0),
    (512, 512, 4, 2.0),
    (640, 512, 4, 2.0),
    (800, 640, 4, 2.0),
    (512, 512, 2, 2.5),
    (512, 512, 1, 4.0),
]
FULL_SIZE = (2400, 1935)  # height and width of the frame that random points lie in
CHUNK = 16  # landmarks decoded at a time, for the memory of the stride-1 maps


class Landmarks(NamedTuple):
    """Points (N, 2) float64 in original pixels, the height and width of their frame, mm per pixel."""

    points: Tensor
    size: tuple[int, int]
    spacing: float


def random_landmarks(count: int, pixel_size: float, generator: torch.Generator) -> Landmarks:
    """Points anywhere in the middle 80 % of a full-size cephalogram."""
    share = 0.1 + 0.8 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return Landmarks(share * torch.tensor([FULL_SIZE[1], FULL_SIZE[0]]), FULL_SIZE, pixel_size)


def isbi_landmarks(root: str, count: int, pixel_size: float, generator: torch.Generator) -> Landmarks:
    """A random choice of the mean points of Test1."""
    from lit_landmarks.readers import Isbi2015
    from lit_landmarks.samples import image_size

    samples = Isbi2015(root, annotator="mean", pixel_size=pixel_size).read().splits["test1"]
    points = torch.cat([torch.as_tensor(sample.points) for sample in samples])
    path = samples[0].path
    assert path is not None
    chosen = torch.randperm(len(points), generator=generator)[:count]
    width, height = image_size(path)
    return Landmarks(points[chosen], (height, width), pixel_size)


def decoded(
    points: Tensor, size: tuple[int, int], sigma: float, noise: float, generator: torch.Generator
) -> dict[codec.DecodeMethod, Tensor]:
    """The points (N, 2) in heatmap pixels that each decoder reads from the maps of `points` (N, 2)."""
    parts: dict[codec.DecodeMethod, list[Tensor]] = {method: [] for method in get_args(codec.DecodeMethod)}
    for chunk in points.float().split(CHUNK):
        maps = codec.encode(chunk[None], torch.ones(1, len(chunk), dtype=torch.bool), size, sigma)
        if noise:
            maps += noise * torch.randn(maps.shape, generator=generator)
        for method, found in parts.items():
            found.append(codec.decode(maps, method, sigma).points[0])
    return {method: torch.cat(found).double() for method, found in parts.items()}


def measure(landmarks: Landmarks, generator: torch.Generator) -> Iterator[dict[str, object]]:
    """One row per case, kind of centre, noise and decoder."""
    for height, width, stride, sigma in CASES:
        matrix = torch.from_numpy(Letterbox(landmarks.size, (height, width)).matrix)[None]
        exact = codec.to_heatmap(transform_points(matrix, landmarks.points[None])[0], stride)
        size = (height // stride, width // stride)
        for centre, points in (("exact", exact), ("integer", exact.round())):
            for noise in (0.0, 0.03):
                for method, found in decoded(points, size, sigma, noise, generator).items():
                    back = transform_points(invert_affine(matrix), codec.from_heatmap(found, stride)[None])
                    valid = torch.ones(back.shape[:2], dtype=torch.bool)
                    error = radial_errors(back, landmarks.points[None], valid, landmarks.spacing)
                    yield {
                        "input": f"{width}x{height}",
                        "stride": stride,
                        "sigma_heatmap_px": sigma,
                        "centre": centre,
                        "noise": noise,
                        "method": method,
                        "mre_mm": round(error.mean().item(), 5),
                        "p95_mm": round(torch.quantile(error, 0.95).item(), 5),
                        "mean_heatmap_px": round((found - exact).norm(dim=-1).mean().item(), 6),
                    }


def table(rows: list[dict[str, object]]) -> str:
    """The mean errors in mm, one line per case, centre and noise, one column per decoder."""
    methods = get_args(codec.DecodeMethod)
    lines: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['input']:>9} /{row['stride']} {row['centre']:>8} {100 * float(str(row['noise'])):3.0f} %"
        lines.setdefault(name, []).append(f"{row['mre_mm']:>11.3f}")
    head = f"{'mm':>9} {'':2} {'centre':>8} noise" + "".join(f"{method:>11}" for method in methods)
    return "\n".join([head, *(name + "".join(cells) for name, cells in lines.items())])


def main() -> None:
    """Parse the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of ISBI 2015; random points if absent")
    parser.add_argument("--pixel-size", type=float, help="mm per pixel of the annotations (0.1; 0.2 with --root)")
    parser.add_argument("--count", type=int, default=400, help="number of landmarks (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/codec.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(arguments.seed)
    pixel_size = arguments.pixel_size or (0.2 if arguments.root else 0.1)
    if arguments.root:
        landmarks = isbi_landmarks(arguments.root, arguments.count, pixel_size, generator)
    else:
        landmarks = random_landmarks(arguments.count, pixel_size, generator)

    rows = list(measure(landmarks, generator))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "landmarks": "ISBI 2015 Test1, mean of both doctors" if arguments.root else "random",
        "count": len(landmarks.points),
        "frame": {"height": landmarks.size[0], "width": landmarks.size[1], "mm_per_px": landmarks.spacing},
        "seed": arguments.seed,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
