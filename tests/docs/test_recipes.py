"""The recipes of CONTRIBUTING.md, followed to the letter on a copy of the tree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.phantom.anatomy import case_id_of
from data_pipelines.phantom.phantom import make_case
from data_pipelines.reading import volume_io
from tests.docs.test_documentation import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
RECIPES = {
    part.partition("\n")[0]: part
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)
    if part.startswith("Recipe: ")
}
STEP = re.compile(
    r"^New file `(?P<new>[^`]+)`:|in `(?P<changed>[^`]+\.\w+)`"
    r"|^```(?P<language>\w*)\n(?P<block>.*?)^```",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)


def follow(recipe: str, tree: Path) -> list[str]:
    """Make the files and changes of a recipe in ``tree``; the commands that check it.

    What the recipe leaves behind must pass the linter and the formatter.
    """
    file, commands, touched = None, [], set()
    for step in STEP.finditer(RECIPES[recipe]):
        if step["new"] or step["changed"]:
            file = tree / (step["new"] or step["changed"])
            touched |= {file} if file.suffix == ".py" else set()
        elif step["language"] == "python":
            assert file is not None
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(step["block"], encoding="utf-8")
        elif step["language"] == "diff":
            assert file is not None
            lines = [(line[:1], line[1:]) for line in step["block"].splitlines(keepends=True)]
            before = "".join(line for sign, line in lines if sign != "+")
            after = "".join(line for sign, line in lines if sign != "-")
            text = file.read_text("utf-8")
            assert text.count(before) == 1, f"{file.name} must hold once:\n{before}"
            file.write_text(text.replace(before, after), encoding="utf-8")
        else:
            commands += step["block"].splitlines()
    for check in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, *sorted(touched)], check=True)
    return commands


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a newcomer has cloned."""
    tree = tmp_path / "clone"
    tree.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.tar.xz", "*.png")
    for name in ("cmsad_jax", "data_pipelines", "experiments", "benchmarks", "tests", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for file in (*ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(file, tree)
    return tree


def run(command: str, tree: Path) -> str:
    """What a command of a recipe prints; it must succeed."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tree,
        env=os.environ | {"HOME": str(tree.parent), "PYTHONPATH": str(tree)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_recipe_is_followed():
    assert set(RECIPES) == {"Recipe: a data set", "Recipe: a fusion", "Recipe: a metric"}


def test_data_set(tree):
    mine = tree / "mine"
    for index in (0, 3):
        case = make_case(index)
        for name, volume in {**case.images, "label": case.label}.items():
            path = mine / f"{case_id_of(index)}_{name}.nii.gz"
            kind = np.uint8 if name == "label" else np.float32
            volume_io.write_nifti(path, volume.array.astype(kind), volume.affine)
    (command,) = follow("Recipe: a data set", tree)
    assert "the data set can be built; cases: 2, errors: 0" in run(command, tree)
    (mine / f"{case_id_of(0)}_adc.nii.gz").unlink()
    with pytest.raises(AssertionError, match=r"must have every modality +got no 'adc'"):
        run(command, tree)
    shown = re.sub(r"[\s│]+", " ", run("python -m data_pipelines.validate --help-all", tree))
    assert "nifti_folder or flat" in shown
    floors = run(
        "python -m pytest -q -p no:cacheprovider tests/test_architecture.py -k has_its_floor", tree
    )
    assert " passed" in floors


@pytest.mark.slow
def test_fusion(tree):
    (check,) = follow("Recipe: a fusion", tree)
    found = run(f"{check} -v -p no:cacheprovider", tree)
    for test in ("absent_modality", "batch_permutation", "is_explained"):
        assert re.search(rf"{test}\S*\[rms\] PASSED", found), found
    (option,) = re.findall(r"`(--network[^`]+)`", RECIPES["Recipe: a fusion"])
    parse = "from experiments.settings.command_line import parse"
    assert "kind='rms'" in run(f"python -c \"{parse}; print(parse(['{option}']).network)\"", tree)


def test_metric(tree):
    grid = np.diag([2.0, 1.0, 1.0, 1.0])
    labels, predictions = (np.zeros((4, 8, 8), np.uint8) for _ in range(2))
    labels[1:3, 2:4, 2:4] = 1
    predictions[1:3, 2:4, 2:7] = 1
    for folder, mask in (("labels", labels), ("predictions", predictions)):
        volume_io.write_nifti(tree / folder / "case.nii.gz", mask, grid)
    evaluate, check = follow("Recipe: a metric", tree)
    assert re.search(r"volume_ratio +2\.500 ", run(evaluate, tree))
    assert "volume_ratio" in (tree / "measured/metrics.csv").read_text("utf-8").splitlines()[0]
    found = run(f"{check} -v -p no:cacheprovider", tree)
    assert "test_every_metric_and_key_of_a_run_is_explained PASSED" in found
