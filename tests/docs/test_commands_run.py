"""Documented commands run, one after another in one folder, as a reader would type them.

Here with a tiny network on few cases; under the marker ``slow`` as they stand, in processes of
their own, but for those that need a reader's data or an accelerator.
"""

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules import EncoderConfig, FusionConfig, NetworkConfig
from cmsad_jax.training import LossConfig
from data_pipelines.phantom.anatomy import case_id_of
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.phantom.phantom import make_case
from data_pipelines.reading import volume_io
from experiments import missing_modalities
from experiments.settings import presets
from experiments.settings.command_line import complete
from experiments.settings.presets import PRESETS
from experiments.studies import cross_validation
from experiments.training.programs import compile_programs
from tests.docs.test_documentation import ROOT, commands

STORY = [
    "python -m experiments.cv",
    "python -m experiments.voxel_baseline",
    "python -m experiments.export runs/small-phantom-lesion --output model.cmsad "
    "--license CC-BY-NC-4.0",
    "python -m experiments.predict --model runs/small-phantom-lesion --input patients "
    "--output predictions",
    "python -m experiments.predict --model model.cmsad --input patients "
    "--output predictions/fold_0 --folds 0 --uncertainty --attention",
    "python -m experiments.cv --output runs/dropout --train.modality-dropout=0.2",
    "python -m experiments.cv --output runs/no-dropout",
    "python -m experiments.missing_modalities runs/dropout runs/no-dropout",
]
"""Commands of README.md and docs/predict.md, in an order in which each finds what it needs."""

TINY = dataclasses.replace(
    PRESETS["small"],
    accelerator="cpu",
    compilation_cache=False,
    num_folds=2,
    network=NetworkConfig(
        encoder=EncoderConfig(
            channels=(2, 2), kernels=((3,) * 3,) * 2, strides=((1,) * 3, (2,) * 3), blocks=(1, 1)
        ),
        fusion=FusionConfig(kind="concat"),
        deep_supervision=0,
    ),
    loss=LossConfig(cross_modal_weight=0.0, self_weight=0.0, label_weight=0.0),
    data=dataclasses.replace(
        PRESETS["small"].data,
        phantom=PhantomOptions(num_cases=5),
        preprocess=dataclasses.replace(
            PRESETS["small"].data.preprocess, spacing_mm=(6.0, 6.0, 6.0), size=(8, 16, 16)
        ),
    ),
    train=dataclasses.replace(
        PRESETS["small"].train,
        steps=1,
        batch_size=1,
        crop=(8, 16, 16),
        validations=1,
        augmentation=AugmentationConfig(
            **{
                field.name: 0.0
                for field in dataclasses.fields(AugmentationConfig)
                if field.name.endswith("_probability")
            }
        ),
    ),
    predict=dataclasses.replace(PRESETS["small"].predict, flip=False, figures=1),
)


def write_patients(folder: Path) -> None:
    """One patient as files."""
    for name, volume in make_case(0).images.items():
        path = folder / case_id_of(0) / f"{name}.nii.gz"
        volume_io.write_nifti(path, volume.array.astype(np.float32), volume.affine)


def test_story_is_in_the_documentation():
    assert {*STORY} <= {command for _, command in commands()}


@pytest.mark.slow
def test_commands_run_with_a_tiny_network(tmp_path, monkeypatch, capsys):
    data = dataclasses.replace(TINY.data, cache=tmp_path / "cache")
    monkeypatch.setitem(presets.PRESETS, "small", dataclasses.replace(TINY, data=data))
    # To compile is most of the time: all runs here share one set of programs.
    programs = compile_programs(complete(TINY), jax.devices()[:1])
    for module in (cross_validation, missing_modalities):
        monkeypatch.setattr(module, "compile_programs", lambda config, devices: programs)
    monkeypatch.chdir(tmp_path)
    write_patients(tmp_path / "patients")
    for command in STORY:
        _, _, module, *arguments = shlex.split(command)
        if "runs/no-dropout" in arguments and module == "experiments.cv":
            # trained once: without dropout, the first run is this one
            Path("runs/no-dropout").symlink_to("small-phantom-lesion")
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
    printed = capsys.readouterr().out
    assert "gradient boosting of voxels on phantom, lesion:" in printed
    assert "| runs/dropout - runs/no-dropout | adc | lesion |" in printed
    t2w = nib.load(tmp_path / f"patients/{case_id_of(0)}/t2w.nii.gz")
    for folder in ("predictions/masks", "predictions/fold_0/entropy"):
        assert nib.load(tmp_path / folder / f"{case_id_of(0)}.nii.gz").shape == t2w.shape


LONG = {"cv", "ablation", "voxel_baseline"}
NOT_HERE = ("/data/", "=mine", "../shared", "accelerator=gpu", "CASE", "RUN", "--distributed")
"""What only the reader has."""


def whole() -> list[str]:
    """The story, then all other long commands that need nothing of the reader's."""
    others = {
        command
        for _, command in commands()
        if command.startswith("python -m experiments.")
        and command.split()[2].removeprefix("experiments.") in LONG
        and not any(part in command for part in NOT_HERE)
    }
    return [*STORY, *sorted(others - {*STORY})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_patients(folder / "patients")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", whole())
def test_command_runs_whole(command, folder):
    subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
