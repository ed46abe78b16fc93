"""MLflow by an overlay, and the line where it is missing."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lit_detr.__main__ import main

OVERLAY = Path(__file__).parents[2] / "configs" / "detr" / "mlflow.yaml"
TINY = [
    *("fit", "--config", "demo", "--config", "mlflow", "--data.synthetic_train", "8", "--data.synthetic_val", "2"),
    *("--data.image_size", "64", "--model.hidden", "32", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1"),
]


def test_no_models_are_logged():
    logger = yaml.safe_load(OVERLAY.read_text())["trainer"]["logger"]
    assert logger["init_args"]["log_model"] is False


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ([], "mlflow and sqlalchemy and alembic"),
        (["--trainer.logger.init_args.tracking_uri", "http://127.0.0.1:5000"], "mlflow"),
    ],
)
def test_a_missing_package_is_one_line(more, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mlflow", "sqlalchemy", "alembic"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(SystemExit) as caught:
        main([*TINY, *more])
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-detr: error")]
    assert lines == [
        f"lit-detr: error: trainer.logger: MLFlowLogger needs {missing}, not installed here: "
        "pip install 'lit-vision-tasks[mlflow]'"
    ]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlflow", "sqlalchemy", "alembic")),
    reason="the extra `mlflow` is not installed",
)
@pytest.mark.parametrize("store", ["database", "files"])
def test_a_fit_logs_figures_pictures_and_no_model(store, tmp_path, monkeypatch):
    """Into a database as the overlay has it, and into a folder of files."""
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = f"file:{tmp_path}/runs" if store == "files" else "sqlite:///mlflow.db"
    more = ["--trainer.logger.init_args.tracking_uri", address] if store == "files" else []
    cli = main([*TINY, *more])
    client = MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("lit_detr").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["backbone"] == "resnet10t"
    assert {"train/loss", "val/ap", "val/ap50"} <= set(run.data.metrics)
    names = [a.path for a in client.list_artifacts(run.info.run_id)]
    assert "predictions" in names
    assert not any("checkpoint" in n or "model" in n for n in names)
    # The run's folder is TensorBoard's, so that --ckpt_path best and last find its checkpoints.
    assert isinstance(cli.trainer.loggers[0], TensorBoardLogger)
    folder = Path(cli.trainer.log_dir)
    assert folder.resolve().is_relative_to((tmp_path / "logs" / "detr" / "mlflow").resolve())
    assert (folder / "config.yaml").is_file()
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert list(folder.glob("events.out.tfevents.*"))
