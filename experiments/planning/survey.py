"""A plan for a data set and a device: reads the files, asks the compiler."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.building import fingerprints
from data_pipelines.building.builders import open_builder
from data_pipelines.building.case_builder import CaseBuilder
from data_pipelines.config import PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing.fingerprint import Fingerprint
from data_pipelines.serving import splits
from experiments.planning import chips, fits, planner, record
from experiments.planning.record import Plan
from experiments.process.accelerator import keep_compiled, select_accelerator
from experiments.process.chips import absent_devices
from experiments.settings.config import Config

UNPLANNED = PreprocessConfig()
"""Grid under which the fingerprint of a data set is kept: it does not depend on one."""


def plan_for(
    asked: Config,
    given: Mapping[str, Any],
    *,
    chip: str | None = None,
    chips_count: int = 1,
    memory_gib: float | None = None,
    compiling: bool | None = None,
) -> Plan:
    """Measure the data, choose the device, make the plan.

    Args:
        asked: data, folds, accelerator.
        given: values by hand, by field.
        chip: one of ``chips.CHIPS`` that is not at hand; None is the device at hand.
        chips_count: how many of these.
        memory_gib: instead of that of the device.
        compiling: ask the compiler for the memory of a step; None does for the device at hand.

    Raises:
        ConfigError, DataError: nothing to plan for, or nothing that fits.
    """
    data = dataclasses.replace(asked.data, preprocess=UNPLANNED, allow_missing=True)
    builder = open_builder(data)
    found = fingerprints.take(builder)
    if not any(case.positive for case in found.cases):
        raise DataError(
            f"a plan needs a case that holds the target {data.target}; got none among "
            f"{len(found.cases)}. Look at the label files with python -m data_pipelines.validate, "
            "or correct --data.target."
        )
    folds = folds_of(asked, found, given)
    if chip is not None:
        device, compiled = chips.absent(chip, memory_gib, chips_count), None
        if compiling:
            absent = absent_devices(chip, chips_count)
            compiled = lambda config: fits.step_bytes(config, absent)  # noqa: E731
    else:
        devices = select_accelerator(asked.accelerator)
        if asked.compilation_cache:
            keep_compiled(asked.data.cache / "compiled")
        device = chips.at_hand(devices, memory_gib)
        compiled = (
            (lambda config: fits.step_bytes(config, devices)) if compiling is not False else None
        )
    plan = planner.make(found, folds, asked, given, device, compiled)
    return dataclasses.replace(plan, notes=(*plan.notes, *_grid_cost(builder, found, plan, asked)))


def folds_of(asked: Config, found: Fingerprint, given: Mapping[str, Any]) -> splits.Folds:
    """The folds of the run, whose training patients' statistics may be used."""
    if asked.folds_file is not None:
        return splits.load_published(asked.folds_file, found.infos)
    if asked.group_by is not None:
        return splits.group_folds(found.infos, group=asked.group_by)
    patients = len({case.patient_id for case in found.cases})
    if patients < 2:
        raise DataError(
            f"a plan needs patients to train on and others to validate; got {patients} patient. "
            "Add patients, or say in patients.csv who is whose."
        )
    count = given.get("num_folds", max(2, min(5, patients)))
    return splits.make_folds(found.infos, num_folds=count, seed=asked.seed)


def _grid_cost(builder: CaseBuilder, found: Fingerprint, plan: Plan, asked: Config) -> list[str]:
    """What the way to the grid and back costs in Dice; on one twice as fine in plane, too."""
    positives = [case.case_id for case in found.cases if case.positive]
    if not positives:
        return []
    config = record.applied(plan.base, plan.values, asked)
    asked_grid = config.data.preprocess
    (d, h, w), (depth, height, width) = asked_grid.spacing_mm, asked_grid.size
    finer = dataclasses.replace(
        asked_grid, spacing_mm=(d, h / 2, w / 2), size=(depth, 2 * height, 2 * width)
    )
    grids = [dataclasses.replace(config.data, preprocess=grid) for grid in (asked_grid, finer)]
    dice = fingerprints.grid_cost(builder, grids, positives)
    if not all(dice):
        return []
    said = [
        f"{sum(of_grid) / len(of_grid):.3f} at "
        f"{' x '.join(f'{mm:g}' for mm in grid.preprocess.spacing_mm)} mm"
        for of_grid, grid in zip(dice, grids, strict=True)
    ]
    return [
        f"note: labels taken to the grid and back keep a Dice of {said[0]} ({len(dice[0])} "
        f"cases), which no network can exceed; {said[1]}."
    ]
