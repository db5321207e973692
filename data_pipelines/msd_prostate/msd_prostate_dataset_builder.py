"""Task05 of the Medical Segmentation Decathlon. See README.md of this folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.building.case_builder import FileCaseBuilder
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.preparing.preprocessing import REFERENCE
from data_pipelines.reading.case_files import CaseFiles

CHANNELS = {"t2w": 0, "adc": 1}
"""Where each modality lies along the fourth axis of an image file."""


class Builder(FileCaseBuilder):
    """The labelled cases of Task05."""

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each file of ``imagesTr``."""
        return find_cases(self.root(), self.data_config)


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
    root = root / "Task05_Prostate" if (root / "Task05_Prostate").is_dir() else root
    files = sorted(p for p in root.glob("imagesTr/*.nii.gz") if not p.name.startswith("."))
    if not files:
        raise MissingDataError(
            f"Task05 has images at imagesTr/prostate_<number>.nii.gz; found none in {root}. Check "
            "--data.path."
        )
    wanted = {name: CHANNELS[name] for name in {REFERENCE, *config.modalities}}
    return [_case_files(file, root / "labelsTr" / file.name, wanted) for file in files]


def _case_files(file: Path, label: Path, channels: dict[str, int]) -> CaseFiles:
    case_id = file.name.removesuffix(".nii.gz")
    return CaseFiles(
        case_id=case_id,
        patient_id=case_id,
        images=dict.fromkeys(channels, file),
        label=label if os.path.lexists(label) else None,
        looked_for={**dict.fromkeys(channels, str(file)), "label": str(label)},
        channels=channels,
    )
