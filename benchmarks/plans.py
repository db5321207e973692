"""Is what is planned as good as a preset? ``auto`` and presets, trained on the same folds.

``python -m benchmarks.plans --output=runs/plans`` draws the data sets of ``benchmarks.made_sets``
and patients of the phantom, trains ``--preset=auto`` and the presets of ``--presets`` on each with
the same steps and seed, and prints their Dice beside each other. ``--own NAME PATH TARGET`` adds a
folder of one's own. What is done is not done again. ``auto`` follows the plan that is made here,
for this device; it stands beside the runs.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import timing
from benchmarks.made_sets import SETS
from data_pipelines.faults import MissingDataError
from experiments.measuring.summary import Summary
from experiments.planning import configure, record
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log
from experiments.run_folder import folder_of
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS
from experiments.studies import jobs
from experiments.studies.ablation_table import compare_rows, folder_of_row, summarise_row

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Row:
    """One preset on one data set, over the positive cases of the folds that were trained.

    Attributes:
        dice: mean over the cases, of the mean over their classes; ``interval`` holds 95 % of its
            bootstrap over patients.
        auto_less: of ``auto``, the mean difference on the same cases; None of ``auto`` itself.
        p: of the permutation test of that difference, not corrected.
    """

    data: str
    preset: str
    num_cases: int
    dice: float
    interval: tuple[float, float] | None
    auto_less: float | None
    auto_less_interval: tuple[float, float] | None
    p: float | None


def data_options(name: str, own: Sequence[Sequence[str]], output: Path, seed: int) -> list[str]:
    """How a run is told to read a data set; a made one is drawn first."""
    for title, path, target in own:
        if title == name:
            return [f"--data.path={path}", f"--data.target={target}"]
    if name in SETS:
        folder = output / name / "data"
        SETS[name].write(folder, seed)
        return SETS[name].options(folder)
    return ["--data.name=phantom", f"--data.phantom.seed={seed}"]


def configurations(
    name: str, data: Sequence[str], options: argparse.Namespace
) -> dict[str, Config]:
    """Of each preset; the plan of ``auto`` is written beside the runs."""
    configs = {}
    for preset in (AUTO, *options.presets):
        planned = configure.configure(
            [
                f"--preset={preset}",
                *data,
                f"--data.cache={options.output / 'cache'}",
                f"--num-folds={options.num_folds}",
                *(["--folds", *map(str, options.folds)] if options.folds else []),
                f"--train.steps={options.steps}",
                f"--seed={options.seed}",
                f"--output={folder_of_row(options.output / name, preset, options.seed)}",
            ]
        )
        if planned.plan is not None:
            record.write(planned.plan, options.output / name / "plan.json")
        configs[preset] = planned.config
    return configs


def compared(name: str, runs: dict[str, Summary]) -> list[Row]:
    """Rows of one data set: ``auto`` first, then each preset with what ``auto`` has over it."""
    rows = []
    for preset, summary in runs.items():
        figures = summarise_row([summary])
        if figures.dice is None:
            raise MissingDataError(
                f"a comparison needs positive cases; got none of {name}. Train more of its folds."
            )
        less = None if preset == AUTO else compare_rows([runs[AUTO]], [summary])
        rows.append(
            Row(
                name,
                preset,
                figures.num_cases,
                figures.dice,
                figures.interval,
                None if less is None else less.difference,
                None if less is None else less.interval,
                None if less is None else less.tests.permutation_p,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""

    def ends(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"

    return timing.markdown(
        [
            ("data", "preset", "cases", "Dice", "95 % interval", "auto less it", "interval", "p"),
            *(
                (
                    row.data,
                    row.preset,
                    str(row.num_cases),
                    f"{row.dice:.3f}",
                    ends(row.interval),
                    "" if row.auto_less is None else f"{row.auto_less:+.3f}",
                    ends(row.auto_less_interval),
                    timing.number(row.p, ".2g"),
                )
                for row in rows
            ),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--sets", nargs="*", choices=["phantom", *SETS], default=["phantom", *SETS])
    parser.add_argument(
        "--own", nargs=3, action="append", default=[], metavar=("NAME", "PATH", "TARGET")
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=[name for name in PRESETS if name != AUTO],
        default=["small"],
    )
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--num-folds", type=int, default=5)
    parser.add_argument("--folds", type=int, nargs="+", help="folds to train; all without it")
    parser.add_argument("--seed", type=int, default=3, help="of data that are drawn, and of runs")
    parser.add_argument("--jobs", type=int, help="runs at a time; one for each core without it")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)

    names = [*options.sets, *(name for name, _, _ in options.own)]
    of_set = {
        name: configurations(
            name, data_options(name, options.own, options.output, options.seed), options
        )
        for name in names
    }
    to_do = [
        config
        for configs in of_set.values()
        for config in configs.values()
        if not jobs.is_done(config)
    ]
    platform = select_accelerator("auto")[0].platform
    jobs.run_all(to_do, options.jobs, platform, lambda folder: f"{folder} is done")
    rows = [
        row
        for name, configs in of_set.items()
        for row in compared(
            name,
            {
                preset: folder_of(config).read_results().summary
                for preset, config in configs.items()
            },
        )
    ]
    log(table(rows))
    if options.json:
        command = shlex.join(["python", "-m", "benchmarks.plans", *arguments])
        timing.save_json(
            options.json, rows, command=command, device=timing.device(), versions=timing.versions()
        )


if __name__ == "__main__":
    main()
