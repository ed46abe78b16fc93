"""The ONNX file against the network, and what is refused."""

import copy
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lit_cli.errors import InputError
from lit_detr import __main__, export
from lit_detr.export import Detector, export_main, export_onnx
from lit_detr.module import LitDETR

SMALL = {
    "backbone": "resnet10t",
    "hidden": 32,
    "heads": 4,
    "feedforward": 64,
    "strides": [8, 16],
    "decoder_layers": 2,
    "queries": 20,
    "eval_queries": 20,
    "noise_queries": 10,
    "most_detections": 30,
    "class_names": ["plane", "bird", "drone"],
    "category_ids": [2, 5, 9],
    "in_channels": 1,
    "image_size": [64, 96],
}
SCORES = {"rtol": 1e-4, "atol": 1e-5}
BOXES = {"rtol": 1e-4, "atol": 1e-2}  # pixels

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `onnx` is not installed",
)


def trained(seed=0, **options):
    """A network whose boxes move and whose scores differ."""
    torch.manual_seed(seed)
    model = LitDETR(**{**SMALL, **options})
    model.configure_model()
    for head in [model.net.selection.box, *model.net.decoder.box_heads]:
        nn.init.normal_(head.last.weight, std=0.05)
    for head in [model.net.selection.score, *model.net.decoder.class_heads]:
        nn.init.normal_(head.weight, std=0.3)
    for layer in model.net.decoder.layers:
        nn.init.normal_(layer.cross.sampling.weight, std=0.1)
    return model


def checkpoint(model, path, **more):
    """What Lightning writes of a module, as far as it is read here."""
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({"pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0, **content, **more}, path)
    return path


def frames(count, seed=0, size=(64, 96), channels=1):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def run(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["boxes", "scores", "labels"], {"images": images.numpy()})


def same(found, expected):
    """Detections of equal score may change places: they are compared by score, then box."""
    boxes, scores, labels = (np.asarray(t) for t in found)
    boxes2, scores2, labels2 = (t.numpy() for t in expected)
    np.testing.assert_allclose(scores, scores2, **SCORES)
    assert (np.diff(scores2, axis=1) < -1e-6).mean() > 0.9  # nearly all places are decided by the scores
    alike = (labels == labels2) & np.isclose(boxes, boxes2, **BOXES).all(-1)
    tied = np.abs(np.diff(scores2, axis=1)) < 1e-5
    near = np.pad(tied, ((0, 0), (0, 1))) | np.pad(tied, ((0, 0), (1, 0)))
    assert (alike | near).all()
    assert alike.mean() > 0.9


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """From a checkpoint with averaged and raw weights, by the command line."""
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("the extra `onnx` is not installed")
    folder = tmp_path_factory.mktemp("export")
    model, other = (trained(seed, decoder_layers=1) for seed in (0, 1))
    run_folder = folder / "logs" / "demo" / "checkpoints"
    run_folder.mkdir(parents=True)
    checkpoint(model, run_folder / "last.ckpt", current_model_state=other.state_dict())
    path = export_main(["--ckpt_path", "last", "--folder", str(folder / "logs"), "--out", str(folder / "a" / "m.onnx")])
    return path, model, other


@needs_onnx
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_batch_gives_the_detections_of_the_network(exported, count):
    path, model, other = exported
    images = frames(count, seed=count)
    found = run(path, images)
    assert [f.shape for f in found] == [(count, 30, 4), (count, 30), (count, 30)]
    assert [f.dtype for f in found] == [np.float32, np.float32, np.int64]
    same(found, Detector(model)(images))
    # The averaged weights, not the raw ones beside them.
    assert np.abs(found[1] - Detector(other)(images)[1].numpy()).max() > 1e-2


@needs_onnx
def test_the_file_says_what_it_is(exported):
    import onnx

    path, _, _ = exported
    model = onnx.load(path)
    said = {p.key: p.value for p in model.metadata_props}
    assert json.loads(said["class_names"]) == ["plane", "bird", "drone"]
    assert json.loads(said["category_ids"]) == [2, 5, 9]
    assert json.loads(said["image_size"]) == [64, 96]
    assert (said["stride"], said["channels"]) == ("16", "1")
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 1, 64, 96]
    assert [i.version for i in model.opset_import if not i.domain] == [18]
    assert not {n.op_type for n in model.graph.node} & {"GridSample", "NonMaxSuppression", "NonZero"}
    assert b"site-packages" not in path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]  # nothing temporary, no second file of weights


@needs_onnx
def test_bytes_a_fixed_batch_and_another_size(tmp_path):
    model = trained(in_channels=3, decoder_layers=1).half()  # of any precision
    path = export_onnx(model, tmp_path / "m.onnx", size=(64, 32), batch=3, pixels="uint8")
    images = torch.randint(256, (3, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    same(run(path, images), Detector(model, pixels="uint8")(images))
    with pytest.raises(Exception, match=r"(?i)dimension"):
        run(path, images[:1])


@needs_onnx
def test_a_file_that_differs_is_not_left(exported, tmp_path, monkeypatch):
    import onnx

    path, model, other = exported
    program = SimpleNamespace(model_proto=onnx.load(path))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: program)
    (tmp_path / "m.onnx").write_text("the one before")
    with pytest.raises(InputError, match=r"scores of the file differ from the network's by .*; nothing written"):
        export_onnx(other, tmp_path / "m.onnx")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the one before"]
    program.model_proto.graph.node[0].op_type = "Nothing"
    with pytest.raises(InputError, match=r"export: the file does not run, nothing written \(No Op registered"):
        export_onnx(model, tmp_path / "m.onnx")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the one before"]
    program.model_proto = onnx.load(path)
    export_onnx(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size > 1000


def test_the_detector_gives_what_evaluation_gives():
    """In another core, and without touching the module."""
    from lit_detr.module import best

    model = trained(channels_last=True).train()
    before, images, core = copy.deepcopy(model.state_dict()), frames(2), model.net.decoder.core
    detector = Detector(model)
    boxes, scores, labels = detector(images)
    with torch.no_grad():
        output = model(images)
        expected = best(output.logits[-1], output.boxes[-1], 30)
    pixels = torch.tensor([96.0, 64, 96, 64])
    clipped = torch.minimum((expected[0] * pixels).clamp(min=0), pixels)
    same((boxes, scores, labels), (clipped, *expected[1:]))
    grid = Detector(model, core="grid_sample")(images)
    same((boxes, scores, labels), grid)
    assert (boxes >= 0).all()
    assert (boxes <= pixels).all()
    assert model.training
    assert model.net.decoder.core == core != "gather"
    assert model.net.channels_last
    assert all(p.requires_grad for p in model.net.decoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    whole = Detector(model, pixels="uint8")((images * 255).round().byte())
    torch.testing.assert_close(whole[1], scores, atol=0.05, rtol=0)


# ----------------------------------------------------------------------------------------------------- refusals


@needs_onnx
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (64, 90)}, "--height, --width: expected multiples of 16, got 64 x 90"),
        ({"size": (0, 64)}, "expected multiples of 16, got 0 x 64"),
        ({"opset": 17}, "--opset: expected 18 to"),
        ({"batch": 0}, "--batch: expected dynamic, or 1 and more, got 0"),
    ],
)
def test_refused_options(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_onnx(trained(), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line_of_the_console(name, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(export, "find_spec", lambda n: None if n == name else found("json"))
    path = checkpoint(trained(), tmp_path / "a.ckpt")
    monkeypatch.setattr(sys, "argv", ["lit-detr", "export", "--ckpt_path", str(path), "--out", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as caught:
        __main__.console()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error == f"lit-detr: error: export: {name} not installed: pip install 'lit-vision-tasks[onnx]'\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "export: the following arguments are required: --ckpt_path"),
        (["--ckpt_path", "nowhere.ckpt"], "--ckpt_path nowhere.ckpt: no such file"),
        (["--ckpt_path", "best", "--folder", "nowhere"], "--ckpt_path best: no checkpoint below nowhere"),
        (["--ckpt_path", "x", "--batch", "many"], "--batch: expected dynamic or a number, got many"),
        (["--ckpt_path", "x", "--pixels", "float16"], "invalid choice"),
    ],
)
def test_refused_arguments(args, message):
    with pytest.raises(InputError, match=message):
        export_main(args)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.ckpt")
    model = trained()
    checkpoint(model, tmp_path / "other.ckpt", hyper_parameters={"lr": 0.1})
    for name in ("text", "weights", "other"):
        with pytest.raises(InputError) as caught:
            export_main(["--ckpt_path", str(tmp_path / f"{name}.ckpt")])
        assert "\n" not in str(caught.value), name
