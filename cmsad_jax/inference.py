"""Whole volumes through a network that sees windows: Gaussian-weighted sliding window, flips."""

import dataclasses
import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from cmsad_jax.types import ConfigError, check_number

Predict = Callable[[Float[np.ndarray, "b *window m"], Bool[np.ndarray, "b m"]], Array | np.ndarray]
"""From windows to probabilities ``b *window k``; jitted by the caller, one shape throughout."""


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of windows that cover an axis evenly, overlapping by at least ``overlap``."""
    if size <= window:
        return [0]
    count = int(np.ceil((size - window) / max(1, int(window * (1 - overlap))))) + 1
    return [round(i * (size - window) / (count - 1)) for i in range(count)]


def importance(window: Sequence[int], *, sigma: float = 0.125) -> Float[np.ndarray, "*window"]:
    """Gaussian weight of each voxel of a window: 1 at the centre, positive everywhere.

    ``sigma`` is in units of the window's size along each axis.
    """
    weight = np.ones(tuple(window), np.float32)
    for axis, n in enumerate(window):
        position = (np.arange(n) - (n - 1) / 2) / max(n * sigma, 1e-6)
        shape = [1] * len(window)
        shape[axis] = n
        weight = weight * np.exp(-0.5 * position**2).reshape(shape).astype(np.float32)
    return np.maximum(weight, 1e-3)


def sliding_window(
    predict: Predict,
    image: Float[np.ndarray, "*space c"],
    present: Bool[np.ndarray, " m"],
    *,
    window: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    batch_size: int = 1,
    flip_axes: Sequence[int] = (),
    prior: bool = False,
) -> Float[np.ndarray, "*space k"]:
    """Probabilities of a whole image, from windows weighted by their distance from the centre.

    The image may be a volume for a network of slices: ``window`` then has two entries and every
    slice is an image of its own. Volumes smaller than the window are padded with 0 and the result
    is cut back. The loop runs on the host, so device memory does not grow with the volume.

    Args:
        predict: probabilities of a batch of windows; always called with ``batch_size`` of them.
        image: one case.
        present: its modalities, bool.
        window: spatial size the network takes.
        num_classes: ``k``.
        overlap: least share of a window that its neighbour sees as well, in [0, 1).
        batch_size: windows for each call.
        flip_axes: axes of ``window``; the result is the mean over all combinations of flips.
        prior: whether one channel follows those of ``present``: what an earlier network found.

    Raises:
        ConfigError: for settings outside their range, an image, window and ``present`` that do not
            fit each other, or a ``predict`` that returns another shape than ``b *window k``.

    Examples:
        >>> image, present = np.ones((4, 8, 8, 2), np.float32), np.array([True, True])
        >>> probability = sliding_window(
        ...     lambda windows, present: windows[..., :1] / 2,
        ...     image, present, window=(4, 4, 4), num_classes=1,
        ... )
        >>> probability.shape, float(probability.max())
        ((4, 8, 8, 1), 0.5)
    """
    window, flip_axes = _check_sliding(
        image, present, window, num_classes, overlap, batch_size, flip_axes, prior
    )
    if len(window) == image.ndim - 2:
        return sliding_window(
            lambda slices, mask: np.asarray(predict(slices[:, 0], mask))[:, None],
            image,
            present,
            window=(1, *window),
            num_classes=num_classes,
            overlap=overlap,
            batch_size=batch_size,
            flip_axes=[axis + 1 for axis in flip_axes],
            prior=prior,
        )
    space = image.shape[:-1]
    missing = [max(0, n - size) for n, size in zip(window, space, strict=True)]
    padding = [(gap // 2, gap - gap // 2) for gap in missing]
    padded = np.pad(image, [*padding, (0, 0)]) if any(missing) else image
    weight = importance(window)[..., None]
    total = np.zeros((*padded.shape[:-1], num_classes), np.float32)
    mass = np.zeros((*padded.shape[:-1], 1), np.float32)
    starts = [
        window_starts(size, n, overlap) for size, n in zip(padded.shape[:-1], window, strict=True)
    ]
    corners = [
        tuple(slice(start, start + n) for start, n in zip(corner, window, strict=True))
        for corner in itertools.product(*starts)
    ]
    flips = [
        axes
        for count in range(len(flip_axes) + 1)
        for axes in itertools.combinations(flip_axes, count)
    ]
    jobs = [(corner, axes) for corner in corners for axes in flips]
    for first in range(0, len(jobs), batch_size):
        chunk = jobs[first : first + batch_size]
        windows = np.stack([np.flip(padded[corner], axes) for corner, axes in chunk])
        filled = np.concatenate([windows, np.repeat(windows[:1], batch_size - len(chunk), 0)])
        result = np.asarray(predict(filled, np.tile(present, (batch_size, 1))), np.float32)
        if result.shape != (batch_size, *window, num_classes):
            raise ConfigError(
                "predict must return probabilities b *window k, "
                f"{(batch_size, *window, num_classes)} for num_classes={num_classes}; "
                f"got {result.shape}. Pass the num_classes of the network: 1 for one foreground "
                "class, else classes with the background."
            )
        for (corner, axes), values in zip(chunk, result, strict=False):
            total[corner] += weight * np.flip(values, axes)
            mass[corner] += weight
    inner = tuple(
        slice(before, before + size) for (before, _), size in zip(padding, space, strict=True)
    )
    total /= mass
    return total[inner]


def _check_sliding(
    image: Any,
    present: Any,
    window: Any,
    num_classes: Any,
    overlap: Any,
    batch_size: Any,
    flip_axes: Any,
    prior: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and axes of flips, as tuples; raises as ``sliding_window`` says."""
    if not isinstance(overlap, numbers.Real) or not 0 <= float(overlap) < 1:
        raise ConfigError(f"overlap must be in [0, 1); got {overlap!r:.80}. Use 0.5.")
    check_number("num_classes", num_classes, least=1, usual=1, whole=True)
    check_number("batch_size", batch_size, least=1, usual=1, whole=True)
    shape: Any = getattr(image, "shape", ())
    if len(shape) not in (3, 4) or 0 in shape:
        raise ConfigError(
            "the image must be one case, an array *space m of 2 or 3 axes of space; "
            f"got {shape or type(image).__name__}. Predict the cases of a batch one by one."
        )
    count = shape[-1] - prior
    if getattr(present, "shape", None) != (count,):
        raise ConfigError(
            f"present must have one entry for each channel of the image{' but the prior' * prior}; "
            f"got {getattr(present, 'shape', type(present).__name__)} beside an image {shape}. "
            f"Use numpy.ones({count}, bool) if all are there."
        )
    sizes = tuple(window) if isinstance(window, Sequence) else ()
    rank = len(shape) - 1
    if len(sizes) not in ({2, 3} & {rank, rank - 1}) or any(
        not isinstance(n, numbers.Integral) or n < 1 for n in sizes
    ):
        raise ConfigError(
            "window must be the size the network takes, 1 or more voxels along each axis of space, "
            f"or along h and w for a network of slices; got {window!r:.80} for an image {shape}. "
            f"Use {rank} numbers."
        )
    axes = tuple(flip_axes) if isinstance(flip_axes, Sequence) else (-1,)
    if len(set(axes)) != len(axes) or not set(axes) <= set(range(len(sizes))):
        raise ConfigError(
            f"flip_axes must be distinct axes of the window, 0 to {len(sizes) - 1}; "
            f"got {flip_axes!r:.80}. Use ({len(sizes) - 1},) for left and right."
        )
    return sizes, axes


@dataclasses.dataclass(frozen=True)
class EnsemblePrediction:
    """What several members say of one image.

    Attributes:
        probability: mean over the members.
        disagreement: their standard deviation (population), 0 for one member.
    """

    probability: Float[np.ndarray, "*space k"]
    disagreement: Float[np.ndarray, "*space k"]


def predict_ensemble(
    members: Sequence[Predict],
    image: Float[np.ndarray, "*space c"],
    present: Bool[np.ndarray, " m"],
    **options: Any,
) -> EnsemblePrediction:
    """Mean and spread of ``sliding_window`` over ``members``, one after the other.

    Memory does not grow with the number of members: mean and squared deviation are updated as
    each member is done (Welford 1962), in float32. ``options`` are those of ``sliding_window``.

    Raises:
        ConfigError: without any member, or as ``sliding_window``.
    """
    if not members:
        raise ConfigError("an ensemble must have at least one member; got none. Pass one or more.")
    mean = sliding_window(members[0], image, present, **options)
    squares = np.zeros_like(mean)
    for count, member in enumerate(members[1:], 2):
        deviation = sliding_window(member, image, present, **options)
        deviation -= mean
        mean += deviation / count
        deviation *= deviation
        squares += deviation * ((count - 1) / count)
    return EnsemblePrediction(mean, np.sqrt(squares / len(members), out=squares))


def entropy(probability: Float[np.ndarray, "*space k"]) -> Float[np.ndarray, "*space"]:
    """Uncertainty of each voxel's class, float32: 0 where it is certain, 1 where all are equal.

    Entropy of the foreground and its complement for ``k = 1``, else of the ``k`` classes, divided
    by the logarithm of their number. 0 where all probabilities are 0 (outside what was predicted).
    """
    probability = np.asarray(probability, np.float32)
    parts = [probability[..., k] for k in range(probability.shape[-1])]
    if len(parts) == 1:
        parts.append(1 - parts[0])
    total = np.zeros(probability.shape[:-1], np.float32)
    for p in parts:
        total -= p * np.log(np.maximum(p, np.finfo(np.float32).tiny))
    return total / np.float32(np.log(len(parts)))
