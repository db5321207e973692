"""Where do false positives lie: in the gland, or outside of it?

``python -m experiments.false_positives RUN [RUN_B ...]`` takes finished runs of ``experiments.cv``
that find lesions. It reads what each fold predicted of the cases that it had not seen, and counts
false lesion candidates at confidences at which each run finds the same share of all lesions: only
so do the counts of two runs compare.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.progress import progress
from data_pipelines.serving import loading
from data_pipelines.short_help import program
from data_pipelines.targets import IGNORED
from experiments.process.console import log, run_main
from experiments.process.records import to_text
from experiments.process.storage import write_text
from experiments.run_folder import RunFolder
from experiments.settings.options import REGISTRY
from experiments.studies.revisit import source_of


@dataclasses.dataclass(frozen=True)
class FalsePositivesConfig:
    """Count false lesion candidates of finished runs, in the gland and outside of it."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of python -m experiments.cv."""
    within: str = "gland"
    """The other target of the same data that candidates lie in or outside of."""
    sensitivities: tuple[float, ...] = (0.7, 0.8, 0.9)
    """Shares of all lesions that are found where the false candidates are counted."""
    json: Path | None = None
    """Also write the rows to this file."""

    def __post_init__(self):
        if not all(0 < share <= 1 for share in self.sensitivities) or not self.sensitivities:
            raise ConfigError(
                "sensitivities must be shares of all lesions, above 0 and at most 1; got "
                f"{' '.join(map(str, self.sensitivities)) or 'none'}. "
                "Use --sensitivities 0.7 0.8 0.9."
            )


class Located(NamedTuple):
    """Confidences of the lesion candidates of a run, by what they are and where.

    Attributes:
        true: of candidates that match a lesion.
        inside, outside: of false ones, by whether the mean position of their voxels lies in the
            gland.
        num_lesions: of all cases, found or not.
        num_cases: cases.
    """

    true: Sequence[float]
    inside: Sequence[float]
    outside: Sequence[float]
    num_lesions: int
    num_cases: int


@dataclasses.dataclass(frozen=True)
class FalsePositives:
    """False candidates of a run where it finds a share of all lesions.

    Attributes:
        run: name of the run.
        sensitivity: the share that was asked for.
        num_cases, num_lesions: of the run.
        num_found: lesions that are found there, the fewest that make the share.
        confidence: from which on candidates count for this; None where the run never finds so many,
            and then of ``inside`` and ``outside``, too.
        inside, outside: false candidates from that confidence on.
    """

    run: str
    sensitivity: float
    num_cases: int
    num_lesions: int
    num_found: int
    confidence: float | None
    inside: int | None
    outside: int | None


def gather(run: Path, within: str) -> Located:
    """Read the predictions of a run, and where their candidates lie.

    Raises:
        ConfigError: no run, one that finds no lesions, or a target that there is not.
        DataError: the data are others than those of the run, a case has no label of the target
            that candidates are to lie in, or there is no lesion.
    """
    from experiments.measuring.lesions import locate  # slow to load, and not needed for --help

    folder = RunFolder(run)
    config = folder.read_config()
    definition = config.data.definition
    if definition.lesion is None:
        raise ConfigError(
            f"candidates are of lesions; got {run}, whose target is {config.data.target}. "
            "Name a run that finds lesions."
        )
    index = definition.classes.index(definition.lesion)
    rows = folder.read_results().summary.metric_per_case
    fold_of = {row.case_id: row.fold for row in rows if row.fold is not None}
    source = source_of(folder, config)
    places = loading.build(dataclasses.replace(config.data, target=within, labels=(), lesions=()))
    if lacking := fold_of.keys() - {info.case_id for info in places.info}:
        raise DataError(
            f"every case must have a label of {within}, to say where its candidates lie; "
            f"{len(lacking)} of {len(fold_of)} have none, the first {min(lacking)}. "
            "Name another --within."
        )
    true, inside, outside, num_lesions = [], [], [], 0
    for case in progress(
        loading.eval_cases(source, sorted(fold_of)), description=str(run), total=len(fold_of)
    ):
        truth = case.original_truth
        probability = definition.probability_of(
            folder.fold(fold_of[case.case_id]).read_probabilities(
                case.case_id, definition.part_names
            ),
            index,
        )
        if definition.ignore is not None:
            probability = np.where(truth == IGNORED, 0, probability)
        where = places[case.case_id].original_truth
        for place in locate(probability, definition.mask_of(truth, index)):
            confidence = place.match.confidence
            num_lesions += place.match.lesion
            if place.match.lesion and confidence > 0:
                true.append(confidence)
            elif not place.match.lesion:
                middle = tuple(round(axis) for axis in place.centre)
                (inside if where[middle] else outside).append(confidence)
    if not num_lesions:
        raise DataError(f"at least one case must have a lesion; {run} has none. Name another run.")
    return Located(true, inside, outside, num_lesions, len(fold_of))


def count(run: str, located: Located, sensitivity: float) -> FalsePositives:
    """False candidates from the confidence on that finds a share of all lesions."""
    found = math.ceil(sensitivity * located.num_lesions - 1e-9)
    numbers = run, sensitivity, located.num_cases, located.num_lesions, found
    if found > len(located.true):
        return FalsePositives(*numbers, None, None, None)
    least = sorted(located.true, reverse=True)[found - 1]
    inside, outside = (
        sum(confidence >= least for confidence in false)
        for false in (located.inside, located.outside)
    )
    return FalsePositives(*numbers, least, inside, outside)


def format_table(rows: Sequence[FalsePositives], within: str) -> str:
    """The rows in Markdown, and what their columns mean."""
    lines = [
        f"| run | cases | lesions found | confidence | false, in {within} | outside of it |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = ("never", "", "")
        if row.confidence is not None:
            figures = (f"{row.confidence:.3f}", str(row.inside), str(row.outside))
        lines.append(
            f"| {row.run} | {row.num_cases} | {row.num_found} of {row.num_lesions} "
            f"({row.sensitivity:.0%}) | {' | '.join(figures)} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "False candidates of all cases together, from the confidence on that finds so many "
            f"lesions. Outside: the middle of the candidate lies outside of {within}. Each case "
            "as predicted by the network that had not seen it.",
        ]
    )


def run(config: FalsePositivesConfig) -> list[FalsePositives]:
    """Count and print.

    Raises:
        ConfigError: as ``gather``, or no run is named.
        DataError: as ``gather``.
    """
    if not config.runs:
        raise ConfigError("at least one run must be given; got none. Name a run folder.")
    located = [(str(folder), gather(folder, config.within)) for folder in config.runs]
    rows = [
        count(name, found, sensitivity)
        for name, found in located
        for sensitivity in config.sensitivities
    ]
    log(format_table(rows, config.within))
    if config.json is not None:
        write_text(config.json, to_text({"false_positives": rows}))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    prog = program("experiments.false_positives")
    run(tyro.cli(FalsePositivesConfig, prog=prog, args=arguments, registry=REGISTRY))


if __name__ == "__main__":
    run_main(main)
