"""The fingerprint of a data set, taken once for each state of its files."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.building import staging
from data_pipelines.building.case_builder import CaseBuilder
from data_pipelines.building.identity import code_sha256
from data_pipelines.case import RawCase
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.files import atomic_file, expanded
from data_pipelines.preparing import fingerprint
from data_pipelines.preparing.fingerprint import CaseFacts, Fingerprint

SCHEMA = 1
"""Version of the files in which fingerprints are kept."""


_WORTH_A_POOL = 40
"""Cases from which on processes are started: to measure one is little but reading it."""


@dataclasses.dataclass(frozen=True)
class _Measurer:
    """Measures cases one by one; picklable, as its builder is."""

    builder: CaseBuilder

    def examine_entry(self, entry: Any) -> tuple[str, CaseFacts | None, str]:
        """Case id, and the facts or why there are none."""
        try:
            raw = readable(self.builder, entry)
            return entry.case_id, fingerprint.measure(raw, self.builder.data_config), ""
        except DataError as error:
            return entry.case_id, None, str(error)


def readable(builder: CaseBuilder, entry: Any) -> RawCase:
    """What can be read of a case: one modality at least.

    Raises:
        DataError: there is none, or the label cannot be read.
    """
    raw, faults = builder.read_available(entry)
    unread = raw is not None and raw.label is None and "label" in builder.files(entry)
    if raw is None or not any(name in raw.images for name in builder.data_config.modalities):
        raise (
            faults[0]
            if faults
            else DataError(
                f"a case must have an image; got none of {entry.case_id}. Run "
                "python -m data_pipelines.validate with the same data options."
            )
        )
    if unread and faults:
        raise faults[0]
    return raw


def take(builder: CaseBuilder, *, num_workers: int | None = None) -> Fingerprint:
    """The facts of all cases; read from the cache if it has those of the same files.

    Args:
        builder: of the data set; the fingerprint does not depend on its reference grid, but is
            kept under its settings: use one and the same grid.
        num_workers: processes; None is one for a small data set, else one for each CPU.

    Raises:
        DataError: no case could be read.
    """
    kept = _file(builder)
    if (found := _load(kept)) is not None:
        return found
    if num_workers is None:
        num_workers = staging.default_workers(len(builder.entries), worth_a_pool=_WORTH_A_POOL)
    measured = staging.examine_all(
        _Measurer(builder),
        builder.sorted_entries,
        num_workers=num_workers,
        description=f"Measuring {builder.name}",
        keep=_whole,
    )
    cases = tuple(facts for _, facts, _ in measured if facts is not None)
    unreadable = {case_id: why for case_id, facts, why in measured if facts is None}
    if not cases:
        raise DataError(
            f"a plan needs at least one case that can be read; got none of {len(measured)}, the "
            f"first because: {next(iter(unreadable.values()), 'there is none')}"
        )
    found = Fingerprint(cases, unreadable)
    with atomic_file(kept) as partial:
        partial.write_text(
            json.dumps({"schema": SCHEMA, **dataclasses.asdict(found)}), encoding="utf-8"
        )
    return found


def _whole(measured: tuple[str, CaseFacts | None, str]) -> tuple[str, CaseFacts | None, str]:
    """All that was measured is kept."""
    return measured


def _file(builder: CaseBuilder) -> Path:
    code = code_sha256(Path(fingerprint.__file__))
    name = hashlib.sha256(f"{builder.state_sha256} {code}".encode()).hexdigest()[:16]
    cache = expanded(builder.data_config.cache, "--data.cache")
    return cache / builder.name / "fingerprints" / f"{name}.json"


def _load(path: Path) -> Fingerprint | None:
    """What ``take`` kept; None if there is nothing, or nothing that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return None
        cases = tuple(
            CaseFacts(**{k: _tuples(k, v) for k, v in case.items()}) for case in content["cases"]
        )
        return Fingerprint(cases, content["unreadable"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tuples(name: str, value: Any) -> Any:
    if name == "intensity":
        return {modality: tuple(numbers) for modality, numbers in value.items()}
    return tuple(value) if isinstance(value, list) else value


def grid_cost(
    builder: CaseBuilder, grids: Sequence[DataConfig], case_ids: Collection[str], *, most: int = 20
) -> list[tuple[float, ...]]:
    """``round_trip_dice`` of up to ``most`` of some cases, at even distances in their order.

    Args:
        builder: lists and reads the cases.
        grids: whose reference grids are asked about.
        case_ids: of cases that hold the target.
        most: cases that are read.
    """
    entries = [entry for entry in builder.sorted_entries if entry.case_id in {*case_ids}]
    step = max(len(entries) / most, 1)
    chosen = [entries[int(i * step)] for i in range(min(most, len(entries)))]
    found: list[list[float]] = [[] for _ in grids]
    for entry in chosen:
        raw = readable(builder, entry)
        for data, of_grid in zip(grids, found, strict=True):
            dice = fingerprint.round_trip_dice(raw, data)
            if dice is not None:
                of_grid.append(dice)
    return [tuple(of_grid) for of_grid in found]
