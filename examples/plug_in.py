"""The callbacks of `lit_callbacks` in a project that knows nothing of this repository: torch and lightning alone.

The module finds a bright square in noise. Two methods of it are there for `PredictionLogger`: `plot_predictions` and
`sample_scores`. Everything else is what any Lightning module has.

    pip install torch lightning && pip install --no-deps lit_vision_tasks-*.whl
    python plug_in.py [FOLDER]
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_callbacks import (
    EMA,
    BatchSizeFit,
    GracefulStop,
    MemoryAndThroughput,
    MilestoneGuard,
    PredictionLogger,
    ValidationSchedule,
    WeightsExport,
)
from lit_callbacks.export import load_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SIDE = 16


def squares(count: int) -> TensorDataset:
    """Noise with a bright square of 4 x 4 pixels, and where its centre is."""
    centres = torch.randint(2, SIDE - 2, (count, 2))
    images = torch.rand(count, 1, SIDE, SIDE)
    for image, (y, x) in zip(images, centres.tolist(), strict=True):
        image[:, y - 2 : y + 2, x - 2 : x + 2] += 2.0
    return TensorDataset(images, centres.float())


def network(width: int) -> nn.Module:
    """From an image to two numbers."""
    first = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(first, nn.Flatten(), nn.Linear(width * SIDE**2 // 4, 2))


class Finder(LightningModule):
    """Finds the square."""

    def __init__(self, width: int = 8, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = network(width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        images, centres = batch
        return nn.functional.mse_loss(self.net(images), centres)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Distance in pixels."""
        images, centres = batch
        found = self.net(images)
        error = (found - centres).norm(dim=1)
        self.log("val/error", error.mean(), batch_size=len(error))
        return {"found": found, "error": error}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def plot_predictions(self, batch: list[Tensor], outputs: dict[str, Tensor]) -> Tensor:
        """The image (H, W, 3), the true centre in green, the found one in red."""
        picture = (batch[0][0, 0] / 3 * 255).byte()[..., None].repeat(1, 1, 3)
        for points, channel in ((batch[1], 1), (outputs["found"], 0)):
            y, x = points[0].round().long().clamp(0, SIDE - 1).tolist()
            picture[y, x] = torch.tensor([0, 0, 0], dtype=torch.uint8)
            picture[y, x, channel] = 255
        return picture

    def sample_scores(self, batch: list[Tensor], outputs: dict[str, Tensor]) -> Tensor:
        """Larger is worse."""
        return outputs["error"]


def main(folder: str) -> None:
    """Train, then read the weights back without Lightning."""
    torch.manual_seed(0)
    export = WeightsExport(prefix="net.")
    callbacks = [
        EMA(decay=0.99),
        MemoryAndThroughput(every_n_steps=4),
        BatchSizeFit(then="continue"),  # on a GPU only
        ValidationSchedule(every_n_epochs=3, cheap_batches=1),
        MilestoneGuard("val/error", {6: 6.0}, mode="min"),
        PredictionLogger(every_n_epochs=3, num_first=2, worst_k=2),
        GracefulStop(),
        export,
        ModelCheckpoint(monitor="val/error", save_last=True),
    ]
    trainer = Trainer(max_epochs=6, default_root_dir=folder, log_every_n_steps=4, callbacks=callbacks)
    train, validation = DataLoader(squares(256), 32, shuffle=True), DataLoader(squares(64), 32)
    trainer.fit(Finder(), train, validation)

    state, hyper_parameters = load_weights(export.artifacts[0])
    net = network(hyper_parameters["width"]).eval()
    net.load_state_dict(state)
    images, centres = squares(64).tensors
    with torch.inference_mode():
        error = (net(images) - centres).norm(dim=1).mean()
    print(f"error without Lightning: {error:.2f} pixels; weights: {export.artifacts[0]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "plug_in_run")
