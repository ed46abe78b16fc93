"""The comparisons of lit_detr in precision: what they compute, and dry runs. Absent peers are stood in for."""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lit_detr.augment import DetectionAugmentation
from lit_detr.data import DetectionData
from lit_detr.samples import pack_targets

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield importlib.import_module
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, False


def rows_of(path, part="run"):
    return [row for row in json.loads(path.read_text())["rows"] if row["part"] == part]


def needs_evaluator():
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")


# ---- peers ----------------------------------------------------------------------------------------------------------


def some_batch(peers, size=(64, 96)):
    own = [peers.random_boxes(3, 0), peers.random_boxes(0, 1)]
    return torch.rand(2, 3, *size), own, pack_targets([o.boxes for o in own], [o.labels for o in own])


def check_peer(peers, peer, size=(64, 96)):
    """Packed targets and lists give one loss, everything trains, detections are boxes in pixels."""
    images, listed, packed = some_batch(peers, size)
    losses = []
    for targets in (listed, packed):
        torch.manual_seed(1)
        losses.append(peer.train().loss(images, targets))
    assert losses[0].item() == losses[1].item()
    losses[0].backward()
    stuck = [n for n, p in peer.named_parameters() if p.grad is None]
    assert not [n for n in stuck if "mask_token" not in n]  # of a ViT's pretraining
    with torch.no_grad():
        found = peer.eval().detect(images)
    assert len(found.boxes) == len(found.scores) == len(found.labels) == 2
    for boxes, scores, labels in zip(*found, strict=True):
        assert boxes.shape == (len(scores), 4)
        assert (scores.diff() <= 0).all()
        assert labels.min() >= 0
        assert labels.max() < 4
    assert max(boxes.max() for boxes in found.boxes) > 1.5  # no shares
    assert peer.description
    assert peer.version


def test_fcos_trains_batch_normalisation_and_takes_images_without_boxes(script):
    peers = script("detr_peers")
    torch.manual_seed(0)
    peer = peers.fcos_r18(4, 8)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in peer.modules()) == 20
    assert all(p.requires_grad for p in peer.parameters())
    check_peer(peers, peer, (32, 64))


def test_fcos_learns_the_smallest_boxes_with_a_stride_of_4_only(script):
    peers = script("detr_peers")
    box = torch.tensor([[17.0, 17.0, 23.0, 23.0]])  # between all points of stride 8
    for finest, learnt in ((4, True), (8, False)):
        torch.manual_seed(0)
        peer = peers.fcos_r18(4, finest).train()
        shares = torch.cat([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], 1) / 64
        outputs, anchors, cells = peer._heads(torch.rand(1, 3, 64, 64))
        rows = [{"boxes": box, "labels": torch.zeros(1, dtype=torch.int64)}]
        parts = peer.net.compute_loss(rows, outputs, anchors, cells)
        assert (parts["bbox_regression"].item() > 0) == learnt
        assert math.isfinite(peer.loss(torch.rand(1, 3, 64, 64), [peers.Boxes(rows[0]["labels"], shares)]).item())


@pytest.mark.parametrize("patched", [False, True])
def test_rtdetr(script, patched):
    pytest.importorskip("transformers", reason="transformers is not installed")
    peers = script("detr_peers")
    torch.manual_seed(0)
    check_peer(peers, peers.rtdetr_v2(4, (64, 96), queries=20, patched=patched, noise_queries=12))
    with pytest.raises(ValueError, match="multiples of 32"):
        peers.rtdetr_v2(4, 100)


def test_rfdetr(script):
    pytest.importorskip("rfdetr", reason="rfdetr is not installed")
    peers = script("detr_peers")
    check_peer(peers, peers.rfdetr_nano(4, 64), (64, 64))


def test_mended_loss_leaves_denoising_queries_out_of_the_first_term(script):
    seen = []

    def loss(logits, labels, device, pred_boxes, config, *rest, denoising_meta_values=None, **options):
        seen.append((logits.shape[1], pred_boxes[0, 0, 0].item(), denoising_meta_values, rest, options))

    mended, boxes = script("detr_peers").without_noise(loss), torch.arange(7.0).view(1, 7, 1).expand(1, 7, 4)
    meta = {"dn_num_split": [4, 3]}
    mended(torch.zeros(1, 7, 2), [], "cpu", boxes, "config", 1, denoising_meta_values=meta, enc=2)
    mended(torch.zeros(1, 3, 2), [], "cpu", boxes[:, 4:], "config", denoising_meta_values=None)
    assert seen == [(3, 4.0, meta, (1,), {"enc": 2}), (3, 4.0, None, (), {})]


# ---- by the clock ---------------------------------------------------------------------------------------------------


class Blob(nn.Module):
    """Stands for a peer: one box in the middle."""

    version, description, millions = "blob 1", "a box", 0.1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.losses = []

    def loss(self, images, targets):
        assert len(images) == len(targets.counts)
        self.losses.append(images.mean().item())
        return self.layer(images.mean().view(1, 1)).square().sum()

    def detect(self, images):
        height, width = images.shape[-2:]
        n = len(images)
        boxes = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
        labels = torch.zeros(1, dtype=torch.int64)
        return SimpleNamespace(boxes=[boxes] * n, scores=[torch.ones(1)] * n, labels=[labels] * n)


def test_the_clock_stops_after_its_time_and_some_steps(script):
    clock = script("detr_equal_time").Clock(1e-6)
    assert clock.share == 1.0
    assert [clock.over(n) for n in (1, 2, 3)] == [False, False, True]
    assert not script("detr_equal_time").Clock(1e3).over(5)
    assert clock.first_s >= 0


def test_data_ask_for_the_progress_where_the_clock_gives_it(script):
    bench = script("detr_equal_time")
    assert hasattr(DetectionData, "_progress")
    data = bench.ClockedData(format="synthetic")
    data.clock = bench.Clock(1e-6)
    assert data._progress() == 1.0


def test_a_hold_out_takes_whole_videos_from_training_and_leaves_val_alone(script, tmp_path):
    bench = script("detr_equal_time")
    data = DetectionData(format="synthetic", image_size=[64, 96], synthetic_train=20, synthetic_val=4)
    before = {k: list(v) for k, v in data.table.splits.items()}
    bench.hold_out(data)
    splits = data.table.splits
    assert len(splits["val"]) == 5
    assert sorted(s.name for part in ("train", "val") for s in splits[part]) == sorted(s.name for s in before["train"])
    assert not {s.group for s in splits["train"]} & {s.group for s in splits["val"]}


def test_drone_ir_dry_run(script, tmp_path, monkeypatch, capsys):
    needs_evaluator()
    bench, out = script("drone_ir"), tmp_path / "rows.json"
    monkeypatch.setitem(bench.WAYS, "FCOS P3 SGD", bench.Way(lambda *_: Blob(), bench.Recipe("sgd", 0.1, dtype=None)))
    call = ["--tiny", "--out", str(out), "--save", str(tmp_path / "saved"), "--only", "ours", "FCOS P3 SGD"]
    bench.main(call)
    rows = {row["method"]: row for row in rows_of(out)}
    assert set(rows) == {"ours", "FCOS P3 SGD"}
    for row in rows.values():
        assert row["steps"] == 3
        assert 0 < row["first_s"] <= row["train_s"]
        assert row["frame"] == [64, 96]
    assert rows["FCOS P3 SGD"]["peer"] == "blob 1"
    difference = next(r for r in rows_of(out, "summary") if r["method"] == "ours - FCOS P3 SGD")
    assert difference["ap_low"] <= difference["ap_high"]
    assert difference["ap"] == pytest.approx(rows["ours"]["ap"] - rows["FCOS P3 SGD"]["ap"], abs=1e-4)
    saved = np.load(next((tmp_path / "saved").glob("FCOS*")))
    assert saved["count"].tolist() == [1, 1, 1, 1]
    assert saved["boxes"][0].tolist() == [24, 16, 72, 48]
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("the rows are there already"))
    bench.main(call)
    bench.main([*call, "--seeds", "1", "--deadline", "0"])
    assert "deadline: stopped before ours, seed 1" in capsys.readouterr().out
    bench.main(["--take", str(out), "--out", str(tmp_path / "other.json")])
    assert len(rows_of(tmp_path / "other.json")) == 2


def test_plain_rows_have_no_mosaics(script):
    bench, shared = script("drone_ir"), script("detr_equal_time")
    plain = {name: way for name, way in bench.WAYS.items() if name.endswith("plain")}
    assert {name.split()[0] for name in plain} == {"ours", "RT-DETRv2", "FCOS"}
    base = ["--config", "h200", "--data.root", "absent", *shared.QUIET, "--trainer.precision", "32-true"]
    assert shared.build(base).datamodule.hparams["augment"]["mosaic_p"] > 0
    for name, way in plain.items():
        augment = shared.build([*base, *way.extra]).datamodule.hparams["augment"]
        assert json.dumps(augment) == json.dumps(dataclasses.asdict(DetectionAugmentation()))
        assert way.recipe == bench.WAYS[name.removesuffix(" plain")].recipe


def test_frames_that_are_not_filled_are_refused(script):
    bench = script("detr_equal_time")
    needs_evaluator()
    cli = bench.build([*bench.TINY, *bench.QUIET])
    cli.datamodule.prepared("val").sizes[:] = (64, 48)
    with pytest.raises(ValueError, match="fill its frame"):
        bench.evaluate(cli, Blob().detect, None)


def test_peers_see_the_batches_of_ours(script):
    bench, peer = script("detr_equal_time"), Blob()
    way = bench.Way(lambda *_: peer, bench.Recipe("sgd", 0.0, dtype=None))
    arguments, seen = [*bench.TINY, *bench.QUIET, *bench.ENDLESS], []
    bench.train_peer(way, bench.build(arguments), bench.Clock(0.0), 0)
    cli = bench.build(arguments)
    step = cli.model.training_step

    def watched(batch, batch_idx):
        seen.append(batch.image.mean().item())
        return step(batch, batch_idx)

    cli.model.training_step = watched
    bench.fit(cli, bench.Clock(0.0))
    assert seen == peer.losses


# ---- ablation -------------------------------------------------------------------------------------------------------


def test_ablation_dry_run(script, tmp_path, capsys):
    needs_evaluator()
    bench, out = script("detr_ablation"), tmp_path / "rows.json"
    call = ["--tiny", "--out", str(out), "--only", "mosaic off", "--only", "tiles"]
    bench.main(call)
    assert "mosaic off: left out, the profile has that" in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["setting"] for row in rows] == ["base", "tiles"]
    assert all(row["steps"] == 2 for row in rows)
    gain = {row["setting"]: row.get("ap_gain") for row in rows_of(out, "summary")}
    assert gain["base"] is None
    assert gain["tiles"] == pytest.approx(rows[1]["ap"] - rows[0]["ap"], abs=1e-4)


def test_ablation_names_what_this_version_lacks(script, monkeypatch, tmp_path, capsys):
    bench = script("detr_ablation")
    monkeypatch.setitem(bench.SETTINGS, "tiles", {"data.no_such_tile": 1})
    monkeypatch.setattr(bench, "run", lambda own, key, results: results.add(key, {"error": "not run"}))
    bench.main(["--tiny", "--out", str(tmp_path / "rows.json"), "--only", "tiles"])
    assert "tiles: left out, there is no data.no_such_tile" in capsys.readouterr().out


def test_every_setting_that_exists_is_accepted(script):
    bench = script("detr_ablation")
    there = {name: options for name, options in bench.SETTINGS.items() if not bench.lacking(options)}
    assert {"stride 4 off", "NWD 2", "noise queries 0", "class loss focal", "mosaic 0.5"} <= set(there)
    base = [*bench.TINY, *bench.QUIET]
    known, frame = bench.values_of(base)
    everything = {option: value for options in there.values() for option, value in options.items()}
    found, _ = bench.values_of([*base, *bench.command_line(everything | {"data.tile": bench.HALF}, frame)])
    assert found["data.tile"] == [32, 48]
    assert {k for k in found if found[k] != known[k]} >= {"strides", "nwd", "queries", "data.augment", "data.tile"}


# ---- crowded scenes -------------------------------------------------------------------------------------------------


def test_dense_dry_run(script, tmp_path, monkeypatch):
    needs_evaluator()
    bench, out = script("detr_dense"), tmp_path / "rows.json"
    monkeypatch.setitem(bench.DENSITIES, 100, bench.Density(2, 2, 40, 2))
    call = ["--tiny", "--out", str(out), "--only", "ours", "--work", str(tmp_path)]
    bench.main(call)
    (row,) = rows_of(out)
    assert row["boxes"] == 100
    assert row["boxes_per_image"] > 20
    assert row["frame"] == [128, 192]
    root = next(tmp_path.glob("dense_100_*"))
    scenes = DetectionData(root=str(root), format="coco", image_size=[128, 192]).table
    assert [len(scenes.splits[k]) for k in ("train", "val")] == [4, 2]
    file = root / "annotations" / "val.json"
    before = file.stat().st_mtime_ns
    bench.make_scenes(bench.source(bench.arguments(call)[0]), tmp_path, 100, {"train": 4, "val": 2})
    assert file.stat().st_mtime_ns == before  # kept


def test_dense_methods_get_as_many_queries_as_they_need(script):
    bench = script("detr_dense")
    for density in bench.DENSITIES.values():
        height, width = density.frame
        assert height % 32 == width % 32 == 0
    words = bench.way_of("ours 8-32", bench.DENSITIES[500]).extra
    assert words[words.index("--model.eval_queries") + 1] == "750"
    assert "[8,16,32]" in words
    peer = bench.way_of("FCOS P2 AdamW", bench.DENSITIES[500]).make(4, (64, 64))
    assert peer.net.detections_per_img == 750
