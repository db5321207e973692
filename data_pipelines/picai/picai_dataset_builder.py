"""PI-CAI in the layout of the challenge. See README.md of this folder."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.case import DataConfig, MissingDataError
from data_pipelines.case_builder import FileCaseBuilder
from data_pipelines.preprocessing import REFERENCE
from data_pipelines.validation import CaseFiles

LABEL_FOLDERS: dict[str, tuple[str, ...]] = {
    "lesion": (
        "csPCa_lesion_delineations/human_expert/resampled",
        "csPCa_lesion_delineations/human_expert/original",
        "csPCa_lesion_delineations/human_expert/Pooch25",
        "csPCa_lesion_delineations/AI/Bosma22a",
    ),
    "gland": ("anatomical_delineations/whole_gland/AI/Bosma22b",),
    "zones": ("anatomical_delineations/zonal_pz_tz/AI/Yuan23",),
}
"""Where the label of each target is looked for; the first folder that has the case wins."""

_MARKSHEET = "clinical_information/marksheet.csv"


class Builder(FileCaseBuilder):
    """The public training and development set of PI-CAI, or any part of it."""

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each study of which any wanted modality is there."""
        return find_cases(self.root(), self.data_config)


def find_cases(root: Path, config: DataConfig) -> list[CaseFiles]:
    """List the studies under ``root``.

    Raises:
        MissingDataError: no image folder, no label folder, or no study.
    """
    image_folders = [root / "images", *sorted(root.glob("public_images_fold*"))]
    image_folders = [folder for folder in image_folders if folder.is_dir()]
    if not image_folders:
        raise MissingDataError(
            f"PI-CAI needs the folder 'images' (or public_images_fold0 to 4); found neither in "
            f"{root}. Check --data.path."
        )
    labels = next((root / n for n in ("labels", "picai_labels") if (root / n).is_dir()), None)
    if labels is None:
        raise MissingDataError(
            f"PI-CAI needs the folder 'labels' (or picai_labels); found neither in {root}. "
            "Clone https://github.com/DIAGNijmegen/picai_labels there."
        )
    wanted = {REFERENCE, *config.modalities}
    studies: dict[str, dict[str, Path]] = {}
    for folder in image_folders:
        for path in sorted(folder.glob("*/*.mha")):
            case_id, _, modality = path.stem.rpartition("_")
            if modality in wanted:
                studies.setdefault(case_id, {})[modality] = path
    if not studies:
        raise MissingDataError(
            f"PI-CAI images lie at <patient>/<patient>_<study>_<modality>.mha; found none for "
            f"{', '.join(config.modalities)} in {image_folders[0]}. Check --data.path."
        )
    facts = _read_marksheet(labels / _MARKSHEET)
    return [
        _case_files(case_id, studies[case_id], labels, config, facts.get(case_id, {}))
        for case_id in sorted(studies)
    ]


def _case_files(
    case_id: str,
    images: Mapping[str, Path],
    labels: Path,
    config: DataConfig,
    facts: Mapping[str, str],
) -> CaseFiles:
    folders = LABEL_FOLDERS[config.target]
    name = f"{case_id}.nii.gz"
    source = next((folder for folder in folders if (labels / folder / name).is_file()), None)
    looked_for = {
        modality: f"{case_id}_{modality}.mha in {next(iter(images.values())).parent}"
        for modality in config.modalities
    }
    looked_for["label"] = f"{name} in {labels}, folders {', '.join(folders)}"
    return CaseFiles(
        case_id=case_id,
        patient_id=case_id.partition("_")[0],
        images=images,
        label=labels / source / name if source else None,
        looked_for=looked_for,
        metadata={**facts, **({"label_source": source} if source else {})},
    )


def _read_marksheet(path: Path) -> dict[str, dict[str, str]]:
    """Centre and ISUP grade of each study, where the challenge's table is there."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {
            f"{row['patient_id']}_{row['study_id']}": {
                "center": row["center"],
                "case_ISUP": row["case_ISUP"],
            }
            for row in csv.DictReader(file)
        }
