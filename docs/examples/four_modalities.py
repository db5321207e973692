"""CMSAD on another organ: four contrasts of the brain, three classes, one contrast missing.

Run it with ``python docs/examples/four_modalities.py``. Nothing in the library is about the
prostate: modalities are names, classes a number, and anisotropy a matter of strides.
"""

from functools import partial

import jax
import numpy as np

from cmsad_jax import (
    CMSAD,
    EncoderConfig,
    FusionConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    init_state,
    train_step,
)

MODALITIES = ("t1", "t1c", "t2", "flair")
CONFIG = NetworkConfig(
    modalities=MODALITIES,
    num_classes=3,  # background, oedema, core
    encoder=EncoderConfig(
        channels=(4, 8),
        kernels=((3, 3, 3), (3, 3, 3)),  # voxels of the brain are cubes: no flat kernels
        strides=((1, 1, 1), (2, 2, 2)),
        blocks=(1, 1),
    ),
    fusion=FusionConfig(kind="concat"),  # "scff" correlates all 12 ordered pairs
)


def make_batch(seed, size=12):
    """Two patients with a bright ball in a larger one; the first has no FLAIR."""
    rng = np.random.default_rng(seed)
    radius = np.linalg.norm(np.indices((size,) * 3) - size / 2, axis=0)
    label = np.stack([(radius < 5).astype(np.int32) + (radius < 3)] * 2)
    contrast = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 1], [0, 3, 2]], np.float32)
    image = np.moveaxis(contrast[:, label], 0, -1)
    image = image + rng.normal(scale=0.5, size=image.shape).astype(np.float32)
    present = np.array([[True, True, True, False], [True] * 4])
    return {
        "image": np.where(present[:, None, None, None], image, 0),
        "label": label,
        "present": present,
        "key": jax.random.split(jax.random.key(seed), 2),  # one for each example
    }


def main() -> tuple[float, float]:
    """Train a few steps; returns the loss before and after."""
    network, num_steps = CMSAD(CONFIG), 12
    batch = make_batch(seed=0)
    optimizer = OptimizerConfig(learning_rate=1e-2).optimizer(num_steps)
    state = init_state(network, optimizer, batch["image"].shape, key=jax.random.key(1))
    loss = LossConfig(pairs=("t1c->t1", "flair->t2"), warmup_steps=0)
    step = jax.jit(partial(train_step, network=network, optimizer=optimizer, loss=loss))
    losses = []
    for _ in range(num_steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    distilled = float(metrics["cross_modal_distillation_loss"])
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, of it attention {distilled:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
