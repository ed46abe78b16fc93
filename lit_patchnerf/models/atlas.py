"""A learned picture of the scene that a camera moves over: detail that stays the same is stored once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_patchnerf.models.blocks import Window, without_autocast

__all__ = ["Atlas", "CameraPath", "atlas_size"]

ATLAS_STD = 0.1  # of what is seen at the start
# What is seen, over what is stored. Adam's steps do not depend on it, so that an atlas learns as with so many times the
# rate: each place is seen once in a frame, where a kernel is at work everywhere.
GAIN = 5.0


class CameraPath(nn.Module):
    """Where the camera looks: two shifts and a zoom at evenly spaced points in time, linear in between.

    They are vectors, so that no optimizer takes them for matrices and a compressed file keeps them at 16 bits.

    Args:
        points: In time, the first at t = 0 and the last at t = 1.

    Example:
        >>> path = CameraPath(2)
        >>> _ = path.down.data.copy_(torch.tensor([0.0, 0.5]))
        >>> path(torch.tensor([0.0, 0.5, 1.0]))[0].tolist()
        [0.0, 0.25, 0.5]
    """

    def __init__(self, points: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(points))
        self.right = nn.Parameter(torch.zeros(points))
        self.zoom = nn.Parameter(torch.zeros(points))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) from 0 to 1 to (N,) shifts down and right, in halves of the frame, and logarithms of the zoom."""
        with without_autocast(t):
            places = t.to(self.down.dtype).clamp(0, 1) * (len(self.down) - 1)
            weights = (1 - (places[:, None] - torch.arange(len(self.down), device=t.device)).abs()).relu()
            down, right, zoom = ((weights * x).sum(dim=1) for x in (self.down, self.right, self.zoom))
        return down, right, zoom


class Atlas(nn.Module):
    """Learned maps that reach beyond the frame, looked at through a camera: bilinear, at each position of a map.

    A shift and a zoom move rows and columns apart from each other, so that looking is two products with matrices, whose
    gradient is the same in every run. Beyond its border the atlas goes on with the values there.

    Args:
        channels: Of the learned maps.
        outputs: Of the map that it is added to.
        size: Rows and columns of that map for a whole frame.
        margin: How much higher and wider than the frame the atlas is, as a share.
        scale: Places of the atlas for each position of the map, along rows and along columns.

    Source:
        The idea is that of Layered Neural Atlases (arXiv 2109.11418), here of one layer, with a grid in place of an
        MLP, and a camera in place of a mapping of each pixel.

    Example:
        >>> atlas = Atlas(1, 1, (2, 2))
        >>> _ = atlas.values.data.copy_(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]) / GAIN), atlas.mix.weight.data.fill_(1)
        >>> right = torch.tensor([0.5])  # a quarter of the frame: half a position
        >>> atlas((torch.zeros(1), right, torch.zeros(1)), torch.zeros(1, 1, 2, 2)).flatten().tolist()
        [0.5, 1.0, 2.5, 3.0]
    """

    def __init__(
        self, channels: int, outputs: int, size: tuple[int, int], margin: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.size, self.scale = size, scale
        self.values = nn.Parameter(ATLAS_STD / GAIN * torch.randn(channels, *atlas_size(size, margin, scale)))
        self.mix = nn.Linear(channels, outputs, bias=False)

    def forward(self, camera: tuple[Tensor, Tensor, Tensor], x: Tensor, window: Window | None = None) -> Tensor:
        """What is seen at the positions of a map.

        Args:
            camera: As a `CameraPath` gives it.
            x: (N, outputs, h, w), a whole map or part of one.
            window: Which part.

        Returns:
            (N, outputs, h, w) to be added.
        """
        down, right, zoom = camera
        with without_autocast(x):
            rows = self._weights(x.shape[2], 0, down, zoom, None if window is None else window.top)
            columns = self._weights(x.shape[3], 1, right, zoom, None if window is None else window.left)
            seen = rows[:, None] @ (GAIN * self.values @ columns.mT[:, None])
        # With channels last, as the map is that it is added to: reading the other order would cost more than this.
        return self.mix(seen.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _weights(self, count: int, axis: int, shift: Tensor, zoom: Tensor, first: Tensor | None) -> Tensor:
        """(N, count, rows or columns of the atlas): how much of each is seen at each position."""
        size, extent = self.size[axis], self.values.shape[1 + axis]
        positions = torch.arange(count, device=shift.device) + (0 if first is None else first[:, None])
        centred = (positions + 0.5) / (size / 2) - 1  # -1 to 1 across the frame
        looked = centred * (-zoom).exp()[:, None] + shift[:, None]
        places = (looked * (size * self.scale / 2) + (extent - 1) / 2).clamp(0, extent - 1)
        # A hat's derivative is 0 at its tip, where all positions of a camera at rest lie: so the slope to the right.
        before = places.detach().floor()
        share = (places - before)[:, :, None]
        distance = torch.arange(extent, device=shift.device) - before[:, :, None]
        return (distance == 0) * (1 - share) + (distance == 1) * share


def atlas_size(size: tuple[int, int], margin: float, scale: float = 1.0) -> tuple[int, int]:
    """Rows and columns of an atlas; it exceeds the frame by as much on either side.

    >>> atlas_size((160, 320), 0.15), atlas_size((160, 320), 0.15, 0.5)
    ((184, 368), (92, 184))
    """
    rows, columns = (max(1, round(n * scale)) + 2 * round(n * scale * margin / 2) for n in size)
    return rows, columns
