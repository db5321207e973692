"""The report of a run folder: ``report.html``, one file that needs nothing else, and ``report.md``.

``python -m experiments.report RUN`` writes both anew from what the folder holds: the results, the
training curves and pictures of cases. Both hold the same facts; charts and pictures are in the
HTML alone. A run with some folds missing is reported as such.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from data_pipelines.short_help import program
from experiments.process.console import run_main
from experiments.run_folder import RunFolder
from experiments.settings.config import ReportConfig


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Write report.html and report.md of a run folder anew."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder of python -m experiments.cv."""
    report: ReportConfig = ReportConfig()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    config = tyro.cli(ReportCommand, prog=program("experiments.report"), args=argv)
    from experiments.reporting import page  # slow to load, and not needed for --help

    print(page.write_report(RunFolder(config.run), config.report))


if __name__ == "__main__":
    run_main(main)
