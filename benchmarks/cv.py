"""What a cross-validation takes: a measured stretch of one fold, extrapolated to all of it.

``python -m benchmarks.cv`` draws phantom cases, trains one fold of a preset for ``--steps`` steps
as ``experiments.cv`` does, with cases read by the host and cases resident on the device, predicts
one case as ``experiments.cv`` does, and computes what ``--cases`` cases take in the preset's folds
and steps. A second process then makes the first step again, with the programs that the first
process left in JAX's compilation cache.

``--folds-at-once 1 5`` measures folds in turn and five side by side; steps/s are then those of all
folds together, so that the rows compare.

The first step is left out of steps/s and of the share of time spent waiting for input. Not in the
extrapolation: the report, and drawing or reading the cases into the built data set.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import timing
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.serving import loading
from experiments.prediction import windows
from experiments.process.accelerator import (
    keep_compiled,
    peak_memory_bytes,
    select_accelerator,
    uncollected,
)
from experiments.run_folder import FoldFolder
from experiments.settings.command_line import complete
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS
from experiments.studies import cross_validation
from experiments.training import loop, programs
from experiments.training.fold import Fold, train_batches

RESIDENCIES = ("host", "device")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    preset: str
    batch: int
    crop: str
    residency: str
    folds_at_once: int
    steps_per_call: int
    steps_per_s: float
    waiting_share: float
    """Of the time after the first call, that in which the loop waited for a batch."""
    peak_memory_gb: float
    first_step_s: float
    second_start_share: float | None
    """The first step's time beyond a steady one, in a second process over that in the first;
    measured with cases read by the host."""
    predict_s_per_case: float
    total_hours: float
    """Extrapolated; see the module."""
    total_cases: int
    device: str
    versions: str


def measured_config(
    preset: str, folder: Path, num_cases: int, residency: str, folds_at_once: int = 1
) -> Config:
    """The preset on phantom cases under ``folder``."""
    base = PRESETS[preset]
    data = dataclasses.replace(
        base.data,
        name="phantom",
        phantom=PhantomOptions(num_cases=num_cases),
        cache=folder,
        residency=residency,
    )
    return complete(
        dataclasses.replace(base, data=data, output=folder / "run", folds_at_once=folds_at_once)
    )


def stretch(config: Config, num_steps: int) -> dict[str, float]:
    """Train the folds of one program for some steps, predict a case, and say what that took."""
    keep_compiled(config.data.cache / "compiled")
    devices = select_accelerator(config.accelerator)
    compiled = programs.compile_programs(config, devices)
    source = loading.build(config.data)
    folds, count = (
        cross_validation.make_folds(config, source),
        programs.folds_at_once(config, devices),
    )
    training = [folds.training(fold) for fold in range(count)]
    feeds = [
        train_batches(config, source, Fold(fold, training[fold], (), Path()), num_folds=count)
        for fold in range(count)
    ]
    place, _ = compiled.of_folds(count)
    state = place.place_state([compiled.init(jax.random.key(fold)) for fold in range(count)])

    def waited_s() -> float:
        return sum(feed.waited_s for feed in feeds)

    number, first_s, first_steps, waited, started = 0, 0.0, 0, 0.0, time.perf_counter()
    while number < num_steps:
        calls, placed, program = loop.next_call(
            config, compiled, feeds, number, lambda _: False, training
        )
        state, _ = (program.step if first_steps else uncollected(program.step))(state, placed)
        number += len(calls[0].batches)
        if not first_steps:
            jax.block_until_ready(state)
            first_steps, first_s = number, time.perf_counter() - started
            waited, started = waited_s(), time.perf_counter()
    jax.block_until_ready(state)
    seconds, steps = time.perf_counter() - started, number - first_steps
    found = {
        "steps_per_s": count * steps / seconds,
        "waiting_share": (waited_s() - waited) / seconds,
        "first_step_s": first_s,
        "compile_s": first_s - first_steps * seconds / steps,
        "steps_per_call": compiled.steps_per_call,
        "peak_memory_gb": (peak_memory_bytes(devices[0]) or math.nan) / 1e9,
    }
    params, case = place.fetch_state(state)[0].average, source[training[0][0]]
    for name in ("predict", "measure"):
        folder = FoldFolder(config.data.cache / "predicted")
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            if name == "predict":
                windows.predict_case(compiled.predict, params, case, config)
            else:
                cross_validation.predict_and_measure(config, compiled, params, case, 0, folder)
            found[f"{name}_s"] = time.perf_counter() - started
    return found


def extrapolated_hours(config: Config, found: dict[str, float], num_cases: int) -> float:
    """All folds: their steps, their looks at the validation fold, and every case predicted once.

    A look predicts the cases with a lesion: 28 % of a fold, as in PI-CAI and the phantom.
    """
    steps = config.num_folds * config.train.steps / found["steps_per_s"]
    looks = config.train.validations * 0.28 * num_cases * found["predict_s"]
    return (steps + looks + num_cases * found["measure_s"] + found["first_step_s"]) / 3600


def rows_of(
    preset: str, *, num_built: int, num_steps: int, num_cases: int, folds_at_once: Sequence[int]
) -> list[Row]:
    """One row for each residency and number of folds, each measured in processes of its own."""
    rows = []
    for residency, folds in itertools.product(RESIDENCIES, folds_at_once):
        with tempfile.TemporaryDirectory() as folder:
            config = measured_config(preset, Path(folder), num_built, residency, folds)
            loading.build(config.data)
            first = _in_process(preset, Path(folder), num_built, residency, folds, num_steps)
            second = None
            if residency == "host":
                second = _in_process(preset, Path(folder), num_built, residency, folds, 4)
        rows.append(
            Row(
                preset=preset,
                batch=config.train.batch_size,
                crop="x".join(map(str, config.train.crop)),
                residency=residency,
                folds_at_once=folds,
                steps_per_call=int(first["steps_per_call"]),
                steps_per_s=first["steps_per_s"],
                waiting_share=first["waiting_share"],
                peak_memory_gb=first["peak_memory_gb"],
                first_step_s=first["first_step_s"],
                second_start_share=None
                if second is None
                else second["compile_s"] / first["compile_s"],
                predict_s_per_case=first["measure_s"],
                total_hours=extrapolated_hours(config, first, num_cases),
                total_cases=num_cases,
                device=timing.device(),
                versions=timing.versions(),
            )
        )
    return rows


def _in_process(
    preset: str, folder: Path, num_built: int, residency: str, folds: int, num_steps: int
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cv", "--presets", preset, "--built", num_built]
    command += ["--steps", num_steps, "--stretch", folder, residency, folds]
    done = subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    header = (
        "preset", "batch", "crop", "cases", "folds at once", "steps/call", "steps/s", "waiting",
        "peak GB", "first step s", "second start", "s/case", "whole run h",
    )  # fmt: skip
    cells = [
        (
            row.preset,
            str(row.batch),
            row.crop,
            row.residency,
            str(row.folds_at_once),
            str(row.steps_per_call),
            f"{row.steps_per_s:.3g}",
            f"{row.waiting_share:.2%}",
            f"{row.peak_memory_gb:.1f}",
            f"{row.first_step_s:.1f}",
            timing.number(row.second_start_share, ".0%"),
            f"{row.predict_s_per_case:.1f}",
            f"{row.total_hours:.2f}",
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cv", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases and steps")
    parser.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), help="by default small on a CPU, else all"
    )
    parser.add_argument("--built", type=int, help="phantom cases that are drawn and trained on")
    parser.add_argument("--steps", type=int, help="that are measured")
    parser.add_argument("--cases", type=int, default=358, help="of the run that is extrapolated")
    parser.add_argument(
        "--folds-at-once", nargs="+", type=int, default=[1], help="numbers of folds side by side"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--stretch", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    built = options.built or (10 if options.quick else 40)
    steps = options.steps or (20 if options.quick else 100)
    if options.stretch:
        folder, residency, folds = options.stretch
        config = measured_config(options.presets[0], Path(folder), built, residency, int(folds))
        print(json.dumps(stretch(config, steps)))
        return
    presets = options.presets or (
        ["small"] if jax.default_backend() == "cpu" else ["small", "volume3d", "slice2d"]
    )
    given = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.cv {shlex.join(given)}".strip()
    print(f"{timing.device()}; {timing.versions()}\n`{command}`\n")
    rows = [
        row
        for preset in presets
        for row in rows_of(
            preset,
            num_built=built,
            num_steps=steps,
            num_cases=options.cases,
            folds_at_once=options.folds_at_once,
        )
    ]
    print(table(rows))
    if options.json:
        timing.save_json(options.json, rows, command=command)


if __name__ == "__main__":
    main()
