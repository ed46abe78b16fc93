"""The command line as users meet it: through `main`, and as a process where stderr and the exit status matter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from lit_callbacks import EMA

from lit_cli.cli import typed_options
from lit_cli.errors import InputError
from lit_cli.profiles import expand_profiles, find_profile
from lit_landmarks.__main__ import main
from lit_landmarks.module import LitLandmarks

ROOT = Path(__file__).parents[2]
DATA = ["--data.format", "synthetic", "--data.synthetic_train", "8", "--data.synthetic_test", "4"]
NET = ["--model.backbone", "resnet10t", "--model.decoder", "pyramid", "--model.pretrained", "false"]
QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--plots.worst", "0"),
]
SMALL = [*DATA, "--data.image_size", "64", *NET, *QUIET, "--trainer.max_epochs", "1"]
STAGE = {"stride": 2, "sigma": 5.0}  # what the shared checkpoint was trained with and no default has


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _as_a_user(tmp_path, monkeypatch):
    """In an empty folder, without the switch that shows tracebacks; global precision settings come back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_TRACEBACK", raising=False)
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One epoch of training; the finished command line and its checkpoint."""
    root = tmp_path_factory.mktemp("trained")
    typed = [f"--model.{name}={value}" for name, value in STAGE.items()]
    cli = main(["fit", *SMALL, *typed, "--trainer.default_root_dir", str(root)])
    (path,) = root.rglob("*.ckpt")
    return cli, path


def written(path, content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def failure(capsys, *args):
    """The one line that a command which must fail leaves on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([str(a) for a in args])
    assert ending.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("lit-landmarks: error: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


def printed_config(capsys, *args):
    """The configuration that `--print_config` shows, as text."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([*args, "--print_config"])
    assert not ending.value.code
    return capsys.readouterr().out


def in_a_process(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "callbacks")])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_one_line_and_status_2():
    done = in_a_process(sys.executable, "-m", "lit_landmarks", "fit", *SMALL, "--model.sgima", "3")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("lit-landmarks: error: ")
    assert "model.sgima" in lines[0]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--data.batch_size", "many"], "batch_size"),
        (["--data.image_size", "65"], "data.image_size"),
        (["--model.backbone", "resnet10tt"], "resnet10tt"),
        (["--model.init_from", "nowhere.ckpt"], "model.init_from"),
        (["--model.tta", "[flip]"], "data.flip_pairs"),
    ],
)
def test_a_wrong_value_names_its_option(capsys, args, named):
    assert named in failure(capsys, "fit", *SMALL, *args)


def test_a_wrong_key_in_a_file_is_named(capsys, tmp_path):
    file = written(tmp_path / "mine.yaml", {"data": {"batchsize": 4}})
    assert "batchsize" in failure(capsys, "fit", "--config", file, *SMALL)


def test_a_broken_yaml_file_is_one_line(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {lr: [1\ndata: 2\n")
    assert "config" in failure(capsys, "fit", "--config", tmp_path / "broken.yaml", *SMALL)


def test_an_unknown_profile_lists_the_known_ones(capsys):
    message = failure(capsys, "fit", "--config", "rtx9999")
    assert "rtx9999" in message
    assert "profiles are" in message
    assert "demo" in message


def test_a_missing_root_is_named(capsys):
    assert "data.root" in failure(capsys, "fit", *NET, *QUIET)


def test_a_root_that_does_not_exist_is_named(capsys):
    assert "nowhere" in failure(capsys, "fit", "--data.root", "nowhere", *NET, *QUIET)


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_a_missing_checkpoint_is_named(capsys, verb):
    message = failure(capsys, verb, *DATA, *NET, *QUIET, "--ckpt_path", "nowhere.ckpt")
    assert "--ckpt_path nowhere.ckpt" in message


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", [1, 2], {"weight": torch.zeros(1)}], ids=["bytes", "list", "weights"]
)
def test_a_file_that_is_no_checkpoint_is_named(capsys, tmp_path, content):
    path = tmp_path / "photo.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "photo.ckpt" in failure(capsys, "test", *DATA, *NET, *QUIET, "--ckpt_path", path)


@pytest.mark.parametrize("word", ["best", "last"])
def test_a_word_for_a_checkpoint_needs_one(capsys, word):
    # Lightning would fail with a traceback, or test an untrained network without saying so.
    assert f"--ckpt_path {word}" in failure(capsys, "test", *DATA, *NET, *QUIET, "--ckpt_path", word)


def test_a_damaged_image_is_named(capsys, tmp_path):
    pixels = np.zeros((64, 64), np.uint8)
    for i in range(4):
        assert cv2.imwrite(str(tmp_path / f"{i}.png"), pixels)
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    rows = "".join(f"{i}.png,0.1,10,20\n" for i in range(4))
    (tmp_path / "labels.csv").write_text(f"file,scale,sella_x,sella_y\n{rows}")
    assert "2.png" in failure(capsys, "fit", "--data.root", tmp_path, *NET, *QUIET)


def test_a_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setenv("LIT_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        main(["fit", *NET, *QUIET])
    assert "Traceback" in capsys.readouterr().err


# ---- profiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["demo", "demo.yaml", "configs/landmarks/demo.yaml"])
def test_a_profile_is_found_from_another_folder(spelling):
    found = Path(find_profile("lit_landmarks", spelling))
    assert found.is_file()
    assert found.name == "demo.yaml"


def test_a_path_comes_before_a_profile_of_that_name(tmp_path):
    own = written(tmp_path / "demo.yaml", {"seed_everything": 7})
    assert find_profile("lit_landmarks", "demo.yaml") == "demo.yaml"
    assert find_profile("lit_landmarks", own) == own


def test_a_missing_path_is_no_profile_name(tmp_path):
    with pytest.raises(InputError, match=r"elsewhere/demo\.yaml: no such file"):
        find_profile("lit_landmarks", str(tmp_path / "elsewhere" / "demo.yaml"))


def test_every_spelling_of_the_option_is_expanded():
    profile = find_profile("lit_landmarks", "demo")
    args = ["fit", "-c", "demo", "--config", "demo", "--config=demo", "--model.lr", "demo"]
    expected = ["fit", "-c", profile, "--config", profile, f"--config={profile}", "--model.lr", "demo"]
    assert expand_profiles("lit_landmarks", args) == expected


# ---- configuration --------------------------------------------------------------------------------------------------


def test_print_config_round_trips(capsys, tmp_path):
    first = printed_config(capsys, "fit", "--config", "demo", "--model.sigma", "7.5", "--data.holdout", "0.25")
    (tmp_path / "printed.yaml").write_text(first)
    assert printed_config(capsys, "fit", "--config", "printed.yaml") == first
    assert yaml.safe_load(first)["model"]["sigma"] == 7.5


def test_two_files_each_set_one_key_of_a_group(capsys, tmp_path):
    a = written(tmp_path / "a.yaml", {"ema": {"decay": 0.9}, "plots": {"worst": 2}})
    b = written(tmp_path / "b.yaml", {"ema": {"warmup": False}, "plots": {"every_n_epochs": 3}})
    config = yaml.safe_load(printed_config(capsys, "fit", "--config", a, "--config", b))
    assert (config["ema"]["decay"], config["ema"]["warmup"]) == (0.9, False)
    assert (config["plots"]["worst"], config["plots"]["every_n_epochs"]) == (2, 3)


def test_typed_options_keep_lists_and_negative_numbers_together():
    args = [
        "test",
        "--config",
        "demo",
        "--model.sdr_thresholds",
        "[1, 2]",
        "--trainer.devices",
        "1",
        "--data.seed",
        "-1",
    ]
    assert typed_options(args, ("model", "data")) == ["--model.sdr_thresholds", "[1, 2]", "--data.seed", "-1"]


def test_matmul_precision_takes_effect():
    torch.set_float32_matmul_precision("medium")
    main(["fit", *SMALL, "--trainer.fast_dev_run", "true", "--matmul_precision", "highest"])
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_fit_leaves_a_plain_checkpoint(trained):
    _, path = trained
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert content["hyper_parameters"]["stride"] == STAGE["stride"]
    assert content["hyper_parameters"]["image_size"] == [64, 64]


def test_the_command_line_wins_when_a_fit_is_resumed(trained, tmp_path):
    _, path = trained
    a = written(tmp_path / "a.yaml", {"ema": {"decay": 0.9}})
    b = written(tmp_path / "b.yaml", {"ema": {"warmup": False}})
    changed = ["--model.decode", "argmax", "--model.weight_decay", "0.5", "--model.stride", "2", "--model.sigma", "5"]
    again = ["fit", "--config", a, "--config", b, *SMALL, *changed, "--trainer.max_epochs", "2"]
    with pytest.warns(UserWarning, match="weight_decay is 0.5, but the resumed optimizer goes on with 0.0001"):
        cli = main([*again, "--ckpt_path", str(path)])
    assert cli.model.hparams["decode"] == "argmax"
    assert cli.model.hparams["weight_decay"] == 0.5
    assert cli.trainer.current_epoch == 2
    assert cli.trainer.global_step == 2
    ema = next(c for c in cli.trainer.callbacks if isinstance(c, EMA))
    assert (ema.decay, ema.warmup) == (0.9, False)
    assert ema.n_averaged == 2


def test_a_checkpoint_describes_its_model(trained, tmp_path):
    first, path = trained
    other = {
        "model": {"backbone": "hrnet_w18_small", "decoder": "branch", "stride": 4, "sigma": 9.0, "decode": "dark"},
        "data": {"image_size": 96, "batch_size": 3},
    }
    file = written(tmp_path / "other.yaml", other)
    cli = main(["test", "--config", file, *DATA, *QUIET, "--ckpt_path", str(path)])
    for name in ("backbone", "decoder", "stride", "sigma"):
        assert cli.model.hparams[name] == first.model.hparams[name], name
    assert cli.datamodule.image_size == (64, 64)
    assert cli.datamodule.batch_size == 3  # how to evaluate is not the checkpoint's to say
    assert "test/mre_mm" in cli.trainer.callback_metrics


def test_what_was_typed_wins_over_a_checkpoint(trained):
    _, path = trained
    best = ["--trainer.default_root_dir", str(path.parents[1]), "--ckpt_path", "best"]
    cli = main(["test", *DATA, *QUIET, *best, "--model.decode", "argmax", "--data.fold=1"])
    assert cli.trainer.ckpt_path == str(path)
    assert cli.model.hparams["decode"] == "argmax"
    assert cli.model.hparams["stride"] == STAGE["stride"]
    assert cli.datamodule.hparams["fold"] == 1


def test_a_second_stage_starts_from_weights_alone(trained):
    first, path = trained
    second = [
        "--data.image_size",
        "96",
        "--model.init_from",
        str(path),
        "--model.lr",
        "1e-9",
        "--model.weight_decay",
        "0",
    ]
    cli = main(["fit", *SMALL, *second, "--model.stride", "2"])
    assert cli.trainer.global_step == 1  # the schedule starts anew
    ours, theirs = cli.model.state_dict(), first.model.state_dict()
    weights = [k for k in ours if k.endswith("weight")]
    assert weights
    for key in weights:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6, msg=key)


def test_a_second_stage_opens_without_the_first(trained, tmp_path):
    _, path = trained
    first = Path(shutil.copy(path, tmp_path / "first.ckpt"))
    second = ["--model.init_from", "first.ckpt", "--model.stride", "2", "--trainer.default_root_dir", "second"]
    main(["fit", *SMALL, *second])
    first.unlink()
    (written_by_second,) = Path("second").rglob("*.ckpt")
    cli = main(["test", *DATA, *QUIET, "--ckpt_path", str(written_by_second)])
    assert cli.model.hparams["stride"] == STAGE["stride"]
    LitLandmarks.load_from_checkpoint(written_by_second)


# ---- the packages ---------------------------------------------------------------------------------------------------


def test_the_callbacks_bring_nothing_but_torch_and_lightning():
    heavy = ("timm", "segmentation_models_pytorch", "albumentations", "cv2", "lit_cli", "lit_landmarks")
    code = f"import lit_callbacks, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = in_a_process(sys.executable, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
