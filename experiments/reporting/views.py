"""A case as it is looked at: every layer on one grid, that of the T2W file.

Slices go from inferior to superior, rows from posterior to anterior, columns from the patient's
left to the right: the canonical axes of ``data_pipelines.preparing.geometry``. What is shown is cut
to where the network looked, and to the truth where it reaches further.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.case import Volume, spacing_of
from data_pipelines.preparing.geometry import canonical, index_transform, resample


@dataclasses.dataclass(frozen=True)
class View:
    """The layers of a case on one grid.

    Attributes:
        title, caption: of the case, for people.
        modalities: names of the images.
        images: ``d h w m``.
        truth: integer ``d h w``, class ``i`` as ``i + 1``; None where it is not known.
        mask: likewise, what was predicted.
        foreground: probability of any class, ``d h w``.
        attention: uint8 ``d h w m s``, with an h and a w of its own, each map relative to its
            largest value; None where there is none.
        spacing_mm: voxel size, ``d h w``.
        index: slice that tells most.
        affine: of the grid, 4 x 4, index ``(w, h, d)`` to RAS+ millimetres; None where it is not
            known, as of runs of the earliest versions, whose layers lie on the network's grid.
        attention_step: voxels of the grid along h and w for each value of ``attention``.
        modality_weights: how much each counts, of a model that weighs them; else empty.
    """

    title: str
    caption: str
    modalities: Sequence[str]
    images: np.ndarray
    truth: np.ndarray | None
    mask: np.ndarray
    foreground: np.ndarray
    attention: np.ndarray | None
    spacing_mm: Sequence[float]
    index: int
    affine: np.ndarray | None = None
    attention_step: tuple[float, float] = (1.0, 1.0)
    modality_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def truth_or_empty(self) -> np.ndarray:
        """The truth, or a mask of nothing."""
        return np.zeros_like(self.mask) if self.truth is None else self.truth


def read_view(
    file: Path, title: str, caption: str, num_classes: int, threshold: float | None
) -> View:
    """What a run kept of a case (``experiments.reporting.figures``).

    Args:
        file: as ``save_figure`` wrote it, in this or an earlier version.
        title: of the case.
        caption: likewise.
        num_classes: of the foreground.
        threshold: of the probability, for one class; None is one half.
    """
    with np.load(file, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    on_t2w = "original_affine" in data
    layers = _on_t2w(data) if on_t2w else data
    foreground, mask = foreground_and_mask(
        layers["probability"], num_classes, 0.5 if threshold is None else threshold
    )
    attention, step = layers.get("attention"), (1.0, 1.0)
    if attention is not None:
        step = layers["attention_step"] if on_t2w else _steps(mask, attention)
    modalities = [str(name) for name in data["modalities"]]
    weights = {}
    if "modality_weights" in data:
        weights = dict(zip(modalities, map(float, data["modality_weights"]), strict=True))
    return View(
        title=title,
        caption="; ".join(text for text in (caption, weights_in_words(weights)) if text),
        modalities=modalities,
        modality_weights=weights,
        images=layers["image"],
        truth=layers["truth"],
        mask=mask,
        foreground=foreground,
        attention=attention,
        spacing_mm=[float(step) for step in layers["spacing_mm"]],
        index=slice_to_show(layers["truth"], mask, foreground),
        affine=layers.get("affine") if on_t2w else None,
        attention_step=(float(step[0]), float(step[1])),
    )


def weights_in_words(weights: Mapping[str, float]) -> str:
    """How much each modality counts, for people; empty without weights."""
    told = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
    return f"weights of the modalities: {told}" if told else ""


def _steps(mask: np.ndarray, attention: np.ndarray) -> tuple[float, float]:
    height, width = mask.shape[1:]
    return height / attention.shape[1], width / attention.shape[2]


def _on_t2w(data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layers of a figure, brought from the network's grid to that of the T2W file."""
    truth = np.zeros(data["original_shape"], np.uint8)
    offset, part = data["truth_offset"], data["original_truth"]
    truth[tuple(slice(a, a + n) for a, n in zip(offset, part.shape, strict=True))] = part
    whole = canonical(Volume(truth, data["original_affine"]))
    reference, grid = data["affine"], data["truth"].shape
    low, high = seen_box(whole, grid, reference)
    affine = moved(whole.affine, low)
    shape = (int(high[0] - low[0]), int(high[1] - low[1]), int(high[2] - low[2]))

    def brought(volume: np.ndarray) -> np.ndarray:
        return resample(Volume(volume, reference), shape, affine, order=1)[0]

    probability = data["probability"].reshape(*grid, -1)
    layers = {
        "image": brought_each(brought, data["image"]),
        "probability": brought_each(brought, probability),
        "truth": whole.array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))],
        "spacing_mm": np.array(spacing_of(affine)),
        "affine": affine,
    }
    if "attention" in data:
        layers |= _attention_on_t2w(data, shape, affine)
    return layers


def brought_each(bring, volumes: np.ndarray) -> np.ndarray:
    """``bring`` of each channel of ``d h w c``."""
    return np.stack([bring(volumes[..., c]) for c in range(volumes.shape[-1])], -1)


def _attention_on_t2w(
    data: Mapping[str, np.ndarray], shape: tuple[int, int, int], affine: np.ndarray
) -> dict[str, np.ndarray]:
    """The attention maps, no finer in plane than they were kept."""
    maps, grid = data["attention"], data["truth"].shape
    block = -(-max(grid[1:]) // 64)  # of ``experiments.reporting.figures.mean_pool``
    step = max(1, -(-max(shape[1:]) // 64))
    size = (shape[0], -(-shape[1] // step), -(-shape[2] // step))
    source, target = coarser(data["affine"], block), coarser(affine, step)

    def brought(volume: np.ndarray) -> np.ndarray:
        return resample(Volume(volume, source), size, target, order=1)[0]

    flat = brought_each(brought, maps.reshape(*maps.shape[:3], -1))
    rounded = np.round(flat).astype(np.uint8).reshape(*size, *maps.shape[3:])
    return {"attention": rounded, "attention_step": np.array((step, step))}


def seen_box(
    volume: Volume, grid: Sequence[int], affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last (excluded) index ``d h w`` of what a grid covers of a volume.

    What is above 0 in the volume is covered in any case.
    """
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in grid))))
    matrix, offset = index_transform(volume.affine, affine)
    reach = corners @ matrix.T + offset
    low, high = np.floor(reach.min(0) + 0.5 + 1e-3), np.ceil(reach.max(0) + 0.5 - 1e-3)
    found = np.argwhere(volume.array)
    if len(found):
        low, high = np.minimum(low, found.min(0)), np.maximum(high, found.max(0) + 1)
    low = np.clip(low, 0, np.subtract(volume.shape, 1)).astype(int)
    return low, np.clip(high, low + 1, volume.shape).astype(int)


def moved(affine: np.ndarray, index: Sequence[int] | np.ndarray) -> np.ndarray:
    """The affine of the part of a grid that begins at an index ``d h w``."""
    result = np.array(affine, np.float64)
    result[:3, 3] += result[:3, :3] @ np.asarray(index)[::-1]
    return result


def coarser(affine: np.ndarray, step: float) -> np.ndarray:
    """The affine of the means over ``step`` x ``step`` voxels in plane."""
    blocks = np.diag([step, step, 1.0, 1.0])
    blocks[:2, 3] = (step - 1) / 2
    return np.asarray(affine, np.float64) @ blocks


def foreground_and_mask(
    probability: np.ndarray, num_classes: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of any foreground and the predicted classes, both ``d h w``.

    ``probability`` is ``d h w``, ``d h w 1``, or ``d h w k`` with background first.
    """
    probability = probability.astype(np.float32)
    if num_classes > 1:
        return probability[..., 1:].sum(-1), probability.argmax(-1).astype(np.uint8)
    if probability.ndim == 4:
        probability = probability[..., 0]
    return probability, (probability > threshold).astype(np.uint8)


def slice_to_show(truth: np.ndarray, mask: np.ndarray, probability: np.ndarray) -> int:
    """Slice with most truth, else with most prediction, else with the largest probability."""
    for found in (truth > 0, mask > 0):
        if found.any():
            return int(found.sum((1, 2)).argmax())
    return int(probability.max((1, 2)).argmax())
