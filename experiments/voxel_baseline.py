"""How far voxels go by themselves: gradient boosting of intensities, blurs and position.

``python -m experiments.voxel_baseline`` takes the options of ``experiments.cv`` and fits one
boosted ensemble of trees to the training voxels of each fold. A voxel is described by its own
intensities, by the mean around it at a few scales, and by where it lies in the gland. What needs
shape, texture or a comparison between places cannot be told from that.

It is measured as a network is: probabilities go back into the frame of the original T2W file, mask
and lesion candidates are made and judged by the same code. Its threshold is that of the highest
mean Dice on training patients, each predicted by an ensemble that has not seen the patient.
Which patients train and validate is what ``experiments.cv`` has.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT, CaseInfo, spacing_of
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing.preprocessing import to_original
from data_pipelines.progress import progress
from data_pipelines.serving import loading, splits
from data_pipelines.short_help import program
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.summary import Summary, format_summary, summarise
from experiments.process.console import log, run_main
from experiments.settings.command_line import parse
from experiments.settings.config import Config, folds_asked, refuse_all

BLURS_MM = (2.0, 4.0, 8.0)
"""Standard deviations of the isotropic blurs."""
BACKGROUND_VOXELS = 2000
"""Background voxels drawn from each training case; of the foreground all are used."""
INNER_FOLDS = 3
"""Parts of the training patients, each predicted by the others to choose the threshold."""
NUM_THRESHOLDS = 400
"""Thresholds tried, just below quantiles of the probabilities of the foreground."""

Voxels = tuple[np.ndarray, np.ndarray]
"""Features ``n f`` and foreground ``n`` of one case."""
Classifier = Callable[[np.ndarray], np.ndarray]
"""Probability of foreground, of features ``n f``."""


def run(config: Config) -> Summary:
    """Train and measure the folds asked for.

    Raises:
        ConfigError: for a target of several classes.
        DataError: for faults of the data, or training patients of whom none has foreground.
    """
    refuse_all(config, "the voxel baseline")
    classes = config.data.classes
    target = config.data.definition
    if target.num_parts > 1 or target.ignore is not None or len(classes) > 1:
        raise ConfigError(
            f"the voxel baseline tells one class from background, with nothing ignored; got "
            f"{', '.join(classes)}{'' if target.ignore is None else ' and ignored voxels'}. "
            "Use --data.target=lesion or --data.target=gland."
        )
    from experiments.studies.cross_validation import (
        make_folds,  # slow to load, and not needed for --help
    )

    source = loading.build(config.data)
    folds = make_folds(config, source)
    described = Described(source, gland_masks(config.data))
    selected = folds_asked(config.folds, len(folds))
    rows = []
    for fold in progress(selected, description="voxel baseline", total=len(selected)):
        training = [info for info in source.info if info.case_id in set(folds.training(fold))]
        threshold = choose_threshold(described, training, seed=config.seed)
        classify = fit_cases(described, training, seed=config.seed)
        for case_id in folds.validation[fold]:
            case = source[case_id]
            probability = (
                classify(described[case_id][0]).astype(np.float32).reshape(case.label.shape)
            )
            rows += measure_case(
                case.case_id,
                case.patient_id,
                fold,
                to_original(probability[..., None], case),
                case.original_truth,
                spacing_of(case.original_affine),
                Rule(config.data.target, threshold, config.data.labels, config.data.lesions),
            )
    return summarise(rows, list(selected))


def gland_masks(data: DataConfig) -> loading.CaseSource | None:
    """The same cases with the gland as label, or None where there are none to be had."""
    if data.target == "gland":
        return None
    try:
        return loading.build(dataclasses.replace(data, target="gland"))
    except DataError as error:
        reason = str(error).splitlines()[0]
        log(f"no masks of the gland ({reason}): position is that on the reference grid")
        return None


class Described:
    """Features and foreground of each case, kept once they are made."""

    def __init__(self, source: loading.CaseSource, glands: loading.CaseSource | None):
        self._source = source
        self._glands = glands
        self._kept: dict[str, Voxels] = {}

    def __getitem__(self, case_id: str) -> Voxels:
        if case_id not in self._kept:
            case = self._source[case_id]
            gland = None if self._glands is None else self._glands.arrays(case_id).label > 0
            image = case.image * np.float32(STORED_UNIT)
            described = features(image, spacing_of(case.affine), gland)
            self._kept[case_id] = described, case.label.ravel() > 0
        return self._kept[case_id]


def features(
    image: np.ndarray, spacing_mm: Sequence[float], gland: np.ndarray | None
) -> np.ndarray:
    """What a voxel is described by, float32 ``n f``.

    Its scaled intensities ``m``; the same after each blur of ``BLURS_MM``; and its position: with
    a mask of the gland, from the mask's centre in half extents of the mask, and the distance to its
    surface in mm (below 0 inside); else from the centre of the grid in mm.

    Args:
        image: ``d h w m``.
        spacing_mm: voxel size, ``d h w``.
        gland: bool ``d h w``; an empty one counts as none.
    """
    columns = [image]
    for sd_mm in BLURS_MM:
        sd = [*(sd_mm / step for step in spacing_mm), 0]
        columns.append(scipy.ndimage.gaussian_filter(image, sd, mode="nearest"))
    index = np.moveaxis(np.indices(image.shape[:3]), 0, -1).astype(np.float32)
    if gland is not None and gland.any():
        inside = index[gland]
        low, high = inside.min(axis=0), inside.max(axis=0)
        columns.append((index - inside.mean(axis=0)) / ((high - low + 1) / 2))
        outside_mm, inside_mm = (
            np.asarray(scipy.ndimage.distance_transform_edt(mask, sampling=spacing_mm))
            for mask in (~gland, gland)
        )
        columns.append((outside_mm - inside_mm)[..., None])
    else:
        middle = (np.array(image.shape[:3]) - 1) / 2
        columns.append((index - middle) * np.asarray(spacing_mm))
    described = np.concatenate(columns, axis=-1, dtype=np.float32, casting="unsafe")
    return described.reshape(-1, described.shape[-1])


def choose_threshold(described: Described, training: Sequence[CaseInfo], *, seed: int) -> float:
    """The threshold of the highest mean Dice of training patients, each predicted by others.

    Of a single patient with foreground there are no others: it is predicted by itself.

    Raises:
        DataError: no training patient has foreground.
    """
    positive = {info.patient_id for info in training if info.positive}
    if not positive:
        raise DataError(
            f"training patients must hold the target; got {len(training)} cases without any. "
            "Use more cases or other folds."
        )
    parts = [(training, [info.case_id for info in training])]
    if len(positive) > 1:
        inner = splits.make_folds(training, num_folds=min(INNER_FOLDS, len(positive)), seed=seed)
        parts = [
            ([info for info in training if info.case_id not in held_out], held_out)
            for held_out in inner.validation
        ]
    scores = []
    for known, held_out in parts:
        classify = fit_cases(described, known, seed=seed)
        cases = [described[case_id] for case_id in held_out]
        scores += [(classify(case), label) for case, label in cases if label.any()]
    return best_threshold(scores)


def fit_cases(described: Described, training: Sequence[CaseInfo], *, seed: int) -> Classifier:
    """Fit one ensemble to a sample of the voxels of these cases."""
    sample = training_sample(
        [described[info.case_id] for info in training], np.random.default_rng(seed)
    )
    return fit(*sample, seed=seed)


def training_sample(
    cases: Sequence[Voxels], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, foreground and weights; with these the background counts as if all were used."""
    images, labels, weights = [], [], []
    for image, label in cases:
        background = np.flatnonzero(~label)
        drawn = rng.choice(background, min(BACKGROUND_VOXELS, background.size), replace=False)
        chosen = np.concatenate([np.flatnonzero(label), drawn])
        images.append(image[chosen])
        labels.append(label[chosen])
        weights.append(np.where(label[chosen], 1.0, background.size / max(drawn.size, 1)))
    return np.concatenate(images), np.concatenate(labels), np.concatenate(weights)


def fit(image: np.ndarray, label: np.ndarray, weight: np.ndarray, *, seed: int) -> Classifier:
    """Fit scikit-learn's histogram gradient boosting: 100 trees of at most 31 leaves.

    In one thread: several wait for each other where the processor is shared with other work, and
    then take five times as long as one.
    """
    from sklearn.ensemble import (
        HistGradientBoostingClassifier,  # slow to load, and not needed for --help
    )

    model = HistGradientBoostingClassifier(
        max_iter=100,
        l2_regularization=1.0,
        early_stopping=False,  # pyright: ignore[reportArgumentType]
        random_state=seed,
    )
    with threadpool_limits(1, user_api="openmp"):
        model.fit(image, label, sample_weight=weight * (label.size / weight.sum()))

    def classify(voxels: np.ndarray) -> np.ndarray:
        with threadpool_limits(1, user_api="openmp"):
            return model.predict_proba(voxels)[:, 1]

    return classify


def best_threshold(scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The threshold above which voxels are marked that gives the highest mean Dice.

    Args:
        scores: of each case, probabilities and foreground, ``n`` each; every case has foreground.
    """
    found = np.concatenate([values[foreground] for values, foreground in scores])
    thresholds = np.nextafter(np.quantile(found, np.linspace(0, 1, NUM_THRESHOLDS)), -np.inf)
    dice = []
    for values, foreground in scores:
        hits = _num_above(values[foreground], thresholds)
        marked = hits + _num_above(values[~foreground], thresholds)
        dice.append(2 * hits / (marked + foreground.sum()))
    return float(thresholds[np.mean(dice, axis=0).argmax()])


def _num_above(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return values.size - np.searchsorted(np.sort(values), thresholds, side="right")


def main() -> None:
    """Command line."""
    config = parse(
        prog=program("experiments.voxel_baseline"),
        description="What voxels tell by intensity, blurs and position; of a run's options, data, "
        "folds and seed count.",
    )
    found = run(config)
    print(f"gradient boosting of voxels on {config.data.name}, {config.data.target}:")
    print(format_summary(found))


if __name__ == "__main__":
    run_main(main)
