"""One file for one video: `.lpn`, with every byte accounted for and every byte checked.

Layout, little-endian:

* 8 bytes `_MAGIC`, the version (16 bits), the length of the packed header (32 bits) and a CRC32 of these bytes and the
  header (32 bits);
* the header, JSON packed with zlib: `config` and `geometry` of the caller, `tensors` (name, shape, type, bits, where
  its bytes begin) and `sections` (part, kind, length, CRC32);
* the sections one after the other: entropy-coded codes, pairs of minimum and scale, raw tensors;
* a SHA-256 of all that precedes it.

A section belongs to a part, such as `weights` or `latents`, so that the report says what each costs. Within a part,
tensors of equal bits share a table of frequencies where that is smaller.

Reading needs numpy and torch, nothing that trains; `load_module` takes the function that builds the network.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lit_cli.errors import InputError
from lit_patchnerf.compress import entropy
from lit_patchnerf.compress.quantise import Quantised, State, dequantise_state

__all__ = ["VERSION", "Container", "SizeReport", "load_module", "read_container", "size_report", "write_container"]

VERSION = 1
_MAGIC = b"\x89LPN\r\n\x1a\n"  # as in PNG: a transfer that rewrites line ends or drops the eighth bit breaks it
_PREFIX = struct.Struct("<8sHI")
_CRC = struct.Struct("<I")
_DIGEST = 32
_HEADER_LIMIT = 64 * 2**20  # an unpacked header beyond this is no header
_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}
_PAIRS = {True: "float16", False: "float32"}


class SizeReport(NamedTuple):
    """Bytes of a file by part.

    Attributes:
        parts: Bytes by part: `header` (with its packing and the checksums), `tables` (frequencies and the headers of
            their streams), `scales` (minimum and scale), then the parts of the caller.
        total: Their sum, the length of the file.
        numbers: Elements of all tensors.
    """

    parts: dict[str, int]
    total: int
    numbers: int

    @property
    def bits_per_number(self) -> float:
        """Bits of the file for each element of its tensors."""
        return 8 * self.total / max(self.numbers, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Container:
    """What a file holds.

    Attributes:
        config: Of the network, as the caller gave it.
        geometry: Of the video: its size, crop, frames a second and the like.
        state: Tensors by name, codes as `Quantised`.
        sizes: Bytes by part.
    """

    config: dict[str, Any]
    geometry: dict[str, Any]
    state: dict[str, Quantised | Tensor]
    sizes: SizeReport

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for `load_state_dict`; every floating one is float32."""
        return dequantise_state(self.state)


def write_container(
    path: str | Path,
    state: State,
    config: Mapping[str, Any],
    geometry: Mapping[str, Any] | None = None,
    parts: Mapping[str, str] | None = None,
) -> SizeReport:
    """Write a file; it appears under its name only when it is whole.

    Args:
        path: The file; its folder is made.
        state: Tensors by name, as `quantise_state` gives them.
        config: What builds the network, values that JSON can hold; tuples come back as lists.
        geometry: What the frames need beside the network, values that JSON can hold.
        parts: The part of a tensor by patterns of its name as of a shell, the first that fits: `{"latents*":
            "latents"}`. Without one it is `weights`.

    Returns:
        The bytes by part.

    Raises:
        InputError: config or geometry that JSON cannot hold unchanged, a tensor of a type that the file has no name
            for, or a file that cannot be written.

    Example:
        >>> from lit_patchnerf.compress.quantise import quantise_state
        >>> path = Path(tempfile.mkdtemp()) / "clip.lpn"
        >>> state = quantise_state({"stem": torch.linspace(-1, 1, 4096).reshape(64, 64)}, bits=6)
        >>> sizes = write_container(path, state, {"fc_dim": 64})
        >>> sizes.total == path.stat().st_size, read_container(path).config
        (True, {'fc_dim': 64})
    """
    path = Path(path)
    data = _Writer(state, dict(parts or {})).file(_plain("config", config), _plain("geometry", geometry or {}))
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp gives it to one user alone
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return _read(data, str(path))[1]


def read_container(path: str | Path) -> Container:
    """Read and check a file.

    Raises:
        InputError: no such file, another format or version, cut short, or a byte that differs from what was written.
    """
    data = _bytes(path)
    header, sizes = _read(data, str(path))
    try:
        state = _tensors(header, memoryview(data)[:-_DIGEST])
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        # The checksums hold, so some other program wrote this.
        raise InputError(f"{path}: tensors that do not fit their header ({error})") from error
    return Container(header["config"], header["geometry"], state, sizes)


def size_report(path: str | Path) -> SizeReport:
    """Bytes of a file by part; it is checked but not decoded.

    Raises:
        InputError: as `read_container`.
    """
    return _read(_bytes(path), str(path))[1]


def load_module(path: str | Path, build: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, Container]:
    """The network of a file, in evaluation mode, and the file.

    Args:
        path: The file.
        build: Makes the network of `config`.

    Raises:
        InputError: as `read_container`, or tensors that are not those of the network.
    """
    content = read_container(path)
    network = build(content.config)
    own, found = network.state_dict(), content.state_dict()
    for name in sorted(set(own) ^ set(found)):
        where = "lacks" if name in own else "has beyond its config"
        raise InputError(f"{path}: {where} the tensor {name}; expected those of the network that its config describes")
    for name, x in own.items():
        if x.shape != found[name].shape:
            raise InputError(f"{path}: {name} is {tuple(found[name].shape)}, expected {tuple(x.shape)} by its config")
    network.load_state_dict(found)
    return network.eval(), content


class _Writer:
    """Collects the sections of a file."""

    def __init__(self, state: State, parts: dict[str, str]) -> None:
        self.state = state
        self.payload: list[bytes] = []
        self.sections: list[dict[str, Any]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        coded: dict[tuple[str, int], list[str]] = {}
        raw: dict[str, list[str]] = {}
        for name, x in state.items():
            part = next((p for pattern, p in parts.items() if fnmatchcase(name, pattern)), "weights")
            if part in ("header", "tables", "scales"):
                raise InputError(f"parts: {part} is a name of the file's own; expected another for {name}")
            if isinstance(x, Quantised):
                coded.setdefault((part, x.bits), []).append(name)
            else:
                raw.setdefault(part, []).append(name)
        for (part, bits), names in coded.items():
            self.codes(part, bits, names)
        self.pairs([name for names in coded.values() for name in names])
        for part, names in raw.items():
            self.raw(part, names)

    def codes(self, part: str, bits: int, names: list[str]) -> None:
        """Codes of tensors of equal bits, in groups that share a table."""
        codes = {name: self.quantised(name).codes.cpu().numpy().reshape(-1) for name in names}
        folded = max(0, bits - 10)  # which tensors are alike shows in the high bits, and a short histogram is fast
        groups = entropy.merge_groups([entropy.histogram(c >> folded, bits - folded) for c in codes.values()])
        for group in groups:
            members, at = [names[i] for i in group], 0
            for name in members:
                q = self.quantised(name)
                self.tensors[name] = {"shape": list(q.codes.shape), "bits": bits, "section": len(self.sections)}
                self.tensors[name] |= {"offset": at, "pairs": list(q.scale.shape), "pair_type": _PAIRS[q.half]}
                at += q.codes.numel()
            stream = entropy.encode(np.concatenate([codes[name] for name in members]), bits)
            self.add(part, "codes", stream.data, table=stream.table_bytes)

    def pairs(self, names: list[str]) -> None:
        """Minimum and scale of all tensors, by the place of a byte."""
        blocks, at = [], 0
        for name in names:
            q, entry = self.quantised(name), self.tensors[name]
            kind = _TYPES[entry["pair_type"]]
            entry["pair_offset"], entry["pair_section"] = at, len(self.sections)
            blocks.append(_raw_bytes(torch.stack([q.minimum.to(kind), q.scale.to(kind)])))
            at += len(blocks[-1])
        if names:
            self.add("scales", "pairs", b"".join(blocks))

    def raw(self, part: str, names: list[str]) -> None:
        """Tensors as they are."""
        blocks, at = [], 0
        for name in names:
            x = self.state[name]
            assert isinstance(x, Tensor)
            if x.dtype not in _NAMES:
                raise InputError(f"{name}: no such type in the file as {x.dtype}; expected one of {', '.join(_TYPES)}")
            self.tensors[name] = {"shape": list(x.shape), "type": _NAMES[x.dtype]}
            self.tensors[name] |= {"section": len(self.sections), "offset": at}
            blocks.append(_raw_bytes(x))
            at += len(blocks[-1])
        self.add(part, "raw", b"".join(blocks))

    def add(self, part: str, kind: str, data: bytes, table: int = 0) -> None:
        """Append a section."""
        self.sections.append(
            {"part": part, "kind": kind, "bytes": len(data), "table": table, "crc32": zlib.crc32(data)}
        )
        self.payload.append(data)

    def file(self, config: dict[str, Any], geometry: dict[str, Any]) -> bytes:
        """The bytes of the file."""
        tensors = [{"name": name, **self.tensors[name]} for name in self.state]
        header = {"config": config, "geometry": geometry, "sections": self.sections, "tensors": tensors}
        packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
        prefix = _PREFIX.pack(_MAGIC, VERSION, len(packed))
        body = b"".join([prefix, _CRC.pack(zlib.crc32(packed, zlib.crc32(prefix))), packed, *self.payload])
        return body + hashlib.sha256(body).digest()

    def quantised(self, name: str) -> Quantised:
        """A tensor that is known to be codes."""
        q = self.state[name]
        assert isinstance(q, Quantised)
        return q


def _plain(field: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as JSON will give it back, refused if that is not what it was."""
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field}: expected numbers, text, lists and mappings that JSON can hold ({error})") from error
    back = json.loads(text)
    for key in value:
        if key not in back:
            raise InputError(f"{field}: expected text as keys, got {key!r}")
    return back


def _raw_bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read(data: bytes, path: str) -> tuple[dict[str, Any], SizeReport]:
    """The header of a file whose every byte has been checked, and its bytes by part."""
    start = _PREFIX.size + _CRC.size
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise InputError(f"{path}: not an .lpn file (its first bytes are others)")
    if len(data) < start + _DIGEST:
        raise InputError(f"{path}: cut short, {len(data)} bytes; expected at least {start + _DIGEST}")
    _, version, packed_bytes = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise InputError(f"{path}: version {version} of the format; expected {VERSION}")
    packed = data[start : start + packed_bytes]
    if zlib.crc32(packed, zlib.crc32(data[: _PREFIX.size])) != _CRC.unpack_from(data, _PREFIX.size)[0]:
        raise InputError(f"{path}: damaged or cut short in its header (CRC32)")
    header = _header(packed, path)
    sizes = {"header": start + packed_bytes + _DIGEST, "tables": 0, "scales": 0}
    at = start + packed_bytes
    expected = at + sum(s["bytes"] for s in header["sections"]) + _DIGEST
    if len(data) != expected:
        kind = "cut short" if len(data) < expected else "longer than it was written"
        raise InputError(f"{path}: {kind}, {len(data)} bytes; expected {expected}")
    for i, section in enumerate(header["sections"]):
        section["at"] = at
        at += section["bytes"]
        if zlib.crc32(data[section["at"] : at]) != section["crc32"]:
            raise InputError(f"{path}: damaged in section {i}, {section['part']} (CRC32)")
        sizes["tables"] += section["table"]
        sizes[section["part"]] = sizes.get(section["part"], 0) + section["bytes"] - section["table"]
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise InputError(f"{path}: damaged (SHA-256)")
    return header, SizeReport(sizes, len(data), sum(math.prod(t["shape"]) for t in header["tensors"]))


def _header(packed: bytes, path: str) -> dict[str, Any]:
    """The unpacked header, of the form that reading relies on."""
    try:
        unpacker = zlib.decompressobj()
        header = json.loads(unpacker.decompress(packed, _HEADER_LIMIT))
        sections_fit = all(
            isinstance(s["part"], str) and min(s["bytes"], s["bytes"] - s["table"], s["crc32"]) >= 0
            for s in header["sections"]
        )
        if not sections_fit or not isinstance(header["config"], dict) or not isinstance(header["geometry"], dict):
            raise ValueError("a field of the wrong kind")
        [(t["name"], math.prod(t["shape"]), t["section"]) for t in header["tensors"]]
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise InputError(f"{path}: a header that this version cannot read ({error})") from error
    return header


def _tensors(header: dict[str, Any], data: memoryview) -> dict[str, Quantised | Tensor]:
    """The tensors, each stream decoded once."""
    sections = [data[s["at"] : s["at"] + s["bytes"]] for s in header["sections"]]
    counts = [0] * len(sections)
    for entry in header["tensors"]:
        counts[entry["section"]] += math.prod(entry["shape"])
    coded = [i for i, section in enumerate(header["sections"]) if section["kind"] == "codes"]
    decoded = {i: entropy.decode(sections[i], counts[i]) for i in coded}
    state: dict[str, Quantised | Tensor] = {}
    for entry in header["tensors"]:
        shape, at = tuple(entry["shape"]), entry["offset"]
        if "type" in entry:
            state[entry["name"]] = _tensor(sections[entry["section"]], at, shape, entry["type"])
            continue
        codes = decoded[entry["section"]][at : at + math.prod(shape)].reshape(shape)
        pairs = _tensor(sections[entry["pair_section"]], entry["pair_offset"], (2, *entry["pairs"]), entry["pair_type"])
        bits, half = int(entry["bits"]), entry["pair_type"] == _PAIRS[True]
        whole = torch.from_numpy(codes.astype(np.uint8 if bits <= 8 else np.int32))
        state[entry["name"]] = Quantised(whole, pairs[0].float(), pairs[1].float(), bits, half)
    return state


def _tensor(data: memoryview, at: int, shape: tuple[int, ...], kind: str) -> Tensor:
    """A tensor of raw bytes; its own memory, as the file's is read-only."""
    count, dtype = math.prod(shape), _TYPES[kind]
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[at : at + count * dtype.itemsize]), dtype=dtype, count=count).reshape(shape)
