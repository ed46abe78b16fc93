"""Embeddings that were made elsewhere: a table of a video's patches, texts, or both, from one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_cli.errors import InputError
from lit_common.weights import first_line

__all__ = ["FileProvider", "file_hash"]

_LAYOUT = "`embeddings` (T, rows, cols, D), or `texts` and `text_embeddings` (M, D), or all three"


class FileProvider:
    """Embeddings of a `.npy`, `.npz` or `.safetensors` file.

    A `.npy` is the table (T, rows, cols, D). The others name their arrays: `embeddings` for the table, and
    `text_embeddings` (M, D) with `texts`, M strings (in a `.safetensors` a JSON list of them in the metadata). A file
    with texts alone serves queries. All are brought to unit length.

    Args:
        path: The file.
        device: That embeddings are given on.

    Raises:
        InputError: the file cannot be read, or holds none of these.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = path, torch.device(device)
        self.name = f"file:{path}"
        arrays, texts = _read(path)
        table, rows = arrays.get("embeddings"), arrays.get("text_embeddings")
        if table is None and rows is None:
            raise InputError(f"{path}: has {sorted(arrays) or 'nothing'}, expected {_LAYOUT}")
        if table is not None and table.ndim != 4:
            raise InputError(f"{path}: embeddings have shape {tuple(table.shape)}, expected (T, rows, cols, D)")
        if rows is not None and (rows.ndim != 2 or len(rows) != len(texts)):
            raise InputError(
                f"{path}: text_embeddings have shape {tuple(rows.shape)}, expected (M, D) for its {len(texts)} texts"
            )
        if table is not None and rows is not None and table.shape[-1] != rows.shape[-1]:
            raise InputError(
                f"{path}: text_embeddings have {rows.shape[-1]} numbers, expected {table.shape[-1]} as the embeddings"
            )
        self.table = None if table is None else self._unit(table, "embeddings")
        self.texts = list(texts)
        self._rows = None if rows is None else self._unit(rows, "text_embeddings")

    @property
    def key(self) -> str:
        """Hash of the file."""
        return self._key

    @cached_property
    def _key(self) -> str:
        return file_hash(self.path)[:24]

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        known = self.table if self.table is not None else self._rows
        assert known is not None  # the constructor saw to it
        return known.shape[-1]

    def encode_images(self, images: Tensor) -> NoReturn:
        """There is no tower in a file.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.name} cannot encode pictures; expected a provider with an image tower: timm:, open_clip:, "
            "transformers:, toy"
        )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of texts that the file holds, float32 (M, D); capitals and spaces around do not matter.

        Raises:
            InputError: a text is not in the file.
        """
        known = {text.strip().lower(): i for i, text in enumerate(self.texts)}
        at = []
        for text in texts:
            if text.strip().lower() not in known or self._rows is None:
                some = ", ".join(self.texts[:5]) + (" ..." if len(self.texts) > 5 else "")
                raise InputError(f"{self.path}: no embedding of the text {text!r}; expected one of: {some or 'none'}")
            at.append(known[text.strip().lower()])
        if self._rows is None:
            return torch.zeros(0, self.dim, device=self.device)
        return self._rows[at].to(self.device)

    def _unit(self, values: Tensor, field: str) -> Tensor:
        # fp16 of a table stays: a long video's would double.
        if not values.is_floating_point() or not bool(values.isfinite().all()):
            raise InputError(f"{self.path}: {field} have values that are no numbers, expected finite floats")
        kept = values.dtype if values.ndim == 4 and values.dtype == torch.float16 else torch.float32
        return F.normalize(values.float(), dim=-1).to(kept)


def file_hash(path: Path) -> str:
    """Sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected .npy, .npz or .safetensors with {_LAYOUT}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                return found, [str(text) for text in json.loads((file.metadata() or {}).get("texts", "[]"))]
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"embeddings": torch.from_numpy(loaded)}, []
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        texts = [str(text) for text in arrays.pop("texts", [])]
        return {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind in "fiu"}, texts
    except ImportError as error:
        raise InputError(f"{path}: safetensors is missing: pip install 'lit-vision-tasks[safetensors]'") from error
    except Exception as error:  # numpy, zipfile and safetensors each have exceptions of their own
        raise InputError(f"{path}: cannot be read, expected {_LAYOUT} ({first_line(error):.100})") from error
