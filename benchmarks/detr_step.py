"""One training step of a detection transformer: ours beside RT-DETRv2 and RF-DETR, in one process on one GPU.

The whole step is timed on batches that lie on the device, with sparse to dense images: network, denoising, matching on
the host, losses, backward pass, clipping at norm 0.1, fused AdamW, bfloat16. Ours and RT-DETRv2 have a ResNet-18 whose
stem is three small convolutions, RF-DETR Nano is a small ViT; all weights are random. RT-DETRv2 is measured as it is
and with channels last, RF-DETR as it is, with its own CUDA graphs and with its own recipe for compilation. Ours takes
as many queries as its budget says (300, and 750 for 500 boxes); a row with 300 queries throughout is what the peers are
compared with, and a peer with as many queries as ours stands beside it.

`ms` is the median of single steps, `first_s` all that comes before: cuDNN's trials, compilation, capture of graphs.
`allocated_gb` is the peak of the tensors from then on, for a captured graph from its capture on, less `held_gb`, which
earlier rows have not given back.

    python benchmarks/detr_step.py --out benchmarks/results/detr_step.json [--only 640,ours] [--brief] [--tiny]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from common import Results, Row, table
from detr_peers import random_boxes, rfdetr_nano, rtdetr_v2
from steps import Held, clean, measured, setup, step_options
from torch import Tensor, nn

from lit_common.graph import GraphedCall
from lit_common.optim import fused_adamw
from lit_detr.losses import DetectionLoss
from lit_detr.matching import Matcher
from lit_detr.models import CORES, build_network, query_budget
from lit_detr.module import widened
from lit_detr.samples import Output, Targets, pack_targets

CLASSES = 4
COLUMNS = ("px", "batch", "boxes", "way", "ms", "iqr_ms", "images_s", "allocated_gb", "reserved_gb", "first_s")
COMPILE_S = 180  # a compiled row must end before the deadline

Prepared = tuple[Callable[[], None], Callable[[], None], float]


class Way(NamedTuple):
    """A way to train, as ours unless it says otherwise."""

    tool: Literal["ours", "RT-DETRv2", "RF-DETR"] = "ours"
    graph: bool = False
    compile: bool = False
    channels_last: bool = False
    fine: bool = False  # a level of stride 4
    queries: int | None = None  # by the number of boxes
    core: str = "auto"
    noise: int = 100
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """All that is not the default, in words."""
        parts = [
            self.tool,
            "compiled" if self.compile else "",
            "CUDA graph" if self.graph else "",
            "channels last" if self.channels_last else "",
            "stride 4" if self.fine else "",
            "" if self.queries is None else f"{self.queries} queries",
            "" if self.core == "auto" else f"core {self.core}",
            "" if self.noise == 100 else f"{self.noise} denoising queries",
            "recomputation" if self.checkpointing else "",
        ]
        return ", ".join(part for part in parts if part)


FAST = Way(graph=True, channels_last=True)
BRIEF = (
    FAST,
    FAST._replace(queries=300),
    FAST._replace(fine=True),
    Way(channels_last=True),
    Way("RT-DETRv2", channels_last=True, queries=300),
    Way("RT-DETRv2", queries=300),
    Way("RF-DETR", graph=True, queries=300),
    Way("RF-DETR", queries=300),
)
FULL = (
    *BRIEF,
    Way(),
    Way(graph=True),
    Way(channels_last=True, compile=True),
    FAST._replace(compile=True),
    *(FAST._replace(core=core) for core in CORES if core not in ("auto", "gather")),
    *(FAST._replace(noise=noise) for noise in (0, 200)),
    Way(channels_last=True, checkpointing=True),
    Way("RT-DETRv2", channels_last=True, queries=750),
    Way("RF-DETR", compile=True, queries=300),
)
# Side, batch, boxes an image: what matters most first. 20 and 500 boxes show how memory grows.
SIZES = ((640, 16, 25), (640, 16, 100), (640, 16, 500), (320, 32, 2), (640, 16, 20), (320, 32, 25))


# ---- one step -------------------------------------------------------------------------------------------------------


def batch_of(side: int, batch: int, boxes: int, device: torch.device) -> tuple[Tensor, Targets]:
    """Noise with boxes of 1 to 5 % of its side."""
    torch.manual_seed(0)
    drawn = [random_boxes(boxes, i, CLASSES) for i in range(batch)]
    targets = pack_targets([own.boxes for own in drawn], [own.labels for own in drawn]).to(device)
    return torch.rand(batch, 3, side, side, device=device), targets


def our_loss(
    way: Way, images: Tensor, targets: Targets, tiny: bool
) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], Tensor]]:
    """Network, an eager step and the one to be timed."""
    small: dict[str, Any] = {"hidden": 32, "heads": 4, "feedforward": 32} if tiny else {}
    network = build_network(
        num_classes=CLASSES,
        backbone="resnet10t" if tiny else "resnet18d",  # with a deep stem, as RT-DETRv2 has it
        strides=(4, 8, 16, 32) if way.fine else (8, 16, 32),
        channels_last=way.channels_last,
        noise_queries=way.noise,
        core=way.core,  # type: ignore[arg-type]
        gradient_checkpointing=way.checkpointing,
        **small,
    )
    network = network.to(images.device).train()
    criterion = DetectionLoss(Matcher()).train()
    queries = way.queries or query_budget(targets.counts)
    if way.compile:
        options: dict[str, Any] = {} if images.device.type == "cuda" else {"backend": "eager"}
        network.compile(dynamic=False, **options)
        criterion.compile_parts(**options)

    def outputs(image: Tensor, boxes: Tensor, labels: Tensor, lengths: Tensor, queries: int) -> tuple[Tensor, ...]:
        return tuple(x for x in network(image, None, Targets(boxes, labels, lengths, []), queries) if x is not None)

    def loss_of(call: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        wide = widened(targets)
        found = Output(*call(images, wide.boxes, wide.labels, wide.lengths, queries=queries))
        return criterion(found, targets, (images.shape[-2], images.shape[-1]))["loss"]

    graphed = GraphedCall(outputs, network) if way.graph and images.device.type == "cuda" else outputs
    return network, lambda: loss_of(outputs), lambda: loss_of(graphed)


def make_step(way: Way, side: int, batch: int, boxes: int, device: torch.device, tiny: bool) -> tuple[Prepared, Row]:
    """Two functions, the first step and each further one, the parameters in millions, and remarks."""
    images, targets = batch_of(side, batch, boxes, device)
    remarks: Row = {}
    if way.tool == "ours":
        network, first, repeated = our_loss(way, images, targets, tiny)
    else:
        if way.tool == "RT-DETRv2":
            peer: Any = rtdetr_v2(CLASSES, side, way.queries or 300, channels_last=way.channels_last)
        else:
            mode = "graphs" if way.graph else "compile" if way.compile else "eager"
            peer = rfdetr_nano(CLASSES, side, mode, device)
        network = peer.to(device).train()
        remarks["remark"] = peer.version

        def repeated() -> Tensor:
            return peer.loss(images, targets)

        first = repeated
    trained = [p for p in network.parameters() if p.requires_grad]
    if way.tool == "ours":
        optimizer: torch.optim.Optimizer = fused_adamw(trained, 1e-5, clips=True)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4, fused=device.type == "cuda")

    def step(loss_function: Callable[[], Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_function()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    millions = round(sum(p.numel() for p in trained) / 1e6, 2)
    # The first step is never captured: cuDNN's trials and the compiler's must not be part of a graph.
    return (lambda: step(first), lambda: step(repeated), millions), remarks


def run(way: Way, side: int, batch: int, boxes: int, device: torch.device, tiny: bool) -> Row:
    """A row's values."""
    clean()
    held = Held.now()
    (first, step, millions), remarks = make_step(way, side, batch, boxes, device, tiny)
    captures = way.graph and way.tool == "RF-DETR"  # in its first step
    row = measured(first, step, device, tiny, held=held, from_first=captures)
    return row | {"images_s": round(1000 * batch / row["ms"], 1), "params_m": millions, **remarks}


# ---- all of them ----------------------------------------------------------------------------------------------------


def relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed and memory over those of the fastest peer with 300 queries at the same size."""
    out = []
    for row in rows:
        same = [r for r in rows if r.get("ms") and _size(r) == _size(row)]
        best = min(
            (r for r in same if r["tool"] != "ours" and r["queries"] == 300), key=lambda r: r["ms"], default=None
        )
        if best is None or not row.get("ms"):
            out.append(row)
            continue
        memory = row["allocated_gb"] / best["allocated_gb"] if best.get("allocated_gb") else None
        out.append({**row, "x peer": best["ms"] / row["ms"], "x memory": memory})
    return out


def _size(row: Row) -> tuple[int, int, int]:
    return row["px"], row["batch"], row["boxes"]


def plan(brief: bool, tiny: bool) -> list[tuple[Way, tuple[int, int, int]]]:
    """Ways and sizes; what each part brings at the first size and at the densest."""
    if tiny:
        return [(way, (128, 2, 3)) for way in (BRIEF if brief else FULL)]
    rows = [(way, size) for size in SIZES for way in BRIEF]
    return rows if brief else rows + [(way, SIZES[i]) for i in (0, 2) for way in FULL if way not in BRIEF]


def main(args: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    options = step_options(__doc__, "detr_step", "PX bBATCH BOXES boxes WAY", args)
    device = setup()
    results = Results(options.out)
    words = [word for word in options.only.split(",") if word]
    for way, (px, batch, boxes) in plan(options.brief, options.tiny):
        key = {"px": px, "batch": batch, "boxes": boxes, "way": way.name}
        label = f"{px} b{batch} {boxes} boxes {way.name}"
        if not all(word in label for word in words) or results.get(**key) is not None:
            continue
        if way.graph and device.type != "cuda":
            continue
        if time.time() + (COMPILE_S if way.compile else 20) * (not options.tiny) > options.deadline:
            continue
        begin = time.perf_counter()
        try:
            row = run(way, px, batch, boxes, device, options.tiny)
        except Exception as error:  # a peer that fails is a result
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        row = {**way._asdict(), **row, "wall_s": round(time.perf_counter() - begin, 1)}
        results.add(key, row)
        print(f"{label}: {row.get('error') or row['ms']} ms ({row['wall_s']} s)", flush=True)
    clean()
    print(table(relative(results.rows), (*COLUMNS, "x peer", "x memory")))


if __name__ == "__main__":
    main()
