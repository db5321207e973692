"""Correlation of every pair of modalities in one pass over the features, forward and backward.

Plain jnp reads a feature again for every sum over its channels, and its gradient keeps several
arrays of the size of a feature. Here all sums of a block of voxels come from one reduction with
many operands. Beside the features and the result, the backward pass keeps one float32 map for the
norm of each modality and of each expression.

With ``e = alpha g_j^2 + beta g_j + gamma``, ``r = <g_i, e> / (norm(g_i) norm(e))`` and the
cotangent ``t`` of ``r``, the cotangents are ``t / (norm(g_i) norm(e)) e - t r / norm(g_i)^2 g_i``
for ``g_i``, and for ``e`` the same with the two exchanged.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cmsad_jax.kernels.reference import EPSILON
from cmsad_jax.types import Feature

Coefficients = Float[Array, "3 p c"]
"""``alpha, beta, gamma`` of every ordered pair of one example."""

CPU_BLOCK = 500
"""Most voxels of a block on a CPU, those of all examples together; elsewhere all are one block."""

CPU_VALUES = 16384
"""Most values of a feature in a block: the block's arrays then fit into the second-level cache."""


def pairs_of(num_modalities: int) -> tuple[tuple[int, int], ...]:
    """Ordered pairs of different modalities; those of one first modality are neighbours."""
    return tuple(itertools.permutations(range(num_modalities), 2))


def xla_correlation(
    features: tuple[Feature, ...],
    alpha: Float[Array, "b m m c"],
    beta: Float[Array, "b m m c"],
    gamma: Float[Array, "b m m c"],
) -> Float[Array, "b *space m m"]:
    """``reference.correlation`` as a loop over blocks of voxels; see the module."""
    batch, *space, channels = features[0].shape
    num_modalities = len(features)
    if num_modalities == 1:
        return jnp.zeros((batch, *space, 1, 1), jnp.float32)
    flat = tuple(feature.reshape(batch, -1, channels) for feature in features)
    table = jnp.stack([alpha, beta, gamma], 1).astype(jnp.float32)
    table = jnp.stack([table[:, :, i, j] for i, j in pairs_of(num_modalities)], 2)
    cells = jnp.asarray(_matrix(flat, table))
    return cells.reshape(batch, *space, num_modalities, num_modalities)


@jax.custom_vjp
def _matrix(features, coefficients) -> Float[Array, "b n mm"]:
    return _over_blocks(_forward_block, (*features,), coefficients)[0]


def _matrix_forward(features, coefficients):
    cells, norms = _over_blocks(_forward_block, (*features,), coefficients)
    return cells, (features, coefficients, cells, norms)


def _matrix_backward(residuals, cotangent):
    features, coefficients, cells, norms = residuals
    found = _over_blocks(_backward_block, (*features, cells, norms, cotangent), coefficients)
    gradients, sums = found[: len(features)], found[len(features) :]
    batch, _, num_pairs, channels = coefficients.shape
    by_pair = jnp.stack(sums, 1).reshape(batch, num_pairs, 3, channels)
    return tuple(gradients), jnp.moveaxis(by_pair, 2, 1)


_matrix.defvjp(_matrix_forward, _matrix_backward)


# Jitted, as is the block below, so that the value, its derivative and the branches of each platform
# share what was traced; XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=0)
def _over_blocks(block: Callable, voxelwise: tuple[Array, ...], coefficients: Array) -> Any:
    """Blocks one after another on a CPU; on accelerators one block of everything."""
    batch, _, _, channels = coefficients.shape
    examples = batch if isinstance(batch, int) else 1  # symbolic where a program is exported
    limit = max(1, min(CPU_BLOCK, CPU_VALUES // channels) // examples)
    return jax.lax.platform_dependent(
        voxelwise,
        coefficients,
        cpu=functools.partial(_loop, block, limit),
        default=functools.partial(_loop, block, None),
    )


def _loop(
    block: Callable, limit: int | None, voxelwise: tuple[Array, ...], coefficients: Array
) -> tuple[Array, ...]:
    """``block`` over parts of the axis ``n``; its terms are summed over all voxels.

    The terms of the blocks are added to each other element by element, and what is left is summed
    once: XLA on CPUs has no vector code for a sum over voxels that is fused with its terms.
    """
    voxels = voxelwise[0].shape[1]
    each = functools.partial(_of_each_example, block)
    if limit is None or voxels <= limit:
        fresh = jnp.ones((coefficients.shape[0], voxels), jnp.float32)
        of_voxels, terms = each(voxelwise, coefficients, fresh)
        return (*of_voxels, *_sums_at_once(terms, 1))
    size = -(-voxels // -(-voxels // limit))
    count = -(-voxels // size)

    # As integers: XLA on CPUs would convert bfloat16 arrays to float32 whole, before the loop.
    whole_bits = [_to_bits(x) for x in voxelwise]

    def part(i):
        # The first block lies at the end and may overlap: it leaves what others will write.
        start = jnp.where(i == 0, voxels - size, (i - 1) * size)
        fresh = (i > 0) | (start + jnp.arange(size) >= (count - 1) * size)
        blocks = tuple(
            _from_bits(jax.lax.dynamic_slice_in_dim(bits, start, size, 1), x.dtype)
            for bits, x in zip(whole_bits, voxelwise, strict=True)
        )
        fresh = jnp.broadcast_to(fresh.astype(jnp.float32), (coefficients.shape[0], size))
        return start, each(blocks, coefficients, fresh)

    shapes = jax.eval_shape(lambda: part(0)[1])
    of_voxels = tuple(
        _to_bits(jnp.zeros((x.shape[0], voxels, *x.shape[2:]), x.dtype)) for x in shapes[0]
    )
    terms = tuple(jnp.zeros(x.shape, x.dtype) for x in shapes[1])

    def step(i, carry):
        start, (parts, added) = part(i)
        written = tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, _to_bits(new), start, 1)
            for whole, new in zip(carry[0], parts, strict=True)
        )
        return written, tuple(a + b for a, b in zip(carry[1], added, strict=True))

    of_voxels, terms = jax.lax.fori_loop(0, count, step, (of_voxels, terms))
    of_voxels = [_from_bits(x, like.dtype) for x, like in zip(of_voxels, shapes[0], strict=True)]
    return (*of_voxels, *_sums_at_once(terms, 1))


@functools.partial(jax.jit, static_argnums=0)
def _of_each_example(
    block: Callable, voxelwise: tuple[Array, ...], coefficients: Array, fresh: Float[Array, "b n"]
) -> Any:
    """``block`` of every example, sums over channels taken at once."""
    return jax.vmap(functools.partial(block, sums=_sums_at_once))(voxelwise, coefficients, fresh)


def _to_bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x


def _sums_at_once(terms: Sequence[Float[Array, "..."]], axis: int) -> list[Array]:
    """Sum of each array over ``axis``, by one loop over all of them."""
    if not terms:
        return []
    zeros = tuple(jnp.zeros((), jnp.float32) for _ in terms)

    def add(left, right):
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(jax.lax.reduce(tuple(terms), zeros, add, (axis,)))


def _sums(terms: Sequence[Float[Array, "n c"]], axis: int) -> list[Array]:
    return [term.sum(axis) for term in terms]


def _inverse_root(square: Float[Array, " n"]) -> Float[Array, " n"]:
    """``1 / sqrt``, and 0 where the square counts as 0."""
    nonzero = square >= EPSILON
    return jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, square, 1.0)), 0.0)


def _expressed(g: Float[Array, "n c"], coefficients: Float[Array, "3 c"]) -> Float[Array, "n c"]:
    return (coefficients[0] * g + coefficients[1]) * g + coefficients[2]


def _forward_block(
    voxelwise: Sequence[Float[Array, "n _"]],
    coefficients: Coefficients,
    fresh: Float[Array, " n"],
    *,
    sums: Callable,
) -> tuple[tuple[Float[Array, "n mm"], Float[Array, "n q"]], tuple[()]]:
    """Correlations of some voxels, and the inverse norms of modalities and of expressions."""
    g = [x.astype(jnp.float32) for x in voxelwise]
    pairs = pairs_of(len(g))
    products, squares = [], []
    for p, (i, j) in enumerate(pairs):
        expressed = _expressed(g[j], coefficients[:, p])
        products.append(g[i] * expressed)
        squares.append(expressed * expressed)
    found = sums([*products, *(x * x for x in g), *squares], 1)
    norms = [_inverse_root(square) for square in found[len(pairs) :]]
    cells = [jnp.zeros_like(norms[0])] * len(g) ** 2
    for p, (i, j) in enumerate(pairs):
        cells[i * len(g) + j] = found[p] * norms[i] * norms[len(g) + p]
    return (jnp.stack(cells, -1), jnp.stack(norms, -1)), ()


def _backward_block(
    voxelwise: Sequence[Float[Array, "n _"]],
    coefficients: Coefficients,
    fresh: Float[Array, " n"],
    *,
    sums: Callable,
) -> tuple[tuple[Float[Array, "n c"], ...], tuple[Float[Array, "n c"], ...]]:
    """Cotangents of the features of some voxels, and the terms of those of the coefficients.

    The cotangent of ``alpha, beta, gamma`` of a pair is the sum of its three terms over voxels.
    """
    *features, cells, norms, cotangent = voxelwise
    g = [x.astype(jnp.float32) for x in features]
    cotangent = cotangent * fresh[:, None]
    pairs = pairs_of(len(g))
    own = jnp.stack([norms[:, i] for i, _ in pairs], 1)
    other = norms[:, len(g) :]
    cotangent, cosine = (
        jnp.stack([x[:, i * len(g) + j] for i, j in pairs], 1) for x in (cotangent, cells)
    )
    mixed = cotangent * own * other
    # One array: XLA would compute separate maps anew for every channel.
    maps = jnp.concatenate([mixed, cotangent * cosine * own**2, cotangent * cosine * other**2], 1)
    gradients = [jnp.zeros_like(x) for x in g]
    terms = []
    for p, (i, j) in enumerate(pairs):
        mix, to_own, to_other = (maps[:, k * len(pairs) + p, None] for k in range(3))
        expressed = _expressed(g[j], coefficients[:, p])
        gradients[i] += mix * expressed - to_own * g[i]
        change = mix * g[i] - to_other * expressed
        gradients[j] += change * (2 * coefficients[0, p] * g[j] + coefficients[1, p])
        terms += [change * g[j] * g[j], change * g[j], change]
    cast = [x.astype(y.dtype) for x, y in zip(gradients, features, strict=True)]
    return tuple(cast), tuple(terms)
