"""A run folder as ``experiments.cv`` leaves it, made of simple shapes, for the report's tests."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.serving.splits import Folds
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.mean_shape import MeanShape
from experiments.measuring.metrics import METRICS
from experiments.measuring.rows import Row
from experiments.measuring.summary import summarise
from experiments.process.environment import Environment
from experiments.process.records import write_record
from experiments.run_folder import SCHEMA, Best, FoldSummary, Results, RunFolder, RunRecord

SPACING_MM = (3.0, 1.0, 1.0)
SHAPE = (8, 40, 48)
LOSS_TERMS = (
    "dice_loss",
    "cross_entropy_loss",
    "cross_modal_distillation_loss",
    "self_distillation_loss",
    "correlation_loss",
)


def ellipsoid(centre: Sequence[float], radius_mm: Sequence[float]) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    offset_mm = (grid - centre) * SPACING_MM
    return ((offset_mm / radius_mm) ** 2).sum(-1) <= 1


def row_of(
    case_id: str,
    *,
    patient_id: str | None = None,
    fold: int | None = 0,
    name: str = "lesion",
    truth_ml: float = 1.0,
    predicted_ml: float = 1.0,
    **metrics: float | None,
) -> Row:
    """A row with these metrics; all others are undefined."""
    values = dict.fromkeys(METRICS) | {
        "false_positive_volume_ml": 0.0,
        "volume_truth_ml": truth_ml,
        "volume_predicted_ml": predicted_ml,
    }
    return Row(case_id, patient_id or case_id, fold, name, values | metrics)


def make_run(
    folder: Path,
    *,
    classes: tuple[str, ...] = ("lesion",),
    modalities: tuple[str, ...] = ("t2w", "adc", "hbv"),
    num_folds: int = 5,
    done: Sequence[int] | None = None,
    cases_per_fold: int = 6,
    positive_share: float = 0.5,
    history: bool = True,
    figures: bool = True,
    extras: bool = True,
) -> Path:
    """Write a run; ``extras`` are the files and keys that a run may lack."""
    rng = np.random.default_rng(0)
    done = range(num_folds) if done is None else done
    ids = [[f"case_{f}{i:02d}" for i in range(cases_per_fold)] for f in range(num_folds)]
    folds = Folds(tuple(tuple(cases) for cases in ids))
    run = RunFolder(folder)
    folds.save(run.folds)
    target = "lesion" if len(classes) == 1 else "zones"
    rule = Rule(target, 0.5)
    rows: list[Row] = []
    for fold in done:
        of_fold = run.fold(fold)
        of_fold.figures.mkdir(parents=True)
        if history:
            write_history(of_fold.history, rng)
        for number, case_id in enumerate(ids[fold]):
            positive = number < round(positive_share * cases_per_fold)
            truth, probability = make_masks(rng, positive, len(classes), miss=number == 0)
            channels = probability[..., None] if len(classes) == 1 else probability
            rows += measure_case(
                case_id, case_id, fold, channels, truth, SPACING_MM, rule, detect=extras
            )
            if figures and number in (1, 2, cases_per_fold - 1):
                draw_figure(of_fold.figure(case_id), rng, modalities, truth, probability)
    results = Results(summarise(rows, list(done)), target, classes, rule.threshold, "last")
    if extras:
        results = write_extras(run, results, list(done), num_folds, modalities)
    run.write_results(results)
    return folder


def draw_figure(
    file: Path,
    rng: np.random.Generator,
    modalities: Sequence[str],
    truth: np.ndarray,
    probability: np.ndarray,
) -> None:
    """What a pictured case is drawn from: a body with a dark lesion, and attention to it."""
    image = rng.normal(size=(*SHAPE, len(modalities))) - 2.0 * truth[..., None]
    image *= ellipsoid((4, 20, 24), (12, 18, 22))[..., None]
    energy = probability.reshape(*SHAPE, -1)[..., -1][:, ::2, ::2]
    attention = np.stack([np.stack([energy, energy**2], -1)] * len(modalities), -2)
    np.savez_compressed(
        file,
        image=image.astype(np.float16),
        modalities=np.array(modalities),
        truth=truth,
        probability=probability.astype(np.float16),
        attention=np.round(255 * attention).astype(np.uint8),
        spacing_mm=np.array(SPACING_MM),
    )


def write_extras(
    run: RunFolder,
    results: Results,
    done: Sequence[int],
    num_folds: int,
    modalities: Sequence[str],
) -> Results:
    """Write the files that a run may lack; the results with the keys that they may lack."""
    best = Best(200, 0.71)
    results = dataclasses.replace(
        results,
        num_folds=num_folds,
        folds_done=tuple(done),
        baseline_mean_shape=MeanShape(0.123, 7),
        best_checkpoint=dict.fromkeys(done, best),
        fold_summaries=dict.fromkeys(
            done,
            FoldSummary(
                first_step_s=9.1,
                train_s=71.5,
                examples_per_s=25.0,
                steps_per_s=12.5,
                loss=0.5,
                skipped_updates=0,
                best=best,
                predict_s=6.0,
                peak_memory_gb=1.23,
            ),
        ),
    )
    config = {"seed": 0, "data": {"name": "phantom", "modalities": list(modalities)}}
    write_record(run.config, RunRecord(config, "0123abcd"), schema=SCHEMA)
    environment = Environment(
        started="2030-01-02T03:04:05+00:00",
        device="1 x cpu",
        git_commit="abc123",
        versions={"jax": "1.2.3", "orbax-checkpoint": None},
    )
    write_record(run.environment, environment, schema=SCHEMA)
    return results


def keep_one_figure(run: Path, image: np.ndarray) -> None:
    """Leave the run one pictured case: ``image`` (``d h w``) with a box of truth, one modality."""
    first, *others = sorted(run.glob("fold_*/figures/*.npz"))
    for file in others:
        file.unlink()
    truth = np.zeros(image.shape, np.uint8)
    height, width = image.shape[1:]
    truth[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    np.savez_compressed(
        first,
        image=image[..., None].astype(np.float16),
        modalities=np.array(["t2w"]),
        truth=truth,
        probability=(0.9 * truth).astype(np.float16),
        spacing_mm=np.array(SPACING_MM),
    )


def make_masks(
    rng: np.random.Generator, positive: bool, num_classes: int, *, miss: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Truth, and probability with a shifted blob: ``d h w``, or ``d h w k`` for several classes."""
    centre = np.array([4.0, 20.0, 24.0])
    if num_classes > 1:
        outer, inner = ellipsoid(centre, (9, 14, 18)), ellipsoid((4, 23, 24), (7, 7, 10))
        truth = np.where(inner, 2, outer).astype(np.uint8)
        soft = np.eye(3)[np.roll(truth, 1, 1)] * 0.8 + 0.1
        return truth, soft / soft.sum(-1, keepdims=True)
    centre += rng.uniform(-1, 1, 3) * (1, 8, 10)
    radius = rng.uniform(4, 9)
    truth = ellipsoid(centre, (radius, radius, radius)) * np.uint8(positive)
    shifted = np.roll(ellipsoid(centre, (radius, radius, radius)), int(rng.integers(0, 4)), 2)
    strength = 0.1 if miss or (not positive and rng.random() < 0.6) else 0.9
    return truth, np.clip(strength * shifted + rng.uniform(0, 0.05, SHAPE), 0, 1)


def write_history(path: Path, rng: np.random.Generator) -> None:
    steps = np.arange(5, 305, 5)
    with path.open("w", encoding="utf-8", newline="") as file:
        names = ("step", "loss", *LOSS_TERMS, "learning_rate", "gradient_norm", "examples_per_s")
        writer = csv.DictWriter(file, (*names, "validation_dice"))
        writer.writeheader()
        for step in steps:
            decay = float(np.exp(-step / 100)) + rng.normal() * 0.03
            terms = dict.fromkeys(LOSS_TERMS, 0.2 + decay * 0.4) | {"correlation_loss": 0.0}
            writer.writerow(
                {
                    "step": step,
                    "loss": sum(terms.values()),
                    **terms,
                    "learning_rate": 1e-3 * (1 - step / 400),
                    "gradient_norm": 1 + abs(rng.normal()),
                    "examples_per_s": 25 + rng.normal(),
                    "validation_dice": 0.7 - decay / 2 if step % 100 == 0 else "",
                }
            )
