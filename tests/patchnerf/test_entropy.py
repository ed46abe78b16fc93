"""The entropy coder, against a scalar rANS in Python's whole numbers and the entropy of the codes."""

import math
import struct
import time

import numpy as np
import pytest

from lit_patchnerf.compress import entropy
from lit_patchnerf.compress.entropy import decode, encode, entropy_bits, histogram, merge_groups


def bell(count, bits, width=0.1, seed=0):
    codes = np.random.default_rng(seed).normal(2**bits / 2, width * 2**bits, count).round()
    return codes.clip(0, 2**bits - 1).astype(np.int64)


def scalar_decode(data):
    """The format as its module describes it, one symbol at a time; streams without unmodelled bits."""
    _, low, precision, count, lanes, table_bytes, words = struct.unpack_from("<BBBxIIII", data)
    assert low == 0
    numbers, value, shift = [], 0, 0
    for byte in data[20 : 20 + table_bytes]:
        value += (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value, shift = 0, 0
    frequencies = []
    while numbers:
        frequencies.append(numbers.pop(0))
        if frequencies[-1] == 0:
            frequencies += [0] * numbers.pop(0)
    slots = [s for s, f in enumerate(frequencies) for _ in range(f)]
    starts = [sum(frequencies[:s]) for s in range(len(frequencies))]
    states = list(struct.unpack_from(f"<{lanes}Q", data, 20 + table_bytes))
    stored = iter(struct.unpack_from(f"<{words}I", data, 20 + table_bytes + 8 * lanes))
    symbols = []
    for i in range(count):
        x = states[i % lanes]
        slot = x % 2**precision
        s = slots[slot]
        symbols.append(s)
        x = frequencies[s] * (x // 2**precision) + slot - starts[s]
        states[i % lanes] = x if x >= 2**31 else x * 2**32 + next(stored)
    assert all(x == 2**31 for x in states)
    assert next(stored, None) is None
    return symbols


@pytest.mark.parametrize("bits", [1, 2, 6, 8, 11, 12, 13, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000, 20_011])
def test_any_codes_come_back(bits, count):
    for codes in (bell(count, bits, seed=count), np.random.default_rng(1).integers(0, 2**bits, count)):
        back = decode(encode(codes, bits).data)
        assert back.dtype == np.uint16
        assert np.array_equal(back, codes)


@pytest.mark.parametrize("value", [0, 1, 200, 255])
def test_equal_codes_take_a_header_and_a_table(value):
    stream = encode(np.full((30, 100), value, np.uint8), 8)
    assert np.array_equal(decode(stream.data), np.full(3000, value))
    assert len(stream.data) < 30


def test_a_scalar_decoder_reads_the_stream():
    codes = np.random.default_rng(0).geometric(0.4, 30_001).clip(0, 60)
    assert scalar_decode(encode(codes, 6).data) == codes.tolist()


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3])
def test_the_stream_is_within_one_percent_of_the_entropy_and_its_table(bits, width):
    codes = bell(100_000, bits, width)
    stream = encode(codes, bits)
    assert len(stream.data) - stream.table_bytes < 1.01 * entropy_bits(histogram(codes, bits)) / 8
    assert stream.table_bytes < 2 * 2**bits + 40


@pytest.mark.parametrize("width", [0.02, 0.1])
def test_wide_codes_are_within_one_percent_of_the_entropy_of_their_distribution(width):
    # A histogram of 100,000 codes over 65,536 symbols knows too much: its own entropy is below this one.
    stream = encode(bell(100_000, 16, width), 16)
    entropy_of_normal = 0.5 * math.log2(2 * math.pi * math.e * (width * 2**16) ** 2)
    assert 8 * len(stream.data) < 1.01 * 100_000 * entropy_of_normal


def test_rare_symbols_cost_what_they_should():
    codes = (np.random.default_rng(0).random(200_000) < 0.003).astype(np.uint8)
    stream = encode(codes, 8)
    assert np.array_equal(decode(stream.data), codes)
    assert len(stream.data) < 1.01 * entropy_bits(histogram(codes, 8)) / 8 + 64


@pytest.mark.parametrize("bits", [1, 5, 8, 12, 16])
@pytest.mark.parametrize("count", [3, 100, 50_000])
def test_noise_is_stored_as_packed_codes(bits, count):
    codes = np.random.default_rng(0).integers(0, 2**bits, count)
    assert len(encode(codes, bits).data) <= math.ceil(bits * count / 8) + 24


def test_a_million_and_a_half_symbols_take_seconds_at_most():
    codes = bell(1_500_000, 8)
    before = time.perf_counter()
    assert np.array_equal(decode(encode(codes, 8).data), codes)
    assert time.perf_counter() - before < 10  # 0.2 s on an idle core


def test_entropy_against_its_definition():
    counts = np.array([5, 0, 1, 10])
    assert entropy_bits(counts) == pytest.approx(-sum(c * math.log2(c / 16) for c in (5, 1, 10)))
    assert entropy_bits(np.zeros(4, np.int64)) == 0.0


@pytest.mark.parametrize("total", [256, 1024, 65536])
def test_frequencies_sum_up_and_keep_every_symbol(total):
    rng = np.random.default_rng(0)
    for counts in (rng.integers(0, 5, 256), rng.geometric(0.001, 200), np.array([10**9] + [1] * 255), np.eye(9, 9)[4]):
        counts = counts.astype(np.int64)
        frequencies = entropy._normalise(counts, total)
        assert frequencies.sum() == total
        assert ((frequencies > 0) == (counts > 0)).all()


def test_tensors_that_are_alike_share_a_table():
    narrow, wide = (lambda s: histogram(bell(20_000, 8, 0.02, s), 8)), (lambda s: histogram(bell(20_000, 8, 0.2, s), 8))
    few = histogram(bell(30, 8, 0.05), 8)
    groups = merge_groups([narrow(0), wide(1), narrow(2), wide(3), few])
    assert {frozenset(g) - {4} for g in groups} == {frozenset({0, 2}), frozenset({1, 3})}
    assert sorted(i for g in groups for i in g) == [0, 1, 2, 3, 4]
    assert merge_groups([]) == []


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [([0, 256], 8, "0 to 255"), ([-1], 8, "0 to 255"), ([0], 17, "1 to 16 bits"), ([0], 0, "1 to 16 bits")],
)
def test_codes_outside_their_range_are_refused(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        encode(np.array(codes), bits)


def test_a_count_that_was_not_expected_is_refused():
    with pytest.raises(ValueError, match="a stream of 2 codes instead of 3"):
        decode(encode(np.zeros(2, np.int64), 8).data, expected=3)


def test_a_stream_that_is_cut_or_changed_is_refused_or_of_equal_length():
    codes = bell(500, 6)
    data = encode(codes, 6).data
    for end in (0, 5, 19, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="stream"):
            decode(data[:end])
    refused = 0
    for at in np.random.default_rng(0).integers(0, len(data), 100):
        changed = bytearray(data)
        changed[at] ^= 1 << int(at % 8)
        try:
            assert len(decode(bytes(changed), expected=len(codes))) == len(codes)  # only a checksum finds this
        except ValueError:
            refused += 1
    assert refused > 20  # a changed bit among the unmodelled ones is just another code
