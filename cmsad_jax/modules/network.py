"""CMSAD assembled: encoders, fusion at every stage, decoder. The whole network on one page."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, PyTree, Shaped

from cmsad_jax.modules.blocks import Block
from cmsad_jax.modules.decoder import Decoder
from cmsad_jax.modules.encoder import Encoder, EncoderConfig
from cmsad_jax.modules.fusion import Fusion, FusionConfig, FusionOutput
from cmsad_jax.modules.slices import SliceMask, seen_slices, slices_apart, slices_together
from cmsad_jax.types import (
    ConfigError,
    Image,
    Logits,
    Present,
    check_choices,
    check_names,
    check_number,
    check_present,
)

Keys = Shaped[Array, " b"]
"""One key of ``jax.random`` for each example."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Everything that fixes the architecture.

    Examples:
        >>> NetworkConfig(modalities=("t2w", "adc"), num_classes=3).encoder.channels
        (8, 16, 32, 64)
    """

    modalities: tuple[str, ...] = ("t2w", "adc", "hbv")
    """Names of the input channels ``m``, one encoder each; any number from 1 up."""
    num_classes: int = 1
    """Logits ``k``: 1 for one foreground class (sigmoid), else classes with background."""
    encoder: EncoderConfig = EncoderConfig()
    fusion: FusionConfig = FusionConfig()
    prior: bool = False
    """One channel more, the last, beside each modality: what the first of a cascade found."""
    share_encoders: bool = False
    """One set of encoder weights for all modalities."""
    decoder_block: Block = "residual"
    """Two convolutions with a shortcut, or one plain convolution."""
    decoder_blocks: int = 1
    """Number of blocks of each decoder stage."""
    deep_supervision: int = 1
    """Number of coarser decoder stages that are supervised as well."""
    head_bias: float = -4.0
    """Initial bias of the logit of a single class (log-odds): foreground is rare."""
    distance_clip_mm: float | None = None
    """Learn the signed distance to the target's surface as well, clipped to so many mm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; weights, norms' statistics, attention maps, losses and logits are float32."""
    matmul_precision: Literal["default", "high", "highest"] = "highest"
    """Of products where dtype is float32: highest is float32 everywhere, default the fastest."""
    rematerialize: bool = False
    """Compute the inside of blocks again for the gradient: a third more work, far less memory."""

    def __post_init__(self):
        check_choices(self)
        check_names("modalities", self.modalities)
        for name, kind in (("encoder", EncoderConfig), ("fusion", FusionConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(
                    f"{name} must be a {kind.__name__}; got {getattr(self, name)!r:.80}. "
                    f"Use {name}={kind.__name__}()."
                )
        check_number("num_classes", self.num_classes, least=1, usual=1, whole=True)
        check_number("decoder_blocks", self.decoder_blocks, least=1, usual=1, whole=True)
        check_number("head_bias", self.head_bias, least=-100, usual=-4)
        if self.distance_clip_mm is not None:
            check_number("distance_clip_mm", self.distance_clip_mm, least=0, usual=15, above=True)
        check_number("deep_supervision", self.deep_supervision, least=0, usual=1, whole=True)
        if not 0 <= self.deep_supervision < self.encoder.num_stages:
            raise ConfigError(
                "deep_supervision must be less than the number of stages; "
                f"got {self.deep_supervision} and {self.encoder.num_stages} stages. "
                f"Use 0 to {self.encoder.num_stages - 1}."
            )
        if not self.scff_stages or not {*self.scff_stages} <= {*range(self.encoder.num_stages)}:
            raise ConfigError(
                "the stages of SCFF must be one or more of the encoder's 0 to "
                f"{self.encoder.num_stages - 1}; got {self.fusion.stages}. "
                "Name existing stages, or use fusion kind concat."
            )

    @property
    def num_channels(self) -> int:
        """Channels of the image: one for each modality, and the prior's."""
        return len(self.modalities) + self.prior

    @property
    def scff_stages(self) -> tuple[int, ...]:
        """Stages that have SCFF, where that is the fusion."""
        stages = self.fusion.stages
        return tuple(range(self.encoder.num_stages)) if stages is None else stages


@struct.dataclass
class NetworkOutput:
    """What the network returns: its result and the intermediates that losses and figures use.

    Attributes:
        logits: ``b *space k``, float32.
        deep_logits: logits of coarser decoder stages, finest first.
        features: ``features[modality][stage]``; those of an absent modality are 0. Empty under
            early fusion, where no feature is of one modality: then there is nothing to distil.
        fused: fused feature of each stage.
        gates: spatial gates ``b *space m`` of each stage; None where the fusion has none.
        correlation_loss: mean of SCFF's correlation loss over the stages that have SCFF, else 0.
        distance_mm: signed distance ``b *space f`` to the surface of each foreground class, below 0
            inside, within ``distance_clip_mm`` both ways, float32; None if it is not learnt.
        modality_weights: of each stage, weights ``b m`` that sum to 1 over the modalities present;
            None where the fusion has none. In 2.5D the mean over the slices that are there.

    Examples:
        >>> network = CMSAD(NetworkConfig(modalities=("t2w", "adc")))
        >>> image = jnp.zeros((1, 4, 16, 16, 2))
        >>> params = jax.eval_shape(network.init, jax.random.key(0), image)
        >>> features = jax.eval_shape(lambda p: network.apply(p, image).features, params)
        >>> features["adc"][1].shape
        (1, 4, 8, 8, 16)
    """

    logits: Float[Array, "b *space k"]
    deep_logits: tuple[Float[Array, "b ..."], ...]
    features: dict[str, tuple[Float[Array, "b ..."], ...]]
    fused: tuple[Float[Array, "b ..."], ...]
    gates: tuple[Float[Array, "b ..."] | None, ...]
    correlation_loss: Float[Array, " b"]
    distance_mm: Float[Array, "b *space f"] | None = None
    modality_weights: tuple[Float[Array, "b m"] | None, ...] = ()


class CMSAD(nn.Module):
    """The segmentation network (docs/method.md, sections 1, 4 and 5).

    It is a pure function of its inputs, the same in training and prediction: dropping modalities
    is a change of ``present``, made by the caller.

    Examples:
        >>> network = CMSAD(NetworkConfig(modalities=("t2w", "adc")))
        >>> image = jnp.zeros((1, 4, 16, 16, 2))
        >>> params = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
        >>> sorted(params)[:4]
        ['decoder', 'encoder_adc', 'encoder_t2w', 'fusion0']
        >>> jax.eval_shape(lambda p: network.apply({"params": p}, image).logits, params).shape
        (1, 4, 16, 16, 1)
    """

    config: NetworkConfig = NetworkConfig()

    @nn.compact
    def __call__(
        self,
        image: Image,
        present: Present | None = None,
        slices: SliceMask | None = None,
        keys: Keys | None = None,
    ) -> NetworkOutput:
        """Segment a batch.

        Args:
            image: scaled intensities; 0 where there is nothing. With ``prior`` a probability in
                the last channel, which each encoder sees beside its modality.
            present: which modalities each example has; None means all. Whatever an absent one
                holds, NaN and inf included, changes neither the output nor a gradient.
            slices: with attention across slices, those that each example has; None means those that
                are not 0 throughout. Whatever the others hold changes nothing.
            keys: with attention across slices that is drawn, one key of ``jax.random`` for each
                example; None takes the means.

        Raises:
            ConfigError: if the channels are not the configured ones, ``present`` or
                ``slices`` is no mask of them, or a stage would shrink to one voxel.
        """
        if self.config.dtype != "float32":
            return self._segment(image, present, slices, keys)
        with jax.default_matmul_precision(self.config.matmul_precision):
            return self._segment(image, present, slices, keys)

    def _segment(
        self, image: Image, present: Present | None, slices: SliceMask | None, keys: Keys | None
    ) -> NetworkOutput:
        config = self.config
        names, encoder = config.modalities, config.encoder
        present = _checked(image, present, config)
        masks = [present[:, m].reshape(-1, *(1,) * (image.ndim - 1)) for m in range(len(names))]
        inputs = [jnp.where(mask, image[..., m : m + 1], 0) for m, mask in enumerate(masks)]
        slices = _checked_slices(encoder, inputs, slices)
        prior = [image[..., -1:]] if config.prior else []
        features: dict[str, tuple[Array, ...]] = {}
        if config.fusion.kind == "early":
            fused = self._encoder("encoder")(jnp.concatenate(inputs + prior, -1), slices, keys)
            fused, gates = [_apart(encoder, f) for f in fused], [None] * encoder.num_stages
            losses, weights = [jnp.zeros(image.shape[0])], gates
        else:
            if prior:
                inputs = [jnp.concatenate([each, *prior], -1) for each in inputs]
            features = self._encode(inputs, masks, slices, keys)
            outputs, losses = self._fuse(features, present, slices)
            fused, gates = [each.fused for each in outputs], [each.gates for each in outputs]
            weights = [_over_slices(each.weights, slices) for each in outputs]
        logits, deep_logits, distance = Decoder(
            config.num_classes,
            encoder.kernels,
            config.deep_supervision,
            encoder.norm,
            config.head_bias if config.num_classes == 1 else 0.0,
            jnp.dtype(config.dtype),
            config.decoder_block,
            config.decoder_blocks,
            config.rematerialize,
            num_distances=0 if config.distance_clip_mm is None else max(1, config.num_classes - 1),
            activation=encoder.act,
            name="decoder",
        )(fused)
        if distance is not None and config.distance_clip_mm is not None:
            distance = config.distance_clip_mm * jnp.tanh(distance)
        of_slices = (logits, deep_logits, tuple(fused), tuple(gates), distance)
        if encoder.apart:
            of_slices = jax.tree.map(partial(slices_together, depth=image.shape[1]), of_slices)
        logits, deep_logits, fused, gates, distance = of_slices
        loss = jnp.stack(losses).mean(0)
        return NetworkOutput(
            logits, deep_logits, features, fused, gates, loss, distance, tuple(weights)
        )

    def _encoder(self, name: str) -> Encoder:
        config = self.config
        return Encoder(config.encoder, jnp.dtype(config.dtype), config.rematerialize, name=name)

    def _encode(
        self,
        inputs: Sequence[Array],
        masks: Sequence[Array | np.ndarray],
        slices: SliceMask | None,
        keys: Keys | None,
    ) -> dict[str, tuple[Array, ...]]:
        """The features of every modality and stage, 0 where it is absent."""
        config = self.config
        shared = self._encoder("encoder") if config.share_encoders else None
        features = {}
        for m, name in enumerate(config.modalities):
            encoder = shared or self._encoder(f"encoder_{name}")
            if keys is not None:
                own = jax.vmap(lambda key, m=m: jax.random.fold_in(key, m))(keys)
            else:
                own = None
            features[name] = tuple(
                jnp.where(masks[m], f, 0) for f in encoder(inputs[m], slices, own)
            )
        return features

    def _fuse(
        self, features: dict[str, tuple[Array, ...]], present: Present, slices: SliceMask | None
    ) -> tuple[list[FusionOutput], list[Array]]:
        """The fusion of every stage, slices apart in 2.5D, and the correlation losses."""
        config = self.config
        encoder, names, dtype = config.encoder, config.modalities, jnp.dtype(config.dtype)
        if encoder.apart:
            depth = features[names[0]][0].shape[1]
            every = jnp.broadcast_to(present[:, None], (present.shape[0], depth, len(names)))
            present = slices_apart(every)
        outputs, losses = [], []
        for stage, channels in enumerate(encoder.channels):
            fusion = config.fusion
            if fusion.kind == "scff" and stage not in config.scff_stages:
                fusion = dataclasses.replace(fusion, kind="concat")
            output = Fusion(channels, names, fusion, dtype, name=f"fusion{stage}")(
                {name: _apart(encoder, features[name][stage]) for name in names}, present
            )
            outputs.append(output)
            if fusion.kind == config.fusion.kind:
                losses.append(_over_slices(output.correlation_loss, slices))
        return outputs, losses


def _apart(encoder: EncoderConfig, feature: Array) -> Array:
    """What fusion and decoder see of a feature: in 2.5D, each slice by itself."""
    return slices_apart(feature) if encoder.apart else feature


def _over_slices(values: Array | None, slices: SliceMask | None) -> Array | None:
    """In 2.5D the mean over the slices that are there, of what fusion has for each; else itself."""
    if values is None or slices is None or values.shape[0] == slices.shape[0]:
        return values
    of_slices = slices_together(values, slices.shape[1])
    there = jnp.asarray(slices).reshape(*slices.shape, *(1,) * (of_slices.ndim - 2))
    return jnp.where(there, of_slices, 0).sum(1) / jnp.maximum(there.sum(1), 1)


def _checked_slices(
    encoder: EncoderConfig, inputs: Sequence[Array], slices: SliceMask | None
) -> SliceMask | None:
    """Which slices each example has; None without attention across slices."""
    if encoder.slices == "none":
        if slices is not None:
            raise ConfigError(
                "a mask of slices is for attention across slices; got one and "
                "encoder.slices none. Leave it out, or use encoder.slices csam or cat."
            )
        return None
    image = jnp.concatenate(inputs, -1)
    encoder.stage_shapes(image.shape[1:-1])
    if slices is None:
        return seen_slices(image)
    if slices.shape != image.shape[:2] or slices.dtype != bool:
        raise ConfigError(
            "slices must be a bool mask with one row for each example and one column for each "
            f"slice; got {slices.dtype} of shape {slices.shape}. Use shape {image.shape[:2]}."
        )
    return slices


def _checked(image: Image, present: Present | None, config: NetworkConfig) -> Present:
    """Which modalities each example has, once image and mask are known to fit the network."""
    if not hasattr(image, "shape"):
        raise ConfigError(
            "the image must be one array with a channel for each modality; "
            f"got {type(image).__name__}. Stack the modalities on the last axis."
        )
    names = config.modalities
    if image.shape[-1] != config.num_channels:
        more = " and one for the prior" if config.prior else ""
        raise ConfigError(
            f"the image must have one channel for each modality {names}{more}; "
            f"got {image.shape[-1]} channels. Stack the modalities on the last axis"
            f"{', and the prior after them' if config.prior else ''}."
        )
    if present is None:
        present = jnp.ones((image.shape[0], len(names)), bool)
    check_present(present, image.shape[0], names)
    return present


def apply(
    network: CMSAD,
    params: PyTree,
    image: Image,
    present: Present | None = None,
    slices: SliceMask | None = None,
    keys: Keys | None = None,
) -> NetworkOutput:
    """``network.apply`` with the weights alone and with the type of what it returns."""
    output = network.apply({"params": params}, image, present, slices, keys)
    assert isinstance(output, NetworkOutput)
    return output


def probabilities_of_distance(
    distance_mm: Float[Array, "b *space f"], width_mm: float
) -> Float[Array, "b *space k"]:
    """Probabilities that are even on the surface, and rise inside over about ``width_mm``.

    ``sigmoid(-distance / width)`` of one class; of several, the softmax of the same scores and of 0
    for the background, which comes first.
    """
    scores = -distance_mm / width_mm
    if scores.shape[-1] == 1:
        return nn.sigmoid(scores)
    return nn.softmax(jnp.concatenate([jnp.zeros_like(scores[..., :1]), scores], -1))


def probabilities(logits: Logits) -> Float[Array, "b *space k"]:
    """Sigmoid of one logit, softmax of several."""
    return nn.sigmoid(logits) if logits.shape[-1] == 1 else nn.softmax(logits)
