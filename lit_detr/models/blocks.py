"""What the parts of the network are built of, and recomputation in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["BoxHead", "ConvNorm", "FeedForward", "Fusion", "autocasts", "full_precision", "recomputed"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast for what lies within; the meta device knows no autocast."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where this tensor is; the meta device knows none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch normalisations run as in training, but leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.momentum is not None]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def recomputed(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` and compute its activations again in the backward pass.

    The running statistics of batch normalisation see each batch once, as without recomputation; under `torch.compile`,
    which traces no context of ours, they see it twice.

    Args:
        module: Whose batch normalisations the function uses.
        function: Called with the arguments, twice.
        args: Of the function.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)),
    )


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, ReLU.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Odd.
        stride: Of the convolution.
        groups: Of the convolution.
        activate: False leaves the ReLU out.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.activate = activate

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride).

        Args:
            x: The map.
            mask: (B, 1, H, W) bool. Cells outside it count as zero, as if the map ended there.
        """
        if mask is not None and self.conv.kernel_size[0] > 1:
            x = x * mask
        x = self.norm(self.conv(x))
        # In place: the gradient of ReLU needs its output only, and that of the normalisation its input.
        return F.relu(x, inplace=True) if self.activate else x


class Fusion(nn.Module):
    """Two paths of half the width, one of them through 3x3 convolutions, added and projected.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        depth: Number of 3x3 convolutions.

    Source:
        The fusion block of RT-DETR (arXiv 2304.08069) after CSPNet (arXiv 1911.11929), with plain convolutions where
        that has RepVGG's pairs: in training these would be two more kernels each.
    """

    def __init__(self, inputs: int, outputs: int, depth: int = 3) -> None:
        super().__init__()
        self.enter = ConvNorm(inputs, outputs)
        self.steps = nn.ModuleList(ConvNorm(outputs // 2, outputs // 2, 3) for _ in range(depth))
        self.leave = ConvNorm(outputs // 2, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W); `mask` as for `ConvNorm`."""
        straight, deep = self.enter(x).chunk(2, dim=1)
        for step in self.steps:
            deep = step(deep, mask)
        return self.leave(straight + deep)


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))
        for layer in (self[0], self[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class BoxHead(nn.Module):
    """What to move a box by, zero at first.

    The last layer computes in float32: a bfloat16 has 8 bits, and a share of the image wants more.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = FeedForward(hidden, hidden, hidden)
        self.last = nn.Linear(hidden, 4)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to (..., 4) float32."""
        x = F.relu(self.hidden(x), inplace=True)
        with full_precision(x):
            return F.linear(x.float(), self.last.weight.float(), self.last.bias.float())
