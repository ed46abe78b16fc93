"""The table of a video's embeddings, one per patch, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_cli.errors import InputError
from lit_patchnerf.clip.files import FileProvider
from lit_patchnerf.clip.providers import Provider, open_provider
from lit_patchnerf.patches import Geometry
from lit_patchnerf.store import PreparedVideo

__all__ = ["cache_files", "embedding_table", "encode_video"]

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the way from frames to embeddings changes: old tables are then left alone
_EVERY = 16  # rows of the canvas: one of so many is hashed


def embedding_table(
    video: PreparedVideo,
    provider: str | Provider,
    weights: str | Path | None = None,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Embeddings of all patches of a video: from the cache, from a file, or computed now and left in the cache.

    A table is found again by a hash of the video, its crop and grid, and the provider; the JSON beside it says what it
    is of. A table that does not fit its JSON, or that is damaged, is made anew. A full or read-only disk costs the
    cache, never the run.

    Args:
        video: Frames that were cropped already: the grid is laid over what the network draws.
        provider: Its text, see `open_provider`, or an open one.
        weights: Local weights, with a text.
        cache_dir: Folder of the cache; None keeps nothing on disk.
        device: That the towers run on, with a text.

    Returns:
        (T, rows, cols, D) float16 unit vectors on the CPU.

    Raises:
        InputError: the provider cannot be opened, or a file's table does not fit the video.

    Example:
        >>> from lit_patchnerf.store import from_frames
        >>> from lit_patchnerf.synthetic import SyntheticVideo
        >>> scene = SyntheticVideo(frames=3, height=32, width=64)
        >>> tuple(embedding_table(from_frames(scene.draw(), scene.facts(), grid=(2, 4)), "toy:20").shape)
        (3, 2, 4, 20)
    """
    source = open_provider(provider, weights, device) if isinstance(provider, str) else provider
    if isinstance(source, FileProvider):
        return _from_file(video, source)
    if cache_dir is None:
        return encode_video(video, source)
    about = _about(video, source)
    file, beside = cache_files(video, source, cache_dir, about)
    table = _load(file, beside, about, video)
    if table is None:
        table = encode_video(video, source)
        _save(file, beside, about, table)
    return table


def encode_video(video: PreparedVideo, provider: Provider) -> Tensor:
    """Encode all patches, a few frames at a time.

    Args:
        video: Frames on their canvas.
        provider: With an image tower.

    Returns:
        (T, rows, cols, D) float16 on the CPU.

    Raises:
        InputError: the tower gives values that are no numbers.
    """
    (rows, cols), (h, w) = video.geometry.grid, video.geometry.patch
    step = max(1, 64 // (rows * cols))
    parts = []
    for start in range(0, len(video.frames), step):
        frames = torch.from_numpy(np.array(video.frames[start : start + step]))
        patches = frames.unflatten(2, (cols, w)).unflatten(1, (rows, h)).transpose(2, 3).flatten(0, 2)
        found = provider.encode_images(patches)
        if not bool(found.isfinite().all()):
            raise InputError(f"{provider.name} gives values that are no numbers, expected other weights")
        parts.append(found.half().cpu().unflatten(0, (-1, rows, cols)))
    return torch.cat(parts)


def cache_files(
    video: PreparedVideo, provider: Provider, folder: Path, about: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """The table of a video in the cache, and the JSON that describes it."""
    text = json.dumps(about or _about(video, provider), sort_keys=True)
    name = f"clip-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    return folder / f"{name}.npz", folder / f"{name}.json"


def _about(video: PreparedVideo, provider: Provider) -> dict[str, Any]:
    # The digest of a folder of images is of names and byte counts, and decoders differ: so pixels are hashed as well,
    # some rows of every frame, which even for a long video takes less than a second.
    digest = hashlib.sha256()
    for frame in video.frames:
        digest.update(np.ascontiguousarray(frame[::_EVERY]).data)
    return {
        "version": VERSION,
        "video": video.facts.digest,
        "pixels": digest.hexdigest(),
        "frames": len(video.frames),
        "geometry": video.geometry.to_dict(),
        "provider": provider.name,
        "key": provider.key,
    }


def _from_file(video: PreparedVideo, provider: FileProvider) -> Tensor:
    table = provider.table
    if table is None:
        raise InputError(f"{provider.path}: has texts alone, expected `embeddings` (T, rows, cols, D)")
    wanted = _shape(len(video.frames), video.geometry)
    if tuple(table.shape[:3]) != wanted:
        raise InputError(
            f"data.embeddings: {provider.path} has {_by(tuple(table.shape[:3]))} embeddings, expected {_by(wanted)}: "
            "frames, rows and columns of the video's grid"
        )
    return table.half().cpu()


def _load(file: Path, beside: Path, about: dict[str, Any], video: PreparedVideo) -> Tensor | None:
    """A cached table; None if there is none, or it is damaged or of something else."""
    try:
        if json.loads(beside.read_text())["of"] != about:
            return None
        with np.load(file, allow_pickle=False) as arrays:  # the archive has a checksum
            table = arrays["embeddings"]
    except FileNotFoundError:
        return None
    except Exception as error:  # json, zipfile and numpy each have exceptions of their own
        log.warning("%s is damaged (%s); encoding again", file, error)
        return None
    fits = (
        table.dtype == np.float16 and table.ndim == 4 and table.shape[:3] == _shape(len(video.frames), video.geometry)
    )
    return torch.from_numpy(table) if fits else None


def _save(file: Path, beside: Path, about: dict[str, Any], table: Tensor) -> None:
    """Write both, the table first: without its JSON it does not count."""
    made = {"dim": table.shape[-1], "torch": torch.__version__}
    text = json.dumps({"of": about, "made": made}, indent=2)
    temporary: list[Path] = []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path in (file, beside):
            handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            temporary.append(Path(name))
            with os.fdopen(handle, "wb") as out:
                if path is file:
                    np.savez(out, embeddings=table.numpy())
                else:
                    out.write(text.encode())
            Path(name).replace(path)
    except OSError as error:
        log.warning("no cache of embeddings at %s (%s); encoding again next time", file.parent, error)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _shape(count: int, geometry: Geometry) -> tuple[int, int, int]:
    return count, *geometry.grid


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
