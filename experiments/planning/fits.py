"""Which batches and crops fit into the memory of a device?

``python -m experiments.plan --table=True`` prints it. It compiles the training step for one and for
two examples on each device and reads XLA's account: no step is made, and nothing
but the weights is allocated. Memory grows with the voxels of a batch in a straight line: the table
tells how large a batch may be for crops around the one asked for, and the answer for that one is
compiled as a check.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmsad_jax.types import ConfigError, Device
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log
from experiments.settings.config import Config, window
from experiments.training import memory
from experiments.training.compiled import shapes_of_batch, shapes_of_state
from experiments.training.feed import DEVICE_SHARE
from experiments.training.memory import GIB
from experiments.training.programs import compile_programs

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""In-plane sides of the crops in the table, relative to those asked for."""


@dataclasses.dataclass(frozen=True)
class FitCommand:
    """Which batches and crops fit into the memory of a device.

    Any option of python -m experiments.cv may follow.
    """

    memory_gib: float | None = None
    """Memory of each device in GiB; by default what JAX may use of the device at hand."""
    share: float = 0.9
    """Part of it that a step may take; the rest is for prediction and for fragments."""


class Fit(NamedTuple):
    """The largest batch for a crop.

    Attributes:
        crop: ``d h w``.
        batch_size: over all devices; 0 if none fits.
        bytes: what it takes on each device; that of the smallest batch where none fits.
    """

    crop: tuple[int, int, int]
    batch_size: int
    bytes: int


def step_bytes(config: Config, devices: Sequence[Device]) -> int:
    """Memory of one training step on each device, by XLA's account; compiles it.

    Raises:
        ConfigError: if XLA does not tell, as under ``pmap``.
    """
    found = memory.estimate(
        compile_programs(config, devices).step.step,
        shapes_of_state(config),
        shapes_of_batch(config, config.train.batch_size),
    )
    if found is None:
        raise ConfigError(
            f"memory is known before a run under jit alone; got --parallel={config.parallel}. "
            "Use --parallel=jit."
        )
    return found.bytes


def table(config: Config, devices: Sequence[Device], limit: float) -> list[Fit]:
    """The largest batch for crops around the one asked for, by a line through two compilations."""
    unit = _unit(config, devices)
    one, two = (step_bytes(_with_batch(config, n * unit), devices) for n in (1, 2))
    voxels = int(np.prod(window(config)))
    slope = max((two - one) / voxels, 1e-9)
    fixed = one - slope * voxels
    rows = []
    for crop in crops(config):
        of_crop = int(np.prod(crop[-len(window(config)) :]))
        units = max(int((limit - fixed) / (slope * of_crop)), 0)
        rows.append(Fit(crop, units * unit, round(fixed + slope * of_crop * max(units, 1))))
    return rows


def crops(config: Config) -> list[tuple[int, int, int]]:
    """Crops of other sides in plane that the stages divide, none larger than a stored case."""
    depth, *sides = config.train.crop
    factors = np.prod([stride[-2:] for stride in config.network.encoder.strides], axis=0)
    found = {config.train.crop}
    for scale in SCALES:
        height, width = (
            max(round(side * scale / factor), 1) * int(factor)
            for side, factor in zip(sides, factors, strict=True)
        )
        if height <= config.data.preprocess.size[1] and width <= config.data.preprocess.size[2]:
            found.add((depth, height, width))
    return sorted(found)


def _unit(config: Config, devices: Sequence[Device]) -> int:
    """The smallest batch: an example for each device and each part of an accumulated step."""
    return len(devices) * config.train.accumulation


def _with_batch(config: Config, batch_size: int) -> Config:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch_size)
    )


def run(command: FitCommand, config: Config) -> list[Fit]:
    """Print the table, and the batch size for the crop asked for after compiling it.

    Raises:
        ConfigError: a memory that is not known, or a share that is none.
    """
    if not 0 < command.share <= 1:
        raise ConfigError(
            f"share must be above 0 and at most 1; got {command.share}. Use --share=0.9."
        )
    devices = select_accelerator(config.accelerator)
    limit = memory.limit_bytes(devices[0])
    if command.memory_gib is not None:
        limit = command.memory_gib * GIB
    if limit is None:
        raise ConfigError(
            f"the memory of a device must be known; {devices[0].platform} has no limit of its own. "
            "Use --memory-gib=16."
        )
    allowed = command.share * limit
    log(
        f"{config.preset}, {config.network.dtype}, {len(devices)} x {devices[0].platform}: a step "
        f"may take {allowed / GIB:.2f} of {limit / GIB:.2f} GiB"
    )
    if config.data.residency != "host":
        log(
            f"Cases that are kept on the device come on top, at most {DEVICE_SHARE:.0%} of its "
            "memory: --data.residency=host keeps none there."
        )
    rows = table(config, devices, allowed)
    asked = next(row for row in rows if row.crop == config.train.crop)
    needed = None
    while asked.batch_size:
        needed = step_bytes(_with_batch(config, asked.batch_size), devices)
        if needed <= allowed:
            break
        units = asked.batch_size // _unit(config, devices)  # the line was too low
        units = min(units - 1, int(units * allowed / needed))
        asked = asked._replace(batch_size=units * _unit(config, devices))
    log(format_table(rows))
    crop = " ".join(map(str, asked.crop))
    if needed is None or not asked.batch_size:
        log(
            f"No example of {crop} fits. Use --network.rematerialize=True, a smaller crop of the "
            "table, or narrower --network.encoder.channels."
        )
    else:
        log(f"--train.batch-size={asked.batch_size} takes {needed / GIB:.2f} GiB (compiled).")
    return [asked if row.crop == asked.crop else row for row in rows]


def format_table(rows: Sequence[Fit]) -> str:
    """The table in Markdown."""
    lines = ["| crop | largest batch | GiB |", "|---|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {' '.join(map(str, row.crop))} | {row.batch_size or 'none'} "
            f"| {row.bytes / GIB:.2f} |"
        )
    return "\n".join(lines)
