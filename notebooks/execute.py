"""Run the notebooks and write each .ipynb beside its .py, with outputs and without anything that changes from run to run.

    make notebooks                                     # all of them
    .venv/bin/python notebooks/execute.py notebooks/01_predict.py
"""

import base64
import io
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent


def smaller(png: str) -> str:
    """A picture with 256 colours, which is all that a plot needs, in a third of the bytes; base64 in and out."""
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path: Path) -> Path:
    """Run NN_name.py (py:percent) and write NN_name.ipynb."""
    notebook = jupytext.read(path)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources=where).execute()
    for at, cell in enumerate(notebook.cells):
        cell.id = f"cell-{at:02d}"
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata.pop("language_info", None)  # says which Python ran it
    notebook.metadata.get("jupytext", {}).get("text_representation", {}).pop("jupytext_version", None)
    out = path.with_suffix(".ipynb")
    nbformat.write(notebook, out)
    return out


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(HERE.glob("[0-9]*.py"))):
        began = time.monotonic()
        out = execute(path.resolve())
        print(f"{out.name}: {time.monotonic() - began:.0f} s, {out.stat().st_size / 1000:.0f} kB", flush=True)
