"""Say everything that is wrong with a data set before anything is built or trained.

``python -m data_pipelines.validate --data.name=picai --data.path=/data/picai`` reads all cases,
prints one table of all problems and the fingerprint of the data set, and writes a contact sheet.
The exit status is 0 if the data set can be built, and 2 if its errors keep it from that. What was
read is kept in ``data.cache``, so that building continues from there.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data_pipelines import command_line, faults
from data_pipelines.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is validated."""

    data: DataConfig = DataConfig()
    num_workers: int | None = None
    """Processes that read the cases; by default one for a small data set, else one for each CPU."""
    output: Path | None = None
    """Folder for the contact sheet; by default runs/validate-<name>-<target>."""


def main(arguments: Arguments) -> int:
    """Print and write the findings; the exit status."""
    from data_pipelines.building import (  # slow to load, and not needed for --help
        builders,
        validation,
    )
    from data_pipelines.preparing import contact_sheet, examination
    from data_pipelines.reading import layout

    config = layout.resolved(arguments.data, print)
    builder = builders.open_builder(config)
    findings = validation.validate(builder, num_workers=arguments.num_workers)
    print(examination.fingerprint(findings.facts, config))
    folder = arguments.output or Path("runs") / f"validate-{config.name}-{config.target}"
    if findings.tiles:
        for path in contact_sheet.write_sheets(findings.tiles, folder):
            print(f"contact sheet: {path}")
    print(validation.summary(findings))
    if findings.problems:
        print(faults.format_table(findings.problems))
        print(f"each of them: {_write_problems(findings.problems, folder / 'problems.csv')}")
    return 2 if findings.num_errors else 0


def _write_problems(problems: Sequence[faults.Problem], path: Path) -> Path:
    """All problems, one a row, where the table gathers those that are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["level", "case", "file", "rule", "what came", "remedy"])
        for p in sorted(problems, key=lambda p: (p.level, p.case_id)):
            rows.writerow([p.level, p.case_id, p.file or "", p.rule, p.came, p.remedy])
    return path


if __name__ == "__main__":
    command_line.run(
        main,
        Arguments,
        module="data_pipelines.validate",
        description="Say everything that is wrong with a data set.",
    )
