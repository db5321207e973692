"""Convolution of each channel by itself, as a sum over the taps of the kernel."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from cmsad_jax.types import ConfigError


def depthwise_convolution(
    x: Float[Array, "b *space c"], kernel: Float[Array, "*k c"], *, strides: Sequence[int]
) -> Float[Array, "b *out_space c"]:
    """Each channel with a kernel of its own, ``k // 2`` zeros on both sides.

    A stride ``s`` maps ``n`` positions to ``ceil(n / s)``. Computes in the type of its arguments.
    XLA fuses the sum over taps into one pass; forward and gradient on a CPU take a quarter to a
    twentieth of the time of its grouped convolution.

    Raises:
        ConfigError: if axes or channels disagree, or a kernel size is even.
    """
    sizes, rank = kernel.shape[:-1], x.ndim - 2
    if not len(sizes) == len(strides) == rank or kernel.shape[-1] != x.shape[-1]:
        raise ConfigError(
            "a depthwise kernel must have one entry for each axis of space, and one for each "
            f"channel; got x {x.shape}, kernel {kernel.shape} and strides {tuple(strides)}. "
            f"Use a kernel of shape (..., {x.shape[-1]})."
        )
    if any(size % 2 == 0 for size in sizes):
        raise ConfigError(f"kernel sizes must be odd; got {sizes}. Use 1, 3 or 5 along each axis.")
    padded = jnp.pad(x, ((0, 0), *((size // 2, size // 2) for size in sizes), (0, 0)))
    taps = []
    for tap in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(first, first + n, step)
            for first, n, step in zip(tap, x.shape[1:-1], strides, strict=True)
        )
        taps.append(padded[(slice(None), *window)] * kernel[tap])
    return sum(taps[1:], taps[0])
