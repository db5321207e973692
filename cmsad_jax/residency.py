"""Training crops cut on the device, from whole cases that stay there."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Cases = Mapping[str, Shaped[Array, "n ..."]]
"""``image: n *space m`` and ``label: n *space`` as stored, ``present: n m``."""


def take_crops(
    cases: Cases,
    case_index: Int[Array, " b"],
    offset: Int[Array, "b d"],
    *,
    crop: Sequence[int],
    unit: float,
) -> dict[str, Shaped[Array, "b ..."]]:
    """Image, label and presence of a batch of crops.

    Args:
        cases: every case, in the type in which it is stored.
        case_index: whose crop each example is.
        offset: its first voxel; the crop must lie within the volume.
        crop: its size.
        unit: intensity of one stored step.

    Returns:
        ``image`` (float32, ``unit`` times what is stored), ``label`` (int32) and ``present``.
    """

    def one(index, start):
        def cut(volumes, *last):
            sizes, zeros = (*crop, *last), (0,) * len(last)
            return jax.lax.dynamic_slice(volumes, (index, *start, *zeros), (1, *sizes))[0]

        image = cut(cases["image"], cases["image"].shape[-1])
        return image, cut(cases["label"]), cases["present"][index]

    image, label, present = jax.vmap(one)(case_index, offset)
    return {
        "image": image.astype(jnp.float32) * jnp.float32(unit),
        "label": label.astype(jnp.int32),
        "present": present,
    }
