"""From a folder of images and a device to a plan: printed with its reasons, and kept.

``python -m experiments.plan --data.path=...`` takes the options of ``experiments.cv``. It measures
the data set, applies the rules of ``experiments.planning.rules``, asks the compiler which training
step fits, and writes ``plan.json``, which may be edited and given back with ``--plan``.
``python -m experiments.cv --preset=auto`` does the same before it trains.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from cmsad_jax.types import ConfigError
from data_pipelines.short_help import program
from experiments.process.console import log, run_main
from experiments.settings import command_line
from experiments.settings.options import REGISTRY


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Plan a run from the data set and the device, and say why.

    Any option of python -m experiments.cv may follow; what is given stays as it is.
    """

    write: Path = Path("plan.json")
    """File for the plan."""
    chip: str | None = None
    """Plan for a chip that is not at hand, such as h100, a100-40, t4 or v5e."""
    chips: int = 1
    """How many of them."""
    memory_gib: float | None = None
    """Memory of each device in GiB; by default that of the device at hand or the chip's."""
    compile: bool | None = None
    """Compile the step to see what fits; without it, or by default for --chip, it is estimated."""
    table: bool = False
    """Print, for the plan or a preset, the largest batch for crops around its own."""


def run(command: PlanCommand, options: Sequence[str]) -> None:
    """Plan, print and write; or print the table of what fits.

    Raises:
        ConfigError, DataError: nothing to plan for, or nothing that fits.
    """
    if command.chip is None and command.chips != 1:
        raise ConfigError(
            f"a number of chips goes with their name; got --chips={command.chips} and no --chip. "
            "Use --chip=v5e, or leave --chips out: the devices at hand are counted."
        )
    from experiments.planning import configure, record

    preset = command_line.typed(options, "preset")
    if command.table and preset not in (None, "auto"):
        config = command_line.parse(options)
    else:
        asked = configure.asked_for(options)
        plan = configure.planned(
            asked,
            configure.given_values(asked, options),
            chip=command.chip,
            chips_count=command.chips,
            memory_gib=command.memory_gib,
            compiling=command.compile,
        )
        record.write(plan, command.write)
        log(f"{command.write}: follow it with python -m experiments.cv --plan={command.write}")
        config = configure.followed(plan, asked, options)
    if command.chip is not None and command.compile:
        from experiments.planning import forecast

        log(forecast.in_words(config, command.chip, command.chips))
    if command.table:
        from experiments.planning import fits  # loads what reads files

        fits.run(fits.FitCommand(command.memory_gib), config)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    command, options = tyro.cli(
        PlanCommand,
        prog=program("experiments.plan"),
        args=list(sys.argv[1:] if argv is None else argv),
        return_unknown_args=True,
        registry=REGISTRY,
        config=(tyro.conf.FlagConversionOff,),
    )
    run(command, options)


if __name__ == "__main__":
    run_main(main)
