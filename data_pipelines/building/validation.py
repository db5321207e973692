"""All that is wrong with a data set, gathered before anything is built or trained."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from data_pipelines import faults
from data_pipelines.building.case_builder import CaseBuilder
from data_pipelines.faults import DataError
from data_pipelines.preparing import contact_sheet, examination


class Findings(NamedTuple):
    """What a validation found.

    Attributes:
        problems: errors and warnings of all cases.
        facts: of each case that could be read, by its id.
        tiles: a picture of each case that could be preprocessed.
        num_cases: how many cases there are.
    """

    problems: list[faults.Problem]
    facts: dict[str, examination.Facts]
    tiles: list[contact_sheet.Tile]
    num_cases: int

    @property
    def num_errors(self) -> int:
        """How many problems keep the data set from being built."""
        return sum(problem.level == "error" for problem in self.problems)


def validate(builder: CaseBuilder, *, num_workers: int | None = None) -> Findings:
    """Read all cases of a data set and gather what is to be said of them."""
    found = builder.examine_all(_kept, num_workers=num_workers, description="Validating")
    facts = {case.case_id: case.facts for case, _ in found if case.facts is not None}
    problems = builder.check_list()
    problems += [problem for case, _ in found for problem in case.problems]
    problems += examination.duplicates(facts)
    tiles = [tile for _, tile in found if tile is not None]
    return Findings(problems, facts, tiles, len(builder.entries))


def check(
    builder: CaseBuilder, log: Callable[[str], None], *, num_workers: int | None = None
) -> None:
    """Validate a data set before it is built for a run; one that is built passes at once.

    Args:
        builder: of the data set.
        log: prints warnings.
        num_workers: processes that read the cases; None chooses.

    Raises:
        DataError: all problems, if there is an error among them.
    """
    if builder.is_prepared():
        return
    builder.must_be_storable()
    count = len(builder.entries)
    cases = f"{count} case" + ("" if count == 1 else "s")
    log(f"reading {cases} of {builder.name}; what is built is kept for later runs")
    findings = validate(builder, num_workers=num_workers)
    table = faults.format_table(findings.problems)
    if findings.num_errors:
        raise DataError(f"{summary(findings)}\n{table}")
    if table:
        log(f"{summary(findings)}\n{table}")


def summary(findings: Findings) -> str:
    """One line: how many cases, errors and warnings."""
    errors = findings.num_errors
    return (
        f"{'the data set cannot be built' if errors else 'the data set can be built'}; "
        f"cases: {findings.num_cases}, errors: {errors}, "
        f"warnings: {len(findings.problems) - errors}."
    )


def _kept(found: examination.Examination):
    """What is kept of an examined case: all but its arrays, and a picture of these."""
    tile = contact_sheet.make_tile(found.case) if found.case is not None else None
    return dataclasses.replace(found, case=None), tile
