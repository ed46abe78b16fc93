"""Seconds per volume of sliding-window inference: ours beside MONAI's and nnU-Net's predictor, one network for all.

The same module with the same weights sees the same windows, with Gaussian weights of sigma = side / 8: neighbours share
half a window or a little more, as nnU-Net and ours spread them evenly; MONAI, which steps by half a window and moves
the last one inwards, is given the overlap that puts its windows there, and our weights, since its own never fall below
0.001 of the middle's. nnU-Net's are centred half a voxel off and have half precision. The clock runs from the
normalised volume on the device to its logits there; reading, argmax and export are not in it. TTA is the mean over the
8 reflections of a window: nnU-Net's and ours are built in, MONAI's is a function around the network. nnU-Net decides
precision (fp16) and batch (1) itself.

Ours runs the network channels last with its kernels, compiled rows excepted; the same weights in torch's own layers
stand for everybody else.

So that agreement means something, the network is first trained for a few seconds on drawn blobs; `agreement` is the
Dice of a row's foreground with that of our windows one by one in float32 without TF32. `first_s` has cuDNN's trials and
compilation, for each number of windows in a batch.

    python benchmarks/dsunet_inference.py --out benchmarks/results/dsunet_inference.json [--only 240,MONAI] [--tiny]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from common import Results, Row, table
from dsunet_peers import mirrored, monai_overlap, monai_windows, nnunet_predictor, version
from steps import DTYPES, clean, compiler, measured, setup
from torch import Tensor, nn
from torch.nn import functional as F

from lit_dsunet.losses import make_loss
from lit_dsunet.metrics import dice
from lit_dsunet.models import build_network, default_features
from lit_dsunet.sliding_window import SlidingWindow, importance

Triple = tuple[int, int, int]
Segment = Callable[[Tensor], Tensor]
CLASSES = 2
COMPILE_S = 75  # a compiled row must end before the deadline
COLUMNS = ("volume", "way", "tta", "windows", "s", "iqr_s", "agreement", "allocated_gb", "reserved_gb", "first_s")


class Case(NamedTuple):
    """A volume and the windows that a network with so many stages sees."""

    size: Triple
    window: Triple
    stages: int

    @property
    def name(self) -> str:
        """`240x240x155`."""
        return "x".join(map(str, self.size))


CASES = (Case((240, 240, 155), (128, 128, 128), 6), Case((190, 142, 88), (112, 112, 80), 5))
TINY = Case((12, 12, 8), (8, 8, 8), 3)


class Way(NamedTuple):
    """A way to segment a volume."""

    tool: Literal["ours", "MONAI", "nnU-Net"]
    batch: int
    precision: str
    compile: bool = False
    tta: bool = False

    @property
    def name(self) -> str:
        """All but TTA, in words."""
        return f"{self.tool} {self.precision}, batch {self.batch}, {'compiled' if self.compile else 'eager'}"


def ways() -> list[Way]:
    """All rows of a case, the most telling first."""
    out = [Way("ours", 4, "fp16"), Way("MONAI", 4, "fp16"), Way("nnU-Net", 1, "fp16")]
    out += [Way(tool, 4, "fp16", compile=True) for tool in ("ours", "MONAI")]
    out += [Way("nnU-Net", 1, "fp16", compile=True)]
    out += [Way(tool, 4, "fp16", tta=True) for tool in ("ours", "MONAI")]
    out += [Way("nnU-Net", 1, "fp16", tta=True)]
    out += [Way("ours", batch, precision) for precision in ("bf16", "fp16") for batch in (1, 2, 4, 8)]
    out += [Way("MONAI", batch, precision) for precision in ("bf16", "fp16") for batch in (1, 4, 16)]
    out += [Way("MONAI", batch, "fp16", compile=True) for batch in (1, 16)]
    out += [Way("ours", batch, "fp16", tta=True) for batch in (1, 8)]
    out += [Way(tool, 4, "fp16", compile=True, tta=True) for tool in ("ours", "MONAI")]
    return list(dict.fromkeys(out))


# ---- a network with something to find -------------------------------------------------------------------------------


def blobs(size: Sequence[int], device: torch.device, seed: int, count: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy images (B, 1, D, H, W) of smooth random shapes, and the shapes (B, D, H, W) uint8."""
    generator = torch.Generator(device).manual_seed(seed)
    coarse = torch.randn(count, 1, *(max(2, s // 10) for s in size), generator=generator, device=device)
    field = F.interpolate(coarse, size=tuple(size), mode="trilinear", align_corners=False)
    label = field > 0.7
    image = label.float() + 0.3 * field + 0.5 * torch.randn(count, 1, *size, generator=generator, device=device)
    return (image - image.mean()) / image.std(), label[:, 0].to(torch.uint8)


def trained(case: Case, device: torch.device, steps: int) -> tuple[nn.Module, nn.Module]:
    """A network in evaluation mode whose logits have edges, and the same channels last."""
    torch.manual_seed(0)
    features = default_features(case.stages) if device.type == "cuda" else [2, 4, 4, 4, 4, 4][: case.stages]
    strides = [1] + [2] * (case.stages - 1)
    options: dict[str, Any] = {"in_channels": 1, "num_classes": CLASSES, "features": features, "strides": strides}
    network = build_network(**options).to(device)
    optimizer, loss = torch.optim.AdamW(network.parameters(), 1e-3), make_loss("dice_ce")
    for step in range(steps):
        image, label = blobs(case.window, device, 1 + step, 2)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(network(image), label)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
    ours = build_network(**options, channels_last=True).to(device)
    ours.load_state_dict(network.state_dict())
    return network.eval().requires_grad_(False), ours.eval().requires_grad_(False)


# ---- rows -----------------------------------------------------------------------------------------------------------


def segmenter(way: Way, case: Case, network: nn.Module, device: torch.device) -> Segment:
    """From a volume (C, D, H, W) to logits (K, D, H, W)."""
    forward = compiler(device)(network) if way.compile else network
    if way.tool == "nnU-Net":
        return nnunet_predictor(forward, CLASSES, case.window, device, way.tta)
    if way.tool == "ours":
        axes = (0, 1, 2) if way.tta else ()
        window = SlidingWindow(case.window, overlap=0.5, batch=way.batch, mirror=axes, device=device)
        segment: Segment = lambda volume: window(forward, [volume])[0]  # noqa: E731 - one of two
    else:
        around = mirrored(forward) if way.tta else forward
        same = (monai_overlap(case.size, case.window), importance(case.window, "gaussian", device))
        segment = lambda volume: monai_windows(around, volume, case.window, way.batch, *same)  # noqa: E731

    def cast(volume: Tensor) -> Tensor:
        with torch.autocast(device.type, DTYPES[way.precision], enabled=way.precision != "fp32"):
            return segment(volume)

    return cast


def reference(case: Case, tta: bool, network: nn.Module, volume: Tensor) -> Tensor:
    """Foreground of our windows one by one, in float32 without TF32."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        segment = segmenter(Way("ours", 1, "fp32", tta=tta), case, network, volume.device)
        return segment(volume).argmax(0)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def windows(network: nn.Module, segment: Segment, volume: Tensor) -> int:
    """Windows that a segmenter gives to an eager network."""
    seen: list[int] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        segment(volume)
    finally:
        handle.remove()
    return sum(seen)


@torch.inference_mode()
def run(way: Way, case: Case, networks: tuple[nn.Module, nn.Module], volume: Tensor, truth: Tensor, tiny: bool) -> Row:
    """A row's values."""
    clean()
    network = networks[way.tool == "ours" and not way.compile]
    segment = segmenter(way, case, network, volume.device)
    times = measured(lambda: segment(volume), lambda: segment(volume), volume.device, tiny, seconds=2.5)
    found = segment(volume).argmax(0)
    eager = segmenter(way._replace(compile=False), case, network, volume.device)
    return {
        "windows": windows(network, eager, volume),
        "s": round(times.pop("ms") / 1000, 4),
        "iqr_s": round(times.pop("iqr_ms") / 1000, 4),
        "agreement": round(float(dice(found, truth, CLASSES)[0]), 6),
        **times,
    }


def relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed over that of the fastest peer on the same volume, with TTA or without."""
    out = []
    for row in rows:
        same = [r for r in rows if r["volume"] == row["volume"] and r["tta"] == row["tta"] and r["tool"] != "ours"]
        best = min((r["s"] for r in same if r.get("s")), default=None)
        out.append({**row, "x peer": best / row["s"]} if best and row.get("s") else row)
    return out


def main(args: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dsunet_inference.json"))
    parser.add_argument("--only", default="", help="comma-separated words that `VOLUME WAY [TTA]` contains")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="Unix time that no row should pass")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = parser.parse_args(args)
    device = setup()
    results = Results(options.out)
    words = [word for word in options.only.split(",") if word]
    for case in (TINY,) if options.tiny else CASES:
        todo = [way for way in ways() if all(word in _text(case, way) for word in words)]
        todo = [way for way in todo if results.get(**_key(case, way)) is None]
        if not todo or time.time() + 30 * (not options.tiny) > options.deadline:
            continue
        networks = trained(case, device, 4 if options.tiny else 150)
        volume = blobs(case.size, device, 0)[0][0]
        with torch.inference_mode():
            truths = {tta: reference(case, tta, networks[0], volume) for tta in {way.tta for way in todo}}
        for way in todo:
            if time.time() + (COMPILE_S if way.compile else 15) * (not options.tiny) > options.deadline:
                continue
            begin = time.perf_counter()
            try:
                row = run(way, case, networks, volume, truths[way.tta], options.tiny)
            except Exception as error:  # a peer that is missing or fails is a result
                row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
            peer: dict[str, Any] = {"MONAI": {"peer": version("monai")}, "nnU-Net": {"peer": version("nnunetv2")}}
            row = {**way._asdict(), **row, **peer.get(way.tool, {}), "wall_s": round(time.perf_counter() - begin, 1)}
            results.add(_key(case, way), row)
            print(f"{_text(case, way)}: {row.get('error') or row['s']} s ({row['wall_s']} s)", flush=True)
    clean()
    print(table(relative(results.rows), (*COLUMNS, "x peer")))


def _key(case: Case, way: Way) -> Row:
    return {"volume": case.name, "way": way.name, "tta": way.tta}


def _text(case: Case, way: Way) -> str:
    return f"{case.name} {way.name}" + (" TTA" if way.tta else "")


if __name__ == "__main__":
    main()
