"""Predict new patients with a run or an exported model, in the frame of their own T2W files.

``python -m experiments.predict --model RUN_OR_ARTIFACT --input CASE_OR_FOLDER --output DIR`` reads
whatever the data pipeline reads, one case or thousands. While one case is computed, the next ones
are read and the ones before are written. A run is exported in memory first, so that a run and an
artifact take one path. A case that cannot be predicted is named and passed over, and the exit
status is then 4.
"""

import collections
import dataclasses
import io
import json
import re
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
    MissingDataError,
    PreprocessConfig,
    RawCase,
)
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import GLAND, modality_of
from data_pipelines.validation import CaseFiles, Problem
from experiments.config import Accelerator, from_json
from experiments.evaluate import write_text
from experiments.export import write_artifact
from experiments.options import REGISTRY
from experiments.runtime import log, progress, read_json, run_main, select_accelerator
from experiments.train import to_mask

T = TypeVar("T")
R = TypeVar("R")

READ_AHEAD = 2
"""Cases held in memory before, and after, the one that is computed."""

OPTIONS = ("threshold", "overlap", "flip", "batch_size")
"""Settings of a model that the command line may change."""

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


def find_inputs(
    root: Path, modalities: Sequence[str], *, with_gland: bool = False
) -> list[CaseFiles]:
    """The cases under ``root``, by the names of their files; labels and others are passed over.

    A file ``<modality>.<ending>`` belongs to the case that its folder is named for, a file
    ``<case>_<modality>.<ending>`` to ``<case>``, and in nnU-Net's raw layout ``<case>_<4 digits>``
    is the channel of that number in ``dataset.json``. Any other NIfTI file beside ``dataset.json``,
    or in a folder ``images*`` under it, is a case with its channels along a fourth axis (the
    layout of the Medical Segmentation Decathlon). A folder with one DICOM series is named like a
    file. Modalities go by the names that the data pipeline accepts.

    Args:
        root: folder of one case or of many.
        modalities: of the model.
        with_gland: whether the gland's mask is looked for too, for a crop around it.

    Raises:
        DataError: no folder, or no case in it.
    """
    if not root.is_dir():
        raise MissingDataError(f"the input must be a folder; got {root}. Check --input.")
    names: list[str] = [preprocessing.REFERENCE, *modalities, *([GLAND] if with_gland else [])]
    wanted = tuple(dict.fromkeys(names))
    found: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    channels: dict[Path, Mapping[int, str]] = {}
    four_axes: dict[tuple[Path, str], Mapping[str, int]] = {}
    for path in sorted(root.rglob("*")):
        stem = _volume_name(path)
        if stem is None:
            continue
        folder = path.parent
        if folder not in channels:
            channels[folder] = _channels(folder, wanted)
        case_id, modality = _case_and_modality(stem, folder, wanted, channels[folder])
        if modality is not None:
            found.setdefault((folder, case_id), {}).setdefault(modality, []).append(path)
        elif not case_id and _holds_channels(path):
            four_axes[folder, stem] = {name: n for n, name in channels[folder].items()}
            for name in four_axes[folder, stem]:
                found.setdefault((folder, stem), {}).setdefault(name, []).append(path)
    # A T2W alone says where the others would lie, not that this is a case of the model.
    cases = [
        _case_files(case_id, folder, files, wanted, four_axes.get((folder, case_id), {}))
        for (folder, case_id), files in found.items()
        if files.keys() & {*modalities}
    ]
    if not cases:
        raise MissingDataError(
            f"the input must hold files named by modality ({', '.join(modalities)}), such as "
            f"CASE/{modalities[0]}.nii.gz or CASE_{modalities[0]}.mha; found none in {root}. "
            f"Rename the files; endings are {', '.join(volume_io.SUFFIXES)}."
        )
    return sorted(cases, key=lambda case: case.case_id)


def _volume_name(path: Path) -> str | None:
    """Name of a volume without its ending, or of a folder that may hold a DICOM series."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        inside = list(path.iterdir())
        plain = inside and all(p.is_file() and _volume_name(p) is None for p in inside)
        return path.name if plain else None
    ending = next((s for s in volume_io.SUFFIXES if path.name.lower().endswith(s)), None)
    return path.name[: -len(ending)] if ending else None


def _case_and_modality(
    stem: str, folder: Path, wanted: Sequence[str], channels: Mapping[int, str]
) -> tuple[str, str | None]:
    """Case and modality that a file name means; no modality for a channel that is not wanted.

    Neither for other files.
    """
    modality = modality_of(stem, wanted)
    if modality is not None:
        return folder.resolve().name, modality
    if numbered := re.fullmatch(r"(.+)_(\d{4})", stem):
        return numbered[1], channels.get(int(numbered[2]))
    for separator in re.finditer(r"[_\s.-]", stem):  # from the left: the longest name first
        modality = modality_of(stem[separator.end() :], wanted)
        if modality is not None and separator.start():
            return stem[: separator.start()], modality
    return "", None


def _holds_channels(path: Path) -> bool:
    """Whether a file of no modality's name holds them all, by where it lies: labels do not."""
    folder = path.parent
    return path.name.lower().endswith(volume_io.NIFTI_SUFFIXES) and (
        folder.name.startswith("images") or (folder / "dataset.json").is_file()
    )


def _channels(folder: Path, wanted: Sequence[str]) -> dict[int, str]:
    """Modality by channel number, from ``dataset.json`` beside or above ``folder``."""
    file = next((f for f in (folder, folder.parent) if (f / "dataset.json").is_file()), None)
    if file is None:
        return {}
    try:
        names = json.loads((file / "dataset.json").read_text("utf-8"))
        names = names.get("channel_names", names.get("modality", {}))
        named = {int(number): modality_of(str(name), wanted) for number, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise DataError(
            f'{file / "dataset.json"} must hold "channel_names", such as {{"0": "T2W"}}; got: '
            f"{error}. Correct the file."
        ) from None
    return {number: modality for number, modality in named.items() if modality}


def _case_files(
    case_id: str,
    folder: Path,
    files: Mapping[str, list[Path]],
    wanted: Sequence[str],
    channels: Mapping[str, int],
) -> CaseFiles:
    return CaseFiles(
        case_id=case_id,
        patient_id=case_id,
        images={name: paths[0] for name, paths in files.items() if name != GLAND},
        label=None,
        gland=files[GLAND][0] if GLAND in files else None,
        looked_for={name: f"'{name}' in {folder}" for name in wanted},
        channels=channels,
        problems=tuple(
            Problem(
                case_id,
                None,
                f"a case must have one file for '{name}'; got {', '.join(p.name for p in paths)} "
                f"in {folder}. Remove all but one.",
            )
            for name, paths in files.items()
            if len(paths) > 1
        ),
    )


def read_case(files: CaseFiles, data: DataConfig) -> Case:
    """Read and preprocess one case.

    Raises:
        DataError: what is wrong with it.
    """
    if files.problems:
        raise DataError("\n".join(problem.text for problem in files.problems))
    raw = RawCase(
        case_id=files.case_id,
        patient_id=files.patient_id,
        images={
            name: volume_io.read_volume(path, files.channels.get(name))
            for name, path in files.images.items()
        },
        label=None,
        gland=volume_io.read_volume(files.gland) if files.gland else None,
    )
    return preprocessing.preprocess_case(raw, data, require_label=False)


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
    refuse_other_results(command.output, identity, settings)
    programs = ["predict", *(["attention"] if command.attention else [])]
    for name in programs:
        model.compile(name)
    log(
        f"{len(entries)} cases; {', '.join(facts.classes)} from {', '.join(facts.modalities)}, "
        f"{len(facts.members)} members, model {model.sha256[:12]}"
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
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
        pending: collections.deque[Future[dict[str, Any]]] = collections.deque()
        read_cases = zip(entries, read_ahead(readers, read, entries), strict=True)
        for entry, case in progress(read_cases, description="Predicting", total=len(entries)):
            if isinstance(case, DataError):
                fail(entry, case)
                continue
            before = time.perf_counter()
            computed = compute(model, case, attention=command.attention)
            computing += time.perf_counter() - before
            while len(pending) >= READ_AHEAD:
                results.append(pending.popleft().result())
            pending.append(writers.submit(write, computed))
        results += [future.result() for future in pending]
    wall, processor = time.perf_counter() - started, time.process_time() - processor
    failed = sum("error" in result for result in results)
    record = {
        "disclaimer": DISCLAIMER,
        "model": identity,
        "cmsad_jax": __version__,
        "settings": settings,
        "coordinates": "centre_mm is x y z in RAS+ millimetres (NIfTI's world)",
        "wall_s": round(wall, 3),
        "compute_s": round(computing, 3),
        "processor_s": round(processor, 3),
        "processor_beside_s": round(beside[0], 3),
        "cases": sorted(results, key=lambda result: result["case_id"]),
    }
    command.output.mkdir(parents=True, exist_ok=True)
    write_text(command.output / "predictions.json", json.dumps(record, indent=1) + "\n")
    log(
        f"{len(results) - failed} of {len(results)} cases predicted in {wall:.1f} s "
        f"({60 * len(results) / max(wall, 1e-9):.0f} a minute, {computing / max(wall, 1e-9):.0%} "
        f"of it computing); {command.output / 'predictions.json'}"
    )
    return failed


def refuse_other_results(
    output: Path, identity: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise ``ConfigError`` if a folder holds the results of another model or other settings."""
    file = output / "predictions.json"
    if not file.is_file():
        return
    old = read_json(file)
    before, now = old["model"]["sha256"][:12], identity["sha256"][:12]
    if before != now or old["settings"] != dict(settings):
        raise ConfigError(
            f"a folder holds the results of one model and its settings; {output} holds those of "
            f"{before} with {old['settings']}, and this is {now} with {dict(settings)}. "
            "Name another folder with --output."
        )


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
