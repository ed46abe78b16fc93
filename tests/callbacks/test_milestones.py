import warnings

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_callbacks import MilestoneGuard
from torch.utils.data import DataLoader, TensorDataset


class Scripted(LightningModule):
    """Logs 10, 9, 8, ... as `v` (one less per epoch) and its negative as `w`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        self.log("t", 1.0, on_step=False, on_epoch=True)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        value = 10.0 - self.current_epoch
        self.log_dict({"v": value, "w": -value, "nan": float("nan")})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(tmp_path, *callbacks, epochs=4, ckpt=None, sanity=0, **options):
    data = DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=1)
    checkpoints = any(isinstance(cb, ModelCheckpoint) for cb in callbacks)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=sanity,
        callbacks=list(callbacks),
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Scripted(), data, data, ckpt_path=ckpt)
    return trainer, [str(w.message) for w in caught if "expected" in str(w.message) or "Milestone" in str(w.message)]


def test_a_missed_milestone_gives_one_line(tmp_path):
    _, lines = fit(tmp_path, MilestoneGuard("v", {2: 5.0}, mode="min", advice="Look at the data."))
    assert lines == ["Epoch 2: v is 9, but at most 5 was expected by epoch 2. Look at the data."]


def test_without_advice_the_line_names_causes(tmp_path):
    _, (line,) = fit(tmp_path, MilestoneGuard("v", {2: 5.0}, mode="min"))
    assert "learning rate" in line


@pytest.mark.parametrize(
    ("monitor", "mode", "bound", "count"),
    [("v", "min", 9.0, 0), ("v", "min", 8.9, 1), ("w", "max", -9.0, 0), ("w", "max", -8.9, 1), ("nan", "min", 1e9, 1)],
)
def test_bounds_are_inclusive_and_nan_fails(tmp_path, monitor, mode, bound, count):
    _, lines = fit(tmp_path, MilestoneGuard(monitor, {2: bound}, mode=mode), epochs=2)
    assert len(lines) == count


def test_each_milestone_is_judged_once(tmp_path):
    _, lines = fit(tmp_path, MilestoneGuard("v", {1: 0.0, 3: 0.0, 9: 0.0}, mode="min"), val_check_interval=2)
    assert [line.split(":")[0] for line in lines] == ["Epoch 1", "Epoch 3"]


def test_a_milestone_between_validations_is_judged_at_the_next(tmp_path):
    guard = MilestoneGuard("v", {1: 0.0, 3: 7.5}, mode="min")
    _, lines = fit(tmp_path, guard, check_val_every_n_epoch=4)
    assert lines == []  # v = 7 at epoch 4 reaches the later milestone; the earlier one is past
    guard = MilestoneGuard("v", {1: 0.0, 3: 6.5}, mode="min", advice="-")
    _, lines = fit(tmp_path, guard, check_val_every_n_epoch=4)
    assert lines == ["Epoch 4: v is 7, but at most 6.5 was expected by epoch 3. -"]


def test_a_validation_within_the_epoch_does_not_count_it_as_finished(tmp_path):
    seen = []

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(guard._judged)

    guard = MilestoneGuard("v", {1: 100.0}, mode="min")
    fit(tmp_path, guard, Look(), epochs=1, val_check_interval=2)
    assert seen == [0, 1]


def test_stop_ends_the_training(tmp_path):
    trainer, lines = fit(tmp_path, MilestoneGuard("v", {2: 5.0}, mode="min", action="stop"))
    assert trainer.current_epoch == 2
    assert "stops here" in lines[0]
    trainer, lines = fit(tmp_path, MilestoneGuard("v", {2: 9.0}, mode="min", action="stop"))
    assert trainer.current_epoch == 4
    assert lines == []


def test_the_sanity_check_is_no_validation(tmp_path):
    guard = MilestoneGuard("v", {1: 100.0}, mode="min")
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((guard._judged, guard._seen))

    fit(tmp_path, guard, Look(), epochs=1, sanity=1)
    assert seen == [(0, False)]


def test_a_resumed_run_does_not_repeat(tmp_path):
    _, lines = fit(
        tmp_path, MilestoneGuard("v", {1: 0.0}, mode="min"), ModelCheckpoint(tmp_path, save_last=True), epochs=2
    )
    assert len(lines) == 1
    _, lines = fit(tmp_path, MilestoneGuard("v", {1: 0.0}, mode="min"), ckpt=tmp_path / "last.ckpt")
    assert lines == []


def test_several_guards_live_together(tmp_path):
    _, lines = fit(tmp_path, MilestoneGuard("v", {1: 0.0}, mode="min"), MilestoneGuard("w", {1: 0.0}, mode="max"))
    assert [line.split()[2] for line in lines] == ["v", "w"]


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'val'.*'v', 'w'"):
        fit(tmp_path, MilestoneGuard("val", {2: 0.0}, mode="min", action="stop"))
    _, lines = fit(tmp_path, MilestoneGuard("val", {2: 0.0}, mode="min"))  # a warning must not end a run
    assert len(lines) == 1
    assert "Not judged" in lines[0]
    _, lines = fit(tmp_path, MilestoneGuard("val", {9: 0.0}, mode="min", action="stop"))
    assert len(lines) == 1
    assert "will fail at epoch 9" in lines[0]


def test_a_metric_of_the_training_epoch_is_not_taken_for_missing(tmp_path):
    _, lines = fit(tmp_path, MilestoneGuard("t", {3: 0.0}, mode="min"))
    assert len(lines) == 1
    assert lines[0].startswith("Epoch 3: t is 1")


def test_yaml_reaches_the_constructor():
    parser = ArgumentParser()
    parser.add_class_arguments(MilestoneGuard, "guard")
    text = "guard: {monitor: v, milestones: {10: 4, 50: 2.5}, mode: min}"
    guard = parser.instantiate(parser.parse_string(text)).guard
    assert guard.milestones == {10: 4.0, 50: 2.5}
    assert all(isinstance(key, int) for key in guard.milestones)


@pytest.mark.parametrize("wrong", [{"milestones": {}}, {"milestones": {0: 1.0}}, {"mode": "x"}, {"action": "x"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(MisconfigurationException, match="MilestoneGuard"):
        MilestoneGuard(**({"monitor": "v", "milestones": {1: 1.0}, "mode": "min"} | wrong))
