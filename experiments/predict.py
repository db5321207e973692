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
from data_pipelines import preprocessing, validation, volume_io
from data_pipelines.case import (
    STORED_UNIT,
    Case,
    DataConfig,
    DataError,
    PreprocessConfig,
)
from data_pipelines.validation import CaseFiles
from experiments.config import Accelerator, from_json
from experiments.evaluate import write_text
from experiments.export import write_artifact
from experiments.inputs import find_inputs, read_case
from experiments.options import REGISTRY
from experiments.runtime import log, progress, read_json, run_main, select_accelerator
from experiments.train import to_mask

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


def run(command: PredictCommand) -> int:
    """Predict every case of the input; returns how many could not be.

    Raises:
        ConfigError: a model or options that cannot work.
        DataError: no case at all, or an output folder of another model.
    """
    select_accelerator(command.accelerator)
    model = open_model(command)
    facts = model.description
    if command.attention and "attention" not in model.programs:
        raise ConfigError(
            f"attention maps need a program for them; {command.model} has none. "
            "Export the run again, or leave out --attention."
        )
    data = data_config(facts)
    with_gland = data.preprocess.centre == "gland"
    entries = find_inputs(command.input, facts.modalities, with_gland=with_gland)
    identity = {
        "sha256": model.sha256,
        "members": list(facts.members),
        "git_commit": facts.provenance.get("environment", {}).get("git_commit"),
        "data_fingerprint": facts.provenance.get("data_fingerprint"),
        "license": facts.license,
    }
    settings = {name: getattr(facts, name) for name in OPTIONS}
    extras = {"attention": command.attention, "uncertainty": command.uncertainty}
    old = earlier_results(command.output, identity, settings)
    going_on = old is not None and not old["complete"] and old["extras"] == extras
    done = {
        result["case_id"]
        for result in (old["cases"] if old and going_on else ())
        if "error" not in result
    }
    entries = [entry for entry in entries if entry.case_id not in done]
    again = {entry.case_id for entry in entries}
    kept = [result for result in (old["cases"] if old else ()) if result["case_id"] not in again]
    programs = ["predict", *(["attention"] if command.attention else [])]
    for name in programs:
        model.compile(name)
    log(
        f"{len(entries)} cases; {', '.join(facts.classes)} from {', '.join(facts.modalities)}, "
        f"{len(facts.members)} members, model {model.sha256[:12]}"
        + (f"; {len(done)} were predicted before the interruption" if done else "")
    )
    results: list[dict[str, Any]] = []
    repeated = {
        problem.case_id: problem
        for problem in validation.check_ids(entry.case_id for entry in entries)
    }

    beside = [0.0]  # processor seconds of reading and writing

    def read(entry: CaseFiles) -> Case | DataError:
        before = time.thread_time()
        try:
            if entry.case_id in repeated:
                raise DataError(repeated[entry.case_id].text)
            return read_case(entry, data)
        except DataError as error:
            return error
        finally:
            beside[0] += time.thread_time() - before

    def write(computed: Computed) -> dict[str, Any]:
        before = time.thread_time()
        try:
            return write_case(computed, facts, command.output, uncertainty=command.uncertainty)
        finally:
            beside[0] += time.thread_time() - before

    def fail(entry: CaseFiles, error: Exception) -> None:
        print(f"error: case {entry.case_id} is passed over: {error}", file=sys.stderr, flush=True)
        results.append({"case_id": entry.case_id, "error": str(error)})

    started, processor, computing = time.perf_counter(), time.process_time(), 0.0

    def save(*, complete: bool) -> None:
        record = {
            "disclaimer": DISCLAIMER,
            "model": identity,
            "cmsad_jax": __version__,
            "settings": settings,
            "extras": extras,
            "complete": complete,
            "coordinates": "centre_mm is x y z in RAS+ millimetres (NIfTI's world)",
            "wall_s": round(time.perf_counter() - started, 3),
            "compute_s": round(computing, 3),
            "processor_s": round(time.process_time() - processor, 3),
            "processor_beside_s": round(beside[0], 3),
            "cases": sorted([*kept, *results], key=lambda result: result["case_id"]),
        }
        command.output.mkdir(parents=True, exist_ok=True)
        write_text(command.output / RECORD, json.dumps(record, indent=1) + "\n")

    save(complete=False)  # says whose results these are, from the first one on
    pending: collections.deque[Future[dict[str, Any]]] = collections.deque()
    complete = False
    try:
        with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
            read_cases = zip(entries, read_ahead(readers, read, entries), strict=True)
            for entry, case in progress(read_cases, description="Predicting", total=len(entries)):
                if isinstance(case, DataError):
                    fail(entry, case)
                    continue
                before = time.perf_counter()
                computed = compute(model, case, attention=command.attention)
                computing += time.perf_counter() - before
                while len(pending) >= READ_AHEAD:
                    results.append(pending[0].result())
                    pending.popleft()
                pending.append(writers.submit(write, computed))
            while pending:
                results.append(pending[0].result())
                pending.popleft()
        complete = True
    finally:
        results += [future.result() for future in pending if not future.exception()]
        save(complete=complete)
    wall = time.perf_counter() - started
    failed = sum("error" in result for result in results)
    log(
        f"{len(results) - failed} of {len(results)} cases predicted in {wall:.1f} s "
        f"({60 * len(results) / max(wall, 1e-9):.0f} a minute, {computing / max(wall, 1e-9):.0%} "
        f"of it computing); {command.output / RECORD}"
    )
    return failed


def earlier_results(
    output: Path, identity: Mapping[str, Any], settings: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """What a folder says of its results, if it holds any.

    Raises:
        ConfigError: they are of another model or other settings.
    """
    file = output / RECORD
    if not file.is_file():
        return None
    old = read_json(file)
    before, now = old["model"]["sha256"][:12], identity["sha256"][:12]
    if before != now or old["settings"] != dict(settings):
        raise ConfigError(
            f"a folder holds the results of one model and its settings; {output} holds those of "
            f"{before} with {old['settings']}, and this is {now} with {dict(settings)}. "
            "Name another folder with --output."
        )
    return {"complete": True, "extras": {}} | old


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
