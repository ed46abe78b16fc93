"""`lit-dsunet plan` on a drawn data set: its YAML goes to the command line as it is."""

import sys

import pytest
import yaml

from lit_cli.errors import InputError
from lit_dsunet.__main__ import VolumeCLI, console
from lit_dsunet.data import VolumeData
from lit_dsunet.module import LitDSUNet
from lit_dsunet.plan import plan_main
from lit_dsunet.synthetic import SyntheticVolumes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "Dataset001_Drawn"
    SyntheticVolumes(num_train=5, num_test=1, shape=(16, 40, 36), seed=0, spacing=(3.0, 1.0, 1.0)).write(path)
    return path


def test_the_plan_is_a_config_file(folder, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    plan = plan_main(["--root", str(folder), "--memory_gb", "8", "--out", str(out)])
    assert plan.spacing == (3.0, 1.0, 1.0)
    assert plan.median_size == (16, 40, 36)
    assert str(out) in capsys.readouterr().out
    content = yaml.safe_load(out.read_text())
    args = ["fit", "--config", "demo", "--config", str(out), "--data.root", str(folder), "--data.format", "auto"]
    cli = VolumeCLI(LitDSUNet, VolumeData, "lit_dsunet", args, build_only=True)
    assert list(cli.datamodule.patch_size) == content["data"]["patch_size"] == list(plan.patch)
    assert cli.model.hparams["strides"] == plan.strides
    with pytest.raises(InputError, match=r"plan: .*plan\.yaml exists"):
        plan_main(["--root", str(folder), "--memory_gb", "8", "--out", str(out)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "--root", "/nowhere", "--memory_gb", "8"], "/nowhere"),
        (["plan", "--memory_gb", "8"], "--root"),
        (["plan", "--root", "FOLDER", "--memory_gb", "0.1"], "0.1 GB are too little"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["lit-dsunet", *(str(folder) if a == "FOLDER" else a for a in args)])
    with pytest.raises(SystemExit) as done:
        console()
    assert done.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x]
    assert line.startswith("lit-dsunet: error: ")
    assert message in line
