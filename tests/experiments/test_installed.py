"""The command ``cmsad``, and commands where the system is not POSIX or the extra is absent."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from experiments.__main__ import COMMANDS, main
from tests.data_pipelines.fabricate import raw_case, write_folder
from tests.experiments.untrained_run import make_untrained_run, tiny_config
from tests.test_architecture import COMMANDS as PROGRAMS

WINDOWS = """
import os, runpy, select, signal, sys, warnings
warnings.simplefilter("ignore")
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "uvloop", "array_record")
FUNCTIONS = "fork forkpty setsid killpg getuid geteuid sched_getaffinity sysconf umask".split()
SIGNALS = ("SIGHUP", "SIGKILL", "SIGPIPE", "SIGALRM", "SIGUSR1", "SIGQUIT")
for name in POSIX:
    sys.modules[name] = None  # cannot be imported, and is not found
for module, names in ((os, FUNCTIONS), (signal, SIGNALS), (select, ["poll"])):
    for name in names:
        delattr(module, name) if hasattr(module, name) else None
for line in sys.argv[1:]:
    module, *sys.argv[1:] = line.split("|")
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        print(module, "ended with", stopped.code or 0)
    else:
        print(module, "ended with 0")
"""
"""Runs commands, each given as module|argument|..., as Windows would: without what POSIX has."""


def test_every_command_is_there_under_its_name():
    modules = {module for module, _ in COMMANDS.values()}
    assert modules == {*PROGRAMS} - {"experiments.__main__", "experiments.missing"}  # an older name
    assert all(module.endswith(f".{name}") for name, (module, _) in COMMANDS.items())


def test_page_of_the_commands_lists_every_name():
    page = Path("docs/commands.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"`cmsad {name}`" not in page] == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_overview_lists_every_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cmsad", *arguments])
    main()
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


def test_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cmsad", "--version"])
    main()
    assert capsys.readouterr().out == "0.1.0\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("predit", "predict"), ("missing-modality", "missing_modalities")]
)
def test_mistyped_command_is_told_with_the_nearest(typed, meant, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cmsad", typed])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "the command must be one of cv, predict" in said
    assert said.endswith(f"Use cmsad {meant}.\n")


def test_command_runs_by_its_name_with_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cmsad", "report", "--help"])
    main()
    assert "usage: " in capsys.readouterr().out


def test_missing_extra_is_named_with_the_line_to_type():
    """``tyro`` stands for the extra's packages; a missing module of ours is a bug and stays one."""
    hidden = (
        "import sys; sys.modules['tyro'] = None; sys.argv = ['cmsad', 'cv']; "
        "from experiments.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1), "the first line"
    assert done.stderr == (
        "error: cmsad cv needs the packages of the extra experiments; got no package tyro. "
        'Use pip install "cmsad-jax[experiments]".\n'
    )


def test_jobs_are_functions_that_return_what_the_files_hold(tmp_path, monkeypatch):
    from experiments import EvaluateConfig, evaluate
    from experiments.measuring.summary import Summary

    case = raw_case("a")
    for folder in ("predictions", "labels"):
        write_folder(tmp_path / "in" / folder, case)
        path = tmp_path / "in" / folder / "a/lesion.nii.gz"
        (tmp_path / folder).mkdir()
        path.rename(tmp_path / folder / "a.nii.gz")
    config = EvaluateConfig(tmp_path / "predictions", tmp_path / "labels", output=tmp_path / "out")
    figures = evaluate(config)
    assert isinstance(figures, Summary)
    assert figures.mean["lesion"]["dice"] == 1.0
    assert (tmp_path / "out/metrics.json").is_file()


def test_names_of_the_jobs_are_resolved_when_they_are_used():
    code = """
import sys, experiments
assert "jax" not in sys.modules
from experiments import Config, PredictCommand, cross_validate, predict
assert Config().train.steps == 250
assert predict.PredictCommand is PredictCommand and callable(predict)
assert cross_validate.__module__ == "experiments.studies.cross_validation"
assert {"cross_validate", "predict", "evaluate"} <= {*dir(experiments)}
try:
    experiments.predic
except AttributeError as error:
    assert str(error) == "module 'experiments' has no attribute 'predic'"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def on_windows(tmp_path_factory) -> tuple[Path, str]:
    """Validate, export, predict, evaluate and cv, one after another, and what they said."""
    root = tmp_path_factory.mktemp("windows")
    make_untrained_run(root / "run", tiny_config())
    case = raw_case("a")
    write_folder(root / "data", case)
    (root / "labels").mkdir()
    label = nib.load(root / "data/a/lesion.nii.gz")
    nib.save(label, root / "labels/a.nii.gz")
    data = ["--data.name=nifti_folder", "--data.path=data", "--data.modalities", "t2w", "adc"]
    data.append("--data.cache=cache")
    lines = [
        ["data_pipelines.validate", *data, "--output=sheet"],
        ["experiments.export", "run", "--output=model.cmsad"],
        ["experiments.predict", "--model=model.cmsad", "--input=data", "--output=out"],
        ["experiments.evaluate", "out/masks", "labels", "--output=measured"],
        ["experiments.cv", *data, "--output=trained"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS, *("|".join(line) for line in lines)],
        capture_output=True,
        encoding="utf-8",
        cwd=root,
        env={"PYTHONPATH": str(Path.cwd()), "JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return root, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "made"),
    [
        ("data_pipelines.validate", "sheet"),
        ("experiments.export", "model.cmsad"),
        ("experiments.predict", "out/masks/a.nii.gz"),
        ("experiments.evaluate", "measured/metrics.json"),
    ],
)
def test_command_runs_without_what_posix_has(on_windows, module, made):
    root, said = on_windows
    assert f"{module} ended with 0" in said
    assert (root / made).exists()


def test_what_needs_array_record_says_so_at_once(on_windows):
    root, said = on_windows
    assert "experiments.cv ended with 2" in said
    assert "got a Python without it, which is how it is on Windows. Use Linux, macOS or WSL" in said
    assert not [*(root / "cache").rglob("cases.json")], "nothing was built"
