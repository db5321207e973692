"""Task05 of the Medical Segmentation Decathlon. See README.md of this folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.building.case_builder import FileCaseBuilder
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, Problem
from data_pipelines.preparing.preprocessing import REFERENCE
from data_pipelines.reading import dataset_json
from data_pipelines.reading.case_files import CaseFiles
from data_pipelines.reading.label_names import check_label_names
from data_pipelines.reading.volume_io import name_without_ending

CHANNELS = {"t2w": 0, "adc": 1}
"""Where each modality lies along the fourth axis of an image file, unless dataset.json says it."""


class Builder(FileCaseBuilder):
    """The labelled cases of Task05."""

    own_classes = False

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each file of ``imagesTr``."""
        return find_cases(self.root(), self.data_config)

    def check_list(self) -> list[Problem]:
        """Also images that the list of ``dataset.json`` leaves out."""
        used = {path.name for entry in self.entries for path in entry.images.values()}
        return [
            *super().check_list(),
            *(
                Problem(
                    name_without_ending(path.name) or "",
                    path,
                    f'a case in imagesTr should be in the list "training" of dataset.json; got '
                    f"{path.name}, which is not, so that it is left out. Add it to the list, or "
                    "remove its files.",
                    "warning",
                )
                for path in _image_files(_task_folder(self.root()))
                if path.name not in used
            ),
        ]


def find_cases(root: Path, config: DataConfig) -> list[CaseFiles]:
    """List the cases under ``root``, the folder Task05_Prostate or the one that holds it.

    Raises:
        DataError: a target or a modality that the data set does not have.
        MissingDataError: no case.
    """
    if config.target == "lesion":
        raise DataError(
            "Task05 has labels of the gland's zones only; got the target 'lesion'. Use "
            "--data.target=zones or --data.target=gland."
        )
    absent = [name for name in config.modalities if name not in CHANNELS]
    if absent:
        raise DataError(
            f"Task05 has the modalities {', '.join(CHANNELS)}; got {', '.join(absent)} as well. "
            f"Use --data.modalities {' '.join(CHANNELS)}."
        )
    root = _task_folder(root)
    channels, listed = CHANNELS, None
    if os.path.lexists(file := root / dataset_json.NAME):
        description = dataset_json.read(file)
        if (names := dataset_json.labels(description)) is not None:
            check_label_names(names, config, str(file))
        numbers = dataset_json.channels(description, tuple(CHANNELS), file)
        channels = {name: number for number, name in numbers.items()}
        if lacking := [name for name in CHANNELS if name not in channels]:
            raise DataError(
                f"{file} must name the channels T2 and ADC; got none for {' and '.join(lacking)}. "
                "Correct the file, or remove it."
            )
        listed = dataset_json.training(description, root, file)
    files = _image_files(root)
    if not files and not listed:
        raise MissingDataError(
            f"Task05 has images at imagesTr/prostate_<number>.nii.gz; found none in {root}. Check "
            "--data.path."
        )
    wanted = {name: channels[name] for name in (REFERENCE, *config.modalities)}
    if listed is not None:
        return [_case_files(case.image, case.label, wanted) for case in listed]
    return [_case_files(file, root / "labelsTr" / file.name, wanted) for file in files]


def _task_folder(root: Path) -> Path:
    return root / "Task05_Prostate" if (root / "Task05_Prostate").is_dir() else root


def _image_files(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("imagesTr/*.nii.gz") if not p.name.startswith("."))


def _case_files(file: Path, label: Path, channels: dict[str, int]) -> CaseFiles:
    case_id = name_without_ending(file.name) or file.name
    return CaseFiles(
        case_id=case_id,
        patient_id=case_id,
        images=dict.fromkeys(channels, file),
        label=label if os.path.lexists(label) else None,
        looked_for={**dict.fromkeys(channels, str(file)), "label": str(label)},
        channels=channels,
    )
