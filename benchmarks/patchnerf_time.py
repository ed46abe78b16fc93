"""Seconds until Big Buck Bunny stands at 35.57 dB, HNeRV's figure for 1.5 million parameters, beside HNeRV's own code.

Ours is a profile with shorter and shorter schedules, each a full cosine in a process of its own with empty caches:
`wall_s` counts from the start of that process, so imports, decoding the video, compilation, captures and one validation
are in; `train_s` is the training alone. The answer is the shortest that reaches the mark. One more run of the longest
schedule validates every few epochs and says when it first passes the mark, validations not counted.

HNeRV is its own `train_nerv_all.py`, unchanged, from a checkout that `--repo` names, with its README's command for
1.5 million parameters on PNG frames that are decoded here beforehand (seconds apart, not counted). Packages that it
imports and does not use for PNG frames are empty stand-ins. A few epochs show how many fit before the deadline, 300 at
most; from fewer the seconds of 300 are computed, and its figure is that of the shorter cosine.

    python benchmarks/patchnerf_time.py --video bigbuckbunny.mp4 --repo HNeRV
    python benchmarks/patchnerf_time.py --video ... --schedules 100 50 -- --model.lr 0.004
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import Results, Row

KEY = ("part", "tool", "profile", "epochs_wanted", "every", "workers", "overrides", "seed")
COLUMNS = ("tool", "epochs_wanted", "every", "workers", "seed", "psnr_db", "epochs", "train_s", "wall_s", "s_epoch")
OURS, PEER = "ours", "HNeRV"
PAPER = 300  # epochs
PROBE = 4
SCHEDULES = (300, 200, 150, 100, 75, 50, 30)
README = (
    "--outf 1120 --vid bunny --conv_type convnext pshuffel --act gelu --norm none --resize_list -1 --loss L2 "
    "--enc_strds 5 4 4 2 2 --enc_dim 64_16 --dec_strds 5 4 4 2 2 --ks 0_1_5 --reduce 1.2 --modelsize 1.5 "
    "--lower_width 12 -b 2 --lr 0.001"
)
WRAPPED = (
    "import runpy, sys, torch; sys.argv[0] = 'train_nerv_all.py'; sys.path.insert(0, '.'); "
    "runpy.run_path('train_nerv_all.py', run_name='__main__'); "
    "print('PEAK', torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)"
)


# ---- ours ------------------------------------------------------------------------------------------------------------


def child(arguments: Sequence[str], started: float) -> Row:
    """One training, with seconds since the Unix time at which its process was started."""
    from patchnerf_runs import train

    return train(arguments, started).row


def alone(arguments: Sequence[str], tiny: bool) -> Row:
    """One training in a process of its own with empty caches; in a dry run in this one."""
    arguments = [*arguments, "--data.cache_dir", "none"]
    if tiny:
        return child(arguments, time.time())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        given = json.dumps({"arguments": arguments, "started": time.time(), "out": str(out)})
        words = [sys.executable, __file__, "--child", given]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if not out.is_file():
            return {"error": next(reversed(done.stderr.strip().splitlines()), f"status {done.returncode}")[:300]}
        return json.loads(out.read_text())


# ---- HNeRV -----------------------------------------------------------------------------------------------------------


def write_frames(video: Path | None, folder: Path) -> float:
    """Frames as PNG files, quickly packed; the seconds it took. Without a video, of a drawn one."""
    import cv2

    from lit_patchnerf.synthetic import SyntheticVideo
    from lit_patchnerf.video import read_video

    begin = time.perf_counter()
    folder.mkdir(parents=True)
    frames: Any = SyntheticVideo(frames=4, height=32, width=64).draw() if video is None else read_video(video)[0]
    for number, frame in enumerate(frames, 1):
        picture = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / f"{number:04d}.png"), picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return time.perf_counter() - begin


def write_stubs(folder: Path) -> None:
    """Empty stand-ins for packages that HNeRV imports and does not use with a folder of PNG files."""
    (folder / "pytorchvideo" / "data").mkdir(parents=True)
    (folder / "decord.py").write_text("class bridge:\n    @staticmethod\n    def set_bridge(name):\n        pass\n")
    (folder / "pytorchvideo" / "__init__.py").write_text("")
    (folder / "pytorchvideo" / "data" / "__init__.py").write_text("")
    (folder / "pytorchvideo" / "data" / "encoded_video.py").write_text("EncodedVideo = None\n")


def run_peer(repo: Path, folder: Path, epochs: int, workers: int, timeout: float | None) -> Row:
    """HNeRV's script for so many epochs, and what it prints."""
    words = [sys.executable, "-c", WRAPPED, *README.split(), "--data_path", str(folder / "frames")]
    words += ["--crop_list", "640_1280", "-e", str(epochs), "--eval_freq", "100000", "-j", str(workers)]
    words += ["--overwrite", "--suffix", f"_bench_j{workers}"]
    path = os.pathsep.join([str(folder / "stubs"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            words, cwd=repo, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    row = read_peer(done.stdout) | {"wall_s": round(time.perf_counter() - begin, 2)}
    if done.returncode or not row["epochs"]:
        return {"error": next(reversed(done.stderr.strip().splitlines()), f"status {done.returncode}")[:300]}
    return row


def read_peer(text: str) -> Row:
    r"""Epochs, seconds and figures in what HNeRV prints.

    >>> said = "Time/epoch: \tCurrent:3.00\tAverage:3.00\nTime/epoch: \tCurrent:1.50\tAverage:2.2\n"
    >>> said += "Eval at epoch 2 for bunny: pred_seen_psnr: 30.12 quant_seen_psnr: 29.9\nPEAK 1073741824"
    >>> read_peer(said)
    {'epochs': 2, 's_epoch': 1.5, 'train_s': 4.5, 'psnr_db': 30.12, 'allocated_gb': 1.0}
    """
    seconds = [float(x) for x in re.findall(r"Time/epoch: \tCurrent:\s*([\d.]+)", text)]
    scores = re.findall(r"pred_seen_psnr: ([\d.]+)", text)
    peak = re.search(r"PEAK (\d+)", text)
    row: Row = {"epochs": len(seconds), "s_epoch": None, "train_s": round(sum(seconds), 2), "psnr_db": None}
    if seconds:
        row["s_epoch"] = round(statistics.median(seconds[1:] or seconds), 4)
    if scores:
        row["psnr_db"] = float(scores[-1])
    return row | ({"allocated_gb": round(int(peak[1]) / 2**30, 2)} if peak else {})


def peer(options: argparse.Namespace, folder: Path, workers: int, share: float) -> Row:
    """Probe, then as many epochs as fit into a share of the time that is left."""
    limit = None if options.deadline == float("inf") else max(1.0, (options.deadline - time.time()) * share)
    begin = time.time()
    probe = run_peer(options.repo.resolve(), folder, min(PROBE, options.peer_epochs), workers, limit)
    if "error" in probe:
        return probe
    epochs, spent = options.peer_epochs, time.time() - begin
    if limit is not None:
        around = probe["wall_s"] - probe["train_s"] + 5  # start and evaluation
        epochs = int(max(PROBE, min(epochs, (limit - spent - around) / (1.1 * probe["s_epoch"]))))
    row = probe
    if epochs > probe["epochs"]:
        row = run_peer(options.repo.resolve(), folder, epochs, workers, limit and max(1.0, limit - spent))
        if "error" in row:
            return row
    later = row["epochs"] - PAPER
    # Seconds of the published 300 epochs, measured or from those of an epoch.
    row["paper_s"] = round(row["wall_s"] - later * row["s_epoch"], 1)
    row["computed"] = later != 0
    return row


# ---- rows ------------------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["--child"]:
        given = json.loads(words[1])
        Path(given["out"]).write_text(json.dumps(child(given["arguments"], given["started"])))
        return
    from patchnerf_runs import Job, command, conduct, options_of, parsed

    parser = options_of(__doc__, "patchnerf_time")
    parser.add_argument("--profile", default="bunny_1.5m", help="(%(default)s)")
    parser.add_argument("--schedules", type=int, nargs="+", default=list(SCHEDULES), help="epochs (%(default)s)")
    parser.add_argument("--every", type=int, default=10, help="epochs between validations of one more run; 0: none")
    parser.add_argument("--repo", type=Path, help="checkout of haochen-rye/HNeRV")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 12], help="of HNeRV's loader (%(default)s)")
    parser.add_argument("--peer-epochs", type=int, default=PAPER, help="of HNeRV at most (%(default)s)")
    parser.set_defaults(seeds=[0])
    options, overrides = parsed(parser, words)
    if options.tiny:
        options.schedules, options.every, options.peer_epochs = [2], min(1, options.every), 2
    blank: Row = dict.fromkeys(KEY) | {"part": "run", "profile": options.profile, "overrides": " ".join(overrides)}

    def ours(seed: int, epochs: int, every: int, folder: Path) -> Row:
        own = argparse.Namespace(**vars(options) | {"epochs": epochs})
        arguments = command(options.profile, own, folder, *overrides, seed=seed, validate_every=every or None)
        return alone(arguments, options.tiny)

    def jobs(results: Results, folder: Path) -> Iterator[Job]:
        runs = [(n, 0) for n in sorted(options.schedules, reverse=True)]
        runs += [(max(options.schedules), options.every)] if options.every else []
        for seed in options.seeds:
            for epochs, every in runs:
                key = blank | {"tool": OURS, "epochs_wanted": epochs, "every": every, "seed": seed}
                yield key, lambda s=seed, n=epochs, e=every: ours(s, n, e, folder)
        if options.repo is None:
            return
        decoded = write_frames(None if options.tiny else options.video, folder / "frames")
        write_stubs(folder / "stubs")
        for number, workers in enumerate(options.workers):
            key = blank | {"tool": PEER, "profile": None, "overrides": "", "epochs_wanted": options.peer_epochs}
            share = 1 / (len(options.workers) - number)
            make = lambda w=workers, s=share: peer(options, folder, w, s) | {"decode_s": round(decoded, 2)}  # noqa: E731
            yield key | {"workers": workers}, make

    conduct(options, KEY, jobs, COLUMNS)


if __name__ == "__main__":
    main()
