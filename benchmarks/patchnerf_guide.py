"""The four profiles of the original guide on Big Buck Bunny, beside what the guide expects of them.

Each trains twice: on all frames (`1_1_1`, for the PSNR of training) and on those of the guide's `6_6_10`, whose
held-out frames stand beside a blend of their trained neighbours. The embeddings are `toy:512`, a stand-in for the CLIP
tower of the guide with as many numbers: it costs the network as much and needs no download; `--embeddings` takes
another. `wall_s` is everything but Python's imports, embeddings of the stand-in and one validation included; the guide
evaluates more often, every 10 to 30 epochs, which it counts with 30 s each.

    python benchmarks/patchnerf_guide.py --video bigbuckbunny.mp4
    python benchmarks/patchnerf_guide.py --video ... --epochs 5 --only a100_moderate
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Results, Row
from patchnerf_published import EXPECTED
from patchnerf_runs import FIGURES, TIMES, Job, by_setting, command, conduct, options_of, parsed, train

SPLITS = ("1_1_1", "6_6_10")
KEY = ("part", "profile", "split", "epochs_wanted", "embeddings", "overrides", "seed")
BASELINES = tuple(f"held_out_psnr_db_{name}" for name in ("nearest", "blend", "over_nearest", "over_blend"))
MORE = ("held_out_cosine", "held_out_centred", "train_cosine", "train_centred")
NAMES = (*FIGURES, *BASELINES, *MORE, *TIMES, "setup_s", "val_s", "params", "allocated_gb", "reserved_gb", "epochs")
COLUMNS = ("profile", "split", "seed", "params", "train_psnr_db", "held_out_psnr_db", *BASELINES[1:2], *TIMES)


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = options_of(__doc__, "patchnerf_guide")
    parser.add_argument("--only", nargs="+", choices=list(EXPECTED), default=list(EXPECTED), metavar="PROFILE")
    parser.add_argument("--embeddings", help="provider of targets (toy:512; with --tiny toy:16)")
    parser.set_defaults(seeds=[0])
    options, overrides = parsed(parser, args)
    options.embeddings = options.embeddings or ("toy:16" if options.tiny else "toy:512")

    def run(name: str, split: str, seed: int, folder: Path) -> Row:
        more = ["--data.data_split", split, "--data.embeddings", options.embeddings, *overrides]
        return train(command(name, options, folder, *more, seed=seed)).row

    def jobs(results: Results, folder: Path) -> Iterator[Job]:
        for seed in options.seeds:
            for name in options.only:
                for split in SPLITS:
                    key: Row = {"part": "run", "profile": name, "split": split, "epochs_wanted": options.epochs}
                    key |= {"embeddings": options.embeddings, "overrides": " ".join(overrides), "seed": seed}
                    yield key, lambda n=name, p=split, s=seed: run(n, p, s, folder)

    conduct(options, KEY, jobs, COLUMNS, lambda rows: by_setting(rows, KEY, NAMES), ("runs", *COLUMNS))


if __name__ == "__main__":
    main()
