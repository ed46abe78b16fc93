import enum
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import EMA, export
from lit_callbacks.export import WeightsExport, checkpoint_weights, export_weights, load_weights, plain_values
from lit_callbacks.export.__main__ import main
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
FORMATS = pytest.mark.parametrize("format", ["safetensors", "pt"])


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class Task(LightningModule):
    def __init__(self, width=3, lr=0.1, size=(4, 4), loss=None, fail_at=None):
        super().__init__()
        self.save_hyperparameters(ignore="fail_at")
        self.net = Net(width)
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("a bad batch")
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        # Best after the first epoch.
        self.log("loss", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def data():
    torch.manual_seed(0)
    return DataLoader(torch.randn(12, 4), batch_size=4)


def trainer_for(tmp_path, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False} | options
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return Trainer(
        accelerator="cpu",
        enable_checkpointing=checkpointing,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )


def fit(tmp_path, *callbacks, module=None, ckpt_path=None, **options):
    trainer = trainer_for(tmp_path, *callbacks, **options)
    module = Task() if module is None else module
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return trainer, module


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


# ---- files ----------------------------------------------------------------------------------------------------------


@SUFFIXES
def test_round_trip(tmp_path, suffix):
    net = Net()
    state = net.state_dict() | {
        "half": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 2),
        "other_empty": torch.zeros(0, 2),
        "scalar": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    hyper = {"lr": 1e-3, "name": "x", "deep": {"a": [1, None, True]}}
    path = export_weights(tmp_path / "new" / f"net{suffix}", state, hyper)
    got, values = load_weights(str(path))
    same(got, state)
    assert values == hyper
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_files_open_without_this_package(tmp_path):
    """Plain torch and plain safetensors; the child imports neither Lightning nor this package."""
    state = Net().state_dict()
    for name in ("a.pt", "a.safetensors"):
        export_weights(tmp_path / name, state, {"width": 3})
    code = (
        "import json, sys, torch; from safetensors import safe_open; from safetensors.torch import load_file\n"
        "one = torch.load('a.pt', weights_only=True); two = load_file('a.safetensors')\n"
        "assert one['state_dict'].keys() == two.keys() and one['hyper_parameters'] == {'width': 3}\n"
        "assert all(torch.equal(v, two[k]) for k, v in one['state_dict'].items())\n"
        "assert json.loads(safe_open('a.safetensors', 'pt').metadata()['hyper_parameters']) == {'width': 3}\n"
        "assert not [m for m in sys.modules if m.startswith(('lightning', 'lit_'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@SUFFIXES
def test_tied_tensors_are_stored_once_and_have_all_names(tmp_path, suffix):
    big = torch.randn(1000, 100)
    state = {"embed": big, "head": big, "view": big[:10], "column": big[:, 3], "transposed": big[:100].t()}
    path = export_weights(tmp_path / f"tied{suffix}", state)
    assert path.stat().st_size < 1.2 * big.nbytes + state["transposed"].nbytes
    got, _ = load_weights(path)
    same(got, state)
    assert got["embed"] is got["head"] or got["embed"].data_ptr() == got["head"].data_ptr()
    if suffix == ".safetensors":
        assert load_file(path).keys() == state.keys() - {"head"}


@SUFFIXES
def test_tied_module_loads_strictly(tmp_path, suffix):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    state, _ = load_weights(export_weights(tmp_path / f"x{suffix}", net.state_dict()))
    other.load_state_dict(state)
    assert torch.equal(other[1].weight, net[0].weight)


@SUFFIXES
def test_memory_formats_and_gradients_do_not_matter(tmp_path, suffix):
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    state = dict(conv.named_parameters())  # with requires_grad
    got, _ = load_weights(export_weights(tmp_path / f"x{suffix}", state))
    same(got, conv.state_dict())
    assert not got["weight"].requires_grad


@SUFFIXES
def test_names_of_compiled_modules_are_cleaned(tmp_path, suffix):
    net = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert "0._orig_mod.weight" in net.state_dict()
    got, _ = load_weights(export_weights(tmp_path / f"x{suffix}", net.state_dict()))
    assert got.keys() == {"0.weight", "0.bias"}


@SUFFIXES
def test_prefix_selects_and_is_cut_off(tmp_path, suffix):
    task = Task()
    got, _ = load_weights(export_weights(tmp_path / f"x{suffix}", task.state_dict(), prefix="net."))
    same(got, task.net.state_dict())
    with pytest.raises(MisconfigurationException, match=r"begins with 'nett\.', but with \['net'\]"):
        export_weights(tmp_path / f"y{suffix}", task.state_dict(), prefix="nett.")
    assert not (tmp_path / f"y{suffix}").exists()


class Colour(enum.StrEnum):
    RED = "red"


def test_plain_values():
    given = {
        "f": np.float64(0.5),
        "colour": Colour.RED,
        "tuple": (1, (2.0, None)),
        "nan": float("inf"),
        "flag": True,
        "array": np.zeros(2),
        "scalar": np.float32(1),
        "tensor": torch.zeros(()),
        "module": nn.ReLU(),
        "path": Path("x"),
        "numbers": {1: 2.0},
        "nested": {"a": {"b": nn.ReLU}},
        "_class_path": "x.Y",
    }
    plain, dropped = plain_values(given)
    assert plain == {"f": 0.5, "colour": "red", "tuple": [1, [2.0, None]], "nan": float("inf"), "flag": True}
    assert [type(plain[k]) for k in ("f", "colour", "flag")] == [float, str, bool]
    assert dropped == ["array", "scalar", "tensor", "module", "path", "numbers", "nested"]


def test_dropped_names_are_in_the_file(tmp_path):
    hyper = {"lr": 0.1, "loss": nn.MSELoss()}
    state = {"w": torch.ones(1), "_extra_state": {"a": 1}}
    assert torch.load(export_weights(tmp_path / "a.pt", state, hyper), weights_only=True) == {
        "state_dict": {"w": torch.ones(1)},
        "hyper_parameters": {"lr": 0.1},
        "dropped": ["loss", "_extra_state"],
    }
    from safetensors import safe_open

    metadata = safe_open(export_weights(tmp_path / "a.safetensors", state, hyper), "pt").metadata()
    assert json.loads(metadata["dropped"]) == ["loss", "_extra_state"]


@pytest.fixture
def small_disk():
    """Files of more than 64 kB cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@SUFFIXES
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, suffix, small_disk):
    path = export_weights(tmp_path / f"x{suffix}", {"w": torch.ones(3)})
    with pytest.raises(OSError, match=r"not written: .*File too large") as caught:
        export_weights(path, {"w": torch.ones(10**6)})
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    same(load_weights(path)[0], {"w": torch.ones(3)})


@SUFFIXES
def test_no_folder_to_write_to(tmp_path, suffix):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not written: "):
        export_weights(tmp_path / "file" / f"x{suffix}", {"w": torch.ones(3)})


def test_unknown_suffix(tmp_path):
    for call in (lambda p: export_weights(p, {}), load_weights):
        with pytest.raises(MisconfigurationException, match=r"x\.ckpt: expected a name that ends in"):
            call(tmp_path / "x.ckpt")


@SUFFIXES
def test_what_is_no_file_of_weights(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(path)
    path.write_bytes(b"hello world, " * 9)
    with pytest.raises(ValueError, match=f"x{suffix}: not a file of") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"state_dict": {}, "hyper_parameters": {"x": Evil()}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds an object of posix\.mkdir"):
        load_weights(tmp_path / "x.pt")
    torch.save([1], tmp_path / "y.pt")
    with pytest.raises(ValueError, match="which has a 'state_dict'"):
        load_weights(tmp_path / "y.pt")
    assert not (tmp_path / "evil").exists()


def test_without_safetensors(tmp_path, monkeypatch):
    path = export_weights(tmp_path / "x.safetensors", {"w": torch.ones(1)})
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="pip install safetensors"):
        load_weights(path)
    with pytest.raises(MisconfigurationException, match="pip install safetensors"):
        export_weights(path, {})
    with pytest.raises(MisconfigurationException, match=r"WeightsExport: format safetensors.*pip install"):
        fit(tmp_path, WeightsExport(format="safetensors"))
    callback = WeightsExport()
    fit(tmp_path, callback)
    assert callback.artifacts == [tmp_path / "weights.pt"]


# ---- the callback ---------------------------------------------------------------------------------------------------


@FORMATS
def test_end_of_fit(tmp_path, format):
    callback = WeightsExport(format=format, dirpath=str(tmp_path / "out"), filename="final")
    _, module = fit(tmp_path, callback, module=Task(width=5, loss=nn.MSELoss()))
    (path,) = callback.artifacts
    assert path == tmp_path / "out" / f"final.{format}"
    state, hyper = load_weights(path)
    same(state, module.state_dict())
    assert hyper == {"width": 5, "lr": 0.1, "size": [4, 4]}
    Task(**hyper).load_state_dict(state)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", [EMA, EMAWeightAveraging])
def test_the_average_is_exported(tmp_path, average, first):
    export_, mean = WeightsExport(prefix="net."), average(decay=0.5)
    save = ModelCheckpoint(tmp_path, filename="last")
    _, module = fit(tmp_path, *([export_, mean] if first else [mean, export_]), save)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    net = Net()
    net.load_state_dict(load_weights(export_.artifacts[0])[0])
    same(net.state_dict(), module.net.state_dict())
    averaged = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items()}
    same(net.state_dict(), averaged)
    assert not torch.equal(net.last.weight, checkpoint["current_model_state"]["net.last.weight"])


def test_the_average_of_a_run_that_had_ended_already(tmp_path):
    """Nothing is left to train, so `on_train_end` does not run."""
    save = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, EMA(decay=0.5), save)
    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        callback = WeightsExport()
        fit(tmp_path, *order(callback, EMA(decay=0.5)), ckpt_path=tmp_path / "last.ckpt")
        same(load_weights(callback.artifacts[0])[0], checkpoint_weights(tmp_path / "last.ckpt")[0])


def test_best_and_both(tmp_path):
    save = ModelCheckpoint(tmp_path / "ckpt", monitor="loss", save_last=True)
    callback = WeightsExport(when="both")
    _, module = fit(tmp_path, EMA(decay=0.5), callback, save, module=Task(loss=nn.MSELoss()))
    end, best = callback.artifacts
    assert (end.name, best.name) == ("weights.safetensors", "weights_best.safetensors")
    same(load_weights(end)[0], module.state_dict())
    # Hyperparameters of any class do not matter in the run's own file.
    assert load_weights(best)[1] == load_weights(end)[1]
    checkpoint = torch.load(save.best_model_path, weights_only=False)
    assert checkpoint["epoch"] == 0
    same(load_weights(best)[0], checkpoint["state_dict"])
    only = WeightsExport(when="best", filename="x")
    fit(tmp_path, only, ModelCheckpoint(tmp_path / "other", monitor="loss"))
    assert [p.name for p in only.artifacts] == ["x_best.safetensors"]


def test_best_needs_a_checkpoint_callback(tmp_path):
    with pytest.raises(MisconfigurationException, match="WeightsExport: when expected 'end' without a checkpoint"):
        fit(tmp_path, WeightsExport(when="best"))
    callback = WeightsExport(when="best")
    with pytest.warns(UserWarning, match="WeightsExport: the checkpoint callback has saved no file"):
        fit(tmp_path, callback, ModelCheckpoint(tmp_path, every_n_epochs=5, save_top_k=-1))
    assert callback.artifacts == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_fit_exports_nothing(tmp_path, error):
    class Break(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise error

    callback = WeightsExport(dirpath=str(tmp_path / "out"))
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(tmp_path, EMA(), callback, Break())
    assert callback.artifacts == []
    assert not (tmp_path / "out").exists()


def test_an_exception_in_a_second_fit(tmp_path):
    callback = WeightsExport(dirpath=str(tmp_path / "out"))
    fit(tmp_path, callback)
    before = callback.artifacts[0].read_bytes()
    with pytest.raises(RuntimeError, match="a bad batch"):
        fit(tmp_path, callback, module=Task(fail_at=2))
    assert callback.artifacts == []
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == before


def test_a_stopped_fit_exports(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    callback = WeightsExport()
    trainer, module = fit(tmp_path, callback, Stop(), max_epochs=50)
    assert trainer.current_epoch < 3
    same(load_weights(callback.artifacts[0])[0], module.state_dict())


def test_tuners_and_dry_runs_write_nothing(tmp_path):
    from lightning.pytorch.tuner import Tuner

    callback = WeightsExport(dirpath=str(tmp_path / "out"))
    trainer = trainer_for(tmp_path, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Tuner(trainer).lr_find(Task(), data(), num_training=3, max_lr=0.2, update_attr=False)
    fit(tmp_path, callback, fast_dev_run=True)
    fit(tmp_path, WeightsExport(dirpath=str(tmp_path / "out"), when="best"), fast_dev_run=True)
    assert not (tmp_path / "out").exists()
    fit(tmp_path, LearningRateFinder(num_training_steps=3, max_lr=0.2, update_attr=False), callback)
    assert len(callback.artifacts) == 1


def test_evaluation_writes_nothing(tmp_path):
    callback = WeightsExport(dirpath=str(tmp_path / "out"))
    trainer, module = fit(tmp_path, callback)
    callback.artifacts[0].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, data(), verbose=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_a_warning_after_the_fit(tmp_path, small_disk):
    callback = WeightsExport()
    with pytest.warns(UserWarning, match=r"WeightsExport: .*File too large.*\. From a checkpoint: python -m"):
        trainer, _ = fit(tmp_path, callback, module=Task(width=9000))
    assert trainer.state.finished
    assert callback.artifacts == []
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    callback = WeightsExport()
    trainer = trainer_for(tmp_path, callback)
    asked = []
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda self: False))
    monkeypatch.setattr(
        trainer.strategy, "lightning_module_state_dict", lambda: asked.append(1) or {}
    )  # a collective under sharded strategies
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(Task(), data())
    assert callback.artifacts == []
    assert asked
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"format": "onnx"}, "format expected auto, safetensors or pt, got 'onnx'"),
        ({"when": "never"}, "when expected end, best or both, got 'never'"),
        ({"filename": "a/b"}, "filename expected a name without folder and suffix, got 'a/b'"),
        ({"filename": "w.pt"}, "filename expected"),
        ({"filename": ""}, "filename expected"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(MisconfigurationException, match=f"WeightsExport: {words}"):
        WeightsExport(**wrong)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    fit(tmp_path, EMA(decay=0.5), ModelCheckpoint(tmp_path, filename="last"))
    file = str(tmp_path / "last.ckpt")
    assert main([file, str(tmp_path / "w.pt"), "--prefix", "net."]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'w.pt'}\n"
    state, hyper = load_weights(tmp_path / "w.pt")
    Net().load_state_dict(state)
    assert hyper == {"width": 3, "lr": 0.1, "size": [4, 4], "loss": None}
    for wrong, words in (
        ([file, "x.onnx"], "ends in .safetensors or .pt"),
        (["none.ckpt", "x.pt"], "none.ckpt: no such file"),
        ([str(tmp_path), "x.pt"], "no such file"),
        ([file, str(tmp_path / "x.pt"), "--prefix", "a."], "no tensor's name begins with 'a.'"),
    ):
        assert main(wrong) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_command_on_objects_of_other_classes(tmp_path, capsys):
    fit(tmp_path, ModelCheckpoint(tmp_path, filename="last"), module=Task(loss=nn.MSELoss()))
    arguments = [str(tmp_path / "last.ckpt"), str(tmp_path / "w.safetensors")]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "holds an object of torch.nn.modules.loss.MSELoss" in err
    assert "--trust" in err
    assert main([*arguments, "--trust"]) == 0
    assert "without loss, which are not plain" in capsys.readouterr().out


def test_command_as_a_module(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "x.ckpt")
    command = [sys.executable, "-m", "lit_callbacks.export", "x.ckpt", "x.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("written: x.safetensors\n", "")
