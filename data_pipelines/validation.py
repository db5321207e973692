"""What is wrong with a user's files, said before a voxel is read and for all cases at once."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_pipelines.case import DataConfig, DataError
from data_pipelines.preprocessing import REFERENCE, overlap_fault, overlaps
from data_pipelines.volume_io import Grid, read_grid

_CASE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One fault of one case; its text is rule, what came, remedy.

    Attributes:
        case_id: the case at fault.
        file: the file at fault, if it is one file's fault.
        text: the rule, what came, and the remedy.
    """

    case_id: str
    file: Path | None
    text: str

    def __str__(self) -> str:
        return f"{self.case_id}: {self.text}"


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
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Path]
    label: Path | None
    looked_for: Mapping[str, str]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


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


def check_files(entries: Sequence[CaseFiles], config: DataConfig) -> list[Problem]:
    """Bad ids, missing files, unreadable headers, grids that do not overlap: all of them."""
    problems = check_ids(entry.case_id for entry in entries)
    for entry in entries:
        problems += entry.problems
        problems += _missing(entry, config)
        problems += _bad_grids(entry)
    return problems


def _missing(entry: CaseFiles, config: DataConfig) -> Iterator[Problem]:
    present = [name for name in config.modalities if name in entry.images]
    for name in config.modalities:
        if name in entry.images or (config.allow_missing and present):
            continue
        remedy = "Remove the case"
        if present:
            remedy += f", use --data.modalities {' '.join(present)} or pass --data.allow-missing"
        yield Problem(
            entry.case_id,
            None,
            f"a case must have every modality; got no '{name}', looked for "
            f"{entry.looked_for[name]}. {remedy}.",
        )
    if entry.label is None:
        yield Problem(
            entry.case_id,
            None,
            f"a case must have a label for the target '{config.target}'; got none, looked for "
            f"{entry.looked_for['label']}. Add the file (all zeros if there is no "
            f"{config.target}), remove the case or choose another --data.target.",
        )


def _bad_grids(entry: CaseFiles) -> Iterator[Problem]:
    files = dict(entry.images)
    if entry.label is not None:
        files["label"] = entry.label
    grids: dict[str, Grid] = {}
    for name, path in files.items():
        try:
            grids[name] = read_grid(path)
        except DataError as error:
            yield Problem(entry.case_id, path, str(error))
    if not grids:
        return
    base = grids[REFERENCE if REFERENCE in grids else next(iter(grids))]
    for name, grid in grids.items():
        if not overlaps(grid.shape, grid.affine, base.shape, base.affine):
            text = overlap_fault(name, grid.affine, base.affine)
            yield Problem(entry.case_id, files[name], f"{text} The file: {files[name]}.")
