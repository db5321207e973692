"""Random changes of training examples, on the device: jitted, per example, one key for each.

What an example becomes depends on its own key alone, never on the batch around it. Geometry is
changed in plane only, since slices are several times thicker than pixels, and intensities per
modality. An effect of probability 0 is not computed. Random numbers come from flat draws, two an
example and a third with elastic deformation: XLA on a CPU takes half a second to compile each draw,
and ten times that for the same draw in several dimensions.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from cmsad_jax.types import ConfigError, Image, Labels, Present

Volume = Float[Array, "m d h w"]
"""One example; modalities first, as most effects differ between them."""

Draws = Iterator[Float[Array, " m"]]
"""Uniform numbers in [0, 1), as many rows as are asked for; one number for each modality."""

_NUM_DRAWS = 32
"""Rows of numbers that all effects together may ask for."""


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """How often and how far examples are changed.

    Each effect has a probability: per example for ``flip``, ``affine`` and ``elastic``, which move
    all modalities and the labels alike, else per modality. Strengths are drawn uniformly. The
    intensities are taken to be standardised (mean 0, standard deviation 1), pixels to be square.

    Examples:
        >>> AugmentationConfig(flip_probability=0.0).flip_probability
        0.0
    """

    flip_probability: float = 0.5
    """Mirror left and right (axis w)."""
    affine_probability: float = 0.5
    """Rotate, scale and shift in plane."""
    rotation_degrees: float = 15.0
    """Largest angle, either way."""
    scale: tuple[float, float] = (0.85, 1.15)
    """Range of the magnification; above 1 enlarges."""
    translation_voxels: float = 4.0
    """Largest shift along h and along w, either way."""
    elastic_probability: float = 0.0
    """Smooth random displacements in plane, of image and labels alike; off by default."""
    elastic_voxels: float = 3.0
    """Largest displacement along h and along w, either way."""
    elastic_nodes: int = 5
    """Independent displacements along h and along w; those between are interpolated."""
    misalignment_probability: float = 0.3
    """Shift a modality against the first one, on which the labels lie; never the first itself."""
    misalignment_voxels: float = 2.0
    """Largest shift along h and along w, either way."""
    blur_probability: float = 0.1
    """In-plane Gaussian blur."""
    blur_sd_voxels: tuple[float, float] = (0.5, 1.0)
    """Range of the width of the blur."""
    bias_probability: float = 0.2
    """Smooth multiplicative field (coil sensitivity) on the intensity above the minimum."""
    bias_amplitude: float = 0.3
    """Largest change of the logarithm of the intensity, either way."""
    contrast_probability: float = 0.2
    """Multiply by a factor, add a shift."""
    contrast: tuple[float, float] = (0.8, 1.25)
    """Range of the factor."""
    brightness: float = 0.2
    """Largest shift, either way, in standard deviations."""
    gamma_probability: float = 0.2
    """Raise the intensity, scaled to 0 to 1, to a power; its range is kept."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Range of the power."""
    noise_probability: float = 0.2
    """Add white Gaussian noise."""
    noise_sd: float = 0.2
    """Largest standard deviation of the noise, in standard deviations of the intensity."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability"):
                rule, valid = "between 0 and 1", 0 <= value <= 1
            elif isinstance(value, tuple):
                rule = "a range of positive numbers, the smaller first"
                valid = len(value) == 2 and 0 < value[0] <= value[1]
            elif field.name == "elastic_nodes":
                rule, valid = "2 or more", value >= 2
            else:
                rule, valid = "0 or more", value >= 0
            if not valid:
                raise ConfigError(
                    f"augmentation.{field.name} must be {rule}; got {value}. "
                    f"The default is {field.default}."
                )


def augment(
    image: Image,
    labels: Labels,
    *,
    keys: Shaped[Array, " b"],
    config: AugmentationConfig,
    present: Present | None = None,
) -> tuple[Image, Labels]:
    """Change each example at random, labels along with the image.

    Images are interpolated linearly, labels take the nearest voxel's class. What enters from
    beyond the border is 0, as are voxels outside a field of view. Channels after those of
    ``present``, such as the prior of a cascade, move as the first modality does, and keep their
    values.

    Args:
        image: standardised intensities; the labels lie on the first modality.
        labels: classes; they keep their integer type.
        keys: one typed random key (``jax.random.key``) for each example.
        config: which effects, how often, how far.
        present: modalities that each example has; the others stay 0. None is all channels.

    Returns:
        Image and labels of the same shapes. Computed in float32, returned in the image's type.

    Raises:
        ConfigError: ``present`` has more modalities than the image has channels.

    Examples:
        >>> image, labels = jnp.zeros((2, 4, 8, 8, 3)), jnp.zeros((2, 4, 8, 8), int)
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> moving = functools.partial(augment, keys=keys, config=AugmentationConfig())
        >>> moved, _ = jax.eval_shape(moving, image, labels)
        >>> moved.shape
        (2, 4, 8, 8, 3)
    """
    if present is None:
        present = jnp.ones((image.shape[0], image.shape[-1]), bool)
    if present.shape[-1] > image.shape[-1]:
        raise ConfigError(
            "present must have an entry for each modality of the image; got "
            f"{present.shape[-1]} entries and {image.shape[-1]} channels. Leave it out for all."
        )
    planar = image.ndim == 4
    volume = image[:, None] if planar else image
    volume = jnp.moveaxis(volume.astype(jnp.float32), -1, 1)
    stacked = labels[:, None] if planar else labels

    def one(volume, labels, present, key):
        draw_key, noise_key = jax.random.split(key)
        drawn = jax.random.uniform(draw_key, (_NUM_DRAWS * present.size,))
        draws = iter(drawn.reshape(_NUM_DRAWS, -1))
        volume, labels = _move(volume, labels, draws, config, jax.random.fold_in(noise_key, 1))
        volume, prior = volume[: present.size], volume[present.size :]
        volume = _change_intensity(volume, draws, config)
        if config.noise_probability:
            chosen, strength = _chosen(draws, config.noise_probability), _column(next(draws))
            m, d, h, w = volume.shape
            noise = jax.random.normal(noise_key, (m * d, h * w)).reshape(volume.shape)
            volume += jnp.where(chosen, config.noise_sd * strength, 0.0) * noise
        volume = jnp.where(present[:, None, None, None], volume, 0.0)
        return jnp.concatenate([volume, prior]) if prior.size else volume, labels

    volume, stacked = jax.vmap(one)(volume, stacked, present, keys)
    volume = jnp.moveaxis(volume, 1, -1).astype(image.dtype)
    return (volume[:, 0], stacked[:, 0]) if planar else (volume, stacked)


def source_positions(
    shape: tuple[int, int], matrix: Float[Array, "2 2"], shift: Float[Array, "2"]
) -> Float[Array, "h w 2"]:
    """Where each pixel of the result comes from: ``matrix @ (pixel - centre) + centre + shift``."""
    size = jnp.array(shape, jnp.float32)
    pixels = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in shape), indexing="ij"), axis=-1)
    centre = (size - 1) / 2
    # Written out: a matrix product may round to bfloat16 on an accelerator.
    return ((pixels - centre)[..., None, :] * matrix).sum(-1) + centre + shift


def sample_linear(
    volume: Float[Array, "*d h w"], positions: Float[Array, "i j 2"]
) -> Float[Array, "*d i j"]:
    """Bilinear values of each slice at ``positions`` (row, column); 0 beyond the border."""
    h, w = volume.shape[-2:]
    corner = jnp.floor(positions)
    fraction = positions - corner
    flat = volume.reshape(*volume.shape[:-2], h * w)
    value = jnp.zeros((), volume.dtype)
    for step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = jnp.where(jnp.array(step, bool), fraction, 1 - fraction).prod(-1)
        index, inside = _flat_index(corner + jnp.array(step), (h, w))
        value += flat[..., index] * jnp.where(inside, weight, 0.0)
    return value


def sample_nearest(
    labels: Int[Array, "*d h w"], positions: Float[Array, "i j 2"]
) -> Int[Array, "*d i j"]:
    """Class of the voxel nearest to each position (row, column); 0 beyond the border."""
    h, w = labels.shape[-2:]
    index, inside = _flat_index(jnp.floor(positions + 0.5), (h, w))
    return jnp.where(inside, labels.reshape(*labels.shape[:-2], h * w)[..., index], 0)


def _flat_index(
    position: Float[Array, "i j 2"], shape: tuple[int, int]
) -> tuple[Int[Array, "i j"], Shaped[Array, "i j"]]:
    """Index of whole-numbered positions into the flattened plane, and which lie in it."""
    limit = jnp.array(shape) - 1
    inside = ((position >= 0) & (position <= limit)).all(-1)
    row, column = jnp.moveaxis(jnp.clip(position, 0, limit).astype(jnp.int32), -1, 0)
    return row * shape[1] + column, inside


def _move(
    volume: Volume,
    labels: Int[Array, "d h w"],
    draws: Draws,
    config: AugmentationConfig,
    elastic_key: Shaped[Array, ""],
) -> tuple[Volume, Int[Array, "d h w"]]:
    """Flip, then rotate, scale, shift, bend all alike, and shift the other modalities further."""
    if config.flip_probability:
        flipped = next(draws)[0] < config.flip_probability
        volume = jnp.where(flipped, volume[..., ::-1], volume)
        labels = jnp.where(flipped, labels[..., ::-1], labels)
    moving = (
        config.affine_probability,
        config.elastic_probability,
        config.misalignment_probability,
    )
    if not any(moving):
        return volume, labels
    plane = volume.shape[2], volume.shape[3]
    positions = source_positions(plane, *_draw_affine(draws, config))
    if config.elastic_probability:
        positions += _elastic(plane, elastic_key, config)
    labels = sample_nearest(labels, positions)
    chosen = _chosen(draws, config.misalignment_probability).at[0].set(False)
    offsets = jnp.stack([_symmetric(next(draws), config.misalignment_voxels) for _ in "hw"], -1)
    offsets = jnp.where(chosen, offsets[:, None, None], 0.0)
    if more := len(volume) - len(offsets):
        offsets = jnp.pad(offsets, ((0, more), (0, 0), (0, 0), (0, 0)))
    return jax.vmap(sample_linear)(volume, positions + offsets), labels


def _draw_affine(
    draws: Draws, config: AugmentationConfig
) -> tuple[Float[Array, "2 2"], Float[Array, "2"]]:
    """Matrix and shift of an example, from the result's pixels to the source's."""
    chosen, angle, scale, *shift = (next(draws)[0] for _ in range(5))
    angle = _symmetric(angle, jnp.deg2rad(config.rotation_degrees))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.stack([cos, -sin, sin, cos]).reshape(2, 2) / _between(scale, config.scale)
    shift = _symmetric(jnp.stack(shift), config.translation_voxels)
    chosen = chosen < config.affine_probability
    return jnp.where(chosen, matrix, jnp.eye(2)), jnp.where(chosen, shift, 0.0)


def _elastic(
    plane: tuple[int, int], key: Shaped[Array, ""], config: AugmentationConfig
) -> Float[Array, "h w 2"]:
    """Displacement of every pixel, from random ones at a few nodes; 0 where it was not drawn."""
    nodes = config.elastic_nodes
    drawn = jax.random.uniform(key, (1 + 2 * nodes**2,))
    coarse = _symmetric(drawn[1:], config.elastic_voxels).reshape(nodes, nodes, 2)
    smooth = jax.image.resize(coarse, (*plane, 2), "cubic")
    smooth = jnp.clip(smooth, -config.elastic_voxels, config.elastic_voxels)
    return jnp.where(drawn[0] < config.elastic_probability, smooth, 0.0)


def _change_intensity(volume: Volume, draws: Draws, config: AugmentationConfig) -> Volume:
    """Blur, coil field, contrast and gamma, each where its modality was chosen for it."""
    for probability, effect in (
        (config.blur_probability, _blur),
        (config.bias_probability, _bias),
        (config.contrast_probability, _contrast),
        (config.gamma_probability, _gamma),
    ):
        if probability:
            chosen = _chosen(draws, probability)
            volume = jnp.where(chosen, effect(volume, draws, config), volume)
    return volume


def _blur(volume: Volume, draws: Draws, config: AugmentationConfig) -> Volume:
    """As two products with Gaussian matrices, their rows normalised (so borders do not darken)."""
    sd = _between(_column(next(draws))[..., 0], config.blur_sd_voxels)

    def weights(size: int) -> Float[Array, "m i j"]:
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        return jax.nn.softmax(-0.5 * (distance / sd) ** 2, axis=-1)

    h, w = volume.shape[-2:]
    highest = jax.lax.Precision.HIGHEST  # else intensities are rounded on accelerators
    return jnp.einsum("mih,mjw,mdhw->mdij", weights(h), weights(w), volume, precision=highest)


def _bias(volume: Volume, draws: Draws, config: AugmentationConfig) -> Volume:
    """``exp`` of a random quadratic of the coordinates, clipped to the amplitude."""
    axes = [jnp.linspace(-1.0, 1.0, n) if n > 1 else jnp.zeros(1) for n in volume.shape[1:]]
    z, y, x = jnp.meshgrid(*axes, indexing="ij", sparse=True)
    terms = (z, y, x, z * y, z * x, y * x, z * z, y * y, x * x)
    limit = config.bias_amplitude
    field = sum(_symmetric(_column(next(draws)), limit / 3) * term for term in terms)
    low = volume.min(axis=(1, 2, 3), keepdims=True)
    return low + (volume - low) * jnp.exp(jnp.clip(field, -limit, limit))


def _contrast(volume: Volume, draws: Draws, config: AugmentationConfig) -> Volume:
    factor = _between(_column(next(draws)), config.contrast)
    return volume * factor + _symmetric(_column(next(draws)), config.brightness)


def _gamma(volume: Volume, draws: Draws, config: AugmentationConfig) -> Volume:
    low = volume.min(axis=(1, 2, 3), keepdims=True)
    extent = volume.max(axis=(1, 2, 3), keepdims=True) - low
    unit = (volume - low) / jnp.where(extent > 0, extent, 1.0)  # constant where absent
    return low + extent * unit ** _between(_column(next(draws)), config.gamma)


def _chosen(draws: Draws, probability: float) -> Bool[Array, "m 1 1 1"]:
    """For which modalities an effect was drawn."""
    return _column(next(draws)) < probability


def _column(row: Shaped[Array, " m"]) -> Shaped[Array, "m 1 1 1"]:
    return row.reshape(-1, 1, 1, 1)


def _between(uniform: Float[Array, "..."], limits: tuple[float, float]) -> Float[Array, "..."]:
    return limits[0] + (limits[1] - limits[0]) * uniform


def _symmetric(
    uniform: Float[Array, "..."], limit: float | Float[Array, ""]
) -> Float[Array, "..."]:
    return limit * (2 * uniform - 1)
