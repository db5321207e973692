"""Public operations: each checks its arguments and chooses an implementation.

``implementation=None`` takes the fastest that works on the platform the program is compiled for; a
name takes that one or raises ``NotImplementedError``.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax
from jaxtyping import Array, Float

from cmsad_jax.kernels import reference
from cmsad_jax.kernels.convolution import folded_convolution, pointwise_convolution
from cmsad_jax.kernels.correlation import xla_correlation
from cmsad_jax.types import AttentionMap, ConfigError, Feature

T = TypeVar("T")

KINDS = ("mean", "sum", "max")
NORMALIZATIONS = ("l2", "softmax")


def attention_energy(
    features: Feature,
    *,
    kind: str = "mean",
    exponent: float = 2.0,
) -> AttentionMap:
    """How strongly the channels of each voxel respond, before any normalisation.

    ``mean_c abs(F)^p``, or its ``sum`` or ``max`` (docs/method.md, section 2; Zagoruyko &
    Komodakis, ICLR 2017). Computed in float32 whatever the features are in; XLA reads each feature
    once, forward and backward.

    Args:
        features: activations of one stage of one modality.
        kind: ``mean``, ``sum`` or ``max`` over the channels.
        exponent: ``p``, at least 1; larger favours the strongest channels.

    Raises:
        ConfigError: if ``kind`` is unknown or ``exponent`` below 1.

    Examples:
        >>> attention_energy(2 * jnp.ones((1, 2, 2, 3)))
        Array([[[4., 4.],
                [4., 4.]]], dtype=float32)
    """
    check_energy(kind, exponent)
    return reference.attention_energy(features, kind=kind, exponent=exponent)


def resize_map(energy: AttentionMap, space: Sequence[int]) -> Float[Array, "b *out_space"]:
    """Attention on another grid: linear, half-pixel centres, antialiased where it shrinks.

    Resize the raw energy and normalise afterwards. Returns ``energy`` itself at equal shapes.
    """
    if energy.shape[1:] == tuple(space):
        return energy
    return jax.image.resize(energy, (energy.shape[0], *space), "linear", antialias=True)


def normalize_map(
    energy: AttentionMap, *, normalization: str = "l2", temperature: float = 1.0
) -> AttentionMap:
    """Attention energy made comparable between stages and modalities, per example.

    ``l2``: ``q / norm2(q)`` over the voxels of one example; 0 with gradient 0 where the squared
    norm is below 1e-12. ``softmax``: ``softmax(q / temperature)`` over them. In float32.

    Raises:
        ConfigError: if ``normalization`` is unknown or ``temperature`` not positive.
    """
    check_normalization(normalization, temperature)
    return reference.normalize_map(energy, normalization=normalization, temperature=temperature)


def attention_map(
    features: Feature,
    *,
    kind: str = "mean",
    exponent: float = 2.0,
    normalization: str = "l2",
    temperature: float = 1.0,
) -> AttentionMap:
    """Spatial attention of one stage: ``normalize_map(attention_energy(features))``, float32.

    Args:
        features: activations ``b *space c`` of one stage of one modality.
        kind: ``mean``, ``sum`` or ``max`` over the channels of ``abs(features) ** exponent``.
        exponent: at least 1; larger favours the strongest channels.
        normalization: ``l2``: unit norm over the voxels of an example, 0 where the squared norm is
            below 1e-12; ``softmax`` over them, of the energy by ``temperature``.
        temperature: of the softmax.

    Returns:
        ``b *space``.

    Raises:
        ConfigError: if a setting is unknown or out of its range.

    Examples:
        >>> attention_map(jnp.ones((1, 2, 2, 3)))
        Array([[[0.5, 0.5],
                [0.5, 0.5]]], dtype=float32)
    """
    check_normalization(normalization, temperature)
    energy = attention_energy(features, kind=kind, exponent=exponent)
    return normalize_map(energy, normalization=normalization, temperature=temperature)


def correlation(
    features: Sequence[Feature],
    alpha: Float[Array, "b m m c"],
    beta: Float[Array, "b m m c"],
    gamma: Float[Array, "b m m c"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b *space m m"]:
    """How well each modality is expressed by each other one, voxel by voxel.

    Source: docs/method.md, section 4.

    ``r_ij = cos(g_i, alpha_ij g_j^2 + beta_ij g_j + gamma_ij)`` over the channels: in [-1, 1] up
    to rounding, float32. The diagonal is 0. Value and gradient are 0 where either squared norm is
    below 1e-12.

    Args:
        features: ``g``, one for each modality ``m``, ``b *space c`` of equal shapes.
        alpha: of the square, for each example, pair ``(i, j)`` and channel.
        beta: of the linear term.
        gamma: of the constant.
        implementation: ``reference``: plain jnp. ``xla``: one pass over the features with a
            backward pass of its own, see ``cmsad_jax.kernels.correlation``. None: ``xla``, but for
            ``written_out``.

    Raises:
        ConfigError: if shapes disagree.
        NotImplementedError: if ``implementation`` is unknown.

    Examples:
        >>> features = [jnp.ones((1, 2, 2, 3))] * 2
        >>> one = jnp.ones((1, 2, 2, 3))
        >>> correlation(features, one, one, one).shape
        (1, 2, 2, 2, 2)
    """
    shapes = {feature.shape for feature in features}
    if len(shapes) != 1:
        raise ConfigError(
            f"correlated features must have one shape; got {sorted(shapes)}. "
            "Project all modalities to a common width on a common grid."
        )
    shape = features[0].shape
    wanted = (shape[0], len(features), len(features), shape[-1])
    for name, coefficients in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if coefficients.shape != wanted:
            raise ConfigError(
                f"{name} must hold one coefficient for each example, pair and channel; "
                f"got shape {coefficients.shape}. Use shape {wanted}."
            )
    known = {"reference": reference.correlation, "xla": xla_correlation}
    return _choose(implementation or _correlation.get(), known)(tuple(features), alpha, beta, gamma)


_correlation = contextvars.ContextVar("correlation", default="xla")


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Inside, operations are traced without loops, for converters to other formats.

    ``correlation`` takes its reference where no implementation is asked for: more memory, and the
    same values up to rounding.

    Examples:
        >>> features, one = [jnp.ones((1, 2, 2, 3))] * 2, jnp.ones((1, 2, 2, 3))
        >>> with written_out():
        ...     "custom_vjp" in str(jax.make_jaxpr(correlation)(features, one, one, one))
        False
        >>> "custom_vjp" in str(jax.make_jaxpr(correlation)(features, one, one, one))
        True
    """
    token = _correlation.set("reference")
    try:
        yield
    finally:
        _correlation.reset(token)


def convolution(
    x: Feature,
    kernel: Float[Array, "*k c o"],
    *,
    strides: Sequence[int],
    implementation: str | None = None,
) -> Float[Array, "b *out_space o"]:
    """Convolution of slices (2D) or volumes (3D) with ``k // 2`` zeros on both sides.

    A stride ``s`` maps ``n`` positions to ``ceil(n / s)``. Computes in the type of its arguments.

    Args:
        x: features, ``b h w c`` or ``b d h w c``.
        kernel: weights, ``kh kw c o`` or ``kd kh kw c o``; odd sizes.
        strides: step along each axis of space.
        implementation: ``native``: XLA's convolution of that dimension. ``folded`` (volumes):
            one 2D convolution of all slices, or a matrix product where the kernel is one voxel,
            see ``cmsad_jax.kernels.convolution``. None: for volumes ``folded`` on a CPU, and
            everywhere if the kernel is one slice thick, else ``native``; chosen for the platform
            that the program is lowered for.

    Raises:
        ConfigError: if the numbers of axes, channels or types disagree, or a kernel size is even.
        NotImplementedError: if ``implementation`` is unknown, or ``folded`` is asked for slices.

    Examples:
        >>> convolution(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), strides=(2, 2)).shape
        (1, 2, 2, 2)
    """
    rank = x.ndim - 2
    strides = tuple(strides) if isinstance(strides, Sequence) else (strides,)
    if not kernel.ndim - 2 == len(strides) == rank or rank not in (2, 3):
        raise ConfigError(
            "kernel and strides must have one entry for each of 2 or 3 axes of space; "
            f"got x {x.shape}, kernel {kernel.shape} and strides {strides}. "
            "Use 2 for slices, 3 for volumes."
        )
    if any(size % 2 == 0 for size in kernel.shape[:-2]):
        raise ConfigError(
            f"kernel sizes must be odd; got {kernel.shape[:-2]}. Use 1, 3 or 5 along each axis."
        )
    if kernel.shape[-2] != x.shape[-1] or kernel.dtype != x.dtype:
        raise ConfigError(
            "kernel and features must have the same channels and type; "
            f"got x {x.shape} {x.dtype} and kernel {kernel.shape} {kernel.dtype}. "
            f"Use a kernel of shape (..., {x.shape[-1]}, outputs) and type {x.dtype}."
        )
    known = {"native": functools.partial(reference.convolution, strides=strides)}
    if rank == 3:
        known["folded"] = functools.partial(folded_convolution, strides=strides)
    if implementation is None and rank == 3:
        return _convolution_of_platform(x, kernel, strides=strides)
    return _choose(implementation or "native", known)(x, kernel)


# Traced once for equal layers. Inlined: on a CPU, a train step of the small preset in whose program
# the convolutions stood in functions of their own took six times as long.
@functools.partial(jax.jit, static_argnames="strides", inline=True)
def _convolution_of_platform(
    x: Float[Array, "b d h w c"], kernel: Float[Array, "kd kh kw c o"], *, strides: tuple[int, ...]
) -> Float[Array, "b d2 h2 w2 o"]:
    """The fastest on each platform; what is two-dimensional in fact is so on all.

    As a convolution of volumes, TPUs spend two thirds of the time of a kernel of one slice on
    copies, and NVIDIA's library wants its channels first.
    """
    folded = functools.partial(folded_convolution, strides=strides)
    if kernel.shape[:3] == (1, 1, 1):
        pointwise = functools.partial(pointwise_convolution, strides=strides)
        return jax.lax.platform_dependent(x, kernel, cuda=pointwise, default=folded)
    if kernel.shape[0] == 1:
        return folded(x, kernel)
    native = functools.partial(reference.convolution, strides=strides)
    return jax.lax.platform_dependent(x, kernel, cpu=folded, default=native)


def check_energy(kind: str, exponent: float) -> None:
    """Raise ``ConfigError`` if no attention energy is defined by ``kind`` and ``exponent``."""
    if kind not in KINDS:
        raise ConfigError(
            f"attention kind must be one of {', '.join(KINDS)}; got {kind!r}. Use 'mean'."
        )
    if not exponent >= 1:
        raise ConfigError(
            f"attention exponent must be at least 1; got {exponent}. "
            "Use 2: below 1 the gradient at 0 is infinite."
        )


def check_normalization(normalization: str, temperature: float) -> None:
    """Raise ``ConfigError`` if no normalisation is defined by the two settings."""
    if normalization not in NORMALIZATIONS:
        raise ConfigError(
            f"attention normalization must be one of {', '.join(NORMALIZATIONS)}; "
            f"got {normalization!r}. Use 'l2'."
        )
    if not temperature > 0:
        raise ConfigError(
            f"attention temperature must be above 0; got {temperature}. Use 1 or more."
        )


def _choose(name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise NotImplementedError(
            f"implementation must be one of {', '.join(known)} here; got {name!r}. "
            "Pass implementation=None for the fastest one."
        )
    return known[name]
