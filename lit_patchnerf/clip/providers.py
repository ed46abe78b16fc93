"""Providers of embeddings, by a text such as `timm:vit_base_patch32_clip_quickgelu_224.openai`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lit_cli.errors import InputError
from lit_patchnerf.clip.files import FileProvider
from lit_patchnerf.clip.towers import OpenClipProvider, TimmProvider, TransformersProvider
from lit_patchnerf.clip.toy import TOY_DIM, ToyProvider

__all__ = ["KINDS", "Provider", "open_provider"]

#: Texts that `open_provider` takes.
KINDS = "file:PATH, timm:NAME, open_clip:NAME/WEIGHTS, transformers:NAME, toy or toy:DIM"


class Provider(Protocol):
    """Encodes pictures and texts into one space.

    A tower that a provider lacks raises an InputError that names the way out. Towers are loaded when they are first
    used, so that a table found in the cache needs neither their package nor their weights.
    """

    @property
    def name(self) -> str:
        """The text that it was opened with."""
        ...

    @property
    def key(self) -> str:
        """Hash of the model's name, its weights and the preprocessing: another key, other embeddings."""
        ...

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit vectors of pictures: uint8 (N, H, W, 3) RGB on any device to float32 (N, D) on the provider's."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of M texts: float32 (M, D) on the provider's device."""
        ...


def open_provider(text: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Provider:
    """The provider that a text names.

    Args:
        text: `file:PATH` for embeddings that were made elsewhere (see `FileProvider`), `timm:NAME` (no texts),
            `open_clip:NAME/WEIGHTS`, `transformers:NAME` with a name of the hub or a local folder, and `toy` or
            `toy:DIM` for colours alone, without any weights.
        weights: A local file of weights for `timm` and `open_clip`; for `transformers` the folder, or a file in it.
        device: That towers run on.

    Raises:
        InputError: there is no such provider, or no such file.

    Example:
        >>> toy = open_provider("toy:24")
        >>> toy.dim, tuple(toy.encode_texts(["red", "dark blue"]).shape)
        (24, (2, 24))
    """
    kind, _, rest = text.partition(":")
    on = torch.device(device)
    if weights is not None and kind not in ("timm", "open_clip", "transformers"):
        raise InputError(f"data.embeddings_weights: {text} has no weights, expected none")
    if weights is not None and not Path(weights).exists():
        raise InputError(f"data.embeddings_weights: no file {weights}, expected the weights of {text}")
    if kind == "toy":
        return ToyProvider(_toy_dim(text, rest), on)
    if rest and kind == "file":
        return FileProvider(Path(rest), on)
    local = Path(weights) if weights is not None else None
    if rest and kind == "timm":
        return TimmProvider(rest, local, on)
    if rest and kind == "open_clip":
        return OpenClipProvider(rest, local, on)
    if rest and kind == "transformers":
        return TransformersProvider(rest, local, on)
    raise InputError(f"data.embeddings is {text!r}, expected one of {KINDS}")


def _toy_dim(text: str, rest: str) -> int:
    if text == "toy":
        return TOY_DIM
    if not rest.isdecimal() or int(rest) < 1:
        raise InputError(f"data.embeddings is {text!r}, expected toy or toy:DIM with a DIM from 1 up")
    return int(rest)
