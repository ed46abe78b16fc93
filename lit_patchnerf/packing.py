"""`lit-patchnerf compress` and `decode`: a checkpoint to one small file, and the file back to frames.

Reading and decoding import nothing that trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.arguments import CommandParser
from lit_cli.errors import InputError
from lit_common.images import save_rgb
from lit_patchnerf.compress.container import Container, SizeReport, load_module, write_container
from lit_patchnerf.compress.quantise import Layout, quantise_state
from lit_patchnerf.decoding import (
    Decoder,
    check_geometry,
    check_region,
    decode_canvases,
    decode_region,
    frame_name,
    frame_times,
    moment_numbers,
    to_bytes,
)
from lit_patchnerf.models import CoordinateConfig, GridConfig, GridDecoder, build_decoder, decoder_config
from lit_patchnerf.patches import Geometry

__all__ = ["NeuralVideo", "compress_main", "decode_main", "neural_video", "pack", "plain_config", "unpack"]

PARTS = {"latents*": "latents", "atlases.*": "atlases", "camera.*": "atlases", "clip.*": "clip"}  # the rest is weights
BITS = 8
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4"}


@dataclass(frozen=True)
class NeuralVideo:
    """A network that holds a video, and what its frames need beside it.

    Attributes:
        net: The decoder, in evaluation mode.
        geometry: How its patches lie in a frame.
        frames: Frames of the video.
        fps: Frames per second.
        bits: What weights were trained to be rounded to, else 8.
        layouts: Those that they were rounded in.
    """

    net: Decoder
    geometry: Geometry
    frames: int
    fps: float
    bits: int = BITS
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """`grid` or `coordinate`."""
        return "grid" if isinstance(self.net, GridDecoder) else "coordinate"


def neural_video(path: str | Path) -> NeuralVideo:
    """Open a checkpoint, or a file of `pack` if its name ends in .lpn.

    Raises:
        InputError: there is no such file, or it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--ckpt_path {path}: no such file, expected a checkpoint or an .lpn file")
    if path.suffix == ".lpn":
        return unpack(path)[0]
    from lit_patchnerf.module import load

    module = load(path)
    net, h = module.net, module.hparams
    if net is None:
        raise InputError(f"--ckpt_path {path}: holds no network")
    return NeuralVideo(
        cast(Decoder, net).eval(),
        module.geometry,
        int(h["frames"]),
        float(h["fps"]),
        h.get("qat_bits") or BITS,
        module.rounding_layouts,
    )


def plain_config(config: CoordinateConfig | GridConfig) -> dict[str, Any]:
    """All fields as plain values; what was solved for is written out, so that a better solver changes no old file.

    >>> plain_config(CoordinateConfig(fc_dim=8, patch=(20, 20), stem=(2, 3)))["strides"]
    [[5, 2], [1, 2], [2, 2]]
    """
    config = replace(config, strides=config.all_strides)
    if isinstance(config, CoordinateConfig):
        config = replace(config, blocks=tuple(config.all_blocks))
    return {name: _lists(value) for name, value in asdict(config).items()}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def pack(
    video: NeuralVideo,
    path: str | Path,
    *,
    bits: int | None = None,
    latent_bits: int | None = None,
    without_clip: bool = False,
) -> SizeReport:
    """Write a network as an .lpn file.

    Args:
        video: The network and its geometry.
        path: The file.
        bits: Of the weights, 2 to 16; by default the video's own.
        latent_bits: Of the latents, likewise.
        without_clip: Leave the head for embeddings out.

    Returns:
        Its bytes by part.

    Raises:
        InputError: bits out of their range, weights that are not finite, or a file that cannot be written.
    """
    net = video.net
    state = {name: x for name, x in net.state_dict().items() if not (without_clip and name.startswith("clip."))}
    chosen = {"latents*": latent_bits or video.bits, "*": bits or video.bits}
    config = replace(net.config, clip_dim=None) if without_clip else net.config
    header = {"mode": video.mode, "decoder": plain_config(config), "frames": video.frames, "fps": video.fps}
    # Other bits than the training's may be better off in other layouts.
    layouts = video.layouts if set(chosen.values()) == {video.bits} else None
    return write_container(path, quantise_state(state, chosen, layouts), header, video.geometry.to_dict(), PARTS)


def unpack(path: str | Path) -> tuple[NeuralVideo, Container]:
    """Read an .lpn file.

    Raises:
        InputError: there is no such file, it is damaged, or it holds no network of these packages.
    """
    net, content = load_module(path, lambda config: build_decoder(_decoder_config(path, config)))
    try:
        geometry = Geometry.from_dict(content.geometry)
        frames, fps = int(content.config["frames"]), float(content.config["fps"])
        check_geometry(cast(Decoder, net), geometry)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: its header has no geometry, frames and fps that fit the decoder ({error})"
        ) from error
    return NeuralVideo(cast(Decoder, net), geometry, frames, fps), content


def _decoder_config(path: str | Path, config: dict[str, Any]) -> CoordinateConfig | GridConfig:
    try:
        return decoder_config(config["mode"], config["decoder"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its header describes no decoder ({error})") from error


def compress_main(args: Sequence[str]) -> SizeReport:
    """`lit-patchnerf compress`: write the file, print what its parts cost and, with a video, what is lost.

    Args:
        args: Command line after the word `compress`.

    Returns:
        Bytes by part.

    Raises:
        InputError: no such checkpoint or video, or what `pack` refuses.
    """
    parser = CommandParser(prog="lit-patchnerf compress", description="A checkpoint to one small file.")
    parser.add_argument("--ckpt_path", required=True, help="best, last (of the newest run in --folder), or a file")
    parser.add_argument("--folder", type=Path, default=Path("logs/patchnerf"), help="of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("video.lpn"), help="file to write (%(default)s)")
    parser.add_argument("--bits", type=int, help="of the weights, 2 to 16 (8, or as trained)")
    parser.add_argument("--latent_bits", type=int, help="of the latents, 2 to 16 (8, or as trained)")
    parser.add_argument("--without_clip", action="store_true", help="leave out the head for embeddings")
    parser.add_argument("--video", help="of the training: measure what is lost")
    parser.add_argument("--device", default=default_device(), help="that measures (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="frames decoded at once (%(default)s)")
    o = parser.parse_args(args)
    device = check_device(o.device)
    path = checkpoint_path(o.ckpt_path, o.folder)
    before = neural_video(path)
    sizes = pack(before, o.out, bits=o.bits, latent_bits=o.latent_bits, without_clip=o.without_clip)
    height, width = before.geometry.crop
    print(f"{o.out}: from {path}, {before.frames} frames of {height}x{width}")
    for part, count in sizes.parts.items():
        print(f"  {part:<10}{count:>12,} bytes {100 * count / sizes.total:6.2f} %")
    pixels = before.frames * height * width
    print(
        f"  {'all':<10}{sizes.total:>12,} bytes, {sizes.bits_per_number:.3f} bits for each of {sizes.numbers:,} numbers"
    )
    print(f"  {8 * sizes.total / pixels:.5f} bits per pixel")
    if o.video is not None:
        frames = _read_frames(o.video, before)
        # The file is read back: what is measured is what a reader will see.
        score = [mean_psnr(video, frames, device, o.batch) for video in (before, unpack(o.out)[0])]
        print(
            f"  PSNR {score[0]:.3f} dB as trained, {score[1]:.3f} dB from the file: {score[0] - score[1]:.3f} dB lost"
        )
    return sizes


def _read_frames(path: str, video: NeuralVideo) -> NDArray[np.uint8]:
    from lit_patchnerf.video import read_video

    frames, facts = read_video(path, limit=video.frames)
    if len(frames) != video.frames or facts.size != video.geometry.frame:
        height, width = video.geometry.frame
        raise InputError(
            f"--video {path}: {len(frames)} frames of {facts.size[0]}x{facts.size[1]}, expected the training's "
            f"{video.frames} of {height}x{width}"
        )
    return frames


def mean_psnr(video: NeuralVideo, frames: NDArray[np.uint8], device: torch.device, batch: int = 4) -> float:
    """Mean over frames of the PSNR in dB, of the cropped frame and the unrounded output.

    Args:
        video: The network.
        frames: (T, H, W, 3) in the original size.
        device: Where to decode.
        batch: Frames at a time.
    """
    from lit_patchnerf.metrics import psnr

    net, scores = video.net.to(device), []
    for part in torch.arange(len(frames)).split(max(1, batch)):
        target = torch.from_numpy(video.geometry.place(frames[part.numpy()]).copy()).to(device)
        times = frame_times(part, video.frames).to(device)
        rgb = video.geometry.cut(decode_canvases(net, times, video.geometry).rgb)
        scores.append(psnr(rgb, video.geometry.cut(target.permute(0, 3, 1, 2)).float() / 255))
    return float(torch.cat(scores).mean())


def checkpoint_path(word: str, folder: Path) -> Path:
    """A checkpoint by its path, or as `best` or `last` of a folder of runs."""
    if word not in ("best", "last"):
        return Path(word)
    from lit_cli.cli import find_checkpoint

    return find_checkpoint(word, folder)


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        InputError: there is no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: no such device here, expected {default_device()}") from error
    return device


def decode_main(args: Sequence[str]) -> Path:
    """`lit-patchnerf decode`: an .lpn file to an mp4 or a folder of PNG files.

    Args:
        args: Command line after the word `decode`.

    Returns:
        The file or folder.

    Raises:
        InputError: a file that is damaged, or a range, a region or a device that is not there.
    """
    parser = CommandParser(prog="lit-patchnerf decode", description="A file back to frames or a film.")
    parser.add_argument("file", metavar="FILE.lpn")
    parser.add_argument("--out", type=Path, required=True, help="file that ends in .mp4, or a folder of PNG files")
    parser.add_argument("--range", type=float, nargs=2, metavar=("FIRST", "LAST"), help="frames, both included (all)")
    parser.add_argument("--step", type=float, default=1.0, help="0.5 decodes between frames too (%(default)s)")
    parser.add_argument("--region", type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--fps", type=float, help="of the mp4; by default the film lasts as long as the video did")
    parser.add_argument("--batch", type=int, default=4, help="frames decoded at once (%(default)s)")
    parser.add_argument("--device", default=default_device(), help="(%(default)s)")
    parser.add_argument("--precision", default="32", choices=("32", "bf16"), help="of the network (%(default)s)")
    o = parser.parse_args(args)
    device = check_device(o.device)
    film = o.out.suffix.lower() in VIDEOS
    if film and o.out.suffix.lower() != ".mp4":
        raise InputError(f"--out {o.out}: expected a file that ends in .mp4, or a folder")
    if o.fps is not None and not 0 < o.fps < math.inf:
        raise InputError(f"--fps: expected a positive number, got {o.fps}")
    if o.batch < 1:
        raise InputError(f"--batch: expected at least 1, got {o.batch}")
    video, _ = unpack(o.file)
    first, last = o.range or (0.0, video.frames - 1.0)
    numbers = moment_numbers(first, last, o.step, video.frames, ("--range", "--step"))
    region = None if o.region is None else check_region(o.region, video.geometry, "--region")
    video.net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    began = time.perf_counter()
    frames = _frames(video, numbers, region, o.batch, device, bf16=o.precision == "bf16")
    if film:
        from lit_patchnerf.video import write_video

        write_video(o.out, frames, o.fps or film_fps(video.fps, o.step))
    else:
        for number, frame in zip(numbers, frames, strict=True):
            _save(o.out / frame_name(number), frame)
    seconds = time.perf_counter() - began
    print(f"{o.out}: {len(numbers)} frames in {seconds:.1f} s, {len(numbers) / seconds:.1f} a second with writing them")
    return o.out


def _frames(
    video: NeuralVideo,
    numbers: list[float],
    region: tuple[int, int, int, int] | None,
    batch: int,
    device: torch.device,
    bf16: bool,
) -> Iterator[NDArray[np.uint8]]:
    """Frames (H, W, 3) one after the other, decoded some at a time."""
    for times in frame_times(numbers, video.frames, device).split(batch):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if region is None:
                rgb: Tensor = to_bytes(decode_canvases(video.net, times, video.geometry).rgb)
                pixels = video.geometry.restore(rgb)
            else:
                pixels = to_bytes(decode_region(video.net, times, video.geometry, region))
        yield from pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _save(path: Path, frame: NDArray[np.uint8]) -> None:
    try:
        save_rgb(path, frame)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from error


def film_fps(fps: float, step: float) -> float:
    """Frames per second of a film: moments between frames come faster, so that it lasts as long as the video.

    >>> film_fps(25.0, 0.5), film_fps(25.0, 1.0), film_fps(25.0, 2.0)
    (50.0, 25.0, 25.0)
    """
    return fps / min(1.0, step)
