"""Say everything that is wrong with a data set before anything is built or trained.

``python -m data_pipelines.validate --data.name=picai --data.path=/data/picai`` reads all cases,
prints one table of all problems and the fingerprint of the data set, and writes a contact sheet.
The exit status is 0 if the data set can be built, and 2 if its errors keep it from that. What was
read is kept in ``data.cache``, so that building continues from there.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipelines import command_line, faults
from data_pipelines.building.case_builder import CaseBuilder
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing import contact_sheet, examination
from data_pipelines.serving import loading


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is validated."""

    data: DataConfig = DataConfig()
    num_workers: int | None = None
    """Processes that read the cases; by default one for a small data set, else one for each CPU."""
    output: Path | None = None
    """Folder for the contact sheet; by default runs/validate-<name>-<target>."""


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
    config: DataConfig, log: Callable[[str], None], *, num_workers: int | None = None
) -> None:
    """Validate a data set before it is built for a run; one that is built passes at once.

    Args:
        config: the data set.
        log: prints warnings.
        num_workers: processes that read the cases; None chooses.

    Raises:
        DataError: all problems, if there is an error among them.
    """
    builder = loading.open_builder(config)
    if builder.is_prepared():
        return
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


def main(arguments: Arguments) -> int:
    """Print and write the findings; the exit status."""
    config = arguments.data
    findings = validate(loading.open_builder(config), num_workers=arguments.num_workers)
    print(examination.fingerprint(findings.facts, config))
    if findings.tiles:
        folder = arguments.output or Path("runs") / f"validate-{config.name}-{config.target}"
        for path in contact_sheet.write_sheets(findings.tiles, folder):
            print(f"contact sheet: {path}")
    print(summary(findings))
    if findings.problems:
        print(faults.format_table(findings.problems))
    return 2 if findings.num_errors else 0


if __name__ == "__main__":
    command_line.run(
        main,
        Arguments,
        module="data_pipelines.validate",
        description="Say everything that is wrong with a data set.",
    )
