"""Every operation in plain jnp: the specification of the others, and what runs where none wins."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmsad_jax.types import AttentionMap, Feature

EPSILON = 1e-12
"""Squared norms below this count as zero: the result and its gradient are 0."""


def attention_energy(
    features: Feature, *, kind: str = "mean", exponent: float = 2.0
) -> AttentionMap:
    """Raw attention: ``abs(features) ** exponent`` reduced over channels; see ``kernels.api``."""
    magnitude = jnp.abs(features.astype(jnp.float32))
    energy = jnp.square(magnitude) if exponent == 2 else magnitude**exponent
    return {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[kind](energy, axis=-1)


def normalize_map(
    energy: AttentionMap, *, normalization: str = "l2", temperature: float = 1.0
) -> AttentionMap:
    """Attention of unit norm or unit sum over the voxels of each example; see ``kernels.api``."""
    energy, space = energy.astype(jnp.float32), tuple(range(1, energy.ndim))
    if normalization == "softmax":
        return jax.nn.softmax(energy / temperature, axis=space)
    squared = jnp.square(energy).sum(space, keepdims=True)
    nonzero = squared >= EPSILON
    # The inner where keeps the root away from 0, and with it the gradient finite.
    inverse = jax.lax.rsqrt(jnp.where(nonzero, squared, 1.0))
    return jnp.where(nonzero, energy * inverse, 0.0)


def correlation(
    features: tuple[Feature, ...],
    alpha: Float[Array, "b m m c"],
    beta: Float[Array, "b m m c"],
    gamma: Float[Array, "b m m c"],
) -> Float[Array, "b *space m m"]:
    """Cosine of each modality with its expression by each other one; see ``kernels.api``."""
    space = (1,) * (features[0].ndim - 2)
    g = [feature.astype(jnp.float32) for feature in features]

    def cosine(i, j):
        a, b, c = (x[:, i, j].reshape(-1, *space, x.shape[-1]) for x in (alpha, beta, gamma))
        expressed = (a * g[j] + b) * g[j] + c
        product = (g[i] * expressed).sum(-1)
        squares = jnp.square(g[i]).sum(-1), jnp.square(expressed).sum(-1)
        nonzero = (squares[0] >= EPSILON) & (squares[1] >= EPSILON)
        # Two roots rather than one of the product, which could underflow.
        own, other = (jax.lax.rsqrt(jnp.where(nonzero, square, 1.0)) for square in squares)
        return jnp.where(nonzero, product * own * other, 0.0)

    # Pair by pair: an array of every pair, voxel and channel would be m * m features large.
    m = range(len(g))
    zeros = jnp.zeros(g[0].shape[:-1], jnp.float32)
    rows = [jnp.stack([zeros if i == j else cosine(i, j) for j in m], -1) for i in m]
    return jnp.stack(rows, -2)


def convolution(
    x: Feature,
    kernel: Float[Array, "*k c o"],
    *,
    strides: tuple[int, ...],
    padding: Sequence[tuple[int, int]] | None = None,
) -> Float[Array, "b *out_space o"]:
    """XLA's convolution, padded by ``k // 2`` or ``padding``; see ``kernels.api``."""
    layouts = {2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding or [(size // 2, size // 2) for size in kernel.shape[:-2]],
        dimension_numbers=layouts[len(strides)],
    )
