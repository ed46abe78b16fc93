"""Big Buck Bunny at the sizes of HNeRV's Table 2: PSNR and MS-SSIM of whole frames, seconds and memory.

Each of the four profiles trains for 300 epochs on all 132 frames of 640 x 1280, as published, and its last validation
is the figure: nothing is chosen by it. Parameters are all of them, latents included. `train_s` is the training alone
with its first batch, in which things are compiled and captured (`first_s`); `wall_s` also counts the command line,
reading the video and one validation, but not Python's imports. What others have published is in
patchnerf_published.py, with its sources.

    python benchmarks/patchnerf_bunny.py --video bigbuckbunny.mp4
    python benchmarks/patchnerf_bunny.py --video ... --only bunny_1.5m --seeds 0 -- --model.lr 0.003
    python benchmarks/patchnerf_bunny.py --take a.json b.json          # rows of several machines together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Results, Row
from patchnerf_published import MILLIONS
from patchnerf_runs import FIGURES, TIMES, Job, by_setting, command, conduct, options_of, parsed, train

KEY = ("part", "profile", "epochs_wanted", "overrides", "seed")
NAMES = (*FIGURES, "seam_ratio", *TIMES, "setup_s", "val_s", "params", "allocated_gb", "reserved_gb", "epochs", "steps")
COLUMNS = ("profile", "seed", "params", *FIGURES[:4], *TIMES, "allocated_gb")


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = options_of(__doc__, "patchnerf_bunny")
    parser.add_argument("--only", nargs="+", choices=list(MILLIONS), default=list(MILLIONS), metavar="PROFILE")
    options, overrides = parsed(parser, args)

    def jobs(results: Results, folder: Path) -> Iterator[Job]:
        for seed in options.seeds:
            for name in options.only:
                key: Row = {"part": "run", "profile": name, "epochs_wanted": options.epochs}
                key |= {"overrides": " ".join(overrides), "seed": seed}
                yield key, lambda n=name, s=seed: train(command(n, options, folder, *overrides, seed=s)).row

    shown = ("profile", "runs", "params", "psnr_db", "psnr_db_sd", "ms_ssim", "train_s", "wall_s")
    conduct(options, KEY, jobs, COLUMNS, lambda rows: by_setting(rows, KEY, NAMES), shown)


if __name__ == "__main__":
    main()
