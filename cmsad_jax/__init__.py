"""Cross-modal self-attention distillation (CMSAD) in JAX and Flax.

The names below are resolved when they are first used (PEP 562), so that one submodule can be used
without loading the rest: the losses, for instance, need no network.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmsad_jax.augmentation import AugmentationConfig, augment
    from cmsad_jax.inference import sliding_window
    from cmsad_jax.kernels import attention_energy, attention_map, convolution, correlation
    from cmsad_jax.losses.distillation import (
        AttentionConfig,
        average_distillation_loss,
        cross_modal_distillation_loss,
        fused_distillation_loss,
        label_distillation_loss,
        map_distance,
        output_distillation_loss,
        self_distillation_loss,
    )
    from cmsad_jax.losses.segmentation import (
        cross_entropy_loss,
        dice_loss,
        focal_loss,
        tversky_loss,
    )
    from cmsad_jax.metrics import dice_score, precision, sensitivity
    from cmsad_jax.modules.baselines import residual_encoder_unet, unet
    from cmsad_jax.modules.decoder import Decoder
    from cmsad_jax.modules.encoder import Encoder, EncoderConfig
    from cmsad_jax.modules.fusion import Fusion, FusionConfig, FusionOutput
    from cmsad_jax.modules.network import CMSAD, NetworkConfig, NetworkOutput
    from cmsad_jax.named_weights import check_weights
    from cmsad_jax.parallel import parallelize
    from cmsad_jax.training import LossConfig, OptimizerConfig, TrainState, init_state, train_step
    from cmsad_jax.types import ConfigError

__version__ = "0.1.0"

_HOME = {
    "CMSAD": "modules.network",
    "AttentionConfig": "losses.distillation",
    "AugmentationConfig": "augmentation",
    "ConfigError": "types",
    "Decoder": "modules.decoder",
    "Encoder": "modules.encoder",
    "EncoderConfig": "modules.encoder",
    "Fusion": "modules.fusion",
    "FusionConfig": "modules.fusion",
    "FusionOutput": "modules.fusion",
    "LossConfig": "training",
    "NetworkConfig": "modules.network",
    "NetworkOutput": "modules.network",
    "OptimizerConfig": "training",
    "TrainState": "training",
    "attention_energy": "kernels",
    "attention_map": "kernels",
    "augment": "augmentation",
    "average_distillation_loss": "losses.distillation",
    "check_weights": "named_weights",
    "convolution": "kernels",
    "correlation": "kernels",
    "cross_entropy_loss": "losses.segmentation",
    "cross_modal_distillation_loss": "losses.distillation",
    "dice_loss": "losses.segmentation",
    "dice_score": "metrics",
    "focal_loss": "losses.segmentation",
    "fused_distillation_loss": "losses.distillation",
    "init_state": "training",
    "label_distillation_loss": "losses.distillation",
    "map_distance": "losses.distillation",
    "output_distillation_loss": "losses.distillation",
    "parallelize": "parallel",
    "precision": "metrics",
    "residual_encoder_unet": "modules.baselines",
    "self_distillation_loss": "losses.distillation",
    "sensitivity": "metrics",
    "sliding_window": "inference",
    "train_step": "training",
    "tversky_loss": "losses.segmentation",
    "unet": "modules.baselines",
}

__all__ = [
    "CMSAD",
    "AttentionConfig",
    "AugmentationConfig",
    "ConfigError",
    "Decoder",
    "Encoder",
    "EncoderConfig",
    "Fusion",
    "FusionConfig",
    "FusionOutput",
    "LossConfig",
    "NetworkConfig",
    "NetworkOutput",
    "OptimizerConfig",
    "TrainState",
    "attention_energy",
    "attention_map",
    "augment",
    "average_distillation_loss",
    "check_weights",
    "convolution",
    "correlation",
    "cross_entropy_loss",
    "cross_modal_distillation_loss",
    "dice_loss",
    "dice_score",
    "focal_loss",
    "fused_distillation_loss",
    "init_state",
    "label_distillation_loss",
    "map_distance",
    "output_distillation_loss",
    "parallelize",
    "precision",
    "residual_encoder_unet",
    "self_distillation_loss",
    "sensitivity",
    "sliding_window",
    "train_step",
    "tversky_loss",
    "unet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
