"""What `profiles.py` has to know of each task: how a profile is built, what it is fed, and what else is tried."""

from __future__ import annotations

import argparse
import functools
import math
import re
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from common import Results, Row

if TYPE_CHECKING:  # a task's packages are imported when it is measured: the other's need not be installed
    from lit_cli.cli import LitCLI
    from lit_detr.data import DetectionData
    from lit_dsunet.data import VolumeData
    from lit_landmarks.samples import LandmarkTable

CONFIGS = Path(__file__).parents[1] / "configs"
CARD = re.compile(r"^# Card: .*?(\d+) GB", re.MULTILINE)


class Case(NamedTuple):
    """Something to measure."""

    name: str
    profile: Path
    extra: list[str]  # further arguments
    card_gb: int | None
    boxes: int = 20  # of an image, where there are any


def card_gb(profile: Path) -> int | None:
    """Memory of the card that a profile's header names, in GB."""
    found = CARD.search(profile.read_text())
    return int(found[1]) if found else None


class Task(ABC):
    """A task's profiles.

    Attributes:
        name: Of the folder in `configs`.
        prefix: Of the names of its rows.
        results: File of its results.
        reference: Row that the speed of the others is compared with.
        unit: What a sample is.
        reserve_s: Seconds that the slowest profile takes.
    """

    name: str
    prefix = ""
    results: str
    reference: str
    unit = "samples"
    reserve_s = 40

    @property
    def folder(self) -> Path:
        """Where the profiles are."""
        return CONFIGS / self.name

    @abstractmethod
    def more_cases(self) -> list[Case]:
        """What is tried beside the profiles as they are."""

    @abstractmethod
    def arguments(self, profile: Path, options: argparse.Namespace) -> list[str]:
        """Of the command line, after those that all tasks share."""

    @abstractmethod
    def build(self, arguments: list[str], options: argparse.Namespace, case: Case) -> LitCLI:
        """Module, data and Trainer."""

    @abstractmethod
    def batches_in_epoch(self, data: Any) -> int:
        """Training batches of an epoch."""

    @abstractmethod
    def describe(self, data: Any, options: argparse.Namespace) -> Row:
        """The row's cells about its samples: `frame`, `batch`, `data`."""

    def samples_of(self, batch: Any, described: Row) -> int:
        """Samples in a batch of training; `described` is what `describe` returned."""
        return described["batch"]

    def more_figures(self, row: Row) -> Row:
        """Further cells, from a measured row."""
        return {}

    def speed(self, row: Row) -> float:
        """What is compared with the reference's."""
        return row["samples_s"]

    def speed_words(self, row: Row, ratio: float | None) -> str:
        """The speed in a profile's header."""
        return f"{row['samples_s']:.0f} {self.unit}/s" + (f" = {ratio:.2f} x {self.reference}" if ratio else "")

    def more_words(self, name: str, results: Results) -> str:
        """What other rows add to a profile's header, with a leading separator; nothing by default."""
        return ""


# ---- landmarks -------------------------------------------------------------------------------------------------------

GUIDE_LIMITS = ((256, 32), (384, 16), (512, 12), (640, 8))  # frame side, largest batch on 8 GB with AMP (guide)
GUIDE_LIMIT_FP32 = (512, 6)  # the same without AMP
LIMIT_CARD_GB = 8


class Landmarks(Task):
    """Images of ISBI 2015, or drawn ones with as many landmarks."""

    name = "landmarks"
    results = "profiles.json"
    reference = "rtx3070ti_balanced"

    def more_cases(self) -> list[Case]:
        """The largest batches that the guide names, and the reference without its CUDA graph."""
        profile = self.folder / f"{self.reference}.yaml"
        eager = ["--model.cuda_graph", "false"]
        out = []
        for side, batch, precision in (*((s, b, "16-mixed") for s, b in GUIDE_LIMITS), (*GUIDE_LIMIT_FP32, "32-true")):
            extra = ["--data.image_size", str(side), "--data.batch_size", str(batch), "--trainer.precision", precision]
            label = f"guide limit {side} b{batch}" + (" fp32" if precision == "32-true" else "")
            # Without a graph: the guide knew none, and its memory is not what it promised.
            out.append(Case(label, profile, [*extra, *eager], LIMIT_CARD_GB))
        return [*out, Case(f"{self.reference} without CUDA graph", profile, eager, LIMIT_CARD_GB)]

    def arguments(self, profile: Path, options: argparse.Namespace) -> list[str]:
        """Random weights; the images."""
        out = ["--model.pretrained", "false", "--plots.worst", "0"]
        if options.root:
            out += ["--data.root", options.root, "--data.pixel_size", str(options.pixel_size)]
        else:
            out += ["--data.format", "synthetic"]
        if options.tiny:
            out += ["--model.backbone", "hrnet_w18_small", "--data.image_size", "64", "--data.synthetic_train", "8"]
        return out

    def build(self, arguments: list[str], options: argparse.Namespace, case: Case) -> LitCLI:
        """Module, data and Trainer."""
        from lit_landmarks.__main__ import LandmarkCLI
        from lit_landmarks.data import LandmarkData
        from lit_landmarks.module import LitLandmarks

        cli = LandmarkCLI(LitLandmarks, LandmarkData, "lit_landmarks", arguments, build_only=True)
        if not options.root and not options.tiny:
            cli.datamodule._table = like_isbi()
        return cli

    def batches_in_epoch(self, data: Any) -> int:
        """Of the training images."""
        return max(1, len(data.prepared("train")) // data.batch_size)

    def describe(self, data: Any, options: argparse.Namespace) -> Row:
        """Width and height of a frame."""
        size = f"{data.image_size[1]}x{data.image_size[0]}"
        return {"frame": size, "batch": data.batch_size, "data": "ISBI 2015" if options.root else "synthetic"}


def like_isbi(seed: int = 0) -> LandmarkTable:
    """150 drawn training images with 19 landmarks, the counts of ISBI 2015."""
    from lit_landmarks.samples import LandmarkTable
    from lit_landmarks.synthetic import SyntheticCephalograms

    drawn = SyntheticCephalograms(num_train=150, num_test=1, seed=seed).read()
    repeat = np.arange(19) % drawn.num_landmarks
    splits = {k: [replace(s, points=s.points[repeat]) for s in samples] for k, samples in drawn.splits.items()}
    return LandmarkTable(splits, tuple(f"L{i + 1}" for i in range(19)))


# ---- volumes ---------------------------------------------------------------------------------------------------------

HEAD = (155, 240, 240), 5  # voxels at 1 mm, and how many volumes; a fifth of them is for validation
SMALL = (36, 50, 36), 60  # those of a hippocampus, for patches of less than 64^3 voxels
TINY = (32, 32, 32), 5
# Batch, precision and memory for the guide's MKDC + DS: its own batch with less memory, and without AMP; then larger
# ones, which it advises against.
GUIDE_BATCHES = ((8, "16-mixed", 8), (8, "32-true", 24), (16, "16-mixed", 24), (32, "16-mixed", 24))


class Volumes(Task):
    """Drawn heads, or volumes of the size of a hippocampus for profiles with patches of that size."""

    name = "dsunet"
    prefix = "dsunet/"
    results = "profiles_dsunet.json"
    reference = "dsunet/guide_baseline"
    unit = "patches"
    reserve_s = 120  # a three-dimensional network is compiled for about a minute

    def more_cases(self) -> list[Case]:
        """Other batches of the guide's network, and profiles with something else in place of what makes them fast."""
        out = []
        for batch, precision, card in GUIDE_BATCHES:
            label = f"dsunet/guide limit 96 b{batch}" + (" fp32" if precision == "32-true" else "") + f" {card} GB"
            extra = ["--data.batch_size", str(batch), "--trainer.precision", precision]
            out.append(Case(label, self.folder / "guide_mkdc_ds.yaml", extra, card))
        compiled = ["--model.compile", "true", "--model.channels_last", "false"]
        for name, words, extra, card in (
            ("gpu_8gb", "compiled, without kernels", compiled, 8),
            ("h200", "without CUDA graph", ["--model.cuda_graph", "false"], 141),
        ):
            out.append(Case(f"dsunet/{name} {words}", self.folder / f"{name}.yaml", extra, card))
        return out

    def arguments(self, profile: Path, options: argparse.Namespace) -> list[str]:
        """One epoch that holds the window; the volumes."""
        steps = 2 if options.tiny else 100
        out = ["--plots.num_first", "0", "--plots.worst_k", "0", "--data.steps_per_epoch", str(steps)]
        out += ["--data.root", options.root] if options.root else ["--data.format", "synthetic"]
        if options.tiny:
            out += ["--data.patch_size", "[32,32,32]", "--model.strides", "[1,2,2]", "--model.features", "[4,4,8]"]
            out += ["--model.deep_supervision", "1"]
        return out

    def build(self, arguments: list[str], options: argparse.Namespace, case: Case) -> LitCLI:
        """Module, data and Trainer."""
        from lit_dsunet.__main__ import VolumeCLI
        from lit_dsunet.data import VolumeData
        from lit_dsunet.module import LitDSUNet

        cli = VolumeCLI(LitDSUNet, VolumeData, "lit_dsunet", arguments, build_only=True)
        if not options.root:
            data: VolumeData = cli.datamodule
            drawn = volumes(*(TINY if options.tiny else SMALL if math.prod(data.patch_size) < 64**3 else HEAD))
            data._table, data._synthetic = drawn.table, drawn._synthetic
            for split in ("train", "val"):
                data._cases[split], data._samples[split] = drawn.cases(split), drawn.samples(split)
        return cli

    def batches_in_epoch(self, data: Any) -> int:
        """As many as were asked for."""
        return data.hparams["steps_per_epoch"]

    def describe(self, data: Any, options: argparse.Namespace) -> Row:
        """Depth, height and width of a patch."""
        patch = data.patch_size
        row: Row = {"frame": "x".join(map(str, patch)), "batch": data.hparams["batch_size"]}
        row["data"] = Path(options.root).resolve().name if options.root else "synthetic"
        return row | {"voxels": math.prod(patch)}

    def speed(self, row: Row) -> float:
        """Voxels, since patches differ in size."""
        return row["samples_s"] * row["voxels"]

    def speed_words(self, row: Row, ratio: float | None) -> str:
        """Patches per second; the ratio is one of voxels."""
        words = f"{row['samples_s']:.3g} patches/s"
        return words + (f", in voxels {ratio:.2f} x {self.reference.removeprefix(self.prefix)}" if ratio else "")


@functools.lru_cache(maxsize=1)
def volumes(size: tuple[int, int, int], count: int) -> VolumeData:
    """Drawn volumes, preprocessed; drawing a head takes seconds, so profiles share them."""
    from lit_dsunet.data import VolumeData

    data = VolumeData(
        format="synthetic", synthetic_train=count, synthetic_test=0, synthetic_size=size, n_folds=5, cache_dir="none"
    )
    data.cases("train")
    return data


# ---- boxes -----------------------------------------------------------------------------------------------------------

DENSE = 500  # boxes of an image, beside the 20 of the rows without a word about it
RESIDENT = 256  # images that lie on the device, where a profile lets them
LADDER = (24, 48)  # batches of the guide's fast profile below and beyond its ladder, whose steps are profiles
SMALL_NETWORK = {"hidden": 32, "heads": 4, "feedforward": 64, "decoder_layers": 2, "queries": 30, "eval_queries": 30}


class Detections(Task):
    """Drawn frames with 20 and with 500 boxes each."""

    name = "detr"
    prefix = "detr/"
    results = "profiles_detr.json"
    reference = "detr/rtxa5000"
    unit = "images"
    reserve_s = 90  # two rows are compiled

    def more_cases(self) -> list[Case]:
        """Every profile with dense images; then what the guide's two lead to, one change at a time."""
        cards = {path: card_gb(path) for path in sorted(self.folder.glob("*.yaml"))}
        dense = ((path, card) for path, card in cards.items() if card is not None)
        out = [Case(self._dense(self.prefix + path.stem), path, [], card, DENSE) for path, card in dense]
        fast = self.folder / "rtxa5000_fast.yaml"
        for words, extra in (
            *((f"batch {n}", ["--data.batch_size", str(n)]) for n in LADDER),
            ("without stride 4", ["--model.strides", "[8,16,32]"]),
            ("with gradient checkpointing", ["--model.gradient_checkpointing", "true"]),
            ("compiled", ["--model.compile", "true"]),
            ("with CUDA graphs", ["--model.cuda_graph", "true"]),
            ("on the device", ["--data.store", "gpu"]),
            ("fp16", ["--trainer.precision", "16-mixed"]),
            ("fp32", ["--trainer.precision", "32-true"]),
        ):
            out.append(Case(f"detr/rtxa5000_fast {words}", fast, extra, 24))
        for words, extra in (
            ("without CUDA graphs", ["--model.cuda_graph", "false"]),
            ("compiled instead", ["--model.cuda_graph", "false", "--model.compile", "true"]),
        ):
            out.append(Case(f"detr/h200 {words}", self.folder / "h200.yaml", extra, 141))
        return out

    @staticmethod
    def _dense(name: str) -> str:
        return f"{name} {DENSE} boxes"

    def arguments(self, profile: Path, options: argparse.Namespace) -> list[str]:
        """Random weights; the images."""
        out = ["--model.pretrained", "false", "--plots.num_first", "0", "--plots.worst_k", "0"]
        out += ["--data.root", options.root] if options.root else ["--data.format", "synthetic"]
        if options.tiny:
            out += ["--model.backbone", "resnet10t", "--model.noise_queries", "10", "--data.image_size", "64"]
            out += [word for name, value in SMALL_NETWORK.items() for word in (f"--model.{name}", str(value))]
        return out

    def build(self, arguments: list[str], options: argparse.Namespace, case: Case) -> LitCLI:
        """Module, data and Trainer."""
        from lit_detr.__main__ import DetectionCLI
        from lit_detr.data import DetectionData
        from lit_detr.module import LitDETR

        cli = DetectionCLI(LitDETR, DetectionData, "lit_detr", arguments, build_only=True)
        if not options.root:
            draw(cli.datamodule, 8 if options.tiny else case.boxes, options.tiny)
        return cli

    def batches_in_epoch(self, data: Any) -> int:
        """Of the training images."""
        return max(1, len(data.prepared("train")) // data.hparams["batch_size"])

    def describe(self, data: Any, options: argparse.Namespace) -> Row:
        """Width and height of a frame, images and the most boxes that one of them has."""
        split = data.prepared("train")
        row: Row = {"frame": f"{data.image_size[1]}x{data.image_size[0]}", "batch": data.hparams["batch_size"]}
        row["data"] = Path(options.root).resolve().name if options.root else "synthetic"
        return row | {"images": len(split), "boxes": max(len(s.boxes) for s in split.samples)}

    def more_words(self, name: str, results: Results) -> str:
        """Memory with dense images."""
        row = results.get(name=self._dense(name))
        if row is None:
            return ""
        said = f"{row['allocated_gb']:.1f} GB allocated" if row["fits"] else "out of memory"
        return f"; {said} with {row['boxes']} boxes an image in place of 20"


def draw(data: DetectionData, boxes: int, tiny: bool) -> None:
    """Give a data module drawn frames with so many boxes each.

    Loader workers start anew in each epoch, so theirs holds the whole window of a measurement.
    """
    from detr_scenes import Scenes

    h = data.hparams
    in_workers = h["store"] == "ram" or h["clahe_p"] > 0 or h["motion_blur_p"] > 0
    train = 4 if tiny else max(RESIDENT, h["batch_size"] * (40 if in_workers else 2))
    counts = {"train": train, "val": 2 if tiny else 16}
    scenes = Scenes(data.image_size, (boxes, boxes), counts, channels=h["channels"])
    data._table, data._synthetic = scenes.read(), scenes  # type: ignore[assignment]


# ---- video -----------------------------------------------------------------------------------------------------------

CLIP = (132, 720, 1280)  # frames and sides of Big Buck Bunny
DRAWN_FRAMES = 4  # that a drawn clip repeats: drawing takes longer than training
BATCHES = (16, 24)  # of the network of the profile for 8 GB, which the guide trains with 24 on 40 GB
TINY_VIDEO = {
    "grid": {"strides": "[4,2]", "floor": "4", "latent_frames": "[6]", "latent_channels": "[4]"},
    "coordinate": {"fc_dim": "8", "stem": "[4,4]", "strides": "[2,2]", "floor": "4", "levels": "8", "hidden": "16"},
}


class Videos(Task):
    """One video: Big Buck Bunny if it is named, else a drawn one of its size."""

    name = "patchnerf"
    prefix = "patchnerf/"
    results = "profiles_patchnerf.json"
    reference = "patchnerf/a100_moderate"
    unit = "frames"
    reserve_s = 120  # a batch may have many steps, and one row is compiled

    def more_cases(self) -> list[Case]:
        """Other batches on 8 GB, and the reference network of HNeRV's size without what makes it fast."""
        small, fast = self.folder / "gpu_8gb.yaml", self.folder / "bunny_1.5m.yaml"
        out = []
        for n in BATCHES:
            extra = ["--data.batch_size", str(n), "--data.steps_per_batch", "4"]
            out.append(Case(f"patchnerf/gpu_8gb batch {n}", small, extra, card_gb(small)))
        eager = ["--model.cuda_graph", "false"]
        for words, extra in (
            ("without CUDA graph", eager),
            ("the Trainer's own steps", [*eager, "--data.steps_per_batch", "1"]),
            ("compiled", ["--model.compile", "true"]),
            ("fp32", ["--trainer.precision", "32-true"]),
        ):
            out.append(Case(f"patchnerf/bunny_1.5m {words}", fast, extra, card_gb(fast)))
        return out

    def arguments(self, profile: Path, options: argparse.Namespace) -> list[str]:
        """The video; a stand-in for a CLIP tower, which costs the network as much."""
        text = profile.read_text()
        out = ["--plots.num_first", "0", "--plots.worst_k", "0"]
        if re.search(r"^  embeddings:", text, re.MULTILINE):
            out += ["--data.embeddings", "toy:512"]
        if options.root:
            out += ["--data.video", options.root]
        if options.tiny:
            mode = "coordinate" if re.search(r"^  mode: coordinate", text, re.MULTILINE) else "grid"
            out += ["--data.crop", "null", "--data.patch_size", "null", "--data.grid", "[2,4]"]
            out += ["--data.steps_per_batch", "2", "--model.ssim_window", "5", "--model.ssim_scales", "1"]
            out += ["--model.target_params", "6000" if mode == "grid" else "null"]
            out += [word for k, v in TINY_VIDEO[mode].items() for word in (f"--model.decoder.{k}", v)]
        return out

    def build(self, arguments: list[str], options: argparse.Namespace, case: Case) -> LitCLI:
        """Module, data and Trainer."""
        from lit_patchnerf.__main__ import VideoCLI
        from lit_patchnerf.data import PatchVideoData
        from lit_patchnerf.module import LitPatchNeRF
        from lit_patchnerf.store import from_frames

        cli = VideoCLI(LitPatchNeRF, PatchVideoData, "lit_patchnerf", arguments, build_only=True)
        if not options.root:
            frames, facts = clip(*((10, 32, 64) if options.tiny else CLIP))
            h = cli.datamodule.hparams
            cli.datamodule._prepared = from_frames(frames, facts, h["crop"], h["patch_size"], h["grid"])
        return cli

    def batches_in_epoch(self, data: Any) -> int:
        """Each has the samples of several optimizer steps."""
        together = data.hparams["steps_per_batch"]
        return max(1, -(-data.steps_per_epoch // together))

    def samples_of(self, batch: Any, described: Row) -> int:
        """Of all its steps; the last one of an epoch has fewer."""
        return batch.indices.numel()

    def describe(self, data: Any, options: argparse.Namespace) -> Row:
        """Frames, what is trained on, and how many samples an epoch has."""
        h, geometry = data.hparams, data.geometry
        row: Row = {"frame": f"{geometry.crop[1]}x{geometry.crop[0]}", "batch": h["batch_size"]}
        row |= {"steps_per_batch": h["steps_per_batch"], "sample": h["sample"]}
        row["per_frame"] = geometry.per_frame if h["sample"] == "patch" else 1
        row |= {"samples_epoch": data.steps_per_epoch * h["batch_size"], "frames": data.count}
        return row | {"data": Path(options.root).name if options.root else "drawn"}

    def more_figures(self, row: Row) -> Row:
        """Seconds of an epoch."""
        return {"s_epoch": round(row["samples_epoch"] / row["samples_s"], 3) if row["samples_s"] else None}

    def speed(self, row: Row) -> float:
        """Frames, since some profiles learn patches."""
        return row["samples_s"] / row["per_frame"]

    def speed_words(self, row: Row, ratio: float | None) -> str:
        """Frames per second, and how long an epoch is."""
        words = f"{self.speed(row):.3g} frames/s" + (
            f" = {ratio:.2f} x {self.reference.removeprefix(self.prefix)}" if ratio else ""
        )
        return f"{words}, {row['s_epoch']:.3g} s an epoch"

    def more_words(self, name: str, results: Results) -> str:
        """PSNR and seconds of whole trainings, from the benchmarks that do them."""
        short = name.removeprefix(self.prefix)
        for file, split in (("patchnerf_bunny", None), ("patchnerf_guide", "1_1_1")):
            key = {"part": "summary", "profile": short, "epochs_wanted": None, "overrides": ""}
            row = Results(results.path.parent / f"{file}.json").get(**key, **({"split": split} if split else {}))
            if row is not None and row.get("psnr_db") is not None:
                seconds = f"{row['train_s']:.0f} s of training on {row['device']}"
                return f"; {row['psnr_db']:.2f} dB on Big Buck Bunny after {row['epochs']:.0f} epochs, {seconds}"
        return ""


@functools.lru_cache(maxsize=1)
def clip(count: int, height: int, width: int) -> Any:
    """Frames (T, H, W, 3) of a drawn video and its facts; the same few frames again and again."""
    from lit_patchnerf.synthetic import SyntheticVideo

    scene = SyntheticVideo(frames=min(count, DRAWN_FRAMES), height=height, width=width)
    drawn = scene.draw()
    return drawn[np.arange(count) % len(drawn)], replace(scene.facts(), count=count)


TASKS: dict[str, Task] = {task.name: task for task in (Landmarks(), Volumes(), Detections(), Videos())}
