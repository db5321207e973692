"""Features whose neighbouring columns share a vector, for convolutions of few channels on TPUs.

A TPU stores and multiplies 128 channels at a time, and fewer cost as much. Packed by ``p``, the
``p`` columns next to each other stand in the channels of one: ``b *space w c`` becomes ``b *space
w/p p*c``, which in memory is the same array. A convolution of packed features is a convolution with
a larger, partly empty kernel: at 32 channels four times the multiplications, of which the matrix
unit does sixteen times as many in a cycle.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cmsad_jax.kernels import reference

LANES = 128
"""Channels that a TPU stores and multiplies at a time."""


def packing_of(width: int, channels: int, outputs: int, step: int) -> tuple[int, int] | None:
    """Columns to pack of an input and of its convolution; None if none gains.

    The output is filled up to ``LANES`` channels, as far as its width divides; the input is packed
    by the stride times as many, so that the packs of both lie on each other.

    Args:
        width: columns of the input.
        channels: of the input.
        outputs: channels of the output.
        step: stride along the columns.
    """
    if width % step:
        return None
    after = 1
    while 2 * after * outputs <= LANES and width // step % (2 * after) == 0:
        after *= 2
    gains = after > 1 or (step > 1 and channels < LANES)
    return (after * step, after) if gains else None


def pack(x: Float[Array, "b *space w c"], size: int) -> Float[Array, "b *space w2 pc"]:
    """``size`` neighbouring columns as the channels of one."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size * x.shape[-1])


def unpack(x: Float[Array, "b *space w2 pc"], size: int) -> Float[Array, "b *space w c"]:
    """The columns that ``pack`` put together."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * size, x.shape[-1] // size)


def packed_convolution(
    x: Float[Array, "b *space w pc"],
    kernel: Float[Array, "*k c o"],
    *,
    strides: tuple[int, ...],
    packing: tuple[int, int],
) -> Float[Array, "b *out_space w2 po"]:
    """``kernels.convolution`` between features packed by the two sizes of ``packing_of``.

    The kernel is not packed, and is rounded to the type of ``x`` after it was: so its gradient sums
    the columns of a pack in the kernel's own type.
    """
    inputs, outputs = packing
    sizes = kernel.shape[:-2]
    taps, before, after = _packed_taps(sizes[-1], strides[-1], inputs, outputs)
    packed = jnp.einsum(
        "jtsk,...kco->...jtcso",
        jnp.asarray(taps, kernel.dtype),
        kernel,
        precision=jax.lax.Precision.HIGHEST,
    )
    packed = packed.reshape(
        *sizes[:-1], len(taps), inputs * kernel.shape[-2], outputs * kernel.shape[-1]
    ).astype(x.dtype)
    steps = (*strides[:-1], 1)
    # Along an axis where the kernel is 1, a stride only selects positions.
    selected = tuple(
        slice(None, None, n if k == 1 else 1) for n, k in zip(steps, sizes, strict=True)
    )
    x = x[:, *selected]
    steps = tuple(1 if k == 1 else n for n, k in zip(steps, sizes, strict=True))
    if math.prod(packed.shape[:-2]) == 1:
        return x @ packed.reshape(packed.shape[-2:])
    padding = [*((k // 2, k // 2) for k in sizes[:-1]), (before, after)]
    lead = x.shape[:2]
    if len(sizes) == 3 and sizes[0] == 1:
        x = x.reshape(lead[0] * lead[1], *x.shape[2:])
        packed, steps, padding = packed[0], steps[1:], padding[1:]
    y = reference.convolution(x, packed, strides=steps, padding=padding)
    return y if y.ndim == len(sizes) + 2 else y.reshape(*lead, *y.shape[1:])


def _packed_taps(size: int, step: int, inputs: int, outputs: int) -> tuple[np.ndarray, int, int]:
    """Which tap joins which columns: ``packs t s k``, and packs before and after one's own.

    The input column ``t`` of the pack ``j`` away meets the output column ``s`` under tap ``k``.
    """
    half = size // 2
    first = -half // inputs
    last = (step * (outputs - 1) + half) // inputs
    j, t, s = np.ogrid[first : last + 1, :inputs, :outputs]
    tap = inputs * j + t - step * s + half
    return (tap[..., None] == np.arange(size)).astype(np.float32), -first, last
