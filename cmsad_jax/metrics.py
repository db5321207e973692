"""Overlap of a prediction with the truth: jit-able, per example, nan where it is undefined.

Average with ``jnp.nanmean``: an example without foreground has no Dice, and must not lend it one.
All raise ``ConfigError`` where the shapes of prediction and labels differ.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cmsad_jax.types import ConfigError, PerExample

Classes = Int[Array | np.ndarray, "b *space"] | Bool[Array | np.ndarray, "b *space"]
"""Class of each voxel; a mask counts as class 1."""


def dice_score(prediction: Classes, labels: Classes, *, class_index: int = 1) -> PerExample:
    """``2 |T & P| / (|T| + |P|)`` of one class; nan where the truth ``T`` is empty.

    Examples:
        >>> dice_score(jnp.array([[1, 1, 0, 0]]), jnp.array([[1, 0, 0, 0]])) > 0.66
        Array([ True], dtype=bool)
    """
    both, predicted, true = _counts(prediction, labels, class_index)
    return _where(true > 0, 2 * both, true + predicted)


def sensitivity(prediction: Classes, labels: Classes, *, class_index: int = 1) -> PerExample:
    """``|T & P| / |T|`` of one class; nan where the truth ``T`` is empty.

    Examples:
        >>> sensitivity(jnp.array([[1, 1, 0, 0]]), jnp.array([[1, 0, 0, 0]]))
        Array([1.], dtype=float32)
    """
    both, _, true = _counts(prediction, labels, class_index)
    return _where(true > 0, both, true)


def precision(prediction: Classes, labels: Classes, *, class_index: int = 1) -> PerExample:
    """``|T & P| / |P|`` of one class; nan where the truth or the prediction is empty.

    Examples:
        >>> precision(jnp.array([[1, 1, 0, 0]]), jnp.array([[1, 0, 0, 0]]))
        Array([0.5], dtype=float32)
    """
    both, predicted, true = _counts(prediction, labels, class_index)
    return _where((true > 0) & (predicted > 0), both, predicted)


def _counts(prediction: Classes, labels: Classes, class_index: int) -> Float[Array, "3 b"]:
    """Number of voxels in both, in the prediction, in the truth; exact to 2^24."""
    shapes = [getattr(x, "shape", type(x).__name__) for x in (prediction, labels)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            "prediction and labels must have one shape, b *space; "
            f"got {shapes[0]} and {shapes[1]}. Take logits[..., 0] > 0, or argmax over classes."
        )
    space = tuple(range(1, labels.ndim))
    p, t = prediction == class_index, labels == class_index
    return jnp.stack([x.sum(space) for x in (p & t, p, t)]).astype(jnp.float32)


def _where(defined: Bool[Array, " b"], over: PerExample, under: PerExample) -> PerExample:
    return jnp.where(defined, over / jnp.where(defined, under, 1.0), jnp.nan)
