"""``--help`` of commands with many options: those that most people use; ``--help-all`` has all.

It is text, so that it is there before configurations are loaded; a test holds it to the options and
defaults that there are.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.process import put

ALL = "--help-all"
HELP = ("--help", "-h")

Options = Sequence[tuple[str, str, str]]
"""Of each option what is typed, what it means, and its default in words."""

CROSS_VALIDATION = (
    "Cross-validation of CMSAD over patients, from files to a report. "
    "Sizes are in the order d h w: slices, rows, columns."
)
"""What ``--help`` of ``cv`` says first."""

OF_DATA: Options = (
    ("--data.path FOLDER", "your files; whose layout it is shows by itself", "the phantom"),
    (
        "--data.files NAME=PATTERN ...",
        "other names, as t2w='*T2*' adc='*ADC*' lesion='*ROI*'",
        "",
    ),
    ("--data.modalities NAME ...", "contrasts to use", "t2w adc hbv"),
    ("--data.target NAME", "what is segmented: lesion, gland or zones", "lesion"),
    ("--data.allow-missing True", "accept cases that lack a modality", "False"),
    ("--data.preprocess.spacing-mm D H W", "voxels of the grid that the network sees", "3 2 2"),
    ("--data.preprocess.size D H W", "how many of them", "20 48 48"),
)

OF_READING: Options = (
    *OF_DATA,
    ("--data.name NAME", "picai, prostate158, msd_prostate, nifti_folder, phantom2 ...", "auto"),
    ("--data.cache FOLDER", "where built data sets are kept", "~/.cache/cmsad_jax"),
    ("--num-workers N", "processes that read the cases", "one, or one for each CPU"),
)
"""Of ``validate`` and ``build``."""

OF_TRAINING: Options = (
    *OF_DATA,
    (
        "--preset NAME",
        "small, light, volume3d, slice2d; auto plans by data and device",
        "small; for files auto",
    ),
    ("--accelerator NAME", "auto, cpu, gpu or tpu", "auto"),
    ("--output FOLDER", "the run folder; the same command continues it", "below runs"),
    ("--num-folds N", "folds over patients", "5"),
    ("--folds N ...", "those to run now; all: one network of all cases", "each"),
    ("--train.steps N", "updates for each fold", "250"),
    ("--train.batch-size N", "examples for each update", "2"),
    ("--train.crop D H W", "voxels of a training crop and of the sliding window", "12 48 48"),
    ("--seed N", "of folds, weights, sampling and augmentation", "0"),
)
"""Of ``cv``, with the preset ``small``."""


def program(module: str) -> str:
    """What a user types to start a command: ``cmsad cv``, or ``python -m experiments.cv``."""
    if any(Path(word).stem == "cmsad" for word in sys.orig_argv[1:2]):
        return f"cmsad {module.rpartition('.')[2]}"
    return f"python -m {module}"


def show(module: str, purpose: str, options: Options) -> bool:
    """Print the short help if the command line asks for help; whether it did."""
    if not any(word in HELP for word in sys.argv[1:]):
        return False
    lines = [f"usage: {program(module)} [OPTIONS]", "", purpose, ""]
    width = max(len(option) for option, _, _ in options)
    for option, meaning, default in options:
        told = f" ({default})" if default else ""
        lines.append(f"  {option:{width}}  {meaning}{told}")
    put("\n".join([*lines, "", f"  {ALL:{width}}  every option, with its default"]))
    return True


def full(arguments: Sequence[str]) -> list[str]:
    """The arguments as tyro understands them: its ``--help`` shows all options."""
    return ["--help" if word == ALL else word for word in arguments]
