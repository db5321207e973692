"""Which batches and crops fit into the memory of a device: a part of ``experiments.plan`` now.

``python -m experiments.fit`` prints the table alone, as before, with a warning.
"""

import sys
import warnings
from collections.abc import Sequence

import tyro

from data_pipelines.short_help import program
from experiments.planning import fits
from experiments.process.console import run_main
from experiments.settings.command_line import parse
from experiments.settings.options import REGISTRY


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    command, options = tyro.cli(
        fits.FitCommand,
        prog=program("experiments.fit"),
        args=list(sys.argv[1:] if argv is None else argv),
        return_unknown_args=True,
        registry=REGISTRY,
    )
    warnings.warn(
        "python -m experiments.fit is python -m experiments.plan --table=True now; use that",
        FutureWarning,
        stacklevel=2,
    )
    fits.run(command, parse(options))


if __name__ == "__main__":
    run_main(main)
