"""Run the notebooks from top to bottom; an error in a cell is an error here.

`python notebooks/run.py --write` also stores each notebook with no output but its picture. It needs
`pip install -e '.[dev,notebooks]'`.
"""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
KEPT = "image/png"


def main() -> None:
    """Run all notebooks, and write them if asked to."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
        print(f"{path.name}: {len(notebook.cells)} cells ran")
        if "--write" in sys.argv:
            keep_picture(notebook)
            nbformat.write(notebook, path)


def keep_picture(notebook: Any) -> None:
    """Remove everything from a notebook that a run has added, but for its last picture."""
    pictures = []
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            pictures += [(cell, output) for output in cell.outputs if KEPT in output.get("data", {})]
            cell.outputs, cell.execution_count = [], None
    cell, output = pictures[-1]
    output.data = {KEPT: output.data[KEPT], "text/plain": "a picture"}
    output.execution_count, output.metadata = None, {}
    cell.outputs = [output]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


if __name__ == "__main__":
    main()
