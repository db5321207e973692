"""Signed distance to the surface of the target, and how far a network is from it.

Source: docs/concepts/distance.md. Beside the mask, a network can learn how far each voxel is from
the target's surface: smooth, and never empty.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cmsad_jax.types import ConfigError, Labels, PerExample, check_number

DistanceMap = Float[Array, "b *space f"]
"""Millimetres to the surface of each foreground class ``f``, below 0 inside it."""


def signed_distance_mm(
    labels: Labels, *, spacing_mm: Sequence[float], clip_mm: float, num_classes: int = 1
) -> DistanceMap:
    """Distance of each voxel's centre to the nearest centre on the other side, in float32.

    Positive outside and negative inside the target, never 0, and clipped at ``clip_mm`` both ways;
    ``clip_mm`` everywhere if there is no target. Exact: along one axis after the other, the least
    sum of squares (Felzenszwalb & Huttenlocher, 2012). It knows what the array holds: a surface
    beyond its border is not seen.

    Args:
        labels: classes; with one foreground class, every value above 0.
        spacing_mm: size of a voxel along each axis of space.
        clip_mm: the largest distance that is told from others.
        num_classes: foreground classes ``f``.

    Raises:
        ConfigError: a size that is not positive, or not one for each axis.
    """
    check_number("clip_mm", clip_mm, least=0, usual=15, above=True)
    labels = jnp.asarray(labels)
    sizes = tuple(float(size) for size in spacing_mm)
    if len(sizes) != labels.ndim - 1 or not all(size > 0 for size in sizes):
        raise ConfigError(
            "spacing_mm must be the size of a voxel along each axis of space, above 0; "
            f"got {sizes} for labels of shape {labels.shape}. Use for example (3.0, 0.5, 0.5)."
        )
    wanted = range(1, num_classes + 1)
    masks = [labels > 0] if num_classes == 1 else [labels == each for each in wanted]
    signed = [
        jnp.where(mask, -_distance(~mask, sizes, clip_mm), _distance(mask, sizes, clip_mm))
        for mask in masks
    ]
    return jnp.stack(signed, -1)


def _distance(
    mask: Bool[Array, "b *space"], sizes: Sequence[float], limit: float
) -> Float[Array, "b *space"]:
    """To the nearest voxel of a mask, at most ``limit``."""
    squared = jnp.where(mask, 0.0, limit**2).astype(jnp.float32)
    for axis, size in enumerate(sizes, start=1):
        position = np.arange(mask.shape[axis]) * size
        apart = ((position[:, None] - position) ** 2).astype(np.float32)
        # the last axis of the sum is where the nearest voxel may be
        along = jnp.moveaxis(squared, axis, -1)[..., None, :]
        squared = jnp.moveaxis((along + apart).min(-1), -1, axis)
    return jnp.sqrt(jnp.minimum(squared, limit**2))


def distance_loss(
    distance_mm: DistanceMap, labels: Labels, *, spacing_mm: Sequence[float], clip_mm: float
) -> PerExample:
    """Mean absolute error of the distance in units of ``clip_mm``, over voxels and classes.

    Args:
        distance_mm: of the network, clipped.
        labels: of the examples.
        spacing_mm: as ``signed_distance_mm``.
        clip_mm: likewise.
    """
    truth = signed_distance_mm(
        labels, spacing_mm=spacing_mm, clip_mm=clip_mm, num_classes=distance_mm.shape[-1]
    )
    error = jnp.abs(distance_mm.astype(jnp.float32) - truth) / clip_mm
    return error.mean(tuple(range(1, error.ndim)))
