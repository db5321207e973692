"""Prostate158 as its authors publish it. See README.md of this folder."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.building.case_builder import FileCaseBuilder
from data_pipelines.config import DataConfig
from data_pipelines.faults import MissingDataError
from data_pipelines.preparing.preprocessing import REFERENCE
from data_pipelines.reading.case_files import CaseFiles, unused_files
from data_pipelines.reading.volume_io import name_without_ending

FILES = {"t2w": "t2", "adc": "adc", "hbv": "dwi"}
"""Name of each modality's file."""

EMPTY = "empty"
"""Stands in the folder of a case without tumour."""

ZONES_IN_FILE = {1: 2, 2: 1}
"""The files number the central gland 1 and the peripheral zone 2; here it is the reverse."""

_KNOWN = re.compile(r"t2|adc|dwi|empty|t2_anatomy_reader\d|(t2|adc)_tumor_reader\d|\..*")
_DEPTHS = ("*", "*/*", "*/*/*")


class Builder(FileCaseBuilder):
    """The published training set, or the test set, or both in one folder."""

    own_classes = False
    hashed_options = ("reader",)

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each folder whose name is a three-digit number."""
        return find_cases(self.root(), self.data_config)


def find_cases(root: Path, config: DataConfig) -> list[CaseFiles]:
    """List the cases under ``root``, at most three folders deep.

    Raises:
        MissingDataError: no case.
    """
    folders = [
        folder
        for depth in _DEPTHS
        for folder in root.glob(depth)
        if folder.is_dir() and re.fullmatch(r"\d{3}", folder.name)
    ]
    if not folders:
        raise MissingDataError(
            f"Prostate158 has a folder for each case, such as train/020; found none in {root}. "
            "Check --data.path."
        )
    return [_case_files(folder, config) for folder in sorted(folders, key=lambda f: f.name)]


def _case_files(folder: Path, config: DataConfig) -> CaseFiles:
    wanted = {REFERENCE, *config.modalities}
    images = {
        name: folder / f"{stem}.nii.gz"
        for name, stem in FILES.items()
        if name in wanted and os.path.lexists(folder / f"{stem}.nii.gz")
    }
    reader = f"reader{config.prostate158.reader}"
    anatomy = f"t2_anatomy_{reader}"
    if config.target == "lesion":
        stems = (
            f"t2_tumor_reader{config.prostate158.reader}",
            f"adc_tumor_reader{config.prostate158.reader}",
            EMPTY,
        )
    else:
        stems = (anatomy,)
    source = next((stem for stem in stems if os.path.lexists(folder / f"{stem}.nii.gz")), None)
    gland = folder / f"{anatomy}.nii.gz"
    looked_for = {name: f"{FILES.get(name, name)}.nii.gz in {folder}" for name in wanted}
    looked_for["label"] = f"{', '.join(f'{stem}.nii.gz' for stem in stems)} in {folder}"
    looked_for["gland"] = str(gland)
    return CaseFiles(
        case_id=folder.name,
        patient_id=folder.name,
        images=images,
        label=folder / f"{source}.nii.gz" if source else None,
        looked_for=looked_for,
        metadata={"part": folder.parent.name, **({"label_source": source} if source else {})},
        problems=tuple(
            unused_files(
                folder.name,
                [
                    path
                    for path in folder.iterdir()
                    if (stem := name_without_ending(path.name)) and not _KNOWN.fullmatch(stem)
                ],
                "the files of the data set",
            )
        ),
        gland=gland if config.preprocess.centre == "gland" and os.path.lexists(gland) else None,
        label_classes=ZONES_IN_FILE if config.target == "zones" else {},
    )
