"""What is segmented: classes by name, which label values make each, and what is ignored.

``lesion``, ``gland`` and ``zones`` are built in, with their meaning for prostates. Any other target
has classes that the user names, as ``dataset.json`` does: ``tumour=1``; a region is several values,
``whole=1+2+3``, and may overlap others; ``ignore=4`` are voxels that nobody labelled.

A network tells *parts* apart, each voxel being of one part at most: the values that belong to the
same classes are one part. Classes are measured as unions of parts. Without regions, the parts are
the classes.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from data_pipelines.faults import DataError

IGNORED = 255
"""Stored value of voxels that count in no loss, no metric and no candidate."""

TARGET_CLASSES: dict[str, tuple[str, ...]] = {
    "lesion": ("lesion",),
    "gland": ("gland",),
    "zones": ("pz", "tz"),
}
"""Foreground classes of the targets that are built in, in label order: class ``i`` is ``i + 1``."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_MOST_VALUE = 65_535
_MOST_PARTS = 200


@dataclasses.dataclass(frozen=True)
class Target:
    """What is segmented.

    Attributes:
        name: of the target.
        classes: names of what is measured, in the user's order.
        parts: of each class, the stored values 1 to n that make it.
        values: of each part, the values in label files; empty for targets that are built in.
        ignore: value of voxels that are ignored in label files.
        lesion: the class whose lesions are detected, if one is said to be a lesion.
    """

    name: str
    classes: tuple[str, ...]
    parts: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...] = ()
    ignore: int | None = None
    lesion: str | None = None

    @property
    def num_parts(self) -> int:
        """How many parts a network tells apart."""
        return max(part for of_class in self.parts for part in of_class)

    @property
    def has_regions(self) -> bool:
        """Whether a class is more than one part, or classes share one."""
        return any(len(of_class) > 1 for of_class in self.parts) or self.num_parts < len(
            self.classes
        )

    @property
    def part_names(self) -> tuple[str, ...]:
        """Name of each part: the classes it belongs to, joined by dots, or its number."""
        names = (
            ".".join(n for n, of in zip(self.classes, self.parts, strict=True) if part in of)
            for part in range(1, self.num_parts + 1)
        )
        return tuple(n if len(n) <= 64 else f"part_{i}" for i, n in enumerate(names, start=1))

    def mask_of(self, labels: np.ndarray, index: int) -> np.ndarray:
        """Where stored values are of class ``index``, counted from 0."""
        first, *others = self.parts[index]
        mask = labels == first
        for part in others:
            mask = mask | (labels == part)
        return mask

    def probability_of(self, probability: np.ndarray, index: int) -> np.ndarray:
        """Probability of class ``index`` from those of the network, background first if several."""
        if probability.shape[-1] == 1:
            return probability[..., 0]
        first, *others = self.parts[index]
        total = probability[..., first]
        for part in others:
            total = total + probability[..., part]
        return total

    def to_file(self, mask: np.ndarray) -> np.ndarray:
        """Stored values as the user's files have them: of a part of several values, the least."""
        if not self.values:
            return mask
        table = np.array([0, *(of_part[0] for of_part in self.values)])
        return table[mask].astype(np.uint8 if table.max() < 256 else np.uint16)


def foreground(labels: np.ndarray) -> np.ndarray:
    """Where stored values are of any class: neither background nor ignored."""
    return (labels > 0) & (labels != IGNORED)


@functools.cache
def target_of(name: str, labels: Sequence[str] = (), lesions: Sequence[str] = ()) -> Target:
    """The target of a name and of the user's lines.

    Args:
        name: of the target.
        labels: ``name=value`` or ``name=value+value`` of each class, and ``ignore=value``.
        lesions: which classes are lesions; one at most.

    Raises:
        DataError: a name without classes, or lines that cannot be meant.
    """
    if name in TARGET_CLASSES:
        if labels or lesions:
            raise DataError(
                f"classes of one's own need a target of another name than {name!r}, which has its "
                "classes; got --data.labels or --data.lesions. Use --data.target=mine."
            )
        classes = TARGET_CLASSES[name]
        parts = tuple((i + 1,) for i in range(len(classes)))
        return Target(name, classes, parts, lesion="lesion" if name == "lesion" else None)
    if not _NAME.fullmatch(name):
        raise DataError(
            "a target must be named by letters, digits, '_' and '-', a letter first, at most 40; "
            f"got {name!r:.80}. Use --data.target=mine."
        )
    if not labels:
        raise DataError(
            f"a target must be {', '.join(TARGET_CLASSES)}, or have classes of its own; got "
            f"{name!r} without any. Use --data.labels tumour=1 organ=2, or name them in "
            "dataset.json beside imagesTr."
        )
    values, ignore = _read(labels)
    named, parts, of_parts = _parts(values)
    lesion = None
    if lesions:
        lesion = lesions[0]
        if len(lesions) > 1 or lesion not in named:
            raise DataError(
                "one class may be said to be a lesion, of those that are there; got "
                f"{', '.join(lesions)} and the classes {', '.join(named)}. Use "
                f"--data.lesions {named[0]}."
            )
    return Target(name, named, parts, of_parts, ignore, lesion)


def _read(labels: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Values of each class, and the ignored one."""
    found: dict[str, tuple[int, ...]] = {}
    for line in labels:
        name, equals, text = line.partition("=")
        numbers = text.split("+")
        good = equals and _NAME.fullmatch(name) and all(n.isdecimal() for n in numbers)
        values = tuple(sorted({int(n) for n in numbers})) if good else ()
        twice = name.lower() in {other.lower() for other in found}
        if name == "background" and values == (0,):
            continue
        if not values or min(values) < 1 or max(values) > _MOST_VALUE or twice:
            raise DataError(
                "a class must be written name=value, or name=value+value for a region, with whole "
                f"numbers from 1 to {_MOST_VALUE} and each name once; got {line!r:.80}. Use "
                "--data.labels tumour=1 organ=2."
            )
        found[name] = values
    ignored = found.pop("ignore", None)
    one = None if ignored is None else ignored[0]
    if ignored is not None and (len(ignored) > 1 or any(one in v for v in found.values())):
        raise DataError(
            "what is ignored must be one value that no class has; got ignore="
            f"{'+'.join(map(str, ignored))}. Use --data.labels tumour=1 ignore=2."
        )
    if not found:
        raise DataError(
            f"a target must have at least one class; got {' '.join(labels)}. Use --data.labels "
            "tumour=1."
        )
    return found, one


def _parts(
    values: dict[str, tuple[int, ...]],
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Names of classes, the parts of each, and the values of each part, by the least of them."""
    names = tuple(values)
    groups: dict[tuple[str, ...], list[int]] = {}
    for value in sorted({v for of_class in values.values() for v in of_class}):
        groups.setdefault(tuple(n for n in names if value in values[n]), []).append(value)
    if len(groups) > _MOST_PARTS:
        raise DataError(
            f"a target may have up to {_MOST_PARTS} parts; got {len(groups)}. Leave out classes of "
            "--data.labels."
        )
    numbered = {owners: number for number, owners in enumerate(groups, start=1)}
    parts = tuple(
        tuple(number for owners, number in numbered.items() if name in owners) for name in names
    )
    return names, parts, tuple(tuple(of_part) for of_part in groups.values())
