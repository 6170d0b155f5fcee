"""The notebook runs from top to bottom, on a tiny model and images, and leaves what it says."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import TINY

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_quick_start_notebook_runs(pictures, tmp_path, monkeypatch, capsys):
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "it is kept without outputs"
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(cells[0], found)  # what a reader changes
    assert found["IMAGES"] == "photos" and found["CHANGES"] == {}
    tiny = {name: value for name, value in TINY.items() if name not in ("curriculum", "stages")}
    found |= {"IMAGES": str(pictures), "CHANGES": tiny}
    for number, cell in enumerate(cells[1:], 1):
        exec(compile(cell, f"{NOTEBOOK.name} cell {number}", "exec"), found)
    shown = capsys.readouterr().out
    assert "24 for training, 12 held out; 3 classes" in shown
    assert found["results"].keys() == {"knn", "linear_probe"}
    run = tmp_path / "runs" / "quickstart"
    assert (run / "reconstruction.png").is_file() and (run / "timm" / "README.md").is_file()
    assert found["features"].shape == (1, TINY["embed_dim"])
