"""Predict new patients with a run or an exported model, in the frame of their own T2W files.

``python -m experiments.predict --model RUN_OR_ARTIFACT --input CASE_OR_FOLDER --output DIR`` reads
whatever the data pipeline reads, one case or thousands. While one case is computed, the next ones
are read and the ones before are written. A run is exported in memory first, so that a run and an
artifact take one path. A case that cannot be predicted is named and passed over, and the exit
status is then 4. An interrupted command goes on where it was; one that came to its end predicts
every case again.
"""

import collections
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro
from scipy import ndimage

from cmsad_jax import __version__, export
from cmsad_jax.inference import EnsemblePrediction, entropy
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT, Case
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing import preprocessing
from data_pipelines.reading import case_files, volume_io
from data_pipelines.reading.case_files import CaseFiles
from experiments.exporting.artifact import write_artifact
from experiments.prediction.inputs import find_inputs, read_case
from experiments.prediction.windows import to_mask
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log, progress, run_main
from experiments.process.storage import read_json, write_text
from experiments.settings.config import Accelerator
from experiments.settings.options import REGISTRY
from experiments.settings.stored import from_json

T = TypeVar("T")
R = TypeVar("R")

READ_AHEAD = 2
"""Cases held in memory before, and after, the one that is computed."""

OPTIONS = ("threshold", "overlap", "flip", "batch_size")
"""Settings of a model that the command line may change."""

RECORD = "predictions.json"
"""File in the output folder that says whose results it holds, and what was found."""

PASSED_OVER = 4
"""Exit status if a case could not be predicted and the others were."""

DISCLAIMER = "Research software, not a medical device: not for diagnosis or treatment."


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Predict new cases with a run or an artifact; masks and probabilities as NIfTI."""

    model: Path
    """Run folder of python -m experiments.cv, or file of python -m experiments.export."""
    input: Path
    """Folder of one case (files named by modality) or of many, in any layout of the pipeline."""
    output: Path
    """Folder for the results."""
    accelerator: Accelerator = "auto"
    """Where to compute; auto takes the best there is."""
    folds: tuple[int, ...] | None = None
    """Folds whose weights make the ensemble. All that the model has by default."""
    overlap: float | None = None
    """Least share of a window that its neighbour sees as well. The model's own by default."""
    flip: bool | None = None
    """Average over the left-right mirror image. The model's own by default."""
    batch_size: int | None = None
    """Windows for each call; changes speed and memory alone. The model's own by default."""
    threshold: float | None = None
    """Probability above which a voxel belongs to the target. The model's own by default."""
    attention: bool = False
    """Write the attention map of each modality too, scaled to a maximum of 1."""
    uncertainty: bool = False
    """Write entropy (0 to 1) and the standard deviation between the folds too."""


def open_model(command: PredictCommand) -> export.Model:
    """The model of a run folder or an artifact, with the options of the command line.

    Raises:
        ConfigError: neither a run nor an artifact, or options that cannot work.
    """
    if command.model.is_dir():
        archive = io.BytesIO()
        write_artifact(command.model, archive, folds=command.folds)
        archive.seek(0)
        model = export.load(archive)
    elif command.model.is_file():
        model = export.load(command.model)
        if command.folds is not None:
            model = model.select([f"fold_{fold}" for fold in command.folds])
    else:
        raise ConfigError(
            f"the model must be a run folder or an artifact; got nothing at {command.model}. "
            "Check --model."
        )
    changes = {name: getattr(command, name) for name in OPTIONS}
    given = {name: value for name, value in changes.items() if value is not None}
    if "threshold" in given and len(model.description.classes) > 1:
        raise ConfigError(
            f"a threshold goes with one class; got {command.threshold} for "
            f"{', '.join(model.description.classes)}, of which the most probable is taken. "
            "Leave --threshold out."
        )
    description = dataclasses.replace(model.description, **given)
    if not 0 < description.threshold < 1 or not 0 <= description.overlap < 1:
        raise ConfigError(
            "threshold must lie between 0 and 1, and overlap be 0 or more and below 1; got "
            f"{description.threshold} and {description.overlap}. Use --threshold=0.5 --overlap=0.5."
        )
    if description.batch_size < 1:
        raise ConfigError(
            f"batch size must be 1 or more; got {description.batch_size}. Use --batch-size=1."
        )
    return dataclasses.replace(model, description=description)


def data_config(description: export.Description) -> DataConfig:
    """How cases are to be preprocessed for a model."""
    target: Any = description.target
    return DataConfig(
        target=target,
        modalities=description.modalities,
        allow_missing=description.allow_missing,
        preprocess=from_json(PreprocessConfig, dict(description.preprocess)),
    )


@dataclasses.dataclass(frozen=True)
class Computed:
    """What the model says of a case, on the reference grid."""

    case: Case
    prediction: EnsemblePrediction
    attention: np.ndarray | None


def compute(model: export.Model, case: Case, *, attention: bool) -> Computed:
    """Run the model on one case."""
    image = case.image.astype(np.float32) * np.float32(STORED_UNIT)
    prediction = model.predict(image, case.present)
    maps = None
    if attention:
        maps = model.predict(image, case.present, program="attention").probability
        maps /= np.maximum(maps.max((0, 1, 2)), 1e-12)
    return Computed(case, prediction, maps)


def write_case(
    computed: Computed, description: export.Description, output: Path, *, uncertainty: bool
) -> dict[str, Any]:
    """Write the images of a case into the frame of its T2W file; returns what is said of it.

    One volume at a time is brought there, so that memory stays near one probability map.
    """
    case, affine, classes = computed.case, computed.case.original_affine, description.classes

    def original(values: np.ndarray) -> np.ndarray:
        return preprocessing.to_original(values, case)

    def write(folder: str, values: np.ndarray, suffix: str = "") -> None:
        volume_io.write_nifti(output / folder / f"{case.case_id}{suffix}.nii.gz", values, affine)

    if computed.attention is not None:
        for index, name in enumerate(description.modalities):
            if case.present[index]:
                write("attention", original(computed.attention[..., index]), f"_{name}")
    if uncertainty:
        write("disagreement", original(computed.prediction.disagreement.max(-1)))
    probability = original(computed.prediction.probability)
    if uncertainty:
        write("entropy", entropy(probability))
    mask = to_mask(probability, description.threshold)
    foreground = probability if len(classes) == 1 else probability[..., 1:]
    candidates = []
    for index, name in enumerate(classes):
        write("probabilities", foreground[..., index], f"_{name}" if len(classes) > 1 else "")
        found = lesion_candidates(mask == index + 1, foreground[..., index], affine)
        candidates += [{"class": name, **candidate} for candidate in found]
    write("masks", mask)  # last: a mask is there only if all else is
    names = description.modalities
    return {
        "case_id": case.case_id,
        "modalities": [n for n, there in zip(names, case.present, strict=True) if there],
        "missing_modalities": [
            n for n, there in zip(names, case.present, strict=True) if not there
        ],
        "candidates": candidates,
        "highest_probability": {
            name: round(float(foreground[..., index].max()), 6)
            for index, name in enumerate(classes)
        },
    }


def lesion_candidates(
    mask: np.ndarray, probability: np.ndarray, affine: np.ndarray
) -> list[dict[str, Any]]:
    """Connected components of a mask (26 neighbours), the most confident first.

    Args:
        mask: bool ``d h w``.
        probability: of the class, ``d h w``.
        affine: of both, to RAS+ millimetres.

    Returns:
        For each ``volume_ml``, ``centre_mm`` (mean position of its voxels, x y z in RAS+) and
        ``confidence`` (its highest probability).
    """
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3, 3)), output=labels)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[box] == number
        index = np.argwhere(inside) + [axis.start for axis in box]
        centre = affine[:3, :3] @ index.mean(0)[::-1] + affine[:3, 3]
        found.append(
            {
                "volume_ml": round(len(index) * voxel_ml, 4),
                "centre_mm": [round(float(x), 2) for x in centre],
                "confidence": round(float(probability[box][inside].max()), 6),
            }
        )
    return sorted(found, key=lambda candidate: -candidate["confidence"])


@dataclasses.dataclass
class Record:
    """What the output folder says of its results: whose they are, and what was found."""

    output: Path
    facts: Mapping[str, Any]
    """The model, its settings, and what is written beside masks."""
    earlier: Sequence[Mapping[str, Any]]
    """Results of earlier commands for cases that are not predicted now."""
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    computing_s: float = 0.0
    """Time in which the model ran."""
    beside_s: float = 0.0
    """Processor time of reading and writing, in their own threads."""
    started_s: float = dataclasses.field(default_factory=time.perf_counter)
    processor_started_s: float = dataclasses.field(default_factory=time.process_time)

    @property
    def wall_s(self) -> float:
        """Time since the record was begun."""
        return time.perf_counter() - self.started_s

    @property
    def failed(self) -> int:
        """Cases that could not be predicted."""
        return sum("error" in result for result in self.results)

    def fail(self, entry: CaseFiles, error: Exception) -> None:
        """Say that a case is passed over."""
        print(f"error: case {entry.case_id} is passed over: {error}", file=sys.stderr, flush=True)
        self.results.append({"case_id": entry.case_id, "error": str(error)})

    def save(self, *, complete: bool) -> None:
        """Write the record, whole or not at all."""
        record = {
            "disclaimer": DISCLAIMER,
            "cmsad_jax": __version__,
            **self.facts,
            "complete": complete,
            "coordinates": "centre_mm is x y z in RAS+ millimetres (NIfTI's world)",
            "wall_s": round(self.wall_s, 3),
            "compute_s": round(self.computing_s, 3),
            "processor_s": round(time.process_time() - self.processor_started_s, 3),
            "processor_beside_s": round(self.beside_s, 3),
            "cases": sorted([*self.earlier, *self.results], key=lambda result: result["case_id"]),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(self.output / RECORD, json.dumps(record, indent=1) + "\n")


def run(command: PredictCommand) -> int:
    """Predict every case of the input; returns how many could not be.

    Raises:
        ConfigError: a model or options that cannot work.
        DataError: no case at all, or an output folder of another model.
    """
    select_accelerator(command.accelerator)
    model = open_model(command)
    description = model.description
    if command.attention and "attention" not in model.programs:
        raise ConfigError(
            f"attention maps need a program for them; {command.model} has none. "
            "Export the run again, or leave out --attention."
        )
    data = data_config(description)
    entries = find_inputs(
        command.input, description.modalities, with_gland=data.preprocess.centre == "gland"
    )
    facts = facts_of(model, command)
    old = earlier_results(command.output, facts)
    done = set()
    if not old["complete"] and old["extras"] == facts["extras"]:
        done = {result["case_id"] for result in old["cases"] if "error" not in result}
    entries = [entry for entry in entries if entry.case_id not in done]
    again = {entry.case_id for entry in entries}
    for name in ("predict", *(("attention",) if command.attention else ())):
        model.compile(name)
    log(
        f"{len(entries)} cases; {', '.join(description.classes)} from "
        f"{', '.join(description.modalities)}, {len(description.members)} members, "
        f"model {model.sha256[:12]}"
        + (f"; {len(done)} were predicted before the interruption" if done else "")
    )
    record = Record(
        command.output, facts, [result for result in old["cases"] if result["case_id"] not in again]
    )
    record.save(complete=False)  # says whose results these are, from the first one on
    complete = False
    try:
        predict_cases(model, entries, data, record)
        complete = True
    finally:
        record.save(complete=complete)
    count, wall = len(record.results), max(record.wall_s, 1e-9)
    log(
        f"{count - record.failed} of {count} cases predicted in {wall:.1f} s "
        f"({60 * count / wall:.0f} a minute, {record.computing_s / wall:.0%} "
        f"of it computing); {command.output / RECORD}"
    )
    return record.failed


def facts_of(model: export.Model, command: PredictCommand) -> dict[str, Any]:
    """What a record says of the model and its settings."""
    description = model.description
    return {
        "model": {
            "sha256": model.sha256,
            "members": list(description.members),
            "git_commit": description.provenance.get("environment", {}).get("git_commit"),
            "data_fingerprint": description.provenance.get("data_fingerprint"),
            "license": description.license,
        },
        "settings": {name: getattr(description, name) for name in OPTIONS},
        "extras": {"attention": command.attention, "uncertainty": command.uncertainty},
    }


def earlier_results(output: Path, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a folder says of its results, if it holds any.

    Raises:
        ConfigError: they are of another model or other settings.
    """
    file = output / RECORD
    if not file.is_file():
        return {"complete": True, "extras": {}, "cases": []}
    old = read_json(file)
    before, now = old["model"]["sha256"][:12], facts["model"]["sha256"][:12]
    if before != now or old["settings"] != facts["settings"]:
        raise ConfigError(
            f"a folder holds the results of one model and its settings; {output} holds those of "
            f"{before} with {old['settings']}, and this is {now} with {facts['settings']}. "
            "Name another folder with --output."
        )
    return {"complete": True, "extras": {}} | old


def predict_cases(
    model: export.Model, entries: Sequence[CaseFiles], data: DataConfig, record: Record
) -> None:
    """Read, compute and write each case, the three side by side; results go into the record.

    When it is interrupted the record holds the cases whose files are all written.
    """
    extras = record.facts["extras"]
    repeated = {
        problem.case_id: problem
        for problem in case_files.check_ids(entry.case_id for entry in entries)
    }

    def read(entry: CaseFiles) -> tuple[Case | DataError, float]:
        before = time.thread_time()
        try:
            if entry.case_id in repeated:
                raise DataError(repeated[entry.case_id].text)
            case = read_case(entry, data)
        except DataError as error:
            case = error
        return case, time.thread_time() - before

    def write(computed: Computed) -> tuple[dict[str, Any], float]:
        before = time.thread_time()
        result = write_case(
            computed, model.description, record.output, uncertainty=extras["uncertainty"]
        )
        return result, time.thread_time() - before

    def written(future: Future[tuple[dict[str, Any], float]]) -> None:
        result, seconds = future.result()
        record.results.append(result)
        record.beside_s += seconds

    pending: collections.deque[Future[tuple[dict[str, Any], float]]] = collections.deque()
    try:
        with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
            read_cases = zip(entries, read_ahead(readers, read, entries), strict=True)
            for entry, (case, seconds) in progress(
                read_cases, description="Predicting", total=len(entries)
            ):
                record.beside_s += seconds
                if isinstance(case, DataError):
                    record.fail(entry, case)
                    continue
                before = time.perf_counter()
                computed = compute(model, case, attention=extras["attention"])
                record.computing_s += time.perf_counter() - before
                while len(pending) >= READ_AHEAD:
                    written(pending[0])
                    pending.popleft()
                pending.append(writers.submit(write, computed))
            while pending:
                written(pending[0])
                pending.popleft()
    finally:
        for future in pending:
            if not future.exception():
                written(future)


def read_ahead(
    executor: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]
) -> Iterator[R]:
    """Results of ``function`` in order, of which up to ``READ_AHEAD`` are made in advance."""
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > READ_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit status 4 if a case was passed over, else as ``run_main``."""
    command = tyro.cli(
        PredictCommand, prog="python -m experiments.predict", args=arguments, registry=REGISTRY
    )
    if run(command):
        raise SystemExit(PASSED_OVER)


if __name__ == "__main__":
    run_main(main)
