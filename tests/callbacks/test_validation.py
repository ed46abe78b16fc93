import time
import warnings
from datetime import timedelta

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks.ema import EMA
from lit_callbacks.milestones import MilestoneGuard
from lit_callbacks.validation import ValidationSchedule, full_epochs, is_full_epoch, training_ends
from torch.utils.data import DataLoader, TensorDataset

BATCHES, VAL_BATCHES = 4, 3


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.judged = []

    def step(self, metrics, epoch=None):
        self.judged.append(float(metrics))
        super().step(metrics, epoch)


class Scripted(LightningModule):
    """`v` is the number of optimizer steps so far, and far lower, "better", if not all batches were seen."""

    def __init__(self, plateau=None, loaders=1, module_mode=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.plateau, self.loaders, self.module_mode = plateau, loaders, module_mode
        self.ran = []  # (finished epochs, batch within the epoch, validation batches, full)

    def training_step(self, batch, batch_idx):
        self.log("t", float(self.global_step), on_step=False, on_epoch=True)
        return self.weight.square()

    def on_validation_epoch_start(self):
        self.seen = 0
        self.asked = ValidationSchedule.is_full(self.trainer)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen += 1
        self.log("step_value", 1.0, on_step=True, on_epoch=True)

    def on_validation_epoch_end(self):
        if self.module_mode:
            self.log("quick", float(self.global_step))
            if self.asked:
                self.log("v", float(self.global_step))
        else:
            self.log("v", float(self.global_step) - (1000 if self.seen < VAL_BATCHES * self.loaders else 0))
        if not self.trainer.sanity_checking:
            batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self.ran.append((self.trainer.current_epoch + 1, batch, self.seen, self.asked))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        if self.plateau is None:
            return optimizer
        self.scheduler = Plateau(optimizer, patience=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "monitor": "v", **self.plateau}}

    def epochs(self, full=True):
        return [epoch for epoch, _, _, asked in self.ran if asked == full]


class Checkpoint(ModelCheckpoint):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.judged = []

    def check_monitor_top_k(self, trainer, current=None):
        if current is not None:
            self.judged.append(float(current))
        return super().check_monitor_top_k(trainer, current)


class Stopping(EarlyStopping):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.judged = []

    def _evaluate_stopping_criteria(self, current):
        self.judged.append(float(current))
        return super()._evaluate_stopping_criteria(current)


class Guard(MilestoneGuard):
    def __init__(self, monitor, milestones):
        super().__init__(monitor, milestones, mode="min")
        self.judged = []

    def _report(self, trainer, due, finished, got, expected):
        self.judged.append(got)


class StopAt(Callback):
    """Asks for the end in a chosen hook of a chosen epoch."""

    def __init__(self, epoch, hook):
        self.epoch, self.hook = epoch, hook

    def _stop(self, trainer, hook, due=True):
        if hook == self.hook and trainer.current_epoch + 1 == self.epoch and due and not trainer.sanity_checking:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._stop(trainer, "batch", batch_idx == 1)
        self._stop(trainer, "last_batch", batch_idx == BATCHES - 1)

    def on_validation_end(self, trainer, pl_module):
        self._stop(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._stop(trainer, "epoch")


def fit(tmp_path, *given, model=None, epochs=12, ckpt=None, sanity=0, loaders=1, logger=False, **options):
    def data(count):
        return DataLoader(TensorDataset(torch.zeros(count, 1)), batch_size=1)

    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=any(isinstance(cb, callbacks.Checkpoint) for cb in given),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=sanity,
        callbacks=list(given),
        **options,
    )
    model = Scripted(loaders=loaders) if model is None else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        trainer.fit(model, data(BATCHES), [data(VAL_BATCHES) for _ in range(loaders)], ckpt_path=ckpt)
    return trainer, model


def steps(epochs):
    return [float(BATCHES * epoch) for epoch in epochs]


def schedule(**kwargs):
    return ValidationSchedule(**({"every_n_epochs": 4, "dense_from": 1.0, "cheap_batches": 2} | kwargs))


# ------------------------------------------------------------------ pure functions


def slow_full_epochs(max_epochs, every_n, milestones, dense_from, dense_every, first):
    chosen = set(milestones) | ({1} if first else set()) | {max_epochs}
    chosen |= {e for e in range(1, max_epochs + 1) if every_n and e % every_n == 0}
    epoch = max_epochs
    while epoch * 1000 > round(dense_from * 1000) * max_epochs:
        chosen.add(epoch)
        epoch -= dense_every
    return sorted(e for e in chosen if 1 <= e <= max_epochs)


@pytest.mark.parametrize("max_epochs", [1, 2, 7, 10, 30])
@pytest.mark.parametrize("every_n", [0, 1, 4])
@pytest.mark.parametrize("dense", [(0.0, 3), (0.7, 1), (0.9, 2), (1.0, 1)])
@pytest.mark.parametrize(("milestones", "first"), [((), False), ((3, 50), True)])
def test_full_epochs_equal_a_slow_list(max_epochs, every_n, dense, milestones, first):
    rule = (max_epochs, every_n, milestones, *dense, first)
    assert full_epochs(*rule) == slow_full_epochs(*rule)


def test_a_run_of_unknown_length_has_no_end():
    assert full_epochs(-1, 5, [2], 0.5, 1, upto=11) == [2, 5, 10]
    assert not is_full_epoch(7, -1, 0)
    with pytest.raises(ValueError, match="upto"):
        full_epochs(-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_n_epochs": -1},
        {"milestones": [0]},
        {"dense_from": 1.1},
        {"dense_every": 0},
        {"cheap": "none"},
        {"cheap_batches": 0},
    ],
)
def test_bad_arguments_name_themselves(wrong):
    with pytest.raises(MisconfigurationException, match=f"ValidationSchedule: {next(iter(wrong))} expected .*, got"):
        ValidationSchedule(**wrong)


def test_arguments_come_from_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(ValidationSchedule, "s")
    config = parser.parse_args(["--s.milestones=[3,1]", "--s.cheap=skip", "--s.dense_from=0.5"])
    assert parser.instantiate_classes(config).s.full_epochs(8) == [1, 3, 5, 6, 7, 8]


def test_two_schedules_and_impossible_monitors_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"more than one .*ValidationSchedule"):  # Lightning's own check
        fit(tmp_path, schedule(), schedule())
    with pytest.raises(MisconfigurationException, match=r"cheap expected limit, which alone logs 'v_cheap'.*EarlySt"):
        fit(tmp_path, schedule(cheap="skip"), EarlyStopping("v_cheap"))


# ----------------------------------------------------------------- which validations run


def test_limit_runs_a_few_batches_under_other_names(tmp_path):
    trainer, model = fit(tmp_path, schedule(milestones=[3]), epochs=6, logger=CSVLogger(tmp_path))
    assert model.epochs() == [3, 4, 6]
    assert [seen for *_, seen, _ in model.ran] == [2, 2, 3, 3, 2, 3]
    assert trainer.callback_metrics["v"] == 24
    assert "v_cheap" not in trainer.callback_metrics  # the last validation logged none
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names, table = rows[0].split(","), [row.split(",") for row in rows[1:]]
    assert {"v", "v_cheap", "step_value_step", "step_value_step_cheap", "step_value_epoch_cheap"} <= set(names)

    def column(name):
        return [float(row[names.index(name)]) for row in table if row[names.index(name)]]

    assert column("v") == steps([3, 4, 6])
    assert column("v_cheap") == [x - 1000 for x in steps([1, 2, 5])]


def test_limit_holds_for_each_loader_and_names_keep_their_loader(tmp_path):
    keys = []

    class Keys(Callback):
        def on_validation_end(self, trainer, pl_module):
            keys.append({k for k in trainer.callback_metrics if "_idx_" in k and "_epoch" not in k})

    _, model = fit(tmp_path, schedule(), Keys(), epochs=5, loaders=2)
    assert [seen for *_, seen, _ in model.ran] == [4, 4, 4, 6, 6]
    assert keys[0] == {"step_value_cheap/dataloader_idx_0", "step_value_cheap/dataloader_idx_1"}
    assert keys[3] == {"step_value/dataloader_idx_0", "step_value/dataloader_idx_1"}


def test_skip_runs_nothing_at_other_epochs(tmp_path):
    _, model = fit(tmp_path, schedule(cheap="skip"), epochs=10)
    assert model.ran == [(4, 4, 3, True), (8, 4, 3, True), (10, 4, 3, True)]


def test_the_module_is_told(tmp_path):
    model = Scripted(module_mode=True)
    model.full_validation = True
    told = []

    class Told(Callback):
        def on_validation_start(self, trainer, pl_module):
            told.append(pl_module.full_validation)

    checkpoint = Checkpoint(tmp_path, monitor="v", save_top_k=-1)
    quick = Stopping("quick", patience=99)
    fit(tmp_path, schedule(cheap="module"), Told(), checkpoint, quick, model=model, epochs=6)
    assert told == [asked for *_, asked in model.ran] == [False, False, False, True, False, True]
    assert model.full_validation
    assert checkpoint.judged == steps([4, 6])
    assert quick.judged == steps([1, 2, 3, 4, 5, 6])


def test_is_full_outside_cheap_validations(tmp_path):
    asked = []

    class Ask(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            asked.append(ValidationSchedule.is_full(trainer))

        def on_sanity_check_end(self, trainer, pl_module):
            assert ValidationSchedule.is_full(trainer)

    callback = schedule()
    trainer, model = fit(tmp_path, callback, Ask(), epochs=5, sanity=1)
    assert asked == [False, False, False, True, True]
    assert ValidationSchedule.is_full(trainer)
    (metrics,) = trainer.validate(model, DataLoader(TensorDataset(torch.zeros(3, 1)), batch_size=1), verbose=False)
    assert metrics["v"] == 20  # of all batches


def test_every_validation_of_a_full_epoch_is_full(tmp_path):
    _, model = fit(tmp_path, schedule(), epochs=5, val_check_interval=0.5)
    full = [(4, 2), (4, 4), (5, 2), (5, 4)]
    assert [(epoch, batch) for epoch, batch, _, asked in model.ran if asked] == full
    assert len(model.ran) == 10


@pytest.mark.parametrize("cheap", ["skip", "limit"])
def test_a_full_epoch_without_validation_is_made_up_for(tmp_path, cheap):
    _, model = fit(tmp_path, schedule(every_n_epochs=5, cheap=cheap), epochs=13, check_val_every_n_epoch=2)
    assert model.epochs() == [6, 10, 13]  # the last epoch is validated although Lightning would not
    assert model.epochs(full=False) == ([] if cheap == "skip" else [2, 4, 8, 12])


def test_validation_by_total_batches(tmp_path):
    callback = schedule(every_n_epochs=2)
    _, model = fit(tmp_path, callback, epochs=5, check_val_every_n_epoch=None, val_check_interval=6)
    # Validations after batches 6, 12 and 18: in epochs 2, 3 and 5; epoch 4 is made up for by the last, which is full.
    assert [(e, b, full) for e, b, _, full in model.ran] == [(2, 2, True), (3, 4, False), (5, 2, True)]


def test_a_trainer_without_validation_is_left_alone(tmp_path):
    _, model = fit(tmp_path, schedule(), epochs=2, limit_val_batches=0)
    assert model.ran == []


# ----------------------------------------------------------------------- the last validation


@pytest.mark.parametrize("cheap", ["skip", "limit"])
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(("hook", "batch"), [("batch", 2), ("last_batch", 4), ("validation", 4), ("epoch", 4)])
def test_whoever_stops_the_run_it_ends_with_a_full_validation(tmp_path, cheap, checkpoint, hook, batch):
    if cheap == "skip" and hook == "validation":
        pytest.skip("there is no validation to stop in")
    judge = [Checkpoint(tmp_path, monitor="v", save_top_k=-1)] if checkpoint else []
    stopping = Stopping("v", patience=99)
    logger = CSVLogger(tmp_path)
    trainer, model = fit(tmp_path, schedule(cheap=cheap), StopAt(3, hook), stopping, *judge, logger=logger)
    assert model.epochs() == [3]
    assert model.ran[-1][:2] == (3, batch)
    last = float(8 + batch)
    assert stopping.judged == [last]
    assert trainer.callback_metrics["v"] == last
    assert all(callback.judged == [last] for callback in judge)
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    (row,) = [r for r in (dict(zip(names, line.split(","), strict=True)) for line in rows[1:]) if r["v"]]
    assert (row["epoch"], row["step"]) == ("2", str(7 + batch))  # as at any end of this epoch


def test_an_early_stopping_of_a_train_metric_ends_with_a_full_validation(tmp_path):
    train = EarlyStopping("t", mode="min", patience=2)  # t rises, so epoch 3 is the last
    checkpoint = Checkpoint(tmp_path, monitor="v")
    trainer, model = fit(tmp_path, schedule(), train, checkpoint)
    assert (trainer.current_epoch, model.epochs(), checkpoint.judged) == (3, [3], [12.0])
    assert torch.load(checkpoint.best_model_path, weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("max_steps", [8, 10])
def test_max_steps(tmp_path, max_steps):
    _, model = fit(tmp_path, schedule(), epochs=-1, max_steps=max_steps)
    assert model.ran[-1] == ((2, 4, 3, True) if max_steps == 8 else (3, 2, 3, True))


def test_max_steps_give_the_length_of_the_run(tmp_path):
    _, model = fit(tmp_path, schedule(dense_from=0.5, every_n_epochs=0), epochs=-1, max_steps=16)
    assert model.epochs() == [3, 4]


def test_max_time(tmp_path):
    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            time.sleep(0.03 if trainer.current_epoch == 1 else 0)

    limit = timedelta(seconds=0.1)
    _, model = fit(tmp_path, schedule(cheap="skip"), Slow(), epochs=-1, max_time=limit, check_val_every_n_epoch=5)
    assert len(model.ran) == 1
    assert model.ran[-1][-1]


def test_min_epochs_are_waited_for(tmp_path):
    _, model = fit(tmp_path, schedule(), StopAt(1, "batch"), min_epochs=3)
    assert [(epoch, full) for epoch, _, _, full in model.ran] == [(1, False), (2, False), (3, True)]


def test_the_end_is_known_in_hooks(tmp_path):
    ends = []

    class Ends(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ends.append(training_ends(trainer))

        def on_train_epoch_end(self, trainer, pl_module):
            ends.append(training_ends(trainer))

    fit(tmp_path, Ends(), epochs=2)
    assert ends == [False] * 8 + [True] * 2


# ----------------------------------------------------------------------- what is judged

FULL = [4, 8, 12]


@pytest.mark.parametrize("cheap", ["skip", "limit"])
@pytest.mark.parametrize(("sanity", "top"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("on_train_end", [None, True, False])
def test_checkpoints_judge_full_validations_once(tmp_path, cheap, sanity, top, on_train_end):
    options = {"save_top_k": top, "mode": "max", "save_last": True, "save_on_train_epoch_end": on_train_end}
    checkpoint = Checkpoint(tmp_path, monitor="v", filename="{epoch}", **options)
    fit(tmp_path, schedule(cheap=cheap), checkpoint, sanity=sanity)
    assert checkpoint.judged == steps(FULL)
    kept = {f"epoch={epoch - 1}.ckpt" for epoch in FULL[-top:]} | {"last.ckpt"}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == kept
    assert checkpoint.best_model_score == 48


@pytest.mark.parametrize("cheap", ["skip", "limit"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("at_epoch_end", [None, False])
def test_patience_counts_full_validations(tmp_path, cheap, strict, at_epoch_end):
    stopping = Stopping("v", patience=2, strict=strict, check_on_train_epoch_end=at_epoch_end, verbose=True)
    trainer, model = fit(tmp_path, schedule(cheap=cheap), stopping, epochs=40)  # v rises: never better than the first
    assert stopping.judged == steps(FULL)
    assert trainer.current_epoch == 12
    assert model.epochs() == FULL


@pytest.mark.parametrize("cheap", ["skip", "limit"])
def test_the_guard_judges_full_validations(tmp_path, cheap):
    guard = Guard("v", dict.fromkeys(range(1, 13), 0.0))
    fit(tmp_path, schedule(cheap=cheap), guard)
    assert guard.judged == steps(FULL)


@pytest.mark.parametrize("cheap", ["skip", "limit"])
@pytest.mark.parametrize(
    ("interval", "frequency"), [("epoch", 1), ("epoch", 2), ("epoch", 3), ("step", 1), ("step", 2)]
)
def test_the_plateau_judges_full_validations(tmp_path, cheap, interval, frequency):
    model = Scripted(plateau={"strict": frequency < 3, "interval": interval, "frequency": frequency})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fit(tmp_path, schedule(cheap=cheap), model=model)
    hit = [e for e in FULL if e % frequency == 0 or interval == "step"]
    assert model.scheduler.judged == steps(hit)


def test_several_validations_within_an_epoch(tmp_path):
    within = Checkpoint(tmp_path / "a", monitor="v", save_top_k=-1)
    stopping = Stopping("v", patience=99, check_on_train_epoch_end=True)
    fit(tmp_path, schedule(), stopping, within, val_check_interval=3)
    at_end = Checkpoint(tmp_path / "b", monitor="v", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, schedule(), at_end, val_check_interval=3)
    full = [float(4 * (epoch - 1) + 3) for epoch in FULL]  # after three of four batches
    assert within.judged == stopping.judged == at_end.judged == full


@pytest.mark.parametrize("on_train_end", [None, False])
def test_saves_triggered_by_steps_wait_for_a_full_value(tmp_path, on_train_end):
    options = {"every_n_train_steps": 6, "save_on_train_epoch_end": on_train_end}
    monitored = Checkpoint(tmp_path / "a", monitor="v", save_top_k=-1, **options)
    plain = Checkpoint(tmp_path / "b", filename="{step}", save_top_k=-1, **options)
    fit(tmp_path, schedule(), monitored, plain)
    assert monitored.judged == steps(FULL)
    saved = {f"step={step}.ckpt" for step in range(6, 49, 6)}
    assert {path.name for path in (tmp_path / "b").glob("*.ckpt")} == saved


def test_saves_triggered_by_time_go_on(tmp_path):
    plain = Checkpoint(tmp_path, filename="{step}", save_top_k=-1, train_time_interval=timedelta(0))
    fit(tmp_path, schedule(cheap="skip"), plain, epochs=2)
    assert len(list(tmp_path.glob("*.ckpt"))) == 8


def test_a_checkpoint_of_every_epoch_goes_on(tmp_path):
    every = Checkpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last="link")
    fit(tmp_path, schedule(cheap="skip"), every, epochs=3)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"epoch={e}.ckpt" for e in range(3)} | {"last.ckpt"}


def test_train_metrics_are_judged_at_every_epoch(tmp_path):
    checkpoint = Checkpoint(tmp_path, monitor="t", save_top_k=-1)
    stopping = Stopping("t", patience=99)
    fit(tmp_path, schedule(), checkpoint, stopping)
    assert len(checkpoint.judged) == len(stopping.judged) == 12


def test_cheap_values_can_be_watched_too(tmp_path):
    stopping = Stopping("v_cheap", patience=99)
    fit(tmp_path, schedule(), stopping)
    assert stopping.judged == [x - 1000 for x in steps(e for e in range(1, 13) if e not in FULL)]


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        (lambda path: EarlyStopping("typo"), RuntimeError),
        (lambda path: ModelCheckpoint(path, monitor="typo"), Exception),
    ],
)
def test_a_typo_is_named_at_the_first_full_validation(tmp_path, callback, error):
    model = Scripted()
    with pytest.raises(error, match="typo"):
        fit(tmp_path, schedule(), callback(tmp_path), model=model)
    assert model.epochs() == [4]


def test_stale_values_are_absent_until_the_next_full_validation(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append("v" in trainer.callback_metrics)

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics.get("v", -1)))

    fit(tmp_path, schedule(), Look(), epochs=6)
    assert seen == [*([False] * 4 + [-1.0]) * 3, *[False] * 4, 16.0, *[False] * 4, -1.0, *[False] * 4, 24.0]


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_metrics_written_by_callbacks_are_treated_alike(tmp_path, at_epoch_end):
    class Write(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.callback_metrics["written"] = trainer.callback_metrics.get("v", torch.tensor(-1.0)) + 1

    stopping = Stopping("written", patience=99, check_on_train_epoch_end=at_epoch_end)
    checkpoint = Checkpoint(tmp_path, monitor="written", save_on_train_epoch_end=at_epoch_end, save_top_k=-1)
    trainer, _ = fit(tmp_path, Write(), schedule(), stopping, checkpoint)
    assert stopping.judged == checkpoint.judged == [x + 1 for x in steps(FULL)]
    assert "written" in trainer.callback_metrics


def test_asking_out_of_turn_changes_nothing(tmp_path):
    class Ask(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)

        on_train_batch_start = on_validation_batch_start = lambda self, trainer, *args: self.on_train_batch_end(
            trainer, None, None, None, None
        )

    _, model = fit(tmp_path, Ask(), schedule(cheap="skip"), Ask())
    assert model.epochs() == FULL


# ------------------------------------------------------------------------ tidiness and resuming


def attributes(trainer, callbacks):
    loop = trainer.fit_loop.epoch_loop
    return [set(vars(owner)) for owner in (loop, loop.val_loop, loop.val_loop._results, *callbacks)]


def test_nothing_is_left_behind(tmp_path):
    class Before(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.before = attributes(trainer, watched)

    watched = [Stopping("v", patience=99), Guard("v", {1: 0.0}), Checkpoint(tmp_path, monitor="v")]
    before = Before()
    trainer, _ = fit(tmp_path, before, schedule(), *watched, epochs=5)
    assert attributes(trainer, watched) == before.before


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_nothing_is_left_behind_by_an_exception(tmp_path, hook):
    class Break(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.before = attributes(trainer, watched)

    def fail(trainer, *args, **kwargs):
        if trainer.current_epoch == 1:
            broken.trainer = trainer
            raise ValueError("broken")

    watched = [Stopping("v", patience=99), Checkpoint(tmp_path, monitor="v")]
    broken = Break()
    setattr(broken, hook, fail)
    with pytest.raises(ValueError, match="broken"):
        fit(tmp_path, broken, schedule(), OnExceptionCheckpoint(tmp_path), *watched)
    assert attributes(broken.trainer, watched) == broken.before
    assert broken.trainer.fit_loop.epoch_loop.val_loop._max_batches == [VAL_BATCHES]


@pytest.mark.parametrize("when", ["epoch_end", "validation_end", "batch"])
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize(
    ("cheap", "limit"),
    [("limit", {"epochs": 10}), ("skip", {"epochs": 10}), ("skip", {"epochs": -1, "max_steps": 40})],
)
def test_a_resumed_run_goes_on_with_the_schedule(tmp_path, cheap, when, at, limit):
    class Save(callbacks.Checkpoint):  # comes last, like Lightning's
        def _save(self, trainer, hook):
            if hook == when and trainer.current_epoch + 1 == at:
                trainer.save_checkpoint(tmp_path / "now.ckpt")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                self._save(trainer, "batch")

        def on_validation_end(self, trainer, pl_module):
            self._save(trainer, "validation_end")

        def on_train_epoch_end(self, trainer, pl_module):
            self._save(trainer, "epoch_end")

    stopping = Stopping("v", patience=99)
    save = Save()
    if cheap == "skip" and when == "validation_end" and at != 4:
        pytest.skip("there is no validation")
    _, model = fit(tmp_path, save, schedule(cheap=cheap), stopping, **limit)
    resumed = Stopping("v", patience=99)
    trainer, second = fit(tmp_path, schedule(cheap=cheap), resumed, **limit, ckpt=tmp_path / "now.ckpt")
    assert model.epochs() == [4, 8, 10]
    assert trainer.global_step == 40
    left = [e for e in [4, 8, 10] if e > at or (e == at and when == "batch")]
    assert second.epochs() == left
    # A file written while the validation of an epoch ended: whoever judges at the end of that epoch has yet to do it.
    judged = [e for e in [4, 8, 10] if e > at or (e == at and when != "epoch_end")]
    assert resumed.judged == steps(judged)
    assert resumed.best_score == stopping.best_score


def test_a_second_fit_goes_on(tmp_path):
    callback = schedule()
    trainer, model = fit(tmp_path, callback, epochs=5)
    trainer.fit_loop.max_epochs = 9
    data = DataLoader(TensorDataset(torch.zeros(BATCHES, 1)), batch_size=1)
    trainer.fit(model, data, data)
    assert model.epochs() == [4, 5, 8, 9]


def test_ema_beside_the_schedule(tmp_path):
    shown = []

    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            shown.append((trainer.current_epoch + 1, pl_module.weight.item()))

    def run(*more):
        ema = EMA(decay=0.9, warmup=False)
        checkpoint = ModelCheckpoint(
            tmp_path, monitor="v", mode="max", filename="{epoch}", enable_version_counter=False
        )
        shown.clear()
        _, model = fit(tmp_path, *more, ema, Look(), checkpoint, StopAt(6, "epoch"))
        return dict(shown), model.weight.item(), torch.load(checkpoint.best_model_path, weights_only=True)

    # Without the schedule every epoch is validated; with it, what is validated must be the same weights.
    shown_plain, weight, saved = run()
    shown_there, weight_there, saved_there = run(schedule())
    assert shown_plain == shown_there
    assert weight == weight_there
    for key in ("state_dict", "current_model_state"):
        assert saved[key]["weight"] == saved_there[key]["weight"]
    assert saved["state_dict"]["weight"] != saved["current_model_state"]["weight"]
    assert shown_plain[6] == float(saved["state_dict"]["weight"])
