"""The notebooks as they are committed: pairs that say the same, with their outputs and nothing of the machine that ran them.

CI runs them (``.ci/run``); here nothing is executed.
"""

import io
import json
import re
from pathlib import Path

import jupytext
import pytest
from rich.console import Console

from w2s_jax import quickstart
from w2s_jax.errors import MismatchError
from w2s_jax.files import write_json

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ["01_predict", "02_distil", "03_design", "04_errors"]
#: A path from a root that only the machine that ran a notebook has; not a fraction, a unit or a part of a relative path.
ABSOLUTE = re.compile(r"(?<![\w.<~])(/(root|home|Users|tmp|work|var|usr|opt|private|mnt|workspace)/|[A-Z]:\\\\?Users)")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_all_are_tested():
    assert sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py")) == NAMES
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


def test_a_pair_has_the_same_cells(name):
    text, run = (jupytext.read(NOTEBOOKS / f"{name}{suffix}") for suffix in (".py", ".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in run.cells] == [(cell.cell_type, cell.source) for cell in text.cells], (
        f"{name}.py was changed: make notebooks"
    )
    for one in (text, run):  # so that Jupyter with jupytext saves both
        assert one.metadata["jupytext"]["formats"] == "ipynb,py:percent"
        assert one.metadata["kernelspec"]["name"] == "python3"


def test_it_was_run_from_top_to_bottom(notebook):
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


def test_every_plot_has_its_picture(notebook):
    drawn = [cell for cell in code(notebook) if "plt.show()" in "".join(cell["source"])]
    assert drawn
    for cell in drawn:
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), "".join(cell["source"])[:200]


def test_no_errors_no_warnings(notebook):
    for cell in code(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", "".join(output["text"])[:500]


def test_nothing_of_the_machine(name, notebook):
    texts = [(NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8"), json.dumps(notebook["metadata"])]
    for cell in notebook["cells"]:
        texts += ["".join(cell["source"]), json.dumps(cell["metadata"])]
        for output in cell.get("outputs", ()):
            texts += [json.dumps({key: value for key, value in output.items() if key != "data"})]
            texts += ["".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    for text in texts:
        found = ABSOLUTE.search(text)
        assert not found, text[max(0, found.start() - 60) : found.end() + 60]
    assert "iopub" not in json.dumps(notebook["metadata"]) + "".join(json.dumps(cell["metadata"]) for cell in notebook["cells"])


def test_it_is_small_and_says_that_its_teacher_is_a_stand_in(name, notebook):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 400_000
    assert "stand-in" in "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def test_the_small_student_of_a_notebook_is_kept_by_the_quickstart(tmp_path):
    """``quickstart.run(…, steps=40)``, and then the command: what is there decides, unless another number is asked for."""
    quiet = Console(quiet=True)
    assert quickstart._choose_steps(tmp_path, None, quiet) == quickstart.STEPS
    assert quickstart._choose_steps(tmp_path, 40, quiet) == 40
    write_json(tmp_path / "run" / "config.json", {"config": {"steps": 40}})
    told = Console(record=True, width=500, file=io.StringIO())
    assert quickstart._choose_steps(tmp_path, None, told) == 40
    assert "run of 40 steps, which is kept" in told.export_text()
    with pytest.raises(MismatchError, match="40 steps, not 320; delete"):
        quickstart._choose_steps(tmp_path, 320, quiet)
