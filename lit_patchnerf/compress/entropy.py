"""Entropy coder: whole numbers of 1 to 16 bits to bytes and back, exactly, in numpy alone.

The coder is rANS (range asymmetric numeral systems) with a static table of frequencies in the stream. It runs in many
lanes at once: symbol i belongs to lane i mod lanes, and one step of numpy moves every lane by one symbol. Millions of
symbols take well under a second that way, though nothing here is compiled.

`constriction` (MIT, Apache-2.0 or BSL-1.0; maintained, with wheels) codes as tightly and faster. It is not used: its
bytes would tie every file to one package with one maintainer, while this coder is two short loops, has its format
written below and is no bottleneck beside the decoding of frames. What it loses against the entropy is under 1 %.

The low bits of wide codes are close to noise and a table of them would cost more than it saves. A stream therefore
models the high bits and stores the rest as they are; how many is chosen by the size that results. All of them as they
are is one of the choices, so no stream is much longer than the packed codes.

Stream, little-endian: a header (`_HEADER`), the table, one 64-bit state for each lane, 32-bit words in the order in
which the decoder takes them, the unmodelled low bits packed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stream", "decode", "encode", "entropy_bits", "histogram", "merge_groups"]

_HEADER = struct.Struct("<BBBxIIII")  # bits, low bits, precision, count, lanes, bytes of the table, words
_LOWER = 31  # a state lies in [2**31, 2**63); a step moves at most one word of 32 bits
_MODELLED = 12  # most bits that a table describes
_PRECISIONS = (8, 10, 12, 14, 16)  # frequencies are shares of 2**precision; fewer bits make a shorter table
_BITS_PER_LANE = 12_800  # a lane costs about 48 bits of state: 0.4 %
_STEPS = 65_536  # most steps of one stream, a second or two; only nearly constant codes come near it
_LANES = 8_192  # more no longer pays: the arrays of a step leave the processor's cache

Codes = NDArray[np.integer]


class Stream(NamedTuple):
    """Coded symbols.

    Attributes:
        data: The bytes.
        table_bytes: How many of them hold the header and the table rather than symbols.
    """

    data: bytes
    table_bytes: int


class _Model(NamedTuple):
    """What a stream is coded with: the low bits left as they are, and the frequencies of the others."""

    low: int
    precision: int
    frequencies: NDArray[np.int64]
    table: bytes
    size: float  # bits of everything, as estimated


def histogram(codes: Codes, bits: int) -> NDArray[np.int64]:
    """How often each of the 2**bits codes occurs.

    Raises:
        ValueError: bits outside 1 to 16, or a code outside 0 to 2**bits - 1.

    Example:
        >>> histogram(np.array([0, 3, 3]), bits=2)
        array([1, 0, 0, 2])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"expected 1 to 16 bits, got {bits}")
    flat = codes.reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ValueError(f"expected codes from 0 to {(1 << bits) - 1}, got {int(flat.min())} to {int(flat.max())}")
    return np.bincount(flat, minlength=1 << bits).astype(np.int64)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """The entropy of a histogram times its count: what an ideal coder that knows the histogram needs, in bits.

    Example:
        >>> entropy_bits(np.array([4, 4, 8]))
        24.0
    """
    present = counts[counts > 0].astype(np.float64)
    return float((present * np.log2(present.sum() / present)).sum()) if present.size else 0.0


def encode(codes: Codes, bits: int) -> Stream:
    """Codes to bytes.

    Args:
        codes: Whole numbers from 0 to 2**bits - 1, any shape; they are taken in C order.
        bits: 1 to 16.

    Raises:
        ValueError: bits or codes outside their range, or 2**32 codes and more.

    Example:
        >>> codes = np.random.default_rng(0).binomial(255, 0.5, 100_000)
        >>> stream = encode(codes, bits=8)
        >>> round(8 * len(stream.data) / entropy_bits(histogram(codes, 8)), 2)
        1.0
        >>> bool((decode(stream.data) == codes).all())
        True
    """
    counts = histogram(codes, bits)
    flat = codes.reshape(-1)
    if flat.size >= 1 << 32:
        raise ValueError(f"expected fewer than 2**32 codes in a stream, got {flat.size}")
    if not flat.size:
        return Stream(_HEADER.pack(bits, 0, 0, 0, 0, 0, 0), _HEADER.size)
    model = min((_fit(counts, low) for low in range(max(0, bits - _MODELLED), bits + 1)), key=lambda m: m.size)
    modelled = model.size - model.low * flat.size - 8 * len(model.table)
    lanes = max(int(modelled / _BITS_PER_LANE), math.ceil(flat.size / _STEPS), 1)
    # One symbol alone needs no coding: its frequency is 1.
    lanes = min(lanes, _LANES, flat.size) if np.count_nonzero(model.frequencies) > 1 else 0
    words = _push((flat >> model.low).astype(np.intp), model, lanes) if lanes else b""
    header = _HEADER.pack(
        bits, model.low, model.precision, flat.size, lanes, len(model.table), (len(words) - 8 * lanes) // 4
    )
    data = header + model.table + words + _pack(flat, model.low)
    return Stream(data, len(header) + len(model.table))


def decode(data: bytes | memoryview, expected: int | None = None) -> NDArray[np.uint16]:
    """Bytes of `encode` to codes, one-dimensional.

    Args:
        data: The stream.
        expected: How many codes, where that is known; a damaged count is then found before memory is asked for it.

    Raises:
        ValueError: the bytes are no such stream; what a checksum should have found first.
    """
    if len(data) < _HEADER.size:
        raise ValueError("a stream of codes ends within its header")
    bits, low, precision, count, lanes, table_bytes, words = _HEADER.unpack_from(data)
    start = _HEADER.size + table_bytes
    packed_at = start + 8 * lanes + 4 * words
    if not (1 <= bits <= 16 and low <= bits and precision <= 16 and lanes <= count) or (
        len(data) != packed_at + (low * count + 7) // 8
    ):
        raise ValueError("a stream of codes whose header does not fit its length")
    if expected is not None and count != expected:
        raise ValueError(f"a stream of {count} codes instead of {expected}")
    if not count:
        return np.zeros(0, np.uint16)
    frequencies = _read_table(bytes(data[_HEADER.size : start]), 1 << (bits - low), 1 << precision)
    if lanes:
        states = np.frombuffer(data, "<u8", lanes, start).astype(np.uint64)
        high = _pull(states, np.frombuffer(data, "<u4", words, start + 8 * lanes), frequencies, precision, count)
    elif np.count_nonzero(frequencies) == 1:
        high = np.full(count, int(frequencies.argmax()), np.uint16)
    else:
        raise ValueError("a stream of codes without states")
    return (high << low) | _unpack(np.frombuffer(data, np.uint8, offset=packed_at), low, count)


def merge_groups(histograms: Sequence[NDArray[np.int64]]) -> list[list[int]]:
    """Which tensors share a table: those whose common table costs less than what their own ones would save.

    The cheapest merger is made until none saves anything. The estimate takes a table as 12 bits for each symbol that
    occurs, beside the 20 bytes of a stream's header and one state.

    Args:
        histograms: One for each tensor, all of one length.

    Returns:
        Groups of positions in `histograms`, in the order of their first members.

    Example:
        >>> alike, other = np.array([90, 10, 0, 0]), np.array([0, 0, 10_000, 9_000])
        >>> merge_groups([alike, other * 50, alike])
        [[0, 2], [1]]
    """
    groups = {i: ([i], h, _estimate(h)) for i, h in enumerate(histograms)}
    savings = {(a, b): _saving(groups[a], groups[b]) for a in groups for b in groups if a < b}
    while savings:
        (a, b), best = max(savings.items(), key=lambda item: item[1])
        if best <= 0:
            break
        merged = groups[a][1] + groups[b][1]
        groups[a] = (sorted(groups[a][0] + groups[b][0]), merged, _estimate(merged))
        del groups[b]
        savings = {pair: s for pair, s in savings.items() if a not in pair and b not in pair}
        savings |= {(min(a, c), max(a, c)): _saving(groups[a], groups[c]) for c in groups if c != a}
    return [members for members, _, _ in groups.values()]


_Group = tuple[list[int], NDArray[np.int64], float]


def _saving(one: _Group, other: _Group) -> float:
    return one[2] + other[2] - _estimate(one[1] + other[1])


def _estimate(counts: NDArray[np.int64]) -> float:
    return entropy_bits(counts) + 12.0 * np.count_nonzero(counts) + 8 * (_HEADER.size + 6)


def _fit(counts: NDArray[np.int64], low: int) -> _Model:
    """The shortest table, together with what it costs the symbols, for the bits above `low`."""
    folded = counts.reshape(-1, 1 << low).sum(1)
    present = folded > 0
    raw = float(low * folded.sum())
    if np.count_nonzero(present) == 1:
        frequencies = present.astype(np.int64)
        table = _write_table(frequencies)
        return _Model(low, 0, frequencies, table, raw + 8 * len(table))
    models = []
    for precision in _PRECISIONS:
        if np.count_nonzero(present) <= 1 << precision:
            frequencies = _normalise(folded, 1 << precision)
            table = _write_table(frequencies)
            cost = float((folded[present] * (precision - np.log2(frequencies[present]))).sum())
            models.append(_Model(low, precision, frequencies, table, raw + cost + 8 * len(table)))
    return min(models, key=lambda m: m.size)


def _normalise(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Counts to frequencies that sum to `total`, none that occurs below 1, close to the least coding cost."""
    present = np.flatnonzero(counts)
    weight = counts[present].astype(np.float64)
    share = np.maximum((weight * (total / weight.sum())).astype(np.int64), 1)
    while (missing := total - int(share.sum())) > 0:
        gain = weight * np.log2((share + 1) / share)
        share[np.argsort(-gain, kind="stable")[:missing]] += 1
    while (excess := int(share.sum()) - total) > 0:
        loss = np.where(share > 1, weight * np.log2(share / np.maximum(share - 1, 1)), np.inf)
        order = np.argsort(loss, kind="stable")[: min(excess, np.count_nonzero(share > 1))]
        share[order] -= 1
    frequencies = np.zeros(len(counts), np.int64)
    frequencies[present] = share
    return frequencies


def _write_table(frequencies: NDArray[np.int64]) -> bytes:
    """Frequencies as numbers of 7 bits a byte; a zero is followed by how many more zeros follow it."""
    out = bytearray()
    values = frequencies[: int(np.flatnonzero(frequencies)[-1]) + 1].tolist()
    i = 0
    while i < len(values):
        run = 1
        _write_number(out, values[i])
        if values[i] == 0:
            while values[i + run] == 0:  # the last value is never 0
                run += 1
            _write_number(out, run - 1)
        i += run
    return bytes(out)


def _write_number(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _read_table(table: bytes, symbols: int, total: int) -> NDArray[np.int64]:
    """Frequencies of `_write_table`; their sum and number are checked, as the decoder indexes with them."""
    numbers, value, shift = [], 0, 0
    for byte in table:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value, shift = 0, 0
    frequencies = np.zeros(symbols, np.int64)
    at, values = 0, iter(numbers)
    for value in values:
        if value == 0:
            at += next(values, 0) + 1
        elif at < symbols and value <= total:
            frequencies[at] = value
            at += 1
        else:
            raise ValueError("a table of frequencies beyond its range")
    if int(frequencies.sum()) != total:
        raise ValueError(f"frequencies that sum to {int(frequencies.sum())} instead of {total}")
    return frequencies


def _push(symbols: NDArray[np.intp], model: _Model, lanes: int) -> bytes:
    """States and words of the symbols. Encoding runs backwards, so that decoding runs forwards."""
    frequencies = model.frequencies.astype(np.uint64)
    cumulative = np.cumsum(frequencies) - frequencies
    precision, word = np.uint64(model.precision), np.uint64(32)
    limit = frequencies << np.uint64(2 * _LOWER + 1 - model.precision)  # above it a step would leave [2**31, 2**63)
    states = np.full(lanes, 1 << _LOWER, np.uint64)
    blocks = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        row = symbols[first : first + lanes]
        state = states[: len(row)]  # a view: the last row may be short
        full = state >= limit[row]
        blocks.append(state[full].astype("<u4"))
        state[full] >>= word
        share = frequencies[row]
        quotient = state // share
        state[:] = (quotient << precision) + (state - quotient * share) + cumulative[row]
    return states.astype("<u8").tobytes() + np.concatenate(blocks[::-1]).tobytes()


def _pull(
    states: NDArray[np.uint64], words: NDArray[np.uint32], frequencies: NDArray[np.int64], precision: int, count: int
) -> NDArray[np.uint16]:
    """Symbols of the states and words; the lanes must end where encoding began."""
    symbol_of = np.repeat(np.arange(len(frequencies), dtype=np.uint16), frequencies)
    share_of = frequencies.astype(np.uint64)[symbol_of]
    # Position of each slot within its symbol's range.
    offset_of = (
        np.arange(len(symbol_of), dtype=np.uint64) - (np.cumsum(frequencies) - frequencies).astype(np.uint64)[symbol_of]
    )
    shift, mask, lower, word = (np.uint64(v) for v in (precision, (1 << precision) - 1, 1 << _LOWER, 32))
    symbols = np.empty(count, np.uint16)
    lanes, at = len(states), 0
    for first in range(0, count, lanes):
        state = states[: min(lanes, count - first)]
        slot = (state & mask).astype(np.intp)
        symbols[first : first + len(state)] = symbol_of[slot]
        state[:] = share_of[slot] * (state >> shift) + offset_of[slot]
        short = np.flatnonzero(state < lower)
        if at + len(short) > len(words):
            raise ValueError("a stream of codes with too few words")
        state[short] = (state[short] << word) | words[at : at + len(short)]
        at += len(short)
    if at != len(words) or (states != lower).any():
        raise ValueError("a stream of codes that does not end where it began")
    return symbols


def _pack(codes: Codes, low: int) -> bytes:
    """The low bits, most significant first."""
    if not low:
        return b""
    wide = (codes.astype(np.uint16) << np.uint16(16 - low)).astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(wide, axis=1, count=low)).tobytes()


def _unpack(packed: NDArray[np.uint8], low: int, count: int) -> NDArray[np.uint16]:
    """Inverse of `_pack`."""
    if not low:
        return np.zeros(count, np.uint16)
    columns = np.unpackbits(packed, count=low * count).reshape(count, low)
    padded = np.packbits(columns, axis=1)  # to 8 or 16 bits, zeros at the right
    wide = np.zeros((count, 2), np.uint8)
    wide[:, : padded.shape[1]] = padded
    return (wide.view(">u2")[:, 0] >> np.uint16(16 - low)).astype(np.uint16)
