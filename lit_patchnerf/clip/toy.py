"""A toy encoder, no CLIP: it knows colours and edges, and needs no weights. For tests and the demonstration."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TOY_DIM", "ToyProvider"]

TOY_DIM = 32
_VERSION = 1  # raise it when embeddings change: caches are found by it
_SIDE = 16  # colours are counted on a picture of so many pixels a side
_SPREAD = 0.16  # of a colour around its name, in RGB from 0 to 1

_COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.15),
    "green": (0.15, 0.65, 0.2),
    "cyan": (0.2, 0.8, 0.85),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.5, 0.15, 0.65),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.28, 0.12),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.5, 0.5, 0.5),
    "black": (0.05, 0.05, 0.05),
}
_MORE = ("dark", "bright", "edges", "plain")
_WORDS = (*_COLOURS, *_MORE)
_SYNONYMS = {
    "gray": "grey",
    "violet": "purple",
    "magenta": "pink",
    "turquoise": "cyan",
    "light": "bright",
    "striped": "edges",
    "stripes": "edges",
    "checked": "edges",
    "textured": "edges",
    "smooth": "plain",
    "flat": "plain",
}


class ToyProvider:
    """Colour words and pictures in one space, through a fixed random projection.

    A picture is the shares of twelve named colours in it, how dark and how bright it is, and how many edges it has. A
    text is the mean of the words that it knows of these; one that knows none means any colour, which serves as a
    negative. Both go through the same projection, which keeps angles exactly from 16 dimensions on.

    Args:
        dim: Length of an embedding.
        device: That it computes on.

    Example:
        >>> toy = ToyProvider()
        >>> red = torch.tensor([220, 30, 30], dtype=torch.uint8).expand(1, 8, 8, 3)
        >>> cosines = toy.encode_texts(["a red disc", "bright green", "things"]) @ toy.encode_images(red)[0]
        >>> cosines.argmax().item()
        0
    """

    def __init__(self, dim: int = TOY_DIM, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.name = f"toy:{dim}"
        self.key = hashlib.sha256(f"{self.name} {_VERSION}".encode()).hexdigest()[:24]
        matrix = np.random.default_rng(0).standard_normal((max(dim, len(_WORDS)), len(_WORDS)))
        if dim >= len(_WORDS):
            matrix = np.linalg.qr(matrix)[0]  # orthogonal columns: the cosines of the statistics themselves
        self._projection = torch.from_numpy(matrix[:dim]).float().to(device)
        self._palette = torch.tensor(list(_COLOURS.values()), device=device)

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors of pictures: uint8 (N, H, W, 3) to float32 (N, D)."""
        pixels = images.to(self._palette.device).permute(0, 3, 1, 2).float() / 255
        with torch.autocast(pixels.device.type, enabled=False):
            small = F.adaptive_avg_pool2d(pixels, _SIDE).flatten(2).transpose(1, 2)
            distance = (small[:, :, None] - self._palette).square().sum(-1)
            colours = F.softmax(-distance / (2 * _SPREAD**2), -1).mean(1)
            light = small.mean(-1)
            dark, bright = (torch.sigmoid(25 * (0.3 - light)), torch.sigmoid(25 * (light - 0.65)))
            grey = pixels.mean(1)
            edges = (grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))).nan_to_num()
            edges = (4 * edges).clamp(max=1)
            more = torch.stack([dark.mean(1), bright.mean(1), edges, 1 - edges], 1)
            # Colours count most: brightness and edges only tell pictures of the same colours apart.
            return F.normalize(torch.cat([colours, 0.25 * more], 1) @ self._projection.T, dim=1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts: float32 (M, D)."""
        rows = torch.zeros(len(texts), len(_WORDS))
        for row, text in zip(rows, texts, strict=True):
            words = [_SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]
            for word in words:
                if word in _WORDS:
                    row[_WORDS.index(word)] += 1
            if not row.any():
                row[: len(_COLOURS)] = 1
        return F.normalize(rows.to(self._projection.device) @ self._projection.T, dim=1)
