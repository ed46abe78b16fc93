"""How training calls a network: by the index of a sample, if need be with other parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from lit_patchnerf.compress.quantise import FakeQuantise
from lit_patchnerf.decoding import frame_times
from lit_patchnerf.models import CoordinateDecoder, Decoded, GridDecoder
from lit_patchnerf.patches import patch_coordinates

__all__ = ["Trained"]


class Trained(nn.Module):
    """The network as training calls it: from indices of samples, with rounded parameters in the others' place.

    Args:
        net: The network.
        frames: Of the video.
        grid: (rows, cols) of patches.
        whole: A sample is a frame rather than a patch.

    Attributes:
        rounding: What rounds parameters, by their names; empty until that is trained for.
    """

    def __init__(self, net: CoordinateDecoder | GridDecoder, frames: int, grid: tuple[int, int], whole: bool) -> None:
        super().__init__()
        self.sampled = _Sampled(net, frames, grid, whole)
        self.rounding: dict[str, FakeQuantise] = {}

    def forward(self, index: Tensor, parameters: dict[str, Tensor] | None = None) -> Decoded:
        """(B,) patches or frames to their colours and embeddings."""
        if parameters is None:
            return self.sampled(index)  # type: ignore[no-any-return]
        named = {f"net.{name}": value for name, value in parameters.items()}
        return functional_call(self.sampled, named, (index,))


class _Sampled(nn.Module):
    def __init__(self, net: CoordinateDecoder | GridDecoder, frames: int, grid: tuple[int, int], whole: bool) -> None:
        super().__init__()
        self.net, self.frames, self.grid, self.whole = net, frames, grid, whole

    def forward(self, index: Tensor) -> Decoded:
        if isinstance(self.net, CoordinateDecoder):
            return self.net(patch_coordinates(index, self.frames, self.grid))  # type: ignore[no-any-return]
        if self.whole:
            return self.net(frame_times(index, self.frames))  # type: ignore[no-any-return]
        columns, per_frame = self.grid[1], self.grid[0] * self.grid[1]
        cell = index % per_frame
        times = frame_times((index - cell) // per_frame, self.frames)
        return self.net.forward_patch(times, cell // columns, cell % columns)
