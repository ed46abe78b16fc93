"""A trained network as one file: what rounding costs in dB, real bytes by part, and how fast frames come out.

A profile is trained once (or `--ckpt` names a checkpoint), then rounded after training to 8 and 6 bits, and trained on
against rounding for a while (`QAT`), from its weights with a lower rate. That training alone may gain something:
`trained on` is the same without rounding. Losses are against the network as it was trained first, on frames rounded to
8 bits, and the file is read back before anything is measured. Bytes are those of the file, header and checksum
included, and the original's mp4 stands beside them: it is smaller than most of these files, and this is no way to
compress a clip as short as this one.

    python benchmarks/patchnerf_compression.py --video bigbuckbunny.mp4
    python benchmarks/patchnerf_compression.py --video ... --ckpt last.ckpt --tune-epochs 60
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, timed
from patchnerf_runs import SCENE, Job, command, conduct, options_of, parsed, train

from lit_patchnerf.decoding import decode_canvases, frame_times, to_bytes
from lit_patchnerf.metrics import FrameMetrics
from lit_patchnerf.packing import NeuralVideo, neural_video, pack, unpack
from lit_patchnerf.synthetic import SyntheticVideo
from lit_patchnerf.video import read_video

FLOAT, LONGER = "as trained", "trained on"
BITS = (8, 6)
KEY = ("part", "way", "bits", "profile", "epochs_wanted", "tune_epochs", "ckpt", "overrides", "seed")
COLUMNS = ("way", "bits", "psnr_8bit_db", "lost_db", "ms_ssim", "bytes", "bpp", "fps_fp32", "fps_bf16", "source_bytes")
AT_ONCE = 4  # frames


@torch.no_grad()
def score(video: NeuralVideo, frames: Any, device: torch.device) -> Row:
    """Figures of all frames, cropped as in training."""
    metric, geometry = FrameMetrics().to(device), video.geometry
    net = video.net.to(device)
    for part in torch.arange(len(frames)).split(AT_ONCE):
        canvas = torch.from_numpy(geometry.place(frames[part.numpy()]).copy()).to(device)
        target = geometry.cut(canvas.permute(0, 3, 1, 2)).float() / 255
        rgb = geometry.cut(decode_canvases(net, frame_times(part, video.frames, device), geometry).rgb)
        metric.update(part.to(device), torch.zeros_like(part), rgb.float().clamp(0, 1), target)
    found = {name: float(value) for name, value in metric.compute().items()}
    return {
        name: round(found[name], 5) for name in ("psnr_db", "psnr_8bit_db", "ms_ssim") if found[name] == found[name]
    }


def speed(video: NeuralVideo, device: torch.device, tiny: bool) -> Row:
    """Frames per second from moments to bytes on the device, not copied from there."""
    net: Any = video.net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    times = frame_times(range(min(AT_ONCE, video.frames)), video.frames, device)
    out: Row = {}
    for name, bf16 in (("fp32", False), ("bf16", True)):

        def decode(bf16: bool = bf16) -> object:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                return to_bytes(decode_canvases(net, times, video.geometry).rgb)

        seconds = timed(decode, device, *((2, 1) if tiny else (30, 5)))
        out[f"fps_{name}"] = round(len(times) * len(seconds) / sum(seconds), 1)
    return out


def packed(video: NeuralVideo, path: Path, bits: int, frames: Any, device: torch.device, tiny: bool) -> Row:
    """A file, read back: its bytes by part, figures and speed."""
    sizes = pack(video, path, bits=bits, latent_bits=bits)
    again = unpack(path)[0]
    height, width = again.geometry.crop
    row = score(again, frames, device) | speed(again, device, tiny)
    row |= {"bytes": sizes.total, "on_disk": path.stat().st_size, "parts": dict(sizes.parts)}
    row |= {"bits_per_number": round(sizes.bits_per_number, 3)}
    return row | {"bpp": round(8 * sizes.total / (again.frames * height * width), 6)}


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = options_of(__doc__, "patchnerf_compression")
    parser.add_argument("--profile", default="bunny_1.5m", help="(%(default)s)")
    parser.add_argument("--ckpt", type=Path, help="a checkpoint of the profile in the place of a training")
    parser.add_argument("--tune-epochs", type=int, default=30, help="of training on (%(default)s)")
    parser.add_argument("--tune-lr", type=float, default=5e-4, help="its rate (%(default)s)")
    parser.add_argument("--save", type=Path, help="folder that keeps the checkpoint and the files")
    parser.set_defaults(seeds=[0])
    options, overrides = parsed(parser, args)
    if options.tiny:
        options.tune_epochs = 1
    if options.ckpt is not None and not options.ckpt.is_file():
        parser.error(f"--ckpt: expected a checkpoint, got {options.ckpt}")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    shared: Row = {"profile": options.profile, "epochs_wanted": options.epochs, "tune_epochs": options.tune_epochs}
    shared |= {"ckpt": options.ckpt and options.ckpt.name, "overrides": " ".join(overrides)}

    def frames(count: int) -> Any:
        return SyntheticVideo(**SCENE).draw() if options.tiny else read_video(options.video, limit=count)[0]

    def trained(path: Path, seed: int) -> Row:
        """The network that all rows begin with; the checkpoint is made where there is none."""
        row: Row = {}
        if not path.is_file():
            run = train(command(options.profile, options, path.parent, *overrides, seed=seed), keep=path)
            row = {k: run.row[k] for k in ("epochs", "train_s", "wall_s")}
        video = neural_video(path)
        height, width = video.geometry.crop
        count = sum(p.numel() for p in video.net.parameters())
        row |= {"params": count, "bytes": 4 * count, "bpp": round(32 * count / (video.frames * height * width), 6)}
        # The file of the video, whatever its frames are cut to.
        file = None if options.tiny else options.video
        row["source_bytes"] = file.stat().st_size if file is not None and file.is_file() else None
        row |= {"frames": video.frames, "frame": [height, width], "video": file.name if file else "drawn"}
        return row | score(video, frames(video.frames), device) | speed(video, device, options.tiny)

    def tuned(base: Path, path: Path, bits: int | None, seed: int) -> NeuralVideo:
        more = [*overrides, "--model.init_from", str(base), "--model.lr", str(options.tune_lr)]
        more += ["--model.qat_bits", str(bits or "null"), "--model.warmup", "0"]
        own = argparse.Namespace(**vars(options) | {"epochs": options.tune_epochs})
        train(command(options.profile, own, path.parent, *more, seed=seed), keep=path)
        return neural_video(path)

    def jobs(results: Results, folder: Path) -> Iterator[Job]:
        kept = options.save or folder
        kept.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            blank = {"part": "run", **shared, "seed": seed}
            base = options.ckpt or kept / f"{options.profile}_{seed}.ckpt"
            yield blank | {"way": FLOAT, "bits": 32}, lambda b=base, s=seed: trained(b, s)
            float_row = results.get(**blank, way=FLOAT)
            if float_row is None:
                continue

            def rounded(way: str, bits: int, base: Path = base, seed: int = seed, before: Row = float_row) -> Row:
                if not base.is_file():  # of an earlier call, whose folder is gone
                    trained(base, seed)
                path = kept / f"{options.profile}_{seed}_{way.replace(' ', '_')}_{bits}"
                start = (
                    None
                    if way == "rounded"
                    else tuned(base, path.with_suffix(".ckpt"), None if way == LONGER else bits, seed)
                )
                video = start or neural_video(base)
                if way == LONGER:
                    row = score(video, frames(video.frames), device)
                else:
                    row = packed(video, path.with_suffix(".lpn"), bits, frames(video.frames), device, options.tiny)
                return row | {"lost_db": round(before["psnr_8bit_db"] - row["psnr_8bit_db"], 4)}

            ways = [*(("rounded", n) for n in BITS), (LONGER, 32), *(("QAT", n) for n in BITS)]
            for way, bits in ways:
                yield blank | {"way": way, "bits": bits}, lambda w=way, n=bits, f=rounded: f(w, n)

    conduct(options, KEY, jobs, COLUMNS)


if __name__ == "__main__":
    main()
