import csv
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import MemoryAndThroughput
from lit_callbacks.monitor import peak_memory_gb, samples_in
from torch.utils.data import DataLoader, Dataset

WAIT, WORK = 0.01, 0.005


class Slow(Dataset):
    def __init__(self, n, wait):
        self.n, self.wait = n, wait

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        time.sleep(self.wait)
        return {"name": "x", "image": torch.zeros(2)}


class Worker(LightningModule):
    def __init__(self, work=0.0, validation=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.work, self.validation = work, validation

    def training_step(self, batch, batch_idx):
        time.sleep(self.work)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        time.sleep(self.validation)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(tmp_path, monitor, *callbacks, model=None, wait=0.0, logger=False, batches=9, **options):
    data = DataLoader(Slow(2 * batches, wait), batch_size=2)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        callbacks=[monitor, *callbacks],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model or Worker(), data, DataLoader(Slow(1, 0.0)))
    return trainer


def test_summary_measures_rate_and_wait(tmp_path, capsys):
    monitor = MemoryAndThroughput(every_n_steps=3)
    fit(tmp_path, monitor, model=Worker(work=WORK), wait=WAIT / 2)
    s = monitor.summary
    assert s.keys() == {"mem_gb", "mem_alloc_gb", "samples/s", "data_wait", "seconds"}
    # Sleeping takes at least its time, on a busy machine more: only the safe side is sharp.
    assert 0.3 < s["data_wait"] < 0.95
    assert s["seconds"] >= 8 * (WAIT + WORK)
    assert s["samples/s"] == pytest.approx(16 / s["seconds"])
    assert 0.05 < s["mem_gb"] < 64
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "samples/s" in line]
    assert "waiting for data" in line


def test_no_wait_when_only_the_step_takes_time(tmp_path):
    monitor = MemoryAndThroughput()
    fit(tmp_path, monitor, model=Worker(work=0.02))
    assert monitor.summary["data_wait"] < 0.4


def test_validation_does_not_count(tmp_path):
    monitor = MemoryAndThroughput()
    fit(tmp_path, monitor, model=Worker(validation=1.0), val_check_interval=4)
    assert monitor.summary["seconds"] < 1.0


def test_logger_gets_one_row_per_window(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, MemoryAndThroughput(every_n_steps=3), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "5", "8"]
    assert rows[0].keys() >= {"mem_gb", "mem_alloc_gb", "samples/s", "data_wait"}


def test_progress_bar_gets_memory_and_rate(tmp_path):
    shown = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            shown.update(trainer.progress_bar_metrics)

    fit(tmp_path, MemoryAndThroughput(every_n_steps=3), Look())
    assert shown.keys() >= {"mem_gb", "samples/s"}
    assert shown["samples/s"] > 0


def test_one_batch_is_no_reason_to_fail(tmp_path):
    monitor = MemoryAndThroughput(every_n_steps=1)
    fit(tmp_path, monitor, batches=1)
    assert monitor.summary["samples/s"] == 0


def test_a_second_fit_starts_anew(tmp_path):
    monitor = MemoryAndThroughput()
    fit(tmp_path, monitor, model=Worker(work=0.05))
    fit(tmp_path, monitor)
    assert monitor.summary["seconds"] < 0.3


def test_warns_once_when_the_card_is_nearly_full():
    monitor = MemoryAndThroughput(warn_fraction=0.9)
    with pytest.warns(UserWarning, match=r"7\.5 of 8\.0 GB.*94%.*accumulate_grad_batches"):
        monitor._check(7.5, 8.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor._check(7.9, 8.0)
        MemoryAndThroughput(warn_fraction=0.95)._check(7.5, 8.0)


def test_samples_of_nested_batches():
    @dataclass
    class Batch:
        name: str
        image: torch.Tensor

    assert samples_in(torch.zeros(3, 2)) == 3
    assert samples_in([{"scale": torch.tensor(1.0), "image": torch.zeros(4, 2)}, torch.zeros(9)]) == 4
    assert samples_in(Batch("a", torch.zeros(5))) == 5
    assert samples_in("text") == 1


@pytest.mark.gpu
def test_cuda_peaks_follow_the_allocator():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory_gb(device)["mem_alloc_gb"]
    kept = torch.zeros(2**28, dtype=torch.uint8, device=device)
    peak = peak_memory_gb(device)
    assert peak["mem_alloc_gb"] - before == pytest.approx(0.25, abs=0.01)
    assert peak["mem_gb"] >= peak["mem_alloc_gb"]
    del kept


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"warn_fraction": 0.0}, {"warn_fraction": 1.5}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MisconfigurationException, match="MemoryAndThroughput"):
        MemoryAndThroughput(**wrong)
