"""The tables of the README and the docs: from rows to markdown, and that the pages are current."""

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:  # the scripts import their neighbours by their bare names
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    tables = importlib.import_module("tables")
    table_parts = importlib.import_module("table_parts")

ORIGIN = {"commit": "abc1234", "date": "2026-01-02", "torch": "2.14.1", "device": "Card X"}


def body(text):
    """Cells of every table line, without header and rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def profile(name, **values):
    row = {"name": name, "frame": "384x384", "batch": 12, "accumulate": 1, "precision": "16-mixed", "card_gb": 8}
    return row | {"fits": True, "reserved_gb": 3.81, "allocated_gb": 3.5, "samples_s": 100.0} | ORIGIN | values


@pytest.mark.parametrize("module", [tables, table_parts])
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0


def test_profiles_start_with_the_reference_and_compare_with_it():
    rows = [
        profile("a_fast", samples_s=250.0, accumulate=2),
        profile(tables.REFERENCE),
        profile("other_device", device="Card Y"),
    ]
    cells = body(tables.profiles({"rows": rows}))
    assert [c[0] for c in cells] == [f"`{n}`" for n in (tables.REFERENCE, "a_fast", "other_device")]
    assert [c[-1] for c in cells] == ["1.00", "2.50", tables.NONE]
    assert cells[1][3] == "12 x 2"
    assert cells[0][5:7] == ["3.81 GB", "3.50 GB"]


def test_a_profile_that_does_not_fit_stays_in_the_table():
    too_large = {"fits": False, "reserved_gb": None, "allocated_gb": None, "samples_s": None}
    cells = body(tables.profiles({"rows": [profile("big", **too_large)]}))
    assert cells[0][5:] == ["does not fit", tables.NONE, tables.NONE, tables.NONE]


def test_a_run_without_a_gpu_has_no_memory():
    row = {k: v for k, v in profile("demo").items() if k not in ("reserved_gb", "allocated_gb")}
    assert body(tables.profiles({"rows": [row]}))[0][5:7] == [tables.NONE, tables.NONE]


def test_guide_limits_stand_apart():
    text = tables.profiles({"rows": [profile("guide limit 256 b32"), profile("mine")]})
    first, second = text.split("The largest batches")
    assert "mine" in first
    assert "256 b32" in second
    assert "256 b32" not in first


def volume_profile(name, patch, **values):
    row = profile(f"dsunet/{name}", frame=patch, batch=2, voxels=1, **values)
    for side in patch.split("x"):
        row["voxels"] *= int(side)
    return row


def test_profiles_of_volumes_are_compared_in_voxels():
    rows = [
        volume_profile("a100_40gb", "64x64x64", samples_s=25.0),
        volume_profile("guide_baseline", "32x32x32", samples_s=100.0),
        volume_profile("guide limit 96 b8 8 GB", "32x32x32", fits=False),
    ]
    text = tables.profiles_dsunet({"rows": rows})
    first, second = text.split("The guide's MKDC")
    assert [(c[0], c[2], *c[-2:]) for c in body(first)] == [
        ("`guide_baseline`", "32x32x32", "100.0", "1.00"),
        ("`a100_40gb`", "64x64x64", "25.0", "2.00"),
    ]
    assert body(second)[0][0] == "guide limit 96 b8 8 GB"
    assert body(second)[0][5] == "does not fit"


def test_errors_are_no_profiles():
    assert tables.profiles({"rows": [{"name": "x", "error": "no"}]}) == tables.NOT_MEASURED


def isbi(seed, mre, **values):
    row = {"name": "h200", "seed": seed, "holdout": 0.0, "fold": 0, "tta": "none", "annotator": "mean", "mre": mre}
    return row | {"sd": 1.0, "median": 0.9} | dict.fromkeys(tables.SDR, 90.0) | ORIGIN | values


def test_seeds_become_mean_and_deviation():
    rows = [
        isbi(0, 1.0, mre_interval=[0.9, 1.1], train_s=100.0),
        isbi(1, 1.2, mre_interval=[1.1, 1.3], train_s=200.0),
        isbi(0, 1.5, annotator="junior"),
        isbi(0, 0.8, tta="multiscale"),
        isbi(0, 2.0, name="wide", holdout=0.2),
        isbi(0, 2.2, name="wide", holdout=0.2, fold=1),
    ]
    test1, held = tables.isbi2015({"rows": rows}), tables.isbi2015_holdout({"rows": rows})
    first, junior, scaled = body(test1)
    assert first[:6] == ["h200", "mean", "none", "2", "1.100 ± 0.141", "0.90 to 1.30"]
    assert first[-1] == "150 s"
    assert junior[:5] == ["h200", "junior", "none", "1", "1.500"]
    assert scaled[2] == "multiscale"
    assert body(held)[0][:5] == ["wide", "mean", "none", "1, 2 folds", "2.100 ± 0.141"]
    assert "re-encoded" in test1


def test_rows_may_say_what_else_the_machine_did():
    text = tables.isbi2015({"rows": [isbi(0, 1.0, conditions="two runs at once"), isbi(1, 1.0)]})
    assert "Conditions: two runs at once." in text
    assert "Conditions" not in tables.isbi2015({"rows": [isbi(0, 1.0)]})


def test_landmarks_are_averaged_over_seeds():
    def one(mre):
        return [{"name": "sella", "mre": mre, "sd": 0.5, "median": 0.4, "sdr_2mm": 99.0, "sdr_4mm": 100.0}]

    rows = [isbi(0, 1.0, per_landmark=one(0.4)), isbi(1, 1.0, per_landmark=one(0.6)), isbi(0, 1.0, annotator="junior")]
    assert body(tables.isbi2015_landmarks({"rows": rows})) == [["sella", "0.50", "0.50", "0.40", "99.0", "100.0"]]


def test_hold_out_runs_say_what_they_changed():
    row = isbi(0, 1.0, holdout=0.2, overrides=["--model.loss", "kl", "--data.image_size", "[800,640]"])
    text = tables.isbi2015_holdout({"rows": [row]})
    assert "| model.loss kl, data.image_size [800,640] |" in text


def test_throughput_is_relative_to_the_plain_loop():
    base = {"network": "net", "side": 512, "batch": 10} | ORIGIN
    rows = [
        base | {"step": "plain fp32", "workers": 4, "samples_per_s": 100.0},
        base | {"step": "plain fp32", "workers": 16, "samples_per_s": 50.0},
        base | {"step": "+ device store", "workers": None, "samples_per_s": 350.0},
        base | {"step": "+ CUDA graph", "workers": None, "error": "no"},
        base | {"side": 256, "step": "+ device store", "workers": None, "samples_per_s": 900.0},
    ]
    text = tables.throughput({"rows": rows})
    assert body(text) == [
        ["plain fp32, 4 workers", "100 (1.0x)", tables.NONE],
        ["plain fp32, 16 workers", "50 (0.5x)", tables.NONE],
        ["+ device store", "350 (3.5x)", "900"],
        ["+ CUDA graph", "failed", tables.NONE],
    ]
    assert "Card X" in text
    assert "abc1234" in text


def test_codec_has_a_column_per_decoder():
    case = {"input": "512x512", "stride": 4, "sigma_heatmap_px": 2.0, "centre": "exact"}
    rows = [
        case | {"noise": noise, "method": method, "mre_mm": 0.1 * i + noise}
        for noise in (0.0, 0.03)
        for i, method in enumerate(tables.DECODERS)
    ]
    frame = {"height": 2400, "width": 1935, "mm_per_px": 0.1}
    report = {"rows": rows, "frame": frame, "count": 7, "landmarks": "random", **ORIGIN}
    noisy = body(tables.codec(report))
    assert noisy == [["512x512", "4", "2.0", "exact", "3 %", "0.030", "0.130", "0.230", "0.330", "0.430"]]
    assert len(body(tables.codec_all(report))) == 2


def cleanup_row(cleanup, every=1, **values):
    row = {"network": "unet_r34", "frames": "variable", "limited": False, "cleanup": cleanup, "every": every}
    row |= {"side": 512, "batch": 12, "precision": "16-mixed", "limit_gb": None, "fits": True, "samples_per_s": 100.0}
    return row | {"reserved_gb": 4.0, "allocated_gb": 3.0, "retries": 0} | ORIGIN | values


def test_cleanup_compares_within_a_training():
    limited = {"limited": True, "limit_gb": 3.15}
    rows = [
        cleanup_row("none"),
        cleanup_row("both", 10, samples_per_s=50.0),
        cleanup_row("none", **limited, samples_per_s=80.0, retries=7),
        cleanup_row("both", 10, **limited, fits=False),
        cleanup_row("gc.collect", error="broken"),
    ]
    first, second, third, fourth = body(tables.memory_cleanup({"rows": rows}))
    assert first[1:] == ["none", tables.NONE, "100", "1.00", "4.00 GB", "3.00 GB", "0"]
    assert second[1:5] == ["both", "10 steps", "50", "0.50"]
    assert third[0] == "unet_r34, variable frames, limited to 3.15 GB"
    assert third[4:] == ["1.00", "4.00 GB", "3.00 GB", "7"]
    assert fourth[3:] == ["out of memory", *[tables.NONE] * 4]
    cpu = {k: v for k, v in cleanup_row("none").items() if k not in ("reserved_gb", "allocated_gb", "retries")}
    assert body(tables.memory_cleanup({"rows": [cpu]}))[0][5:] == [tables.NONE] * 3


def test_ema_is_relative_to_ours():
    row = {"network": "net", "step": "eager", "side": 512, "batch": 10, "params_m": 30.0, "step_ms": 40.0} | ORIGIN
    row |= {"iqr_us": 10.0, "kernels": 20, "gpu_us": 100.0, "added_iqr_us": 5.0}
    rows = [
        row | {"average": "ours", "update_us": 500.0, "added_us": 200.0, "share": 0.005},
        row | {"average": "stock", "update_us": 100_000.0, "added_us": 90_000.0, "share": 2.25},
    ]
    first, second = body(tables.ema({"rows": rows}))
    assert first == ["net (30 M), eager, 40.0 ms", "ours", "500 ± 10", "1.0", "20", "100", "200 ± 5", "0.50%"]
    assert second[2:4] == ["100000 ± 10", "200.0"]
    assert second[-1] == "225.00%"


def test_sections_without_results_say_so(tmp_path):
    for name, (_, make) in tables.TABLES.items():
        assert tables.table_of(name, tmp_path) == tables.NOT_MEASURED
        if not name.startswith("codec"):  # which says how it was measured beside its rows
            assert make({"rows": []}) == tables.NOT_MEASURED


def test_every_section_stands_in_a_page():
    pages = [tables.ROOT / "README.md", *(tables.ROOT / "docs").glob("*.md")]
    marks = {name for page in pages for name in re.findall(r"<!-- table:([\w-]+) -->", page.read_text())}
    assert marks == set(tables.TABLES)


def test_pages_are_rewritten_once(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# a\n<!-- table:profiles -->\nold\n<!-- /table -->\nend\n")
    (tmp_path / "docs" / "plain.md").write_text("nothing here\n")
    results = tmp_path / "benchmarks" / "results" / "profiles.json"
    results.write_text(json.dumps({"rows": [profile("mine")]}))
    pages = tables.outdated(tmp_path)
    assert list(pages) == [tmp_path / "README.md"]
    text = pages[tmp_path / "README.md"]
    assert text.startswith("# a\n<!-- table:profiles -->\n| profile |")
    assert text.endswith("<!-- /table -->\nend\n")
    (tmp_path / "README.md").write_text(text)
    assert tables.outdated(tmp_path) == {}


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("<!-- table:nothing -->\n<!-- /table -->\n", "no table 'nothing'"),
        ("<!-- table:profiles -->\nno end\n", "without its partner"),
        ("text\n<!-- /table -->\n", "without its partner"),
        ("<!-- table:codec -->\n<!-- table:codec -->\n<!-- /table -->\n", "without its partner"),
    ],
)
def test_wrong_marks_name_the_page(tmp_path, page, complaint):
    (tmp_path / "README.md").write_text(page)
    with pytest.raises(ValueError, match=rf"README\.md: .*{complaint}"):
        tables.outdated(tmp_path)


def test_the_pages_of_this_checkout_are_current():
    assert [str(path) for path in tables.outdated()] == [], "run python benchmarks/tables.py"


def test_check_writes_nothing(monkeypatch, capsys):
    page = tables.ROOT / "README.md"
    monkeypatch.setattr(tables, "outdated", lambda: {page: "new"})
    before = page.read_text()
    assert tables.main(["--check"]) == 1
    assert page.read_text() == before
    assert "README.md: not current" in capsys.readouterr().out
    monkeypatch.setattr(tables, "outdated", dict)
    assert tables.main(["--check"]) == 0
