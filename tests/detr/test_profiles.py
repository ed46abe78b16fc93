import math
import shlex
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lit_callbacks import EMA, MemoryAndThroughput, OOMGuard

from lit_detr.__main__ import DetectionCLI, main
from lit_detr.data import DetectionData
from lit_detr.module import LitDETR
from tests.helpers.profiles import (
    ROOT,
    changed_lines,
    check_best_and_last,
    check_header,
    check_prints_itself,
    commands,
    content,
    differences,
    flat,
    header,
)

FOLDER = ROOT / "configs" / "detr"
GUIDE = ("rtxa5000", "rtxa5000_fast", "rtxa5000_fast_b32", "rtxa5000_fast_b40")
CARDS = {"gpu_8gb": 8, "gpu_12gb": 12, **dict.fromkeys(GUIDE, 24), "a100_40gb": 40, "h200": 141}
PROFILES = [FOLDER / f"{name}.yaml" for name in CARDS]
ALSO_THERE = {"demo", "mlflow"}  # no hardware profiles
# The guide's two files, key by key, where a key of it has one of ours.
BASELINE = {
    "data.batch_size": 24,
    "data.num_workers": 4,
    "data.prefetch_factor": 2,
    "data.persistent_workers": False,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 50,
    "trainer.callbacks.3.init_args.every_n_steps": 50,  # the adaptive interval
    "trainer.callbacks.5.init_args.refresh_rate": 20,  # printing to the console
    "trainer.max_epochs": 20,
}
FAST = {
    "data.batch_size": 36,
    "data.num_workers": 12,
    "data.prefetch_factor": 6,
    "data.persistent_workers": True,
    "trainer.check_val_every_n_epoch": 2,
    "trainer.log_every_n_steps": 200,
    "trainer.callbacks.3.init_args.every_n_steps": 100,
    "trainer.callbacks.5.init_args.refresh_rate": 100,
    "trainer.max_epochs": 20,
    "data.clahe_p": 0.0,
    "data.motion_blur_p": 0.0,
    "model.channels_last": True,
}
# What memory, the kind of card and the guide's loader decide.
CARDS_DIFFER = {
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
    "trainer.callbacks.3.init_args.every_n_steps",
    "trainer.callbacks.4.class_path",
    "trainer.callbacks.5.class_path",
    "trainer.callbacks.5.init_args.refresh_rate",
    "model.lr",
    "data.batch_size",
    "data.store",
    "data.num_workers",
    "data.prefetch_factor",
}
# Our own recipe for the shortest honest training of small frames.
ALSO = {
    "h200": {
        "trainer.max_epochs",
        "trainer.benchmark",
        "trainer.check_val_every_n_epoch",
        "model.cuda_graph",
        "data.image_size",
        # No card decides on these: they were chosen on drone_ir's held-out videos.
        "model.backbone",
        "data.augment.mosaic_p",
        "data.augment.scale",
    }
}
SMALL = shlex.split(
    "--trainer.accelerator cpu --trainer.precision 32-true --data.format synthetic --data.synthetic_train 8 "
    "--data.synthetic_val 2 --data.synthetic_test 0 --data.image_size 64 --data.batch_size 2 --data.num_workers 0 "
    "--model.backbone resnet10t --model.decoder_layers 1 --model.hidden 32 --model.heads 4 --model.feedforward 64 "
    "--model.queries 20 --model.eval_queries 20 --model.noise_queries 10 --plots.num_first 0 --plots.worst_k 0"
)

pytestmark = pytest.mark.usefixtures("torch_settings")
each = pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)


def build(*args):
    return DetectionCLI(LitDETR, DetectionData, "lit_detr", ["fit", *map(str, args)], build_only=True)


def profile(name):
    return FOLDER / f"{name}.yaml"


@pytest.fixture(scope="module")
def parser():
    """The real command line's parser; making one takes longer than using it."""
    return build("--config", PROFILES[0], "--trainer.accelerator", "cpu").parser


def test_every_promised_profile_exists():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - ALSO_THERE == set(CARDS)


@each
def test_prints_itself(path, parser, tmp_path, capsys):
    check_prints_itself(path, parser, tmp_path, capsys)


@pytest.mark.parametrize("name", ["rtxa5000", "rtxa5000_fast", "gpu_8gb", "h200"])  # the others differ in numbers alone
def test_trains(name, tmp_path):
    where = ["--trainer.default_root_dir", str(tmp_path), "--trainer.fast_dev_run", "2"]
    cli = main(["fit", "--config", name, *SMALL, *where])
    want = content(profile(name))
    assert cli.trainer.global_step == (2 if want["trainer"].get("accumulate_grad_batches", 1) == 1 else 1)
    assert cli.trainer.gradient_clip_val == want["trainer"]["gradient_clip_val"]
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert {"val/ap", "val/ap_tiny"} <= cli.trainer.callback_metrics.keys()
    assert cli.model.hparams["strides"] == [4, 8, 16, 32]
    assert any(isinstance(c, EMA) for c in cli.trainer.callbacks)


@each
def test_callbacks(path):
    expected = [LearningRateMonitor, MemoryAndThroughput]
    if path.stem in GUIDE:
        expected += [OOMGuard, TQDMProgressBar]
    assert check_best_and_last(path, "val/ap") == [c.__name__ for c in expected]


@each
def test_header(path, profile_benchmark):
    check_header(path)
    assert profile_benchmark.card_gb(path) == CARDS[path.stem]


@each
def test_the_last_epoch_is_validated(path):
    trainer = content(path)["trainer"]
    assert trainer["max_epochs"] % trainer["check_val_every_n_epoch"] == 0


@each
def test_learning_rate_goes_with_the_root_of_the_batch(path):
    values = flat(content(path))
    batch = values["data.batch_size"] * values.get("trainer.accumulate_grad_batches", 1)
    assert values["model.lr"] == pytest.approx(4e-4 * math.sqrt(batch / 24), rel=0.03)


@each
def test_precision_and_queries(path):
    values = flat(content(path))
    assert values["trainer.precision"] == "bf16-mixed"
    assert (values["model.queries"], values["model.most_queries"]) == (300, 1500)
    assert (values["ema.decay"], values["ema.warmup"]) == (0.999, True)


@pytest.mark.parametrize(("name", "wanted"), [("rtxa5000", BASELINE), ("rtxa5000_fast", FAST)])
def test_guide(name, wanted):
    """Its settings, one by one."""
    values = flat(content(profile(name)))
    assert {k: values.get(k) for k in wanted} == wanted
    assert values["trainer.callbacks.4.class_path"] == "lit_callbacks.OOMGuard"
    assert "matmul_precision" not in values  # the default, high, is TF32
    assert values["data.store"] == "ram"  # or there would be no workers
    cleanup = 10 if name == "rtxa5000" else 30
    assert f"cleanup every {cleanup} steps" in " ".join(line.lstrip("# ") for line in header(profile(name)))


def test_guide_baseline_augments():
    values = flat(content(profile("rtxa5000")))
    assert values["data.clahe_p"] > 0
    assert values["data.motion_blur_p"] > 0
    assert differences(profile("rtxa5000"), profile("rtxa5000_fast")) == {*FAST, "model.lr"} - {"trainer.max_epochs"}


@pytest.mark.parametrize("batch", [32, 40])
def test_steps_of_the_ladder(batch):
    path = profile(f"rtxa5000_fast_b{batch}")
    assert differences(path, profile("rtxa5000_fast")) == {"data.batch_size", "model.lr"}
    assert content(path)["data"]["batch_size"] == batch


@pytest.mark.parametrize("name", [n for n in CARDS if n not in GUIDE])
def test_cards_differ_in_what_hardware_decides(name):
    assert differences(profile(name), profile("rtxa5000_fast")) <= CARDS_DIFFER | ALSO.get(name, set())


@pytest.mark.parametrize("name", ["gpu_8gb", "gpu_12gb"])
def test_older_cards_keep_the_recipe(name):
    command = next(c for c in commands(profile(name)) if "--trainer.precision" in c)
    cli = build(*command[1 : command.index("--data.root")], *command[command.index("--trainer.precision") :])
    values = content(profile(name))
    assert cli.trainer.precision == "32-true"
    assert cli.datamodule.hparams["batch_size"] * cli.trainer.accumulate_grad_batches == (
        values["data"]["batch_size"] * values["trainer"]["accumulate_grad_batches"]
    )


def test_benchmark_rewrites_the_measured_lines_only(tmp_path, profile_benchmark):
    folder = tmp_path / "detr"
    shutil.copytree(FOLDER, folder)
    results = profile_benchmark.Results(tmp_path / "results.json")
    common = {"fits": True, "reserved_gb": 13.21, "allocated_gb": 12.0, "limit_gb": 23.5, "data": "synthetic"}
    results.add({"name": "detr/rtxa5000"}, {**common, "samples_s": 100.0, "boxes": 20})
    results.add({"name": "detr/rtxa5000 500 boxes"}, {**common, "allocated_gb": 13.1, "samples_s": 80, "boxes": 500})
    results.add({"name": "detr/gpu_8gb"}, {**common, "samples_s": 50.0, "boxes": 20, "limit_gb": 7.5})
    results.add({"name": "detr/gpu_8gb 500 boxes"}, {"fits": False, "boxes": 500})
    results.add({"name": "detr/gpu_12gb"}, {**common, "fits": False})
    task = profile_benchmark.TASKS["detr"]
    assert profile_benchmark.write_headers(results, folder, task) == 3
    assert profile_benchmark.write_headers(results, folder, task) == 0
    for path in PROFILES:
        written = path.stem in ("rtxa5000", "gpu_8gb", "gpu_12gb")
        assert changed_lines(path, folder / path.name) == ([2, 3] if written else [])
        check_header(folder / path.name)
    lines = (folder / "rtxa5000.yaml").read_text().splitlines()
    assert lines[2].startswith(
        "# measured: peak 13.2 GB reserved, 12.0 GB allocated; 100 images/s = 1.00 x detr/rtxa5000; "
        "13.1 GB allocated with 500 boxes an image in place of 20; on "
    )
    assert lines[3].endswith("python benchmarks/profiles.py --only detr/rtxa5000")
    small = (folder / "gpu_8gb.yaml").read_text()
    assert "50 images/s = 0.50 x detr/rtxa5000; out of memory with 500 boxes an image in place of 20; on" in small
    assert "# measured: does not fit" in (folder / "gpu_12gb.yaml").read_text()


def test_benchmark_measures_a_profile(tmp_path, profile_benchmark, capsys):
    out = tmp_path / "results.json"
    names = ["detr/gpu_8gb", "detr/rtxa5000 500 boxes"]  # images on the device, and those of loader workers
    profile_benchmark.main(["--tiny", *(word for name in names for word in ("--only", name)), "--out", str(out)])
    results = profile_benchmark.Results(out)
    for name in names:
        row = results.get(name=name)
        assert (row["frame"], row["batch"], row["images"], row["boxes"], row["fits"]) == ("64x64", 2, 4, 8, True)
        assert row["samples_s"] > 0
        assert name in capsys.readouterr().out or name == names[1]


def test_benchmark_knows_every_case(profile_benchmark, parser):
    cases = profile_benchmark.cases(profile_benchmark.TASKS["detr"], [])
    names = [case.name for case in cases]
    assert names[0] == "detr/rtxa5000"
    assert len(names) == len(set(names))
    for name, card in CARDS.items():
        own = {case.boxes: case for case in cases if case.name in (f"detr/{name}", f"detr/{name} 500 boxes")}
        assert sorted(own) == [20, 500]
        assert {case.card_gb for case in own.values()} == {card}
    # Every argument is one of the real command line.
    parser.parse_args(["fit", "--config", str(PROFILES[0]), *(word for case in cases for word in case.extra)])


def test_drawn_frames_have_the_boxes_asked_for(profile_benchmark):
    import profile_tasks

    data = DetectionData(format="synthetic", image_size=[64, 96], batch_size=3, store="ram")
    profile_tasks.draw(data, 500, tiny=True)
    assert {len(data.prepared("train").boxes(i).boxes) for i in range(4)} == {500}
    assert data.prepared("val").images.shape == (2, 3, 64, 96)
    frames = {}
    for store, images in (("ram", 120), ("auto", 256)):
        data = DetectionData(format="synthetic", image_size=64, batch_size=3, store=store)
        profile_tasks.draw(data, 1, tiny=False)
        frames[store] = len(data.table.splits["train"])
        assert frames[store] == max(256, images)
