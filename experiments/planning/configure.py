"""A run's configuration from its command line where a plan is made or followed."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmsad_jax.types import ConfigError
from data_pipelines.command_line import current_names
from data_pipelines.config import origin_of
from data_pipelines.short_help import CROSS_VALIDATION
from experiments.planning import record, rules
from experiments.planning.record import Plan
from experiments.process import hosts
from experiments.process.console import log
from experiments.settings import command_line
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS

_OF_NETWORK = "--network.encoder."


@dataclasses.dataclass(frozen=True)
class Planned:
    """A configuration, and the plan that it follows; none for a preset."""

    config: Config
    plan: Plan | None = None


def configure(
    arguments: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = CROSS_VALIDATION,
) -> Planned:
    """What ``command_line.parse`` gives, planned first where ``auto`` or a plan is asked for.

    Without a preset, data that are drawn are trained on with ``small``, and all others are planned
    for. A run folder that holds a plan is continued by it, whatever machine it is continued on, and
    one without a plan by ``small``.

    Raises:
        ConfigError, DataError: settings, data or a plan that cannot work.
    """
    arguments = current_names(sys.argv[1:] if arguments is None else arguments)
    preset, path = (command_line.typed(arguments, name) for name in ("preset", "plan"))
    if preset is None and path is None:
        asked = command_line.read(arguments, prog=prog, description=description)
        begun = _is_begun_without_plan(asked)
        if begun:
            log(
                f"{default_output(asked)} was begun without a plan, and goes on so; "
                "--preset=auto plans a new run"
            )
        if begun or origin_of(asked.data.name).synthetic:
            return Planned(command_line.complete(asked))
        log("no --preset: planned for these data and this device, as with --preset=auto")
    elif preset != "auto" and path is None:
        return Planned(command_line.parse(arguments, prog=prog, description=description))
    if preset not in (None, "auto"):
        raise ConfigError(
            f"a plan takes the place of a preset; got --plan and --preset={preset}. Drop one."
        )
    asked = asked_for(arguments, prog=prog, description=description)
    hosts.join(asked.distributed)  # before a device is looked at
    of_run = default_output(asked) / "plan.json"
    if path is not None:
        plan = record.read(Path(path))
    elif of_run.is_file():
        log(f"the plan is that of the run folder, {of_run}")
        plan = record.read(of_run)
    else:
        from data_pipelines.building.builders import open_builder  # slow, not needed for --help

        open_builder(asked.data).must_be_storable()  # before all files are measured
        plan = planned(asked, given_values(asked, arguments))
    return Planned(followed(plan, asked, arguments), plan)


def _is_begun_without_plan(asked: Config) -> bool:
    from experiments.run_folder import RunFolder  # slow to load, and not needed for --help

    folder = RunFolder(default_output(asked))
    return folder.config.is_file() and not folder.plan.is_file()


def asked_for(arguments: Sequence[str], **words: Any) -> Config:
    """What was typed, but for stages, whose number is not known yet."""
    kept, skipping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            skipping = argument.startswith(_OF_NETWORK)
        if not skipping:
            kept.append(argument)
    asked = command_line.read(kept, default=PRESETS["auto"], **words)
    from data_pipelines.reading.own_classes import with_own_classes  # reads files, --help does not

    return dataclasses.replace(asked, preset="auto", data=with_own_classes(asked.data))


def given_values(asked: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Values by hand of fields that are planned, but for those of stages."""
    fields = command_line.typed_fields(arguments)
    return {
        field: command_line.value_of(asked, field)
        for field in (*rules.OF_DATA, *BY_MEMORY, *rules.OF_TRAINING)
        if field in fields
    }


BY_MEMORY = ("train.crop", "train.batch_size", "train.accumulation", "network.rematerialize")
"""Planned fields that are found together."""


def planned(asked: Config, given: Mapping[str, Any], **options: Any) -> Plan:
    """A new plan for the data and the device of a configuration."""
    from experiments.planning import survey  # loads what reads files, which --help does not need

    started = time.perf_counter()
    plan = survey.plan_for(asked, given, **options)
    log(record.format_plan(plan))
    log(f"planned in {time.perf_counter() - started:.0f} s; plan {plan.sha256[:12]}")
    return plan


def followed(plan: Plan, asked: Config, arguments: Sequence[str]) -> Config:
    """The configuration that a plan asks for, with what was typed over it."""
    default = record.applied(plan.base, plan.values, asked)
    words = _without(arguments, ("preset", "plan"))
    config = command_line.read(words, default=default)
    return command_line.complete(dataclasses.replace(config, preset="auto"))


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
            continue
        name, equals, _ = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in options:
            skip = not equals
            continue
        kept.append(argument)
    return kept


def default_output(asked: Config) -> Path:
    """The run folder, as ``command_line.complete`` names it."""
    return asked.output or command_line.usual_output(asked)
