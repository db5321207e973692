"""The notebook runs from top to bottom on a run folder."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest

from tests.experiments.fake_run import make_run

NOTEBOOK = Path(__file__).parents[2] / "docs/examples/figures_from_a_run.ipynb"


@pytest.mark.parametrize("classes", [("lesion",), ("pz", "tz")])
def test_notebook_makes_its_figures(tmp_path, monkeypatch, classes):
    monkeypatch.setenv("CMSAD_RUN", str(make_run(tmp_path, classes=classes, num_folds=3)))
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    namespace: dict = {}
    plt.close("all")
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    by_fold, volumes, case = map(plt.figure, plt.get_fignums())
    points = sum(len(line.get_xdata()) for line in by_fold.axes[0].lines[:-1])
    defined = json.loads((tmp_path / "metrics.json").read_text("utf-8"))["num_defined"]
    assert points == defined[classes[0]]["dice"]
    assert len(volumes.axes[0].lines[0].get_xdata()) == points
    assert len(case.axes) == 8
    assert all(axis.images for axis in case.axes)
    plt.close("all")
