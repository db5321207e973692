"""Convolution of volumes in two dimensions, for platforms whose 3D convolution is slow."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmsad_jax.kernels import reference


def folded_convolution(
    x: Float[Array, "b d h w c"], kernel: Float[Array, "kd kh kw c o"], *, strides: tuple[int, ...]
) -> Float[Array, "b d2 h2 w2 o"]:
    """3D convolution as one 2D convolution of all slices, or one matrix product if ``1x1x1``.

    The slices that meet in an output slice, one for each depth tap, are stacked in the channels,
    and the depth is folded into the batch. On CPUs, where XLA has no fast 3D convolution, forward
    and gradient are 3 to 9 times faster, and with strides tens of times. The sums over taps and
    channels are one reduction, as in the 3D convolution, so precision is the same in every dtype.
    """
    sizes = kernel.shape[:3]
    # Along an axis where the kernel is 1, a stride only selects positions.
    skips = [step if size == 1 else 1 for size, step in zip(sizes, strides, strict=True)]
    steps = [1 if size == 1 else step for size, step in zip(sizes, strides, strict=True)]
    x = x[:, :: skips[0], :: skips[1], :: skips[2]]
    if math.prod(sizes) == 1:
        return x @ kernel.reshape(kernel.shape[3:])
    taps = _depth_taps(x, sizes[0], steps[0])
    b, d, *plane, c = taps.shape
    y = reference.convolution(
        taps.reshape(b * d, *plane, c),
        jnp.concatenate(list(kernel), axis=-2),
        strides=tuple(steps[1:]),
    )
    return y.reshape(b, d, *y.shape[1:])


def pointwise_convolution(
    x: Float[Array, "b d h w c"],
    kernel: Float[Array, "1 1 1 c o"],
    *,
    strides: tuple[int, ...],
) -> Float[Array, "b d2 h2 w2 o"]:
    """``folded_convolution`` of a kernel of one voxel, by NVIDIA's library.

    Of a product, XLA has the operand computed where it is multiplied, and then stops for many
    sizes, since no tile of it can be read (``Couldn't find output tile sizes``).
    """
    x = x[:, :: strides[0]]
    b, d, *plane, c = x.shape
    y = reference.convolution(x.reshape(b * d, *plane, c), kernel[0], strides=strides[1:])
    return y.reshape(b, d, *y.shape[1:])


def _depth_taps(
    x: Float[Array, "b d h w c"], size: int, step: int
) -> Float[Array, "b d2 h w taps"]:
    """The ``size`` slices under the kernel at each output slice, stacked in the channels."""
    if size == 1:
        return x
    depth, half = x.shape[1], size // 2
    last = -(-depth // step) * step - step
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate(
        [jax.lax.slice_in_dim(padded, i, i + last + 1, step, axis=1) for i in range(size)], -1
    )
