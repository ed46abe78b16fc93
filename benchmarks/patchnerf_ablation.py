"""What each part of lit_patchnerf is worth: a profile with one thing changed at a time, equal epochs.

Every row is a training by the real Trainer; `s_epoch` is an epoch after the first batch, `train_s` all of the training
with it. Differences in PSNR are paired by seed. Settings that the profile has anyway are named and left out; so are
options that this version does not have. Optimizers come with a rate of their own, named in their row: one rate for all
would say who happens to suit it. In `coordinate mode` the decoder is solved for the profile's count, `patches` trains
on eight patches in the place of each frame: the same pixels, each with its halo.

    python benchmarks/patchnerf_ablation.py --video bigbuckbunny.mp4
    python benchmarks/patchnerf_ablation.py --video ... --only "loss l1" --only fp32 --epochs 100
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Results, Row
from patchnerf_runs import (
    FIGURES,
    TIMES,
    Job,
    by_setting,
    command,
    conduct,
    mode_of,
    options_of,
    parsed,
    train,
    values_of,
)

from lit_cli.errors import InputError

BASE = "base"
KEY = ("part", "setting", "profile", "epochs_wanted", "overrides", "seed")
NAMES = (*FIGURES, "seam_ratio", *TIMES, "params", "steps", "allocated_gb", "reserved_gb", "epochs")
COLUMNS = ("setting", "seed", *FIGURES[:2], "ms_ssim", "params", "steps", *TIMES[1:], "allocated_gb")


def _optimizer(name: str, lr: float, **options: object) -> list[str]:
    given = [word for k, v in options.items() for word in (f"--model.optimizer_options.{k}", str(v))]
    return ["--model.optimizer", name, "--model.optimizer_options", "null", "--model.lr", str(lr), *given]


def _eager(steps: int) -> list[str]:
    """Without a graph; `steps` of the optimizer from one batch."""
    return ["--model.cuda_graph", "false", "--data.steps_per_batch", str(steps)]


def _latents(frames: str, channels: str) -> list[str]:
    return ["--model.decoder.latent_frames", frames, "--model.decoder.latent_channels", channels]


def _atlas(stage: int, scale: float = 1.0, points: int = 33) -> list[str]:
    options = {"atlas_stages": f"[{stage}]", "atlas_scales": f"[{scale}]", "camera_frames": str(points)}
    return [word for name, value in options.items() for word in (f"--model.decoder.{name}", value)]


COORDINATE = '{"fc_dim": 32, "hidden": 64, "floor": 16, "multiple": 1, "clip_dim": null}'
SETTINGS: dict[str, list[str]] = {
    BASE: [],
    "adam 0.001": _optimizer("adam", 1e-3),
    "adamw 0.002": _optimizer("adamw", 2e-3),
    "adamw 0.005": _optimizer("adamw", 5e-3),
    "adan 0.003": _optimizer("adan", 3e-3),
    **{f"muon, rms {rate}": _optimizer("muon", 2e-3, muon_lr=rate) for rate in (0.001, 0.0025, 0.005)},
    **{
        f"muon, spectral {rate}": _optimizer("muon", 2e-3, muon_lr=rate, muon_scale="spectral")
        for rate in (0.005, 0.01, 0.02, 0.03)
    },
    **{f"momentum {m}": ["--model.optimizer_options.momentum", str(m)] for m in (0.95, 0.98, 0.99, 0.995)},
    "Newton-Schulz steps: 3": ["--model.optimizer_options.ns_steps", "3"],
    "muon, phases apart": ["--model.optimizer_options.phases", "true"],
    **{f"loss {name}": ["--model.loss", name] for name in ("l2", "l1", "fusion6", "fusion10_freq")},
    "coordinate mode": [
        "--model.mode",
        "coordinate",
        "--model.decoder",
        COORDINATE,
        "--data.sample",
        "patch",
        "--data.batch_size",
        "8",
    ],
    "patches": ["--data.sample", "patch", "--data.batch_size", "8"],
    **{f"activation {name}": ["--model.decoder.activation", name] for name in ("gelu", "sin")},
    "one block a stage": ["--model.decoder.blocks", "[1]"],
    "FiLM": ["--model.decoder.levels", "16"],
    "channels as they come": ["--model.decoder.multiple", "1", "--model.decoder.reduction", "1.2"],
    "kernels up to 3": ["--model.decoder.kernels", "[1,3]"],
    "reduction 1.4": ["--model.decoder.reduction", "1.4"],
    "no atlas": ["--model.decoder.atlas_stages", "[]"],
    **{f"atlas behind stage {n}, half as fine": _atlas(n, 0.5) for n in (4, 5)},
    "atlas behind stage 4": _atlas(4),
    "atlas behind stage 5, half as fine, still camera": _atlas(5, 0.5, points=0),
    "latents of one resolution": _latents("[132]", "[32]"),
    "latents of two resolutions": _latents("[132,33]", "[16,16]"),
    "bf16": ["--trainer.precision", "bf16-mixed"],
    "fp32": ["--trainer.precision", "32-true"],
    "compiled": ["--model.compile", "true"],
    "compiled, no CUDA graph": ["--model.compile", "true", "--model.cuda_graph", "false"],
    "no CUDA graph": ["--model.cuda_graph", "false"],
    **{f"steps a batch: {n}": ["--data.steps_per_batch", str(n)] for n in (1, 4, 12)},
    "Trainer's own steps": _eager(1),
    **{f"batch {n}": ["--data.batch_size", str(n)] for n in (1, 2, 4)},
    "channels_last off": ["--model.channels_last", "false"],
    "EMA": ["--ema.enabled", "true"],
}


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = options_of(__doc__, "patchnerf_ablation")
    parser.add_argument("--profile", default="bunny_1.5m", help="(%(default)s)")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), metavar="SETTING", help="beside the base")
    parser.set_defaults(seeds=[0])
    options, overrides = parsed(parser, args)

    def arguments(setting: str, seed: int, folder: Path) -> list[str]:
        mode = "coordinate" if setting == "coordinate mode" else mode_of(options.profile)
        changed = [*overrides, *SETTINGS[setting]]
        # Sizes of samples and steps that a dry run makes small come last there, and are the setting's all the same.
        more = [w for w in SETTINGS[setting] if options.tiny and setting.startswith(("batch", "patches"))]
        return command(options.profile, options, folder, *more, seed=seed, changed=changed, mode=mode)

    def settings(folder: Path) -> Iterator[str]:
        known = values_of(arguments(BASE, 0, folder))
        yield BASE
        for setting in options.only or list(SETTINGS)[1:]:
            try:
                same = values_of(arguments(setting, 0, folder)) == known
            except InputError as error:
                print(f"{setting}: left out ({str(error).splitlines()[0]})")
                continue
            if same:
                print(f"{setting}: left out, the profile has that")
            else:
                yield setting

    def jobs(results: Results, folder: Path) -> Iterator[Job]:
        chosen = list(dict.fromkeys(settings(folder)))
        for seed in options.seeds:
            for setting in chosen:
                key: Row = {"part": "run", "setting": setting, "profile": options.profile}
                key |= {"epochs_wanted": options.epochs, "overrides": " ".join(overrides), "seed": seed}
                yield key, lambda n=setting, s=seed: train(arguments(n, s, folder)).row

    shown = ("setting", "runs", "psnr_db", "psnr_db_gain", "s_epoch", "train_s", "params")
    conduct(
        options, KEY, jobs, COLUMNS, lambda rows: by_setting(rows, KEY, NAMES, lambda r: r["setting"] == BASE), shown
    )


if __name__ == "__main__":
    main()
