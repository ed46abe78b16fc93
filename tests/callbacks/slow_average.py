"""A slow average in float64, a recorder of what it needs, and a toy to train."""

import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 8


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def slow_average(history, *, decay, every=1):
    """The definition: starts at the first entry, moves at each `every`-th one; integers are the latest.

    Args:
        history: States in float64, one per optimizer step.
        decay: Share of the old average that one step keeps.
        every: Steps per update.
    """
    average = dict(history[0])
    for state in history[every::every]:
        for name, live in state.items():
            average[name] = decay**every * average[name] + (1 - decay**every) * live
    return average | {name: live for name, live in history[-1].items() if name.endswith("num_batches_tracked")}


class Steps(Callback):
    """States in float64: one at the start, one after each batch that changed a trainable parameter.

    Nobody's step counter is asked: a step is real if it moved something.
    """

    def __init__(self):
        self.history, self.names = [], []

    def on_train_start(self, trainer, pl_module):
        self.names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        if not self.history:
            self.history.append(self._state(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = self._state(pl_module)
        if any(not torch.equal(state[name], self.history[-1][name]) for name in self.names):
            self.history.append(state)

    @staticmethod
    def _state(module):
        return {name: tensor.double() for name, tensor in weights(module).items()}


class Do(Callback):
    """Run a function in one hook."""

    def __init__(self, hook, function):
        setattr(self, hook, function)


def toy_of(base):
    """The toy as a subclass of one package's LightningModule."""

    class Toy(base):
        """Three layers with BatchNorm; remembers the weights that it had in each hook."""

        def __init__(self, *, norm=True, compiled=False, fused=False, optimizers=1, none_at=(), inf_at=()):
            super().__init__()
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 1))
            self.net = torch.compile(net, backend="eager") if compiled else net
            self.fused, self.n_optimizers, self.none_at, self.inf_at = fused, optimizers, none_at, inf_at
            self.automatic_optimization = optimizers == 1
            self.seen = {}

        def look(self, hook):
            self.seen.setdefault(hook, []).append(weights(self))

        def training_step(self, batch, batch_idx):
            if batch_idx in self.none_at:
                return None
            loss = self.net(batch[0]).float().square().mean()
            if batch_idx in self.inf_at:
                loss = loss * float("inf")
            if not self.automatic_optimization:
                self.manual_step(loss)
            return loss

        def manual_step(self, loss):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def validation_step(self, batch, batch_idx):
            self.look("validation_step")
            self.log("v", self.net(batch[0]).float().square().mean())

        def on_validation_epoch_end(self):
            self.look("validation_epoch_end")

        def test_step(self, batch, batch_idx):
            self.look("test_step")

        def predict_step(self, batch, batch_idx):
            self.look("predict_step")

        def configure_optimizers(self):
            if self.n_optimizers == 1:
                return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)
            return [
                torch.optim.SGD(layer.parameters(), lr=0.01) for layer in self.modules() if isinstance(layer, nn.Linear)
            ]

    return Toy


Toy = toy_of(LightningModule)


def loader(batches=BATCHES):
    x = torch.randn(2 * batches, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=2)


def trainer_for(folder, *callbacks, of=Trainer, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    common = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, "enable_checkpointing": saves}
    return of(callbacks=list(callbacks), **(quiet | common | options))


def run(trainer, method, model, **options):
    """Call a method of the Trainer; its advice about tiny runs is left out."""
    loaders = (loader(), loader(1)) if method == "fit" else (loader(1),)
    with warnings.catch_warnings():
        advice = ".*(does not have many workers|returned `None`|Be aware that when using `ckpt_path`|not empty).*"
        warnings.filterwarnings("ignore", advice)
        return getattr(trainer, method)(model, *loaders, **options)


def read(path):
    return torch.load(path, weights_only=True)
