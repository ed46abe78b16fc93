"""What an embedding of every patch costs in PSNR, and how well those of held-out frames are met.

Arms, of equal epochs, trained on the frames of `6_6_10`: `without` a head; `with` one at equal parameters in all, the
decoder being solved for the count less the head's, so that it is narrower; `on top` of the very decoder of `without`,
whose head comes in addition; and both once more with the gradient of the embeddings stopped before the decoder.
Differences to `without` are paired by seed, with Student's 95 % interval.

Embeddings of held-out frames stand beside those of the nearest trained frame and of a blend of the two around: cosine,
cosine after the video's mean is taken off, and how far a ranking of all held-out patches agrees with that by the true
embeddings. Queries are texts where the provider knows texts, else true embeddings of trained patches. `toy:512`, the
default, is a stand-in for a CLIP tower: colours only, without weights.

    python benchmarks/patchnerf_clip.py --video bigbuckbunny.mp4
    python benchmarks/patchnerf_clip.py --video ... --embeddings timm:vit_base_patch32_clip_quickgelu_224.openai \
        --weights open_clip_model.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Results, Row
from patchnerf_runs import FIGURES, TIMES, Job, Run, by_setting, command, conduct, mode_of, options_of, parsed, train
from torch import Tensor

from lit_cli.errors import InputError
from lit_patchnerf.clip import open_provider
from lit_patchnerf.module import load
from lit_patchnerf.query import embed_video, embedding_report

WITHOUT, WITH, ON_TOP = "without", "with", "on top"
STOPPED = ", gradient stopped"
ARMS = (WITHOUT, WITH, WITH + STOPPED, ON_TOP, ON_TOP + STOPPED)
KEY = ("part", "arm", "profile", "split", "epochs_wanted", "embeddings", "overrides", "seed")
REPORT = ("cosine", "centred_cosine", "top1", "top5", "spearman")
REPORTED = tuple(f"{who}_{what}" for who in ("model", "nearest", "blend") for what in REPORT)
NAMES = (*FIGURES, "held_out_psnr_db_blend", *REPORTED, *TIMES, "params", "head_params", "width", "epochs")
COLUMNS = ("arm", "seed", "params", "width", "train_psnr_db", "held_out_psnr_db", *REPORTED[:5], "train_s")
TEXTS = ("grass", "a tree", "a grey rabbit", "blue sky", "a red apple", "yellow", "something dark", "white fur")
QUERIES = 16  # trained patches, where there are no texts


def queries_of(options: argparse.Namespace, run: Run) -> tuple[Tensor, str]:
    """(M, D) queries, and what they are."""
    data = run.cli.datamodule
    provider = open_provider(options.embeddings, options.weights)
    try:
        return provider.encode_texts(TEXTS), f"{len(TEXTS)} texts"
    except InputError:
        table = data.embedding_table[data.split.train].float().flatten(0, 2)
        chosen = table[:: max(1, len(table) // QUERIES)][:QUERIES]
        return chosen, f"{len(chosen)} trained patches"


def report(options: argparse.Namespace, run: Run, checkpoint: Path) -> Row:
    """Embeddings of held-out frames."""
    texts, words = queries_of(options, run)
    data = run.cli.datamodule
    module = load(checkpoint, run.cli.trainer.strategy.root_device)
    found = embedding_report(embed_video(module), data.embedding_table.float(), data.split, texts)
    row: Row = {f"{who}_{name}": round(value, 5) for who, own in found.items() for name, value in own.items()}
    assert module.net is not None
    assert module.net.clip is not None
    return row | {"queries": words, "head_params": sum(p.numel() for p in module.net.clip.parameters())}


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables."""
    parser = options_of(__doc__, "patchnerf_clip")
    parser.add_argument("--profile", default="bunny_1.5m", help="(%(default)s)")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS[1:], default=list(ARMS[1:]), metavar="ARM", help="beside the base"
    )
    parser.add_argument("--split", default="6_6_10", help="(%(default)s)")
    parser.add_argument("--embeddings", help="provider of targets (toy:512; with --tiny toy:16)")
    parser.add_argument("--weights", help="local file of the provider's weights")
    options, overrides = parsed(parser, args)
    options.embeddings = options.embeddings or ("toy:16" if options.tiny else "toy:512")
    width = "width" if mode_of(options.profile) == "grid" else "fc_dim"

    def run(arm: str, seed: int, base: Row | None, folder: Path) -> Row:
        more = ["--data.data_split", options.split, *overrides]
        if arm == WITHOUT:
            more += ["--data.embeddings", "null", "--model.decoder.clip_dim", "null"]
        else:
            more += ["--data.embeddings", options.embeddings]
            more += ["--data.embeddings_weights", options.weights] if options.weights else []
        if arm.startswith(ON_TOP):
            assert base is not None
            more += ["--model.target_params", "null", f"--model.decoder.{width}", str(base["width"])]
        elif arm != WITHOUT:
            assert base is not None
            more += ["--model.target_params", str(base["wanted"])]
        if arm.endswith(STOPPED):
            more += ["--model.decoder.clip_stop_gradient", "true"]
        checkpoint = folder / "clip.ckpt"
        done = train(command(options.profile, options, folder, *more, seed=seed), keep=checkpoint)
        if arm != WITHOUT:
            return done.row | report(options, done, checkpoint)
        # Where the profile solves for no count, the arms with a head do, for this one's.
        return done.row | {"wanted": done.cli.model.hparams["target_params"] or done.row["params"]}

    def jobs(results: Results, folder: Path) -> Iterator[Job]:
        for seed in options.seeds:
            shared: Row = {"part": "run", "profile": options.profile, "split": options.split}
            shared |= {"epochs_wanted": options.epochs, "embeddings": options.embeddings}
            shared |= {"overrides": " ".join(overrides), "seed": seed}
            for arm in (WITHOUT, *options.arms):
                base = results.get(**shared, arm=WITHOUT)
                if arm == WITHOUT or base is not None:
                    yield {"arm": arm, **shared}, lambda a=arm, s=seed, b=base: run(a, s, b, folder)

    shown = ("arm", "runs", "params", "train_psnr_db", "train_psnr_db_gain", "train_psnr_db_gain_low")
    shown += ("train_psnr_db_gain_high", "held_out_psnr_db", "model_centred_cosine", "model_spearman")
    conduct(options, KEY, jobs, COLUMNS, lambda r: by_setting(r, KEY, NAMES, lambda x: x["arm"] == WITHOUT), shown)


if __name__ == "__main__":
    main()
