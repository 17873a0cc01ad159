"""Run the notebooks, or those named, and keep what they show: `python notebooks/refresh.py`.

The site and the forge show these outputs; nobody runs the notebooks to read them. A cell whose
metadata name a `picture` also writes its picture to that file in `docs`.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent


def smaller(png: str) -> str:
    """The same picture in a palette of 128 colours: a third of the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def refresh(path: Path) -> None:
    """Run a notebook and write it with its outputs, without warnings and progress bars."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    NotebookClient(
        notebook,
        timeout=3600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    notebook.metadata.language_info = {"name": "python"}  # whatever this Python's version is
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        for data in (out.data for out in cell.outputs if "data" in out):
            if "image/png" in data:
                data.pop("image/jpeg", None)  # the same once more
                data["image/png"] = smaller(data["image/png"])
                if name := cell.metadata.get("picture"):
                    file = HERE.parent / "docs" / name
                    file.write_bytes(base64.b64decode(data["image/png"]))
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
        refresh(HERE / name)
