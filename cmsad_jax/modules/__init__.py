"""Flax Linen modules: encoder, fusion, decoder and their assembly."""

from cmsad_jax.modules.decoder import Decoder
from cmsad_jax.modules.encoder import Encoder, EncoderConfig
from cmsad_jax.modules.fusion import Fusion, FusionConfig, FusionOutput
from cmsad_jax.modules.network import CMSAD, NetworkConfig, NetworkOutput, probabilities

__all__ = [
    "CMSAD",
    "Decoder",
    "Encoder",
    "EncoderConfig",
    "Fusion",
    "FusionConfig",
    "FusionOutput",
    "NetworkConfig",
    "NetworkOutput",
    "probabilities",
]
