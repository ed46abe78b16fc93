"""`lit-patchnerf query`: where a video shows what a text, or a picture, says."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cli.arguments import CommandParser
from lit_cli.cli import find_checkpoint
from lit_cli.errors import InputError
from lit_common.images import save_rgb
from lit_patchnerf.clip import Provider, open_provider
from lit_patchnerf.clip.files import FileProvider
from lit_patchnerf.decoding import frame_times
from lit_patchnerf.patches import Geometry
from lit_patchnerf.ranking import (
    Hit,
    Score,
    cell_box,
    embedding_report,
    frame_curve,
    heat_picture,
    score_table,
    top_hits,
    write_heat,
)
from lit_patchnerf.similarity import NEGATIVES
from lit_patchnerf.video import open_source

__all__ = [
    "Hit",
    "Score",
    "cell_box",
    "embed_video",
    "embedding_report",
    "frame_curve",
    "heat_picture",
    "query_main",
    "score_table",
    "top_hits",
    "write_heat",
]

Frames = NDArray[np.uint8]

_CHUNK = 32  # frames embedded or decoded at once


class Video(Protocol):
    """What is used of a trained module."""

    hparams: Any

    @property
    def geometry(self) -> Geometry:
        """How patches lie in a frame."""
        ...

    def embed(self, times: Tensor) -> Tensor:
        """(F,) times from 0 to 1 to (F, rows, cols, D)."""
        ...


@torch.no_grad()
def embed_video(module: Video) -> Tensor:
    """The embeddings that a trained module gives for all frames, (T, rows, cols, D) float32 on its device.

    Raises:
        InputError: it was trained without embeddings.
    """
    if not module.hparams.get("clip_dim"):
        raise InputError("the checkpoint has no embeddings, expected one that was trained with data.embeddings")
    times = _times(module)
    return torch.cat([module.embed(part).float() for part in times.split(_CHUNK)])


# ---- The command -----------------------------------------------------------------------------------------------------


def query_main(args: Sequence[str]) -> dict[str, Any]:
    """`lit-patchnerf query`: rank the patches of a trained video and write what was found.

    Into the folder go `results.json`, and for each query `heat.mp4` and the pictures of the best patches; with several
    queries, in a folder for each.

    Args:
        args: Command line after the word `query`.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: no such checkpoint, text, picture or video, or none with embeddings of this length.
    """
    o = _parser().parse_args(args)
    if bool(o.image) == bool(o.text or o.texts):
        raise InputError("query: expected --text or --texts, or --image")
    if o.top < 1 or o.apart < 0:
        raise InputError(f"query: --top is {o.top} and --apart {o.apart}, expected at least 1 and 0")
    path = find_checkpoint(o.ckpt_path, o.folder) if o.ckpt_path in ("best", "last") else Path(o.ckpt_path)
    if not path.is_file():
        raise InputError(f"--ckpt_path {path}: no such file, expected a checkpoint, best or last")
    from lit_patchnerf.module import load  # it brings Lightning's module, which the functions above do without

    module: Any = load(path)
    if hasattr(module, "to"):
        module.to(o.device)
    stored = _stored(path)
    queries, embeddings, negatives, score, provider = _ask(o, stored)
    if score == "probability" and len(queries) < 2:
        raise InputError("query: --score probability is over the texts as labels, expected at least two of them")
    begin = time.perf_counter()
    table = embed_video(module)
    if table.shape[-1] != embeddings.shape[-1]:
        raise InputError(
            f"query: {provider} gives {embeddings.shape[-1]} numbers, expected {table.shape[-1]}: the length that "
            f"{path} was trained on"
        )
    if table.is_cuda:
        torch.cuda.synchronize()  # only the clock needs it
    table_s = time.perf_counter() - begin
    begin = time.perf_counter()
    scores = score_table(table, embeddings, negatives, score).cpu()
    rank_s = time.perf_counter() - begin
    fps = float(module.hparams.get("fps") or 25.0)
    report: dict[str, Any] = {
        "checkpoint": str(path),
        "provider": provider,
        "score": score,
        "negatives": o.negatives if score == "relevancy" else [],
        "frames": len(table),
        "grid": list(module.geometry.grid),
        "fps": fps,
        "queries": [],
    }
    print(f"{len(table)} frames embedded in {table_s:.2f} s, {len(queries)} queries ranked in {1000 * rank_s:.1f} ms")
    for number, (query, values) in enumerate(zip(queries, scores, strict=True), 1):
        inside = f"{number:02d}_{_slug(query)}/" if len(queries) > 1 else ""
        hits = top_hits(values, module.geometry, o.top, o.apart)
        files = _write(o.out / inside, _originals(module, o.video), values, hits, module.geometry, fps)
        curve = frame_curve(values)
        found = [
            asdict(hit) | {"box": list(hit.box), "time_s": hit.frame / fps, "picture": inside + name}
            for hit, name in zip(hits, files, strict=True)
        ]
        report["queries"].append(
            {
                "query": query,
                "best_frame": int(curve.argmax()),
                "hits": found,
                "curve": curve.tolist(),
                "heat": f"{inside}heat.mp4",
            }
        )
        _print(query, score, hits, fps)
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "results.json").write_text(json.dumps(report, indent=2))
    print(f"written to {o.out}: results.json, heat.mp4 and {o.top} pictures of each query")
    return report


def _parser() -> CommandParser:
    parser = CommandParser(prog="lit-patchnerf query", description=__doc__)
    add = parser.add_argument
    add("--ckpt_path", required=True, help="best, last (of the newest run in --folder), or a file")
    add("--folder", type=Path, default=Path("logs/patchnerf"), help="of the runs (%(default)s)")
    add("--text", nargs="+", default=[], help="what to look for; each text is a query of its own")
    add("--image", type=Path, help="a picture to look for, by a provider with an image tower")
    add("--texts", type=Path, help=".npz with `texts` and `text_embeddings`: no text tower is needed")
    add("--negatives", nargs="+", default=list(NEGATIVES), help="what relevancy compares with (%(default)s)")
    add("--provider", help="timm:, open_clip:, transformers:, file:, toy; by default that of the training")
    add("--weights", type=Path, help="local file of its weights")
    add("--score", choices=get_args(Score), help="by default relevancy for texts, cosine for a picture")
    add("--video", type=Path, help="to draw on; by default on what the network decodes")
    add("--top", type=int, default=10, help="hits of a query (%(default)s)")
    add("--apart", type=int, default=0, help="frames between hits at the same place, at least (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    add("--out", type=Path, default=Path("query"), help="folder to write (%(default)s)")
    return parser


def _ask(o: argparse.Namespace, stored: dict[str, Any]) -> tuple[list[str], Tensor, Tensor | None, Score, str]:
    """Queries, their embeddings, those of the negatives, the score and the provider's name."""
    text = f"file:{o.texts}" if o.texts else o.provider or stored.get("embeddings")
    if not text:
        raise InputError("query: the checkpoint names no provider, expected --provider or --texts")
    weights = o.weights or (stored.get("embeddings_weights") if text == stored.get("embeddings") else None)
    provider: Provider = open_provider(text, weights, o.device)
    if o.image:
        return [o.image.name], provider.encode_images(_picture(o.image)), None, _image_score(o.score), provider.name
    queries = o.text or (provider.texts if isinstance(provider, FileProvider) else [])
    if not queries:
        raise InputError(f"query: {text} holds no texts, expected --text")
    embeddings = provider.encode_texts(queries)
    score: Score = o.score or "relevancy"
    if score != "relevancy":
        return queries, embeddings, None, score, provider.name
    if o.score is None and isinstance(provider, FileProvider):
        known = {name.strip().lower() for name in provider.texts}
        lacking = [name for name in o.negatives if name.strip().lower() not in known]
        if lacking:
            print(
                f"{provider.path} has no embedding of the negative {lacking[0]!r}: ranked by cosine, not by relevancy"
            )
            return queries, embeddings, None, "cosine", provider.name
    return queries, embeddings, provider.encode_texts(o.negatives), score, provider.name


def _image_score(wanted: Score | None) -> Score:
    if wanted not in (None, "cosine"):
        raise InputError(f"query: --score {wanted} is for texts, expected cosine with --image")
    return "cosine"


def _picture(path: Path) -> Tensor:
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # an empty file is an error of OpenCV's
        image = None
    if image is None:
        raise InputError(f"--image {path}: cannot be read, expected a picture")
    return torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))[None]


def _stored(path: Path) -> dict[str, Any]:
    """Options of the data module that a checkpoint was trained with."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True).get("datamodule_hyper_parameters") or {}
    except Exception:  # `load` has read the file already, so it is only written by other means
        return {}


def _times(module: Any) -> Tensor:
    count = module.hparams["frames"]
    return frame_times(range(count), count, getattr(module, "device", None))


def _originals(module: Any, video: Path | None) -> Iterator[Frames]:
    """Frames in their original size, from the video or as the network decodes them."""
    count, geometry = module.hparams["frames"], module.geometry
    if video is None:
        for part in _times(module).split(_CHUNK):
            with torch.no_grad():
                canvas = geometry.restore(module.decode(part).rgb.float().clamp(0, 1))
            yield from (canvas * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return
    source = open_source(video)
    if source.size != geometry.frame:
        raise InputError(
            f"--video {video}: frames of {source.size[0]}x{source.size[1]} pixels, expected "
            f"{geometry.frame[0]}x{geometry.frame[1]} as the network was trained on"
        )
    yield from islice(source.frames(count), count)


def _write(
    folder: Path, frames: Iterator[Frames], scores: Tensor, hits: list[Hit], geometry: Geometry, fps: float
) -> list[str]:
    """Write the heat map, and on the way through the frames a picture of each hit; their names, in order of hits."""
    names = [f"top_{rank:02d}_frame_{hit.frame:05d}.png" for rank, hit in enumerate(hits, 1)]

    def passing() -> Iterator[Frames]:
        for number, frame in enumerate(frames):
            for hit, name in zip(hits, names, strict=True):
                if hit.frame == number:
                    x1, y1, x2, y2 = hit.box
                    width = max(1, math.ceil(min(frame.shape[:2]) / 200))
                    marked = cv2.rectangle(np.array(frame, order="C"), (x1, y1), (x2 - 1, y2 - 1), (255, 60, 40), width)
                    save_rgb(folder / name, np.asarray(marked, np.uint8))
            yield frame

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_heat(folder / "heat.mp4", passing(), scores, geometry, fps)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error})") from error
    return names


def _print(query: str, score: Score, hits: list[Hit], fps: float) -> None:
    print(f"\n{query}\n{'rank':>4} {'frame':>6} {'time s':>7} {'row':>4} {'col':>4} {score:>11}  box x1 y1 x2 y2")
    for rank, hit in enumerate(hits, 1):
        box = " ".join(map(str, hit.box))
        print(f"{rank:>4} {hit.frame:>6} {hit.frame / fps:>7.2f} {hit.row:>4} {hit.col:>4} {hit.score:>11.4f}  {box}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "query"
