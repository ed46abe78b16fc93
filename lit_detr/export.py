"""A trained detector as one ONNX file that gives finished detections."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lit_cli.arguments import CommandParser
from lit_cli.cli import find_checkpoint
from lit_cli.errors import InputError
from lit_common.onnx_files import strip_notes
from lit_detr.models.attention import Core
from lit_detr.models.detr import DETR
from lit_detr.module import LitDETR, best

__all__ = ["Detector", "PixelKind", "export_main", "export_onnx", "metadata"]

PixelKind = Literal["float32", "uint8"]

LEAST_OPSET = 18  # what torch.onnx translates to; its conversion to older ones leaves nodes that these do not have
TOLERANCE = 1e-3  # of scores, between the network and the file: of float32 sums in another order, 1e-5 is usual


class Detector(nn.Module):
    """Network and post-processing in one call, in float32 and out of operations that every exporter knows.

    It has its own copy of the network; the module it comes from stays as it is.

    Args:
        module: A module with its network, as training or a checkpoint leaves it. After a fit with EMA, and in a
            checkpoint of one, these are the averaged weights, the ones that evaluation uses.
        pixels: `float32` images hold values from 0 to 1, `uint8` ones 0 to 255.
        core: How the decoder reads points; runtimes handle `gather` best.
    """

    def __init__(self, module: LitDETR, *, pixels: PixelKind = "float32", core: Core = "gather") -> None:
        super().__init__()
        if module.net is None:
            module.configure_model()
        assert isinstance(module.net, DETR)
        self.net = copy.deepcopy(module.net).cpu().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.net.channels_last = False
        self.net.set_core(core)
        self.queries: int = module.hparams["eval_queries"]
        self.most: int = module.hparams["most_detections"]
        self.pixels: PixelKind = pixels
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (B, C, H, W) RGB or grey, H and W multiples of the stride.

        Returns:
            Boxes (B, D, 4) x1 y1 x2 y2 in pixels of the input and inside of it, scores (B, D) from 0 to 1, best first,
            and labels (B, D) int64 class indices.
        """
        if self.pixels == "uint8":
            images = images.float() / 255
        output = self.net(images, None, None, self.queries)
        boxes, scores, labels = best(output.logits[-1], output.boxes[-1], self.most)
        height, width = images.shape[-2:]
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        return (boxes * limit).clamp_min(0).minimum(limit), scores, labels


def export_onnx(
    module: LitDETR,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    pixels: PixelKind = "float32",
    opset: int = LEAST_OPSET,
    core: Core = "gather",
) -> Path:
    """Write a detector as ONNX: input `images`, outputs `boxes`, `scores` and `labels` as in `Detector.forward`.

    The file takes frames of one size and knows no padding: all of a frame counts as image. `predict` masks what an
    image leaves of its frame; so choose a size of the images' own shape, or expect small differences at their edge.
    With onnxruntime installed, the file is run once and compared with the network.

    Args:
        module: A trained module.
        path: The file; it is replaced as a whole.
        size: Height and width; by default what the module was trained on.
        batch: Images per call; None leaves it open.
        pixels: What the input holds, see `Detector`.
        opset: Version of ONNX's operators.
        core: How the decoder reads points.

    Returns:
        The path.

    Raises:
        InputError: with one line: a package is missing, the size or the opset cannot be served, or the file gives
            other detections than the network.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"export: {' and '.join(missing)} not installed: pip install 'lit-vision-tasks[onnx]'")
    import onnx  # type: ignore[import-not-found]

    newest = onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise InputError(f"--opset: expected {LEAST_OPSET} to {newest} with the installed onnx, got {opset}")
    if batch is not None and batch < 1:
        raise InputError(f"--batch: expected dynamic, or 1 and more, got {batch}")
    detector = Detector(module, pixels=pixels, core=core)
    height, width = size or module.hparams["image_size"]
    stride = detector.net.stride
    if height < stride or width < stride or height % stride or width % stride:
        raise InputError(f"--height, --width: expected multiples of {stride}, got {height} x {width}")
    # An open batch must not be 1 here, or it would become a constant.
    example = _frames(batch or 2, module.hparams["in_channels"], (height, width), pixels)
    program = torch.onnx.export(
        detector,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["boxes", "scores", "labels"],
        opset_version=opset,
        dynamic_shapes=None if batch is not None else {"images": {0: "batch"}},
    )
    assert program is not None
    model: Any = program.model_proto
    strip_notes(model)
    onnx.helper.set_model_props(model, metadata(module, (height, width), stride, pixels))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        onnx.save(model, str(temporary))
        try:
            onnx.checker.check_model(str(temporary))
            difference = _difference(detector, temporary, example) if find_spec("onnxruntime") is not None else 0.0
        except Exception as error:  # of the runtimes' own classes
            reason = " ".join(str(error).split())
            raise InputError(f"export: the file does not run, nothing written ({reason:.150})") from error
        if not difference <= TOLERANCE:
            raise InputError(
                f"export: scores of the file differ from the network's by {difference:.2g}; nothing written"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def metadata(module: LitDETR, size: tuple[int, int], stride: int, pixels: PixelKind) -> dict[str, str]:
    """What the file says about itself: strings, lists as JSON.

    Example:
        >>> module = LitDETR(class_names=["plane"], category_ids=[7], in_channels=1)
        >>> metadata(module, (64, 96), 32, "uint8")["image_size"]
        '[64, 96]'
    """
    h = module.hparams
    ids = h["category_ids"] or list(range(1, len(h["class_names"]) + 1))
    values = {
        "class_names": json.dumps(h["class_names"]),
        "category_ids": json.dumps(ids),
        "image_size": json.dumps(list(size)),
        "channels": str(h["in_channels"]),
        "stride": str(stride),
        "pixels": "uint8, 0 to 255" if pixels == "uint8" else "float32, 0 to 1",
        "boxes": "x1 y1 x2 y2 in pixels of the input",
    }
    return {**values, "producer": "lit_detr"}


def _frames(batch: int, channels: int, size: tuple[int, int], pixels: PixelKind) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (batch, channels, *size), generator=generator, dtype=torch.uint8)
    return values if pixels == "uint8" else values.float() / 255


def _difference(detector: Detector, path: Path, example: Tensor) -> float:
    """Run a file beside the network: the greatest difference of the scores."""
    import onnxruntime  # type: ignore[import-not-found]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Any = session.run(["scores"], {"images": example.numpy()})[0]
    with torch.inference_mode():
        # Best first in both: so queries of equal score, which may change places, do not matter.
        return float(np.abs(found - detector(example)[1].numpy()).max())


def export_main(args: Sequence[str]) -> Path:
    """`lit-detr export`.

    Args:
        args: Command line after the word `export`.

    Returns:
        The file.

    Raises:
        InputError: no such checkpoint, or what `export_onnx` refuses.
    """
    parser = CommandParser(prog="lit-detr export", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, help="best, last (of the newest run in --folder), or a file")
    parser.add_argument("--folder", type=Path, default=Path("logs/detr"), help="of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("model.onnx"), help="file to write (%(default)s)")
    parser.add_argument("--height", type=int, help="of the input; by default as trained")
    parser.add_argument("--width", type=int, help="of the input; by default as trained")
    parser.add_argument("--batch", type=_batch, default=None, help="images per call, or dynamic, the default")
    parser.add_argument("--pixels", default="float32", choices=get_args(PixelKind), help="0 to 1, or 0 to 255")
    parser.add_argument("--opset", type=int, default=LEAST_OPSET, help="version of the operators (%(default)s)")
    o = parser.parse_args(args)
    path = find_checkpoint(o.ckpt_path, o.folder) if o.ckpt_path in ("best", "last") else Path(o.ckpt_path)
    module = _load(path)
    height, width = module.hparams["image_size"]
    size = (height if o.height is None else o.height, width if o.width is None else o.width)
    export_onnx(module, o.out, size=size, batch=o.batch, pixels=o.pixels, opset=o.opset)
    checked = "the same detections as the network" if find_spec("onnxruntime") else "not run: onnxruntime is missing"
    shape = f"({o.batch or 'batch'}, {module.hparams['in_channels']}, {size[0]}, {size[1]})"
    print(f"{o.out}: from {path}, {o.out.stat().st_size / 2**20:.1f} MiB, images {shape} {o.pixels}; {checked}")
    return o.out


def _batch(text: str) -> int | None:
    if text != "dynamic" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected dynamic or a number, got {text}")
    return None if text == "dynamic" else int(text)


def _load(path: Path) -> LitDETR:
    if not path.is_file():
        raise InputError(f"--ckpt_path {path}: no such file")
    try:
        module = LitDETR.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"--ckpt_path {path}: not a checkpoint of lit_detr ({reason:.100})") from error
    return module
