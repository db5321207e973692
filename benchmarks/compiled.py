"""What XLA makes of this project's programs for accelerators that are not at hand.

``python -m benchmarks.compiled --chips v5e:1 v5e:16 h100:4`` compiles the train step of the small
preset for each, and prints one table: compiled, not run. ``--presets``, ``--programs`` and
``--batch`` (examples on each chip) choose others; with ``--json FILE`` rows that stand there are
not compiled again. The compilers come with ``pip install "jax[tpu]"`` and ``pip install --no-deps
jax-cuda13-plugin jax-cuda13-pjrt``, each in the version of JAX, in an environment of its own. A
preset for volumes takes minutes of processor time a row; ``--effort=-1`` shortens it, at up to 1.75
times the estimate and 1.2 times the temporary memory.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered

from benchmarks import timing
from cmsad_jax import parallel
from cmsad_jax.types import ConfigError, Device
from experiments.process.chips import CHIPS, absent_devices
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS
from experiments.training.compiled import account, shapes_of_batch, shapes_of_state
from experiments.training.programs import compile_programs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    program: str
    preset: str
    dtype: str
    chip: str
    chips: int
    batch: int
    """Examples on each chip."""
    crop: str
    effort: float
    compile_s: float | None
    """None where XLA refuses; ``error`` then says why."""
    peak_gib: float | None = None
    """Arguments, results and everything between, on each chip."""
    temporary_gib: float | None = None
    tflop: float | None = None
    accessed_gb: float | None = None
    collectives: str = ""
    """Kind and megabytes."""
    gathers: int | None = None
    """Elements that are fetched one by one."""
    copies: float | None = None
    """Share of XLA's own estimate; of TPUs alone."""
    estimate_ms: float | None = None
    """Sum of XLA's estimated cycles at 1.5 GHz; of TPUs alone."""
    roofline_ms: float | None = None
    """Least time of a call by the data sheet of the chip."""
    run_h: float | None = None
    """Five folds of the preset's steps at that."""
    error: str = ""
    versions: str = ""


def _lowered(jitted: Any, state: Any, batch: Any, platform: str) -> Lowered:
    return jitted.trace(state, batch).lower(lowering_platforms=(platform,))


def _step(config: Config, devices: Sequence[Device], platform: str) -> Lowered:
    batch = shapes_of_batch(config, config.train.batch_size)
    step = compile_programs(config, devices).step.step
    return _lowered(step, shapes_of_state(config), batch, platform)


def _several(config: Config, devices: Sequence[Device], platform: str) -> Lowered:
    programs = compile_programs(config, devices)
    batch = shapes_of_batch(config, config.train.batch_size, programs.steps_per_call)
    assert programs.several is not None
    return _lowered(programs.several.step, shapes_of_state(config), batch, platform)


def _accumulated(config: Config, devices: Sequence[Device], platform: str) -> Lowered:
    train = dataclasses.replace(config.train, accumulation=2)
    return _step(dataclasses.replace(config, train=train), devices, platform)


def _rematerialized(config: Config, devices: Sequence[Device], platform: str) -> Lowered:
    network = dataclasses.replace(config.network, rematerialize=True)
    return _step(dataclasses.replace(config, network=network), devices, platform)


def _folds(config: Config, devices: Sequence[Device], platform: str) -> Lowered:
    count = len(devices)
    one = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=config.train.batch_size // count)
    )
    folds = dataclasses.replace(one, folds_at_once=count)
    step, _ = compile_programs(folds, devices).of_folds(count)
    stack = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree
    )
    batch = stack(shapes_of_batch(one, one.train.batch_size))
    return _lowered(step.step, stack(shapes_of_state(one)), batch, platform)


def _window(name: str) -> Callable[[Config, Sequence[Device], str], Lowered]:
    def lowered(config: Config, devices: Sequence[Device], platform: str) -> Lowered:
        mesh = parallel.data_mesh(devices)
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        program = getattr(compile_programs(config, devices), name)
        batch = shapes_of_batch(config, config.train.batch_size)
        return (
            jax.jit(program, in_shardings=(whole, split, split))
            .trace(shapes_of_state(config).params, batch["image"], batch["present"])
            .lower(lowering_platforms=(platform,))
        )

    return lowered


PROGRAMS: dict[str, Callable[[Config, Sequence[Device], str], Lowered]] = {
    "step": _step,
    "several steps": _several,
    "accumulated": _accumulated,
    "rematerialized": _rematerialized,
    "folds": _folds,
    "predict": _window("predict"),
    "attention": _window("attention"),
}
"""What is compiled; ``folds``: one on each chip."""

TRAINING = ("step", "accumulated", "rematerialized")
"""Of which a run is made, a step a call."""


def measure(
    program: str, preset: str, chip: str, chips: int, batch: int | None, effort: float
) -> Row:
    """Compile one program; ``batch`` is of each chip, by default the preset's.

    Raises:
        ConfigError: for a chip that is not known, or without its compiler.
    """
    config = PRESETS[preset]
    each = config.train.batch_size if batch is None else batch
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=each * chips)
    )
    devices = absent_devices(chip, chips)
    row = Row(
        program, preset, config.network.dtype, chip, chips, each,
        "x".join(map(str, config.train.crop)), effort, None, versions=timing.versions(),
    )  # fmt: skip
    started = time.perf_counter()
    try:
        found = account(PROGRAMS[program](config, devices, CHIPS[chip].platform))
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(row, error=str(error).splitlines()[0][:200])
    seconds = found.roofline_s(CHIPS[chip], chips)
    cycles = sum(found.cycles.values())
    return dataclasses.replace(
        row,
        compile_s=time.perf_counter() - started,
        peak_gib=found.memory.bytes / GIB,
        temporary_gib=found.memory.temporary_bytes / GIB,
        tflop=found.operations / 1e12,
        accessed_gb=found.accessed_bytes / 1e9,
        collectives=", ".join(f"{k} {n / 1e6:.1f}" for k, n in sorted(found.collectives.items())),
        gathers=found.gathers,
        copies=found.copies,
        estimate_ms=cycles / 1.5e6 if cycles else None,
        roofline_ms=1e3 * seconds,
        run_h=5 * config.train.steps * seconds / 3600 if program in TRAINING else None,
    )


def format_table(rows: Sequence[Row]) -> str:
    """The table in Markdown."""

    def text(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        "| program | preset | chip | a chip | compiled s | peak GiB | temporary GiB | TFLOP "
        "| GB accessed | collectives MB | gathers | copies | estimate ms | roofline ms | run h |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        start = (
            f"| {row.program} | {row.preset}, {row.crop} | {row.chips} {row.chip} | {row.batch} |"
        )
        if row.compile_s is None:
            lines.append(f"{start} refused: {row.error.replace('|', '/')} |" + " |" * 10)
            continue
        lines.append(
            f"{start} {row.compile_s:.0f} | {text(row.peak_gib, 2)} | {text(row.temporary_gib, 2)} "
            f"| {text(row.tflop, 3)} | {text(row.accessed_gb, 1)} | {row.collectives} "
            f"| {row.gathers:,} | {'' if row.copies is None else f'{row.copies:.0%}'} "
            f"| {text(row.estimate_ms, 1)} | {text(row.roofline_ms, 1)} | {text(row.run_h, 2)} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5e:1", "v5e:4", "h100:1", "h100:4"])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small"])
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=["step"])
    parser.add_argument("--batch", type=int, help="examples on each chip")
    parser.add_argument("--effort", type=float, default=0.0, help="of XLA, -1 to 1")
    parser.add_argument("--json", type=Path, help="keep the rows, and compile none again")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_exec_time_optimization_effort", arguments.effort)
    known = []
    if arguments.json and arguments.json.exists():
        known = [Row(**row) for row in json.loads(arguments.json.read_text("utf-8"))]
    rows = []
    for preset in arguments.presets:
        for program in arguments.programs:
            for place in arguments.chips:
                chip, _, count = place.partition(":")
                asked = (program, preset, chip, int(count or 1), arguments.batch, arguments.effort)
                row = next((row for row in known if same(row, *asked)), None)
                if row is None:
                    row = measure(*asked)
                    known.append(row)
                    if arguments.json:
                        content = json.dumps([dataclasses.asdict(each) for each in known], indent=1)
                        arguments.json.write_text(content, "utf-8")
                rows.append(row)
                print(format_table([row]).splitlines()[-1], file=sys.stderr)
    print(format_table(rows))
    print(
        "\nCompiled, not run. Peak leaves out the work space of libraries (cuDNN); the roofline is "
        "the least\ntime by the data sheet: peak rate and bandwidth, nothing lost between; run: "
        "five folds at that."
    )


def same(
    row: Row, program: str, preset: str, chip: str, chips: int, batch: int | None, effort: float
) -> bool:
    """Whether a row is what is asked for."""
    each = PRESETS[preset].train.batch_size if batch is None else batch
    asked = (program, preset, chip, chips, each, effort, timing.versions())
    return asked == (
        row.program, row.preset, row.chip, row.chips, row.batch, row.effort, row.versions,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"benchmarks.compiled: {error}")
