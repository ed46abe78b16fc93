"""The notebooks in the repository: executed, without errors, and their code still runs (on a few tiny samples)."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


@dataclass(frozen=True)
class Notebook:
    """What to expect of one.

    Attributes:
        name: Of its file and of the checkpoint that it writes.
        sizes: Left side of the line that sets how long it takes.
        tiny: Its right side in the test.
        figure: One of the figures that it shows.
        least: Of that figure, or
        most: at most.
        axes: Of its picture.
        lines: Of its code, at most; imports are not counted.
    """

    name: str
    sizes: str
    tiny: str
    figure: str
    least: float
    most: float
    axes: int
    lines: int = 25

    @property
    def path(self):
        return FOLDER / f"{self.name}.ipynb"

    def read(self):
        found = nbformat.read(self.path, as_version=4)
        nbformat.validate(found)
        return found


NOTEBOOKS = [
    Notebook("landmarks", "EPOCHS, IMAGES, SIZE", "1, 10, 64", "test/mre_px", 0, 2, axes=3),
    Notebook("dsunet", "EPOCHS, VOLUMES, SIZE", "1, 2, 24", "test/dice", 0.75, 1, axes=4),
    Notebook("detr", "EPOCHS, IMAGES, SIZE", "1, 8, 64", "test/ap50", 0.5, 1, axes=2),
    Notebook("patchnerf", "EPOCHS, FRAMES", "1, 8", "test/psnr_db", 27, 40, axes=6, lines=36),
]


@pytest.fixture(params=NOTEBOOKS, ids=lambda notebook: notebook.name)
def notebook(request):
    return request.param


def code_of(notebook):
    return [cell for cell in notebook.read().cells if cell.cell_type == "code"]


def test_all_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {notebook.name for notebook in NOTEBOOKS}


def test_was_executed_from_top_to_bottom(notebook):
    assert notebook.read().metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code_of(notebook)] == [1, 2, 3, 4]
    kinds = [output.output_type for cell in code_of(notebook) for output in cell.outputs]
    assert "error" not in kinds
    assert "stream" not in kinds  # warnings and progress bars


def test_shows_one_picture_and_the_figures(notebook):
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    texts = [str(o.get("data", {}).get("text/plain")) for o in outputs]
    (figures,) = [text for text in texts if notebook.figure in text]
    value = float(re.search(rf"'{notebook.figure}': ([\d.]+)", figures)[1])
    assert notebook.least < value < notebook.most


def test_is_short(notebook):
    lines = [line for cell in code_of(notebook) for line in cell.source.splitlines()]
    assert len([line for line in lines if line.strip() and not line.startswith(("import", "from"))]) <= notebook.lines


def test_names_no_folder_of_a_machine(notebook):
    assert not re.search(r"/(home|tmp|root|work|Users)/", notebook.path.read_text())


@pytest.mark.filterwarnings("ignore")
def test_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    source = "\n".join(cell.source for cell in code_of(notebook))
    assert source.count(f"{notebook.sizes} = ") == 1
    tiny = f"{notebook.sizes} = {notebook.tiny}"
    source = re.sub(rf"^{notebook.sizes} = .*$", tiny, source, flags=re.MULTILINE)
    names = {"__name__": "__main__"}
    try:
        exec(compile(source, notebook.path.name, "exec"), names)
        assert names["trainer"].current_epoch == 1
        assert notebook.figure in names["figures"]
        assert len(names["fig"].axes) == notebook.axes
        assert (tmp_path / f"{notebook.name}.ckpt").is_file()
    finally:
        plt.close("all")
        matplotlib.use(before)
