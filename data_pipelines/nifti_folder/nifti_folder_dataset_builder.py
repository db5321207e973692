"""A user's own files: one folder per case, or the raw layout of nnU-Net. See README.md."""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.building.case_builder import FileCaseBuilder
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, Problem
from data_pipelines.preparing.preprocessing import REFERENCE
from data_pipelines.reading.case_files import CaseFiles
from data_pipelines.reading.tables import read_table
from data_pipelines.reading.volume_io import SUFFIXES

ALIASES: dict[str, tuple[str, ...]] = {
    "t2w": ("t2", "t2_tra", "t2_tse", "t2_weighted"),
    "adc": ("adc_map",),
    "hbv": ("dwi", "high_b", "highb", "high_b_value", "dwi_high_b"),
}
"""Other names under which a modality is accepted, in lower case with ``_`` for blanks and ``-``."""

GLAND = "gland"
"""Name of the file, or prefix of the nnU-Net folder, with the mask for a crop around the gland."""

_PATIENTS = "patients.csv"
_ZONES = {
    *("pz", "tz", "cz", "cg", "afs", "afms", "peripheral_zone", "transition_zone"),
    *("transitional_zone", "central_zone", "central_gland", "anterior_fibromuscular_stroma"),
}
_STRUCTURES = {
    "lesion": {"lesion", "cancer", "prostate_cancer", "pca", "cspca", "tumor", "tumour"},
    "gland": {
        "gland",
        "wg",
        "prostate",
        "prostate_gland",
        "whole_gland",
        "whole_prostate",
        *_ZONES,
    },
}
"""What nnU-Net labels that mean these targets are called."""

_CLASSES = {"peripheral_zone": "pz", "transition_zone": "tz", "transitional_zone": "tz"}
"""Long names of classes."""


class Builder(FileCaseBuilder):
    """Cases in a folder of the user's own."""

    def find_cases(self) -> Sequence[CaseFiles]:
        """One entry for each case folder, or each case of ``imagesTr``."""
        return find_cases(self.root(), self.data_config)

    def check_list(self) -> list[Problem]:
        """Also labels of the nnU-Net layout that have no image."""
        return [*super().check_list(), *_labels_alone(self.root(), self.entries)]


def find_cases(root: Path, config: DataConfig) -> list[CaseFiles]:
    """List the cases under ``root``, in either layout.

    Raises:
        MissingDataError: no case, or ``imagesTr`` without ``dataset.json``.
        DataError: a faulty ``dataset.json`` or table of patients.
    """
    wanted = (REFERENCE, *(name for name in config.modalities if name != REFERENCE))
    if (root / "imagesTr").is_dir():
        cases = _nnunet_cases(root, wanted, config)
    else:
        cases = _folder_cases(root, wanted, config)
    if not cases:
        raise MissingDataError(
            f"the data folder must hold a folder for each case, or imagesTr; found no case in "
            f"{root}. Check --data.path."
        )
    table = _read_table(root / _PATIENTS, cases, wanted)
    return [_with_row(case, table[case.case_id], config) if table else case for case in cases]


def modality_of(name: str, wanted: Sequence[str]) -> str | None:
    """Which of the wanted modalities a file or channel name means; case does not matter."""
    name = _plain(name)
    for modality in wanted:
        if name in (modality.lower(), *ALIASES.get(modality, ())):
            return modality
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _folder_cases(root: Path, wanted: Sequence[str], config: DataConfig) -> list[CaseFiles]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [_folder_case(folder, wanted, config) for folder in folders]


def _folder_case(folder: Path, wanted: Sequence[str], config: DataConfig) -> CaseFiles:
    target = config.target
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.lower() if path.is_dir() else _stem(path)  # a folder: a DICOM series
        name = stem if stem in (target, "label", GLAND) else modality_of(stem, wanted)
        if name:
            found.setdefault(name, []).append(path)
    general = found.pop("label", [])
    labels = found.pop(target, general)
    masks = found.pop(GLAND, [])
    problems = tuple(
        Problem(
            folder.name,
            None,
            f"a case must have one file for '{name}'; got {', '.join(p.name for p in paths)} in "
            f"{folder}. Remove all but one.",
        )
        for name, paths in (*found.items(), (target, labels))
        if len(paths) > 1
    )
    endings = f"{{{','.join(SUFFIXES)}}}"
    looked_for = {name: f"{name}{endings} in {folder}" for name in (*wanted, GLAND)}
    looked_for["label"] = f"{target}{endings} and label{endings} in {folder}"
    return CaseFiles(
        case_id=folder.name,
        patient_id=folder.name,
        images={name: found[name][0] for name in wanted if name in found},
        label=labels[0] if labels else None,
        looked_for=looked_for,
        problems=problems,
        gland=masks[0] if masks and config.preprocess.centre == "gland" else None,
    )


def _nnunet_cases(root: Path, wanted: Sequence[str], config: DataConfig) -> list[CaseFiles]:
    description = _read_dataset_json(root / "dataset.json")
    _check_classes(description, config, root / "dataset.json")
    channels = _channels(description, wanted, root / "dataset.json")
    ending = description.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise DataError(
            f'{root / "dataset.json"} must give one of {", ".join(SUFFIXES)} as "file_ending"; '
            f"got {ending!r:.80}. Correct the file."
        )
    images: dict[str, dict[str, Path]] = {}
    for path in sorted((root / "imagesTr").glob(f"*{ending}")):
        case_id, _, number = path.name.removesuffix(ending).rpartition("_")
        hidden = case_id.startswith(".")
        if number.isdigit() and int(number) in channels and not hidden:
            images.setdefault(case_id, {})[channels[int(number)]] = path
    numbers = {name: number for number, name in channels.items()}
    cases = []
    for case_id in sorted(images):
        label = root / "labelsTr" / f"{case_id}{ending}"
        gland = root / f"{GLAND}Tr" / f"{case_id}{ending}"
        looked_for = {
            name: f"{case_id}_{numbers[name]:04d}{ending} in {root / 'imagesTr'}"
            if name in numbers
            else f"a channel of that name in {root / 'dataset.json'}"
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


def _labels_alone(root: Path, cases: Sequence[CaseFiles]) -> list[Problem]:
    folder = root / "labelsTr"
    if not (root / "imagesTr").is_dir() or not folder.is_dir():
        return []
    known = {case.case_id.lower() for case in cases}
    return [
        Problem(
            path.name[: len(_stem(path))],
            path,
            f"{path} should have images; got none for it in {root / 'imagesTr'}, so the case is "
            "left out. Add the images, or remove the label.",
            "warning",
        )
        for path in sorted(folder.iterdir())
        if _stem(path) and _stem(path) not in known
    ]


def _read_dataset_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingDataError(
            f"the nnU-Net layout needs dataset.json, which names the channels; none at {path}. "
            "Add it."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} must be JSON; got: {error}. Correct the file.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object; got {content!r:.40}. Correct the file.")
    return content


def _channels(description: Mapping, wanted: Sequence[str], path: Path) -> dict[int, str]:
    """Channel number to modality, from ``channel_names`` (``modality`` in nnU-Net version 1)."""
    names = description.get("channel_names", description.get("modality"))
    if not isinstance(names, dict) or not all(str(number).isdigit() for number in names):
        raise DataError(
            f'{path} must hold "channel_names", such as {{"0": "T2W", "1": "ADC"}}; got '
            f"{names!r}. Correct the file."
        )
    channels: dict[int, str] = {}
    for number, name in names.items():
        modality = modality_of(str(name), wanted)
        if modality in channels.values():
            raise DataError(
                f"{path} must name each modality once; got '{modality}' again as channel "
                f"{number} ({name}). Correct the file."
            )
        if modality:
            channels[int(number)] = modality
    if not channels:
        raise DataError(
            f"{path} must name a wanted channel ({', '.join(wanted)}); got "
            f"{', '.join(map(str, names.values()))}. Rename the channels or change "
            "--data.modalities."
        )
    return channels


def _check_classes(description: Mapping, config: DataConfig, path: Path) -> None:
    """Whether the labels that the file names are those of the target, as far as names tell.

    For several classes the numbers matter. For one class every value above 0 is the target, so no
    name may stand for another structure; of names that are not known, such as grades, all are.
    """
    labels = description.get("labels")
    if not isinstance(labels, dict):
        return
    if all(str(number).isdigit() for number in labels):  # version 1 maps numbers to names
        labels = {str(name): int(number) for number, name in labels.items()}
    if len(config.classes) == 1:
        foreground = {name: n for name, n in labels.items() if n not in (0, "0")}
        _check_one_class(foreground, config.target, path)
        return
    names = {name: _plain(str(name)) for name in labels}
    given = {_CLASSES.get(plain, plain): labels[name] for name, plain in names.items()}
    expected = {name: i + 1 for i, name in enumerate(config.classes)}
    if any(given.get(name) != number for name, number in expected.items()):
        remedy = 'Renumber the labels, in labelsTr and in "labels",'
        if not expected.keys() <= given.keys():
            remedy = "Rename the labels, and renumber them if they differ,"
        raise DataError(
            f"{path} must number the classes of '{config.target}' as {expected}; got {labels}. "
            f"{remedy} or choose another --data.target."
        )


def _check_one_class(labels: Mapping[str, Any], target: str, path: Path) -> None:
    """Refuse foreground ``labels`` that name another structure than the target."""
    names = {name: _plain(name) for name in labels}
    own = {name for name, plain in names.items() if plain in _STRUCTURES[target]}
    others = {name for name in names if name not in own} if own else set()
    for structure, known in _STRUCTURES.items():
        if structure != target:
            others |= {name for name, plain in names.items() if plain in known and name not in own}
    if others:
        remedy = "Choose another --data.target"
        if own:
            values = ", ".join(str(labels[name]) for name in sorted(own))
            remedy = (
                f"Make it so with value {values} set to 1 and all others to 0, in labelsTr and in "
                f'"labels", or choose another --data.target'
            )
        raise DataError(
            f"{path} must name no other structure than the target '{target}', since every value "
            f"above 0 is taken for it; got {', '.join(sorted(others))}. {remedy}."
        )


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
    """Lower-case file name without the ending of a volume; empty if it is no volume."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix) and not name.startswith("."):
            return name.removesuffix(suffix)
    return ""
