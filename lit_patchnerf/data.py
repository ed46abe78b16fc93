"""The data module: a video, its patches and frames, and how they become batches on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_cli.errors import InputError
from lit_common.loaders import EpochBatches, IndexLoader, ResumableLoader, epoch_batches, worker_loader
from lit_common.store import Store, batches_done, cache_folder, choose_store, root_device
from lit_patchnerf.loaders import EvalFrames, Moments, StepBatches, TrainSamples
from lit_patchnerf.masks import load_mask
from lit_patchnerf.patches import Geometry, frame_patches
from lit_patchnerf.splits import FrameSplit, parse_split, split_frames
from lit_patchnerf.store import PreparedVideo, from_frames, place_frames, prepare_video
from lit_patchnerf.synthetic import SyntheticVideo

__all__ = ["PatchVideoData"]

Sample = Literal["patch", "frame"]
EvalFramesOf = Literal["all", "held_out"]
Region = tuple[int, int, int, int]
Known = tuple[Geometry, int, float]


class PatchVideoData(LightningDataModule):
    """The patches, or the frames, of one video.

    Pixels of the canvas that are padding have weight 0 in training, as hidden ones have: repeated borders are nothing
    to spend parameters on. A patch without any visible pixel is not trained on, neither are the embeddings of it.

    Args:
        video: A file that OpenCV decodes, or a folder of images; None draws a synthetic scene.
        synthetic: Options of `SyntheticVideo`, used without a video.
        crop: [height, width] of the centre crop of frames; see `plan_geometry`, as for the next two.
        patch_size: [height, width] of a patch in pixels.
        grid: [rows, cols] of patches.
        limit: Read so many frames at most, from the first one on.
        fps: Frames per second, over what the video says.
        data_split: `a_b_c`, see `split_frames`.
        split_seed: Deals the roles to the frames in a shuffled order.
        sample: What is trained on: `patch`, or the whole canvas of a `frame`.
        batch_size: Samples of an optimizer step, in each process.
        steps_per_batch: Optimizer steps whose samples one batch holds; no more than an epoch has.
        drop_last: Leave out the last samples of an epoch, those that do not fill an optimizer step. Otherwise they are
            filled up with samples of the epoch's beginning.
        seed: Of the order.
        eval_batch_size: Frames in a batch of evaluation and prediction.
        eval_frames: What validation and test decode: `all` frames, or those `held_out`, which are all where none is.
        mask: Pixels to hide in training: `inpaint_N` or an image file, see `load_mask`.
        embeddings: Provider of targets for the CLIP head: `file:PATH`, `timm:NAME`, `open_clip:NAME/WEIGHTS`,
            `transformers:NAME`, `toy` or `toy:DIM`; None for none.
        embeddings_weights: Local file of weights for `timm` and `open_clip`.
        predict_range: [first, last] frame to decode, both included; by default the whole video.
        predict_step: In frames; 0.5 also decodes halfway between two of them.
        region: [top, left, height, width] in pixels of the original frame that prediction is cut to.
        store: `gpu` (resident uint8), `ram`, `disk` (mapped from the cache), or `auto`.
        cache_dir: Of decoded frames and embeddings; `none` for none.
        num_workers: Worker processes where frames are not on the device.
        prefetch_factor: Batches per worker ahead.
        persistent_workers: Keep workers between epochs.
        pin_memory: Page-locked batches.

    Raises:
        InputError: with one line, before training starts, when a value or the video is not as expected.

    Example:
        >>> scene = {"frames": 4, "height": 16, "width": 32}
        >>> data = PatchVideoData(synthetic=scene, grid=[1, 2], data_split="3_3_4", batch_size=2, steps_per_batch=3)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> tuple(batch.indices.shape), tuple(batch.pixels.shape)
        ((3, 2), (3, 2, 3, 16, 16))
    """

    # Taken from a checkpoint unless the command line says otherwise: evaluation must see what training saw.
    checkpoint_fields = (
        "video",
        "synthetic",
        "crop",
        "patch_size",
        "grid",
        "limit",
        "fps",
        "data_split",
        "split_seed",
        "mask",
        "embeddings",
        "embeddings_weights",
    )

    def __init__(
        self,
        *,
        video: str | None = None,
        synthetic: dict[str, Any] | None = None,
        crop: list[int] | None = None,
        patch_size: list[int] | None = None,
        grid: list[int] | None = None,
        limit: int | None = None,
        fps: float | None = None,
        data_split: str | int = "1_1_1",
        split_seed: int | None = None,
        sample: Sample = "patch",
        batch_size: int = 8,
        steps_per_batch: int = 1,
        drop_last: bool = True,
        seed: int = 0,
        eval_batch_size: int = 4,
        eval_frames: EvalFramesOf = "all",
        mask: str | None = None,
        embeddings: str | None = None,
        embeddings_weights: str | None = None,
        predict_range: list[float] | None = None,
        predict_step: float = 1.0,
        region: list[int] | None = None,
        store: Store = "auto",
        cache_dir: str | None = None,
        num_workers: int = 4,
        prefetch_factor: int = 4,
        persistent_workers: bool = True,
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        # Only plain values: a checkpoint must open with weights_only=True.
        values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        self.save_hyperparameters(values, logger=False)
        for name, least in (("batch_size", 1), ("steps_per_batch", 1), ("eval_batch_size", 1), ("num_workers", 0)):
            if values[name] < least:
                raise InputError(f"data.{name} is {values[name]}, expected {least} or more")
        for name, choices in (("sample", Sample), ("eval_frames", EvalFramesOf), ("store", Store)):
            if values[name] not in get_args(choices):
                raise InputError(f"data.{name} is {values[name]!r}, expected one of {', '.join(get_args(choices))}")
        if limit is not None and limit < 2:
            raise InputError(f"data.limit is {limit}, expected at least 2 frames")
        if isinstance(data_split, int):
            raise InputError(
                f"data.data_split is the number {data_split}, which YAML makes of 6_6_10 and the like; expected it in "
                'quotes: "6_6_10"'
            )
        for name in ("fps", "predict_step"):
            if values[name] is not None and not 0 < values[name] < math.inf:
                raise InputError(f"data.{name} is {values[name]}, expected a positive number")
        parse_split(data_split)
        self._prepared: PreparedVideo | None = None
        self._known: Known | None = None  # what a network in `predict` was trained on
        self._split: FrameSplit | None = None
        self._hidden: Tensor | None = None
        self._table: Tensor | None = None
        self._placed: tuple[torch.device, Tensor] | None = None

    # ---- what the module asks ------------------------------------------------------------------------------------

    @property
    def prepared(self) -> PreparedVideo:
        """The video on its canvas, read on first use."""
        if self._prepared is None:
            h = self.hparams
            place = h["crop"], h["patch_size"], h["grid"]
            if h["video"] is None:
                self._prepared = _draw(h["synthetic"] or {}, h["limit"], h["fps"], place)
            else:
                cache = cache_folder(h["cache_dir"], "patchnerf")
                self._prepared = prepare_video(h["video"], *place, limit=h["limit"], fps=h["fps"], cache_dir=cache)
        return self._prepared

    @property
    def geometry(self) -> Geometry:
        """Crop, padding and grid; in `predict` those that the network was trained with."""
        return self.prepared.geometry if self._known is None else self._known[0]

    @property
    def count(self) -> int:
        """Frames of the video."""
        return self.prepared.facts.count if self._known is None else self._known[1]

    @property
    def fps(self) -> float:
        """Frames per second."""
        if self._known is None:
            return self.prepared.facts.fps
        return self.hparams["fps"] or self._known[2]

    @property
    def split(self) -> FrameSplit:
        """The role of each frame."""
        if self._split is None:
            self._split = split_frames(self.count, self.hparams["data_split"], self.hparams["split_seed"])
        return self._split

    @property
    def frames(self) -> Tensor:
        """(T, H, W, 3) uint8 canvases: on the device, in memory, or mapped."""
        device = root_device(self.trainer)
        if self._placed is None or self._placed[0] != device:
            wanted, video = self.hparams["store"], self.prepared
            if wanted == "disk" and video.cache is None and self.hparams["video"] is None:
                raise InputError("data.store is disk, expected gpu, ram or auto for a drawn scene: it has no cache")
            self._placed = device, place_frames(video, wanted, device)
            if device.type != "cpu" and self._resident:
                rank_zero_info(f"{self.count} frames, {video.frames.nbytes / 2**20:.0f} MiB on {device}")
        return self._placed[1]

    @property
    def hidden(self) -> Tensor | None:
        """(1, 1, H, W) bool on the canvas, True where the mask hides the pixel of all frames; None without a mask."""
        if self._hidden is None and self.hparams["mask"] is not None:
            self._hidden = load_mask(self.hparams["mask"], self.geometry)
        return self._hidden

    @property
    def embedding_table(self) -> Tensor | None:
        """(T, rows, cols, D) float16 on the CPU, targets of the CLIP head; None without a provider."""
        h = self.hparams
        if self._table is None and h["embeddings"] is not None:
            from lit_patchnerf.clip import embedding_table  # only with targets: towers come with large libraries

            cache = cache_folder(h["cache_dir"], "patchnerf")
            device = root_device(self.trainer)
            table = embedding_table(self.prepared, h["embeddings"], h["embeddings_weights"], cache, device)
            if table.ndim != 4 or tuple(table.shape[:3]) != (self.count, *self.geometry.grid):
                raise InputError(
                    f"data.embeddings: {h['embeddings']} gave a table of shape {tuple(table.shape)}, expected "
                    f"{(self.count, *self.geometry.grid)} and the dimension"
                )
            self._table = table
        return self._table

    @property
    def embedding_dim(self) -> int | None:
        """D of the targets; None without."""
        table = self.embedding_table
        return None if table is None else table.shape[-1]

    @property
    def region(self) -> Region | None:
        """(top, left, height, width) that prediction is cut to, in pixels of the original frame; None for all of it."""
        region, geometry = self.hparams["region"], self.geometry
        if region is None:
            return None
        height, width = geometry.frame
        whole = len(region) == 4 and all(isinstance(v, int) and not isinstance(v, bool) for v in region)
        if not whole or min(region[:2]) < 0 or min(region[2:]) < 1:
            raise InputError(f"data.region is {list(region)}, expected top, left, height and width in whole pixels")
        top, left, rows, cols = region
        if top + rows > height or left + cols > width:
            raise InputError(f"data.region is {list(region)}, expected it within the frame's {height}x{width} pixels")
        for first, size, kept in zip((top, left), (rows, cols), geometry.region, strict=True):
            if first >= kept.stop or first + size <= kept.start:
                raise InputError(
                    f"data.region is {list(region)}, expected some of the {geometry.crop[0]}x{geometry.crop[1]} pixels "
                    f"from row {geometry.corner[0]} and column {geometry.corner[1]} on that data.crop left"
                )
        return top, left, rows, cols

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch in each process, which the batches of a training loader hold together."""
        return self._order(self._pool()).steps

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and check what a stage needs, so that a mistake ends the run before it starts."""
        self._known = self._of_network() if stage == "predict" else None
        if stage == "predict":
            _ = self.region, self._moments()
            return
        _ = self.split, self.hidden, self.embedding_table, self.frames
        if stage == "fit":
            self._order(self._pool(), tell=True)

    def train_dataloader(self) -> IndexLoader | ResumableLoader:
        """Samples of the trained frames, in an order that depends on the seed and the epoch alone."""
        h, frames, pool = self.hparams, self.frames, self._pool()
        order, device = self._order(pool), frames.device
        weight, table = self._weight(), self.embedding_table
        samples = TrainSamples(
            frames,
            pool.to(device),
            self.geometry.grid if h["sample"] == "patch" else None,
            h["batch_size"],
            None if weight is None else weight.to(device),
            None if table is None else table.to(device),
        )
        return self._loader(samples, order, partial(batches_done, self.trainer))

    def val_dataloader(self) -> IndexLoader | ResumableLoader:
        """The frames to evaluate on, in order and each once."""
        h, device = self.hparams, self.frames.device
        split, hidden, table = self.split, self.hidden, self.embedding_table
        wanted = split.val if h["eval_frames"] == "held_out" and split.val else range(self.count)
        roles = torch.zeros(self.count, dtype=torch.int64)
        for role, members in enumerate(split):
            roles[members] = role
        frames = EvalFrames(
            self.frames,
            torch.tensor(list(wanted)),
            roles.to(device),
            None if hidden is None else hidden.to(device),
            None if table is None else table.to(device),
        )
        return self._loader(frames, self._in_order(len(wanted)))

    def test_dataloader(self) -> IndexLoader | ResumableLoader:
        """The same."""
        return self.val_dataloader()

    def predict_dataloader(self) -> IndexLoader:
        """The moments to decode."""
        moments = self._moments()
        return IndexLoader(moments, self._in_order(len(moments)))

    def teardown(self, stage: str) -> None:
        """Release the device memory of the frames."""
        self._placed = None

    # ---- inside --------------------------------------------------------------------------------------------------

    @property
    def _resident(self) -> bool:
        """Whether batches are gathered where the frames lie, rather than by workers."""
        frames, device = self.frames, root_device(self.trainer)
        if device.type != "cpu":
            return frames.device.type == device.type
        # On the CPU `gpu` and `ram` are the same memory; what differs is who gathers.
        return choose_store(self.hparams["store"], frames.nbytes, device) == "gpu"

    def _loader(
        self, samples: TrainSamples | EvalFrames, order: EpochBatches, begin: Callable[[], int] | None = None
    ) -> IndexLoader | ResumableLoader:
        if self._resident:
            return IndexLoader(samples, order, begin)
        return worker_loader(samples, order, self.hparams, begin)

    def _in_order(self, length: int) -> EpochBatches:
        size = self.hparams["eval_batch_size"]
        return epoch_batches(self.trainer, length, size, shuffle=False, drop_last=False)

    def _weight(self) -> Tensor | None:
        """(per_frame, 1, h, w) float32 of patches, or (1, 1, H, W) of frames; None where every pixel counts."""
        geometry, hidden = self.geometry, self.hidden
        if hidden is None and geometry.canvas == geometry.crop:
            return None
        weight = torch.zeros(1, 1, *geometry.canvas)
        geometry.cut(weight).fill_(1)
        if hidden is not None:
            weight.masked_fill_(hidden, 0)
        if self.hparams["sample"] == "frame":
            return weight
        (rows, cols), (h, w) = geometry.grid, geometry.patch
        return weight.view(rows, h, cols, w).transpose(1, 2).reshape(rows * cols, 1, h, w)

    def _pool(self) -> Tensor:
        """(N,) int64: the patches, or the frames, that training draws from."""
        train = self.split.train
        if self.hparams["sample"] == "frame":
            return torch.tensor(train)
        pool, weight = frame_patches(train, self.geometry.grid), self._weight()
        if weight is not None:  # patches without any visible pixel have nothing to teach
            pool = pool[weight.flatten(1).any(1)[pool % len(weight)]]
        return pool

    def _order(self, pool: Tensor, *, tell: bool = False) -> StepBatches:
        h, trainer = self.hparams, self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        size, together, share = h["batch_size"], h["steps_per_batch"], len(pool) // world
        if size > share:
            things = f"{len(pool)} patches of " if h["sample"] == "patch" else ""
            apart = f" in {world} processes" if world > 1 else ""
            raise InputError(
                f"data.batch_size is {size}, expected at most {share}: there are {things}"
                f"{len(self.split.train)} trained frames{apart}"
            )
        if getattr(trainer, "fast_dev_run", False):
            together = 1  # the Trainer stops after so many steps, before a validation if batches have several
        most = share // size if h["drop_last"] else math.ceil(share / size)
        if together > most and tell:
            rank_zero_info(
                f"data.steps_per_batch is {together}, but an epoch has {most} steps: one batch holds them all"
            )
        options = {"drop_last": h["drop_last"], "seed": h["seed"], "rank": rank, "world": world}
        return StepBatches(len(pool), size, min(together, most), **options)

    def _of_network(self) -> Known | None:
        """What the network of a `predict` says of the video, so that none has to be read."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        known = getattr(module, "hparams", {})
        if any(known.get(name) is None for name in ("frames", "geometry", "fps")):
            return None
        return Geometry.from_dict(known["geometry"]), int(known["frames"]), float(known["fps"])

    def _moments(self) -> Moments:
        wanted, last = self.hparams["predict_range"], self.count - 1
        if wanted is None:
            wanted = (0, last)
        if len(wanted) != 2 or not 0 <= wanted[0] <= wanted[1] <= last:
            raise InputError(
                f"data.predict_range is {list(wanted)}, expected the first and the last frame to decode, within 0 to "
                f"{last}"
            )
        return Moments(wanted[0], wanted[1], self.hparams["predict_step"], self.count)


def _draw(options: dict[str, Any], limit: int | None, fps: float | None, place: Sequence[Any]) -> PreparedVideo:
    names = [field.name for field in fields(SyntheticVideo)]
    for name in options:
        if name not in names:
            raise InputError(f"data.synthetic: no option {name!r}, expected {', '.join(names)}")
    try:
        scene = SyntheticVideo(**options)
    except InputError as error:
        raise InputError(f"data.synthetic: {str(error).removeprefix('synthetic video: ')}") from error
    except TypeError as error:
        raise InputError(f"data.synthetic is {options}, expected numbers") from error
    frames = scene.draw()[:limit]
    facts = replace(scene.facts(), count=len(frames), fps=fps or scene.fps)
    return from_frames(frames, facts, *place)
