"""One training step of a 3-D U-Net: ours beside MONAI's DynUNet and nnU-Net's own step, in one process on one GPU.

The network is PlainConvUNet with six stages in all of them (DynUNet has the same layers), 1 channel in, 2 classes out;
the whole step is timed: loss with deep supervision, backward pass, clipping at norm 12, SGD with Nesterov momentum. The
batch lies on the device. Ours makes the targets of the heads inside the step, from the label; nnU-Net gets them as its
loader delivers them, ready made; MONAI interpolates logits to full size instead. nnU-Net's step compiles network and
Dice; without nnunetv2 its network is measured with MONAI's loss, and the row says so.

`ms` is the median of single steps, `first_s` all that comes before: cuDNN's trials, compilation, capture of graphs.
`allocated_gb` is the peak of the tensors from then on, for a captured graph from its capture on.

    python benchmarks/dsunet_step.py --out benchmarks/results/dsunet_step.json [--only 96,nnU-Net] [--brief] [--tiny]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from common import Results, Row, table
from dsunet_peers import dynunet, monai_loss, nearest_targets, nnunet_loss, plain_conv_unet, version
from steps import DTYPES, Held, clean, compiler, measured, setup, step_options
from torch import Tensor, nn

from lit_common.graph import GraphedStep
from lit_common.optim import fused_sgd
from lit_dsunet.losses import DeepSupervisionLoss, make_loss
from lit_dsunet.models import build_network

FEATURES = (32, 64, 128, 256, 320, 320)
STRIDES = (1, 2, 2, 2, 2, 2)
FORWARD_GFLOP = {96: 402.7, 128: 954.5}  # one patch, multiplication and addition counted apart
COLUMNS = ("side", "batch", "way", "ms", "iqr_ms", "patches_s", "tflop_s", "allocated_gb", "reserved_gb", "first_s")
COMPILE_S = 75  # a compiled row must end before the deadline

Tool = Literal["ours", "DynUNet", "nnU-Net"]
Norm = Literal["instance", "batch", "none"]
Prepared = tuple[Callable[[], None], Callable[[], None], int]


class Way(NamedTuple):
    """A way to train, as ours unless it says otherwise."""

    tool: Tool = "ours"
    precision: str = "bf16"
    compile: bool = False
    graph: bool = False
    channels_last: bool = False  # the layout alone
    kernels: bool = False  # the layout with our kernels between the convolutions
    norm: Norm = "instance"
    mkdc: Literal["off", "naive", "fused"] = "off"
    targets: Literal["soft", "nearest"] = "soft"
    deep_supervision: bool = True

    @property
    def name(self) -> str:
        """All that is not the default, in words."""
        parts = [
            f"{self.tool} {self.precision}",
            "compiled" if self.compile else "eager",
            "CUDA graph" if self.graph else "",
            "channels last" if self.channels_last else "",
            "channels last with kernels" if self.kernels else "",
            {"instance": "", "batch": "batch norm", "none": "no norm"}[self.norm],
            "" if self.mkdc == "off" else f"MKDC {self.mkdc}",
            "" if self.targets == "soft" else f"{self.targets} targets",
            "" if self.deep_supervision else "no deep supervision",
        ]
        return ", ".join(part for part in parts if part)


BRIEF = (
    Way(kernels=True, graph=True),
    Way("nnU-Net", "bf16", compile=True),
    Way("nnU-Net", "fp16", compile=True),
    Way("DynUNet", "bf16", compile=True),
    Way(kernels=True),
    Way(),
)
FULL = (
    *BRIEF,
    *(Way(kernels=True, graph=True, mkdc=mkdc) for mkdc in ("naive", "fused")),
    *(Way(mkdc=mkdc) for mkdc in ("naive", "fused")),
    Way(kernels=True, graph=True, deep_supervision=False),
    Way(kernels=True, graph=True, targets="nearest"),
    Way(kernels=True, graph=True, precision="fp16"),
    Way(graph=True),
    Way(deep_supervision=False),
    *(Way(norm=norm) for norm in ("batch", "none")),
    *(Way(channels_last=True, norm=norm) for norm in ("instance", "batch", "none")),
    Way("nnU-Net", "fp16"),
    *(Way("DynUNet", precision) for precision in ("bf16", "fp16")),
    Way(compile=True),
    Way(compile=True, graph=True),
    Way("DynUNet", "fp16", compile=True),
    *(Way(mkdc=mkdc, compile=True) for mkdc in ("naive", "fused")),
    Way(channels_last=True, compile=True),
)


# ---- one step -------------------------------------------------------------------------------------------------------


def replace_norms(network: nn.Module, norm: Norm) -> None:
    """Put other normalisations in the place of the instance normalisations."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.InstanceNorm3d) and norm != "instance":
                new = nn.BatchNorm3d(child.num_features) if norm == "batch" else nn.Identity()
                setattr(parent, name, new)


def network_and_loss(
    way: Way, x: Tensor, label: Tensor, features: Sequence[int], strides: Sequence[int]
) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor], str | None]:
    """Network, loss, and a remark on what stands in for what."""
    heads = min(4, len(features) - 1)
    if way.tool == "ours":
        network = build_network(
            in_channels=1,
            num_classes=2,
            features=features,
            strides=strides,
            deep_supervision=heads - 1 if way.deep_supervision else 0,
            mkdc="off" if way.mkdc == "off" else "skips",
            mkdc_fused=way.mkdc == "fused",
            channels_last=way.kernels,
        )
        replace_norms(network, way.norm)
        return network, DeepSupervisionLoss(make_loss("dice_ce"), mode=way.targets), None
    if way.tool == "DynUNet":
        return dynunet(1, 2, features, strides), monai_loss(), version("monai")
    network = plain_conv_unet(1, 2, features, strides)
    try:
        loss = nnunet_loss(len(features) - 1, compiler(x.device) if way.compile else None)
    except ModuleNotFoundError:
        base = monai_loss()
        weights = [0.5**i for i in range(len(features) - 2)]
        targets = nearest_targets(label, [(2**i,) * 3 for i in range(len(weights))])

        def stand_in(out: list[Tensor], _: Tensor) -> Tensor:
            parts = zip(weights, out, targets, strict=False)
            return torch.stack([w / sum(weights) * base(o, t[:, 0]) for w, o, t in parts]).sum()

        return network, stand_in, "nnunetv2 is not installed: its network with MONAI's DiceCELoss on each head"
    ready = nearest_targets(label, [(2**i,) * 3 for i in range(len(features) - 1)])
    return network, lambda out, _: loss(out, ready), version("nnunetv2")


def make_step(way: Way, side: int, batch: int, device: torch.device, tiny: bool) -> tuple[Prepared, Row]:
    """Two functions, the first step and each further one, the parameters, and remarks."""
    features, strides = ((2, 4, 4, 4), STRIDES[:4]) if tiny else (FEATURES, STRIDES)
    torch.manual_seed(0)
    x = torch.randn(batch, 1, side, side, side, device=device)
    label = (torch.rand(batch, side, side, side, device=device) < 0.03).to(torch.uint8)
    network, loss, remark = network_and_loss(way, x, label, features, strides)
    network = network.to(device).train()
    if way.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
        x = x.contiguous(memory_format=torch.channels_last_3d)
    forward = compiler(device)(network) if way.compile else network
    trained = [p for p in network.parameters() if p.requires_grad]
    if way.tool == "ours":
        optimizer = fused_sgd(trained, 1e-3, momentum=0.99, weight_decay=3e-5, clips=True)
    else:  # as their trainers build it
        optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=way.precision == "fp16" and device.type == "cuda")  # type: ignore[attr-defined]

    def loss_of(image: Tensor, target: Tensor) -> Tensor:
        return loss(forward(image), target)

    def step(loss_function: Callable[..., Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, DTYPES[way.precision], enabled=way.precision != "fp32"):
            value = loss_function(x, label)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 12)
        scaler.step(optimizer)
        scaler.update()

    # The first step is never captured: cuDNN's trials and the compiler's must not be part of a graph.
    repeated = GraphedStep(loss_of, network) if way.graph and device.type == "cuda" else loss_of
    count = sum(p.numel() for p in network.parameters())
    return (lambda: step(loss_of), lambda: step(repeated), count), {"remark": remark} if remark else {}


def run(way: Way, side: int, batch: int, device: torch.device, tiny: bool) -> Row:
    """A row's values."""
    clean()
    held = Held.now()
    (first, step, parameters), remarks = make_step(way, side, batch, device, tiny)
    row = measured(first, step, device, tiny, held=held)
    rate = 1000 * batch / row["ms"]
    row |= {"patches_s": round(rate, 2), "params_m": round(parameters / 1e6, 2), **remarks}
    if side in FORWARD_GFLOP and way.mkdc == "off":
        row["tflop_s"] = round(rate * 3 * FORWARD_GFLOP[side] / 1000, 1)
    return row


# ---- all of them ----------------------------------------------------------------------------------------------------


def relative(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed and memory over those of the fastest peer of the same size."""
    out = []
    for row in rows:
        peers = [r for r in rows if r.get("ms") and r["tool"] != "ours" and _size(r) == _size(row)]
        best = min(peers, key=lambda r: r["ms"], default=None)
        if best is None or not row.get("ms"):
            out.append(row)
            continue
        memory = row["allocated_gb"] / best["allocated_gb"] if best.get("allocated_gb") else None
        out.append({**row, "x peer": best["ms"] / row["ms"], "x memory": memory})
    return out


def _size(row: Row) -> tuple[int, int]:
    return row["side"], row["batch"]


def main(args: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    options = step_options(__doc__, "dsunet_step", "SIDE bBATCH WAY", args)
    device = setup()
    results = Results(options.out)
    sizes, others = (((16, 2),), ()) if options.tiny else (((96, 8), (128, 2)), ((96, 2), (128, 8)))
    # What matters most comes first: the brief list for every size, then what each part costs at two of them.
    plan = [(way, size) for size in (*sizes, *others) for way in BRIEF]
    plan += [] if options.brief else [(way, size) for size in sizes for way in FULL if way not in BRIEF]
    words = [word for word in options.only.split(",") if word]
    for way, (side, batch) in plan:
        key = {"side": side, "batch": batch, "way": way.name}
        if not all(word in f"{side} b{batch} {way.name}" for word in words) or results.get(**key) is not None:
            continue
        if way.graph and device.type != "cuda":
            continue
        if time.time() + (COMPILE_S if way.compile else 15) * (not options.tiny) > options.deadline:
            continue
        begin = time.perf_counter()
        try:
            row = run(way, side, batch, device, options.tiny)
        except Exception as error:  # a peer that fails is a result
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        row = {"tool": way.tool, **way._asdict(), **row, "wall_s": round(time.perf_counter() - begin, 1)}
        results.add(key, row)
        print(f"{side}^3 b{batch} {way.name}: {row.get('error') or row['ms']} ms ({row['wall_s']} s)", flush=True)
    clean()
    print(table(relative(results.rows), (*COLUMNS, "x peer", "x memory")))


if __name__ == "__main__":
    main()
