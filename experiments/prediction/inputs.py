"""Cases to predict: found by the names of their files, read and preprocessed as for training."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.case import Case, RawCase
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, Problem
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import GLAND, modality_of
from data_pipelines.preparing import preprocessing
from data_pipelines.reading import volume_io
from data_pipelines.reading.case_files import CaseFiles


def find_inputs(
    root: Path, modalities: Sequence[str], *, with_gland: bool = False
) -> list[CaseFiles]:
    """The cases under ``root``, by the names of their files; labels and others are passed over.

    A file ``<modality>.<ending>`` belongs to the case that its folder is named for, a file
    ``<case>_<modality>.<ending>`` to ``<case>``, and in nnU-Net's raw layout ``<case>_<4 digits>``
    is the channel of that number in ``dataset.json``. Any other NIfTI file beside ``dataset.json``,
    or in a folder ``images*`` under it, is a case with its channels along a fourth axis (the
    layout of the Medical Segmentation Decathlon). A folder with one DICOM series is named like a
    file. Modalities go by the names that the data pipeline accepts.

    Args:
        root: folder of one case or of many.
        modalities: of the model.
        with_gland: whether the gland's mask is looked for too, for a crop around it.

    Raises:
        DataError: no folder, or no case in it.
    """
    if not root.is_dir():
        raise MissingDataError(f"the input must be a folder; got {root}. Check --input.")
    names: list[str] = [preprocessing.REFERENCE, *modalities, *([GLAND] if with_gland else [])]
    wanted = tuple(dict.fromkeys(names))
    found: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    channels: dict[Path, Mapping[int, str]] = {}
    four_axes: dict[tuple[Path, str], Mapping[str, int]] = {}
    for path in sorted(root.rglob("*")):
        stem = _volume_name(path)
        if stem is None:
            continue
        folder = path.parent
        if folder not in channels:
            channels[folder] = _channels(folder, wanted)
        case_id, modality = _case_and_modality(stem, folder, wanted, channels[folder])
        if modality is not None:
            found.setdefault((folder, case_id), {}).setdefault(modality, []).append(path)
        elif not case_id and _holds_channels(path):
            four_axes[folder, stem] = {name: n for n, name in channels[folder].items()}
            for name in four_axes[folder, stem]:
                found.setdefault((folder, stem), {}).setdefault(name, []).append(path)
    # A T2W alone says where the others would lie, not that this is a case of the model.
    cases = [
        _case_files(case_id, folder, files, wanted, four_axes.get((folder, case_id), {}))
        for (folder, case_id), files in found.items()
        if files.keys() & {*modalities}
    ]
    if not cases:
        raise MissingDataError(
            f"the input must hold files named by modality ({', '.join(modalities)}), such as "
            f"CASE/{modalities[0]}.nii.gz or CASE_{modalities[0]}.mha; found none in {root}. "
            f"Rename the files; endings are {', '.join(volume_io.SUFFIXES)}."
        )
    return sorted(cases, key=lambda case: case.case_id)


def _volume_name(path: Path) -> str | None:
    """Name of a volume without its ending, or of a folder that may hold a DICOM series."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        inside = list(path.iterdir())
        plain = inside and all(p.is_file() and _volume_name(p) is None for p in inside)
        return path.name if plain else None
    ending = next((s for s in volume_io.SUFFIXES if path.name.lower().endswith(s)), None)
    return path.name[: -len(ending)] if ending else None


def _case_and_modality(
    stem: str, folder: Path, wanted: Sequence[str], channels: Mapping[int, str]
) -> tuple[str, str | None]:
    """Case and modality that a file name means; no modality for a channel that is not wanted.

    Neither for other files.
    """
    modality = modality_of(stem, wanted)
    if modality is not None:
        return folder.resolve().name, modality
    if numbered := re.fullmatch(r"(.+)_(\d{4})", stem):
        return numbered[1], channels.get(int(numbered[2]))
    for separator in re.finditer(r"[_\s.-]", stem):  # from the left: the longest name first
        modality = modality_of(stem[separator.end() :], wanted)
        if modality is not None and separator.start():
            return stem[: separator.start()], modality
    return "", None


def _holds_channels(path: Path) -> bool:
    """Whether a file of no modality's name holds them all, by where it lies: labels do not."""
    folder = path.parent
    return path.name.lower().endswith(volume_io.NIFTI_SUFFIXES) and (
        folder.name.startswith("images") or (folder / "dataset.json").is_file()
    )


def _channels(folder: Path, wanted: Sequence[str]) -> dict[int, str]:
    """Modality by channel number, from ``dataset.json`` beside or above ``folder``."""
    file = next((f for f in (folder, folder.parent) if (f / "dataset.json").is_file()), None)
    if file is None:
        return {}
    try:
        names = json.loads((file / "dataset.json").read_text("utf-8"))
        names = names.get("channel_names", names.get("modality", {}))
        named = {int(number): modality_of(str(name), wanted) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise DataError(
            f'{file / "dataset.json"} must hold "channel_names", such as {{"0": "T2W"}}; got: '
            f"{error}. Correct the file."
        ) from None
    return {number: modality for number, modality in named.items() if modality}


def _case_files(
    case_id: str,
    folder: Path,
    files: Mapping[str, list[Path]],
    wanted: Sequence[str],
    channels: Mapping[str, int],
) -> CaseFiles:
    return CaseFiles(
        case_id=case_id,
        patient_id=case_id,
        images={name: paths[0] for name, paths in files.items() if name != GLAND},
        label=None,
        gland=files[GLAND][0] if GLAND in files else None,
        looked_for={name: f"'{name}' in {folder}" for name in wanted},
        channels=channels,
        problems=tuple(
            Problem(
                case_id,
                None,
                f"a case must have one file for '{name}'; got {', '.join(p.name for p in paths)} "
                f"in {folder}. Remove all but one.",
            )
            for name, paths in files.items()
            if len(paths) > 1
        ),
    )


def read_case(files: CaseFiles, data: DataConfig) -> Case:
    """Read and preprocess one case.

    Raises:
        DataError: what is wrong with it.
    """
    if files.problems:
        raise DataError("\n".join(problem.text for problem in files.problems))
    if data.preprocess.centre == GLAND and files.gland is None:
        raise DataError(
            f"a model that sees the grid around the gland needs a mask of it; got none for "
            f"{files.case_id}. Add {GLAND}.nii.gz to the folder of the case, or "
            f"{files.case_id}_{GLAND}.nii.gz beside its images."
        )
    raw = RawCase(
        case_id=files.case_id,
        patient_id=files.patient_id,
        images={
            name: volume_io.read_volume(path, files.channels.get(name))
            for name, path in files.images.items()
        },
        label=None,
        gland=volume_io.read_volume(files.gland) if files.gland else None,
    )
    return preprocessing.preprocess_case(raw, data, require_label=False)
