"""Typical mistakes of the first day: each is answered in one screen that says what to type."""

import contextlib
import importlib
import io
import shutil
import signal
import sys
from pathlib import Path

import pytest

from data_pipelines import command_line
from experiments.__main__ import COMMANDS
from experiments.__main__ import run as run_command
from experiments.process.console import run_main
from experiments.process.signals import SIGNALS
from experiments.studies import cross_validation
from tests.data_pipelines.fabricate import raw_case, write_folder
from tests.experiments.untrained_run import make_untrained_run, tiny_config

WIDTH, LINES = 132, 24
"""Of a terminal in which a table of faults is read."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of which one fold is done, folders of cases that are right and wrong, masks."""
    root = tmp_path_factory.mktemp("first_day")
    make_untrained_run(root / "run", tiny_config(), done=1)
    write_folder(root / "cases", *(raw_case(f"c{n}", seed=n) for n in range(3)))
    for case in sorted((root / "cases").iterdir()):
        (case / "hbv.nii.gz").unlink()
        own = root / "scans" / case.name
        own.mkdir(parents=True)
        for name, theirs in (("t2w", "axT2"), ("adc", "ADCmap"), ("lesion", "ROI")):
            shutil.copy(case / f"{name}.nii.gz", own / f"{theirs}.nii.gz")
        shutil.copytree(case, root / "unlabelled" / case.name)
        (root / "unlabelled" / case.name / "lesion.nii.gz").unlink()
    shutil.copytree(root / "cases", root / "broken")
    (root / "broken/c1/adc.nii.gz").write_bytes(b"a page that says: log in")
    (root / "empty").mkdir()
    for name, case in (("masks/c0", "c0"), ("labels/other", "c1")):
        (root / name).parent.mkdir()
        shutil.copy(root / f"cases/{case}/lesion.nii.gz", root / f"{name}.nii.gz")
    (root / "patients.csv").write_text("study;who\nc0;P1\n", encoding="utf-8")
    return root


TWO = "--data.modalities t2w adc"
MISTAKES = {
    "a command misspelt": ("predcit", "Use cmsad predict."),
    "an option misspelt": ("cv --train.step=5", "Perhaps you meant: --train.steps INT"),
    "a preset misspelt": ("cv --preset=smal", "got 'smal'. Use --preset=small."),
    "words for a number": ("cv --train.steps=many", "--train.steps INT"),
    "a batch of nothing": ("cv --train.batch-size=0", "Use --train.batch-size=2, the default."),
    "a fold that is not there": ("cv --folds 7", "among 0 to 4; got (7,). Name existing folds"),
    "a crop beyond the grid": ("cv --train.crop 12 96 96", "Use --train.crop 20 48 48 or less"),
    "a data set misspelt": (
        "cv --data.name=picia --data.path=cases",
        "nifti_folder reads your own files",
    ),
    "a data set without its path": ("cv --data.name=picai", "pass --data.path FOLDER."),
    "a path that is not there": ("cv --data.path=nowhere", "no folder at nowhere. Check --data."),
    "a folder without images": (
        "cv --data.path=empty",
        "which holds no image file. Known are a folder for each case with files named t2w",
    ),
    "files of one's own names": (
        "validate --data.path=scans",
        "told by --data.files t2w='*T2*' adc='*ADC*' hbv='*...*' label='*ROI*'.",
    ),
    "a modality that no case has": ("validate --data.path=cases", "--data.modalities"),
    "no labels": (f"cv --data.path=unlabelled {TWO}", "--data.target."),
    "a target that the data lack": (
        f"cv --data.path=cases {TWO} --data.target=gland",
        "--data.target.",
    ),
    "more folds than patients": (
        f"cv --data.path=cases {TWO} --num-folds=9 --data.preprocess.spacing-mm 3 1 1 "
        "--data.preprocess.size 6 16 16 --train.crop 4 16 16",
        "--num-folds=3",
    ),
    "a file that is no image": (
        f"validate --data.path=broken {TWO}",
        "Copy or convert the file again.",
    ),
    "a model that is not there": (
        "predict --model runs/mine --input cases --output out",
        "got nothing at runs/mine. Check --model.",
    ),
    "no model": ("predict --input cases --output out", "got none. Name a run or an artifact: --m"),
    "an input that is not there": (
        "predict --model run --folds 0 --input nothing --output out",
        "nothing. Check --input.",
    ),
    "an input without images": (
        "predict --model run --folds 0 --input empty --output out",
        "such as CASE/t2w.nii.gz",
    ),
    "masks and labels of other names": (
        "evaluate masks labels",
        "got c0 in masks and other in labels. Rename them",
    ),
    "a table of other columns": (
        "evaluate masks masks --patients patients.csv",
        "must have the columns case and patient; got study, who",
    ),
    "one run to compare": ("compare run", "at least two runs; got 1. Name another one."),
    "a run without results": ("compare run empty", "none in empty. Finish the run with python -m"),
    "a folder that is no run": (
        "export empty",
        "Name a folder written by python -m experiments.cv.",
    ),
    "a report of no run": ("report cases", "none in cases. Finish the run with python -m"),
}


def answer(line: str) -> tuple[int, str]:
    """Exit status of a command and what it says."""
    name, *arguments = line.split()
    said = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(cross_validation, "run_folds", goes_on)
        try:
            if name not in COMMANDS:
                run_command(name, arguments)
            module = importlib.import_module(COMMANDS[name][0])
            patch.setattr(sys, "argv", [module.__name__, *arguments])
            if module.__name__.startswith("data_pipelines"):
                command_line.run(
                    module.main, module.Arguments, module=module.__name__, description=""
                )
            run_main(module.main)
        except SystemExit as stopped:
            return int(stopped.code or 0), said.getvalue()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0, said.getvalue()


def goes_on(*_):
    raise AssertionError("the command begins to train")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_is_answered_in_one_screen(mistake, folder, monkeypatch, tmp_path):
    line, says = MISTAKES[mistake]
    monkeypatch.chdir(folder)
    if " --data.path" in line:
        line += f" --data.cache={tmp_path}"
    before = {*Path().rglob("*")}
    status, said = answer(line)
    assert status == 2, said
    assert says in " ".join(said.split())
    assert "Traceback" not in said
    lines = sum(1 + len(text) // (WIDTH + 1) for text in said.splitlines())
    assert lines <= LINES, said
    written = {path for path in {*Path().rglob("*")} - before if path.is_file()}
    assert not {path for path in written if path.parts[:1] != ("runs",)}
