"""Convolution, normalisation and the residual block, on volumes and slices alike."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cmsad_jax import kernels

Norm = Literal["instance", "group"]
Block = Literal["residual", "plain"]

_GROUP_SIZE = 8
_CONSTANT = 1e-6
"""A variance below this share of the mean square is float32's rounding of a constant."""


def he_normal(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Normal weights of variance ``2 / fan_in`` (He et al., ICCV 2015), float32; outputs are last.

    Drawn flat: XLA takes seconds on a CPU to compile a draw of five axes, for each shape.
    """
    flat = jax.random.normal(key, (math.prod(shape),), jnp.float32)
    return flat.reshape(shape) * math.sqrt(2 / math.prod(shape[:-1]))


class Conv(nn.Module):
    """Convolution with explicit ``k // 2`` padding, so that stride 2 maps ``n`` to ``ceil(n / 2)``.

    The weights are float32; the convolution runs in ``dtype``, through
    ``cmsad_jax.kernels.convolution``, which picks the formulation that is fast here.

    Attributes:
        channels: number of output channels.
        kernel: size along each axis of space, odd.
        strides: step along each axis of space; 1 by default.
        dtype: in which the convolution computes.
        bias: initial value of the bias, or None for no bias.
    """

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32
    bias: float | None = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out_space o"]:
        """Convolve."""
        shape = (*self.kernel, x.shape[-1], self.channels)
        weights = self.param("kernel", he_normal, shape)
        strides = self.strides or (1,) * len(self.kernel)
        y = kernels.convolution(
            x.astype(self.dtype), jnp.asarray(weights, self.dtype), strides=strides
        )
        if self.bias is not None:
            initial = nn.initializers.constant(self.bias)
            y += jnp.asarray(self.param("bias", initial, (self.channels,), jnp.float32), self.dtype)
        return y


class Normalization(nn.Module):
    """Instance or group normalisation: statistics of one example only, in float32.

    The result therefore does not depend on the batch, its padding or its sharding. ``scale *
    (x - mean) / sqrt(variance + 1e-6) + bias``; where a channel (or group) is constant up to
    float32's rounding it is ``bias``, and its gradient with respect to ``x`` is 0. The plain
    formula would multiply that gradient by 1000 in every layer above an empty crop.

    Attributes:
        kind: each channel by itself, or groups of 8 (of the greatest common divisor of 8 and the
            number of channels, so that groups are of one size).
        dtype: of the result.
    """

    kind: Norm = "instance"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """Normalise each channel (or group) of each example, then scale and shift."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return _normalize(x, scale, bias, kind=self.kind, dtype=self.dtype)


# Jitted, so that layers of one shape are traced and differentiated once; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def _normalize(
    x: Float[Array, "b *space c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    kind: Norm,
    dtype: DTypeLike,
) -> Float[Array, "b *space c"]:
    space = tuple(range(1, x.ndim - 1))
    values = x.astype(jnp.float32)
    mean = values.mean(space, keepdims=True)
    square = jnp.square(values).mean(space, keepdims=True)
    if kind == "group":
        mean, square = (_mean_of_groups(moment) for moment in (mean, square))
    variance = jnp.maximum(square - jnp.square(mean), 0)
    varies = variance > _CONSTANT * square
    inverse = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, variance, 1.0) + 1e-6), 0.0)
    return ((values - mean) * (inverse * scale) + bias).astype(dtype)


def _mean_of_groups(moment: Float[Array, "b *ones c"]) -> Float[Array, "b *ones c"]:
    """Each channel's moment replaced by the mean over its group of channels."""
    size = math.gcd(_GROUP_SIZE, moment.shape[-1])
    grouped = moment.reshape(*moment.shape[:-1], -1, size)
    mean = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
    return mean.reshape(moment.shape)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut: ``act(norm(conv(act(norm(conv(x))))) + shortcut(x))``."""

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    norm: Norm = "instance"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out_space o"]:
        """Apply the block; the shortcut is a strided pointwise convolution where shapes change."""
        y = Conv(self.channels, self.kernel, self.strides, self.dtype, bias=None)(x)
        y = nn.leaky_relu(Normalization(self.norm, self.dtype)(y))
        y = Conv(self.channels, self.kernel, None, self.dtype, bias=None)(y)
        y = Normalization(self.norm, self.dtype)(y)
        if x.shape != y.shape:
            pointwise = (1,) * len(self.kernel)
            x = Conv(self.channels, pointwise, self.strides, self.dtype, bias=None)(x)
            x = Normalization(self.norm, self.dtype)(x)
        return nn.leaky_relu(x.astype(self.dtype) + y)


class PlainBlock(nn.Module):
    """One convolution without shortcut, as in a plain U-Net: ``act(norm(conv(x)))``."""

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    norm: Norm = "instance"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out_space o"]:
        """Apply the block."""
        y = Conv(self.channels, self.kernel, self.strides, self.dtype, bias=None)(x)
        return nn.leaky_relu(Normalization(self.norm, self.dtype)(y))


BLOCKS = {"residual": ResidualBlock, "plain": PlainBlock}


def block_class(block: Block, *, rematerialize: bool) -> Callable[..., nn.Module]:
    """The class of a block; ``rematerialize`` computes its inside again in the backward pass."""
    return nn.remat(BLOCKS[block]) if rematerialize else BLOCKS[block]


def resize(x: Float[Array, "b *space c"], space: tuple[int, ...]) -> Float[Array, "b *out_space c"]:
    """Linear resize to ``space`` with half-pixel centres; returns ``x`` where nothing changes."""
    if x.shape[1:-1] == tuple(space):
        return x
    return jax.image.resize(x, (x.shape[0], *space, x.shape[-1]), "linear")
