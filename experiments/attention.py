"""Where does the attention of each encoder lie, and do the modalities agree?

``python -m experiments.attention RUN [RUN ...]`` takes finished runs of ``experiments.cv``. Each
fold's own network looks again at the positive cases that it did not see, and the attention map of
every modality and stage, on the whole reference grid, is held against the truth and against the
maps of the other modalities. Distillation is to bring the maps together *on the target*: maps that
agree because all have become one pattern, whatever the image shows, teach nothing. So the maps of
different patients are held against one another too, and against those of the network before its
training: where they have become much more alike than they were, the attention has collapsed.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy
import tyro

from cmsad_jax.losses.distillation import COLLAPSED
from cmsad_jax.types import ConfigError
from data_pipelines.case import Case
from data_pipelines.faults import DataError
from data_pipelines.short_help import program
from data_pipelines.targets import foreground
from experiments.measuring import statistics
from experiments.prediction.windows import through_windows
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log, run_main
from experiments.run_folder import RunFolder
from experiments.settings.config import Accelerator
from experiments.settings.options import REGISTRY
from experiments.studies.revisit import RevisitCommand, open_run
from experiments.training.programs import compile_programs


@dataclasses.dataclass(frozen=True)
class Focus:
    """Attention of one modality at one stage, means over the positive cases of a run.

    Attributes:
        run, modality, stage: whose; stage 0 is the shallowest.
        num_cases, num_patients: positive cases that have the modality, and whose they are.
        lift: mean attention in the target over that of the whole volume; 1 is no focus at all.
        lift_interval: its 95 % bootstrap interval over patients; None below two.
        auroc: how well attention tells voxels of the target from others; 0.5 is not at all.
        variation: sd over mean of a map's voxels; 0 is a flat map.
        between_patients: distance of the maps of two patients under one network, mean over the
            pairs of each fold; None where no fold has two patients with the modality.
        before_training: the same of the networks as they were when their training began.
        collapsed: whether ``between_patients`` is below ``COLLAPSED`` of ``before_training``.
    """

    run: str
    modality: str
    stage: int
    num_cases: int
    num_patients: int
    lift: float
    lift_interval: tuple[float, float] | None
    auroc: float
    variation: float
    between_patients: float | None
    before_training: float | None
    collapsed: bool | None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Distance of the maps of two modalities at one stage, mean over the cases that have both.

    Attributes:
        run, modalities, stage, num_cases: of what.
        distance: squared differences of the maps of unit norm, summed over the voxels: 0 is equal,
            2 nothing in common.
    """

    run: str
    modalities: tuple[str, str]
    stage: int
    num_cases: int
    distance: float


def lift(attention: np.ndarray, target: np.ndarray) -> float:
    """Mean of ``attention`` within ``target`` over its mean; 1 where there is no attention."""
    mean = float(attention.mean())
    return float(attention[target].mean()) / mean if mean > 0 else 1.0


def auroc(attention: np.ndarray, target: np.ndarray) -> float:
    """Chance that a voxel of ``target`` has more attention than another one; ties count half."""
    ranks = scipy.stats.rankdata(attention)
    num, others = int(target.sum()), int((~target).sum())
    return float((ranks[target.ravel()].sum() - num * (num + 1) / 2) / (num * others))


def variation(attention: np.ndarray) -> float:
    """Standard deviation over mean; 0 where there is no attention."""
    mean = float(attention.mean())
    return float(attention.std()) / mean if mean > 0 else 0.0


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared differences of two maps of unit norm, summed."""
    unit = [q / max(float(np.linalg.norm(q)), 1e-12) for q in (a, b)]
    return float(np.square(unit[0] - unit[1]).sum())


class Spread:
    """Mean distance between the maps of different patients, without keeping the maps.

    For unit maps ``q`` of ``n`` patients all pairs together are ``n sum |q|^2 - |sum q|^2`` apart.
    Of a patient's cases the first counts.
    """

    def __init__(self):
        self._patients: set[str] = set()
        self._sum: np.ndarray | float = 0.0
        self._squares = 0.0

    def add(self, patient: str, attention: np.ndarray) -> None:
        """Take the map of a case of ``patient``."""
        if patient in self._patients:
            return
        self._patients.add(patient)
        unit = attention / max(float(np.linalg.norm(attention)), 1e-12)
        self._sum = self._sum + unit
        self._squares += float(np.square(unit).sum())

    @property
    def num_pairs(self) -> int:
        """Pairs of patients."""
        return len(self._patients) * (len(self._patients) - 1) // 2

    @property
    def total(self) -> float:
        """Sum of the distances of all pairs."""
        apart = len(self._patients) * self._squares - float(np.square(self._sum).sum())
        return max(apart, 0.0)


def mean_distance(spreads: Sequence[Spread]) -> float | None:
    """Mean over all pairs of all folds; None if there is none."""
    num_pairs = sum(spread.num_pairs for spread in spreads)
    return sum(spread.total for spread in spreads) / num_pairs if num_pairs else None


class Findings:
    """What the attention maps of a run show, taken case by case without keeping the maps.

    Args:
        run: whose maps.
        modalities: names of their columns.
        num_stages: of the network's encoders.
        patients: whose each case is.
    """

    def __init__(
        self, run: str, modalities: tuple[str, ...], num_stages: int, patients: Mapping[str, str]
    ):
        self.run, self.modalities, self.num_stages = run, modalities, num_stages
        self.patients = patients
        self._of_map: dict[tuple[str, int], dict[str, tuple[float, float, float]]] = {}
        self._of_pair: dict[tuple[tuple[str, str], int], list[float]] = {}
        self._after: dict[tuple[str, int], dict[int, Spread]] = {}
        self._before: dict[tuple[str, int], dict[int, Spread]] = {}

    def add(self, case: Case, fold: int, maps: np.ndarray, untrained: np.ndarray) -> None:
        """Take the maps of a case, ``d h w m s``, and those of its network before training."""
        names, target, patient = (
            self.modalities,
            foreground(case.label),
            self.patients[case.case_id],
        )
        there = [m for m in range(len(names)) if case.present[m]]
        for stage in range(self.num_stages):
            for m in there:
                q = maps[..., m, stage]
                found = (lift(q, target), auroc(q, target), variation(q))
                self._of_map.setdefault((names[m], stage), {})[case.case_id] = found
                for spreads, of_case in ((self._after, maps), (self._before, untrained)):
                    of_fold = spreads.setdefault((names[m], stage), {})
                    of_fold.setdefault(fold, Spread()).add(patient, of_case[..., m, stage])
            for m, n in itertools.combinations(there, 2):
                found = distance(maps[..., m, stage], maps[..., n, stage])
                self._of_pair.setdefault(((names[m], names[n]), stage), []).append(found)

    def focus(self) -> list[Focus]:
        """Of every modality and stage of which there is a map."""
        keys = itertools.product(self.modalities, range(self.num_stages))
        return [self._focus(*key) for key in keys if key in self._of_map]

    def agreement(self) -> list[Agreement]:
        """Of every two modalities that a case has both, at each stage."""
        pairs = itertools.combinations(self.modalities, 2)
        return [
            Agreement(
                self.run,
                pair,
                stage,
                len(self._of_pair[pair, stage]),
                float(np.mean(self._of_pair[pair, stage])),
            )
            for pair, stage in itertools.product(pairs, range(self.num_stages))
            if (pair, stage) in self._of_pair
        ]

    def _focus(self, modality: str, stage: int) -> Focus:
        key = (modality, stage)
        between = mean_distance([*self._after[key].values()])
        at_first = mean_distance([*self._before[key].values()])
        owners = [self.patients[case_id] for case_id in self._of_map[key]]
        found = np.array([*self._of_map[key].values()])
        means = found.mean(0)
        return Focus(
            run=self.run,
            modality=modality,
            stage=stage,
            num_cases=len(owners),
            num_patients=len(set(owners)),
            lift=float(means[0]),
            lift_interval=statistics.bootstrap_interval(found[:, 0], owners),
            auroc=float(means[1]),
            variation=float(means[2]),
            between_patients=between,
            before_training=at_first,
            collapsed=None if between is None or not at_first else between < COLLAPSED * at_first,
        )


def measure(
    folder: Path, accelerator: Accelerator, folds: tuple[int, ...] | None = None
) -> tuple[list[Focus], list[Agreement]]:
    """The attention of one run.

    Raises:
        ConfigError: no run, a fold that is not done, or early fusion, which has no such maps.
        DataError: no positive case with target and background on the reference grid, or the data
            are others than those of the run.
    """
    fusion = RunFolder(folder).read_config().network.fusion.kind
    if fusion == "early":
        raise ConfigError(
            f"a run must have an encoder for each modality; {folder} has fusion {fusion}, which "
            "stacks them. Name another run."
        )
    run = open_run(folder, folds)
    config, names = run.config, run.config.data.modalities
    num_stages = config.network.encoder.num_stages
    devices = select_accelerator(accelerator)[:1]
    programs = compile_programs(config, devices)
    key = jax.random.key(config.seed)
    untrained = {fold: programs.init(jax.random.fold_in(key, fold)).params for fold in run.of_fold}
    fold_of = {case_id: fold for fold, case_ids in run.of_fold.items() for case_id in case_ids}

    def maps_of(params: Any, case: Case) -> np.ndarray:
        found = through_windows(programs.attention, params, case, config, len(names) * num_stages)
        return found.reshape(*case.label.shape, len(names), num_stages).astype(np.float64)

    findings = Findings(str(folder), names, num_stages, run.patients)
    for params, whole, see in run.cases(devices):
        case = see(whole)
        target = foreground(case.label)
        if not target.any() or target.all():  # too small or too large for the reference grid
            continue
        fold = fold_of[case.case_id]
        findings.add(case, fold, maps_of(params, case), maps_of(untrained[fold], case))
    focus = findings.focus()
    if not focus:
        raise DataError(
            "on the reference grid a positive case must have both target and background; of "
            f"{folder} none has. Name a run with another --data.preprocess.spacing-mm or size."
        )
    return focus, findings.agreement()


def format_table(focus: Sequence[Focus], agreement: Sequence[Agreement]) -> str:
    """Both tables in Markdown, and what their columns mean."""
    lines = [
        "| run | modality | stage | cases | lift | 95 % interval | AUROC | variation "
        "| between patients | before training | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in focus:
        ends = "" if row.lift_interval is None else "{:.2f} to {:.2f}".format(*row.lift_interval)
        lines.append(
            f"| {row.run} | {row.modality} | {row.stage} | {row.num_cases} | {row.lift:.2f} "
            f"| {ends} | {row.auroc:.3f} | {row.variation:.2f} | {_number(row.between_patients)} "
            f"| {_number(row.before_training)} | {'collapsed' if row.collapsed else ''} |"
        )
    lines += ["", "| run | modalities | stage | cases | distance |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row.run} | {' and '.join(row.modalities)} | {row.stage} | {row.num_cases} "
        f"| {row.distance:.3f} |"
        for row in agreement
    ]
    lines += [
        "",
        "Positive cases, each looked at by the network that had not seen it. Lift: mean attention "
        "in the target over that of the whole volume (1: no focus); BCa bootstrap over patients. "
        "AUROC of attention for voxels of the target. Variation: sd over mean of a map (0: flat). "
        "Distance of two maps of unit norm: 0 equal, 2 nothing in common; between patients: of the "
        "maps that one network makes of two of them, and before training those of the network that "
        f"it was at first. Collapsed: less than {COLLAPSED:.0%} of that distance is left: the maps "
        "hardly depend on the patient.",
    ]
    few = min(row.num_patients for row in focus)
    if few < statistics.FEW_PATIENTS:
        lines.append(f"Warning: {statistics.few_patients_warning(few)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@dataclasses.dataclass(frozen=True)
class AttentionCommand(RevisitCommand):
    """Where the attention of finished runs lies, and how far their modalities agree."""


def run(command: AttentionCommand) -> tuple[list[Focus], list[Agreement]]:
    """Measure the runs; prints the tables."""
    command.refuse_nothing()
    focus, agreement = [], []
    for folder in command.runs:
        of_maps, of_pairs = measure(folder, command.accelerator, command.folds)
        focus += of_maps
        agreement += of_pairs
    log(format_table(focus, agreement))
    command.write(focus=focus, agreement=agreement)
    return focus, agreement


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    prog = program("experiments.attention")
    run(tyro.cli(AttentionCommand, prog=prog, args=arguments, registry=REGISTRY))


if __name__ == "__main__":
    run_main(main)
