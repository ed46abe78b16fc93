"""The benchmarks of lit_dsunet: what they compute besides seconds, and dry runs. Peers are stood in for."""

import importlib
import json
import math
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_dsunet.store import Case

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield importlib.import_module
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, False


def rows_of(path):
    return json.loads(path.read_text())["rows"]


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_readers_that_a_peer_imports_but_does_not_use_may_be_absent(script, tmp_path, monkeypatch):
    peers = script("dsunet_peers")
    monkeypatch.setattr(peers, "UNUSED", ("no_such_reader",))
    (tmp_path / "peer_with_reader.py").write_text(
        "import no_such_reader\n"
        "import no_such_reader.io as io\n"
        "from no_such_reader.deep import Thing\n"
        "def read(x: no_such_reader.a.b.C) -> io.D: ...\n"
        "class Own(Thing): ...\n"
    )
    (tmp_path / "peer_without_library.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers.load("peer_with_reader").Own.__name__ == "Own"
    assert not [name for name in sys.modules if name.startswith("no_such_reader")]
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        peers.load("peer_without_library")


def test_mirrored_is_the_mean_over_all_reflections(script):
    torch.manual_seed(0)
    net = nn.Conv3d(1, 2, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 1, 4, 5, 6)
    wanted = torch.zeros(2, 2, 4, 5, 6)
    for flips in product((False, True), repeat=3):
        axes = [a + 2 for a, flip in enumerate(flips) if flip]
        wanted += torch.flip(net(torch.flip(x, axes)), axes) / 8
    assert torch.allclose(script("dsunet_peers").mirrored(net)(x), wanted, atol=1e-6)


@pytest.mark.parametrize(("size", "patch"), [((240, 240, 155), (128, 128, 128)), ((190, 142, 60), (112, 112, 80))])
def test_monais_windows_are_put_where_ours_are(script, size, patch):
    from lit_dsunet.sliding_window import window_starts

    for s, p, overlap in zip(size, patch, script("dsunet_peers").monai_overlap(size, patch), strict=True):
        step = int(p * (1 - overlap))
        starts = [min(i * step, max(0, s - p)) for i in range(math.ceil(max(0, s - p) / step) + 1)]
        assert starts == window_starts(max(s, p), p, 0.5)


def test_targets_as_a_loader_would_deliver_them(script):
    label = torch.arange(64, dtype=torch.uint8).view(1, 4, 4, 4)
    full, half = script("dsunet_peers").nearest_targets(label, [(1, 1, 1), (2, 2, 1)])
    assert full.shape == (1, 1, 4, 4, 4)
    assert half.dtype == torch.float32
    assert [half[0, 0, d, h, w] for d, h, w in ((0, 0, 3), (1, 1, 2))] == [label[0, 0, 0, 3], label[0, 2, 2, 2]]


def test_peers_networks_are_ours(script):
    pytest.importorskip("monai", reason="the extra `peers` is not installed")
    pytest.importorskip("dynamic_network_architectures", reason="the extra `peers` is not installed")
    from lit_dsunet.models import build_network

    peers, features, strides = script("dsunet_peers"), (4, 6, 8), ([1, 1, 1], [1, 2, 2], [2, 2, 2])
    ours = build_network(in_channels=2, num_classes=3, features=features, strides=strides, deep_supervision=1)
    plain = peers.plain_conv_unet(2, 3, features, strides)
    dyn = peers.dynunet(2, 3, features, strides)
    count = [sum(p.numel() for p in net.parameters()) for net in (ours, plain)]
    assert count[0] == count[1]
    x, label = torch.randn(1, 2, 4, 8, 8), torch.randint(0, 3, (1, 4, 8, 8))
    assert peers.monai_loss()(dyn(x), label).isfinite()
    assert peers.monai_windows(dyn.eval(), x[0], (4, 8, 8), 2).shape == (3, 4, 8, 8)


# ---- training step --------------------------------------------------------------------------------------------------


def test_ways_to_train_have_names_of_their_own(script):
    step = script("dsunet_step")
    names = [way.name for way in step.FULL]
    assert len(names) == len(set(names))
    assert step.Way(compile=True, graph=True, mkdc="fused").name == "ours bf16, compiled, CUDA graph, MKDC fused"
    assert set(step.BRIEF) <= set(step.FULL)


def test_other_normalisations_leave_the_rest_alone(script):
    step = script("dsunet_step")
    x, label = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    kinds = {}
    for norm in ("instance", "batch", "none"):
        net, _, _ = step.network_and_loss(step.Way(norm=norm), x, label, (2, 4), (1, 2))
        kinds[norm] = [type(m) for m in net.modules() if "Norm3d" in type(m).__name__]
        assert sum(isinstance(m, nn.Conv3d) for m in net.modules()) == 7
    assert len(kinds["instance"]) == len(kinds["batch"]) == 6
    assert set(kinds["batch"]) == {nn.BatchNorm3d}
    assert kinds["none"] == []


def test_step_dry_run_goes_on_where_it_stopped(script, tmp_path, monkeypatch, capsys):
    step, out = script("dsunet_step"), tmp_path / "rows.json"
    monkeypatch.setattr(step, "FULL", (step.Way(), step.Way(mkdc="naive"), step.Way("nnU-Net", "fp16")))
    monkeypatch.setattr(step, "BRIEF", ())

    def absent(*_):
        raise ModuleNotFoundError("No module named 'dynamic_network_architectures'\nand more")

    monkeypatch.setattr(step, "plain_conv_unet", absent)
    step.main(["--tiny", "--out", str(out)])
    ours, mkdc, peer = rows_of(out)
    assert ours["ms"] > 0
    assert mkdc["params_m"] >= ours["params_m"]
    assert peer["error"] == "ModuleNotFoundError: No module named 'dynamic_network_architectures'"
    assert "patches_s" in capsys.readouterr().out
    monkeypatch.setattr(step, "run", lambda way, *_: {"ms": 2 * ours["ms"]})
    step.main(["--tiny", "--out", str(out), "--deadline", "0"])
    assert "error" in rows_of(out)[2]
    step.main(["--tiny", "--out", str(out)])
    assert rows_of(out)[:2] == [ours, mkdc]  # only what failed is tried again
    compared = step.relative(rows_of(out))
    assert [round(row["x peer"], 6) for row in (compared[0], compared[2])] == [2.0, 1.0]


# ---- inference ------------------------------------------------------------------------------------------------------


def test_ways_to_segment_have_keys_of_their_own(script):
    inference = script("dsunet_inference")
    keys = [(way.name, way.tta) for way in inference.ways()]
    assert len(keys) == len(set(keys))
    wanted = {(batch, p, False) for batch in (1, 4) for p in ("bf16", "fp16")} | {(4, "fp16", True)}
    assert wanted <= {(w.batch, w.precision, w.compile) for w in inference.ways() if w.tool == "ours"}
    for case in inference.CASES:
        assert all(side % 2 ** (case.stages - 1) == 0 for side in case.window)


def test_inference_dry_run(script, tmp_path, monkeypatch):
    inference, out = script("dsunet_inference"), tmp_path / "rows.json"
    way = inference.Way
    monkeypatch.setattr(
        inference, "ways", lambda: [way("ours", 4, "bf16"), way("ours", 1, "fp32", tta=True), way("MONAI", 2, "fp32")]
    )

    def whole_volume(network, volume, patch, sw_batch, overlap, weight):
        return F.pad(network(volume[None, :, :8, :8, :8]), (0, 0, 0, 4, 0, 4))[0]

    monkeypatch.setattr(inference, "monai_windows", whole_volume)
    inference.main(["--tiny", "--out", str(out)])
    plain, mirrored, peer = rows_of(out)
    assert (plain["windows"], mirrored["windows"], peer["windows"]) == (4, 32, 1)
    assert plain["agreement"] > 0.9
    assert mirrored["agreement"] == 1.0
    assert peer["agreement"] < 1.0
    compared = inference.relative([plain, mirrored, peer])
    assert compared[0]["x peer"] == pytest.approx(peer["s"] / plain["s"])
    assert "x peer" not in compared[1]


# ---- loader ---------------------------------------------------------------------------------------------------------


def test_windows_hold_whole_bursts(script, monkeypatch):
    loader, now = script("dsunet_loader"), [0.0]
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now[0])
    rate, trainer, steps = loader.Rate(workers=4, seconds=1.0, windows=2), SimpleNamespace(should_stop=False), 0
    while not trainer.should_stop:
        steps += 1
        now[0] += 0.9 if steps % 4 == 1 else 0.01  # four batches come at once
        rate.on_train_batch_end(trainer, None, None, None, 0)
    assert rate.first_s == pytest.approx(0.9)
    assert steps == 8 + 2 * 8
    assert rate.rates == pytest.approx([8 / (2 * 0.93)] * 2)


def test_the_guides_patches(script, tmp_path):
    loader = script("dsunet_loader")
    rng = np.random.default_rng(0)
    for i, shape in enumerate(((12, 10, 8), (4, 10, 8))):
        mask = np.zeros(shape, np.uint8)
        mask[tuple(s // 2 for s in shape)] = 1
        np.savez_compressed(tmp_path / f"{i}.npz", image=rng.normal(size=shape).astype(np.float32), mask=mask)
    data = loader.NpzPatches(sorted(tmp_path.glob("*.npz")), (6, 6, 6), 40)
    patches = [data[i] for i in range(len(data))]
    assert all(image.shape == (1, 6, 6, 6) and image.dtype == torch.float32 for image, _ in patches)
    assert all(mask.shape == (6, 6, 6) and mask.dtype == torch.uint8 for _, mask in patches)
    assert np.mean([int(mask.sum()) for _, mask in patches]) > 0.6  # 70 % are centred on the one voxel


def test_image_and_mask_turn_together_in_the_guides_augmentation(script):
    mask = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)
    changed = 0
    for seed in range(30):
        image, turned = script("dsunet_loader")._guide_augment(
            mask.astype(np.float32), mask, np.random.default_rng(seed)
        )
        assert image.dtype == np.float32
        assert np.abs(np.argsort(image, None) - np.argsort(turned, None)).max() == 0  # order survives shift and gamma
        changed += not np.array_equal(turned, mask)
    assert 10 < changed < 30


def test_loader_dry_run(script, tmp_path):
    loader, out = script("dsunet_loader"), tmp_path / "rows.json"
    arguments = ["--tiny", "--out", str(out), "--folder", str(tmp_path / "data")]
    loader.main([*arguments, "--only", "device store"])
    loader.main([*arguments, "--only", "guide"])
    loader.main([*arguments, "--deadline", "0"])
    ours, guide = rows_of(out)
    assert (ours["way"], ours["workers"], guide["way"], guide["workers"]) == ("ours, device store", 0, "guide", 1)
    assert all(
        row["patches_s"] > 0 and row["epoch_s"] == pytest.approx(1000 / row["patches_s"], rel=0.1)
        for row in (ours, guide)
    )


# ---- hippocampus ----------------------------------------------------------------------------------------------------


def fold_row(method, seed, cases, **more):
    times = {"train_s": 1.0, "eval_s": 0.5, "fold_s": 1.5, "steps": 3, "fold": 0}
    fixed = {"config": "h200", "overrides": "", "tta": False, "dice_a": 0.5}
    return {"method": method, "seed": seed, **fixed, **times, "per_case": {"dice": cases}, **more}


def test_methods_are_compared_by_case_after_averaging_the_seeds(script):
    bench = script("hippocampus")
    rows = [
        fold_row(bench.OURS, 0, {"a": 0.9, "b": 0.8, "c": None}),
        fold_row(bench.OURS, 1, {"a": 0.7, "b": 0.8}, fold_s=4.0),
        fold_row(bench.PEER, 0, {"a": 0.5, "b": 0.7, "d": 0.1}),
        fold_row(bench.OURS, 0, {"a": 0.1}, overrides="--trainer.max_epochs 1"),
        {"method": bench.OURS, "part": "cold start"},
    ]
    ours, peer, difference, other = bench.summary(rows)
    assert (ours["dice"], ours["seeds"], ours["cases"], ours["longest_s"]) == (0.8, [0.85, 0.75], 2, 4.0)
    assert peer["dice"] == pytest.approx((0.5 + 0.7 + 0.1) / 3, abs=1e-5)
    assert (difference["dice"], difference["cases"]) == (pytest.approx((0.3 + 0.1) / 2), 2)
    assert difference["low"] <= difference["dice"] <= difference["high"]
    assert other["overrides"] == "--trainer.max_epochs 1"
    assert bench.summary([*rows, ours, difference]) == bench.summary(rows)  # its own rows are no runs


def test_cases_keep_their_names_and_missing_values(script):
    bench = script("hippocampus")
    table = {"case": torch.tensor([0, 2]), "dice": torch.tensor([0.25, math.nan]), "fp": torch.tensor([1, 3])}
    figures = bench.by_name(table, ["x", "y", "z"])
    assert figures["fp"] == {"x": 1.0, "z": 3.0}
    assert bench.values(figures) == {"dice": 0.25, "fp": 2.0, "per_case": {"dice": {"x": 0.25, "z": None}}}


def test_rows_of_several_machines_come_together(script, tmp_path):
    bench = script("hippocampus")
    for name, seeds in (("a", (0, 1)), ("b", (1, 2))):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"rows": [fold_row(bench.OURS, s, {"x": 0.5}, commit=name) for s in seeds]})
        )
    out = tmp_path / "all.json"
    bench.main(["--take", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)])
    assert [(row["seed"], row["commit"]) for row in rows_of(out) if "seed" in row] == [(0, "a"), (1, "a"), (2, "b")]
    assert rows_of(out)[-1]["part"] == "summary"


def test_hippocampus_dry_run(script, tmp_path, monkeypatch, capsys):
    bench, out = script("hippocampus"), tmp_path / "rows.json"
    asked = {}

    def network(channels, classes, features, strides, kernels):
        asked.update(features=features, strides=strides)
        return nn.Conv3d(channels, classes, 3, padding=1)

    monkeypatch.setattr(bench, "dynunet", network)
    monkeypatch.setattr(bench, "monai_loss", lambda batch_dice: lambda out, label: F.cross_entropy(out, label.long()))
    monkeypatch.setattr(bench, "monai_windows", lambda network, volume, *_: network(volume[None])[0])
    train = bench.train_peer

    def shortly(cli, options, seed, seconds):
        asked["seconds"] = seconds
        return train(cli, options, seed, 0.3)

    monkeypatch.setattr(bench, "train_peer", shortly)
    bench.main(["--tiny", "--cold", "--peer-precision", "bf16", "--out", str(out)])
    runs = [row for row in rows_of(out) if "fold" in row]
    assert [(row["method"], row["tta"]) for row in runs] == list(product((bench.OURS, bench.PEER), (False, True)))
    ours, peer = runs[0], runs[2]
    assert ours["steps"] == 3
    assert peer["steps"] >= 3
    assert peer["train_s"] >= 0.3
    assert ours["per_case"]["dice"].keys() == peer["per_case"]["dice"].keys()
    assert len(ours["per_case"]["dice"]) == 2
    assert asked == {"features": [2, 4, 4], "strides": [1, 2, 2], "seconds": ours["train_s"]}
    assert "ours - MONAI DynUNet" in capsys.readouterr().out
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("the rows are there already"))
    bench.main(["--tiny", "--cold", "--out", str(out)])


# ---- lesion targets -------------------------------------------------------------------------------------------------


def test_every_volume_gets_lesions_of_its_own(script, tmp_path):
    bench = script("lesion_targets")
    options, _ = bench.arguments(["--tiny", "--volumes", "3"])
    first, again = bench.volumes(options), bench.volumes(options)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].label, first[1].label)
    found = bench.write(first, tmp_path)
    assert found["volumes"] == 3
    assert found["lesions"] == sum(v for k, v in found.items() if k.startswith("n_"))
    read = bench.make_reader("auto", str(tmp_path), None, None).read()
    assert [s.name for s in read.splits["train"]] == [v.name for v in first]
    back = bench.read_volume(read.splits["train"][0], read.label_values)
    assert np.array_equal(back.label, first[0].label)
    # The same lesions as `implant_lesions` puts into what was read.
    options.root = str(tmp_path)
    implanted = bench.volumes(options)
    assert len({v.label.tobytes() for v in implanted}) == 3


def arm_row(arm, seed, recall, **more):
    setting = {
        "data": "x",
        "volumes_asked": 2,
        "lesions_mean": 8.0,
        "contrast": [1, 2],
        "steps_asked": 9,
        "overrides": "",
    }
    cases = {"lesion_recall": recall, "lesion_f1": {"a": 0.5}, "lesion_precision": {"a": 0.5}, "dice": {"a": 0.5}}
    return {"arm": arm, "seed": seed, "fold": 0, **setting, "per_case": cases, **more}


def test_arms_are_paired_with_nearest(script):
    bench = script("lesion_targets")
    names = [f"c{i}" for i in range(12)]
    rows = [arm_row("nearest", s, dict.fromkeys(names, 0.5)) for s in (0, 1)]
    rows += [arm_row("soft", s, {n: 0.6 + 0.01 * i + 0.1 * s for i, n in enumerate(names)}) for s in (0, 1)]
    rows += [arm_row("soft", 0, {"c0": 0.0}, steps_asked=5)]  # another setting, without nearest
    found = {(row["pair"], row["figure"]): row for row in bench.comparisons(rows)}
    recall = found["soft - nearest", "lesion_recall"]
    assert recall["difference"] == pytest.approx(0.15 + 0.055)
    assert recall["verdict"] == "helps"
    assert recall["cases"] == 12
    assert found["soft - nearest", "dice"]["verdict"] == "no evidence"  # one case
    assert len(found) == len(bench.FIGURES)


def test_lesion_targets_dry_run(script, tmp_path):
    bench, out = script("lesion_targets"), tmp_path / "rows.json"
    bench.main(["--tiny", "--arms", "nearest", "max", "--out", str(out)])
    runs = [row for row in rows_of(out) if "seed" in row]
    assert [row["arm"] for row in runs] == ["nearest", "max"]
    assert all(row["val_cases"] == 2 and "lesion_recall_lt6voxels" in row for row in runs)
    assert {row["part"] for row in rows_of(out) if "part" in row} == {"data", "mean", "comparison"}
    before = rows_of(out)
    bench.main(["--tiny", "--arms", "nearest", "max", "--out", str(out)])
    assert rows_of(out) == before


def test_patches_of_cases_are_what_the_guide_stores(script, tmp_path):
    loader = script("dsunet_loader")
    label = np.zeros((4, 4, 4), np.uint8)
    case = Case("x", np.ones((1, 4, 4, 4), np.float16), label, np.zeros((0, 4), np.int16), None, (4, 4, 4), label)
    loader.npz_loader([case], tmp_path / "npz", (2, 2, 2), 2, 0)
    with np.load(tmp_path / "npz" / "x.npz") as content:
        assert content["image"].dtype == np.float32
        assert content["mask"].shape == (4, 4, 4)
