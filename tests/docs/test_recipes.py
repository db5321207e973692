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
    """Make the files and changes of a recipe in ``tree``; the commands that check it."""
    file, commands = None, []
    for step in STEP.finditer(RECIPES[recipe]):
        if step["new"] or step["changed"]:
            file = tree / (step["new"] or step["changed"])
        elif step["language"] == "python":
            assert file is not None
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(step["block"])
        elif step["language"] == "diff":
            assert file is not None
            lines = [(line[:1], line[1:]) for line in step["block"].splitlines(keepends=True)]
            before = "".join(line for sign, line in lines if sign != "+")
            after = "".join(line for sign, line in lines if sign != "-")
            text = file.read_text("utf-8")
            assert text.count(before) == 1, f"{file.name} must hold once:\n{before}"
            file.write_text(text.replace(before, after))
        else:
            commands += step["block"].splitlines()
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
    assert words[:2] == ["python", "-m"]
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tree,
        env=os.environ | {"HOME": str(tree.parent), "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lint(tree: Path) -> None:
    """What a recipe leaves behind passes the linter and the formatter."""
    for check in (["check"], ["format", "--check"]):
        folders = [tree / name for name in ("cmsad_jax", "data_pipelines", "experiments")]
        subprocess.run([sys.executable, "-m", "ruff", *check, *folders], cwd=tree, check=True)


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
    assert "nifti_folder or side_by_side" in run("python -m data_pipelines.validate --help", tree)
    lint(tree)


def test_fusion(tree):
    check, train = follow("Recipe: a fusion", tree)
    found = run(f"{check} -v -p no:cacheprovider", tree)
    for test in ("absent_modality", "batch_permutation", "is_explained"):
        assert re.search(rf"{test}\S*\[rms\] PASSED", found), found
    assert train.startswith("python -m experiments.cv --network.fusion.kind=")
    lint(tree)
