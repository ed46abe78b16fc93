"""The tables of the volume task: from rows to markdown."""

import doctest
import importlib
import json
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:  # the scripts import their neighbours by their bare names
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    tables = importlib.import_module("tables_dsunet")
    pages = importlib.import_module("tables")

ORIGIN = {"commit": "abc1234", "date": "2026-01-02", "torch": "2.14.1", "device": "Card X"}
ERROR = {"error": "ModuleNotFoundError: no such peer"}
NONE = tables.NONE


def body(text):
    """Cells of every table line, without headers and rules."""
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for block in blocks for line in block[2:]]


def header(text):
    """Cells of the first line."""
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def test_doctests():
    assert doctest.testmod(tables).failed == 0


def test_all_are_registered_under_names_of_this_task():
    assert all(name.startswith("dsunet-") for name in tables.TABLES_DSUNET)
    assert tables.TABLES_DSUNET.items() <= pages.TABLES.items()


@pytest.mark.parametrize("name", tables.TABLES_DSUNET)
def test_nothing_measured(name):
    _, make = tables.TABLES_DSUNET[name]
    failed = {"tool": "ours", "way": "x", "tta": False, "fold": 0, "seed": 0, **ERROR, **ORIGIN}
    for report in ({"rows": []}, {"rows": [failed]}):
        assert make(report) == tables.NOT_MEASURED


# ---- training step --------------------------------------------------------------------------------------------------


def step(way, ms, tool="ours", side=96, memory=4.0, **more):
    figures = {"ms": ms, "patches_s": 8000 / ms, "allocated_gb": memory}
    return {"side": side, "batch": 8, "way": way, "tool": tool} | figures | ORIGIN | more


def test_steps_are_relative_to_the_fastest_peer_of_their_size():
    rows = [
        step("ours bf16", 40.0, memory=3.0),
        step("ours bf16, no norm", 10.0, norm="none"),
        step("ours bf16, MKDC fused", 20.0, mkdc="fused"),
        step("ours bf16, no deep supervision", 20.0, deep_supervision=False),
        step("nnU-Net fp16", 80.0, "nnU-Net", remark="nnunetv2 2.8.1"),
        step("DynUNet bf16", 100.0, "DynUNet", remark="monai 1.6.1"),
        step("ours bf16", 50.0, side=128),
        {"side": 96, "batch": 8, "way": "DynUNet fp16", "tool": "DynUNet", **ERROR},
    ]
    text = tables.dsunet_step({"rows": rows})
    cells = {row[0]: row[1:] for row in body(text)}
    assert header(text) == ["way", "96³, batch 8", "128³, batch 8"]
    assert cells["ours bf16"] == ["200.0 (2.00x), 3.0 GiB (0.75x)", "160.0, 4.0 GiB"]
    assert cells["DynUNet bf16"] == ["80.0 (0.80x), 4.0 GiB (1.00x)", NONE]
    assert cells["DynUNet fp16"] == ["failed", NONE]
    assert cells["ours bf16, no norm"][0].startswith("800.0 (8.00x)")
    # Another network is no answer to a peer, however fast.
    assert "96³, batch 8: `ours bf16` has 2.00x the speed and 0.75x the memory of the fastest of 2 peer rows." in text
    assert "Peers: nnunetv2 2.8.1, monai 1.6.1. Measured on Card X: commit abc1234; 2026-01-02" in text


def test_steps_without_peers_or_memory():
    row = {key: value for key, value in step("ours bf16", 40.0).items() if key != "allocated_gb"}
    text = tables.dsunet_step({"rows": [row]})
    assert body(text) == [["ours bf16", "200.0"]]
    assert "x the speed" not in text
    assert "Peers: none." in text
    peer = {**row, "tool": "DynUNet", "way": "DynUNet"}
    assert "`ours bf16` has 1.00x the speed of the only peer row." in tables.dsunet_step({"rows": [row, peer]})


# ---- inference ------------------------------------------------------------------------------------------------------


def volume(way, s, tool="ours", tta=False, agreement=1.0, **more):
    row = {"volume": "240x240x155", "way": way, "tta": tta, "tool": tool, "s": s, "agreement": agreement}
    return row | ORIGIN | more


def test_seconds_per_volume_with_and_without_tta():
    rows = [volume("ours fp16", 0.5, tta=True, agreement=0.9991), volume("ours fp16", 0.1, allocated_gb=1.26)]
    rows += [volume("MONAI fp16", 0.25, "MONAI", peer="monai 1.6.1"), volume("MONAI bf16", 0.4, "MONAI")]
    failed = {key: value for key, value in volume("nnU-Net", 0, "nnU-Net").items() if key not in ("s", "agreement")}
    text = tables.dsunet_inference({"rows": [*rows, failed | ERROR]})
    assert header(text) == ["way", "240 x 240 x 155", "240 x 240 x 155, TTA", "agreement", "peak GiB"]
    assert body(text) == [
        ["ours fp16", "0.100 (2.50x)", "0.500", "0.9991", "1.3"],
        ["MONAI fp16", "0.250 (1.00x)", NONE, "1.0000", NONE],
        ["MONAI bf16", "0.400 (0.62x)", NONE, "1.0000", NONE],
        ["nnU-Net", "failed", NONE, NONE, NONE],
    ]
    # The agreement is that of the row that is spoken of.
    assert "240 x 240 x 155: `ours fp16` is 2.50x as fast as the fastest of 2 peer rows, agreement 1.0000." in text


# ---- loader ---------------------------------------------------------------------------------------------------------


def loader(way, workers, rate, **more):
    row = {"data": "32 drawn volumes", "patch": [96, 96, 96], "batch": 8, "cores": 16, "way": way, "workers": workers}
    return row | {"patches_s": rate, "low": rate - 1, "high": rate + 1, "epoch_s": 2000 / rate} | ORIGIN | more


def test_loaders_are_relative_to_the_guide_on_the_same_data():
    rows = [loader("ours, device store", 0, 900.0, device_gb=1.234), loader("guide", 4, 3.0), loader("guide", 16, 9.0)]
    rows += [loader("ours, ram", 1, 50.0, data="other"), {**loader("MONAI", 4, 1.0), **ERROR}]
    text = tables.dsunet_loader({"rows": rows})
    assert [row[1:] for row in body(text)] == [
        ["ours, device store", "900", "899 to 901", "100.0x", "2.2", "1.23"],
        ["guide, 4 workers", "3", "2 to 4", "0.3x", "666.7", NONE],
        ["guide, 16 workers", "9", "8 to 10", "1.0x", "222.2", NONE],
        ["MONAI, 4 workers", "failed", *[NONE] * 4],
        ["ours, ram, 1 worker", "50", "49 to 51", NONE, "40.0", NONE],
    ]
    assert body(text)[0][0] == "32 drawn volumes, patch 96x96x96, batch 8"
    assert "16 cores." in text


# ---- Hippocampus ----------------------------------------------------------------------------------------------------


def test_methods_and_their_difference():
    # The summary was made on another machine than the runs.
    shared = {"part": "summary", "config": "h200", "overrides": "", "tta": False, **ORIGIN, "device": "cpu"}
    times = {"train_s": 80.4, "longest_s": 95.0, "steps": 8000.0, "runs": 10}
    ours = {"method": "ours", "dice": 0.8951, "seeds": [0.895, 0.8952], "cases": 260}
    difference = {"method": "ours - MONAI DynUNet", "dice": 0.0021, "low": 0.001, "high": 0.003, "p": 1e-5}
    runs = [{"method": "ours", "fold": fold, "seed": 0, **ORIGIN} for fold in range(5)]
    peer = {"method": "MONAI DynUNet", "fold": 0, "seed": 0, "peer": "monai 1.6.1", "precision": "fp16"}
    rows = [
        shared | times | ours,
        shared | difference | {"cases": 260},
        shared | times | ours | {"tta": True, "overrides": "--trainer.max_epochs 16"},
        {"part": "cold start", "method": "ours", "first_s": 51.0},
        *runs,
        peer | {"compile": True} | ORIGIN,
    ]
    text = tables.hippocampus({"rows": rows})
    first, second, third = body(text)
    assert first == ["ours", "`h200`", "none", "0.8951", "0.8950, 0.8952", "80", "95", "8000", "10"]
    assert second[3:] == ["+0.0021", "+0.0010 to +0.0030, p < 0.001", *[NONE] * 4]
    assert third[1:3] == ["`h200` --trainer.max_epochs 16", "mirrors"]
    assert "260 held-out cases of 5 folds" in text
    assert "ours 51 s" in text
    assert "Peer: monai 1.6.1 in fp16, compiled. Measured on Card X:" in text


# ---- lesion targets -------------------------------------------------------------------------------------------------


def test_lesion_figures_and_differences_of_each_setting():
    mean = {"part": "mean", "arm": "soft", "runs": 3, "dice": 0.7, "lesion_recall": 0.81234, "steps_asked": 4000}
    pair = {"part": "comparison", "pair": "soft - nearest", "figure": "lesion_recall", "difference": 0.05}
    pair |= {"low": 0.01, "high": 0.09, "p_holm": 0.02, "verdict": "helps", "steps_asked": 4000}
    data = {"part": "data", "data": "msd_hippocampus", "volumes": 260, "lesions": 2000, "steps_asked": 4000}
    run = {"arm": "soft", "seed": 0, "steps_asked": 4000, "data": "msd_hippocampus"}
    rows = [row | ORIGIN | {"data": "msd_hippocampus"} for row in (data, run)]
    rows += [row | ORIGIN | {"data": "msd_hippocampus", "device": "cpu"} for row in (mean, pair)]
    other = {**mean, "data": "drawn brains", "overrides": "--model.loss blob", **ORIGIN}
    text = tables.lesion_targets({"rows": [*rows, other]})
    first, second, third = body(text)
    assert first[:4] == ["soft", "0.700", "0.812", NONE]
    assert second == ["soft - nearest", "recall", "+0.050", "+0.010 to +0.090", "0.020", "helps"]
    assert third[0] == "soft"
    assert "2000 lesions in 260 volumes (msd_hippocampus). 4000 steps. " in text
    assert "4000 steps with `--model.loss blob`. " in text
    assert text.count("Measured on Card X") == 2


# ---- lesion metrics -------------------------------------------------------------------------------------------------


def test_lesion_metrics_have_a_column_per_way():
    base = {"figure": "any", "lesions": 37, "shape": "182x218x182"} | ORIGIN
    rows = [
        base | {"way": "loop", "ms": 571.4, "iqr_ms": 85.9, "speedup": 1.0},
        base | {"way": "ours", "ms": 4.437, "iqr_ms": 0.929, "speedup": 128.7},
        base | {"figure": "hd95", "way": "distance maps", "ms": 99.94, "iqr_ms": 1.0, "speedup": 1.0},
        base | {"figure": "hd95", "way": "ours", "ms": 10.0, "iqr_ms": 1.0, "speedup": 10.0},
    ]
    text = tables.lesion_metrics({"rows": rows})
    assert header(text) == ["figure", "lesions", "loop", "distance maps", "ours", "ratio"]
    assert body(text) == [
        ["lesions, any overlap", "37", "571 ± 86", NONE, "4.4 ± 0.9", "129x"],
        ["HD95", "37", NONE, "99.9 ± 1.0", "10.0 ± 1.0", "10x"],
    ]
    assert "masks of 182 x 218 x 182 voxels" in text


# ---- studies --------------------------------------------------------------------------------------------------------


def arm(mean, sd_of_seeds=None):
    return {"dice": {"mean": mean, "sd": 4.0, "sd_of_seeds": sd_of_seeds}}


def found(mean, low, high, verdict="no evidence", p=0.02):
    return {"mean": mean, "low": low, "high": high, "p": p, "p_holm": 2 * p, "verdict": verdict}


def study(**more):
    cost = {"seconds": 60.0, "evaluation_seconds": 3.0, "samples_per_s": 250.0, "peak_reserved_gb": 3.456}
    cost |= {"parameters": 1234567.0, "gflops": 12.3}
    report = {
        "runs": {"done": 10, "planned": 10, "counted": 10},
        "cases": 260,
        "patients": 260,
        "folds": [0, 1, 2, 3, 4],
        "seeds": [0],
        "reference": "baseline",
        "smallest_effect": 0.5,
        "checks": {"optimizer steps": "equal (8000)"},
        "about": {"device": ["Card X"], "torch": ["2.14.1"], "code": ["0123456789ab"], "commit": "abc1234"},
        "arms": {"baseline": arm(88.0), "mkdc": arm(88.125)},
        "differences": {"dice": {"mkdc": found(0.125, -0.5, 0.75)}},
        "effects": {"dice": {}},
        "notes": [],
        "sentences": ["MKDC changes Dice by +0.12 points: no evidence that it helps here."],
        "cost": {"baseline": cost, "mkdc": {**cost, "peak_reserved_gb": None, "samples_per_s": 125.0}},
    }
    return {**report, **more}


def test_a_study_shows_dice_cost_effects_and_its_sentences():
    effects = {"MKDC": found(0.125, -0.5, 0.75, p=0.0001), "MKDC x DS": found(-0.001, None, None, "equivalent")}
    text = tables.study(study(effects={"dice": effects}, notes=["Not complete: 10 of 20 runs."]))
    baseline, mkdc, main, interaction = body(text)
    fixed = ["1.235", "12.30"]
    assert baseline == ["baseline", "88.00", "4.00", NONE, NONE, NONE, "60", "3.0", "250.0", "3.46", *fixed]
    assert mkdc[:6] == ["mkdc", "88.12", "4.00", "+0.12", "-0.50 to +0.75", "0.040"]
    assert mkdc[6:] == ["60", "3.0", "125.0", NONE, *fixed]
    assert main == ["MKDC", "+0.12", "-0.50 to +0.75", "< 0.001", "< 0.001", "no evidence"]
    assert interaction == ["MKDC x DS, interaction", "0.00", NONE, "0.020", "0.040", "equivalent"]
    assert "\n\n**Not complete: 10 of 20 runs.**\n\n- MKDC changes Dice by +0.12 points: no evidence" in text
    assert "folds 0, 1, 2, 3, 4; seeds 0; 10 of 10 runs, 10.5 minutes of training and evaluation together" in text
    assert "Checked: optimizer steps: equal (8000). Measured on Card X: commit abc1234; code 0123456789ab" in text


def test_a_study_without_factors_gives_the_verdicts_of_its_arms():
    arms = {"baseline": arm(88.0, 0.25), "mkdc": arm(88.125, 0.5)}
    report = study(arms=arms, differences={"dice": {"mkdc": found(0.125, 0.1, 0.75, "helps")}}, seeds=[0, 1])
    text = tables.study(report)
    assert header(text)[3:8] == ["SD of seeds", "against baseline", "95 % interval", "p (Holm)", "verdict"]
    assert [row[3:8] for row in body(text)] == [
        ["0.25", NONE, NONE, NONE, NONE],
        ["0.50", "+0.12", "+0.10 to +0.75", "0.040", "helps"],
    ]


def test_the_report_that_a_study_writes(tmp_path):
    """Its keys are those that the table asks for: a study with made-up results."""
    from lit_dsunet.study.arms import guide_arms
    from lit_dsunet.study.plan import Study
    from lit_dsunet.study.report import make_report

    arms = guide_arms({"model": {"mkdc": "off", "deep_supervision": 2}})
    plan = Study(tmp_path, [], [], {"data.seed": 0}, arms, [0, 1], [0], "code", {"commit": "abc1234"})
    for run in plan.runs():
        names = [f"case{run.fold}{i}" for i in range(6)]
        dice = [0.8 + 0.01 * i + 0.02 * ("ds" in run.arm) for i in range(6)]
        result = {
            "cases": {"name": names, "patient": names, "dice": dice, "dice_lesion": dice},
            "steps": 7,
            "order": "same",
            "initial": {"a:1": "x"},
            "cost": {"seconds": 1.0, "samples_per_s": 2.0, "evaluation_seconds": 0.5, "parameters": 10, "gflops": 1.0}
            | {"peak_reserved_gb": None, "peak_allocated_gb": None},
            "code": "code",
            "torch": "2.14.1",
            "device": "Card X",
        }
        plan.path(run).mkdir(parents=True)
        plan.result(run).write_text(json.dumps(result))
    make_report(plan, draws=200)
    text = tables.study(json.loads((tmp_path / "report.json").read_text()))
    cells = {row[0]: row[1:] for row in body(text)}
    assert list(cells) == ["baseline", "mkdc", "ds", "mkdc_ds", "MKDC", "DS", "MKDC x DS, interaction"]
    assert cells["ds"][2] == cells["DS"][0] == "+2.00"
    assert cells["DS"][-1] == "helps"
    assert "- DS changes Dice by +2.00 points" in text
    assert "8 of 8 runs, 0.2 minutes" in text
    assert "Measured on Card X: commit abc1234; code code; torch 2.14.1." in text


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_current_with_and_without_results(tmp_path):
    page, results = tmp_path / "docs" / "dsunet.md", tmp_path / "benchmarks" / "results"
    page.parent.mkdir()
    results.mkdir(parents=True)
    page.write_text((pages.ROOT / "docs" / "dsunet.md").read_text())

    def write():
        for path, text in pages.outdated(tmp_path).items():
            path.write_text(text)
        assert pages.outdated(tmp_path) == {}
        return page.read_text()

    empty = write()
    assert empty.count(f"\n{tables.NOT_MEASURED}\n") == len(tables.TABLES_DSUNET) + 1  # and the profiles
    (results / "dsunet_step.json").write_text(json.dumps({"rows": [step("ours bf16", 40.0)]}))
    (results / "dsunet_study.json").write_text(json.dumps(study()))
    filled = write()
    assert filled.count(tables.NOT_MEASURED) == empty.count(tables.NOT_MEASURED) - 2
    assert "| ours bf16 | 200.0, 4.0 GiB |" in filled
    for path in results.iterdir():
        path.unlink()
    assert write() == empty
