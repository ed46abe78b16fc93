"""The `.lpn` file: what goes in comes out, every byte is counted, and no changed byte passes."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lit_cli.errors import InputError
from lit_patchnerf.compress import container
from lit_patchnerf.compress.container import load_module, read_container, size_report, write_container
from lit_patchnerf.compress.entropy import entropy_bits, histogram
from lit_patchnerf.compress.quantise import Quantised, dequantise_state, quantise_state

CONFIG = {"mode": "grid", "fc_dim": 12, "strides": [5, 4], "ratio": 0.1, "name": "häschen", "none": None}
GEOMETRY = {"size": [640, 1280], "frames": 132, "fps": 24.0}
PARTS = {"latents*": "latents"}


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "latents": normal(20, 16, 2, 4),
        "stem.weight": normal(40, 16, 1, 1) * torch.linspace(0.1, 2, 40).reshape(-1, 1, 1, 1),
        "stem.bias": normal(40),
        "up.weight": normal(24, 10, 3, 3) * 1e-7,  # its pairs need float32
        "fine.weight": normal(12, 30),
        "constant": torch.full((5, 6), 0.1),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "half": normal(7).half(),
        "brain": normal(3).bfloat16(),
        "count": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "double": normal(4).double(),
    }


def coded():
    named = {"latents": 6, "fine*": 12, "*.weight": 8, "*.bias": 8, "constant": 8, "empty": 8}
    return quantise_state(tensors(), named)


def same(one, other):
    if isinstance(one, Quantised):
        return (
            (one.bits, one.half, one.codes.dtype) == (other.bits, other.half, other.codes.dtype)
            and torch.equal(one.codes, other.codes)
            and torch.equal(one.minimum, other.minimum)
            and torch.equal(one.scale, other.scale)
        )
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture
def path(tmp_path):
    write_container(tmp_path / "clip.lpn", coded(), CONFIG, GEOMETRY, PARTS)
    return tmp_path / "clip.lpn"


def test_everything_comes_back(path):
    content, state = read_container(path), coded()
    assert (content.config, content.geometry) == (CONFIG, GEOMETRY)
    assert list(content.state) == list(state)
    assert all(same(state[name], x) for name, x in content.state.items())
    assert {type(x) for x in content.state.values()} == {Quantised, torch.Tensor}
    plain = dequantise_state(state)
    assert all(torch.equal(x, plain[name]) for name, x in content.state_dict().items())


@pytest.mark.parametrize("bits", [2, 5, 8, 11, 16])
def test_random_tensors_of_any_width(tmp_path, bits):
    generator = torch.Generator().manual_seed(bits)
    shapes = [(30, 20), (3, 4, 5, 6), (100, 7), (2, 2), (64, 9, 3, 3)]
    state = quantise_state({str(i): torch.randn(s, generator=generator) for i, s in enumerate(shapes)}, bits)
    write_container(tmp_path / "x.lpn", state, {})
    back = read_container(tmp_path / "x.lpn").state
    assert all(same(state[name], x) for name, x in back.items())


def test_a_file_may_hold_nothing(tmp_path):
    sizes = write_container(tmp_path / "x.lpn", {}, {})
    assert read_container(tmp_path / "x.lpn").state == {}
    assert (sizes.total, sizes.numbers) == ((tmp_path / "x.lpn").stat().st_size, 0)


def test_the_report_counts_every_byte(path):
    sizes = size_report(path)
    assert sizes == read_container(path).sizes
    assert sum(sizes.parts.values()) == sizes.total == path.stat().st_size
    assert set(sizes.parts) == {"header", "tables", "scales", "weights", "latents"}
    state = coded()
    pairs = sum(2 * x.scale.numel() * (2 if x.half else 4) for x in state.values() if isinstance(x, Quantised))
    assert sizes.parts["scales"] == pairs
    codes = state["latents"].codes.numpy()
    ideal = entropy_bits(histogram(codes, 6)) / 8
    assert ideal < sizes.parts["latents"] < 1.01 * ideal + 8
    assert sizes.numbers == sum(x.numel() for x in tensors().values())
    assert sizes.bits_per_number == 8 * sizes.total / sizes.numbers


def test_a_large_file_is_its_entropy_and_little_more(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = quantise_state({f"{i}.weight": torch.randn(96, 40, 5, 5, generator=generator) for i in range(4)}, 8)
    sizes = write_container(tmp_path / "x.lpn", state, CONFIG)
    ideal = sum(entropy_bits(histogram(q.codes.numpy(), 8)) for q in state.values()) / 8
    assert sizes.total - sizes.parts["scales"] < 1.01 * ideal
    assert sizes.parts["header"] < 600


def test_a_changed_byte_is_refused_wherever_it_is(path):
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {*range(120), *range(len(data) - 40, len(data)), *rng.integers(0, len(data), 300).tolist()}
    for at in places:
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"^.*clip\.lpn: [^\n]+$"):
            read_container(path)
        with pytest.raises(InputError):
            size_report(path)
    path.write_bytes(data)
    read_container(path)


def test_what_is_wrong_is_said(path):
    data = path.read_bytes()

    def refused(changed, message):
        path.write_bytes(changed)
        with pytest.raises(InputError, match=message):
            read_container(path)

    refused(b"", "not an .lpn file")
    refused(b"RIFF" + data[4:], "not an .lpn file")
    refused(data.replace(b"\r\n", b"\n", 1), "not an .lpn file")
    refused(data[:5], "cut short, 5 bytes")
    refused(data[:30], "cut short, 30 bytes")
    refused(data[:100], r"cut short in its header \(CRC32\)")
    refused(data[:-1], f"cut short, {len(data) - 1} bytes; expected {len(data)}")
    refused(data + b"\0", "longer than it was written")
    refused(data[:8] + struct.pack("<H", 2) + data[10:], "version 2 of the format; expected 1")
    refused(data[:-1] + bytes([data[-1] ^ 1]), "SHA-256")
    refused(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], r"damaged in section \d+, weights \(CRC32\)")
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_container(path)


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for end in [*range(60), *np.random.default_rng(0).integers(0, len(data), 50).tolist()]:
        path.write_bytes(data[:end])
        with pytest.raises(InputError):
            read_container(path)


def sealed(header):
    """A file with this header and checksums that hold, and no sections."""
    packed = zlib.compress(json.dumps(header).encode())
    prefix = struct.pack("<8sHI", container._MAGIC, 1, len(packed))
    body = prefix + struct.pack("<I", zlib.crc32(packed, zlib.crc32(prefix))) + packed
    return body + container.hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"config": {}, "geometry": {}, "sections": [], "tensors": [{"name": "x", "shape": [2]}]},
        {"config": [], "geometry": {}, "sections": [], "tensors": []},
        {"config": {}, "geometry": {}, "sections": [{"part": "w", "bytes": -1, "table": 0, "crc32": 0}], "tensors": []},
        {
            "config": {},
            "geometry": {},
            "sections": [{"part": "w", "kind": "raw", "bytes": 0, "table": 0, "crc32": 0}],
            "tensors": [{"name": "x", "shape": [2], "type": "float32", "section": 0, "offset": 0}],
        },
    ],
)
def test_a_header_that_some_other_program_wrote_is_one_line(tmp_path, header):
    (tmp_path / "x.lpn").write_bytes(sealed(header))
    with pytest.raises(InputError, match=r"^[^\n]*(cannot read|do not fit)[^\n]*$"):
        read_container(tmp_path / "x.lpn")


def test_a_failed_write_leaves_the_former_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_container(path, {}, {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["clip.lpn"]


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "x.lpn"
    for config, message in [
        ({"x": torch.ones(1)}, "config: expected numbers"),
        ({"x": float("nan")}, "config: expected numbers"),
        ({1: 2}, "config: expected text as keys, got 1"),
    ]:
        with pytest.raises(InputError, match=message):
            write_container(path, {}, config)
    with pytest.raises(InputError, match=r"z: no such type .*complex64"):
        write_container(path, {"z": torch.ones(2, dtype=torch.complex64)}, {})
    with pytest.raises(InputError, match="scales is a name of the file's own"):
        write_container(path, {"z": torch.ones(2)}, {}, parts={"*": "scales"})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_container(tmp_path / "file" / "x.lpn", {}, {})
    assert not path.exists()


def build(config):
    return nn.Sequential(nn.Linear(4, config["width"]), nn.GELU(), nn.Linear(config["width"], 2))


def test_a_network_comes_back_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    net, path = build({"width": 64}), tmp_path / "x.lpn"
    write_container(path, quantise_state(net.state_dict(), 8), {"width": 64})
    back, content = load_module(path, build)
    assert not back.training
    assert content.config == {"width": 64}
    x = torch.randn(10, 4)
    assert torch.allclose(back(x), net(x), atol=0.02)
    assert torch.equal(load_module(path, build)[0](x), back(x))
    with pytest.raises(InputError, match=r"0\.weight is \(64, 4\), expected \(32, 4\)"):
        load_module(path, lambda _: build({"width": 32}))
    with pytest.raises(InputError, match=r"lacks the tensor 3\.bias"):
        load_module(path, lambda c: build(c).append(nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"has beyond its config the tensor 2\.bias"):
        load_module(path, lambda c: build(c)[:1])


def test_reading_needs_no_training_code(path):
    code = (
        "import sys; from lit_patchnerf.compress.container import read_container; read_container(sys.argv[1]);"
        "print([m for m in ('lightning', 'torchmetrics', 'timm', 'cv2', 'scipy', 'torchvision') if m in sys.modules])"
    )
    here = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
