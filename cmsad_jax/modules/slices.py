"""Attention across the slices of a volume (docs/concepts/slices.md): CSAM and CAT-Net.

What slices share is learnt beside kernels that see one slice each (2.5D), or kernels of few slices.
Both take ``b d h w c`` and a mask of the slices that are there, and see nothing of the others.
"""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from cmsad_jax.modules.blocks import Conv, Norm, normalize
from cmsad_jax.types import ConfigError, check_number

Slices = Literal["none", "csam", "cat"]
SliceMask = Bool[Array | np.ndarray, "b d"]
"""Which slices each example has."""


@dataclasses.dataclass(frozen=True)
class SliceAttentionConfig:
    """The constants of attention across slices; but for ``opening``, those of its authors' code."""

    stages: tuple[int, ...] | None = None
    """Encoder stages that have it, from 0. All by default."""
    onward: bool = False
    """Whether what comes of it also goes into the next stage, not to fusion and decoder alone."""
    reduction: int = 16
    """CSAM: channels for each hidden unit of the attention over channels."""
    kernel: int = 7
    """CSAM: kernel of the attention in plane, in voxels, odd."""
    expansion: int = 4
    """CSAM: hidden units for each slice of the attention over slices."""
    opening: float = 3.0
    """CSAM: what each sigmoid begins with; of 0 an eighth of the features passes, of 3 86 %."""
    sampling: bool = False
    """CSAM: in training, draw the attention over slices from a learnt normal distribution."""
    rank: int = 5
    """CSAM, sampling: rank of its covariance, beside a diagonal."""
    heads: int = 3
    """CAT: heads."""
    pooling: int = 4
    """CAT: queries and keys are of means over so many voxels in plane, each way."""

    def __post_init__(self):
        for name in ("reduction", "kernel", "expansion", "rank", "heads", "pooling"):
            usual = getattr(SliceAttentionConfig, name)
            check_number(name, getattr(self, name), least=1, usual=usual, whole=True)
        check_number("opening", self.opening, least=0, usual=3.0)
        if self.kernel % 2 == 0:
            raise ConfigError(
                f"the kernel of CSAM's attention in plane must be odd; got {self.kernel}. Use 7."
            )


def slices_apart(x: Shaped[Array, "b d *rest"]) -> Shaped[Array, "bd *rest"]:
    """Each slice as an example of its own."""
    return x.reshape(-1, *x.shape[2:])


def slices_together(x: Shaped[Array, "bd *rest"], depth: int) -> Shaped[Array, "b d *rest"]:
    """The inverse of ``slices_apart``."""
    return x.reshape(-1, depth, *x.shape[1:])


def seen_slices(image: Float[Array | np.ndarray, "b d h w m"]) -> Bool[Array, "b d"]:
    """Slices in which any modality holds anything: images are 0 beyond what was measured."""
    return jnp.any(image != 0, (-3, -2, -1))


def where_seen(x: Float[Array, "b d h w c"], mask: SliceMask) -> Float[Array, "b d h w c"]:
    """The features of the slices that are there, 0 in the others."""
    return jnp.where(jnp.asarray(mask)[:, :, None, None, None], x, 0)


def slices_at(mask: SliceMask, stride: int) -> Bool[Array, "b d2"]:
    """The mask behind a stride along the depth: of the slices that it joins, any is there."""
    if stride == 1:
        return jnp.asarray(mask)
    padded = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % stride)))
    return padded.reshape(mask.shape[0], -1, stride).any(-1)


class CSAM(nn.Module):
    """Attention over channels, over places and over slices, one after the other.

    Hung et al., WACV 2024: ``x *= sig(MLP(max_dhw x) + MLP(mean_dhw x))``, then ``x *=
    sig(conv[max_dc x; mean_dc x])``, then ``x *= sig(a)`` with ``a = MLP(max_hwc x) + MLP(mean_hwc
    x)``. Where ``a`` is drawn, it is normal with means, factors and logarithms of the diagonal of
    its covariance linear in ``relu(a)``; the means begin as ``relu(a)`` itself. Without keys the
    means are taken. Attention in float32.

    The biases begin such that each sigmoid is of ``config.opening``, and the features pass; that
    is ours, the authors' begin near 0. The weights over slices are of one depth: that of the crops
    it is trained on.
    """

    config: SliceAttentionConfig = SliceAttentionConfig()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b d h w c"],
        mask: SliceMask,
        keys: Shaped[Array, " b"] | None = None,
    ) -> Float[Array, "b d h w c"]:
        """The features weighed; 0 in slices that are not there.

        Args:
            x: features of one stage.
            mask: which slices are there; the others change nothing.
            keys: one key of ``jax.random`` for each example, where the attention is drawn.

        Raises:
            ConfigError: the weights are of another number of slices.
        """
        config, depth, channels = self.config, x.shape[1], x.shape[-1]
        self._check_depth(depth)
        there = jnp.asarray(mask)[:, :, None, None, None]
        x = where_seen(x, mask)

        begun = config.opening / 2  # of each of two terms
        of_channels = _Bottleneck(max(1, channels // config.reduction), begun, name="semantic")
        highest, mean = _pooled(x, there, (1, 2, 3))
        gate = of_channels(highest) + of_channels(mean)
        x = x * _gate(gate, x)[:, None, None, None]
        of_places = Conv(1, (config.kernel, config.kernel), bias=config.opening, name="positional")
        gate = of_places(jnp.stack(_pooled(x, there, (1, 4)), -1))
        x = x * _gate(gate, x)[:, None]
        of_slices = _Bottleneck(config.expansion * depth, begun, name="slice")
        highest, mean = _pooled(x, there, (2, 3, 4))
        gate = of_slices(highest) + of_slices(mean)
        if config.sampling:
            gate = self._drawn(gate, keys)
        return x * _gate(gate, x)[:, :, None, None, None]

    def _drawn(
        self, a: Float[Array, "b d"], keys: Shaped[Array, " b"] | None
    ) -> Float[Array, "b d"]:
        """A sample around ``relu(a)``, or without keys the mean."""
        depth, rank = a.shape[1], self.config.rank
        rectified = nn.relu(a)
        identity = nn.initializers.constant(np.eye(depth, dtype=np.float32))
        mean = nn.Dense(depth, kernel_init=identity, name="slice_mean")(rectified)
        log_diagonal = nn.Dense(depth, name="slice_log_diagonal")(rectified)
        factor = nn.Dense(depth * rank, name="slice_factor")(rectified)
        if keys is None:
            return mean
        noise = jax.vmap(lambda key: jax.random.normal(key, (rank + depth,)))(keys)
        shared = (factor.reshape(-1, depth, rank) * noise[:, None, :rank]).sum(-1)
        return mean + shared + jnp.exp(0.5 * log_diagonal) * noise[:, rank:]

    def _check_depth(self, depth: int) -> None:
        if not self.has_variable("params", "slice"):
            return
        known = self.get_variable("params", "slice")["hidden"]["kernel"].shape[0]
        if known != depth:
            raise ConfigError(
                "CSAM weighs the number of slices that it was trained on; got weights of "
                f"{known} slices and features of {depth}. Slide a window of the training depth "
                "over the volume, or use slices=cat."
            )


class CAT(nn.Module):
    """Slices attend to slices, with several heads (Hung et al., IEEE TMI 2022).

    With ``e`` a sine and cosine encoding of the slice, ``y = x + e``, and ``q, k`` pointwise
    convolutions of ``y`` averaged in plane, flattened for each slice to ``dim`` numbers, a head has
    ``A = softmax_d(q k^T / sqrt(dim))`` and ``out_i = sum_j A_ij v_j`` with ``v`` pointwise of
    ``y``. The result is ``gelu(norm(y + conv(out of all heads)))``. Attention in float32. Any
    number of slices will do. Rows and columns that fill no whole cell are left out of ``q, k``.

    Attributes:
        config: heads and pooling.
        norm: as of the encoder.
        apart: whether the norm is of each slice by itself, as in a network of slices.
        dtype: in which the convolutions compute.
    """

    config: SliceAttentionConfig = SliceAttentionConfig()
    norm: Norm = "instance"
    apart: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b d h w c"],
        mask: SliceMask,
        keys: Shaped[Array, " b"] | None = None,
    ) -> Float[Array, "b d h w c"]:
        """The features joined with those of other slices; 0 in slices that are not there.

        Args:
            x: features of one stage.
            mask: which slices are there; the others change nothing.
            keys: not used; as ``CSAM``.
        """
        depth, (height, width, channels), heads = x.shape[1], x.shape[2:], self.config.heads
        there = jnp.asarray(mask)[:, :, None, None, None]
        encoding = jnp.asarray(slice_encoding(depth, channels), self.dtype)
        y = jnp.where(there, x + encoding[:, None, None], 0)
        flat = slices_apart(y)

        def pointwise(x, name, outputs, bias=None):
            return Conv(outputs, (1, 1), dtype=self.dtype, bias=bias, name=name)(x)

        cells = _cells(flat, self.config.pooling)
        dim = cells.shape[1] * cells.shape[2] * channels
        query, key = (
            slices_together(pointwise(cells, name, heads * channels), depth)
            .astype(jnp.float32)
            .reshape(-1, depth, dim // channels, heads, channels)
            for name in ("query", "key")
        )
        scores = jnp.einsum("bipnc,bjpnc->bnij", query, key) / np.sqrt(dim)
        scores = jnp.where(jnp.asarray(mask)[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        value = slices_together(pointwise(flat, "value", heads * channels), depth)
        value = value.reshape(-1, depth, height * width, heads, channels)
        out = jnp.einsum("bnij,bjpnc->bipnc", weights, value)
        out = out.reshape(-1, height, width, heads * channels)
        joined = y + slices_together(pointwise(out, "join", channels, 0.0), depth)
        return jnp.where(there, nn.gelu(self._normalized(joined)), 0)

    def _normalized(self, x: Float[Array, "b d h w c"]) -> Float[Array, "b d h w c"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", zeros, (x.shape[-1],), jnp.float32)
        flat = slices_apart(x) if self.apart else x
        flat = normalize(flat, scale, bias, kind=self.norm, dtype=jnp.dtype(self.dtype).name)
        return flat.reshape(x.shape)


def slice_encoding(depth: int, channels: int) -> Float[np.ndarray, "d c"]:
    """Sines in even channels and cosines in odd ones, slower from channel to channel.

    ``sin(i / 10000^(c / channels))`` of slice ``i`` and even ``c``, the cosine of the same in the
    channel behind (Vaswani et al., NeurIPS 2017).
    """
    even = np.arange(channels) // 2 * 2
    angle = np.arange(depth)[:, None] / 10_000 ** (even / channels)
    return np.where(np.arange(channels) % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


class _Bottleneck(nn.Module):
    """Two dense layers, as many outputs as inputs."""

    hidden: int
    bias: float

    @nn.compact
    def __call__(self, x: Float[Array, "b n"]) -> Float[Array, "b n"]:
        inside = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        bias_init = nn.initializers.constant(self.bias)
        return nn.Dense(x.shape[-1], bias_init=bias_init, name="output")(inside)


def _pooled(
    x: Float[Array, "b d h w c"], there: Bool[Array, "b d 1 1 1"], axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Largest and mean over some axes, of the slices that are there; 0 where none is."""
    values = x.astype(jnp.float32)
    over_slices = tuple(axis for axis in axes if axis == 1)
    some = there.any(axes, keepdims=True)
    lowest = jnp.finfo(jnp.float32).min
    highest: Array = largest(jnp.where(there, values, lowest), axes)
    count = np.prod([x.shape[axis] for axis in axes if axis != 1])
    num_slices = there.sum(over_slices, keepdims=True) if over_slices else 1
    mean = jnp.where(there, values, 0).sum(axes, keepdims=True) / jnp.maximum(num_slices * count, 1)
    return (
        jnp.where(some, highest, 0).squeeze(axes),
        jnp.where(some, mean, 0).squeeze(axes),
    )


# JAX's own gradient divides by the number of values equal to the largest. Where XLA computes the
# values again for it, rounded in another way, there are none, and the gradient is NaN.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def largest(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The largest over some axes; its gradient is shared by all that equal it up to rounding."""
    return x.max(axes, keepdims=True)


def _largest_forward(
    x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Float[Array, "..."], tuple[Float[Array, "..."], Float[Array, "..."]]]:
    found = x.max(axes, keepdims=True)
    return found, (x, found)


def _largest_backward(
    axes: tuple[int, ...],
    kept: tuple[Float[Array, "..."], Float[Array, "..."]],
    gradient: Float[Array, "..."],
) -> tuple[Float[Array, "..."]]:
    x, found = kept
    equal = x >= found - 1e-6 * jnp.abs(found)
    return (jnp.where(equal, gradient / jnp.maximum(equal.sum(axes, keepdims=True), 1), 0),)


largest.defvjp(_largest_forward, _largest_backward)


def _gate(gate: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.sigmoid(gate).astype(x.dtype)


def _cells(x: Float[Array, "bd h w c"], size: int) -> Float[Array, "bd i j c"]:
    """Means over cells of ``size`` by ``size`` voxels, or the whole side where that is less."""
    height, width = x.shape[1:3]
    rows, columns = min(size, height), min(size, width)
    i, j = height // rows, width // columns
    inside = x[:, : i * rows, : j * columns]
    return inside.reshape(-1, i, rows, j, columns, x.shape[-1]).mean((2, 4))


def slice_attention(
    kind: Slices,
    config: SliceAttentionConfig,
    *,
    norm: Norm,
    apart: bool,
    dtype: DTypeLike,
    rematerialize: bool,
    name: str,
) -> nn.Module:
    """The module of a kind, whose inside may be computed again in the backward pass."""
    modules = {
        "csam": functools.partial(_class(CSAM, rematerialize), config),
        "cat": functools.partial(_class(CAT, rematerialize), config, norm, apart, dtype),
    }
    return modules[kind](name=name)


def _class(module: type[nn.Module], rematerialize: bool) -> type[nn.Module]:
    return nn.remat(module) if rematerialize else module
