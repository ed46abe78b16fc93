"""The file against the network: what is lost, what is refused, and that decoding needs nothing that trains."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from lit_cli.errors import InputError
from lit_patchnerf import export, packing
from lit_patchnerf.compress.container import read_container, size_report
from lit_patchnerf.compress.quantise import Layout, fake_quantisers
from lit_patchnerf.decoding import decode_canvases, decode_region, frame_times, to_bytes
from lit_patchnerf.export import compress_main, decode_main, export_decoder, export_main
from lit_patchnerf.models import CoordinateConfig, CoordinateDecoder, GridConfig, GridDecoder, decoder_config
from lit_patchnerf.packing import NeuralVideo, mean_psnr, neural_video, pack, plain_config, unpack
from lit_patchnerf.patches import plan_geometry
from lit_patchnerf.video import read_video, write_frames

MODES = ("grid", "coordinate")
FRAMES = 6
GEOMETRY = plan_geometry((50, 80), crop=(40, 80), patch=(20, 20))

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `onnx` is not installed",
)


def network(mode, clip_dim=16):
    """Every parameter random: FiLM and residual blocks begin with zeros."""
    torch.manual_seed(0)
    if mode == "grid":
        options = {"width": 16, "frame": (40, 80), "grid": (2, 4), "strides": ((5, 5), (2, 2), (2, 2)), "levels": 4}
        options |= {"atlas_stages": (2,), "camera_frames": 5}
        net = GridDecoder(GridConfig(**options, latent_frames=(6, 3), latent_channels=(8, 6), clip_dim=clip_dim))
    else:
        net = CoordinateDecoder(CoordinateConfig(fc_dim=16, patch=(20, 20), stem=(2, 3), clip_dim=clip_dim))
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()


def video(mode, **options):
    return NeuralVideo(network(mode, **options), GEOMETRY, FRAMES, 12.0)


def decoded(video):
    return decode_canvases(video.net, frame_times(range(video.frames), video.frames), video.geometry)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint of a stand-in: opening one is the business of the module."""

    def make(mode, layouts=None, **hparams):
        path = tmp_path / "last.ckpt"
        path.write_bytes(b"")
        values = {"frames": FRAMES, "fps": 12.0, "geometry": GEOMETRY.to_dict(), "mode": mode, **hparams}
        module = SimpleNamespace(net=network(mode), geometry=GEOMETRY, hparams=values, rounding_layouts=layouts or {})
        stand_in = ModuleType("lit_patchnerf.module")
        stand_in.load = lambda path: module
        monkeypatch.setitem(sys.modules, "lit_patchnerf.module", stand_in)
        return path

    return make


@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode, tmp_path):
    before, path = video(mode), tmp_path / "a" / "video.lpn"
    sizes = pack(before, path, bits=12, latent_bits=12)
    assert sizes.total == path.stat().st_size
    assert sizes.numbers == sum(p.numel() for p in before.net.parameters())
    after, content = unpack(path)
    assert (after.geometry, after.frames, after.fps, after.mode) == (GEOMETRY, FRAMES, 12.0, mode)
    assert not after.net.training
    for x, y in zip(decoded(before), decoded(after), strict=True):
        torch.testing.assert_close(x, y, atol=3e-3, rtol=0)
    assert content.config.keys() == {"mode", "decoder", "frames", "fps"}
    assert content.config["decoder"].keys() == asdict(before.net.config).keys()


def test_codes_are_those_that_training_rounded_to(checkpoint, tmp_path):
    """The file of a rounding-aware checkpoint holds bit for bit what the last steps computed with."""
    net = network("grid")
    fakes = fake_quantisers(net.named_parameters(), 6)
    odd = {name: Layout((1,) * len(fake.layout.shape), half=False) for name, fake in fakes.items()}
    fakes = fake_quantisers(net.named_parameters(), 6, layouts=odd)
    path = checkpoint("grid", qat_bits=6, layouts=odd)
    pack(neural_video(path), tmp_path / "a.lpn")
    after = dict(unpack(tmp_path / "a.lpn")[0].net.named_parameters())
    assert all(torch.equal(fake(x), after[n]) for n, x in net.named_parameters() if (fake := fakes.get(n)))
    assert fakes.keys() == odd.keys()
    pack(neural_video(path), tmp_path / "b.lpn", bits=5)  # others' codes have layouts of their own
    state = read_container(tmp_path / "b.lpn").state
    assert any(state[name].minimum.numel() > 1 for name in odd)


@pytest.mark.parametrize("mode", MODES)
def test_config_is_plain_and_complete(mode):
    config = network(mode).config
    values = plain_config(config)
    assert json.loads(json.dumps(values)) == values
    back = decoder_config(mode, values)
    assert back.strides == config.all_strides  # written out
    assert back.widths == config.widths
    if mode == "coordinate":
        assert back.all_blocks == config.all_blocks
        back = replace(back, blocks=None)
    assert replace(back, strides=config.strides) == config


def test_bits_of_weights_and_latents(tmp_path):
    def bits(content):
        return {name: q.bits for name, q in content.state.items() if hasattr(q, "bits")}

    before = video("grid")
    pack(before, tmp_path / "a.lpn", bits=6, latent_bits=5)
    found = bits(read_container(tmp_path / "a.lpn"))
    assert found.pop("latents.0.values") == found.pop("latents.1.values") == 5
    assert set(found.values()) == {6}
    pack(replace(before, bits=7), tmp_path / "b.lpn")
    assert set(bits(read_container(tmp_path / "b.lpn")).values()) == {7}
    parts = size_report(tmp_path / "a.lpn").parts
    assert {"weights", "latents", "atlases", "clip", "header", "tables", "scales"} == parts.keys()
    assert parts["latents"] < size_report(tmp_path / "b.lpn").parts["latents"]
    with pytest.raises(InputError, match="bits: expected 2 to 16, got 17"):
        pack(before, tmp_path / "c.lpn", bits=17)
    assert not (tmp_path / "c.lpn").exists()


@pytest.mark.parametrize("mode", MODES)
def test_without_clip(mode, tmp_path):
    before, path = video(mode), tmp_path / "a.lpn"
    sizes = pack(before, path, bits=12, latent_bits=12, without_clip=True)
    assert "clip" not in sizes.parts
    after, _ = unpack(path)
    assert after.net.clip is None
    torch.testing.assert_close(decoded(after).rgb, decoded(before).rgb, atol=3e-3, rtol=0)
    assert before.net.clip is not None
    pack(after, tmp_path / "b.lpn", without_clip=True)  # nothing to leave out
    assert unpack(tmp_path / "b.lpn")[0].net.clip is None


def test_compress_prints_bytes_and_loss(tmp_path, checkpoint, capsys):
    path, out = checkpoint("grid", qat_bits=None), tmp_path / "video.lpn"
    frames = np.random.default_rng(0).integers(0, 255, (FRAMES + 2, 50, 80, 3), dtype=np.uint8)  # two beyond the limit
    write_frames(tmp_path / "frames", frames)
    args = ["--ckpt_path", str(path), "--out", str(out), "--bits", "4", "--batch", "4", "--device", "cpu"]
    sizes = compress_main([*args, "--video", str(tmp_path / "frames")])
    text = capsys.readouterr().out
    for part, count in sizes.parts.items():
        assert re.search(rf"{part} +{count:,} bytes", text)
    assert f"{sizes.total:,} bytes, {sizes.bits_per_number:.3f} bits for each" in text
    assert f"{8 * sizes.total / (FRAMES * 40 * 80):.5f} bits per pixel" in text
    values = [float(v) for v in re.findall(r"(-?\d+\.\d+) dB", text)]
    target = torch.from_numpy(frames[:FRAMES, 5:45]).permute(0, 3, 1, 2) / 255
    for value, one in zip(values, (neural_video(path), unpack(out)[0]), strict=False):
        errors = (decoded(one).rgb - target).square().mean((1, 2, 3))
        assert value == pytest.approx(float((-10 * torch.log10(errors + 1e-9)).mean()), abs=1e-3)
    assert values[2] == pytest.approx(values[0] - values[1], abs=2e-3)
    write_frames(tmp_path / "few", frames[:3])
    with pytest.raises(InputError, match=r"^--video .*few: 3 frames of 50x80, expected the training's 6 of 50x80$"):
        compress_main([*args, "--video", str(tmp_path / "few")])


def test_compress_takes_the_bits_of_the_training(tmp_path, checkpoint):
    assert neural_video(checkpoint("grid", qat_bits=6)).bits == 6
    assert neural_video(checkpoint("grid")).bits == 8


def test_psnr_leaves_the_padding_out():
    padded = plan_geometry((37, 74), patch=(20, 20))
    one = replace(video("grid"), geometry=padded)
    frames = to_bytes(padded.restore(decoded(one).rgb)).permute(0, 2, 3, 1).numpy()
    assert mean_psnr(one, frames, torch.device("cpu")) > 55  # only the rounding is left


@pytest.mark.parametrize("mode", MODES)
def test_decode_to_frames(mode, tmp_path, capsys):
    path, out = tmp_path / "a.lpn", tmp_path / "frames"
    pack(video(mode), path)
    args = [str(path), "--out", str(out), "--device", "cpu"]
    assert decode_main([*args, "--range", "1", "2", "--step", "0.5", "--batch", "2"]) == out
    assert sorted(p.name for p in out.iterdir()) == ["000001.png", "000001_500.png", "000002.png"]
    assert "3 frames in" in capsys.readouterr().out
    found, _ = read_video(out)
    net = unpack(path)[0].net
    expected = GEOMETRY.restore(to_bytes(decode_canvases(net, frame_times([1, 1.5, 2], FRAMES), GEOMETRY).rgb))
    difference = torch.from_numpy(found).permute(0, 3, 1, 2).int() - expected
    assert difference.abs().max() <= 1  # memory formats differ
    assert not found[:, :5].any()  # what the crop left out is black


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_decode_a_region_to_mp4(tmp_path, precision):
    path, out = tmp_path / "a.lpn", tmp_path / "b" / "region.mp4"
    pack(video("grid"), path)
    region = ["--region", "3", "10", "30", "52"]
    decode_main([str(path), "--out", str(out), "--step", "0.5", "--device", "cpu", *region, "--precision", precision])
    found, facts = read_video(out)
    assert (facts.count, facts.size, facts.fps) == (11, (30, 52), 24.0)
    rgb = decode_region(unpack(path)[0].net, frame_times([0.5], FRAMES), GEOMETRY, (3, 10, 30, 52))
    assert abs(found[1].mean() - 255 * float(rgb.mean())) < 4
    decode_main([str(path), "--out", str(out), "--fps", "7", "--device", "cpu"])
    assert read_video(out)[1].fps == 7.0


def test_decoding_imports_nothing_that_trains(tmp_path):
    pack(video("coordinate"), tmp_path / "a.lpn")
    code = (
        "import sys\n"
        "from lit_patchnerf.console import console\n"
        "file, *outs = sys.argv[1:]\n"
        "for out in outs:\n"
        "    sys.argv[1:] = ['decode', file, '--out', out, '--device', 'cpu']\n"
        "    console()\n"
        "    found = {'lightning', 'pytorch_lightning', 'torchmetrics', 'jsonargparse', 'timm'} & set(sys.modules)\n"
        "    found |= {f'lit_patchnerf.{m}' for m in ('module', 'data', 'losses')} & set(sys.modules)\n"
        "    assert not found, (out, found)\n"
    )
    names = [str(tmp_path / name) for name in ("a.lpn", "frames", "film.mp4")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    assert read_video(names[2])[1].count == len(list((tmp_path / "frames").iterdir())) == FRAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range", "0", "6"], r"^--range is 0 to 6, expected first and last frame from 0 to 5"),
        (["--step", "0"], r"^--step is 0, expected a positive number"),
        (["--region", "0", "0", "51", "80"], r"^--region is \[0, 0, 51, 80\], expected .* inside of the frame's 50x80"),
        (["--device", "abacus"], r"^--device abacus: no such device"),
        (["--batch", "0"], r"^--batch: expected at least 1"),
        (["--fps", "nan"], r"^--fps: expected a positive number"),
        (["--out", "x.avi"], r"^--out x\.avi: expected a file that ends in \.mp4"),
        (["--range", "0"], r"^decode: argument --range: expected 2 arguments"),
    ],
)
def test_decode_refuses(tmp_path, options, message):
    pack(video("grid"), tmp_path / "a.lpn")
    with pytest.raises(InputError, match=message) as error:
        decode_main([str(tmp_path / "a.lpn"), "--out", str(tmp_path / "o"), "--device", "cpu", *options])
    assert "\n" not in str(error.value)


def test_files_that_are_not_ours(tmp_path, checkpoint):
    with pytest.raises(InputError, match=r"none\.lpn: cannot be read"):
        decode_main([str(tmp_path / "none.lpn"), "--out", str(tmp_path / "o")])
    with pytest.raises(InputError, match=r"no such file, expected a checkpoint or an \.lpn file"):
        neural_video(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match=r"^compress: the following arguments are required: --ckpt_path"):
        compress_main([])
    state = network("grid").state_dict()
    good = {"mode": "grid", "decoder": plain_config(network("grid").config), "frames": FRAMES, "fps": 12.0}
    for change, message in (
        ({"mode": "cubist"}, r"a\.lpn: model\.mode: expected coordinate or grid, got cubist"),
        ({"decoder": {"breadth": 3}}, r"a\.lpn: model\.decoder\.breadth: no such option"),
        ({"decoder": None}, r"a\.lpn: lacks|a\.lpn: has beyond|a\.lpn: .* is .*expected"),
        ({"decoder": {"width": "wide"}}, r"a\.lpn: its header describes no decoder"),
        ({"frames": "many"}, r"a\.lpn: its header has no geometry, frames and fps"),
    ):
        packing.write_container(tmp_path / "a.lpn", state, {**good, **change}, GEOMETRY.to_dict())
        with pytest.raises(InputError, match=message):
            unpack(tmp_path / "a.lpn")
    for geometry in ({}, {**GEOMETRY.to_dict(), "grid": [1, 8]}, {**GEOMETRY.to_dict(), "patch": 20}):
        packing.write_container(tmp_path / "a.lpn", state, good, geometry)
        with pytest.raises(
            InputError, match=r"a\.lpn: its header has no geometry, frames and fps that fit the decoder"
        ):
            unpack(tmp_path / "a.lpn")
    damaged = bytearray((tmp_path / "a.lpn").read_bytes())
    damaged[-50] ^= 1
    (tmp_path / "a.lpn").write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        unpack(tmp_path / "a.lpn")


@needs_onnx
@pytest.mark.parametrize("mode", ["grid"])  # the other has fewer kinds of nodes; an export takes seconds
def test_onnx_gives_the_same_pixels(mode, tmp_path, checkpoint, capsys):
    import onnx
    import onnxruntime

    out = tmp_path / "decoder.onnx"
    export_main(["--ckpt_path", str(checkpoint(mode)), "--out", str(out)])
    text = capsys.readouterr().out
    assert float(re.search(r"differ from the network's by (\S+) of 1", text)[1]) < export.TOLERANCE
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["t" if mode == "grid" else "tyx"]
    for count in (1, 5):
        where = torch.rand((count,) if mode == "grid" else (count, 3))
        with torch.no_grad():
            expected = network(mode)(where).rgb
        found = session.run(["pixels"], {session.get_inputs()[0].name: where.numpy()})[0]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    model = onnx.load(str(out))
    about = {item.key: item.value for item in model.metadata_props}
    assert json.loads(about["geometry"]) == GEOMETRY.to_dict()
    assert (about["mode"], about["frames"], about["fps"]) == (mode, "6", "12")
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_torchscript_gives_the_same_pixels(mode, tmp_path):
    pack(video(mode), tmp_path / "a.lpn")
    out = tmp_path / "decoder.pt"
    export_main(["--ckpt_path", str(tmp_path / "a.lpn"), "--format", "torchscript", "--out", str(out)])
    extra = {"geometry": "", "mode": ""}
    graph = torch.jit.load(str(out), _extra_files=extra)
    assert json.loads(extra["geometry"]) == GEOMETRY.to_dict()
    for count in (1, 4):
        where = torch.rand((count,) if mode == "grid" else (count, 3))
        with torch.no_grad():
            torch.testing.assert_close(graph(where), unpack(tmp_path / "a.lpn")[0].net(where).rgb, atol=1e-5, rtol=0)


def test_export_leaves_the_network_as_it_is(tmp_path):
    one = video("grid")
    one.net.to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    graph = export.Graph(one)
    assert next(graph.parameters()).dtype == torch.float32
    assert next(one.net.parameters()).dtype == torch.bfloat16
    assert next(one.net.parameters()).requires_grad


def test_export_refuses_other_pixels(tmp_path, monkeypatch):
    out = tmp_path / "decoder.pt"
    out.write_text("what was there")
    run = export._run_torchscript
    for wrong, message in (
        (lambda *a: run(*a) + 1e-3, r"^export: pixels of the file differ .* by 0\.001, .*; nothing written$"),
        (lambda *a: run(*a) * float("nan"), r"^export: pixels of the file differ .* by nan"),
        (lambda *a: run(*a)[:2], r"^export: the file gives \(2, 3, 40, 80\), expected \(3, 3, 40, 80\)"),
        (lambda *a: 1 // 0, r"^export: the file does not run, nothing written \(.*zero\)$"),
    ):
        monkeypatch.setattr(export, "_run_torchscript", wrong)
        with pytest.raises(InputError, match=message):
            export_decoder(video("grid"), out, "torchscript")
    assert out.read_text() == "what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["decoder.pt"]


def test_export_refuses_options(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^--format: expected one of onnx, torchscript, got gif"):
        export_decoder(video("grid"), tmp_path / "x", "gif")
    if importlib.util.find_spec("onnx") is not None:
        with pytest.raises(InputError, match=r"^--opset: expected 18 to \d+ .*, got 11"):
            export_decoder(video("grid"), tmp_path / "x", opset=11)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(InputError, match=r"^export: onnxruntime not installed: pip install 'lit-vision-tasks\[onnx\]'"):
        export_decoder(video("grid"), tmp_path / "x")
