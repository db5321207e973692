"""Operations with a choice of implementations; see ``cmsad_jax.kernels.api``."""

from cmsad_jax.kernels.api import (
    attention_energy,
    attention_map,
    convolution,
    correlation,
    normalize_map,
    resize_map,
    written_out,
)
from cmsad_jax.kernels.depthwise import depthwise_convolution

__all__ = [
    "attention_energy",
    "attention_map",
    "convolution",
    "correlation",
    "depthwise_convolution",
    "normalize_map",
    "resize_map",
    "written_out",
]
