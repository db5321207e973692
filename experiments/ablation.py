"""The ablation of docs/method.md, section 8, baselines of the field, and sweeps over any field.

``python -m experiments.ablation --preset=quick`` trains every row on the same folds with the same
seeds and steps, one run folder of ``experiments.cv`` for each row and seed, and compares them.
Further options are those of ``experiments.cv`` and hold for all rows, ``--sweep`` adds rows:

    python -m experiments.ablation --data.name=picai --data.path=/data/picai
    python -m experiments.ablation --rows full --sweep loss.attention.exponent=1,4 loss.stages="1 2"
    python -m experiments.ablation --rows slice2d csam cat

What is done is not done again: the same command continues, and one with more rows or seeds trains
those alone. The table is written after each row, and holds what the last command asked for. On a
processor several runs are trained at a time (``experiments.studies.jobs``).
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from cmsad_jax.modules import baselines
from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.serving import loading, splits
from data_pipelines.short_help import program
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log, run_main
from experiments.run_folder import RunFolder
from experiments.settings.command_line import complete, parse
from experiments.settings.config import Config, DistributedConfig, refuse_all, window
from experiments.settings.options import REGISTRY
from experiments.settings.presets import PRESETS
from experiments.settings.systems import OF_ITS_OWN_SIZE, SYSTEMS
from experiments.studies import jobs
from experiments.studies.ablation_table import (
    FULL,
    LATE,
    AblationTable,
    Variant,
    folder_of_row,
    format_table,
    summarise_row,
    write_table,
)
from experiments.studies.averaging import average_runs

_NO_DISTILLATION: Mapping[str, object] = {
    "loss.cross_modal_weight": 0.0,
    "loss.self_weight": 0.0,
    "loss.label_weight": 0.0,
    "loss.fused_weight": 0.0,
    "loss.average_weight": 0.0,
    "loss.average_output_weight": 0.0,
    "loss.correlation_weight": 0.0,
}

ROWS: dict[str, Mapping[str, object]] = {
    FULL: {},
    "scff": _NO_DISTILLATION,
    "cmsad": {"network.fusion.kind": "concat", "loss.correlation_weight": 0.0},
    "concat": {"network.fusion.kind": "concat", **_NO_DISTILLATION},
    "attention-gated": {"network.fusion.kind": "attention", **_NO_DISTILLATION},
    "early-unet": {"network": baselines.unet, **_NO_DISTILLATION},
    "early-resenc": {"network": baselines.residual_encoder_unet, **_NO_DISTILLATION},
}
"""What each row changes in the configuration; a function replaces the field by its result. One row
for each modality by itself, and their average (late fusion), are added to these; the systems of
``experiments.settings.systems``, without distillation, where they are asked for."""

_PRESETS: dict[str, tuple[tuple[int, ...], dict[str, list[str]]]] = {
    "quick": ((0,), {"--folds": ["0", "1"], "--train.steps": ["110"]}),
    "full": ((1, 2, 3), {"--train.steps": ["160"]}),
}
"""Seeds and, for ``--config=small``, options. Seed 0 is for development: it is never reported."""


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Train and compare every row of the ablation.

    Any option of python -m experiments.cv may follow, and holds for all rows.
    """

    preset: Literal["quick", "full"] = "full"
    """How much is run; quick: one seed, two folds, few steps; full: three seeds, all folds."""
    config: str = "small"
    """Preset of experiments.cv to start from: small, light, volume3d or slice2d."""
    output: Path = Path("runs/ablation")
    """Folder of the runs and of the table."""
    seeds: tuple[int, ...] | None = None
    """Seeds of weights, sampling and augmentation, not of the folds. By default the preset's."""
    rows: tuple[str, ...] | None = None
    """Rows to run; by default all of the method. The full model, tested against, always is."""
    sweep: tuple[str, ...] = ()
    """Further rows, each the full model with one field changed: field=value,value,..."""
    jobs: int | None = None
    """Runs at a time; by default one for each core and 4 GiB of memory, on accelerators 1."""
    match_parameters: bool = True
    """Scale the widths of each network so that all have about as many weights as the full one."""


def variants(base: Config, options: Sequence[str], command: AblationConfig) -> list[Variant]:
    """The rows that are trained, the full model first.

    Args:
        base: the full model.
        options: the command line that gave ``base``, to which a sweep adds.
        command: which rows, and whether parameters are matched.

    Raises:
        ConfigError: an unknown row, or a sweep that is not ``field=value,...``.
    """
    table = dict(ROWS)
    singles = {f"{name}-alone": name for name in base.data.modalities}
    if len(singles) > 1:
        for row, name in singles.items():
            table[row] = {"data.modalities": (name,), **_NO_DISTILLATION}
    default = [*table, *([LATE] if len(singles) > 1 else [])]
    names = [*default, *SYSTEMS]
    asked = list(default if command.rows is None else command.rows)
    if unknown := [row for row in asked if row not in names]:
        raise ConfigError(
            f"rows must be among {', '.join(names)}; got {', '.join(unknown)}. "
            "Name existing rows after --rows."
        )
    if LATE in asked:
        asked += singles
    found = [
        Variant(row, complete(_changed(base, table[row])))
        for row in table
        if row == FULL or row in asked
    ]
    found += [
        Variant(
            row,
            complete(_changed(system(base), {} if row in OF_ITS_OWN_SIZE else _NO_DISTILLATION)),
        )
        for row, system in SYSTEMS.items()
        if row in asked
    ]
    found += [
        Variant(f"{field}={value}", parse([*options, f"--{field}", *value.split()]))
        for field, value in _swept(command.sweep)
    ]
    if not command.match_parameters:
        return found
    target = baselines.count_parameters(found[0].config.network, window(base))
    return [
        variant
        if variant.name in OF_ITS_OWN_SIZE
        else dataclasses.replace(
            variant,
            config=dataclasses.replace(
                variant.config,
                network=baselines.match_parameters(
                    variant.config.network, target, window(variant.config)
                ),
            ),
        )
        for variant in found
    ]


def _swept(sweep: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for entry in sweep:
        field, equals, values = entry.partition("=")
        if not field or not equals or not values:
            raise ConfigError(
                f"a sweep must be field=value,value,...; got {entry!r}. "
                "Use --sweep loss.attention.exponent=1,2,4."
            )
        pairs += [(field.replace("_", "-"), value) for value in values.split(",")]
    return pairs


def _changed(config: Config, changes: Mapping[str, object]) -> Config:
    for path, value in changes.items():
        config = _with_field(config, path.split("."), value)
    return config


def _with_field(config: Any, path: Sequence[str], value: object) -> Any:
    old = getattr(config, path[0])
    if len(path) > 1:
        value = _with_field(old, path[1:], value)
    elif callable(value):
        value = value(old)
    return dataclasses.replace(config, **{path[0]: value})


def run(command: AblationConfig, options: Sequence[str]) -> AblationTable:
    """Run what is not done, and write ``ablation.json`` and ``ablation.md``; returns the table."""
    base, seeds = base_of(command, options)
    devices = select_accelerator(base.accelerator)
    rows = variants(base, _cv_options(command, options), command)
    from experiments.studies import cross_validation  # slow to load, and not needed for --help

    source = loading.build(base.data)
    refuse_lacking_modalities(rows, source)
    folds_file = keep_folds(command.output, cross_validation.make_folds(base, source))
    configs = [
        dataclasses.replace(
            variant.config,
            seed=seed,
            output=folder_of_row(command.output, variant.name, seed),
            folds_file=folds_file,
            group_by=None,
        )
        for variant in rows
        for seed in seeds
    ]
    to_do = [config for config in configs if not jobs.is_done(config)]
    log(f"{len(rows)} rows, {len(seeds)} seeds: {len(configs)} runs, {len(to_do)} of them to do")

    wanted = command.rows is None or LATE in command.rows
    fused = wanted and len(base.data.modalities) > 1

    def done(folder: Path) -> str:
        write_table(command.output, rows, seeds, late_fusion=fused)
        entry = summarise_row([RunFolder(folder).read_results().summary])
        dice = "undefined" if entry.dice is None else f"{entry.dice:.3f}"
        return f"{folder}: Dice {dice}, {entry.num_cases} cases"

    jobs.run_all(to_do, command.jobs, devices[0].platform, done)
    if fused:
        for seed in seeds:
            late_fusion(command.output, base, source, seed)
    table = write_table(command.output, rows, seeds, late_fusion=fused)
    log(format_table(table))
    return table


def refuse_lacking_modalities(rows: Sequence[Variant], source: loading.CaseSource) -> None:
    """Raise ``DataError`` if a case has none of the modalities of a row, before any is trained."""
    if not rows[0].config.data.allow_missing:
        return
    names = np.array(rows[0].config.data.modalities)
    present = {
        case.case_id: {*names[case.present]} for case in loading.eval_cases(source, source.case_ids)
    }
    for row in rows:
        lacking = [case for case, has in present.items() if not has & {*row.config.data.modalities}]
        if lacking:
            raise DataError(
                f"every case must have a modality of every row, which all have the same cases; got "
                f"{len(lacking)} of {len(present)} cases, the first {lacking[0]}, without those of "
                f"{row.name}. Leave this row out (and {LATE}) by naming others after --rows."
            )


def base_of(command: AblationConfig, options: Sequence[str]) -> tuple[Config, tuple[int, ...]]:
    """The full model's configuration, and the seeds."""
    base = parse(_cv_options(command, options))
    if base.distributed != DistributedConfig():
        raise ConfigError(
            f"an ablation runs in one process; got {base.distributed}. "
            "Leave out --distributed.launcher and its like; rows run on several machines by --rows."
        )
    refuse_all(base, "an ablation")
    return base, command.seeds or _PRESETS[command.preset][0]


def _cv_options(command: AblationConfig, options: Sequence[str]) -> list[str]:
    """Options for ``experiments.cv``: those of the preset where none was given, then the rest."""
    presets = [name for name in PRESETS if name != "auto"]
    if command.config not in presets:
        raise ConfigError(
            f"config must be one of {', '.join(presets)}; got {command.config!r}. "
            "Use --config=small."
        )
    given = {option.split("=")[0] for option in options}
    added = _PRESETS[command.preset][1] if command.config == "small" else {}
    preset = [part for name, value in added.items() if name not in given for part in (name, *value)]
    return [f"--preset={command.config}", *preset, *options]


def keep_folds(output: Path, folds: splits.Folds) -> Path:
    """Write the folds that all rows share, or check that they are those of the earlier rows."""
    path = RunFolder(output).folds
    if path.exists() and splits.Folds.load(path).sha256 != folds.sha256:
        raise ConfigError(
            f"an ablation compares rows on the same folds; those of {output} are others. "
            "Name another folder with --output, or restore data and options."
        )
    folds.save(path)
    return path


def late_fusion(output: Path, base: Config, source: loading.CaseSource, seed: int) -> None:
    """Average the probabilities of the single-modality rows, and evaluate that as a run."""
    singles = [
        RunFolder(folder_of_row(output, f"{name}-alone", seed)) for name in base.data.modalities
    ]
    average_runs(singles, RunFolder(folder_of_row(output, LATE, seed)), base, source)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, options = tyro.cli(
        AblationConfig,
        prog=program("experiments.ablation"),
        args=arguments,
        return_unknown_args=True,
        registry=REGISTRY,
    )
    run(command, options)


if __name__ == "__main__":
    run_main(main)
