"""Cases to predict: found by the names of their files, read and preprocessed as for training."""

import dataclasses
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.case import Case, RawCase
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, Problem
from data_pipelines.modalities import ALIASES, by_modality, modality_of
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import GLAND
from data_pipelines.preparing import preprocessing
from data_pipelines.preparing.labels import settled
from data_pipelines.progress import say_line
from data_pipelines.reading import dataset_json, volume_io
from data_pipelines.reading.case_files import CaseFiles, unused_files
from data_pipelines.reading.volume_io import name_without_ending
from data_pipelines.targets import TARGET_CLASSES
from experiments.prediction.outputs import KINDS, RECORD

_LABEL_WORDS = {
    *(*TARGET_CLASSES, "label", "labels", "mask", "masks", "roi", "seg", "segmentation"),
    *("segmentations", "annotation", "pred", "prediction", "probability", "attention"),
}


def find_inputs(
    root: Path, modalities: Sequence[str], *, with_gland: bool = False
) -> list[CaseFiles]:
    """The cases under ``root``, by the names of their files; labels and others are passed over.

    A file ``<modality>.<ending>`` belongs to the case that its folder is named for, a file
    ``<case>_<modality>.<ending>`` to ``<case>`` (unless its folder holds files of the first kind),
    and in nnU-Net's raw layout ``<case>_<4 digits>`` is the channel of that number in
    ``dataset.json``, or without that file in the order of ``modalities``. Any other NIfTI file
    beside ``dataset.json``, or in a folder ``images*`` under it, is a case with its channels along
    a fourth axis (the layout of the Medical Segmentation
    Decathlon). A folder with one DICOM series is named like a file. Modalities go by the names that
    the data pipeline accepts. Links are followed; hidden folders and results of earlier
    predictions are passed over.

    Cases of equal names are told apart by the folders above them: ``A/mri`` and ``B/mri`` become
    ``A_mri`` and ``B_mri``.

    Args:
        root: folder of one case or of many.
        modalities: of the model.
        with_gland: whether the gland's mask is looked for too, for a crop around it.

    Raises:
        DataError: no folder, or no case in it.
    """
    if not root.is_dir():
        raise MissingDataError(f"the input must be a folder; got {root}. Check --input.")
    root = Path(os.path.abspath(root))  # a name for '.'; links keep theirs
    names: list[str] = [preprocessing.REFERENCE, *modalities, *([GLAND] if with_gland else [])]
    wanted = tuple(dict.fromkeys(names))
    found: list[CaseFiles] = []
    for folder, paths in _folders(root):
        found += _cases_in(folder, paths, wanted, modalities)
    # A T2W alone says where the others would lie, not that this is a case of the model.
    cases = [case for case in found if case.images.keys() & {*modalities}]
    if not cases:
        raise MissingDataError(
            f"the input must hold files named by modality ({', '.join(modalities)}), such as "
            f"CASE/{modalities[0]}.nii.gz or CASE_{modalities[0]}.mha; found none in {root}. "
            f"Rename the files; endings are {', '.join(volume_io.SUFFIXES)}."
        )
    return sorted(_told_apart(cases, root), key=lambda case: case.case_id)


def _folders(
    root: Path, above: frozenset[str] = frozenset()
) -> Iterator[tuple[Path, list[tuple[str, Path]]]]:
    """Each folder with the volumes in it by name, through links, but not round in circles."""
    real = os.path.realpath(root)
    if real in above:
        return
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    passed_over = KINDS if (root / RECORD).is_file() else ()
    volumes = []
    folders = []
    for path in entries:
        name = _volume_name(path)
        if name is not None:
            volumes.append((name, path))
        if path.is_dir() and path.name not in passed_over:
            folders.append(path)
    yield root, volumes
    for folder in folders:
        yield from _folders(folder, above | {real})


def _volume_name(path: Path) -> str | None:
    """Name of a volume without its ending, or of a folder that may hold a DICOM series."""
    if not path.is_dir():
        return name_without_ending(path.name)
    inside = [p for p in path.iterdir() if not p.name.startswith(".")]
    plain = inside and all(p.is_file() and name_without_ending(p.name) is None for p in inside)
    return path.name if plain else None


def _cases_in(
    folder: Path,
    volumes: Sequence[tuple[str, Path]],
    wanted: Sequence[str],
    modalities: Sequence[str],
) -> list[CaseFiles]:
    """The cases whose files lie in one folder."""
    channels = _channels(folder, wanted) if volumes else {}
    if channels is None:
        channels = _channels_of_model(folder, [name for name, _ in volumes], modalities)
    named: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    numbered: dict[str, dict[str, list[Path]]] = {}
    four_axes: dict[str, dict[str, int]] = {}
    one_case = any(modality_of(name, wanted) not in (None, GLAND) for name, _ in volumes)
    for name, path in volumes:
        if modality_of(name, wanted) is not None:
            named[folder.name].append((name, path))
        elif match := re.fullmatch(r"(.+)_(\d{4})", name):
            if (modality := channels.get(int(match[2]))) is not None:
                numbered.setdefault(match[1], {}).setdefault(modality, []).append(path)
        elif (parts := _case_and_modality(name, wanted)) is not None:
            if not one_case:
                named[parts[0]].append((parts[1], path))
        elif channels and _holds_channels(path):
            four_axes[name] = {modality: number for number, modality in channels.items()}
            for modality in four_axes[name]:
                numbered.setdefault(name, {}).setdefault(modality, []).append(path)
    cases = []
    for case_id in dict.fromkeys((*named, *numbered)):
        files, left = by_modality(named.get(case_id, ()), wanted)
        if one_case and case_id == folder.name:
            left += [path for name, path in volumes if _is_odd(name, wanted)]
        for modality, paths in numbered.get(case_id, {}).items():
            files.setdefault(modality, []).extend(paths)
        case = _case_files(case_id, folder, files, wanted, four_axes.get(case_id, {}))
        unused = unused_files(case_id, left, ", ".join(wanted))
        cases.append(dataclasses.replace(case, problems=(*case.problems, *unused)))
    return cases


def _is_odd(name: str, wanted: Sequence[str]) -> bool:
    """Whether a volume in the folder of a case is neither a modality of the field nor a label."""
    words = {*re.split(r"[_\s.-]", name.lower())}
    return modality_of(name, (*wanted, *ALIASES)) is None and not words & _LABEL_WORDS


def _case_and_modality(name: str, wanted: Sequence[str]) -> tuple[str, str] | None:
    """Case, and name of a modality, that make up a file's name; None for labels and others."""
    for separator in re.finditer(r"[_\s.-]", name):  # from the left: the longest name first
        case_id, rest = name[: separator.start()], name[separator.end() :]
        if case_id and modality_of(rest, wanted) is not None:
            word = re.split(r"[_\s.-]", case_id)[-1].lower()
            return None if word in _LABEL_WORDS else (case_id, rest)
    return None


def _holds_channels(path: Path) -> bool:
    """Whether a file of no modality's name holds them all, by where it lies: labels do not."""
    folder = path.parent
    return path.name.lower().endswith(volume_io.NIFTI_SUFFIXES) and (
        folder.name.startswith("images") or (folder / dataset_json.NAME).is_file()
    )


def _channels(folder: Path, wanted: Sequence[str]) -> dict[int, str] | None:
    """Modality by channel number, from ``dataset.json`` here or above; None without."""
    files = (folder / dataset_json.NAME, folder.parent / dataset_json.NAME)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    return dataset_json.channels(dataset_json.read(file), wanted, file)


def _channels_of_model(
    folder: Path, names: Sequence[str], modalities: Sequence[str]
) -> dict[int, str]:
    """Modality by channel number in the model's order, said, if all its channels are there."""
    numbers = {int(match[1]) for name in names if (match := re.search(r"_(\d{4})$", name))}
    if numbers != {*range(len(modalities))}:
        return {}
    told = ", ".join(f"{number:04d} for {name}" for number, name in enumerate(modalities))
    say_line(
        f"{folder} has no {dataset_json.NAME}: channels are taken in the order of the model, "
        f'{told}. If they are others, write {{"channel_names": {{"0": ...}}}} into '
        f"{dataset_json.NAME} there."
    )
    return dict(enumerate(modalities))


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


def _told_apart(cases: Sequence[CaseFiles], root: Path) -> list[CaseFiles]:
    """Cases of equal names get those of the folders above them as well, as many as it takes."""
    above = []
    for case in cases:
        folder = next(iter(case.images.values())).parent
        parts = folder.relative_to(root).parts
        above.append(parts[:-1] if case.case_id == folder.name else parts)
    names = [case.case_id for case in cases]
    for length in range(1, 1 + max(map(len, above))):
        counts = Counter(name.casefold() for name in names)
        names = [
            "_".join((*parts[max(len(parts) - length, 0) :], case.case_id))
            if counts[name.casefold()] > 1
            else name
            for name, parts, case in zip(names, above, cases, strict=True)
        ]
    return [
        dataclasses.replace(case, case_id=name, patient_id=name)
        for name, case in zip(names, cases, strict=True)
    ]


def read_raw(files: CaseFiles, data: DataConfig) -> RawCase:
    """Read the files of one case.

    Raises:
        DataError: what is wrong with them.
    """
    errors = [problem.text for problem in files.problems if problem.level == "error"]
    if errors:
        raise DataError("\n".join(errors))
    if data.preprocess.centre == GLAND and files.gland is None:
        raise DataError(
            f"a model that sees the grid around the gland needs a mask of it; got none for "
            f"{files.case_id}. Add {GLAND}.nii.gz to the folder of the case, or "
            f"{files.case_id}_{GLAND}.nii.gz beside its images."
        )
    return RawCase(
        case_id=files.case_id,
        patient_id=files.patient_id,
        images={
            name: volume_io.read_volume(path, files.channels.get(name))
            for name, path in files.images.items()
        },
        label=None,
        gland=settled(volume_io.read_volume(files.gland)) if files.gland else None,
    )


def read_case(files: CaseFiles, data: DataConfig) -> Case:
    """Read and preprocess one case.

    Raises:
        DataError: what is wrong with it.
    """
    return preprocessing.preprocess_case(read_raw(files, data), data, require_label=False)


def images_sha256(raw: RawCase) -> str:
    """sha256 of the images of a case and where they lie: whose result a file is."""
    digest = hashlib.sha256()
    for name in sorted(raw.images):
        volume = raw.images[name]
        digest.update(f"{name} {volume.array.dtype.str} {volume.shape}".encode())
        digest.update(np.ascontiguousarray(volume.array).data)
        digest.update(np.asarray(volume.affine, "<f8").tobytes())
    return digest.hexdigest()
