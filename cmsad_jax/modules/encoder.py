"""Encoder of one modality (docs/method.md, section 1): one feature for each stage."""

import dataclasses
import math
import numbers
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from cmsad_jax.modules.blocks import Activation, Block, Nonlinearity, Norm, block_class
from cmsad_jax.modules.slices import (
    SliceAttentionConfig,
    SliceMask,
    Slices,
    seen_slices,
    slice_attention,
    slices_apart,
    slices_at,
    slices_together,
    where_seen,
)
from cmsad_jax.types import ConfigError, check_choices


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Stages of an encoder; the length of a kernel tuple makes it 2D (h w) or 3D (d h w).

    Prostate MRI is anisotropic, so kernels and strides are given for each stage and axis: early
    stages work in plane, later ones in all directions.

    Examples:
        >>> EncoderConfig().rank
        3
    """

    channels: tuple[int, ...] = (8, 16, 32, 64)
    """Output channels of each stage."""
    kernels: tuple[tuple[int, ...], ...] = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    """Kernel size of each stage, in voxels, odd."""
    strides: tuple[tuple[int, ...], ...] = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2))
    """Factor of the down-sampling at the entry of each stage, along each axis."""
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    """Number of blocks of each stage."""
    block: Block = "residual"
    """Two convolutions with a shortcut, separable ones or not, or one plain convolution."""
    norm: Norm = "instance"
    """Normalisation over one example: each channel, or groups of 8 (else of their GCD with 8)."""
    activation: Nonlinearity = "leaky_relu"
    """Nonlinearity of all blocks, those of the decoder too."""
    negative_slope: float = 0.01
    """Slope of leaky_relu below 0."""
    slices: Slices = "none"
    """Attention across slices behind each stage; with kernels h w, crops then have depth (2.5D)."""
    slice_attention: SliceAttentionConfig = SliceAttentionConfig()

    def __post_init__(self):
        check_choices(self)
        for name, example in (("channels", "(8, 16)"), ("blocks", "(1, 1)")):
            if not _whole_numbers(getattr(self, name)):
                raise ConfigError(
                    f"{name} must be a tuple of whole numbers, one for each stage; "
                    f"got {getattr(self, name)!r:.80}. Use for example {example}."
                )
        for name, example in (
            ("kernels", "((1, 3, 3), (3, 3, 3))"),
            ("strides", "((1, 1, 1), (2, 2, 2))"),
        ):
            of_stage = getattr(self, name)
            if not isinstance(of_stage, tuple) or not all(map(_whole_numbers, of_stage)):
                raise ConfigError(
                    f"{name} must be a tuple of tuples of whole numbers, one for each stage with "
                    f"one number for each axis; got {of_stage!r:.80}. Use for example {example}."
                )
        lengths = {
            name: len(getattr(self, name)) for name in ("channels", "kernels", "strides", "blocks")
        }
        if not self.channels:
            raise ConfigError(
                "an encoder must have one or more stages; got channels (). Use for example (8, 16)."
            )
        if len(set(lengths.values())) != 1:
            raise ConfigError(
                "channels, kernels, strides and blocks must have one entry for each encoder stage; "
                f"got {', '.join(f'{n} {name}' for name, n in lengths.items())}. "
                "Give all four the same length."
            )
        axes = {len(entry) for entry in (*self.kernels, *self.strides)}
        if len(axes) != 1 or not axes <= {2, 3}:
            raise ConfigError(
                "kernels and strides must all have one entry for each axis of space; "
                f"got kernels {self.kernels} and strides {self.strides}. "
                "Use 2 entries throughout for slices, 3 for volumes."
            )
        if min((*self.channels, *self.blocks, *(n for stride in self.strides for n in stride))) < 1:
            raise ConfigError(
                "channels, strides and blocks must be at least 1; got channels "
                f"{self.channels}, strides {self.strides} and blocks {self.blocks}. "
                "Use 1 or more in every stage."
            )
        if any(size < 1 or size % 2 == 0 for kernel in self.kernels for size in kernel):
            raise ConfigError(
                f"kernel sizes must be odd and at least 1; got {self.kernels}. "
                "Use 1, 3 or 5 along each axis."
            )
        if self.activation != "leaky_relu" and self.negative_slope != Activation().slope:
            raise ConfigError(
                f"a negative slope is that of leaky_relu; got {self.negative_slope} and "
                f"{self.activation}. Leave one of the two out."
            )
        if not 0 <= self.negative_slope < 1:
            raise ConfigError(
                f"negative_slope must lie in [0, 1); got {self.negative_slope}. Use 0.01."
            )
        self._check_slices()

    @property
    def act(self) -> Activation:
        """The nonlinearity with its constant."""
        return Activation(self.activation, self.negative_slope)

    def _check_slices(self) -> None:
        """Whether the stages that have attention across slices are there."""
        if not isinstance(self.slice_attention, SliceAttentionConfig):
            raise ConfigError(
                "slice_attention must be a SliceAttentionConfig; got "
                f"{self.slice_attention!r:.80}. Use slice_attention=SliceAttentionConfig()."
            )
        stages = self.slice_attention.stages
        if stages is not None and not (stages and {*stages} <= {*range(self.num_stages)}):
            raise ConfigError(
                "the stages of attention across slices must be one or more of the encoder's 0 to "
                f"{self.num_stages - 1}; got {stages}. Name existing stages, or use slices=none."
            )

    @property
    def num_stages(self) -> int:
        """Number of stages ``s``."""
        return len(self.channels)

    @property
    def rank(self) -> int:
        """Axes of space of what it is given: 2 for slices, 3 for volumes and crops of slices."""
        return 2 if self.slices == "none" and len(self.kernels[0]) == 2 else 3

    @property
    def apart(self) -> bool:
        """Whether slices of one crop meet in the attention across slices alone (2.5D)."""
        return self.rank > len(self.kernels[0])

    @property
    def slice_stages(self) -> tuple[int, ...]:
        """Stages that have attention across slices."""
        stages = self.slice_attention.stages
        every = tuple(range(self.num_stages)) if stages is None else stages
        return () if self.slices == "none" else every

    @property
    def draws(self) -> bool:
        """Whether attention across slices is drawn in training."""
        return self.slices == "csam" and self.slice_attention.sampling

    def stage_shapes(self, space: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Spatial shape of each stage for an input of shape ``space``.

        Raises:
            ConfigError: if ``space`` has the wrong number of axes, or a stage has a single voxel,
                where normalisation over an example's voxels leaves nothing.
        """
        if len(space) != self.rank:
            raise ConfigError(
                f"a {self.rank}D encoder takes images with {self.rank} axes of space; "
                f"got {tuple(space)}. Use a preset of the other dimension or reshape the input."
            )
        shapes = []
        for stage, strides in enumerate(self.strides):
            steps = (1,) * self.apart + strides
            space = tuple(-(-n // step) for n, step in zip(space, steps, strict=True))
            if math.prod(space[self.apart :]) == 1:
                raise ConfigError(
                    "every encoder stage must keep more than one voxel; "
                    f"stage {stage} of strides {self.strides} shrinks to {space}. "
                    "Use fewer stages, smaller strides or a larger crop."
                )
            shapes.append(space)
        return tuple(shapes)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in value
    )


class Encoder(nn.Module):
    """Encoder: the first block of stage ``s`` strides, the others follow.

    Returns the output of every stage, shallowest first: ``b d_s h_s w_s c_s``, in ``dtype``. With
    attention across slices that is what comes of it; into the next stage goes what was before it,
    as its authors have it, unless ``SliceAttentionConfig.onward``.

    Examples:
        >>> stages, _ = jax.eval_shape(
        ...     Encoder().init_with_output, jax.random.key(0), jnp.zeros((1, 4, 16, 16, 1))
        ... )
        >>> [stage.shape for stage in stages][:2]
        [(1, 4, 16, 16, 8), (1, 4, 8, 8, 16)]
    """

    config: EncoderConfig = EncoderConfig()
    dtype: DTypeLike = jnp.float32
    rematerialize: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        slices: SliceMask | None = None,
        keys: Shaped[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b ..."], ...]:
        """Encode one array.

        Args:
            x: one modality, or several stacked.
            slices: which slices are there; None means those that are not 0 throughout. What the
                others hold changes nothing. Of attention across slices alone.
            keys: one for each example, where ``EncoderConfig.slice_attention`` draws.

        Raises:
            ConfigError: as ``EncoderConfig.stage_shapes`` does.
        """
        config = self.config
        if not hasattr(x, "shape"):
            raise ConfigError(
                "an encoder must be given one array of shape (batch, *space, channels); "
                f"got {type(x).__name__}. Give each modality an encoder of its own."
            )
        shapes = config.stage_shapes(x.shape[1:-1])
        block_type = block_class(config.block, rematerialize=self.rematerialize)
        features = []
        if config.slices != "none":
            slices = seen_slices(x) if slices is None else slices
            x = where_seen(x, slices)
        for stage in range(config.num_stages):
            x = slices_apart(x) if config.apart else x
            for block in range(config.blocks[stage]):
                x = block_type(
                    config.channels[stage],
                    config.kernels[stage],
                    config.strides[stage] if block == 0 else None,
                    config.norm,
                    self.dtype,
                    config.act,
                    name=f"stage{stage}_block{block}",
                )(x)
            x = slices_together(x, shapes[stage][0]) if config.apart else x
            if slices is not None and config.slices != "none":
                slices = slices if config.apart else slices_at(slices, config.strides[stage][0])
                attended = self._across_slices(stage, x, slices, keys)
                features.append(attended)
                x = attended if config.slice_attention.onward else where_seen(x, slices)
            else:
                features.append(x)
        return tuple(features)

    def _across_slices(
        self,
        stage: int,
        x: Float[Array, "b d h w c"],
        slices: SliceMask,
        keys: Shaped[Array, " b"] | None,
    ) -> Float[Array, "b d h w c"]:
        """What comes of attention across slices where the stage has it."""
        config = self.config
        if stage not in config.slice_stages:
            return x
        if keys is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, stage))(keys)
        return slice_attention(
            config.slices,
            config.slice_attention,
            norm=config.norm,
            apart=config.apart,
            dtype=self.dtype,
            rematerialize=self.rematerialize,
            name=f"stage{stage}_slices",
        )(x, slices, keys)
