"""Named starting points for a run."""

from cmsad_jax.modules import baselines
from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.modules.network import NetworkConfig
from cmsad_jax.training import LossConfig, OptimizerConfig
from data_pipelines.config import DataConfig, PreprocessConfig
from experiments.settings.config import Config, PredictConfig, TrainConfig

_VOLUME_STAGES = EncoderConfig(
    channels=(32, 64, 128, 256, 320, 320),
    kernels=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    blocks=(1, 1, 2, 2, 2, 2),
)


_SLICE_STAGES = EncoderConfig(
    channels=(32, 64, 128, 256, 320, 320),
    kernels=((3, 3),) * 6,
    strides=((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2)),
    blocks=(1, 1, 2, 2, 2, 2),
)


_FINE_GRID = PreprocessConfig(spacing_mm=(3.0, 0.5, 0.5), size=(20, 256, 256))


PRESETS: dict[str, Config] = {
    "auto": Config(preset="auto"),
    "small": Config(preset="small"),
    "light": Config(preset="light", network=baselines.light(NetworkConfig())),
    "volume3d": Config(
        preset="volume3d",
        data=DataConfig(preprocess=_FINE_GRID),
        network=NetworkConfig(encoder=_VOLUME_STAGES, deep_supervision=3, dtype="bfloat16"),
        loss=LossConfig(warmup_steps=1000),
        train=TrainConfig(
            steps=20_000,
            batch_size=2,
            crop=(20, 160, 160),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            average_decay=0.999,
            validations=20,
            checkpoint_every=500,
        ),
    ),
    "slice2d": Config(
        preset="slice2d",
        data=DataConfig(preprocess=_FINE_GRID),
        network=NetworkConfig(encoder=_SLICE_STAGES, deep_supervision=3, dtype="bfloat16"),
        loss=LossConfig(warmup_steps=1000),
        train=TrainConfig(
            steps=20_000,
            batch_size=16,
            crop=(1, 192, 192),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            average_decay=0.999,
            validations=20,
            checkpoint_every=500,
        ),
        predict=PredictConfig(batch_size=8),
    ),
}
"""Named starting points: a small one for CPUs, two for accelerators in the style of nnU-Net, and
what ``experiments.planning`` fills in."""
