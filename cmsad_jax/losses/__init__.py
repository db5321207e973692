"""Losses: pure functions of arrays that return one value for each example."""

from cmsad_jax.losses.distillation import (
    AttentionConfig,
    average_distillation_loss,
    cross_modal_distillation_loss,
    fused_distillation_loss,
    label_distillation_loss,
    map_distance,
    output_distillation_loss,
    parse_pairs,
    self_distillation_loss,
)
from cmsad_jax.losses.segmentation import (
    cross_entropy_loss,
    dice_loss,
    focal_loss,
    tversky_loss,
)

__all__ = [
    "AttentionConfig",
    "average_distillation_loss",
    "cross_entropy_loss",
    "cross_modal_distillation_loss",
    "dice_loss",
    "focal_loss",
    "fused_distillation_loss",
    "label_distillation_loss",
    "map_distance",
    "output_distillation_loss",
    "parse_pairs",
    "self_distillation_loss",
    "tversky_loss",
]
