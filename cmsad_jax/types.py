"""Axis legend, array aliases and the one error type of the library.

Axes are lower case: ``b`` batch, ``d h w`` slice, row and column, ``c`` channels, ``m``
modalities, ``s`` encoder stages, ``k`` classes, ``p`` ordered pairs of modalities. Channels come
last and depth comes before rows and columns. ``*space`` stands for ``d h w`` (volumes) or ``h w``
(slices): every module and every function of the library runs on both, so axis 0 is always the
batch, the last axis the channels, and whatever lies between them is space.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Array, Bool, Float, Int

Image = Float[Array | np.ndarray, "b *space m"]
"""Modalities of one patient on a common grid, scaled; an absent modality is all zeros."""

Labels = Int[Array | np.ndarray, "b *space"]
"""Class of each voxel, any integer type; 0 is background."""

Logits = Float[Array, "b *space k"]
"""Network output before the sigmoid (``k = 1``) or the softmax (``k > 1``, background first)."""

Present = Bool[Array | np.ndarray, "b m"]
"""Which modalities each example has."""

Feature = Float[Array, "b *space c"]
"""Activation of one encoder stage of one modality."""

Features = Mapping[str, Sequence[Float[Array, "b ..."]]]
"""``features[modality][stage]``, each a ``Feature`` of its stage's size; stage 0 is shallowest."""

AttentionMap = Float[Array, "b *space"]
"""Spatial attention of one stage, float32."""

PerExample = Float[Array, " b"]
"""One value for each example of the batch: what every loss and metric returns."""

Device: TypeAlias = Any
"""A ``jax.Device``; JAX names the class by a variable, which type checkers refuse."""


class ConfigError(ValueError):
    """A setting or a shape that cannot work; the message holds the rule, what came, the remedy."""


def check_choices(config: Any) -> None:
    """Raise ``ConfigError`` if a field of a dataclass is none of those its ``Literal`` names."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(
                f"{name} of {type(config).__name__} must be one of {choices}; got {value!r}. "
                f"Use {name}={get_args(hint)[0]!r}."
            )
