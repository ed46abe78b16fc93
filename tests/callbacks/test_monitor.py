import csv
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import MemoryAndThroughput, monitor
from lit_callbacks.monitor import peak_memory_gb, samples_in
from torch.utils.data import DataLoader, Dataset, IterableDataset

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
    assert s.keys() == {
        *("mem_gb", "mem_alloc_gb", "samples/s", "data_wait", "seconds"),
        *("samples/s_median", "samples/s_iqr", "windows", "steps", "wall_s", "validation"),
    }
    # Sleeping takes at least its time, on a busy machine more: only the safe side is sharp.
    assert 0.3 < s["data_wait"] < 0.95
    assert s["seconds"] >= 8 * (WAIT + WORK)
    assert s["samples/s"] == pytest.approx(16 / s["seconds"])
    assert 0.05 < s["mem_gb"] < 64
    lines = capsys.readouterr().out.splitlines()
    columns = [line.split("  ", 1)[0] for line in lines[-7:-1]]
    assert columns == ["peak reserved", "peak allocated", "samples/s", "waiting for data", "validation", "steps"]
    assert "raise num_workers (now 0) or prefetch_factor, keep" in lines[-1]


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
    fit(tmp_path, monitor, model=Worker(work=0.15))
    first = monitor.summary
    fit(tmp_path, monitor)
    # Relative, since a busy machine stretches both.
    assert monitor.summary["steps"] == first["steps"]
    assert monitor.summary["seconds"] < first["seconds"]


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


class Clock:
    """Stands still unless a step moves it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed(LightningModule):
    """One second per batch, ten per validation, of a clock of its own."""

    def __init__(self, clock, automatic=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.clock = clock
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        self.clock.now += 1.0
        if self.automatic_optimization:
            return self.weight.square()
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.clock.now += 10.0

    def configure_optimizers(self):
        one = torch.optim.SGD(self.parameters(), lr=0.01)
        return one if self.automatic_optimization else [one, torch.optim.SGD(self.parameters(), lr=0.01)]


class Rows(CSVLogger):
    """Keeps what it is given, with the time."""

    def __init__(self, folder, clock):
        super().__init__(folder)
        self.clock, self.rows = clock, []

    def log_metrics(self, metrics, step=None):
        if "mem_gb" in metrics:
            self.rows.append({"now": self.clock.now, "step": step, **metrics})


def timed_fit(tmp_path, monkeypatch, *callbacks, data=None, window=4, automatic=True, ckpt_path=None, **options):
    """Fit on a clock of its own: the callback, the logged windows, the clock and the trainer."""
    clock = Clock()
    monkeypatch.setattr(monitor, "perf_counter", clock)
    ours, rows = MemoryAndThroughput(every_n_steps=window), [Rows(tmp_path / name, clock) for name in "ab"]
    options = {"max_epochs": 6, "check_val_every_n_epoch": 2, "logger": rows} | options
    trainer = Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ours, *callbacks],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = DataLoader(Slow(16, 0.0), batch_size=2) if data is None else data
        trainer.fit(Timed(clock, automatic), data, DataLoader(Slow(1, 0.0)), ckpt_path=ckpt_path)
    assert rows[0].rows == rows[1].rows
    return ours, rows[0].rows, clock, trainer


def test_time_left_is_exact_once_a_validation_was_seen(tmp_path, monkeypatch):
    _, rows, clock, _ = timed_fit(tmp_path, monkeypatch)
    assert clock.now == 48 + 3 * 10
    left = [(clock.now - row["now"]) / 60 for row in rows]
    got = [row["eta_min"] for row in rows]
    # Window of four batches; the first validation comes after 16.
    assert got[:4] == pytest.approx([(48 - b) / 60 for b in (4, 8, 12, 16)], abs=0.05)
    assert got[4:] == pytest.approx(left[4:], abs=0.05)
    assert got[-1] == pytest.approx(10 / 60, abs=0.05)  # the last validation is still to come


def test_time_left_with_validations_within_the_epoch(tmp_path, monkeypatch):
    options = {"check_val_every_n_epoch": 1, "val_check_interval": 4}
    ours, rows, clock, _ = timed_fit(tmp_path, monkeypatch, window=3, **options)
    assert clock.now == 48 + 12 * 10
    later = [row for row in rows if row["now"] > 4 + 10]
    left = [(clock.now - row["now"]) / 60 for row in later]
    assert [row["eta_min"] for row in later] == pytest.approx(left, abs=0.17 + 0.05)  # at most one validation apart
    assert ours.summary["validation"] == pytest.approx(120 / 168)
    assert ours.summary["wall_s"] == 168


def test_time_left_of_a_resumed_fit(tmp_path, monkeypatch):
    half = timed_fit(tmp_path, monkeypatch, max_epochs=3)[3]
    half.save_checkpoint(tmp_path / "half.ckpt")
    ours, rows, clock, _ = timed_fit(tmp_path, monkeypatch, ckpt_path=tmp_path / "half.ckpt")
    assert clock.now == 24 + 2 * 10
    assert rows[0]["eta_min"] == pytest.approx(20 / 60, abs=0.05)
    left = [(clock.now - row["now"]) / 60 for row in rows[2:]]
    assert [row["eta_min"] for row in rows[2:]] == pytest.approx(left, abs=0.17 + 0.05)  # at most one validation apart
    assert [row["step"] for row in rows] == [27, 31, 35, 39, 43, 47]  # the axis goes on
    assert ours.summary["steps"] == 24
    assert ours.summary["samples/s"] == pytest.approx(2.0)


def test_time_left_counts_optimizer_steps_under_accumulation(tmp_path, monkeypatch):
    options = {"max_epochs": -1, "max_steps": 10, "accumulate_grad_batches": 4, "limit_val_batches": 0}
    ours, rows, clock, _ = timed_fit(tmp_path, monkeypatch, **options)
    assert clock.now == 40
    assert [row["eta_min"] for row in rows] == pytest.approx([(40 - row["now"]) / 60 for row in rows], abs=0.05)
    assert ours.summary["steps"] == 10
    assert ours.summary["samples/s"] == pytest.approx(2.0)
    # Before the first step only the setting can tell.
    assert timed_fit(tmp_path, monkeypatch, window=2, **options)[1][0]["eta_min"] == pytest.approx(38 / 60, abs=0.05)


def test_two_optimizers_count_twice_for_max_steps(tmp_path, monkeypatch):
    options = {"max_epochs": -1, "max_steps": 40, "limit_val_batches": 0}
    ours, rows, clock, _ = timed_fit(tmp_path, monkeypatch, automatic=False, **options)
    assert clock.now == 20
    assert [row["eta_min"] for row in rows] == pytest.approx([(20 - row["now"]) / 60 for row in rows], abs=0.05)
    assert ours.summary["steps"] == 20


def test_the_nearest_limit_counts(tmp_path, monkeypatch):
    _, rows, *_ = timed_fit(tmp_path, monkeypatch, Timer(duration=timedelta(hours=9)), max_epochs=100_000, max_steps=99)
    assert rows[0]["eta_min"] == pytest.approx(95 / 60, abs=0.05)
    _, rows, *_ = timed_fit(tmp_path, monkeypatch, Timer(duration=timedelta(seconds=30)), limit_val_batches=0)
    assert rows[0]["eta_min"] == pytest.approx(0.5, abs=0.05)


def test_no_end_no_time_left(tmp_path, monkeypatch):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch >= 1

    _, rows, *_ = timed_fit(tmp_path, monkeypatch, Stop(), Timer(duration=None), max_epochs=-1)
    assert rows
    assert all("eta_min" not in row for row in rows)


def test_an_iterable_set_without_length_tells_after_its_first_epoch(tmp_path, monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.zeros(16, 2))

    data = DataLoader(Stream(), batch_size=2)
    _, rows, clock, _ = timed_fit(tmp_path, monkeypatch, data=data, max_epochs=3, limit_val_batches=0)
    assert ["eta_min" in row for row in rows] == [False, False, True, True, True, True]
    assert rows[2]["eta_min"] == pytest.approx((clock.now - rows[2]["now"]) / 60, abs=0.05)


def test_several_loggers_and_barebones(tmp_path, monkeypatch, capsys):
    ours = MemoryAndThroughput(every_n_steps=2)
    model = Worker()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(max_epochs=1, accelerator="cpu", barebones=True, callbacks=[ours]).fit(
            model, DataLoader(Slow(8, 0.0), batch_size=2)
        )
    assert ours.summary["steps"] == 4
    assert "peak reserved" in capsys.readouterr().out


def test_the_bar_shows_the_minutes(tmp_path):
    shown = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            shown.update(trainer.progress_bar_metrics)

    fit(tmp_path, MemoryAndThroughput(every_n_steps=3), Look())
    assert shown["eta_min"] == pytest.approx(0.0, abs=0.1)


def test_no_host_synchronisation_in_the_step(tmp_path, monkeypatch):
    """Neither a tensor is read nor the device waited for, in the windows' last batch either."""
    calls, inside = [], []

    def watch(owner, name):
        original = getattr(owner, name)

        def method(*args, **kwargs):
            if inside:
                calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    for name in ("item", "cpu", "tolist", "__float__", "__bool__", "__int__", "numpy"):
        watch(torch.Tensor, name)
    watch(torch.cuda, "synchronize")

    class Watched(MemoryAndThroughput):
        def on_train_batch_start(self, *args):
            inside.append(1)
            super().on_train_batch_start(*args)
            inside.clear()

        def on_train_batch_end(self, *args):
            inside.append(1)
            super().on_train_batch_end(*args)
            inside.clear()

    fit(tmp_path, Watched(every_n_steps=1), logger=CSVLogger(tmp_path))
    assert calls == []


def test_median_and_spread_of_windows(tmp_path, monkeypatch):
    class Slower(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            # The first window takes 1 s per batch, the second 2 s, the third 3 s.
            pl_module.clock.now += batch_idx // 4

    data = DataLoader(Slow(24, 0.0), batch_size=2)
    ours, rows, *_ = timed_fit(tmp_path, monkeypatch, Slower(), data=data, max_epochs=1, limit_val_batches=0)
    assert [row["samples/s"] for row in rows] == pytest.approx([2.0, 1.0, 2 / 3])
    assert ours.summary["samples/s_median"] == pytest.approx(1.0)
    assert ours.summary["samples/s_iqr"] == pytest.approx((2.0 - 2 / 3) / 2)
    assert ours.summary["windows"] == 3


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader([1]), "num_workers (now 0) or prefetch_factor, keep"),
        ({"a": DataLoader([1], num_workers=2, prefetch_factor=3)}, "num_workers (now 2) or prefetch_factor (now 3)"),
        ([iter(()), DataLoader([1], num_workers=1)], "num_workers (now 1) or prefetch_factor (now 2)"),
        (iter(()), "what the loader, the transfer to the device and other callbacks do"),
        (None, "what the loader"),
    ],
)
def test_remedies_for_waiting(loader, words):
    line = monitor._waiting_remedy(0.41, loader)
    assert line.startswith("41% of the training time")
    assert words in line
    assert "\n" not in line


def test_no_remedy_without_waiting(tmp_path, monkeypatch, capsys):
    timed_fit(tmp_path, monkeypatch, max_epochs=1)
    assert "num_workers" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("largest", "accumulate", "words"),
    [
        (12, 1, "keeps the effective batch: 6 and 2 in place of batch_size 12 and accumulate_grad_batches 1"),
        (5, 4, "nearly keeps the effective batch: 3 and 8 in place of batch_size 5 and accumulate_grad_batches 4"),
        (1, 8, "one sample already"),
    ],
)
def test_the_warning_names_the_numbers(largest, accumulate, words):
    ours = MemoryAndThroughput()
    ours._largest = largest
    with pytest.warns(UserWarning, match=words):
        ours._check(7.9, 8.0, accumulate)


def test_the_table_names_the_card():
    s = dict.fromkeys(("samples/s_median", "samples/s_iqr", "windows", "data_wait", "validation", "steps"), 1)
    text = monitor._table(s | {"mem_gb": 3.5, "mem_alloc_gb": 3.4, "card_gb": 8.0, "seconds": 3725, "wall_s": 4000})
    assert text.splitlines()[0].split() == ["peak", "reserved", "3.50", "GB", "of", "8.0", "GB"]
    assert "of 1:02:05 of training" in text
    assert all(len(line) < 80 for line in text.splitlines())


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
