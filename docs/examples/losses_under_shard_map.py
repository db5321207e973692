"""The losses on many devices: each computes its own part of the batch, under ``shard_map``.

Run it with ``python docs/examples/losses_under_shard_map.py``. On a machine with one device, four
are simulated on the CPU; on eight GPUs it uses eight. A loss is one value for each example, so
nothing needs to be known of the other devices: the mean is the caller's.
"""

import os

if "XLA_FLAGS" not in os.environ:  # before JAX starts
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cmsad_jax import cross_modal_distillation_loss, dice_loss


def objective(logits, labels, features):
    """Value per example: segmentation and attention distillation."""
    distillation = cross_modal_distillation_loss(features, stages=(0,), pairs=("adc->t2w",))
    return dice_loss(logits, labels) + 0.1 * distillation


def main() -> tuple[float, float]:
    """The mean over all devices, and the same on one; they agree."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    num_examples = 2 * mesh.size
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (num_examples, 8, 16, 16)
    logits = jax.random.normal(keys[0], (*shape, 1))
    labels = (jax.random.uniform(keys[1], shape) > 0.8).astype(jnp.int32)
    maps = jax.random.normal(keys[2], (2, *shape, 4))
    features = {"t2w": (maps[0],), "adc": (maps[1],)}

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("batch"), out_specs=P())
    def mean_over_devices(logits, labels, features):
        return jax.lax.pmean(objective(logits, labels, features).mean(), "batch")

    on_many = float(mean_over_devices(logits, labels, features))
    on_one = float(objective(logits, labels, features).mean())
    print(f"{mesh.size} devices: {on_many:.6f}, one device: {on_one:.6f}")
    return on_many, on_one


if __name__ == "__main__":
    main()
