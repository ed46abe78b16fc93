"""The tables of the video task: from rows to markdown, and the sentences that judge them."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as patch:  # the scripts import their neighbours by their bare names
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables_patchnerf")
    pages = importlib.import_module("tables")

ORIGIN = {"commit": "abc1234", "date": "2026-01-02", "torch": "2.14.1", "device": "Card X"}
CLIP = {"video": "a.mp4", "frames": 132, "frame": [640, 1280], "epochs": 300, "epochs_wanted": None, "overrides": ""}
ERROR = {"error": "out of memory"}
NONE = tables.NONE


def body(text):
    """Cells of every table line, without headers and rules."""
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for block in blocks for line in block[2:]]


def header(text):
    """Cells of the first line."""
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def pair(**values):
    """A run and the summary of it."""
    row = CLIP | ORIGIN | {"seed": 0, "part": "run"} | values
    return [row, {k: v for k, v in row.items() if k != "seed"} | {"part": "summary", "runs": 3}]


def test_doctests():
    assert doctest.testmod(tables).failed == 0


def test_all_are_registered_and_the_page_has_each_once():
    assert tables.TABLES_PATCHNERF.items() <= pages.TABLES.items()
    page = ROOT / "docs" / "patchnerf.md"
    if not page.is_file():
        pytest.skip("there is no docs/patchnerf.md")
    marks = re.findall(r"<!-- table:([\w-]+) -->", page.read_text())
    assert sorted(m for m in marks if m.startswith("patchnerf")) == sorted(tables.TABLES_PATCHNERF)


@pytest.mark.parametrize("name", tables.TABLES_PATCHNERF)
def test_nothing_measured(name, tmp_path):
    _, make = tables.TABLES_PATCHNERF[name]
    failed = {"tool": "ours", "way": "x", "name": "patchnerf/x", "part": "run", "profile": "bunny_3m", "every": 0}
    for report in ({"rows": []}, {"rows": [failed | CLIP | ERROR | ORIGIN]}):
        assert make(report) == tables.NOT_MEASURED
    assert pages.table_of(name, tmp_path) == tables.NOT_MEASURED


# ---- reconstruction and time -----------------------------------------------------------------------------------------


def bunny(profile, psnr, ms_ssim=0.989, **more):
    values = {"profile": profile, "psnr_db": psnr, "ms_ssim": ms_ssim, "params": 1_490_000, "train_s": 55.4}
    return pair(**values, psnr_db_min=33.0, psnr_8bit_db=psnr - 0.01, first_s=4.25, wall_s=61.0, **more)


def test_sizes_stand_beside_what_is_published():
    rows = [*bunny("bunny_3m", 40.0), *bunny("bunny_1.5m", 38.7, psnr_db_sd=0.1, allocated_gb=1.5)]
    text = tables.bunny({"rows": rows})
    small, large = body(text)
    cells = dict(zip(header(text), small, strict=True))
    assert cells["PSNR dB"] == "38.70 ± 0.10"
    assert (cells["NeRV"], cells["E-NeRV"], cells["HNeRV"], cells["over HNeRV"]) == ("30.87", "32.09", "35.57", "+3.13")
    assert (cells["train s"], cells["of it first step"], cells["peak GB"]) == ("55", "4.25", "1.50")
    assert large[0] == "`bunny_3m`"
    assert "38.70 dB and MS-SSIM 0.9890 (38.6 dB and 0.988 were aimed at: met)" in text
    assert "`bunny_3m` is +2.57 dB from HNeRV (3 dB were aimed at: not met)" in text
    assert "a.mp4, 132 frames of 640 x 1280, 300 epochs; means" in text
    assert "arXiv 2304.02633" in text


def test_a_high_psnr_does_not_make_up_for_ms_ssim():
    assert "aimed at: not met" in tables.bunny({"rows": bunny("bunny_1.5m", 39.0, 0.98)})


def test_other_settings_come_after_the_profiles():
    rows = [*bunny("bunny_1.5m", 30.0, overrides="--model.lr 1"), *bunny("bunny_1.5m", 39.0)]
    text = tables.bunny({"rows": rows})
    assert [cells[2] for cells in body(text)] == ["39.00", "30.00"]
    assert "300 epochs with `--model.lr 1`; means" in text


def schedule(epochs, psnr, wall, every=0, **more):
    row = {"part": "run", "tool": "ours", "profile": "bunny_1.5m", "epochs_wanted": epochs, "every": every, "seed": 0}
    return CLIP | ORIGIN | row | {"psnr_db": psnr, "wall_s": wall, "train_s": wall - 15, "first_s": 3.0} | more


def peer(workers, paper, computed=True):
    row = {"part": "run", "tool": "HNeRV", "workers": workers, "epochs": 40, "psnr_db": 28.0, "s_epoch": paper / 300}
    return ORIGIN | row | {"wall_s": 80.0, "paper_s": paper, "computed": computed, "every": None}


def test_the_shortest_schedule_that_reaches_the_mark_counts_with_all_its_seeds():
    rows = [
        schedule(300, 38.0, 90.0),
        schedule(100, 36.0, 45.0),
        schedule(50, 35.6, 30.0),
        schedule(50, 35.5, 30.0, seed=1),
        schedule(
            300,
            38.0,
            99.0,
            every=10,
            curve=[{"epoch": e, "train_s": e / 4, "psnr_db": p} for e, p in ((10, 30.0), (20, 35.7), (30, 36.0))],
        ),
    ]
    text = tables.time_to_mark({"rows": [*rows, peer(4, 560.0), peer(12, 465.0, False)]})
    assert [cells[3] for cells in body(text)[:3]] == ["yes", "yes", "no"]
    assert "35.57 dB after 100 epochs in 45.0 s, 30.0 s of them training (60 s in all were aimed at: met)" in text
    assert "10.3x as fast as 300 epochs of HNeRV with 12 workers (10x was aimed at: met)" in text
    assert "passes it at epoch 20, after 5.0 s of training (validated every 10)" in text
    assert ["HNeRV, 4 workers", "40", "28.00", "1.867", "80", "560 (computed)"] in body(text)
    assert "No schedule reached 35.57 dB." in tables.time_to_mark({"rows": rows[2:4]})


# ---- the guide, embeddings, parts ------------------------------------------------------------------------------------


def test_the_guide():
    shared = {"profile": "a100_moderate", "embeddings": "toy:512", "params": 18_800_000, "wall_s": 200.0}
    held = {"held_out_psnr_db": 30.0, "held_out_psnr_db_blend": 30.5, "held_out_psnr_db_over_blend": -0.5}
    rows = [*pair(**shared, split="1_1_1", psnr_db=37.0), *pair(**shared, split="6_6_10", train_psnr_db=36.5, **held)]
    text = tables.guide({"rows": rows})
    (cells,) = body(text)
    assert cells[:8] == ["`a100_moderate`", "18.8 (20)", "37.00", "28 to 31", "+6.0", "36.50", "30.00", "30.50"]
    assert cells[8:] == ["200", "3.5 h", "63x", NONE]
    assert "`a100_moderate`: +6.0 dB in 1/63 of the time, met" in text
    assert "-0.50 dB beside the blend, not met" in text
    assert "toy:512, a stand-in for a CLIP tower" in text
    assert body(tables.guide({"rows": rows[2:]}))[0][2] == NONE  # one of the two is enough for a row


def test_the_head():
    shared = {"profile": "bunny_1.5m", "split": "6_6_10", "embeddings": "toy:512", "params": 1_490_000, "train_s": 50.0}
    report = {f"{who}_{k}": 0.5 for who in ("model", "nearest", "blend") for k in ("cosine", "centred_cosine", "top1")}
    gain = {"train_psnr_db_gain": -0.05, "train_psnr_db_gain_low": -0.1, "train_psnr_db_gain_high": 0.0}
    rows = [*pair(**shared, arm="without", train_psnr_db=38.0)]
    rows += pair(**shared, arm="on top", train_psnr_db=37.95, head_params=300_000, queries="8 texts", **gain, **report)
    rows += pair(**shared, arm="with", train_psnr_db=37.0, train_psnr_db_gain=-1.0, **report)
    text = tables.clip({"rows": rows})
    assert body(text)[1][:5] == ["on top", "1.490", "0.300", "37.95", "-0.05 (-0.10 to 0.00)"]
    assert ["nearest", "0.500", "0.500", "0.500", NONE, NONE] in body(text)
    assert "The head costs 0.05 dB `on top` (0.1 dB were aimed at: met)" in text
    assert "1.00 dB `with` (0.1 dB were aimed at: not met)" in text
    assert "rankings for 8 texts" in text


def test_parts():
    shared = {"profile": "bunny_1.5m", "params": 1_490_000, "first_s": 1.0, "train_s": 50.0}
    rows = [*pair(**shared, setting="base", psnr_db=38.0, psnr_db_sd=0.1, s_epoch=0.2)]
    for name, change in (("better", 0.3), ("worse", -0.3), ("same", 0.15)):
        rows += pair(**shared, setting=name, psnr_db=38 + change, psnr_db_gain=change, s_epoch=0.1)
    failed = CLIP | ORIGIN | ERROR | {"part": "run", "setting": "too large", "profile": "bunny_1.5m", "seed": 0}
    text = tables.ablation({"rows": [*rows, failed]})
    assert body(text)[0][:3] == ["base", "38.00 ± 0.10", NONE]
    assert body(text)[1][:6] == ["better", "38.30", "+0.30", NONE, "0.100", "0.50x"]
    assert "count from 0.20 dB on. Better than the base: better; worse: worse; no clear difference: same." in text
    assert text.endswith("Failed: too large: out of memory.")


# ---- files and profiles ----------------------------------------------------------------------------------------------


def test_files():
    key = CLIP | ORIGIN | {"part": "run", "profile": "bunny_1.5m", "tune_epochs": 30, "ckpt": None, "seed": 0}
    parts = {"weights": 900_000, "latents": 20_000}
    rows = [
        key | {"way": "as trained", "bits": 32, "psnr_8bit_db": 38.5, "bytes": 6_000_000, "source_bytes": 1_000_000},
        key | {"way": "rounded", "bits": 6, "psnr_8bit_db": 37.5, "lost_db": 1.0, "bytes": 920_000, "parts": parts},
        key | {"way": "QAT", "bits": 8, "psnr_8bit_db": 38.5, "lost_db": -0.001, "bytes": 1_400_000, "parts": parts},
    ]
    text = tables.compression({"rows": rows})
    assert header(text)[4:7] == ["kB", "weights kB", "latents kB"]
    assert body(text)[1][:7] == ["rounded, 6 bit", "37.50", "1.00", NONE, "920.0", "900.0", "20.0"]
    assert body(text)[2][2] == "0.00"
    assert "The video itself is 1000.0 kB; 1 of 2 files are smaller." in text


def profile(name, samples_s, **more):
    row = {"name": f"patchnerf/{name}", "fits": True, "samples_s": samples_s, "frame": "1280x640", "batch": 1}
    row |= {"sample": "frame", "per_frame": 1, "steps_per_batch": 12, "samples_epoch": 132, "precision": "bf16-mixed"}
    return row | ORIGIN | {"card_gb": 8, "reserved_gb": 2.0, "allocated_gb": 1.25, "s_epoch": 0.5} | more


def test_profiles_are_compared_in_frames():
    patches = {"sample": "patch", "per_frame": 8, "batch": 24, "steps_per_batch": 1, "samples_epoch": 624}
    rows = [
        profile("bunny_1.5m", 300.0),
        profile("a100_moderate", 800.0, **patches),
        profile("bunny_1.5m compiled", 600.0),
        profile("gpu_8gb batch 24", 0.0, **patches) | {"fits": False},
    ]
    text = tables.profiles({"rows": rows})
    first, second, compiled, large = body(text)
    assert first[:4] == ["`a100_moderate`", "8 GB", "1280x640", "24 patches"]
    assert first[7:] == ["100", "1.00", "0.50", "624 patches"]
    assert second[3:9] == ["1 frames x 12", "bf16-mixed", "2.0 GB", "1.2 GB", "300", "3.00"]
    assert (compiled[0], compiled[8]) == ("bunny_1.5m compiled", "2.00")
    assert large[5] == "does not fit"
    assert "Out of memory: gpu_8gb batch 24." in text
