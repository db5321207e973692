"""What is kept of some cases of a fold for the report's pictures."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.case import Case, spacing_of
from data_pipelines.files import atomic_file
from data_pipelines.targets import IGNORED
from experiments.measuring.rows import Row
from experiments.prediction.windows import Params, predict_case, scaled_image, through_windows
from experiments.settings.config import Config
from experiments.training.programs import Programs


def cases_to_show(rows: Sequence[Row], count: int) -> list[str]:
    """Best, median and worst case by Dice, and the lesion-free one with most false positives.

    Where more are asked for, lesion-free ones and the others follow, the worst first.
    """
    ranked = sorted((row.dice, row.case_id) for row in rows if row.dice is not None)
    negatives = sorted(
        (row.false_positive_volume_ml, row.case_id) for row in rows if row.dice is None
    )
    chosen = [ranked[i][1] for i in (-1, len(ranked) // 2, 0)] if ranked else []
    falsely = [case_id for _, case_id in reversed(negatives)]
    rest = [case_id for _, case_id in ranked if case_id not in chosen]
    chosen += falsely[:1]
    for pair in itertools.zip_longest(rest, falsely[1:]):
        chosen += [case_id for case_id in pair if case_id is not None]
    return list(dict.fromkeys(chosen))[:count]


def save_figure(config: Config, programs: Programs, params: Params, case: Case, file: Path) -> None:
    """Keep a case's images, truth, probability and attention maps for the report's pictures.

    All lie on the network's grid; where that and the T2W file's lie is kept too, and the truth on
    the latter. Attention is kept as uint8 ``d h w m s``, each map relative to its largest value and
    averaged in plane down to about 64 voxels: its own resolution is coarse. Early fusion has none.
    Of a fusion that weighs modalities, their weights are kept, ``m``.
    """
    modalities, num_stages = config.data.modalities, config.network.encoder.num_stages
    maps: dict[str, np.ndarray] = {}
    if config.network.fusion.kind != "early":
        attention = through_windows(
            programs.attention, params, case, config, len(modalities) * num_stages
        ).reshape(*case.label.shape, len(modalities), num_stages)
        largest = np.maximum(attention.max((0, 1, 2)), 1e-12)
        coarse = np.stack([mean_pool(volume / largest) for volume in attention])
        maps["attention"] = np.round(255 * coarse).astype(np.uint8)
    if programs.modality_weights is not None:
        weights = through_windows(programs.modality_weights, params, case, config, len(modalities))
        maps["modality_weights"] = weights.mean((0, 1, 2))
    probability = predict_case(programs.predict, params, case, config)
    with atomic_file(file) as partial:
        np.savez_compressed(
            partial,
            allow_pickle=False,
            image=scaled_image(case)[..., : len(modalities)].astype(np.float16),
            modalities=np.array(modalities),
            probability=probability.astype(np.float16),
            **grids(case),
            **maps,
        )


def grids(case: Case) -> dict[str, np.ndarray]:
    """The truth, and where the network's grid and that of the T2W file lie."""
    return {
        "truth": np.where(case.label == IGNORED, 0, case.label),
        "spacing_mm": np.array(spacing_of(case.affine)),
        "affine": case.affine,
        "original_affine": case.original_affine,
        "original_shape": np.array(case.original_shape),
        "original_truth": np.where(case.truth == IGNORED, 0, case.truth),
        "truth_offset": np.array(case.truth_offset),
    }


def mean_pool(image: np.ndarray, largest: int = 64) -> np.ndarray:
    """Means over square blocks of ``h w ...``, so that neither side exceeds about ``largest``."""
    height, width = image.shape[:2]
    size = -(-max(height, width) // largest)
    rows, columns = np.arange(0, height, size), np.arange(0, width, size)
    total = np.add.reduceat(np.add.reduceat(image, rows, 0), columns, 1)
    counts = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    return total / counts.reshape(*counts.shape, *(1,) * (image.ndim - 2))
