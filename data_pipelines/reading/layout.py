"""Which data set a folder is, by the names of what lies in it; no file is opened."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipelines.config import AUTO, DataConfig, origin_of
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.files import expanded
from data_pipelines.modalities import ALIASES, modality_of
from data_pipelines.reading import file_patterns
from data_pipelines.reading.volume_io import name_without_ending

DEFAULT = "phantom"
"""The data set where no files are named."""

OWN = "nifti_folder"
"""The data set of a user's own files."""


@functools.cache
def say_once(text: str) -> None:
    """Print a line, the first time in the process; a configuration may be read several times."""
    print(text, flush=True)


def resolved(config: DataConfig, say: Callable[[str], None] | None = None) -> DataConfig:
    """The configuration with its data set named, by the files at its path; ``say`` tells which.

    Raises:
        DataError: a path or patterns that nothing reads, or files in no known layout.
    """
    if origin_of(config.name).synthetic and config.path is not None:
        raise DataError(
            f"a data set that is drawn reads no folder; got --data.name={config.name} and "
            f"--data.path={config.path}. Leave out --data.name, which then goes by the files "
            "there, or leave out --data.path."
        )
    if config.files and config.name not in (AUTO, OWN):
        raise DataError(
            f"patterns of file names go with your own files; got --data.files and "
            f"--data.name={config.name}. Leave out one of them."
        )
    if config.name != AUTO:
        return config
    if config.path is None:
        if config.files:
            raise DataError(
                f"patterns of file names need the folder of the files; got {config.files[0]!r} "
                "and no path. Add --data.path=FOLDER."
            )
        return dataclasses.replace(config, name=DEFAULT)
    root = expanded(config.path, "--data.path")
    if not root.is_dir():
        raise MissingDataError(f"no folder at {config.path}. Check --data.path.")
    try:
        name, why = OWN, "its files by name"
        if not file_patterns.read(root, config.files):
            name, why = detect(root, config)
    except OSError as error:
        raise DataError(
            f"files and folders of the data set must be readable; got: {error.strerror or error}, "
            f"for {error.filename}. Check the storage and the permissions of --data.path."
        ) from error
    if say is not None:
        say(f"data set {name}: {why}, in {config.path}")
    return dataclasses.replace(config, name=name)


def detect(root: Path, config: DataConfig) -> tuple[str, str]:
    """Name of the data set whose layout a folder has, and by what it is known.

    Raises:
        DataError: none that is known; the message says what lies there and what to type.
    """
    for kind in (_picai, _nnunet_or_decathlon, _prostate158, _folder_of_each_case):
        if (found := kind(root)) is not None:
            return found
    suggested = file_patterns.suggestion(
        file_patterns.example(root), config.modalities, flat=file_patterns.is_flat(root)
    )
    names = " or ".join(f"{name} ({', '.join(ALIASES[name][:2])})" for name in ALIASES)
    raise DataError(
        f"files must be laid out in a known way; got {root}, which holds "
        f"{file_patterns.holds(root)}. Known are a folder for each case with files named {names}, "
        "nnU-Net's imagesTr, and PI-CAI, Prostate158 and the Decathlon as published. "
        f"{suggested}."
    )


def _picai(root: Path) -> tuple[str, str] | None:
    for folder in (root / "images", *sorted(root.glob("public_images_fold*"))):
        if any(folder.glob("*/*_*_t2w.mha")) or any(folder.glob("*/*_*_adc.mha")):
            return "picai", f"PI-CAI's {folder.name}/<patient>/<patient>_<study>_<modality>.mha"
    return None


def _nnunet_or_decathlon(root: Path) -> tuple[str, str] | None:
    if (root / "Task05_Prostate" / "imagesTr").is_dir():
        return "msd_prostate", "the Decathlon's Task05_Prostate"
    if not (root / "imagesTr").is_dir():
        return None
    stems = [name_without_ending(path.name) for path in (root / "imagesTr").iterdir()]
    numbered = [bool(re.search(r"_\d{4}$", stem)) for stem in stems if stem]
    if numbered and not any(numbered):
        return "msd_prostate", "the Decathlon's imagesTr, the modalities along a fourth axis"
    return OWN, "nnU-Net's imagesTr"


def _prostate158(root: Path) -> tuple[str, str] | None:
    for depth in ("*", "*/*", "*/*/*"):
        for folder in root.glob(depth):
            if not re.fullmatch(r"\d{3}", folder.name):
                continue
            if any(folder.glob("*_reader[12].nii.gz")) or (folder / "empty.nii.gz").exists():
                return "prostate158", f"Prostate158's {folder.relative_to(root)}"
    return None


def _folder_of_each_case(root: Path) -> tuple[str, str] | None:
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for name, path in _named(folder):
            if modality_of(name, tuple(ALIASES)) is not None:
                return OWN, f"a folder for each case, such as {folder.name}/{path.name}"
    return None


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    """Volumes of a case, and folders that may hold a series, by their names."""
    if folder.name.startswith("."):
        return
    for path in sorted(folder.iterdir()):
        name = path.name if path.is_dir() else name_without_ending(path.name)
        if name and not name.startswith("."):
            yield name, path
