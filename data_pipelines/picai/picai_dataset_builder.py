"""PI-CAI in the layout of the challenge. See README.md of this folder."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipelines.building.case_builder import FileCaseBuilder
from data_pipelines.case import RawCase, Volume
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, Problem
from data_pipelines.preparing.examination import frames_apart
from data_pipelines.preparing.geometry import resample
from data_pipelines.preparing.preprocessing import REFERENCE
from data_pipelines.reading.case_files import CaseFiles
from data_pipelines.reading.tables import read_table
from data_pipelines.reading.volume_io import read_volume

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

GLAND_FOLDER = LABEL_FOLDERS["gland"][0]
ZONES_FOLDER = LABEL_FOLDERS["zones"][0]
ORIGINAL = "csPCa_lesion_delineations/human_expert/original"
"""The one label folder whose files lie on grids of their own; all others are on the T2W grid."""

MARKSHEET_COLUMNS = (
    "center",
    "mri_date",
    "patient_age",
    "psa",
    "psad",
    "prostate_volume",
    "histopath_type",
    "lesion_PIRADS",
    "lesion_GS",
    "lesion_ISUP",
    "case_ISUP",
    "case_csPCa",
)
"""What is kept of the challenge's table, where it has the column."""

_MARKSHEET = "clinical_information/marksheet.csv"
_SAME_SPACING = 1e-2
_APART_MM = 1.0
_APART_DEGREES = 0.5
_MIN_AGREEMENT = 0.5


class Builder(FileCaseBuilder):
    """The public training and development set of PI-CAI, or any part of it."""

    own_classes = False

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each study of which any wanted modality is there."""
        return find_cases(self.root(), self.data_config)

    def read_available(self, entry: CaseFiles) -> tuple[RawCase | None, list[DataError]]:
        """As for all files; a label of T2W's size with another header is put on the T2W grid."""
        raw, faults = super().read_available(entry)
        if raw is None or raw.label is None or REFERENCE not in raw.images:
            return raw, faults
        if entry.metadata.get("label_source") == ORIGINAL:
            return raw, faults
        label = on_t2w_grid(raw.label, raw.images[REFERENCE])
        if label is raw.label:
            return raw, faults
        metadata = {**raw.metadata, "label_header": "replaced by that of T2W"}
        return dataclasses.replace(raw, label=label, metadata=metadata), faults

    def suspicions(self, entry: CaseFiles, raw: RawCase) -> list[Problem]:
        """What the marksheet and the other label sets say against the label."""
        problems = []
        if "label_header" in raw.metadata:
            problems.append(
                Problem(
                    entry.case_id,
                    entry.label,
                    "a label of the size of the T2W image must lie on its grid; got a header that "
                    "places it elsewhere, which was replaced by that of T2W. Check the outline on "
                    "the contact sheet.",
                    "warning",
                )
            )
        if raw.label is not None and self.data_config.target == "lesion":
            problems += _marksheet_suspicions(entry, bool((raw.label.array > 0).any()))
        if raw.label is not None and self.data_config.target == "gland":
            problems += _gland_suspicions(entry, raw.label)
        return problems


def on_t2w_grid(label: Volume, t2w: Volume) -> Volume:
    """The label with the header of the T2W image, if of its grid but lying elsewhere.

    Of its grid: of equal size and spacing, with the axes in the same order and directions. A label
    that is stored in another orientation is left where its own header places it, since only that
    header says which of its voxels is which of T2W's.
    """
    same = label.shape == t2w.shape and np.allclose(
        label.spacing_mm, t2w.spacing_mm, rtol=_SAME_SPACING
    )
    if not same or nib.aff2axcodes(label.affine) != nib.aff2axcodes(t2w.affine):
        return label
    apart_mm, degrees = frames_apart(label, t2w)
    if apart_mm <= _APART_MM and degrees <= _APART_DEGREES:
        return label
    return Volume(label.array, t2w.affine)


def _marksheet_suspicions(entry: CaseFiles, positive: bool) -> list[Problem]:
    """An empty label of a case that the marksheet calls positive, or the reverse."""
    recorded = entry.metadata.get("case_csPCa", "").upper()
    by_ai = "/AI/" in entry.metadata.get("label_source", "")
    if recorded == "YES" and not positive:
        return [
            Problem(
                entry.case_id,
                entry.label,
                "a case with significant cancer in the marksheet must have a lesion in its label; "
                f"got an empty {'label by an AI, which proves nothing' if by_ai else 'label'}. "
                "Add a human label, or remove the case.",
                "error" if by_ai else "warning",
            )
        ]
    if recorded == "NO" and positive:
        return [
            Problem(
                entry.case_id,
                entry.label,
                "a case without significant cancer in the marksheet should have an empty label; "
                "got a lesion. Check the outline on the contact sheet.",
                "warning",
            )
        ]
    return []


def _gland_suspicions(entry: CaseFiles, gland: Volume) -> list[Problem]:
    """A gland mask that disagrees with the zones of another AI: one is on a wrong structure."""
    assert entry.label is not None
    file = entry.label.parents[len(Path(GLAND_FOLDER).parts)] / ZONES_FOLDER / entry.label.name
    if not file.is_file():
        return []
    try:
        zones = read_volume(file)
    except DataError:
        return []
    other, _ = resample(zones, gland.shape, gland.affine, order=0)
    overlap = ((gland.array > 0) & (other > 0)).sum()
    dice = 2 * overlap / max((gland.array > 0).sum() + (other > 0).sum(), 1)
    if dice >= _MIN_AGREEMENT:
        return []
    return [
        Problem(
            entry.case_id,
            entry.label,
            "the gland must be where another AI sees its zones; got a Dice of "
            f"{dice:.2f} between {GLAND_FOLDER} and {ZONES_FOLDER}, so one of them is on a wrong "
            "structure. Look at the contact sheet, and remove the case if it is this one.",
            "warning",
        )
    ]


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
    folds: dict[str, str] = {}
    for folder in image_folders:
        for path in sorted(folder.glob("*/*.mha")):
            case_id, _, modality = path.stem.rpartition("_")
            if modality in wanted and not path.name.startswith("."):
                studies.setdefault(case_id, {})[modality] = path
                if match := re.fullmatch(r"public_images_fold(\d)", folder.name):
                    folds[case_id] = match[1]
    if not studies:
        raise MissingDataError(
            f"PI-CAI images lie at <patient>/<patient>_<study>_<modality>.mha; found none for "
            f"{', '.join(config.modalities)} in {image_folders[0]}. Check --data.path."
        )
    facts = _read_marksheet(labels / _MARKSHEET)
    for case_id, fold in folds.items():
        facts.setdefault(case_id, {})["published_fold"] = fold
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
    source = next((folder for folder in folders if os.path.lexists(labels / folder / name)), None)
    looked_for = {
        modality: f"{case_id}_{modality}.mha in {next(iter(images.values())).parent}"
        for modality in config.modalities
    }
    looked_for["label"] = f"{name} in {labels}, folders {', '.join(folders)}"
    looked_for["gland"] = f"{name} in {labels / GLAND_FOLDER}"
    gland = labels / GLAND_FOLDER / name
    around_gland = config.preprocess.centre == "gland" and os.path.lexists(gland)
    return CaseFiles(
        case_id=case_id,
        patient_id=case_id.partition("_")[0],
        images=images,
        label=labels / source / name if source else None,
        looked_for=looked_for,
        metadata={**facts, **({"label_source": source} if source else {})},
        gland=gland if around_gland else None,
    )


def _read_marksheet(path: Path) -> dict[str, dict[str, str]]:
    """What the challenge's table says of each study, where it is there."""
    if not os.path.lexists(path):
        return {}
    rows = read_table(path, ("patient_id", "study_id"), remedy="Fetch picai_labels again.")
    return {
        f"{row['patient_id']}_{row['study_id']}": {
            name: row[name] for name in MARKSHEET_COLUMNS if row.get(name)
        }
        for row in rows
    }
