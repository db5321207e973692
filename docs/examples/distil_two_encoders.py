"""Distil spatial attention from one encoder of your own into another.

Run it with ``python docs/examples/distil_two_encoders.py``.
"""

import flax.linen as nn
import jax
import optax

import cmsad_jax


class Encoder(nn.Module):
    """Two stages on slices ``b h w c``."""

    @nn.compact
    def __call__(self, x):
        """The feature of each stage, shallowest first."""
        shallow = nn.relu(nn.Conv(8, (3, 3))(x))
        deep = nn.relu(nn.Conv(16, (3, 3), strides=2)(shallow))
        return shallow, deep


def loss_fn(params, images):
    """How far the student's attention maps are from the teacher's, averaged over the batch."""
    features = {name: Encoder().apply(params[name], images[name]) for name in images}
    loss = cmsad_jax.cross_modal_distillation_loss(
        features, attention=cmsad_jax.AttentionConfig(), stages=(0, 1), pairs=("adc->t2w",)
    )
    return loss.mean()  # one value for each example


def main() -> list[float]:
    """Train the T2W encoder to look where the ADC encoder looks."""
    keys = dict(zip(("t2w", "adc"), jax.random.split(jax.random.key(0)), strict=True))
    images = {name: jax.random.normal(key, (4, 32, 32, 1)) for name, key in keys.items()}
    params = {name: Encoder().init(key, images[name]) for name, key in keys.items()}
    optimizer = optax.adam(1e-2)
    state, losses = optimizer.init(params), []
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    for _ in range(20):
        loss, gradient = value_and_grad(params, images)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    print(f"distillation loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
