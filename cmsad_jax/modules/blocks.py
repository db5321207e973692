"""Convolution, normalisation and the residual block, on volumes and slices alike."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cmsad_jax import kernels
from cmsad_jax.kernels.packing import pack, packed_convolution, packing_of, unpack

Norm = Literal["instance", "group"]
Block = Literal["residual", "plain", "separable"]
Nonlinearity = Literal["leaky_relu", "relu", "elu", "gelu", "silu"]


class Activation(NamedTuple):
    """The nonlinearity of blocks; each keeps 0 at 0.

    Attributes:
        kind: ``gelu`` is the exact one, ``elu`` has the constant 1.
        slope: of ``leaky_relu`` below 0; of no other.
    """

    kind: Nonlinearity = "leaky_relu"
    slope: float = 0.01

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply it to each value."""
        if self.kind == "leaky_relu":
            return nn.leaky_relu(x, self.slope)
        if self.kind == "gelu":
            return nn.gelu(x, approximate=False)
        return {"relu": nn.relu, "elu": nn.elu, "silu": nn.silu}[self.kind](x)


_Layer = tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]
"""Kernel, and the scale and bias of the normalisation that follows."""

_GROUP_SIZE = 8
_IMAGE_CHANNELS = 4
"""Fewer are an image, of which one kernel a channel would see too little."""
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


# Jitted, so that layers of one shape are traced and differentiated once; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("kind", "dtype", "packing"))
def normalize(
    x: Float[Array, "b *space c"],
    scale: Float[Array, " o"],
    bias: Float[Array, " o"],
    *,
    kind: Norm,
    dtype: DTypeLike,
    packing: int = 1,
) -> Float[Array, "b *space c"]:
    """Instance or group normalisation: statistics of one example only, in float32.

    The result therefore does not depend on the batch, its padding or its sharding. ``scale *
    (x - mean) / sqrt(variance + 1e-6) + bias``; where a channel (or group) is constant up to
    float32's rounding it is ``bias``, and its gradient with respect to ``x`` is 0. The plain
    formula would multiply that gradient by 1000 in every layer above an empty crop.

    Args:
        x: features, ``packing`` columns of which stand in the channels of one.
        scale: for each channel.
        bias: likewise.
        kind: each channel by itself, or groups of 8 (of the greatest common divisor of 8 and the
            number of channels, so that groups are of one size).
        dtype: of the result.
        packing: see ``cmsad_jax.kernels.packing``.
    """
    space = tuple(range(1, x.ndim - 1))
    values = x.astype(jnp.float32)
    mean = values.mean(space, keepdims=True)
    square = jnp.square(values).mean(space, keepdims=True)
    if packing > 1:
        mean, square = (
            moment.reshape(*moment.shape[:-1], packing, -1).mean(-2) for moment in (mean, square)
        )
    if kind == "group":
        mean, square = (_mean_of_groups(moment) for moment in (mean, square))
    variance = jnp.maximum(square - jnp.square(mean), 0)
    varies = variance > _CONSTANT * square
    inverse = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, variance, 1.0) + 1e-6), 0.0)
    factor = inverse * scale
    if packing > 1:
        mean, factor, bias = (_repeated(each, packing) for each in (mean, factor, bias))
    return ((values - mean) * factor + bias).astype(dtype)


def _mean_of_groups(moment: Float[Array, "b *ones c"]) -> Float[Array, "b *ones c"]:
    """Each channel's moment replaced by the mean over its group of channels."""
    size = math.gcd(_GROUP_SIZE, moment.shape[-1])
    grouped = moment.reshape(*moment.shape[:-1], -1, size)
    mean = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
    return mean.reshape(moment.shape)


def _repeated(each: Float[Array, "*ones c"], packing: int) -> Float[Array, "*ones pc"]:
    """What belongs to the channels of a column, for all columns of a pack."""
    return jnp.tile(each, (*(1,) * (each.ndim - 1), packing))


class _Kernel(nn.Module):
    """Weights of a convolution, float32."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return self.param("kernel", he_normal, self.shape)


class _ScaleAndBias(nn.Module):
    """What follows a normalisation, float32."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        return (
            self.param("scale", nn.initializers.ones, (self.channels,), jnp.float32),
            self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32),
        )


class _ConvolutionBlock(nn.Module):
    """What blocks have in common: convolutions, each with its normalisation.

    The weights are float32; convolutions run in ``dtype`` and the statistics of the normalisation
    in float32. On TPUs, features of few channels are packed within a block, see
    ``cmsad_jax.kernels.packing``.

    Attributes:
        channels: number of output channels.
        kernel: size along each axis of space, odd.
        strides: step along each axis of space; 1 by default.
        norm: kind of normalisation.
        dtype: in which the convolutions compute.
        activation: what ``act`` is.
    """

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    norm: Norm = "instance"
    dtype: DTypeLike = jnp.float32
    activation: Activation = Activation()

    def _layer(self, index: int, kernel: tuple[int, ...], inputs: int) -> _Layer:
        """Weights of a convolution and its normalisation."""
        shape = (*kernel, inputs, self.channels)
        weights = _Kernel(shape, name=f"Conv_{index}")()
        return weights, *_ScaleAndBias(self.channels, name=f"Normalization_{index}")()

    def _apply(self, x: Float[Array, "b *space c"], layers: tuple[_Layer, ...]):
        strides = self.strides or (1,) * len(self.kernel)
        return _block(
            x,
            layers,
            strides=strides,
            norm=self.norm,
            activation=self.activation,
            dtype=jnp.dtype(self.dtype).name,
        )


class ResidualBlock(_ConvolutionBlock):
    """Two convolutions with a shortcut: ``act(norm(conv(act(norm(conv(x))))) + shortcut(x))``."""

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out_space o"]:
        """Apply the block; the shortcut is a strided pointwise convolution where shapes change."""
        layers = [
            self._layer(0, self.kernel, x.shape[-1]),
            self._layer(1, self.kernel, self.channels),
        ]
        strides = self.strides or (1,) * len(self.kernel)
        space = tuple(-(-n // step) for n, step in zip(x.shape[1:-1], strides, strict=True))
        if x.shape[1:] != (*space, self.channels):
            layers.append(self._layer(2, (1,) * len(self.kernel), x.shape[-1]))
        return self._apply(x, tuple(layers))


class PlainBlock(_ConvolutionBlock):
    """One convolution without shortcut, as in a plain U-Net: ``act(norm(conv(x)))``."""

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out_space o"]:
        """Apply the block."""
        return self._apply(x, (self._layer(0, self.kernel, x.shape[-1]),))


class SeparableBlock(_ConvolutionBlock):
    """A residual block whose convolutions are depthwise, then pointwise: few weights.

    ``act(norm(point(depth(act(norm(point(depth(x))))))) + shortcut(x))`` (Howard et al., 2017,
    without a norm between the two). Of fewer than four channels, such as an image, the first is a
    full convolution.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out_space o"]:
        """Apply the block; the shortcut is a strided pointwise convolution where shapes change."""
        x = x.astype(self.dtype)
        ones = (1,) * len(self.kernel)
        strides = self.strides or ones
        if x.shape[-1] < _IMAGE_CHANNELS:
            y = self._normalized(x, 0, self.kernel, strides)
        else:
            y = self._normalized(self._depthwise(x, 0, strides), 0, ones, ones)
        y = self._normalized(self._depthwise(self.activation(y), 1, ones), 1, ones, ones)
        if x.shape != y.shape:
            x = self._normalized(x, 2, ones, strides)
        return self.activation(x + y)

    def _depthwise(self, x: Float[Array, "..."], index: int, strides: tuple[int, ...]):
        shape = (*self.kernel, 1, x.shape[-1])
        kernel = _Kernel(shape, name=f"Depthwise_{index}")()[..., 0, :]
        return kernels.depthwise_convolution(x, kernel.astype(self.dtype), strides=strides)

    def _normalized(
        self, x: Float[Array, "..."], index: int, kernel: tuple[int, ...], strides: tuple[int, ...]
    ):
        weights, scale, bias = self._layer(index, kernel, x.shape[-1])
        y = kernels.convolution(x, weights.astype(self.dtype), strides=strides)
        dtype = jnp.dtype(self.dtype).name
        return normalize(y, scale, bias, kind=self.norm, dtype=dtype)


# Inlined: on a CPU, a train step in whose program convolutions stand in functions of their own
# takes six times as long.
@functools.partial(jax.jit, static_argnames=("strides", "norm", "activation", "dtype"), inline=True)
def _block(
    x: Float[Array, "b *space c"],
    layers: tuple[_Layer, ...],
    *,
    strides: tuple[int, ...],
    norm: Norm,
    activation: Activation,
    dtype: str,
) -> Float[Array, "b *out_space o"]:
    """A block as it is, or packed where it is lowered for a TPU and its channels are few."""
    layered = functools.partial(
        _layers, strides=strides, norm=norm, activation=activation, dtype=dtype
    )
    plain = functools.partial(layered, packing=None)
    packing = packing_of(x.shape[-2], x.shape[-1], layers[0][0].shape[-1], strides[-1])
    if packing is None:
        return plain(x, layers)

    def packed(x, layers):
        return unpack(layered(pack(x, packing[0]), layers, packing=packing), packing[1])

    return jax.lax.platform_dependent(x, layers, tpu=packed, default=plain)


def _layers(
    x: Float[Array, "b *space c"],
    layers: tuple[_Layer, ...],
    *,
    strides: tuple[int, ...],
    norm: Norm,
    activation: Activation,
    dtype: str,
    packing: tuple[int, int] | None,
) -> Float[Array, "b *out_space o"]:
    """The layers of a block: the first, a second one with a shortcut, and a third in that."""
    x = x.astype(dtype)
    inputs, outputs = packing or (1, 1)

    def layer(x, weights, steps, inputs):
        kernel, scale, bias = weights
        if inputs == outputs == 1:
            y = kernels.convolution(x, kernel.astype(dtype), strides=steps)
        else:
            y = packed_convolution(x, kernel, strides=steps, packing=(inputs, outputs))
        return normalize(y, scale, bias, kind=norm, dtype=dtype, packing=outputs)

    y = activation(layer(x, layers[0], strides, inputs))
    if len(layers) == 1:
        return y
    y = layer(y, layers[1], (1,) * len(strides), outputs)
    return activation((layer(x, layers[2], strides, inputs) if len(layers) > 2 else x) + y)


BLOCKS = {"residual": ResidualBlock, "plain": PlainBlock, "separable": SeparableBlock}


def block_class(block: Block, *, rematerialize: bool) -> Callable[..., nn.Module]:
    """The class of a block; ``rematerialize`` computes its inside again in the backward pass."""
    return nn.remat(BLOCKS[block]) if rematerialize else BLOCKS[block]


def resize(x: Float[Array, "b *space c"], space: tuple[int, ...]) -> Float[Array, "b *out_space c"]:
    """Linear resize to ``space`` with half-pixel centres; returns ``x`` where nothing changes."""
    if x.shape[1:-1] == tuple(space):
        return x
    return jax.image.resize(x, (x.shape[0], *space, x.shape[-1]), "linear")
