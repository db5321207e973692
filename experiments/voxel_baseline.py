"""How far single voxels go: logistic regression on intensities, on the folds of a run.

``python -m experiments.voxel_baseline`` takes the options of ``experiments.cv`` and fits, to the
training voxels of each fold, one regression for each choice of inputs, features and class
weights. A task that needs shape, place or context leaves this baseline far behind. It is favoured
on purpose: its threshold is the best one for each validation fold, and its best variant counts.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from data_pipelines.case import STORED_UNIT
from data_pipelines.serving import loading
from experiments.process.console import progress, run_main
from experiments.settings.command_line import parse
from experiments.settings.config import Config
from experiments.studies.cross_validation import make_folds

BACKGROUND_VOXELS = 2000
"""Background voxels drawn from each training case; of the foreground all are used."""
NUM_THRESHOLDS = 400
"""Thresholds tried, at quantiles of the scores of the validation fold's foreground."""

Voxels = tuple[np.ndarray, np.ndarray]
"""Intensities ``n m`` and foreground ``n`` of one case."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of the baseline.

    Attributes:
        modalities: its inputs.
        products: whether squares and pairwise products are features beside the intensities.
        balanced: whether both classes weigh the same in the fit.
    """

    modalities: tuple[str, ...]
    products: bool
    balanced: bool


def variants(modalities: Sequence[str]) -> list[Variant]:
    """All modalities together, then each alone, with each choice of features and weights."""
    inputs = [tuple(modalities), *((name,) for name in modalities if len(modalities) > 1)]
    flags = (False, True)
    return [Variant(names, p, b) for names in inputs for p in flags for b in flags]


def run(config: Config) -> dict[Variant, float]:
    """Mean Dice of every variant over all validation cases with foreground (any class)."""
    source = loading.build(config.data)
    folds = make_folds(config, source)
    names = config.data.modalities
    dice: dict[Variant, list[float]] = {variant: [] for variant in variants(names)}
    for fold, validation in enumerate(progress(folds.validation, description="voxel baseline")):
        rng = np.random.default_rng((config.seed, fold))
        image, label, weight = training_sample(
            [voxels(source, case_id) for case_id in folds.training(fold)], rng
        )
        cases = [case for case in (voxels(source, i) for i in validation) if case[1].any()]
        for variant, values in dice.items():
            columns = [names.index(name) for name in variant.modalities]
            decide = fit(image[:, columns], label, weight, variant)
            scores = [(decide(case[:, columns]), foreground) for case, foreground in cases]
            values.extend(best_dice(scores) if scores else [])
    return {variant: float(np.mean(values)) for variant, values in dice.items()}


def voxels(source: loading.CaseSource, case_id: str) -> Voxels:
    """Scaled intensities and foreground of a case on the reference grid."""
    image, label, _ = source.arrays(case_id)
    return image.reshape(-1, image.shape[-1]) * np.float32(STORED_UNIT), label.ravel() > 0


def training_sample(
    cases: Sequence[Voxels], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intensities, foreground and weights; with these the background counts as if all were used."""
    images, labels, weights = [], [], []
    for image, label in cases:
        background = np.flatnonzero(~label)
        drawn = rng.choice(background, min(BACKGROUND_VOXELS, background.size), replace=False)
        chosen = np.concatenate([np.flatnonzero(label), drawn])
        images.append(image[chosen])
        labels.append(label[chosen])
        weights.append(np.where(label[chosen], 1.0, background.size / max(drawn.size, 1)))
    return np.concatenate(images), np.concatenate(labels), np.concatenate(weights)


def fit(
    image: np.ndarray, label: np.ndarray, weight: np.ndarray, variant: Variant
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit one regression; returns its decision function, of voxels ``n m``."""
    if variant.balanced:
        weight = np.where(label, weight / weight[label].sum(), weight / weight[~label].sum())
    model = make_pipeline(
        PolynomialFeatures(degree=2 if variant.products else 1, include_bias=False),
        StandardScaler(),
        LogisticRegression(max_iter=1000),
    )
    weight = weight * (label.size / weight.sum())
    model.fit(image, label, logisticregression__sample_weight=weight)
    return model.decision_function


def best_dice(scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Dice of each case at the one threshold that gives the highest mean.

    Args:
        scores: of each case, decision values and foreground, ``n`` each; every case has foreground.
    """
    found = np.concatenate([values[foreground] for values, foreground in scores])
    thresholds = np.quantile(found, np.linspace(0, 1, NUM_THRESHOLDS))
    dice = []
    for values, foreground in scores:
        hits = _num_at_least(values[foreground], thresholds)
        marked = hits + _num_at_least(values[~foreground], thresholds)
        dice.append(2 * hits / (marked + foreground.sum()))
    table = np.array(dice)
    return table[:, table.mean(axis=0).argmax()]


def _num_at_least(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return values.size - np.searchsorted(np.sort(values), thresholds)


def format_table(dice: dict[Variant, float]) -> str:
    """One line for each variant, and the best of them."""
    lines = [f"{'inputs':<14}{'features':<20}{'weights':<12}{'Dice':>6}"]
    for variant, value in dice.items():
        features = "squares, products" if variant.products else "intensities"
        weights = "balanced" if variant.balanced else "as found"
        lines.append(f"{'+'.join(variant.modalities):<14}{features:<20}{weights:<12}{value:6.3f}")
    best = max(dice.values())
    lines.append(f"best of {len(dice)} voxel-wise logistic regressions: Dice {best:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    config = parse(
        prog="python -m experiments.voxel_baseline",
        description="What single voxels can tell; of a run's options, data, folds and seed count.",
    )
    print(format_table(run(config)))


if __name__ == "__main__":
    run_main(main)
