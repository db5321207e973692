"""The objective and the train step: pure functions, undecorated.

Source: docs/method.md, sections 3, 6 and 7.

``cmsad_jax.parallel`` compiles the step for one device or many. Every random choice comes from
``batch["key"]``, one key for each example, so results do not depend on batch size or sharding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from cmsad_jax.augmentation import AugmentationConfig, augment
from cmsad_jax.losses import distance, distillation, segmentation
from cmsad_jax.losses.distillation import AttentionConfig, parse_pairs
from cmsad_jax.modules.blocks import resize
from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.modules.network import CMSAD, NetworkConfig, NetworkOutput, apply
from cmsad_jax.modules.slices import seen_slices
from cmsad_jax.types import ConfigError, Labels, Present, check_choices, check_number

Batch = Mapping[str, Shaped[Array | np.ndarray, "b ..."]]
"""``image: b *space m``, ``label: b *space`` (integers), ``present: b m`` (bool) and ``key``: what
is random for each example, ``b 2`` words of uint32 from a host, or ``b`` keys of ``jax.random``.
Where ``labelled: b`` (bool) is there too, examples without a label take part in distillation alone,
by the teachers that need none; whatever ``label`` holds for them is not looked at."""

BATCH = ("image", "label", "present", "key")
"""What a ``Batch`` must hold."""

Metrics = dict[str, Float[Array, ""]]

MAP_DISTANCE = "map_distance"
"""Metric of how far the distilled maps of two examples lie apart, ``losses.map_distance``: NaN in a
batch in which no two have the same modality, and none in a batch of one."""

Teacher = Literal["all", "informed", "label", "fused", "average"]
"""Who teaches maps of attention: other modalities, all of them or only such as are informed, that
is attend to the target more than their pupil; the target; the fused feature; the averaged network,
which sees the modalities that are withheld from the pupil."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The terms of the objective; distillation and correlation of weight 0 are not computed.

    Examples:
        >>> LossConfig(cross_modal_weight=0.5).region
        'dice'
    """

    region: Literal["dice", "tversky"] = "dice"
    """Overlap term."""
    voxel: Literal["cross_entropy", "focal"] = "cross_entropy"
    """Voxel-wise term."""
    region_weight: float = 1.0
    """Weight of the overlap term."""
    voxel_weight: float = 1.0
    """Weight of the voxel-wise term."""
    smooth: float = 0.01
    """Voxels added to both sides of the overlap's fraction; 1 or more can teach to find nothing."""
    tversky_alpha: float = 0.3
    """Tversky: weight of false positives; beside an equal weight of false negatives it is Dice."""
    tversky_beta: float = 0.7
    """Tversky: weight of false negatives; more than that of false positives favours sensitivity."""
    focal_gamma: float = 2.0
    """Focal: how strongly voxels that are right already are passed over; 0 is cross-entropy."""
    focal_alpha: float | None = None
    """Focal: weight of foreground voxels, background having the rest of 1; None weighs all by 1."""
    region_over: segmentation.Over = "example"
    """Overlap of each example, of the whole batch, or of examples that hold target alone."""
    class_weights: tuple[float, ...] | None = None
    """Cross-entropy: weight of each class, background first; None weighs all alike."""
    cross_modal_weight: float = 0.1
    """Weight of the attention distillation between modalities; 0 switches it off."""
    self_weight: float = 0.1
    """Weight of that from deeper to shallower stages of a modality; 0 switches it off."""
    correlation_weight: float = 0.0
    """Weight of SCFF's correlation loss (docs/method.md, section 4); 0 switches it off."""
    attention: AttentionConfig = AttentionConfig()
    stages: tuple[int, ...] | None = None
    """Encoder stages that are distilled, from 0; by default the three deepest."""
    ignored_label: int | None = None
    """Label of voxels that count in no loss; follows from the data."""
    pairs: Literal["mutual"] | tuple[str, ...] = "mutual"
    """Who teaches whom: mutual is every ordered pair; or a list such as 'adc->t2w'."""
    teachers: tuple[Teacher, ...] = ("label", "all")
    """Who teaches: modalities (all, or those informed of the target), label, fused, average."""
    label_weight: float = 0.3
    """Weight of the label's teaching, where it is among the teachers; 0 switches it off."""
    fused_weight: float = 0.1
    """Weight of the fused feature's teaching, where it is among the teachers."""
    average_weight: float = 0.1
    """Weight of the averaged network's maps, where it is among the teachers; see its output."""
    average_output_weight: float = 1.0
    """Weight of its output; it teaches where --train.modality-dropout withholds a modality."""
    distance: Literal["l2", "kl"] = "l2"
    """Distance between maps; kl needs --loss.attention.normalization=softmax."""
    reduction: Literal["sum", "mean"] = "sum"
    """Of the distance over voxels; the mean shrinks as maps grow, and its weight must make up."""
    stop_gradient: bool = True
    """Whether a teacher learns nothing of its student; the label and the average never learn."""
    distance_weight: float = 1.0
    """Weight of the error of the signed distance in units of its clip, where it is learnt."""
    warmup_steps: int = 100
    """Steps over which the distillation and correlation weights rise from 0; 0 has none."""
    deep_weight: float = 0.5
    """Weight of each coarser output relative to the next finer one."""

    def __post_init__(self):
        check_choices(self)
        for name, usual in vars(LossConfig).items():
            if name.endswith("_weight") or name in ("tversky_alpha", "tversky_beta", "focal_gamma"):
                check_number(name, getattr(self, name), least=0, usual=usual)
        check_number("smooth", self.smooth, least=0, usual=0.01, above=True)
        check_number("warmup_steps", self.warmup_steps, least=0, usual=100, whole=True)
        if self.focal_alpha is not None:
            check_number("focal_alpha", self.focal_alpha, least=0, usual=0.25)
            check_number("1 - focal_alpha", 1 - self.focal_alpha, least=0, usual=0.75)
        if not isinstance(self.attention, AttentionConfig):
            raise ConfigError(
                f"attention must be an AttentionConfig; got {self.attention!r:.80}. "
                "Use attention=AttentionConfig()."
            )
        if self.region_weight == self.voxel_weight == 0:
            raise ConfigError(
                "an objective must hold a segmentation loss; got region_weight 0 and voxel_weight "
                "0. Raise one of them."
            )
        if {"all", "informed"} <= {*self.teachers}:
            raise ConfigError(
                "teachers must be all or informed, not both: all lets every term count; "
                f"got {self.teachers}. Leave out one of the two."
            )
        distillation.check_distance(self.distance, self.attention, self.reduction)
        distillation.check_pairs(self.pairs)
        if self.stages is not None:
            distillation.check_stages(self.stages)

    def check(self, network: NetworkConfig) -> None:
        """Whether the objective has all its terms with this network; before any data are read.

        Raises:
            ConfigError: a term that is switched on could never have an effect, or names stages or
                modalities that the network does not have.
        """
        stages = self.distilled_stages(network.encoder.num_stages)
        kind, names, teachers = network.fusion.kind, network.modalities, {*self.teachers}
        distils = {
            "cross-modal-weight": self.taught_by_modalities,
            "self-weight": self.self_weight,
            "label-weight": "label" in teachers and self.label_weight,
            "fused-weight": "fused" in teachers and self.fused_weight,
        }
        on = [f"--loss.{name}=0" for name, weight in distils.items() if weight]
        if kind == "early" and on:
            raise ConfigError(
                "distillation needs an encoder for each modality; got the fusion early, which has "
                f"one for all. Use {' '.join(on)}, or another --network.fusion.kind."
            )
        if self.taught_by_modalities:
            parse_pairs(self.pairs, names)
        if self.self_weight and set(stages) == {network.encoder.num_stages - 1}:
            raise ConfigError(
                "self distillation needs a stage that has a deeper one to learn from; got stages "
                f"{stages} of {network.encoder.num_stages}. Use --loss.self-weight=0, or add a "
                "shallower stage to loss.stages."
            )
        if self.correlation_weight and (kind != "scff" or len(names) == 1):
            raise ConfigError(
                "the correlation loss needs the fusion scff of two or more modalities; "
                f"got {kind} of {', '.join(names)}. Use --loss.correlation-weight=0."
            )
        if network.distance_clip_mm is not None and not self.distance_weight:
            raise ConfigError(
                "a distance is learnt from its loss; got a distance_clip_mm of "
                f"{network.distance_clip_mm:g} and a weight of 0. Use --loss.distance-weight=1.0, "
                "or --network.distance-clip-mm None."
            )
        if network.distance_clip_mm is not None and self.ignored_label is not None:
            raise ConfigError(
                "a distance to the surface is not known where voxels are to be ignored; got a "
                f"distance_clip_mm of {network.distance_clip_mm:g} and labels with such voxels. "
                "Use labels without them, or --network.distance-clip-mm None."
            )
        if self.region == "tversky" and self.tversky_alpha == self.tversky_beta == 0.5:
            raise ConfigError(
                "Tversky with equal weights of false positives and false negatives is Dice; got "
                "tversky_alpha 0.5 and tversky_beta 0.5. Use --loss.region=dice, or "
                "--loss.tversky-alpha=0.3 --loss.tversky-beta=0.7."
            )

    def without_effect(self, network: NetworkConfig) -> list[str]:
        """One sentence for each setting that was changed and that this objective does not use.

        Also for the terms that a network of one modality cannot have. Nothing here is wrong: rows
        of an ablation keep the settings of what they switch off.
        """
        said = [
            f"{root}.{setting} has no effect, as {why}."
            for root, config, idle in (
                ("loss", self, self._idle_loss_settings(network)),
                ("network", network, self._idle_network_settings(network)),
            )
            for why, settings in idle
            for setting in settings
            if _is_changed(config, setting)
        ]
        if self.taught_by_modalities and len(network.modalities) == 1:
            said.append(
                f"There is no cross-modal distillation, as {network.modalities[0]} is the only "
                "modality."
            )
        return said

    def _idle_loss_settings(self, network: NetworkConfig) -> Iterator[tuple[str, Sequence[str]]]:
        """Why, and which, settings of the objective change nothing with this network."""
        if not (self.distils_maps or self.taught_by_average):
            of_maps = ("stages", "teachers", "distance", "reduction", "stop_gradient", "attention")
            yield "nothing is distilled", of_maps
        if not self.taught_by_modalities:
            yield "no modality teaches another", ["pairs"]
        of_teachers = {
            "label": ("label_weight",),
            "fused": ("fused_weight",),
            "average": ("average_weight", "average_output_weight"),
        }
        for teacher, weights in of_teachers.items():
            if teacher not in self.teachers:
                yield (
                    f"loss.teachers lacks {teacher}",
                    [weight for weight in weights if getattr(self, weight)],
                )
        if self.region != "tversky":
            yield f"loss.region is {self.region}", ["tversky_alpha", "tversky_beta"]
        if self.voxel != "focal":
            yield f"loss.voxel is {self.voxel}", ["focal_gamma", "focal_alpha"]
        if self.voxel != "cross_entropy":
            yield f"loss.voxel is {self.voxel}", ["class_weights"]
        normalization = self.attention.normalization
        if normalization != "softmax":
            yield f"loss.attention.normalization is {normalization}", ["attention.temperature"]
        if network.distance_clip_mm is None:
            yield "network.distance_clip_mm is None", ["distance_weight"]
        if not network.deep_supervision:
            yield "network.deep_supervision is 0", ["deep_weight"]

    def _idle_network_settings(self, network: NetworkConfig) -> Iterator[tuple[str, Sequence[str]]]:
        """Why, and which, settings of the network change nothing under this objective."""
        kind = network.fusion.kind
        if kind not in ("scff", "weighted"):
            yield f"network.fusion.kind is {kind}", ["fusion.hidden"]
        if kind != "scff":
            of_scff = ("expression", "gate_identity", "stages")
            yield f"network.fusion.kind is {kind}", [f"fusion.{name}" for name in of_scff]
        if not self.correlation_weight:
            of_correlation = ("correlation_direction", "correlation_stop_gradient")
            yield "loss.correlation_weight is 0", [f"fusion.{name}" for name in of_correlation]
        if kind in ("mean", "max", "early"):
            yield f"network.fusion.kind is {kind}", ["fusion.residual"]
        if kind not in ("scff", "attention"):
            yield f"network.fusion.kind is {kind}", ["fusion.gate_kernel"]
        if kind == "early":
            yield f"network.fusion.kind is {kind}", ["share_encoders"]
        if network.num_classes > 1:
            yield "there are several classes", ["head_bias"]
        yield from _idle_slice_settings(network.encoder)

    @property
    def taught_by_modalities(self) -> bool:
        """Whether modalities teach one another."""
        return bool(self.cross_modal_weight and {*self.teachers} & {"all", "informed"})

    @property
    def taught_by_average(self) -> bool:
        """Whether the averaged network teaches, in a second forward pass."""
        weights = (self.average_weight, self.average_output_weight)
        return "average" in self.teachers and any(weights)

    @property
    def distils_maps(self) -> bool:
        """Whether any map of attention is taught."""
        teachers = {*self.teachers}
        return bool(
            self.self_weight
            or self.taught_by_modalities
            or (self.label_weight and "label" in teachers)
            or (self.fused_weight and "fused" in teachers)
            or (self.average_weight and "average" in teachers)
        )

    def distilled_stages(self, num_stages: int) -> tuple[int, ...]:
        """The stages that are distilled, checked against the encoder's."""
        stages = tuple(range(num_stages))[-3:] if self.stages is None else self.stages
        if any(not 0 <= stage < num_stages for stage in stages):
            raise ConfigError(
                f"distilled stages must be among the encoder's 0 to {num_stages - 1}; "
                f"got {stages}. Set loss.stages to existing stages."
            )
        return stages


def _idle_slice_settings(encoder: EncoderConfig) -> Iterator[tuple[str, Sequence[str]]]:
    """Why, and which, settings of attention across slices change nothing."""
    of_csam, of_cat = ("reduction", "kernel", "expansion", "sampling"), ("heads", "pooling")
    idle = {"none": ("stages", *of_csam, "rank", *of_cat), "csam": of_cat, "cat": of_csam}
    why = f"network.encoder.slices is {encoder.slices}"
    yield why, [f"encoder.slice_attention.{name}" for name in idle[encoder.slices]]
    if encoder.slices != "none" and not encoder.draws:
        yield "no attention across slices is drawn", ["encoder.slice_attention.rank"]


def _is_changed(config: Any, setting: str) -> bool:
    """Whether a setting, named by its path in ``config``, is other than its default."""
    *path, name = setting.split(".")
    owner = reduce(getattr, path, config)
    return getattr(owner, name) != getattr(type(owner), name)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser under a warm-up and a decay of its learning rate, with clipped gradients.

    Examples:
        >>> schedule = OptimizerConfig(learning_rate=1e-3).schedule(100)
        >>> float(schedule(0)) < float(schedule(5))
        True
    """

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    """Adam with decoupled weight decay, Adam, or gradient descent with momentum."""
    learning_rate: float = 5e-3
    """The highest, at the end of the warm-up."""
    weight_decay: float = 1e-4
    """AdamW: share of a weight taken off a step, times the learning rate; else an L2 penalty."""
    beta1: float = 0.9
    """AdamW, Adam: decay a step of the mean of the gradients."""
    beta2: float = 0.999
    """AdamW, Adam: decay a step of the mean of their squares."""
    epsilon: float = 1e-8
    """AdamW, Adam: added to the root of the mean of the squares."""
    momentum: float = 0.9
    """SGD: decay a step of the sum of the gradients."""
    nesterov: bool = False
    """SGD: look ahead along the momentum."""
    decay: Literal["cosine", "polynomial", "steps", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; cosine and polynomial reach 0 at the end."""
    decay_power: float = 0.9
    """Polynomial: power of the share of steps that is left."""
    decay_milestones: tuple[float, ...] = (0.5, 0.75)
    """Steps: shares of all steps after which it falls."""
    decay_factor: float = 0.1
    """Steps: by which the learning rate is multiplied there."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self):
        check_choices(self)
        for name, above in (
            ("momentum", False),
            ("epsilon", True),
            ("decay_power", True),
            ("decay_factor", True),
        ):
            usual = getattr(OptimizerConfig, name)
            check_number(name, getattr(self, name), least=0, usual=usual, above=above)
        for name in ("beta1", "beta2"):
            value, usual = getattr(self, name), getattr(OptimizerConfig, name)
            check_number(name, value, least=0, usual=usual)
            check_number(f"1 - {name}", 1 - value, least=0, usual=1 - usual, above=True)
        if not all(0 < share < 1 for share in self.decay_milestones):
            raise ConfigError(
                "decay_milestones must be shares of the steps between 0 and 1; "
                f"got {self.decay_milestones}. Use for example (0.5, 0.75)."
            )

    def schedule(self, num_steps: int) -> optax.Schedule:
        """Learning rate at each of ``num_steps`` steps."""
        warmup = max(1, round(self.warmup_fraction * num_steps))
        total = max(num_steps, warmup + 1)
        if self.decay == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, total)
        if self.decay == "polynomial":
            after = optax.polynomial_schedule(
                self.learning_rate, 0.0, self.decay_power, total - warmup
            )
        else:
            milestones = self.decay_milestones if self.decay == "steps" else ()
            factors = {max(1, round(m * total) - warmup): self.decay_factor for m in milestones}
            after = optax.piecewise_constant_schedule(self.learning_rate, factors)
        rise = optax.linear_schedule(0.0, self.learning_rate, warmup)
        return optax.join_schedules([rise, after], [warmup])

    def optimizer(self, num_steps: int) -> optax.GradientTransformation:
        """The Optax transformation for a run of ``num_steps`` steps."""
        schedule = self.schedule(num_steps)
        of_adam: dict[str, Any] = {"b1": self.beta1, "b2": self.beta2, "eps": self.epsilon}
        if self.kind == "adamw":
            steps = [optax.adamw(schedule, weight_decay=self.weight_decay, **of_adam)]
        else:
            plain = (
                optax.adam(schedule, **of_adam)
                if self.kind == "adam"
                else optax.sgd(schedule, momentum=self.momentum, nesterov=self.nesterov)
            )
            steps = [optax.add_decayed_weights(self.weight_decay), plain]
        # Flat: all weights are one array. A kernel for each of hundreds takes longer to compile, to
        # load and to launch than it runs.
        return optax.flatten(optax.chain(optax.clip_by_global_norm(self.clip_norm), *steps))


@struct.dataclass
class TrainState:
    """What a training run carries from step to step.

    The fields are typed as trees because JAX and Orbax rebuild a state around placeholders.

    Attributes:
        step: number of updates made, an int32 scalar.
        params: float32 master weights.
        average: their exponential moving average; equal to ``params`` where the decay is 0.
        opt_state: Optax state.

    Examples:
        >>> TrainState(step=jnp.asarray(3), params={}, average={}, opt_state=()).step
        Array(3, dtype=int32, weak_type=True)
    """

    step: PyTree
    params: PyTree
    average: PyTree
    opt_state: PyTree


# The program of all random draws runs once a fold. Optimising it took a CPU longer than compiling
# the train step.
@partial(
    jax.jit,
    static_argnums=(0, 1),
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
def _draw_params(network: CMSAD, image_shape: tuple[int, ...], key: Array) -> PyTree:
    return network.init(key, jnp.zeros(image_shape))["params"]


def init_state(
    network: CMSAD,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    *,
    key: Array,
) -> TrainState:
    """Fresh state for images of ``image_shape`` (``b *space m``); equal keys give equal weights.

    Call it outside ``jit``: it compiles programs of its own, once for each network and shape.

    Examples:
        >>> encoder = EncoderConfig((4,), ((3, 3, 3),), ((1, 1, 1),), (1,))
        >>> network = CMSAD(NetworkConfig(encoder=encoder, deep_supervision=0))
        >>> optimizer = OptimizerConfig().optimizer(100)
        >>> state = init_state(network, optimizer, (1, 4, 8, 8, 3), key=jax.random.key(0))
        >>> sorted(state.params)
        ['decoder', 'encoder_adc', 'encoder_hbv', 'encoder_t2w', 'fusion0']
    """
    return _first_state(optimizer, _draw_params(network, tuple(image_shape), key))


@partial(jax.jit, static_argnums=0)
def _first_state(optimizer: optax.GradientTransformation, params: PyTree) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def drop_modalities(
    present: Present, *, keys: Shaped[Array, " b"], rate: float
) -> Bool[Array, "b m"]:
    """Mark each present modality absent with probability ``rate``, always keeping one.

    The one that is kept is drawn uniformly from those present.
    """

    def one(mask, key):
        drop_key, keep_key = jax.random.split(key)
        kept = mask & ~jax.random.bernoulli(drop_key, rate, mask.shape)
        score = jnp.where(mask, jax.random.uniform(keep_key, mask.shape), -1.0)
        survivor = jnp.arange(mask.size) == jnp.argmax(score)
        return jnp.where(kept.any(), kept, mask & survivor)

    return jax.vmap(one)(present, keys)


def segmentation_terms(
    output: NetworkOutput,
    labels: Labels,
    config: LossConfig,
    *,
    labelled: Bool[Array | np.ndarray, " b"] | None = None,
    axis_name: str | None = None,
) -> dict[str, Float[Array, " b"]]:
    """Overlap and voxel-wise loss per example, averaged over the supervised outputs.

    Coarser logits are resized to the labels' grid, so that small lesions are not lost. ``labelled``
    says which examples have a label, None that all have; the others' values are 0. Voxels of
    ``config.ignored_label`` count in none.
    """
    counted = None
    if config.ignored_label is not None:
        counted = labels != config.ignored_label
        labels = jnp.where(counted, labels, 0)
    tversky = partial(
        segmentation.tversky_loss, alpha=config.tversky_alpha, beta=config.tversky_beta
    )
    region = partial(
        {"dice": segmentation.dice_loss, "tversky": tversky}[config.region],
        smooth=config.smooth,
        over=config.region_over,
        labelled=labelled,
        counted=counted,
        axis_name=axis_name,
    )
    entropy = partial(segmentation.cross_entropy_loss, class_weights=config.class_weights)
    focal = partial(segmentation.focal_loss, gamma=config.focal_gamma, alpha=config.focal_alpha)
    voxel = {"cross_entropy": entropy, "focal": focal}[config.voxel]
    outputs = [output.logits, *(resize(deep, labels.shape[1:]) for deep in output.deep_logits)]
    weights = [config.deep_weight**i for i in range(len(outputs))]
    none = jnp.zeros(labels.shape[0])
    terms = {f"{config.region}_loss": none, f"{config.voxel}_loss": none}
    for weight, logits in zip(weights, outputs, strict=True):
        share = weight / sum(weights)
        terms[f"{config.region}_loss"] += share * region(logits, labels)
        of_voxels = voxel(logits, labels, counted=counted)
        if labelled is not None:
            of_voxels = jnp.where(labelled, of_voxels, 0.0)
        terms[f"{config.voxel}_loss"] += share * of_voxels
    return terms


def distillation_terms(
    output: NetworkOutput,
    labels: Labels,
    present: Present,
    config: LossConfig,
    *,
    modalities: tuple[str, ...],
    labelled: Bool[Array | np.ndarray, " b"] | None = None,
    average: NetworkOutput | None = None,
    withheld: Bool[Array, " b"] | None = None,
) -> dict[str, tuple[float, Float[Array, " b"]]]:
    """What each teacher that is switched on has to teach: name to (weight, value per example).

    The arguments are those of ``loss_terms``.
    """
    terms: dict[str, tuple[float, Array]] = {}
    target, known = _targets(labels, labelled, config.ignored_label)
    teachers = {*config.teachers}
    maps: dict[str, Any] = {
        "attention": config.attention,
        "stages": config.distilled_stages(len(output.fused)),
        "distance": config.distance,
        "reduction": config.reduction,
        "present": present,
        "modalities": modalities,
    }
    between = {
        **maps,
        "stop_gradient": config.stop_gradient,
        "foreground": target if "informed" in teachers else None,
    }
    if config.taught_by_modalities and len(output.features) > 1:
        value = distillation.cross_modal_distillation_loss(
            output.features, pairs=config.pairs, **between
        )
        terms["cross_modal_distillation_loss"] = (config.cross_modal_weight, value)
    if config.self_weight and output.features:
        value = distillation.self_distillation_loss(output.features, **between)
        terms["self_distillation_loss"] = (config.self_weight, value)
    if "label" in teachers and config.label_weight and output.features:
        value = distillation.label_distillation_loss(output.features, known, **maps)
        terms["label_distillation_loss"] = (config.label_weight, value)
    if "fused" in teachers and config.fused_weight and output.features:
        value = distillation.fused_distillation_loss(
            output.features, output.fused, stop_gradient=config.stop_gradient, **maps
        )
        terms["fused_distillation_loss"] = (config.fused_weight, value)
    if average is not None and withheld is not None:
        if config.average_weight:
            value = distillation.average_distillation_loss(
                output.features, output.fused, average.fused, withheld=withheld, **maps
            )
            terms["average_distillation_loss"] = (config.average_weight, value)
        if config.average_output_weight:
            value = distillation.output_distillation_loss(
                output.logits, average.logits, withheld=withheld
            )
            terms["output_distillation_loss"] = (config.average_output_weight, value)
    return terms


def _targets(
    labels: Labels, labelled: Bool[Array | np.ndarray, " b"] | None, ignored_label: int | None
) -> tuple[Bool[Array, "b *space"], Bool[Array, "b *space"]]:
    """The target of the examples with a label, and of those of which no voxel is to be ignored.

    A map of attention is of a whole example: the others cannot say where it should lie.
    """
    target, axes = jnp.asarray(labels > 0), tuple(range(1, labels.ndim))
    if labelled is not None:
        target &= jnp.expand_dims(labelled, axes)
    if ignored_label is None:
        return target, target
    ignored = labels == ignored_label
    return target & ~ignored, target & ~ignored & ~ignored.any(axes, keepdims=True)


def loss_terms(
    output: NetworkOutput,
    labels: Labels,
    present: Present,
    *,
    config: LossConfig,
    modalities: tuple[str, ...],
    labelled: Bool[Array | np.ndarray, " b"] | None = None,
    average: NetworkOutput | None = None,
    withheld: Bool[Array, " b"] | None = None,
    clip_mm: float | None = None,
    spacing_mm: Sequence[float] | None = None,
    axis_name: str | None = None,
) -> dict[str, tuple[float, bool, Float[Array, " b"]]]:
    """Every term that is switched on: name to (weight, whether it warms up, value per example).

    Args:
        output: of the network in training.
        labels: of the examples.
        present: what the network saw of each example.
        config: which terms.
        modalities: names of the columns of ``present``.
        labelled: which examples have a label; None is all.
        average: what the averaged network made of all modalities there are, if it teaches.
        withheld: in which examples it saw more than the network.
        clip_mm: largest distance, where the network learns it.
        spacing_mm: size of a voxel along each axis of space, for distances.
        axis_name: the mapped axis over which the batch is split.
    """
    terms: dict[str, tuple[float, bool, Array]] = {}
    weights = (config.region_weight, config.voxel_weight)
    of_segmentation = segmentation_terms(
        output, labels, config, labelled=labelled, axis_name=axis_name
    )
    for weight, (name, value) in zip(weights, of_segmentation.items(), strict=True):
        terms[name] = (weight, False, value)
    if output.distance_mm is not None and clip_mm is not None:
        value = distance.distance_loss(
            output.distance_mm, labels, spacing_mm=_known(spacing_mm), clip_mm=clip_mm
        )
        value = value if labelled is None else jnp.where(labelled, value, 0.0)
        terms["distance_loss"] = (config.distance_weight, False, value)
    of_distillation = distillation_terms(
        output,
        labels,
        present,
        config,
        modalities=modalities,
        labelled=labelled,
        average=average,
        withheld=withheld,
    )
    for name, (weight, value) in of_distillation.items():
        terms[name] = (weight, True, value)
    if config.correlation_weight and any(gates is not None for gates in output.gates):
        terms["correlation_loss"] = (config.correlation_weight, True, output.correlation_loss)
    return terms


def _known(spacing_mm: Sequence[float] | None) -> Sequence[float]:
    """The size of a voxel, which distances are measured by."""
    if spacing_mm is None:
        raise ConfigError(
            "a signed distance needs the size of a voxel; got no spacing_mm. "
            "Pass for example spacing_mm=(3.0, 0.5, 0.5) to the train step."
        )
    return spacing_mm


def loss_fn(
    params: PyTree,
    batch: Batch,
    step: Array,
    *,
    network: CMSAD,
    config: LossConfig,
    average: PyTree | None = None,
    spacing_mm: Sequence[float] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean objective of a batch, and the mean of every term under its own name (unweighted).

    Args:
        params: the weights.
        batch: what the network sees; where the averaged network teaches also ``available``, the
            modalities that are there, of which ``present`` leaves some out. With attention across
            slices also ``slices``, those that are there, and where it is drawn ``drawn``, a key of
            ``jax.random`` for each example.
        step: sets the warm-up of the distillation terms.
        network: the model.
        config: terms and weights.
        average: weights of the averaged network.
        spacing_mm: size of a voxel along each axis of space, where distances are learnt.
        axis_name: the mapped axis over which the batch is split.
    """
    config.check(network.config)
    present = batch["present"]
    slices, drawn = batch.get("slices"), batch.get("drawn")
    drawn = None if drawn is None else jnp.asarray(drawn)
    output = apply(network, params, batch["image"], present, slices, drawn)
    taught, withheld = None, None
    if config.taught_by_average:
        available = batch["available"]
        withheld = jnp.any(available & ~present, -1)
        seen = apply(network, average, batch["image"], available, slices)
        taught = jax.lax.stop_gradient(seen)
    ramp = jnp.minimum(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    total, metrics = jnp.zeros(()), {}
    for name, (weight, warms_up, value) in loss_terms(
        output,
        batch["label"],
        present,
        config=config,
        modalities=network.config.modalities,
        labelled=batch.get("labelled"),
        average=taught,
        withheld=withheld,
        clip_mm=network.config.distance_clip_mm,
        spacing_mm=spacing_mm,
        axis_name=axis_name,
    ).items():
        metrics[name] = value.mean()
        total += weight * (ramp if warms_up else 1.0) * metrics[name]
    metrics = {"loss": total, **metrics}
    if config.distils_maps and output.features and len(present) > 1:
        metrics[MAP_DISTANCE] = distillation.map_distance(
            output.features,
            attention=config.attention,
            stages=config.distilled_stages(len(output.fused)),
            present=present,
            modalities=network.config.modalities,
        )
    return total, metrics


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    network: CMSAD,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    augmentation: AugmentationConfig | None = None,
    modality_dropout: float = 0.0,
    average_decay: float = 0.0,
    accumulation: int = 1,
    rolled: bool = False,
    spacing_mm: Sequence[float] | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update: augment, differentiate, clip, step, average.

    Weights, their gradients, moments and average are float32 whatever the network computes in, and
    so is the one sum of the gradients over devices.
    Where the loss or the norm of its gradient is not finite, the state stays as it was.

    Args:
        state: before the step.
        batch: ``image`` (``b *space m``), ``label`` (integers ``b *space``), ``present`` (bool
            ``b m``, all True where nothing lacks) and ``key``, one for each example: typed keys
            ``b``, as of ``jax.random.split``, or two words of uint32 each, ``b 2``.
        network: the model.
        optimizer: as made by ``OptimizerConfig.optimizer``.
        loss: terms and weights.
        augmentation: random changes of image and label, or None.
        modality_dropout: probability with which each modality is withheld from an example.
        average_decay: of the moving average of the weights, ramped up over the first steps; 0
            keeps no average.
        accumulation: parts into which the batch is cut; their gradients are averaged, so that
            only one part's activations are in memory. The result is that of the whole batch, but
            for an overlap over the batch, which is then taken over each part.
        rolled: loop over the parts inside the program. Compiles once for any number of them, but
            XLA's convolutions are 14 to 34 times slower in a rolled loop on CPUs.
        spacing_mm: size of a voxel along each axis of space, where distances are learnt.
        axis_name: the mapped axis over which gradients are averaged (as in
            ``cmsad_jax.parallel``).

    Returns:
        The next state, and the mean of the loss and of each term, with ``gradient_norm`` and
        ``skipped`` (1 where nothing was updated, else 0).

    Raises:
        ConfigError: if the batch lacks an entry, has other keys, or cannot be cut into equal parts.

    Examples:
        >>> encoder = EncoderConfig((4,), ((3, 3, 3),), ((1, 1, 1),), (1,))
        >>> network = CMSAD(NetworkConfig(encoder=encoder, deep_supervision=0))
        >>> optimizer = OptimizerConfig().optimizer(100)
        >>> state = init_state(network, optimizer, (1, 4, 8, 8, 3), key=jax.random.key(0))
        >>> batch = {
        ...     "image": np.ones((1, 4, 8, 8, 3), np.float32),
        ...     "label": np.ones((1, 4, 8, 8), np.int32),
        ...     "present": np.ones((1, 3), bool),
        ...     "key": np.ones((1, 2), np.uint32),
        ... }
        >>> loss = LossConfig(self_weight=0.0)
        >>> step = functools.partial(train_step, network=network, optimizer=optimizer, loss=loss)
        >>> state, metrics = jax.jit(step)(state, batch)
        >>> int(state.step), bool(metrics["loss"] > 0)
        (1, True)
    """
    batch = dict(batch)
    if lacking := [name for name in BATCH if name not in batch]:
        raise ConfigError(
            f"a batch must hold {', '.join(BATCH)}; got {', '.join(batch)}. "
            f"Add {', '.join(lacking)}; present is all True where no modality lacks."
        )
    batch = _drawn(
        batch,
        encoder=network.config.encoder,
        augmentation=augmentation,
        modality_dropout=modality_dropout,
        keep_available=loss.taught_by_average,
    )
    differentiate = partial(
        jax.grad(loss_fn, has_aux=True),
        network=network,
        config=loss,
        average=state.average,
        spacing_mm=spacing_mm,
        axis_name=axis_name,
    )
    gradient, metrics = _mean_over_parts(
        lambda part: differentiate(state.params, part, state.step), batch, accumulation, rolled
    )
    # As the optimizer has it: one sum over devices, and one over weights for the norm.
    flat, unravel = ravel_pytree(gradient)
    if axis_name is not None:
        flat, metrics = jax.lax.pmean((flat, metrics), axis_name)
        gradient = unravel(flat)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = params
    if average_decay:
        # Early averages would remember the random start: begin short, lengthen.
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
    updated = TrainState(state.step + 1, params, average, opt_state)
    metrics["gradient_norm"] = jnp.linalg.norm(flat)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    metrics["skipped"] = 1.0 - finite
    return jax.tree.map(partial(jnp.where, finite), updated, state), metrics


def _drawn(
    batch: Batch,
    *,
    encoder: EncoderConfig,
    augmentation: AugmentationConfig | None,
    modality_dropout: float,
    keep_available: bool,
) -> Batch:
    """The batch with everything random drawn, in place of its keys: what ``loss_fn`` takes."""
    batch = dict(batch)
    own = _typed(batch.pop("key"))
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(own)
    batch |= _of_slices(batch, encoder, own)
    if augmentation is not None:
        batch["image"], batch["label"] = augment(
            batch["image"],
            batch["label"],
            present=batch["present"],
            keys=keys[:, 0],
            config=augmentation,
        )
    if keep_available:
        batch["available"] = batch["present"]
    if modality_dropout:
        batch["present"] = drop_modalities(batch["present"], keys=keys[:, 1], rate=modality_dropout)
    return batch


def _of_slices(
    batch: Batch, encoder: EncoderConfig, keys: Shaped[Array, " b"]
) -> dict[str, Shaped[Array, "b ..."]]:
    """What attention across slices needs of a batch that is not augmented yet."""
    if encoder.slices == "none":
        return {}
    present = batch["present"].reshape(len(batch["present"]), 1, 1, 1, -1)
    image = batch["image"][..., : present.shape[-1]]
    found = {"slices": seen_slices(jnp.where(present, image, 0))}
    if encoder.draws:
        found["drawn"] = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
    return found


def _typed(keys: Shaped[Array | np.ndarray, "b ..."]) -> Shaped[Array, " b"]:
    """Keys of ``jax.random`` from what a batch holds."""
    keys = jnp.asarray(keys)
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys
    if keys.dtype != jnp.uint32 or keys.shape[1:] != (2,):
        raise ConfigError(
            "key must hold a key of jax.random for each example, or two uint32 words; got "
            f"{keys.dtype} of shape {keys.shape}. Use jax.random.split(key, batch_size)."
        )
    # two words each, whatever generator JAX is set to
    return jax.vmap(partial(jax.random.wrap_key_data, impl="threefry2x32"))(keys)


def _mean_over_parts(
    function: Callable[[Batch], PyTree], batch: Batch, num_parts: int, rolled: bool
) -> PyTree:
    """Mean of ``function`` over equal parts of the batch, one after the other."""
    size = len(jax.tree.leaves(batch)[0])
    if num_parts < 1 or size % num_parts:
        raise ConfigError(
            "the batch of each device must be divisible by train.accumulation; "
            f"got {size} and {num_parts}. Use --train.accumulation=1 or a divisor of the batch."
        )
    if num_parts == 1:
        return function(batch)
    # Part i is every num_parts-th example: sharded over devices, each has its share in every part.
    parts = jax.tree.map(lambda x: x.reshape(size // num_parts, num_parts, *x.shape[1:]), batch)
    first = function(jax.tree.map(lambda x: x[:, 0], parts))

    def add(total, part):
        # The barrier keeps the parts from being computed at once, which would need all memory.
        part, total = jax.lax.optimization_barrier((part, total))
        return jax.tree.map(jnp.add, total, function(part)), None

    if rolled:
        others = jax.tree.map(lambda x: jnp.moveaxis(x[:, 1:], 1, 0), parts)
        total, _ = jax.lax.scan(add, first, others)
    else:
        total = first
        for i in range(1, num_parts):
            total, _ = add(total, jax.tree.map(lambda x, i=i: x[:, i], parts))
    return jax.tree.map(lambda x: x / num_parts, total)


def train_steps(
    state: TrainState,
    batches: Batch,
    *,
    step: Callable[..., tuple[TrainState, Metrics]],
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Float[Array, " steps"]]]:
    """Several updates in one program, so that an accelerator does not wait for its host.

    Args:
        state: before the first step.
        batches: as many batches as steps, stacked along a new first axis.
        step: ``train_step`` with its options bound.
        axis_name: handed to ``step``.

    Returns:
        The state after the last step, and the metrics of every step.
    """
    return jax.lax.scan(partial(step, axis_name=axis_name), state, batches)
