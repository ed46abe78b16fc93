"""The notebook in the repository: executed, without errors, and its code still runs (on a few tiny images)."""

import base64
import re
from pathlib import Path

import matplotlib
import nbformat
import pytest

PATH = Path(__file__).parents[1] / "notebooks" / "landmarks.ipynb"
TINY = "EPOCHS, IMAGES, SIZE = 1, 10, 64"


@pytest.fixture(scope="module")
def notebook():
    found = nbformat.read(PATH, as_version=4)
    nbformat.validate(found)
    return found


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_was_executed_from_top_to_bottom(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code_of(notebook)] == [1, 2, 3, 4]
    kinds = [output.output_type for cell in code_of(notebook) for output in cell.outputs]
    assert "error" not in kinds
    assert "stream" not in kinds  # warnings and progress bars


def test_shows_one_picture_and_the_figures(notebook):
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    (figures,) = [o.data["text/plain"] for o in outputs if "test/mre_px" in str(o.get("data", {}).get("text/plain"))]
    assert float(re.search(r"'test/mre_px': ([\d.]+)", figures)[1]) < 2


def test_is_short(notebook):
    lines = [line for cell in code_of(notebook) for line in cell.source.splitlines()]
    assert len([line for line in lines if line.strip() and not line.startswith(("import", "from"))]) <= 25


def test_names_no_folder_of_a_machine():
    assert not re.search(r"/(home|tmp|root|work|Users)/", PATH.read_text())


@pytest.mark.filterwarnings("ignore")
def test_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    source = "\n".join(cell.source for cell in code_of(notebook))
    assert source.count("EPOCHS, IMAGES, SIZE = ") == 1
    source = re.sub(r"^EPOCHS, IMAGES, SIZE = .*$", TINY, source, flags=re.MULTILINE)
    names = {"__name__": "__main__"}
    try:
        exec(compile(source, PATH.name, "exec"), names)
        assert names["trainer"].current_epoch == 1
        assert "test/mre_mm" in names["figures"]
        assert len(names["fig"].axes) == 3
        assert (tmp_path / "landmarks.ckpt").is_file()
    finally:
        names["plt"].close("all")
        matplotlib.use(before)
