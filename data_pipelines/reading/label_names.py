"""What the names of labels tell: whether a file's values are those of the target.

For one class every value above 0 is the target, so no value may stand for anything else. Names come
from ``dataset.json`` or from the segments of 3D Slicer.
"""

import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.modalities import plain

_ZONES = {
    *("pz", "tz", "cz", "cg", "afs", "afms", "peripheral_zone", "transition_zone"),
    *("transitional_zone", "central_zone", "central_gland", "anterior_fibromuscular_stroma"),
}
_GLAND = {
    *("gland", "wg", "prostate", "prostate_gland", "whole_gland", "whole_prostate"),
    *_ZONES,
}
_LESION_WORD = re.compile(
    r"(lesion|cancer|carcinoma|tumou?r|finding)s?\d*|(lesion_?)?area\d*|(cs|is)?pca\d*|isup\d*|"
    r"gleason\d*|gs\d*|pirads\d*|rads\d*|grade\d*|gg\d*|roi\d*|suspicious|malignant|significant|cs"
)
_UNNAMED = re.compile(r"(foreground|label|mask|class|value|segment|segmentation|target)?_?\d*")
_LONG_NAMES = {"peripheral_zone": "pz", "transition_zone": "tz", "transitional_zone": "tz"}


def check_label_names(labels: Mapping[str, Any], config: DataConfig, where: str) -> None:
    """Whether named values are those of the target.

    Args:
        labels: value of each name, as nnU-Net writes them.
        config: says the target.
        where: the file that says so, for messages.

    Raises:
        DataError: of a built-in target values that are ignored, regions, a foreground of value 0,
            another structure, an unknown name, or classes in another order.
    """
    if config.definition.values:
        return  # classes of one's own, as they are typed or named there
    ignored = sorted(n for n in labels if plain(n) in ("ignore", "ignored", "ignore_label"))
    one_class = len(config.classes) == 1
    own = sorted(n for n in labels if _structure(n) == config.target and labels[n] not in (0, "0"))
    if ignored and not (one_class and own):
        raise DataError(
            f"{where} must name no voxels that are to be ignored where the target is one of those "
            f"that are built in; got {', '.join(ignored)} with value {labels[ignored[0]]}. Use "
            "--data.target=mine, which takes all classes of the file and leaves those voxels out."
        )
    for name, value in labels.items():
        if str(value) == "0" and _structure(name) not in (None, ""):
            raise DataError(
                f"{where} must give the background the value 0; got it for {name!r}. Renumber the "
                "labels."
            )
    if one_class:
        _check_one_class({n: v for n, v in labels.items() if str(v) != "0"}, config, where)
    else:
        _check_classes(labels, config, where)


def _structure(name: str) -> str | None:
    """Target that a name means; empty for a name that means nothing, None for another one."""
    name = plain(name)
    if name in _GLAND:
        return "gland"
    words = [word for word in re.split(r"[^a-z0-9]+", name) if word]
    if any(_LESION_WORD.fullmatch(word) for word in words):
        return "lesion"
    return "" if _UNNAMED.fullmatch(name) else None


def _check_one_class(labels: Mapping[str, Any], config: DataConfig, where: str) -> None:
    structures = {name: _structure(name) for name in labels}
    own = {name for name, structure in structures.items() if structure == config.target}
    others = {
        name
        for name, structure in structures.items()
        if name not in own and (own or structure != "")
    }
    regions = [name for name, value in labels.items() if isinstance(value, list | tuple)]
    if others:
        remedy = "Choose another --data.target"
        if own:
            values = ", ".join(str(labels[name]) for name in sorted(own))
            remedy = (
                f"Make it so with value {values} set to 1 and all others to 0, in labelsTr and in "
                f'"labels", or choose another --data.target'
            )
        elif all(structures[name] is None for name in others):
            remedy += f", or rename it ({config.target}) if it is what is meant"
        raise DataError(
            f"{where} must name no other structure than the target '{config.target}', since every "
            f"value above 0 is taken for it; got {', '.join(sorted(others))}. {remedy}."
        )
    if regions:
        raise DataError(
            f"{where} must give each label one value; got the region {regions[0]} of "
            f"{labels[regions[0]]}. Name each value by itself."
        )


def _check_classes(labels: Mapping[str, Any], config: DataConfig, where: str) -> None:
    names = {name: plain(name) for name in labels}
    given = {_LONG_NAMES.get(short, short): labels[name] for name, short in names.items()}
    expected = {name: i + 1 for i, name in enumerate(config.classes)}
    if any(given.get(name) != number for name, number in expected.items()):
        remedy = 'Renumber the labels, in labelsTr and in "labels",'
        if not expected.keys() <= given.keys():
            remedy = "Rename the labels, and renumber them if they differ,"
        raise DataError(
            f"{where} must number the classes of '{config.target}' as {expected}; got "
            f"{dict(labels)}. {remedy} or choose another --data.target."
        )
