"""U-Net decoder over the fused features, with deep supervision (docs/method.md, section 5)."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cmsad_jax.modules.blocks import Activation, Block, Conv, Norm, block_class, resize


class Decoder(nn.Module):
    """From the fused feature of every stage to logits.

    Each step resizes linearly to the next shallower stage (a transposed 3D convolution's gradient
    is slow under XLA), convolves, joins the skip and applies its blocks.

    Attributes:
        num_classes: ``k``.
        kernels: kernel of each stage, as in the encoder.
        num_deep: number of coarser stages that give logits of their own, for deep supervision.
        norm: normalisation of the blocks.
        head_bias: initial bias of the logits; below 0 where the foreground is rare.
        dtype: in which the convolutions compute; logits are float32.
        block: residual, plain or separable.
        num_blocks: blocks of each stage.
        rematerialize: as in ``NetworkConfig``.
        num_distances: foreground classes of which the finest stage also gives a distance; 0 has
            none.
        activation: nonlinearity of the blocks.

    Examples:
        >>> Decoder(num_classes=1, kernels=((3, 3, 3), (1, 3, 3))).num_deep
        0
    """

    num_classes: int
    kernels: tuple[tuple[int, ...], ...]
    num_deep: int = 0
    norm: Norm = "instance"
    head_bias: float = 0.0
    dtype: DTypeLike = jnp.float32
    block: Block = "residual"
    num_blocks: int = 1
    rematerialize: bool = False
    num_distances: int = 0
    activation: Activation = Activation()

    @nn.compact
    def __call__(
        self, fused: Sequence[Float[Array, "b ..."]]
    ) -> tuple[
        Float[Array, "b *space k"],
        tuple[Float[Array, "b ..."], ...],
        Float[Array, "b *space f"] | None,
    ]:
        """Logits at the finest stage, those of the ``num_deep`` coarser ones, and distances.

        The coarser ones are finest first. Distances are float32, before the tanh that clips them.
        """
        x = fused[-1]
        pointwise = (1,) * (x.ndim - 2)
        block_type = block_class(self.block, rematerialize=self.rematerialize)
        deep = []
        for stage in reversed(range(len(fused) - 1)):
            skip = fused[stage]
            channels = skip.shape[-1]
            if stage < self.num_deep:
                deep.append(self._head(f"head{stage + 1}", pointwise)(x))
            x = Conv(channels, pointwise, dtype=self.dtype, name=f"reduce{stage}")(x)
            x = jnp.concatenate([resize(x, skip.shape[1:-1]), skip], -1)
            for block in range(self.num_blocks):
                name = f"block{stage}" if block == 0 else f"block{stage}_{block}"
                x = block_type(
                    channels,
                    self.kernels[stage],
                    None,
                    self.norm,
                    self.dtype,
                    self.activation,
                    name=name,
                )(x)
        logits = self._head("head0", pointwise)(x)
        distance = None
        if self.num_distances:
            distance = Conv(self.num_distances, pointwise, name="distance")(x)
        return logits, tuple(reversed(deep)), distance

    def _head(self, name: str, pointwise: tuple[int, ...]) -> nn.Module:
        return Conv(self.num_classes, pointwise, bias=self.head_bias, name=name)
