"""``dataset.json`` of nnU-Net (both versions) and of the Medical Segmentation Decathlon.

All that says which files mean what is read: channels, the list of training cases and their labels,
their number, and what the labels are. What cannot be followed is refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.modalities import by_modality
from data_pipelines.reading.volume_io import SUFFIXES

NAME = "dataset.json"


class Listed(NamedTuple):
    """A case of the list ``training``; paths below the folder of ``dataset.json``."""

    case_id: str
    image: Path
    label: Path


def read(path: Path) -> dict[str, Any]:
    """The object in the file.

    Raises:
        MissingDataError: no such file.
        DataError: no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise MissingDataError(
            f"the nnU-Net layout needs dataset.json, which names the channels; none at {path}. "
            "Add it."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} must be JSON; got: {error}. Correct the file.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object; got {content!r:.40}. Correct the file.")
    return content


def channels(description: Mapping[str, Any], wanted: Sequence[str], path: Path) -> dict[int, str]:
    """Channel number to wanted modality, from ``channel_names`` or, in version 1, ``modality``.

    Raises:
        DataError: no such names, or two channels of one modality.
    """
    names = description.get("channel_names", description.get("modality"))
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise DataError(
            f'{path} must hold "channel_names", such as {{"0": "T2W", "1": "ADC"}}; got '
            f"{names!r}. Correct the file."
        )
    numbered = [(str(name), int(number)) for number, name in names.items()]
    found, _ = by_modality(numbered, wanted)
    for modality, numbers in found.items():
        if len(numbers) > 1:
            name = names.get(str(numbers[1]), "")
            raise DataError(
                f"{path} must name each modality once; got '{modality}' again as channel "
                f"{numbers[1]} ({name}). Correct the file."
            )
    return {numbers[0]: modality for modality, numbers in found.items()}


def num_channels(description: Mapping[str, Any]) -> int:
    """How many channels are named, wanted or not."""
    return len(description.get("channel_names", description.get("modality", ())))


def labels(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """Value of each name in ``labels``; version 1 maps values to names. None if there are none."""
    named = description.get("labels")
    if not isinstance(named, dict):
        return None
    if named and all(str(number).isdecimal() for number in named):
        return {str(name): int(number) for number, name in named.items()}
    return {str(name): value for name, value in named.items()}


def training(description: Mapping[str, Any], root: Path, path: Path) -> list[Listed] | None:
    """The cases that ``training`` lists, or None if there is no list.

    Raises:
        DataError: a list in another form, a path that leads out of the folder, a case twice, or
            another number of cases than ``numTraining`` says.
    """
    if "dataset" in description:
        raise DataError(
            f'{path} must leave the files where their names say; got a list "dataset", which is '
            "not read. Move the files to imagesTr and labelsTr and remove the list."
        )
    listed = description.get("training")
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and {"image", "label"} <= entry.keys() for entry in listed
    ):
        raise DataError(
            f'{path} must list image and label of each case in "training"; got {listed!r:.80}. '
            "Correct the list, or remove it to use all files of imagesTr."
        )
    cases = [
        Listed(
            _case_id(entry["image"]),
            _inside(root, entry["image"], path),
            _inside(root, entry["label"], path),
        )
        for entry in listed
    ]
    ids = [case.case_id for case in cases]
    if len({*ids}) < len(ids):
        twice = next(case_id for case_id in ids if ids.count(case_id) > 1)
        raise DataError(
            f'{path} must list each case once in "training"; got {twice} again. Remove one.'
        )
    said = description.get("numTraining")
    if said is not None and said != len(cases):
        raise DataError(
            f'{path} must list as many cases in "training" as "numTraining" says; got {len(cases)} '
            f"and {said!r:.20}. Correct the one that is wrong."
        )
    return cases


def _case_id(image: object) -> str:
    name = PurePosixPath(str(image)).name
    ending = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(ending)]


def _inside(root: Path, name: object, path: Path) -> Path:
    relative = PurePosixPath(str(name))
    if not isinstance(name, str) or relative.is_absolute() or ".." in relative.parts:
        raise DataError(
            f"{path} must name files below its own folder; got {name!r:.80}. Correct the list."
        )
    return root / relative
