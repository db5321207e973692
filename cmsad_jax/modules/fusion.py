"""Fusion of the modalities at one stage: spatial correlated feature fusion, and its baselines.

SCFF follows docs/method.md, section 4: a reconstruction from the abstract's words and from the
published correlation blocks of Zhou et al. (arXiv 2003.08870, 2104.06231, 2111.01623). All fusions
have the same input, output and width, take any number of modalities, and see nothing of an absent
one. Early fusion has no stage of its own: the network then has one encoder of the stacked
modalities.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cmsad_jax import kernels
from cmsad_jax.modules.blocks import Conv
from cmsad_jax.types import (
    ConfigError,
    Feature,
    Present,
    check_choices,
    check_names,
    check_number,
    check_present,
)


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """How the modalities' features become one.

    Examples:
        >>> FusionConfig(kind="mean").kind
        'mean'
    """

    kind: Literal["scff", "concat", "mean", "max", "attention", "weighted", "early"] = "scff"
    """Spatial correlated feature fusion, or a baseline; early: one encoder of all modalities."""
    expression: Literal["nonlinear", "linear"] = "nonlinear"
    """SCFF: a modality expressed by another one, g, is a g^2 + b g + c, or linear: b g + c."""
    hidden: int = 16
    """SCFF, weighted: hidden units of the MLP that gives the coefficients, or the weights."""
    gate_kernel: int = 3
    """SCFF, attention: in-plane kernel of the convolution that gives the gates, in voxels, odd."""
    gate_identity: bool = True
    """SCFF: a modality is multiplied by 1 + gate; else by its gate alone."""
    residual: bool = True
    """SCFF, concat, attention, weighted: add the mean of the modalities to what is convolved."""
    stages: tuple[int, ...] | None = None
    """SCFF: stages that have it, from 0; the others join by concat. All by default."""
    correlation_direction: Literal["forward", "reverse"] = "forward"
    """SCFF's loss: KL of a modality from its expression by another one, or reverse."""
    correlation_stop_gradient: bool = True
    """SCFF's loss: the expressed modality does not move towards its expression."""

    def __post_init__(self):
        check_choices(self)
        check_number("hidden", self.hidden, least=1, usual=16, whole=True)
        check_number("gate_kernel", self.gate_kernel, least=1, usual=3, whole=True)
        if self.gate_kernel % 2 == 0:
            raise ConfigError(
                f"the gate's kernel must be odd; got {self.gate_kernel}. Use 1, 3 or 5."
            )


@struct.dataclass
class FusionOutput:
    """What a fusion returns.

    Attributes:
        fused: the joint feature.
        gates: spatial gate of each modality, float32: in (0, 1) for SCFF, and for attention summing
            to 1 over those present; None for the other baselines, and under SCFF for a single
            modality, which has no other to correlate with.
        correlation_loss: ``KL(softmax_c(g_i) || softmax_c(ghat_ij))`` summed over channels,
            averaged over voxels and over the pairs present; 0 where there is no pair. ``g_i`` is
            under a stop-gradient unless ``FusionConfig`` says otherwise, and so is the direction.
        weights: of ``weighted``, one weight for each modality, float32, 0 where it is absent and
            summing to 1; None for the others.

    Examples:
        >>> FusionOutput(jnp.ones((1, 2, 2, 3)), None, jnp.zeros(1)).fused.shape
        (1, 2, 2, 3)
    """

    fused: Float[Array, "b *space c"]
    gates: Float[Array, "b *space m"] | None
    correlation_loss: Float[Array, " b"]
    weights: Float[Array, "b m"] | None = None


@dataclasses.dataclass(frozen=True)
class _Projected:
    """What every kind of fusion joins: features of equal width, those of absent modalities 0."""

    features: Sequence[Feature]
    present: Present
    count: Int[Array, "b *ones"]
    """How many modalities are there; 1 where there is none."""
    mean: Feature
    """Over the modalities that are there."""

    @property
    def rank(self) -> int:
        """Axes of space."""
        return self.features[0].ndim - 2

    def expanded(
        self, flags: Bool[Array | np.ndarray, " b"]
    ) -> Bool[Array | np.ndarray, "b *ones"]:
        """One flag for each example, to be broadcast over a feature."""
        return flags.reshape(-1, *(1,) * (self.rank + 1))


def _no_loss(given: _Projected) -> Float[Array, " b"]:
    return jnp.zeros(given.present.shape[0], jnp.float32)


class Fusion(nn.Module):
    """Fuse one feature for each modality into one of ``channels`` channels.

    Attributes:
        channels: width of the output and of each projected modality.
        modalities: names of the features, in the order of the axis ``m``. Weights and columns of
            ``present`` go by it, and not by the order of a dictionary, which JAX sorts by key.
        config: which fusion; ``early`` has none at a stage.
        dtype: in which the convolutions compute; correlations and losses are float32.

    Examples:
        >>> features = {name: jnp.ones((1, 2, 2, 3)) for name in ("t2w", "adc")}
        >>> fusion = Fusion(channels=3, modalities=("t2w", "adc"), config=FusionConfig(kind="mean"))
        >>> params = jax.jit(fusion.init)(jax.random.key(0), features)
        >>> fusion.apply(params, features).fused.shape
        (1, 2, 2, 3)
    """

    channels: int
    modalities: tuple[str, ...]
    config: FusionConfig = FusionConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Mapping[str, Feature], present: Present | None = None
    ) -> FusionOutput:
        """Fuse ``features[modality]``, all on one grid.

        ``present=None`` means that every modality is there. Whatever the feature of an absent one
        holds, NaN and inf included, changes neither the result nor a gradient.

        Raises:
            ConfigError: if ``features`` are not of ``modalities`` or differ in space, ``present``
                is no mask of them, or the fusion is ``early``.
        """
        self._check(features)
        ordered = [features[name] for name in self.modalities]
        batch, num_modalities = ordered[0].shape[0], len(ordered)
        if present is None:
            present = jnp.ones((batch, num_modalities), bool)
        check_present(present, batch, self.modalities)
        kinds = {
            "scff": self._scff,
            "concat": self._concat,
            "mean": self._mean,
            "max": self._max,
            "attention": self._attention,
            "weighted": self._weighted,
        }
        return kinds[self.config.kind](self._project(ordered, present))

    def _project(self, features: Sequence[Feature], present: Present) -> _Projected:
        """Each feature in ``channels`` channels, without those that are absent."""
        batch, rank = features[0].shape[0], features[0].ndim - 2
        projected = []
        for m, feature in enumerate(features):
            there = present[:, m].reshape(batch, *(1,) * (rank + 1))
            # Before the product with the weights, whose gradient NaN or inf would reach.
            feature = jnp.where(there, feature, 0)
            g = Conv(self.channels, (1,) * rank, dtype=self.dtype, name=f"project{m}")(feature)
            projected.append(jnp.where(there, g, 0))
        count = jnp.maximum(present.sum(-1), 1).reshape(batch, *(1,) * (rank + 1))
        mean = sum(projected[1:], projected[0]) / count.astype(self.dtype)
        return _Projected(projected, present, count, mean)

    def _mean(self, given: _Projected) -> FusionOutput:
        """Mean over the modalities present."""
        return FusionOutput(given.mean, None, _no_loss(given))

    def _max(self, given: _Projected) -> FusionOutput:
        """Largest over the modalities present."""
        lowest = jnp.finfo(self.dtype).min
        stacked = [
            jnp.where(given.expanded(given.present[:, m]), g, lowest)
            for m, g in enumerate(given.features)
        ]
        largest = jnp.stack(stacked).max(0)
        somewhere = given.expanded(jnp.any(given.present, -1))
        return FusionOutput(jnp.where(somewhere, largest, 0), None, _no_loss(given))

    def _attention(self, given: _Projected) -> FusionOutput:
        """Joint convolution of what a softmax over the modalities weighs at each voxel."""
        num_modalities = len(given.features)
        scores = Conv(num_modalities, self._gate_kernel(given.rank), name="gate")(
            jnp.concatenate(given.features, -1).astype(jnp.float32)
        )
        absent = ~given.present.reshape(-1, *(1,) * given.rank, num_modalities)
        gates = jax.nn.softmax(jnp.where(absent, jnp.finfo(jnp.float32).min, scores))
        weighed = [
            g * gates[..., m : m + 1].astype(self.dtype) for m, g in enumerate(given.features)
        ]
        fused = self._join(sum(weighed[1:], weighed[0]))
        return FusionOutput(self._with_mean(fused, given), gates, _no_loss(given))

    def _weighted(self, given: _Projected) -> FusionOutput:
        """Joint convolution of what a softmax over the modalities weighs, once for each example."""
        axes = tuple(range(1, given.rank + 1))
        pooled = [g.astype(jnp.float32).mean(axes) for g in given.features]
        hidden = nn.relu(nn.Dense(self.config.hidden, name="weights_hidden")(jnp.hstack(pooled)))
        scores = nn.Dense(len(pooled), name="weights")(hidden)
        lowest = jnp.finfo(jnp.float32).min
        weights = jax.nn.softmax(jnp.where(given.present, scores, lowest))
        weights = jnp.where(given.present, weights, 0)  # where none is there, none has any
        each = weights.astype(self.dtype).reshape(-1, *(1,) * given.rank, len(pooled))
        weighed = [g * each[..., m : m + 1] for m, g in enumerate(given.features)]
        fused = self._join(sum(weighed[1:], weighed[0]))
        return FusionOutput(self._with_mean(fused, given), None, _no_loss(given), weights)

    def _concat(self, given: _Projected) -> FusionOutput:
        """Joint convolution of all modalities."""
        fused = self._join_all(given.features, given)
        return FusionOutput(self._with_mean(fused, given), None, _no_loss(given))

    def _scff(self, given: _Projected) -> FusionOutput:
        """Joint convolution of all modalities, each raised where it correlates with the others."""
        if len(given.features) == 1:
            return self._concat(given)
        gates, loss = self._correlate(given.features, given.present)
        least = 1 if self.config.gate_identity else 0
        gated = [
            g * (least + gates[..., m : m + 1].astype(self.dtype))
            for m, g in enumerate(given.features)
        ]
        fused = self._join_all(gated, given)
        return FusionOutput(self._with_mean(fused, given), gates, loss)

    def _with_mean(self, fused: Feature, given: _Projected) -> Feature:
        return fused + given.mean if self.config.residual else fused

    def _join(self, feature: Float[Array, "b *space i"]) -> Feature:
        pointwise = (1,) * (feature.ndim - 2)
        return Conv(self.channels, pointwise, dtype=self.dtype, name="join")(feature)

    def _join_all(self, features: Sequence[Feature], given: _Projected) -> Feature:
        # Like dropout: what is there is scaled up for what is not.
        rescale = (len(features) / given.count).astype(self.dtype)
        return self._join(jnp.concatenate(features, -1) * rescale)

    def _check(self, features: Any) -> None:
        check_names("modalities", self.modalities)
        check_number("channels", self.channels, least=1, usual=8, whole=True)
        if self.config.kind == "early":
            raise ConfigError(
                "a fusion module fuses features of a stage; got the kind early, which stacks the "
                "images before one encoder. Use CMSAD for it, or another kind."
            )
        if not isinstance(features, Mapping) or set(features) != set(self.modalities):
            came = (
                ", ".join(map(str, features))
                if isinstance(features, Mapping)
                else type(features).__name__
            )
            raise ConfigError(
                "features must be a dictionary with one array for each modality of "
                f"{', '.join(self.modalities)}; got {came or 'none'}. "
                "Pass {'t2w': ..., 'adc': ...} and the same names as modalities."
            )
        shapes = {name: getattr(features[name], "shape", None) for name in self.modalities}
        spaces = {shape if shape is None else shape[:-1] for shape in shapes.values()}
        if len(spaces) != 1 or None in spaces:
            raise ConfigError(
                "features must be arrays of the same batch and space, b *space c; got "
                + ", ".join(
                    f"{name} {type(features[name]).__name__ if shape is None else shape}"
                    for name, shape in shapes.items()
                )
                + ". Pass one stage at a time, and resize all modalities to one grid."
            )

    def _correlate(
        self, projected: Sequence[Feature], present: Present
    ) -> tuple[Float[Array, "b *space m"], Float[Array, " b"]]:
        """Gates and correlation loss from the expression of each modality by each other one."""
        num_modalities, rank = len(projected), projected[0].ndim - 2
        ones = (1,) * rank
        axes = tuple(range(1, rank + 1))
        pairs = list(itertools.permutations(range(num_modalities), 2))
        first, second = (np.array([pair[k] for pair in pairs], int) for k in (0, 1))
        pooled = jnp.stack([g.astype(jnp.float32).mean(axes) for g in projected], 1)
        alpha, beta, gamma = self._coefficients(pooled, pairs)

        r = kernels.correlation(projected, alpha, beta, gamma)[..., first, second]
        both = present[:, first] & present[:, second]
        r = jnp.where(both.reshape(-1, *ones, len(pairs)), r, 0)
        gates = jax.nn.sigmoid(Conv(num_modalities, self._gate_kernel(rank), name="gate")(r))

        loss = jnp.zeros(r.shape[0], jnp.float32)
        for pair, (i, j) in enumerate(pairs):
            of_pair = (x[:, i, j].reshape(-1, *ones, self.channels) for x in (alpha, beta, gamma))
            divergence = _divergence(
                projected[i],
                projected[j],
                *of_pair,
                direction=self.config.correlation_direction,
                stop_gradient=self.config.correlation_stop_gradient,
            )
            loss += jnp.where(both[:, pair], divergence, 0)
        return gates, loss / jnp.maximum(both.sum(-1), 1)

    def _gate_kernel(self, rank: int) -> tuple[int, ...]:
        in_plane = self.config.gate_kernel
        return (1,) * (rank - 2) + (in_plane, in_plane)

    def _coefficients(
        self, pooled: Float[Array, "b m c"], pairs: Sequence[tuple[int, int]]
    ) -> tuple[Float[Array, "b m m c"], ...]:
        """``alpha, beta, gamma`` of every ordered pair, by a small MLP of its own."""
        batch, num_modalities, channels = pooled.shape
        first, second = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
        inputs = jnp.concatenate([pooled[:, first], pooled[:, second]], -1)

        def dense(features, name, **options):
            each_pair = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=1,
                out_axes=1,
            )
            return each_pair(features, name=name, **options)

        hidden = nn.gelu(dense(self.config.hidden, "coefficients_hidden")(inputs))
        change = dense(3 * channels, "coefficients", kernel_init=nn.initializers.normal(1e-2))(
            hidden
        )
        table = jnp.zeros((batch, num_modalities, num_modalities, 3 * channels))
        table = table.at[:, first, second].set(change)
        square, slope, offset = jnp.split(table, 3, -1)
        if self.config.expression == "linear":
            square = jnp.zeros_like(square)
        return square, 1 + slope, offset  # the expression starts near the identity


# Jitted, so that all pairs of a stage are traced and differentiated once; XLA inlines the calls.
@functools.partial(jax.jit, static_argnames=("direction", "stop_gradient"))
def _divergence(
    own: Feature,
    other: Feature,
    a: Float[Array, "b *ones c"],
    b: Float[Array, "b *ones c"],
    c: Float[Array, "b *ones c"],
    *,
    direction: str,
    stop_gradient: bool,
) -> Float[Array, " b"]:
    """How far the expression of ``own`` by ``other`` is from it; see ``FusionOutput``."""
    g = other.astype(jnp.float32)
    own = jax.lax.stop_gradient(own) if stop_gradient else own
    first = jax.nn.log_softmax(own.astype(jnp.float32))
    second = jax.nn.log_softmax((a * g + b) * g + c)
    if direction == "reverse":
        first, second = second, first
    return (jnp.exp(first) * (first - second)).sum(-1).mean(tuple(range(1, g.ndim - 1)))
