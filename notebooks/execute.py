"""Notebooks from their scripts: runs each in a fresh kernel and writes the .ipynb, with its outputs, beside it.

python notebooks/execute.py                                all of them
python notebooks/execute.py notebooks/1_hypergradients.py  this one

The script is the source. Nothing volatile is kept (times, random ids, versions), so that a second run that finds the
same numbers changes no line.
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

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(script: Path) -> None:
    """Write the notebook of a script; where a cell fails nothing is written, and the error is raised."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.source = cell.source.strip("\n")  # the formatter wants two empty lines above a function
    where = {"metadata": {"path": str(script.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=where).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.NotebookNode()
        for output in cell.get("outputs", []):
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = nbformat.NotebookNode()
                if "image/png" in output.data:
                    output.data["image/png"] = smaller(output.data["image/png"])
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def smaller(png: str) -> str:
    """The picture (base64) in 256 colours, which is more than a plot has: a third of the bytes."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    for script in [Path(name).resolve() for name in sys.argv[1:]] or sorted(here.glob("[0-9]*.py")):
        start = time.perf_counter()
        execute(script)
        print(f"{script.stem}: {time.perf_counter() - start:.0f} s", flush=True)
