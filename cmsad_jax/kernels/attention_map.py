"""Attention energy as a Pallas kernel: each feature is read once forward, and once backward.

Nothing is kept for the gradient beside the features. With ``q = mean_c abs(x)^p`` and the cotangent
``t`` of ``q``, that of ``x`` is ``t p abs(x)^(p - 1) sign(x) / c``; for ``sum`` without ``1 / c``,
and for ``max`` shared by the channels that attain the maximum. As JAX has it, the sign of 0 is 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from cmsad_jax.kernels.reference import attention_energy
from cmsad_jax.types import AttentionMap, Feature

TILE = 128
"""Voxels of a block; those of all examples stand in one row."""


def pallas_attention_energy(
    features: Feature, *, kind: str = "mean", exponent: float = 2.0, interpret: bool
) -> AttentionMap:
    """``reference.attention_energy`` as one Pallas kernel forward and one backward.

    Raises:
        NotImplementedError: if the voxels of the batch are not a multiple of ``TILE``.
    """
    voxels = math.prod(features.shape[:-1])
    if voxels % TILE:
        raise NotImplementedError(
            f"the Pallas attention energy takes multiples of {TILE} voxels a batch; "
            f"got {voxels}. Use implementation='reference'."
        )
    flat = features.reshape(voxels, features.shape[-1])
    energy = jnp.asarray(_energy(flat, kind, exponent, interpret))
    return energy.reshape(features.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _energy(
    x: Float[Array, "n c"], kind: str, exponent: float, interpret: bool
) -> Float[Array, "n 1"]:
    def block(x):
        return attention_energy(x, kind=kind, exponent=exponent)[:, None]

    result = jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)
    return _by_tile(block, (x,), result, interpret=interpret)


def _energy_forward(x, kind, exponent, interpret):
    return _energy(x, kind, exponent, interpret), x


def _energy_backward(kind, exponent, interpret, x, cotangent):
    def block(x, t):
        magnitude = jnp.abs(x.astype(jnp.float32))
        slope = exponent * (magnitude if exponent == 2 else magnitude ** (exponent - 1))
        if kind == "mean":
            slope /= x.shape[-1]
        elif kind == "max":
            largest = magnitude == magnitude.max(-1, keepdims=True)
            slope = jnp.where(largest, slope, 0) / largest.sum(-1, keepdims=True)
        return (t * jnp.where(x < 0, -slope, slope)).astype(x.dtype)

    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (_by_tile(block, (x, cotangent), result, interpret=interpret),)


_energy.defvjp(_energy_forward, _energy_backward)


def _by_tile(
    block: Callable[..., Array],
    arrays: tuple[Float[Array, "n _"], ...],
    result: jax.ShapeDtypeStruct,
    *,
    interpret: bool,
) -> Any:
    """``block`` of every tile of rows."""

    def kernel(*refs):
        *inputs, output = refs
        output[...] = block(*(ref[...] for ref in inputs))

    def spec(x):
        return pl.BlockSpec((TILE, x.shape[-1]), lambda tile: (tile, 0))

    return pl.pallas_call(
        kernel,
        grid=(result.shape[0] // TILE,),
        in_specs=[spec(x) for x in arrays],
        out_specs=spec(result),
        out_shape=result,
        interpret=interpret,
    )(*arrays)
