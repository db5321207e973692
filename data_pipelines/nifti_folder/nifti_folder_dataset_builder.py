"""A user's own files: one folder per case, or the raw layout of nnU-Net. See README.md."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.building.case_builder import FileCaseBuilder
from data_pipelines.case import RawCase
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, Problem
from data_pipelines.modalities import ALIASES, by_modality, modality_of
from data_pipelines.preparing.preprocessing import REFERENCE
from data_pipelines.reading import dataset_json, file_patterns
from data_pipelines.reading.case_files import CaseFiles, unused_files
from data_pipelines.reading.file_checks import segments
from data_pipelines.reading.label_names import check_label_names
from data_pipelines.reading.tables import read_table
from data_pipelines.reading.volume_io import SEGMENTATION, SUFFIXES, name_without_ending
from data_pipelines.targets import TARGET_CLASSES

GLAND = "gland"
"""Name of the file, or prefix of the nnU-Net folder, with the mask for a crop around the gland."""

_PATIENTS = "patients.csv"


class Builder(FileCaseBuilder):
    """Cases in a folder of the user's own."""

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each case folder, or each case of ``imagesTr``."""
        return find_cases(self.root(), self.data_config)

    def suspicions(self, entry: CaseFiles, raw: RawCase) -> list[Problem]:
        """Also values of a label that ``dataset.json`` does not name."""
        if raw.label is None or self._named_values is None:
            return []
        odd = sorted({float(v) for v in np.unique(raw.label.array)} - self._named_values)
        if not odd:
            return []
        return [
            Problem(
                entry.case_id,
                entry.label,
                f"a label must hold the values that {dataset_json.NAME} names; got "
                f"{', '.join(f'{value:g}' for value in odd[:3])} besides. Correct the label, or "
                "name the value.",
            )
        ]

    @functools.cached_property
    def _named_values(self) -> set[float] | None:
        """Values in ``labels`` of ``dataset.json``, if there are some."""
        if not _is_nnunet(self.root(), self.data_config):
            return None
        names = dataset_json.labels(dataset_json.read(self.root() / dataset_json.NAME))
        if names is None or not all(str(value).isdecimal() for value in names.values()):
            return None
        return {0.0, *(float(value) for value in names.values())}

    def check_list(self) -> list[Problem]:
        """Also files of the nnU-Net layout that belong to no case."""
        alone = []
        if _is_nnunet(self.root(), self.data_config):
            alone = _files_alone(self.root(), self.entries)
        return [*super().check_list(), *alone]


def find_cases(root: Path, config: DataConfig) -> list[CaseFiles]:
    """List the cases under ``root``, in either layout or by patterns of file names.

    Raises:
        MissingDataError: no case, or ``imagesTr`` without ``dataset.json``.
        DataError: a faulty ``dataset.json`` or table of patients, or patterns that find nothing.
    """
    wanted = (REFERENCE, *(name for name in config.modalities if name != REFERENCE))
    if patterns := file_patterns.read(root, config.files):
        compiled = file_patterns.compiled(patterns, wanted, config.target)
        around_gland = config.preprocess.centre == GLAND
        cases = file_patterns.find(root, compiled, wanted, with_gland=around_gland)
    elif _is_nnunet(root, config):
        cases = _nnunet_cases(root, wanted, config)
    else:
        cases = _folder_cases(root, wanted, config)
    if not cases:
        raise MissingDataError(
            "the data folder must hold a folder for each case, or imagesTr; found no case in "
            f"{root}, which holds {file_patterns.holds(root)}. Check --data.path."
        )
    table = _read_table(root / _PATIENTS, cases, wanted)
    return [_with_row(case, table[case.case_id], config) if table else case for case in cases]


def _is_nnunet(root: Path, config: DataConfig) -> bool:
    """Whether the folder is in nnU-Net's raw layout, and not told by patterns."""
    return (root / "imagesTr").is_dir() and not file_patterns.read(root, config.files)


def _folder_cases(root: Path, wanted: Sequence[str], config: DataConfig) -> list[CaseFiles]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [_folder_case(folder, wanted, config) for folder in folders]


def _folder_case(folder: Path, wanted: Sequence[str], config: DataConfig) -> CaseFiles:
    target = config.target
    volumes = [(stem, path) for path in sorted(folder.iterdir()) if (stem := _stem(path))]
    masks = [path for stem, path in volumes if stem == GLAND]
    general = [path for stem, path in volumes if stem == "label"]
    labels = [path for stem, path in volumes if stem == target] or general
    named = ("label", GLAND, target, *TARGET_CLASSES)
    found, left = by_modality([v for v in volumes if v[0] not in named], wanted)
    left = [path for path in left if not _known(_stem(path), found)]
    if labels is not general:
        left += general
    problems = [
        Problem(
            folder.name,
            None,
            f"a case must have one file for '{name}'; got {', '.join(p.name for p in paths)} in "
            f"{folder}. Remove all but one.",
        )
        for name, paths in (*found.items(), (target, labels))
        if len(paths) > 1
    ]
    problems += unused_files(folder.name, left, f"{', '.join(wanted)} and {target}")
    if labels:
        problems += _segment_problems(folder.name, labels[0], config)
    endings = f"{{{','.join(SUFFIXES)}}}"
    there = ", ".join(path.name for _, path in volumes[:6]) or "no image"
    looked_for = {
        name: f"{name}{endings} in {folder}, which holds {there}" for name in (*wanted, GLAND)
    }
    looked_for["label"] = f"{target}{endings} and label{endings} in {folder}, which holds {there}"
    return CaseFiles(
        case_id=folder.name,
        patient_id=folder.name,
        images={name: found[name][0] for name in wanted if name in found},
        label=labels[0] if labels else None,
        looked_for=looked_for,
        hint=file_patterns.suggestion([path.name for _, path in volumes], wanted),
        problems=tuple(problems),
        gland=masks[0] if masks and config.preprocess.centre == "gland" else None,
    )


def _known(stem: str, found: Mapping[str, object]) -> bool:
    """Whether a name means a modality of the field that is not asked for."""
    field = modality_of(stem, tuple(ALIASES))
    return field is not None and field not in found


def _segment_problems(case_id: str, label: Path, config: DataConfig) -> list[Problem]:
    """Segments of 3D Slicer that are not those of the target."""
    if not label.name.lower().endswith(SEGMENTATION):
        return []
    try:
        named = segments(label)
        if named:
            check_label_names(named, config, f"the segmentation {label}")
    except DataError as error:
        return [Problem(case_id, label, str(error))]
    return []


def _nnunet_cases(root: Path, wanted: Sequence[str], config: DataConfig) -> list[CaseFiles]:
    file = root / dataset_json.NAME
    description = dataset_json.read(file)
    names = dataset_json.labels(description)
    if names is not None:
        check_label_names(names, config, str(file))
    channels = dataset_json.channels(description, wanted, file)
    if not channels:
        named = description.get("channel_names", description.get("modality", {}))
        raise DataError(
            f"{file} must name a wanted channel ({', '.join(wanted)}); got "
            f"{', '.join(map(str, named.values()))}. Rename the channels or change "
            "--data.modalities."
        )
    ending = description.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise DataError(
            f'{file} must give one of {", ".join(SUFFIXES)} as "file_ending"; '
            f"got {ending!r:.80}. Correct the file."
        )
    listed = dataset_json.training(description, root, file)
    labels = {case.case_id: case.label for case in listed or ()}
    images: dict[str, dict[str, Path]] = {case_id: {} for case_id in labels}
    for path in sorted((root / "imagesTr").glob(f"*{ending}")):
        case_id, _, number = path.name.removesuffix(ending).rpartition("_")
        known = number.isdecimal() and int(number) in channels
        if known and not case_id.startswith(".") and (listed is None or case_id in labels):
            images.setdefault(case_id, {})[channels[int(number)]] = path
    numbers = {name: number for number, name in channels.items()}
    cases = []
    for case_id in sorted(images):
        label = labels.get(case_id, root / "labelsTr" / f"{case_id}{ending}")
        gland = root / f"{GLAND}Tr" / f"{case_id}{ending}"
        looked_for = {
            name: f"{case_id}_{numbers[name]:04d}{ending} in {root / 'imagesTr'}"
            if name in numbers
            else f"a channel of that name in {file}"
            for name in wanted
        }
        looked_for |= {"label": str(label), "gland": str(gland)}
        cases.append(
            CaseFiles(
                case_id=case_id,
                patient_id=case_id,
                images={name: images[case_id][name] for name in wanted if name in images[case_id]},
                label=label if os.path.lexists(label) else None,
                looked_for=looked_for,
                gland=gland
                if config.preprocess.centre == "gland" and os.path.lexists(gland)
                else None,
            )
        )
    return cases


def _files_alone(root: Path, cases: Sequence[CaseFiles]) -> list[Problem]:
    """Labels and images of the nnU-Net layout that belong to no case."""
    file = root / dataset_json.NAME
    description = dataset_json.read(file)
    known = {case.case_id.lower() for case in cases}
    labels = {case.label for case in cases}
    ending = description.get("file_ending", ".nii.gz")
    count = dataset_json.num_channels(description)
    odd, left_out = [], {}
    for path in _visible(root / "imagesTr"):
        case_id, _, number = path.name.removesuffix(ending).rpartition("_")
        if not (path.name.endswith(ending) and number.isdecimal() and int(number) < count):
            odd.append(path)
        elif case_id.lower() not in known:
            left_out[case_id] = path
    imaged = known | {case_id.lower() for case_id in left_out}
    problems = [
        Problem(
            path.name[: len(_stem(path))],
            path,
            f"{path} should have images; got none for it in {root / 'imagesTr'}, so the case is "
            "left out. Add the images, or remove the label.",
            "warning",
        )
        for path in _visible(root / "labelsTr")
        if _stem(path) and _stem(path) not in imaged and path not in labels
    ]
    problems += unused_files("imagesTr", odd, f"<case>_0000{ending} to <case>_{count - 1:04d}")
    problems += [
        Problem(
            case_id,
            path,
            f'a case in imagesTr should be in the list "training" of {file}, if there is one; got '
            f"{case_id}, which is not, so that it is left out. Add it to the list, or remove its "
            "files.",
            "warning",
        )
        for case_id, path in left_out.items()
    ]
    said = description.get("numTraining")
    if said is not None and said != len(cases):
        problems.append(
            Problem(
                "all cases",
                file,
                f"{file} should say how many cases there are; got numTraining {said!r:.20} and "
                f"{len(cases)} cases. Look for files that are missing or too many.",
                "warning",
            )
        )
    return problems


def _visible(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_table(
    path: Path, cases: Sequence[CaseFiles], wanted: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The row of each case; nothing if there is no table."""
    if not os.path.lexists(path):
        return {}
    rows = read_table(path, ("case", "patient"), remedy="Correct the file.")
    counts = Counter(row["case"] for row in rows if row["case"])
    twice = [case_id for case_id, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{path} must have one row for a case; got several for {', '.join(twice[:3])}"
            f"{f' and {len(twice) - 3} more' if len(twice) > 3 else ''}. Remove all but one."
        )
    table = {row["case"]: row for row in rows}
    unknown = [case.case_id for case in cases if not table.get(case.case_id, {}).get("patient")]
    if unknown:
        raise DataError(
            f"{path} must name the patient of every case; got none for {', '.join(unknown[:3])}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}. Add the rows."
        )
    named = {name for row in rows for name in row.get("available", "").split()}
    odd = [name for name in sorted(named) if modality_of(name, (*wanted, *ALIASES)) is None]
    if odd:
        raise DataError(
            f"{path} must name modalities in the column available, separated by spaces; got "
            f"{', '.join(odd[:3])}. Use names such as {' '.join(wanted)}."
        )
    return table


def _with_row(case: CaseFiles, row: Mapping[str, str], config: DataConfig) -> CaseFiles:
    """A case with what the table says of it: patient, group, and what of its files may be used."""
    metadata = dict(case.metadata)
    if row.get("group"):
        metadata["group"] = row["group"]
    images, problems = dict(case.images), list(case.problems)
    if row.get("available"):
        wanted = tuple(case.looked_for)
        usable = {modality_of(name, wanted) for name in row["available"].split()}
        problems += [
            Problem(
                case.case_id,
                None,
                f"a modality that {_PATIENTS} calls available must have a file; got none for "
                f"'{name}', looked for {case.looked_for[name]}. Add the file or correct the table.",
            )
            for name in config.modalities
            if name in usable and name not in images
        ]
        images = {name: path for name, path in images.items() if name in usable}
    return dataclasses.replace(
        case,
        patient_id=row["patient"],
        metadata=metadata,
        images=images,
        problems=tuple(problems),
    )


def _stem(path: Path) -> str:
    """Lower-case name of a volume without its ending, or of a folder, which may be a series.

    Empty if it is hidden or no volume.
    """
    if path.name.startswith("."):
        return ""
    return path.name.lower() if path.is_dir() else (name_without_ending(path.name) or "").lower()
