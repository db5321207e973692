"""Use the correlated fusion block inside an ``nnx.Module`` of your own.

Run it with ``python docs/examples/fusion_in_nnx.py``. The library's modules are Flax Linen;
``flax.nnx.bridge`` makes any of them part of an NNX model, weights included.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cmsad_jax


class TwoContrasts(nnx.Module):
    """Two convolutions of your own, fused by SCFF, and one logit for each pixel of a slice."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.second = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.fusion = nnx.bridge.ToNNX(cmsad_jax.Fusion(8, ("first", "second")), rngs=rngs)
        zeros = jnp.zeros((1, 8, 8, 8))
        nnx.bridge.lazy_init(self.fusion, {"first": zeros, "second": zeros})
        self.head = nnx.Conv(8, 1, (1, 1), rngs=rngs)

    def __call__(self, first, second):
        """Logits ``b h w 1`` of two images ``b h w 1``."""
        features = {"first": nnx.relu(self.first(first)), "second": nnx.relu(self.second(second))}
        return self.head(self.fusion(features).fused)


@nnx.jit
def train_step(model: TwoContrasts, optimizer: nnx.Optimizer, first, second, labels):
    """One update; returns the loss."""

    def loss_fn(model):
        return cmsad_jax.dice_loss(model(first, second), labels).mean()

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradient)
    return loss


def main() -> list[float]:
    """Learn where the two images agree, which neither of them says alone."""
    keys = jax.random.split(jax.random.key(0))
    first, second = (jax.random.normal(key, (2, 32, 32, 1)) for key in keys)
    labels = (first * second > 0)[..., 0].astype(jnp.int32)
    model = TwoContrasts(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, first, second, labels)) for _ in range(40)]
    print(f"Dice loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
