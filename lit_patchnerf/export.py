"""`lit-patchnerf export`: the decoder as a graph for other runtimes, checked against the network."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_cli.arguments import CommandParser
from lit_cli.errors import InputError
from lit_common.onnx_files import strip_notes
from lit_patchnerf.packing import NeuralVideo, checkpoint_path, compress_main, decode_main, neural_video

__all__ = ["ExportFormat", "Graph", "compress_main", "decode_main", "export_decoder", "export_main", "metadata"]

ExportFormat = Literal["onnx", "torchscript"]

LEAST_OPSET = 18  # what torch.onnx translates to; its conversion to older ones leaves nodes that these do not have
TOLERANCE = 1e-4  # of colours from 0 to 1, between the network and the file: float32 sums in another order
CHECKED = 3  # inputs of the check; another number than the example's, so that a constant batch shows


class Graph(nn.Module):
    """The colours alone, in float32, from a decoder of its own.

    Args:
        video: The network; it stays as it is.
    """

    def __init__(self, video: NeuralVideo) -> None:
        super().__init__()
        net = copy.deepcopy(video.net).cpu().float()
        self.net = net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    def forward(self, where: Tensor) -> Tensor:
        """Decode.

        Args:
            where: (N,) times from 0 to 1 in grid mode, (N, 3) of t, y, x from 0 to 1 in coordinate mode.

        Returns:
            Colours from 0 to 1: frames (N, 3, H, W) of the canvas, or patches (N, 3, h, w).
        """
        return self.net(where).rgb


class _OneByOne(nn.Module):
    """A traced graph has the batch that it was traced with; this loop takes any."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, where: Tensor) -> Tensor:
        return torch.cat([self.one(where[i : i + 1]) for i in range(where.shape[0])])


def export_decoder(
    video: NeuralVideo, path: str | Path, format: ExportFormat = "onnx", *, opset: int = LEAST_OPSET
) -> float:
    """Write the decoder as a graph, and run the file beside the network before it gets its name.

    Its input is `t` (N,) or `tyx` (N, 3), its output `pixels`; see `Graph.forward`. An ONNX file decodes a batch at
    once, TorchScript one after the other.

    Args:
        video: The network and its geometry.
        path: The file; it is replaced as a whole.
        format: Of the file.
        opset: Version of ONNX's operators.

    Returns:
        The greatest difference of a colour, in the range from 0 to 1.

    Raises:
        InputError: with one line: a package is missing, the opset cannot be served, or the file gives other pixels
            than the network.
    """
    if format not in get_args(ExportFormat):
        raise InputError(f"--format: expected one of {', '.join(get_args(ExportFormat))}, got {format}")
    graph, path = Graph(video), Path(path)
    write, run = (_write_onnx, _run_onnx) if format == "onnx" else (_write_torchscript, _run_torchscript)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(graph, temporary, metadata(video), opset)
        difference = _difference(graph, temporary, _example(video, CHECKED), run)
        if not difference <= TOLERANCE:
            raise InputError(
                f"export: pixels of the file differ from the network's by {difference:.2g}, expected at most "
                f"{TOLERANCE:g}; nothing written"
            )
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def metadata(video: NeuralVideo) -> dict[str, str]:
    """What the file says about itself: strings, lists as JSON."""
    grid = video.mode == "grid"
    return {
        "mode": video.mode,
        "input": "t of frames, frame / (frames - 1)" if grid else "t, y, x: frame / (frames - 1), centre of the patch",
        "output": f"{'frames' if grid else 'patches'} (N, 3, h, w), RGB from 0 to 1",
        "frames": str(video.frames),
        "fps": f"{video.fps:g}",
        "geometry": json.dumps(video.geometry.to_dict()),
        "producer": "lit_patchnerf",
    }


def _input_name(example: Tensor) -> str:
    return "t" if example.ndim == 1 else "tyx"


def _example(video: NeuralVideo, count: int) -> Tensor:
    shape = (count,) if video.mode == "grid" else (count, 3)
    return torch.rand(shape, generator=torch.Generator().manual_seed(count))


def _write_onnx(graph: Graph, path: Path, about: dict[str, str], opset: int) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise InputError(f"export: {' and '.join(missing)} not installed: pip install 'lit-vision-tasks[onnx]'")
    import onnx  # type: ignore[import-not-found]

    newest = onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise InputError(f"--opset: expected {LEAST_OPSET} to {newest} with the installed onnx, got {opset}")
    example = torch.rand((2,) if about["mode"] == "grid" else (2, 3))  # a batch of 1 would become a constant
    program = torch.onnx.export(
        graph,
        (example,),
        dynamo=True,
        verbose=False,
        # onnxscript 0.7.2 fuses the clamps of latents' weights to nodes that miss an input; runtimes optimise anyway.
        optimize=False,
        input_names=[_input_name(example)],
        output_names=["pixels"],
        opset_version=opset,
        dynamic_shapes={"where": {0: "batch"}},
    )
    assert program is not None
    model: Any = program.model_proto
    strip_notes(model)
    onnx.helper.set_model_props(model, about)
    onnx.save(model, str(path))
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # of a class of its own
        raise InputError(f"export: ONNX refuses the file, nothing written ({_line(error)})") from error


def _run_onnx(path: Path, example: Tensor) -> Tensor:
    import onnxruntime  # type: ignore[import-not-found]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Any = session.run(["pixels"], {session.get_inputs()[0].name: example.numpy()})[0]
    return torch.from_numpy(found)


def _write_torchscript(graph: Graph, path: Path, about: dict[str, str], opset: int) -> None:
    example = torch.rand((1,) if about["mode"] == "grid" else (1, 3))
    with warnings.catch_warnings():
        # TorchScript is deprecated in favour of torch.export, and the tracer remarks on the batch of 1, which is meant.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, (example,), check_trace=False)
        scripted = torch.jit.script(_OneByOne(traced))  # type: ignore[arg-type]
        torch.jit.save(scripted, str(path), _extra_files={name: text.encode() for name, text in about.items()})


def _run_torchscript(path: Path, example: Tensor) -> Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path))(example)  # type: ignore[no-any-return]


def _difference(graph: Graph, path: Path, example: Tensor, run: Callable[[Path, Tensor], Tensor]) -> float:
    """Run a file beside the network."""
    with torch.inference_mode():
        expected = graph(example)
    try:
        found = run(path, example)
    except Exception as error:  # of the runtimes' own classes
        raise InputError(f"export: the file does not run, nothing written ({_line(error)})") from error
    if found.shape != expected.shape:
        raise InputError(
            f"export: the file gives {tuple(found.shape)}, expected {tuple(expected.shape)}; nothing written"
        )
    return float((found - expected).abs().max())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]


def export_main(args: Sequence[str]) -> Path:
    """`lit-patchnerf export`: the decoder of a checkpoint or an .lpn file as ONNX or TorchScript.

    Args:
        args: Command line after the word `export`.

    Returns:
        The file.

    Raises:
        InputError: no such checkpoint, or what `export_decoder` refuses.
    """
    parser = CommandParser(prog="lit-patchnerf export", description=__doc__)
    parser.add_argument("--ckpt_path", required=True, help="best, last (of the newest run in --folder), or a file")
    parser.add_argument("--folder", type=Path, default=Path("logs/patchnerf"), help="of the runs (%(default)s)")
    parser.add_argument("--format", default="onnx", choices=get_args(ExportFormat), help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (decoder.onnx or decoder.pt)")
    parser.add_argument("--opset", type=int, default=LEAST_OPSET, help="version of ONNX's operators (%(default)s)")
    o = parser.parse_args(args)
    path = checkpoint_path(o.ckpt_path, o.folder)
    out = o.out or Path("decoder.onnx" if o.format == "onnx" else "decoder.pt")
    video = neural_video(path)
    difference = export_decoder(video, out, o.format, opset=o.opset)
    shape = "t (N,) to frames" if video.mode == "grid" else "tyx (N, 3) to patches"
    size = video.geometry.canvas if video.mode == "grid" else video.geometry.patch
    print(f"{out}: from {path}, {out.stat().st_size / 2**20:.1f} MiB, {shape} (N, 3, {size[0]}, {size[1]})")
    print(f"pixels differ from the network's by {difference:.2g} of 1 at most ({TOLERANCE:g} is allowed)")
    return out
