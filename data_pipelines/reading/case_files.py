"""The files of one case as a reader found them, and what shows in their list alone."""

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from data_pipelines.config import DataConfig
from data_pipelines.faults import Problem

_CASE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """The files of one case, as a reader found them.

    Attributes:
        case_id: unique name of the study.
        patient_id: who was imaged.
        images: modality to file; a modality that was not found has no key.
        label: the label file, or None if there is none.
        looked_for: for each modality and for ``label``, where a file was looked for.
        metadata: further facts, as text.
        problems: faults seen while the files were listed.
        channels: for a modality that is one volume of a file with four axes, which one.
        gland: a mask of the gland, for a crop around it.
        label_classes: class of the target for values of the label file that mean another one.
        hint: a sentence with what to type where a file has another name; ends without a full stop.
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Path]
    label: Path | None
    looked_for: Mapping[str, str]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    channels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    gland: Path | None = None
    label_classes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    hint: str = ""

    @property
    def files(self) -> dict[str, Path]:
        """All files, by modality and as ``label`` and ``gland``."""
        others = {"label": self.label, "gland": self.gland}
        return {**self.images, **{name: path for name, path in others.items() if path}}


def check_ids(case_ids: Iterable[str]) -> list[Problem]:
    """Ids that occur twice or cannot become file names.

    Some file systems take upper and lower case for the same; so ids must differ in more than that.
    """
    counts = Counter(case_ids)
    folded = Counter(case_id.casefold() for case_id in counts)
    return (
        [
            Problem(
                case_id,
                None,
                f"a case id must be unique; got it {count} times. Rename or remove the others.",
            )
            for case_id, count in counts.items()
            if count > 1
        ]
        + [
            Problem(
                case_id,
                None,
                "a case id must consist of at most 64 letters a to z, digits, '.', '_' and '-' and "
                f"start with neither '.' nor '-'; got {case_id!r:.80}. Rename its files.",
            )
            for case_id in counts
            if not _CASE_ID.fullmatch(case_id)
        ]
        + [
            Problem(
                case_id,
                None,
                "case ids must differ in more than upper and lower case; got "
                f"{case_id!r} and {folded[case_id.casefold()] - 1} like it. Rename all but one.",
            )
            for case_id in counts
            if folded[case_id.casefold()] > 1
        ]
    )


def check_patients(patient_ids: Iterable[str]) -> list[Problem]:
    """Patients that seem to be written in two ways, and would part into different folds.

    Spreadsheets make 2 of 02 and 3.0 of 3, and people write P01 and p01: that is an error. P1
    beside P01 may be meant, and is a warning.
    """
    problems: list[Problem] = []
    kinds: tuple[tuple[Callable[[str], str], Literal["error", "warning"]], ...] = (
        (_spelled_alike, "error"),
        (_numbered_alike, "warning"),
    )
    for spelled, level in kinds:
        alike: dict[str, set[str]] = defaultdict(set)
        for patient_id in patient_ids:
            alike[spelled(patient_id)].add(patient_id)
        problems += [
            Problem(
                min(names),
                None,
                "a patient must be written in one way in all cases, lest they part into different "
                f"folds; got {', '.join(sorted(names))}. Write it in one way, or rename those who "
                "are others.",
                level,
            )
            for names in alike.values()
            if len({_spelled_alike(name) for name in names} if level == "warning" else names) > 1
        ]
    return problems


def _spelled_alike(patient_id: str) -> str:
    """An id without what spreadsheets and people change: case, form, zeros around a number."""
    text = " ".join(unicodedata.normalize("NFKC", patient_id).casefold().split())
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text)
    return number[1] if number else text


def _numbered_alike(patient_id: str) -> str:
    """The same, with neither zeros before any number in it nor what parts words."""
    words = re.findall(r"\d+|[^\W\d_]+", _spelled_alike(patient_id))
    return "-".join(word.lstrip("0") or "0" if word.isdigit() else word for word in words)


def check_present(entries: Iterable["CaseFiles"], config: DataConfig) -> list[Problem]:
    """Modalities that no case has, and with which nothing can be learned."""
    entries = list(entries)
    found = {name for entry in entries for name in entry.images}
    absent = [name for name in config.modalities if name not in found]
    if not config.allow_missing or not entries or not absent:
        return []  # else each case says what it lacks
    others = " ".join(name for name in config.modalities if name in found)
    remedy = f"Use --data.modalities {others}, or correct" if others else "Correct"
    return [
        Problem(
            "all cases",
            None,
            f"a modality must be there in some case; got no '{name}' in any of {len(entries)}, "
            f"looked for {entries[0].looked_for[name]}. {remedy} the names "
            "of its files or channels.",
        )
        for name in absent
    ]


def unused_files(case_id: str, unused: Iterable[Path], known: str) -> list[Problem]:
    """A warning of the volumes of a case that nothing reads, if there are some."""
    names = sorted(path.name for path in unused)
    if not names:
        return []
    return [
        Problem(
            case_id,
            None,
            f"every volume of a case should be used; got {', '.join(names[:5])}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}, of which nothing is read. "
            f"Rename it if it is one of {known}, put several findings into one file, or take it "
            "out of the folder.",
            "warning",
        )
    ]


def check_entry(entry: CaseFiles, config: DataConfig) -> list[Problem]:
    """What is wrong with the list of a case's files: those that are missing or too many."""
    return [*entry.problems, *_missing(entry, config)]


def _missing(entry: CaseFiles, config: DataConfig) -> Iterator[Problem]:
    present = [name for name in config.modalities if name in entry.images]
    hint = f" {entry.hint}." if entry.hint else ""
    for name in config.modalities:
        if name in entry.images or (config.allow_missing and present):
            continue
        remedy = "Remove the case"
        if present:
            remedy += (
                f", use --data.modalities {' '.join(present)} or pass --data.allow-missing True"
            )
        yield Problem(
            entry.case_id,
            None,
            f"a case must have every modality; got no '{name}', looked for "
            f"{entry.looked_for[name]}. {remedy}.{hint}",
        )
    if entry.label is None:
        yield Problem(
            entry.case_id,
            None,
            f"a case must have a label for the target '{config.target}'; got none, looked for "
            f"{entry.looked_for['label']}. Add the file (all zeros if there is no "
            f"{config.target}), remove the case or choose another --data.target.{hint}",
        )

    if config.preprocess.centre == "gland" and entry.gland is None:
        yield Problem(
            entry.case_id,
            None,
            "a crop around the gland needs a mask of the gland in every case; got none, looked for "
            f"{entry.looked_for.get('gland', 'one in this layout, which has no place for it')}. "
            "Add the mask, or use --data.preprocess.centre=image.",
        )
